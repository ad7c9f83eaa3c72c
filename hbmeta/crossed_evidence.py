"""Laplace's evidence where effects of level 1 are integrated out beside φ.

Model: θ = (ψ, u). u are effects that many tasks share and that have a scale of their own in ψ (the
lecturers of students, the items of persons), so that p(u | ψ) is part of p(θ); φ_i ~ p(φ | u, ψ).
At a point u would be wrong: the joint density of u and its scale has no mode worth the name
(centered it grows without bound as the scale falls to 0; non-centered it ends at no shrinkage).
Estimator: with m = (u, φ_1, …, φ_T) and N(m, ψ) = −log p(y, φ, u, ψ),

    m̂(ψ) = argmin N,   H = ∇²_m N(m̂, ψ),   E(ψ) = −N(m̂, ψ) + (D/2) log 2π − ½ log det H,

ψ at the maximum of E, and (u, φ) ~ N(m̂, H⁻¹). Exact, given ψ, on linear-Gaussian programs.

Tasks are independent given u, so that H = [A Bᵀ; B C] has a block diagonal C, one block per task.
With C = L Lᵀ, W = L⁻¹B and the Schur complement S = A − WᵀW = K Kᵀ of the size of u,

    log det H = log det C + log det S,    H⁻¹ = Σ_k p_k p_kᵀ,

p_k the columns of K⁻ᵀ continued by −C⁻¹B K⁻ᵀ over the tasks, and those of L⁻ᵀ. So H is never
formed, and the derivative of its log determinant needs second derivatives along the p_k alone:

    T(m, ψ) = ½ Σ_k p_kᵀ ∇²N(m, ψ) p_k, p_k held,    ∂(½ log det H) = ∂T,
    dE/dψ = −∂_ψ N − ∂_ψ T + ∂_ψ [vᵀ ∇_m N], v held,    v = H⁻¹ ∂_m T,

the last term because m̂ moves with ψ. One such sum costs as many products as u has entries.

References:
    Kristensen et al. (2016), J. Stat. Softw. 70(5), §2. Bates et al. (2015), J. Stat. Softw. 67(1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbmeta.errors import ConvergenceError, CurvatureError
from hbmeta.newton import minimise_tasks
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.staging import Staged

__all__ = ["CrossedEvidence", "Factor"]

_STEPS, _PRODUCTS = 60, 300


class Factor(NamedTuple):
    """H⁻¹ as the sum of p pᵀ, and log det H.

    Attributes:
        shared: (size of u, size of u) K⁻ᵀ; its columns are the p_k over u.
        across: (tasks, phi_size, size of u) −C⁻¹B K⁻ᵀ, the same over the tasks.
        within: (tasks, phi_size, phi_size) L⁻ᵀ.
        log_det: ().
    """

    shared: Tensor
    across: Tensor
    within: Tensor
    log_det: Tensor

    def solve(self, u: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """H⁻¹ of a vector in two parts, (size of u,) and (tasks, phi_size)."""
        along = self.shared.mT @ u + torch.einsum("tik,ti->k", self.across, phi)
        own = (self.within @ (self.within.mT @ phi.unsqueeze(-1))).squeeze(-1)
        return self.shared @ along, self.across @ along + own

    def draw(self, shared: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Draws of N(0, H⁻¹) from standard normal (draws, size of u), (draws, tasks, phi_size)."""
        phi = torch.einsum("tik,sk->sti", self.across, shared)
        return shared @ self.shared.mT, phi + torch.einsum("tij,stj->sti", self.within, own)


class CrossedEvidence:
    """E(ψ) and its gradient.

    Args:
        problem: the program.
        batch: the rows of the tasks.
        names: the level-1 sites u.
        start: θ, from which u starts.
        tier: how derivatives run.
        where: for errors.
    """

    def __init__(
        self, problem: Problem, batch: Batch, names: tuple[str, ...], start: Theta, tier: Any,
        where: str,
    ) -> None:  # fmt: skip
        self.problem, self.batch, self.where = problem, batch, where
        self.names = names
        self.shapes = {name: start[name].shape for name in names}
        self.sizes = [start[name].numel() for name in names]
        self.psi = {k: v for k, v in start.items() if k not in names}
        self.u = torch.cat([start[name].reshape(-1) for name in names])
        with torch.no_grad():
            self.phi = problem.location(start, batch)
        self.calls = 0

        def staged(function: Callable[..., Any]) -> Staged:
            return Staged(function, tier=tier, expected_calls=20 * sum(self.sizes))

        self._gradient = staged(self._gradient_of)
        self._product = staged(self._product_of)
        self._along = staged(self._along_of)

    @property
    def seconds_staging(self) -> float:
        """Of tracing and compiling."""
        return sum(f.seconds_staging for f in (self._gradient, self._product, self._along))

    def theta(self, psi: Mapping[str, Tensor], u: Tensor) -> Theta:
        """θ by site, of u (size of u,)."""
        parts = zip(self.names, u.split(self.sizes), strict=True)
        return {**psi, **{name: part.reshape(self.shapes[name]) for name, part in parts}}

    def energy(self, psi: Mapping[str, Tensor], u: Tensor, phi: Tensor) -> Tensor:
        """N, ()."""
        terms = self.problem.terms(self.theta(psi, u), phi, self.batch)
        return -(terms[0].sum() + terms[1].sum() + terms[2])

    # -- derivatives, each a function of tensors that can be traced -------------------------------

    def _gradient_of(self, psi: Theta, u: Tensor, phi: Tensor) -> tuple[Tensor, ...]:
        """N and ∇_m N."""
        u, phi = (value.detach().requires_grad_() for value in (u, phi))
        with torch.enable_grad():
            value = self.energy(psi, u, phi)
            found = torch.autograd.grad(value, (u, phi))
        return value.detach(), *found

    def _slope(self, psi: Theta, point: list[Tensor], along: tuple[Tensor, Tensor]) -> Tensor:
        """∇_m N · (v_u, v_φ), with history."""
        found = torch.autograd.grad(self.energy(psi, *point), point, create_graph=True)
        return (found[0] * along[0]).sum() + (found[1] * along[1]).sum()

    def _product_of(
        self, psi: Theta, u: Tensor, phi: Tensor, v: Tensor, w: Tensor
    ) -> tuple[Tensor, ...]:
        """∇²_m N (v, w)."""
        point = [value.detach().requires_grad_() for value in (u, phi)]
        with torch.enable_grad():
            return _derivatives(self._slope(psi, point, (v, w)), point)

    def _along_of(
        self, psi: Theta, u: Tensor, phi: Tensor, v: Tensor, w: Tensor
    ) -> tuple[Tensor, ...]:
        """∂_u, ∂_φ of ½ pᵀ∇²N p, p = (v, w), then its ∂_ψ, then ∂_ψ of pᵀ∇N, in ψ's order."""
        point = [value.detach().requires_grad_() for value in (u, phi)]
        psi = {name: value.detach().requires_grad_() for name, value in psi.items()}
        leaves = list(psi.values())
        with torch.enable_grad():
            slope = self._slope(psi, point, (v, w))
            bend = _derivatives(slope, point, create_graph=True)
            half = 0.5 * ((bend[0] * v).sum() + (bend[1] * w).sum())
            return *_derivatives(half, [*point, *leaves], keep=True), *_derivatives(slope, leaves)

    # -- mode, curvature and evidence -------------------------------------------------------------

    def mode(self, psi: Theta, tolerance: float) -> bool:
        """Moves u and φ to m̂(ψ), from where they are; whether the search met its tolerance."""
        count = len(self.u)

        def parts(point: Tensor) -> tuple[Tensor, Tensor]:
            return point[0, :count], point[0, count:].reshape(self.phi.shape)

        def whole(u: Tensor, phi: Tensor) -> Tensor:
            return torch.cat([u, phi.reshape(-1)]).unsqueeze(0)

        def gradient(point: Tensor) -> tuple[Tensor, Tensor]:
            value, *found = self._gradient(psi, *parts(point))
            return value.reshape(1), whole(*found)

        def product(point: Tensor, vector: Tensor) -> Tensor:
            return whole(*self._product(psi, *parts(point), *parts(vector)))

        found = minimise_tasks(
            gradient, product, whole(self.u, self.phi),
            tolerance=math.sqrt(2 * tolerance), steps=_STEPS, products=_PRODUCTS,
        )  # fmt: skip
        self.u, self.phi = (value.clone() for value in parts(found.point))
        return bool(found.met.all())

    def factor(self, psi: Theta) -> Factor:
        """The factor of H at u and φ.

        Raises:
            CurvatureError: H is not positive definite.
        """
        u, phi = self.u, self.phi
        columns = [self._product(psi, u, phi, e, torch.zeros_like(phi)) for e in _axes(u)]
        a = torch.stack([column[0] for column in columns], -1)
        b = torch.stack([column[1] for column in columns], -1)
        # Blocks do not see each other, so that one product gives a column of every block.
        own = [
            self._product(psi, u, phi, torch.zeros_like(u), e.expand_as(phi))[1]
            for e in _axes(phi[0])
        ]
        c = torch.stack(own, -1)
        lower, failed = torch.linalg.cholesky_ex(0.5 * (c + c.mT))
        w = torch.linalg.solve_triangular(lower, b, upper=False)
        schur = a - torch.einsum("tij,tik->jk", w, w)
        outer, failed_outer = torch.linalg.cholesky_ex(0.5 * (schur + schur.mT))
        if bool((failed > 0).any()) or bool(failed_outer > 0):
            raise CurvatureError(
                self.where,
                needed="a mode of u and φ given the other level-1 parameters",
                found="a curvature there that is not positive definite",
                do="Give effects proper priors, write their scale non-centered, or use NUTS.",
            )
        shared = _inverse(outer).mT
        within = _inverse(lower).mT
        across = -(within @ (w @ shared))
        log_det = sum(2 * part.diagonal(dim1=-2, dim2=-1).log().sum() for part in (lower, outer))
        return Factor(shared, across, within, torch.as_tensor(log_det))

    def __call__(self, psi: Theta, tolerance: float) -> tuple[Tensor, dict[str, Tensor], bool]:
        """E(ψ), dE/dψ by site, and whether the mode met its tolerance; u and φ move to m̂(ψ)."""
        psi = {name: value.detach() for name, value in psi.items()}
        met = self.mode(psi, tolerance)
        factor = self.factor(psi)
        # One more Newton step is free, and makes a quadratic exact.
        _, *slope = self._gradient(psi, self.u, self.phi)
        step = factor.solve(*slope)
        self.u, self.phi = self.u - step[0], self.phi - step[1]
        value = self._gradient(psi, self.u, self.phi)[0]
        if not bool(torch.isfinite(value)):
            raise ConvergenceError(
                self.where,
                needed="a finite log density at the mode",
                found=str(float(value)),
                do="Standardise x and y, or check the program's priors.",
            )
        size = self.u.numel() + self.phi.numel()
        evidence = -value + 0.5 * size * math.log(2 * math.pi) - 0.5 * factor.log_det
        return evidence, self._derivative(psi, factor), met

    def _derivative(self, psi: Theta, factor: Factor) -> dict[str, Tensor]:
        """dE/dψ; see the module."""
        u, phi, n = self.u, self.phi, len(psi)
        pairs = [(p, q) for p, q in zip(factor.shared.mT, factor.across.unbind(-1), strict=True)]
        pairs += [(torch.zeros_like(u), q) for q in factor.within.unbind(-1)]
        bends = [torch.zeros_like(u), torch.zeros_like(phi), *map(torch.zeros_like, psi.values())]
        for p, q in pairs:
            for total, part in zip(bends, self._along(psi, u, phi, p, q)[: 2 + n], strict=True):
                total += part
        v = factor.solve(bends[0], bends[1])
        follows = self._along(psi, u, phi, *v)[2 + n :]
        leaves = {name: value.detach().requires_grad_() for name, value in psi.items()}
        with torch.enable_grad():
            direct = _derivatives(self.energy(leaves, u, phi), list(leaves.values()))
        return {
            name: -here - bend + follow
            for name, here, bend, follow in zip(psi, direct, bends[2:], follows, strict=True)
        }


def _derivatives(
    value: Tensor, leaves: list[Tensor], *, create_graph: bool = False, keep: bool = False
) -> tuple[Tensor, ...]:
    """Gradients, zero where the value does not depend on a leaf."""
    if not (leaves and value.requires_grad):
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    found = torch.autograd.grad(
        value,
        leaves,
        create_graph=create_graph,
        retain_graph=keep or create_graph,
        allow_unused=True,
    )
    return tuple(
        torch.zeros_like(v) if g is None else g for v, g in zip(leaves, found, strict=True)
    )


def _axes(like: Tensor) -> list[Tensor]:
    """The unit vectors of a vector's space."""
    return list(torch.eye(len(like), dtype=like.dtype, device=like.device))


def _inverse(lower: Tensor) -> Tensor:
    """The inverse of a lower factor."""
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    found: Tensor = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    return found
