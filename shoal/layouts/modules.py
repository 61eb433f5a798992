"""Modules of which each rank of a line has a part: what they do instead of their own forward method."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from shoal.errors import UserError
from shoal.layouts.tokens import Columns, Enter, Gather, Leave, Scatter, Share, Sum, TensorAxis, Tokens

ENCODED = "encoder_hidden_states"  # what the models of Hugging Face call it


def cut_tokens_within(layers: list[nn.Module], line: TensorAxis) -> None:
    """Have each rank with a part of the tokens from the first of the layers to the last."""

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        line.tokens = Tokens(line, *hidden.shape[:2])
        return _with_hidden(Enter.apply(hidden, line.tokens), args, kwargs)

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (Leave.apply(output[0], line.tokens), *output[1:])
        return Leave.apply(output, line.tokens)

    layers[0].register_forward_pre_hook(enter, with_kwargs=True)
    layers[-1].register_forward_hook(leave)


def share_encoded(module: nn.Module, line: TensorAxis) -> None:
    """Have the layers within a module each attend, with the heads that are here, to what an encoder has found.

    The gradient is summed over the layers first, and then once over the ranks.
    """

    def share(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if kwargs.get(ENCODED) is None:
            return None
        (shared,) = Share.apply(line, kwargs[ENCODED])
        return args, {**kwargs, ENCODED: shared}

    module.register_forward_pre_hook(share, with_kwargs=True)


def gather_for(module: nn.Module, line: TensorAxis) -> None:
    """Have a module see all tokens: one exchange, whatever it computes of them."""

    def gather(module: nn.Module, args: Any, kwargs: Any) -> Any:
        part = args[0] if args else kwargs["hidden_states"]
        kind = part.device.type
        if torch.is_autocast_enabled(kind):  # which its products would do next: half the bytes
            part = part.to(torch.get_autocast_dtype(kind))
        return _with_hidden(Gather.apply(part, line.tokens), args, kwargs)

    module.register_forward_pre_hook(gather, with_kwargs=True)


def _with_hidden(hidden: Tensor, args: Any, kwargs: Any) -> Any:
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


class SummedUp:
    """A linear layer with a part of the inputs: for its part of the tokens, what all ranks find together."""

    def __init__(self, module: Any, line: TensorAxis) -> None:
        self.module, self.line = module, line

    def __call__(self, inputs: Tensor) -> Tensor:
        bias = self.module.bias
        part: Tensor = Scatter.apply(self._product(inputs), self.line.tokens)
        return part if bias is None else part + bias.to(part.dtype)

    def _product(self, inputs: Tensor) -> Tensor:
        """As the layer computes it, in float8 perhaps, but without its bias, which belongs to the sum."""
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

    def __init__(self, module: nn.Dropout, line: TensorAxis) -> None:
        self.module, self.line = module, line

    def __call__(self, part: Tensor) -> Tensor:
        return part * self._drawn(part) if self.module.training and self.module.p else part

    def _drawn(self, part: Tensor) -> Tensor:
        """What this part is multiplied by."""
        tokens = self.line.tokens
        if part.shape[:2] != (1, tokens.share):
            found = "the model has a dropout within its layers of something else than hidden states"
            raise UserError(f"--tp {self.line.size}", found, "set its dropout to 0")
        return tokens.own(self._draw(part, tokens.rows, tokens.length, part.shape[-1]))

    def _draw(self, part: Tensor, *whole: int) -> Tensor:
        return F.dropout(part.new_ones(whole), self.module.p)


class DropoutBetween(Dropout):
    """The same between the linear layers of a pair: of all tokens, over a part of the width."""

    def _drawn(self, part: Tensor) -> Tensor:
        width = self.line.size * part.shape[-1]
        return self._draw(part, *part.shape[:-1], width).chunk(self.line.size, -1)[self.line.index]


class Common:
    """The parameters of a layer that every rank has whole: each finds a part of their gradients, which is summed.

    During the layer's forward pass they stand in their modules as what `Share` made of them.
    """

    def __init__(self, layer: nn.Module, names: list[str], line: TensorAxis) -> None:
        self.line = line
        self.places = [
            (layer.get_submodule(path), name) for path, _, name in (n.rpartition(".") for n in names)
        ]
        self.own: list[Any] = []
        layer.register_forward_pre_hook(self._share)
        layer.register_forward_hook(self._restore, always_call=True)

    def _share(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            self.own = [module._parameters[name] for module, name in self.places]
            self._put(Share.apply(self.line, *self.own))

    def _restore(self, module: nn.Module, args: Any, output: Any) -> None:
        self._put(self.own)
        self.own = []

    def _put(self, tensors: Any) -> None:
        for (module, name), tensor in zip(self.places, tensors, strict=bool(tensors)):
            module._parameters[name] = tensor


class Rows:
    """The rows of the vocabulary that this rank has, for a loss taken of the hidden states."""

    def __init__(self, line: TensorAxis, first: int) -> None:
        self.line, self.first = line, first

    def gather(self, numbers: Tensor) -> Tensor:
        """What every rank has found, [...]: [ranks, ...]."""
        return self.line.gather(numbers[None])

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        return self.line.sum(numbers)


class Embedding:
    """An embedding with a part of the rows: what the others have is zero here, and the sum is whole."""

    def __init__(self, module: Any, line: TensorAxis, first: int) -> None:
        self.module, self.line, self.first = module, line, first
        self.own = type(module).forward
        padding = module.padding_idx
        here = padding is not None and first <= padding < first + len(module.weight)
        module.padding_idx = padding - first if here else None

    def __call__(self, ids: Tensor) -> Tensor:
        local = ids - self.first
        missing = (local < 0) | (local >= len(self.module.weight))
        found = self.own(self.module, local.masked_fill(missing, 0))
        whole: Tensor = Sum.apply(found.masked_fill(missing[..., None], 0), self.line)
        return whole


class Head:
    """An output embedding with a part of the rows, for a loss that wants all logits."""

    def __init__(self, module: Any, line: TensorAxis, first: int, rows: int) -> None:
        self.module, self.line, self.rows = module, line, rows
        self.own = type(module).forward
        module.vocabulary = Rows(line, first)

    def __call__(self, hidden: Tensor) -> Tensor:
        (shared,) = Share.apply(self.line, hidden)
        whole: Tensor = Columns.apply(self.own(self.module, shared), self.line, self.rows)
        return whole
