"""Truncated Newton in a trust region for all tasks at once, on gradients and products alone.

Each task i minimises its own f_i(φ_i). With g = ∇f and H = ∇²f at φ, and Δ the task's own radius,

    s ≈ argmin gᵀs + ½ sᵀHs  over ‖s‖ ≤ Δ,

by conjugate gradients from s = 0 that stop where the model's gradient r = g + Hs is small, where s
leaves the region, or where a direction of negative curvature is met (Steihaug 1983). The step is
taken where f falls by a share of what the model says, and Δ shrinks where the model said too much;
a rejected step is shortened along its way first, which takes gradients alone (Nocedal & Yuan 1998).
No matrix is formed and no history kept: memory does not grow with the number of steps.

The search is three functions of tensors, so that a caller can stage each with its own gradient and
product inside (one compiled graph per iteration in place of twenty small operations):

    begin     (f, ∇f)(φ_0)           → Search, Inner
    advance   one product H d        → Inner             (an iteration of conjugate gradients)
    attempt   (f, ∇f)(φ + s)         → Search, Inner     (take the step or not; the next region)

Δ starts at infinity. Rejected steps give it its scale; a first step along negative curvature −κ
has the length that curvature κ would give it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Inner", "Minima", "Search", "advance", "attempt", "begin", "minimise_tasks", "run"]

ValueAndGradient = Callable[[Tensor], tuple[Tensor, Tensor]]

# Conjugate gradients stop at this share of ‖g‖, and at ‖g‖/‖g_0‖ once that is smaller, which makes
# the search superlinear.
_FORCING = 0.5
# A step is taken where f falls by this share of the model's fall; the region shrinks below the
# second share and grows, where it bounded the step, above the third (Nocedal & Wright, alg. 4.1).
_TAKE, _SHRINK, _GROW = 1e-4, 0.25, 0.75
# Differences of f below so many roundings of f say nothing; the gradients at both ends do.
_ROUNDINGS = 64
# Curvature within this many roundings of the largest seen is none.
_FLAT = 16
# A rejected step is shortened and tried again so many times, which takes no product, before the
# model is asked for another one (Nocedal & Yuan 1998).
_RETRIES = 2
# Rejections in a row after which a task is given up: a step is then 2^-10 of the first, or less.
_FAILURES = 10


class Search(NamedTuple):
    """Where the search of every task stands.

    Attributes:
        point: (tasks, size) φ.
        value: (tasks,) f.
        gradient: (tasks, size) ∇f.
        radius: (tasks,) Δ; infinite until a step has been rejected.
        first: (tasks,) ‖∇f(φ_0)‖.
        target: (tasks,) the gradient norm to reach.
        failures: (tasks,) steps rejected in a row.
        given_up: (tasks,) 1 where no step makes f fall any more.
        negative: (tasks,) 1 where a direction of negative curvature was met on the way.
    """

    point: Tensor
    value: Tensor
    gradient: Tensor
    radius: Tensor
    first: Tensor
    target: Tensor
    failures: Tensor
    given_up: Tensor
    negative: Tensor


class Inner(NamedTuple):
    """Where conjugate gradients on the model stand.

    Attributes:
        step: (tasks, size) s.
        residual: (tasks, size) r = g + H s.
        direction: (tasks, size) d; 0 for a task that is done.
        square: (tasks,) rᵀr.
        largest: (tasks,) the largest |dᵀHd| / dᵀd so far.
        cut: (tasks,) 1 where the region or negative curvature ended the step.
        negative: (tasks,) 1 where negative curvature did.
        going: (tasks,) 1 where the iteration goes on.
        retries: (tasks,) how often this step has been shortened.
    """

    step: Tensor
    residual: Tensor
    direction: Tensor
    square: Tensor
    largest: Tensor
    cut: Tensor
    negative: Tensor
    going: Tensor
    retries: Tensor


class Minima(NamedTuple):
    """What a search found, per task.

    Attributes:
        point: (tasks, size).
        value: (tasks,) f there.
        residual: (tasks,) ‖∇f‖ there, Euclidean.
        met: (tasks,) whether it is at most the tolerance.
        negative: (tasks,) whether negative curvature was met on the way.
        gradients: evaluations of f and ∇f, of all tasks at once.
        products: Hessian-vector products, likewise.
    """

    point: Tensor
    value: Tensor
    residual: Tensor
    met: Tensor
    negative: Tensor
    gradients: int
    products: int


def begin(
    value_and_gradient: ValueAndGradient, start: Tensor, tolerance: float
) -> tuple[Search, Inner]:
    """The search at φ_0."""
    value, gradient = value_and_gradient(start)
    norm = torch.linalg.vector_norm(gradient, dim=-1)
    none = torch.zeros_like(norm)
    target = tolerance * norm.clamp_min(1.0)
    search = Search(
        start, value, gradient, torch.full_like(norm, torch.inf), norm, target, none, none, none
    )
    return search, _model(search)


def _model(search: Search) -> Inner:
    """Conjugate gradients at s = 0."""
    square = (search.gradient * search.gradient).sum(-1)
    going = ((square.sqrt() > search.target) & (search.given_up == 0)).to(square.dtype)
    direction = -search.gradient * going.unsqueeze(-1)
    none, nowhere = torch.zeros_like(square), torch.zeros_like(direction)
    return Inner(nowhere, search.gradient, direction, square, none, none, none, going, none)


def advance(product: Callable[[Tensor], Tensor], search: Search, inner: Inner) -> Inner:
    """One iteration of conjugate gradients on the model of every task that still goes on."""
    step, residual, direction, square, largest, cut, negative, going, retries = inner
    tiny, eps = torch.finfo(square.dtype).tiny, torch.finfo(square.dtype).eps
    on = going > 0
    along = product(direction)
    bend = (direction * along).sum(-1)
    length = (direction * direction).sum(-1).clamp_min(tiny)
    curvature = bend / length
    largest = torch.maximum(largest, curvature.abs())
    bends_down = curvature <= _FLAT * eps * largest
    # Along negative curvature −κ the model has no minimum: go as far as κ would, for want of a Δ.
    upright = torch.where(
        bends_down, torch.maximum(curvature.abs(), 1e-3 * largest).clamp_min(tiny), curvature
    )
    far = square / (upright * length)
    # s + τ d with ‖s + τ d‖ = Δ, τ > 0.
    cross, base = (step * direction).sum(-1), (step * step).sum(-1)
    bounded = torch.isfinite(search.radius)
    radius = torch.where(bounded, search.radius, torch.zeros_like(search.radius))
    room = (cross * cross + length * (radius * radius - base)).clamp_min(0)
    # Written without the difference of −cross and a root that may be as large.
    to_edge = (radius * radius - base).clamp_min(0) / (cross + room.sqrt()).clamp_min(tiny)
    outside = base + far * (2 * cross + far * length) >= radius * radius
    stops = bounded & (outside | bends_down)
    share = torch.where(on, torch.where(stops, to_edge, far), torch.zeros_like(far))
    step = step + share.unsqueeze(-1) * direction
    residual = residual + share.unsqueeze(-1) * along
    new = (residual * residual).sum(-1)
    norm = (search.gradient * search.gradient).sum(-1).sqrt()
    forcing = (norm / search.first.clamp_min(tiny)).clamp_max(_FORCING)
    enough = torch.maximum(forcing * norm, 0.5 * search.target)
    ends = stops | bends_down
    on_still = on & ~ends & (new.sqrt() > enough)
    share_old = torch.where(on_still, new / square.clamp_min(tiny), torch.zeros_like(new))
    going = on_still.to(square.dtype)
    direction = (share_old.unsqueeze(-1) * direction - residual) * going.unsqueeze(-1)
    cut = torch.where(on & ends, torch.ones_like(cut), cut)
    negative = torch.where(on & bends_down, torch.ones_like(negative), negative)
    return Inner(step, residual, direction, new, largest, cut, negative, going, retries)


def attempt(
    value_and_gradient: ValueAndGradient, search: Search, inner: Inner
) -> tuple[Search, Inner]:
    """φ + s where f falls there, the next region, and the model at the new point.

    A rejected step is shortened and tried again, before a new one is asked for.
    """
    point, value, gradient, radius, first, target, failures, given_up, negative = search
    step, residual, retries = inner.step, inner.residual, inner.retries
    eps, tiny = torch.finfo(value.dtype).eps, torch.finfo(value.dtype).tiny
    length = torch.linalg.vector_norm(step, dim=-1)
    tried = length > 0
    new_value, new_gradient = value_and_gradient(point + step)
    slope, new_slope = (gradient * step).sum(-1), (new_gradient * step).sum(-1)
    # gᵀs + ½ sᵀHs with Hs = r − g.
    predicted = -0.5 * (slope + (residual * step).sum(-1))
    actual = value - new_value
    noise = eps * torch.maximum(value.abs(), new_value.abs())
    # By the trapezoidal rule, exact for a quadratic, where f has too few digits.
    actual = torch.where(actual.abs() <= _ROUNDINGS * noise, -0.5 * (slope + new_slope), actual)
    finite = torch.isfinite(new_value) & torch.isfinite(new_gradient).all(-1)
    ratio = torch.where(finite, actual / predicted.clamp_min(tiny), torch.full_like(actual, -1.0))
    taken = tried & (ratio > _TAKE)
    rejected = tried & ~taken
    # The minimum of the parabola through f and its slope at 0 and f at 1.
    shorter = -0.5 * slope / (-actual - slope).clamp_min(tiny)
    shorter = torch.where(finite, shorter, torch.zeros_like(shorter)).clamp(0.1, 0.5)
    again = rejected & (retries < _RETRIES)
    one = torch.ones_like(value)
    grown = (ratio > _GROW) & (inner.cut > 0)
    radius = torch.where(grown, 2 * radius, radius)
    radius = torch.where(taken & (ratio < _SHRINK), 0.5 * length, radius)
    radius = torch.where(taken & (retries > 0), length, radius)
    radius = torch.where(rejected, shorter * length, radius)
    failures = torch.where(taken, torch.zeros_like(failures), failures + rejected.to(one.dtype))
    # By the digits of f here: where a step ended far up, f has few, and a shorter one may do.
    hopeless = rejected & ((predicted <= 4 * eps * value.abs()) | (failures >= _FAILURES))
    given_up = torch.where(hopeless, one, given_up)
    again = again & ~hopeless
    moved = taken.unsqueeze(-1)
    search = Search(
        torch.where(moved, point + step, point),
        torch.where(taken, new_value, value),
        torch.where(moved, new_gradient, gradient),
        radius, first, target, failures, given_up,
        torch.maximum(negative, inner.negative),
    )  # fmt: skip
    fresh = _model(search)
    keep, scale = again.unsqueeze(-1), shorter.unsqueeze(-1)
    return search, Inner(
        torch.where(keep, scale * step, fresh.step),
        # r is linear in s.
        torch.where(keep, gradient + scale * (residual - gradient), fresh.residual),
        torch.where(keep, torch.zeros_like(step), fresh.direction),
        fresh.square,
        fresh.largest,
        fresh.cut,
        fresh.negative,
        torch.where(again, torch.zeros_like(one), fresh.going),
        torch.where(again, retries + 1, torch.zeros_like(one)),
    )


def run(
    begun: tuple[Search, Inner],
    advance: Callable[[Search, Inner], Inner],
    attempt: Callable[[Search, Inner], tuple[Search, Inner]],
    *,
    steps: int,
    products: int,
    share: float = 0.0,
) -> Minima:
    """Runs a search to its tolerance; its functions may be staged.

    Args:
        begun: of `begin`.
        advance: as the function of this module, its product given.
        attempt: as the function of this module, its value and gradient given.
        steps: at most so many Newton steps.
        products: at most so many products for each.
        share: conjugate gradients end where at most this share of the tasks that began still goes
            on. A product costs the same for all tasks as for one, and their steps so far are steps
            that a search may take; but above 0 a task's way then depends on the others (what it
            ends at, to its tolerance, does not).
    """
    search, inner = begun
    gradients, multiplied = 1, 0
    for _ in range(steps):
        began = float(inner.going.sum())
        if not began:
            break
        for _ in range(products):
            inner = advance(search, inner)
            multiplied += 1
            if float(inner.going.sum()) <= share * began:
                break
        search, inner = attempt(search, inner)
        gradients += 1
        while bool(inner.retries.any()):
            search, inner = attempt(search, inner)
            gradients += 1
    residual = torch.linalg.vector_norm(search.gradient, dim=-1)
    met, negative = residual <= search.target, search.negative > 0
    return Minima(search.point, search.value, residual, met, negative, gradients, multiplied)


def minimise_tasks(
    value_and_gradient: ValueAndGradient,
    hessian_vector: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    *,
    tolerance: float,
    steps: int = 50,
    products: int = 100,
) -> Minima:
    """Every task's own minimum near its start.

    Args:
        value_and_gradient: φ (tasks, size) to f (tasks,) and ∇f (tasks, size), without history.
        hessian_vector: φ and v to ∇²f(φ) v, (tasks, size) each.
        start: φ_0.
        tolerance: on ‖∇f_i‖, Euclidean, in the units of f per φ; relative to ‖∇f_i(φ_0)‖ where
            that is above 1.
        steps: at most so many Newton steps.
        products: at most so many products for each.
    References:
        Steihaug (1983), SIAM J. Numer. Anal. 20. Nocedal, Yuan (1998), Advances in Nonlinear
        Programming. Nocedal, Wright (2006), Numerical Optimization, algorithms 4.1 and 7.2.
    """
    return run(
        begin(value_and_gradient, start.detach(), tolerance),
        lambda search, inner: advance(lambda v: hessian_vector(search.point, v), search, inner),
        lambda search, inner: attempt(value_and_gradient, search, inner),
        steps=steps,
        products=products,
    )
