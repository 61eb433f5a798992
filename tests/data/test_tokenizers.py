"""A tokenizer is trained the same way each time; any other keeps its own idea of where a text ends."""

import json
from pathlib import Path

import numpy as np
import pytest
from corpora import Data, documents_of, files_of, some_text
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from shoal.data import tokenizer
from shoal.data.prepare import prepare
from shoal.data.shards import TokenStream
from shoal.errors import UserError

TEXTS = [some_text(seed, 300) for seed in range(20)]


def bpe(folder: Path, **roles: str) -> Path:
    """A folder as `transformers` saves it, with special tokens in the given roles."""
    tokenizer.train_bpe(TEXTS, 400, folder)
    inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    PreTrainedTokenizerFast(tokenizer_object=inner, **roles).save_pretrained(folder)
    return folder


def word_level(folder: Path, words: list[str]) -> Path:
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "</s>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    outer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", eos_token="</s>")
    outer.save_pretrained(folder)
    return folder


def test_training_is_deterministic_and_loads_in_transformers(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tokenizer.train_bpe(iter(TEXTS), 300, tmp_path / name)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert len(loaded) == 300
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 0, 0)
    assert loaded.decode(loaded.encode(TEXTS[0])) == TEXTS[0]
    assert tokenizer.boundary(loaded) == ([0], [])
    assert tokenizer.boundary(tokenizer.special_ids(tmp_path / "a")) == ([0], [])


def test_a_vocabulary_below_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--vocab-size 256"):
        tokenizer.train_bpe(TEXTS, 256, tmp_path)


@pytest.mark.parametrize(
    ("roles", "prefix", "suffix"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, ["<s>"], ["</s>"]),
        ({"eos_token": "</s>"}, [], ["</s>"]),
        ({"bos_token": "</s>", "eos_token": "</s>"}, ["</s>"], []),
    ],
)
def test_documents_stand_between_the_tokens_that_the_tokenizer_states(
    corpus: Path, tmp_path: Path, roles: dict[str, str], prefix: list[str], suffix: list[str]
) -> None:
    folder = bpe(tmp_path / "given", **roles)
    reference = AutoTokenizer.from_pretrained(folder)
    prepared = prepare(Data([str(corpus)], str(tmp_path / "cache")), str(folder), lambda line: None)
    stream = TokenStream(prepared, "train")
    expected: list[int] = []
    for text in documents_of(prepared, "train"):
        assert text in [file.read_text() for file in corpus.iterdir()]
        expected += reference.convert_tokens_to_ids(prefix)
        expected += reference(text, add_special_tokens=False)["input_ids"]
        expected += reference.convert_tokens_to_ids(suffix)
    assert np.array_equal(stream.read(0, stream.tokens)[0], expected)
    assert tokenizer.boundary(reference) == (stream.prefix, stream.suffix)
    assert stream.shared_boundary == (not suffix)
    assert stream.vocab_size == len(reference) == tokenizer.vocab_size(reference)


@pytest.mark.parametrize("split", [False, True])
def test_special_tokens_in_a_text_are_what_transformers_makes_of_them(tmp_path: Path, split: bool) -> None:
    folder = bpe(
        tmp_path / "given",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_start|>x"],
    )
    texts = [
        "<|im_start|>user\n潮 fish</s> <s>swim</s>",
        "<|im_start|>x <|im_start|> <|im_end|>",
        "plain text",
    ]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(rows)
    lines: list[str] = []
    data = Data(
        [str(tmp_path / "a.jsonl")], str(tmp_path / "cache"), eval_fraction=0, split_special_tokens=split
    )
    prepared = prepare(data, str(folder), lines.append)
    stream, reference = TokenStream(prepared, "train"), AutoTokenizer.from_pretrained(folder)
    ids, owners = stream.read(0, stream.tokens)
    for number, text in enumerate(texts):
        inside = reference(text, add_special_tokens=False, split_special_tokens=split)["input_ids"]
        expected = [reference.bos_token_id, *inside, reference.eos_token_id]
        assert ids[owners == number].tolist() == expected
    said = "special tokens written in the text: 2 <|im_start|>, 2 </s>, 1 <s>, 1 <|im_start|>x; each is encoded as "
    assert lines[-1].startswith(said + ("plain text" if split else "that token"))


@pytest.mark.parametrize(("largest", "dtype"), [(999, "uint16"), (65_535, "uint16"), (70_299, "uint32")])
def test_ids_may_have_gaps(corpus: Path, tmp_path: Path, largest: int, dtype: str) -> None:
    folder = bpe(tmp_path / "given", eos_token="</s>")
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    common = vocabulary["Ġ"]
    (word,) = (word for word, number in vocabulary.items() if number == common)
    vocabulary[word] = largest
    (folder / "tokenizer.json").write_text(json.dumps(content))
    prepared = prepare(Data([str(corpus)], str(tmp_path / "cache")), str(folder), lambda line: None)
    stream = TokenStream(prepared, "train")
    ids, _ = stream.read(0, stream.tokens)
    assert ids.max() == largest
    assert stream.vocab_size == largest + 1
    assert json.loads((prepared / "index.json").read_text())["dtype"] == dtype
    assert tokenizer.vocab_size(AutoTokenizer.from_pretrained(folder)) == largest + 1
    assert [
        text
        for text in documents_of(prepared, "train")
        if text not in {f.read_text() for f in corpus.iterdir()}
    ] == []


def test_a_tokenizer_without_an_end_is_refused(corpus: Path, tmp_path: Path) -> None:
    folder = bpe(tmp_path / "given", unk_token="<unk>")
    with pytest.raises(UserError, match=r"--tokenizer.*has no eos_token"):
        prepare(Data([str(corpus)], str(tmp_path / "cache")), str(folder), lambda line: None)


def test_a_folder_without_the_fast_file_is_converted(corpus: Path, tmp_path: Path) -> None:
    folder = bpe(tmp_path / "given", bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (slow / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (slow / "config.json").write_text('{"model_type": "gpt2"}')
    data = Data([str(corpus)], str(tmp_path / "cache"))
    prepared = [prepare(data, str(name), lambda line: None) for name in (slow, slow, folder)]
    assert prepared[0] == prepared[1]
    assert documents_of(prepared[0], "train") == documents_of(prepared[2], "train")


@pytest.mark.parametrize("text", ["潮の流れに 魚の群れが 泳ぐ " * 20, "entirely different words here " * 20])
def test_a_tokenizer_of_another_language_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    folder = word_level(tmp_path / "given", ["the", "fish"])
    with pytest.raises(UserError, match="no token for 100% of the characters"):
        prepare(Data([str(tmp_path / "a.txt")], str(tmp_path / "cache")), str(folder), lambda line: None)


@pytest.mark.parametrize(("strange", "refused"), [(15, False), (25, True)])
def test_a_few_unknown_words_are_not_another_language(tmp_path: Path, strange: int, refused: bool) -> None:
    (tmp_path / "a.txt").write_text("fish " * (100 - strange) + "what " * strange)
    folder = word_level(tmp_path / "given", ["the", "fish"])
    data = Data([str(tmp_path / "a.txt")], str(tmp_path / "cache"))
    if refused:
        with pytest.raises(UserError, match="no token for 25%"):
            prepare(data, str(folder), lambda line: None)
    else:
        prepare(data, str(folder), lambda line: None)


@pytest.mark.parametrize("content", [None, "{"])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, corpus: Path, content: str | None) -> None:
    (tmp_path / "given").mkdir()
    if content:
        (tmp_path / "given" / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"--tokenizer .*given"):
        prepare(Data([str(corpus)], str(tmp_path / "cache")), str(tmp_path / "given"), lambda line: None)


def test_a_name_that_is_nowhere_is_refused(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--tokenizer no/where: no such folder, and not found on the hub"):
        prepare(Data([str(corpus)], str(tmp_path / "cache")), "no/where", lambda line: None)
