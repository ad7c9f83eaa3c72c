"""Peak memory of a call: the most bytes of tensors at one moment, beyond those at its start.

On a CPU every allocation, and every release of what was allocated since, is an event of torch's
profiler, in order; their running sum is what the call holds, and its maximum the peak. It is that
of tensors (also those that compiled code asks for), not of the process: allocators of the system
round up, and keep what was released. A GPU's allocator keeps the maximum itself.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["peak_bytes"]

_MEMORY = "[memory]"


def peak_bytes(call: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """The most bytes of tensors that a call held at once, its result included.

    What it does for the first time (tracing, compiling, caches) counts as well: call it once
    before. A CPU counts what this thread allocates, and threads that autograd starts for it.

    Args:
        call: without arguments.
        device: whose memory is counted.
    """
    device = torch.device(device)
    gc.collect()  # what it would release in the meantime is not the call's
    return _on_cuda(call, device) if device.type == "cuda" else _on_cpu(call)


def _on_cuda(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    peak: int = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def _on_cpu(call: Callable[[], object]) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    profiler = torch.profiler.profile(activities=activities, profile_memory=True)
    with _quiet():
        profiler.start()
    try:
        result = call()
    finally:
        with _quiet():
            profiler.stop()
    del result
    held = peak = 0
    assert profiler.profiler is not None
    events: list[Any] = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in events:
        if event.name() == _MEMORY:
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the two lines that the profiler of torch 2.13 writes to standard error by itself."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
