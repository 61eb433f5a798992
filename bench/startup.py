"""What it costs to ask shoal for help, and what importing it brings along."""

import subprocess
import sys
import time

from bench.jobs import SHOAL

HEAVY = ("torch", "transformers", "datasets")


def help_seconds() -> float:
    """The wall time of `shoal --help`."""
    began = time.perf_counter()
    subprocess.run([SHOAL, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def loaded_by_import() -> list[str]:
    """The heavy packages that `import shoal` loads."""
    code = f"import sys, shoal; print(*(name for name in {HEAVY} if name in sys.modules))"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
