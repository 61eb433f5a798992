"""Tensors of one rank: pieces, buckets of gradients, dtypes, sums in tree order, files."""
