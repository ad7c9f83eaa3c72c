"""Bounds against their formulas, and gradients of them against plain automatic differentiation."""

import math

import pytest
import torch

from hbmeta.densities import Gaussian
from hbmeta.variational import Bound

ALPHAS = (0.0, 0.3, 1.0, 2.0)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def log_target(phi, theta):
    """log p(y, φ): φ ~ N(θ, 1), y = 0.7 ~ N(φ², 1), not a Gaussian in φ; normalised in y."""
    prior = -0.5 * (phi - theta).square().sum(-1)
    return prior - 0.5 * (0.7 - phi.square()).square().sum(-1) - math.log(2 * math.pi)


def test_limits_and_the_written_out_formula():
    log_w = normal(6, 2) * 3
    weights = log_w.exp()
    torch.testing.assert_close(Bound(1.0, 6).value(log_w), log_w.mean(0))
    torch.testing.assert_close(Bound(0.0, 6).value(log_w), weights.mean(0).log())
    torch.testing.assert_close(Bound(0.5, 6).value(log_w), 2 * weights.sqrt().mean(0).log())
    # L_α is smooth in α: (L_α − L_1) = (1 − α) Var(log w) / 2 + …
    near = Bound(1 - 1e-6, 6).value(log_w) - log_w.mean(0)
    torch.testing.assert_close(near, 0.5e-6 * log_w.var(0, unbiased=False), rtol=1e-3, atol=1e-9)


def test_bounds_fall_with_alpha_and_do_not_overflow():
    log_w = normal(5, 3) * 400
    values = torch.stack([Bound(alpha, 5).value(log_w) for alpha in ALPHAS])
    assert bool(torch.isfinite(values).all())
    assert bool((values.diff(dim=0) < 0).all())


def test_an_average_is_over_groups_of_k():
    log_w = normal(12, 2)
    bound = Bound(0.0, 4)
    wanted = torch.stack([bound.value(group) for group in log_w.split(4)]).mean(0)
    torch.testing.assert_close(bound.average(log_w), wanted)


def gradients(alpha, draws, seed, *, plain):
    """Of L_α in (m, log s, θ): by the estimator, or of the value by automatic differentiation."""
    leaves = [torch.tensor(v).double().requires_grad_() for v in (0.4, -0.5, 0.2)]
    loc, log_scale, theta = leaves
    # A thousand estimates side by side.
    shape = (1000, 1)
    density = Gaussian(loc.expand(shape), log_scale.exp().expand(shape))
    held = density.detach()
    phi = density.draw(normal(draws, *shape, seed=seed))
    bound = Bound(alpha, draws)
    if plain:
        value = bound.value(log_target(phi, theta) - density.log_prob(phi))
    else:
        value = bound.estimate(phi, lambda p: log_target(p, theta), held.log_prob)
    each = torch.autograd.grad(value, leaves, torch.eye(1000).double(), is_grads_batched=True)
    return value.detach(), torch.stack(each, -1)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_estimator_is_the_gradient_on_average(alpha):
    """1,000 estimates of each: the means of the differences lie within 4.5 standard errors of 0.

    Three numbers and four orders: a false alarm with probability 8e-5.
    """
    value, found = gradients(alpha, 4, seed=1, plain=False)
    plain_value, wanted = gradients(alpha, 4, seed=1, plain=True)
    torch.testing.assert_close(value, plain_value)
    # In θ there is no score to leave out: equal draw by draw.
    torch.testing.assert_close(found[:, 2], wanted[:, 2])
    difference = found - wanted
    error = difference.std(0) / math.sqrt(1000)
    assert bool((difference.mean(0).abs() <= 4.5 * error + 1e-12).all())


@pytest.mark.parametrize("alpha", ALPHAS)
def test_no_noise_where_q_is_exact(alpha):
    """p(φ, y) ∝ N(1, 0.25): the weights are equal, and every path gradient is 0."""
    loc = torch.tensor([[1.0]]).double().requires_grad_()
    log_scale = torch.tensor([[math.log(0.5)]], dtype=torch.float64, requires_grad=True)
    density = Gaussian(loc, log_scale.exp())
    exact = Gaussian(torch.tensor([[1.0]]).double(), torch.tensor([[0.5]]).double())
    phi = density.draw(normal(5, 1, 1))
    value = Bound(alpha, 5).estimate(
        phi, lambda p: exact.log_prob(p) + 3, density.detach().log_prob
    )
    torch.testing.assert_close(value, torch.full_like(value, 3.0))
    for gradient in torch.autograd.grad(value.sum(), [loc, log_scale]):
        assert float(gradient.abs().max()) < 1e-12
