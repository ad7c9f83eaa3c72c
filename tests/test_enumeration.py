"""p(y | the rest, φ) by enumeration: by hand, in both layouts, and in the limit of many draws."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import special, stats
from torch import nn

from hbmeta.densities import Delta, Empirical, Gaussian
from hbmeta.enumeration import Classes, class_cells, integrated, is_linear_gaussian
from hbmeta.errors import UnsupportedModelError
from hbmeta.inference import MAML, ExactLinear, Quadrature
from hbmeta.posterior import TaskPosterior
from hbmeta.predictive import Predictive
from hbmeta.problem import Problem
from hbmeta.tasks import Tasks

PRIOR_OF_ONE = 0.3


def two_classes(x, y=None, *, task=None, n_tasks=None):
    """A yes/no label and two numbers around the mean of their class, in both layouts."""

    def draw(means):
        label = pyro.sample("label", dist.Bernoulli(PRIOR_OF_ONE).expand(x.shape[:-1]), obs=y)
        mean = torch.where(label.unsqueeze(-1) > 0, means[..., 2:], means[..., :2])
        pyro.sample("z", dist.Normal(mean, 0.8).to_event(1), obs=x)

    def prior():
        return dist.Normal(0.0, 1.5).expand([4]).to_event(1)

    if task is None:
        with pyro.plate("task", x.shape[0], dim=-2):
            means = pyro.sample("means", prior())
            with pyro.plate("point", x.shape[1], dim=-1):
                draw(means)
        return
    with pyro.plate("task", n_tasks, dim=-1):
        means = pyro.sample("means", prior())
    with pyro.plate("point", x.shape[0], dim=-1):
        draw(means[task])


def labelled(counts=(6, 3, 5), seed=0, dtype=torch.int64):
    rng = np.random.default_rng(seed)
    task = np.repeat(np.arange(len(counts)), counts)
    y = rng.permutation(np.arange(len(task)) % 2)
    x = (2 * y - 1)[:, None] * np.array([0.6, -0.4]) + 0.8 * rng.standard_normal((len(task), 2))
    ids = [f"t{i}" for i in range(len(counts))]
    return Tasks.from_flat(x, torch.from_numpy(y).to(dtype), task, len(counts), ids=ids)


SUPPORT, QUERY = labelled(), labelled((2, 4, 1), seed=1)


def rows(tasks, i):
    mine = tasks.task == i
    return tasks.flat_x[mine].numpy(), tasks.flat_y[mine].numpy()


def log_joint(z, means):
    """(rows, 2) log p(y = k, z | φ)."""
    logs = [
        stats.norm(means[2 * k : 2 * k + 2], 0.8).logpdf(z).sum(1)
        + math.log(PRIOR_OF_ONE if k else 1 - PRIOR_OF_ONE)
        for k in (0, 1)
    ]
    return np.stack(logs, 1)


def draws(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 4, generator=generator, dtype=torch.float64)


def posterior(density, *, layout=None, tasks=SUPPORT):
    return TaskPosterior(Problem(two_classes, tasks, layout=layout), {}, density, tasks)


@pytest.mark.parametrize("layout", ["nested", "flat"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_cells_are_the_joint_densities_of_every_class(layout, dtype):
    tasks = labelled(dtype=dtype)
    problem = Problem(two_classes, tasks, layout=layout)
    assert problem.classes == 2
    phi = draws(1)[0]
    batch = problem.batch(tasks)
    found = class_cells(problem, {}, phi, batch)
    found = found if batch.task is not None else found[batch.mask]
    expected = np.concatenate([log_joint(rows(tasks, i)[0], phi[i].numpy()) for i in range(3)])
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    log_predictive = problem.log_predictive({}, phi, batch, batch)
    for i in range(3):
        each = special.log_softmax(log_joint(rows(tasks, i)[0], phi[i].numpy()), 1)
        y = rows(tasks, i)[1].astype(int)
        assert float(log_predictive[i]) == pytest.approx(each[np.arange(len(y)), y].sum(), abs=1e-9)


@pytest.mark.parametrize("layout", ["nested", "flat"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_log_likelihood_by_row_is_what_a_point_predicts(layout, dtype):
    """With φ at a point: log p(y | z, φ), not the joint density of y and z."""
    tasks = labelled(dtype=dtype)
    point = posterior(Delta(draws(1)[0]), layout=layout, tasks=tasks)
    found, _ = point.log_likelihood()
    assert found.shape == (1, tasks.n_points)
    probabilities = point.predict(tasks).probabilities
    labels = tasks.flat_y.long().unsqueeze(-1)
    expected = tasks.unpad(probabilities).gather(-1, labels).log().squeeze(-1)
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("layout", ["nested", "flat"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_row_s_own_embedding_weighs_the_draws(weighted, layout):
    """Σ_s w_s p(k, z | φ_s) / Σ_s w_s p(z | φ_s), and all rows of a task together likewise."""
    phi = draws(7)
    log_w = draws(7, seed=5)[..., 0] if weighted else None
    of_draws = posterior(Empirical(phi, log_w), layout=layout)
    predictive = of_draws.predict(QUERY)
    found = predictive.probabilities
    # Given draws all labellings need no sum: rows are independent given φ_s.
    classes = Classes(of_draws.problem, of_draws.particles(), QUERY, SUPPORT)
    with_joint = Predictive(classes, QUERY, log_weights=log_w, row_log_weights=classes.log_evidence)
    torch.testing.assert_close(with_joint.probabilities, found)
    joint = with_joint.log_prob(QUERY.y, joint=True)
    for i in range(3):
        z, y = rows(QUERY, i)
        w = np.zeros(7) if log_w is None else log_w[:, i].numpy()
        each = np.stack([log_joint(z, phi[s, i].numpy()) for s in range(7)])
        expected = special.softmax(special.logsumexp(w[:, None, None] + each, axis=0), 1)
        np.testing.assert_allclose(found[i, : len(z)], expected, rtol=1e-9)
        labels = special.logsumexp(w + each[:, np.arange(len(y)), y].sum(1))
        without = special.logsumexp(w + special.logsumexp(each, axis=2).sum(1))
        assert float(joint[i]) == pytest.approx(labels - without, abs=1e-9)


def test_many_draws_of_the_exact_posterior_converge_to_the_closed_form():
    """40,000 draws, self-normalised weights: within 5 of their standard errors, 1e-6 per row.

    p̂ = Σ w_s p_s / Σ w_s has the error √(Σ w_s² (p_s − p)²) / Σ w_s (the delta method).
    """
    exact = ExactLinear().fit(two_classes, SUPPORT, compile=False).adapt(SUPPORT)
    closed = exact.predict(QUERY).probabilities[..., 1]
    assert exact.predict(QUERY).n_draws == 1
    noise = torch.randn(
        40_000, 3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    phi = exact.density.draw(noise)
    found = posterior(Empirical(phi)).predict(QUERY, draws=40_000).probabilities[..., 1]
    for i in range(3):
        z, _ = rows(QUERY, i)
        each = np.stack([_fast_log_joint(z, phi[:, i].numpy(), k) for k in (0, 1)], -1)
        w = np.exp(special.logsumexp(each, axis=2))
        p = np.exp(each[..., 1]) / w
        at = closed[i, : len(z)].numpy()
        error = np.sqrt((w**2 * (p - at) ** 2).sum(0)) / w.sum(0)
        assert (np.abs(found[i, : len(z)].numpy() - at) < 5 * error).all()
        # Draws that all weigh the same would be plainly wrong somewhere.
        assert (error < 0.01).all()
        plain = np.abs(p.mean(0) - at) / error
        if i == 1:
            assert plain.max() > 5


def _fast_log_joint(z, means, k):
    """(draws, rows) log p(y = k, z | φ) for means (draws, 4)."""
    at = means[:, None, 2 * k : 2 * k + 2]
    log_prior = math.log(PRIOR_OF_ONE if k else 1 - PRIOR_OF_ONE)
    return stats.norm(at, 0.8).logpdf(z).sum(-1) + log_prior


def test_closed_form_is_the_dense_integral():
    """z | y = k, S ~ N(m_k, σ² I + V_k), with the conjugate m_k and V_k of each class by hand."""
    found = ExactLinear().fit(two_classes, SUPPORT, compile=False).adapt(SUPPORT)
    probabilities = found.predict(QUERY).probabilities
    for i in range(3):
        (x, y), (z, _) = rows(SUPPORT, i), rows(QUERY, i)
        logits = []
        for k in (0, 1):
            precision = 1.5**-2 + (y == k).sum() / 0.64
            mean = x[y == k].sum(0) / 0.64 / precision
            law = stats.norm(mean, math.sqrt(0.64 + 1 / precision))
            logits.append(law.logpdf(z).sum(1) + math.log(PRIOR_OF_ONE if k else 1 - PRIOR_OF_ONE))
        expected = special.softmax(np.stack(logits, 1), 1)
        np.testing.assert_allclose(probabilities[i, : len(z)], expected, atol=1e-10)


@pytest.mark.parametrize("layout", ["nested", "flat"])
@pytest.mark.parametrize("full", [False, True])
def test_closed_form_of_correlated_means(layout, full):
    """A full covariance of φ: V_k is its block. Both layouts, also a task without query."""
    tril = torch.tril(0.4 * draws(4, seed=8).permute(1, 0, 2)) + 0.5 * torch.eye(4)
    density = Gaussian(draws(1)[0], tril if full else tril.diagonal(dim1=-2, dim2=-1).abs())
    predictive = posterior(density, layout=layout).predict(labelled((2, 0, 3), seed=1))
    for i in (0, 2):
        z, _ = rows(labelled((2, 0, 3), seed=1), i)
        covariance = density.covariance[i].numpy()
        logits = []
        for k in (0, 1):
            block = slice(2 * k, 2 * k + 2)
            law = stats.multivariate_normal(
                density.loc[i, block], covariance[block, block] + 0.64 * np.eye(2)
            )
            logits.append(law.logpdf(z) + math.log(PRIOR_OF_ONE if k else 1 - PRIOR_OF_ONE))
        expected = special.softmax(np.stack(np.atleast_2d(logits), -1), -1)
        np.testing.assert_allclose(predictive.probabilities[i, : len(z)], expected, atol=1e-10)


# Where the closed form must not be used


def single_label(law):
    def program(x, y=None, *, task, n_tasks):
        with pyro.plate("task", n_tasks, dim=-1):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        with pyro.plate("point", x.shape[0], dim=-1):
            label = pyro.sample("label", dist.Categorical(torch.ones(2)), obs=y)
            chosen = nn.functional.one_hot(label.long(), 2).to(x.dtype)
            mean = (chosen.unsqueeze(-2) @ phi[task].reshape(-1, 2, 2)).squeeze(-2)
            pyro.sample("z", law(mean, x), obs=x)

    return program


@pytest.mark.parametrize(
    ("law", "linear"),
    [
        (lambda m, x: dist.Normal(m, 0.8).to_event(1), True),
        (lambda m, x: dist.Normal(m.tanh(), 0.8).to_event(1), False),
        (lambda m, x: dist.Normal(m.clamp(min=-1.5), 0.8).to_event(1), False),
        (lambda m, x: dist.Normal(m.clamp(max=1.5), 0.8).to_event(1), False),
        (lambda m, x: dist.Normal(m, m.exp()).to_event(1), False),
        (lambda m, x: dist.Normal(m * x, 0.8).to_event(1), False),
        (lambda m, x: dist.Normal(m, 1 + x.abs()).to_event(1), False),
        (lambda m, x: dist.Laplace(m, 0.8).to_event(1), False),
        (lambda m, x: dist.MultivariateNormal(m, torch.eye(2)), False),
    ],
)
def test_linearity_is_tested_and_not_declared(law, linear):
    problem = Problem(single_label(law), SUPPORT)
    density = Gaussian(draws(1)[0], torch.full((3, 4), 0.5, dtype=torch.float64))
    with torch.no_grad():
        assert is_linear_gaussian(problem, {}, density, problem.batch(SUPPORT)) == linear
    assert (integrated(problem, {}, density, QUERY, SUPPORT) is not None) == linear
    # Either way there is a predictive.
    predictive = TaskPosterior(problem, {}, density, SUPPORT).predict(QUERY, draws=50)
    assert predictive.n_draws == (1 if linear else 50)
    assert bool(torch.isfinite(predictive.log_prob(QUERY.y)).all())


def test_a_law_that_x_moves_is_right_with_one_row_per_task():
    """One row cannot tell, so the law must be taken at that row of that task."""
    problem = Problem(single_label(lambda m, x: dist.Normal(m * x, 0.8).to_event(1)), SUPPORT)
    density = Gaussian(draws(1)[0], torch.full((3, 4), 0.5, dtype=torch.float64))
    one = labelled((1, 1, 1), seed=4)
    found = TaskPosterior(problem, {}, density, SUPPORT).predict(one).probabilities
    for i in range(3):
        z, _ = rows(one, i)
        means = density.loc[i].reshape(2, 2).numpy()
        logits = [
            stats.norm(means[k] * z, np.sqrt(0.64 + 0.25 * z**2)).logpdf(z).sum() for k in (0, 1)
        ]
        np.testing.assert_allclose(found[i, 0], special.softmax(logits), atol=1e-9)


# Labels of several points at once


def test_joint_probability_of_labels_is_refused_where_phi_is_uncertain():
    """The rows of a Gaussian's closed form are marginals: their product is not the joint one."""
    for density in (
        Gaussian(draws(1)[0], torch.full((3, 4), 0.5, dtype=torch.float64)),
        Empirical(draws(7)),
    ):
        predictive = posterior(density).predict(QUERY)
        with pytest.raises(UnsupportedModelError, match="joint=False"):
            predictive.log_prob(QUERY.y, joint=True)
    predictive = posterior(Delta(draws(1)[0])).predict(QUERY)
    each = torch.where(QUERY.mask, predictive.log_prob(QUERY.y), 0.0).sum(1)
    torch.testing.assert_close(predictive.log_prob(QUERY.y, joint=True), each)


# What else a program may observe


def test_a_program_of_one_observed_site_has_nothing_to_enumerate():
    def program(x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with pyro.plate("point", x.shape[1], dim=-1):
                pyro.sample("y", dist.Bernoulli(logits=phi + x[..., 0]), obs=y)

    assert Problem(program, SUPPORT).classes is None


class Moving(nn.Module):
    """Numbers y beside an embedding of x that is learned: nothing to enumerate."""

    def __init__(self, frozen):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(2), requires_grad=not frozen)

    def forward(self, x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with pyro.plate("point", x.shape[1], dim=-1):
                pyro.sample("y", dist.Normal(phi + x[..., 0], 1.0), obs=y)
                pyro.sample("z", dist.Normal(phi.unsqueeze(-1), 1.0).to_event(1),
                            obs=x @ self.weight)  # fmt: skip


@pytest.mark.parametrize("strategy", [MAML(), Quadrature()])
def test_an_embedding_beside_numbers_is_refused_whatever_is_minimised(strategy):
    """Without classes to enumerate, the query's loss holds the density of the embedding too."""
    tasks = Tasks(SUPPORT.x[:, :3], torch.randn(3, 3, dtype=torch.float64).round())
    with pytest.raises(UnsupportedModelError, match="would shrink to nothing"):
        strategy.fit(Moving(frozen=False), tasks, steps=1, compile=False, progress=False)
    strategy.fit(Moving(frozen=True), tasks, steps=1, compile=False, progress=False)


def test_predictions_need_no_labels():
    inputs = QUERY.x
    for density in (Delta(draws(1)[0]), Gaussian(draws(1)[0], 0.3 + 0 * draws(1)[0])):
        found = posterior(density).predict(inputs).probabilities
        by_tasks = posterior(density).predict(QUERY).probabilities
        torch.testing.assert_close(found[0, :2], by_tasks[0, :2], rtol=1e-12, atol=0)
