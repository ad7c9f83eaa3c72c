"""Standard errors of θ̂, from the curvature of its evidence.

With ℓ(u) = Σ_i log p(S_i | θ(u)), plus log p(θ) where the fit added it, in unconstrained u,

    C = (−∇²ℓ(û))⁻¹,   g(û) ± √ diag(G C Gᵀ),   G = ∂g/∂u,

the inverse observed information and the delta method for what the program calls a parameter, g(u).
Without a prior these are the classical standard errors of Type-II maximum likelihood: for
ȳ_i ~ N(μ, v), v = τ² + σ²/n, SE(μ̂) = √(v/T) and SE(τ̂²) = v √(2/T). With one, they are posterior
standard deviations of θ in Laplace's approximation. ∇ℓ is exact, through modes where there are any,
and ∇²ℓ comes from its differences (`hbmeta.evidence.observed_information`).

A bound L ≤ ℓ (`Variational`) has another curvature than ℓ: where q is too narrow, so are standard
errors from it. There ℓ is Laplace's evidence, whose curvature is taken at the θ̂ of the bound; that
is close where the two have nearly the same maximum, which is checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hbmeta.curvature import expand, log_joint
from hbmeta.densities import Empirical
from hbmeta.derivatives import jacobian_of
from hbmeta.errors import ConvergenceError, CurvatureError, UnsupportedModelError
from hbmeta.evidence import observed_information
from hbmeta.fitted import Fitted
from hbmeta.inference import ExactLinear, Laplace, Quadrature, Variational
from hbmeta.laplace_evidence import total_evidence
from hbmeta.modes import DENSE_AT_MOST, find_modes
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.training import prior_scales

if TYPE_CHECKING:
    import pandas

_MOST = 200
# ½ gᵀCg in nats: what a Newton step would still gain.
_GAIN = 1e-3
# The same for a θ̂ that maximises a bound instead: half a standard error off, in some direction.
_GAIN_OF_BOUND = 0.125

__all__ = ["StandardErrors", "standard_errors"]


@dataclass(frozen=True)
class StandardErrors:
    """θ̂ with standard errors.

    Attributes:
        estimates: θ̂ by site (and parameter of the module), in the program's units; deterministic
            level-1 sites too.
        errors: their standard errors, of the same shapes.
        names: of the entries of u, "site" or "site[index]".
        covariance: C (size, size), in unconstrained space.
        prior: whether log p(θ) is part of ℓ.
    """

    estimates: dict[str, Tensor]
    errors: dict[str, Tensor]
    names: tuple[str, ...]
    covariance: Tensor
    prior: bool

    def to_frame(self) -> pandas.DataFrame:
        """One row per entry: estimate and standard error."""
        import pandas

        rows = {}
        for name, value in self.estimates.items():
            for label, one, error in zip(
                _labels(name, value), value.flatten(), self.errors[name].flatten(), strict=True
            ):
                rows[label] = {"estimate": float(one), "standard_error": float(error)}
        return pandas.DataFrame.from_dict(rows, orient="index")

    def __str__(self) -> str:
        return str(self.to_frame().to_string(float_format=lambda v: f"{v:.4g}"))


def standard_errors(fitted: Fitted) -> StandardErrors:
    """Standard errors of a θ that maximises an evidence.

    Args:
        fitted: of ExactLinear, Quadrature or ExactGP; of Laplace, or of Variational with θ at a
            point and not amortized, with up to 64 parameters per task.
    Raises:
        UnsupportedModelError: another strategy, more than 200 entries of θ or none, or a variance
            whose estimate is zero: at that boundary the evidence has no curvature to speak of.
        ConvergenceError: θ is no maximum: a Newton step would still gain. Of Variational: it is
            over half a standard error from the maximum of Laplace's evidence.
        CurvatureError: the evidence does not bend down in some direction, named by its entry.
    References:
        Efron, Hinkley (1978), Biometrika 65(3), for the observed information. van der Vaart (1998),
        Asymptotic Statistics, §3.1, for the delta method.
    """
    where = "standard_errors"
    problem, theta = fitted.problem, {k: v.detach() for k, v in fitted.theta.items()}
    _check(fitted, where)
    bounded = isinstance(fitted.strategy, Variational)
    prior = bounded or bool(getattr(fitted.strategy, "prior", False))
    batch = problem.batch(fitted.tasks)
    scales = _scales(problem, theta, batch)
    shapes = {name: value.shape for name, value in theta.items()}
    sizes = [value.numel() for value in theta.values()]
    scale = torch.cat([scales[name].reshape(-1) for name in theta])
    at = torch.cat([value.reshape(-1) for value in theta.values()])
    names = tuple(label for name, value in theta.items() for label in _labels(name, value))

    def unpack(vector: Tensor) -> Theta:
        parts = zip(shapes.items(), vector.split(sizes), strict=True)
        return {name: part.reshape(shape) for (name, shape), part in parts}

    modes = _modes(fitted, theta, batch)

    def gradient(vector: Tensor) -> Tensor:
        vector = vector.detach().requires_grad_()
        moved = unpack(vector)
        with torch.enable_grad():
            total = _evidence(fitted, moved, batch, modes).sum()
            if prior:
                total = total + problem.log_prior(moved, batch)
            (found,) = torch.autograd.grad(total, vector)
        return found

    information = observed_information(gradient, at, scale)
    covariance = _inverse(information, scale, names, where)
    slope = gradient(at)
    gain = float(0.5 * slope @ covariance @ slope)
    if not gain < (_GAIN_OF_BOUND if bounded else _GAIN):
        raise ConvergenceError(
            where,
            needed="θ at the maximum of its evidence",
            found=f"a point where a Newton step would still gain {gain:.3g} nats",
            do="Fit with more steps, draws or a richer family, or fit Laplace itself."
            if bounded
            else "Standardise x and y, or use float64, and fit again.",
        )
    estimates, errors = _constrained(problem, unpack, at, covariance, batch)
    return StandardErrors(estimates, errors, names, covariance, prior)


def _check(fitted: Fitted, where: str) -> None:
    strategy, problem = fitted.strategy, fitted.problem
    modal = isinstance(strategy, Laplace | Variational)
    large = modal and problem.sites.phi_size > DENSE_AT_MOST
    # An encoder's bound has a gap that it moves θ by; q(θ) has standard deviations of its own.
    other = isinstance(strategy, Variational) and (strategy.amortized or fitted.drawn)
    if not (isinstance(strategy, ExactLinear | Quadrature) or modal) or large or other:
        raise UnsupportedModelError(
            where,
            needed="a fit whose θ maximises an evidence: ExactLinear, Quadrature, ExactGP, or "
            f"Laplace or Variational(theta='point') with up to {DENSE_AT_MOST} parameters per task",
            found=strategy.name
            + (f" with {problem.sites.phi_size} of them" if large else "")
            + (" with amortized=True or a distribution of θ" if other else ""),
            do="Fit Laplace to the same program, or NUTS for the posterior of θ.",
        )
    if fitted.drawn:
        raise UnsupportedModelError(
            where,
            needed="a θ that is held at a point as a whole",
            found=f"draws of it, integrated={getattr(strategy, 'integrated', ())!r}",
            do="Their spread is that of the integrated sites; NUTS has that of the others too.",
        )
    size = sum(value.numel() for value in fitted.theta.values())
    if not 1 <= size <= _MOST:
        raise UnsupportedModelError(
            where,
            needed=f"between 1 and {_MOST} entries of θ",
            found=str(size),
            do="Every level-1 quantity is given; there is nothing to estimate."
            if not size
            else "Give the level-1 parameters fewer entries, or resample tasks.",
        )
    at_zero = fitted.info.get("at_zero") or []
    if at_zero:
        raise UnsupportedModelError(
            where,
            needed="an estimate inside its range, where the evidence has a curvature",
            found=f"the estimate of {', '.join(at_zero)} at zero, the boundary",
            do="Use prior=True, or NUTS, which weighs how large it could still be.",
        )


def _as_laplace(fitted: Fitted) -> Laplace | None:
    """By whose evidence ℓ is taken, if it has modes."""
    strategy = fitted.strategy
    if isinstance(strategy, Variational):
        return Laplace()
    return strategy if isinstance(strategy, Laplace) else None


def _modes(fitted: Fitted, theta: Theta, batch: Batch) -> Tensor | None:
    """Modes at θ̂, where searches at other θ start."""
    strategy, problem = _as_laplace(fitted), fitted.problem
    if strategy is None:
        return None
    with torch.no_grad():
        start = problem.location(theta, batch)
    return find_modes(
        problem, theta, batch, start, tolerance=strategy.tolerance, seed=fitted.seed,
        iterations=strategy.iterations,
    ).point  # fmt: skip


def _evidence(fitted: Fitted, theta: Theta, batch: Batch, modes: Tensor | None) -> Tensor:
    """(tasks,) log p(S_i | θ) by the strategy's own formula, with its gradient in θ."""
    strategy, problem = fitted.strategy, fitted.problem
    laplace = _as_laplace(fitted)
    if laplace is not None:
        assert modes is not None
        found = find_modes(
            problem, theta, batch, modes, tolerance=laplace.tolerance,
            iterations=laplace.iterations,
        )  # fmt: skip
        # That of the fit, chosen or given: θ̂ is the maximum of this evidence and of no other.
        held = fitted.info.get("damping") or laplace.damping or 0.0
        damping = torch.as_tensor(held, dtype=modes.dtype, device=modes.device)
        damping = damping.expand(modes.shape[:1])
        return total_evidence(problem, theta, found.point, batch, damping, laplace.curvature)
    if isinstance(strategy, Quadrature):
        density = strategy.posterior(problem, theta, None, batch)
        if isinstance(density, Empirical) and density.log_weights is not None:
            return density.log_weights.logsumexp(0)
        return problem.log_likelihood(theta, problem.location(theta, batch), batch)
    start = problem.location(theta, batch).detach()
    return expand(
        lambda phi: log_joint(problem, theta, phi, batch), start, newton=True, create_graph=True
    ).log_evidence


def _scales(problem: Problem, theta: Theta, batch: Batch) -> Theta:
    """What a step is measured in: the scale of a site's prior, at least 1 of other parameters."""
    # At the priors' locations: far below it the logarithm of a scale has next to no curvature.
    found = prior_scales(problem, problem.theta(batch), batch)
    return {n: found[n] if n in found else v.abs().clamp_min(1.0) for n, v in theta.items()}


def _inverse(information: Tensor, scale: Tensor, names: tuple[str, ...], where: str) -> Tensor:
    # In units of the scales, so that a direction's curvature says something.
    white = scale.unsqueeze(-1) * information * scale
    values, vectors = torch.linalg.eigh(white)
    share = 1e-9 if white.dtype == torch.float64 else 1e-4
    if not bool(torch.isfinite(white).all()) or not float(values[0]) > share * float(values[-1]):
        worst = names[int(vectors[:, 0].abs().argmax())]
        raise CurvatureError(
            where,
            needed="an evidence that falls in every direction of θ",
            found=f"curvature {float(values[0]):.3g} (in units of the prior's scale) along a "
            f"direction of {worst!r}",
            do="The data do not tell it: leave it out, or use prior=True or NUTS.",
        )
    inverse: Tensor = (vectors / values) @ vectors.T
    return scale.unsqueeze(-1) * inverse * scale


def _constrained(
    problem: Problem, unpack: Any, at: Tensor, covariance: Tensor, batch: Batch
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values of level-1 sites and parameters at û, and √ diag(G C Gᵀ)."""
    vector = at.detach().requires_grad_()
    sites = (*problem.sites.globals, *problem.sites.deterministic_global)
    with torch.enable_grad():
        theta = unpack(vector)
        values = problem.run(theta, {}, batch, with_y=False).values
        known = {site.name for site in problem.sites.globals}
        found = {name: value for name, value in theta.items() if name not in known}
        found |= {site.name: values[site.name] for site in sites}
        estimates, errors = {}, {}
        for name, value in found.items():
            g = jacobian_of(value.reshape(-1), vector)
            estimates[name] = value.detach()
            variance = ((g @ covariance) * g).sum(-1)
            errors[name] = variance.sqrt().reshape(value.shape)
    return estimates, errors


def _labels(name: str, value: Tensor) -> list[str]:
    """The name alone for a number, "site[i, j]" for the entries of anything else."""
    if not value.dim():
        return [name]
    indices = torch.cartesian_prod(*(torch.arange(n) for n in value.shape)).reshape(-1, value.dim())
    return [f"{name}[{', '.join(map(str, index))}]" for index in indices.tolist()]
