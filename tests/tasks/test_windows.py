"""Windows of packed documents, and rows of one: every token is a label once, and nothing crosses a document."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from shoal.config import load_config
from shoal.data import tokenizer
from shoal.data.batches import ABSENT, Batches
from shoal.data.prepare import prepare
from shoal.data.shards import TokenStream
from shoal.models.isolation import PADDING
from shoal.models.loss import IGNORED
from shoal.tasks.causal_lm import Rows, Windows

LENGTH = 16
ROLES = {
    "one token between": {"bos_token": "</s>", "eos_token": "</s>"},
    "begin and end": {"bos_token": "<s>", "eos_token": "</s>"},
    "end alone": {"eos_token": "</s>"},
}


@pytest.fixture(scope="module", params=ROLES)
def stream(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TokenStream:
    """The train split of a small corpus, for each way in which a tokenizer marks where a document ends."""
    folder = tmp_path_factory.mktemp("windows")
    texts = [f"{i} " + "ebb and flow, " * (i % 9) for i in range(40)]
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    tokenizer.train_bpe(texts, 300, folder / "tokenizer")
    inner = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    outer = PreTrainedTokenizerFast(tokenizer_object=inner, **ROLES[request.param])
    outer.save_pretrained(folder / "tokenizer")
    config = load_config(None, [], {}, data=str(folder / "*.txt"), cache_dir=str(folder / "cache")).config
    made = TokenStream(prepare(config.data, str(folder / "tokenizer"), lambda line: None), "train")
    assert made.shared_boundary == (request.param == "one token between")
    return made


def all_ids(windows: Windows | Rows) -> np.ndarray:
    return np.append(np.arange(len(windows)), ABSENT)


@pytest.mark.parametrize("kind", [Windows, Rows])
@pytest.mark.parametrize("length", [2, 3, LENGTH, 50, 100_000])
def test_label_counts_are_those_of_the_collated_rows(
    stream: TokenStream, length: int, kind: type[Windows] | type[Rows]
) -> None:
    windows = kind(stream, length)
    ids = all_ids(windows)
    collated = (windows.collate(ids)["labels"].numpy() != IGNORED).sum(1)
    assert np.array_equal(windows.label_counts(ids), collated)
    assert np.array_equal(windows.label_counts(ids[None]), collated[None])


@pytest.mark.parametrize("kind", [Windows, Rows])
@pytest.mark.parametrize("length", [2, LENGTH, 1000])
def test_every_token_is_a_label_once_but_the_first_of_a_document(
    stream: TokenStream, length: int, kind: type[Windows] | type[Rows]
) -> None:
    windows = kind(stream, length)
    labels = windows.collate(np.arange(len(windows)))["labels"].numpy().reshape(-1)
    tokens, owners = stream.read(0, stream.tokens)
    first = np.append(True, owners[1:] != owners[:-1])
    expected = tokens[1:] if stream.shared_boundary else tokens[~first]
    assert np.array_equal(labels[labels != IGNORED], expected)


def test_a_label_stands_where_it_is_predicted_within_one_document(stream: TokenStream) -> None:
    windows = Windows(stream, LENGTH)
    rows = {name: t.numpy() for name, t in windows.collate(np.arange(len(windows))).items()}
    tokens, owners = stream.read(0, stream.tokens)
    for row in range(len(windows)):
        for column in range(LENGTH):
            at, label = row * LENGTH + column, rows["labels"][row, column]
            if label == IGNORED:
                assert at + 1 >= len(tokens) or owners[at] != owners[at + 1]
                continue
            assert rows["input_ids"][row, column] == tokens[at]
            assert label == tokens[at + 1]
            assert rows["documents"][row, column] == owners[at]
            assert stream.shared_boundary or owners[at] == owners[at + 1]


@pytest.mark.parametrize("kind", [Windows, Rows])
def test_the_labels_of_a_step_are_counted_from_the_index_alone(
    stream: TokenStream, monkeypatch: pytest.MonkeyPatch, kind: type[Windows] | type[Rows]
) -> None:
    windows = kind(stream, LENGTH)
    made = Batches(windows, seed=1, global_batch_size=7, micro_batch_size=7, epochs=2.0)
    expected = [int((made.at(s).micro_batch(0)["labels"] != IGNORED).sum()) for s in range(made.steps)]
    monkeypatch.setattr(stream, "read", None)
    assert [made.at(step).labels for step in range(made.steps)] == expected
    assert sum(expected) == 2 * windows.label_counts(np.arange(len(windows))).sum()


@pytest.mark.parametrize("kind", [Windows, Rows])
def test_an_absent_row_teaches_nothing(stream: TokenStream, kind: type[Windows] | type[Rows]) -> None:
    rows = kind(stream, LENGTH).collate(np.array([ABSENT, 0]))
    assert (rows["labels"][0] == IGNORED).all()
    assert (rows["documents"][0] == PADDING).all()
    assert (rows["labels"][1] != IGNORED).any()


@pytest.mark.parametrize("length", [2, LENGTH, 1000])
def test_a_row_is_of_one_document_and_goes_on_where_the_last_one_ended(
    stream: TokenStream, length: int
) -> None:
    made = Rows(stream, length)
    rows = {name: t.numpy() for name, t in made.collate(np.arange(len(made))).items()}
    tokens, owners = stream.read(0, stream.tokens)
    at = 0
    for ids, labels, documents in zip(*rows.values(), strict=True):
        real = documents != PADDING
        count = int(real.sum())
        assert real[:count].all()
        assert (labels[:count] != IGNORED).all()
        assert (labels[count:] == IGNORED).all()
        while owners[at] != documents[0]:  # a last token that predicts nothing
            at += 1
        assert (owners[at : at + count] == documents[:count]).all()
        assert (tokens[at : at + count] == ids[:count]).all()
        assert (tokens[at + 1 : at + count + 1] == labels[:count]).all()
        assert count == length or at + count in (
            *(made.stream.starts - 1),
            *made.stream.starts,
            len(tokens) - 1,
        )
        at += count


def test_paths_are_those_of_the_prepared_folder(stream: TokenStream) -> None:
    assert Path(stream.folder).is_dir()
    assert stream.documents > 30
