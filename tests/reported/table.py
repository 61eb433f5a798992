"""What users of trainers ran into: a small input, a command, and what must come of it.

Each case stands for a kind of fault. The tests of the mechanism stand with those of its module; a case shows that the
command does what a user needs.
"""

import json
import lzma
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from reported.inputs import LINES, SIZES, model, rows, say_of_itself, tokenizer
from safetensors import safe_open

from shoal.errors import BAD_INPUT, DONE

PREPARE = "prepare --vocab-size 300 --cache-dir cache --data"
TRAIN = "train tiny.yaml --cache-dir cache --output-dir run --precision 32-true"
MODEL = (
    "train --model model --data t.jsonl --cache-dir cache --output-dir run --precision 32-true --nproc-per-node 1 "
    "--sequence-length 32 --global-batch-size 4 --per-device-train-batch-size 2 --max-steps 2 --logging-steps 1"
)

Make = Callable[[Path], None]
Check = Callable[[Path, str], None]


@dataclass(frozen=True)
class Case:
    """`words` behind `shoal`, in a folder that `make` has filled: the exit code, and what is printed.

    `check` is given the folder and the output. `line` is a whole line for a shell, in place of words: its workers are
    processes of their own.
    """

    name: str
    words: str = ""
    code: int = DONE
    says: tuple[str, ...] = ()  # regular expressions
    make: Make = lambda folder: None
    check: Check = lambda folder, output: None
    environ: dict[str, str] = field(default_factory=dict)
    line: str = ""


def file(name: str, content: str | bytes) -> Make:
    """Make a file of this content."""

    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def family(kind: str, **options: Any) -> Make:
    """Make the folder of a model."""
    return lambda folder: model(folder / "model", kind, **options)


def documents(count: int) -> Check:
    """So many documents were read."""

    def check(folder: Path, output: str) -> None:
        prepared = json.loads((folder / output.split()[-1] / "index.json").read_text())
        assert sum(shard["documents"] for shard in prepared["shards"]) == count

    return check


def trained(folder: Path, output: str) -> None:
    """The run came to its end."""
    assert json.loads((folder / "run" / "summary.json").read_text())["steps"] == 2
    assert (folder / "run" / "final" / "config.json").is_file()


def _zip_of_two(folder: Path) -> None:
    with zipfile.ZipFile(folder / "corpus.jsonl.zip", "w") as archive:
        archive.writestr("a.jsonl", rows(LINES[:20]))
        archive.writestr("b.jsonl", rows(LINES[20:]))
        archive.writestr("__MACOSX/._a.jsonl", b"\0\5\26\7")


def _frames(folder: Path) -> None:
    halves = (rows(LINES[:20]), rows(LINES[20:]))
    frames = [pyarrow.Codec("zstd").compress(half.encode(), asbytes=True) for half in halves]
    file("two.jsonl.zst", b"".join(frames))(folder)


def _linked_folder(folder: Path) -> None:
    file("elsewhere/more.txt", LINES[0])(folder)
    file("corpus/one.txt", LINES[1])(folder)
    (folder / "corpus" / "linked").symlink_to(folder / "elsewhere")
    (folder / "corpus" / "circle").symlink_to(folder / "corpus")


def _tokens_with_a_gap(folder: Path) -> None:
    tokenizer(folder / "tok", gap=9)
    tokenizer(folder / "far", gap=70_000)


def _chat(folder: Path) -> None:
    tokenizer(folder / "tok", special=("<|im_start|>", "<|im_end|>"))
    text = "<|im_start|>user\nWhat is a shoal?<|im_end|>\n<|im_start|>assistant\nMany fish.<|im_end|>\n"
    file("chat.jsonl", rows([text] * 10))(folder)


def _one_id_each(folder: Path, output: str) -> None:
    prepared = folder / output.split()[-1]
    ids = np.fromfile(
        prepared / "shard-00000.bin", json.loads((prepared / "index.json").read_text())["dtype"]
    )
    assert int((ids == 259).sum()) == 20  # <|im_start|>, behind 256 bytes and three others


def _unknown_type(folder: Path) -> None:
    model(folder / "model", "llama")
    say_of_itself(folder / "model", model_type="qwen9_future")


def _remote_code(folder: Path) -> None:
    _unknown_type(folder)
    say_of_itself(
        folder / "model", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    )
    file("model/code.py", "raise SystemExit('was run')")(folder)


def _half_a_config(folder: Path) -> None:
    model(folder / "model", "llama")
    whole = (folder / "model" / "config.json").read_text()
    (folder / "model" / "config.json").write_text(whole[: len(whole) // 2])


def _same_tensors(folder: Path, output: str) -> None:
    trained(folder, output)
    before, after = (
        safe_open(f"{folder}/{at}/model.safetensors", "pt").keys() for at in ("model", "run/final")
    )
    assert sorted(before) == sorted(after)


def _many_files(folder: Path) -> None:
    file(
        "random.py", "raise SystemExit('a module of the standard library was taken from the current folder')"
    )(folder)
    (folder / "c").mkdir()
    for i in range(3500):
        (folder / "c" / f"page-{i:06d}-scraped-from-somewhere.txt").write_text(f"Page {i} says {i * 7}.\n")


def _gemma3(folder: Path) -> None:
    model(folder / "model", "gemma3", **GEMMA3)


def _home(folder: Path) -> None:
    model(folder / "m", "llama")
    file("r.yaml", "model: {name: ~/m}\n")(folder)


def _no_folder_called_tilde(folder: Path, output: str) -> None:
    assert not (folder / "~").exists()
    assert (folder / "run" / "summary.json").is_file()


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "sliding_window": None}
GEMMA3 = {
    "text_config": SIZES
    | {"model_type": "gemma3_text", "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16},
    "vision_config": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 8,
        "patch_size": 4,
    },
    "mm_tokens_per_image": 4, "image_token_index": 10, "boi_token_index": 11, "eoi_token_index": 12,
}  # fmt: skip
BLOOM = {"n_layer": 2, "n_head": 4}
LLAMA4 = {"intermediate_size_mlp": 48, "num_local_experts": 2, "num_key_value_heads": 2, "head_dim": 8}
HOME = {"HOME": "HERE"}
OF_DIGITS = '{"text": "a line", "n": ' + "7" * 5000 + "}\n"
BY_COMMAS = "".join(f'{i},"{line}"\n' for i, line in enumerate(LINES))
BY_SEMICOLONS = "".join(f"{i};{line}\n" for i, line in enumerate(LINES))

DATA = [
    Case("zip of two", f"{PREPARE} corpus.jsonl.zip", make=_zip_of_two, check=documents(40)),
    Case("zst of two frames", f"{PREPARE} two.jsonl.zst", make=_frames, check=documents(40)),
    Case("linked folder", f"{PREPARE} corpus", make=_linked_folder, check=documents(2)),
    Case("long header", f"{PREPARE} x.csv", make=file("x.csv", f"{'c' * 140_000},text\n{BY_COMMAS}"),
         check=documents(40)),
    Case("UTF-16", f"{PREPARE} x.csv", BAD_INPUT, ("UTF-8",),
         make=file("x.csv", f"id,text\n{BY_COMMAS}".encode("utf-16"))),
    Case("semicolons", f"{PREPARE} x.csv", make=file("x.csv", f"id;text\n{BY_SEMICOLONS}"), check=documents(40)),
    Case("broken xz", f"{PREPARE} x.jsonl.xz", BAD_INPUT, ("x.jsonl.xz",),
         make=file("x.jsonl.xz", lzma.compress(rows(LINES).encode())[:-40])),
    Case("no zip", f"{PREPARE} x.jsonl.zip", BAD_INPUT, ("x.jsonl.zip",), make=file("x.jsonl.zip", "no archive")),
    Case("long integer", f"{PREPARE} x.jsonl", make=file("x.jsonl", rows(LINES) + OF_DIGITS), check=documents(41)),
    Case("comma", f"{PREPARE} 'Smith, John.txt'", make=file("Smith, John.txt", "\n".join(LINES))),
    Case("special tokens", f"{PREPARE} chat.jsonl --tokenizer tok", make=_chat, check=_one_id_each),
    Case("gap in the ids", f"{TRAIN} --tokenizer tok", make=_tokens_with_a_gap, check=trained),
    Case("large gap in the ids", f"{PREPARE} t.txt --tokenizer far", make=_tokens_with_a_gap),
    Case("many files beside a random.py", line=f"shoal {TRAIN} --data c/*.txt", make=_many_files, check=trained),
]  # fmt: skip

MODELS = [
    Case("auxiliary loss", f"{MODEL} --max-steps 1", says=("loss: [78]",),
         make=family("mixtral", **EXPERTS, output_router_logits=True, router_aux_loss_coef=1.0)),
    Case("names of experts", MODEL, make=family("mixtral", **EXPERTS), check=_same_tensors),
    Case("bloom", MODEL, make=family("bloom", **BLOOM), check=trained),
    Case("falcon with alibi", MODEL, make=family("falcon", alibi=True), check=trained),
    Case("GPT-1", f"{MODEL} --no-packing", make=family("openai-gpt"), check=trained),
    Case("multimodal Gemma 3", MODEL, make=_gemma3, check=trained),
    Case("Llama 4", MODEL, make=family("llama4_text", **LLAMA4), check=trained),
    Case("OPT in a pipeline", f"{MODEL} --nproc-per-node 2 --pp 2",
         make=family("opt", ffn_dim=48, word_embed_proj_dim=32), check=trained),
    Case("unknown type", MODEL, BAD_INPUT, ("qwen9_future",), make=_unknown_type),
    Case("remote code", MODEL, BAD_INPUT, ("code",), make=_remote_code),
    Case("half a config.json", MODEL, BAD_INPUT, ("config.json",), make=_half_a_config),
]  # fmt: skip

SETTINGS = [
    Case("no is a precision", "config show r.yaml", says=("precision: 32-true",),
         make=file("r.yaml", "train: {mixed_precision: no}\n")),
    Case("no is a way to normalize", "config show r.yaml", says=("normalize: .?no",),
         make=file("r.yaml", "strategy: {normalize: no}\n")),
    Case("~ in a recipe", MODEL.replace("--model model", "r.yaml"), make=_home, check=trained,
         environ=HOME),
    Case("~ behind =", "train tiny.yaml --cache-dir cache --data=~/t.txt --output-dir=~/run", make=_home,
         check=_no_folder_called_tilde, environ=HOME),
    Case("port of Kubernetes", TRAIN, BAD_INPUT, ("MASTER_PORT.*tcp://",),
         environ={"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "tcp://10.96.0.1:23456"}),
    Case("no world size", TRAIN, BAD_INPUT, ("WORLD_SIZE",), environ={"RANK": "0", "WORLD_SIZE": ""}),
]  # fmt: skip

OUTPUT = [
    Case("ASCII for a reader that leaves", line=f"shoal {TRAIN} --data zh.txt | head -3", check=trained,
         make=file("zh.txt", "鱼群游向大海。\n" * 400), environ={"PYTHONIOENCODING": "ascii"}),
    Case("closed", line=f"shoal {TRAIN} >&-", check=trained),
    Case("full", line=f"shoal {TRAIN} >/dev/full", check=trained),
]  # fmt: skip
