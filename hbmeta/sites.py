"""The sites of a program by level, and how φ and θ are laid out as vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Phi = dict[str, Tensor]
Theta = dict[str, Tensor]
Level = Literal["global", "local", "observed", "deterministic"]

__all__ = ["Level", "Phi", "Site", "Sites", "Theta"]


@dataclass(frozen=True)
class Site:
    """One site of a program.

    Attributes:
        level: where it stands in the three-level model.
        family: name of its distribution.
        shape: constrained shape; for local sites that of one task, for observed ones of one point.
        unconstrained_shape: shape of the latent after the transform of its support, likewise.
        real: True where the support is the whole space, so that transform and Jacobian vanish.
    """

    name: str
    level: Level
    family: str
    shape: tuple[int, ...]
    unconstrained_shape: tuple[int, ...]
    real: bool = False

    @property
    def size(self) -> int:
        """Number of unconstrained values, likewise."""
        return int(torch.Size(self.unconstrained_shape).numel())


@dataclass(frozen=True)
class Sites:
    """All sites of a program, by level, in the order in which they are drawn."""

    globals: tuple[Site, ...]
    locals: tuple[Site, ...]
    observed: tuple[Site, ...]
    deterministic_local: tuple[Site, ...] = ()
    deterministic_global: tuple[Site, ...] = ()
    response: str = ""

    @property
    def phi_size(self) -> int:
        """Dimension of φ_i in unconstrained space."""
        return sum(site.size for site in self.locals)

    @property
    def theta_size(self) -> int:
        """Dimension of the global sites in unconstrained space."""
        return sum(site.size for site in self.globals)

    def to_vector(self, phi: Mapping[str, Tensor]) -> Tensor:
        """Unconstrained φ by site, (..., tasks, *shape), as one vector (..., tasks, phi_size)."""
        parts = []
        for site in self.locals:
            value = phi[site.name]
            lead = value.shape[: value.ndim - len(site.unconstrained_shape)]
            parts.append(value.reshape(*lead, site.size))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def from_vector(self, vector: Tensor) -> Phi:
        """The inverse of `to_vector`."""
        return _split(vector, self.locals)

    def theta_to_vector(self, theta: Mapping[str, Tensor]) -> Tensor:
        """Unconstrained global sites (..., *shape) as one vector (..., theta_size)."""
        parts = []
        for site in self.globals:
            value = theta[site.name]
            lead = value.shape[: value.ndim - len(site.unconstrained_shape)]
            parts.append(value.reshape(*lead, site.size))
        return torch.cat(parts, -1)

    def theta_from_vector(self, vector: Tensor) -> Theta:
        """The inverse of `theta_to_vector`."""
        return _split(vector, self.globals)

    def describe(self) -> str:
        """A table of the sites, one line each."""
        rows = [("site", "level", "family", "shape")]
        for group in (
            self.globals,
            self.locals,
            self.deterministic_global,
            self.deterministic_local,
            self.observed,
        ):
            rows += [(s.name, s.level, s.family, str(tuple(s.shape))) for s in group]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def _split(vector: Tensor, sites: tuple[Site, ...]) -> dict[str, Tensor]:
    out, start = {}, 0
    for site in sites:
        part = vector[..., start : start + site.size]
        out[site.name] = part.reshape((*vector.shape[:-1], *site.unconstrained_shape))
        start += site.size
    return out
