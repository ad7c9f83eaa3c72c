"""The gradient that training follows: one graph or pieces, the prior, the mean over tasks."""

from dataclasses import dataclass

import pytest
import torch

from hbmeta.inference import MAML, AmortizedGuide
from hbmeta.models import NeuralRegression
from hbmeta.program import Batch, Functional
from hbmeta.tasks import Sinusoids
from hbmeta.training import mean_over_queries
from tests.cases import case

EAGER = {"compile": False, "seed": 0, "progress": False}


class Autograd:
    """The gradient of a strategy's loss by autograd, handed in from outside of the loop."""

    tier = "eager"
    seconds_staging = 0.25

    def __init__(self, strategy, problem, own):
        self.strategy, self.problem, self.own, self.calls = strategy, problem, own, 0

    def __call__(self, theta, own, support, query, noise):
        self.calls += 1
        leaves = {f"theta/{k}": v for k, v in theta.items()}
        leaves |= {f"own/{k}": v for k, v in own.items()}
        assert not any(value.requires_grad for value in leaves.values())
        leaves = {k: v.clone().requires_grad_() for k, v in leaves.items()}
        theta = {k: leaves[f"theta/{k}"] for k in theta}
        bound = None
        if self.own is not None:
            bound = Functional(self.own, {k: leaves[f"own/{k}"] for k in own})
        losses = self.strategy.loss(self.problem, theta, bound, support, query, noise)
        loss = mean_over_queries(losses, query)
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        gradients = {
            # In another order in memory, as a compiled graph may return them.
            key: value.movedim(0, -1).contiguous().movedim(-1, 0) if value.ndim > 1 else value
            for key, value in zip(leaves, found, strict=True)
            if value is not None
        }
        return loss.detach(), gradients

    def finish(self):
        return {"calls": self.calls}


@dataclass(frozen=True)
class WholeMAML(MAML):
    def meta_gradient(self, problem, own, options):
        return None


@dataclass(frozen=True)
class PiecewiseMAML(MAML):
    def meta_gradient(self, problem, own, options):
        return Autograd(self, problem, own)


@dataclass(frozen=True)
class PiecewiseGuide(AmortizedGuide):
    def meta_gradient(self, problem, own, options):
        assert options.steps == 12
        return Autograd(self, problem, own)


def test_pieces_train_to_the_same_bits():
    """A network: no prior on θ, so that the data's gradient is all there is."""
    model, source = NeuralRegression(hidden=(6, 5)), Sinusoids(shots=4, queries=(1, 3))
    whole, pieces = (
        kind(steps=2, step_size=0.02).fit(model, source, steps=20, tasks_per_step=4, **EAGER)
        for kind in (WholeMAML, PiecewiseMAML)
    )
    assert pieces.history == whole.history
    assert all(torch.equal(pieces.theta[k], v) for k, v in whole.theta.items())
    found, wanted = dict(pieces.info), dict(whole.info)
    assert torch.equal(found.pop("distance_to_mode"), wanted.pop("distance_to_mode"))
    assert found == {**wanted, "calls": 20}
    assert pieces.seconds.staging == 0.25
    start = model.bind(source.sample(2, seed=0).all)
    moved = [not torch.equal(pieces.theta[k], v) for k, v in start.named_parameters()]
    assert all(moved)


@pytest.mark.parametrize("tier", [False, "graph"])
def test_the_prior_is_added_to_pieces(tier):
    """Global sites in units of their prior's scale, a network of the strategy's own, noise."""
    known = case("varying_intercepts")
    settings = {"steps": 12, "compile": tier, "seed": 0, "progress": False}
    whole, pieces = (
        kind(hidden=8).fit(known.program, known.tasks, **settings)
        for kind in (AmortizedGuide, PiecewiseGuide)
    )
    torch.testing.assert_close(pieces.history, whole.history, rtol=1e-9, atol=0.0)
    assert set(whole.theta) == {"mean", "fixed", "scale", "noise"}
    for name, value in whole.theta.items():
        torch.testing.assert_close(pieces.theta[name], value, rtol=1e-8, atol=1e-10)
    for name, value in whole.own.state_dict().items():
        torch.testing.assert_close(pieces.own.state_dict()[name], value, rtol=1e-7, atol=1e-9)


def test_a_theta_without_gradient_is_untouched_by_pieces():
    known = case("two_coefficients")
    with pytest.warns(UserWarning, match="does not depend on scale"):
        fitted = PiecewiseMAML(steps=1).fit(known.program, known.tasks, steps=3, **EAGER)
    assert fitted.info["untouched"] == ["scale"]
    start = fitted.problem.theta(fitted.problem.batch(fitted.tasks))
    assert torch.equal(fitted.theta["scale"], start["scale"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_mean_counts_tasks_with_a_query(dtype):
    weight = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]], dtype=dtype)
    query = Batch(torch.zeros(3, 2, 1, dtype=dtype), None, weight, None, 3)
    losses = torch.tensor([1.0, 100.0, 4.0], dtype=dtype)
    found = mean_over_queries(losses, query)
    assert found.item() == 2.5
    assert found.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    empty = Batch(query.x, None, torch.zeros_like(weight), None, 3)
    assert mean_over_queries(losses, empty).item() == 0.0
