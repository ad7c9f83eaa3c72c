"""What figures share: the site and coordinate to show, views of what runs away, losses by step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from hbmeta.errors import DataError
from hbmeta.fitted import Fitted
from hbmeta.posterior import TaskPosterior

__all__ = [
    "View",
    "common_site",
    "coordinate_name",
    "coordinate_values",
    "draw_loss",
    "view_of",
]

Floats = npt.NDArray[np.float64]
View = tuple[float, float]


def common_site(posteriors: Iterable[TaskPosterior], site: str | None, where: str) -> str:
    """The named site, or the first that all programs have, computed ones first."""
    every = [p.problem.sites for p in posteriors]
    names = [s.name for s in (*every[0].deterministic_local, *every[0].locals)]
    common = [
        n for n in names
        if all(n in {s.name for s in (*x.deterministic_local, *x.locals)} for x in every)
    ]  # fmt: skip
    if not common or (site is not None and site not in common):
        raise DataError(
            where,
            needed="a local site that all posteriors have: "
            + (", ".join(common) or "there is none"),
            found="no name" if site is None else repr(site),
            do="Correct site, or plot posteriors of one program.",
        )
    return common[0] if site is None else site


def coordinate_values(
    posterior: TaskPosterior, site: str, coordinate: int, draws: int, seed: int
) -> tuple[Tensor, Tensor | None]:
    """Draws (draws, tasks) of one coordinate of a flattened site, and their log weights."""
    with torch.no_grad():
        values, weights = posterior.values(draws, seed)
    value = values[site].double().cpu()
    value = value.reshape(*value.shape[:2], -1)
    if not -value.shape[-1] <= coordinate < value.shape[-1]:
        raise DataError(
            site,
            needed=f"a coordinate from 0 to {value.shape[-1] - 1}",
            found=f"{coordinate}",
            do="Correct coordinate.",
        )
    return value[..., coordinate], None if weights is None else weights.cpu()


def coordinate_name(site: str, coordinate: int, posterior: TaskPosterior) -> str:
    """What a coordinate is called on an axis: by the model's own name for it, else its index."""
    sites = (*posterior.problem.sites.locals, *posterior.problem.sites.deterministic_local)
    size = next(math.prod(s.shape) for s in sites if s.name == site)
    named: dict[str, list[str]] = getattr(posterior.problem.program, "coordinates", dict)()
    names = named.get(site, [])
    if len(names) == size:
        return f"{site}[{names[coordinate]}]"
    return site if size == 1 else f"{site}[{coordinate}]"


def view_of(ranges: Sequence[View], keep: View | None = None) -> View:
    """Limits of an axis that show the bulk of several ranges, whichever of them runs away.

    The bulk is the range of the lower median width, and `keep`. Ranges that reach no further than
    the bulk's width beyond it are seen whole; of others, only a quarter of that width.

    Args:
        ranges: (lowest, highest) of what is drawn, such as one per strategy.
        keep: what must be seen, such as the data.
    """
    finite = sorted(
        (r for r in ranges if math.isfinite(r[0]) and math.isfinite(r[1])),
        key=lambda r: r[1] - r[0],
    )
    bulk = [finite[(len(finite) - 1) // 2]] if finite else []
    bulk += [] if keep is None else [keep]
    if not bulk:
        return 0.0, 1.0
    low, high = min(r[0] for r in bulk), max(r[1] for r in bulk)
    width = high - low
    least, most = low, high
    for start, stop in finite:
        # Points alone have no width to go by: all of them are seen.
        whole = width <= 0.0 or (low - width <= start and stop <= high + width)
        least = min(least, start if whole else max(start, low - 0.25 * width))
        most = max(most, stop if whole else min(stop, high + 0.25 * width))
    room = 0.05 * (most - least) or 0.05 * max(abs(most), 1e-6)
    return least - room, most + room


def draw_loss(axis: Axes, fitted: Fitted, width: int, colour: str) -> None:
    """The loss of each step, faint, and its running mean over `width` steps."""
    history = np.asarray(fitted.history, dtype=float)
    mean = np.convolve(history, np.full(width, 1.0 / width), mode="valid")
    steps = np.arange(1, len(history) + 1)
    axis.plot(steps, history, color=colour, lw=0.4, alpha=0.35, label="each step")
    # The mean stands at the last step that it looks at.
    axis.plot(steps[width - 1 :], mean, color=colour, lw=1.2, label=f"mean of {width} steps")
    # The first steps can lie far above all others; the axis shows what they come down to.
    settled = mean[len(mean) // 10 :]
    noise = 3 * float(np.std(history[len(history) // 2 :]))
    spread = max(float(np.ptp(settled)), noise, 1e-12)
    low = min(float(settled.min()), float(np.quantile(history, 0.01)))
    high = min(float(history.max()), float(settled.max()) + spread)
    axis.set_ylim(low - 0.1 * spread, high + 0.1 * spread)
