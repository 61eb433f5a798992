"""The LSTM language model: carried state, reset at documents, padding, save and load."""

import pytest
import torch

from shoal.models.isolation import packed_inputs
from shoal.models.lstm import LstmConfig, LstmForCausalLM

WORDS = 50


def small(**sizes: int) -> LstmForCausalLM:
    torch.manual_seed(0)
    return LstmForCausalLM(LstmConfig(vocab_size=WORDS, hidden_size=24, **sizes)).eval()


def some_ids(rows: int, length: int) -> torch.Tensor:
    return torch.arange(rows * length).view(rows, length) * 7 % WORDS


@torch.no_grad()
def test_state_carries_over_a_cut() -> None:
    model, ids = small(), some_ids(3, 20)
    whole = model(ids)
    first = model(ids[:, :8])
    second = model(ids[:, 8:], state=first.state)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole.logits)
    torch.testing.assert_close(second.state, whole.state)


@torch.no_grad()
def test_packed_windows_carry_the_state_of_their_last_document() -> None:
    model, ids = small(), some_ids(2, 20)
    documents = torch.tensor([[0] * 6 + [1] * 14, [2] * 19 + [3]])
    packed = model(**packed_inputs(ids, documents))
    torch.testing.assert_close(packed.state[:, :, :1], model(ids[:1, 6:]).state)
    torch.testing.assert_close(packed.state[:, :, 1:], model(ids[1:, 19:]).state)


@torch.no_grad()
def test_a_row_goes_on_or_begins_by_its_position() -> None:
    model, ids = small(), some_ids(2, 10)
    state = model(some_ids(2, 5)).state
    positions = torch.arange(10).expand(2, 10) + torch.tensor([[5], [0]])
    mixed = model(ids, positions, state).logits
    torch.testing.assert_close(mixed[0], model(ids, state=state).logits[0])
    torch.testing.assert_close(mixed[1], model(ids).logits[1])


@torch.no_grad()
def test_a_document_goes_on_before_the_next_begins() -> None:
    """The carried state reaches the first document of its row only."""
    model, ids = small(), some_ids(2, 10)
    state = model(some_ids(2, 5)).state
    positions = torch.tensor([[5, 6, 7, 0, 1, 2, 3, 4, 5, 6], [5, 6, 7, 8, 9, 10, 11, 0, 1, 2]])
    packed = model(ids, positions, state).logits
    for row, cut in [(0, 3), (1, 7)]:
        torch.testing.assert_close(packed[row, :cut], model(ids, state=state).logits[row, :cut])
        torch.testing.assert_close(packed[row, cut:], model(ids[row : row + 1, cut:]).logits[0])


def test_generation_equals_the_whole_forward_and_ignores_padding() -> None:
    model, prompt = small(), some_ids(1, 6)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    written = model.generate(prompt, **settings)
    ids = prompt
    for _ in range(8):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert written.tolist() == ids.tolist()

    padded = torch.cat([torch.full((1, 4), 9), prompt], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 6])
    assert model.generate(padded, attention_mask=mask, **settings)[:, 4:].tolist() == written.tolist()


@pytest.mark.parametrize(("embedding_size", "tied"), [(None, True), (24, True), (16, False)])
def test_tied_when_sizes_allow(embedding_size: int | None, tied: bool) -> None:
    model = small(embedding_size=embedding_size)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_dropout_only_in_training() -> None:
    model, ids = small(dropout=0.5), some_ids(1, 6)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
