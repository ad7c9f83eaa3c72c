"""Gradients, Hessian-vector products and Jacobians per task, against dense ones of each task."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from hbmeta.curvature import gradient_and_hessian
from hbmeta.derivatives import hessian_vector, jacobian, jacobian_of, task_gradient


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


TASKS = 3
LEVELS = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def one(a, b, level):
    """A function of two sites of one task, a () and b (2, 2), whose Hessian mixes them."""
    return torch.sin(a * b.sum()) + level * b[0, 0] ** 3 + (b @ b).trace() * a


def every(phi):
    return torch.stack([one(phi["a"][i], phi["b"][i], LEVELS[i]) for i in range(len(phi["a"]))])


def point(seed=0):
    return {"a": normal(TASKS, seed=seed), "b": normal(TASKS, 2, 2, seed=seed + 1)}


def test_hessian_vector_product_of_the_reference():
    """T2: f = x²y + y³ at (1, 2), v = (1, 2): H = [[4, 2], [2, 12]], Hv = (8, 26)."""

    def f(phi):
        return phi[:, 0] ** 2 * phi[:, 1] + phi[:, 1] ** 3

    at = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    value, gradient = task_gradient(f, at)
    assert value.tolist() == [10.0]
    assert gradient.tolist() == [[4.0, 13.0]]
    assert hessian_vector(f, at, at).tolist() == [[8.0, 26.0]]
    assert jacobian(lambda p: task_gradient(f, p, create_graph=True)[1], at).tolist() == [
        [[4.0, 2.0], [2.0, 12.0]]
    ]


def test_against_dense_derivatives_of_each_task_alone():
    phi, vector = point(), point(seed=5)
    value, gradient = task_gradient(every, phi)
    product = hessian_vector(every, phi, vector)
    assert not value.requires_grad
    assert not any(v.requires_grad for v in [*gradient.values(), *product.values()])
    for i in range(TASKS):

        def flat(x, i=i):
            return one(x[0], x[1:].reshape(2, 2), LEVELS[i])

        def together(tree, i=i):
            return torch.cat([tree["a"][i].reshape(1), tree["b"][i].flatten()])

        x = together(phi)
        torch.testing.assert_close(value[i], flat(x))
        dense = torch.autograd.functional.jacobian(flat, x)
        torch.testing.assert_close(together(gradient), dense, rtol=1e-12, atol=1e-12)
        hessian = torch.autograd.functional.hessian(flat, x)
        wanted = hessian @ together(vector)
        torch.testing.assert_close(together(product), wanted, rtol=1e-12, atol=1e-12)


def test_jacobian_with_leading_axes_against_torch():
    def f(phi):
        return torch.stack([phi.prod(-1), phi[..., 0] ** 2, torch.ones_like(phi[..., 0])], -1)

    phi = normal(2, TASKS, 4)
    found = jacobian(f, phi)
    assert found.shape == (2, TASKS, 3, 4)
    for k in range(2):
        for i in range(TASKS):
            dense = torch.autograd.functional.jacobian(f, phi[k, i])
            torch.testing.assert_close(found[k, i], dense, rtol=1e-12, atol=1e-12)


def test_jacobians_of_composed_maps_multiply_from_the_last_to_the_first():
    """And a backward pass gives the transposes in the other order, which is another number."""
    A, B = normal(TASKS, 2, 2, seed=1), normal(TASKS, 2, 2, seed=2)
    A, B = A + A.mT, B + B.mT

    def first(phi):
        return torch.einsum("tij,tj->ti", A, phi)

    def both(phi):
        return torch.einsum("tij,tj->ti", B, torch.sin(first(phi)))

    phi, v = normal(TASKS, 2, seed=3), normal(TASKS, 2, seed=4)
    J1 = jacobian(first, phi)
    J2 = B @ torch.diag_embed(torch.cos(first(phi)))
    torch.testing.assert_close(jacobian(both, phi), J2 @ J1)
    leaf = phi.clone().requires_grad_()
    (pulled,) = torch.autograd.grad(both(leaf), leaf, v)
    torch.testing.assert_close(pulled, (J1.mT @ (J2.mT @ v.unsqueeze(-1))).squeeze(-1))
    wrong = (J2.mT @ (J1.mT @ v.unsqueeze(-1))).squeeze(-1)
    assert not torch.allclose(pulled, wrong, rtol=1e-2)


def test_the_vector_is_held_constant():
    """Though it is a function of φ: by hand, its derivative would come on top."""

    def f(phi):
        return (phi**4).sum(-1)

    phi = normal(TASKS, 2).requires_grad_()
    vector = phi**2
    held = hessian_vector(f, phi, vector)
    torch.testing.assert_close(held, (12 * phi**2 * phi**2).detach())
    _, gradient = task_gradient(f, phi, create_graph=True)
    (by_hand,) = torch.autograd.grad((gradient * vector).sum(), phi)
    torch.testing.assert_close(by_hand, (12 * phi**4 + 4 * phi**3 * 2 * phi).detach())


def test_tasks_that_see_each_other_get_no_gradient_of_their_own():
    """The first pitfall: batch statistics over tasks."""

    def alone(phi):
        return (phi**2).sum(-1)

    def normalised(phi):
        return ((phi - phi.mean(0)) ** 2).sum(-1)

    phi = normal(TASKS, 2)
    torch.testing.assert_close(task_gradient(alone, phi)[1], 2 * phi)
    found = task_gradient(normalised, phi)[1]
    of_all = torch.autograd.functional.jacobian(normalised, phi)
    own = torch.stack([of_all[i, i] for i in range(TASKS)])
    assert (found - own).abs().max() > 0.1


@pytest.mark.parametrize("linear", [True, False])
def test_what_a_function_does_not_depend_on_is_zero(linear):
    def f(phi):
        return 3 * phi["a"] if linear else torch.zeros(TASKS, dtype=torch.float64)

    value, gradient = task_gradient(f, point())
    product = hessian_vector(f, point(), point(seed=5))
    assert value.shape == (TASKS,)
    assert gradient["a"].tolist() == ([3.0] * TASKS if linear else [0.0] * TASKS)
    for found in (gradient["b"], product["a"], product["b"]):
        assert not found.any()
    assert found.shape == (TASKS, 2, 2)
    constant = jacobian_of(torch.ones(TASKS, 2), normal(TASKS, 4).requires_grad_())
    assert constant.shape == (TASKS, 2, 4)
    assert not constant.any()


def test_history_is_kept_where_asked_for():
    theta = normal(2).requires_grad_()

    def f(phi):
        return ((phi * theta) ** 3).sum(-1)

    phi, vector = normal(TASKS, 2, seed=1), normal(TASKS, 2, seed=2)
    _, gradient = task_gradient(f, phi, create_graph=True)
    (found,) = torch.autograd.grad(gradient.sum(), theta)
    # ∂/∂θ of 3 θ³ φ².
    torch.testing.assert_close(found, (9 * theta**2 * (phi**2).sum(0)).detach())
    product = hessian_vector(f, phi, vector, create_graph=True)
    (found,) = torch.autograd.grad(product.sum(), theta)
    torch.testing.assert_close(found, (18 * theta**2 * (phi * vector).sum(0)).detach())
    _, cut = task_gradient(f, phi)
    assert not cut.requires_grad


def test_all_of_it_traces():
    phi, vector = point(), point(seed=5)

    def everything(phi, vector):
        return (
            task_gradient(every, phi),
            hessian_vector(every, phi, vector),
            jacobian(lambda x: torch.sin(x) * x.sum(-1, keepdim=True), phi["b"].flatten(1)),
        )

    graph = make_fx(everything)(phi, vector)
    other = point(seed=9), point(seed=7)
    torch.testing.assert_close(graph(*other), everything(*other))


def test_results_are_the_same_where_gradients_are_off():
    def f(phi):
        return phi[:, 0] ** 2 * phi[:, 1] + phi[:, 1] ** 3

    at, vector = normal(TASKS, 2, seed=1), normal(TASKS, 2, seed=2)
    expected = task_gradient(f, at)[1], hessian_vector(f, at, vector), gradient_and_hessian(f, at)
    with torch.no_grad():
        found = task_gradient(f, at)[1], hessian_vector(f, at, vector), gradient_and_hessian(f, at)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)
    assert float(found[2][2].abs().min()) > 0.0
