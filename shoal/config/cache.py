"""Where prepared data lies."""

from pathlib import Path

from shoal.config.record import DataConfig
from shoal.errors import UserError


def cache_folder(data: DataConfig) -> Path:
    """The folder where prepared data lies. Raises UserError where it is below the home of a user without one."""
    try:
        return Path(data.cache_dir or "~/.cache/shoal").expanduser()
    except RuntimeError:
        found, change = "this user has no home folder", "give a folder, or set HOME"
        raise UserError(f"--cache-dir {data.cache_dir}".strip(), found, change) from None
