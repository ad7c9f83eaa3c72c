"""A Gaussian over θ and all φ_i at once, with the structure of the three levels.

    q(θ) = N(m, L Lᵀ),    q(φ_i | θ) = N(a_i + B_i L⁻¹(θ − m), R_i R_iᵀ)

Tasks are independent given θ, as they are in the posterior, so that T tasks cost T blocks and no
(T · d)² covariance. It holds every joint Gaussian of that structure, the posterior of a
linear-Gaussian program among them. With θ = m + L ε_0 and φ_i = a_i + B_i ε_0 + R_i ε_i,

    ELBO = E[Σ_i {log p(S_i | φ_i, θ) + log p(φ_i | θ) − log q(φ_i | θ)} + log p(θ) − log q(θ)].

All numbers are in units: θ of its prior's scale, φ of its frame. Module parameters have no prior;
they stay a point.

Of more than 64 global values q(θ) has independent entries, and B_i holds those of the short sites
alone (`linear_entries`): 1,128 effects of which a task sees 25 are 1,128 numbers per task that a
gradient fills with noise.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hbmeta.densities import Gaussian
from hbmeta.families import Diagonal, Family, Frame, FullRank
from hbmeta.movement import Moving
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.sites import Sites
from hbmeta.variational.noise import matched_noise

__all__ = ["FULL_AT_MOST", "GLOBAL", "JointGuide", "linear_entries"]

FULL_AT_MOST = 64
"""Global values up to which q(θ) has a full covariance."""
GLOBAL = "q(theta)"
"""The name of q(θ)'s own numbers among what tasks share."""


def linear_entries(sites: Sites) -> Tensor:
    """Positions in θ of what φ is linear in: all, or the shortest sites with 64 values in all."""
    starts = [0]
    for site in sites.globals:
        starts.append(starts[-1] + site.size)
    found: list[int] = []
    for number in sorted(range(len(sites.globals)), key=lambda k: sites.globals[k].size):
        if len(found) + sites.globals[number].size <= FULL_AT_MOST:
            found += range(starts[number], starts[number + 1])
    return torch.tensor(sorted(found), dtype=torch.int64)


class JointGuide:
    """The ELBO of θ and all φ_i.

    Args:
        problem: the program.
        family: of q(φ_i | θ), Diagonal or FullRank.
        centre: location and scale (1, theta_size) of the global sites, in which q(θ) has no units.
        full: whether q(θ) has a full covariance, or independent entries.
        draws: of one estimate.
        moving: turns the point parameters among what moves into θ.
    """

    def __init__(
        self,
        problem: Problem,
        family: Family,
        centre: Gaussian,
        *,
        full: bool,
        draws: int,
        moving: Moving,
    ) -> None:
        self.problem, self.family, self.draws, self.moving = problem, family, draws, moving
        self.centre = centre if not full else Gaussian(centre.loc, torch.diag_embed(centre.scale))
        self.size = problem.sites.theta_size
        self.outer: Family = FullRank(self.size) if full else Diagonal(self.size)
        self.entries = linear_entries(problem.sites).to(centre.loc.device)

    @property
    def row_size(self) -> int:
        """Those of the family, and B (phi_size, entries)."""
        return self.family.parameters + self.family.size * len(self.entries)

    def start(self, frame: Frame, seed: int) -> Tensor:
        """(tasks, row_size): φ from its frame, independent of θ."""
        own = self.family.start(frame, seed)
        slope = own.new_zeros(own.shape[0], self.family.size * len(self.entries))
        return torch.cat([own, slope], -1)

    def noise_shapes(self, n_tasks: int) -> dict[str, tuple[int, ...]]:
        """Half of the draws, mirrored."""
        half = (self.draws + 1) // 2
        return {"phi": (half, n_tasks, self.family.size), "theta": (half, self.size)}

    def fixed_noise(self, draws: int, seed: int, like: Tensor) -> dict[str, Tensor]:
        """One matched set for θ and the φ of a task: no term holds the φ of two tasks."""
        total = self.size + self.family.size
        wanted = max(draws, 2 * total)
        found = matched_noise(wanted + wanted % 2, total, seed).to(like)
        theta, phi = found.split([self.size, self.family.size], -1)
        return {"phi": phi.unsqueeze(1), "theta": theta}

    def global_density(self, shared: Mapping[str, Tensor]) -> Gaussian:
        """q(θ) over the unconstrained global sites, (1, theta_size)."""
        found = self.outer.density(shared[GLOBAL].unsqueeze(0), self.centre)
        assert isinstance(found, Gaussian)
        return found

    def local_parts(self, rows: Tensor, frame: Frame) -> tuple[Gaussian, Tensor]:
        """N(a, R Rᵀ) of every task, and B (tasks, phi_size, entries)."""
        entries = len(self.entries)
        own, slope = rows.split([self.family.parameters, self.family.size * entries], -1)
        slope = slope.unflatten(-1, (self.family.size, entries))
        if frame.diagonal:
            slope = frame.scale.unsqueeze(-1) * slope
        else:
            slope = frame.scale @ slope
        density = self.family.density(own, frame)
        assert isinstance(density, Gaussian)
        return density, slope

    def terms(
        self,
        shared: Mapping[str, Tensor],
        rows: Tensor,
        frame: Frame,
        batch: Batch,
        noise: Mapping[str, Tensor],
        *,
        fixed: bool,
    ) -> tuple[Tensor, Tensor]:
        """(tasks,) −E[log p(S, φ | θ) − log q(φ | θ)] and () −E[log p(θ) − log q(θ)].

        Args: as of `PointGuide.terms`.
        """
        problem = self.problem
        point: Theta = self.moving.unpack(shared)[0]
        own, shift = noise["phi"], noise["theta"]
        if fixed:
            own = own.expand(-1, batch.n_tasks, -1)
        else:
            own, shift = torch.cat([own, -own]), torch.cat([shift, -shift])
        outer = self.global_density(shared)
        inner, slope = self.local_parts(rows, frame)
        theta, phi = self._draw(outer, inner, slope, shift, own)
        if not fixed:
            # The gradient of log q through its own parameters is a score, whose mean is zero.
            outer, inner, slope = outer.detach(), inner.detach(), slope.detach()
        log_outer = outer.log_prob(theta.unsqueeze(1)).squeeze(1)
        log_inner = self._log_inner(outer, inner, slope, theta, phi)

        def one(drawn: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            full = {**point, **problem.sites.theta_from_vector(drawn)}
            likelihood, local, global_ = problem.terms(full, values, batch)
            return likelihood + local, global_

        values, globals_ = torch.vmap(one)(theta, phi)
        return (log_inner - values).mean(0), (log_outer - globals_).mean()

    def _draw(
        self, outer: Gaussian, inner: Gaussian, slope: Tensor, shift: Tensor, own: Tensor
    ) -> tuple[Tensor, Tensor]:
        """θ (draws, theta_size) and φ (draws, tasks, phi_size) of noise ε_0 and ε_i."""
        theta = outer.draw(shift.unsqueeze(1)).squeeze(1)
        return theta, inner.draw(own) + torch.einsum("tij,sj->sti", slope, self._linear(shift))

    def _linear(self, values: Tensor) -> Tensor:
        """Of (draws, theta_size) the entries that φ is linear in."""
        return values if len(self.entries) == self.size else values[:, self.entries]

    def _log_inner(
        self, outer: Gaussian, inner: Gaussian, slope: Tensor, theta: Tensor, phi: Tensor
    ) -> Tensor:
        """(draws, tasks) log q(φ_i | θ)."""
        difference = theta - outer.loc
        if outer.diagonal:
            whitened = difference / outer.scale
        else:
            whitened = torch.linalg.solve_triangular(outer.scale[0], difference.mT, upper=False).mT
        return inner.log_prob(phi - torch.einsum("tij,sj->sti", slope, self._linear(whitened)))

    def sample(
        self, shared: Mapping[str, Tensor], rows: Tensor, frame: Frame, draws: int, seed: int
    ) -> tuple[Theta, Tensor]:
        """Paired draws: θ with a first axis of draws, φ (draws, tasks, phi_size)."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            found = torch.randn(shape, generator=generator, dtype=torch.float64)
            return found.to(frame.loc)

        outer = self.global_density(shared)
        inner, slope = self.local_parts(rows, frame)
        shift = normal(draws, self.size)
        own = normal(draws, rows.shape[0], self.family.size)
        theta, phi = self._draw(outer, inner, slope, shift, own)
        point = self.moving.unpack(shared)[0]
        return {**point, **self.problem.sites.theta_from_vector(theta)}, phi
