"""Which linear layers of a model are cut by their outputs and which by their inputs, for tensor parallelism.

The outputs of one (queries, keys and values; the wide side of an MLP) are the inputs of another, and between the two
nothing is exchanged. Most Hugging Face models say it of themselves; the table has others. (An embedding within the
layers, as T5's position bias with a number for each head, is a linear layer of one-hot inputs.)
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Style:
    """By which side a linear layer is cut; `parts` as large as each other lie end to end there, each cut alike."""

    side: Literal["out", "in"]
    parts: int = 1


COLWISE, ROWWISE = Style("out"), Style("in")
T5_LAYER = {
    "SelfAttention.q": COLWISE,
    "SelfAttention.k": COLWISE,
    "SelfAttention.v": COLWISE,
    "SelfAttention.o": ROWWISE,
    "SelfAttention.relative_attention_bias": COLWISE,
    "EncDecAttention.q": COLWISE,
    "EncDecAttention.k": COLWISE,
    "EncDecAttention.v": COLWISE,
    "EncDecAttention.o": ROWWISE,
    "DenseReluDense.wi": COLWISE,
    "DenseReluDense.wi_0": COLWISE,
    "DenseReluDense.wi_1": COLWISE,
    "DenseReluDense.wo": ROWWISE,
}
# Names of modules below the base model, numbers as *.
PLANS: dict[str, dict[str, Style]] = {
    "bert": {
        "encoder.layer.*.attention.self.query": COLWISE,
        "encoder.layer.*.attention.self.key": COLWISE,
        "encoder.layer.*.attention.self.value": COLWISE,
        "encoder.layer.*.attention.output.dense": ROWWISE,
        "encoder.layer.*.intermediate.dense": COLWISE,
        "encoder.layer.*.output.dense": ROWWISE,
    },
    "gpt2": {
        "h.*.attn.c_attn": Style("out", parts=3),
        "h.*.attn.c_proj": ROWWISE,
        "h.*.mlp.c_fc": COLWISE,
        "h.*.mlp.c_proj": ROWWISE,
    },
    "t5": {
        f"{stack}.block.*.layer.*.{name}": style
        for stack in ("encoder", "decoder")
        for name, style in T5_LAYER.items()
    },
}
# What modules remember of the width that they are cut in, and would cut the outputs by.
WIDTHS: dict[str, tuple[str, ...]] = {"gpt2": ("split_size",), "t5": ("n_heads", "inner_dim")}
# The ends of the names of dropouts between the linear layers of a pair, which see a part of the width.
BETWEEN: dict[str, tuple[str, ...]] = {"t5": ("DenseReluDense.dropout",)}
# The words of Hugging Face; None: nothing of it is cut.
STYLES: dict[str, Style | None] = {
    "colwise": COLWISE,
    "rowwise": ROWWISE,
    "replicated_with_grad_allreduce": None,
}


class Unknown(Exception):
    """The part of a model that cannot be cut."""


def plan(model: nn.Module, layers: list[nn.Module]) -> dict[nn.Module, Style]:
    """The style of every linear layer within the `layers` of a model. Raises Unknown, which names one without."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    named = _named(model, kind)
    within = {id(module) for layer in layers for module in layer.modules()}
    found = {}
    for name, module in model.named_modules():
        if id(module) not in within:
            continue
        style = named.get(re.sub(r"\.\d+(?=\.)", ".*", name))
        if isinstance(style, str):
            if style not in STYLES:
                raise Unknown(f"{name} of {kind} is cut in a way that is not there: {style}")
            style = STYLES[style]
        if style is not None:
            found[module] = style
        elif isinstance(module, nn.Linear | Conv1D | nn.Embedding | nn.RNNBase):
            raise Unknown(f"no plan says how to cut {name} of {kind}")
    if not found:
        raise Unknown(f"no plan says how to cut a model of type {kind}")
    return found


def out_dim(module: nn.Module) -> int:
    """The dim of a linear layer's weight that is its outputs."""
    return 1 if isinstance(module, Conv1D | nn.Embedding) else 0


def sizes(module: nn.Module) -> tuple[int, int]:
    """How many inputs and outputs a linear layer has."""
    weight, out = weight_of(module), out_dim(module)
    return weight.shape[1 - out], weight.shape[out]


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear layer."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _named(model: "nn.Module | PreTrainedModel", kind: str) -> dict[str, "Style | str | None"]:
    """By name in the model, numbers as *."""
    carried: dict[str, Style | str | None] = {**(getattr(model, "_tp_plan", None) or {})}
    prefix = getattr(model, "base_model_prefix", "")
    table = PLANS.get(kind, {})
    base = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    return {**carried, **{base + name: style for name, style in table.items()}}
