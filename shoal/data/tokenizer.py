"""Tokenizers: trained on documents, or taken from a folder or the Hugging Face hub; a folder in the end."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol

from shoal.data.cache import made
from shoal.errors import UserError, first_line
from shoal.system.locks import Report

END_OF_TEXT = "<|endoftext|>"
BYTES = 256
NEVER = r"(?!)"  # a pattern that nothing matches
LOST_SHARE = 0.2  # a tokenizer that cannot write more than this of the text was made for another
# What a tokenizer folder may hold; the first is what the `tokenizers` library reads.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


class SpecialTokens(Protocol):
    """What `boundary` asks of a tokenizer; those of `transformers` have it."""

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text."""


@dataclass(frozen=True)
class SpecialIds:
    """The special tokens of a folder, read without importing `transformers`."""

    bos_token_id: int | None
    eos_token_id: int | None


def train_bpe(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE, and save it as a folder that `AutoTokenizer` loads.

    Its one special token, `<|endoftext|>`, is id 0. A small text gives fewer than `vocab_size` entries.
    The same texts give the same bytes. Raises UserError for a vocabulary too small for the 256 bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size <= BYTES:
        raise UserError(f"--vocab-size {vocab_size}", "bytes alone take 257 entries", "set it higher")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def fetch(name: str, cache: Path, report: Report) -> Path:
    """A folder with the tokenizer of a folder or hub name, in the form that the `tokenizers` library reads.

    One that says too little of itself is loaded by `transformers` and saved under `cache`.
    """
    source = Path(name).expanduser() if Path(name).expanduser().is_dir() else _downloaded(name)
    if (source / "tokenizer.json").is_file() and special_ids(source).eos_token_id is not None:
        return source
    folder = cache / fingerprint(source)

    def convert(building: Path) -> None:
        loaded = load(str(source))
        if not getattr(loaded, "is_fast", False):
            raise UserError(f"--tokenizer {name}", "it has no fast form", "name one with a tokenizer.json")
        loaded.save_pretrained(building)

    made(folder, convert, report)
    return folder


def load(folder_or_name: str | Path) -> Any:
    """The tokenizer as `transformers` loads it (importing torch with it); no code of the folder is run."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder_or_name), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        found = f"no tokenizer could be loaded ({first_line(error)})"
        raise UserError(f"--tokenizer {folder_or_name}", found, "name one that has it") from error


def boundary(tokenizer: SpecialTokens) -> tuple[list[int], list[int]]:
    """The ids that stand before and after every document: (prefix, suffix).

    One token for both ends stands before only; a tokenizer without an end of text raises UserError.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is None:
        found = "it has no eos_token, so documents could not be told apart"
        raise UserError("--tokenizer", found, "add one in tokenizer_config.json, or set --tokenizer train")
    if bos == eos:
        return [eos], []
    return ([] if bos is None else [bos]), [eos]


def special_ids(folder: Path) -> SpecialIds:
    """The ids of the first and last token of a text, as the files of a tokenizer folder state them."""
    tokenizer = open_fast(folder)
    stated: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            stated |= json.loads((folder / name).read_text(encoding="utf-8"))

    def id_of(role: str) -> int | None:
        token = stated.get(role)
        text = token["content"] if isinstance(token, dict) else token
        return None if text is None else tokenizer.token_to_id(text)

    return SpecialIds(id_of("bos_token"), id_of("eos_token"))


def open_fast(folder: Path, split_special_tokens: bool = False) -> Any:
    """The `tokenizers.Tokenizer` of a folder, set to encode documents as they stand: whole and unpadded.

    `<|endoftext|>` and its like inside a document are that token, or with `split_special_tokens` plain text.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"--tokenizer {folder}", f"tokenizer.json: {error}", "name a whole folder") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = split_special_tokens
    return tokenizer


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """What finds the special tokens of a `tokenizers.Tokenizer` where they are written in a text."""
    words = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    longest_first = sorted(filter(None, words), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or NEVER)


def vocab_size(tokenizer: Any) -> int:
    """One more than the largest id, of a tokenizer of `tokenizers` or `transformers`; ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def copy_files(source: Path, target: Path) -> None:
    """Copy a tokenizer, and nothing else of a model's folder."""
    target.mkdir(exist_ok=True)
    for file in _files_of(source):
        shutil.copyfile(file, target / file.name)


def fingerprint(folder: Path) -> str:
    """SHA-256 over the files of a tokenizer."""
    digest = hashlib.sha256()
    for file in _files_of(folder):
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def check_match(tokenizer: Any, texts: Sequence[str], name: str) -> None:
    """Raise UserError where a `tokenizers.Tokenizer` cannot write a fifth of the characters of a sample."""
    unknown = getattr(tokenizer.model, "unk_token", None)
    lost = total = 0
    for text, encoding in zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
        written = bytearray(len(text))
        for token, (start, stop) in zip(encoding.tokens, encoding.offsets, strict=True):
            if token != unknown:
                written[start:stop] = b"\1" * (stop - start)
        visible = [known for known, character in zip(written, text, strict=True) if not character.isspace()]
        total += len(visible)
        lost += visible.count(0)
    if lost > LOST_SHARE * total:
        found = f"it has no token for {lost / total:.0%} of the characters of the data"
        raise UserError(f"--tokenizer {name}", found, "name one for this language, or set --tokenizer train")


def _files_of(folder: Path) -> list[Path]:
    return [folder / name for name in FILES if (folder / name).is_file()]


def _downloaded(name: str) -> Path:
    """The tokenizer's files of a model on the hub, from its cache where they are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=[*FILES, "config.json"]))
    except (OSError, ValueError, HFValidationError) as error:
        found = f"no such folder, and not found on the hub ({shorten(str(error), 160)})"
        change = "name a folder, a hub name, or train (HF_HUB_OFFLINE=1 asks no network)"
        raise UserError(f"--tokenizer {name}", found, change) from error
