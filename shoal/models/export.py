"""The weights of a checkpoint as a Hugging Face folder, never whole in memory.

Written aside from blocks of tensors, read again and compared, moved into place.
"""

import copy
import json
import math
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from shoal.errors import ShoalError, UserError
from shoal.models.families import CAUSAL, FAMILIES, family_of
from shoal.models.pretrained import UNREADABLE, last_line, quiet
from shoal.models.written import Blocks, Written
from shoal.tensors import tensor_files
from shoal.tensors.tensor_files import Stored

SAMPLE_TOKENS = 16
MAX_SHARD_SIZE = "5GB"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FRONT_MATTER = {"library_name": "transformers", "tags": ["shoal"]}


def describe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write what `export` needs beside the weights: both configurations, and the tokenizer's files."""
    (folder / "config.json").write_text(model.config.to_json_string())
    if model.can_generate():
        (folder / "generation_config.json").write_text(_generation(model, tokenizer).to_json_string())
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> GenerationConfig:
    """The model's configuration of generation, with the tokenizer's special tokens where it has none."""
    special: GenerationConfig = copy.deepcopy(model.generation_config)
    if tokenizer is None:
        return special
    for role in ("eos_token_id", "bos_token_id", "pad_token_id"):
        if getattr(special, role) is None:
            setattr(special, role, getattr(tokenizer, role))
    if special.pad_token_id is None:
        special.pad_token_id = tokenizer.eos_token_id
    return special


def export(
    source: Path,
    folder: Path,
    card: Mapping[str, Any],
    *,
    max_shard_size: str = MAX_SHARD_SIZE,
    dtype: str | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Leave `folder` with what `save_pretrained` would of the model in `source`, and a model card made of `card`.

    `source` holds weights, whole or in pieces, and what `describe` has left beside them. `dtype` is that of the
    tensors written ("bfloat16"); that of the checkpoint by default. The folder is there once every block has been
    read again as it was, and `check` has not raised for it. Raises UserError where `source` is no whole model or
    there is something in `folder`, ShoalError where it cannot be written or is not the same.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"export to {folder}", "it exists", "name another, or remove it")
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    model = _skeleton(source)
    tensors = _Tensors(Stored(source), model, DTYPES[dtype] if dtype else None)
    try:
        aside.mkdir(parents=True)
        for file in (file for file in source.iterdir() if file.suffix != ".safetensors"):
            shutil.copyfile(file, aside / file.name)
        with quiet():
            _write_config(model, tensors, aside)
            _write_weights(model, tensors, aside, max_shard_size)
            (aside / "README.md").write_text(_card_text(model, card), encoding="utf-8")
            _check_same_tensors(tensors, aside)
            if check is not None:
                check(aside)
        aside.rename(folder)
    except (OSError, SafetensorError) as error:
        raise ShoalError(f"export to {folder}: {error}; the checkpoints still hold the model") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _skeleton(source: Path) -> PreTrainedModel:
    """The model of a folder without its weights: their names and shapes, and what is tied."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = family_of(config).auto.from_config(config)
    except UNREADABLE as error:
        kinds = ", ".join(family.what for family in FAMILIES.values())
        found = f"config.json describes none of {kinds} ({last_line(error)})"
        raise UserError(f"export {source}", found, "use the checkpoint of a Hugging Face model") from error
    return model


def _named(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors that belong to a model's state, in its order; tied ones once, under their first name."""
    first = dict(model.named_parameters())
    state = model.state_dict(keep_vars=True).items()
    return {name: tensor for name, tensor in state if name in first or not isinstance(tensor, nn.Parameter)}


class _Tensors:
    """The tensors to write, by their names in the files, read from a checkpoint a block at a time."""

    def __init__(self, weights: Stored, model: PreTrainedModel, dtype: torch.dtype | None) -> None:
        self.weights = weights
        named = _named(model)
        specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in named.items()}
        tensor_files.check(weights.specs, specs, f"export {weights.folder}")
        self.written = Written.of(model, named)
        self.specs = {name: (self._dtype(name, dtype), shape) for name, shape in self.written.shapes.items()}

    def _dtype(self, name: str, asked: torch.dtype | None) -> torch.dtype:
        its = self.weights.dtypes[min(self.written.sources[name])]
        return asked if asked and its.is_floating_point else its

    def blocks(self, name: str) -> Blocks:
        """Where each block begins and its size, and the block."""
        for where, block in self.written.blocks(name, self.weights):
            yield where, block.to(self.specs[name][0])


def _write_config(model: PreTrainedModel, tensors: _Tensors, folder: Path) -> None:
    config = model.config
    dtypes = (dtype for dtype, _ in tensors.specs.values() if dtype.is_floating_point)
    config.architectures = [type(model).__name__]
    config.dtype = str(next(dtypes)).removeprefix("torch.")
    config.save_pretrained(folder)


def _write_weights(model: PreTrainedModel, tensors: _Tensors, folder: Path, max_shard_size: str) -> None:
    """The shards, and their index if there are several."""
    specs = tensors.specs
    sizes = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in specs.items()}
    try:
        split = split_state_dict_into_shards_factory(
            sizes,
            get_storage_size=lambda size: size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise UserError(f"--max-shard-size {max_shard_size}", str(error), "write it as 5GB") from error
    for file, names in split.filename_to_tensors.items():
        tensor_files.stream(
            folder / file,
            {name: specs[name] for name in names},
            lambda name: (block for _, block in tensors.blocks(name)),
        )
    if split.is_sharded:
        about = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": about, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n"
        )


def _check_same_tensors(tensors: _Tensors, folder: Path) -> None:
    again = Stored(folder)
    for name in tensors.specs:
        for where, block in tensors.blocks(name):
            if not torch.equal(tensor_files.as_bytes(block), tensor_files.as_bytes(again.read(name, *where))):
                raise ShoalError(
                    f"export to {folder}: {name} differs when read again; nothing was left there"
                )


@torch.no_grad()
def check_same_logits(model: PreTrainedModel, folder: Path) -> None:
    """Raise ShoalError if the model of a folder, loaded as anyone would, is not the same function as `model`."""
    loaded = CAUSAL.auto.from_pretrained(folder, dtype=model.dtype, use_safetensors=True)
    was_training = model.training
    loaded.to(device=model.device)
    ours, theirs = (_sample_logits(each.eval()) for each in (model, loaded))
    model.train(was_training)
    rounded = 8 * torch.finfo(model.dtype).eps  # other kernels add up in another order
    rtol, atol = (1e-4, 1e-5) if rounded < 1e-4 else (rounded, rounded * ours.abs().max().item())
    if not torch.allclose(ours, theirs, rtol=rtol, atol=atol, equal_nan=True):
        apart = (ours - theirs).abs().max().item()
        raise ShoalError(
            f"export to {folder}: loaded again, its logits are {apart:g} apart; nothing was left there"
        )
    if _is_tied(model) != _is_tied(loaded):
        raise ShoalError(
            f"export to {folder}: loaded again, its embeddings are tied otherwise; nothing was left there"
        )


def _sample_logits(model: PreTrainedModel) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    ids = torch.arange(SAMPLE_TOKENS, device=model.device)[None] % int(vocabulary)
    return model(input_ids=ids).logits


def _is_tied(model: PreTrainedModel) -> bool:
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def _card_text(model: PreTrainedModel, card: Mapping[str, Any]) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    kind, family = model.config.model_type, family_of(model.config)
    needs = "import shoal.models.lstm  # makes the type known\n" if kind == "lstm" else ""
    sections: dict[str, Mapping[str, Any]] = {
        "Training": {key: value for key, value in card.items() if not isinstance(value, Mapping)},
        **{key: value for key, value in card.items() if isinstance(value, Mapping)},
    }
    tables = "\n".join(f"## {title}\n\n{_table(rows)}" for title, rows in sections.items() if rows)
    return f"""---
{yaml.safe_dump(FRONT_MATTER | {"pipeline_tag": family.pipeline_tag}, sort_keys=False)}---
# {family.what.capitalize()} of the type {kind}

{parameters:,} parameters, trained data-parallel with shoal.

```python
from transformers import {family.auto_class}, AutoTokenizer
{needs}
model = {family.auto_class}.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

{tables}"""


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {key} | {_cell(value)} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines, ""])


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
