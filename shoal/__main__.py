"""`python -m shoal` is `shoal`."""

import os
import sys

if __name__ == "__main__":
    # `python -m` puts the current folder first, where a file may be called like a module of Python's own.
    if not sys.flags.safe_path and sys.path[0] == os.getcwd():
        del sys.path[0]
    from shoal.cli import command

    command()
