"""Where fits start, and whether they can: at the priors' locations, around them, or by Pathfinder.

A centered hierarchy has no joint mode: log p(θ, φ, y) grows without bound as the scale of φ goes to
zero with φ at its mean. Searches therefore run with every site that can be non-centered in ε
(`hbmeta.parametrisation`), where the density of a proper program is bounded, and their draws are
carried over to the coordinates of the sampler. Carrying a point over changes no law: it is the
draw (θ, φ) itself, written in other numbers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hbmeta.errors import ConvergenceError
from hbmeta.joint_density import Potential, pack, unpack
from hbmeta.parametrisation import Coordinates
from hbmeta.pathfinder import find_paths
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.tasks import Tasks

# Draws of each path, from which starts are chosen.
_DRAWS = 250
# How often a start is drawn closer to the priors' locations.
_HALVINGS = 12
_ADVICE = (
    "Look for logarithms and roots of what can be negative and for scales that can be 0, or give "
    "the priors locations where the data are possible."
)

__all__ = [
    "from_noise",
    "non_centered",
    "pathfinder_starts",
    "require_finite_start",
    "spread_starts",
]


def require_finite_start(problem: Problem, tasks: Tasks, where: str) -> None:
    """Raises where log p(θ, φ, y) is not finite at the priors' locations, nor near them.

    Every strategy starts there. Points within 1, 1/2, 1/4, … of the locations are tried too, in
    unconstrained space, because a search may leave a location that is bad by itself.

    Raises:
        ConvergenceError: names the density that is not finite, and the task.
    """
    batch = problem.batch(tasks)
    theta = problem.theta(batch)
    with torch.no_grad():
        phi = problem.location(theta, batch)
        at_locations = problem.terms(theta, phi, batch)
        if all(bool(part.isfinite().all()) for part in at_locations):
            return
        centre = pack(problem, theta, phi)
        generator = torch.Generator().manual_seed(0)
        for number in range(_HALVINGS):
            jitter = 2 * torch.rand(centre.shape, generator=generator, dtype=torch.float64) - 1
            near, other = unpack(problem, centre + jitter.to(centre) / 2**number, batch.n_tasks)
            terms = problem.terms({**theta, **near}, other, batch)
            if all(bool(part.isfinite().all()) for part in terms):
                return
    likelihood, local, prior = at_locations
    if not bool(prior.isfinite()):
        found = f"{float(prior)} for log p(θ)"
    else:
        # Where φ has no density, y has none either.
        no_prior = not bool(local.isfinite().all())
        name, part = ("log p(φ | θ)", local) if no_prior else ("the likelihood", likelihood)
        task = int((~part.isfinite()).nonzero()[0])
        found = f"{float(part[task])} for {name} of task {tasks.ids[task]!r}"
    raise ConvergenceError(
        where,
        needed="a log density of the program that is finite near its priors' locations",
        found=found,
        do=_ADVICE,
    )


def spread_starts(
    problem: Problem,
    batch: Batch,
    theta: Theta,
    potential: Potential,
    coordinates: Coordinates | None,
    *,
    count: int,
    seed: int,
) -> Tensor:
    """(count, size) uniform within 1 of the priors' locations, or as near as needs be.

    The spread is halved until the density is finite.

    Raises:
        ConvergenceError: it is not, nor its gradient, this near to the priors' locations.
    """
    place = problem.location if coordinates is None else coordinates.start
    with torch.no_grad():
        centre = pack(problem, theta, place(theta, batch)).double().cpu()
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        jitter = 2 * torch.rand(centre.shape, generator=generator, dtype=torch.float64) - 1
        for _ in range(_HALVINGS):
            value, gradient = potential(centre + jitter)
            if math.isfinite(float(value)) and bool(torch.isfinite(gradient).all()):
                break
            jitter = jitter / 2
        else:
            bad = int((~gradient.isfinite()).sum())
            raise ConvergenceError(
                problem.name,
                needed="a finite density and gradient near the priors' locations",
                found=f"a log density of {float(value)}, {bad} entries of its gradient not finite",
                do=_ADVICE,
            )
        rows.append(centre + jitter)
    return torch.stack(rows)


def pathfinder_starts(
    problem: Problem,
    batch: Batch,
    theta: Theta,
    potential: Potential,
    coordinates: Coordinates | None,
    *,
    count: int,
    seed: int,
    where: str,
) -> Tensor:
    """(count, size) different draws of a mixture of so many paths, by their weights.

    Args:
        problem: the program.
        batch: the rows.
        theta: what of θ is no global site.
        potential: the staged log density, in `coordinates`.
        coordinates: those of the sampler.
        count: how many.
        seed: of everything random.
        where: for the error.
    Raises:
        ConvergenceError: no path has a Gaussian; see `hbmeta.pathfinder`.
    """
    with non_centered(coordinates):
        starts = spread_starts(
            problem, batch, theta, potential, coordinates, count=count, seed=seed
        )
        found = find_paths(potential, starts, draws=_DRAWS, seed=seed, where=where)
    chosen = found.resampled(count, seed, replacement=False)
    return chosen if coordinates is None else from_noise(problem, batch, theta, coordinates, chosen)


def from_noise(
    problem: Problem, batch: Batch, theta: Theta, coordinates: Coordinates, points: Tensor
) -> Tensor:
    """(count, size) the same (θ, φ) in these coordinates, from points with no site centered."""
    drawn, noise = unpack(problem, points.to(batch.x), batch.n_tasks)
    moved = coordinates.from_noise({**theta, **drawn}, bool(drawn), noise, batch)
    return torch.cat([points[:, : problem.sites.theta_size], moved.flatten(1).to(points)], 1)


@contextlib.contextmanager
def non_centered(coordinates: Coordinates | None) -> Iterator[None]:
    """ε at every site that has a choice, while it lasts; a staged potential reads it."""
    if coordinates is None:
        yield
        return
    chosen = coordinates.centered
    try:
        coordinates.centered = torch.zeros_like(chosen)
        yield
    finally:
        coordinates.centered = chosen
