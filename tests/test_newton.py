"""Truncated Newton for many tasks at once, against dense and one-by-one minimisers."""

import itertools
import math

import numpy as np
import torch
from scipy import optimize

from hbmeta import newton
from hbmeta.derivatives import hessian_vector, task_gradient
from hbmeta.newton import minimise_tasks
from hbmeta.staging import Staged


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def minimise(function, start, **kwargs):
    """With a count of the calls, which the record must agree with."""
    calls = {"gradients": 0, "products": 0}

    def value_and_gradient(phi):
        calls["gradients"] += 1
        return task_gradient(function, phi)

    def product(phi, vector):
        calls["products"] += 1
        return hessian_vector(function, phi, vector)

    found = minimise_tasks(value_and_gradient, product, start, **kwargs)
    assert (found.gradients, found.products) == (calls["gradients"], calls["products"])
    assert not found.point.requires_grad
    value, gradient = task_gradient(function, found.point)
    torch.testing.assert_close(found.value, value)
    torch.testing.assert_close(found.residual, gradient.norm(dim=-1))
    return found


def rosenbrock(phi):
    """A curved valley of another steepness for each task; minimum 0 at ones."""
    steep = torch.logspace(0, 2, len(phi), dtype=phi.dtype)
    x, y = phi[:, :-1], phi[:, 1:]
    return (steep.unsqueeze(-1) * (y - x**2) ** 2 + (1 - x) ** 2).sum(-1)


def test_quadratics_of_every_task():
    """Other curvatures, centres and scales side by side; against the dense solve."""
    A = normal(6, 8, 8)
    A = A @ A.mT + 0.1 * torch.eye(8, dtype=torch.float64)
    A = A * torch.logspace(-3, 3, 6, dtype=torch.float64)[:, None, None]
    b = normal(6, 8, seed=1)

    def f(phi):
        return 0.5 * torch.einsum("ti,tij,tj->t", phi, A, phi) - (b * phi).sum(-1)

    found = minimise(f, torch.zeros(6, 8, dtype=torch.float64), tolerance=1e-12)
    wanted = torch.linalg.solve(A, b.unsqueeze(-1)).squeeze(-1)
    assert found.met.all()
    assert not found.negative.any()
    error = (found.point - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert error.max() < 1e-8
    assert found.gradients < 12


def test_the_tolerance_is_that_of_the_gradient_norm_of_every_task():
    start = 0.5 * normal(5, 6)
    first = task_gradient(rosenbrock, start)[1].norm(dim=-1)
    for tolerance in (1e-1, 1e-4, 1e-10):
        found = minimise(rosenbrock, start, tolerance=tolerance, steps=200)
        assert found.met.all()
        assert (found.residual <= tolerance * first.clamp_min(1)).all()
    torch.testing.assert_close(found.point, torch.ones_like(start), atol=1e-7, rtol=0)


def test_against_one_by_one_minimisation():
    """Non-convex sums of sines in a bowl; SciPy's trust region from the same start."""
    W = 1.5 * normal(4, 10, 3)

    def f(phi):
        return torch.sin(torch.einsum("tni,ti->tn", W, phi)).sum(-1) + 3 * (phi**2).sum(-1)

    found = minimise(f, 0.3 * normal(4, 3, seed=1), tolerance=1e-10, steps=100)
    assert found.met.all()
    for i in range(4):

        def alone(x, i=i):
            x = torch.as_tensor(x)
            value, gradient = task_gradient(
                lambda p: torch.sin(W[i] @ p[0]).sum()[None] + 3 * (p**2).sum(-1), x[None]
            )
            return float(value), gradient[0].numpy()

        near = optimize.minimize(alone, found.point[i].numpy(), jac=True, options={"gtol": 1e-11})
        np.testing.assert_allclose(found.point[i], near.x, atol=1e-8)
        # And a minimum it is.
        dense = torch.autograd.functional.hessian(
            lambda p, i=i: torch.sin(W[i] @ p).sum() + 3 * (p**2).sum(), found.point[i]
        )
        assert torch.linalg.eigvalsh(dense)[0] > 0


def test_negative_curvature_on_the_way():
    """Double wells (φ² − 1)², started where they curve downwards, and beside them a bowl."""

    def f(phi):
        wells = ((phi**2 - 1) ** 2).sum(-1)
        return torch.where(tensor([1.0, 1.0, 0.0]) > 0, wells, (phi**2).sum(-1))

    start = tensor([[0.1, -0.2], [1e-6, 0.3], [0.1, -0.2]])
    found = minimise(f, start, tolerance=1e-9)
    assert found.met.all()
    assert found.negative.tolist() == [True, True, False]
    torch.testing.assert_close(
        found.point, tensor([[1.0, -1.0], [1.0, 1.0], [0.0, 0.0]]), atol=1e-8, rtol=0
    )


def test_a_function_that_ends_at_a_wall():
    """−log of slacks: a full Newton step leads where f is NaN, for some of the tasks."""
    b = tensor([[1.0, 2.0], [1e-3, 5.0], [10.0, 0.1]])

    def f(phi):
        return phi.sum(-1) - b[:, 0] * torch.log(phi[:, 0]) - b[:, 1] * torch.log(phi[:, 1])

    found = minimise(f, torch.full((3, 2), 4.0, dtype=torch.float64), tolerance=1e-9, steps=200)
    assert found.met.all()
    torch.testing.assert_close(found.point, b, rtol=1e-6, atol=1e-8)


def test_a_step_far_up_an_exponential_is_shortened():
    """Newton's first step ends where f is 1e26 and has no digits; that is no reason to stop."""
    y = tensor([366.0, 1.0, 5000.0])

    def function(phi):
        return 6.0 * phi[:, 0].exp() - y * phi[:, 0]

    found = minimise(function, tensor([[0.0], [0.0], [-3.0]]), tolerance=1e-10)
    assert bool(found.met.all())
    torch.testing.assert_close(found.point[:, 0], (y / 6.0).log(), rtol=0, atol=1e-9)


def test_a_kink_is_reported_and_ends_the_search():
    """|φ − c| has no vanishing gradient at its minimum; the smooth task is not held up."""
    c = tensor([[0.3, -0.7], [2.0, 1.0]])

    def f(phi):
        kinked = (phi - c).abs().sum(-1) + 0.1 * (phi**2).sum(-1)
        return torch.where(tensor([1.0, 0.0]) > 0, kinked, ((phi - c) ** 2).sum(-1))

    found = minimise(f, torch.zeros(2, 2, dtype=torch.float64), tolerance=1e-8, steps=500)
    assert found.met.tolist() == [False, True]
    assert found.residual[0] > 0.1
    assert (found.point[0] - c[0]).abs().max() < 1e-2
    assert found.gradients < 300


def test_a_start_at_the_minimum_costs_one_gradient():
    found = minimise(rosenbrock, torch.ones(3, 4, dtype=torch.float64), tolerance=1e-6)
    assert (found.gradients, found.products) == (1, 0)
    assert found.met.all()


def test_the_bounds_on_steps_and_products_hold():
    start = 0.5 * normal(5, 6)
    found = minimise(rosenbrock, start, tolerance=1e-12, steps=3, products=2)
    assert not found.met.all()
    assert found.products <= 6
    assert (found.value < task_gradient(rosenbrock, start)[0]).all()


def test_stragglers_may_wait_for_the_next_step():
    """Fewer products, and the same minima to the tolerance."""
    start = 0.5 * normal(25, 6)

    def value_and_gradient(phi):
        return task_gradient(rosenbrock, phi)

    def search(share):
        return newton.run(
            newton.begin(value_and_gradient, start, 1e-6),
            lambda search, inner: newton.advance(
                lambda v: hessian_vector(rosenbrock, search.point, v), search, inner
            ),
            lambda search, inner: newton.attempt(value_and_gradient, search, inner),
            steps=200,
            products=50,
            share=share,
        )

    alone, waiting = search(0.0), search(0.2)
    assert alone.met.all()
    assert waiting.met.all()
    assert waiting.products < 0.9 * alone.products
    torch.testing.assert_close(waiting.point, alone.point, atol=1e-3, rtol=0)


def test_f_never_rises():
    start = 0.5 * normal(5, 6)
    values = [
        minimise(rosenbrock, start, tolerance=1e-12, steps=steps).value for steps in range(1, 15)
    ]
    for before, after in itertools.pairwise(values):
        assert (after <= before).all()


def test_single_precision_reaches_what_it_can():
    start = (0.5 * normal(5, 6)).float()
    found = minimise(rosenbrock, start, tolerance=1e-5, steps=200)
    assert found.point.dtype == torch.float32
    assert found.met.all()
    # Beyond its digits it stops and says so.
    found = minimise(rosenbrock, start, tolerance=1e-12, steps=2000)
    assert found.gradients < 500
    assert found.residual.max() < 1e-2


def test_a_start_that_is_not_finite_stays_and_is_not_met():
    def f(phi):
        return torch.log(phi).sum(-1) + (phi**2).sum(-1)

    start = tensor([[-1.0], [2.0]])
    found = minimise_tasks(
        lambda p: task_gradient(f, p), lambda p, v: hessian_vector(f, p, v), start, tolerance=1e-6
    )
    assert not found.met[0]
    assert found.point[0] == -1
    assert math.isnan(found.value[0])


def test_the_three_functions_can_be_staged():
    """Graphs of begin, advance and attempt give the search of the functions themselves."""

    def value_and_gradient(phi):
        return task_gradient(rosenbrock, phi)

    def begin(phi):
        return newton.begin(value_and_gradient, phi, 1e-8)

    def advance(search, inner):
        def product(vector):
            return hessian_vector(rosenbrock, search.point, vector)

        return newton.advance(product, search, inner)

    def attempt(search, inner):
        return newton.attempt(value_and_gradient, search, inner)

    start = 0.5 * normal(5, 6)
    graphs = [Staged(function, tier="graph") for function in (begin, advance, attempt)]
    found = newton.run(graphs[0](start), graphs[1], graphs[2], steps=50, products=20)
    eager = newton.run(begin(start), advance, attempt, steps=50, products=20)
    assert found.met.all()
    torch.testing.assert_close(tuple(found), tuple(eager))
