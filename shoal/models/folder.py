"""Checks a model's folder, and says in one line why it cannot be loaded, before transformers reads it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers.utils import cached_file
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from shoal.errors import UserError

CONFIG, ADAPTER = "config.json", "adapter_config.json"
# What transformers turns into plain weights as it loads them, on any device.
DEQUANTIZED: dict[str, Any] = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Folder:
    """A model that was found on disk or on the hub; `asked` is how errors name it."""

    name: str
    asked: str
    config: Mapping[str, Any]  # what is in its config.json

    @property
    def quantization(self) -> str | None:
        """How its weights are quantised; None if they are not."""
        return _quantization(self.config)

    def check_weights(self) -> None:
        """Raise UserError where its weights cannot be read, or are no weights to train."""
        method = self.quantization
        if method is not None and method not in DEQUANTIZED:
            found = f"its weights are quantised ({method}), and only plain ones are trained"
            raise UserError(self.asked, found, "name the model as it was before quantisation")
        folder = Path(self.name)
        if not folder.is_dir():
            return
        files = sorted(folder.glob("*.safetensors"))
        weights = [file for file in files if not file.name.startswith("adapter_model")]
        if not weights:
            _check_other_weights(self.asked, folder)
            raise UserError(
                self.asked, "the folder holds no weights", "start at random: --model.from_config true"
            )
        for file in weights:
            with file.open("rb") as opened:
                if opened.read(len(LFS)) == LFS:
                    found = f"{file.name} is a pointer of Git LFS and holds no weights"
                    raise UserError(self.asked, found, "fetch them: git lfs pull")


def find(name: str, asked: str) -> Folder:
    """The folder or hub name `name`. Raises UserError where it is no model that transformers knows.

    Raises OSError where there is no folder of that name and no model on the hub, as far as that can be asked.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / CONFIG).is_file():
        _check_other_weights(asked, folder)
        raise UserError(asked, f"the folder has no {CONFIG}", "name a saved model folder")
    file = folder / CONFIG if folder.is_dir() else Path(str(cached_file(name, CONFIG)))
    found = Folder(name, asked, _read(file, asked))
    _check_type(found)
    return found


def _read(file: Path, asked: str) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        found = f"{file}, line {error.lineno}: not JSON ({error.msg})"
        raise UserError(asked, found, "it may be cut short: copy it again") from error
    except (ValueError, RecursionError) as error:
        raise UserError(asked, f"{file}: no JSON that can be read ({error})", "copy it again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(asked, f"{file} names no model_type", "name the folder of a saved model")
    return config


def _check_type(folder: Folder) -> None:
    kind = folder.config["model_type"]
    if kind in transformers.CONFIG_MAPPING:
        return
    code = folder.config.get("auto_map")
    if isinstance(code, dict) and code:
        file = str(next(iter(code.values()))).split(".")[0]
        found = f"its model_type {kind} needs code that comes with it ({file}.py), which is never run"
        raise UserError(folder.asked, found, "name a model of a type that transformers has")
    found = f"transformers {transformers.__version__} does not know its model_type {kind}"
    raise UserError(folder.asked, found, "update transformers, or name another model")


def _quantization(config: Mapping[str, Any]) -> str | None:
    parts = [config, config.get("text_config")]
    for part in (part for part in parts if isinstance(part, Mapping)):
        found = part.get("quantization_config") or part.get("compression_config")
        if isinstance(found, Mapping) and found:
            legacy = (
                "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & found.keys() else "an unnamed method"
            )
            return str(found.get("quant_method") or legacy)
    return None


def _check_other_weights(asked: str, folder: Path) -> None:
    """Refuse a folder that holds something other than a model's weights, and say what it holds."""
    if gguf := sorted(folder.glob("*.gguf")):
        change = "name the model that they were made of, in safetensors"
        raise UserError(asked, f"the folder holds GGUF weights ({gguf[0].name})", change)
    if (folder / ADAPTER).is_file():
        try:
            base = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (ValueError, KeyError, TypeError):
            base = "another model"
        change = "merge the two (peft: merge_and_unload, then save_pretrained), and name that folder"
        raise UserError(asked, f"the folder holds only a PEFT adapter of {base}", change)
    if pickled := sorted(folder.glob("*.bin")):
        found = f"the folder holds only pickled weights ({pickled[0].name}), which are never read"
        raise UserError(asked, found, "convert them to safetensors")
