"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path

import numpy
import pyro
import scipy
import torch

import hbmeta


def describe(seed: int) -> str:
    """One paragraph: processor, cores, versions, date, seed."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    cuda = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{cpu}, {os.cpu_count()} cores{cuda}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, pyro {pyro.__version__}, numpy {numpy.__version__}, "
        f"scipy {scipy.__version__}, hbmeta {hbmeta.__version__}; {date.today()}, seed {seed}"
    )


def interleaved(
    work: Mapping[str, Callable[[], object]], *, rounds: int = 15, seconds: float = 0.15
) -> dict[str, float]:
    """Median seconds per call of each, measured in turn: a drifting machine hits all alike."""
    found = rounds_of(work, rounds=rounds, seconds=seconds)
    return {name: statistics.median(times) for name, times in found.items()}


def rounds_of(
    work: Mapping[str, Callable[[], object]], *, rounds: int = 15, seconds: float = 0.15
) -> dict[str, list[float]]:
    """Seconds per call of each in every round, to compare round by round."""
    repeats = {}
    for name, call in work.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(seconds / max(time.perf_counter() - start, 1e-7)))
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, call in work.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            found[name].append((time.perf_counter() - start) / repeats[name])
    return found


def cpu_seconds() -> float:
    """Of this process and its ended children so far."""
    used = (resource.getrusage(one) for one in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)
