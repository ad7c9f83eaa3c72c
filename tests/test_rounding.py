import copy

import pytest
import torch
from torch import nn

from hbmeta.inference import MAML
from hbmeta.models import NeuralRegression
from hbmeta.problem import Problem
from hbmeta.rounding import moved_by_rounding
from hbmeta.staging import trace
from hbmeta.tasks import Sinusoids

FUNCTIONS = {
    "cancelling": lambda x: ((x + 3e3) - 3e3).exp(),
    "smooth": lambda x: (x.sin() * x.exp()).cumsum(0),
    "variance": lambda x: 1.0 / (0.01 * x + 50.0).var(),
    "second derivative": lambda x: torch.vmap(torch.func.grad(torch.func.grad(torch.tanh)))(x),
    "inverse": lambda x: torch.linalg.inv(torch.outer(x, x) + 1e-3 * torch.eye(len(x)).to(x)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_it_is_as_large_as_the_error_of_single_precision(name, untouched):
    """The error against double precision: hardly more, and less only where it happened to cancel.

    Numbers with fixed seeds.
    """
    function = FUNCTIONS[name]
    x = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    with untouched():
        (moved,) = moved_by_rounding(function, (x,))
    error = float((function(x).double() - function(x.double())).abs().max())
    assert error / 5 <= moved <= 200 * error


def test_whole_numbers_are_exact():
    def counts(weight):
        total = weight.sum()
        return total, (total >= 3).to(weight), weight * 2.0

    assert moved_by_rounding(counts, (torch.ones(3),)) == [0.0, 0.0, 0.0]


def test_what_changes_from_call_to_call_is_not_rounding():
    calls = iter(range(10))
    assert moved_by_rounding(lambda x: x * float(next(calls)), (torch.rand(3),)) == [0.0]


def test_tensors_that_are_no_numbers_are_left_out():
    found = moved_by_rounding(lambda x: (x.argmax(), None, x * 0.3, x[:0]), (torch.rand(4),))
    assert len(found) == 2
    assert found[1] == 0.0


@pytest.mark.slow
def test_a_graph_of_batch_norm_in_single_precision_differs_by_no_more():
    """w of a first layer has next to no gradient: BN(w x + b) hardly depends on its size."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(1, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 40),
            nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 1),
        )  # fmt: skip
    episode = Sinusoids().sample(25, seed=0).to(dtype=torch.float32)
    problem = Problem(NeuralRegression(network=net).bind(episode.all), episode.all)
    batches = problem.batch(episode.support), problem.batch(episode.query)

    def gradient(theta, support, query):
        theta = {name: value.detach().requires_grad_() for name, value in theta.items()}
        losses = MAML(steps=1).loss(problem, theta, None, support, query, {})
        return torch.autograd.grad(losses.mean(), list(theta.values()))

    args = (problem.theta(batches[0]), *batches)
    graph, _ = trace(gradient, copy.copy(args))
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(leaf)]
    eager, traced = gradient(*args), graph(*tensors)
    moved = moved_by_rounding(gradient, args)
    ratios = []
    for one, other, limit in zip(eager, traced, moved, strict=True):
        difference = float((one - other).abs().max())
        assert difference <= 10 * limit
        ratios.append(difference / float(one.abs().max()))
    assert max(ratios) > 1e-4
