"""On what a benchmark ran: processor, memory, versions, date, and how busy the machine was before."""

import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

import psutil

PACKAGES = ("torch", "transformers", "accelerate", "lightning-fabric", "tokenizers", "numpy")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "bf16")


def describe() -> dict[str, str]:
    """One fact a line of the report."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    flags = set(_field(cpuinfo, "flags").split())
    gib = psutil.virtual_memory().total / 2**30
    return {
        "date": date.today().isoformat(),
        "processor": f"{_field(cpuinfo, 'model name')}, {len(os.sched_getaffinity(0))} cores",
        "instructions": ", ".join(name for name in INSTRUCTIONS if name in flags),
        "memory": f"{gib:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "load before": f"{os.getloadavg()[0]:.2f} processes",
    }


def _field(cpuinfo: str, name: str) -> str:
    """A field of the first processor of /proc/cpuinfo, "" where it has none."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")
