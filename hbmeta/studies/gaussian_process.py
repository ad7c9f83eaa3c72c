"""Functions from a Gaussian process whose lengthscale differs from task to task.

    f_i ~ GP(0, k_{ℓ_i}),  ℓ_i ~ U[0.25, 1],  y_ij = f_i(x_ij) + ε_ij,  ε ~ N(0, 0.1²)

The exact predictive with the task's own ℓ is an oracle: no method that has to infer ℓ reaches it in
expectation. The exact predictive with ℓ integrated out is the best that such a method can do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import arviz
import numpy as np
import torch
from matplotlib.figure import Figure

from hbmeta import marginals, panels
from hbmeta.comparison import compare
from hbmeta.fitted import Fitted
from hbmeta.inference import MAML, NUTS, ExactGP, LatentNP
from hbmeta.models import GaussianProcess, LatentProcess, NeuralRegression
from hbmeta.oracles import known_kernel
from hbmeta.records import Comparison
from hbmeta.rows import Score
from hbmeta.studies.common import Outcome, Plan, Say, Study, entries, fit_plans
from hbmeta.studies.waves import grid_of
from hbmeta.tasks import Episode, GaussianProcessTasks, Tasks

__all__ = ["Budget", "agreement", "run"]

_EXACT, _NUTS, _LATENT, _ORACLE = "exact", "nuts", "latent np", "exact, ℓ known"
_CONTEXT = 10


@dataclass(frozen=True)
class Budget:
    """How much work the study is.

    Attributes:
        latent: training steps of the neural process, 32 tasks each.
        maml: training steps of MAML, 25 tasks each.
        draws: draws and half as many warm-up steps of NUTS, per chain.
        tasks: held-out tasks.
        sampled: how many of them NUTS is run on.
    """

    latent: int = 10_000
    maml: int = 8_000
    draws: int = 1_000
    tasks: int = 400
    sampled: int = 20


def _find(budget: Budget, seed: int, say: Say, compile: bool | str) -> Outcome:
    budget = replace(budget, sampled=min(budget.sampled, budget.tasks))
    family = GaussianProcessTasks(dtype=torch.float32)
    held_out = replace(family, shots=_CONTEXT, queries=30, dtype=torch.float64)
    # Training draws tasks with seeds made of `seed` and the number of the step; these are others.
    test, truth = held_out.sample_with_truth(budget.tasks, seed=2**32 + seed)
    sampled = test[torch.arange(budget.sampled)]
    process = GaussianProcess("rbf", lengthscale=(0.25, 1.0), scale=1.0, noise=0.1)
    plans = {
        _EXACT: Plan(ExactGP(), process, test.support),
        _NUTS: Plan(
            NUTS(draws=budget.draws, warmup=max(budget.draws // 2, 100)), process, sampled.support
        ),
        _LATENT: Plan(
            LatentNP(),
            LatentProcess(),
            family,
            {"steps": budget.latent, "tasks_per_step": 32, "learning_rate": 2e-3},
        ),
        "maml": Plan(
            MAML(steps=5, step_size=0.01),
            NeuralRegression(hidden=(40, 40)),
            replace(family, shots=_CONTEXT),
            {"steps": budget.maml},
        ),
    }
    fits = fit_plans(plans, seed=seed, compile=compile, say=say)
    whole = {name: fitted for name, fitted in fits.items() if name != _NUTS}
    few = {name: values[: budget.sampled] for name, values in truth.items()}
    tables = {
        "all": compare(
            whole,
            test,
            baseline=_EXACT,
            oracles={_ORACLE: known_kernel(held_out, test, truth)},
            seed=seed,
        ),
        "sampled": compare(
            fits,
            sampled,
            reference=_EXACT,
            oracles={_ORACLE: known_kernel(held_out, sampled, few)},
            seed=seed,
        ),
    }
    say("compared")
    return Outcome(
        title="A Gaussian process per task, its lengthscale unknown: five predictives beside the "
        "exact ones",
        text=_text(fits, tables["all"], budget),
        comparisons=tables,
        captions={
            "all": f"{budget.tasks} new functions, {_CONTEXT} context points each",
            "sampled": f"the first {budget.sampled} of them, with NUTS over ℓ",
        },
        figures=_figures(fits, sampled, held_out, truth["lengthscale"]),
    )


run = Study(
    _find, full=Budget(), quick=Budget(latent=2_000, maml=1_000, draws=300, tasks=100, sampled=5)
)
"""Trains on tasks of 3 to 20 points, judges on tasks of 10 points and 30 held-out ones."""


def agreement(nuts: Fitted, exact: Fitted) -> tuple[float, int]:
    """NUTS's posterior mean of ℓ against quadrature, in standard errors of Monte Carlo.

    Returns:
        the largest |z| over tasks, and their number; of n independent z the largest is below
        Φ⁻¹(1 − 0.0005/n) with probability 0.999.
    """
    posterior = nuts.posterior
    draws = posterior.values(draws=10**9)[0]["lengthscale"].double()
    chains = draws.reshape(nuts.chains, -1, draws.shape[1]).numpy()
    with np.errstate(all="ignore"):
        error = arviz.mcse(arviz.convert_to_dataset(chains))["x"].values
    mean = exact.posterior_of(posterior.support).moments()["lengthscale"][0].double()
    z = (draws.mean(0) - mean).numpy() / error
    return float(np.abs(z).max()), len(z)


def _text(fits: Mapping[str, Fitted], table: Comparison, budget: Budget) -> str:
    largest, n = agreement(fits[_NUTS], fits[_EXACT])
    limit = -torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.0005 / n)).item()
    row = next(row for row in table.rows if row.name == _LATENT)
    gaps = [_gap(row.scores[key]) for key in ("nll", "joint_nll")]
    history = torch.tensor(fits[_LATENT].history)
    tenth = max(1, len(history) // 10)
    first, last = float(history[:tenth].mean()), float(history[-tenth:].mean())
    seconds = fits[_LATENT].seconds.fit
    said = {
        "tasks": "f ~ GP(0, RBF of lengthscale ℓ and unit scale), ℓ ~ U[0.25, 1] in each task, "
        f"x ~ U[−2, 2], noise 0.1. Training tasks have 3 to 20 points, held-out ones {_CONTEXT}.",
        "exact": "The Gaussian process itself, ℓ integrated out by quadrature; and, as an oracle, "
        "with each task's true ℓ.",
        _NUTS: f"Draws of ℓ. Its posterior means differ from quadrature's by at most {largest:.2f} "
        f"standard errors of Monte Carlo over {n} tasks (below {limit:.2f} in 999 of 1,000 runs).",
        _LATENT: f"z of 32 numbers, trained for {budget.latent:,} steps of 32 tasks in "
        f"{seconds:.0f} s; training loss per target {first:.3f} in the first tenth, {last:.3f} in "
        f"the last. Behind the exact one by {gaps[0]} nats per target, {gaps[1]} jointly.",
        "maml": "A network 1-40-40-1, 5 gradient steps from a start learned in "
        f"{budget.maml:,} steps of 25 tasks of {_CONTEXT} points; noise √½, so that the loss is "
        "the squared error.",
    }
    return entries(said)


def _gap(score: Score) -> str:
    assert score.difference is not None
    assert score.difference_error is not None
    return f"{score.difference:.3f} ± {score.difference_error:.3f}"


def _figures(
    fits: Mapping[str, Fitted],
    sampled: Episode,
    family: GaussianProcessTasks,
    lengthscale: torch.Tensor,
) -> dict[str, Callable[[], Figure]]:
    # Of the tasks that NUTS saw too, the one whose lengthscale is the median.
    order = lengthscale[: len(sampled.ids)].argsort()
    one = sampled.support.select([sampled.ids[int(order[len(order) // 2])]])
    held_out = sampled.query.select(one.ids)

    def bands() -> Figure:
        grid = grid_of(family.low, family.high, 201)
        x = Tasks(grid.reshape(1, -1, 1), ids=one.ids, features=one.features)
        found = {name: fitted.posterior_of(one).predict(x) for name, fitted in fits.items()}
        return panels.bands(found, one, query=held_out, labels=("x", "y"))

    def posterior() -> Figure:
        both = {name: fits[name].posterior_of(one) for name in (_NUTS, _EXACT)}
        return marginals.densities(both, task=one.ids[0], site="lengthscale", labels=["ℓ"])

    trained = {name: fits[name] for name in (_LATENT, "maml")}
    return {
        "bands": bands,
        "lengthscale": posterior,
        "learning": lambda: panels.learning_curves(trained),
    }
