"""Arguments of the bounds, checked and brought to float64.

Counts, risks, divergences and confidences that no theorem allows are refused before anything is
computed. What rounding may have done is repaired: 1e-9 beyond [0, 1] for a risk, 1e-9 below 0 for
a divergence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from hbmeta.errors import DataError

__all__ = [
    "Array",
    "TaskArguments",
    "Values",
    "as_array",
    "common_shape",
    "confidence",
    "count",
    "divergence",
    "positive",
    "probability",
    "single_task_arguments",
    "task_arguments",
]

Array: TypeAlias = NDArray[np.float64]
Values: TypeAlias = ArrayLike | Tensor

SLACK = 1e-9
"""How far a mean of losses or a closed-form KL may leave its range by rounding."""

LARGEST = 1e100
"""A KL beyond this is taken for ∞: its square must not overflow."""


def as_array(value: Values, name: str, where: str) -> Array:
    """The value in float64, if it is numeric, not empty and free of NaN."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.full((1,), np.nan)
    if array.size == 0 or np.isnan(array).any():
        raise DataError(
            where,
            needed=f"{name} as numbers, at least one and none NaN",
            found="an empty array" if array.size == 0 else f"{value!r}",
            do="Look for tasks without data and for losses that overflowed.",
        )
    return array


def _require(array: Array, good: NDArray[np.bool_], where: str, needed: str, do: str) -> None:
    if not good.all():
        raise DataError(where, needed=needed, found=f"{array[~good].flat[0]:g}", do=do)


def probability(value: Values, name: str, where: str) -> Array:
    """Numbers in [0, 1]: losses, risks."""
    array = as_array(value, name, where)
    _require(
        array,
        (array >= -SLACK) & (array <= 1.0 + SLACK),
        where,
        f"{name} in [0, 1]",
        "Bound the loss before the data are seen (0-1, clipped or truncated) and rescale it.",
    )
    return np.clip(array, 0.0, 1.0)


def divergence(value: Values, name: str, where: str) -> Array:
    """Numbers in [0, ∞]."""
    array = as_array(value, name, where)
    do = "A KL divergence is never negative: look at the order of its arguments."
    _require(array, array >= -SLACK, where, f"{name} of 0 or more, in nats", do)
    return np.where(array > LARGEST, np.inf, np.maximum(array, 0.0))


def confidence(value: Values, where: str, name: str = "delta") -> Array:
    """Numbers strictly between 0 and 1."""
    array = as_array(value, name, where)
    do = "It is the probability with which the bound may fail, such as 0.05."
    _require(array, (array > 0.0) & (array < 1.0), where, f"{name} strictly in (0, 1)", do)
    return array


def positive(value: Values, name: str, where: str) -> Array:
    """Numbers in (0, ∞)."""
    array = as_array(value, name, where)
    good = (array > 0.0) & np.isfinite(array)
    do = "Give it in the units of the theorem, fixed before the data are seen."
    _require(array, good, where, f"a positive and finite {name}", do)
    return array


def count(value: Values, name: str, where: str, *, least: int = 1) -> Array:
    """Whole numbers, at least `least`."""
    array = as_array(value, name, where)
    good = (array >= least) & np.isfinite(array) & (array == np.floor(array))
    do = "The theorem says nothing about fewer." if least > 1 else "Count them."
    _require(array, good, where, f"{name} as whole numbers of at least {least}", do)
    return array


def common_shape(where: str, **arrays: Array) -> tuple[int, ...]:
    """The shape to which all arrays broadcast."""
    try:
        return np.broadcast_shapes(*(array.shape for array in arrays.values()))
    except ValueError:
        raise DataError(
            where,
            needed="shapes that broadcast",
            found=", ".join(f"{name} {array.shape}" for name, array in arrays.items()),
            do="What is given per task has the tasks last; add dimensions with x[..., None].",
        ) from None


def single_task_arguments(
    where: str, risk: Values, kl: Values, n_samples: Values, delta: Values, *, least: int = 1
) -> tuple[Array, Array, Array, Array]:
    """Risk, KL, n and δ of a bound for one task, each checked, and that they broadcast."""
    checked = (
        probability(risk, "risk", where),
        divergence(kl, "kl", where),
        count(n_samples, "n_samples", where, least=least),
        confidence(delta, where),
    )
    common_shape(where, **dict(zip(("risk", "kl", "n_samples", "delta"), checked, strict=True)))
    return checked


@dataclass(frozen=True)
class TaskArguments:
    """What a bound over tasks is computed from.

    Per task, (..., tasks), or (..., 1) where all tasks are alike: `risk`, `task_kls`, `n_samples`.
    Over all tasks, (...): `hyper_kl`, `n_tasks`, `delta`; the same again as columns (..., 1) from
    `column`.
    """

    risk: Array
    hyper_kl: Array
    task_kls: Array
    n_samples: Array
    n_tasks: Array
    delta: Array

    @property
    def mean_risk(self) -> Array:
        """(...) every task counts once, whatever its sample."""
        return np.asarray(self.risk.mean(-1))

    @property
    def summed_task_kls(self) -> Array:
        """(...) Σ_i K_i."""
        return np.asarray(self.n_tasks * self.task_kls.mean(-1))

    def require_shapes(self, where: str, **others: Array) -> None:
        """Raises DataError unless others, (...), broadcast with the bounds asked for."""
        own = np.broadcast_shapes(
            *(a.shape[:-1] for a in (self.risk, self.task_kls, self.n_samples)),
            *(a.shape for a in (self.hyper_kl, self.n_tasks, self.delta)),
        )
        common_shape(where, arguments=np.broadcast_to(0.0, own), **others)

    def column(self, name: str) -> Array:
        """(..., 1) one of `hyper_kl`, `n_tasks`, `delta`, to stand beside numbers per task."""
        values: Array = getattr(self, name)[..., None]
        return values

    @property
    def equal_samples(self) -> NDArray[np.bool_]:
        """(...) whether every task has the same n."""
        return np.asarray((self.n_samples == self.n_samples[..., :1]).all(-1))


def task_arguments(
    where: str,
    *,
    risk: Values,
    n_tasks: Values,
    delta: Values,
    hyper_kl: Values = 0.0,
    task_kls: Values = 0.0,
    n_samples: Values = 1,
    least_tasks: int = 1,
    least_samples: int = 1,
) -> TaskArguments:
    """Arguments of a bound over tasks, checked and with the tasks last.

    Raises:
        DataError: one is out of range; the last dimension of what is given per task is neither 1
            nor the number of tasks; shapes do not broadcast.
    """
    tasks = count(n_tasks, "n_tasks", where, least=least_tasks)

    def per_task(value: Values, name: str, check: Callable[[Values], Array]) -> Array:
        array = np.atleast_1d(check(value))
        if array.shape[-1] != 1 and not (tasks == array.shape[-1]).all():
            raise DataError(
                where,
                needed=f"{name} as one number, or with the tasks last ({tasks.max():g} of them)",
                found=f"shape {array.shape}",
                do=f"Write {name}[..., None] to compute a bound for each of its entries.",
            )
        return array

    checked = TaskArguments(
        risk=per_task(risk, "risk", lambda value: probability(value, "risk", where)),
        hyper_kl=divergence(hyper_kl, "hyper_kl", where),
        task_kls=per_task(task_kls, "task_kls", lambda value: divergence(value, "task_kls", where)),
        n_samples=per_task(
            n_samples,
            "n_samples",
            lambda value: count(value, "n_samples", where, least=least_samples),
        ),
        n_tasks=tasks,
        delta=confidence(delta, where),
    )
    common_shape(
        where,
        risk=checked.risk,
        task_kls=checked.task_kls,
        n_samples=checked.n_samples,
        hyper_kl=checked.column("hyper_kl"),
        n_tasks=checked.column("n_tasks"),
        delta=checked.column("delta"),
    )
    return checked
