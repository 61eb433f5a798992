"""Modules of which each rank of the tensor axis has a part: what runs in the place of their forward methods."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from shoal.errors import UserError
from shoal.layouts.tokens import (
    GatherColumns,
    GatherTokens,
    JoinTokens,
    ScatterTokens,
    SplitTokens,
    SumGradients,
    SumPartials,
    TensorGroup,
    Tokens,
)

ENCODED = "encoder_hidden_states"  # what the models of Hugging Face call it


def cut_tokens_within(layers: list[nn.Module], group: TensorGroup) -> None:
    """Cut hidden states by tokens from the first of the layers to the last."""

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        group.tokens = Tokens(group, *hidden.shape[:2])
        return _with_hidden(SplitTokens.apply(hidden, group.tokens), args, kwargs)

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (JoinTokens.apply(output[0], group.tokens), *output[1:])
        return JoinTokens.apply(output, group.tokens)

    layers[0].register_forward_pre_hook(enter, with_kwargs=True)
    layers[-1].register_forward_hook(leave)


def share_encoded(module: nn.Module, group: TensorGroup) -> None:
    """Let each layer of a module attend to an encoder's hidden states with the heads of this rank.

    The gradient is summed over the layers first, and then once over the ranks.
    """

    def share(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if kwargs.get(ENCODED) is None:
            return None
        (shared,) = SumGradients.apply(group, kwargs[ENCODED])
        return args, {**kwargs, ENCODED: shared}

    module.register_forward_pre_hook(share, with_kwargs=True)


def gather_for(module: nn.Module, group: TensorGroup) -> None:
    """Gather all tokens for a module, in one exchange."""

    def gather(module: nn.Module, args: Any, kwargs: Any) -> Any:
        part = args[0] if args else kwargs["hidden_states"]
        kind = part.device.type
        if torch.is_autocast_enabled(kind):  # which its products would do next: half the bytes
            part = part.to(torch.get_autocast_dtype(kind))
        return _with_hidden(GatherTokens.apply(part, group.tokens), args, kwargs)

    module.register_forward_pre_hook(gather, with_kwargs=True)


def _with_hidden(hidden: Tensor, args: Any, kwargs: Any) -> Any:
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


class SummedUp:
    """A linear layer with a part of the inputs: the ranks' products are summed, each gets its tokens of the sum."""

    def __init__(self, module: Any, group: TensorGroup) -> None:
        self.module, self.group = module, group

    def __call__(self, inputs: Tensor) -> Tensor:
        bias = self.module.bias
        part: Tensor = ScatterTokens.apply(self._product(inputs), self.group.tokens)
        return part if bias is None else part + bias.to(part.dtype)

    def _product(self, inputs: Tensor) -> Tensor:
        """The layer's own product, which may be in float8, without the bias: that is added to the sum."""
        if isinstance(self.module, Conv1D):
            return inputs @ self.module.weight
        held, bias = self.module._parameters, self.module._parameters["bias"]
        held["bias"] = None
        try:
            found: Tensor = type(self.module).forward(self.module, inputs)
        finally:
            held["bias"] = bias
        return found


class Dropout:
    """Dropout over a part of the tokens, as one process would draw it for all."""

    def __init__(self, module: nn.Dropout, group: TensorGroup) -> None:
        self.module, self.group = module, group

    def __call__(self, part: Tensor) -> Tensor:
        return part * self._drawn(part) if self.module.training and self.module.p else part

    def _drawn(self, part: Tensor) -> Tensor:
        """The mask, scaled, for this part."""
        tokens = self.group.tokens
        if part.shape[:2] != (1, tokens.share):
            found = "the model has a dropout within its layers of something else than hidden states"
            raise UserError(f"--tp {self.group.size}", found, "set its dropout to 0")
        return tokens.own(self._draw(part, tokens.rows, tokens.length, part.shape[-1]))

    def _draw(self, part: Tensor, *whole: int) -> Tensor:
        return F.dropout(part.new_ones(whole), self.module.p)


class DropoutBetween(Dropout):
    """Dropout between the two linear layers of a pair: over all tokens and a part of the width."""

    def _drawn(self, part: Tensor) -> Tensor:
        width = self.group.size * part.shape[-1]
        return self._draw(part, *part.shape[:-1], width).chunk(self.group.size, -1)[self.group.index]


class Common:
    """The parameters of a layer that every rank has whole: their gradients are summed over the ranks.

    During the layer's forward pass they stand in their modules as what `SumGradients` made of them.
    """

    def __init__(self, layer: nn.Module, names: list[str], group: TensorGroup) -> None:
        self.group = group
        self.places = [
            (layer.get_submodule(path), name) for path, _, name in (n.rpartition(".") for n in names)
        ]
        self.own: list[Any] = []
        layer.register_forward_pre_hook(self._share)
        layer.register_forward_hook(self._restore, always_call=True)

    def _share(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            self.own = [module._parameters[name] for module, name in self.places]
            self._put(SumGradients.apply(self.group, *self.own))

    def _restore(self, module: nn.Module, args: Any, output: Any) -> None:
        self._put(self.own)
        self.own = []

    def _put(self, tensors: Any) -> None:
        for (module, name), tensor in zip(self.places, tensors, strict=bool(tensors)):
            module._parameters[name] = tensor


class Rows:
    """The rows of the vocabulary that this rank has, for a loss computed from hidden states."""

    def __init__(self, group: TensorGroup, first: int) -> None:
        self.group, self.first = group, first

    def gather(self, numbers: Tensor) -> Tensor:
        """The `numbers` [...] of every rank: [ranks, ...]."""
        return self.group.gather(numbers[None])

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        return self.group.wire.sum(numbers)


class Embedding:
    """An embedding with a part of the rows: ids of other ranks give zeros, and the ranks' results are summed."""

    def __init__(self, module: Any, group: TensorGroup, first: int) -> None:
        self.module, self.group, self.first = module, group, first
        self.own = type(module).forward
        padding = module.padding_idx
        here = padding is not None and first <= padding < first + len(module.weight)
        module.padding_idx = padding - first if here else None

    def __call__(self, ids: Tensor) -> Tensor:
        local = ids - self.first
        missing = (local < 0) | (local >= len(self.module.weight))
        found = self.own(self.module, local.masked_fill(missing, 0))
        whole: Tensor = SumPartials.apply(found.masked_fill(missing[..., None], 0), self.group)
        return whole


class Head:
    """An output embedding with a part of the rows, for a loss that needs all logits."""

    def __init__(self, module: Any, group: TensorGroup, first: int, rows: int) -> None:
        self.module, self.group, self.rows = module, group, rows
        self.own = type(module).forward
        module.vocabulary = Rows(group, first)

    def __call__(self, hidden: Tensor) -> Tensor:
        (shared,) = SumGradients.apply(self.group, hidden)
        whole: Tensor = GatherColumns.apply(self.own(self.module, shared), self.group, self.rows)
        return whole
