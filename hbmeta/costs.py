"""What one meta-step costs: gradients, Hessian-vector products, seconds and bytes.

A meta-step is the value of the training loss and its gradient in θ, for all tasks of the step at
once; drawing the tasks and moving θ come on top and are the same for all strategies. With N inner
steps, and c the seconds of a Hessian-vector product in those of a gradient,

    MAML  N + 1 gradients and N products,    FOMAML  N + 1 gradients,
    MAML / FOMAML = (N + 1 + c N) / (N + 1)

(8/3 for N = 5 if c is 2, 1.83 if it is 1, 3.5 if it is 3). A product by itself computes the
gradient that it goes back through; where that one's graph is kept from the inner step, a product
costs one gradient less, and c − 1 stands in the place of c. Neither formula knows what it costs to
write and read the kept graph, or what a compiler merges, and both take a support to be as large as
a query. So c and the ratio are measured, side by side.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hbmeta.accounts import Entry, Ledger, cost_ratio
from hbmeta.derivatives import hessian_vector, task_gradient
from hbmeta.errors import ConvergenceError, DataError, UnsupportedModelError
from hbmeta.feeding import training_tasks
from hbmeta.inference import FOMAML, Strategy
from hbmeta.inference.strategy import on_device, threads_for
from hbmeta.inference.work import Counted, Work
from hbmeta.memory import peak_bytes
from hbmeta.models import HierarchicalModel
from hbmeta.problem import Problem
from hbmeta.program import Batch, Phi, Program, Theta
from hbmeta.records import versions
from hbmeta.rows import unknown_name
from hbmeta.staging import TIERS, Staged, Tier, tier_of
from hbmeta.tasks.checks import check_count, check_seed
from hbmeta.training import Options, Setup

__all__ = ["Entry", "Ledger", "cost_ratio", "ledger"]

_WHERE = "ledger"
# Calls of a round add up to this many seconds at least, so that the clock's ticks do not show.
_SECONDS_PER_ROUND = 0.03
# With compile="auto" the first calls decide how a fit is staged, see `hbmeta.staging`.
_CALLS_TO_SETTLE = 6


def ledger(
    strategies: Mapping[str, Strategy],
    model: Program,
    tasks: Any,
    *,
    baseline: str | None = None,
    steps: int = 2000,
    tasks_per_step: int | None = None,
    seed: int = 0,
    rounds: int = 11,
    device: str | torch.device | None = None,
    compile: bool | str = "auto",
) -> Ledger:
    """Measures a meta-step of each strategy on the same tasks; fits nothing.

    θ stays where a fit would start, and the first step of that fit is computed again and again, by
    the function that training calls. The rounds of all strategies, of one gradient and of one
    Hessian-vector product are interleaved, so that a drifting machine hits all alike.

    Args:
        strategies: strategies that are trained, by name.
        model: as for `Strategy.fit`.
        tasks: as for `Strategy.fit`.
        baseline: the strategy that ratios are to; by default the first FOMAML, if there is one.
        steps: training steps of the fit that is meant; with compile="auto" they decide what is
            compiled.
        tasks_per_step: as for `Strategy.fit`.
        seed: of tasks, of what the strategies learn besides θ, and of noise.
        rounds: the median over so many is taken.
        device: where to run; the device of the data by default.
        compile: as for `Strategy.fit`.
    Returns:
        Ledger: printable, `to_frame()`, `to_json()`.
    Raises:
        DataError: no strategies, an unknown baseline, arguments that are no counts.
        UnsupportedModelError: a strategy that is not trained, or makes no sense for the program.
        ConvergenceError: a loss is infinite or NaN.
    Example:
        print(ledger({"maml": MAML(), "fomaml": FOMAML()}, model, Sinusoids()))
    """
    baseline = _checked(strategies, baseline)
    if not callable(model):
        raise UnsupportedModelError(
            _WHERE,
            needed="a model: a HierarchicalModel or a Pyro program",
            found=type(model).__name__,
            do="Pass the strategies first, the model second and the tasks third.",
        )
    steps = check_count(steps, "steps", where=_WHERE)
    rounds = check_count(rounds, "rounds", where=_WHERE)
    seed, tier = check_seed(seed, where=_WHERE), tier_of(compile)
    known = training_tasks(tasks, seed)
    known = known if device is None else on_device(known, device, _WHERE)
    problem = Problem(model.bind(known) if isinstance(model, HierarchicalModel) else model, known)
    options = Options(steps=steps, tasks_per_step=tasks_per_step, seed=seed, tier=tier)
    with threads_for(known):
        sides = {
            name: _Side(name, strategy, problem, tasks, options)
            for name, strategy in strategies.items()
        }
        split = [name for name, strategy in strategies.items() if strategy.needs == "split"]
        support, query = sides[split[0] if split else next(iter(sides))].step
        rows = support if split else query
        reached = [side.tier for side in sides.values()]
        alike = max(reached, key=TIERS.index) if baseline is None else sides[baseline].tier
        calls = {("step", name): side.call for name, side in sides.items()}
        calls |= _single(problem, rows, alike)
        seconds = _interleaved(calls, rounds, problem.device)
        threads = torch.get_num_threads()
        entries = tuple(side.entry(seconds["step", name]) for name, side in sides.items())
    return Ledger(
        entries=entries,
        baseline=baseline,
        gradient_times=tuple(seconds["single", "gradient"]),
        product_times=tuple(seconds["single", "product"]),
        tier=alike,
        program=problem.name,
        n_tasks=query.n_tasks,
        support_points=int(support.counts.sum()),
        query_points=int(query.counts.sum()),
        phi_size=problem.sites.phi_size,
        dtype=str(problem.dtype).removeprefix("torch."),
        device=str(problem.device),
        threads=threads,
        steps=steps,
        seed=seed,
        versions=versions(),
    )


class _Side:
    """A strategy on the first step of its fit, staged as that fit would stage it."""

    def __init__(
        self, name: str, strategy: Strategy, problem: Problem, data: Any, options: Options
    ) -> None:
        self.name, self.strategy, self.problem = name, strategy, problem
        strategy.check_levels(problem)
        strategy.check(problem)
        setup = Setup(strategy, problem, data, options)
        if not setup.moving.free:
            raise UnsupportedModelError(
                _WHERE,
                needed=f"something that {name} learns from {problem.name}",
                found="nothing: no θ and no parameters of its own that the loss depends on",
                do="Leave it out, or give the program parameters.",
            )
        self.step, self.noise = setup.first, setup.noise()
        self.decides = options.tier == "auto"
        self.pieces = strategy.meta_gradient(problem, setup.own, options)
        self.gradient = setup.gradient(self.pieces, options.steps)
        self._settle()

    def call(self) -> tuple[Tensor, list[Tensor]]:
        """One meta-step: value and gradient."""
        return self.gradient(*self.step, self.noise)

    def _settle(self) -> None:
        """Calls it until nothing is staged any more."""
        self.loss = float(self.call()[0])
        if not math.isfinite(self.loss):
            raise ConvergenceError(
                _WHERE,
                needed="a finite loss where training starts",
                found=f"{self.loss} of {self.name}",
                do="Lower step_size, or standardise x and y.",
            )
        quiet, enough = 0, _CALLS_TO_SETTLE if self.decides else 1
        while quiet < enough:
            before = self.gradient.seconds_staging
            self.call()
            quiet = quiet + 1 if self.gradient.seconds_staging == before else 0

    @property
    def tier(self) -> Tier:
        """How it runs."""
        return self.gradient.tier

    def entry(self, seconds: list[float]) -> Entry:
        """The line of the ledger, given the seconds of every round."""
        work: Work | None = None
        for counted in (self.pieces, self.strategy):
            if work is None and isinstance(counted, Counted):
                work = counted.work()
        return Entry(
            name=self.name,
            strategy=self.strategy.name,
            settings=self.strategy.settings(),
            gradients=None if work is None else work.gradients,
            products=None if work is None else work.products,
            graph_kept=work is not None and work.graph_kept,
            moving=self._moving() if work is not None else None,
            loss=self.loss,
            times=tuple(seconds),
            peak_bytes=peak_bytes(self.call, self.problem.device),
            tier=self.tier,
            seconds_staging=self.gradient.seconds_staging,
        )

    def _moving(self) -> int:
        sites = {site.name: site.size for site in self.problem.sites.locals}
        moving: Callable[[Problem], tuple[str, ...]] | None
        moving = getattr(self.strategy, "moving", None)
        return sum(sites[name] for name in (sites if moving is None else moving(self.problem)))


def _single(
    problem: Problem, support: Batch, tier: Tier
) -> dict[tuple[str, str], Callable[[], Any]]:
    """One gradient of the support loss in φ, and one Hessian-vector product, of all tasks."""
    theta = problem.theta(support)
    with torch.no_grad():
        phi = {k: v.clone() for k, v in problem.location_by_site(theta, support).items()}

    def loss(theta: Theta, phi: Phi, batch: Batch) -> Tensor:
        return -problem.log_likelihood(theta, phi, batch) / batch.counts.clamp_min(1.0)

    def gradient(theta: Theta, phi: Phi, batch: Batch) -> tuple[Tensor, Phi]:
        return task_gradient(lambda p: loss(theta, p, batch), phi)

    def product(theta: Theta, phi: Phi, batch: Batch, vector: Phi) -> Phi:
        return hessian_vector(lambda p: loss(theta, p, batch), phi, vector)

    staged = {"gradient": Staged(gradient, tier=tier), "product": Staged(product, tier=tier)}
    vector = {name: torch.ones_like(value) for name, value in phi.items()}
    return {
        ("single", "gradient"): lambda: staged["gradient"](theta, phi, support),
        ("single", "product"): lambda: staged["product"](theta, phi, support, vector),
    }


def _interleaved(
    calls: Mapping[tuple[str, str], Callable[[], Any]], rounds: int, device: torch.device
) -> dict[tuple[str, str], list[float]]:
    """Seconds per call of each in every round, all of them in turn."""

    def timed(call: Callable[[], Any], times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / times

    times = {}
    for key, call in calls.items():
        timed(call, 1)
        times[key] = max(1, math.ceil(_SECONDS_PER_ROUND / max(timed(call, 1), 1e-7)))
    found: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            found[key].append(timed(call, times[key]))
    return found


def _checked(strategies: Mapping[str, Strategy], baseline: str | None) -> str | None:
    """The baseline; raises where the strategies are none."""
    if not isinstance(strategies, Mapping) or not strategies:
        raise DataError(
            _WHERE,
            needed="one strategy or more by name",
            found="none" if isinstance(strategies, Mapping) else type(strategies).__name__,
            do='Pass {"maml": MAML(), "fomaml": FOMAML()}.',
        )
    for name, strategy in strategies.items():
        if not isinstance(strategy, Strategy) or not isinstance(name, str):
            raise DataError(
                _WHERE,
                needed="strategies by names that are text",
                found=f"{type(strategy).__name__} under {name!r}",
                do='Pass {"maml": MAML(), "fomaml": FOMAML()}; nothing has to be fitted.',
            )
        if type(strategy).learn is not Strategy.learn:
            raise UnsupportedModelError(
                _WHERE,
                needed="strategies that are trained by gradient steps on θ",
                found=f"{strategy.name} under {name!r}, which is not",
                do="Leave it out; Fitted.seconds says what its fit took.",
            )
    if baseline is not None and baseline not in strategies:
        raise unknown_name(
            baseline, strategies, needed="baseline as one of the strategies:", where=_WHERE
        )
    first_order = (name for name, found in strategies.items() if isinstance(found, FOMAML))
    return baseline if baseline is not None else next(first_order, None)
