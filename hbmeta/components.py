"""The components of a predictive: likelihoods at draws of (θ, φ), or one exact Gaussian."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbmeta.densities import Density, Gaussian
from hbmeta.likelihoods import seeded
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.rebuilding import rebuild, tensors_of
from hbmeta.tasks import Tasks

__all__ = [
    "LinearGaussian",
    "Mixture",
    "Particles",
    "linear_columns",
    "linear_gaussian",
    "probes",
]

# Beyond so many parameters per task, linearity is first looked at along one line.
_MANY = 64

# Where a function is held against the plane through φ̂ and φ̂ + L_j: along random sums of columns,
# and along every column so many standard deviations away.
_MIXES = 4
_SIZES = (-1.0, 2.5, -2.5, 5.0, -5.0)
# Predictions of that many points of φ, at least, are looked at together.
_PART = 8


class Particles(NamedTuple):
    """Draws of (θ, φ) with weights per task.

    Attributes:
        theta: θ; global sites carry a first axis of draws where `drawn`.
        drawn: whether θ varies with the draw.
        phi: (draws, tasks, phi_size), unconstrained.
        log_weights: (draws, tasks), or None for equal weights.
    """

    theta: Theta
    drawn: bool
    phi: Tensor
    log_weights: Tensor | None

    def part(self, start: int, stop: int, problem: Problem) -> Particles:
        """Draws start to stop; what of θ does not vary with the draw stays whole."""
        names = {site.name for site in problem.sites.globals} if self.drawn else set()
        theta = {k: v[start:stop] if k in names else v for k, v in self.theta.items()}
        weights = None if self.log_weights is None else self.log_weights[start:stop]
        return Particles(theta, self.drawn, self.phi[start:stop], weights)


def _rows(problem: Problem, batch: Batch, values: Tensor) -> Tensor:
    """(draws, *cells, ...) of the problem's layout as (draws, rows, ...)."""
    return values if batch.task is not None else values[:, batch.mask]


class Mixture:
    """p(y | φ_s, θ_s) at flat rows, predicted from a support, a chunk of draws at a time."""

    def __init__(
        self, problem: Problem, particles: Particles, tasks: Tasks, support: Tasks
    ) -> None:
        self.problem, self.particles = problem, particles
        self.batch = problem.batch(tasks, support)
        self.n_draws = particles.phi.shape[0]

    def distribution(self, start: int, stop: int) -> Any:
        """The likelihoods of draws start to stop, batch shape (stop - start, rows)."""
        p = self.particles.part(start, stop, self.problem)
        found = self.problem.particle_response(p.theta, p.drawn, p.phi, self.batch)
        if self.batch.task is not None:
            return found
        return _pick_cells(found, self.batch.mask)


def _pick_cells(distribution: Any, mask: Tensor) -> Any:
    """A distribution over (draws, tasks, points) restricted to the real cells, (draws, rows)."""
    tensors, spec = tensors_of(distribution)
    return rebuild(spec, {name: value[:, mask] for name, value in tensors.items()})


class LinearGaussian:
    """The exact predictive of y ~ Normal(a + A ε, s²), ε ~ N(0, I): one Normal per row."""

    n_draws = 1

    def __init__(self, mean: Tensor, columns: Tensor, noise: Tensor, tasks: Tasks) -> None:
        self.mean, self.columns, self.noise, self.tasks = mean, columns, noise, tasks

    def distribution(self, start: int, stop: int) -> Any:
        """The predictive of every row, batch shape (1, rows)."""
        variance = self.noise.square() + self.columns.square().sum(0)
        return torch.distributions.Normal(
            self.mean.unsqueeze(0), variance.sqrt().unsqueeze(0), validate_args=False
        )

    def sample(self, n: int, seed: int) -> Tensor:
        """(n, rows) draws, joint over the rows of a task: its rows share one ε."""
        rows, size = self.mean.shape[0], self.columns.shape[0]
        with seeded(seed, self.mean.device):
            shared = torch.randn(n, self.tasks.n_tasks, size, dtype=torch.float64).to(self.mean)
            own = torch.randn(n, rows, dtype=torch.float64).to(self.mean)
        effect = torch.einsum("snk,kn->sn", shared[:, self.tasks.task], self.columns)
        return self.mean + effect + self.noise * own

    def joint(self, y: Tensor) -> Tensor:
        """(tasks,) log N(y_i; a_i, A_i A_iᵀ + s² I)."""
        tasks = self.tasks
        mask = tasks.mask
        residual = torch.where(mask, tasks.pad(y - self.mean), 0.0)
        columns = torch.where(mask.unsqueeze(-1), tasks.pad(self.columns.T), 0.0)
        noise = torch.where(mask, tasks.pad(self.noise), 1.0)
        # Rank phi_size: the determinant and the inverse of I + BᵀB with B = s⁻¹A instead of a
        # points × points matrix (matrix determinant lemma, Woodbury).
        b = columns / noise.unsqueeze(-1)
        r = residual / noise
        inner = torch.eye(b.shape[-1], dtype=b.dtype, device=b.device) + b.mT @ b
        factor = torch.linalg.cholesky(inner)
        projected = torch.linalg.solve_triangular(factor, b.mT @ r.unsqueeze(-1), upper=False)
        quadratic = r.square().sum(-1) - projected.squeeze(-1).square().sum(-1)
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 2 * noise.log().sum(-1)
        constant = math.log(2 * math.pi) * mask.sum(-1).to(quadratic.dtype)
        out: Tensor = -0.5 * (quadratic + log_det + constant)
        return out


def linear_gaussian(
    problem: Problem, theta: Theta, density: Density, tasks: Tasks, support: Tasks
) -> LinearGaussian | None:
    """The exact predictive where q is Gaussian and y Normal with a mean linear in φ, else None.

    Linearity is tested, not declared: at `probes`, to both sides of φ̂.
    """
    if not isinstance(density, Gaussian) or tasks.n_points == 0:
        return None
    batch = problem.batch(tasks, support)
    if density.loc.shape[-1] > _MANY and not _linear_on_a_line(problem, theta, density, batch):
        return None
    points, steps = probes(density)
    first = density.loc.shape[-1] + 1

    def mean_and_noise(phi: Tensor) -> tuple[Tensor, Tensor] | None:
        found = problem.particle_response(theta, False, phi, batch)
        if type(found).__name__ != "Normal":
            return None
        shape = found.batch_shape
        mean, noise = (_rows(problem, batch, v.expand(shape)) for v in (found.loc, found.scale))
        return mean, noise

    start = mean_and_noise(points[:first])
    if start is None:
        return None
    mean, noise = start[0][0], start[1][0]
    columns = start[0][1:] - mean
    if not _constant(start[1], noise):
        return None
    # A part at a time: most programs fail the first, and all at once may be too large.
    size = max(first, _PART)
    for phi, moved in zip(points[first:].split(size), steps[first:].split(size), strict=True):
        found = mean_and_noise(phi)
        if found is None or not _constant(found[1], noise):
            return None
        if not _on_the_plane(found[0], mean, columns, moved):
            return None
    return LinearGaussian(mean, columns, noise, tasks)


def _constant(noise: Tensor, at: Tensor) -> bool:
    return bool((noise - at).abs().max() <= _tolerance(at) * at.abs().max())


def _linear_on_a_line(problem: Problem, theta: Theta, density: Gaussian, batch: Batch) -> bool:
    """Whether the mean of y is linear along one direction, which costs 3 evaluations.

    The probes hold phi_size dense matrices: for the weights of a network they would not fit
    into memory, and one line shows that it is not linear.
    """
    size = density.loc.shape[-1]
    noise = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = density.draw(noise.to(density.loc).expand_as(density.loc)[None])[0] - density.loc
    phi = torch.stack([density.loc, density.loc + step, density.loc - 2 * step])
    found = problem.particle_response(theta, False, phi, batch)
    if type(found).__name__ != "Normal":
        return False
    mean = found.loc
    first, second = mean[1] - mean[0], mean[2] - mean[0]
    return bool((second + 2 * first).abs().max() <= _tolerance(mean) * (mean.abs().max() + 1e-12))


def probes(density: Gaussian) -> tuple[Tensor, Tensor]:
    """Points φ̂ + L ε that show whether a function of φ is linear where q has its mass.

    ε = 0 and the unit vectors e_j come first; then four random directions, and every e_j, to both
    sides: a function that is clamped (a ReLU, an absolute value) is linear on one of them. A kink
    beyond the outermost, 5 standard deviations, moves the mean by less than 1e-7 of one.

    Returns:
        the points (points, tasks, phi_size), and ε (points, phi_size).
    """
    size = density.loc.shape[-1]
    tril = torch.diag_embed(density.scale) if density.diagonal else density.scale
    generator = torch.Generator().manual_seed(0)
    mixes = torch.randn(_MIXES, size, generator=generator, dtype=torch.float64).to(tril)
    unit = torch.eye(size).to(tril)
    far = [3.0 * mixes, -3.0 * mixes, *(k * unit for k in _SIZES)]
    steps = torch.cat([torch.zeros_like(unit[:1]), unit, *far])
    return density.loc + torch.einsum("tij,sj->sti", tril, steps), steps


def linear_columns(values: Tensor, steps: Tensor) -> Tensor | None:
    """A_j = f(φ̂ + L_j) − f(φ̂) from values at the probes, or None where f is not linear.

    f(φ̂ + L ε) is then f(φ̂) + Σ_j A_j ε_j, with variance Σ_j A_j².
    """
    columns = values[1 : steps.shape[-1] + 1] - values[0]
    return columns if _on_the_plane(values, values[0], columns, steps) else None


def _on_the_plane(values: Tensor, at: Tensor, columns: Tensor, steps: Tensor) -> bool:
    """Whether values at ε are at + Σ_j A_j ε_j."""
    predicted = at + torch.einsum("sj,j...->s...", steps, columns)
    scale = values.abs().max() + 1e-12
    return bool((values - predicted).abs().max() <= _tolerance(values) * scale)


def _tolerance(values: Tensor) -> float:
    return 1e-9 if values.dtype == torch.float64 else 1e-5
