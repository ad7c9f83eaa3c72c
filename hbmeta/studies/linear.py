"""Linear regressions whose coefficients come from one Gaussian: every posterior against the truth.

    φ_i ~ N(μ, Σ) with correlated entries, y_ij = φ_i1 + φ_i2 x_ij + ε_ij

with μ, Σ and the noise known, so that p(φ_i | S_i) is a Gaussian in closed form and what is seen is
the approximation of φ alone. In theory a point has infinite divergence from it; the best factorised
Gaussian has the right mean and variances 1/Λ_jj, too small where the precision Λ is no diagonal; a
full Gaussian that one network gives for every task is off by the network; an exact one by nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from matplotlib.figure import Figure
from torch import Tensor

from hbmeta import marginals
from hbmeta.comparison import compare
from hbmeta.densities import Delta, Gaussian
from hbmeta.inference import (
    MAML,
    NUTS,
    AmortizedGuide,
    CompletePooling,
    ExactLinear,
    NoPooling,
    Quadrature,
)
from hbmeta.models import LinearRegression
from hbmeta.posterior import TaskPosterior
from hbmeta.scores import gaussian_kl, wasserstein2_gaussian
from hbmeta.studies.common import Outcome, Plan, Say, Study, entries, fit_plans
from hbmeta.tables import aligned
from hbmeta.tasks import LinearTasks

__all__ = ["Budget", "divergences", "mean_field_divergence", "run"]

_MEAN = (1.0, -0.5)
_COVARIANCE = ((1.0, 0.3), (0.3, 0.5))
_NOISE = 0.5
_EXACT = "exact"
_MEAN_FIELD = "amortized mean-field"


@dataclass(frozen=True)
class Budget:
    """How much work the study is: training steps of the guides, draws of NUTS per chain, tasks."""

    guide: int = 8_000
    draws: int = 1_000
    tasks: int = 100


def _find(budget: Budget, seed: int, say: Say, compile: bool | str) -> Outcome:
    family = LinearTasks(
        _MEAN, _COVARIANCE, noise=_NOISE, shots=(1, 6), queries=10, low=0.0, high=2.0
    )
    test = family.sample(budget.tasks, seed=2**31 + seed)
    model = LinearRegression(mean=_MEAN, covariance=_COVARIANCE, noise=_NOISE)
    # A guide learns from tasks of the family; the others need the support alone.
    guide = {"steps": budget.guide, "tasks_per_step": 64}
    training = replace(family, shots=8, queries=0)
    plans = {
        _EXACT: Plan(ExactLinear(), model, test.support),
        "quadrature": Plan(Quadrature(), model, test.support),
        "nuts": Plan(NUTS(draws=budget.draws, warmup=min(budget.draws, 500)), model, test.support),
        "amortized full": Plan(AmortizedGuide(covariance="full"), model, training, guide),
        _MEAN_FIELD: Plan(AmortizedGuide(covariance="diagonal"), model, training, guide),
        "maml": Plan(MAML(steps=5, step_size=0.05), model, replace(family, shots=3)),
        "no pooling": Plan(NoPooling(), model, test.support),
        "complete pooling": Plan(CompletePooling(), model, test.support),
    }
    fits = fit_plans(plans, seed=seed, compile=compile, say=say)
    posteriors = {name: fitted.posterior_of(test.support) for name, fitted in fits.items()}
    table = compare(fits, test, reference=_EXACT, seed=seed)
    found = divergences(posteriors)
    return Outcome(
        title="Linear regressions with a known prior: every posterior against the exact one",
        text=_text(found, posteriors[_EXACT], budget),
        comparisons={"all": table},
        captions={"all": f"{budget.tasks} tasks of 1 to 6 points"},
        figures=_figures(posteriors),
    )


run = Study(_find, full=Budget(), quick=Budget(guide=1_000, draws=500, tasks=40))
"""Every strategy that suits the program, on the same tasks, next to the exact posterior."""


def divergences(posteriors: Mapping[str, TaskPosterior]) -> dict[str, tuple[float, float]]:
    """KL(q ‖ exact) and W₂(q, exact) by name, means over tasks; draws by their mean and covariance.

    Args:
        posteriors: of the same tasks; "exact" is the Gaussian that they are compared with.
    Returns:
        nats, ∞ for a point; and the Wasserstein distance in the units of φ.
    """
    mean, covariance = _gaussian(posteriors[_EXACT])
    out = {}
    for name, posterior in posteriors.items():
        m, c = _gaussian(posterior)
        point = isinstance(posterior.density, Delta)
        kl = math.inf if point else float(gaussian_kl(m, c, mean, covariance).mean())
        out[name] = (kl, float(wasserstein2_gaussian(m, c, mean, covariance).mean()))
    return out


def mean_field_divergence(posterior: TaskPosterior) -> float:
    """KL of the best factorised Gaussian from a Gaussian of precision Λ, mean over tasks, in nats.

    N(m, diag(1/Λ_jj)) minimises KL(q ‖ p), at ½ (log Π_j Λ_jj − log |Λ|) (Bishop 2006, §10.1.2).
    """
    precision = torch.linalg.inv(_gaussian(posterior)[1])
    diagonal = precision.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return float(0.5 * (diagonal - torch.logdet(precision)).mean())


def _gaussian(posterior: TaskPosterior) -> tuple[Tensor, Tensor]:
    """Mean (tasks, p) and covariance (tasks, p, p) of the coefficients, which are φ itself."""
    density = posterior.density
    if isinstance(density, Delta):
        return density.loc.double(), torch.diag_embed(torch.zeros_like(density.loc.double()))
    if isinstance(density, Gaussian):
        root = torch.diag_embed(density.scale) if density.diagonal else density.scale
        return density.loc.double(), (root @ root.mT).double()
    values, weights = posterior.values(draws=10**9)
    draws = values["coefficients"].double()
    share = (torch.zeros_like(draws[..., 0]) if weights is None else weights.double()).softmax(0)
    mean = (share.unsqueeze(-1) * draws).sum(0)
    offset = draws - mean
    return mean, torch.einsum("st,sti,stj->tij", share, offset, offset)


def _text(found: Mapping[str, tuple[float, float]], exact: TaskPosterior, budget: Budget) -> str:
    rows = [[name, _number(kl), _number(w2)] for name, (kl, w2) in found.items()]
    said = {
        "tasks": "φ = (intercept, slope), mean (1, −0.5), variances 1 and 0.5, covariance 0.3; "
        "x ~ U[0, 2], noise 0.5. Prior and noise are known to every fit.",
        "amortized": f"One network for all tasks, {budget.guide:,} steps of 64 tasks. Its "
        "Gaussian is full, or diagonal: the factorised (mean-field) form, whose best member has "
        f"KL {_number(mean_field_divergence(exact))} here.",
        "maml": "5 gradient steps of size 0.05 from the prior's mean: a point.",
        "pooling": "Each task alone, and all as one: points that know no prior.",
    }
    table = aligned(["", "KL(q ‖ exact)", "W₂ to exact"], rows)
    return "\n".join([entries(said), "", *table])


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "∞" if math.isinf(value) else f"{max(value, 0.0):.2g}" if value > 1e-7 else "0"


def _figures(posteriors: Mapping[str, TaskPosterior]) -> dict[str, Callable[[], Figure]]:
    chosen = {n: p for n, p in posteriors.items() if n not in ("quadrature", "complete pooling")}
    counts = posteriors[_EXACT].support.counts
    # Three points leave the posterior visibly wide and correlated.
    task = posteriors[_EXACT].ids[int((counts - 3).abs().argmin())]
    return {
        "posterior": lambda: marginals.densities(
            chosen, task=task, coordinates=(0, 1), labels=("intercept", "slope")
        )
    }
