"""Pathfinder: Gaussians along the path of a quasi-Newton search, the best by its bound, and draws.

Model: any density exp(f) on ℝᴺ with a gradient, known up to a factor.
Estimator: L-BFGS on −f from a start gives iterates x_l with gradients g_l of −f. Each has the
inverse Hessian that BFGS builds from the last J pairs s = x_l − x_{l−1}, z = g_l − g_{l−1} with
sᵀz > 0, on a diagonal A = diag(α) that follows the curvature too,

    Σ_l = A + B Γ Bᵀ,   B = [A Z, S],   Γ = [[0, −R⁻¹], [−R⁻ᵀ, R⁻ᵀ (E + Zᵀ A Z) R⁻¹]],

R the upper triangle of SᵀZ and E its diagonal, and the Gaussian of Newton's step,

    q_l = N(x_l − Σ_l g_l, Σ_l),   ELBO_l = E_q [f − log q_l],

of which the one with the largest ELBO is kept: the path runs from the tail through the bulk to a
mode, and stops being judged where there is none (a hierarchy whose density has no bound). With
A^(−½) B = Q T a QR factor and C Cᵀ = I + T Γ Tᵀ, a draw and its density are

    x = μ + A^½ (u + Q (C − I) Qᵀ u),   log q = −½ (‖u‖² + log det 2πA) − log det C,   u ~ N(0, I),

at a cost of N J per draw. Several paths from different starts are one mixture, whose draws weigh

    w = exp f(x) / ((1/I) Σ_i q_i(x)),

Pareto-smoothed. (As published a draw is weighed by the q of its own path; the mixture's weights are
never more variable, and a path that ended badly cannot dominate by a density that is small where
others have draws.) All ELBOs of a path use the same u, in pairs of opposite sign, so that their
differences hold less noise.

Exact where f is quadratic: iterates that span the space give its mean, and Σ tends to its
covariance as the search converges, if J ≥ N.

References:
    Zhang, Carpenter, Gelman, Vehtari (2022), Pathfinder, JMLR 23(306). Byrd, Nocedal, Schnabel
    (1994), Mathematical Programming 63, for the compact form; Gilbert, Lemaréchal (1989), ibid. 45,
    for α; Veach, Guibas (1995), SIGGRAPH, for the mixture's weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from hbmeta.errors import ConvergenceError
from hbmeta.importance import pareto_smoothed
from hbmeta.joint_density import Potential

# Pairs kept, iterations at most, and pairs ±u of draws of an ELBO.
HISTORY, ITERATIONS, PAIRS = 10, 1000, 5
# sᵀz above this share of ‖z‖² is a curvature; below it is rounding, or the density bends upwards.
_CURVED = 1e-12
# Log weights that differ by less than so many roundings of their terms are equal.
_ROUNDINGS = 64
# Ends of the search: relative fall of −f in a step, and largest entry of its gradient.
_FALL, _SLOPE = 1e-13, 1e-8

__all__ = ["HISTORY", "ITERATIONS", "LowRankNormal", "Path", "Paths", "find_path", "find_paths"]


@dataclass(frozen=True)
class LowRankNormal:
    """N(μ, A^½ (I + Q (C Cᵀ − I) Qᵀ) A^½); see the module's docstring.

    Attributes:
        mean: μ (size,).
        diagonal: α (size,).
        basis: Q (size, rank), orthonormal columns.
        factor: C (rank, rank), lower triangular.
    """

    mean: Tensor
    diagonal: Tensor
    basis: Tensor
    factor: Tensor

    @property
    def covariance(self) -> Tensor:
        """Σ (size, size), dense."""
        inner = self.factor @ self.factor.T - torch.eye(len(self.factor)).to(self.factor)
        root = self.diagonal.sqrt()
        outer = root.unsqueeze(-1) * (self.basis @ inner @ self.basis.T) * root
        return torch.diag(self.diagonal) + outer

    def draw(self, noise: Tensor) -> Tensor:
        """(draws, size) from standard normal u (draws, size)."""
        inside = noise @ self.basis
        turned = noise + (inside @ self.factor.T - inside) @ self.basis.T
        found: Tensor = self.mean + self.diagonal.sqrt() * turned
        return found

    def log_prob(self, points: Tensor) -> Tensor:
        """(draws,) log q at points (draws, size)."""
        white = (points - self.mean) / self.diagonal.sqrt()
        inside = white @ self.basis
        noise = torch.linalg.solve_triangular(self.factor, inside.T, upper=False).T
        # What lies outside the columns of Q is not scaled.
        square = white.square().sum(-1) - inside.square().sum(-1) + noise.square().sum(-1)
        log_det = (2 * math.pi * self.diagonal).log().sum()
        found: Tensor = -0.5 * (square + log_det) - self.factor.diagonal().log().sum()
        return found


class Path(NamedTuple):
    """A search and its best Gaussian.

    Attributes:
        best: q with the largest ELBO.
        position: of its iterate, from 1 on; 0 is the start.
        elbos: (iterates,) of all Gaussians, −∞ where there is none.
        evaluations: of f and its gradient.
    """

    best: LowRankNormal
    position: int
    elbos: Tensor
    evaluations: int


class Paths(NamedTuple):
    """Draws of the mixture of several paths.

    Attributes:
        draws: (paths · draws, size), path after path.
        log_weights: (paths · draws,) normalised and Pareto-smoothed.
        pareto_k: k̂ of the weights; see `hbmeta.importance`.
        log_evidence: log of the mean weight, of what is not smoothed.
        paths: those that ended with a Gaussian.
    """

    draws: Tensor
    log_weights: Tensor
    pareto_k: float
    log_evidence: float
    paths: tuple[Path, ...]

    def resampled(self, n: int, seed: int, *, replacement: bool) -> Tensor:
        """(n, size) of the draws, by their weights."""
        generator = torch.Generator().manual_seed(seed)
        # A weight that is 0 beside the largest would leave fewer than n to choose from.
        weights = self.log_weights.exp().clamp_min(torch.finfo(torch.float64).tiny)
        return self.draws[torch.multinomial(weights, n, replacement, generator=generator)]


def find_path(
    log_density: Potential,
    start: Tensor,
    *,
    seed: int = 0,
    history: int = HISTORY,
    iterations: int = ITERATIONS,
    where: str = "pathfinder",
) -> Path:
    """One search from a start, and the best Gaussian along it.

    Args:
        log_density: x (size,) to f and its gradient, float64 on the CPU.
        start: (size,), float64, where f is finite.
        seed: of the draws of the ELBOs.
        history: J.
        iterations: of L-BFGS, at most.
        where: for the error.
    Raises:
        ConvergenceError: f is not finite at the start, or no iterate has a finite ELBO.
    """
    iterates, gradients, evaluations = _searched(log_density, start, history, iterations, where)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((PAIRS, len(start)), generator=generator, dtype=torch.float64)
    noise = torch.cat([noise, -noise])
    elbos = torch.full((len(iterates),), -math.inf, dtype=torch.float64)
    best, alpha = None, torch.ones_like(start)
    steps: list[Tensor] = []
    changes: list[Tensor] = []
    for number in range(1, len(iterates)):
        step = iterates[number] - iterates[number - 1]
        change = gradients[number] - gradients[number - 1]
        if float(step @ change) > _CURVED * float(change @ change):
            alpha = _diagonal(alpha, step, change)
            steps, changes = [*steps, step][-history:], [*changes, change][-history:]
        found = _gaussian(iterates[number], gradients[number], alpha, steps, changes)
        if found is None:
            continue
        evaluations += len(noise)
        elbos[number] = _elbo(log_density, found, noise)
        if elbos[number] > elbos[:number].max():
            best = found
    if best is None:
        raise ConvergenceError(
            where,
            needed="an iterate of L-BFGS with a Gaussian under which the density is finite",
            found=f"none among {len(iterates) - 1}",
            do="Standardise x and y, or check the program's priors.",
        )
    return Path(best, int(elbos.argmax()), elbos, evaluations)


def find_paths(
    log_density: Potential,
    starts: Tensor,
    *,
    draws: int,
    seed: int = 0,
    history: int = HISTORY,
    iterations: int = ITERATIONS,
    where: str = "pathfinder",
) -> Paths:
    """A path from each start, and draws of their mixture with weights.

    Args:
        log_density: as in `find_path`.
        starts: (paths, size).
        draws: of each path.
        seed: of everything random.
        history: J.
        iterations: of L-BFGS, at most.
        where: for the error.
    Raises:
        ConvergenceError: no path has a Gaussian, or no draw a finite weight.
    """
    paths: list[Path] = []
    for number, start in enumerate(starts):
        try:
            found = find_path(
                log_density, start, seed=seed * 7919 + number, history=history,
                iterations=iterations, where=where,
            )  # fmt: skip
        except ConvergenceError:
            # One bad start of several is no harm; the last one, if all were, says why.
            if not paths and number == len(starts) - 1:
                raise
        else:
            paths.append(found)
    generator = torch.Generator().manual_seed(seed)
    shape = (draws, starts.shape[1])
    points = torch.cat(
        [p.best.draw(torch.randn(shape, generator=generator, dtype=torch.float64)) for p in paths]
    )
    log_p = torch.stack([log_density(point)[0] for point in points])
    log_q = torch.stack([path.best.log_prob(points) for path in paths]).logsumexp(0)
    log_weights = log_p - log_q + math.log(len(paths))
    log_weights = torch.where(log_weights.isfinite(), log_weights, -math.inf)
    if not bool(log_weights.isfinite().any()):
        raise ConvergenceError(
            where,
            needed="draws at which the density is finite",
            found=f"none among {len(points)}",
            do="Standardise x and y, or check the program's priors.",
        )
    terms = log_p.where(log_p.isfinite(), 0.0).abs().max() + log_q.abs().max()
    rounding = _ROUNDINGS * torch.finfo(terms.dtype).eps * (1.0 + terms)
    smoothed, k = pareto_smoothed(log_weights.unsqueeze(-1), rounding)
    log_evidence = float(log_weights.logsumexp(0)) - math.log(len(points))
    return Paths(points, smoothed.squeeze(-1), float(k), log_evidence, tuple(paths))


def _searched(
    log_density: Potential, start: Tensor, history: int, iterations: int, where: str
) -> tuple[list[Tensor], list[Tensor], int]:
    """Iterates and gradients of −f, start first, and the number of evaluations."""
    last: dict[str, Any] = {}

    def objective(point: Any) -> tuple[float, Any]:
        value, gradient = log_density(torch.from_numpy(point))
        finite = math.isfinite(float(value)) and bool(torch.isfinite(gradient).all())
        # A value that is not finite is a step too far for the line search.
        found = (-float(value), -gradient.numpy()) if finite else (1e300, np.zeros_like(point))
        last["point"], last["gradient"] = point.copy(), np.array(found[1])
        return found

    first, slope = objective(start.numpy().copy())
    if first == 1e300:
        raise ConvergenceError(
            where,
            needed="a finite log density at the start",
            found="infinity or NaN",
            do="Standardise x and y, or check the program's priors.",
        )
    iterates, gradients = [start.numpy().copy()], [np.array(slope)]

    def keep(point: Any) -> None:
        # The search accepts what it evaluated last; if not, its gradient is taken again.
        if not np.array_equal(point, last["point"]):
            objective(point.copy())
        iterates.append(point.copy())
        gradients.append(last["gradient"])

    found = scipy.optimize.minimize(
        objective,
        iterates[0],
        jac=True,
        method="L-BFGS-B",
        callback=keep,
        options={
            "maxiter": iterations,
            "maxfun": 4 * iterations,
            "maxcor": history,
            "ftol": _FALL,
            "gtol": _SLOPE,
        },
    )
    points, slopes = ([torch.from_numpy(v) for v in each] for each in (iterates, gradients))
    return points, slopes, int(found.nfev) + 1


def _diagonal(alpha: Tensor, step: Tensor, change: Tensor) -> Tensor:
    """α after a pair: BFGS of diag(α), of which the diagonal is kept.

    With a = zᵀAz, b = zᵀs, c = sᵀA⁻¹s:  1/α' = a / (b α) + z² / b − a s² / (b c α²), above 0.
    """
    a, b = (change * alpha) @ change, change @ step
    ratio = step / alpha
    c = ratio @ step
    inverse: Tensor = a / (b * alpha) + change.square() / b - a / (b * c) * ratio.square()
    return 1.0 / inverse


def _gaussian(
    point: Tensor,
    gradient: Tensor,
    alpha: Tensor,
    steps: Sequence[Tensor],
    changes: Sequence[Tensor],
) -> LowRankNormal | None:
    """q of an iterate; None where rounding leaves it no factor."""
    root = alpha.sqrt()
    if not steps:
        empty = alpha.new_zeros(len(alpha), 0)
        return LowRankNormal(point - alpha * gradient, alpha, empty, alpha.new_zeros(0, 0))
    s, z = torch.stack(list(steps), -1), torch.stack(list(changes), -1)
    product = s.T @ z
    inverse = torch.linalg.inv(product.triu())
    zero = torch.zeros_like(inverse)
    corner = inverse.T @ (torch.diag(product.diagonal()) + (z.T * alpha) @ z) @ inverse
    gamma = torch.cat([torch.cat([zero, -inverse], 1), torch.cat([-inverse.T, corner], 1)])
    # A^(−½) B.
    basis, triangle = torch.linalg.qr(
        torch.cat([root.unsqueeze(-1) * z, s / root.unsqueeze(-1)], 1)
    )
    inner = triangle @ gamma @ triangle.T
    inner = torch.eye(len(inner)).to(inner) + 0.5 * (inner + inner.T)
    factor, failed = torch.linalg.cholesky_ex(inner)
    if int(failed) or not bool(torch.isfinite(factor).all() & torch.isfinite(alpha).all()):
        return None
    # Σ g = A^½ (w + Q (C Cᵀ − I) Qᵀ w), w = A^½ g.
    white = root * gradient
    inside = white @ basis
    newton = root * (white + basis @ (inner @ inside - inside))
    return LowRankNormal(point - newton, alpha, basis, factor)


def _elbo(log_density: Potential, q: LowRankNormal, noise: Tensor) -> Tensor:
    """Mean of f − log q over draws; −∞ where f is not finite at one."""
    points = q.draw(noise)
    values = torch.stack([log_density(point)[0] for point in points])
    found: Tensor = (values - q.log_prob(points)).mean()
    return found if bool(torch.isfinite(found)) else torch.full_like(found, -math.inf)
