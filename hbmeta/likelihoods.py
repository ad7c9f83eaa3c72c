"""What torch and Pyro distributions of y can do, asked in one place.

A family here has batch shape (draws, rows) and event shape () or (k,). A method that a family
lacks raises `NotImplementedError` in torch; the questions below turn that into a bool.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import pyro
import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor
from torch.distributions import Categorical

__all__ = [
    "Components",
    "component_cdf",
    "component_log_prob",
    "dtype_of",
    "evaluating",
    "has_cdf",
    "has_inverse_cdf",
    "has_moments",
    "is_discrete",
    "largest_parameter",
    "not_finite",
    "ranks",
    "seeded",
    "unmasked",
]


class Components(Protocol):
    """The likelihoods p(y | φ_s, θ_s) of every draw s, evaluated when asked for."""

    @property
    def n_draws(self) -> int:
        """Number of draws."""

    def distribution(self, start: int, stop: int) -> Any:
        """The distribution of y with batch shape (stop − start, n) and event shape () or (k,).

        Rows in the order of `tasks.flat_x`; a torch or Pyro distribution.
        """


def unmasked(family: Any) -> Any:
    """The distribution under `.mask(...)`: a mask says what to learn from, not what to predict."""
    while isinstance(family, MaskedDistribution):
        family = family.base_dist
    return family


def _has(family: Any, *names: str) -> bool:
    """Whether the properties, or methods of one number, are there."""
    try:
        for name in names:
            found = getattr(family, name)
            if callable(found):
                found(torch.full((), 0.5, device=_device(family)))
    except NotImplementedError:
        return False
    return True


def has_moments(family: Any) -> bool:
    """Whether mean and variance are known; transformed distributions have none."""
    return _has(family, "mean", "variance")


def has_cdf(family: Any) -> bool:
    """Whether the distribution function of a number y is known."""
    return not (family.event_shape or is_discrete(family)) and _has(family, "cdf")


def has_inverse_cdf(family: Any) -> bool:
    """Whether the quantiles of a number y are known."""
    return has_cdf(family) and _has(family, "icdf")


def is_discrete(family: Any) -> bool:
    """Whether y has a probability rather than a density."""
    return bool(family.support.is_discrete)


def _parameters(family: Any) -> Iterator[tuple[str, Tensor]]:
    """The parameters that a distribution holds, and those of the one that it is built on."""
    for part in ("base_dist", "mixture_distribution", "component_distribution"):
        base = getattr(family, part, None)
        if base is not None:
            yield from _parameters(base)
    for name in family.arg_constraints:
        # Others, such as logits beside probs, are computed from these when asked for.
        value = family.__dict__.get(name)
        if isinstance(value, Tensor):
            yield name, value


def _device(family: Any) -> torch.device | None:
    return next((value.device for _, value in _parameters(family)), None)


def dtype_of(family: Any, otherwise: torch.dtype) -> torch.dtype:
    """The floating dtype of the parameters."""
    dtypes = (value.dtype for _, value in _parameters(family) if value.is_floating_point())
    return next(dtypes, otherwise)


def largest_parameter(family: Any) -> int:
    """Numbers in the largest parameter, or in one draw of y where that is larger."""
    draw = (family.batch_shape + family.event_shape).numel()
    return max([1, int(draw), *(value.numel() for _, value in _parameters(family))])


def not_finite(family: Any) -> tuple[str, Tensor] | None:
    """Name and places (draws, rows) of a parameter that is not finite; None where all are.

    A logit may be infinite, since a class may be impossible.
    """
    for name, value in _parameters(family):
        bad = value.isnan() if name == "logits" else ~value.isfinite()
        if bool(bad.any()):
            if bad.shape[:2] != family.batch_shape[:2]:
                return name, bad.any().expand(family.batch_shape[:2])
            return name, bad.flatten(2).any(-1) if bad.dim() > 2 else bad
    return None


def component_log_prob(family: Any, y: Tensor) -> Tensor:
    """(draws, rows) log density of y (rows, *event); −inf outside the support. float64."""
    inside = family.support.check(y)
    # The value outside does not matter, but it must be one that can be looked up.
    event = [1] * (y.dim() - 1)
    safe = torch.where(inside.reshape(*inside.shape, *event), y, torch.zeros_like(y))
    if isinstance(family, Categorical):
        safe = safe.long()
    log_prob: Tensor = family.log_prob(safe)
    return torch.where(inside, log_prob.double(), -torch.inf)


def component_cdf(family: Any, y: Tensor) -> Tensor:
    """(draws, rows) P(Y ≤ y) of numbers y (rows,); 0 below the support and 1 above. float64."""
    upper = getattr(family.support, "upper_bound", None)
    outside = torch.zeros_like(y) if upper is None else (y > upper).double()
    inside: Tensor = family.support.check(y)
    return torch.where(inside, family.cdf(y).double(), outside.double())


@contextlib.contextmanager
def evaluating() -> Iterator[None]:
    """No gradients, and no validation: a y outside the support has density 0, and is no error."""
    with torch.no_grad(), pyro.validation_enabled(False):
        yield


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A random state of its own; the caller's is as before afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def ranks(chosen: Tensor) -> Tensor:
    """How often each entry (n, tasks) occurred before in its column."""
    ordered, order = chosen.sort(stable=True, dim=0)
    place = torch.arange(len(chosen), device=chosen.device)[:, None].expand_as(ordered)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    begins = torch.where(new, place, 0).cummax(0).values
    return torch.empty_like(order).scatter_(0, order, place - begins)
