"""Nested Laplace: θ integrated out around the mode of its evidence, φ by an expansion for each θ.

Model: θ ~ p(θ), φ_i ~ p(φ | θ), y_ij ~ p(y | φ_i, θ).
Estimator: in unconstrained u of θ, with û and C the maximum of Laplace's evidence plus log p(θ) and
the inverse of its curvature there,

    u_s ~ q = t₇(û, C), some with one axis stretched,
    φ_ik ~ q_i = t₇ around the mode of p(S_i, φ | u_s), k = 1..K (`hbmeta.conditional`),
    p̂(S_i | u_s) = mean_k w_ik,   w_ik = p(S_i, φ_ik | u_s) / q_i(φ_ik),
    w_s = p(u_s) Π_i p̂(S_i | u_s) / q(u_s),

and one φ_i of each task chosen by its w_ik. The p̂ are unbiased, so that the w_s are weights of the
draws (u_s, φ_s) to the joint posterior, whatever Laplace's error (importance sampling with random
weights; Fearnhead et al. 2008). û and C move to the weighted mean and covariance in a few rounds.
The weights of the last are Pareto-smoothed, and their k̂ says whether to rely on them.

Integrated nested Laplace approximation (Rue et al. 2009) keeps the Gaussian, or a correction of it,
where this samples; it takes a grid or a design of points where this draws, which many global sites
forbid.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hbmeta.conditional import conditional, conditional_over_draws, warn_of_proposals
from hbmeta.densities import Density, Empirical
from hbmeta.errors import ConvergenceError, DataError, UnsupportedModelError
from hbmeta.evidence import observed_information
from hbmeta.feeding import training_tasks
from hbmeta.fitted import Fitted
from hbmeta.importance import largest_k, pareto_smoothed
from hbmeta.inference.adapting import adapt_to_draws
from hbmeta.inference.laplace import Laplace
from hbmeta.inference.nuts import require_priors
from hbmeta.inference.strategy import Strategy
from hbmeta.laplace_evidence import total_evidence
from hbmeta.modes import DENSE_AT_MOST, find_modes
from hbmeta.posterior import TaskPosterior
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.tasks import Tasks
from hbmeta.training import Learned, Options, prior_scales

_MOST_GLOBALS = 64
# A curvature of the evidence below this share of the prior's is taken for it: where the data say
# less, the proposal is as wide as three standard deviations of the prior.
_LEAST_CURVATURE = 0.1
# Of the proposal of θ: Student-t, and in this share of draws with one axis stretched.
_DEGREES_OF_FREEDOM = 7.0
_STRETCHED, _STRETCH = 0.2, 3.0
# Draws of a round of adaptation, and the share of them that must be effective to end it.
_DRAWS_PER_ROUND = 500
_ENOUGH = 0.4
# Draws of the last round for each one that is kept.
_SPARE = 2
# θ's are mapped over the program so many rows at a time: Hessians of all tasks at each θ.
_ROWS = 400_000

__all__ = ["NestedLaplace"]


@dataclass(frozen=True)
class NestedLaplace(Strategy):
    """Draws from the joint posterior of θ and all φ, by importance sampling around modes.

    Keeps p(θ), p(φ | θ) and p(y | φ, θ) in the weights; approximates nothing but by the number of
    draws, as long as the posterior of θ has one mode, that of each φ given θ too, and
    `info["pareto_k"]` is below `info["threshold"]`. Otherwise it warns. Every level-1 parameter
    needs a prior. New tasks get draws of φ given each draw of θ with the weight p(S_new | θ), as of
    NUTS.

    `info`: pareto_k and threshold of the weights of θ, effective_draws (1/Σ w², of the last round),
    rounds (of adaptation that were needed), log_evidence (log p(y), log mean w), and
    proposal_efficiency per task, the share of useful draws of φ given θ.

    Args:
        draws: kept, of (θ, φ), with equal weights; twice as many are made, of which these are taken
            by their weights.
        proposals: K, draws of φ per task and θ.
        rounds: of adaptation to the mean and covariance of θ, at most.
    Raises:
        UnsupportedModelError: no global sites, or more than 64 values of them; a module parameter
            without a prior; more than 64 parameters per task.
        ConvergenceError: no draw of θ has a finite density.
    References:
        Rue, Martino, Chopin (2009), JRSS B 71(2). Fearnhead, Papaspiliopoulos, Roberts (2008), JRSS
        B 70(4). Vehtari et al. (2024), JMLR 25(72), for the smoothing.
    """

    learns_spread: ClassVar[bool] = False

    draws: int = 1000
    proposals: int = 16
    rounds: int = 3

    def __post_init__(self) -> None:
        least = {"draws": 100, "proposals": 1, "rounds": 0}
        for name, number in least.items():
            value = getattr(self, name)
            if type(value) is not int or value < number:
                raise DataError(
                    self.name,
                    needed=f"{name} as a whole number of {number} or more",
                    found=f"{name}={value!r}",
                    do="Leave it out for the default.",
                )

    def suited(self, problem: Problem, known: Tasks) -> Strategy:
        """Itself: θ is drawn."""
        return self

    def check(self, problem: Problem) -> None:
        """Priors, some θ to integrate out, and few enough numbers on either level."""
        require_priors(problem, self.name)
        size = problem.sites.theta_size
        if not 1 <= size <= _MOST_GLOBALS:
            raise UnsupportedModelError(
                self.name,
                needed=f"between 1 and {_MOST_GLOBALS} values of global sites to integrate out",
                found=str(size),
                do="Use NUTS." if size else "Use Laplace, and importance(fitted.posterior).",
            )
        if problem.sites.phi_size > DENSE_AT_MOST:
            raise UnsupportedModelError(
                self.name,
                needed=f"at most {DENSE_AT_MOST} parameters per task (the curvature is dense)",
                found=str(problem.sites.phi_size),
                do="Use NUTS or Variational.",
            )

    def learn(self, problem: Problem, data: Any, options: Options) -> Learned:
        """The rounds of adaptation, and the draws that are kept."""
        tasks = training_tasks(data, options.seed).to(device=problem.device, dtype=problem.dtype)
        batch = problem.batch(tasks)
        with warnings.catch_warnings():
            # Warnings about θ as a point are none about what is around it.
            warnings.simplefilter("ignore")
            at = Laplace().learn(problem, tasks, options)
        loc, tril = _around_mode(problem, at.theta, batch, options.seed)
        rounds = 0
        for rounds in range(1, self.rounds + 1):
            found = self._draw(problem, batch, loc, tril, _DRAWS_PER_ROUND, options.seed + rounds)
            loc, tril, effective = found.moments(tril)
            if effective >= _ENOUGH * _DRAWS_PER_ROUND:
                break
        found = self._draw(problem, batch, loc, tril, _SPARE * self.draws, options.seed)
        smoothed, k = found.smoothed()
        kept = _systematic(smoothed.exp(), self.draws, options.seed)
        info = {
            "pareto_k": k,
            "threshold": largest_k(_SPARE * self.draws),
            "effective_draws": float(1.0 / smoothed.exp().square().sum()),
            "rounds": rounds,
            "log_evidence": float(found.log_weights.exp().mean().log() + found.largest),
            "proposal_efficiency": found.efficiency,
        }
        self._warn(info, found, tasks)
        return Learned(
            theta=problem.sites.theta_from_vector(found.u[kept]),
            drawn=True,
            density=Empirical(found.phi[kept]),
            info=info,
            seconds_staging=at.seconds_staging,
        )

    def _draw(
        self, problem: Problem, batch: Batch, loc: Tensor, tril: Tensor, draws: int, seed: int
    ) -> _Round:
        """Draws of (θ, φ) with their weights."""
        u, log_q = _propose(loc, tril, draws, seed)
        width = max(1, _ROWS // (max(batch.weight.numel(), 1) * min(self.proposals, 4)))
        phi, log_weights, efficiencies, modal = [], [], [], []
        for number, part in enumerate(u.split(width)):
            theta = problem.sites.theta_from_vector(part)
            density, info = conditional_over_draws(
                problem, theta, batch, proposals=self.proposals, seed=seed + number
            )
            with torch.no_grad():
                log_prior = torch.vmap(lambda t: problem.log_prior(t, batch))(theta)
            phi.append(density.phi)
            log_weights.append(log_prior + info["log_evidence"].sum(-1))
            efficiencies.append(len(part) / draws * info["proposal_efficiency"])
            modal.append(info["converged"] & info["positive"])
        total = (torch.cat(log_weights) - log_q).double()
        # A θ at which the program overflows has no density.
        total = torch.where(total.isfinite(), total, -torch.inf)
        if not bool(total.isfinite().any()):
            raise ConvergenceError(
                f"{self.name}.fit",
                needed="a draw of θ at which p(θ, y) is finite",
                found=f"none among {draws} around the mode of Laplace's evidence",
                do="Standardise x and y, or use NUTS.",
            )
        largest = float(total.max())
        return _Round(
            u,
            torch.cat(phi),
            total - largest,
            largest,
            torch.stack(efficiencies).sum(0),
            torch.stack(modal).all(0),
        )

    def _warn(self, info: dict[str, Any], found: _Round, tasks: Tasks) -> None:
        checked = {
            "proposal_efficiency": found.efficiency,
            "converged": found.modal,
            "positive": found.modal,
        }
        # NaN is no small k̂.
        if not info["pareto_k"] <= info["threshold"]:
            warnings.warn(
                f"{self.name}: Pareto k̂ is {info['pareto_k']:.2f}, above {info['threshold']:.2f}: "
                "the posterior of θ is far from a Student-t around the mode of its evidence, or "
                "the evidence of many tasks too noisy, so that the draws may miss a part of it. "
                "Raise draws or proposals, reparametrise θ, or use NUTS.",
                stacklevel=5,
            )
            warn_of_proposals(checked, tasks.ids, f"{self.name}.fit")

    def posterior(self, problem: Problem, theta: Theta, own: Any, support: Batch) -> Density:
        """p(φ | S, θ) at a point θ, by importance sampling from its expansion at the mode."""
        return conditional(problem, theta, support)[0]

    def adapt(self, fitted: Fitted, support: Tasks, seed: int) -> TaskPosterior:
        """Weighted draws of (θ, φ) for new tasks; tasks of the fit keep its draws."""
        return adapt_to_draws(fitted, support, seed)


@dataclass(frozen=True)
class _Round:
    """Draws of (θ, φ): u (draws, size), φ (draws, tasks, phi_size), log w less the largest."""

    u: Tensor
    phi: Tensor
    log_weights: Tensor
    largest: float
    efficiency: Tensor
    modal: Tensor

    def smoothed(self) -> tuple[Tensor, float]:
        """Log weights (draws,) that sum to one, and k̂."""
        rounding = 64 * torch.finfo(torch.float64).eps * (1.0 + abs(self.largest))
        found, k = pareto_smoothed(
            self.log_weights.unsqueeze(-1), torch.full_like(self.log_weights[:1], rounding)
        )
        return found[:, 0].log_softmax(0), float(k[0])

    def moments(self, tril: Tensor) -> tuple[Tensor, Tensor, float]:
        """Weighted mean and a factor of the covariance, and the effective draws.

        With too few of them for a covariance weights are tempered, w^(1/2), w^(1/4), …, until there
        are enough: the next round then starts from between this one and the posterior.
        """
        log_weights = self.smoothed()[0]
        effective = float(1.0 / log_weights.exp().square().sum())
        enough = min(20.0 + 4.0 * self.u.shape[-1], 0.5 * len(self.u))
        weights = log_weights.exp()
        for _ in range(10):
            if float(1.0 / weights.square().sum()) >= enough:
                break
            log_weights = 0.5 * log_weights
            weights = log_weights.softmax(0)
        mean = weights @ self.u.to(weights)
        error = self.u - mean
        factor, failed = torch.linalg.cholesky_ex((error * weights.unsqueeze(-1)).mT @ error)
        return mean.to(tril), tril if bool(failed) else factor.to(tril), effective


def _around_mode(problem: Problem, theta: Theta, batch: Batch, seed: int) -> tuple[Tensor, Tensor]:
    """û and a factor of C, the inverse curvature of Laplace's evidence plus log p(θ).

    Curvatures are taken in units of the prior's scale, and raised where the evidence is flat or
    bends up, since any proposal is valid.
    """
    sites = problem.sites
    at = sites.theta_to_vector(theta)
    scale = sites.theta_to_vector(prior_scales(problem, problem.theta(batch), batch))
    gradient = _slope_of_evidence(problem, theta, batch, seed)
    white = scale.unsqueeze(-1) * observed_information(gradient, at, scale) * scale
    if not bool(torch.isfinite(white).all()):
        white = torch.eye(len(at), dtype=at.dtype, device=at.device)
    values, vectors = torch.linalg.eigh(white)
    inverse = (vectors / values.clamp_min(_LEAST_CURVATURE)) @ vectors.mT
    return at, torch.linalg.cholesky(scale.unsqueeze(-1) * inverse * scale)


def _slope_of_evidence(
    problem: Problem, theta: Theta, batch: Batch, seed: int
) -> Callable[[Tensor], Tensor]:
    """∇_u [Σ_i log p(S_i | u) + log p(u)], Laplace's evidence; modes start from those at û."""
    settings = Laplace()
    limits = {"tolerance": settings.tolerance, "iterations": settings.iterations}
    with torch.no_grad():
        start = problem.location(theta, batch)
    modes = find_modes(problem, theta, batch, start, seed=seed, **limits).point  # type: ignore[arg-type]
    damping = torch.zeros_like(modes[:, 0])

    def gradient(vector: Tensor) -> Tensor:
        vector = vector.detach().requires_grad_()
        with torch.enable_grad():
            moved = problem.sites.theta_from_vector(vector)
            held = {name: value.detach() for name, value in moved.items()}
            point = find_modes(problem, held, batch, modes, **limits).point  # type: ignore[arg-type]
            total = total_evidence(problem, moved, point, batch, damping, "exact").sum()
            (found,) = torch.autograd.grad(total + problem.log_prior(moved, batch), vector)
        return found

    return gradient


def _propose(loc: Tensor, tril: Tensor, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws (draws, size) of the mixture over c of t₇(loc, (L D_c)(L D_c)ᵀ), and log q.

    D_0 = I, and D_c stretches one axis of L: the logarithm of a scale that may be zero has an
    exponential tail on one side, which the weights of an elliptical proposal grow along.
    """
    size, df = len(loc), _DEGREES_OF_FREEDOM
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(draws, size + int(df), generator=generator, dtype=torch.float64)
    # t = ε √(ν / χ²_ν)
    z = noise[:, :size] * (df / noise[:, size:].square().sum(-1, keepdim=True)).sqrt()
    stretches = torch.ones(size + 1, size, dtype=torch.float64)
    stretches[1:].fill_diagonal_(_STRETCH)
    shares = torch.full((size + 1,), _STRETCHED / size, dtype=torch.float64)
    shares[0] = 1.0 - _STRETCHED
    z = z * stretches[torch.multinomial(shares, draws, True, generator=generator)]
    squared = (z.unsqueeze(1) / stretches).square().sum(-1)
    constant = (
        math.lgamma((df + size) / 2) - math.lgamma(df / 2) - 0.5 * size * math.log(df * math.pi)
    )
    each = constant - 0.5 * (df + size) * torch.log1p(squared / df) - stretches.log().sum(-1)
    log_q = torch.logsumexp(shares.log() + each, -1).to(loc) - tril.diagonal().log().sum()
    return loc + z.to(loc) @ tril.T, log_q


def _systematic(weights: Tensor, n: int, seed: int) -> Tensor:
    """(n,) positions, each taken n w times up or down to a whole number, in random order."""
    generator = torch.Generator().manual_seed(seed)
    first, order = torch.rand(1, generator=generator), torch.randperm(n, generator=generator)
    points = (torch.arange(n) + first).double() / n
    found = torch.searchsorted(weights.double().cpu().cumsum(0), points)
    return found.clamp_max(len(weights) - 1)[order].to(weights.device)
