"""The memory that `shoal export` takes for a checkpoint in pieces, against the largest file that it writes.

The checkpoint is made here, of a Llama of 0.8 GB as four ranks hold it; the export is a process of its own:
`python -m bench.export CHECKPOINT OUT`.
"""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.jobs import Corpus

RANKS = 4
SHARD = "200MB"
MODEL = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_hidden_layers": 14}


def peak_over_shard(corpus: Corpus) -> tuple[float, float]:
    """The most bytes above those resident when the verb begins, modules loaded, and those of the largest shard."""
    with TemporaryDirectory(dir=corpus.work) as name:
        source, target = Path(name, "checkpoint-1"), Path(name, "out")
        _save(source, corpus.tokenizer)
        command = [sys.executable, "-m", "bench.export", str(source), str(target)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        shards = [file.stat().st_size for file in target.glob("*.safetensors")]
    return float(json.loads(said.splitlines()[-1])), float(max(shards))


def _save(folder: Path, tokenizer: Path) -> None:
    """As the ranks of a run under ZeRO 3 leave it, a rank at a time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from shoal import checkpoint
    from shoal.data import tokenizer as tokenizers
    from shoal.models.export import describe
    from shoal.tensors import tensor_files
    from shoal.tensors.piece import Block

    with torch.device("meta"):
        config = AutoConfig.for_model("llama", tie_word_embeddings=True, **MODEL)
        model = AutoModelForCausalLM.from_config(config)
    parts = folder.with_name("parts")
    (parts / "model").mkdir(parents=True)
    for rank in range(RANKS):
        held: dict[str, torch.Tensor] = {}
        places: tensor_files.Places = {}
        for name, p in model.named_parameters():
            rows = len(p) // RANKS
            held[name] = torch.full((rows, *p.shape[1:]), 0.01 * rank)
            zero = (0,) * p.dim()
            block = Block(zero, (rank * rows, *zero[1:]), tuple(held[name].shape))
            places[name] = (tuple(p.shape), (block,))
        tensor_files.write(parts / checkpoint.rank_file("model", rank), held, places)
    about = partial(describe, model, tokenizers.load(tokenizer))
    checkpoint.write(folder, {}, checkpoint.Progress(step=1), about, parts=parts)


def _measure(source: Path, target: Path) -> int:
    from transformers import LlamaForCausalLM  # noqa: F401  (what the verb would load)

    from shoal.checkpoint.export import ExportOptions, run

    Path("/proc/self/clear_refs").write_text("5")  # the highest of so far begins anew
    before = _resident("VmRSS")
    run(ExportOptions(source, target, max_shard_size=SHARD))
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """Bytes, of what the kernel says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(_measure(Path(sys.argv[1]), Path(sys.argv[2])))
