"""`--model`: a preset at random, or weights from a Hugging Face folder or the hub, in float32."""

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from shoal.errors import UserError
from shoal.models import attention, lstm, norm  # noqa: F401  (the LSTM registers itself with the Auto classes)
from shoal.models.presets import PRESETS

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
    check_name(model.name)
    overrides = dict(model.overrides)
    at_random = bool(overrides.pop(FROM_CONFIG, False))
    if model.name in PRESETS:
        config, at_random = _preset_config(model.name, overrides, vocab_size, tokenizer), True
    else:
        config = _stored_config(model.name, overrides)
    _check_window(model.name, config, sequence_length)

    if at_random:
        torch.manual_seed(seed)
        loaded = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        loaded = _pretrained(model.name, config)
    _check_vocabulary(model.name, loaded, vocab_size)
    attention.use_fastest(loaded)
    norm.use_fastest(loaded)
    return loaded.train()


def check_name(name: str) -> None:
    """Refuse a `--model` that no hub need be asked for: a slip of a preset's name, or no possible name.

    An unreachable hub costs half a minute of retries.
    """
    if name in PRESETS or Path(name).is_dir():
        return
    meant = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=SLIP)
    if meant and "/" not in name:
        raise UserError(f"--model {name}", "no preset and no model folder", f"did you mean {meant[0]}")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        found = "no preset, no model folder, and no name that the hub could hold"
        raise UserError(f"--model {name}", found, f"presets are {', '.join(PRESETS)}") from error


def load_trained(name: str) -> transformers.PreTrainedModel:
    """The model of a folder or hub name with its weights, in float32 and eval mode, on the CPU."""
    loaded = _pretrained(name, _stored_config(name, {}))
    attention.use_fastest(loaded)
    norm.use_fastest(loaded)
    return loaded.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers: every worker would draw its own."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _preset_config(
    name: str,
    overrides: dict[str, Any],
    vocab_size: int,
    tokenizer: transformers.PreTrainedTokenizerBase | None,
) -> transformers.PreTrainedConfig:
    dimensions = dict(PRESETS[name])
    blank = transformers.AutoConfig.for_model(dimensions.pop("model_type"))
    _check_names(name, blank, overrides)
    # No padding token: embeddings freeze its row, and here it is the token between documents.
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer is not None:
        special |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    chosen = dimensions | {"vocab_size": vocab_size} | special | overrides
    own_names = {blank.attribute_map.get(key, key): value for key, value in chosen.items()}
    try:
        return type(blank)(**own_names)
    except (StrictDataclassError, ValueError) as error:
        raise _bad_dimensions(name, error) from error


def _stored_config(name: str, overrides: dict[str, Any]) -> transformers.PreTrainedConfig:
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise UserError(f"--model {name}", "the folder has no config.json", "name a saved model folder")
    try:
        stored = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {close[0]}" if close else f"presets are {', '.join(PRESETS)}"
        found = "no preset, no model folder, and the hub does not give it (HF_HUB_OFFLINE=1 asks no network)"
        raise UserError(f"--model {name}", found, hint) from error
    _check_names(name, stored, overrides)
    try:
        for key, value in overrides.items():
            setattr(stored, key, value)
        stored.validate()
    except (StrictDataclassError, ValueError) as error:
        raise _bad_dimensions(name, error) from error
    return stored


def _pretrained(name: str, config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickled = [each.name for each in folder.glob("*.bin")]
        found = f"only pickled weights ({pickled[0]}), which are never read" if pickled else "no weights"
        change = "convert them to safetensors" if pickled else f"start at random: --model.{FROM_CONFIG} true"
        raise UserError(f"--model {name}", f"the folder holds {found}", change)
    from_pretrained: Callable[..., Any] = transformers.AutoModelForCausalLM.from_pretrained
    try:
        with quiet():
            loaded, report = from_pretrained(
                name,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--model {name}", _last_line(error), "check the folder and overrides") from error
    if report["missing_keys"]:
        first = sorted(report["missing_keys"])[0]
        found = f"the weights lack {len(report['missing_keys'])} tensors, {first} first"
        raise UserError(f"--model {name}", found, "name a folder saved from a causal language model")
    return loaded


def _check_names(name: str, config: transformers.PreTrainedConfig, overrides: dict[str, Any]) -> None:
    known = set(config.to_dict()) | set(config.attribute_map)
    for key in overrides:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            change = f"did you mean --model.{close[0]}" if close else f"known are {', '.join(sorted(known))}"
            raise UserError(f"--model.{key}", f"{name} ({config.model_type}) has no such dimension", change)


def _check_window(name: str, config: transformers.PreTrainedConfig, sequence_length: int) -> None:
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and sequence_length > most:
        found = f"{name} takes at most {most} positions"
        raise UserError(f"--sequence-length {sequence_length}", found, f"set it to {most} or less")


def _check_vocabulary(name: str, model: transformers.PreTrainedModel, vocab_size: int) -> None:
    rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    if vocab_size > rows:
        found = f"the tokenizer has ids up to {vocab_size - 1}, the embedding {rows} rows"
        raise UserError(f"--model {name}", found, "use the tokenizer that belongs to the model")


def _bad_dimensions(name: str, error: Exception) -> UserError:
    return UserError(f"--model {name}", _last_line(error), "correct the --model.* overrides")


def _last_line(error: Exception) -> str:
    """The last line of a library's message: its first ones say where, the last says what."""
    return str(error).strip().splitlines()[-1].strip()
