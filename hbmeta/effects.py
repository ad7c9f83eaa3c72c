"""Effects of level 1 in their non-centered form, u = s^κ z, recognised in any program.

Model: z of several entries with a law of its own, s a scale (or a precision, or the logarithm of
one) among θ too, and tasks that see z s^κ alone: items of a test, lecturers of students.
At a point such a θ is wrong. log p(z) is −½ ‖z‖² and holds no n log s, as log p(u | s) would, so
that of all pairs with one product a search takes a small z and a large s: effects that are not
shrunk, and a scale that is no estimate (12 against 0.34 on the 24 items of VerbAgg).

Recognised by Euler's identity. With f(θ, φ) = log p(y | φ, θ) + log p(φ | θ) a function of z s^κ,

    zᵀ ∂f/∂z = κ⁻¹ Σ_k ∂f/∂log s_k,    s a whole site or one of its entries,

at every point; a site without bounds stands for its own logarithm. At a few random points the two
sides of a pair that is none are not proportional, almost surely. The centered form is recognised
from its prior (`parametrisation.shared_effects`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hbmeta.curvature import log_joint
from hbmeta.errors import UnsupportedModelError
from hbmeta.problem import Problem
from hbmeta.program import Batch

# Where effects are looked for: points, and by how much a cosine may fall short of 1 by rounding.
_POINTS = 5
_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6}

__all__ = ["refuse_scaled_effects", "scaled_effects"]


def scaled_effects(problem: Problem, batch: Batch) -> tuple[str, ...]:
    """Level-1 sites z of several entries that tasks see through z s^κ alone, s another such site.

    They are found from derivatives (module's docstring); no program has to declare them.

    Args:
        problem: the program.
        batch: a few tasks with data.
    """
    effects = [site.name for site in problem.sites.globals if site.size > 1]
    if not effects or len(problem.sites.globals) < 2:
        return ()
    points = [_slopes(problem, batch, seed) for seed in range(_POINTS)]
    tolerance = _ROUNDING.get(problem.dtype, 0.0)
    found = []
    for name in effects:
        if name not in points[0][0]:
            continue
        along = torch.stack([toward[name] for toward, _ in points])
        for other in points[0][1].keys() - {name}:
            slopes = torch.stack([logs[other] for _, logs in points])
            pairs = torch.cat([slopes.sum(1, keepdim=True), slopes], 1).unbind(1)
            if any(_proportional(along, one, tolerance) for one in pairs):
                found.append(name)
                break
    return tuple(found)


def refuse_scaled_effects(names: tuple[str, ...], where: str) -> None:
    """Raises where there are any, for what holds θ at a point.

    Raises:
        UnsupportedModelError: names the first.
    """
    if names:
        raise UnsupportedModelError(
            where,
            needed="level-1 parameters that can be held at a point",
            found=f"{names[0]!r}, effects that are multiplied by a scale which is a level-1 "
            "parameter too: at a point they are not shrunk, and the scale is no estimate",
            do=f"Use Laplace(integrated={names!r}), Variational(theta='distribution') or NUTS.",
        )


def _slopes(
    problem: Problem, batch: Batch, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """zᵀ ∂f/∂z of sites without bounds, and (entries,) ∂f/∂log s, near where θ starts."""
    generator = torch.Generator().manual_seed(seed)

    def near(value: Tensor) -> Tensor:
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        return (value + 0.5 * noise.to(value)).detach()

    sites = problem.sites.globals
    start = problem.theta(batch)
    theta = {**start, **{s.name: near(start[s.name]).requires_grad_() for s in sites}}
    with torch.no_grad():
        phi = near(problem.location(theta, batch))
    weights = torch.rand(batch.n_tasks, generator=generator, dtype=torch.float64).to(phi)
    leaves = [theta[site.name] for site in sites]
    with torch.enable_grad():
        f = (weights * log_joint(problem, theta, phi, batch)).sum()
        slopes = torch.autograd.grad(f, leaves, allow_unused=True)
        values = problem.values(theta, phi, batch)
    toward, logs = {}, {}
    for site, leaf, slope in zip(sites, leaves, slopes, strict=True):
        if slope is None or site.shape != site.unconstrained_shape:
            continue
        unit = torch.ones_like(leaf)
        if torch.equal(values[site.name], leaf):
            toward[site.name] = (leaf * slope).sum().detach()
        else:
            (unit,) = torch.autograd.grad(values[site.name].log().sum(), leaf)
        logs[site.name] = (slope / unit).reshape(-1)
    return toward, logs


def _proportional(left: Tensor, right: Tensor, tolerance: float) -> bool:
    """Whether two functions, known at a few points, are the same but for a factor that is not 0."""
    left, right = left.double(), right.double()
    size = left.norm() * right.norm()
    if not bool(torch.isfinite(size) & (size > 0)):
        return False
    return bool((left @ right).abs() >= (1 - tolerance) * size)
