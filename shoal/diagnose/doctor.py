"""Examines hardware, software and the network between workers: each finding with a verdict and a remedy."""

import json
import shutil
import socket
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from shoal.config.resolve import load_config
from shoal.data import cache
from shoal.diagnose.finding import Finding, Verdict
from shoal.errors import ShoalError, UserError
from shoal.system import devices
from shoal.system.devices import usable_cores

GIB = 2**30
BF16 = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512", "bf16": "Arm"}  # processor flags, best first


def examine(environ: Mapping[str, str]) -> list[Finding]:
    """Every finding on this machine. Starts two short-lived workers; changes nothing."""
    return [*_hardware(environ), *_software(environ), *_network(environ)]


def as_text(findings: list[Finding]) -> str:
    """One line a finding, by area, and the count of verdicts."""
    lines = []
    for area in dict.fromkeys(finding.area for finding in findings):
        lines.append(area)
        for finding in (each for each in findings if each.area == area):
            remedy = f"; {finding.remedy}" if finding.remedy else ""
            lines.append(f"  {finding.verdict:<5} {finding.name:<14} {finding.found}{remedy}")
    counts = [sum(finding.verdict == verdict for finding in findings) for verdict in ("ok", "warn", "fail")]
    return "\n".join([*lines, "{} ok, {} to look at, {} that will not do".format(*counts)])


def as_json(findings: list[Finding]) -> str:
    """The findings as a JSON list of objects: area, name, found, verdict, remedy."""
    return json.dumps([asdict(finding) for finding in findings], indent=2)


def _hardware(environ: Mapping[str, str]) -> Iterator[Finding]:
    import psutil

    cores = usable_cores()
    yield _judged(
        "hardware", "cores", f"{cores} usable", cores >= 2, "one worker at a time is all it can run"
    )
    free = psutil.virtual_memory().available / GIB
    found = f"{free:.1f} GiB free of {psutil.virtual_memory().total / GIB:.1f}"
    yield _judged(
        "hardware", "memory", found, free >= 1.5 * cores, "a worker needs about 1.5 GiB: start fewer"
    )
    yield _gpus()
    yield _bf16(_processor_flags(Path("/proc/cpuinfo")))
    yield _disk("disk, here", Path.cwd())
    try:
        yield _disk("disk, cache", cache.folder_of(load_config(environ=environ).config.data.cache_dir))
    except UserError as error:
        yield Finding("hardware", "disk, cache", error.found, "warn", "set HOME, or give --cache-dir")


def _gpus() -> Finding:
    """The GPUs that workers will compute on, and why not where there are some."""
    import torch

    count = devices.gpus()
    if count:
        return Finding("hardware", "GPUs", f"{count}, one a worker: {', '.join(devices.describe(count))}")
    if devices.has_driver():
        built = torch.version.cuda or torch.version.hip
        remedy = (
            "see CUDA_VISIBLE_DEVICES and the driver's version"
            if built
            else "install torch with CUDA or ROCm"
        )
        return Finding("hardware", "GPUs", "a driver, but none that torch can use", "warn", remedy)
    beside = " (Apple's is not used)" if torch.backends.mps.is_available() else ""
    return Finding("hardware", "GPUs", f"none: workers compute on the cores{beside}")


def _processor_flags(cpuinfo: Path) -> set[str]:
    if not cpuinfo.exists():
        return set()
    lines = cpuinfo.read_text().splitlines()
    return set(next((line for line in lines if line.lower().startswith(("flags", "features"))), "").split())


def _bf16(flags: set[str]) -> Finding:
    found = [kind for flag, kind in BF16.items() if flag in flags]
    if found:
        return Finding("hardware", "bf16", f"instructions: {', '.join(found)}")
    return Finding(
        "hardware", "bf16", "no instructions seen", "warn", "keep --precision auto, which takes float32"
    )


def _disk(name: str, place: Path) -> Finding:
    existing = next(folder for folder in (place, *place.parents) if folder.exists())
    free = shutil.disk_usage(existing).free / GIB
    verdict: Verdict = "ok" if free >= 5 else "warn" if free >= 0.5 else "fail"
    remedy = "" if verdict == "ok" else "make room, or set --output-dir and --cache-dir elsewhere"
    return Finding("hardware", name, f"{free:.1f} GiB free in {existing}", verdict, remedy)


def _software(environ: Mapping[str, str]) -> Iterator[Finding]:
    version = sys.version.split()[0]
    yield _judged("software", "python", version, sys.version_info >= (3, 11), "take 3.11 or later", "fail")
    yield from _packages()
    yield _compiler(environ)


def _packages() -> Iterator[Finding]:
    """Each package that shoal's own metadata asks for, held against what is installed."""
    try:
        wanted = metadata.requires("shoal") or []
    except metadata.PackageNotFoundError:
        yield Finding("software", "shoal", "runs uninstalled, from a folder", "warn", "pip install -e .")
        return
    from packaging.requirements import Requirement

    for requirement in map(Requirement, wanted):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        remedy = f"pip install '{requirement}'"
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding("software", requirement.name, "is not installed", "fail", remedy)
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        yield _judged("software", requirement.name, version, fits, remedy, "fail")


def _compiler(environ: Mapping[str, str]) -> Finding:
    """What torch.compile needs on a processor: a C++ compiler and Python's headers."""
    compiler = next(filter(None, map(shutil.which, (environ.get("CXX", ""), "g++", "clang++"))), None)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if compiler and header.exists():
        return Finding("software", "compiler", f"{compiler}, with Python.h: --compile works")
    missing = " and ".join(["a C++ compiler"] * (not compiler) + ["Python.h"] * (not header.exists()))
    remedy = "for --compile install g++ and python3-dev"
    return Finding("software", "compiler", f"{missing} is missing", "warn", remedy)


def _network(environ: Mapping[str, str]) -> Iterator[Finding]:
    name = socket.gethostname()
    try:
        yield Finding("network", "host name", f"{name} is {socket.gethostbyname(name)}")
    except OSError as error:
        remedy = f"add `127.0.1.1 {name}` to /etc/hosts"
        yield Finding("network", "host name", f"{name} has no address ({error})", "warn", remedy)
    from shoal.diagnose.link_probe import PAYLOAD_BYTES, measure_link

    try:
        link = measure_link(environ)
    except UserError as error:
        yield Finding("network", "local workers", error.found, "fail", error.change)
        return
    except ShoalError as error:
        remedy = "let nothing block 127.0.0.1 (firewall, proxy, sandbox), or use --nproc-per-node 1"
        yield Finding("network", "local workers", str(error), "fail", remedy)
        return
    found = f"{link.latency * 1e6:.0f} us for an all-reduce of 4 bytes between 2 workers"
    yield _judged("network", "latency", found, link.latency < 5e-3, "cores are busy: stop what else runs")
    found = f"{link.bandwidth / 1e9:.2f} GB/s in an all-reduce of {PAYLOAD_BYTES / 1e6:.0f} MB"
    yield _judged("network", "bandwidth", found, link.bandwidth > 2e8, "cores are busy: stop what else runs")


def _judged(area: str, name: str, found: str, fine: bool, remedy: str, else_: Verdict = "warn") -> Finding:
    return Finding(area, name, found) if fine else Finding(area, name, found, else_, remedy)
