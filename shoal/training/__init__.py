"""A training run: its assembly, resuming, the loop, evaluation and recording."""
