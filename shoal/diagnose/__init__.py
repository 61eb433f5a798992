"""Checks of a machine and of its links to others."""
