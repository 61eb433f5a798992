"""The language model of a Hugging Face folder or of the hub: its configuration, then its weights in float32."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from shoal.config.presets import PRESETS
from shoal.errors import UserError
from shoal.models import folder
from shoal.models.families import CAUSAL
from shoal.models.folder import Folder

QUANTIZATION = "quantization_config"
FITS = "name a model that writes text token by token (llama, gpt2, qwen3, ...)"
# What the code of a family raises of a configuration or of weights that do not fit it.
UNREADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    ImportError,
    KeyError,
    TypeError,
    AttributeError,
    SafetensorError,
    StrictDataclassError,
)


def locate(name: str, asked: str) -> Folder:
    """The folder or hub name `name`. Raises UserError, as an answer to `asked`, where it is no model."""
    try:
        return folder.find(name, asked)
    except OSError as error:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {close[0]}" if close else f"presets are {', '.join(PRESETS)}"
        found = "no preset, no model folder, and the hub does not give it (HF_HUB_OFFLINE=1 asks no network)"
        raise UserError(asked, found, hint) from error


def stored_config(source: Folder, overrides: dict[str, Any]) -> transformers.PreTrainedConfig:
    """The configuration of a folder, with `overrides` in the part that is its language model.

    Raises UserError where there is none, or an override does not fit.
    """
    try:
        stored = transformers.AutoConfig.from_pretrained(source.name, trust_remote_code=False)
    except UNREADABLE as error:
        found = f"its {folder.CONFIG} is refused: {last_line(error)}"
        raise UserError(source.asked, found, "correct it, or copy it again") from error
    text = text_part(stored)
    if type(text) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        found = f"the model type {text.model_type} is no {CAUSAL.what} in transformers"
        raise UserError(source.asked, found, FITS)
    check_names(source.name, text, overrides)
    try:
        for key, value in overrides.items():
            setattr(text, key, value)
        text.validate()
    except (StrictDataclassError, ValueError) as error:
        raise bad_dimensions(source.name, error) from error
    return stored


def pretrained(source: Folder, config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    """The language model of a folder; of a model of text and images the part that writes text."""
    source.check_weights()
    text, chosen = text_part(config), {}
    if source.quantization is not None:
        chosen[QUANTIZATION] = folder.DEQUANTIZED[source.quantization](dequantize=True)
    whole: Any = CAUSAL.auto
    if text is not config and type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        whole = transformers.AutoModelForImageTextToText
    try:
        with quiet():
            loaded, report = whole.from_pretrained(
                source.name,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # the report names them
                **chosen,
            )
    except UNREADABLE as error:
        raise UserError(source.asked, last_line(error), "check the folder and overrides") from error
    for name, stored, own in sorted(report["mismatched_keys"]):
        found = f"{name} of its weights is {tuple(stored)}, the configuration has {tuple(own)}"
        raise UserError(source.asked, found, "check the folder and overrides")
    if report["missing_keys"]:
        first = sorted(report["missing_keys"])[0]
        found = f"the weights lack {len(report['missing_keys'])} tensors, {first} first"
        raise UserError(source.asked, found, f"name a folder saved from a {CAUSAL.what}")
    return loaded if text is config else _writer(loaded, text)


def at_random(config: transformers.PreTrainedConfig, asked: str) -> transformers.PreTrainedModel:
    """A model of a configuration with random weights, in float32."""
    if hasattr(config, QUANTIZATION):
        delattr(config, QUANTIZATION)  # it is about the weights that are left out
    try:
        return CAUSAL.auto.from_config(config, dtype=torch.float32)
    except UNREADABLE as error:
        raise UserError(asked, last_line(error), "correct the configuration or its overrides") from error


def text_part(config: transformers.PreTrainedConfig) -> transformers.PreTrainedConfig:
    """The part of a configuration of text and images that is the language model; any other configuration itself."""
    try:
        text = config.get_text_config(decoder=True)
    except ValueError:  # several parts are of text
        return config
    return text if any(value is text for value in vars(config).values()) else config


def remarks(name: str) -> list[str]:
    """How the model that is trained differs from the one in its folder: one line for each difference."""
    if name in PRESETS:
        return []
    source = locate(name, f"--model {name}")
    config = stored_config(source, {})
    said = []
    if text_part(config) is not config:
        said.append(
            f"the text part of {config.model_type} is trained, what it has for images or sound is left out"
        )
    if source.quantization is not None:
        said.append(f"{source.quantization} weights are turned into plain ones, and saved as such")
    return said


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


def check_names(name: str, config: transformers.PreTrainedConfig, overrides: dict[str, Any]) -> None:
    """Raise UserError where an override is no name of the configuration's."""
    known = set(config.to_dict()) | set(config.attribute_map)
    for key in overrides:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            change = f"did you mean --model.{close[0]}" if close else f"known are {', '.join(sorted(known))}"
            raise UserError(f"--model.{key}", f"{name} ({config.model_type}) has no such dimension", change)


def _writer(loaded: transformers.PreTrainedModel, text: transformers.PreTrainedConfig) -> Any:
    """The causal language model within a model of text and images: its decoder and its head."""
    with torch.device("meta"):
        part = CAUSAL.auto.from_config(text)
    body = type(part.base_model)
    for module in loaded.modules():
        if type(module) is type(part):
            return module
    decoder = next(module for module in loaded.modules() if type(module) is body)
    setattr(part, part.base_model_prefix, decoder)
    part.set_output_embeddings(loaded.get_output_embeddings())
    part.config, part.generation_config = decoder.config, loaded.generation_config
    tied = part.get_output_embeddings().weight is part.get_input_embeddings().weight
    part.config.tie_word_embeddings = tied  # the two configurations may differ in it
    return part


def bad_dimensions(name: str, error: Exception) -> UserError:
    """The error of overrides that do not fit each other."""
    return UserError(f"--model {name}", last_line(error), "correct the --model.* overrides")


def last_line(error: Exception) -> str:
    """The last line of a library's message: its first ones say where, the last says what."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip()
