"""Demonstrations: one promise each, beside a peer, in a minute."""
