"""Small fits to certify, made once; nobody changes them."""

import functools

import torch

from hbmeta import inference, models, tasks
from hbmeta.certification import certify

FAMILY = tasks.LinearTasks([1.0, -0.5], [[1.0, 0.3], [0.3, 0.5]], noise=0.3, shots=5, queries=10)
SQUARED = {"loss": "truncated-squared", "scale": 2.0}


@functools.cache
def episodes(n_tasks=40, seed=1):
    return FAMILY.sample(n_tasks, seed=seed)


def fit(strategy, model, data, *, steps=1):
    return strategy.fit(model, data, steps=steps, compile=False, progress=False)


@functools.cache
def linear(first=1.0):
    """The exact posterior under N((first, −0.5), Σ), everything known; fitted on other tasks."""
    model = models.LinearRegression([first, -0.5], [[1.0, 0.3], [0.3, 0.5]], noise=0.3)
    return fit(inference.ExactLinear(), model, episodes(20, 0))


CENTRES = (-3.0, 0.0, 1.0, 4.0)


def candidates():
    return [linear(first) for first in CENTRES]


@functools.cache
def network():
    """MAML on a small network, trained a little on the tasks `episodes()`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.NeuralRegression(hidden=(4,))
    return fit(inference.MAML(steps=2), model, episodes(), steps=5)


@functools.cache
def prototypes():
    """Class means in the plane: nothing is learned."""
    clusters = tasks.Clusters(ways=3, shots=2, queries=4, dtype=torch.float64)
    model = models.ClassConditional(None, 3)
    return fit(inference.ProtoNet(), model, clusters.sample(4, seed=0)), clusters.sample(30, seed=1)


@functools.cache
def meta_test():
    return certify(linear(), episodes(), **SQUARED)
