"""What was read and what was not, in a few lines: counted while preparing, kept in the index."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

MOST_KINDS = 8


def totals(index: dict[str, Any]) -> Counter[str]:
    """The documents, tokens and UTF-8 bytes of a prepared corpus over all its splits."""
    return _sum(
        {name: split[name] for name in ("documents", "tokens", "bytes")} for split in index["splits"].values()
    )


def lines(index: dict[str, Any], left_out: Counter[str]) -> Iterator[str]:
    """What to say of a prepared corpus; `left_out` counts the files that were not read, by reason."""
    counts = totals(index)
    files = "1 file" if index["files"] == 1 else f"{index['files']:,} files"
    read = f"read {files}: {counts['documents']:,} documents, {counts['bytes']:,} bytes of text"
    skipped = _sum(shard["skipped"] for shard in index["shards"])
    rows = f"; skipped {skipped.total():,} without text ({_listed(skipped)})" if skipped else ""
    others = f"; left out {left_out.total():,} ({_listed(left_out)})" if left_out else ""
    yield read + rows + others
    if special := _sum(shard["special_tokens"] for shard in index["shards"]):
        how = "plain text (--split-special-tokens)"
        if not index["split_special_tokens"]:
            how = "that token (--split-special-tokens makes it plain text)"
        yield f"special tokens written in the text: {_listed(special)}; each is encoded as {how}"


def _sum(counts: Iterable[dict[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for some in counts:
        total.update(some)
    return total


def _listed(counts: Counter[str]) -> str:
    kinds = counts.most_common()
    rest = sum(count for _, count in kinds[MOST_KINDS:])
    shown = [f"{count:,} {kind}" for kind, count in kinds[:MOST_KINDS]]
    return ", ".join([*shown, f"{rest:,} other"] if rest else shown)
