"""What is fixed before the data at level 1, and the hyperposteriors that are paid for against it.

A meta-learner that hands out one θ̂ is a point mass, and a point mass has KL(𝒬‖𝒫) = ∞ against any
density: softening the posterior within tasks alone does not help. Two ways to a finite K_H:

    Gaussian   𝒫 = N(θ_0, κ_P² I_D), 𝒬 = N(θ̂, κ_Q² I_D),
               K_H = ½ [D κ_Q²/κ_P² + ‖θ̂ − θ_0‖²/κ_P² − D + 2D log(κ_P/κ_Q)];
    finite     𝒫 uniform over k fits that were made before the data, 𝒬 any weights, K_H ≤ log k.

A bound holds for all 𝒬 at once: θ̂, κ_Q and the weights may be chosen after the data, for nothing.
It holds for one 𝒫: several κ_P cost δ/J each.

θ_0 is where training started, before any data, or what other tasks taught (a fit on tasks that are
disjoint from those of the certificate): the latter makes ‖θ̂ − θ_0‖ small and is a theorem all the
same, because 𝒫 is independent of the tasks that are certified on.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.fitted import Fitted

__all__ = ["FiniteHyperprior", "GaussianHyperprior", "Softened", "soften"]


@dataclass(frozen=True)
class GaussianHyperprior:
    """𝒫 = N(θ_0, κ_P² I) over parameters of level 1, fixed before the data.

    Coordinates are those of training: parameters of networks as they are, global sites
    unconstrained. Only `parameters` are random; the others must be at θ̂ what they are at θ_0.

    Args:
        scale: κ_P; several are tried and cost δ/J each.
        posterior_scale: κ_Q; several are tried on draws of their own, which costs nothing.
        centre: θ_0: a fit on other tasks, or tensors by name; None for where training started.
        parameters: names of what is random, such as those of the last layer; None for all.
    """

    scale: float | Sequence[float]
    posterior_scale: float | Sequence[float]
    centre: Fitted | Mapping[str, Tensor] | None = None
    parameters: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in ("scale", "posterior_scale"):
            value = getattr(self, name)
            values = _several(value)
            if not values or not all(0.0 < v < math.inf for v in values):
                raise DataError(
                    "GaussianHyperprior",
                    needed=f"{name} above 0 and finite (a point mass has an infinite KL)",
                    found=repr(value),
                    do="Pass standard deviations, such as scale=1.0 and posterior_scale=0.1.",
                )

    @property
    def scales(self) -> tuple[float, ...]:
        """The κ_P that share δ."""
        return _several(self.scale)

    @property
    def posterior_scales(self) -> tuple[float, ...]:
        """The κ_Q that are tried."""
        return _several(self.posterior_scale)


def _several(value: float | Sequence[float]) -> tuple[float, ...]:
    return (float(value),) if isinstance(value, int | float) else tuple(float(v) for v in value)


@dataclass(frozen=True)
class FiniteHyperprior:
    """𝒫 uniform over fits that were made before the data: of other tasks, or of none.

    Args:
        fits: two or more, of one kind of task.
    """

    fits: Sequence[Fitted]

    def __post_init__(self) -> None:
        fits = tuple(self.fits)
        if len(fits) < 2 or not all(isinstance(one, Fitted) for one in fits):
            raise DataError(
                "FiniteHyperprior",
                needed="two fits or more",
                found=f"{len(fits)} of {sorted({type(one).__name__ for one in fits})}",
                do="Fit the candidates on tasks that are not certified on.",
            )
        object.__setattr__(self, "fits", fits)

    @property
    def prior_weights(self) -> list[float]:
        """1/k each."""
        return [1.0 / len(self.fits)] * len(self.fits)


@dataclass(frozen=True, eq=False)
class Softened:
    """A fit and the directions in which its θ is random.

    Attributes:
        fitted: the fit, at θ̂.
        values: what is random, at θ̂, by name; of what a strategy learned besides θ, "own/…".
        distance: ‖θ̂ − θ_0‖ over these.
    """

    fitted: Fitted
    values: Mapping[str, Tensor]
    distance: float

    @property
    def dimension(self) -> int:
        """D, the number of hyperparameters."""
        return sum(value.numel() for value in self.values.values())

    def draw(self, sd: float, generator: torch.Generator) -> Fitted:
        """The fit at one θ ~ N(θ̂, sd² I)."""
        moved = {
            name: value
            + sd * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
            for name, value in self.values.items()
        }
        theta = {name: moved.get(name, value) for name, value in self.fitted.theta.items()}
        own = self.fitted.own
        if own is not None:
            own = copy.deepcopy(own)
            with torch.no_grad():
                for name, parameter in own.named_parameters():
                    parameter.copy_(moved.get(f"own/{name}", parameter))
        return dataclasses.replace(self.fitted, theta=theta, own=own, density=None, _cache={})


def soften(fitted: Fitted, hyperprior: GaussianHyperprior, where: str) -> Softened:
    """The fit with what the hyperprior says is random.

    Raises:
        UnsupportedModelError: θ is draws, so that no density is known; or where training started
            is not known to be free of the data.
        DataError: unknown names; a centre of other shapes; θ̂ differs from θ_0 where it is fixed.
    """
    if fitted.drawn:
        raise UnsupportedModelError(
            where,
            needed="θ at a point, around which a Gaussian hyperposterior can stand",
            found=f"draws of {fitted.strategy.name}, each a point mass with an infinite KL",
            do='Use bound="meta_test" on fresh tasks, or a FiniteHyperprior.',
        )
    at = _level_one(fitted)
    centre = _centre(fitted, hyperprior, at, where)
    names = list(at) if hyperprior.parameters is None else list(hyperprior.parameters)
    unknown = [name for name in names if name not in at]
    if unknown or not names:
        raise DataError(
            where,
            needed=f"parameters among {', '.join(at) or 'none: nothing was learned'}",
            found=repr(unknown[0]) if unknown else "none",
            do="Use bound='meta_test' where nothing is learned." if not at else "Name some.",
        )
    for name, value in at.items():
        if name not in centre or centre[name].shape != value.shape:
            raise DataError(
                where,
                needed=f"a centre with {name!r} of shape {tuple(value.shape)}",
                found="none" if name not in centre else f"shape {tuple(centre[name].shape)}",
                do="Take the centre from a fit of the same program and strategy.",
            )
        if name not in names and not torch.equal(value, centre[name].to(value)):
            raise DataError(
                where,
                needed=f"{name!r} at θ̂ as it is in the centre, because it is not softened",
                found="another value: it was learned, and a point mass has an infinite KL",
                do="Add it to parameters, or keep it fixed in training.",
            )
    squares = [(at[n].double() - centre[n].to(at[n]).double()).square().sum() for n in names]
    return Softened(fitted, {n: at[n] for n in names}, float(torch.stack(squares).sum().sqrt()))


def _level_one(fitted: Fitted) -> dict[str, Tensor]:
    """θ̂ and what the strategy learned besides, by name."""
    own = {} if fitted.own is None else dict(fitted.own.named_parameters())
    return {
        **{name: value.detach() for name, value in fitted.theta.items()},
        **{f"own/{name}": value.detach() for name, value in own.items()},
    }


def _centre(
    fitted: Fitted, hyperprior: GaussianHyperprior, at: Mapping[str, Tensor], where: str
) -> Mapping[str, Tensor]:
    if isinstance(hyperprior.centre, Fitted):
        return _level_one(hyperprior.centre)
    if hyperprior.centre is not None:
        return hyperprior.centre
    start = {name: parameter.detach() for name, parameter in fitted.problem.parameters()}
    missing = [name for name in at if name not in start]
    if missing:
        # The location of p(θ) may be a function of the data that the model was bound to.
        raise UnsupportedModelError(
            where,
            needed="a centre that is known to be fixed before the data",
            found=f"{missing[0]!r}, whose start may depend on the tasks that were fitted",
            do="Pass centre= a fit on other tasks, or tensors by name.",
        )
    if all(torch.equal(start[name].to(at[name]), at[name]) for name in at):
        raise UnsupportedModelError(
            where,
            needed="the values at which training started",
            found="the values at which it ended (a fit that was read from a file has no others)",
            do="Pass centre= the start as tensors by name, or a fit on other tasks.",
        )
    return start
