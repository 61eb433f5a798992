"""Engines start workers: they set rank, world size and address, and nothing else."""
