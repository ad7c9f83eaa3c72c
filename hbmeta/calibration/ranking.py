"""Ranks of what a simulation drew among the draws of a posterior.

    r = #{s : f(draw_s) < f(truth)} + U{0, …, #{s : f(draw_s) = f(truth)}}

f is a coordinate of a site, the log likelihood log p(y_i | φ_i, θ), which depends on the data, the
distance to a random point (TARP), or a function of the caller's.

References:
    Talts, Betancourt, Simpson, Vehtari, Gelman (2018), arXiv:1804.06788. Modrák et al. (2023),
    Bayesian Analysis, for ties and data-dependent quantities. Lemos, Coogan, Hezaveh, Perreault-
    Levasseur (2023), ICML, for distances.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbmeta.densities import Delta, Empirical, equal_draws
from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.posterior import TaskPosterior
from hbmeta.problem import Problem
from hbmeta.simulation import Simulated

__all__ = ["LIKELIHOOD", "TARP", "Drawn", "Quantity", "Truth", "draws_of", "rank", "ranks_of"]

Quantity = Callable[[Mapping[str, Tensor]], Tensor]
"""Of the constrained sites of one task, (draws, *shape) each, to numbers (draws,)."""

LIKELIHOOD, TARP = "log likelihood", "distance to a random point"


@dataclass(frozen=True)
class Drawn:
    """L draws with equal weights.

    Attributes:
        level_one: constrained global sites (draws, *shape); empty where θ is held.
        local: constrained local sites (draws, tasks, *shape).
        log_likelihood: (draws, tasks).
        phi: (draws, tasks, phi_size), and theta (draws, theta_size), unconstrained.
    """

    level_one: dict[str, Tensor]
    local: dict[str, Tensor]
    log_likelihood: Tensor
    phi: Tensor
    theta: Tensor


@dataclass(frozen=True)
class Truth:
    """What was drawn, in blocks of tasks that share a θ; and a second draw to measure from."""

    blocks: Sequence[Simulated]
    reference: Simulated

    def as_draw(self, problem: Problem) -> Drawn:
        """The same shapes as those of draws, with one draw."""
        with torch.no_grad():
            likelihood = [
                problem.log_likelihood(b.theta, b.phi, problem.batch(b.tasks)) for b in self.blocks
            ]
        sites = problem.sites
        local = (*sites.locals, *sites.deterministic_local)
        level_one = (*sites.globals, *sites.deterministic_global)
        first = self.blocks[0]
        n_tasks = sum(len(block.phi) for block in self.blocks)
        theta = sites.theta_to_vector(first.theta) if sites.globals else first.phi.new_zeros(0)
        return Drawn(
            {s.name: first.values[s.name].expand(s.shape)[None] for s in level_one},
            {
                s.name: torch.cat(
                    [b.values[s.name].expand(len(b.phi), *s.shape) for b in self.blocks]
                ).reshape(1, n_tasks, *s.shape)
                for s in local
            },
            torch.cat(likelihood)[None],
            torch.cat([block.phi for block in self.blocks])[None],
            theta[None],
        )


def draws_of(posterior: TaskPosterior, draws: int, seed: int) -> Drawn:
    """L draws of a posterior; stored ones evenly thinned, weighted ones resampled.

    Raises:
        UnsupportedModelError: q is a point.
        DataError: fewer draws are stored than are wanted.
    """
    problem, density = posterior.problem, posterior.density
    if isinstance(density, Delta):
        raise UnsupportedModelError(
            "sbc",
            needed="a strategy that can be drawn from",
            found="a point estimate, among whose draws nothing has a rank",
            do="Use a strategy with a density or draws, such as Laplace or NUTS.",
        )
    weighted = isinstance(density, Empirical) and density.log_weights is not None
    stored = density.phi.shape[0] if isinstance(density, Empirical) else draws
    if stored < draws and not weighted:
        raise DataError(
            "sbc",
            needed=f"at least draws={draws} draws of the strategy",
            found=str(stored),
            do="Let the strategy draw more, or pass fewer draws (19, 49).",
        )
    particles = posterior.particles(stored if weighted else draws, seed)
    batch = problem.batch(posterior.support)
    given = (particles.theta, particles.drawn, particles.phi, batch)
    values, likelihood = problem.particle_values(*given), problem.particle_log_likelihood(*given)
    sites, shape = problem.sites, particles.phi.shape[:2]
    local = {
        s.name: values[s.name].expand(*shape, *s.shape)
        for s in (*sites.locals, *sites.deterministic_local)
    }
    phi = particles.phi
    if particles.log_weights is not None:
        index = equal_draws(particles.log_weights, draws, seed + 1)
        local = {name: _taken(value, index) for name, value in local.items()}
        likelihood, phi = _taken(likelihood, index), _taken(phi, index)
    level_one, theta = {}, phi.new_zeros(draws, 0)
    if particles.drawn and particles.log_weights is None:
        every = (*sites.globals, *sites.deterministic_global)
        level_one = {s.name: values[s.name].expand(shape[0], *s.shape) for s in every}
        theta = sites.theta_to_vector(particles.theta)
    return Drawn(level_one, local, likelihood, phi, theta)


def ranks_of(
    problem: Problem,
    drawn: Drawn,
    truth: Truth,
    *,
    together: bool,
    ranked: Sequence[int],
    labels: Sequence[Any],
    quantities: Mapping[str, Quantity],
    generator: torch.Generator,
) -> dict[str, list[int]]:
    """Ranks by the name of the quantity.

    Args:
        problem: the program.
        drawn: draws of the posterior.
        truth: what they should look like.
        together: whether tasks depend on each other through a θ that is drawn: each has ranks of
            its own then. Those of independent tasks are pooled.
        ranked: positions of the tasks to rank.
        labels: of the tasks, for names.
        quantities: further ones, of the sites of a task.
        generator: for ties.
    """
    true = truth.as_draw(problem)
    names: dict[str, list[str]] = getattr(problem.program, "coordinates", dict)()
    out: dict[str, list[int]] = {}

    def put(name: str, draws: Tensor, value: Tensor) -> None:
        out.setdefault(name, []).append(rank(draws, value, generator))

    def put_site(site: str, draws: Tensor, value: Tensor, suffix: str) -> None:
        for number, name in enumerate(_coordinates(site, draws.shape[1:], names)):
            put(name + suffix, draws.reshape(len(draws), -1)[:, number], value.reshape(-1)[number])

    for site, values in drawn.level_one.items():
        put_site(site, values, true.level_one[site], "")
    for task in ranked:
        suffix = f", task {labels[task]!r}" if together else ""
        for site, values in drawn.local.items():
            put_site(site, values[:, task], true.local[site][:, task], suffix)
        for name, quantity in quantities.items():
            put(name + suffix, *(quantity(_of_task(one, drawn, task)) for one in (drawn, true)))
        if not together:
            put(LIKELIHOOD, drawn.log_likelihood[:, task], true.log_likelihood[0, task])
            far, near = _distances(drawn.phi[:, task], true.phi[:, task], truth.reference.phi[task])
            put(TARP, far, near)
    if together:
        put(LIKELIHOOD, drawn.log_likelihood.sum(1), true.log_likelihood.sum())
        start = truth.reference
        parts = [start.phi.reshape(-1)]
        if drawn.theta.shape[1]:
            parts.append(problem.sites.theta_to_vector(start.theta))
        whole, point = (
            torch.cat([one.phi.flatten(1), one.theta[:, : drawn.theta.shape[1]]], 1)
            for one in (drawn, true)
        )
        put(TARP, *_distances(whole, point, torch.cat(parts)))
    return out


def rank(draws: Tensor, truth: Tensor, generator: torch.Generator) -> int:
    """The number of draws below the truth; those that are equal to it go either way."""
    below, equal = int((draws < truth).sum()), int((draws == truth).sum())
    return below + int(torch.randint(0, equal + 1, (), generator=generator))


def _distances(draws: Tensor, truth: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """From a point that depends on neither, in sds of the draws; (draws,) and a number.

    The point is a draw of the prior: a q that is the prior itself passes. The log likelihood is
    there to catch that.
    """
    scale = draws.std(0).clamp_min(1e-12)
    return ((draws - start) / scale).norm(dim=1), ((truth[0] - start) / scale).norm()


def _coordinates(site: str, shape: Sequence[int], names: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of the entries of a site, in the order of the flattened site."""
    if not shape:
        return [site]
    axes = [[str(i) for i in range(n)] for n in shape]
    if len(names.get(site, ())) == shape[-1]:
        axes[-1] = list(names[site])
    return [f"{site}[{', '.join(entries)}]" for entries in itertools.product(*axes)]


def _of_task(one: Drawn, drawn: Drawn, task: int) -> dict[str, Tensor]:
    """The sites of a task, and of level 1 where these were drawn."""
    level_one = {name: one.level_one[name] for name in drawn.level_one}
    return level_one | {name: value[:, task] for name, value in one.local.items()}


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """values (draws, tasks, ...) at index (n, tasks)."""
    full = index.reshape(*index.shape, *(1,) * (values.ndim - 2))
    return values.gather(0, full.expand(*index.shape, *values.shape[2:]))
