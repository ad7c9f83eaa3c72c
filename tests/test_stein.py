"""Stein's direction: against a double loop, and where particles meet."""

import math

import numpy as np
import pytest
import torch

from hbmeta.stein import bandwidth, squared_distances, stein_direction


def draws(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def by_loops(phi, scores):
    """(M, size) direction of one task, and h, pair by pair."""
    count = len(phi)
    pairs = [((phi[i] - phi[j]) ** 2).sum() for i in range(count) for j in range(i)]
    width = sorted(pairs)[(len(pairs) - 1) // 2] / math.log(count + 1)
    out = np.zeros_like(phi)
    for i in range(count):
        for j in range(count):
            kernel = math.exp(-((phi[j] - phi[i]) ** 2).sum() / width)
            toward_j = -2 / width * (phi[j] - phi[i]) * kernel  # ∂k(φ_j, φ_i)/∂φ_j
            out[i] += (kernel * scores[j] + toward_j) / count
    return out, width


def flat(parts):
    return torch.cat([p.reshape(*p.shape[:2], -1) for p in parts], -1)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_direction_is_that_of_a_double_loop(count):
    """Claimed to rounding, over two sites of which one is a matrix, tasks apart."""
    phi = [draws(count, 4, 2, 3, seed=1), draws(count, 4, seed=2)]
    scores = [draws(count, 4, 2, 3, seed=3), draws(count, 4, seed=4)]
    found = stein_direction(phi, scores)
    assert [f.shape for f in found] == [p.shape for p in phi]
    widths = bandwidth(squared_distances(flat(phi)))
    for task in range(4):
        expected, width = by_loops(flat(phi)[:, task].numpy(), flat(scores)[:, task].numpy())
        np.testing.assert_allclose(flat(found)[:, task], expected, rtol=1e-11, atol=1e-12)
        assert float(widths[task]) == pytest.approx(width, rel=1e-12)


def test_one_particle_climbs_its_own_score():
    phi, score = draws(1, 3, 2, seed=1), draws(1, 3, 2, seed=2)
    (found,) = stein_direction([phi], [score])
    assert torch.equal(found, score)


def test_derivative_is_that_of_the_loop():
    """Against central differences of the loop, bandwidth and all, exact to 1e-8."""
    phi, score, along = (draws(4, 1, 2, seed=s) for s in (1, 2, 3))
    leaf = phi.clone().requires_grad_()
    (found,) = stein_direction([leaf], [score])
    (gradient,) = torch.autograd.grad((found * along).sum(), leaf)

    def value(vector):
        moved = by_loops(vector.reshape(4, 2), score[:, 0].numpy())[0]
        return (moved * along[:, 0].numpy()).sum()

    steps = 1e-6 * np.eye(8)
    point = phi[:, 0].numpy().ravel()
    expected = [(value(point + s) - value(point - s)) / 2e-6 for s in steps]
    np.testing.assert_allclose(gradient[:, 0].ravel(), expected, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("meeting", [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 1), (0, 1, 1, 2)])
def test_particles_that_meet_give_no_nan(dtype, meeting):
    places = 1e3 + draws(3, 2, 5, seed=1)
    phi = places[list(meeting)].to(dtype).requires_grad_()
    score = draws(4, 2, 5, seed=2).to(dtype)
    (found,) = stein_direction([phi], [score])
    (gradient,) = torch.autograd.grad(found.square().sum(), phi)
    assert bool(torch.isfinite(found).all())
    assert bool(torch.isfinite(gradient).all())
    if len(set(meeting)) == 1:
        # All in one place: nothing pushes, and all climb the mean of their scores.
        together = score.mean(0).expand_as(found)
        torch.testing.assert_close(found.detach(), together, rtol=1e-5, atol=1e-6)


def test_does_not_depend_on_where_the_origin_is():
    """1e6 spreads away 6 of 16 digits are gone, not 12: norms are taken around the mean."""
    phi, score = draws(5, 1, 3, seed=1), draws(5, 1, 3, seed=2)
    near, far = (stein_direction([p], [score])[0] for p in (phi, phi + 1e6))
    torch.testing.assert_close(near, far, rtol=1e-8, atol=1e-8)


def test_many_particles_on_a_normal():
    """N(2, 0.5²), 30 particles: the mean to 1e-3, the sd within 6 % (it is 95 % of that)."""
    phi = draws(30, 1, 1, seed=1)
    for _ in range(4000):
        (moved,) = stein_direction([phi], [-(phi - 2.0) / 0.25])
        phi = phi + 0.3 * moved
    assert float(phi.mean()) == pytest.approx(2.0, abs=1e-3)
    assert float(phi.std(unbiased=False)) == pytest.approx(0.5, rel=0.06)
