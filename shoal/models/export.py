"""The weights of a checkpoint as a Hugging Face folder, never whole in memory.

Written aside from blocks of tensors, read again and compared, moved into place.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import split_state_dict_into_shards_factory
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from shoal import stored
from shoal.errors import ShoalError, UserError
from shoal.models.loading import quiet
from shoal.stored import Spec, Stored

SAMPLE_TOKENS = 16
MAX_SHARD_SIZE = "5GB"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FRONT_MATTER = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["shoal"]}


def describe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Leave beside saved weights all else that `export` needs: both configurations, and the tokenizer's files."""
    special = copy.deepcopy(model.generation_config)
    for role in ("eos_token_id", "bos_token_id", "pad_token_id"):
        if getattr(special, role) is None:
            setattr(special, role, getattr(tokenizer, role))
    if special.pad_token_id is None:
        special.pad_token_id = tokenizer.eos_token_id
    (folder / "config.json").write_text(model.config.to_json_string())
    (folder / "generation_config.json").write_text(special.to_json_string())
    tokenizer.save_pretrained(folder)


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
    tensors written ("bfloat16"); that of the checkpoint by default. A folder that was there is replaced, and only
    once every block has been read again as it was, and `check` has not raised for the new one. Raises UserError
    where `source` is no whole model, ShoalError where the new folder cannot be written or is not the same.
    """
    aside, old = (folder.with_name(f".{folder.name}.{part}") for part in ("new", "old"))
    weights = Stored(source)
    model = _skeleton(source)
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in _named(model)}
    stored.check(weights.specs, specs, f"export {source}")
    written = {name: (_dtype(weights.dtypes[name], dtype), shape) for name, (_, shape) in specs.items()}
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        for file in (file for file in source.iterdir() if file.suffix != ".safetensors"):
            shutil.copyfile(file, aside / file.name)
        with quiet():
            _write_config(model, written, aside)
            _write_weights(weights, model, written, aside, max_shard_size)
            (aside / "README.md").write_text(_card_text(model, card), encoding="utf-8")
            _check_same_tensors(weights, written, aside)
            if check is not None:
                check(aside)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        aside.rename(folder)
    except (OSError, SafetensorError) as error:
        raise ShoalError(f"export to {folder}: {error}; the checkpoints still hold the model") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _skeleton(source: Path) -> PreTrainedModel:
    """The model of a folder without its weights: their names and shapes, and what is tied."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        found = (
            f"config.json tells of no causal language model ({str(error).strip().splitlines()[-1].strip()})"
        )
        raise UserError(f"export {source}", found, "use the checkpoint of a Hugging Face model") from error
    return model


def _named(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The tensors that belong to a model's state, in its order; tied ones once, under their first name."""
    first = dict(model.named_parameters())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in first or not isinstance(tensor, nn.Parameter):
            yield name, tensor


def _dtype(own: torch.dtype, asked: str | None) -> torch.dtype:
    return DTYPES[asked] if asked is not None and own.is_floating_point else own


def _write_config(model: PreTrainedModel, written: Mapping[str, Spec], folder: Path) -> None:
    config = model.config
    config.architectures = [type(model).__name__]
    config.dtype = next(str(dtype).split(".")[1] for dtype, _ in written.values() if dtype.is_floating_point)
    config.save_pretrained(folder)


def _write_weights(
    weights: Stored,
    model: PreTrainedModel,
    written: Mapping[str, Spec],
    folder: Path,
    max_shard_size: str,
) -> None:
    """The shards, and their index if there are several."""
    sizes = {name: dtype.itemsize * torch.Size(shape).numel() for name, (dtype, shape) in written.items()}
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )

    def blocks(name: str) -> Iterator[Tensor]:
        for where in weights.rows(name):
            yield weights.read(name, *where).to(written[name][0])

    for file, names in split.filename_to_tensors.items():
        stored.stream(folder / file, {name: written[name] for name in names}, blocks)
    if split.is_sharded:
        about = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": about, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True) + "\n"
        )


def _check_same_tensors(weights: Stored, written: Mapping[str, Spec], folder: Path) -> None:
    again = Stored(folder)
    for name, (dtype, _) in written.items():
        for where in weights.rows(name):
            ours, theirs = weights.read(name, *where).to(dtype), again.read(name, *where)
            if not torch.equal(stored.as_bytes(ours), stored.as_bytes(theirs)):
                raise ShoalError(
                    f"export to {folder}: {name} is another when read again; nothing was replaced"
                )


@torch.no_grad()
def check_same_logits(model: PreTrainedModel, folder: Path) -> None:
    """Raise ShoalError if the model of a folder, loaded as anyone would, is not the same function as `model`."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, use_safetensors=True)
    was_training = model.training
    loaded.to(device=model.device)  # type: ignore[call-arg]
    ours, theirs = (_sample_logits(each.eval()) for each in (model, loaded))
    model.train(was_training)
    if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True):
        apart = (ours - theirs).abs().max().item()
        raise ShoalError(
            f"export to {folder}: loaded again, its logits are {apart:g} apart; nothing was replaced"
        )
    if _is_tied(model) != _is_tied(loaded):
        raise ShoalError(
            f"export to {folder}: loaded again, its embeddings are tied otherwise; nothing was replaced"
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
    kind = model.config.model_type
    needs = "import shoal.models.lstm  # makes the type known\n" if kind == "lstm" else ""
    sections: dict[str, Mapping[str, Any]] = {
        "Training": {key: value for key, value in card.items() if not isinstance(value, Mapping)},
        **{key: value for key, value in card.items() if isinstance(value, Mapping)},
    }
    tables = "\n".join(f"## {title}\n\n{_table(rows)}" for title, rows in sections.items() if rows)
    return f"""---
{yaml.safe_dump(FRONT_MATTER, sort_keys=False)}---
# Language model of the type {kind}

{parameters:,} parameters, trained data-parallel with shoal.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
{needs}
model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

{tables}"""


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {key} | {_cell(value)} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines, ""])


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
