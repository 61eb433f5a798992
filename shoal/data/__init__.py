"""Text to token shards to batches: sources -> documents -> tokens -> token shards -> samples in order."""
