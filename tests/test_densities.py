"""Densities over φ against SciPy, and draws against their moments."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from hbmeta.densities import Delta, Empirical, Gaussian, equal_draws
from hbmeta.errors import UnsupportedModelError

TASKS, SIZE = 3, 2


@pytest.fixture
def full() -> Gaussian:
    generator = torch.Generator().manual_seed(0)
    loc = torch.randn(TASKS, SIZE, generator=generator, dtype=torch.float64)
    tril = torch.randn(TASKS, SIZE, SIZE, generator=generator, dtype=torch.float64).tril()
    diagonal = tril.diagonal(dim1=-2, dim2=-1)
    return Gaussian(loc, tril - torch.diag_embed(diagonal) + torch.diag_embed(diagonal.abs() + 0.3))


@pytest.fixture
def diagonal(full) -> Gaussian:
    return Gaussian(full.loc, full.scale.diagonal(dim1=-2, dim2=-1))


def noise(draws: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(draws, TASKS, SIZE, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_gaussian_log_prob_is_that_of_scipy(kind, request):
    density = request.getfixturevalue(kind)
    phi = density.draw(noise(5))
    expected = np.stack(
        [
            stats.multivariate_normal(m, c).logpdf(phi[:, i])
            for i, (m, c) in enumerate(
                zip(density.loc.numpy(), density.covariance.numpy(), strict=True)
            )
        ],
        1,
    )
    np.testing.assert_allclose(density.log_prob(phi), expected, rtol=1e-12, atol=1e-12)


def test_a_full_scale_and_a_diagonal_one_agree(diagonal):
    same = Gaussian(diagonal.loc, torch.diag_embed(diagonal.scale))
    phi = noise(4)
    assert diagonal.diagonal
    assert not same.diagonal
    torch.testing.assert_close(same.log_prob(phi), diagonal.log_prob(phi))
    torch.testing.assert_close(same.draw(phi), diagonal.draw(phi))
    torch.testing.assert_close(same.sd, diagonal.sd)
    torch.testing.assert_close(same.covariance, diagonal.covariance)


def gaussians(size, full, seed):
    rng = np.random.default_rng(seed)
    loc = torch.tensor(rng.normal(size=(4, size)))
    sd = torch.tensor(rng.uniform(0.3, 2.0, (4, size)))
    if not full:
        return Gaussian(loc, sd)
    return Gaussian(loc, torch.tensor(rng.normal(size=(4, size, size))).tril(-1) + sd.diag_embed())


@pytest.mark.parametrize("size", [1, 3, 6])
@pytest.mark.parametrize("full", list(itertools.product([False, True], repeat=2)))
def test_gaussian_kl_is_the_dense_formula(size, full):
    first, second = (gaussians(size, f, seed) for seed, f in enumerate(full))
    found = first.kl(second)
    for i in range(4):
        # ½ (tr Σ₂⁻¹ Σ₁ + Δᵀ Σ₂⁻¹ Δ − d + log det Σ₂ − log det Σ₁), dense.
        a, b = first.covariance[i].numpy(), second.covariance[i].numpy()
        shift = (second.loc - first.loc)[i].numpy()
        inverse = np.linalg.inv(b)
        log_ratio = np.linalg.slogdet(b)[1] - np.linalg.slogdet(a)[1]
        wanted = 0.5 * (np.trace(inverse @ a) + shift @ inverse @ shift - size + log_ratio)
        assert found[i].item() == pytest.approx(wanted, rel=1e-9)
    assert float(first.kl(first).abs().max()) < 1e-12


def test_gaussian_draws_have_its_moments(full):
    n = 20_000
    draws = full.draw(noise(n))
    # 6 means and 6 sds at 5 standard errors: false-alarm rate below 1e-5.
    assert bool(((draws.mean(0) - full.mean).abs() < 5 * full.sd / n**0.5).all())
    assert bool(((draws.std(0) / full.sd - 1).abs() < 5 / (2 * n) ** 0.5).all())
    assert torch.equal(full.mean, full.loc)


def test_detached_gaussian_has_no_history(full):
    density = Gaussian(full.loc.clone().requires_grad_(), full.scale)
    assert not density.detach().loc.requires_grad


def test_delta_stays_where_it_is():
    density = Delta(torch.tensor([[1.0, 2.0]]))
    assert torch.equal(density.draw(torch.zeros(3, 1, 2)), density.loc.expand(3, 1, 2))
    assert torch.equal(density.mean, density.loc)
    assert torch.equal(density.sd, torch.zeros(1, 2))


@pytest.mark.parametrize("density", [Delta(torch.zeros(1, 2)), Empirical(torch.zeros(4, 1, 2))])
def test_what_has_no_density_refuses(density):
    with pytest.raises(UnsupportedModelError, match="a posterior with a density"):
        density.log_prob(torch.zeros(1, 2))


def test_select_takes_tasks_in_the_order_asked_for(full, diagonal):
    positions = torch.tensor([2, 0])
    phi = noise(4)
    densities = (
        full,
        diagonal,
        Delta(full.loc),
        Empirical(phi),
        Empirical(phi, phi[..., 0]),
    )
    for density in densities:
        found = density.select(positions)
        assert type(found) is type(density)
        torch.testing.assert_close(found.mean, density.mean[positions])
        torch.testing.assert_close(found.sd, density.sd[positions])


def test_equal_weights_are_plain_moments():
    phi = noise(7)
    density = Empirical(phi)
    torch.testing.assert_close(density.mean, phi.mean(0))
    torch.testing.assert_close(density.sd, phi.std(0, correction=0))
    torch.testing.assert_close(density.effective_draws, torch.full((TASKS,), 7.0).double())


def test_weights_are_each_tasks_own_and_need_no_normalisation():
    phi = noise(4)
    log_weights = torch.log(torch.tensor([[1.0, 1, 0], [1, 2, 0], [1, 1, 0], [1, 0, 1]]).double())
    density = Empirical(phi, log_weights + torch.tensor([0.0, 3.0, -2.0]))
    torch.testing.assert_close(density.weights.sum(0), torch.ones(TASKS).double())
    torch.testing.assert_close(density.mean[0], phi[:, 0].mean(0))
    torch.testing.assert_close(density.mean[1], (phi[0, 1] + 2 * phi[1, 1] + phi[2, 1]) / 4)
    torch.testing.assert_close(density.mean[2], phi[3, 2])
    torch.testing.assert_close(density.sd[2], torch.zeros(SIZE).double())
    # Kish: 1 / Σ w².
    torch.testing.assert_close(
        density.effective_draws, torch.tensor([4.0, 1 / (0.25**2 * 2 + 0.5**2), 1.0]).double()
    )


def test_equal_draws_come_by_their_weights():
    n = 20_000
    log_weights = torch.tensor([[0.0, 0.0], [0.0, 2.0], [-torch.inf, 1.0]]).double()
    index = equal_draws(log_weights, n, seed=0)
    assert index.shape == (n, 2)
    probabilities = log_weights.softmax(0)
    found = torch.stack([(index == k).double().mean(0) for k in range(3)])
    error = (probabilities * (1 - probabilities) / n).sqrt()
    # 6 frequencies at 5 standard errors: false-alarm rate below 1e-5.
    assert bool(((found - probabilities).abs() <= 5 * error).all())
    assert torch.equal(index, equal_draws(log_weights, n, seed=0))
    assert not torch.equal(index, equal_draws(log_weights, n, seed=1))
