"""What is mutated: a recipe, a command line, a file of data, a checkpoint. Each gives the words of a command."""

import bz2
import csv
import gzip
import io
import json
import lzma
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import pyarrow
import pyarrow.parquet
from fuzz import mutate

from shoal.config import dump_yaml, load_config
from shoal.config.names import facts
from shoal.system import manifest

TEXTS = [f"Net {i} comes in with {i * 7} fish, and goes out again." for i in range(60)]
SMALL = [
    "--model=llama-tiny", "--model.hidden-size=16", "--model.num-hidden-layers=1", "--model.num-attention-heads=2",
    "--model.intermediate-size=32", "--vocab-size=300", "--sequence-length=16", "--global-batch-size=4",
    "--per-device-train-batch-size=2", "--max-steps=2", "--nproc-per-node=2",
]  # fmt: skip
OFTEN = [
    "--precision=bf16-true",
    "--strategy=local",
    "--strategy=zero3",
    "--codec=topk",
    "--exact",
    "--tp=2",
    "--pp=2",
]

Subject = Callable[[Random, Path], list[str]]


def recipe(random: Random, folder: Path) -> list[str]:
    """A recipe of all settings, a few of its lines changed, checked whole."""
    (folder / "r.yaml").write_text(mutate.lines(random, dump_yaml(load_config(None, []))))
    return ["config", "validate", str(folder / "r.yaml")]


def setting(random: Random, folder: Path) -> list[str]:
    """One to three settings with odd values, as flags."""
    chosen = random.choices(facts(), k=random.randint(1, 3))
    (folder / "r.yaml").write_text("{}\n")
    return [
        "config",
        "validate",
        str(folder / "r.yaml"),
        *(f"{f.flag}={random.choice(mutate.ODD)}" for f in chosen),
    ]


def command(random: Random, folder: Path) -> list[str]:
    """A command line, changed. Its paths lie in the folder; a run is not started (see the test)."""
    (folder / "t.txt").write_text("\n".join(TEXTS))
    (folder / "p.txt").write_text("A net\nA fish\n")
    out, text = str(folder / "out"), str(folder / "t.txt")
    given = random.choice(
        [
            ["train", "--data", text, "--output-dir", out, *random.sample(SMALL, 5), random.choice(OFTEN)],
            ["config", "show", "--data", text, *random.sample(SMALL, 5), random.choice(OFTEN)],
            [
                "generate",
                str(folder),
                "--prompts-file",
                str(folder / "p.txt"),
                "--output-file",
                out,
                "--top-k",
                "3",
            ],
            ["export", str(folder), "--output-dir", out, "--dtype", "bfloat16"],
            ["evaluate", str(folder), "--data", text],
            ["audit", str(folder)],
            ["config", "schema"],
        ]
    )
    return mutate.words(random, given)


def data(random: Random, folder: Path) -> list[str]:
    """A file of data of some form, damaged, prepared."""
    name, content = random.choice(FORMS)()
    file = folder / name
    file.write_bytes(mutate.content(random, content))
    words = ["--data", str(file), "--cache-dir", str(folder / "cache"), "--vocab-size", "300"]
    return ["prepare", *words, *(["--text-field", "id"] if random.random() < 0.1 else [])]


def checkpoint(random: Random, folder: Path, source: Path) -> list[str]:
    """A checkpoint with a file damaged, and the manifest made to vouch for it or not, exported."""
    shutil.copytree(source, folder / source.name)
    chosen = folder / source.name
    file = random.choice([path for path in sorted(chosen.rglob("*")) if path.is_file()])
    if file.suffix == ".json" and random.random() < 0.7:
        _change_json(random, file)
    elif random.random() < 0.2:
        file.unlink()
    else:
        file.write_bytes(mutate.content(random, file.read_bytes()))
    if random.random() < 0.8 and (chosen / manifest.NAME).is_file() and file.name != manifest.NAME:
        facts = json.loads((chosen / manifest.NAME).read_text())
        manifest.write(chosen, step=facts["step"], tokens=facts["tokens"])
    return ["export", str(chosen), "--output-dir", str(folder / "out")]


def _change_json(random: Random, file: Path) -> None:
    """Give one value, or one value of a value, another kind or size."""
    whole = json.loads(file.read_text())
    at = whole
    while isinstance(at, dict) and at:
        key = random.choice(sorted(at))
        if isinstance(at[key], dict) and at[key] and random.random() < 0.7:
            at = at[key]
            continue
        at[key] = random.choice([None, -1, 0, 10**30, 0.5, "", "x", [], [[]], {}, {"a": 1}, True])
        break
    file.write_text(json.dumps(whole))


def _jsonl() -> bytes:
    return "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)).encode()


def _table(delimiter: str) -> bytes:
    written = io.StringIO()
    csv.writer(written, delimiter=delimiter).writerows([("id", "text"), *enumerate(TEXTS)])
    return written.getvalue().encode()


def _parquet() -> bytes:
    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "id": list(range(len(TEXTS)))}), written)
    return written.getvalue()


def _zip() -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", _jsonl())
        archive.writestr("b.jsonl", _jsonl())
    return written.getvalue()


FORMS: list[Callable[[], tuple[str, bytes]]] = [
    lambda: ("x.txt", "\n".join(TEXTS).encode()),
    lambda: ("x.jsonl", _jsonl()),
    lambda: ("x.csv", _table(",")),
    lambda: ("x.tsv", _table("\t")),
    lambda: ("x.parquet", _parquet()),
    lambda: ("x.jsonl.gz", gzip.compress(_jsonl())),
    lambda: ("x.jsonl.xz", lzma.compress(_jsonl())),
    lambda: ("x.txt.bz2", bz2.compress("\n".join(TEXTS).encode())),
    lambda: ("x.jsonl.zip", _zip()),
]
