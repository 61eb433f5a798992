"""What a person may ask of generation."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class GenerateOptions:
    """What to write on from, and how; `model` is a run's folder, a Hugging Face folder or a hub name."""

    model: str
    prompt: str | None = None
    prompts_file: Path | None = None  # .txt, one a line, or .jsonl with `prompt`
    output_file: Path | None = None
    max_new_tokens: int = 128
    temperature: float = 0.8  # 0 takes the likeliest token
    top_k: int = 50  # 0 is all
    top_p: float = 1.0
    stop: list[str] = field(default_factory=list)
    seed: int = 42
    quantize: str = "none"  # int8, int4: hold the weights in so few bits
    batch_size: int = 8
    nproc: int = 1
