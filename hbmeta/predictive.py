"""The posterior predictive of a batch of tasks, shaped as y and in the units of the data.

p(y | x, S) = Σ_s w_s p(y | x, φ_s, θ_s)        per row, Σ_s w_s = 1 within each task
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Normal, OneHotCategorical

from hbmeta.errors import ConvergenceError, DataError, UnsupportedModelError
from hbmeta.likelihoods import Components, is_discrete
from hbmeta.mixtures import Mixture
from hbmeta.scores import crps_draws, crps_normal
from hbmeta.tasks import Tasks

__all__ = ["Components", "Predictive"]


class Predictive:
    """Posterior predictive of every row: moments, quantiles, draws, densities and scores.

    A row is one point of one task. Results per row are padded to (tasks, points, ...), where a
    padding cell repeats a real row (`tasks.mask` tells them apart), or flat (n, ...) in the order
    of `tasks.flat_x`. They come back in float64, draws in the dtype of the model.

    Exact given the draws of (φ, θ): `mean`, `variance`, `log_prob`, `probabilities`; and `cdf`,
    `quantile`, `interval` of families with a distribution function (Normal, Gamma, Laplace, ...).
    All else (Student-t, Poisson, Binomial, vectors, ...) is read off at least 4,000 draws of y,
    the same for the same seed: P(Y ≤ y) has a standard error of at most
    sqrt(p (1 − p) / 4,000), 0.0034 at 0.05 and at 0.95; with weights, 4,000 becomes their effective
    number. So do the moments of a transformed distribution, which torch does not know.

    A Student-t with df ≤ 2 has variance inf and one with df ≤ 1 mean and variance NaN; one such
    draw is enough for the mixture. Quantiles are fine.

    Args:
        components: one likelihood per draw and row.
        tasks: the rows to predict; only x and the layout are read.
        log_weights: (draws, tasks), normalised here within each task; None weighs all alike.
        row_log_weights: (draws, rows) how well a draw explains what else is known of a row (its x,
            in a model of x); weighs the draws of each row on top of `log_weights`.
        joint: log p(y_i | x_i, S_i) of all rows of each task together, (tasks,), where it is known
            in closed form; takes the flat y (n,) in the units and the dtype of the model.
        joint_sample: (number, seed) to draws (number, n) from that joint density; without it the
            rows of a component are drawn independently.
        location: y = location + scale · (y of the model), undoes a standardised y.
        scale: see location; positive, in the units of y.
        seed: of every draw, unless a method is given its own.
        padded: False returns flat rows.
    Raises:
        DataError: a wrong shape of the weights, or a scale that is not positive.
        ConvergenceError: weights, parameters or densities that are not finite; names the task.
        ProgramError: a likelihood whose batch shape is not (draws, rows).
    """

    def __init__(
        self,
        components: Components,
        tasks: Tasks,
        *,
        log_weights: Tensor | None = None,
        row_log_weights: Tensor | None = None,
        joint: Callable[[Tensor], Tensor] | None = None,
        joint_sample: Callable[[int, int], Tensor] | None = None,
        location: float = 0.0,
        scale: float = 1.0,
        seed: int = 0,
        padded: bool = True,
    ) -> None:
        if not (math.isfinite(location) and math.isfinite(scale) and scale > 0.0):
            raise DataError(
                "Predictive",
                needed="a finite location and a positive scale",
                found=f"location {location}, scale {scale}",
                do="Pass the mean and the standard deviation that y was standardised with.",
            )
        self.tasks, self.seed, self.padded = tasks, seed, padded
        self.location, self.scale = float(location), float(scale)
        by_row = None
        if row_log_weights is not None:
            given = row_log_weights.double()
            whole = given.new_zeros(len(given), tasks.n_tasks).index_add(1, tasks.task, given)
            if log_weights is not None:
                given = given + log_weights.double()[:, tasks.task]
                whole = whole + log_weights.double()
            by_row, log_weights = torch.log_softmax(given, 0), whole
        if log_weights is not None:
            log_weights = _normalised(log_weights, components.n_draws, tasks)
        self._joint, self._joint_sample = joint, joint_sample
        self._mixture = Mixture(components, tasks, log_weights, by_row)

    @property
    def n_draws(self) -> int:
        """Number of components S of the mixture."""
        return self._mixture.n_draws

    def __repr__(self) -> str:
        return (
            f"Predictive({self.tasks.n_tasks} tasks, {self.tasks.n_points} points, "
            f"{self.n_draws} draws)"
        )

    # What y may be

    @property
    def mean(self) -> Tensor:
        """E[y], shaped as y.

        Raises:
            UnsupportedModelError: y is a class label.
        """
        self._refuse_labels("mean")
        return self._shaped(self.location + self.scale * self._mixture.moments[0])

    @property
    def variance(self) -> Tensor:
        """Var[y], shaped as y: the mean of the variances plus the variance of the means.

        Raises:
            UnsupportedModelError: y is a class label.
        """
        self._refuse_labels("variance")
        return self._shaped(self.scale**2 * self._mixture.moments[1])

    @property
    def sd(self) -> Tensor:
        """Standard deviation of y, shaped as y."""
        return self.variance.sqrt()

    @property
    def probabilities(self) -> Tensor:
        """(..., k) probability of each class; (..., 2), of 0 and of 1, for a Bernoulli response.

        Raises:
            UnsupportedModelError: y is no class.
        """
        if self.tasks.n_points == 0:
            return self._shaped(self._mixture.per_row(0.0)[..., None])
        family = self._mixture.first
        if not isinstance(family, Bernoulli | Categorical | OneHotCategorical):
            raise UnsupportedModelError(
                "Predictive.probabilities",
                needed="a Bernoulli, Categorical or OneHotCategorical response",
                found=f"{type(family).__name__}",
                do="Use mean, interval or log_prob.",
            )
        found = self._mixture.average("probs")
        if isinstance(family, Bernoulli):
            found = torch.stack([1.0 - found, found], -1)
        return self._shaped(found)

    @property
    def labels(self) -> Tensor:
        """Most probable class of every row, int64, shaped as y; the lowest of equal ones.

        A OneHotCategorical response has one label per vector.

        Raises:
            UnsupportedModelError: y is no class.
        """
        return self.probabilities.argmax(-1)

    def quantile(self, p: float | Sequence[float]) -> Tensor:
        """Quantiles: y with P(Y ≤ y) = p; for whole numbers the smallest with P(Y ≤ y) ≥ p.

        Args:
            p: one level or several, between 0 and 1.
        Returns:
            Shaped as y for one level, (levels, *shape of y) for several. For vectors, the quantiles
            of each coordinate.
        Raises:
            UnsupportedModelError: y is a class label.
        """
        levels = [float(level) for level in p] if isinstance(p, Sequence) else [float(p)]
        found = self._shaped(self._quantiles(levels), dim=1)
        return found if isinstance(p, Sequence) else found[0]

    def interval(self, p: float) -> tuple[Tensor, Tensor]:
        """Lower and upper end, shaped as y, of the central interval of probability p.

        The quantiles (1 − p)/2 and (1 + p)/2. For whole numbers it covers at least p.
        """
        lower, upper = self.quantile(_ends(p))
        return lower, upper

    def _quantiles(self, levels: Sequence[float]) -> Tensor:
        """(levels, n, *event) in the units of y."""
        self._refuse_labels("quantiles")
        for level in levels:
            if not 0.0 < level < 1.0:
                raise DataError(
                    "Predictive.quantile",
                    needed="levels between 0 and 1",
                    found=f"{level}",
                    do="Pass 0.9, not 90.",
                )
        return self._in_units(self._mixture.quantiles(levels, self.seed))

    def sample(self, n: int, seed: int | None = None) -> Tensor:
        """Draws of y, joint over the rows of a task: they share the draw of (φ, θ).

        With equal weights the tasks share it too, and no component is used again before all were
        used; with weights each task draws its own.

        Args:
            n: number of draws.
            seed: the seed of the predictive by default.
        Returns:
            (n, *shape of y), in the units of y; int64 for class labels.
        """
        if not isinstance(n, int) or n < 1:
            raise DataError(
                "Predictive.sample", needed="n of 1 or more", found=f"{n!r}", do="Pass n=1000."
            )
        seed = self.seed if seed is None else seed
        if self._joint_sample is None or self.tasks.n_points == 0:
            draws = self._mixture.sample(n, seed)
        else:
            draws = self._joint_sample(n, seed)
        return self._shaped(self._in_units(draws), dim=1)

    # How well a given y fits

    def log_prob(self, y: Any, *, joint: bool = False) -> Tensor:
        """Log density of y in the units of y (log probability of labels and whole numbers).

        −inf where no component can produce y.

        Args:
            y: (tasks, points, ...) or flat (n, ...); what stands in padding cells is ignored.
            joint: one density per task, log Σ_s w_s Π_r p(y_r | s), the sum over draws outside the
                product over rows. (tasks,), 0 for a task without rows.
        Returns:
            (tasks, points) or (n,) per row, or (tasks,). Padding cells repeat a row, so sum over
            `tasks.mask`.
        """
        rows = self._model_y(y)
        # y = a + b z has log p(y) = log p(z) − log b for each of its numbers, unless y is counted.
        volume = 0.0
        if self.tasks.n_points and not is_discrete(self._mixture.first):
            volume = math.log(self.scale) * math.prod(self._mixture.event)
        if not joint:
            return self._shaped(self._mixture.log_prob(rows) - volume)
        if self._joint is None or self.tasks.n_points == 0:
            found = self._mixture.joint_log_prob(rows)
        else:
            with torch.no_grad():
                found = self._joint(rows).double()
        return found - volume * self.tasks.counts.double()

    def cdf(self, y: Any) -> Tensor:
        """P(Y ≤ y) per row, shaped as y; uniform over rows where predictions are calibrated.

        Args:
            y: (tasks, points, ...) or flat (n, ...).
        Raises:
            UnsupportedModelError: y is a class label.
        """
        self._refuse_labels("distribution function")
        return self._shaped(self._mixture.cdf(self._model_y(y), self.seed))

    def crps(self, y: Any) -> Tensor:
        """Continuous ranked probability score per row, in the units of y; lower is better.

        Closed form where there is one Normal component, else the fair form over draws
        (`scores.crps_draws`). For vectors, of each coordinate.

        Args:
            y: (tasks, points, ...) or flat (n, ...).
        Raises:
            UnsupportedModelError: y is a class label.
        """
        self._refuse_labels("score of a number")
        rows, mixture = self._model_y(y), self._mixture
        found = mixture.per_row(0.0)
        if self.n_draws == 1 and self.tasks.n_points and isinstance(mixture.first, Normal):
            found = crps_normal(mixture.first.loc[0], mixture.first.scale[0], rows).detach()
        else:
            for block, draws, log_weights in mixture.draws(self.seed):
                weights = log_weights if mixture.weighted else None
                found[block] = crps_draws(draws, rows[block], weights)
        return self._shaped(self.scale * found)

    def coverage(self, y: Any, p: float) -> Tensor:
        """Whether y lies in the central interval of probability p, ends included; bool per number.

        Args:
            y: (tasks, points, ...) or flat (n, ...).
            p: probability of the interval.
        """
        rows = self._rows(y)
        lower, upper = self._quantiles(_ends(p))
        return self._shaped((lower <= rows) & (rows <= upper))

    # Shapes and units

    def _rows(self, y: Any) -> Tensor:
        """y as flat rows (n, *event), in its own units and dtype."""
        values = torch.as_tensor(y, device=self.tasks.device)
        event = self._mixture.event
        flat = (self.tasks.n_points, *event)
        cells = (self.tasks.n_tasks, self.tasks.max_points, *event)
        if tuple(values.shape) == cells:
            values = self.tasks.unpad(values)
        elif tuple(values.shape) != flat:
            raise DataError(
                "Predictive",
                needed=f"y of shape {cells}, padded, or {flat}, flat",
                found=f"shape {tuple(values.shape)}",
                do="Pass the y of the tasks that were predicted.",
            )
        if not bool(values.isfinite().all()):
            bad = ~values.isfinite().reshape(self.tasks.n_points, -1).all(-1)
            raise DataError(
                "Predictive",
                needed="finite y",
                found=f"NaN or an infinite value for {self._mixture.task_of(bad)}",
                do="Drop those rows from the tasks first.",
            )
        return values.detach()

    def _model_y(self, y: Any) -> Tensor:
        """y as flat rows in the units and the dtype of the model."""
        rows = self._rows(y)
        if self._labels:
            return rows
        return ((rows.double() - self.location) / self.scale).to(self._mixture.dtype)

    def _in_units(self, values: Tensor) -> Tensor:
        """Values of the model in the units of y; labels, which have none, stay."""
        return self.location + self.scale * values if values.is_floating_point() else values

    def _shaped(self, values: Tensor, *, dim: int = 0) -> Tensor:
        return self.tasks.pad(values, dim=dim) if self.padded else values

    @property
    def _labels(self) -> bool:
        return self.tasks.n_points > 0 and isinstance(self._mixture.first, Categorical)

    def _refuse_labels(self, what: str) -> None:
        if self._labels:
            raise UnsupportedModelError(
                f"Predictive ({what})",
                needed="a response of numbers",
                found="class labels (Categorical), which have no order",
                do="Use probabilities or log_prob.",
            )


def _ends(p: float) -> list[float]:
    if not 0.0 < p < 1.0:
        raise DataError(
            "Predictive.interval",
            needed="a probability between 0 and 1",
            found=f"{p}",
            do="Pass 0.9, not 90.",
        )
    return [0.5 - 0.5 * p, 0.5 + 0.5 * p]


def _normalised(log_weights: Tensor, n_draws: int, tasks: Tasks) -> Tensor:
    """Log weights (draws, tasks) that sum to 1 within each task, checked."""
    shape = (n_draws, tasks.n_tasks)
    if tuple(log_weights.shape) != shape:
        raise DataError(
            "Predictive",
            needed=f"log_weights of shape (draws, tasks) = {shape}",
            found=f"shape {tuple(log_weights.shape)}",
            do="Pass one column per task, or None.",
        )
    normalised = torch.log_softmax(log_weights.detach().double(), 0)
    bad = normalised.isnan().any(0)  # comes of NaN, +inf, or a column of -inf
    if bool(bad.any()):
        raise ConvergenceError(
            "Predictive",
            needed="log weights below +inf, at least one of them finite",
            found=f"others for task {tasks.ids[int(bad.nonzero()[0, 0])]!r}",
            do="Draw θ from a distribution that covers this task.",
        )
    return normalised
