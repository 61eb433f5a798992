"""Causal language models from a preset, a Hugging Face folder or the hub."""

from shoal.models.loading import load

__all__ = ["load"]
