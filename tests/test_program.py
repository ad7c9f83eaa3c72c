import math

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample
from scipy import integrate, stats
from torch import nn
from torch.distributions import biject_to, constraints
from torch.fx.experimental.proxy_tensor import make_fx

from hbmeta.problem import Problem
from hbmeta.program import Batch, isolated
from hbmeta.tasks import Tasks

DRAW = np.random.default_rng(0)
X = torch.tensor(DRAW.normal(size=(9, 2)))
Y = torch.tensor(DRAW.normal(size=9))
TASK = [0, 0, 0, 1, 3, 3, 3, 3, 3]  # task 2 is empty


def data(dtype: torch.dtype = torch.float64) -> Tasks:
    return Tasks.from_flat(X.to(dtype), Y.to(dtype), TASK, 4)


def flat_and_nested(body):
    """A program of both layouts from `body(draw_phi) -> φ` and the likelihood N(sum of φ, 1)."""

    def program(x, y=None, *, task=None, n_tasks=None):
        if task is None:
            with pyro.plate("task", x.shape[0], dim=-2):
                location = body()
                with pyro.plate("point", x.shape[1], dim=-1):
                    return pyro.sample("y", dist.Normal(location, 1.0), obs=y)
        with pyro.plate("task", n_tasks, dim=-1):
            location = body()
        with pyro.plate("point", x.shape[0], dim=-1):
            return pyro.sample("y", dist.Normal(location[task], 1.0), obs=y)

    return program


def total(value: torch.Tensor, event_dims: int) -> torch.Tensor:
    return value.sum(tuple(range(-event_dims, 0))) if event_dims else value


def local_program(family):
    prior = family()
    return flat_and_nested(lambda: total(pyro.sample("phi", family()), len(prior.event_shape)))


def global_program(family):
    prior = family()

    def program(x, y=None, *, task=None, n_tasks=None):
        shared = total(pyro.sample("theta", family()), len(prior.event_shape))
        return flat_and_nested(lambda: shared + pyro.sample("phi", dist.Normal(0.0, 1.0)))(
            x, y, task=task, n_tasks=n_tasks
        )

    return program


# Densities in unconstrained space

SCALAR = {
    "HalfNormal": (
        lambda: dist.HalfNormal(2.5),
        lambda u: stats.halfnorm.logpdf(np.exp(u), scale=2.5) + u,
    ),
    "HalfCauchy": (
        lambda: dist.HalfCauchy(2.5),
        lambda u: stats.halfcauchy.logpdf(np.exp(u), scale=2.5) + u,
    ),
    "Gamma": (
        lambda: dist.Gamma(2.0, 3.0),
        lambda u: stats.gamma.logpdf(np.exp(u), 2.0, scale=1 / 3.0) + u,
    ),
    "Beta": (
        lambda: dist.Beta(2.0, 3.0),
        # x = 1 / (1 + e^-u), dx/du = x (1 - x)
        lambda u: (
            stats.beta.logpdf(1 / (1 + np.exp(-u)), 2.0, 3.0)
            - np.log(1 + np.exp(-u))
            - np.log(1 + np.exp(u))
        ),
    ),
    "Uniform": (
        lambda: dist.Uniform(-1.0, 3.0),
        # x = -1 + 4 s(u), density 1/4, dx/du = 4 s (1 - s)
        lambda u: -np.log(1 + np.exp(-u)) - np.log(1 + np.exp(u)),
    ),
    "Normal": (lambda: dist.Normal(1.0, 2.0), lambda u: stats.norm.logpdf(u, 1.0, 2.0)),
}


@pytest.mark.parametrize("layout", ["nested", "flat"])
@pytest.mark.parametrize("name", SCALAR)
def test_scalar_local_densities_by_hand(name, layout):
    family, by_hand = SCALAR[name]
    tasks = data()
    problem = Problem(local_program(family), tasks, layout=layout)
    u = torch.tensor([[-1.2], [0.3], [0.0], [1.4]], dtype=torch.float64)
    found = problem.log_task_prior({}, u, problem.batch(tasks))
    np.testing.assert_allclose(found, by_hand(u[:, 0].numpy()), rtol=1e-12)


@pytest.mark.parametrize("name", SCALAR)
def test_scalar_global_densities_by_hand(name):
    family, by_hand = SCALAR[name]
    tasks = data()
    problem = Problem(global_program(family), tasks)
    for u in (-1.2, 0.3):
        theta = {"theta": torch.tensor(u, dtype=torch.float64)}
        found = problem.log_prior(theta, problem.batch(tasks))
        assert float(found) == pytest.approx(by_hand(u), rel=1e-12)


@pytest.mark.parametrize(
    "family",
    [
        lambda: dist.HalfCauchy(0.7),
        lambda: dist.Beta(0.8, 2.0),
        lambda: dist.Dirichlet(torch.tensor([0.8, 2.0])),
        lambda: dist.LKJCholesky(2, 1.5),
        lambda: dist.LogNormal(0.3, 0.5),
    ],
)
def test_densities_of_one_dimension_integrate_to_one(family):
    tasks = data()
    problem = Problem(global_program(family), tasks)
    batch = problem.batch(tasks)
    shape = problem.sites.globals[0].unconstrained_shape

    def density(u: float) -> float:
        theta = {"theta": torch.tensor(u, dtype=torch.float64).reshape(shape)}
        return math.exp(float(problem.log_prior(theta, batch)))

    # Tails beyond ±30 hold less than e^-24 (the smallest exponent here is 0.8).
    mass, _ = integrate.quad(density, -30.0, 30.0, points=[0.0], limit=100)
    assert mass == pytest.approx(1.0, abs=1e-7)


def free_coordinates(name: str, x: torch.Tensor) -> torch.Tensor:
    """The coordinates in which scipy's and torch's densities are densities."""
    if name == "Dirichlet":
        return x[:-1]
    if name == "LKJCholesky":
        rows, columns = torch.tril_indices(len(x), len(x), -1)
        return x[rows, columns]
    return x.reshape(-1)


VECTOR = {
    "Dirichlet": (
        lambda: dist.Dirichlet(torch.tensor([0.8, 2.0, 3.0])),
        lambda x: stats.dirichlet.logpdf(x / x.sum(), [0.8, 2.0, 3.0]),
    ),
    # Over the free entries of L the density is Π_i L_ii^(D - i + 2 β - 2), i = 2..D, up to a
    # constant that does not depend on L; here relative to L = I.
    "LKJCholesky": (
        lambda: dist.LKJCholesky(3, 1.5),
        lambda L: 2.0 * np.log(L[1, 1]) + 1.0 * np.log(L[2, 2]),
    ),
    "Gamma vector": (
        lambda: dist.Gamma(torch.tensor([2.0, 0.7]), torch.tensor([1.0, 3.0])).to_event(1),
        lambda x: stats.gamma.logpdf(x, [2.0, 0.7], scale=[1.0, 1 / 3.0]).sum(),
    ),
    "Normal matrix": (
        lambda: dist.Normal(0.0, 2.0).expand([2, 3]).to_event(2),
        lambda x: stats.norm.logpdf(x, 0.0, 2.0).sum(),
    ),
}


def expected_density(name: str, u: torch.Tensor) -> float:
    """log p(x(u)) + log |det dx/du|, the Jacobian by differentiating every coordinate."""
    family, by_hand = VECTOR[name]
    with isolated(torch.zeros(1, dtype=torch.float64)):
        transform = biject_to(family().support)
        constant = 0.0
        if name == "LKJCholesky":
            constant = float(family().log_prob(torch.eye(3)))
        jacobian = torch.func.jacrev(lambda v: free_coordinates(name, transform(v)))(u)
        log_det = float(torch.linalg.slogdet(jacobian.reshape(u.numel(), u.numel()))[1])
    return float(by_hand(transform(u).numpy())) + constant + log_det


@pytest.mark.parametrize("layout", ["nested", "flat"])
@pytest.mark.parametrize("name", VECTOR)
def test_vector_densities_by_hand(name, layout):
    family, _ = VECTOR[name]
    tasks = data()
    local = Problem(local_program(family), tasks, layout=layout)
    shared = Problem(global_program(family), tasks, layout=layout)
    size, shape = local.sites.phi_size, shared.sites.globals[0].unconstrained_shape
    u = torch.randn(4, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = [expected_density(name, row.reshape(shape)) for row in u]
    batch = local.batch(tasks)
    np.testing.assert_allclose(local.log_task_prior({}, u, batch), expected, rtol=1e-11)
    found = [float(shared.log_prior({"theta": row.reshape(shape)}, batch)) for row in u]
    np.testing.assert_allclose(found, expected, rtol=1e-11)


def test_global_sites_inside_a_plate_are_summed():
    def program(x, y=None):
        with pyro.plate("columns", x.shape[-1]):
            scale = pyro.sample("scale", dist.HalfNormal(2.0))
        with pyro.plate("task", x.shape[0], dim=-2):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with pyro.plate("point", x.shape[1], dim=-1):
                pyro.sample("y", dist.Normal(phi + (x * scale).sum(-1), 1.0), obs=y)

    tasks = data()
    problem = Problem(program, tasks)
    u = torch.tensor([0.3, -0.8], dtype=torch.float64)
    found = problem.log_prior({"scale": u}, problem.batch(tasks))
    expected = stats.halfnorm.logpdf(u.exp(), scale=2.0).sum() + float(u.sum())
    assert float(found) == pytest.approx(expected, rel=1e-12)


# The likelihood: masks, scales, factors


@pytest.mark.parametrize("layout", ["nested", "flat"])
def test_likelihood_counts_real_rows_and_masked_in_ones(layout):
    tasks = data()
    problem = Problem(local_program(lambda: dist.Normal(0.0, 1.0)), tasks, layout=layout)
    phi = torch.tensor([[0.5], [-1.0], [2.0], [0.1]], dtype=torch.float64)
    cells = stats.norm.logpdf(Y, phi[TASK, 0], 1.0)
    batch = problem.batch(tasks)
    found = problem.log_likelihood({}, phi, batch)
    np.testing.assert_allclose(found, np.bincount(TASK, cells, 4), rtol=1e-12)

    chosen = np.arange(9) % 2 == 0
    rows = torch.tensor(chosen)
    mask = tasks.pad(rows) & tasks.mask if layout == "nested" else rows
    found = problem.log_likelihood({}, phi, batch.where(mask))
    np.testing.assert_allclose(found, np.bincount(TASK, cells * chosen, 4), rtol=1e-12)
    np.testing.assert_allclose(batch.where(mask).counts, np.bincount(TASK, chosen, 4))


def test_factors_of_every_level():
    def program(x, y=None):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.factor("of_theta", -theta.pow(4))
        with pyro.plate("task", x.shape[0], dim=-2):
            phi = pyro.sample("phi", dist.Normal(theta, 1.0))
            pyro.factor("of_task", phi.sin())
            with pyro.plate("point", x.shape[1], dim=-1):
                pyro.factor("of_point", phi * x[..., 0])
                pyro.sample("y", dist.Normal(phi, 1.0), obs=y)

    tasks = data()
    problem = Problem(program, tasks)
    phi = torch.tensor([[0.5], [-1.0], [2.0], [0.1]], dtype=torch.float64)
    theta = {"theta": torch.tensor(0.7, dtype=torch.float64)}
    likelihood, local, shared = problem.terms(theta, phi, problem.batch(tasks))
    cells = stats.norm.logpdf(Y, phi[TASK, 0], 1.0) + (phi[TASK, 0] * X[:, 0]).numpy()
    expected = np.bincount(TASK, cells, 4) + phi[:, 0].sin().numpy()
    np.testing.assert_allclose(likelihood, expected, rtol=1e-12)
    np.testing.assert_allclose(local, stats.norm.logpdf(phi[:, 0], 0.7, 1.0), rtol=1e-12)
    assert float(shared) == pytest.approx(stats.norm.logpdf(0.7) - 0.7**4, rel=1e-12)


def test_scales_and_masks_of_handlers():
    def program(x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            with poutine.scale(scale=0.5):
                phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            thrice, positive = poutine.scale(scale=3.0), poutine.mask(mask=x[..., 0] > 0)
            with pyro.plate("point", x.shape[1], dim=-1), thrice, positive:
                pyro.sample("y", dist.Normal(phi, 1.0), obs=y)

    tasks = data()
    problem = Problem(program, tasks)
    phi = torch.tensor([[0.5], [-1.0], [2.0], [0.1]], dtype=torch.float64)
    likelihood, local, _ = problem.terms({}, phi, problem.batch(tasks))
    cells = 3.0 * stats.norm.logpdf(Y, phi[TASK, 0], 1.0) * (X[:, 0] > 0).numpy()
    np.testing.assert_allclose(likelihood, np.bincount(TASK, cells, 4), rtol=1e-12)
    np.testing.assert_allclose(local, 0.5 * stats.norm.logpdf(phi[:, 0]), rtol=1e-12)


def test_a_further_observed_site_enters_the_likelihood():
    def program(x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with pyro.plate("point", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(phi, 2.0), obs=x[..., 0])
                pyro.sample("y", dist.Normal(phi, 1.0), obs=y)

    tasks = data()
    problem = Problem(program, tasks)
    assert problem.sites.response == "y"
    phi = torch.tensor([[0.5], [-1.0], [2.0], [0.1]], dtype=torch.float64)
    at = phi[TASK, 0]
    cells = stats.norm.logpdf(Y, at, 1.0) + stats.norm.logpdf(X[:, 0], at, 2.0)
    found = problem.log_likelihood({}, phi, problem.batch(tasks))
    np.testing.assert_allclose(found, np.bincount(TASK, cells, 4), rtol=1e-12)


def test_padding_gives_no_nan_gradient():
    # Known standard errors stand in x, as in eight schools: a padded 0 would be no scale.
    def program(x, y=None):
        spread = pyro.sample("spread", dist.HalfCauchy(5.0))
        with pyro.plate("task", x.shape[0], dim=-2):
            phi = pyro.sample("phi", dist.Normal(0.0, spread))
            with pyro.plate("point", x.shape[1], dim=-1):
                pyro.sample("y", dist.Normal(phi, x[..., 0]), obs=y)

    tasks = Tasks.from_flat(X.abs() + 0.1, Y, TASK, 4)
    problem = Problem(program, tasks)
    batch = problem.batch(tasks)
    theta = {"spread": torch.tensor(0.3, dtype=torch.float64, requires_grad=True)}
    phi = torch.zeros(4, 1, dtype=torch.float64, requires_grad=True)
    terms = problem.terms(theta, phi, batch)
    gradients = torch.autograd.grad(sum(term.sum() for term in terms), [phi, theta["spread"]])
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    # d/dφ_i log p = Σ_j y_ij / σ_ij² at φ = 0
    expected = np.bincount(TASK, Y / (X[:, 0].abs() + 0.1) ** 2, 4)
    np.testing.assert_allclose(gradients[0][:, 0], expected, rtol=1e-12)


# Where latents start


def test_latents_that_are_not_given_sit_at_their_location():
    def program(x, y=None):
        spread = pyro.sample("spread", dist.HalfNormal(2.0))
        with pyro.plate("task", x.shape[0], dim=-2):
            rate = pyro.sample("rate", dist.Gamma(3.0, spread))
            mean = pyro.sample("mean", dist.Normal(rate, 1.0))
            with pyro.plate("point", x.shape[1], dim=-1):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    tasks = data()
    problem = Problem(program, tasks)
    batch = problem.batch(tasks)
    start = problem.theta(batch)
    assert float(start["spread"]) == pytest.approx(math.log(2.0))
    spread = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    found = problem.location({"spread": spread}, batch)
    expected = torch.stack([math.log(3.0) - spread, 3.0 / spread.exp()]).expand(4, 2)
    torch.testing.assert_close(found, expected, check_dtype=False)
    (gradient,) = torch.autograd.grad(found[:, 0].sum(), spread)
    assert float(gradient) == pytest.approx(-4.0)


# Parameters of modules


class Net(PyroModule):
    """θ in every form: a parameter, modules of Pyro and of torch, a constrained parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.inner = PyroModule[nn.Linear](2, 1)
        self.plain = nn.Linear(2, 1)
        self.spread = PyroParam(torch.tensor(2.0), constraint=constraints.positive)

    def forward(self, x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            phi = pyro.sample("phi", dist.Normal(self.weight, 1.0))
            with pyro.plate("point", x.shape[1], dim=-1):
                location = phi + (self.inner(x) + self.plain(x))[..., 0]
                return pyro.sample("y", dist.Normal(location, self.spread), obs=y)


NAMES = {
    "weight",
    "inner.weight",
    "inner.bias",
    "plain.weight",
    "plain.bias",
    "spread_unconstrained",
}


def net_by_hand(theta, phi):
    location = phi[TASK, 0]
    for name in ("inner", "plain"):
        location = location + (X @ theta[f"{name}.weight"].T + theta[f"{name}.bias"])[:, 0]
    spread = theta["spread_unconstrained"].exp()
    cells = torch.distributions.Normal(location, spread).log_prob(Y)
    likelihood = torch.zeros(4, dtype=torch.float64).index_add(0, torch.tensor(TASK), cells)
    return likelihood, torch.distributions.Normal(theta["weight"], 1.0).log_prob(phi[:, 0])


def net_problem(seed: int = 0):
    torch.manual_seed(seed)
    tasks = data()
    problem = Problem(Net(), tasks)
    return problem, problem.batch(tasks)


def test_parameters_of_modules_are_those_that_are_passed():
    problem, batch = net_problem()
    start = problem.theta(batch)
    assert set(start) == NAMES
    phi = torch.randn(4, 1, dtype=torch.float64)
    seen = {}
    for changed in ["", *sorted(NAMES)]:
        theta = {name: value + (name == changed) for name, value in start.items()}
        found = problem.terms(theta, phi, batch)
        for one, by_hand in zip(found[:2], net_by_hand(theta, phi), strict=True):
            torch.testing.assert_close(one, by_hand, rtol=1e-12, atol=1e-12)
        seen[changed] = float(sum(term.sum() for term in found))
    assert all(seen[name] != seen[""] for name in NAMES)


def test_parameters_of_modules_have_gradients_also_when_traced_and_mapped():
    problem, batch = net_problem()
    theta, phi = problem.theta(batch), torch.randn(4, 1, dtype=torch.float64)

    def found(theta, phi):
        return sum(term.sum() for term in problem.terms(theta, phi, batch))

    def by_hand(theta, phi):
        return sum(term.sum() for term in net_by_hand(theta, phi))

    expected = torch.func.grad(by_hand)(theta, phi)
    gradient = torch.func.grad(found)
    torch.testing.assert_close(gradient(theta, phi), expected)
    torch.testing.assert_close(make_fx(gradient)(theta, phi)(theta, phi), expected)
    many = {name: torch.stack([value, value + 0.1]) for name, value in theta.items()}
    mapped = torch.vmap(found, in_dims=(0, None))(many, phi)
    torch.testing.assert_close(mapped, torch.vmap(by_hand, in_dims=(0, None))(many, phi))


def test_the_persons_module_is_left_as_it_was():
    torch.manual_seed(0)
    module = Net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    problem = Problem(module, data())
    batch = problem.batch(data())
    theta = {name: value + 1 for name, value in problem.theta(batch).items()}
    problem.terms(theta, torch.zeros(4, 1, dtype=torch.float64), batch)
    after = module.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {value.dtype for value in after.values()} == {torch.float32}


def test_samples_of_modules_are_global_sites():
    class Bayesian(PyroModule):
        def __init__(self):
            super().__init__()
            self.inner = PyroModule[nn.Linear](2, 1)
            self.inner.weight = PyroSample(
                lambda self: dist.Normal(0.0, 2.0).expand([1, 2]).to_event(2)
            )

        def forward(self, x, y=None):
            location = self.inner(x)[..., 0]
            with pyro.plate("task", x.shape[0], dim=-2):
                phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
                with pyro.plate("point", x.shape[1], dim=-1):
                    return pyro.sample("y", dist.Normal(phi + location, 1.0), obs=y)

    torch.manual_seed(0)
    problem = Problem(Bayesian(), data())
    batch = problem.batch(data())
    theta = problem.theta(batch)
    assert {name: tuple(value.shape) for name, value in theta.items()} == {
        "inner.bias": (1,),
        "inner.weight": (1, 2),
    }
    theta["inner.weight"] = torch.tensor([[0.4, -1.0]], dtype=torch.float64)
    likelihood, _, shared = problem.terms(theta, torch.zeros(4, 1).double(), batch)
    location = (X @ theta["inner.weight"].T + theta["inner.bias"])[:, 0]
    cells = stats.norm.logpdf(Y, location, 1.0)
    np.testing.assert_allclose(likelihood, np.bincount(TASK, cells, 4), rtol=1e-12)
    assert float(shared) == pytest.approx(stats.norm.logpdf([0.4, -1.0], 0.0, 2.0).sum())


def test_parameters_without_gradient_stay():
    torch.manual_seed(0)
    module = Net()
    module.plain.requires_grad_(False)
    problem = Problem(module, data())
    batch = problem.batch(data())
    theta = problem.theta(batch)
    assert set(theta) == NAMES - {"plain.weight", "plain.bias"}
    phi = torch.zeros(4, 1, dtype=torch.float64)
    frozen = {f"plain.{name}": value.double() for name, value in module.plain.named_parameters()}
    likelihood, _ = net_by_hand(theta | frozen, phi)
    torch.testing.assert_close(problem.log_likelihood(theta, phi, batch), likelihood)
    assert not any(value.requires_grad for value in module.plain.parameters())
    assert set(problem.theta(batch)) == set(theta)


# Nothing global


def test_no_global_state_is_touched(untouched):
    pyro.clear_param_store()
    pyro.param("mine", torch.tensor(1.5))
    try:
        with untouched():
            problem, batch = problem_without_seeding()
            theta = problem.theta(batch)
            problem.terms(theta, torch.zeros(4, 1, dtype=torch.float64), batch)
            problem.response(theta, torch.zeros(4, 1, dtype=torch.float64), batch)
    finally:
        pyro.clear_param_store()


def problem_without_seeding():
    with torch.random.fork_rng(devices=[]):
        module = Net()
    problem = Problem(module, data())
    return problem, problem.batch(data())


@pytest.mark.parametrize("validate", [True, False])
def test_isolation_ends_with_an_error(untouched, validate):
    def fail():
        pyro.param("other", torch.tensor(1.0))
        raise KeyError

    with (
        untouched(),
        pytest.raises(KeyError),
        isolated(torch.zeros(1, dtype=torch.float64), validate=validate),
    ):
        fail()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_in_a_program_take_the_dtype_of_the_data(dtype):
    tasks = data(dtype)
    problem = Problem(global_program(lambda: dist.HalfNormal(0.1)), tasks)
    batch = problem.batch(tasks)
    theta = problem.theta(batch)
    terms = problem.terms(theta, problem.location(theta, batch), batch)
    assert {theta["theta"].dtype, *(term.dtype for term in terms)} == {dtype}
    scale = torch.tensor(0.1, dtype=dtype).log()
    assert torch.equal(theta["theta"], scale)


# Shapes


def test_vectors_and_sites_are_inverse_to_each_other():
    def program(x, y=None):
        spread = pyro.sample("spread", dist.HalfNormal(1.0).expand([2]).to_event(1))
        pyro.sample("noise", dist.HalfNormal(1.0))
        with pyro.plate("task", x.shape[0], dim=-2):
            weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
            phi = pyro.sample("phi", dist.Normal(torch.zeros(2), spread).to_event(1))
            with pyro.plate("point", x.shape[1], dim=-1):
                location = weights[..., 0] + (phi * x).sum(-1)
                pyro.sample("y", dist.Normal(location, 1.0), obs=y)

    sites = Problem(program, data()).sites
    assert (sites.phi_size, sites.theta_size) == (4, 3)
    for lead in [(4,), (5, 4)]:
        vector = torch.randn(*lead, 4)
        phi = sites.from_vector(vector)
        assert phi["weights"].shape == (*lead, 2)
        assert torch.equal(sites.to_vector(phi), vector)
    for lead in [(), (5,)]:
        vector = torch.randn(*lead, 3)
        theta = sites.theta_from_vector(vector)
        assert (theta["spread"].shape, theta["noise"].shape) == ((*lead, 2), lead)
        assert torch.equal(sites.theta_to_vector(theta), vector)
    table = sites.describe().splitlines()
    assert table[0].split() == ["site", "level", "family", "shape"]
    assert [row.split()[0] for row in table[1:]] == ["spread", "noise", "weights", "phi", "y"]


def test_batches_are_trees_of_tensors():
    tasks = data()
    for layout in ("nested", "flat"):
        batch = Batch.of(tasks, layout)
        doubled = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t + t, batch)
        assert (doubled.n_tasks, doubled.layout) == (4, layout)
        assert torch.equal(doubled.x, 2 * batch.x)
        without_y = Batch.of(Tasks.from_flat(X, None, TASK, 4), layout)
        assert torch.utils._pytree.tree_map(lambda leaf: leaf, without_y).y is None


def test_values_are_constrained_and_per_task():
    def program(x, y=None):
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        pyro.deterministic("variance", spread**2)
        with pyro.plate("task", x.shape[0], dim=-2):
            phi = pyro.sample("phi", dist.Gamma(torch.ones(2), 1.0).to_event(1))
            pyro.deterministic("share", phi / phi.sum(-1, keepdim=True), event_dim=1)
            with pyro.plate("point", x.shape[1], dim=-1):
                pyro.sample("y", dist.Normal(phi.sum(-1), spread), obs=y)

    tasks = data()
    problem = Problem(program, tasks)
    assert [site.name for site in problem.sites.deterministic_global] == ["variance"]
    assert [site.shape for site in problem.sites.deterministic_local] == [(2,)]
    theta = {"spread": torch.tensor(0.5, dtype=torch.float64)}
    u = torch.randn(4, 2, dtype=torch.float64)
    values = problem.values(theta, u, problem.batch(tasks))
    torch.testing.assert_close(values["phi"], u.exp())
    torch.testing.assert_close(values["share"], u.softmax(-1))
    torch.testing.assert_close(values["variance"], torch.tensor(1.0, dtype=torch.float64).exp())


def test_numbers_of_a_program_follow_the_device_of_x(untouched):
    with untouched():
        with isolated(torch.zeros(1, dtype=torch.float64, device="meta")):
            written = dist.Normal(0.0, 0.1).loc
        assert (written.device.type, written.dtype) == ("meta", torch.float64)
        assert torch.zeros(1).device.type == "cpu"
