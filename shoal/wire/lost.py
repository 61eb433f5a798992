"""What torch says when the other side of an exchange is gone, as one typed error."""

from collections.abc import Iterator
from contextlib import contextmanager

from shoal.errors import PeerLost


@contextmanager
def peer_lost(what: str, rank: int | None = None) -> Iterator[None]:
    """Within it, an error of torch's transport becomes `PeerLost(rank, what)`.

    A message of the wrong size is a fault of the program, and stays the error it is.
    """
    try:
        yield
    except RuntimeError as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        if "preamble" in said:
            raise
        said = said.partition("] ")[2] if said.startswith("[") else said  # where in gloo's source
        raise PeerLost(rank, what, said.split(". ")[0]) from error
