"""Whether a family, an episode and a truth belong together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hbmeta.errors import DataError
from hbmeta.tasks import Clusters, Episode

__all__ = ["check_episode", "truth_of"]


def check_episode(
    family: Any, kind: type[Any], episode: Any, columns: int, *, where: str
) -> Tensor:
    """y of the support, flat; raises unless family and episode fit to each other."""
    if not isinstance(family, kind) or not isinstance(episode, Episode):
        raise DataError(
            where,
            needed=f"a family {kind.__name__} and an Episode of it",
            found=f"{type(family).__name__} and {type(episode).__name__}",
            do="Pass the family, and what its sample method returned.",
        )
    y = episode.support.flat_y
    most = int(family.ways) - 1 if isinstance(family, Clusters) else None
    fits = y is not None and y.dim() == 1 and y.is_floating_point() is (most is None)
    if fits and most is not None and y is not None and len(y):
        fits = int(y.max()) <= most
    if y is None or not fits or len(episode.support.features) != columns:
        response = "a number" if most is None else f"class labels 0 to {most}"
        raise DataError(
            where,
            needed=f"a support with {columns} columns in x (one per feature) and {response} as y",
            found=f"{episode.support!r}",
            do="Pass an episode that this family drew.",
        )
    return y.double() if most is None else y


def truth_of(
    truth: Mapping[str, Tensor], name: str, shape: tuple[int, ...], device: Any, *, where: str
) -> Tensor:
    """One entry of the truth, float64; raises unless it is there, finite and of that shape."""
    value = truth.get(name) if isinstance(truth, Mapping) else None
    values = None if value is None else torch.as_tensor(value, dtype=torch.float64, device=device)
    if values is None or values.shape != tuple(shape) or not bool(values.isfinite().all()):
        found = "none" if values is None else f"shape {tuple(values.shape)}"
        if values is not None and values.shape == tuple(shape):
            found = "NaN or infinite entries"
        raise DataError(
            where,
            needed=f"{name!r} in the truth, finite, of shape {tuple(shape)}",
            found=found,
            do="Pass the truth that sample_with_truth returned with this episode.",
        )
    return values
