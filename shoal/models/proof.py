"""Proves by small forward passes that a model can be trained as asked, whatever its family is called.

- the loss that is summed here is the one that the model's own forward pass gives with labels
- a document in a packed window is computed as it is alone, and no token sees a later one

A leak shows as a difference between two passes. It is the mean over tokens of |a - b| / |a|, and has to be at most
the square root of the epsilon of the precision (float32 3e-4, bfloat16 0.09), or twice what mixed precision changes.
Rounding is far below that, also where it sends some tokens of a mixture to other experts.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers.utils import logging

from shoal.errors import ShoalError, UserError, described
from shoal.models.heads import final_hidden, has_plain_head, logits
from shoal.models.isolation import PADDING, packed_inputs, padded_inputs
from shoal.models.loss import IGNORED, own_loss, summed_cross_entropy
from shoal.models.pretrained import FITS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

How = Literal["chunked", "whole", "own"]  # a loss: of chunks of logits, of whole ones, by the model itself
LOSS_SHAPE = (2, 16)  # rows and tokens
SAME_LOSS = 1e-5  # of a loss in float32, as models are loaded
FEW_TOKENS = 64
MOST_PRODUCTS = 1e11  # weights times tokens: about a second on one core
SEES = "a document in a packed window sees the one before it"
MOVED = "a document in a packed window is not computed as it is alone"
PADDED = "a document is not computed as it is without padding behind it"
DECODER = "is_decoder"  # by it an encoder's configuration makes a causal model
REMEDY = "add --no-packing, or take another model"


def remedy(packing: bool) -> str:
    """What to change where a model fails on trial."""
    return REMEDY if packing else "take another model"


@contextmanager
def trial(asked: str, change: str) -> Iterator[None]:
    """Turn any error of a forward pass in the block into a UserError of one line; no gradients, no warnings."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # families warn of labels that are only those of this trial
    try:
        with torch.no_grad():
            yield
    except (ShoalError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(asked, f"a forward pass on trial fails ({described(error)[:200]})", change) from error
    finally:
        logging.set_verbosity(verbosity)


def choose_loss(model: "PreTrainedModel", asked: str) -> How:
    """How to sum the loss that the model's own forward pass gives with labels (in eval mode, as loaded).

    Cross entropy, where it is that; else what the model gives. Raises UserError where that cannot be summed.
    """
    how: How = "chunked" if has_plain_head(model) else "whole"
    if "labels" not in inspect.signature(model.forward).parameters:
        return how
    ids = _ids(model, *LOSS_SHAPE)
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
    count = int((labels != IGNORED).sum())
    was_training = model.training
    model.eval()
    try:
        given = model(input_ids=ids, labels=ids, use_cache=False).loss
        ours = summed_cross_entropy(model, {"input_ids": ids}, labels, chunked=how == "chunked") / count
        if given is None or _near(ours, given):
            return how
        if _near(own_loss(model, {"input_ids": ids}, labels) / count, given):
            return "own"
    finally:
        model.train(was_training)
    found = (
        f"its own loss is {given.item():.5f}, not the cross entropy {ours.item():.5f}, and cannot be summed"
    )
    raise UserError(asked, found, "take another model")


def _near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.to(b), b, rtol=SAME_LOSS, atol=0, equal_nan=True)


def trial_tokens(model: "PreTrainedModel", sequence_length: int) -> int:
    """How many tokens a trial on the CPU takes: those of a window, fewer where they would take minutes."""
    weights = sum(p.numel() for p in model.parameters())
    return min(sequence_length, max(FEW_TOKENS, int(MOST_PRODUCTS / weights)))


def tolerance(dtype: torch.dtype) -> float:
    """The largest difference allowed between two passes of this precision."""
    return float(max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) ** 0.5)  # norms are in float32


def check_hidden(
    model: "PreTrainedModel", asked: str, tokens: int, packing: bool, dtype: torch.dtype
) -> None:
    """Prove by the hidden states of a row of so many tokens that its documents are computed as they are alone.

    Without `packing` there is one, with padding behind it. Raises UserError where hidden states differ.
    """
    ids, other = _ids(model, 2, tokens).split(1)
    first, near = _first_document(model, tokens), tolerance(dtype)
    before, document = ids[:, :first], ids[:, first:]
    count = tokens - first

    def in_row(before: Tensor, document: Tensor) -> Tensor:
        """The hidden states of a document in a row with another one, or with padding."""
        if packing:
            return _hidden(model, packed_inputs(*_row(before, document, first)))[:, first:]
        row, documents = _row(document, before, count)
        return _hidden(model, padded_inputs(row, documents * PADDING))[:, :count]

    found = in_row(before, document)
    half = count // 2
    changed = in_row(before, torch.cat([document[:, :half], other[:, first + half :]], dim=1))
    last = slice(half - 1, half)  # of the tokens that are the same
    if half and _differ(changed[:, last], found[:, last]) > near:
        raise _reads_ahead(model, asked)
    if packing and _differ(in_row(other[:, :first], document), found) > near:
        raise UserError(asked, SEES, REMEDY)
    alone = _hidden(model, {"input_ids": document})
    apart = _differ(found, alone)
    if apart > near:
        with torch.autocast(model.device.type, enabled=False):  # a recurrent model may amplify its rounding
            near = 2 * _differ(_hidden(model, {"input_ids": document}), alone)
    if apart > near:
        raise UserError(asked, MOVED if packing else PADDED, remedy(packing))


def _reads_ahead(model: "PreTrainedModel", asked: str) -> UserError:
    found = f"{type(model).__name__} reads ahead: a token sees the ones after it"
    kind = model.config.model_type
    makes = f"; --model.{DECODER} true makes one of {kind}" if hasattr(model.config, DECODER) else ""
    return UserError(asked, found, f"{FITS}{makes}")


def check_loss(
    loss: Callable[[dict[str, Tensor]], Tensor],
    model: "PreTrainedModel",
    asked: str,
    tokens: int,
    packing: bool,
    dtype: torch.dtype,
) -> None:
    """The same by the summed loss of a row, for a model that is cut. Rounding averages out: a tenth is allowed."""
    ids, other = _ids(model, 2, tokens).split(1)
    first, near = _first_document(model, tokens), tolerance(dtype) / 10
    count = tokens - first
    blank = torch.full_like(ids, IGNORED)

    def of(row: Tensor, documents: Tensor, place: int) -> Tensor:
        """The loss of the document that begins at `place`."""
        labels = blank.clone()
        labels[:, place : place + count - 1] = ids[:, first + 1 :]
        return loss({"input_ids": row, "labels": labels, "documents": documents}).view(1, 1)

    row, documents = _row(ids[:, first:], ids[:, :first], count)
    alone = of(row, documents * PADDING, 0)
    if packing:
        found, changed = (
            of(*_row(before[:, :first], ids[:, first:], first), first) for before in (ids, other)
        )
        if _differ(changed, found) > near:
            raise UserError(asked, SEES, REMEDY)
        if _differ(alone, found) > near:
            raise UserError(asked, MOVED, REMEDY)


def _hidden(model: "PreTrainedModel", inputs: dict[str, Any]) -> Tensor:
    was_training = model.training
    model.eval()
    try:
        whole = model.base_model is model  # no body that could run alone
        return logits(model, inputs) if whole else final_hidden(model, inputs)
    finally:
        model.train(was_training)


def _row(before: Tensor, after: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Tokens [1, T] of two documents, and which each belongs to."""
    row = torch.cat([before, after], dim=1)
    return row, (torch.arange(row.shape[1], device=row.device) >= first).long()[None]


def _first_document(model: "PreTrainedModel", tokens: int) -> int:
    """The length of the first of two documents; the second is longer than the window of a layer, where it can be."""
    sliding = getattr(model.config, "sliding_window", None) or tokens
    return max(1, min(tokens // 4, (tokens - sliding) // 2 if sliding < tokens else tokens))


def _ids(model: "PreTrainedModel", rows: int, tokens: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    # Not of the embeddings, of which a rank may have a part or none.
    words = model.config.get_text_config().vocab_size
    return torch.randint(words, (rows, tokens), generator=draw).to(model.device)


def _differ(a: Tensor, b: Tensor) -> float:
    """The mean over tokens of |a - b| / |a|, infinite where one is not a number."""
    a, b = a.double(), b.double()
    apart = ((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-30)).mean().item()
    return apart if apart == apart else float("inf")
