"""A trained model and its tokenizer, writing on from prompts."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from shoal.checkpoint.model_folder import model_folder
from shoal.data import tokenizer as tokenizers
from shoal.errors import UserError
from shoal.models.loading import load_trained
from shoal.models.quantize import quantize
from shoal.serve.options import GenerateOptions
from shoal.system import output


class Writer:
    """Completes prompts as the options say; the same (seed, block) draws the same tokens anywhere."""

    def __init__(self, options: GenerateOptions) -> None:
        self.options = options
        folder = str(model_folder(Path(options.model)))
        self.model = load_trained(folder, f"shoal generate {options.model}")
        if options.quantize != "none":
            quantize(self.model, options.quantize)
        self.tokenizer = tokenizers.load(folder)
        self.settings = self._settings()

    def stream(self, prompt: str) -> None:
        """Print the prompt and what follows it, word by word as it comes."""
        printer = _Printer(self.tokenizer, skip_special_tokens=True)
        self._generate([prompt], 0, streamer=printer)

    def complete(self, prompts: list[str], block: int) -> list[str]:
        """What follows each of the prompts of a block, cut before the first stop text."""
        rows = self._generate(prompts, block)
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [self._before_stop(text) for text in texts]

    @torch.no_grad()
    def _generate(self, prompts: list[str], block: int, **options: Any) -> Tensor:
        """The new tokens [B, N] of a block of prompts, padded on the left to one length."""
        rows = [self._encode(prompt) for prompt in prompts]
        longest = max(map(len, rows))
        self._check_room(longest)
        pad = self.settings.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        torch.manual_seed(_seed_of(self.options.seed, block))
        generate: Any = self.model.generate
        written = generate(
            ids, attention_mask=mask, generation_config=self.settings, tokenizer=self.tokenizer, **options
        )
        return written[:, longest:]

    def _encode(self, prompt: str) -> list[int]:
        """The prompt as the beginning of a document."""
        first, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = self.tokenizer.encode(prompt, add_special_tokens=False)
        whole = ids if first is None else [first, *ids]
        return whole or [eos]

    def _check_room(self, longest: int) -> None:
        most = getattr(self.model.config, "max_position_embeddings", None)
        wanted = longest + self.options.max_new_tokens
        if most is not None and wanted > most:
            found = f"with a prompt of {longest} tokens that is {wanted}, and the model takes {most}"
            raise UserError(f"--max-new-tokens {self.options.max_new_tokens}", found, "shorten either")

    def _settings(self) -> GenerationConfig:
        own, options = self.model.generation_config, self.options
        eos = self.tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
        drawn = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
        return GenerationConfig(
            max_new_tokens=options.max_new_tokens,
            do_sample=options.temperature > 0,
            eos_token_id=eos,
            pad_token_id=eos[0] if isinstance(eos, list) else eos or 0,
            stop_strings=options.stop or None,
            **(drawn if options.temperature > 0 else {}),
        )

    def _before_stop(self, text: str) -> str:
        ends = [text.find(stop) for stop in self.options.stop]
        return text[: min((end for end in ends if end >= 0), default=len(text))]


class _Printer(TextStreamer):
    """Ends the generation when nobody reads it any more."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a few words."""
        output.result(text, end="\n" if stream_end else "")


def _seed_of(seed: int, block: int) -> int:
    digest = hashlib.sha256(f"{seed} {block}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
