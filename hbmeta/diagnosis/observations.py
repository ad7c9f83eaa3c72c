"""The response against its predictive: whether the model is wrong, not its approximation.

Estimator: with weights v_rs ∝ 1 / p(y_r | φ_s, θ_s), Pareto-smoothed, draws of the posterior become
draws of the one without row r, and

    u_r = P(Y_r ≤ y_r | all rows but r) = Σ_s v_rs F(y_r | φ_s, θ_s)

is uniform under the model (for counts F(y − 1) + v (F(y) − F(y − 1)) with v uniform). χ² over bins
of equal probability; rejected at p < 0.01, which a right model with independent rows meets once in
a hundred diagnoses.

References:
    Gelfand, Dey, Chang (1992), Bayesian Statistics 4, for the leave-one-out predictive. Vehtari,
    Gelman, Gabry (2017), Stat. Comput. 27, for the weights. Czado, Gneiting, Held (2009),
    Biometrics 65, for counts.
"""

from __future__ import annotations

import torch
from scipy import stats
from torch import Tensor

from hbmeta.components import Mixture as Components
from hbmeta.densities import Delta
from hbmeta.diagnosis.records import Symptom
from hbmeta.importance import pareto_smoothed
from hbmeta.mixtures import Mixture
from hbmeta.posterior import TaskPosterior

__all__ = ["leave_one_out_pit", "symptoms_of_model"]

_FEWEST_ROWS = 40
_FALSE_ALARMS = 0.01
# Draws × rows held at once.
_CELLS = 8_000_000
_DRAWS, _FEWEST_DRAWS = 1000, 200


def leave_one_out_pit(posterior: TaskPosterior, seed: int) -> Tensor | None:
    """(rows,) u_r of the support; None where the response is no number, or rows depend on others.

    Args:
        posterior: draws or a density; not a point, whose predictive knows no uncertainty of φ.
        seed: of draws, and of v.
    """
    problem, tasks = posterior.problem, posterior.support
    y = tasks.flat_y
    if y is None or y.dim() > 1 or problem.layout == "joint" or problem.classes is not None:
        return None
    if not y.is_floating_point() or isinstance(posterior.density, Delta):
        return None
    draws = min(_DRAWS, _CELLS // max(len(y), 1))
    if draws < _FEWEST_DRAWS or len(y) < _FEWEST_ROWS:
        return None
    log_likelihood, log_weights = posterior.log_likelihood(draws, seed)
    without = -log_likelihood.double()
    if log_weights is not None:
        without = without + log_weights.double()[:, tasks.task]
    smoothed, _ = pareto_smoothed(without, torch.full_like(without[0], 1e-9))
    particles = posterior.particles(draws, seed)
    mixture = Mixture(
        Components(problem, particles, tasks, tasks), tasks, None, smoothed.log_softmax(0)
    )
    upper = mixture.cdf(y, seed)
    if not bool(mixture.first.support.is_discrete):
        return upper
    lower = mixture.cdf(y - 1, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    return lower + torch.rand(len(y), generator=generator, dtype=torch.float64) * (upper - lower)


def symptoms_of_model(posterior: TaskPosterior, trusted: bool, seed: int) -> list[Symptom]:
    """A response that the model does not predict.

    Args:
        posterior: to predict by.
        trusted: whether it is known to be near the true one.
        seed: of the check.
    """
    u = leave_one_out_pit(posterior, seed)
    if u is None or not bool(u.isfinite().all()):
        return []
    bins = min(20, len(u) // 10)
    count = torch.histc(u.clamp(0.0, 1.0), bins, 0.0, 1.0)
    expected = len(u) / bins
    statistic = float(((count - expected).square() / expected).sum())
    p = float(stats.chi2.sf(statistic, bins - 1))
    if p >= _FALSE_ALARMS:
        return []
    third = len(u) / 3
    tails = float(((u < 1 / 6) | (u > 5 / 6)).sum())
    shape = "too many far out" if tails > third else "too few far out"
    blame = (
        ""
        if trusted
        else " Or the approximation is, by which this was predicted: settle that first."
    )
    return [
        Symptom(
            name="observations against their predictive",
            about="model",
            measured=f"χ² = {statistic:.0f} in {bins} bins of {len(u)} rows, p = {p:.1g}; {shape} "
            f"({tails:.0f} in the outer third, {third:.0f} expected)",
            sure="a right model with independent rows is accused once in a hundred diagnoses",
            means="the model itself, its family or its noise, is off for these rows: predictive "
            "intervals are wrong even where the posterior is computed without error." + blame,
            do="Try another family (Student-t for heavy tails, negative binomial for counts), or a "
            "column that is missing.",
        )
    ]
