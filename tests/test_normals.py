"""The divergence of normals: against torch's, without cancellation, without NaN."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from hbmeta.normals import LARGEST_LOG, bounded, normal_kl


def draws(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_is_that_of_the_distributions():
    """Claimed to rounding."""
    loc, loc_prior, log_scale, log_prior = draws(4, 3, 5)
    expected = kl_divergence(Normal(loc, log_scale.exp()), Normal(loc_prior, log_prior.exp()))
    found = normal_kl(loc - loc_prior, log_scale, log_prior)
    torch.testing.assert_close(found, expected.sum(-1), rtol=1e-13, atol=1e-13)


def test_does_not_cancel():
    """δ² + O(δ³) for scales that differ by a share δ; the usual formula gives rounding, 2e-16."""
    delta = torch.tensor([1e-9], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    assert float(normal_kl(zero, delta, zero)) == pytest.approx(1e-18, rel=1e-6, abs=0.0)
    assert float(normal_kl(zero, zero, zero)) == 0.0


@pytest.mark.parametrize("left", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("right", [1e-30, 1.0, 1e30])
def test_extreme_scales_are_finite(left, right):
    numbers = (1e-3 * right, math.log(left), math.log(right))
    leaves = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in numbers]
    value = normal_kl(*leaves)
    gradients = torch.autograd.grad(value, leaves)
    assert bool(torch.isfinite(value))
    assert bool(value >= 0.0)
    assert all(bool(torch.isfinite(g).all()) for g in gradients)


@pytest.mark.parametrize("raw", [-1e30, -50.0, 50.0, 1e30])
def test_bounded_scales_are_finite_in_single_precision(raw):
    value = torch.tensor([raw], dtype=torch.float32, requires_grad=True)
    scale = bounded(value)
    assert bool(scale.abs() <= LARGEST_LOG)
    found = normal_kl(torch.ones(1), scale, -scale)
    (gradient,) = torch.autograd.grad(found, value)
    assert bool(torch.isfinite(found))
    assert bool(torch.isfinite(gradient))


def test_bounded_is_the_identity_where_it_matters():
    """tanh(x) = x − x³/3: at 0.1 of ±12 by a share of 2.3e-5."""
    small = torch.tensor([-0.1, 0.0, 0.1], dtype=torch.float64)
    torch.testing.assert_close(bounded(small), small, rtol=2.4e-5, atol=0.0)
