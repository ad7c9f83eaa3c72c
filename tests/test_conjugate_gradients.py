"""Batched conjugate gradients, against dense solves and the bound on their error."""

import math
import warnings

import pytest
import torch

from hbmeta.conjugate_gradients import solve
from hbmeta.errors import ConvergenceError

SPECTRUM = torch.linspace(1, 10, 50, dtype=torch.float64)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def matrices(tasks, size, *, least=0.5, seed=0):
    """Symmetric (tasks, size, size) with smallest eigenvalue `least`, in random bases."""
    bases = torch.linalg.qr(normal(tasks, size, size, seed=seed))[0]
    values = least + 5 * normal(tasks, size, seed=seed + 1).abs()
    values[:, 0] = least
    return bases @ torch.diag_embed(values) @ bases.mT


def times(A):
    return lambda p: torch.einsum("tij,...tj->...ti", A, p)


def a_norm(x):
    return (SPECTRUM * x * x).sum(-1).sqrt()


@pytest.mark.parametrize(("k", "bound"), [(10, 2.863e-3), (20, 4.099e-6), (23, 1e-6)])
def test_the_error_is_below_its_bound(k, bound):
    """κ = 10; 2 ((√κ − 1)/(√κ + 1))^k, and ½ √κ log(2/ε) = 23 iterations for ε = 1e-6."""
    rate = (math.sqrt(10) - 1) / (math.sqrt(10) + 1)
    assert 2 * rate**k <= bound * 1.0005
    right = normal(6, 50)
    found = solve(lambda p: p * SPECTRUM, right, tolerance=1e-14, iterations=k)
    exact = right / SPECTRUM
    error = a_norm(found.x - exact) / a_norm(exact)
    assert (error < bound).all()
    assert found.products == k + 1  # one for the residual
    # Not exact either: else the bound would be tested on nothing.
    assert (error > 1e-3 * bound).all()
    torch.testing.assert_close(
        found.residual, (right - SPECTRUM * found.x).norm(dim=-1) / right.norm(dim=-1)
    )


@pytest.mark.parametrize("lead", [(), (3,)])
def test_equal_to_the_dense_solve_for_every_task(lead):
    """Several right-hand sides at once, with scales from 1e-6 to 1e6 side by side."""
    A = matrices(5, 12)
    scales = torch.logspace(-6, 6, 5, dtype=torch.float64).unsqueeze(-1)
    right = normal(*lead, 5, 12) * scales
    found = solve(times(A), right, tolerance=1e-12)
    wanted = torch.linalg.solve(A, right.unsqueeze(-1)).squeeze(-1)
    assert ((found.x - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max() < 1e-8
    assert found.residual.shape == (*lead, 5)
    assert (found.residual <= 1e-12).all()
    assert found.positive.all()
    # A Rayleigh quotient is no smaller than the smallest eigenvalue.
    assert (found.curvature >= 0.5).all()
    assert (found.curvature < 5).all()


def test_the_tolerance_holds_for_the_slowest_task():
    """One task needs 30 times the iterations of the other 24: on the mean it would be lost."""
    size = 200
    easy = torch.ones(24, size, dtype=torch.float64)
    hard = torch.logspace(0, 3, size, dtype=torch.float64).unsqueeze(0)
    A = torch.cat([easy, hard])
    right = normal(25, size)
    for tolerance in (1e-2, 1e-6):
        found = solve(lambda p: p * A, right, tolerance=tolerance)
        residual = (right - A * found.x).norm(dim=-1) / right.norm(dim=-1)
        assert (residual <= tolerance).all()


def test_products_are_counted_and_no_more_than_needed():
    calls = []

    def product(p):
        calls.append(p.shape)
        return 3 * p

    found = solve(product, normal(4, 1), tolerance=1e-10)
    assert found.products == len(calls) == 2  # one iteration, one residual
    found = solve(product, normal(4, 30), tolerance=1e-10)
    assert found.products == len(calls) - 2 == 12  # the iteration never stops before the eleventh
    before = len(calls)
    nothing = solve(product, torch.zeros(4, 30), tolerance=1e-10)
    assert nothing.products == 0
    assert len(calls) == before
    assert not nothing.x.any()
    assert not nothing.residual.any()
    assert nothing.positive.all()


def test_negative_curvature_is_found_and_the_others_are_solved():
    A = matrices(4, 8)
    shift = torch.tensor([0.0, 0.8, 0.0, 0.5], dtype=torch.float64)
    A = A - shift[:, None, None] * torch.eye(8, dtype=torch.float64)  # smallest: .5, −.3, .5, 0
    right = normal(4, 8)
    right[2] = 0
    found = solve(times(A), right, tolerance=1e-10)
    assert found.positive.tolist() == [True, False, True, False]
    assert found.curvature[1] < 0
    assert found.curvature[1] >= -0.3 - 1e-12
    assert found.curvature[2] == torch.inf
    assert found.residual[1] == 1
    assert not found.x[1:].any()
    torch.testing.assert_close(found.x[0], torch.linalg.solve(A[0], right[0]), rtol=1e-8, atol=1e-8)


def test_all_negative_ends_at_once():
    found = solve(lambda p: -p, normal(3, 20))
    assert not found.positive.any()
    assert found.products == 1


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-12])
def test_single_precision(tolerance):
    """What float32 cannot reach is reported, and does not run to the end of the budget."""
    A = matrices(5, 40, least=0.2).float()
    right = normal(5, 40).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = solve(times(A), right, tolerance=tolerance)
    assert found.x.dtype == torch.float32
    assert found.positive.all()
    wanted = torch.linalg.solve(A.double(), right.double().unsqueeze(-1)).squeeze(-1)
    error = (found.x - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert (error < max(100 * tolerance, 1e-4)).all()
    if tolerance > 1e-6:
        assert (found.residual <= tolerance).all()
    else:
        assert (found.residual > tolerance).all()
        assert found.products < 300


def test_the_budget_is_kept():
    A = torch.logspace(0, 6, 300, dtype=torch.float64)
    found = solve(lambda p: p * A, normal(2, 300), tolerance=1e-10, iterations=40)
    assert found.products == 41
    assert (found.residual > 1e-10).all()


def test_what_is_not_finite_raises():
    with pytest.raises(ConvergenceError, match="right-hand side"):
        solve(lambda p: p, torch.tensor([[1.0, math.nan]]), where="somewhere")
    with pytest.raises(ConvergenceError, match=r"somewhere.*products"):
        solve(lambda p: p * math.nan, torch.ones(2, 3), where="somewhere")
