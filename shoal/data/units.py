"""Units of work: the sources are cut into them by bytes alone, and each becomes one token shard."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shoal.data.documents import read_documents, spans_of
from shoal.data.shards import Shard, content_hash, write_shard
from shoal.data.sources import Part, Span
from shoal.data.tokenizer import open_fast, special_tokens

UNITS = 64  # aimed at: enough to keep many processes evenly busy
MIN_UNIT_BYTES, MAX_UNIT_BYTES = 256 << 10, 64 << 20  # what a shard is worth, and what a kill may cost
JOB = "job.json"
BATCH_CHARACTERS = 1 << 20

Unit = list[Span]


def cut_units(parts: Sequence[Part]) -> list[Unit]:
    """The parts in order as units of about equal bytes: small files together, large files in stretches."""
    total = sum(part.size for part in parts)
    unit_bytes = min(max(total // UNITS, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    units: list[Unit] = []
    filled = unit_bytes
    for span in (span for part in parts for span in spans_of(part, unit_bytes)):
        if filled + span.size > unit_bytes:
            units.append([])
            filled = 0
        units[-1].append(span)
        filled += span.size
    return units


def bytes_of(unit: Unit) -> int:
    """About how many bytes a unit reads."""
    return sum(span.size for span in unit)


@dataclass(frozen=True)
class Job:
    """Everything a process must know to turn unit `i` into token shard `i`."""

    units: list[Unit]
    text_field: str
    tokenizer: str
    split_special_tokens: bool
    prefix: list[int]
    suffix: list[int]
    dtype: str

    def save(self, file: Path) -> None:
        """Write the job as JSON, each part once."""
        numbers = {part: number for number, part in enumerate(_parts_of(self.units))}
        facts = {name: value for name, value in vars(self).items() if name != "units"}
        units = [[[numbers[s.part], s.size, s.start, s.stop] for s in unit] for unit in self.units]
        file.write_text(json.dumps({**facts, "parts": [asdict(part) for part in numbers], "units": units}))

    @classmethod
    def load(cls, file: Path) -> "Job":
        """Read what `save` wrote."""
        facts = json.loads(file.read_text())
        parts = [Part(**part) for part in facts.pop("parts")]
        units = [[Span(parts[number], *rest) for number, *rest in unit] for unit in facts.pop("units")]
        return cls(units=units, **facts)


class UnitTokenizer:
    """Turns the units of one job into token shards in one folder."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.folder = job, folder
        self.tokenizer = open_fast(Path(job.tokenizer), job.split_special_tokens)
        self.special_tokens = special_tokens(self.tokenizer)

    def write(self, number: int) -> Shard:
        """Tokenize unit `number`; the same bytes come out whichever process does it. Raises UserError."""
        unit, skipped, met = self.job.units[number], Counter[str](), Counter[str]()
        texts = (text for span in unit for text in read_documents(span, self.job.text_field, skipped))
        shard = write_shard(self.folder, number, self._encoded(texts, met))
        return replace(shard, skipped=dict(skipped), special_tokens=dict(met))

    def _encoded(self, texts: Iterable[str], met: Counter[str]) -> Iterator[tuple[np.ndarray, int, int]]:
        prefix, suffix, dtype = self.job.prefix, self.job.suffix, self.job.dtype
        for batch in _batches(texts):
            for text in batch:
                met.update(self.special_tokens.findall(text))
            for text, encoding in zip(batch, self._encode(batch), strict=True):
                data = text.encode()
                yield np.array([*prefix, *encoding.ids, *suffix], dtype), len(data), content_hash(data)

    def _encode(self, batch: list[str]) -> Any:
        return self.tokenizer.encode_batch_fast(batch, add_special_tokens=False)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _parts_of(units: Iterable[Unit]) -> dict[Part, None]:
    return dict.fromkeys(span.part for unit in units for span in unit)
