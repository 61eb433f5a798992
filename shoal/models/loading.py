"""`--model`: a preset at random, or weights from a Hugging Face folder or the hub, in float32."""

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id

from shoal.config.presets import PRESETS
from shoal.errors import UserError
from shoal.models import attention, folder, lstm, norm  # noqa: F401  (the LSTM registers itself with the Auto classes)
from shoal.models.pretrained import (
    at_random,
    bad_dimensions,
    check_names,
    locate,
    pretrained,
    stored_config,
    text_part,
)

if TYPE_CHECKING:
    from shoal.config import ModelConfig

FROM_CONFIG = "from_config"
SLIP = 0.8  # difflib's ratio from which a name was meant to be a preset's: llama-tyni, not distilgpt2


def load(
    model: "ModelConfig",
    vocab_size: int,
    sequence_length: int,
    tokenizer: transformers.PreTrainedTokenizerBase | None = None,
    seed: int = 42,
) -> transformers.PreTrainedModel:
    """The model that `--model` names, in float32 and train mode, on the CPU.

    A preset (or a folder with `from_config`) is drawn from `seed`, a preset with `vocab_size` embeddings;
    a folder or hub name brings its weights. Raises UserError where nothing fits the name, the overrides, the
    vocabulary or the window of `sequence_length` tokens.
    """
    asked = f"--model {model.name}"
    check_name(model.name)
    overrides = {name: value for name, value in model.overrides.items() if name != FROM_CONFIG}
    if model.name in PRESETS:
        config = _preset_config(model.name, overrides, vocab_size, tokenizer)
    else:
        source = locate(model.name, asked)
        config = stored_config(source, overrides)
    _check_window(model.name, text_part(config), sequence_length)

    if is_random(model):
        torch.manual_seed(seed)
        loaded = at_random(text_part(config), asked)
    else:
        loaded = pretrained(source, config)
    _check_vocabulary(model.name, loaded, vocab_size)
    return _prepared(loaded).train()


def is_random(model: "ModelConfig") -> bool:
    """Whether the weights of `--model` are drawn at random, rather than loaded."""
    return model.name in PRESETS or bool(model.overrides.get(FROM_CONFIG))


def check_name(name: str) -> None:
    """Refuse a `--model` that no hub need be asked for: a slip of a preset's name, no possible name, a bad folder.

    An unreachable hub costs half a minute of retries.
    """
    if name in PRESETS:
        return
    if Path(name).is_dir():
        folder.find(name, f"--model {name}")  # before its tokenizer is asked for
        return
    meant = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=SLIP)
    if meant and "/" not in name:
        raise UserError(f"--model {name}", "no preset and no model folder", f"did you mean {meant[0]}")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        found = "no preset, no model folder, and no name that the hub could hold"
        raise UserError(f"--model {name}", found, f"presets are {', '.join(PRESETS)}") from error


def load_trained(name: str, asked: str) -> transformers.PreTrainedModel:
    """The model of a folder with its weights, in float32 and eval mode, on the CPU. Errors begin with `asked`."""
    source = locate(name, asked)
    loaded = _prepared(pretrained(source, stored_config(source, {})))
    return loaded.eval()


def _prepared(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Use the fastest code for its parts, and correct where `base_model` looks for its body."""
    if model.base_model is model:  # Llama 4 names one that it has not
        bodies = [
            name for name, child in model.named_children() if isinstance(child, transformers.PreTrainedModel)
        ]
        model.base_model_prefix = bodies[0] if len(bodies) == 1 else model.base_model_prefix
    attention.use_fastest(model)
    norm.use_fastest(model)
    return model


def _preset_config(
    name: str,
    overrides: dict[str, Any],
    vocab_size: int,
    tokenizer: transformers.PreTrainedTokenizerBase | None,
) -> transformers.PreTrainedConfig:
    dimensions = dict(PRESETS[name])
    blank = transformers.AutoConfig.for_model(dimensions.pop("model_type"))
    check_names(name, blank, overrides)
    # No padding token: embeddings freeze its row, and here it is the token between documents.
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer is not None:
        special |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    chosen = dimensions | {"vocab_size": vocab_size} | special | overrides
    own_names = {blank.attribute_map.get(key, key): value for key, value in chosen.items()}
    try:
        return type(blank)(**own_names)
    except (StrictDataclassError, ValueError) as error:
        raise bad_dimensions(name, error) from error


def _check_window(name: str, config: transformers.PreTrainedConfig, sequence_length: int) -> None:
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and 0 < most < sequence_length:  # some have -1 for any number
        found = f"{name} takes at most {most} positions"
        raise UserError(f"--sequence-length {sequence_length}", found, f"set it to {most} or less")


def _check_vocabulary(name: str, model: transformers.PreTrainedModel, vocab_size: int) -> None:
    rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    if vocab_size > rows:
        found = f"the tokenizer has ids up to {vocab_size - 1}, the embedding {rows} rows"
        raise UserError(f"--model {name}", found, "use the tokenizer that belongs to the model")
