"""ExactGP and Quadrature against dense formulas, brute-force grids, conjugacy and NUTS."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import special, stats

from hbmeta import models
from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.inference import NUTS, AmortizedGuide, ExactGP, ExactLinear, Quadrature
from hbmeta.oracles import known_kernel
from hbmeta.tasks import GaussianProcessTasks, Tasks
from tests import reference
from tests.cases import case, rows_of

# T7 of the reference: RBF, ℓ = 1, s² = 1, σ² = 0.01.
X_C, Y_C = (-1.0, 0.0, 1.5), (0.5, -0.2, 1.0)
X_T, Y_T = (-0.5, 1.0), (0.1, 0.7)
MEAN = (0.0722288988, 0.5410307299)
VARIANCE_OF_F = (0.0314664231, 0.0927763055)
COVARIANCE_OF_F = -0.0323521183
LML_C, LML_CT = -3.6313872812, -2.8190336259
JOINT, FACTORISED, TOTAL_CORRELATION = 0.8123536553, 0.7589164113, 0.1409115904


def one_task(x, y, *, dtype=torch.float64, name="a"):
    x, y = torch.tensor(x, dtype=dtype), torch.tensor(y, dtype=dtype)
    return Tasks.from_flat(x[:, None], y, torch.zeros(len(x), dtype=torch.int64), 1, ids=[name])


def known(noise=0.1):
    return models.GaussianProcess("rbf", lengthscale=1.0, scale=1.0, noise=noise)


def fitted(model, tasks, strategy=None, **settings):
    return (strategy or ExactGP()).fit(model, tasks, compile=False, progress=False, **settings)


def covariance(x, z, kernel="rbf", *, lengthscale=1.0, scale=1.0, **settings):
    settings = {"lengthscale": lengthscale} | settings
    return scale**2 * reference.kernel_matrix(kernel, x, z, **settings)


def log_marginal(x, y, *, noise, **settings):
    """log N(y; 0, K + σ² I), densely; 0 without points."""
    x, y = np.ravel(x), np.asarray(y)
    if not len(y):
        return 0.0
    matrix = covariance(x, x, **settings) + noise**2 * np.eye(len(x))
    return float(stats.multivariate_normal(np.zeros(len(x)), matrix).logpdf(y))


def conditional(x_new, x, y, *, noise, **settings):
    """Mean and covariance of y at x_new given (x, y), noise included."""
    x_new, x = np.ravel(x_new), np.ravel(x)
    k = covariance(x, x, **settings) + noise**2 * np.eye(len(x))
    cross = covariance(x_new, x, **settings)
    new = covariance(x_new, x_new, **settings) + noise**2 * np.eye(len(x_new))
    if not len(x):
        return np.zeros(len(x_new)), new
    return cross @ np.linalg.solve(k, y), new - cross @ np.linalg.solve(k, cross.T)


# Known hyperparameters: φ is empty


def test_known_kernel_of_three_points():
    support, query = one_task(X_C, Y_C), one_task(X_T, Y_T)
    fit = fitted(known(), support)
    posterior = fit.adapt(support)
    predictive = posterior.predict(query)
    np.testing.assert_allclose(predictive.mean[0], MEAN, atol=6e-11)
    np.testing.assert_allclose(predictive.variance[0] - 0.01, VARIANCE_OF_F, atol=6e-11)
    draws = predictive.sample(20_000, seed=1)[:, 0].T
    # Covariance of two numbers from 20,000 draws: 5 standard errors, a false alarm in 1e-6.
    sds = predictive.sd[0].prod()
    assert abs(float(torch.cov(draws)[0, 1]) - COVARIANCE_OF_F) < 5 * float(sds) * 2**0.5 / 141
    assert float(posterior.info["log_evidence"]) == pytest.approx(LML_C, abs=6e-11)
    assert fit.info["log_evidence"] == pytest.approx(LML_C, abs=6e-11)
    both = fitted(known(), one_task(X_C + X_T, Y_C + Y_T))
    assert both.info["log_evidence"] == pytest.approx(LML_CT, abs=6e-11)
    joint = float(predictive.log_prob(query.y, joint=True))
    assert joint == pytest.approx(JOINT, abs=6e-11)
    assert joint == pytest.approx(both.info["log_evidence"] - fit.info["log_evidence"], abs=1e-10)
    factorised = float(predictive.log_prob(query.y).sum())
    assert factorised == pytest.approx(FACTORISED, abs=6e-11)
    # Half of the difference of log determinants of the marginals and of the joint law.
    law = conditional(X_T, X_C, Y_C, noise=0.1)[1]
    by_hand = 0.5 * (np.log(np.diag(law)).sum() - np.linalg.slogdet(law)[1])
    assert by_hand == pytest.approx(TOTAL_CORRELATION, abs=6e-11)
    sd = predictive.sd[0]
    found = stats.multivariate_normal(predictive.mean[0], law).entropy()
    assert float(torch.log(sd * math.sqrt(2 * math.pi * math.e)).sum()) - found == pytest.approx(
        TOTAL_CORRELATION, abs=1e-9
    )


def test_empty_support_gives_the_prior():
    support, query = one_task(X_C, Y_C), one_task(X_T, Y_T)
    nothing = support.keep(torch.zeros(3, dtype=torch.bool))
    posterior = fitted(known(), support).adapt(nothing)
    predictive = posterior.predict(query)
    assert float(posterior.info["log_evidence"]) == 0.0
    np.testing.assert_allclose(predictive.mean[0], 0.0, atol=1e-14)
    np.testing.assert_allclose(predictive.variance[0], 1.01, rtol=1e-12)
    joint = float(predictive.log_prob(query.y, joint=True))
    assert joint == pytest.approx(log_marginal(X_T, Y_T, noise=0.1), abs=1e-12)


RAGGED = {"a": (3, 4), "b": (0, 2), "c": (6, 1), "d": (1, 5)}


def ragged():
    """Tasks of unequal supports and queries, one of them without support."""
    rng = np.random.default_rng(0)
    parts = []
    for which in (0, 1):
        counts = [sizes[which] for sizes in RAGGED.values()]
        task = np.repeat(np.arange(4), counts)
        x = rng.uniform(-2, 2, (len(task), 1))
        y = np.sin(2 * x[:, 0]) + 0.1 * rng.standard_normal(len(task))
        parts.append(Tasks.from_flat(x, y, task, 4, ids=list(RAGGED)))
    return parts


@pytest.mark.parametrize("lengthscale", [0.7, (0.2, 1.5)])
def test_ragged_tasks_equal_each_task_alone(lengthscale):
    support, query = ragged()
    model = models.GaussianProcess("matern52", lengthscale=lengthscale, scale=1.0, noise=0.2)
    fit = fitted(model, support)
    together = fit.adapt(support)
    predictive = together.predict(query)
    joint = predictive.log_prob(query.y, joint=True)
    for i, name in enumerate(RAGGED):
        alone = fit.adapt(support.select([name]))
        one = alone.predict(query.select([name]))
        n = int(query.counts[i])
        for what in ("mean", "variance"):
            torch.testing.assert_close(
                getattr(predictive, what)[i, :n], getattr(one, what)[0, :n], rtol=1e-10, atol=1e-10
            )
        assert float(joint[i]) == pytest.approx(
            float(one.log_prob(query.select([name]).y, joint=True)), abs=1e-10
        )
        for key in ("log_evidence", "quadrature_error"):
            assert float(together.info[key][i]) == pytest.approx(float(alone.info[key]), abs=1e-10)


def test_repeated_inputs_are_averaged():
    """Two observations at one place weigh as one of their mean with half of the variance."""
    support, query = one_task((0.3, 0.3, -1.0), (0.5, 0.9, 0.2)), one_task((0.3, 0.6), (0.0, 0.0))
    predictive = fitted(known(), support).adapt(support).predict(query)
    k = covariance([0.3, -1.0], [0.3, -1.0]) + np.diag([0.005, 0.01])
    cross = covariance([0.3, 0.6], [0.3, -1.0])
    np.testing.assert_allclose(
        predictive.mean[0], cross @ np.linalg.solve(k, [0.7, 0.2]), rtol=1e-10
    )
    variance = 1.01 - (cross @ np.linalg.solve(k, cross.T)).diagonal()
    np.testing.assert_allclose(predictive.variance[0], variance, rtol=1e-10)


def test_single_precision():
    """The same numbers to 1e-4, in float32 throughout."""
    support = one_task(X_C, Y_C, dtype=torch.float32)
    query = one_task(X_T, Y_T, dtype=torch.float32)
    posterior = fitted(known(), support).adapt(support)
    predictive = posterior.predict(query)
    assert posterior.info["log_evidence"].dtype == torch.float32
    np.testing.assert_allclose(predictive.mean[0], MEAN, atol=1e-5)
    assert float(predictive.log_prob(query.y, joint=True)) == pytest.approx(JOINT, abs=1e-4)
    model = models.GaussianProcess("rbf", lengthscale=(0.2, 2.0), scale=1.0, noise=0.1)
    low, high = (
        fitted(model, tasks).adapt(tasks).predict(tasks).mean
        for tasks in (support, one_task(X_C, Y_C))
    )
    np.testing.assert_allclose(low, high, atol=1e-4)


@pytest.mark.parametrize("kernel", ["rbf", "matern32", "periodic"])
def test_known_hyperparameters_equal_the_oracle(kernel):
    """Another implementation, with hyperparameters of its own for each task: one fit a task."""
    family = GaussianProcessTasks(kernel=kernel, shots=5, queries=4)
    episode, truth = family.sample_with_truth(3, seed=0)
    oracle = known_kernel(family, episode, truth)
    for i, name in enumerate(episode.support.ids):
        own = {k: float(v[i]) for k, v in truth.items()}
        model = models.GaussianProcess(kernel, **own)
        support, query = episode.support.select([name]), episode.query.select([name])
        predictive = fitted(model, support).adapt(support).predict(query)
        torch.testing.assert_close(predictive.mean[0], oracle.mean[i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            predictive.log_prob(query.y, joint=True)[0],
            oracle.log_prob(episode.query.y, joint=True)[i],
            rtol=1e-3,
            atol=1e-3,
        )


# Lengthscales integrated out

LOW, HIGH, NOISE = 0.25, 1.25, 0.15


def mixture(support, query, position, nodes=1001, *, kernel="rbf"):
    """Marginal and joint log densities of the query under ℓ ~ U(LOW, HIGH), by Simpson's rule."""
    x, y = rows_of(support, position)
    x_new, y_new = rows_of(query, position)
    ell = np.linspace(LOW, HIGH, nodes)
    log_w = np.log(np.where(np.arange(nodes) % 2, 4.0, 2.0) / (3 * (nodes - 1)))
    log_w[[0, -1]] -= math.log(2)
    settings = [{"kernel": kernel, "lengthscale": v, "noise": NOISE} for v in ell]
    evidence = np.array([log_marginal(x, y, **s) for s in settings])
    total = special.logsumexp(log_w + evidence)
    laws = [conditional(x_new, x, y, **s) for s in settings]
    marginal = np.array([stats.norm(m, np.sqrt(np.diag(v))).logpdf(y_new) for m, v in laws])
    joint = np.array([stats.multivariate_normal(m, v).logpdf(y_new) for m, v in laws])
    posterior = log_w + evidence - total
    mean = np.exp(posterior) @ np.array([m for m, _ in laws])
    return {
        "evidence": total,
        "marginal": special.logsumexp(posterior[:, None] + marginal, axis=0),
        "joint": special.logsumexp(posterior + joint),
        "mean": mean,
        "lengthscale": float(np.exp(posterior) @ ell),
    }


def uncertain(kernel="rbf"):
    return models.GaussianProcess(kernel, lengthscale=(LOW, HIGH), scale=1.0, noise=NOISE)


@pytest.mark.parametrize("kernel", ["rbf", "matern32"])
def test_lengthscale_integrated_out_equals_a_dense_grid(kernel):
    """Claimed to 1e-8; the rule of 1,001 nodes is good for 1e-11."""
    support, query = ragged()
    posterior = fitted(uncertain(kernel), support).adapt(support)
    predictive = posterior.predict(query)
    marginal = predictive.log_prob(query.y)
    joint = predictive.log_prob(query.y, joint=True)
    moments = posterior.moments()["lengthscale"][0]
    for i in (0, 2):
        expected = mixture(support, query, i, kernel=kernel)
        n = int(query.counts[i])
        assert float(posterior.info["log_evidence"][i]) == pytest.approx(
            expected["evidence"], abs=1e-8
        )
        np.testing.assert_allclose(marginal[i, :n], expected["marginal"], atol=1e-8)
        assert float(joint[i]) == pytest.approx(expected["joint"], abs=1e-8)
        np.testing.assert_allclose(predictive.mean[i, :n], expected["mean"], atol=1e-8)
        assert float(moments[i]) == pytest.approx(expected["lengthscale"], abs=1e-8)


@pytest.mark.parametrize("kernel", ["rbf", "matern12", "matern52", "periodic"])
def test_halving_the_grid_does_not_change_predictions(kernel):
    """Of the family as it is by default, by less than 1e-6."""
    family = GaussianProcessTasks(kernel=kernel, shots=10, queries=6, dtype=torch.float64)
    episode, _ = family.sample_with_truth(4, seed=3)
    settings = {
        name: value if isinstance(value, tuple) else float(value)
        for name, value in ((n, getattr(family, n)) for n in family.hyperparameters)
    }
    model = models.GaussianProcess(kernel, **settings)
    fit = fitted(model, episode.support)
    fine = fit.adapt(episode.support).predict(episode.query)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        coarse = fit.adapt(episode.support, nodes=32).predict(episode.query)
    torch.testing.assert_close(coarse.mean, fine.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(coarse.variance, fine.variance, rtol=0, atol=1e-6)
    y = episode.query.y
    torch.testing.assert_close(coarse.log_prob(y), fine.log_prob(y), rtol=0, atol=1e-6)


def test_two_hyperparameters_equal_a_dense_grid():
    """ℓ and s: the midpoint rule of 300 × 300 cells, good to 1e-5; one task of three points."""
    support, query = one_task(X_C, Y_C), one_task(X_T, Y_T)
    model = models.GaussianProcess("rbf", lengthscale=(0.5, 1.5), scale=(0.5, 2.0), noise=0.1)
    posterior = fitted(model, support).adapt(support)
    assert posterior.density.phi.shape == (48 * 48, 1, 2)
    ell, scale = (low + (high - low) * (np.arange(300) + 0.5) / 300 for low, high in
                  ((0.5, 1.5), (0.5, 2.0)))  # fmt: skip
    both = np.zeros((300, 300))
    alone = np.zeros((300, 300))
    for (x, y), out in (((X_C, Y_C), alone), ((X_C + X_T, Y_C + Y_T), both)):
        for i, value in enumerate(ell):
            # The scale enters through the eigenvalues of K alone.
            eigenvalues, vectors = np.linalg.eigh(covariance(x, x, lengthscale=value))
            variance = np.outer(scale**2, eigenvalues) + 0.01
            out[i] = -0.5 * (
                np.log(2 * np.pi * variance) + (vectors.T @ np.array(y)) ** 2 / variance
            ).sum(1)
    expected = special.logsumexp(alone) - math.log(90_000)
    assert float(posterior.info["log_evidence"]) == pytest.approx(expected, abs=1e-5)
    joint = float(posterior.predict(query).log_prob(query.y, joint=True))
    assert joint == pytest.approx(special.logsumexp(both) - special.logsumexp(alone), abs=1e-5)
    weights = np.exp(alone - special.logsumexp(alone))
    moments = posterior.moments()
    assert float(moments["lengthscale"][0]) == pytest.approx(weights.sum(1) @ ell, abs=1e-5)
    assert float(moments["scale"][0]) == pytest.approx(weights.sum(0) @ scale, abs=1e-5)


def test_no_node_is_left_out_however_few_draws_are_asked_for():
    """Nodes are no draws: thinning them would change the integral."""
    support, query = ragged()
    model = models.GaussianProcess("rbf", lengthscale=(0.3, 1.5), scale=(0.5, 2.0), noise=0.2)
    posterior = fitted(model, support).adapt(support)
    whole = posterior.predict(query, draws=10_000)
    for posterior_of, rows in ((posterior, query), (posterior.select(["c"]), query.select(["c"]))):
        few = posterior_of.predict(rows, draws=7)
        assert few.n_draws == 48**2
        joint = whole.log_prob(query.y, joint=True)
        found = few.log_prob(rows.y, joint=True)
        expected = joint if len(rows.ids) > 1 else joint[2:3]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    values, weights = posterior.values(draws=5)
    assert values["lengthscale"].shape == weights.shape == (48**2, 4)
    mean = posterior.moments(draws=5)["scale"][0]
    torch.testing.assert_close(mean, (weights.softmax(0) * values["scale"]).sum(0))
    # 4,000 draws with equal weights: their means within 5 standard errors, 1e-6 for each of 8.
    draws = posterior.sample(4000, seed=2)
    for name, (mean, sd) in posterior.moments().items():
        assert draws[name].shape == (4000, 4)
        assert bool(((draws[name].mean(0) - mean).abs() < 5 * sd / 4000**0.5).all())


def test_draws_of_the_predictive_have_its_moments():
    """10,000 joint draws: means, variances and a covariance within 5 standard errors."""
    support, query = ragged()
    predictive = fitted(uncertain(), support).adapt(support).predict(query)
    draws = predictive.sample(10_000, seed=3)
    mask = query.mask
    mean, sd = predictive.mean[mask], predictive.sd[mask]
    rows = draws[:, mask]
    assert bool(((rows.mean(0) - mean).abs() < 5 * sd / 100).all())
    # The kurtosis of such a mixture stays below 5.
    assert bool(((rows.var(0) / sd.square() - 1).abs() < 5 * 2 / 100).all())
    assert torch.equal(draws, predictive.sample(10_000, seed=3))
    # Rows of a task hang together: the sum of its rows has the variance of the joint law.
    x, y = rows_of(support, 2)
    assert len(x) == 6
    a = query.select(["a"])
    x, y = rows_of(support, 0)
    nodes = np.linspace(LOW, HIGH, 401)
    evidence = np.array([log_marginal(x, y, lengthscale=v, noise=NOISE) for v in nodes])
    weights = special.softmax(evidence)
    laws = [conditional(rows_of(a, 0)[0], x, y, lengthscale=v, noise=NOISE) for v in nodes]
    sums = np.array([m.sum() for m, _ in laws])
    variance = weights @ (np.array([v.sum() for _, v in laws]) + sums**2) - (weights @ sums) ** 2
    found = float(draws[:, 0, :4].sum(1).var())
    assert found == pytest.approx(variance, rel=0.1)


# Learned hyperparameters


def simulated(n_tasks=40, n_points=12, *, location=-0.5, spread=0.25, noise=0.1):
    """Tasks with log ℓ ~ N(location, spread²), s = 1."""
    rng = np.random.default_rng(1)
    x = np.sort(rng.uniform(-2, 2, (n_tasks, n_points)), 1)
    log_ell = location + spread * rng.standard_normal(n_tasks)
    y = np.stack([
        rng.multivariate_normal(
            np.zeros(n_points),
            covariance(x[i], x[i], lengthscale=np.exp(log_ell[i])) + noise**2 * np.eye(n_points),
        )
        for i in range(n_tasks)
    ])  # fmt: skip
    return Tasks(x[..., None], y), log_ell


def test_type_two_maximum_likelihood_recovers_the_location_of_log_lengthscales():
    """40 tasks: the location within 4 standard errors of what it would be if ℓ were seen.

    That error is spread / √40 = 0.04; inferring ℓ from 12 points adds about as much again (0.2 per
    task), so 4 · 0.06: a false alarm in 1e-4.
    """
    tasks, log_ell = simulated()
    model = models.GaussianProcess("rbf", scale=1.0, noise=0.1)
    fit = fitted(model, tasks)
    assert fit.info["converged"]
    found = fit.globals()
    assert abs(float(found["lengthscale_location"]) + 0.5) < 0.24
    assert abs(float(found["lengthscale_location"]) - log_ell.mean()) < 0.2
    assert 0.0 < float(found["lengthscale_spread"]) < 0.6

    # It is a maximum: a dense evidence is lower at its neighbours.
    def evidence(location, spread):
        u = location + spread * np.linspace(-6, 6, 121)
        log_w = stats.norm(location, spread).logpdf(u) + math.log(spread * 0.1)
        total = 0.0
        for i in range(10):
            x, y = rows_of(tasks, i)
            each = [log_marginal(x, y, lengthscale=np.exp(v), noise=0.1) for v in u]
            total += special.logsumexp(log_w + each)
        return total

    at = float(found["lengthscale_location"]), float(found["lengthscale_spread"])
    here = fit.adapt(tasks).info["log_evidence"][:10].sum()
    assert float(here) == pytest.approx(evidence(*at), abs=1e-4)


def test_prior_on_theta_moves_its_estimate_towards_the_prior():
    tasks, _ = simulated(8, 6, location=1.0)
    model = models.GaussianProcess("rbf", scale=1.0, noise=0.1)
    # Eight tasks of six points do not show that lengthscales differ.
    with pytest.warns(UserWarning, match="ExactGP: the estimate of lengthscale_spread is zero"):
        flat = fitted(model, tasks, ExactGP())
    informed = fitted(model, tasks, ExactGP(prior=True))
    assert (flat.info["at_zero"], informed.info["at_zero"]) == (["lengthscale_spread"], [])
    at = [float(fit.globals()["lengthscale_location"]) for fit in (flat, informed)]
    assert 0.0 < at[1] < at[0]


# NUTS on the same program


@pytest.mark.slow
def test_nuts_over_the_lengthscale_equals_quadrature():
    """Means and sds of ℓ within 5 of their Monte Carlo standard errors: 1e-5 for all four."""
    support, query = (tasks.select(["a", "d"]) for tasks in ragged())
    exact = fitted(uncertain(), support).adapt(support)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = NUTS(draws=250, warmup=150, chains=2).fit(
            uncertain(), support, seed=0, compile="graph", progress=False
        )
    draws = fit.posterior.values(10_000)[0]["lengthscale"].numpy().reshape(2, 250, 2)
    for kind, found, expected in zip(
        ("mean", "sd"),
        (draws.mean((0, 1)), draws.std((0, 1))),
        exact.moments()["lengthscale"],
        strict=True,
    ):
        error = reference.monte_carlo_error(draws, kind)
        assert (np.abs(found - expected.numpy()) < 5 * error).all()
        assert (error < 0.04).all()
    joint = fit.posterior.predict(query).log_prob(query.y, joint=True)
    expected = exact.predict(query).log_prob(query.y, joint=True)
    np.testing.assert_allclose(joint, expected, atol=0.15)


# Quadrature on other programs


def test_gamma_poisson_is_conjugate():
    known_answer = case("gamma_poisson")
    fit = fitted(known_answer.program, known_answer.tasks, Quadrature())
    posterior = fit.adapt(known_answer.tasks)
    np.testing.assert_allclose(posterior.info["log_evidence"], known_answer.log_evidence, atol=1e-9)
    mean, sd = posterior.moments()["rate"]
    np.testing.assert_allclose(mean, known_answer.posterior[0], rtol=1e-8)
    np.testing.assert_allclose(sd, known_answer.posterior[1], rtol=1e-8)
    # The predictive of a Gamma mixture of Poissons is negative binomial.
    shape = known_answer.posterior[0] ** 2 / known_answer.posterior[1] ** 2
    rate = shape / known_answer.posterior[0]
    x = torch.zeros(4, 1, 1, dtype=torch.float64)
    found = posterior.predict(x).log_prob(torch.full((4, 1), 2.0, dtype=torch.float64))[:, 0]
    np.testing.assert_allclose(found, stats.nbinom(shape, rate / (1 + rate)).logpmf(2), atol=1e-8)


@pytest.mark.parametrize("name", ["linear_given_theta", "linear_own_nested", "linear_own_flat"])
def test_two_coefficients_are_the_exact_gaussian(name):
    known_answer = case(name)
    posterior = fitted(known_answer.program, known_answer.tasks, Quadrature(nodes=100)).adapt(
        known_answer.tasks
    )
    np.testing.assert_allclose(posterior.info["log_evidence"], known_answer.log_evidence, atol=1e-5)
    mean, sd = posterior.moments()["coefficients"]
    np.testing.assert_allclose(mean, known_answer.posterior[0], atol=1e-5)
    np.testing.assert_allclose(sd, known_answer.posterior[1], rtol=1e-4)


def test_varying_intercepts_of_a_bernoulli_equal_a_dense_grid():
    known_answer = case("bernoulli")
    # By evidence alone the intercepts of these six tasks do not vary.
    fit = fitted(known_answer.program, known_answer.tasks, Quadrature(prior=True))
    assert theta_scale(fit) > 0.1
    posterior = fit.adapt(known_answer.tasks)
    z = np.linspace(-9, 9, 6001)
    mean, sd = posterior.moments()["coefficients"]
    slope = float(fit.globals()["fixed"].reshape(-1)[0])
    for i in range(known_answer.tasks.n_tasks):
        x, y = rows_of(known_answer.tasks, i)
        a = theta_location(fit) + theta_scale(fit) * z
        eta = a[:, None] + slope * x[:, 0]
        each = (y * special.log_expit(eta) + (1 - y) * special.log_expit(-eta)).sum(1)
        log_w = each + stats.norm.logpdf(z) + math.log(z[1] - z[0])
        total = special.logsumexp(log_w)
        assert float(posterior.info["log_evidence"][i]) == pytest.approx(total, abs=1e-6)
        w = np.exp(log_w - total)
        assert float(mean[i].squeeze()) == pytest.approx(w @ a, abs=1e-6)
        assert float(sd[i].squeeze()) ** 2 == pytest.approx(w @ a**2 - (w @ a) ** 2, abs=1e-6)


def theta_location(fit):
    return float(fit.globals()["mean"].reshape(-1)[0])


def theta_scale(fit):
    return float(fit.globals()["scale"].reshape(-1)[0])


# What is refused, warned of, or not finite


def test_more_than_three_parameters_are_refused():
    def program(x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
            with pyro.plate("point", x.shape[1], dim=-1):
                pyro.sample("y", dist.Normal(phi.sum(-1) + x[..., 0], 1.0), obs=y)

    with pytest.raises(UnsupportedModelError, match="at most 3 parameters per task") as caught:
        fitted(program, one_task(X_C, Y_C), Quadrature())
    assert caught.value.found == "4"
    assert "NUTS" in caught.value.do


def test_exact_gp_refuses_points_that_are_independent():
    known_answer = case("gamma_poisson")
    with pytest.raises(UnsupportedModelError, match="the joint layout") as caught:
        fitted(known_answer.program, known_answer.tasks)
    assert "Use Quadrature" in caught.value.do


@pytest.mark.parametrize("strategy", [Quadrature(), AmortizedGuide(), NUTS(), ExactLinear()])
def test_a_program_without_phi_is_for_exact_gp(strategy):
    with pytest.raises(UnsupportedModelError, match="task parameters φ to infer") as caught:
        fitted(known(), one_task(X_C, Y_C), strategy)
    assert "Use ExactGP" in caught.value.do


def test_too_few_nodes_are_warned_of():
    tasks, _ = simulated(3, 12)
    model = models.GaussianProcess("rbf", lengthscale=(0.01, 30.0), scale=1.0, noise=0.1)
    fit = fitted(model, tasks, ExactGP(nodes=8))
    with pytest.warns(UserWarning, match=r"the quadrature of task \d changes by .*now 8"):
        posterior = fit.adapt(tasks)
    assert float(posterior.info["quadrature_error"].max()) > 0.1


def test_a_change_of_a_tenth_of_a_nat_is_warned_of():
    """Below it the grid's own error, as a rule, is about the square of the change: under 0.01.

    300 tasks of one point, y ~ N(φ, 0.1²), φ ~ N(0, 1), whose evidence is known; the seed is fixed.
    """

    def program(x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with pyro.plate("point", x.shape[1], dim=-1):
                pyro.sample("y", dist.Normal(phi + 0.0 * x[..., 0], 0.1), obs=y)

    spread = math.sqrt(1.01)
    y = spread * torch.randn(300, 1, generator=torch.Generator().manual_seed(0)).double()
    tasks = Tasks(torch.zeros(300, 1, 1, dtype=torch.float64), y)
    fit = fitted(program, tasks, Quadrature(nodes=28))
    with pytest.warns(UserWarning, match="changes by"):
        info = fit.adapt(tasks).info
    change = info["quadrature_error"]
    error = (info["log_evidence"] - torch.from_numpy(stats.norm(0, spread).logpdf(y[:, 0]))).abs()
    told, silent = change > 0.1, (change > 0.03) & (change <= 0.1)
    assert int(silent.sum()) > 20
    assert float(error[silent].median()) < 0.01
    assert float(error[silent].quantile(0.9)) < 0.03
    quiet = tasks.select([tasks.ids[int(i)] for i in silent.nonzero()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit.adapt(quiet)
    with pytest.warns(UserWarning, match="changes by"):
        fit.adapt(tasks.select([tasks.ids[int(told.nonzero()[0])]]))


def test_a_spread_of_zero_is_told_of():
    """As by ExactLinear, whose θ is the same to the quadrature."""
    known_answer = case("eight_schools")
    fits = {}
    for strategy in (ExactLinear(), Quadrature(nodes=100)):
        name = type(strategy).__name__
        with pytest.warns(UserWarning, match=f"{name}: the estimate of tau is zero"):
            fits[name] = fitted(known_answer.program, known_answer.tasks, strategy)
        assert fits[name].info["at_zero"] == ["tau"]
    one, other = (float(fit.globals()["mu"]) for fit in fits.values())
    assert one == pytest.approx(other, abs=0.02)


@pytest.mark.parametrize("nodes", [3, 2.5, 0])
def test_nodes_are_a_whole_number(nodes):
    with pytest.raises(DataError, match="4 or more"):
        Quadrature(nodes=nodes)


def test_repeated_inputs_without_noise_have_the_floor_of_the_noise():
    model = models.GaussianProcess("rbf", lengthscale=1.0, scale=1.0, noise=1e-9)
    twice = one_task(X_C * 2, Y_C * 2, name="twice")
    found = float(fitted(model, twice).adapt(twice).info["log_evidence"])
    k = covariance(X_C * 2, X_C * 2, lengthscale=1.0) + 1e-8 * np.eye(2 * len(X_C))
    expected = stats.multivariate_normal(cov=k).logpdf(np.array(Y_C * 2))
    # Two equal y at one x: a density of e^13 or so, with a condition number near 1e9.
    assert found == pytest.approx(expected, rel=1e-5)


def test_where_the_spread_vanishes_all_nodes_weigh_one_together():
    """Below rounding every node is the location: the evidence is the likelihood there."""
    support, _ = ragged()
    model = models.GaussianProcess("rbf", scale=1.0, noise=0.2)
    fit = fitted(model, support, ExactGP(prior=True))
    problem, batch = fit.problem, fit.problem.batch(support)
    theta = dict(fit.theta) | {"lengthscale_spread": torch.tensor(-60.0, dtype=torch.float64)}
    evidence = fit.strategy._weighted(problem, theta, batch)[1].logsumexp(0)
    at_location = problem.log_likelihood(theta, problem.location(theta, batch), batch)
    torch.testing.assert_close(evidence, at_location, rtol=1e-9, atol=1e-9)


def test_evidence_is_the_same_for_any_layout_of_chunks(monkeypatch):
    support, _ = ragged()
    fit = fitted(uncertain(), support)
    whole = fit.adapt(support).info["log_evidence"]
    monkeypatch.setattr("hbmeta.inference.quadrature._NUMBERS", 500)
    torch.testing.assert_close(fit.adapt(support).info["log_evidence"], whole, rtol=1e-12, atol=0)


def test_same_seed_same_bits_and_no_trace(untouched):
    support, query = ragged()
    with untouched():
        runs = [fitted(uncertain(), support).adapt(support).predict(query) for _ in range(2)]
        draws = [run.sample(5, seed=1) for run in runs]
    assert torch.equal(runs[0].mean, runs[1].mean)
    assert torch.equal(*draws)
