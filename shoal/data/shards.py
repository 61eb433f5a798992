"""Token shards: files of token ids, and the splits that say which documents of them stand in which stream."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from shoal.errors import ShoalError
from shoal.system.manifest import sha256

FORMAT = 2  # of the folder; also raised when the same sources would give other documents or tokens
UNFINISHED = ".part"  # the end of a file's name while it is written
MOST_MAPS = 128  # token shards that a stream keeps open
Split = Literal["train", "eval"]

# Columns of `shard-*.npy`, one row a document; its hash decides on its split.
TOKENS, BYTES, HASH = range(3)
# Columns of `train.npy` and `eval.npy`, one row a document and a last one that holds the end of the stream.
START, SHARD, OFFSET, TEXT_BYTES = range(4)
HASH_BITS = 63  # fits an int64


@dataclass(frozen=True)
class Shard:
    """One token shard: its number, what it holds, and the SHA-256 of its ids and of its documents' index."""

    number: int
    documents: int
    tokens: int
    ids_sha256: str
    documents_sha256: str
    skipped: dict[str, int] = field(default_factory=dict)  # rows without text, by reason
    special_tokens: dict[str, int] = field(default_factory=dict)  # those that are written in the text

    @property
    def ids_file(self) -> str:
        """Its file of token ids."""
        return f"shard-{self.number:05d}.bin"

    @property
    def documents_file(self) -> str:
        """Its index: int64 [documents, 3], the tokens, UTF-8 bytes and hash of each document."""
        return f"shard-{self.number:05d}.npy"


def content_hash(text: bytes) -> int:
    """A number in [0, 2**63) that depends on the text alone: equal documents fall into the same split."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> (64 - HASH_BITS)


def held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are kept for evaluation: bool [documents] from their hashes, int64 [documents].

    Where a fraction above 0 takes none of two documents or more, or all there are, one is moved to the other side.
    """
    chosen = hashes < int(fraction * 2**HASH_BITS)
    if chosen.all() and len(hashes):
        chosen[hashes.argmax()] = False
    elif len(hashes) >= 2 and fraction > 0 and not chosen.any():
        chosen[hashes.argmin()] = True
    return chosen


def write_shard(folder: Path, number: int, documents: Iterable[tuple[np.ndarray, int, int]]) -> Shard:
    """Write (ids, UTF-8 bytes, hash) of documents as they come; a shard has its name once it is whole."""
    index, digest, tokens = [], hashlib.sha256(), 0
    aside = folder / f"shard-{number:05d}.{os.getpid()}{UNFINISHED}"
    with aside.open("wb") as file:
        for ids, text_bytes, text_hash in documents:
            data = ids.tobytes()
            digest.update(data)
            file.write(data)
            tokens += len(ids)
            index.append((len(ids), text_bytes, text_hash))
        _flush_to_disk(file)
    index_aside = aside.with_suffix(f".index{UNFINISHED}")
    with index_aside.open("wb") as file:
        np.save(file, np.array(index, np.int64).reshape(-1, 3), allow_pickle=False)
        _flush_to_disk(file)
    shard = Shard(number, len(index), tokens, digest.hexdigest(), sha256(index_aside))
    aside.rename(folder / shard.ids_file)
    index_aside.rename(folder / shard.documents_file)
    return shard


def write_splits(folder: Path, shards: Sequence[Shard], chosen: np.ndarray) -> dict[str, dict[str, Any]]:
    """Write `train.npy` and `eval.npy`; `chosen` says of every document whether it is held out.

    Returns the counts and checksum of each.
    """
    return {
        split: _write_split(folder / f"{split}.npy", shards, mask)
        for split, mask in (("train", ~chosen), ("eval", chosen))
    }


def _write_split(path: Path, shards: Sequence[Shard], mask: np.ndarray) -> dict[str, Any]:
    document = tokens = text_bytes = 0
    documents = int(mask.sum())
    with path.open("wb") as file:  # not a memory map: on a full disk that ends in a signal, this in an error
        header = {"descr": "<i8", "fortran_order": False, "shape": (documents + 1, 4)}
        np.lib.format.write_array_header_1_0(file, header)
        for position, shard in enumerate(shards):
            index = np.load(path.parent / shard.documents_file, allow_pickle=False)
            mine = mask[document : document + len(index)]
            kept, offsets = index[mine], np.cumsum(index[:, TOKENS]) - index[:, TOKENS]
            rows = np.empty((len(kept), 4), np.int64)
            rows[:, START] = tokens + np.cumsum(kept[:, TOKENS]) - kept[:, TOKENS]
            rows[:, SHARD] = position
            rows[:, OFFSET] = offsets[mine]
            rows[:, TEXT_BYTES] = kept[:, BYTES]
            file.write(rows.tobytes())
            document += len(index)
            tokens += int(kept[:, TOKENS].sum())
            text_bytes += int(kept[:, BYTES].sum())
        file.write(np.array([tokens, 0, 0, 0], np.int64).tobytes())
        _flush_to_disk(file)
    return {"documents": documents, "tokens": tokens, "bytes": text_bytes, "sha256": sha256(path)}


def write_index(folder: Path, shards: Sequence[Shard], splits: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write `index.json`, which makes a folder of shards a prepared corpus."""
    index = {"format": FORMAT, **facts, "splits": splits, "shards": [asdict(shard) for shard in shards]}
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")


def token_dtype(vocab_size: int) -> str:
    """The narrowest type for the ids of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class TokenStream:
    """One split of a prepared corpus: its documents one after the other, each with its boundary tokens.

    Files are memory-mapped, so opening costs the same at any size, and processes share the pages.
    """

    def __init__(self, folder: str | Path, split: Split) -> None:
        self.folder, self.split = Path(folder), split
        index = load_index(self.folder)
        facts = index["splits"][split]
        self.tokens: int = facts["tokens"]
        self.documents: int = facts["documents"]
        self.bytes: int = facts["bytes"]  # UTF-8 bytes of the text, without boundaries: for bits per byte
        self.vocab_size: int = index["vocab_size"]
        self.prefix: list[int] = index["prefix"]
        self.suffix: list[int] = index["suffix"]
        self._sha256: str = facts["sha256"]
        self._dtype = np.dtype(index["dtype"])
        self._shards = [Shard(**facts) for facts in index["shards"]]
        # Each map takes a file descriptor, of which a process may have 1024.
        self._map = lru_cache(MOST_MAPS)(self._open_map)

    @property
    def starts(self) -> np.ndarray:
        """Where each document starts in the stream: int64 [documents], ascending, memory-mapped."""
        return self._rows[:-1, START]

    @property
    def shared_boundary(self) -> bool:
        """Whether the token that begins a document also ends the one before it."""
        return not self.suffix

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens [start, stop) of the stream and the ordinals of their documents: int64 [stop - start].

        Raises IndexError outside [0, tokens].
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a stream of {self.tokens}")
        ids, documents = np.empty(stop - start, np.int64), np.empty(stop - start, np.int64)
        document = int(np.searchsorted(self._rows[:, START], start, side="right")) - 1
        position = start
        while position < stop:
            begin, shard, offset, _ = self._rows[document].tolist()
            end = min(stop, int(self._rows[document + 1, START]))
            into = slice(position - start, end - start)
            ids[into] = self._map(shard)[offset + position - begin : offset + end - begin]
            documents[into] = document
            position, document = end, document + 1
        return ids, documents

    def verify(self) -> None:
        """Compare every file with its checksum; raises ShoalError that names the first one that differs."""
        expected = {f"{self.split}.npy": self._sha256}
        for shard in self._shards:
            expected |= {shard.ids_file: shard.ids_sha256, shard.documents_file: shard.documents_sha256}
        for name, digest in expected.items():
            file = self.folder / name
            if not file.is_file() or sha256(file) != digest:
                raise ShoalError(f"{file} is missing or damaged; remove {self.folder} and prepare it again")

    @cached_property
    def _rows(self) -> np.ndarray:
        return np.load(self.folder / f"{self.split}.npy", mmap_mode="r", allow_pickle=False)

    def _open_map(self, shard: int) -> np.ndarray:
        return np.memmap(self.folder / self._shards[shard].ids_file, self._dtype, mode="r")


def all_hashes(folder: Path, shards: Iterable[Shard]) -> np.ndarray:
    """The content hashes of all documents of the shards, int64 [documents]."""
    loaded = [np.load(folder / shard.documents_file, allow_pickle=False)[:, HASH] for shard in shards]
    return np.concatenate([np.empty(0, np.int64), *loaded])


def _flush_to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def load_index(folder: Path) -> dict[str, Any]:
    """What `write_index` wrote. Raises ShoalError for a folder that holds no prepared data, or of another format."""
    try:
        index = json.loads((folder / "index.json").read_text())
    except FileNotFoundError:
        raise ShoalError(f"{folder} holds no prepared data; run shoal prepare") from None
    if index["format"] != FORMAT:
        raise ShoalError(f"{folder} has format {index['format']}, not {FORMAT}; run shoal prepare again")
    return dict(index)
