"""Seeing a run: metrics on disk, lines on the terminal, and the ledger of who computed what."""
