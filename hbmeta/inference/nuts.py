"""NUTS over global and local sites together: the reference for every approximation.

Model: θ ~ p(θ), φ_i ~ p(φ | θ), y_ij ~ p(y | φ_i, θ).
Estimator: draws of (θ, φ_1, …, φ_T) from p(θ, φ | y) in unconstrained space, by the No-U-Turn
sampler.
New tasks: (θ_s, φ_s) with φ_s ~ p(φ | S_new, θ_s), weighted by p(S_new | θ_s).
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hbmeta.chains import Chains, run_chains
from hbmeta.conditional import conditional
from hbmeta.densities import Density, Empirical
from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.feeding import training_tasks
from hbmeta.fitted import Fitted
from hbmeta.inference.adapting import adapt_by_importance, adapt_to_draws
from hbmeta.inference.strategy import Strategy
from hbmeta.joint_density import (
    Potential,
    check_gradient,
    log_density,
    staged_log_density,
    unpack,
)
from hbmeta.mixing import mixing
from hbmeta.parametrisation import CHOICES, Choice, Coordinates
from hbmeta.posterior import TaskPosterior
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.staging import Tier
from hbmeta.starts import from_noise, pathfinder_starts, spread_starts
from hbmeta.tasks import Tasks
from hbmeta.training import Learned, Options, show_progress

__all__ = ["NUTS", "log_density", "require_priors", "staged_log_density"]

# The pilot that tells which parametrisation is better, at most; its trees are cut at 2^7 steps.
_PILOT_DRAWS, _PILOT_WARMUP, _PILOT_DEPTH = 60, 150, 7


@dataclass(frozen=True)
class NUTS(Strategy):
    """Draws from the joint posterior of θ and all φ; asymptotically exact.

    Keeps p(θ), p(φ | θ) and p(y | φ, θ). Split R̂, bulk and tail effective sample sizes, and
    divergences are in `info`; what is bad among them is warned of. Every level-1 parameter needs a
    prior. New tasks get draws of φ given each draw of θ with the weight p(S_new | θ); the effective
    number of draws per task is in the posterior's `info`. Tasks that the fit saw with the very same
    rows keep its draws.

    Args:
        draws: per chain, after warm-up.
        chains: number of chains.
        warmup: steps of adaptation per chain.
        target_accept: raise towards 1 where there are divergences.
        max_tree_depth: a trajectory has at most 2 to this power steps.
        processes: chains that run at a time, in threads where the potential is a C function
            (`info["potential"]` is "native") and else in processes; the number of cores by
            default. The draws do not depend on it.
        parametrisation: what the chains move in at local sites φ = m + s ε of a location-scale
            family whose m or s depends on θ: φ ("centered"), ε ("non-centered"), or the better of
            the two, per site, by a short pilot ("auto"; above 64 parameters per task ε, without
            a pilot). "as written" moves the program's own sites. Draws are always of φ;
            `info["parametrisation"]` says what was used.
        initial: where chains start: "spread" within 1 of the priors' locations in unconstrained
            space, or at draws of "pathfinder" (`hbmeta.pathfinder`), where the posterior is far
            from there or the warm-up short.
    References:
        Hoffman, Gelman (2014), JMLR 15. Sampler: nutpie. Diagnostics: `hbmeta.mixing`.
        Parametrisation: `hbmeta.parametrisation`.
    """

    learns_spread: ClassVar[bool] = False

    draws: int = 1000
    chains: int = 4
    warmup: int = 500
    target_accept: float = 0.8
    max_tree_depth: int = 10
    processes: int | None = None
    parametrisation: Choice = "auto"
    initial: Literal["spread", "pathfinder"] = "spread"

    def __post_init__(self) -> None:
        counts = (self.draws, self.chains, self.warmup, self.max_tree_depth)
        whole = all(isinstance(count, int) and count >= 1 for count in counts)
        share = isinstance(self.target_accept, float) and 0 < self.target_accept < 1
        several = self.processes is None or (
            isinstance(self.processes, int) and self.processes >= 1
        )
        if not (whole and share and several):
            raise DataError(
                "NUTS",
                needed="whole draws, chains, warmup, max_tree_depth (and processes) of 1 or more, "
                "target_accept in (0, 1)",
                found=str(self.settings()),
                do="Correct the setting.",
            )
        if self.parametrisation not in CHOICES:
            raise DataError(
                "NUTS",
                needed=f"parametrisation among {', '.join(map(repr, CHOICES))}",
                found=repr(self.parametrisation),
                do="Leave it out to have it chosen.",
            )
        if self.initial not in ("spread", "pathfinder"):
            raise DataError(
                "NUTS",
                needed="initial as 'spread' or 'pathfinder'",
                found=repr(self.initial),
                do="Leave it out for 'spread'.",
            )

    def suited(self, problem: Problem, known: Tasks) -> Strategy:
        """Itself: θ is drawn."""
        return self

    def check(self, problem: Problem) -> None:
        """Every level-1 parameter needs a prior."""
        require_priors(problem, self.name)

    def learn(self, problem: Problem, data: Any, options: Options) -> Learned:
        """Runs the chains on all rows of the tasks."""
        tasks = training_tasks(data, options.seed).to(device=problem.device, dtype=problem.dtype)
        batch = problem.batch(tasks)
        theta = problem.theta(batch)
        expected = self.chains * (self.draws + self.warmup) * 15
        tier: Tier = "compiled" if options.tier == "auto" else options.tier
        coordinates = Coordinates.of(problem, batch, self.parametrisation, self.name)
        potential, seconds_staging = staged_log_density(
            problem, batch, theta, tier, expected, coordinates, falls_back=options.tier == "auto"
        )
        starts = self._starts(problem, batch, theta, options.seed, potential, coordinates)
        if problem.dtype == torch.float64:
            check_gradient(potential, starts[0], problem.name)
        run = functools.partial(
            run_chains,
            potential,
            seed=options.seed,
            target_accept=self.target_accept,
            processes=1 if problem.device.type != "cpu" else self.processes,
            where=f"{self.name}.fit",
        )
        if coordinates is not None and self.parametrisation == "auto" and coordinates.measurable:
            pilot = run(
                starts[:2],
                draws=min(self.draws, _PILOT_DRAWS),
                warmup=min(self.warmup, _PILOT_WARMUP),
                max_tree_depth=min(self.max_tree_depth, _PILOT_DEPTH),
                progress=False,
            )
            drawn, t = unpack(problem, _like(problem, pilot.draws.flatten(0, 1)), batch.n_tasks)
            coordinates.choose({**theta, **drawn}, bool(drawn), t, batch)
            if self.initial == "pathfinder":
                starts = from_noise(problem, batch, theta, coordinates, starts)
            else:
                starts = self._starts(problem, batch, theta, options.seed, potential, coordinates)
        found = run(
            starts,
            draws=self.draws,
            warmup=self.warmup,
            max_tree_depth=self.max_tree_depth,
            progress=show_progress(options.progress),
        )
        return self._learned(problem, tasks, theta, found, seconds_staging, coordinates)

    def _starts(
        self,
        problem: Problem,
        batch: Batch,
        theta: Theta,
        seed: int,
        potential: Potential,
        coordinates: Coordinates | None,
    ) -> Tensor:
        """As `initial` says; see `hbmeta.starts`."""
        given = (problem, batch, theta, potential, coordinates)
        if self.initial == "spread":
            return spread_starts(*given, count=self.chains, seed=seed)
        where = f"{self.name}.fit"
        return pathfinder_starts(*given, count=self.chains, seed=seed, where=where)

    def _learned(
        self,
        problem: Problem,
        tasks: Tasks,
        theta: Theta,
        found: Chains,
        seconds_staging: float,
        coordinates: Coordinates | None,
    ) -> Learned:
        flat = _like(problem, found.draws.flatten(0, 1))
        drawn, phi = unpack(problem, flat, tasks.n_tasks)
        if coordinates is not None:
            # Nothing after this knows of other coordinates: φ, and log p(θ, φ, y) of it.
            batch = problem.batch(tasks)
            phi, log_det = coordinates.many({**theta, **drawn}, bool(drawn), phi, batch)
            vectors = torch.cat([flat[:, : problem.sites.theta_size], phi.flatten(1)], 1)
            log_det = log_det.to(found.log_density).reshape(found.log_density.shape)
            found = dataclasses.replace(
                found,
                draws=vectors.to(found.draws).reshape(found.draws.shape),
                log_density=found.log_density - log_det,
            )
        info = self._diagnostics(found, coordinates)
        return Learned(
            theta={**theta, **drawn},
            drawn=bool(problem.sites.globals),
            density=Empirical(phi),
            info=info,
            seconds_staging=seconds_staging,
            chains=self.chains,
        )

    def _diagnostics(self, found: Chains, coordinates: Coordinates | None) -> dict[str, Any]:
        """Rank-normalised R̂ and effective sample sizes of every unconstrained coordinate."""
        info: dict[str, Any] = {
            "divergences": int(found.diverging.sum()),
            "deep_trees": int((found.tree_depth >= self.max_tree_depth).sum()),
            "gradients": found.gradients,
            "seconds_sampling": found.seconds,
            "potential": found.potential,
            "diverging": found.diverging,
            "log_density": found.log_density,
            "tree_depth": found.tree_depth,
            "step_size": found.step_size,
            "parametrisation": "as written" if coordinates is None else coordinates.describe(),
        }
        if self.draws >= 4:
            mixed = mixing(found.draws)
            info |= {
                "r_hat": mixed.r_hat,
                "ess_bulk": mixed.ess_bulk,
                "ess_tail": mixed.ess_tail,
            }
        for problem in trouble(info):
            warnings.warn(f"NUTS: {problem}", stacklevel=5)
        return info

    def posterior(self, problem: Problem, theta: Theta, own: Any, support: Batch) -> Density:
        """p(φ | S, θ) at a point θ, by importance sampling from its expansion at the mode."""
        return conditional(problem, theta, support)[0]

    def adapt(self, fitted: Fitted, support: Tasks, seed: int) -> TaskPosterior:
        """Weighted draws of (θ, φ) for new tasks; see the class."""
        adapt = adapt_to_draws if fitted.drawn else adapt_by_importance
        return adapt(fitted, support, seed)


def require_priors(problem: Problem, where: str) -> None:
    """Raises UnsupportedModelError where a parameter of the module has no prior to draw it by."""
    free = [name for name, _ in problem.parameters()]
    if free:
        raise UnsupportedModelError(
            where,
            needed="a prior for every level-1 parameter",
            found=f"module parameter {free[0]!r} without one",
            do="Make it a pyro.sample site, fix it with requires_grad_(False), or use "
            "AmortizedGuide.",
        )


def _like(problem: Problem, draws: Tensor) -> Tensor:
    return draws.to(dtype=problem.dtype, device=problem.device)


def _used(info: dict[str, Any]) -> str:
    """The parametrisation in words; nothing where it is the program's own."""
    used = info.get("parametrisation", "as written")
    return "" if isinstance(used, str) else ", ".join(f"{k} {v}" for k, v in used.items())


def _advice(info: dict[str, Any]) -> str:
    """What to try against divergences, given the parametrisation in use."""
    raised, used = "Raise target_accept (0.95)", _used(info)
    if not used:
        return f"{raised}, or write the program non-centered."
    if any(choice != "non-centered" for choice in info["parametrisation"].values()):
        return f'{raised}, or pass parametrisation="non-centered" (it was: {used}).'
    return (
        f'{raised}, pass parametrisation="centered" (it was: {used}), or give the scales a prior '
        "with less mass near 0 and far out."
    )


def trouble(info: dict[str, Any]) -> list[str]:
    """What is wrong with a run, in words; empty where nothing is."""
    out = []
    used = f"; {_used(info)}" if _used(info) else ""
    if info["divergences"]:
        out.append(f"{info['divergences']} divergent transitions. {_advice(info)}")
    if info["deep_trees"]:
        out.append(
            f"{info['deep_trees']} trajectories hit max_tree_depth. Raise it, or rescale the "
            "columns."
        )
    # NaN (a chain that never moved) must not pass; one chain alone has no R̂ at all.
    several = info["diverging"].shape[0] > 1
    if several and "r_hat" in info and not bool((info["r_hat"] <= 1.01).all()):
        worst = float(info["r_hat"].nan_to_num(torch.inf).max())
        out.append(f"split R̂ up to {worst:.3f} (above 1.01{used}). Raise warmup and draws.")
    if "ess_bulk" in info:
        least = float(torch.minimum(info["ess_bulk"], info["ess_tail"]).min())
        if not least >= 400:
            out.append(f"an effective sample size of {least:.0f} (below 400{used}). Raise draws.")
    return out
