"""Importance sampling from any q(φ | S) with a density, with Pareto-smoothed weights (PSIS).

Model: p(S, φ | θ) at a θ that is held at a point.
Estimator: φ_s ~ q(· | S), s = 1..n, both densities those of unconstrained φ,

    w_s = p(S, φ_s | θ) / q(φ_s),     p(S | θ) ≈ w̄ = mean_s w_s,

the weights of the draws of p(φ | S, θ) being the w_s with their largest M = min(n/5, 3√n) replaced
by the quantiles of a generalised Pareto law fitted to them. Its shape k̂ says how heavy the tail is:
w has 1/k moments. The estimates are usable where k̂ < min(1 − 1/log₁₀ n, 0.7).

Exact where q is the posterior: then every weight is p(S | θ) and k̂ = −∞. k̂ is that of all φ_i of a
task together; it says nothing of a marginal, and grows with the number of parameters.

References:
    Vehtari, Simpson, Gelman, Yao, Gabry (2024), JMLR 25(72). Yao, Vehtari, Simpson, Gelman (2018),
    Yes, but did it work?, ICML.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import arviz
import numpy as np
import torch
from torch import Tensor

from hbmeta.curvature import log_joint
from hbmeta.densities import Delta, Empirical, Transported
from hbmeta.errors import ConvergenceError, DataError, UnsupportedModelError
from hbmeta.posterior import TaskPosterior
from hbmeta.tasks.checks import check_seed

# Weights whose logarithms differ by less than so many roundings of the terms are equal.
_ROUNDINGS = 64
# Fewer draws leave too short a tail to fit.
_FEWEST = 100

__all__ = ["importance", "largest_k", "pareto_smoothed"]


def largest_k(draws: int) -> float:
    """The k̂ from which on estimates from so many draws are not to be relied on."""
    return min(1.0 - 1.0 / math.log10(draws), 0.7)


def importance(posterior: TaskPosterior, draws: int = 4000, seed: int = 0) -> TaskPosterior:
    """Draws of q(φ | S), weighted to those of p(φ | S, θ): `importance(fitted.adapt(support))`.

    Args:
        posterior: of any strategy whose q has a density (a Gaussian, a flow).
        draws: n, per task.
        seed: of the draws.
    Returns:
        a TaskPosterior of weighted draws. Its info, each (tasks,): pareto_k; effective_draws,
        1/Σ w² of the smoothed weights; log_evidence, log w̄ of the raw weights, and
        log_evidence_error, its standard error sd(w) / (w̄ √n), which means something where
        k̂ < ½. And threshold, `largest_k(draws)`.
    Raises:
        UnsupportedModelError: q is a point or draws, or θ is a set of draws.
        ConvergenceError: a weight is NaN or infinite; names the task.
    Warns:
        where k̂ exceeds the threshold, naming the worst task.
    """
    if type(draws) is not int or draws < _FEWEST:
        raise DataError(
            "importance",
            needed=f"draws as a whole number of {_FEWEST} or more",
            found=repr(draws),
            do="Leave it out for 4000.",
        )
    seed = check_seed(seed, where="importance")
    phi, log_weights, rounding = _weighted(posterior, _density(posterior), draws, seed)
    smoothed, k = pareto_smoothed(log_weights, rounding)
    shifted = (log_weights - log_weights.amax(0)).exp()
    mean = shifted.mean(0)
    density = Empirical(phi, smoothed)
    info: dict[str, Any] = {
        **posterior.info,
        "pareto_k": k,
        "threshold": largest_k(draws),
        "effective_draws": density.effective_draws,
        "log_evidence": log_weights.amax(0) + mean.log(),
        "log_evidence_error": shifted.std(0) / (mean * math.sqrt(draws)),
    }
    _warn(k, posterior.ids, draws)
    return TaskPosterior(
        posterior.problem,
        posterior.theta,
        density,
        posterior.support,
        info=info,
        units=posterior.units,
    )


def _density(posterior: TaskPosterior) -> Transported:
    density = posterior.density
    if posterior.drawn or not isinstance(density, Transported):
        found, do = (
            "draws",
            "Draws of NUTS need no correction; a density is Laplace's, for example.",
        )
        if isinstance(density, Delta):
            found = "a point (Delta)"
            do = "Widen it to a Gaussian first: Laplace.soften(fitted), then adapt."
        elif posterior.drawn:
            found, do = "draws of θ", "Use a strategy that holds θ at a point, or NUTS."
        raise UnsupportedModelError(
            "importance",
            needed="a posterior with a density q(φ | S), at one θ",
            found=found,
            do=do,
        )
    return density


def _weighted(
    posterior: TaskPosterior, density: Transported, draws: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws (draws, tasks, phi_size), log w (draws, tasks) and its rounding (tasks,)."""
    problem, theta = posterior.problem, posterior.theta
    batch = problem.batch(posterior.support)
    generator = torch.Generator().manual_seed(seed)
    shape = (draws, len(posterior.ids), density.noise_size)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(density.centre)
    with torch.no_grad():
        phi = density.draw(noise)
        log_q = density.log_prob(phi).double()
    log_p = problem.over(
        lambda t, p: log_joint(problem, t, p, batch), theta, False, phi, batch
    ).double()
    log_weights = log_p - log_q
    # A weight of 0 (log w = −∞) is one; NaN and +∞ are not.
    bad = log_weights.isnan() | (log_weights == math.inf)
    lost = bad.any(0) | (log_weights == -math.inf).all(0)
    if bool(lost.any()):
        worst = int(lost.nonzero()[0])
        raise ConvergenceError(
            "importance",
            needed="finite weights of the draws of every task",
            found=f"NaN or infinity for task {posterior.ids[worst]!r}",
            do="Check q there (posterior.moments()), and the program far from its priors' "
            "locations.",
        )
    terms = log_p.abs().where(log_p.isfinite(), 0.0).amax(0) + log_q.abs().amax(0)
    return phi, log_weights, _ROUNDINGS * torch.finfo(phi.dtype).eps * (1.0 + terms)


def pareto_smoothed(log_weights: Tensor, rounding: Tensor) -> tuple[Tensor, Tensor]:
    """Pareto-smoothed log weights, normalised, and k̂, which is −∞ where all weights are equal.

    Args:
        log_weights: (draws, tasks); −∞ is a weight of 0.
        rounding: (tasks,) what log weights differ by that are equal.
    """
    # ArviZ fits a tail to rounding where all weights are equal: those are the best there are.
    equal = log_weights.amax(0) - log_weights.amin(0) <= rounding
    with np.errstate(all="ignore"):
        found, k = arviz.psislw(log_weights.T.cpu().numpy())
    smoothed = torch.from_numpy(np.ascontiguousarray(found.T)).to(log_weights)
    shape = torch.from_numpy(np.asarray(k, dtype=np.float64).reshape(-1)).to(log_weights)
    even = torch.full_like(smoothed, -math.log(len(smoothed)))
    return torch.where(equal, even, smoothed), torch.where(equal, -math.inf, shape)


def _warn(k: Tensor, ids: tuple[Any, ...], draws: int) -> None:
    # NaN is no small k̂.
    poor = ~(k <= largest_k(draws))
    if not bool(poor.any()):
        return
    worst = int(k.nan_to_num(math.inf, math.inf).argmax())
    warnings.warn(
        f"importance: Pareto k̂ of task {ids[worst]!r} is {float(k[worst]):.2f}, above "
        f"{largest_k(draws):.2f} ({int(poor.sum())} of {len(ids)} tasks): q is too far from "
        "p(φ | S, θ) there for its weights to correct it. Use a wider or a more flexible q, or "
        "NUTS.",
        stacklevel=3,
    )
