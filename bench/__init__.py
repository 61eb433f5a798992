"""Benchmarks: shoal against its peers and against what it promises. `python -m bench` prints the tables."""
