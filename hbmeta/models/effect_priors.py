"""Weakly informative priors of regression coefficients, scaled from the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor

from hbmeta.errors import DataError
from hbmeta.models.columns import INTERCEPT
from hbmeta.tasks import Tasks

__all__ = ["FAMILIES", "Family", "Priors", "Scales", "scales_of"]

Family = Literal["gaussian", "student_t", "bernoulli", "poisson", "binomial"]
FAMILIES: tuple[Family, ...] = get_args(Family)
_MEASURED: tuple[Family, ...] = ("gaussian", "student_t")  # y in units of its own


@dataclass(frozen=True)
class Priors:
    """Priors of `VaryingEffects`; a number holds for all columns, None is scaled from the data.

    The scaled ones are those of rstanarm and Bambi, for columns that are not centred. Let m_c and
    s_c be mean and standard deviation of column c over all rows (n in the denominator), and s_y
    that of y for "gaussian" and "student_t", 1 for the families with a logit or log link:

        coefficient of c       N(0, b_c²)  with b_c = 2.5 s_y / s_c
        intercept              N(a, (2.5 s_y)² + Σ_c (b_c m_c)²)
                               a = mean of y ("gaussian", "student_t"), 0 (logit),
                               log((Σ y + ½) / Σ exposure) ("poisson")
        scale of an effect     HalfNormal(2.5 s_y / s_c) of column c, HalfNormal(2.5 s_y) of the
                               intercept
        noise                  HalfNormal(s_y)

    The sum in the intercept's variance makes the prior at the mean of the columns N(a, (2.5 s_y)²).
    The coefficients of `varying` have these priors for their means.

    Args:
        intercept_location: mean of the intercept's prior, on the scale of η.
        intercept_scale: standard deviation of the intercept's prior.
        coefficient_scale: standard deviation b of every coefficient's prior.
        effect_scale: scale of the half-normal prior of every effect's standard deviation.
        noise_scale: scale of the half-normal prior of the noise.
    Raises:
        DataError: a scale that is not positive, a location that is not finite.
    References:
        Capretto et al. (2022), Bambi, Journal of Statistical Software 103(15), section 3.
    """

    intercept_location: float | None = None
    intercept_scale: float | None = None
    coefficient_scale: float | None = None
    effect_scale: float | None = None
    noise_scale: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            lowest = float("-inf") if field.name == "intercept_location" else 0.0
            if value is not None and not lowest < value < float("inf"):
                kind = "finite" if field.name == "intercept_location" else "positive"
                raise DataError(
                    "Priors",
                    needed=f"{field.name} as a {kind} number, or None",
                    found=f"{value!r}",
                    do="Leave it out to have it scaled from the data.",
                )


@dataclass(frozen=True)
class Scales:
    """The numbers of all priors, in the order of the columns; see `Priors`.

    Args:
        mean_location: (k,) means of the priors of the varying coefficients' means.
        mean_scale: (k,) their standard deviations.
        effect_scale: (k,) scales of the half-normal priors of the effects' standard deviations.
        fixed_location: (f,) means of the priors of the fixed coefficients.
        fixed_scale: (f,) their standard deviations.
        noise_scale: scale of the half-normal prior of the noise; None without noise.
    """

    mean_location: list[float]
    mean_scale: list[float]
    effect_scale: list[float]
    fixed_location: list[float]
    fixed_scale: list[float]
    noise_scale: float | None


def scales_of(
    priors: Priors,
    tasks: Tasks,
    family: Family,
    fixed: Sequence[str],
    varying: Sequence[str],
    *,
    offset: str | None = None,
) -> Scales:
    """The numbers of the priors for given data.

    Raises:
        DataError: a column, or y, has no spread and a prior needs it.
    """
    y = _response(tasks)
    measured = family in _MEASURED

    def scale_of_y() -> float:
        return _spread(y, "y") if measured else 1.0

    def slope(name: str, given: float | None, argument: str) -> float:
        if given is not None:
            return given
        return 2.5 * scale_of_y() / _spread(_column(tasks, name), f"column {name!r}", argument)

    coefficient = {
        name: slope(name, priors.coefficient_scale, "coefficient_scale")
        for name in (*fixed, *varying)
        if name != INTERCEPT
    }

    def intercept() -> tuple[float, float]:
        location, scale = priors.intercept_location, priors.intercept_scale
        if location is None:
            location = _intercept_location(tasks, y, family, offset)
        if scale is None:
            variance = (2.5 * scale_of_y()) ** 2
            for name, b in coefficient.items():
                variance += (b * float(_column(tasks, name).mean())) ** 2
            scale = variance**0.5
        return location, scale

    def effect(name: str) -> float:
        if priors.effect_scale is None and name == INTERCEPT:
            return 2.5 * scale_of_y()
        return slope(name, priors.effect_scale, "effect_scale")

    def normal(names: Sequence[str]) -> tuple[list[float], list[float]]:
        pairs = [intercept() if n == INTERCEPT else (0.0, coefficient[n]) for n in names]
        return [location for location, _ in pairs], [scale for _, scale in pairs]

    noise = None
    if measured:
        noise = priors.noise_scale if priors.noise_scale is not None else scale_of_y()
    mean, shared = normal(varying), normal(fixed)
    return Scales(mean[0], mean[1], [effect(name) for name in varying], shared[0], shared[1], noise)


def _intercept_location(tasks: Tasks, y: Tensor, family: Family, offset: str | None) -> float:
    if family in _MEASURED:
        return float(y.mean())
    if family != "poisson":
        return 0.0
    # The half keeps counts that are all zero finite.
    exposure = torch.zeros_like(y) if offset is None else _column(tasks, offset)
    return float((y.sum() + 0.5).log() - exposure.logsumexp(0))


def _response(tasks: Tasks) -> Tensor:
    assert tasks.flat_y is not None  # check_response ran before
    return tasks.flat_y.detach().double()


def _column(tasks: Tasks, name: str) -> Tensor:
    return tasks.flat_x[:, tasks.features.index(name)].double()


def _spread(values: Tensor, what: str, argument: str | None = None) -> float:
    """The standard deviation of numbers that are not all equal."""
    if bool((values == values[0]).all()):
        if argument is None:
            remedy = "Check y, or pass Priors(...) with numbers for all scales"
        else:
            remedy = (
                f"Drop the column ('intercept' is the constant), or pass Priors({argument}=...)"
            )
        raise DataError(
            "VaryingEffects.bind",
            needed=f"{what} with different values, to scale a prior from its standard deviation",
            found=f"{float(values[0])!r} in all {len(values)} rows",
            do=f"{remedy}.",
        )
    return float(values.std(correction=0))
