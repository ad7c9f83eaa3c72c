"""Losses of what a fit predicts on the queries of tasks: of the prediction itself, or of one φ.

Two predictors are certified, and they are not the same:

    predictive   adapt to S_i, average over q(φ | S_i), predict: what `posterior.predict` says. For
                 the theorems that take any predictor (`meta_test`, `query_split`, `hold_out`).
    Gibbs        draw φ ~ q(φ | S_i) and predict by p(y | x, φ) alone: what the theorems that pay
                 for KL(Q_i‖P) are about.

Every task counts once: X_i is the mean over its rows. Draws of φ are taken a part at a time, so
that memory does not grow with their number.
"""

from __future__ import annotations

import numpy as np
import torch
from pyro.distributions import Bernoulli
from torch import Tensor
from tqdm.auto import tqdm

from hbmeta.bounds.checks import Array
from hbmeta.certification.losses import Loss
from hbmeta.densities import Transported
from hbmeta.errors import UnsupportedModelError
from hbmeta.fitted import Fitted
from hbmeta.posterior import TaskPosterior
from hbmeta.tasks import Episode, Tasks

__all__ = ["by_task", "gibbs_losses", "predictive_losses", "row_losses"]

CELLS = 16_000_000
"""Rows, or parameters of tasks, times draws that are held at once."""


def predictive_losses(
    fitted: Fitted, episode: Episode, loss: Loss, *, draws: int, seed: int
) -> Array:
    """(T,) X_i: the mean loss on the query of what the fit predicts after adapting to the support.

    Args:
        fitted: the fit.
        episode: tasks, each with a query row.
        loss: in [0, 1].
        draws: draws of q(φ | S) that enter the prediction.
        seed: of adapting and of these draws; data of the task, as far as a theorem is concerned.
    """
    return by_task(row_losses(fitted, episode, loss, draws=draws, seed=seed), episode.query)


def row_losses(
    fitted: Fitted,
    episode: Episode,
    loss: Loss,
    *,
    draws: int,
    seed: int,
    progress: bool | None = False,
) -> Tensor:
    """(rows,) the losses of the rows of the query; see `predictive_losses`.

    All tasks are adapted to at once, and predicted some at a time where their draws are many.
    """
    posterior, query = fitted.adapt(episode.support, seed=seed), episode.query
    n, size = query.n_tasks, max(fitted.problem.sites.phi_size, query.max_points)
    at_once = max(1, CELLS // max(1, draws * size))
    if at_once >= n:
        return _predicted(posterior, query, loss, draws, seed)
    found = query.flat_x.new_empty(query.n_points, dtype=torch.float64)
    off = None if progress is None else not progress
    for number, start in enumerate(
        tqdm(range(0, n, at_once), desc="certify", disable=off, leave=False)
    ):
        some = query[start : start + at_once]
        part = _predicted(posterior.select(some.ids), some, loss, draws, seed + number)
        found[(query.task >= start) & (query.task < start + at_once)] = part.double()
    return found


def _predicted(posterior: TaskPosterior, query: Tasks, loss: Loss, draws: int, seed: int) -> Tensor:
    y = query.flat_y
    assert y is not None
    return loss.of(posterior.predict(query, draws=draws, seed=seed), y)


def gibbs_losses(
    posterior: TaskPosterior,
    tasks: Tasks,
    loss: Loss,
    *,
    draws: int,
    seed: int,
    progress: bool | None = False,
) -> Array:
    """(M, T) mean loss on each task of p(y | x, φ) at M fresh draws φ ~ q(φ | S_i).

    Raises:
        UnsupportedModelError: q is no distribution to draw from, or points depend on each other.
    """
    density, problem = posterior.density, posterior.problem
    if not isinstance(density, Transported) or problem.layout == "joint" or problem.classes:
        raise UnsupportedModelError(
            "certify",
            needed="a posterior with a density, of a program whose points are independent given φ",
            found=f"{type(density).__name__} of {problem.name}",
            do='Use bound="query_split" or bound="meta_test".',
        )
    rows = tasks.to(device=problem.device, dtype=problem.dtype)
    y = tasks.flat_y
    assert y is not None
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, CELLS // max(rows.n_points, density.centre.numel()))
    found = []
    off = None if progress is None else not progress  # None: only outside a terminal
    for start in tqdm(range(0, draws, at_once), desc="certify", disable=off, leave=False):
        n = min(at_once, draws - start)
        shape = (n, len(posterior.ids), density.noise_size)
        noise = torch.randn(shape, generator=generator, dtype=density.centre.dtype)
        with torch.no_grad():
            phi = density.draw(noise.to(density.centre.device))
        found += [_of_draws(posterior, phi, rows, y, loss)]
    return np.concatenate(found)


def _of_draws(posterior: TaskPosterior, phi: Tensor, rows: Tasks, y: Tensor, loss: Loss) -> Array:
    """(n, T) at draws φ (n, T, phi_size)."""
    problem, units = posterior.problem, posterior.units
    batch = problem.batch(rows, posterior.support)
    response = problem.particle_response(posterior.theta, False, phi, batch)

    def by_row(cells: Tensor) -> Tensor:
        return cells if batch.task is not None else rows.unpad(cells, dim=1)

    if loss.name == "zero-one":
        p = response.probs
        labels = (p > 0.5).long() if isinstance(response, Bernoulli) else p.argmax(-1)
        losses = loss.of_labels(by_row(labels), y)
    elif loss.name == "clipped-nll":
        losses = loss.of_log_probabilities(by_row(response.log_prob(batch.y)))
    else:
        try:
            means = by_row(response.mean.double())
        except NotImplementedError as error:
            raise UnsupportedModelError(
                "certify",
                needed="a response whose mean is known",
                found=type(response).__name__,
                do='Use bound="query_split" or bound="meta_test".',
            ) from error
        losses = loss.of_means(units.location + units.scale * means, y.expand(means.shape))
    return by_task(losses, rows)


def by_task(losses: Tensor, tasks: Tasks) -> Array:
    """(..., T) means over the rows of each task, from (..., rows)."""
    losses = losses.detach().double().cpu()
    total = losses.new_zeros(*losses.shape[:-1], tasks.n_tasks)
    total.index_add_(-1, tasks.task.cpu(), losses)
    found: Array = (total / tasks.counts.cpu().double()).numpy()
    return found
