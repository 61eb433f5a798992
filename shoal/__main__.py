"""`python -m shoal` is `shoal`."""

from shoal.cli import command

if __name__ == "__main__":
    command()
