"""The trained model as a Hugging Face folder: written aside, loaded again, compared, moved into place."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from shoal.errors import ShoalError
from shoal.models.loading import quiet

SAMPLE_TOKENS = 16
FRONT_MATTER = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["shoal"]}


def export(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, card: Mapping[str, Any]
) -> None:
    """Leave `folder` with config, generation config, safetensors, tokenizer and a model card made of `card`.

    A folder that was there is replaced, and only once the new one gave the same logits when loaded again;
    raises ShoalError if it does not, or if it cannot be written.
    """
    aside, old = (folder.with_name(f".{folder.name}.{part}") for part in ("new", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with quiet():
            _write(model, tokenizer, aside, card)
            _check_same_logits(model, aside)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        aside.rename(folder)
    except (OSError, SafetensorError) as error:
        raise ShoalError(f"export to {folder}: {error}; the checkpoints still hold the model") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, card: Mapping[str, Any]
) -> None:
    special = model.generation_config
    if special.eos_token_id is None:
        special.eos_token_id = tokenizer.eos_token_id
    if special.bos_token_id is None:
        special.bos_token_id = tokenizer.bos_token_id
    if special.pad_token_id is None:
        special.pad_token_id = (
            tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(_card_text(folder.name, model, card), encoding="utf-8")


@torch.no_grad()
def _check_same_logits(model: PreTrainedModel, folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, use_safetensors=True)
    was_training = model.training
    loaded.to(device=model.device)  # type: ignore[call-arg]
    ours, theirs = (_sample_logits(each.eval()) for each in (model, loaded))
    model.train(was_training)
    rounded = 8 * torch.finfo(model.dtype).eps  # other kernels add up in another order
    rtol, atol = (1e-4, 1e-5) if rounded < 1e-4 else (rounded, rounded * ours.abs().max().item())
    if not torch.allclose(ours, theirs, rtol=rtol, atol=atol, equal_nan=True):
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


def _card_text(name: str, model: PreTrainedModel, card: Mapping[str, Any]) -> str:
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
