"""Curvatures of tasks against dense ones, another library's, and expectations by summation."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from curvlinops import FisherType, KFACLinearOperator
from torch import nn

from hbmeta import models
from hbmeta.curvature import gradient_and_hessian, log_joint
from hbmeta.curvatures import check_curvature, precision_of
from hbmeta.curvatures.information import observations
from hbmeta.curvatures.response import gram, response_rows
from hbmeta.errors import UnsupportedModelError
from hbmeta.problem import Problem
from hbmeta.tasks import Tasks
from tests.cases import NOISE, case


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def read(program, tasks, *, seed=0):
    """A problem, its batch, θ, and φ away from where it starts."""
    if isinstance(program, models.HierarchicalModel):
        program = program.bind(tasks)
    problem = Problem(program, tasks)
    batch = problem.batch(tasks)
    theta = problem.theta(batch)
    phi = problem.location(theta, batch)
    return problem, batch, theta, phi + 0.5 * normal(*phi.shape, seed=seed)


def dense(kind, problem, theta, phi, batch, **options):
    """Λ (tasks, size, size) from the covariance of the density, without damping."""
    precision = precision_of(kind, problem, theta, phi, batch, **options)
    none = torch.zeros(batch.n_tasks, dtype=torch.float64)
    return torch.linalg.inv(covariance_of(precision.density(phi, none)))


def covariance_of(density):
    """A Aᵀ with the columns of φ = centre + A ε."""
    identity = torch.eye(density.noise_size, dtype=torch.float64)
    noise = identity.unsqueeze(1).expand(-1, len(density.centre), -1)
    columns = (density.draw(noise) - density.centre).permute(1, 2, 0)
    return columns @ columns.mT


def network(tasks, hidden=(8, 8), **settings):
    settings = {"noise": 0.3, "activation": "tanh"} | settings
    return models.NeuralRegression(hidden, **settings).bind(tasks)


# Gauss–Newton is the exact curvature where the parameters are natural and linear in φ


SOFTMAX = models.NeuralClassifier(3, (), prior_scale=1.0)


@pytest.mark.parametrize(
    "name",
    ["linear_own_nested", "linear_own_flat", "bernoulli", "poisson_offset", "class_conditional"],
)
def test_gauss_newton_of_canonical_links(name):
    problem, batch, theta, phi = read(case(name).program, case(name).tasks)
    exact = dense("exact", problem, theta, phi, batch)
    torch.testing.assert_close(
        dense("ggn", problem, theta, phi, batch), exact, rtol=1e-9, atol=1e-9
    )


def test_gauss_newton_of_a_softmax():
    problem, batch, theta, phi = read(SOFTMAX, case("neural_classifier").tasks)
    exact = dense("exact", problem, theta, phi, batch)
    torch.testing.assert_close(
        dense("ggn", problem, theta, phi, batch), exact, rtol=1e-9, atol=1e-9
    )


def test_other_links_have_another_curvature():
    """Else the tests above would pass for any reason."""
    problem, batch, theta, phi = read(case("student_t").program, case("student_t").tasks)
    found = dense("ggn", problem, theta, phi, batch)
    exact = precision_of("exact", problem, theta, phi, batch).matrix
    assert float((found - exact).abs().max()) > 0.1


# The information of families: E[∇ log p ∇ log pᵀ], summed or integrated over y

GRID = np.linspace(-300, 300, 1_200_001)
POSITIVE = np.exp(np.linspace(-22, 9, 400_001))
COUNTS = np.arange(400.0)
FAMILIES = {
    "normal": (lambda a, b: dist.Normal(a, b.exp()), GRID),
    "log-normal": (lambda a, b: dist.LogNormal(0.3 * a, 0.3 * b.exp()), POSITIVE),
    "laplace": (lambda a, b: dist.Laplace(a, b.exp()), GRID),
    "student": (lambda a, b: dist.StudentT(9.0, a, b.exp()), GRID),
    "gamma": (lambda a, b: dist.Gamma(a.exp(), b.exp()), POSITIVE),
    "exponential": (lambda a, b: dist.Exponential((a + b).exp()), POSITIVE),
    "bernoulli": (lambda a, b: dist.Bernoulli(logits=a + b), np.arange(2.0)),
    "bernoulli, probabilities": (lambda a, b: dist.Bernoulli((a + b).sigmoid()), np.arange(2.0)),
    "binomial": (lambda a, b: dist.Binomial(7, logits=a * b), np.arange(8.0)),
    "poisson": (lambda a, b: dist.Poisson((a + b).exp()), COUNTS),
    "negative binomial": (lambda a, b: dist.NegativeBinomial(3.0, logits=a + b - 1), COUNTS),
    "categorical": (
        lambda a, b: dist.Categorical(logits=torch.stack([a, b, a * b], -1)),
        np.arange(3.0),
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_information_of_a_family(name):
    """The integrals' own error is below 1e-6 on these grids, 1e-3 at a kink; the sums are exact."""
    family, support = FAMILIES[name]
    u = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)
    y = torch.from_numpy(support)

    def log_prob(point):
        return family(point[0], point[1]).log_prob(y)

    scores = torch.func.jacfwd(log_prob)(u.detach())
    weights = log_prob(u.detach()).exp()
    if support is GRID or support is POSITIVE:
        weights = weights * torch.from_numpy(np.gradient(support))
    expected = scores.T @ (weights.unsqueeze(-1) * scores)
    found = observations(family(u[0], u[1]), y[0], lambda tensor: tensor.requires_grad)
    rows = [torch.autograd.grad(p, u, retain_graph=True)[0] for p in found.parameters.flatten()]
    whitened = found.root.reshape(-1, len(rows)) @ torch.stack(rows)
    off = 1e-3 if name == "laplace" else 2e-5
    torch.testing.assert_close(whitened.T @ whitened, expected, rtol=off, atol=off)


def test_family_without_a_formula_takes_its_own_curvature():
    """Weibull at y: the positive part of −∂² log p, here as it is."""

    def weibull(x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
            with pyro.plate("point", x.shape[1], dim=-1):
                return pyro.sample("y", dist.Weibull(level.exp(), 2.0), obs=y)

    # −∂² log p / ∂s² of the scale s is 6 y² / s⁴ − 2 / s², and ds/dφ = s.
    tasks = Tasks(torch.zeros(2, 2, 1), torch.tensor([[1.5, 2.0], [3.0, 0.1]]))
    problem, batch, theta, _ = read(weibull, tasks.to(dtype=torch.float64))
    phi = torch.zeros(2, 1, dtype=torch.float64)
    each = (6 * batch.y.square() - 2).clamp_min(0)
    torch.testing.assert_close(
        precision_of("ggn", problem, theta, phi, batch).matrix.flatten(), 1 + each.sum(-1)
    )


# Structured forms against dense ones


def jacobian_of_network(problem, theta, phi, batch):
    """∂ outputs / ∂φ (points, size) of the first task, by torch.func."""

    def mean(vector):
        whole = torch.cat([vector[None], phi[1:]])
        return problem.response(theta, problem.sites.from_vector(whole), batch).mean[0]

    return torch.func.jacrev(mean)(phi[0])


def test_low_rank_form_is_the_dense_one():
    problem, batch, theta, phi = read(
        network(case("neural_regression").tasks), case("neural_regression").tasks
    )
    precision = precision_of("ggn", problem, theta, phi, batch)
    none = torch.zeros(batch.n_tasks, dtype=torch.float64)
    density = precision.density(phi, none)
    assert type(density).__name__ == "LowRankPrecision"
    rows = jacobian_of_network(problem, theta, phi, batch) * batch.weight[0].unsqueeze(-1)
    # prior_scale 0.1, noise 0.3
    matrix = 100 * torch.eye(97, dtype=torch.float64) + rows.T @ rows / 0.09
    truth = torch.distributions.MultivariateNormal(phi[0], precision_matrix=matrix)
    covariance = covariance_of(density)[0]
    torch.testing.assert_close(covariance, truth.covariance_matrix, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(density.sd[0], covariance.diagonal().sqrt(), rtol=1e-9, atol=0)
    at = phi + 0.1 * normal(3, *phi.shape, seed=4)
    torch.testing.assert_close(density.log_prob(at)[:, 0], truth.log_prob(at[:, 0]))
    torch.testing.assert_close(precision.log_det(none)[0], torch.logdet(matrix))
    assert float(density.select(torch.tensor([2])).centre[0, 0]) == float(phi[2, 0])


def test_diagonal_and_last_layer_are_parts_of_the_dense_one():
    problem, batch, theta, phi = read(
        network(case("neural_regression").tasks, (3,)), case("neural_regression").tasks
    )
    whole = precision_of("ggn", problem, theta, phi, batch).matrix
    diagonal = precision_of("diagonal", problem, theta, phi, batch)
    torch.testing.assert_close(diagonal.values, whole.diagonal(dim1=-2, dim2=-1))
    block = precision_of("last_layer", problem, theta, phi, batch)
    names = [site.name for site in problem.sites.locals]
    assert names[-2:] == ["layer2.weight", "layer2.bias"]
    assert block.entries.tolist() == [6, 7, 8, 9]
    torch.testing.assert_close(block.inner.matrix, whole[:, 6:, 6:])
    none = torch.zeros(batch.n_tasks, dtype=torch.float64)
    density = block.density(phi, none)
    covariance = covariance_of(density)
    torch.testing.assert_close(covariance[:, 6:, 6:], torch.linalg.inv(whole[:, 6:, 6:]))
    assert float(covariance[:, :6].abs().max()) == 0.0
    with pytest.raises(UnsupportedModelError, match="at a point"):
        density.log_prob(phi)
    # The flat layout sums over the rows of a task by index.
    flat = case("linear_own_flat")
    problem, batch, theta, phi = read(flat.program, flat.tasks)
    whole = precision_of("ggn", problem, theta, phi, batch).matrix
    found = precision_of("diagonal", problem, theta, phi, batch).values
    torch.testing.assert_close(found, whole.diagonal(dim1=-2, dim2=-1))


def one_task(outputs):
    """One task of six rows, and a plain network 2-4-3-outputs of tanh."""
    x = normal(1, 6, 2, seed=3)
    layers = nn.Sequential(
        nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, outputs)
    ).double()
    with torch.no_grad():
        for number, parameter in enumerate(layers.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=number))
    return x, layers


@pytest.mark.parametrize("family", ["normal", "categorical"])
def test_kronecker_factors_are_those_of_another_library(family):
    if family == "normal":
        x, layers = one_task(1)
        y = normal(1, 6, seed=9)
        # The Hessian of (y − f)² is 2; noise² = ½ gives the same.
        model = models.NeuralRegression(network=layers, noise=0.5**0.5, prior_scale=1.0)
        loss, target = nn.MSELoss(reduction="sum"), y[0].unsqueeze(-1)
    else:
        x, layers = one_task(3)
        y = torch.tensor([[0, 2, 1, 1, 0, 2]])
        model = models.NeuralClassifier(3, network=layers, prior_scale=1.0)
        loss, target = nn.CrossEntropyLoss(reduction="sum"), y[0]
    tasks = Tasks(x, y)
    problem, batch, theta, _ = read(model, tasks)
    phi = torch.cat([p.detach().reshape(1, -1) for p in layers.parameters()], 1)
    found = dense("kronecker", problem, theta, phi, batch) - torch.eye(phi.shape[1]).double()
    theirs = KFACLinearOperator(
        layers,
        loss,
        [p for p in layers.parameters() if p.requires_grad],
        [(x[0], target)],
        fisher_type=FisherType.TYPE2,
        separate_weight_and_bias=False,
    )
    expected = theirs @ torch.eye(phi.shape[1], dtype=torch.float64)
    torch.testing.assert_close(found[0], expected, rtol=1e-7, atol=1e-9)


def test_kronecker_density_is_the_dense_one():
    """Also under a prior that differs between weights and biases, and with damping."""
    tasks = case("neural_regression").tasks
    model = network(tasks, (4, 3), mean="zero")
    problem, batch, theta, phi = read(model, tasks)
    precision = precision_of("kronecker", problem, theta, phi, batch)
    damping = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    density = precision.density(phi, damping)
    whole = torch.zeros(4, *[phi.shape[1]] * 2, dtype=torch.float64)
    for layer in precision.layers:
        outputs = layer.entries.shape[0]
        at = layer.entries.flatten()
        for i in range(4):
            block = torch.kron(layer.outputs[i], layer.inputs[i])
            block = block + torch.diag((layer.prior[i] + damping[i]).repeat(outputs))
            whole[i, at.unsqueeze(-1), at] = block
    truth = torch.distributions.MultivariateNormal(phi, precision_matrix=whole)
    torch.testing.assert_close(covariance_of(density), truth.covariance_matrix)
    at = phi + 0.3 * normal(2, *phi.shape, seed=4)
    torch.testing.assert_close(density.log_prob(at), truth.log_prob(at))
    torch.testing.assert_close(precision.log_det(damping), torch.logdet(whole))
    picked = density.select(torch.tensor([3, 1]))
    torch.testing.assert_close(picked.log_prob(at[:, [3, 1]]), truth.log_prob(at)[:, [3, 1]])
    # Bias and weights have their own prior: fan-in scaled against 1.
    assert len(precision.layers[1].prior[0].unique()) == 2


def test_rows_by_points_and_by_entries_are_the_same():
    tasks = case("neural_regression").tasks
    problem, batch, theta, phi = read(network(tasks), tasks)
    by_row = response_rows(problem, theta, phi, batch)
    some = [0, 40, 96]
    by_column = response_rows(problem, theta, phi, batch, columns=some)
    torch.testing.assert_close(by_row[..., some], by_column)
    torch.testing.assert_close(gram(by_row, batch)[:, some][:, :, some], gram(by_column, batch))


# What is refused, and what is not of the observations


def test_factors_of_a_task_count_as_they_are():
    def with_factor(x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
            pyro.factor("pull", -2.0 * level**2)
            with pyro.plate("point", x.shape[1], dim=-1):
                return pyro.sample("y", dist.Normal(level, NOISE), obs=y)

    tasks = Tasks(torch.zeros(2, 3, 1, dtype=torch.float64), normal(2, 3))
    problem, batch, theta, phi = read(with_factor, tasks)
    expected = torch.full((2,), 1 + 4 + 3 / NOISE**2, dtype=torch.float64)
    found = precision_of("ggn", problem, theta, phi, batch).matrix.flatten()
    torch.testing.assert_close(found, expected)
    _, _, hessian = gradient_and_hessian(lambda p: log_joint(problem, theta, p, batch), phi)
    torch.testing.assert_close(-hessian.flatten(), expected)


def scaled(x, y=None):
    with pyro.plate("task", x.shape[0], dim=-2):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("point", x.shape[1], dim=-1), pyro.poutine.scale(scale=3.0):
            return pyro.sample("y", dist.Normal(level, NOISE), obs=y)


@pytest.mark.parametrize(
    ("kind", "program", "name", "found"),
    [
        ("exact", None, "neural_regression", "97"),
        ("ggn", scaled, "eight_schools", "scaled or masked"),
        ("ggn", None, "gaussian_process", "the joint layout"),
        ("kronecker", None, "two_coefficients", "two_coefficients"),
        ("last_layer", None, "two_coefficients", "intercept, slope"),
        ("kronecker", None, "linear_own_nested", "ties them"),
    ],
)
def test_refusals_say_what_was_found(kind, program, name, found):
    problem, *_ = read(program or case(name).program, case(name).tasks)
    with pytest.raises(UnsupportedModelError) as caught:
        check_curvature(kind, problem, "Laplace")
    assert found in caught.value.found
    assert "curvature" in caught.value.do


def test_kronecker_wants_dense_layers():
    tasks = case("neural_regression").tasks
    odd = nn.Sequential(nn.Linear(1, 4), nn.LayerNorm(4), nn.Linear(4, 1)).double()
    problem, *_ = read(models.NeuralRegression(network=odd), tasks)
    with pytest.raises(UnsupportedModelError, match="LayerNorm '1'"):
        check_curvature("kronecker", problem, "Laplace")
