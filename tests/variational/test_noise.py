"""Fixed draws whose moments are exact."""

import pytest
import torch

from hbmeta.variational import matched_noise


@pytest.mark.parametrize(("draws", "size"), [(2, 1), (8, 4), (128, 10), (64, 32)])
def test_mean_and_covariance_are_exact(draws, size, untouched):
    with untouched():
        noise = matched_noise(draws, size, seed=3)
    assert noise.shape == (draws, size)
    eye = torch.eye(size).double()
    torch.testing.assert_close(noise.mean(0), torch.zeros(size).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(noise.mT @ noise / draws, eye, atol=1e-10, rtol=0)


def test_fewer_draws_than_that_have_variances_of_one():
    noise = matched_noise(8, 20, seed=0)
    torch.testing.assert_close(noise.square().mean(0), torch.ones(20).double())
    torch.testing.assert_close(noise.mean(0), torch.zeros(20).double(), atol=1e-12, rtol=0)


def test_they_are_normal_enough():
    """Fourth moments of a quasi-random set of 256, against 3: within a tenth."""
    noise = matched_noise(256, 3, seed=0)
    torch.testing.assert_close(
        noise.pow(4).mean(0), torch.full((3,), 3.0).double(), rtol=0.1, atol=0
    )


def test_the_seed_tells():
    assert torch.equal(matched_noise(16, 3, 1), matched_noise(16, 3, 1))
    assert not torch.equal(matched_noise(16, 3, 1), matched_noise(16, 3, 2))
