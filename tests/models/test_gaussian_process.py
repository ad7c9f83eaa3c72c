"""GaussianProcess against gpytorch's own kernels, evaluated densely and task by task."""

import copy

import gpytorch
import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import hbmeta as hb
from hbmeta import models
from hbmeta.errors import DataError, ProgramError, UnsupportedModelError
from hbmeta.inference import MAML, ExactGP
from hbmeta.problem import Problem
from hbmeta.program import Batch
from hbmeta.tasks import Tasks
from tests import reference

K = gpytorch.kernels

# Anything that gpytorch has and that sums, products and scalings of it give.
KERNELS = {
    "rbf": lambda: K.RBFKernel(),
    "matern12": lambda: K.MaternKernel(0.5),
    "matern32": lambda: K.MaternKernel(1.5),
    "matern52": lambda: K.MaternKernel(2.5),
    "periodic": lambda: K.PeriodicKernel(),
    "rational quadratic": lambda: K.RQKernel(),
    "scaled": lambda: K.ScaleKernel(K.RBFKernel()),
    "sum": lambda: K.RBFKernel() + K.PeriodicKernel(),
    "product": lambda: K.RBFKernel() * K.LinearKernel(),
    "polynomial": lambda: K.PolynomialKernel(2),
    "per column": lambda: K.RBFKernel(ard_num_dims=2),
    "periodic per column": lambda: K.PeriodicKernel(ard_num_dims=2),
    "of some columns": lambda: K.ScaleKernel(
        K.RBFKernel(active_dims=[0]) * K.MaternKernel(1.5, active_dims=[1])
    ),
    "constant": lambda: K.ConstantKernel() + K.RBFKernel(),
}
NAMED = ("rbf", "matern12", "matern32", "matern52", "periodic")
N_TASKS, N_POINTS = 3, 5

each_kernel = pytest.mark.parametrize("name", KERNELS)


def numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def inputs():
    return 2 * numbers(N_TASKS, N_POINTS, 2, seed=1) - 1


def coincident():
    """Two points of every task at the same place."""
    x = inputs()
    x[:, 3] = x[:, 1]
    return x


def data(n_columns=1):
    return Tasks(coincident()[..., :n_columns], numbers(N_TASKS, N_POINTS, seed=2))


def learned(name):
    """The model with every hyperparameter of its kernel in φ, and values of these."""
    model = models.GaussianProcess(KERNELS[name](), scale=1.3, noise=0.2)
    sizes = {n: int(np.prod(s)) for n, s in model._kernel.shapes.items()}
    values = {n: 0.4 + numbers(N_TASKS, size, seed=i) for i, (n, size) in enumerate(sizes.items())}
    return model, values


def dense(kernel, values, x):
    """gpytorch's matrix of one task, its hyperparameters set one by one."""
    kernel = copy.deepcopy(kernel).double()
    for name, parameter in list(kernel.named_parameters()):
        *path, last = name.replace("raw_", "").split(".")
        module = kernel.get_submodule(".".join(path))
        setattr(module, last, values[".".join([*path, last])].reshape(parameter.shape))
    with torch.no_grad():
        return kernel(x).to_dense()


# The kernel matrix


@each_kernel
def test_kernel_is_gpytorch_s_own(name):
    model, values = learned(name)
    found = model._kernel.matrix(values, inputs())
    for i in range(N_TASKS):
        expected = dense(KERNELS[name](), {n: v[i] for n, v in values.items()}, inputs()[i])
        torch.testing.assert_close(found[i], expected, rtol=1e-10, atol=1e-10)


@each_kernel
def test_known_hyperparameters_are_the_same_in_all_tasks(name):
    shapes = learned(name)[0]._kernel.shapes
    known = {n: 0.6 + 0.2 * i for i, n in enumerate(shapes)}
    model = models.GaussianProcess(KERNELS[name](), scale=1.3, noise=0.2, hyperparameters=known)
    response = model.likelihood({}, {}, inputs())
    for i in range(N_TASKS):
        values = {n: torch.full(shapes[n], v, dtype=torch.float64) for n, v in known.items()}
        expected = 1.69 * dense(KERNELS[name](), values, inputs()[i])
        expected = expected + 0.04 * torch.eye(N_POINTS, dtype=torch.float64)
        torch.testing.assert_close(
            response.covariance_matrix[i].detach(), expected, rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize("name", NAMED)
def test_named_kernels_are_the_written_formulas(name):
    period = {"period": 0.8} if name == "periodic" else {}
    model = models.GaussianProcess(name, lengthscale=0.7, scale=1.3, noise=0.2, **period)
    x = coincident()[0, :, 0]
    at = x.numpy()
    expected = 1.69 * reference.kernel_matrix(name, at, at, lengthscale=0.7, **period)
    found = model.likelihood({}, {}, x[None, :, None]).covariance_matrix[0].numpy()
    np.testing.assert_allclose(found, expected + 0.04 * np.eye(N_POINTS), rtol=1e-10, atol=1e-12)
    # gpytorch's own distance of equal points is 3e-8; here it is 0.
    assert found[1, 3] == pytest.approx(1.69, rel=1e-14)


@each_kernel
def test_traced_graph_and_vmap_equal_the_eager_matrix(name):
    model, values = learned(name)
    eager = model._kernel.matrix(values, inputs())
    graph = make_fx(lambda v, x: model._kernel.matrix(v, x))(
        {n: v.clone() for n, v in values.items()}, inputs()
    )
    torch.testing.assert_close(graph(values, inputs()), eager, rtol=1e-12, atol=1e-12)
    # The graph must follow its arguments.
    others = {n: v + 0.3 for n, v in values.items()}
    moved = model._kernel.matrix(others, inputs())
    torch.testing.assert_close(graph(others, inputs()), moved, rtol=1e-12, atol=1e-12)
    both = {n: torch.stack([values[n], others[n]]) for n in values}
    x = inputs()
    mapped = torch.vmap(lambda v: model._kernel.matrix(v, x))(both)
    torch.testing.assert_close(mapped, torch.stack([eager, moved]), rtol=1e-12, atol=1e-12)


# The log likelihood


@pytest.mark.parametrize("name", NAMED)
def test_gradients_of_the_log_likelihood_with_coincident_points(name):
    """gradcheck and gradgradcheck: MAML's inner steps are differentiated twice."""
    period = {"period": 0.9} if name == "periodic" else {}
    model = models.GaussianProcess(name, lengthscale=(0.2, 2.0), scale=1.0, noise=0.3, **period)
    problem = Problem(model, data())
    batch = problem.batch(data())

    def log_likelihood(phi):
        return problem.log_likelihood({}, phi, batch)

    phi = (numbers(N_TASKS, 1, seed=4) - 0.5).requires_grad_()
    assert torch.autograd.gradcheck(log_likelihood, phi)
    assert torch.autograd.gradgradcheck(log_likelihood, phi)


@pytest.mark.parametrize("name", NAMED)
def test_maml_s_loss_has_finite_gradients_at_coincident_points(name):
    period = {"period": 0.9} if name == "periodic" else {}
    model = models.GaussianProcess(name, scale=1.0, noise=0.3, **period)
    problem = Problem(model, data())
    batch = problem.batch(data())
    theta = {n: v.requires_grad_() for n, v in problem.theta(batch).items()}
    support, query = (batch.where(batch.mask & keep) for keep in _halves())
    loss = MAML(steps=3, step_size=0.05).loss(problem, theta, None, support, query, {})
    gradient = torch.autograd.grad(loss.sum(), theta["lengthscale_location"])[0]

    def at(value):
        moved = theta | {"lengthscale_location": torch.as_tensor(value, dtype=torch.float64)}
        return float(MAML(steps=3, step_size=0.05).loss(
            problem, moved, None, support, query, {}
        ).sum().detach())  # fmt: skip

    assert float(gradient) == pytest.approx((at(1e-5) - at(-1e-5)) / 2e-5, rel=1e-5)


def _halves():
    first = torch.tensor([True, True, False, False, False])
    return first, ~first


def test_staged_log_likelihood_and_its_gradient_equal_the_eager_ones():
    problem = Problem(models.GaussianProcess("matern52"), data())
    batch = problem.batch(data())
    theta = problem.theta(batch)

    def gradient(phi):
        with torch.enable_grad():
            phi = phi.detach().requires_grad_()
            value = problem.log_likelihood(theta, phi, batch).sum()
            return torch.autograd.grad(value, phi)[0]

    start, moved = (numbers(N_TASKS, 3, seed=s) - 0.5 for s in (5, 6))
    graph = make_fx(gradient)(start.clone())
    torch.testing.assert_close(graph(moved), gradient(moved), rtol=1e-10, atol=1e-12)


def test_masked_points_add_nothing_and_are_told_nothing():
    """The same task padded, with any numbers in the padding, has the same log likelihood."""
    model = models.GaussianProcess("rbf", lengthscale=(0.2, 2.0), scale=1.0, noise=0.3, mean=0.7)
    problem = Problem(model, data())
    batch = problem.batch(data())
    phi = numbers(N_TASKS, 1, seed=4)
    alone = problem.log_likelihood({}, phi, batch)
    x = torch.cat([batch.x, 50 * numbers(N_TASKS, 3, 1, seed=8)], 1)
    y = torch.cat([batch.y, 50 * numbers(N_TASKS, 3, seed=9)], 1)
    weight = torch.cat([batch.weight, torch.zeros(N_TASKS, 3, dtype=torch.float64)], 1)
    padded = Batch(x, y, weight, None, N_TASKS, joint=True)
    found = problem.log_likelihood({}, phi, padded)
    torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-12)


def test_forward_draws_from_the_prior_and_keeps_the_mean_in_the_padding():
    """2,000 draws of two points: mean and covariance within 5 standard errors (1e-6 each)."""
    model = models.GaussianProcess("rbf", lengthscale=0.5, scale=2.0, noise=0.3, mean=1.5)
    x = torch.tensor([[0.0], [0.4], [9.0]], dtype=torch.float64).expand(2000, 3, 1)
    mask = torch.tensor([True, True, False]).expand(2000, 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = model(x, mask=mask)[:, :2]
    covariance = 4 * np.exp(-0.5 * (0.4 / 0.5) ** 2)
    error = np.sqrt(4.09 / 2000)
    assert float((y.mean(0) - 1.5).abs().max()) < 5 * error
    assert abs(float(torch.cov(y.T)[0, 1]) - covariance) < 5 * 4.09 * np.sqrt(2 / 2000)


# Settings, errors, files


def test_learned_hyperparameters_have_a_location_and_a_spread_at_level_one():
    sites = Problem(models.GaussianProcess("rbf", noise=0.1, lengthscale=(0.1, 1.0)), data()).sites
    assert [s.name for s in sites.globals] == ["scale_location", "scale_spread"]
    assert [(s.name, s.family, s.shape) for s in sites.locals] == [
        ("lengthscale", "Uniform", ()),
        ("scale", "LogNormal", ()),
    ]
    per_column = models.GaussianProcess(K.RBFKernel(ard_num_dims=2), scale=1.0, noise=0.1)
    assert Problem(per_column, data(2)).sites.locals[0].shape == (2,)


def test_the_kernel_of_the_caller_is_left_alone():
    kernel = K.ScaleKernel(K.RBFKernel())
    before = {n: p.clone() for n, p in kernel.named_parameters()}
    models.GaussianProcess(kernel, hyperparameters={"outputscale": 2.0})(inputs())
    assert all(torch.equal(before[n], p) for n, p in kernel.named_parameters())
    assert all(p.requires_grad for p in kernel.parameters())
    torch.testing.assert_close(kernel(inputs()[0].float()).to_dense()[0, 0].item(), 0.6931472)


@pytest.mark.parametrize(
    ("arguments", "needed", "found"),
    [
        ({"kernel": "gauss"}, "kernel among 'rbf'", "'gauss'"),
        ({"kernel": 3}, "a kernel: a name", "int"),
        ({"lengthscale": -1.0}, "lengthscale as a positive number", "-1.0"),
        ({"lengthscale": (1.0, 0.2)}, "a range (low, high)", "(1.0, 0.2)"),
        ({"lengthscale": (1.0, 2.0, 3.0)}, "a range (low, high)", "(1.0, 2.0, 3.0)"),
        ({"scale": "learnt"}, "or 'learned'", "'learnt'"),
        ({"noise": 0.0}, "noise as a positive number", "0.0"),
        ({"noise": float("nan")}, "noise as a positive number", "nan"),
        ({"period": 1.0}, "hyperparameters among 'lengthscale'", "'period_length'"),
        ({"hyperparameters": {"alpha": 1.0}}, "hyperparameters among", "'alpha'"),
        ({"mean": float("inf")}, "a finite mean", "inf"),
        ({"mean": "a"}, "a finite mean", "'a'"),
        ({"scale": True}, "scale as a positive number", "True"),
        ({"noise": "0.1"}, "noise as a positive number", "'0.1'"),
    ],
)
def test_impossible_settings_are_refused(arguments, needed, found):
    with pytest.raises(DataError) as caught:
        models.GaussianProcess(**arguments)
    assert needed in caught.value.needed
    assert found in caught.value.found


@pytest.mark.parametrize(
    ("arguments", "do"),
    [
        ({"hyperparameters": {"scale": 1.0}}, "scale=1.0"),
        ({"hyperparameters": {"noise": 1.0}}, "noise=1.0"),
        ({"period": 1.0}, "'periodic', period=1.0"),
    ],
)
def test_names_that_are_no_hyperparameters_of_the_kernel_say_where_they_go(arguments, do):
    with pytest.raises(DataError) as caught:
        models.GaussianProcess("rbf", **arguments)
    assert do in caught.value.do


def test_labels_as_y_are_refused():
    with pytest.raises(ProgramError, match="one real number per point"):
        models.GaussianProcess("rbf").bind(Tasks(inputs(), torch.ones(3, 5, dtype=torch.int64)))


@pytest.mark.parametrize("lengthscale", [0.5, (0.2, 1.0), "learned"])
def test_a_fit_is_read_back_from_its_file(lengthscale, tmp_path):
    model = models.GaussianProcess("matern32", lengthscale=lengthscale, scale=1.0, noise=0.2)
    fitted = ExactGP().fit(model, data(), compile=False)
    fitted.save(tmp_path / "fit.safetensors")
    back = hb.load(tmp_path / "fit.safetensors")
    assert back.model.settings() == model.settings()
    one, other = (f.adapt(data()).predict(data()) for f in (fitted, back))
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.log_prob(data().y, joint=True), other.log_prob(data().y, joint=True))


def test_a_kernel_object_is_passed_to_load(tmp_path):
    def model(nu=1.5):
        kernel = K.ScaleKernel(K.MaternKernel(nu))
        known = {"base_kernel.lengthscale": (0.2, 1.0), "outputscale": 1.3}
        return models.GaussianProcess(kernel, scale=1.0, noise=0.2, hyperparameters=known)

    path = tmp_path / "fit.safetensors"
    fitted = ExactGP().fit(model(), data(), compile=False)
    fitted.save(path)
    with pytest.raises(UnsupportedModelError, match="kernel=ScaleKernel"):
        hb.load(path)
    with pytest.raises(UnsupportedModelError, match=r"a model with kernel=.*'nu': 1.5"):
        hb.load(path, model=model(2.5))
    back = hb.load(path, model=model())
    one, other = (f.adapt(data()).predict(data()).mean for f in (fitted, back))
    assert torch.equal(one, other)
