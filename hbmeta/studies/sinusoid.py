"""Sine waves: what each approximation makes of 5 points of a wave (Finn et al. 2017, §5.1).

    y = A sin(x − b),  A ~ U[0.1, 5], b ~ U[0, π], x ~ U[−5, 5], no noise

The family is not told to any model. All models are networks; what differs is which distribution of
functions they bring along, and how they update it on the support.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import arviz
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from hbmeta import panels
from hbmeta.comparison import compare
from hbmeta.fitted import Fitted
from hbmeta.inference import MAML, NUTS, AmortizedGuide, LatentNP
from hbmeta.models import LatentProcess, NeuralRegression
from hbmeta.studies.common import Outcome, Plan, Say, Study, entries, fit_plans
from hbmeta.studies.waves import adaptation, error_by_step, grid_of
from hbmeta.tasks import Episode, Sinusoids, Tasks

__all__ = ["Budget", "run"]

_SHOTS = 5
_STEP_SIZE = 0.01
_SCRATCH = "from scratch"
_STEPS = (0, 1, 2, 3, 5, 10, 20, 50, 100, 200)


@dataclass(frozen=True)
class Budget:
    """How much work the study is.

    Attributes:
        maml: training steps of MAML, 25 tasks each (the paper: 70,000).
        guide: training steps of the amortized guide.
        latent: training steps of the latent neural process.
        scratch: gradient steps of fitting from scratch.
        draws: draws and warm-up steps of NUTS, per chain.
        depth: a trajectory of NUTS has at most 2 to this power steps.
        tasks: held-out tasks.
        sampled: how many of them NUTS is run on, 2 or more.
        hidden: widths of the networks.
        predictive: draws of the weights in each predictive.
    """

    maml: int = 10_000
    guide: int = 3_000
    latent: int = 4_000
    scratch: int = 200
    draws: int = 400
    depth: int = 8
    tasks: int = 200
    sampled: int = 20
    hidden: tuple[int, ...] = (40, 40)
    predictive: int = 200


def _find(budget: Budget, seed: int, say: Say, compile: bool | str) -> Outcome:
    budget = replace(budget, sampled=min(budget.sampled, budget.tasks))
    family = Sinusoids()
    held_out = replace(family, shots=_SHOTS, queries=50, dtype=torch.float64)
    # Training draws tasks with seeds made of `seed` and the number of the step; these are others.
    test, truth = held_out.sample_with_truth(budget.tasks, seed=2**32 + seed)
    sampled = test[torch.arange(budget.sampled)]
    fits = fit_plans(_plans(family, sampled, budget, compile), seed=seed, compile=compile, say=say)
    trained = {name: fitted for name, fitted in fits.items() if name != "nuts"}
    draws = budget.predictive
    tables = {
        "all": compare(trained, test, draws=draws, seed=seed),
        "sampled": compare(fits, sampled, draws=draws, seed=seed),
    }
    say("compared")
    captions = {
        "all": f"{budget.tasks} new waves, {_SHOTS} points each",
        "sampled": f"the first {budget.sampled} of them, with NUTS",
    }
    return Outcome(
        title="Sinusoids: what a network makes of 5 points of a wave that it was not told about",
        text=_text(fits, test, budget),
        comparisons=tables,
        captions=captions,
        figures=_figures(fits, sampled, test, truth, budget),
    )


run = Study(
    _find,
    full=Budget(),
    quick=Budget(
        maml=1_500, guide=500, latent=800, draws=200, depth=7, tasks=100, sampled=6, predictive=100
    ),
)
"""Fits on tasks of 10 + 10 points, judges on held-out tasks of 5 + 50 points."""


def _plans(
    family: Sinusoids, sampled: Episode, budget: Budget, compile: bool | str
) -> dict[str, Plan]:
    # With the default noise √½ the loss is the squared error of the paper.
    network = NeuralRegression(hidden=budget.hidden)
    guided = NeuralRegression(hidden=(20, 20), noise=None, prior_scale="learned")
    alone = NeuralRegression(
        hidden=(8,), mean="zero", activation="tanh", noise=0.3, prior_scale=3.0
    )
    steps = {"steps": budget.maml}
    return {
        "maml 1 step": Plan(MAML(steps=1, step_size=_STEP_SIZE), network, family, steps),
        "maml 5 steps": Plan(MAML(steps=5, step_size=_STEP_SIZE), network, family, steps),
        "amortized": Plan(
            AmortizedGuide(),
            guided,
            family,
            # Compiling its many nodes takes longer than these steps.
            {"steps": budget.guide, "compile": "graph" if compile == "auto" else compile},
        ),
        "latent np": Plan(
            LatentNP(),
            LatentProcess(),
            replace(family, shots=(3, 10)),
            {"steps": budget.latent, "tasks_per_step": 32},
        ),
        _SCRATCH: Plan(
            MAML(steps=budget.scratch, step_size=_STEP_SIZE),
            network,
            family,
            {"steps": 1, "learning_rate": 0.0, "compile": False},
        ),
        "nuts": Plan(
            NUTS(draws=budget.draws, warmup=budget.draws, chains=2, max_tree_depth=budget.depth),
            alone,
            sampled.support,
            network=True,
        ),
    }


def _text(fits: Mapping[str, Fitted], test: Episode, budget: Budget) -> str:
    learned = float(fits["amortized"].globals()["noise"])
    hidden = "-".join(map(str, (1, *budget.hidden, 1)))
    r_hat = _r_hat(fits["nuts"], test)
    said = {
        "tasks": "y = A sin(x − b), A ~ U[0.1, 5], b ~ U[0, π], x ~ U[−5, 5], without noise. "
        f"Training tasks have 10 points to adapt to; the {budget.tasks} held-out ones have "
        f"{_SHOTS}, and 50 points to be judged by.",
        "maml": f"A network {hidden}, all weights adapted by 1 or 5 gradient steps from a start θ "
        f"that was learned in {budget.maml:,} steps of 25 tasks (the paper: 70,000).",
        "amortized": "A Gaussian over the weights of a network 1-20-20-1, given by an encoder of "
        f"the support, learned in {budget.guide:,} steps.",
        "latent np": "A latent process: a vector z per task, which a network turns into a wave and "
        "its noise, given by an encoder of 3 to 10 points; learned in "
        f"{budget.latent:,} steps of 32 tasks.",
        _SCRATCH: f"{budget.scratch} gradient steps from a random start of the network of maml; "
        "nothing was learned before.",
        "nuts": "Draws of the weights of a network 1-8-1, each task for itself, under a prior that "
        "knows no waves: exact for that model, and no better than its prior. First "
        f"{budget.sampled} tasks. R̂ of its mean predictions is at most {r_hat:.2f}; that of single "
        "weights says little, because many sets of weights are one function.",
        "noise": "The waves have none. A model's noise is what its network leaves unexplained: √½ "
        "for maml and from scratch, so that the loss is the squared error (plus 0.572) and "
        f"the steps are the paper's; learned by amortized ({learned:.2f}); 0.3 for nuts.",
    }
    return entries(said)


def _r_hat(nuts: Fitted, test: Episode) -> float:
    """The largest split R̂ of the predicted mean over the query points of the tasks of the fit."""
    posterior = nuts.posterior
    x = test.query.select(posterior.ids)
    particles = posterior.particles(draws=10**9)
    batch = nuts.problem.batch(x)
    mean = nuts.problem.particle_response(particles.theta, particles.drawn, particles.phi, batch)
    chains = mean.mean.reshape(nuts.chains, -1, *mean.mean.shape[1:]).detach().cpu().numpy()
    if chains.shape[1] < 4:
        return float("nan")
    with np.errstate(all="ignore"):
        return float(arviz.rhat(arviz.convert_to_dataset(chains))["x"].max())


def _figures(
    fits: Mapping[str, Fitted],
    sampled: Episode,
    test: Episode,
    truth: Mapping[str, Tensor],
    budget: Budget,
) -> dict[str, Callable[[], Figure]]:
    # A wave of middling and one of large amplitude, of those that NUTS saw too.
    order = truth["amplitude"][: len(sampled.ids)].argsort()
    chosen = [int(order[(len(order) - 1) // 2]), int(order[-1])]
    grid = grid_of(-5.0, 5.0, 201)

    def wave(task: int) -> Tensor:
        return truth["amplitude"][task] * torch.sin(grid - truth["phase"][task])

    curves = {test.ids[task]: (grid, wave(task)) for task in chosen}
    two = test.support.select([test.ids[task] for task in chosen])

    def bands() -> Figure:
        one = two.select(two.ids[:1])
        x = Tasks(grid.reshape(1, -1, 1), ids=one.ids, features=one.features)
        found = {}
        for name, fitted in fits.items():
            posterior = fitted.posterior_of(one)
            found[name] = posterior.predict(x, draws=budget.predictive)
        truth_of = {"the wave": curves[one.ids[0]]}
        return panels.bands(found, one, truth=truth_of, labels=("x", "y"))

    long = sorted({0, budget.scratch // 40, budget.scratch // 4, budget.scratch})
    steps = [number for number in _STEPS if number <= max(10, budget.scratch)]
    by_step = {name: fits[name] for name in ("maml 1 step", "maml 5 steps", _SCRATCH)}
    return {
        "adaptation": lambda: adaptation(fits["maml 5 steps"], two, curves, (0, 1, 5, 10)),
        "scratch": lambda: adaptation(fits[_SCRATCH], two, curves, long),
        "steps": lambda: error_by_step(by_step, test, steps, among=fits),
        "bands": bands,
    }
