"""The gradient lens held against dense algebra: gradients, biases, fixed points, moments."""

import itertools
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from hbmeta import models
from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.inference import ANIL, FOMAML, MAML, CompletePooling, MetaSGD, Reptile, step_sizes
from hbmeta.inference.gradient_descent import descend, one_step
from hbmeta.inference.inner_optimizers import Adam, Descent, Momentum
from hbmeta.problem import Problem
from hbmeta.program import Functional
from hbmeta.tasks import Episode, LinearTasks, Sinusoids, Tasks
from hbmeta.theory import implied_precision, residual
from hbmeta.training import Options, mean_over_queries

# Fits of a few steps end far from the modes of their tasks, which is not what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:.*near the mode of log p")

DOUBLE = torch.float64
LINES = LinearTasks([1.0, -0.5], [[0.3, 0.1], [0.1, 0.3]], noise=0.3, shots=4, queries=6)


# T1 as a program: rows with x = 0 carry the support's loss, rows with x = 1 the query's.


class Valley(PyroModule):
    """L^S = ½x² + x²y + 3/2 y² and L^Q = ½ ‖φ − (1, −1)‖², as factors."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.tensor([0.5, -0.3], dtype=DOUBLE))

    def forward(self, x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            phi = pyro.sample("phi", dist.Normal(self.start, 1.0).to_event(1))
            with pyro.plate("point", x.shape[1], dim=-1):
                a, b = phi[..., 0], phi[..., 1]
                support = 0.5 * a**2 + a**2 * b + 1.5 * b**2
                query = 0.5 * ((a - 1) ** 2 + (b + 1) ** 2)
                pyro.factor("loss", -torch.where(x[..., 0] > 0.5, query, support))
                return pyro.sample("y", dist.Normal(0.0, 1.0).expand(x.shape[:2]), obs=y)


def valley() -> Episode:
    zero, one = torch.zeros(2, 1, 1, dtype=DOUBLE), torch.ones(2, 1, 1, dtype=DOUBLE)
    return Episode(Tasks(zero, zero[..., 0]), Tasks(one, zero[..., 0]))


FIRST_ORDER = {  # steps: gradient, first-order gradient, ‖bias‖, bound
    1: ((-0.5757, 0.5875), (-0.52, 0.765), 0.186034, 0.308961),
    3: ((-0.66981503, 0.4222294233), (-0.5738463635, 0.8480595206), 0.436510, 1.406921),
    5: ((-0.690601059, 0.3253343255), (-0.6332864899, 0.8971163857), 0.574647, 3.541144),
}


def untrained(strategy, program, data):
    """A fit that leaves θ where it starts."""
    return strategy.fit(
        program, data, steps=1, learning_rate=0.0, theta_learning_rate=0.0, compile=False
    )


@pytest.mark.parametrize("steps", FIRST_ORDER)
def test_first_order_bias(steps):
    gradient, first, norm, bound = FIRST_ORDER[steps]
    fitted = untrained(FOMAML(steps=steps, step_size=0.1), Valley(), valley())
    found = FOMAML.bias(fitted, valley())
    for task in range(2):
        np.testing.assert_allclose(found.gradient[task], gradient, atol=5e-9)
        np.testing.assert_allclose(found.first_order[task], first, atol=5e-9)
    np.testing.assert_allclose(found.bias.norm(dim=-1), norm, atol=1e-6)
    np.testing.assert_allclose(found.bound, bound, atol=1e-5 if steps > 1 else 1e-6)
    assert (found.bias.norm(dim=-1) <= found.bound).all()
    # The largest curvature of the path to N = 5 is that of its start.
    np.testing.assert_allclose(found.curvature, 3.340122, atol=1e-6)
    assert (found.relative > 0.1).all()
    assert (found.cosine < 1).all()


def test_bias_is_the_product_of_dense_matrices():
    """(A_0 ⋯ A_{N−1} − I) ∇L^Q(φ_N), with Hessians of one task at a time."""
    episode = Sinusoids(shots=4, queries=3, dtype=DOUBLE).sample(2, seed=0)
    fitted = untrained(MAML(steps=3, step_size=0.1), models.NeuralRegression(hidden=(3,)), episode)
    found = FOMAML.bias(fitted, episode)
    problem = fitted.problem
    support, query = problem.batch(episode.support), problem.batch(episode.query)
    phi, product, size = problem.location(fitted.theta, support), None, problem.sites.phi_size
    for task in range(2):

        def loss(one, batch, task=task, phi=phi):
            whole = torch.cat([phi[:task], one[None], phi[task + 1 :]])
            return -problem.log_likelihood(fitted.theta, whole, batch)[task] / batch.counts[task]

        point, product = phi[task], torch.eye(size, dtype=DOUBLE)
        for _ in range(3):
            hessian = torch.autograd.functional.hessian(lambda p: loss(p, support), point)
            product = product @ (torch.eye(size, dtype=DOUBLE) - 0.1 * hessian)
            point = point - 0.1 * torch.func.grad(lambda p: loss(p, support))(point)
        at_end = torch.func.grad(lambda p: loss(p, query))(point)
        torch.testing.assert_close(found.bias[task], product @ at_end - at_end)
        torch.testing.assert_close(found.gradient[task], product @ at_end)


def test_bias_needs_an_inner_loop():
    program = models.LinearRegression(noise=1.0)
    fitted = CompletePooling().fit(program, LINES.sample(3, seed=0), compile=False)
    with pytest.raises(UnsupportedModelError, match="inner loop"):
        FOMAML.bias(fitted, LINES.sample(3, seed=0))


# The chain of recomputed steps against the whole graph, for everything that can be learned.

LOOPS = [
    MAML(steps=4),
    MAML(steps=3, optimizer="momentum"),
    MAML(steps=3, optimizer="adam"),
    MAML(steps=3, batches=2, reduction="sum", step_size=1e-3),
    MAML(steps=3, learned_step="scalar"),
    MAML(steps=3, learned_step="site", per_step=True),
    MetaSGD(steps=3),
    MetaSGD(steps=2, optimizer="momentum", per_step=True),
    ANIL(steps=3),
    ANIL(steps=3, learned_step="parameter"),
    MAML(steps=2, sites=("layer1", "layer2.bias")),
    FOMAML(steps=3),
    FOMAML(steps=3, learned_step="parameter"),
    Reptile(steps=3),
    Reptile(steps=4, batches=2, optimizer="adam"),
    Reptile(steps=3, sites=("layer2",)),
]


def whole_gradient(strategy, problem, theta, own, support, query):
    """Loss and gradient of the whole graph by autograd."""
    theta = {k: v.clone().requires_grad_() for k, v in theta.items()}
    parameters = {} if own is None else {
        k: v.detach().clone().requires_grad_() for k, v in own.named_parameters()
    }  # fmt: skip
    bound = None if own is None else Functional(own, parameters)
    loss = mean_over_queries(strategy.loss(problem, theta, bound, support, query, {}), query)
    leaves = {f"theta/{k}": v for k, v in theta.items()}
    leaves |= {f"own/{k}": v for k, v in parameters.items()}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return loss.detach(), {k: g for k, g in zip(leaves, found, strict=True) if g is not None}


@pytest.mark.parametrize(
    ("strategy", "tier"),
    [(s, "eager") for s in LOOPS] + [(LOOPS[i], "graph") for i in (3, 5, 9, 12, 14)],
    ids=lambda value: value if isinstance(value, str) else f"{value.name}{LOOPS.index(value)}",
)
def test_recomputed_steps_give_the_gradient_of_the_whole_graph(strategy, tier):
    episode = Sinusoids(shots=6, queries=4, dtype=DOUBLE).sample(3, seed=0)
    # The noise is a θ that both losses hold besides φ.
    model = models.NeuralRegression(hidden=(4, 4), noise=None).bind(episode.all)
    problem = Problem(model, episode.all)
    support, query = problem.batch(episode.support), problem.batch(episode.query)
    if strategy.needs == "subset":
        query = support.beside(query)
    generator = torch.Generator().manual_seed(1)
    theta = {
        k: v + 0.1 * torch.randn(v.shape, generator=generator, dtype=DOUBLE)
        for k, v in problem.theta(support).items()
    }
    own = strategy.parameters(problem, episode.all, 0)
    expected, gradient = whole_gradient(strategy, problem, theta, own, support, query)
    pieces = replace(strategy, recompute=True).meta_gradient(
        problem, own, Options(steps=10, tier=tier)
    )
    parameters = {} if own is None else {k: v.detach() for k, v in own.named_parameters()}
    for _ in range(2):
        loss, found = pieces(theta, parameters, support, query, {})
    torch.testing.assert_close(loss, expected)
    assert found.keys() == gradient.keys()
    for name, value in gradient.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    assert pieces.tier == tier
    assert "theta/noise" in found


@pytest.mark.parametrize("strategy", [MAML(steps=3), Reptile(steps=2), MetaSGD(steps=2)])
def test_recomputed_fits_are_those_of_the_whole_graph(strategy):
    data = Sinusoids(dtype=DOUBLE)
    program = models.NeuralRegression(hidden=(4,))
    fits = [
        replace(strategy, recompute=recompute).fit(program, data, steps=5, compile=False)
        for recompute in (False, True)
    ]
    for name, value in fits[0].theta.items():
        torch.testing.assert_close(fits[1].theta[name], value, rtol=1e-9, atol=1e-12)
    assert "recomputed" in fits[1].info
    assert "recomputed" not in fits[0].info


def test_long_loops_are_recomputed():
    episode = Sinusoids(dtype=DOUBLE).sample(2, seed=0)
    problem = Problem(models.NeuralRegression(hidden=(2,)).bind(episode.all), episode.all)
    for steps, expected in ((9, False), (10, True)):
        found = MAML(steps=steps).meta_gradient(problem, None, Options())
        assert (found is not None) == expected


# Reptile.

CURVATURE = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=DOUBLE)
CENTRE = torch.tensor([1.0, -1.0], dtype=DOUBLE)
ORIGIN = torch.tensor([0.3, 0.2], dtype=DOUBLE)


def quadratic(phi, curvature=CURVATURE, centre=CENTRE):
    difference = phi - centre
    return 0.5 * ((difference @ curvature) * difference).sum(-1)


def test_reptile_vector():
    """T3."""
    end = descend(quadratic, ORIGIN[None], step_size=0.01, steps=5)[0].detach()
    np.testing.assert_allclose(end, (0.338846035, 0.1579513153), atol=1e-10)
    travel = (ORIGIN - end) / 0.05
    np.testing.assert_allclose(travel, (-0.7769206997, 0.8409736933), atol=1e-9)


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_coefficient_of_the_gradient_norm_is_a_quarter(steps):
    """Regression of ∇L − (φ_0 − φ_N)/(αN) on α: its slope is (N−1)/4 ∇‖∇L‖², not (N−1)/2."""
    gradient = CURVATURE @ (ORIGIN - CENTRE)
    of_norm = 2 * CURVATURE @ gradient
    sizes = np.array([1e-4, 2e-4, 4e-4])
    slopes = []
    for size in sizes:
        end = descend(quadratic, ORIGIN[None], step_size=size, steps=steps)[0].detach()
        short = gradient - (ORIGIN - end) / (size * steps)
        slopes.append(float(short @ of_norm / (of_norm @ of_norm)) / size)
    coefficient = np.polyfit(sizes, slopes, 1)[1]
    assert coefficient == pytest.approx((steps - 1) / 4, rel=1e-6)
    if steps == 2:
        # Two steps on a quadratic: no higher terms.
        assert slopes[-1] == pytest.approx(0.25, rel=1e-8)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_moments_of_the_three_gradients(k):
    """Over all orders of k minibatches of a task: −2(k−1), −(k−1) and −k(k−1)/2 AvgGradInner."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(k, 3, 3, generator=generator, dtype=DOUBLE)
    curvature = root @ root.mT + torch.eye(3, dtype=DOUBLE)
    centre = torch.randn(k, 3, generator=generator, dtype=DOUBLE)
    start = torch.randn(3, generator=generator, dtype=DOUBLE)
    gradient = torch.stack([curvature[i] @ (start - centre[i]) for i in range(k)])
    average = gradient.mean(0)
    pairs = [(i, j) for i in range(k) for j in range(k) if i != j]
    inner = torch.stack([curvature[j] @ gradient[i] for i, j in pairs]).mean(0)

    def moments(size):
        found = {"maml": [], "fomaml": [], "reptile": []}
        for order in itertools.permutations(range(k)):
            for name, first_order in (("maml", False), ("fomaml", True)):
                phi = start[None].clone().requires_grad_()
                state = [[phi]]
                for number, batch in enumerate(order[:-1]):

                    def loss(values, batch=batch):
                        return quadratic(values[0], curvature[batch], centre[batch])

                    state = one_step(
                        loss, state, [size], number, optimizer=Descent(), first_order=first_order
                    )
                last = quadratic(state[0][0], curvature[order[-1]], centre[order[-1]]).sum()
                found[name].append(torch.autograd.grad(last, phi)[0][0])
            point = start.clone()
            for batch in order:
                point = point - size * curvature[batch] @ (point - centre[batch])
            found["reptile"].append((start - point) / size)
        return {name: torch.stack(values).mean(0) for name, values in found.items()}

    expected = {
        "maml": (1, -2 * (k - 1)),
        "fomaml": (1, -(k - 1)),
        "reptile": (k, -k * (k - 1) / 2),
    }
    sizes = np.array([1e-5, 2e-5, 4e-5])
    slopes = {name: [] for name in expected}
    for size in sizes:
        found = moments(float(size))
        for name, (constant, _) in expected.items():
            rest = found[name] - constant * average
            slopes[name].append(float(rest @ inner / (inner @ inner)) / size)
    for name, (_, coefficient) in expected.items():
        assert np.polyfit(sizes, slopes[name], 1)[1] == pytest.approx(coefficient, rel=1e-4)


def test_minibatches_are_dealt_in_turn():
    """Reptile(batches=2) is two steps on rows 0, 2, … and two on 1, 3, …, in turn."""
    x = torch.ones(1, 4, 1, dtype=DOUBLE)
    y = torch.tensor([[1.0, 5.0, 3.0, 7.0]], dtype=DOUBLE)
    problem = Problem(Mean(), Tasks(x, y))
    batch = problem.batch(Tasks(x, y))
    strategy = Reptile(steps=3, step_size=0.1, batches=2)
    end = strategy.posterior(problem, {"start": torch.zeros(1, dtype=DOUBLE)}, None, batch).loc
    phi = 0.0
    for centre in (2.0, 6.0, 2.0):
        phi = phi - 0.1 * (phi - centre)
    assert float(end.detach()) == pytest.approx(phi, rel=1e-12)


# Family Q2: curvatures 1 and 4 with minima 0 and 1.


class Mean(PyroModule):
    """φ ~ N(start, 1), y ~ N(x φ, 1)."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.zeros(1, dtype=DOUBLE))

    def forward(self, x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            phi = pyro.sample("phi", dist.Normal(self.start[0], 1.0))
            with pyro.plate("point", x.shape[1], dim=-1):
                return pyro.sample("y", dist.Normal(x[..., 0] * phi, 1.0), obs=y)


def two_curvatures() -> Episode:
    x = torch.tensor([[[1.0]], [[2.0]]], dtype=DOUBLE)
    y = torch.tensor([[0.0], [2.0]], dtype=DOUBLE)
    return Episode(Tasks(x, y), Tasks(x.clone(), y.clone()))


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (MAML(steps=1, step_size=0.1), 0.64),
        (FOMAML(steps=1, step_size=0.1), 0.7272727273),
        (Reptile(steps=5, step_size=0.1), 0.6925023465),
        (MAML(steps=0), 0.8),
    ],
)
def test_training_ends_at_the_fixed_point_of_its_gradient(strategy, expected):
    fitted = strategy.fit(
        Mean(), two_curvatures(), steps=600, learning_rate=0.05, compile="graph", progress=False
    )
    assert float(fitted.theta["start"]) == pytest.approx(expected, abs=2e-6)


def test_reptile_trains_what_tasks_share():
    """The noise is no location of a task's parameter: it follows the loss at φ_N."""
    data = LINES.sample(20, seed=0).all
    model = models.LinearRegression(noise=None)
    with pytest.warns(UserWarning, match="does not depend on scale"):
        fitted = Reptile(steps=20, step_size=0.05).fit(
            model, data, steps=300, theta_learning_rate=0.1, compile="graph", progress=False
        )
    assert float(fitted.globals()["noise"]) == pytest.approx(0.3, rel=0.35)
    assert "noise" not in fitted.info["untouched"]


# Inner optimizers and what they imply.


@pytest.mark.parametrize("steps", [1, 4])
def test_momentum_is_the_map_estimate_under_its_implied_prior(steps):
    curvature, centre, start, size, decay = 2.0, 3.0, -1.0, 0.05, 0.6

    def loss(phi):
        return 0.5 * curvature * (phi[..., 0] - centre) ** 2

    phi = torch.tensor([[start]], dtype=DOUBLE)
    end = descend(loss, phi, step_size=size, steps=steps, optimizer=Momentum(decay)).detach()
    left = residual(curvature, size, steps, momentum=decay)
    assert float(end) == pytest.approx(centre + left * (start - centre), rel=1e-12)
    prior = implied_precision(curvature, left)
    assert prior.is_prior
    mode = (curvature * centre + prior.precision * start) / (curvature + prior.precision)
    assert float(end) == pytest.approx(mode, rel=1e-12)


def test_adam_leaves_no_fixed_share_of_the_distance():
    """Two starts shrink by different factors, so that no prior gives both."""

    def loss(phi):
        return phi[..., 0] ** 2

    starts = torch.tensor([[1.0], [3.0]], dtype=DOUBLE)
    end = descend(loss, starts, step_size=0.1, steps=4, optimizer=Adam())
    shares = (end.detach() / starts).flatten()
    assert abs(float(shares[0] - shares[1])) > 0.2
    shares = (descend(loss, starts, step_size=0.1, steps=4).detach() / starts).flatten()
    assert float(shares[0]) == pytest.approx(float(shares[1]), rel=1e-12)


def test_adam_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, 2, generator=generator, dtype=DOUBLE)
    end = descend(quadratic, start, step_size=0.03, steps=7, optimizer=Adam())
    leaf = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=0.03)
    for _ in range(7):
        optimizer.zero_grad()
        quadratic(leaf).sum().backward()
        optimizer.step()
    torch.testing.assert_close(end.detach(), leaf.detach(), rtol=1e-7, atol=1e-9)


def test_gradients_through_adam_are_finite_where_a_gradient_is_zero():
    start = torch.zeros(1, 2, dtype=torch.float32, requires_grad=True)
    end = descend(
        lambda p: p[..., 0] ** 2 + 0 * p[..., 1], start, step_size=0.1, steps=3, optimizer=Adam()
    )
    (gradient,) = torch.autograd.grad(end.sum(), start)
    assert torch.isfinite(gradient).all()


# Learned steps, and which sites move.


@pytest.mark.parametrize("strategy", [MetaSGD(steps=2), FOMAML(steps=2, learned_step="parameter")])
def test_gradient_of_the_step_sizes(strategy):
    """By finite differences; the first-order one of a loop whose gradients are held."""
    episode = Sinusoids(shots=4, queries=4, dtype=DOUBLE).sample(2, seed=0)
    model = models.NeuralRegression(hidden=(3,), activation="tanh").bind(episode.all)
    problem = Problem(model, episode.all)
    support, query = problem.batch(episode.support), problem.batch(episode.query)
    theta, own = problem.theta(support), strategy.parameters(problem, episode.all, 0)
    _, gradient = whole_gradient(strategy, problem, theta, own, support, query)
    name = "own/sizes.0"
    step = 1e-6
    if strategy.first_order:
        # Held gradients: φ_2 = φ_0 − α s (g_0 + g_1), with g at the point where s = 1.
        site = strategy.moving(problem)[0]
        by_site = strategy.adapted(problem, theta, own, support)
        travel = {k: problem.location_by_site(theta, support)[k] - by_site[k] for k in by_site}
    losses = []
    for sign in (1, -1):
        moved = {k: v.detach().clone() for k, v in own.named_parameters()}
        moved["sizes.0"][0, 0] += sign * step
        if strategy.first_order:
            shifted = {k: v.detach().clone() for k, v in by_site.items()}
            shifted[site][:, 0, 0] -= sign * step * travel[site][:, 0, 0].detach()
            found = strategy.end(problem, theta, {}, shifted, support, query)
        else:
            found = strategy.loss(problem, theta, Functional(own, moved), support, query, {})
        losses.append(float(found.detach().mean()))
    expected = (losses[0] - losses[1]) / (2 * step)
    assert float(gradient[name][0, 0]) == pytest.approx(expected, rel=1e-5)


def test_meta_sgd_learns_the_scales_of_tasks():
    """Slopes differ between tasks and intercepts do not: the learned steps say which."""
    family = LinearTasks([0.0, 0.0], [[0.0025, 0.0], [0.0, 2.0]], noise=0.3, shots=4)
    with pytest.warns(UserWarning, match="does not depend on scale"):
        fitted = MetaSGD(step_size=0.1).fit(
            models.LinearRegression(noise=0.3), family, steps=600, learning_rate=0.01,
            compile="graph", progress=False,
        )  # fmt: skip
    sizes = torch.cat([v.flatten() for v in step_sizes(fitted).values()])
    assert sizes.shape == (2,)
    assert float(sizes[1]) > 3 * float(sizes[0])


def test_step_sizes_after_the_last_learned_step_are_the_last():
    episode = Sinusoids(dtype=DOUBLE).sample(2, seed=0)
    strategy = MAML(steps=2, learned_step="scalar", per_step=True)
    fitted = strategy.fit(models.NeuralRegression(hidden=(3,)), episode, steps=2, compile=False)
    own = fitted.own
    assert own(1)[0] is not None
    assert torch.equal(own(7)[0], own(1)[0])
    assert torch.equal(own(torch.tensor(7.0))[0], own(1)[0])
    longer = fitted.adapt(episode.support, steps=4)
    assert not torch.equal(longer.density.loc, fitted.adapt(episode.support).density.loc)


def test_only_the_head_moves():
    episode = Sinusoids(dtype=DOUBLE).sample(3, seed=0)
    fitted = ANIL(steps=3).fit(
        models.NeuralRegression(hidden=(4,)), episode, steps=2, compile=False
    )
    assert ANIL().moving(fitted.problem) == ("layer2.weight", "layer2.bias")
    phi = fitted.problem.sites.from_vector(fitted.adapt(episode.support).density.loc)
    for name, value in phi.items():
        same = bool((value == fitted.theta[f"mean.{name}"]).all()) if (
            f"mean.{name}" in fitted.theta
        ) else bool((value == value[:1]).all())  # fmt: skip
        assert same == name.startswith("layer1")


def test_reptile_trains_the_sites_that_stay():
    """They get the gradient of the loss at φ_N; the travel of the others is α N of theirs."""
    episode = Sinusoids(dtype=DOUBLE).sample(3, seed=0)
    strategy = Reptile(steps=2, step_size=0.05, sites=("layer2",))
    fitted = untrained(strategy, models.NeuralRegression(hidden=(4,)), episode)
    problem = fitted.problem
    rows = problem.batch(episode.all)
    theta = {k: v.detach().requires_grad_() for k, v in fitted.theta.items()}
    loss = strategy.loss(problem, theta, None, rows, rows, {}).sum()
    names = [n for n in theta if n.startswith("mean.")]
    found = dict(zip(names, torch.autograd.grad(loss, [theta[n] for n in names]), strict=True))
    ends = MAML(steps=2, step_size=0.05, sites=("layer2",)).adapted(
        problem, fitted.theta, None, rows
    )
    points = rows.counts
    for name in names:
        site = name.removeprefix("mean.")
        if site.startswith("layer2"):
            travel = (fitted.theta[name] - ends[site]).sum(0) / (2 * 0.05)
            torch.testing.assert_close(found[name], travel.reshape(found[name].shape))
            continue
        leaf = ends[site].detach().requires_grad_()
        value = -problem.log_likelihood(fitted.theta, {**ends, site: leaf}, rows) / points
        (direct,) = torch.autograd.grad(value.sum(), leaf)
        torch.testing.assert_close(found[name], direct.sum(0).reshape(found[name].shape))
        assert float(direct.abs().max()) > 0


def test_the_bound_of_some_sites_is_that_of_their_rows():
    episode = Sinusoids(shots=4, queries=3, dtype=DOUBLE).sample(2, seed=0)
    program = models.NeuralRegression(hidden=(3,), activation="tanh")
    for sites in (None, ("layer2",), ("layer1.bias",)):
        fitted = untrained(MAML(steps=3, step_size=0.1, sites=sites), program, episode)
        found = FOMAML.bias(fitted, episode)
        assert (found.bias.norm(dim=-1) <= found.bound).all()
        if sites is None:
            whole = found.curvature
        else:
            assert (found.curvature < whole).all()


def test_what_a_fit_learned_goes_into_theory():
    """`step_sizes` gives tensors: one number, or one per step."""
    episode = Sinusoids(dtype=DOUBLE).sample(3, seed=0)
    program = models.NeuralRegression(hidden=(4,))
    for strategy in (MAML(steps=3), MAML(steps=3, learned_step="scalar", per_step=True)):
        size = step_sizes(untrained(strategy, program, episode))["layer1.bias"]
        assert size.dtype == DOUBLE
        assert residual(2.0, size, 3) == pytest.approx((1 - 0.01 * 2.0) ** 3, rel=1e-12)


def test_adam_keeps_its_moments_in_single_precision():
    """In float16 the square of a gradient of 1e-4 is nothing, and ε² would be 61."""
    start = torch.zeros(2, 3, dtype=torch.float16)
    slope = torch.tensor([1.0, 1e-4, -1e-3], dtype=torch.float16)
    end = descend(lambda p: (p * slope).sum(-1), start, step_size=0.01, steps=1, optimizer=Adam())
    torch.testing.assert_close(end[0].detach(), -0.01 * slope.sign(), rtol=1e-2, atol=0.0)


def test_all_sites_are_maml():
    episode = Sinusoids(dtype=DOUBLE).sample(3, seed=0)
    program = models.NeuralRegression(hidden=(4,))
    fits = [
        strategy.fit(program, episode, steps=3, compile=False)
        for strategy in (MAML(steps=2), ANIL(steps=2, sites=("layer1", "layer2")))
    ]
    for name, value in fits[0].theta.items():
        torch.testing.assert_close(fits[1].theta[name], value)


def test_other_numbers_of_batches_in_the_flat_layout():
    """Ranks within tasks, whatever the layout."""
    tasks = replace(LINES, shots=(2, 5)).sample(4, seed=0).all
    model = models.LinearRegression(noise=0.3).bind(tasks)
    ends = []
    for layout in ("nested", "flat"):
        problem = Problem(model, tasks, layout=layout)
        batch = problem.batch(tasks)
        strategy = MAML(steps=3, batches=3)
        ends.append(strategy.posterior(problem, problem.theta(batch), None, batch).loc.detach())
    torch.testing.assert_close(ends[0], ends[1])


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: MAML(optimizer="sgd"), "'sgd'"),
        (lambda: MAML(learned_step="layer"), "'layer'"),
        (lambda: MAML(per_step=True), "per_step=True"),
        (lambda: MAML(momentum=1.0), "momentum=1.0"),
        (lambda: MAML(batches=0), "batches=0"),
        (lambda: Reptile(steps=0), "steps=0"),
        (lambda: Reptile(learned_step="scalar"), "learned_step='scalar'"),
        (lambda: FOMAML(step_size=-1.0), "step_size=-1.0"),
    ],
)
def test_settings_that_are_refused(make, found):
    with pytest.raises(DataError) as caught:
        make()
    assert found in str(caught.value)


def test_unknown_sites_are_refused():
    episode = Sinusoids(dtype=DOUBLE).sample(3, seed=0)
    for sites in (("layer9",), ("layer",), ()):
        with pytest.raises(UnsupportedModelError, match="site"):
            MAML(sites=sites).fit(
                models.NeuralRegression(hidden=(4,)), episode, steps=1, compile=False
            )
