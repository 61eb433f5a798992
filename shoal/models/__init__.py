"""Causal language models from a preset, a Hugging Face folder or the hub: their loss and their export."""
