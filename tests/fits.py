"""Small fits of every strategy on one small table, made once per process."""

import functools
import warnings

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn

from hbmeta import models, tasks
from hbmeta.fitted import Fitted
from hbmeta.inference import (
    MAML,
    NUTS,
    AmortizedGuide,
    CompletePooling,
    ExactLinear,
    NoPooling,
    Strategy,
)

STRATEGIES: dict[str, Strategy] = {
    "NUTS": NUTS(draws=200, chains=2, warmup=100, target_accept=0.6, max_tree_depth=4),
    "MAML": MAML(steps=3, step_size=0.05),
    "AmortizedGuide": AmortizedGuide(hidden=8),
    "ExactLinear": ExactLinear(),
    "NoPooling": NoPooling(),
    "CompletePooling": CompletePooling(),
}
TINY: dict[str, Strategy] = STRATEGIES | {
    "NUTS": NUTS(draws=5, chains=2, warmup=5, max_tree_depth=3, processes=1)
}
"""The same with as few draws as will do where only their being the same matters."""

SCORE = (50.0, 10.0)


def table(groups="abcdef", sizes=(3, 9, 5, 8, 4, 6), *, seed=0) -> pd.DataFrame:
    """Scores of schools against hours, around 50 with a standard deviation near 10."""
    rng = np.random.default_rng(seed)
    school = np.repeat(list(groups), sizes)
    effect = dict(zip(groups, rng.standard_normal(len(groups)), strict=True))
    hours = rng.uniform(-1, 1, len(school))
    noise = 0.4 * rng.standard_normal(len(school))
    score = 0.8 * np.array([effect[g] for g in school]) + 0.5 * hours + noise
    return pd.DataFrame(
        {"school": school, "hours": hours, "score": SCORE[0] + SCORE[1] * score},
    ).sample(frac=1.0, random_state=seed, ignore_index=True)


def task_set() -> tasks.TaskSet:
    """The table as tasks, its score standardised."""
    return tasks.from_frame(table(), group="school", x=["hours"], y="score", standardise=["score"])


def new_tasks(*, seed=1) -> tasks.Tasks:
    """Two further schools of 2 and 4 rows, encoded as the fitted ones."""
    schema = task_set().schema
    assert schema is not None
    return schema.encode(table("yz", (2, 4), seed=seed), need_y=True).tasks


def model() -> models.VaryingEffects:
    return models.VaryingEffects(fixed=["hours"], varying=["intercept"])


class Heads(PyroModule):
    """A program with parameters of a module, which have no prior."""

    def __init__(self, width=2):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1.0, 1.0, width).reshape(1, width))
        self.start = nn.Parameter(torch.zeros(width))

    def forward(self, x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            head = pyro.sample("head", dist.Normal(self.start, 1.0).to_event(1))
            with pyro.plate("point", x.shape[1], dim=-1):
                mean = (torch.tanh(x @ self.weight) * head).sum(-1)
                return pyro.sample("y", dist.Normal(mean, 0.3), obs=y)


def fit(strategy: Strategy, data=None, program=None, **settings) -> Fitted:
    """A short fit, not staged; warnings of a short run are not what is tested."""
    settings = {"steps": 4, "compile": False, "progress": False} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return strategy.fit(
            model() if program is None else program,
            task_set() if data is None else data,
            **settings,
        )


@functools.cache
def fitted(name: str) -> Fitted:
    """The fit of a strategy of STRATEGIES; nobody changes it."""
    return fit(STRATEGIES[name], steps=20, compile="graph" if name == "NUTS" else False)


def adapted(name: str, support=None, **overrides):
    """What the fit says of new schools."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fitted(name).adapt(new_tasks() if support is None else support, **overrides)
