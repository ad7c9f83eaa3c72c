"""A bound with fixed noise, tightened by truncated Newton: each task's by itself, or all with θ."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hbmeta.derivatives import hessian_vector, task_gradient
from hbmeta.families import Frame
from hbmeta.newton import Minima, minimise_tasks
from hbmeta.optimisation import minimise
from hbmeta.program import Batch
from hbmeta.staging import Staged, Tier
from hbmeta.variational.point_guide import PointGuide

# Below this a gradient in float32 is rounding, at any size of a loss.
_LEAST = {torch.float64: 0.0, torch.float32: 1e-3}
# A start whose average loss is so many nats per parameter above that of its centre is drawn closer,
# to this share, so often: Newton goes down an exponential by one unit of its exponent a step. (The
# prior itself is half a nat above.)
_ABOVE, _CLOSER, _TIMES = 10.0, 0.25, 12
# Newton steps for θ and all λ, and the slope per task, in nats, that is worth a warning.
_STEPS, _STEEP = 60, 1e-2
_LINE_SEARCHES = 500
# Calls of a gradient, and of a product, that a search of Newton's takes.
_CALLS = 100

__all__ = ["Guide", "search_all", "search_tasks", "settle", "starting_frame"]


class Guide(Protocol):
    """What is searched and trained; see `PointGuide` and `JointGuide`."""

    def noise_shapes(self, n_tasks: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the standard normal draws of one estimate."""
        ...

    def fixed_noise(self, draws: int, seed: int, like: Tensor) -> dict[str, Tensor]:
        """Draws that are held fixed, for all tasks alike; see `matched_noise`."""
        ...

    def terms(
        self,
        shared: Mapping[str, Tensor],
        rows: Tensor,
        frame: Frame,
        batch: Batch,
        noise: Mapping[str, Tensor],
        *,
        fixed: bool,
    ) -> tuple[Tensor, Tensor]:
        """(tasks,) what each task adds to the loss, and () what θ adds by itself."""
        ...


def starting_frame(
    guide: Guide,
    shared: Mapping[str, Tensor],
    frame: Frame,
    rows: Callable[[Frame], Tensor],
    batch: Batch,
    noise: Mapping[str, Tensor],
) -> Frame:
    """The frame, narrower where the bound overflows (counts under a wide prior, say)."""
    still = {name: torch.zeros_like(value[:1]) for name, value in noise.items()}
    for _ in range(_TIMES):
        with torch.no_grad():
            value, centre = (
                guide.terms(shared, rows(frame), frame, batch, eps, fixed=True)[0]
                for eps in (noise, still)
            )
        bad = ~(value - centre < _ABOVE * frame.loc.shape[-1])
        if not bool(bad.any()):
            break
        factor = torch.where(bad, _CLOSER, 1.0).to(frame.loc)
        factor = factor.reshape(-1, *(1,) * (frame.scale.ndim - 1))
        frame = Frame(frame.loc, factor * frame.scale)
    return frame


def search_tasks(
    guide: PointGuide,
    shared: Mapping[str, Tensor],
    rows: Tensor,
    frame: Frame,
    batch: Batch,
    noise: Mapping[str, Tensor],
    *,
    steps: int,
    tolerance: float,
    tier: Tier | Literal["auto"],
) -> Minima:
    """λ of every task at the maximum of its own bound, what tasks share held.

    Args:
        guide: the bound. It is traced once for the searches of its family on a problem.
        shared: θ, or what stands for it.
        rows: (tasks, row_size) λ to start from.
        frame: of each task.
        batch: rows of the tasks.
        noise: of `guide.fixed_noise`.
        steps: at most so many Newton steps.
        tolerance: on the norm of each task's gradient, in nats per unit of λ.
        tier: how to run.
    """
    shared = {name: value.detach() for name, value in shared.items()}
    given = (shared, frame.loc.detach(), frame.scale.detach(), batch, dict(noise))

    def value(shared: Any, loc: Tensor, scale: Tensor, batch: Batch, noise: Any) -> Any:
        return lambda r: guide.terms(shared, r, Frame(loc, scale), batch, noise, fixed=True)[0]

    def stage(name: str, function: Callable[..., Any]) -> Staged:
        key = ("search_tasks", name, guide.family, guide.bound)
        return guide.problem.staged(key, function, tier, _CALLS)

    return _search(value, given, rows, steps=steps, tolerance=tolerance, stage=stage)


def search_all(
    name: str,
    guide: Guide,
    shared: Mapping[str, Tensor],
    rows: Tensor,
    frame: Frame,
    batch: Batch,
    noise: Mapping[str, Tensor],
    *,
    steps: int,
    tolerance: float,
    tier: Tier | Literal["auto"],
) -> tuple[dict[str, Tensor], Tensor, Minima]:
    """What tasks share and all λ at the maximum of the whole objective, as one vector.

    Arguments are those of `search_tasks`, after the strategy's name for errors; the tolerance is
    one on the norm of the whole gradient.

    Returns:
        what tasks share, λ, and how the search ended (one "task").
    """
    names = list(shared)
    sizes = [shared[name].numel() for name in names]
    start = torch.cat([*(shared[n].detach().flatten() for n in names), rows.flatten()])
    given = (frame.loc.detach(), frame.scale.detach(), batch, dict(noise))

    def unpack(vector: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        parts = vector.split([*sizes, rows.numel()])
        found = {
            n: part.reshape(shared[n].shape) for n, part in zip(names, parts[:-1], strict=True)
        }
        return found, parts[-1].reshape(rows.shape)

    def value(loc: Tensor, scale: Tensor, batch: Batch, noise: Any) -> Any:
        def whole(vector: Tensor) -> Tensor:
            losses, prior = guide.terms(
                *unpack(vector[0]), Frame(loc, scale), batch, noise, fixed=True
            )
            return (losses.sum() + prior).reshape(1)

        return whole

    whole = value(*given)
    # A line search first, for what is far and no quadratic (scales near zero); then Newton.
    near = minimise(
        lambda vector: whole(vector.unsqueeze(0)).squeeze(0) / rows.shape[0],
        start,
        where=name,
        tier=tier,
        iterations=_LINE_SEARCHES,
    )

    def stage(_: str, function: Callable[..., Any]) -> Staged:
        return Staged(function, tier=tier, expected_calls=_CALLS)

    found = _search(
        value, given, near.point.unsqueeze(0), steps=steps, tolerance=tolerance, stage=stage
    )
    return *unpack(found.point[0]), found


def settle(
    name: str,
    guide: Guide,
    shared: dict[str, Tensor],
    rows: Tensor,
    frame: Frame,
    batch: Batch,
    noise: Mapping[str, Tensor],
    *,
    tolerance: float,
    tier: Tier | Literal["auto"],
) -> tuple[Tensor, float]:
    """`search_all` that moves what tasks share in place; warns where the bound still rises in it.

    Returns:
        λ, and the norm of the gradient at the end.
    """
    found, rows, end = search_all(
        name,
        guide,
        shared,
        rows,
        frame,
        batch,
        noise,
        steps=_STEPS,
        tolerance=tolerance,
        tier=tier,
    )
    for key, value in found.items():
        shared[key].copy_(value)
    steep = float(end.residual)
    if not bool(end.met.all()) and not steep < _STEEP * rows.shape[0]:
        warnings.warn(
            f"{name}: the search for θ stopped where the bound still rises ({steep:.2g} nats per "
            "unit of a prior's scale). Raise steps of fit, or standardise x and y.",
            stacklevel=4,
        )
    return rows, steep


def _search(
    value: Callable[..., Callable[[Tensor], Tensor]],
    given: tuple[Any, ...],
    start: Tensor,
    *,
    steps: int,
    tolerance: float,
    stage: Callable[[str, Callable[..., Any]], Staged],
) -> Minima:
    """`minimise_tasks` with its two functions staged, and what is given as their inputs."""

    def first(point: Tensor, given: Any) -> tuple[Tensor, Tensor]:
        return task_gradient(value(*given), point)

    def second(point: Tensor, vector: Tensor, given: Any) -> Tensor:
        return hessian_vector(value(*given), point, vector)

    gradient, product = stage("gradient", first), stage("product", second)
    return minimise_tasks(
        lambda point: gradient(point, given),
        lambda point, vector: product(point, vector, given),
        start.detach(),
        tolerance=max(tolerance, _LEAST.get(start.dtype, 0.0)),
        steps=steps,
    )
