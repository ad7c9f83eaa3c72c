"""Markov chains of NUTS (nutpie) on a staged potential, several at a time.

A potential that is a C function (`hbmeta.native`) is sampled by nutpie's own threads, which need
neither Python nor its lock. Any other is called through Python, each chain in a process of its own:
the potential is compiled once; forked processes share the compiled code, the data and a block of
memory for the draws, so nothing is copied or serialised. Where a process cannot be forked (no
`fork`, a CUDA device) those chains run one after another. The draws of a chain depend on its seed
and start alone, not on how many run at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hbmeta.errors import ConvergenceError
from hbmeta.joint_density import Potential
from hbmeta.native import NativeDensity
from hbmeta.staging import Tier

__all__ = ["Chains", "run_chains"]

_SECONDS_BETWEEN_LOOKS = 0.002


@dataclass(frozen=True)
class Chains:
    """Draws of several chains.

    Attributes:
        draws: (chains, draws, size), unconstrained.
        diverging: (chains, draws) bool.
        log_density: (chains, draws).
        tree_depth: (chains, draws) doublings of each trajectory.
        step_size: (chains,) after adaptation.
        gradients: number of evaluations, warm-up included.
        seconds: wall-clock seconds.
        potential: "native" where the sampler called C, else the tier that it called.
    """

    draws: Tensor
    diverging: Tensor
    log_density: Tensor
    tree_depth: Tensor
    step_size: Tensor
    gradients: int
    seconds: float
    potential: Literal["native"] | Tier


@dataclass(frozen=True)
class _Settings:
    draws: int
    warmup: int
    seed: int
    target_accept: float
    max_tree_depth: int


def run_chains(
    log_density: Potential,
    starts: Tensor,
    *,
    draws: int,
    warmup: int,
    seed: int,
    target_accept: float,
    max_tree_depth: int,
    processes: int | None,
    progress: bool,
    where: str,
) -> Chains:
    """Runs one chain from each start.

    Args:
        log_density: of vectors (size,).
        starts: (chains, size).
        draws: per chain, after warm-up.
        warmup: steps of adaptation per chain.
        seed: of the sampler; each chain derives its own.
        target_accept: mean acceptance that the step size is adapted to, in (0, 1).
        max_tree_depth: a trajectory has at most 2 to this power steps.
        processes: chains at a time, at most; the number of cores by default.
        progress: show a bar of all chains' steps.
        where: for the error.
    Raises:
        ConvergenceError: no chain could start, or a chain died; its message is passed on.
    """
    chains, size = starts.shape
    shared = _Shared(chains, draws, size)
    settings = _Settings(draws, warmup, seed, target_accept, max_tree_depth)
    begin = time.perf_counter()
    limit = min(chains, processes or os.cpu_count() or 1)
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    bar = tqdm(total=chains * (warmup + draws), desc="NUTS", disable=not progress)
    native = log_density.native()

    def one(chain: int) -> None:
        _run_one(log_density, shared, chain, starts[chain].numpy().copy(), settings)

    if native is not None:
        _in_threads(log_density, native, starts, settings, limit, shared, bar)
    elif limit == 1 or not can_fork:
        for chain in range(chains):
            try:
                one(chain)
            except Exception as error:
                shared.fail(chain, error)
                break
            bar.update(warmup + draws)
    else:
        _fork(one, chains, limit, shared, bar)
    bar.close()
    for chain in range(chains):
        if int(shared.state[chain]) != 1:
            raise ConvergenceError(
                where,
                needed="chains that run to their end",
                found=f"chain {chain} stopped: {shared.message(chain)}",
                do="Check that the log density is finite near the priors' locations.",
            )
    return Chains(
        shared.draws.clone(),
        shared.stats[..., 0] > 0.5,
        shared.stats[..., 1].clone(),
        shared.stats[..., 2].clone(),
        shared.stats[:, -1, 3].clone(),
        int(shared.gradients.sum()),
        time.perf_counter() - begin,
        log_density.tier if native is None else "native",
    )


class _Shared:
    """Memory that forked chains write to."""

    def __init__(self, chains: int, draws: int, size: int) -> None:
        self.draws = torch.zeros(chains, draws, size, dtype=torch.float64).share_memory_()
        self.stats = torch.zeros(chains, draws, 4, dtype=torch.float64).share_memory_()
        self.done = torch.zeros(chains, dtype=torch.int64).share_memory_()
        self.gradients = torch.zeros(chains, dtype=torch.int64).share_memory_()
        self.state = torch.zeros(chains, dtype=torch.int64).share_memory_()
        self.text = torch.zeros(chains, 2000, dtype=torch.uint8).share_memory_()

    def fail(self, chain: int, error: BaseException) -> None:
        # What the sampler says, without the stack of its own language.
        said = f"{type(error).__name__}: {error}".partition("Stack backtrace")[0]
        raw = " ".join(said.split()).encode()[:2000]
        self.text[chain, : len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        self.state[chain] = -1

    def message(self, chain: int) -> str:
        said = bytes(self.text[chain].tolist()).rstrip(b"\0").decode(errors="replace")
        return said or "its process ended without a word"


def _fork(one: Callable[[int], None], chains: int, limit: int, shared: _Shared, bar: Any) -> None:
    context = multiprocessing.get_context("fork")
    waiting = list(range(chains))
    running: dict[int, BaseProcess] = {}

    def target(chain: int) -> None:
        torch.set_num_threads(1)
        try:
            one(chain)
        except BaseException as error:
            shared.fail(chain, error)
        os._exit(0)

    try:
        while waiting or running:
            while waiting and len(running) < limit:
                chain = waiting.pop(0)
                with warnings.catch_warnings():
                    # The children touch only what was made for them: the compiled graph and memory.
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process: BaseProcess = context.Process(
                        target=target, args=(chain,), daemon=True
                    )
                    process.start()
                running[chain] = process
            time.sleep(0.02)
            bar.update(int(shared.done.sum()) - bar.n)
            for chain, process in list(running.items()):
                if process.exitcode is not None:
                    process.join()
                    del running[chain]
    finally:
        for process in running.values():
            process.kill()


def _in_threads(
    log_density: Potential,
    native: NativeDensity,
    starts: Tensor,
    settings: _Settings,
    limit: int,
    shared: _Shared,
    bar: Any,
) -> None:
    """Chains in the sampler's own threads, each with a recording of the potential."""
    running: dict[int, tuple[Any, NativeDensity]] = {}
    waiting = list(range(len(starts)))
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                chain = waiting.pop(0)
                density = native if chain == 0 else log_density.native()
                assert density is not None
                model = _native_model(density, starts[chain].numpy().copy())
                running[chain] = (_sample(model, chain, settings, blocking=False), density)
            for chain, (sampler, density) in list(running.items()):
                try:
                    trace = sampler.wait(timeout=_SECONDS_BETWEEN_LOOKS)
                except TimeoutError:
                    shared.done[chain] = density.kept
                    continue
                except Exception as error:
                    shared.fail(chain, error)
                else:
                    _take(trace, shared, chain, settings)
                del running[chain]
                shared.done[chain], shared.gradients[chain] = density.kept, density.evaluations
            bar.update(int(shared.done.sum()) - bar.n)
    finally:
        for sampler, _ in running.values():
            sampler.cancel()


def _native_model(density: NativeDensity, start: Any) -> Any:
    """nutpie's model of a C function."""
    from nutpie.compile_pymc import CompiledPyMCModel

    return CompiledPyMCModel(
        dims={},
        compiled_logp_func=types.SimpleNamespace(address=density.evaluate),
        compiled_expand_func=types.SimpleNamespace(address=density.keep),
        initial_point_func=lambda _: start,
        shared_data={},
        user_data=density.block,
        n_expanded=density.size,
        shape_info=(["u"], [slice(None)], [(density.size,)]),
        logp_func=density,
        expand_func=density,
        _n_dim=density.size,
        _shapes={"u": (density.size,)},
        _coords={},
    )


def _sample(model: Any, chain: int, settings: _Settings, *, blocking: bool) -> Any:
    """One chain: its trace, or the sampler that is at it."""
    import nutpie

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nutpie.sample(
            model,
            draws=settings.draws,
            tune=settings.warmup,
            chains=1,
            cores=1,
            seed=(settings.seed * 7919 + chain) % (2**31),
            progress_bar=False,
            target_accept=settings.target_accept,
            maxdepth=settings.max_tree_depth,
            return_raw_trace=True,
            blocking=blocking,
        )


def _take(trace: Any, shared: _Shared, chain: int, settings: _Settings) -> None:
    """Copies the draws after warm-up and what is known of each from a raw trace."""
    import pyarrow

    (drawn,), (known,) = trace.get_arrow_trace()
    draws = pyarrow.array(drawn.column("u")).flatten().to_numpy(zero_copy_only=False)
    size = shared.draws.shape[-1]
    shared.draws[chain] = torch.from_numpy(draws.reshape(-1, size)[-settings.draws :].copy())
    for column, name in enumerate(("diverging", "logp", "depth", "step_size_bar")):
        values = pyarrow.array(known.column(name)).to_numpy(zero_copy_only=False)
        shared.stats[chain, :, column] = torch.from_numpy(
            values[-settings.draws :].astype(np.float64)
        )
    shared.state[chain] = 1


def _run_one(
    log_density: Potential, shared: _Shared, chain: int, start: Any, settings: _Settings
) -> None:
    """A chain whose potential is called through Python."""
    import nutpie

    size = start.shape[0]
    gradients = 0
    threads = torch.get_num_threads()

    def make_log_density() -> Any:
        def evaluate(point: Any) -> tuple[float, Any]:
            nonlocal gradients
            if not gradients:
                # The sampler calls from a thread of its own, and OpenMP counts by thread: there a
                # library call (a Cholesky factor) would start one worker per core and wait for it.
                torch.set_num_threads(threads)
            gradients += 1
            value, gradient = log_density(torch.from_numpy(point))
            return float(value), gradient.numpy()

        return evaluate

    def make_expand(*_: Any) -> Any:
        def expand(point: Any) -> dict[str, Any]:
            shared.done[chain] += 1
            return {"u": point}

        return expand

    model = nutpie.compiled_pyfunc.from_pyfunc(
        size,
        make_log_density,
        make_expand,
        [np.dtype("float64")],
        [(size,)],
        ["u"],
        make_initial_point_fn=lambda _: start,
    )
    _take(_sample(model, chain, settings, blocking=True), shared, chain, settings)
    shared.gradients[chain] = gradients
