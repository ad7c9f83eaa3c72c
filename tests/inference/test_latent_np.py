"""Latent neural processes: the objectives on Gaussians, the encoder, fits."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from hbmeta import models
from hbmeta.densities import Gaussian
from hbmeta.encoders import RowFeatures, SetEncoder
from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.inference import AmortizedGuide, ExactLinear, LatentNP
from hbmeta.inference.latent_np import neural_process_objective
from hbmeta.problem import Problem
from hbmeta.program import Batch
from hbmeta.tasks import LinearTasks, Tasks
from tests.cases import COVARIANCE, MEAN, NOISE, case

# T5: z ~ N(0, 1), y = z + ε, σ² = ¼, y_C = (1, 0.6), y_T = 2.

EXACT = ((0.7111111111, 0.1111111111), (1.1076923077, 0.0769230769))
BAD = ((1.8, 0.05), (1.85, 0.04))
LOG_PREDICTIVE = -2.7098246829  # log p(y_T | C)
LOG_IMPLIED = -0.3836187977  # log ∫ p(y_T | z) q(z | C) dz of the bad encoder


def log_likelihood(z):
    return -0.5 * (2.0 - z[..., 0]) ** 2 / 0.25 - 0.5 * math.log(2 * math.pi * 0.25)


def encoders(which, n_tasks=1):
    return [
        Gaussian(*(torch.full((n_tasks, 1), v, dtype=torch.float64) for v in (m, math.sqrt(s2))))
        for m, s2 in which
    ]


def expectation_one_draw(objective, which):
    """E of the objective with K = 1, exactly: it is quadratic in ε, and ±1 have variance 1."""
    noise = torch.tensor([[[1.0], [-1.0]]], dtype=torch.float64)
    both = encoders(which, 2)
    return float(neural_process_objective(objective, log_likelihood, *both, noise).mean())


@pytest.mark.parametrize(
    ("objective", "which", "value"),
    [
        ("np", EXACT, LOG_PREDICTIVE),
        ("np", BAD, -0.3873631283),
        ("npml", BAD, -0.4057913526),
        ("iw", EXACT, LOG_PREDICTIVE),
        ("iw", BAD, -0.3873631283),
    ],
)
def test_one_draw_in_expectation(objective, which, value):
    assert expectation_one_draw(objective, which) == pytest.approx(value, abs=2e-9)


def test_objectives_bound_what_the_encoder_predicts_and_not_the_posterior_predictive():
    """The counterexample: a bad q(z | C) lifts the objective 2.3 nats above log p(y_T | C)."""
    context, _ = encoders(BAD)
    implied = stats.norm.logpdf(2.0, float(context.loc), math.sqrt(0.05 + 0.25))
    assert implied == pytest.approx(LOG_IMPLIED, abs=1e-9)
    for objective in ("np", "npml", "iw"):
        value = expectation_one_draw(objective, BAD)
        assert LOG_PREDICTIVE + 2.0 < value < implied


@pytest.mark.parametrize(
    ("objective", "draws", "value"),
    [("npml", 5, -0.3872), ("npml", 50, -0.3838), ("iw", 5, -0.3843), ("iw", 50, -0.38363)],
)
def test_more_draws_come_closer_to_the_bound(objective, draws, value):
    """The values have 4 digits (iw, 50: 5). 100,000 replicates as tasks, 5 standard errors each.

    False-alarm rate below 1e-6 per case.
    """
    n = 100_000
    generator = torch.Generator().manual_seed(draws)
    noise = torch.randn(draws, n, 1, generator=generator, dtype=torch.float64)
    context, both = encoders(BAD, n)
    found = neural_process_objective(objective, log_likelihood, context, both, noise)
    error = float(found.std()) / math.sqrt(n)
    assert abs(float(found.mean()) - value) < 5 * error + 5e-5
    assert float(found.mean()) < LOG_IMPLIED + 5 * error


# The loss


def encoder_for(strategy, problem, tasks):
    """An encoder whose heads are away from where they start."""
    own = strategy.parameters(problem, tasks, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in own.parameters():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            value.add_(0.1 * noise)
    return own


@pytest.mark.parametrize("name", ["linear_own_nested", "linear_own_flat"])
@pytest.mark.parametrize("context_in_targets", [False, True])
@pytest.mark.parametrize("objective", ["np", "npml", "iw"])
def test_loss_by_hand(name, context_in_targets, objective):
    """Row by row and draw by draw in NumPy, from the densities of support and union alone."""
    tasks = case(name).tasks
    problem = Problem(case(name).program, tasks)
    strategy = LatentNP(
        hidden=5, draws=3, objective=objective, context_in_targets=context_in_targets
    )
    own, theta = encoder_for(strategy, problem, tasks), problem.theta(problem.batch(tasks))
    whole = problem.batch(tasks)
    generator = torch.Generator().manual_seed(2)
    given = (torch.rand(whole.weight.shape, generator=generator) < 0.5) & whole.mask
    support, query = whole.where(given), whole.where(whole.mask & ~given)
    noise = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
    found = strategy.loss(problem, theta, own, support, query, {"phi": noise}).detach()
    on_rows = given if whole.task is not None else tasks.unpad(given)
    with torch.no_grad():
        context = strategy.posterior(problem, theta, own, support)
        both = strategy.posterior(problem, theta, own, whole)
    rng = np.arange(len(tasks.task))
    for i in range(4):
        mine = rng[tasks.task.numpy() == i]
        targets = [r for r in mine if context_in_targets or not on_rows[r]]
        normals = [
            stats.multivariate_normal(d.loc[i].numpy(), d.covariance[i].numpy())
            for d in (context, both)
        ]
        drawn_from = context if objective == "npml" else both
        values = []
        for k in range(3):
            phi = drawn_from.draw(noise)[k, i].numpy()
            rows = zip(tasks.flat_x[targets].numpy(), tasks.flat_y[targets].numpy(), strict=True)
            value = sum(stats.norm.logpdf(y, x @ phi, NOISE) for x, y in rows)
            if objective == "iw":
                value += normals[0].logpdf(phi) - normals[1].logpdf(phi)
            values.append(value)
        if objective == "np":
            bound = np.mean(values) - float(both.kl(context)[i])
        else:
            bound = np.log(np.mean(np.exp(values)))
        assert found[i].item() == pytest.approx(-bound / max(len(targets), 1), rel=1e-8)


# The encoder


@pytest.mark.parametrize("strategy", [LatentNP(hidden=6), AmortizedGuide(hidden=6, layers=2)])
@pytest.mark.parametrize("name", ["two_coefficients", "linear_own_flat"])
def test_encoder_gives_the_prior_without_rows_and_sees_no_order(strategy, name):
    tasks = case(name).tasks
    problem = Problem(case(name).program, tasks)
    own, theta = encoder_for(strategy, problem, tasks), problem.theta(problem.batch(tasks))
    whole = problem.batch(tasks)
    nothing = strategy.posterior(
        problem, theta, own, whole.where(torch.zeros_like(whole.weight) > 0)
    )
    mode = problem.location(theta, whole)
    np.testing.assert_allclose(nothing.loc.detach(), mode.detach(), rtol=1e-12)
    hessian = torch.autograd.functional.hessian(
        lambda p: problem.log_task_prior(theta, p, whole).sum(), mode
    )
    for i in range(tasks.n_tasks):
        inverse = torch.linalg.inv(-hessian[i, :, i])
        np.testing.assert_allclose(nothing.covariance[i].detach(), inverse, rtol=1e-9, atol=1e-12)
    order = torch.argsort(torch.rand(tasks.n_points, generator=torch.Generator().manual_seed(3)))
    order = order[torch.argsort(tasks.task[order], stable=True)]
    mixed = Tasks.from_flat(
        tasks.flat_x[order], tasks.flat_y[order], tasks.task[order], tasks.n_tasks
    )
    assert not torch.equal(mixed.flat_x, tasks.flat_x)
    for one, other in zip(
        vars(strategy.posterior(problem, theta, own, whole)).values(),
        vars(strategy.posterior(problem, theta, own, problem.batch(mixed))).values(),
        strict=True,
    ):
        np.testing.assert_allclose(one.detach(), other.detach(), rtol=1e-9, atol=1e-11)


def test_factors_are_those_of_bayes_rule():
    """The sums of the encoder, row by row, in both layouts."""
    tasks = case("ragged_one_row").tasks
    features = RowFeatures(tasks, classes=0, frequencies=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = SetEncoder(features, hidden=4, layers=2, size=5, located=True).double()
    nested, flat = (Batch.of(tasks, layout) for layout in ("nested", "flat"))
    found = [encoder(batch) for batch in (nested, flat)]
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one.detach(), other.detach(), rtol=1e-10, atol=1e-14)
    for i in range(tasks.n_tasks):
        alone = Batch.of(tasks[[i]], "flat")
        precision = encoder(alone)[1][0].detach()
        # As many eigenvalues above zero as rows.
        rank = int((torch.linalg.eigvalsh(precision) > 1e-12).sum())
        assert rank == min(int(tasks.counts[i]), 5)


def labelled(n_tasks=4, points=6, ways=3):
    rng = np.random.default_rng(0)
    return Tasks(rng.normal(size=(n_tasks, points, 1)), rng.integers(0, ways, (n_tasks, points)))


def test_labels_enter_as_indicators():
    tasks = labelled()
    features = RowFeatures(tasks, classes=3, frequencies=0)
    rows = features(Batch.of(tasks, "flat"))
    x = (tasks.flat_x - tasks.flat_x.mean(0)) / tasks.flat_x.std(0)
    wanted = torch.cat([x, torch.nn.functional.one_hot(tasks.flat_y, 3)], 1)
    np.testing.assert_allclose(rows[:, :4], wanted, rtol=1e-12)
    assert rows.shape[1] == features.width == 4 + 10


@pytest.mark.parametrize("tier", ["eager", "graph"])
@pytest.mark.parametrize("strategy", [LatentNP(hidden=4, draws=2), AmortizedGuide(hidden=4)])
def test_classifiers_are_guided_by_labels(strategy, tier):
    model = models.NeuralClassifier(3, hidden=(2,))
    fitted = strategy.fit(model, labelled(), steps=3, compile=tier, progress=False)
    assert fitted.own.features.classes == 3
    found = fitted.adapt(labelled(2, 3)).predict(torch.zeros(2, 1, 1).double(), draws=20)
    np.testing.assert_allclose(found.probabilities.sum(-1), 1.0, rtol=1e-9)


# Fits


@pytest.mark.parametrize("name", ["poisson_offset", "varying_intercepts", "module_parameters"])
@pytest.mark.parametrize("objective", ["np", "npml", "iw"])
def test_any_program(name, objective):
    strategy = LatentNP(hidden=4, draws=2, objective=objective)
    fitted = strategy.fit(
        case(name).program, case(name).tasks, steps=4, compile=False, progress=False
    )
    assert np.isfinite(fitted.history).all()
    assert torch.isfinite(fitted.adapt(case(name).tasks).density.loc).all()


@pytest.mark.parametrize("objective", [pytest.param("np", marks=pytest.mark.slow), "npml"])
def test_linear_tasks_are_predicted_as_by_the_exact_posterior(objective):
    """θ given: joint NLL per point within 0.1 nats of the exact one on 200 new tasks.

    Loose, for a short training; the standard error of the difference is below 0.01.
    """
    family = LinearTasks(MEAN, COVARIANCE, NOISE, shots=4, queries=6)
    model = models.LinearRegression(MEAN, COVARIANCE, NOISE)
    new = family.sample(200, seed=1)
    strategy = LatentNP(hidden=32, frequencies=0, layers=1, objective=objective)
    fitted = strategy.fit(
        model, family, steps=400, learning_rate=5e-3, compile="graph", progress=False
    )
    exact = ExactLinear().fit(model, new.support, compile=False)
    found, wanted = (
        f.adapt(new.support).predict(new.query.x).log_prob(new.query.y, joint=True) / 6
        for f in (fitted, exact)
    )
    assert float((wanted - found).mean()) < 0.1
    assert np.mean(fitted.history[-50:]) < np.mean(fitted.history[:50]) - 0.1


def test_same_seed_same_fit_and_the_global_state_is_left():
    tasks = case("two_coefficients").tasks
    before = torch.get_rng_state()
    fits = [
        LatentNP(hidden=4, draws=2).fit(
            case("two_coefficients").program, tasks, steps=3, seed=s, compile=False, progress=False
        )
        for s in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert fits[0].history == fits[1].history != fits[2].history


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"objective": "elbo"}, "'elbo'"),
        ({"context_in_targets": 1}, "1"),
        ({"draws": 0}, "draws=0"),
        ({"layers": 0}, "layers=0"),
        ({"frequencies": -1}, "frequencies=-1"),
        ({"hidden": 1.5}, r"hidden=1\.5"),
        ({"covariance": "low-rank"}, "covariance='low-rank'"),
    ],
)
def test_settings_that_cannot_be_used(settings, found):
    with pytest.raises(DataError, match=f"LatentNP: .*found {found}"):
        LatentNP(**settings)


def test_data_that_cannot_be_used():
    schools = case("eight_schools")
    with pytest.raises(DataError, match="tasks with two rows or more"):
        LatentNP().fit(schools.program, schools.tasks, steps=1, compile=False)
    wide = models.NeuralRegression(hidden=(8, 8)).bind(case("varying_intercepts").tasks)
    problem = Problem(wide, case("varying_intercepts").tasks)
    with pytest.raises(UnsupportedModelError, match="at most 64 parameters per task"):
        replace(LatentNP(), covariance="full").parameters(
            problem, case("varying_intercepts").tasks, 0
        )
