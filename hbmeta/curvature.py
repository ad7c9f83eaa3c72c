"""Mode, curvature and evidence of p(φ_i | S_i, θ), task by task and θ by θ.

With f_i(φ) = log p(S_i | φ, θ) + log p(φ | θ), tasks are independent given θ, so one gradient of
Σ_i f_i gives every task's own gradient, and phi_size further ones every task's own Hessian H_i.
A second-order expansion at the mode φ̂ gives N(φ̂, (−H)⁻¹) and

    log p(S_i | θ) ≈ f_i(φ̂) + (phi_size/2) log 2π − ½ log det(−H_i),

both exact where f_i is quadratic (linear-Gaussian programs; MacKay 1992, eq. 2.9).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hbmeta.derivatives import jacobian_of, task_gradient
from hbmeta.errors import CurvatureError
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta

# Curvature of f above this share of its magnitude is a saddle's, not the rounding of a flat ridge.
_UPWARDS = {torch.float64: 1e-6, torch.float32: 1e-4}
# How far beside a mode f is looked at, in units of its curvature there.
_NEAR = 1e-2

__all__ = [
    "Expansion",
    "expand",
    "gradient_and_hessian",
    "leave_saddle",
    "log_joint",
    "maximise",
    "require_positive",
]


class Expansion(NamedTuple):
    """A second-order expansion of f at a point, per task.

    Attributes:
        loc: (..., tasks, phi_size) the point, or the Newton point of it.
        tril: (..., tasks, phi_size, phi_size) lower-triangular L with L Lᵀ = (−H)⁻¹.
        log_evidence: (..., tasks) the evidence of the expansion.
        positive: (..., tasks) whether −H is positive definite there.
    """

    loc: Tensor
    tril: Tensor
    log_evidence: Tensor
    positive: Tensor


def log_joint(problem: Problem, theta: Theta, phi: Tensor, batch: Batch) -> Tensor:
    """(tasks,) f_i(φ_i) = log p(S_i | φ_i, θ) + log p(φ_i | θ)."""
    likelihood, local, _ = problem.terms(theta, phi, batch)
    return likelihood + local


def gradient_and_hessian(
    function: Callable[[Tensor], Tensor], phi: Tensor, *, create_graph: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """f (…, tasks), its gradient and its Hessian for each task, by reverse over reverse.

    Args:
        function: φ (..., tasks, phi_size) to (..., tasks), tasks independent of each other.
        phi: the point.
        create_graph: keep the history, to differentiate the result in θ.
    """
    if not phi.requires_grad:
        phi = phi.detach().requires_grad_()
    value, gradient = task_gradient(function, phi, create_graph=True)
    hessian = jacobian_of(gradient, phi, create_graph=create_graph)
    if not create_graph:
        value, gradient = value.detach(), gradient.detach()
    return value, gradient, 0.5 * (hessian + hessian.mT)


def expand(
    function: Callable[[Tensor], Tensor],
    phi: Tensor,
    *,
    newton: bool = False,
    create_graph: bool = False,
) -> Expansion:
    """The expansion at φ, or (`newton`) at φ's Newton point, which is the mode of a quadratic f.

    Cholesky of −H without a check, so that it can be traced: `positive` says where it failed.
    """
    value, gradient, hessian = gradient_and_hessian(function, phi, create_graph=create_graph)
    precision = -hessian
    factor, failed = torch.linalg.cholesky_ex(precision)
    size = phi.shape[-1]
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    if newton:
        step = torch.cholesky_solve(gradient.unsqueeze(-1), factor).squeeze(-1)
        # f(φ + step) of the expansion is f(φ) + ½ gᵀ step.
        value = value + 0.5 * (gradient * step).sum(-1)
        phi = phi + step
    identity = torch.eye(size, dtype=phi.dtype, device=phi.device).expand(precision.shape)
    # (−H)⁻¹ = F⁻ᵀ F⁻¹ with F the factor; its own lower factor by one more Cholesky.
    inverse = torch.cholesky_solve(identity, factor)
    tril, _ = torch.linalg.cholesky_ex(inverse)
    evidence = value + 0.5 * size * math.log(2 * math.pi) - 0.5 * log_det
    return Expansion(phi, tril, evidence, failed == 0)


def maximise(
    function: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    iterations: int = 60,
    tolerance: float = 1e-9,
    seed: int = 0,
    derivatives: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Newton's method with its own damping for each task (Levenberg–Marquardt).

    A start (or a point on the way) without gradient where f curves upwards, such as φ = 0 of
    y ~ N(φ², s²), is left along the direction of largest curvature, to a side drawn by `seed`. A
    kink where f rises and yet its gradient is zero (φ = 0 of y ~ N(relu(φ), s²), as the derivative
    of relu at 0 is taken to be 0) is left to the side where f is higher.

    Args:
        function: as in `gradient_and_hessian`.
        start: (..., tasks, phi_size).
        iterations: at most so many evaluations of the Hessian.
        tolerance: stop where the predicted gain ½ gᵀ(−H)⁻¹g is below it, in nats.
        seed: of the side to which a saddle is left, and of where f is looked at beside a mode.
        derivatives: φ to f, its gradient and its Hessian, where they are to be had faster than by
            `gradient_and_hessian` (staged).
    Returns:
        the point, and (..., tasks) whether it met the tolerance.
    """
    phi = start.detach()
    size = phi.shape[-1]
    identity = torch.eye(size, dtype=phi.dtype, device=phi.device)
    damping = torch.full(phi.shape[:-1], 0.0, dtype=phi.dtype, device=phi.device)
    done = torch.zeros(phi.shape[:-1], dtype=torch.bool, device=phi.device)
    moved = False
    for _ in range(iterations):
        found = gradient_and_hessian(function, phi) if derivatives is None else derivatives(phi)
        value, gradient, hessian = found
        precision = -hessian
        # The curvature's own magnitude, so that damping has its units.
        magnitude = _magnitude(precision)
        smallest = _smallest(precision, 1e-10 * magnitude)
        floor = torch.where(
            smallest > 1e-10 * magnitude,
            torch.zeros_like(smallest),
            -1.5 * smallest + 1e-3 * magnitude,
        )
        total = torch.maximum(damping, floor)
        step = torch.linalg.solve(
            precision + total[..., None, None] * identity, gradient.unsqueeze(-1)
        ).squeeze(-1)
        gain = 0.5 * (gradient * step).sum(-1)
        done = (gain.abs() < tolerance) & (floor == 0)
        if bool(done.all()):
            # The last step costs nothing and makes a quadratic exact.
            phi = torch.where(torch.isfinite(step), phi + step, phi)
            beside, rises = _beside(function, phi, magnitude, tolerance, seed)
            if moved or not bool(rises.any()):
                return phi, done & ~rises
            phi, moved = beside, True
            continue
        stuck = (gain.abs() < tolerance) & (smallest < -_UPWARDS[phi.dtype] * magnitude)
        if bool(stuck.any()):
            step = torch.where(stuck.unsqueeze(-1), _upwards(precision, damping, seed), step)
        with torch.no_grad():
            new = function(phi + step)
        better = (new >= value - 1e-12 * value.abs()) & torch.isfinite(new)
        phi = torch.where(better.unsqueeze(-1), phi + step, phi)
        damping = torch.where(better, total * 0.1, torch.maximum(total * 10, 1e-3 * magnitude))
        damping = torch.where(damping < 1e-9 * magnitude, 0.0 * damping, damping)
    return phi, done


def _beside(
    function: Callable[[Tensor], Tensor],
    phi: Tensor,
    magnitude: Tensor,
    tolerance: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """A point near φ where f is higher, and (..., tasks) whether there is one.

    At a mode f falls to both sides, whatever its gradient and Hessian (a kink has more than one).
    """
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(phi.shape, generator=generator, dtype=torch.float64).to(phi)
    step = _NEAR * magnitude.rsqrt().unsqueeze(-1) * direction
    with torch.no_grad():
        here, there, back = (function(point) for point in (phi, phi + step, phi - step))
    rounding = 100 * torch.finfo(phi.dtype).eps * (1 + here.abs())
    rises = torch.maximum(there, back) > here + 10 * tolerance + rounding
    step = torch.where((there > back).unsqueeze(-1), step, -step)
    return torch.where(rises.unsqueeze(-1), phi + step, phi), rises


def leave_saddle(function: Callable[[Tensor], Tensor], phi: Tensor, *, seed: int = 0) -> Tensor:
    """φ of a search that has ended, moved where f still curves upwards, so that it can go on.

    Args:
        function: as in `gradient_and_hessian`; only its sum matters.
        phi: (..., tasks, phi_size).
        seed: of the side.
    """
    # A search may have ended where a Hessian is not finite; nothing is known of the way on there.
    precision = torch.nan_to_num(-gradient_and_hessian(function, phi)[2], 0.0, 0.0, 0.0)
    phi = phi.detach()
    smallest = torch.linalg.eigvalsh(precision)[..., 0]
    stuck = smallest < -_UPWARDS[phi.dtype] * _magnitude(precision)
    if not bool(stuck.any()):
        return phi
    step = _upwards(precision, torch.zeros_like(smallest), seed)
    step = torch.where(stuck.unsqueeze(-1), step, torch.zeros_like(step))
    with torch.no_grad():
        before = function(phi).sum()
        for _ in range(20):
            if bool(function(phi + step).sum() > before):
                break
            step = 0.5 * step
    return phi + step


def _smallest(precision: Tensor, bound: Tensor) -> Tensor:
    """(..., tasks) the smallest eigenvalue, or infinity where all are above their bound.

    Cholesky's factor of precision − bound · I says that at a tenth of an eigenvalue's price.
    """
    shift = torch.diag_embed(bound.unsqueeze(-1).expand(precision.shape[:-1]))
    _, failed = torch.linalg.cholesky_ex(precision - shift)
    if bool((failed == 0).all()):
        return torch.full_like(bound, torch.inf)
    found: Tensor = torch.linalg.eigvalsh(precision)[..., 0]
    return found


def _magnitude(precision: Tensor) -> Tensor:
    """(..., tasks) the size of a curvature."""
    return precision.diagonal(dim1=-2, dim2=-1).abs().mean(-1).clamp_min(1e-8)


def _upwards(precision: Tensor, damping: Tensor, seed: int) -> Tensor:
    """A step along the direction in which f curves upwards most.

    With curvature κ > 0 of f along it, f rises by ½ κ s²: by one nat at s = √(2/κ). Damping makes
    the step shorter.
    """
    values, vectors = torch.linalg.eigh(precision)
    upwards = (-values[..., 0]).clamp_min(torch.finfo(values.dtype).tiny)
    generator = torch.Generator().manual_seed(seed)
    coin = torch.randint(0, 2, upwards.shape, generator=generator).to(upwards)
    length = (2 * coin - 1) * (2 / (upwards + damping)).sqrt()
    step: Tensor = length.unsqueeze(-1) * vectors[..., 0]
    return step


def require_positive(precision: Tensor, ids: tuple[object, ...], where: str) -> None:
    """Raises where a precision (tasks, phi_size, phi_size) is not positive definite.

    Raises:
        CurvatureError: names the task with the smallest eigenvalue.
    """
    smallest = torch.linalg.eigvalsh(precision)[..., 0]
    if not bool((smallest > 0).all()):
        worst = int(smallest.argmin())
        raise CurvatureError(
            where,
            needed="a positive definite posterior precision of every task",
            found=f"task {ids[worst]!r} with smallest eigenvalue {float(smallest[worst]):.3g}",
            do="Give every task parameter a proper prior.",
        )
