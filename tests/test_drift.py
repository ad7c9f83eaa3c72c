"""What is left to go at the end of training, on paths whose end is known."""

import math

import numpy as np
import pytest
import torch

from hbmeta.drift import left_to_go


def cosine(steps):
    return 0.5 * (1 + torch.cos(math.pi * torch.arange(steps) / steps))


@pytest.mark.parametrize("tau", [0.2, 0.5, 1.0])
def test_an_exponential_approach_ends_where_it_says(tau):
    """θ(s) = 3 − 2 exp(−s / τ): means of windows keep the ratio, so that the answer is exact.

    To the width of a step in s; the ends of the blocks fall between steps.
    """
    rates = cosine(2000)
    s = rates.double().cumsum(0) / rates.double().sum()
    path = 3.0 - 2.0 * torch.exp(-s / tau)[:, None]
    last = float(path[s >= 0.8].double().mean())
    found = float(left_to_go(path, rates))
    # Blocks count alike in s, the rows of a window do not: the mean over s instead.
    fine = np.linspace(0.8, 1.0, 10_001)
    left = np.mean(2.0 * np.exp(-fine / tau))
    assert found == pytest.approx(left, rel=0.05)
    assert abs(found) > 0.0
    assert last < 3.0


def test_noise_around_a_fixed_point_is_at_rest():
    """20,000 coordinates: at a rate of 1e-4, more than 6 come up in 0.5 % of runs."""
    generator = torch.Generator().manual_seed(0)
    for steps in (200, 1000):
        path = torch.randn(steps, 20_000, generator=generator)
        assert int((left_to_go(path, cosine(steps)) != 0).sum()) <= 6


def test_what_cannot_be_known_is_zero():
    rates = cosine(50)
    path = torch.arange(50.0)[:, None]
    assert float(left_to_go(path, rates)) == 0.0  # too short for blocks
    assert float(left_to_go(path, torch.zeros(50))) == 0.0
    long = torch.arange(2000.0)[:, None].log1p()
    assert float(left_to_go(long, cosine(2000))) > 0.0
    late = long.clone()
    late[:1500] = math.nan  # a resumed fit
    assert float(left_to_go(late, cosine(2000))) == 0.0
    early = long.clone()
    early[:300] = math.nan
    assert float(left_to_go(early, cosine(2000))) == float(left_to_go(long, cosine(2000)))
    assert left_to_go(long[:, :0], cosine(2000)).shape == (0,)
