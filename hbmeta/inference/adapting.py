"""New tasks under θ as the fit left it: draws of its posterior, or a point.

Model: θ ~ p(θ), φ_i ~ p(φ | θ), y_ij ~ p(y | φ_i, θ), with θ_s draws of p(θ | D), D the rows of the
fit.
Estimator: (θ_s, φ_s) with φ_s ~ p(φ | S_new, θ_s) and the weight p(S_new | θ_s) per task: draws of
the posterior given D and S_new (`hbmeta.conditional`). That takes rows S_new that are not in D. A
task of the fit with the very same rows keeps the fit's draws, whose weights are equal; one with
other rows is warned of, since the draws of θ know those of the fit already.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from hbmeta.conditional import conditional, conditional_over_draws, warn_of_proposals
from hbmeta.densities import Empirical
from hbmeta.posterior import TaskPosterior
from hbmeta.tasks import Tasks

if TYPE_CHECKING:
    from hbmeta.fitted import Fitted

_MOST_DRAWS_OF_THETA = 1000
# Fewer effective draws of θ than this, and than half of all, are warned of.
_FEW = 100

__all__ = ["adapt_by_importance", "adapt_to_draws"]


def adapt_to_draws(fitted: Fitted, support: Tasks, seed: int) -> TaskPosterior:
    """φ of tasks for each draw of θ, with the weight p(S_new | θ) of each; see the module.

    Args:
        fitted: a fit that holds draws of θ; of more than 1,000 as many are taken, evenly spaced.
        support: the rows of the tasks.
        seed: of the draws of φ.
    Returns:
        the posterior of the fit where it saw all of these rows; else one whose info has, per task,
        what `conditional_over_draws` gives and effective_draws of θ.
    """
    seen = fitted.saw(support)
    if seen and all(seen):
        return fitted.posterior_of(support)
    where = f"{fitted.strategy.name}.adapt"
    _warn_of_known(fitted, support, seen, where)
    problem, theta = fitted.problem, fitted.theta
    names = [site.name for site in problem.sites.globals]
    total = theta[names[0]].shape[0]
    kept = torch.linspace(0, total - 1, min(total, _MOST_DRAWS_OF_THETA)).round().long()
    theta = {name: v[kept] if name in names else v for name, v in theta.items()}
    found, info = conditional_over_draws(problem, theta, problem.batch(support), seed=seed)
    fresh = [position for position, same in enumerate(seen) if not same]
    warn_of_proposals(
        {name: info[name][fresh] for name in ("proposal_efficiency", "converged", "positive")},
        tuple(support.ids[position] for position in fresh),
        where,
        stacklevel=5,
    )
    assert found.log_weights is not None
    phi, log_weights = found.phi.clone(), found.log_weights.clone()
    known = [position for position, same in enumerate(seen) if same]
    if known:
        assert isinstance(fitted.density, Empirical)
        at = [fitted.tasks.position(support.ids[position]) for position in known]
        phi[:, known] = fitted.density.phi[kept][:, at]
        log_weights[:, known] = 0.0
    density = Empirical(phi, log_weights)
    info["effective_draws"] = density.effective_draws
    smallest = float(info["effective_draws"].min())
    if not smallest >= min(_FEW, 0.5 * len(kept)):
        worst = support.ids[int(info["effective_draws"].argmin())]
        warnings.warn(
            f"{where}: task {worst!r} leaves {smallest:.0f} effective draws of θ; it says "
            "much about θ that the fit did not know. Fit it together with the others.",
            stacklevel=4,
        )
    return TaskPosterior(
        problem, theta, density, support, drawn=True, info=info, units=fitted.units
    )


def adapt_by_importance(fitted: Fitted, support: Tasks, seed: int) -> TaskPosterior:
    """p(φ | S, θ) at the θ of a fit without draws of it, by importance sampling."""
    problem = fitted.problem
    density, info = conditional(problem, fitted.theta, problem.batch(support), seed=seed)
    warn_of_proposals(info, support.ids, f"{fitted.strategy.name}.adapt", stacklevel=5)
    return TaskPosterior(problem, fitted.theta, density, support, info=info, units=fitted.units)


def _warn_of_known(fitted: Fitted, support: Tasks, seen: list[bool], where: str) -> None:
    """Draws of θ that saw rows of a task know them; more rows of it are more evidence to them."""
    known, counts = set(fitted.tasks.ids), support.counts.tolist()
    other = [
        i
        for i, same, n in zip(support.ids, seen, counts, strict=True)
        if n and not same and i in known
    ]
    if other:
        warnings.warn(
            f"{where}: task {other[0]!r} was fitted with other rows ({len(other)} such), so "
            "these rows count on top of the fit's: rows that are in both count twice in θ, and φ "
            "is drawn from these rows alone. Fit again with all rows; for the posterior of the "
            "fit call fitted.posterior.select(ids); for another task of that name rename it.",
            stacklevel=5,
        )
