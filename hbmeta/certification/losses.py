"""Losses in [0, 1], the only ones that a certificate can be about, each with its constant.

    zero-one            1[label ≠ y], the most probable class against the label
    clipped-nll         min(−log p(y), log(1/p_min)) / log(1/p_min), for probabilities of classes
    truncated-squared   min((ŷ − y)² / scale², 1), ŷ the predicted mean, y a number

The constants p_min and scale are part of the loss, and so of what is claimed: they are given before
the data are seen. A loss without a bound (a squared error, a log density) has no certificate, since
one point that was not in the sample can make its expectation as large as one likes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from hbmeta.bounded_loss import has_classes
from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.predictive import Predictive
from hbmeta.problem import Problem

__all__ = ["LOSSES", "Loss", "loss_of"]

LOSSES = ("zero-one", "clipped-nll", "truncated-squared")


@dataclass(frozen=True)
class Loss:
    """A loss in [0, 1].

    Attributes:
        name: one of `LOSSES`.
        constant: p_min of the clipped log loss, the scale of the truncated squared error in the
            units of y; None for the 0-1 loss.
    """

    name: str
    constant: float | None = None

    def __str__(self) -> str:
        if self.constant is None:
            return "0-1 loss"
        if self.name == "clipped-nll":
            unit = f"log(1/{self.constant:g}) = {math.log(1.0 / self.constant):.3g}"
            return f"min(-log p(y), {unit}) / {unit.split(' = ')[1]}"
        return f"min((error / {self.constant:g})², 1)"

    def of(self, predictive: Predictive, y: Tensor) -> Tensor:
        """(rows,) float64 losses of a prediction.

        Args:
            predictive: of the rows that y belongs to.
            y: flat, in the units of the data.
        """
        tasks = predictive.tasks
        if self.name == "zero-one":
            return self.of_labels(tasks.unpad(predictive.labels), y)
        if self.name == "clipped-nll":
            return self.of_log_probabilities(tasks.unpad(predictive.log_prob(y)))
        return self.of_means(tasks.unpad(predictive.mean), y)

    def of_labels(self, labels: Tensor, y: Tensor) -> Tensor:
        """0 where the label is right."""
        return (labels != y.to(labels.dtype)).double()

    def of_log_probabilities(self, log_p: Tensor) -> Tensor:
        """0 at probability 1, and 1 at p_min or less."""
        assert self.constant is not None
        worst = math.log(1.0 / self.constant)
        return (-log_p.double()).clamp(0.0, worst) / worst

    def of_means(self, mean: Tensor, y: Tensor) -> Tensor:
        """1 from an error of the scale on."""
        assert self.constant is not None
        squared = ((mean.double() - y.double()) / self.constant).square()
        return squared.clamp(max=1.0)


def loss_of(
    problem: Problem, name: str | None, *, p_min: float | None, scale: float | None, where: str
) -> Loss:
    """The loss by its name; that of classes by default.

    Raises:
        DataError: a name or a constant that makes no loss in [0, 1], or none for a regression.
        UnsupportedModelError: a loss of classes for a regression, or the reverse.
    """
    classes = has_classes(problem)
    if name is None and not classes:
        raise DataError(
            where,
            needed='loss="truncated-squared" with a scale that was fixed before the data',
            found="none: a regression has no loss with a natural bound",
            do="Pass for example scale=2.0, the error in units of y from which all are alike.",
        )
    name = "zero-one" if name is None else name
    if name not in LOSSES:
        raise DataError(
            where,
            needed=f"a loss in [0, 1], one of {', '.join(LOSSES)}",
            found=repr(name),
            do="A loss without a bound has no certificate: clip or truncate it before the data.",
        )
    if classes == (name == "truncated-squared"):
        raise UnsupportedModelError(
            where,
            needed="a loss of classes" if classes else "a loss of numbers (truncated-squared)",
            found=f"{name} for the response of {problem.name}",
            do="The log loss of a density has no bound from below; squared errors can be cut off."
            if not classes
            else "Use zero-one or clipped-nll.",
        )
    if name == "zero-one":
        return Loss(name)
    what, constant, top = (
        ("p_min", p_min, 1.0) if name == "clipped-nll" else ("scale", scale, math.inf)
    )
    if not isinstance(constant, int | float) or not 0.0 < constant < top:
        raise DataError(
            where,
            needed=f"{what} between 0 and {top:g}, fixed before the data",
            found=repr(constant),
            do=f"Pass {what}={'1e-4' if what == 'p_min' else '2.0, in the units of y'}.",
        )
    return Loss(name, float(constant))
