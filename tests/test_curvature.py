"""Gradients, Hessians, modes and evidences per task, against dense ones."""

import math

import numpy as np
import pytest
import torch

from hbmeta.curvature import (
    expand,
    gradient_and_hessian,
    leave_saddle,
    log_joint,
    maximise,
    require_positive,
)
from hbmeta.errors import CurvatureError
from hbmeta.problem import Problem
from tests import reference
from tests.cases import COVARIANCE, MEAN, NOISE, case, rows_of


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def linear_problem(name="linear_own_nested"):
    tasks = case(name).tasks
    problem = Problem(case(name).program, tasks)
    return problem, problem.batch(tasks)


def quadratic(phi):
    """A different quadratic for each of three tasks: −½ (φ − c)ᵀ A (φ − c) + k."""
    difference = phi - CENTRES
    return -0.5 * torch.einsum("...ti,tij,...tj->...t", difference, CURVATURES, difference) + LEVELS


CENTRES = tensor([[1.0, -2.0], [0.0, 0.5], [3.0, 3.0]])
CURVATURES = tensor(
    [[[4.0, 1.0], [1.0, 2.0]], [[1.0, 0.0], [0.0, 9.0]], [[2.0, -1.0], [-1.0, 2.0]]]
)
LEVELS = tensor([0.5, -1.0, 2.0])


# T2: the Hessian-vector product


def test_hessian_vector_product():
    """f = x²y + y³ at (1, 2): H = [[4, 2], [2, 12]], H (1, 2) = (8, 26)."""

    def f(phi):
        x, y = phi[..., 0], phi[..., 1]
        return x**2 * y + y**3

    value, gradient, hessian = gradient_and_hessian(f, tensor([[1.0, 2.0]]))
    assert value.tolist() == [10.0]
    assert gradient.tolist() == [[4.0, 13.0]]
    assert hessian.tolist() == [[[4.0, 2.0], [2.0, 12.0]]]
    phi = tensor([[1.0, 2.0]]).requires_grad_()
    (first,) = torch.autograd.grad(f(phi).sum(), phi, create_graph=True)
    (product,) = torch.autograd.grad((first * tensor([[1.0, 2.0]])).sum(), phi)
    assert product.tolist() == [[8.0, 26.0]]
    # Forward over reverse, and differences of the gradient.
    torch.testing.assert_close(hessian[0] @ tensor([1.0, 2.0]), product[0])
    gradient_at = lambda p: gradient_and_hessian(f, torch.tensor(p[None]))[1][0].numpy()  # noqa: E731
    by_difference = reference.finite_difference(gradient_at, [1.0, 2.0])
    np.testing.assert_allclose(by_difference, hessian[0].numpy(), atol=1e-7)


def test_each_task_has_its_own_hessian():
    """With a leading axis too; against torch's dense Hessian of the whole, block diagonal."""

    def f(phi):
        return torch.sin(phi[..., 0] * phi[..., 1]) + LEVELS * phi[..., 1] ** 3

    phi = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value, gradient, hessian = gradient_and_hessian(f, phi)
    assert value.shape == (2, 3)
    assert hessian.shape == (2, 3, 2, 2)
    assert not any(t.requires_grad for t in (value, gradient, hessian))
    dense = torch.autograd.functional.hessian(lambda p: f(p).sum(), phi)
    for s in range(2):
        for t in range(3):
            torch.testing.assert_close(hessian[s, t], dense[s, t, :, s, t])
    assert float(dense[0, 0, :, 0, 1].abs().max()) == 0.0


def test_a_linear_function_has_no_curvature():
    _, gradient, hessian = gradient_and_hessian(lambda phi: 3 * phi[..., 0], torch.zeros(2, 2))
    assert gradient.tolist() == [[3.0, 0.0]] * 2
    assert hessian.abs().max() == 0.0


def test_a_hessian_is_differentiable_on_request():
    theta = tensor(2.0).requires_grad_()
    _, _, hessian = gradient_and_hessian(
        lambda phi: theta * phi[..., 0] ** 3, tensor([[1.5]]), create_graph=True
    )
    (found,) = torch.autograd.grad(hessian.sum(), theta)
    assert float(found) == pytest.approx(6 * 1.5)


# Expansions


@pytest.mark.parametrize("newton", [True, False])
def test_expansion_of_a_quadratic(newton):
    """From anywhere by one Newton step, or at the mode itself."""
    start = tensor([[5.0, 5.0]] * 3) if newton else CENTRES
    found = expand(quadratic, start, newton=newton)
    torch.testing.assert_close(found.loc, CENTRES)
    covariance = torch.linalg.inv(CURVATURES)
    torch.testing.assert_close(found.tril @ found.tril.mT, covariance)
    torch.testing.assert_close(found.tril, found.tril.tril())
    evidence = LEVELS + math.log(2 * math.pi) - 0.5 * torch.logdet(CURVATURES)
    torch.testing.assert_close(found.log_evidence, evidence)
    assert bool(found.positive.all())


@pytest.mark.parametrize("name", ["linear_own_nested", "linear_own_flat", "linear_given_theta"])
def test_expansion_of_a_linear_program_is_the_posterior(name):
    problem, batch = linear_problem(name)
    start = torch.zeros(problem.location({}, batch).shape, dtype=torch.float64)
    found = expand(lambda phi: log_joint(problem, {}, phi, batch), start, newton=True)
    for i in range(batch.n_tasks):
        X, y = rows_of(case(name).tasks, i)
        mean, covariance = reference.gaussian_posterior(X, y, MEAN, COVARIANCE, NOISE)
        np.testing.assert_allclose(found.loc[i].numpy(), mean, rtol=1e-10)
        np.testing.assert_allclose(
            (found.tril[i] @ found.tril[i].T).numpy(), covariance, rtol=1e-10
        )
        evidence = reference.log_evidence(X, y, MEAN, COVARIANCE, NOISE)
        assert float(found.log_evidence[i]) == pytest.approx(evidence, rel=1e-10)


def test_expansion_says_where_the_curvature_is_not_positive():
    found = expand(
        lambda phi: -(phi[..., 0] ** 2) + tensor([1.0, -1.0]) * phi[..., 1] ** 2,
        torch.zeros(2, 2).double(),
    )
    assert found.positive.tolist() == [False, True]


def test_the_error_names_the_task():
    precision = torch.diag_embed(tensor([[1.0, 3.0], [2.0, -0.5], [-2.0, 4.0]]))
    require_positive(precision[:1], ("a",), "here")
    with pytest.raises(CurvatureError, match=r"here: .*task 'c' with smallest eigenvalue -2"):
        require_positive(precision, ("a", "b", "c"), "here")
    with pytest.raises(CurvatureError, match="smallest eigenvalue nan"):
        require_positive(precision[:1] * torch.nan, ("a",), "here")


# Modes


def test_mode_of_a_quadratic_is_exact():
    point, converged = maximise(quadratic, torch.zeros(3, 2, dtype=torch.float64))
    torch.testing.assert_close(point, CENTRES, rtol=1e-12, atol=1e-12)
    assert converged.tolist() == [True] * 3


def test_mode_where_newton_by_itself_diverges():
    """Concave only near the mode, starts far away, each task with its own damping."""
    centre = tensor([[0.0], [3.0], [-2.0]])

    def f(phi):
        return -torch.log1p((phi - centre).square()).sum(-1)

    point, converged = maximise(f, tensor([[4.0], [-6.0], [-1.9]]))
    torch.testing.assert_close(point, centre, rtol=0.0, atol=1e-5)
    assert bool(converged.all())


def two_wells(phi):
    """−(x² − c)² − (y − x)²: modes at ±√c, a saddle at 0 where the gradient is exactly zero."""
    x, y = phi[..., 0], phi[..., 1]
    return -((x**2 - tensor([1.0, 4.0, 0.25])) ** 2) - (y - x) ** 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_start_without_gradient_is_left(dtype):
    """Each task, and each draw before them, to a side of its own; the same for the same seed."""
    start = torch.zeros(10, 3, 2, dtype=dtype)
    point, converged = maximise(two_wells, start)
    root = torch.tensor([1.0, 2.0, 0.5], dtype=dtype).expand(10, 3)
    torch.testing.assert_close(point.abs(), torch.stack([root, root], -1), rtol=1e-4, atol=1e-4)
    assert bool(converged.all())
    assert len({tuple(sides) for sides in point[..., 0].sign().tolist()}) > 1
    again, _ = maximise(two_wells, start)
    assert torch.equal(point, again)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_kink_whose_gradient_is_zero_is_left(dtype):
    """f = −φ²/2 − (y − relu φ)² / 2 from φ = 0, where autograd's relu'(0) = 0: the mode is y/2.

    For y < 0 it is 0 indeed, and so it is of −|φ| − φ²/2, a kink that is a maximum.
    """
    y = torch.tensor([3.0, 0.5, -2.0], dtype=dtype)

    def bent(phi):
        return -0.5 * phi[..., 0].square() - 0.5 * (y - phi[..., 0].relu()).square()

    point, converged = maximise(bent, torch.zeros(3, 1, dtype=dtype))
    assert bool(converged.all())
    torch.testing.assert_close(point[:, 0], (y / 2).clamp_min(0.0))

    def peak(phi):
        return -phi[..., 0].abs() - 0.5 * phi[..., 0].square()

    point, converged = maximise(peak, torch.zeros(2, 1, dtype=dtype))
    assert bool(converged.all())
    assert bool((point == 0).all())


def test_a_kink_that_is_not_left_is_no_mode():
    """−φ²/2 + |φ| − |φ|³: its derivative at 0 is taken to be 0 wherever φ is below a thousandth."""

    def blind(phi):
        seen = torch.where(phi.abs() < 0.1, phi.detach(), phi)
        return (phi.detach().abs() - phi.detach().abs() ** 3 - 0.5 * seen.square())[..., 0] - (
            0.5 * (phi - phi.detach()).square()[..., 0]
        )

    _, converged = maximise(blind, torch.zeros(2, 1, dtype=torch.float64))
    assert not bool(converged.any())


def test_leaving_a_saddle_leaves_maxima_and_flat_ridges_alone():
    moved = leave_saddle(two_wells, torch.zeros(3, 2, dtype=torch.float64))
    assert float(two_wells(moved).sum()) > float(two_wells(torch.zeros(3, 2)).sum())
    assert bool((moved != 0).all())
    tops = tensor([[1.0, 1.0], [-2.0, -2.0], [0.5, 0.5]])
    assert torch.equal(leave_saddle(two_wells, tops), tops)
    # A ridge: −(x + y)², whose curvature along x = −y is 0.
    points = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(leave_saddle(lambda p: -3 * (p.sum(-1) - 0.7) ** 2, points), points)


def test_mode_of_a_program():
    """Gamma–Poisson in u = log rate: log p(u | y) = a u − b e^u, so the mode is log(a / b)."""
    known = case("gamma_poisson")
    problem = Problem(known.program, known.tasks)
    batch = problem.batch(known.tasks)

    def f(phi):
        return log_joint(problem, {}, phi, batch)

    point, converged = maximise(f, problem.location({}, batch))
    assert bool(converged.all())
    np.testing.assert_allclose(point.exp().numpy()[:, 0], known.posterior[0], rtol=1e-9)
    # The curvature there is the shape a, so the sd of u is 1/√a.
    shape = (known.posterior[0] / known.posterior[1]) ** 2
    np.testing.assert_allclose(expand(f, point).tril[:, 0, 0].numpy(), shape**-0.5, rtol=1e-9)


def test_a_mode_that_is_not_reached_is_said():
    """No maximum at all: e^φ grows for ever."""
    _, converged = maximise(lambda phi: phi[..., 0].exp(), torch.zeros(2, 1).double(), iterations=5)
    assert converged.tolist() == [False, False]
