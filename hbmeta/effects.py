"""Effects of level 1 that many tasks share and whose scale is of level 1 too: found in any program.

Model: effects u ~ N(0, s²) among θ, s among θ: items of a test, lecturers of students. Written so
they are centered; non-centered they are u = s^κ z, with z of several entries and a law of its own,
s a scale (or a precision, or the logarithm of one), and tasks that see z s^κ alone.
At a point such a θ is wrong. Centered, log p(u | s) holds −n log s, which grows without bound as u
and s fall to 0 together: there is no mode. Non-centered, log p(z) is −½ ‖z‖² and holds no n log s,
so that of all pairs with one product a search takes a small z and a large s: effects that are not
shrunk, and a scale that is no estimate (12 against 0.34 on the 24 items of VerbAgg).

The centered form is recognised from the prior: a scale that depends on another site. The other by
Euler's identity. With f(θ, φ) = log p(y | φ, θ) + log p(φ | θ) a function of z s^κ,

    zᵀ ∂f/∂z = κ⁻¹ Σ_k ∂f/∂log s_k,    s a whole site or one of its entries,

at every point; a site without bounds stands for its own logarithm. At a few random points the two
sides of a pair that is none are not proportional, almost surely.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from hbmeta.curvature import log_joint
from hbmeta.errors import UnsupportedModelError
from hbmeta.parametrisation import centered_effects
from hbmeta.problem import Problem
from hbmeta.program import Batch

# Where effects are looked for: points, and by how much a cosine may fall short of 1 by rounding.
_POINTS = 5
_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6}

__all__ = ["SharedEffects", "shared_effects"]


@dataclass(frozen=True)
class SharedEffects:
    """Names of level-1 sites that are effects with a scale of level 1; see the module.

    Attributes:
        centered: those drawn around their location with their scale.
        non_centered: those that a scale multiplies.
    """

    centered: tuple[str, ...]
    non_centered: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.centered, *self.non_centered)

    def refuse_at_a_point(self, where: str, *, integrated: Collection[str] = ()) -> None:
        """Raises where any is left to be held at a point together with its scale.

        Args:
            where: the strategy.
            integrated: those that it integrates out.
        Raises:
            UnsupportedModelError: names the first, and says what goes wrong with it.
        """
        left = tuple(name for name in self.names if name not in integrated)
        if not left:
            return
        why = "whose scale is a level-1 parameter itself: their joint density grows without bound "
        why += "as both fall to 0"
        if left[0] in self.non_centered:
            why = "effects that are multiplied by a scale which is a level-1 parameter too: at a "
            why += "point they are not shrunk, and the scale is no estimate"
        raise UnsupportedModelError(
            where,
            needed="level-1 parameters that can be held at a point",
            found=f"{left[0]!r}, {why}",
            do=f"Use Laplace(integrated={self.names!r}), Variational(theta='distribution') or "
            "NUTS.",
        )


def shared_effects(problem: Problem, batch: Batch) -> SharedEffects:
    """The effects of a program in either form; no program has to declare them.

    Args:
        problem: the program.
        batch: a few tasks with data.
    """
    centered = centered_effects(problem)
    others = _multiplied_effects(problem, batch)
    return SharedEffects(centered, tuple(name for name in others if name not in centered))


def _multiplied_effects(problem: Problem, batch: Batch) -> tuple[str, ...]:
    """Sites z of several entries that tasks see through z s^κ alone, s another such site."""
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
