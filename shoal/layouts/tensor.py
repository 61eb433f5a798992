"""Tensor-parallel with sequence parallel: each rank of a team has a part of every layer, and computes all tokens.

Of a pair of linear layers the first is cut by its outputs (some of the heads, a part of the MLP's width), the second
by its inputs; what the ranks find is summed (Shoeybi et al. 2019, "Megatron-LM"). Between such pairs, where norms,
residuals and dropout are, each rank has a part of the tokens (Korthikanti et al. 2022, "Reducing Activation
Recomputation in Large Transformer Models"): they are gathered before a pair, once for queries, keys and values
together, and the sum is scattered after it. Embedding, head and loss are cut by rows of the vocabulary; logits are
never whole. Parameters are plain tensors, so that ZeRO cuts them further as it cuts any others.

With t ranks, per micro-batch of N tokens with H numbers each, a rank sends

- for each pair  4 (t - 1) / t N H, forward and backward, in the dtype of the matrix products
- before and after the layers  6 (t - 1) / t N H: a sum of the embeddings, a gather each way, a sum for the head, or
  after an encoder for the attentions to it: so much for each of the two stacks of layers
- in a layer that is computed again in the backward pass half as much once more, which `cost` leaves out
- for the loss  3 (t - 1) N numbers, and for norms and biases within the layers 2 (t - 1) / t of their gradients

and holds of linear layers, embedding and head, their gradients and moments 1 / t. Parameters that are not cut are on
every rank, but only the first one trains them and broadcasts them once a step: copies are equal under every strategy.

An encoder's hidden states leave its layers whole. An attention to them gathers the decoder's tokens alone, and has
keys and values of all of the encoder's tokens for the heads of this rank.
"""

import inspect
import itertools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from shoal.errors import UserError
from shoal.layouts.base import PlacedModel, Request
from shoal.layouts.modules import (
    Common,
    Dropout,
    DropoutBetween,
    Embedding,
    Head,
    SummedUp,
    cut_tokens_within,
    gather_for,
    share_encoded,
)
from shoal.layouts.tokens import TensorGroup, Tokens
from shoal.models import attention, plans
from shoal.models.blocks import blocks, stacks
from shoal.models.heads import has_plain_head
from shoal.tensors.piece import Block, Piece, empty
from shoal.tensors.precision import Policy
from shoal.wire.mesh import Axis

Styles = dict[nn.Module, plans.Style]


class TensorParallel(PlacedModel):
    """The layers, embedding and head of another layout's model cut over the ranks of a team."""

    def __init__(self, inner: PlacedModel, request: Request) -> None:
        axis, model = request.mesh.axes["tensor"], inner.model
        self.group = TensorGroup(request.mesh.wire("tensor"))
        self.is_first = axis.index == 0
        layers = list(blocks(model))
        styles = _styles(model, layers, axis.size)
        cuts = _cuts(model, styles)
        self._sizes = _Sizes.of(model, layers, styles, cuts, request.policy, axis.size)
        self._common = {piece.name for piece in inner.pieces if piece.source not in cuts}
        pieces = [_part(piece, cuts.get(piece.source), axis) for piece in inner.pieces]
        new = {old.source: piece.source for old, piece in zip(inner.pieces, pieces, strict=True)}
        parents = _parents(model)
        for stack in stacks(model):
            cut_tokens_within(list(stack), self.group)
            share_encoded(parents[stack], self.group)
        _share(model, layers, cuts, self.group)
        for module in model.modules():
            for name, p in module._parameters.items():
                module._parameters[name] = new.get(p) if p is not None else None
        _compute_in_part(model, styles, self.group)
        _cut_vocabulary(model, self._sizes.vocabulary, axis, self.group)
        super().__init__(model, pieces, inner._loss, inner)

    @property
    def _reports(self) -> bool:
        return self.is_first and super()._reports  # all ranks of a team find the same

    def _hidden_shape(self, rows: int, tokens: int) -> tuple[int, int]:
        return 1, Tokens(self.group, *super()._hidden_shape(rows, tokens)).share

    def _begin_tokens(self, rows: int, tokens: int) -> None:
        self.group.tokens = Tokens(self.group, rows, tokens)

    def _recompute_context(self) -> AbstractContextManager[object]:
        return self._with_tokens(self.group.tokens, super()._recompute_context())

    @contextmanager
    def _with_tokens(self, tokens: Tokens, below: AbstractContextManager[object]) -> Iterator[None]:
        now, self.group.tokens = self.group.tokens, tokens
        try:
            with below:
                yield
        finally:
            self.group.tokens = now

    def _common_here(self) -> list[nn.Parameter]:
        """The parameters of this rank's layers that are not cut."""
        return [p for name, p in self.model.named_parameters() if name in self._common]

    def before_forward(self) -> None:
        super().before_forward()
        params = self._common_here()
        held = [_local(p) for p in params]
        if not held:
            return
        flat = torch.cat([each.flatten() for each in held])
        self.group.wire.broadcast(flat, "parameters that are not cut")
        if not self.is_first:
            for p, own, first in zip(params, held, flat.split([each.numel() for each in held]), strict=True):
                own.copy_(first.view_as(own))
                p.grad = None

    def _cost(self, turns: int, shape: tuple[int, int]) -> float:
        """As the head of this file has it. Encoder and decoder are taken to read as many tokens, those of `shape`."""
        told = sum(_local(p).nbytes for p in self._common_here())
        here = [any(True for _ in layer.parameters()) for layer in blocks(self.model)]
        sent = turns * self._sizes.sent(Tokens(self.group, *shape), here)
        return super()._cost(turns, shape) + sent + (told if self.is_first else 0)

    def __str__(self) -> str:
        return f"replicas of {self.group.size} workers, each with its part of every layer"


@dataclass(frozen=True)
class _Cut:
    """The dim along which a parameter is cut; there lie `parts` equal parts end to end, and each is cut."""

    dim: int
    parts: int = 1


def _cuts(model: Any, styles: Styles) -> dict[Tensor, _Cut]:
    """Of every parameter that is cut, how."""
    cuts: dict[Tensor, _Cut] = {}
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        cuts |= {p: _Cut(0) for p in embedding.parameters()}
    for module, style in styles.items():
        out = plans.out_dim(module)
        cuts[plans.weight_of(module)] = _Cut(out if style.side == "out" else 1 - out, style.parts)
        bias = getattr(module, "bias", None)
        if style.side == "out" and isinstance(bias, Tensor):
            cuts[bias] = _Cut(0, style.parts)
    return cuts


def _part(piece: Piece, cut: _Cut | None, axis: Axis) -> Piece:
    """The part of a whole piece that this rank trains, which may be empty."""
    source = piece.source
    if cut is None:
        return piece if axis.index == 0 else empty(piece, source)
    length = source.shape[cut.dim] // cut.parts
    first, count = _span(length, axis)
    at = [0] * source.dim()
    offset, size = list(at), list(source.shape)
    blocks, held = [], []
    for part in range(cut.parts):
        at[cut.dim], offset[cut.dim], size[cut.dim] = part * count, part * length + first, count
        blocks.append(Block(tuple(at), tuple(offset), tuple(size)))
        held.append(source.detach().narrow(cut.dim, offset[cut.dim], count))
    local = nn.Parameter(torch.cat(held, cut.dim), requires_grad=source.requires_grad)
    return Piece(piece.name, piece.shape, blocks[0].offset, local, local, parts=tuple(blocks))


def _span(length: int, axis: Axis) -> tuple[int, int]:
    """This rank's first of `length` rows, and how many it has: all ranks have as many, the last one perhaps fewer."""
    most = -(-length // axis.size)
    first = axis.index * most
    return first, min(most, length - first)


def _local(p: Tensor) -> Tensor:
    """This rank's values of a parameter, which ZeRO may have cut further."""
    return p.to_local().detach() if isinstance(p, DTensor) else p.detach()


def _share(model: Any, layers: list[nn.Module], cuts: dict[Tensor, _Cut], group: TensorGroup) -> None:
    """Make dropout, and gradients of parameters that are not cut, equal to those of one process."""
    between = plans.BETWEEN.get(model.config.model_type, ())
    for layer in layers:
        common = [name for name, p in layer.named_parameters() if p.requires_grad and p not in cuts]
        if common:
            Common(layer, common, group)
        dropouts: dict[str, Any] = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Dropout)}
        for name, dropout in dropouts.items():
            dropout.forward = (DropoutBetween if name.endswith(between) else Dropout)(dropout, group)


def _compute_in_part(model: Any, styles: Styles, group: TensorGroup) -> None:
    """Make linear layers, and the modules around them, compute a part of the heads and widths."""
    for module, style in styles.items():
        if style.side == "in":
            module.forward = SummedUp(module, group)
        elif isinstance(module, Conv1D):
            module.nf //= group.size
    for parent in _pairs(model, styles):
        gather_for(parent, group)
        setattr(parent, attention.HEADS, (group.index, group.size))
        for width in plans.WIDTHS.get(model.config.model_type, ()):
            if hasattr(parent, width):
                setattr(parent, width, getattr(parent, width) // group.size)


def _pairs(model: nn.Module, styles: Styles) -> dict[nn.Module, nn.Module]:
    """The modules that hold linear layers cut by their outputs, each with one of these."""
    parents = _parents(model)
    return {
        parents[module]: module
        for module, style in styles.items()
        if style.side == "out" and not isinstance(module, nn.Embedding)
    }


def _parents(model: nn.Module) -> dict[nn.Module, nn.Module]:
    return {child: parent for parent in model.modules() for child in parent.children()}


def _cut_vocabulary(model: Any, rows: int, axis: Axis, group: TensorGroup) -> None:
    first, _ = _span(rows, axis)
    weight, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    embeddings: list[Any] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for embedding in embeddings:
        if embedding.weight is weight:  # encoder and decoder have one each
            embedding.forward = Embedding(embedding, group, first)
    head.forward = Head(head, group, first, rows)


@dataclass(frozen=True)
class _Sizes:
    """Of a model: what a rank's bytes depend on."""

    ranks: int
    ends: tuple[int, ...]  # the numbers of the layers where hidden states enter and leave: of each stack two
    width: int  # of hidden states
    between: tuple[int, ...]  # numbers of a token that are gathered or scattered in each layer, one way
    common: tuple[int, ...]  # numbers of each layer that are trained and not cut
    vocabulary: int
    logits: bool  # whether they are gathered, for a loss that needs them all
    wide: int  # bytes of a number, where they are not those of matrix products:
    narrow: int
    summed: int  # of a sum of gradients

    @classmethod
    def of(
        cls,
        model: Any,
        layers: list[nn.Module],
        styles: Styles,
        cuts: dict[Tensor, _Cut],
        policy: Policy,
        ranks: int,
    ) -> "_Sizes":
        """Those of a model that is still whole."""
        between = {module: plans.sizes(module)[0] for module in _pairs(model, styles).values()}
        between |= {module: plans.sizes(module)[1] for module, each in styles.items() if each.side == "in"}
        embedding = model.get_input_embeddings().weight
        return cls(
            ranks,
            ends=tuple(layers.index(stack[end]) for stack in stacks(model) for end in (0, -1)),
            width=embedding.shape[1],
            between=tuple(sum(between.get(module, 0) for module in layer.modules()) for layer in layers),
            common=tuple(
                sum(p.numel() for p in layer.parameters() if p.requires_grad and p not in cuts)
                for layer in layers
            ),
            vocabulary=embedding.shape[0],
            logits=not has_plain_head(model),
            wide=policy.parameters.itemsize,
            narrow=policy.compute.itemsize,
            summed=policy.reduction.itemsize,
        )

    def sent(self, tokens: Tokens, here: list[bool]) -> int:
        """By a rank for the forward and backward pass of a micro-batch through the layers that are `here`."""
        count, others = tokens.rows * tokens.length, self.ranks - 1
        shares = others * tokens.share
        sent = sum(
            2 * shares * between * self.narrow + self._summed(common, self.summed)
            for between, common in itertools.compress(zip(self.between, self.common, strict=True), here)
        )
        # Before a stack stands an embedding, whose sum is of the forward pass; behind it the head or a decoder.
        for ends, size in ((self.ends[::2], self.wide), (self.ends[1::2], self.summed)):
            each = shares * self.width * self.wide + self._summed(count * self.width, size)
            sent += sum(here[end] for end in ends) * each
        rows = -(-self.vocabulary // self.ranks)
        loss = others * count * (rows * self.narrow if self.logits else 3 * self.summed)
        return sent + here[-1] * loss

    def _summed(self, numbers: int, size: int) -> int:
        return 2 * (numbers * size * (self.ranks - 1) // self.ranks)


def _styles(model: Any, layers: list[nn.Module], ranks: int) -> Styles:
    """How each linear layer is cut. Raises UserError where a model cannot be."""
    try:
        styles = plans.plan(model, layers)
    except plans.Unknown as error:
        known = ", ".join(sorted(plans.PLANS))
        _refuse(
            ranks, str(error), f"take {known}, or a model that carries a plan (llama, qwen3, gpt_neox, ...)"
        )
    _check_sizes(model, styles, ranks)
    _check_embeddings(model, ranks)
    _check_dropout(model, layers, ranks)
    return styles


def _check_sizes(model: Any, styles: Styles, ranks: int) -> None:
    config, names = model.config, {module: name for name, module in model.named_modules()}
    sizes = {
        "attention heads": config.num_attention_heads,
        "key and value heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
    }
    for module, style in styles.items():
        width = plans.sizes(module)[style.side == "out"] // style.parts
        sizes[f"{style.side}puts of {names[module]}"] = width
    common = math.gcd(*sizes.values())
    for what, size in sizes.items():
        if size % ranks:
            choices = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            _refuse(ranks, f"{size} {what} do not divide by it", f"take one of {choices}")


def _check_embeddings(model: Any, ranks: int) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = embedding.weight.shape[0]
    if not isinstance(head, nn.Linear) or head.weight.shape[0] != rows:
        _refuse(ranks, "the model has no head as large as its vocabulary", "take another model")
    if -(-rows // ranks) * (ranks - 1) >= rows:
        _refuse(ranks, f"of {rows} tokens the last worker would have none", "take a smaller number")
    if any(p.dim() == 0 for p in model.parameters()):
        _refuse(ranks, "the model has a parameter without a dim", "take another model")


def _check_dropout(model: Any, layers: list[nn.Module], ranks: int) -> None:
    """The masks are those that one process would draw: where a model draws them by itself they would be others."""
    config = model.config.to_dict()
    rates = {
        name: rate for name, rate in config.items() if "drop" in name and isinstance(rate, float) and rate
    }
    kinds = {type(module) for layer in layers for module in layer.modules()}
    own = [kind.__name__ for kind in kinds if "functional.dropout" in inspect.getsource(kind.forward)]
    if model.config._attn_implementation != attention.NAME:
        own.append(f"attention of the kind {model.config._attn_implementation}")
    if rates and own:
        zero = " ".join(f"--model.{name} 0" for name in rates)
        _refuse(ranks, f"{own[0]} would draw other dropout masks than one worker", f"add {zero}")


def _refuse(ranks: int, found: str, change: str) -> NoReturn:
    raise UserError(f"--tp {ranks}", found, change)
