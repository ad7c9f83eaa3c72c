"""Checks and conversions shared by the batches of tasks; each failure names the offending value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hbmeta.errors import DataError

__all__ = [
    "TaskId",
    "check_features",
    "check_finite",
    "check_ids",
    "check_labels",
    "check_seed",
    "child_seeds",
    "flatten_padded",
    "generator",
    "is_whole",
    "sort_flat",
]

TaskId = str | int
"""The label of a task: a person's own word or number for it."""


def _as_values(value: Any, name: str, *, where: str, labels: bool = False) -> tuple[Tensor, bool]:
    """Turn a tensor, array or nested list into a tensor of numbers.

    Args:
        value: a tensor, a NumPy array, or nested lists of numbers (which become float64).
        name: "x" or "y", for the message.
        where: the caller, for the message.
        labels: whether int64 class labels are allowed.
    Returns:
        The tensor, and whether its dtype was chosen here (true for lists) or by the caller.
    Raises:
        DataError: ragged lists, or a dtype that is neither floating nor (with `labels`) int64.
    """
    chosen_here = not isinstance(value, Tensor | np.ndarray)
    if chosen_here:
        try:
            value = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(
                where,
                needed=f"{name} as a tensor, an array or nested lists of numbers of equal lengths",
                found=f"{type(value).__name__} that is none of them ({error})",
                do="Pad unequal tasks and pass a mask, or pass the rows with Tasks.from_flat.",
            ) from None
    if isinstance(value, np.ndarray) and value.dtype.kind not in "fiub":
        raise DataError(
            where,
            needed=f"numbers in {name}",
            found=f"an array of dtype {value.dtype}",
            do="Convert it with astype(float), or read a data frame with tasks.from_frame.",
        )
    tensor = value if isinstance(value, Tensor) else torch.tensor(value)
    if tensor.is_floating_point() or (labels and tensor.dtype == torch.int64):
        return tensor, chosen_here
    choices = "floating point (numbers) or int64 (class labels)" if labels else "floating point"
    remedy = f"Pass {name}.double() for numbers" if name == "y" else f"Pass {name}.double()"
    if labels:
        remedy += ", or y.long() for class labels"
    raise DataError(
        where,
        needed=f"{name} of dtype {choices}",
        found=f"dtype {_name(tensor.dtype)}",
        do=f"{remedy}.",
    )


def _as_x_and_y(x: Any, y: Any, *, where: str) -> tuple[Tensor, Tensor | None]:
    """Read x and y as tensors of one dtype on one device; a list follows the other's dtype."""
    x, x_free = _as_values(x, "x", where=where)
    if y is None:
        return x, None
    y, y_free = _as_values(y, "y", where=where, labels=True)
    if y.is_floating_point() and y.dtype != x.dtype:
        if not (x_free or y_free):
            raise DataError(
                where,
                needed="x and y of the same floating dtype",
                found=f"x {_name(x.dtype)}, y {_name(y.dtype)}",
                do="Convert one of them, for example with .double().",
            )
        x, y = (x.to(y.dtype), y) if x_free else (x, y.to(x.dtype))
    return x, y.to(x.device)


def _as_mask(mask: Any, shape: tuple[int, int], *, where: str) -> Tensor:
    """Turn a mask into a bool tensor of the given shape (tasks, points)."""
    try:
        tensor = mask if isinstance(mask, Tensor) else torch.tensor(np.asarray(mask))
    except (TypeError, ValueError):
        raise DataError(
            where,
            needed=f"a mask of shape (tasks, points) = {shape}, as x has it",
            found=f"a {type(mask).__name__} that makes no array of bools",
            do="Give every task one entry per padded row of x.",
        ) from None
    if tensor.dtype != torch.bool:
        raise DataError(
            where,
            needed="a bool mask, True where a row is real",
            found=f"a mask of dtype {_name(tensor.dtype)}",
            do="Pass mask.bool() if non-zero means real.",
        )
    if tuple(tensor.shape) != shape:
        raise DataError(
            where,
            needed=f"a mask of shape (tasks, points) = {shape}, as x has it",
            found=f"shape {tuple(tensor.shape)}",
            do="Build the mask from the same padded layout as x.",
        )
    return tensor


def flatten_padded(
    x: Any, y: Any, mask: Any, *, where: str
) -> tuple[Tensor, Tensor | None, Tensor, int]:
    """Read the padded layout: the real rows of x and y, their tasks, and the number of tasks."""
    x, y = _as_x_and_y(x, y, where=where)
    if x.dim() != 3:
        raise DataError(
            where,
            needed="x of shape (tasks, points, features)",
            found=f"shape {tuple(x.shape)}",
            do="For one feature pass x[..., None]; for rows and a group index call "
            "Tasks.from_flat(x, y, task, n_tasks).",
        )
    shape = (int(x.shape[0]), int(x.shape[1]))
    if y is not None and (y.dim() not in (2, 3) or tuple(y.shape[:2]) != shape):
        raise DataError(
            where,
            needed=f"y of shape {shape}, or {(*shape, 'k')} for vectors, as x has it",
            found=f"shape {tuple(y.shape)}",
            do="Give y one entry per row of x; a single output needs no last dimension.",
        )
    if mask is None:
        real = torch.ones(shape, dtype=torch.bool, device=x.device)
    else:
        real = _as_mask(mask, shape, where=where).to(x.device)
    # Boolean indexing copies, so that the caller's tensors stay the caller's.
    return x[real], None if y is None else y[real], real.nonzero()[:, 0], shape[0]


def sort_flat(
    x: Any, y: Any, task: Any, n_tasks: int, *, where: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Read the flat layout: x, y and the group index, sorted by task with the rows' order kept."""
    x, y = _as_x_and_y(x, y, where=where)
    index = task if isinstance(task, Tensor) else torch.tensor(np.asarray(task))
    if index.numel() == 0:
        index = index.long()  # an empty list has no integer dtype of its own
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise DataError(
            where,
            needed="task as whole numbers, the position of each row's task",
            found=f"dtype {_name(index.dtype)}",
            do="Pass task.long().",
        )
    index = index.to(device=x.device, dtype=torch.int64)
    n = tuple(x.shape[:1])
    if x.dim() != 2 or tuple(index.shape) != n or (y is not None and tuple(y.shape[:1]) != n):
        raise DataError(
            where,
            needed="x of shape (n, features) with y and task of the same length n",
            found=f"x {tuple(x.shape)}, y {None if y is None else tuple(y.shape)}, "
            f"task {tuple(index.shape)}",
            do="Give each row one entry in y and task; for one feature pass x[:, None].",
        )
    if y is not None and y.dim() > 2:
        raise DataError(
            where,
            needed="y of shape (n,) or (n, k)",
            found=f"shape {tuple(y.shape)}",
            do="Flatten the last dimensions of y.",
        )
    outside = index[(index < 0) | (index >= n_tasks)]
    if len(outside):
        raise DataError(
            where,
            needed=f"task positions from 0 to n_tasks - 1 = {n_tasks - 1}",
            found=f"the position {int(outside[0])}",
            do="Number the tasks from 0, or raise n_tasks.",
        )
    order = torch.argsort(index, stable=True)
    return x[order], None if y is None else y[order], index[order]


def check_ids(ids: Iterable[Any] | None, n_tasks: int, *, where: str) -> tuple[TaskId, ...]:
    """Return one unique str or int label per task; 0..T-1 where none are given."""
    if ids is None:
        return tuple(range(n_tasks))
    checked: list[TaskId] = []
    for label in ids.tolist() if isinstance(ids, Tensor | np.ndarray) else ids:
        plain = label.item() if isinstance(label, np.generic) else label
        if isinstance(plain, bool) or not isinstance(plain, str | int):
            raise DataError(
                where,
                needed="ids that are words (str) or whole numbers (int)",
                found=f"{plain!r} of type {type(plain).__name__}",
                do="Convert the labels, for example with str(label).",
            )
        checked.append(plain)
    if len(checked) != n_tasks:
        raise DataError(
            where,
            needed=f"one id per task, {n_tasks} in all",
            found=f"{len(checked)} ids",
            do="Pass as many ids as x has tasks.",
        )
    seen: set[TaskId] = set()
    for label in checked:
        if label in seen:
            raise DataError(
                where,
                needed="a different id for every task",
                found=f"the id {label!r} more than once",
                do="Rename one of the tasks, or put their rows together under one id.",
            )
        seen.add(label)
    return tuple(checked)


def check_features(features: Sequence[str] | None, n: int, *, where: str) -> tuple[str, ...]:
    """Return one name per column of x; "x0", "x1", ... where none are given."""
    if features is None:
        return tuple(f"x{column}" for column in range(n))
    names = tuple(features)
    repeated = sorted({str(name) for name in names if names.count(name) > 1})
    if isinstance(features, str) or len(names) != n or repeated:
        raise DataError(
            where,
            needed=f"{n} different feature names, one per column of x",
            found=f"{features!r}" + (f" ({', '.join(repeated)} repeated)" if repeated else ""),
            do="Pass a list of names in the order of the columns.",
        )
    return names


def check_finite(
    values: Tensor,
    name: str,
    task: Tensor,
    ids: tuple[TaskId, ...],
    columns: tuple[str, ...] | None,
    *,
    where: str,
) -> None:
    """Raise where a row (n, ...) holds a NaN or an infinity, naming its task and its row in it."""
    if not values.is_floating_point() or bool(torch.isfinite(values).all()):
        return
    entries = values.reshape(values.shape[0], -1)
    bad = (~torch.isfinite(entries)).nonzero()
    row, column = int(bad[0, 0]), int(bad[0, 1])
    index = int(task[row])
    within = int((task[:row] == index).sum())
    place = f"column {columns[column]!r} of {name}" if columns else name
    raise DataError(
        where,
        needed=f"finite numbers in {name}",
        found=(
            f"{float(entries[row, column])} in {place}, task {ids[index]!r}, row {within} of that "
            f"task counted from 0 ({len(bad)} such entries in all)"
        ),
        do="Drop these rows, or mark them with mask=False.",
    )


def check_labels(y: Tensor, *, where: str) -> None:
    """Raise where int64 class labels are negative."""
    if y.dtype == torch.int64 and y.numel() and int(y.min()) < 0:
        raise DataError(
            where,
            needed="class labels 0, 1, ..., k - 1",
            found=f"the label {int(y.min())}",
            do="Number the classes from 0, or pass y.double() if these are numbers.",
        )


def is_whole(value: Any) -> bool:
    """Whether a value is an int of Python or NumPy; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_seed(seed: Any, *, where: str) -> int:
    """Return a seed as int; it must be a whole number from 0 to 2⁶³ - 1."""
    if not is_whole(seed) or not 0 <= int(seed) < 2**63:
        raise DataError(
            where,
            needed="seed as a whole number of at least 0",
            found=f"{seed!r}",
            do="Pass for example seed=0.",
        )
    return int(seed)


def check_count(value: Any, name: str, *, where: str) -> int:
    """Return a number of things as int; it must be a whole number from 1 on."""
    if not is_whole(value) or int(value) < 1:
        raise DataError(
            where,
            needed=f"{name} as a whole number of at least 1",
            found=f"{name}={value!r}",
            do=f"Pass for example {name}=1000.",
        )
    return int(value)


def child_seeds(seed: Any, n: int, *, where: str) -> list[int]:
    """Independent seeds that are a function of one seed."""
    state = np.random.SeedSequence(check_seed(seed, where=where)).generate_state(n, np.uint64)
    return [int(child >> np.uint64(1)) for child in state]


def generator(seed: Any, *, where: str) -> torch.Generator:
    """A generator of its own for a seed, so that the caller's random state stays as it was."""
    return torch.Generator().manual_seed(check_seed(seed, where=where))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
