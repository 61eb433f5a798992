"""Context parallel: each rank of a team computes a part of every window, and attends to all of it.

Between two attentions a token knows of no other: embeddings, norms, products and the loss need a rank's own tokens
alone, and the losses of the ranks add up. Only attention needs the others: each layer gathers the keys and
values of all ranks (Dubey et al. 2024, "The Llama 3 herd of models", section 3.3.2), and its backward pass sums what
the ranks found as their gradients into each rank's part. That sends what the ring of Liu et al. 2023 ("Ring attention
with blockwise transformers") does, in one exchange.

Of causal attention the last tokens have the most to do. So a window is cut into 2 C chunks, of which rank r of C has
number r and number 2 C - 1 - r: head and tail together see equally many keys on every rank (Brandon et al. 2023,
"Striped attention", balances by interleaving tokens instead).

Per micro-batch of B windows of T tokens, with W elements in the keys and values of a token in a layer, a rank sends
(C - 1) / C * 2 B T W elements a layer, half of them in the forward pass (and in one that is done again for the
backward pass, which `cost` leaves out); it holds activations of T / C tokens, and of
each layer's keys and values all T. Weights are whole on every rank: ZeRO (`sharded`) cuts them over the same ranks,
and sums their gradients.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PreTrainedModel

from shoal.errors import UserError
from shoal.layouts.base import Function, PlacedModel, Request
from shoal.models import attention, blockwise
from shoal.models.heads import final_hidden
from shoal.models.isolation import document_positions, packed_inputs
from shoal.models.loss import IGNORED
from shoal.models.proof import trial

NAME = "shoal-context"
SENT = "shoal_sent"  # of an attention: how many elements the keys and values of a token have
FITS = "leave it out, or take a model of causal attention (llama, gpt2, gpt_neox, qwen3, ...)"


class Context(PlacedModel):
    """Another layout's model, whose windows are cut over the ranks of the `context` axis.

    Raises UserError where attention or windows cannot be cut.
    """

    def __init__(self, inner: PlacedModel, request: Request) -> None:
        super().__init__(inner.model, inner.pieces, inner._loss, inner)
        axis = request.mesh.axes["context"]
        self.ranks, self.rank = axis.size, axis.index
        self.wire = request.mesh.wire("context")
        self._dropout: _DropoutOfPart  # of the forward pass that runs
        self._itemsize = request.policy.compute.itemsize
        self._prove(_checked(inner.model, self.ranks, request.empty_micro_batch))

    def _hidden_shape(self, rows: int, tokens: int) -> tuple[int, int]:
        return super()._hidden_shape(rows, 2 * chunk_tokens(self.ranks, tokens))

    def _apply(self, function: Function, inputs: dict[str, Tensor]) -> Tensor:
        length = inputs["documents"].shape[-1]
        self._dropout = _DropoutOfPart(self._own(length), length)
        with self._dropout:
            return super()._apply(function, self._part(inputs))

    def _recompute_context(self) -> AbstractContextManager[object]:
        return _both(self._dropout, super()._recompute_context())

    def _own(self, length: int) -> Tensor:
        return _places(self.rank, self.ranks, length)

    def _part(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's tokens of a micro-batch, and the documents of all."""
        documents = inputs["documents"]
        length = documents.shape[-1]
        own = self._own(length).to(documents.device)
        whole = {**inputs, "position_ids": document_positions(documents)}
        part = {name: tensor[:, own.clamp(max=length - 1)] for name, tensor in whole.items()}
        part["labels"] = part["labels"].masked_fill(own >= length, IGNORED)
        return {**part, "documents": documents}

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: Tensor,
        dropout: float = 0.0,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """As `attention.attention_forward`, of this rank's tokens; for a mask the `documents` [B, 1, 1, T]."""
        kind, length = query.device.type, documents.shape[-1]
        setattr(module, SENT, key.shape[1] * (key.shape[-1] + value.shape[-1]))
        compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        query, kept = query.to(compute), None
        if dropout:
            own = self._own(length).clamp(max=length - 1).to(query.device)
            part = getattr(module, attention.HEADS, (0, 1))
            shape = (*query.shape[:2], length, length)
            kept = attention.kept(query, shape, dropout, part)[:, :, own]
        with torch.autocast(kind, enabled=False):
            part = torch.cat([key, value], dim=-1).to(compute)
            keys, values = _GatherWindow.apply(part, self, length).split(
                [key.shape[-1], value.shape[-1]], dim=-1
            )
            places = chunks(self.rank, self.ranks, length)
            out = blockwise.attend(query, keys, values, places, documents[:, 0, 0], scale, kept)
        return out.transpose(1, 2).contiguous(), None

    def gather(self, part: Tensor) -> Tensor:
        """Every rank's `part`, [ranks, ...]."""
        whole = part.new_empty(self.ranks, *part.shape)
        self.wire.start_all_gather(whole.view(-1), part.contiguous().view(-1), "keys and values").wait()
        return whole

    def scatter(self, whole: Tensor) -> Tensor:
        """The sum over the ranks of this rank's part of `whole` [ranks, ...]."""
        part = torch.empty_like(whole[0])
        self.wire.start_reduce_scatter(part.view(-1), whole.view(-1), "their gradients").wait()
        return part

    def _prove(self, model: PreTrainedModel) -> None:
        """From now on attention is ours. Raises UserError unless hidden states, dropped out, stay what they were."""
        length = 4 * self.ranks - 1
        ids = torch.arange(length, device=model.device)[None] % model.config.vocab_size
        inputs = {
            "input_ids": ids,
            "labels": ids,
            "documents": torch.arange(length, device=model.device)[None] // (2 * self.ranks),
        }
        own = self._own(length)
        real = own < length
        was_training = model.training
        model.train()
        with trial(f"--cp {self.ranks}", FITS), torch.random.fork_rng():
            torch.manual_seed(0)
            expected = final_hidden(model, packed_inputs(ids, inputs["documents"]))[:, own[real]]
            AttentionInterface.register(NAME, self._attend)
            model.set_attn_implementation(NAME)
            torch.manual_seed(0)
            part = self._part(inputs)
            with _DropoutOfPart(own, length):
                found = final_hidden(
                    model, packed_inputs(part["input_ids"], part["documents"], part["position_ids"])
                )
        model.train(was_training)
        near = torch.finfo(found.dtype).eps ** 0.5
        differs = not torch.allclose(found[:, real], expected, rtol=near, atol=near)
        if self.wire.sum(torch.tensor([float(differs)])).item():
            kind = type(model).__name__
            raise UserError(
                f"--cp {self.ranks}", f"{kind} makes other hidden states of a window that is cut", FITS
            )

    def _cost(self, turns: int, shape: tuple[int, int]) -> float:
        """As the head of this file has it, of windows filled up to whole chunks."""
        rows, length = shape
        own = 2 * chunk_tokens(self.ranks, length)
        of_token = sum(getattr(module, SENT, 0) for module in self.model.modules()) * self._itemsize
        sent = (self.ranks - 1) * rows * own * of_token
        return super()._cost(turns, (rows, own)) + turns * 2 * sent

    def __str__(self) -> str:
        return f"sequences cut over {self.ranks} workers"


def chunk_tokens(ranks: int, length: int) -> int:
    """How many tokens a chunk of a window of `length` tokens has; the last chunks are filled up to it."""
    return -(-length // (2 * ranks))


def chunks(rank: int, ranks: int, length: int) -> tuple[range, range]:
    """The places in a window of `length` tokens that a rank has: of 2 * `ranks` chunks one, and its mirror image."""
    size = chunk_tokens(ranks, length)
    head, tail = rank, 2 * ranks - 1 - rank
    return range(head * size, (head + 1) * size), range(tail * size, (tail + 1) * size)


def _places(rank: int, ranks: int, length: int) -> Tensor:
    """The places in a window of a rank's tokens, int64; from `length` on they are padding."""
    return torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in chunks(rank, ranks, length)])


@contextmanager
def _both(first: AbstractContextManager[object], second: AbstractContextManager[object]) -> Iterator[None]:
    with first, second:
        yield


class _GatherWindow(torch.autograd.Function):
    """From the ranks' parts [B, heads, own tokens, D] to the whole [B, heads, length, D], in the window's order."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, context: Context, length: int) -> Tensor:
        by_rank = [_places(rank, context.ranks, length) for rank in range(context.ranks)]
        ctx.context, ctx.order = context, torch.cat(by_rank).to(part.device)
        whole = context.gather(part).movedim(0, 2).flatten(2, 3)
        return whole[:, :, ctx.order.argsort()[:length]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        padded = F.pad(grad, (0, 0, 0, len(ctx.order) - grad.shape[2]))
        whole = padded[:, :, ctx.order].unflatten(2, (ctx.context.ranks, -1))
        return ctx.context.scatter(whole.movedim(2, 0).contiguous()), None, None


class _DropoutOfPart(TorchFunctionMode):
    """Dropout that multiplies a rank's tokens [B, own, ...] by what one process draws for them in a whole window."""

    def __init__(self, own: Tensor, length: int) -> None:
        super().__init__()
        self.own = own
        self.length = length

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let every other function be."""
        call = self._dropout if func is F.dropout else func
        return call(*args, **(kwargs or {}))

    def _dropout(
        self, hidden: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or not p:
            return hidden
        if hidden.dim() < 3 or hidden.shape[1] != len(self.own):
            found = f"dropout of shape {tuple(hidden.shape)} in the model does not go by tokens"
            raise UserError("--cp", found, "set the model's dropout to 0 by --model.NAME")
        whole = hidden.new_ones(len(hidden), self.length, *hidden.shape[2:])
        return (
            hidden
            * torch.dropout(whole, p, train=True)[:, self.own.clamp(max=self.length - 1).to(hidden.device)]
        )


def _checked(model: nn.Module, ranks: int, empty_micro_batch: dict[str, Tensor]) -> PreTrainedModel:
    """The model. Raises UserError where its attention is not ours, or windows cannot be cut."""
    asked, kind = f"--cp {ranks}", type(model).__name__
    if not isinstance(model, PreTrainedModel) or model.config._attn_implementation != attention.NAME:
        raise UserError(asked, f"{kind} has no attention that could be cut", FITS)
    if getattr(model.config, "sliding_window", None) is not None:
        found = f"{kind} has layers that look back {model.config.sliding_window} tokens only"
        raise UserError(asked, found, FITS)
    if "documents" not in empty_micro_batch:
        raise UserError(asked, "this task does not say which document a token belongs to", "leave it out")
    length = empty_micro_batch["documents"].shape[-1]
    if length < 2 * ranks:
        found = f"windows of {length} tokens are cut into {2 * ranks} chunks"
        raise UserError(asked, found, f"set --sequence-length to {2 * ranks} or more")
    return model
