"""ProtoNet against the dense formulas of conjugate class means, ExactLinear and NUTS."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from hbmeta import models
from hbmeta.densities import Gaussian
from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.inference import (
    MAML,
    NUTS,
    AmortizedGuide,
    CompletePooling,
    ExactLinear,
    NoPooling,
    ProtoNet,
)
from hbmeta.problem import Problem
from hbmeta.staging import Staged
from hbmeta.tasks import Clusters, Tasks
from tests import reference
from tests.cases import case

WAYS, PRIORS = 3, (0.5, 0.3, 0.2)
SHOTS = ((2, 2, 2), (5, 1, 2), (1, 4, 3))


def labelled(shots, *, seed=0, dtype=torch.int64, spread=0.8):
    """Tasks with so many points of each class around random means, in a shuffled order."""
    rng = np.random.default_rng(seed)
    x, y, task = [], [], []
    for i, counts in enumerate(shots):
        centres = 2 * rng.standard_normal((WAYS, 2))
        labels = rng.permutation(np.repeat(np.arange(WAYS), counts))
        x.append(centres[labels] + spread * rng.standard_normal((len(labels), 2)))
        y.append(labels)
        task.append(np.full(len(labels), i))
    y = torch.from_numpy(np.concatenate(y)).to(dtype)
    ids = [f"t{i}" for i in range(len(shots))]
    return Tasks.from_flat(np.concatenate(x), y, np.concatenate(task), len(shots), ids=ids)


SUPPORT = labelled(SHOTS)
QUERY = labelled(((3, 3, 3), (1, 2, 4), (2, 0, 1)), seed=1)


def fitted(model, strategy=None, tasks=SUPPORT, **settings):
    settings = {"steps": 1, "compile": False, "progress": False} | settings
    return (strategy or ProtoNet()).fit(model, tasks, **settings)


def dense(z, z_support, labels, *, variance=0.5, prior_scale=None, priors=None, plug_in):
    """(rows, WAYS) p(y | z, S), class by class."""
    logits = []
    for k in range(WAYS):
        mine = z_support[labels == k]
        precision = len(mine) / variance + (0.0 if prior_scale is None else prior_scale**-2)
        mean = mine.sum(0) / variance / precision
        spread = variance if plug_in else variance + 1 / precision
        logit = -0.5 * ((z - mean) ** 2).sum(1) / spread - 0.5 * z.shape[1] * math.log(spread)
        logits.append(logit + (0.0 if priors is None else math.log(priors[k])))
    logits = np.stack(logits, 1)
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def rows(tasks, i, embed=None):
    mine = tasks.task == i
    x = tasks.flat_x[mine] if embed is None else embed(tasks.flat_x[mine]).detach()
    return x.numpy(), tasks.flat_y[mine].numpy()


@pytest.mark.parametrize("y_dtype", [torch.int64, torch.float64])
@pytest.mark.parametrize("embedding", [None, (6, 3)])
@pytest.mark.parametrize("priors", [None, PRIORS])
@pytest.mark.parametrize("prior_scale", [None, 1.5])
@pytest.mark.parametrize("plug_in", [True, False])
def test_predictions_are_the_dense_formula(plug_in, prior_scale, priors, embedding, y_dtype):
    """To 1e-12 plugged in and to 1e-10 integrated out, for balanced and unbalanced shots."""
    support = labelled(SHOTS, dtype=y_dtype)
    model = models.ClassConditional(
        embedding, WAYS, prior_scale=prior_scale, probabilities=priors, seed=4
    )
    fit = fitted(model, ProtoNet(plug_in=plug_in), support)
    found = fit.adapt(support).predict(QUERY).probabilities
    embed = fit.problem.program.embed if embedding else None
    theta = fit.theta
    if embedding:

        def embed(x):
            weights = {n.removeprefix("network."): v for n, v in theta.items()}
            return torch.func.functional_call(fit.problem.program.network, weights, (x,))

    for i in range(len(SHOTS)):
        z, _ = rows(QUERY, i, embed)
        expected = dense(
            z, *rows(support, i, embed), prior_scale=prior_scale, priors=priors, plug_in=plug_in
        )
        tolerance = 1e-12 if plug_in else 1e-10
        np.testing.assert_allclose(found[i, : len(z)], expected, atol=tolerance)


def test_plug_in_is_softmax_of_minus_squared_distances():
    """The published rule to the letter, without any other formula in between."""
    found = fitted(models.ClassConditional(None, WAYS)).adapt(SUPPORT).predict(QUERY).probabilities
    for i in range(len(SHOTS)):
        x, y = (torch.from_numpy(v) for v in rows(SUPPORT, i))
        z, _ = rows(QUERY, i)
        prototypes = torch.stack([x[y == k].mean(0) for k in range(WAYS)])
        distances = torch.cdist(torch.from_numpy(z), prototypes).square()
        torch.testing.assert_close(found[i, : len(z)], (-distances).softmax(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("prior_scale", [None, 1.5])
def test_posterior_equals_exact_linear(prior_scale):
    model = models.ClassConditional(None, WAYS, prior_scale=prior_scale, probabilities=PRIORS)
    one = fitted(model, ProtoNet(plug_in=False)).adapt(SUPPORT)
    other = fitted(model, ExactLinear()).adapt(SUPPORT)
    torch.testing.assert_close(one.density.loc, other.density.loc, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.density.sd, other.density.sd, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        one.predict(QUERY).probabilities, other.predict(QUERY).probabilities, rtol=0, atol=1e-12
    )


@pytest.mark.slow
def test_nuts_on_the_same_program_agrees():
    """Means of φ within 5 Monte Carlo standard errors (1e-6 each of 12), of 800 draws."""
    model = models.ClassConditional(None, WAYS, prior_scale=1.5)
    tasks = SUPPORT[:2]
    exact = fitted(model, ProtoNet(plug_in=False), tasks).adapt(tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = NUTS(draws=400, warmup=200, chains=2).fit(
            model, tasks, compile="graph", progress=False
        )
    found = fit.posterior.density
    assert bool(((found.mean - exact.density.loc).abs() < 5 * exact.density.sd / 400**0.5).all())
    torch.testing.assert_close(found.sd, exact.density.sd, rtol=0.2, atol=0)
    # Points near the classes: draws of φ weigh by how well they explain a point.
    p, q = (posterior.predict(tasks).probabilities for posterior in (fit.posterior, exact))
    assert float((p - q).abs().max()) < 0.03


# A class without points

MISSING = labelled(((2, 2, 2), (3, 0, 2), (1, 4, 3)))


@pytest.mark.parametrize("plug_in", [True, False])
def test_a_class_without_points_under_a_flat_prior_names_the_task(plug_in):
    fit = fitted(models.ClassConditional(None, WAYS), ProtoNet(plug_in=plug_in))
    with pytest.raises(DataError, match="'t1'") as caught:
        fit.adapt(MISSING)
    assert "prior_scale" in caught.value.do
    nothing = SUPPORT.keep(torch.zeros(SUPPORT.n_points, dtype=torch.bool))
    with pytest.raises(DataError, match="'t0'"):
        fit.adapt(nothing)


@pytest.mark.parametrize("plug_in", [True, False])
def test_a_class_without_points_under_a_prior_is_at_its_mean(plug_in):
    model = models.ClassConditional(None, WAYS, prior_scale=1.5)
    posterior = fitted(model, ProtoNet(plug_in=plug_in)).adapt(MISSING)
    torch.testing.assert_close(
        posterior.density.loc[1, 2:4], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12
    )
    found = posterior.predict(QUERY).probabilities
    z, _ = rows(QUERY, 1)
    expected = dense(z, *rows(MISSING, 1), prior_scale=1.5, plug_in=plug_in)
    np.testing.assert_allclose(found[1, : len(z)], expected, atol=1e-10)
    if not plug_in:
        sd = posterior.density.sd[1, 2:4]
        torch.testing.assert_close(sd, torch.full_like(sd, 1.5))


# Training

NETWORK = models.ClassConditional((8, 2), WAYS, prior_scale=2.0, seed=1)


def both_losses(plug_in):
    """The problem, its θ and the loss (tasks,) as a function of θ."""
    problem = Problem(NETWORK.bind(SUPPORT), SUPPORT)
    support, query = problem.batch(SUPPORT), problem.batch(QUERY)
    strategy = ProtoNet(plug_in=plug_in)

    def loss(theta):
        return strategy.loss(problem, theta, None, support, query, {})

    return problem, problem.theta(support), loss


@pytest.mark.parametrize("plug_in", [True, False])
def test_loss_is_the_mean_negative_log_probability_of_the_query(plug_in):
    problem, theta, loss = both_losses(plug_in)
    found = loss(theta).detach()
    for i in range(len(SHOTS)):
        z, labels = rows(QUERY, i, problem.program.embed)
        p = dense(z, *rows(SUPPORT, i, problem.program.embed), prior_scale=2.0, plug_in=plug_in)
        expected = -np.log(p[np.arange(len(z)), labels]).mean()
        assert float(found[i]) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("plug_in", [True, False])
def test_gradient_of_the_loss_in_the_embedding(plug_in):
    """Central differences in double precision, of the first layer's weights."""
    _, theta, loss = both_losses(plug_in)
    name = next(n for n in theta if n.endswith("weight"))
    leaf = theta[name].clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(theta | {name: leaf}).sum(), leaf)

    def at(flat):
        with torch.no_grad():
            moved = torch.from_numpy(flat).reshape(theta[name].shape)
        return float(loss(theta | {name: moved}).sum().detach())

    expected = reference.finite_difference(at, theta[name].flatten().numpy())
    np.testing.assert_allclose(found.flatten(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("plug_in", [True, False])
def test_staged_loss_and_gradient_equal_the_eager_ones(plug_in):
    _, theta, loss = both_losses(plug_in)

    def value_and_gradient(values):
        with torch.enable_grad():
            leaves = {n: v.detach().requires_grad_() for n, v in values.items()}
            total = loss(leaves)
            return total, torch.autograd.grad(total.sum(), list(leaves.values()))

    graph = make_fx(value_and_gradient)({n: v.clone() for n, v in theta.items()})
    moved = {n: v + 0.1 for n, v in theta.items()}
    torch.testing.assert_close(graph(moved), value_and_gradient(moved), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("plug_in", [True, False])
def test_training_lowers_the_loss_of_new_tasks(plug_in):
    source = Clusters(ways=WAYS, shots=3, queries=5, noise=0.6, dtype=torch.float64)
    model = models.ClassConditional((16, 4), WAYS, prior_scale=1.0, seed=0)
    new = source.sample(40, seed=9)
    scores = []
    for steps in (1, 80):
        fit = ProtoNet(plug_in=plug_in).fit(
            model, source, steps=steps, learning_rate=1e-2, compile=False, progress=False
        )
        scores.append(float(fit.adapt(new.support).predict(new.query).log_prob(new.query.y).mean()))
    # Chance is −log 3 = −1.1; embeddings of the size that a start gives are near to it.
    assert scores[1] > scores[0] + 0.1
    assert fit.history[-1] < fit.history[0]


def test_training_does_not_shrink_the_embedding():
    """What a likelihood of the embedding would do: spread of f(x) after 60 steps is no smaller."""
    source = Clusters(ways=WAYS, shots=3, queries=5, dtype=torch.float64)
    x = source.sample(5, seed=1).support.flat_x
    spreads = []
    for steps in (1, 60):
        fit = ProtoNet().fit(
            models.ClassConditional((8, 2), WAYS), source, steps=steps, learning_rate=1e-2,
            compile=False, progress=False,
        )  # fmt: skip
        weights = {n.removeprefix("network."): v for n, v in fit.theta.items()}
        z = torch.func.functional_call(fit.problem.program.network, weights, (x,))
        spreads.append(float(z.std()))
    assert spreads[1] > spreads[0]


# Splits that miss a class, under a flat prior

FLAT = models.ClassConditional((8, 2), WAYS, seed=1)
GONE = labelled(((0, 0, 0), (3, 0, 2), (1, 4, 0)))
ASKED = labelled(((1, 1, 1), (2, 2, 2), (1, 0, 3)), seed=2)


def of_layout(plug_in, layout, support=GONE, query=ASKED):
    """θ and the loss of a layout under a flat prior."""
    problem = Problem(FLAT.bind(support), support, layout=layout)
    batches = problem.batch(support), problem.batch(query)
    strategy = ProtoNet(plug_in=plug_in)
    theta = problem.theta(batches[0])
    return problem, theta, lambda t: strategy.loss(problem, t, None, *batches, {})


def masked_loss(problem, plug_in, support, query):
    """Each task alone: classes without a support point, and their queries, taken away by hand."""
    out = []
    for i in range(query.n_tasks):
        (z, labels), (z_support, known) = (
            rows(part, i, problem.program.embed) for part in (query, support)
        )
        present = sorted(set(known.tolist()))
        logits = []
        for k in present:
            mine = z_support[known == k]
            spread = 0.5 if plug_in else 0.5 * (1 + 1 / len(mine))
            squares = ((z - mine.mean(0)) ** 2).sum(1)
            logits.append(-0.5 * squares / spread - math.log(spread))
        kept = np.isin(labels, present)
        if not kept.any():
            out.append(0.0)
            continue
        log_p = np.stack(logits, 1)
        log_p = log_p - np.log(np.exp(log_p).sum(1, keepdims=True))
        column = [present.index(k) for k in labels[kept]]
        out.append(-log_p[kept, column].mean())
    return out


@pytest.mark.parametrize("layout", ["nested", "flat"])
@pytest.mark.parametrize("plug_in", [True, False])
def test_a_class_that_a_split_misses_is_left_out_of_the_loss(plug_in, layout):
    problem, theta, loss = of_layout(plug_in, layout)
    expected = masked_loss(problem, plug_in, GONE, ASKED)
    np.testing.assert_allclose(loss(theta).detach(), expected, rtol=0, atol=1e-10)
    assert expected[0] == 0.0
    assert min(expected[1:]) > 0.0


@pytest.mark.parametrize("layout", ["nested", "flat"])
@pytest.mark.parametrize("plug_in", [True, False])
def test_a_traced_loss_masks_whatever_classes_a_split_misses(plug_in, layout):
    """Traced where no class is missing, run where some are: no branch was frozen; no NaN."""
    full = labelled(((2, 2, 2), (3, 1, 1), (1, 2, 2)), seed=3)
    problem, theta, _ = of_layout(plug_in, layout)
    strategy = ProtoNet(plug_in=plug_in)
    # The same rows, all weighed and then with some weights 0, which is what a random split changes.
    query = problem.batch(ASKED)
    batch = problem.batch(full)
    first = batch.y == 1

    def value_and_gradient(values, weight):
        with torch.enable_grad():
            leaves = {n: v.detach().requires_grad_() for n, v in values.items()}
            total = strategy.loss(problem, leaves, None, replace(batch, weight=weight), query, {})
            return total, torch.autograd.grad(total.sum(), list(leaves.values()))

    graph = Staged(value_and_gradient, tier="graph")
    graph(theta, batch.weight)
    without = torch.where(first, 0.0, batch.weight)
    for weight in (without, torch.zeros_like(without)):
        value, gradients = graph(theta, weight)
        expected, others = value_and_gradient(theta, weight)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
        for one, other in zip(gradients, others, strict=True):
            assert bool(torch.isfinite(one).all())
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert float(value.abs().max()) == 0.0
    known = full.keep(full.flat_y != 1)
    np.testing.assert_allclose(
        graph(theta, without)[0], masked_loss(problem, plug_in, known, ASKED), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("plug_in", [True, False])
def test_training_under_a_flat_prior_on_plain_tasks(plug_in):
    """Three points of each class, split at random: the loss falls and stays finite."""
    tasks = Clusters(ways=WAYS, shots=3, queries=1, dtype=torch.float64).sample(20, seed=4).support
    fit = ProtoNet(plug_in=plug_in).fit(
        models.ClassConditional((8, 2), WAYS), tasks, steps=60, learning_rate=1e-2,
        compile=False, progress=False,
    )  # fmt: skip
    assert all(math.isfinite(value) for value in fit.history)
    assert sum(fit.history[-10:]) < sum(fit.history[:10])


@pytest.mark.parametrize("plug_in", [True, False])
def test_a_proper_prior_masks_nothing(plug_in):
    """A class without points has its prior then, and enters every probability."""
    model = models.ClassConditional(None, WAYS, prior_scale=1.5)
    problem = Problem(model.bind(GONE), GONE)
    support, query = problem.batch(GONE), problem.batch(ASKED)
    found = ProtoNet(plug_in=plug_in).loss(problem, {}, None, support, query, {}).detach()
    for i in range(3):
        z, labels = rows(ASKED, i)
        p = dense(z, *rows(GONE, i), prior_scale=1.5, plug_in=plug_in)
        expected = -np.log(p[np.arange(len(z)), labels]).mean()
        assert float(found[i]) == pytest.approx(expected, abs=1e-10)


# What is refused


@pytest.mark.parametrize("name", ["linear_given_theta", "bernoulli", "gamma_poisson"])
def test_programs_without_an_embedding_are_refused(name):
    known = case(name)
    with pytest.raises(UnsupportedModelError, match="a joint model of label and embedding"):
        fitted(known.program, tasks=known.tasks)


def own_program(law, prior):
    """A program of one's own: z given the label, with this law around the class's φ."""

    def program(x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            phi = pyro.sample("phi", prior())
            with pyro.plate("point", x.shape[1], dim=-1):
                label = pyro.sample("y", dist.Categorical(torch.ones(WAYS)), obs=y)
                chosen = nn.functional.one_hot(label.long(), WAYS).to(x.dtype)
                mean = (chosen.unsqueeze(-2) @ phi).squeeze(-2)
                pyro.sample("z", law(mean, x), obs=x)

    return program


def normal():
    return dist.Normal(0.0, 1.5).expand([WAYS, 2]).to_event(2)


@pytest.mark.parametrize(
    ("law", "prior", "plug_in", "words"),
    [
        (lambda m, x: dist.Laplace(m, 1.0).to_event(1), normal, True, "quadratic in φ"),
        (
            lambda m, x: dist.Normal(m, 1.0).to_event(1),
            lambda: dist.Laplace(0.0, 1.0).expand([WAYS, 2]).to_event(2),
            True,
            "quadratic in φ",
        ),
        (
            lambda m, x: dist.MultivariateNormal(m, torch.tensor([[1.0, 0.5], [0.5, 2.0]])),
            normal,
            True,
            "diagonal curvature",
        ),
        (
            lambda m, x: dist.MultivariateNormal(m, torch.eye(2)),
            normal,
            False,
            "independent coordinates",
        ),
        (lambda m, x: dist.Normal(m * x, 1.0).to_event(1), normal, False, "y and φ alone"),
        (lambda m, x: dist.Normal(m, 1 + x**2).to_event(1), normal, False, "y and φ alone"),
    ],
    ids=["laplace", "laplace prior", "correlated", "matrix", "mean by x", "spread by x"],
)
def test_programs_of_other_laws_are_refused(law, prior, plug_in, words):
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        fitted(own_program(law, prior), ProtoNet(plug_in=plug_in))
    assert caught.value.do


def test_a_mean_that_x_scales_is_right_when_plugged_in():
    """Quadratic with a diagonal curvature, so the prototypes are exact; no closed integral."""
    program = own_program(lambda m, x: dist.Normal(m * x.abs(), 1.0).to_event(1), normal)
    density = fitted(program).adapt(SUPPORT).density
    x, y = rows(SUPPORT, 0)
    for k in range(WAYS):
        mine = x[y == k]
        expected = (np.abs(mine) * mine).sum(0) / (1.5**-2 + (mine**2).sum(0))
        np.testing.assert_allclose(density.loc[0].reshape(WAYS, 2)[k], expected, atol=1e-12)


@pytest.mark.parametrize(
    "strategy", [AmortizedGuide(), NoPooling(), CompletePooling(), ExactLinear()]
)
def test_a_likelihood_of_the_embedding_is_no_objective_for_it(strategy):
    model = models.ClassConditional((4, 2), WAYS, prior_scale=1.0)
    with pytest.raises(UnsupportedModelError, match="would shrink to nothing") as caught:
        fitted(model, strategy)
    assert "'embedding'" in caught.value.found
    assert "Use ProtoNet or MAML" in caught.value.do


def test_an_embedding_that_is_fixed_may_be_fitted_by_a_likelihood():
    own = nn.Linear(2, 2).double().requires_grad_(False)
    model = models.ClassConditional(own, WAYS, prior_scale=1.0)
    one, other = (
        fitted(model, strategy).adapt(SUPPORT).predict(QUERY).probabilities
        for strategy in (ExactLinear(), ProtoNet(plug_in=False))
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_maml_trains_an_embedding_by_its_query():
    model = models.ClassConditional((4, 2), WAYS, prior_scale=1.0)
    fit = fitted(model, MAML(steps=3, step_size=0.05), steps=3)
    found = fit.adapt(SUPPORT).predict(QUERY).probabilities
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))


def test_a_point_and_a_gaussian_are_what_is_returned(untouched):
    model = models.ClassConditional((4, 2), WAYS, prior_scale=1.0)
    with untouched():
        runs = [fitted(model, ProtoNet(plug_in=False), steps=3) for _ in range(2)]
        densities = [run.adapt(SUPPORT).density for run in runs]
    assert all(isinstance(density, Gaussian) for density in densities)
    assert torch.equal(densities[0].loc, densities[1].loc)
    point = runs[0].adapt(SUPPORT, plug_in=True).density
    assert torch.equal(point.loc, densities[0].loc)
