"""Laplace with effects of level 1 integrated out, where all is Gaussian: against dense algebra."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.optimize
import scipy.stats
import torch

import hbmeta as hb
from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.inference import Laplace
from hbmeta.standard_errors import standard_errors
from hbmeta.tasks import Tasks

PERSONS, ITEMS, ROWS = 8, 5, 150
INTEGRATED = ("mu", "item")


def ratings(x, y=None, *, task, n_tasks):
    zero = x.new_zeros(())
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    item = pyro.sample("item", dist.Normal(zero, tau).expand([ITEMS]).to_event(1))
    with pyro.plate("task", n_tasks):
        person = pyro.sample("person", dist.Normal(zero, spread))
    with pyro.plate("point", x.shape[0]):
        pyro.sample("y", dist.Normal(mu + item[x[:, 0].long()] + person[task], sigma), obs=y)


def data(persons=PERSONS, rows=ROWS):
    rng = np.random.default_rng(3)
    task, item = rng.integers(0, persons, rows), rng.integers(0, ITEMS, rows)
    effects = 0.8 * rng.standard_normal(ITEMS), 0.5 * rng.standard_normal(persons)
    y = 1.0 + effects[0][item] + effects[1][task] + 0.6 * rng.standard_normal(rows)
    return Tasks.from_flat(item[:, None].astype(float), y, task, persons)


def columns(tasks):
    """Rows of 1, items and persons."""
    item, task = tasks.flat_x[:, 0].long().numpy(), tasks.task.numpy()
    return np.column_stack([np.ones(len(item)), np.eye(ITEMS)[item], np.eye(PERSONS)[task]])


def prior_sds(tau, spread):
    return np.concatenate([[3.0], np.full(ITEMS, tau), np.full(PERSONS, spread)])


def log_evidence(logs, tasks):
    """log p(y, ψ) of the logarithms of τ, spread and σ, by one Gaussian over all rows."""
    tau, spread, sigma = np.exp(logs)
    z = columns(tasks) * prior_sds(tau, spread)
    covariance = z @ z.T + sigma**2 * np.eye(len(z))
    value = scipy.stats.multivariate_normal(np.zeros(len(z)), covariance).logpdf(tasks.flat_y)
    return value + (scipy.stats.halfnorm.logpdf(np.exp(logs)) + logs).sum()


@pytest.fixture(scope="module")
def fitted():
    return Laplace(integrated=INTEGRATED).fit(ratings, data(), compile=False)


def test_scales_are_at_the_maximum_of_the_evidence(fitted):
    tasks = fitted.tasks
    found = np.array([float(fitted.theta[name][0]) for name in ("tau", "spread", "sigma")])
    best = scipy.optimize.minimize(
        lambda logs: -log_evidence(logs, tasks), found + 0.1, options={"gtol": 1e-7}
    )
    # The search ends at 1e-6 nats per row and unit; the curvature is of the order of the rows.
    np.testing.assert_allclose(found, best.x, atol=1e-4)
    assert fitted.info["log_evidence"] == pytest.approx(log_evidence(found, tasks), abs=1e-6)
    assert fitted.info["mode_found"]
    assert fitted.drawn
    assert len(fitted.theta["tau"].unique()) == 1


def test_draws_are_those_of_the_conditional_gaussian(fitted):
    tau, spread, sigma = (float(fitted.theta[n][0].exp()) for n in ("tau", "spread", "sigma"))
    z = columns(fitted.tasks)
    precision = z.T @ z / sigma**2 + np.diag(prior_sds(tau, spread) ** -2.0)
    covariance = np.linalg.inv(precision)
    mean = covariance @ z.T @ fitted.tasks.flat_y.numpy() / sigma**2
    theta, phi = fitted.theta, fitted.density.phi[..., 0]
    draws = torch.cat([theta["mu"].unsqueeze(-1), theta["item"], phi], -1).numpy()
    error = np.sqrt(np.diag(covariance) / len(draws))
    # 14 means within 5 standard errors: fails once in 10⁵ seeds.
    assert (np.abs(draws.mean(0) - mean) < 5 * error).all()
    # Entries of a covariance of 1,000 draws: an error of at most √(2/1000) of the sds' product.
    scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    assert (np.abs(np.cov(draws.T) - covariance) < 5 * np.sqrt(2 / len(draws)) * scale).all()


def test_new_persons_weigh_the_draws(fitted):
    tasks = fitted.tasks
    new = Tasks.from_flat(tasks.flat_x[:6], tasks.flat_y[:6], torch.zeros(6).long(), 1, ids=["z"])
    posterior = fitted.adapt(new)
    assert posterior.drawn
    assert float(posterior.info["effective_draws"]) > 100
    assert torch.isfinite(posterior.moments()["person"][0]).all()


def test_a_fit_comes_back_from_its_file(fitted, tmp_path):
    fitted.save(tmp_path / "fit")
    again = hb.load(tmp_path / "fit", model=ratings)
    assert again.strategy == fitted.strategy
    torch.testing.assert_close(again.posterior.density.phi, fitted.posterior.density.phi)


def test_effects_that_are_left_at_a_point_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"'item', whose scale.*integrated=\('item',\)"):
        Laplace(integrated="mu").fit(ratings, data(), compile=False)


def test_settings_that_cannot_go_together():
    with pytest.raises(DataError, match=r"'rows'.*φ is integrated out"):
        Laplace(integrated=("item", "rows")).fit(ratings, data(), compile=False)
    for other in ({"prior": False}, {"curvature": "ggn"}, {"damping": 0.1}):
        with pytest.raises(DataError, match="integrated"):
            Laplace(integrated=INTEGRATED, **other)


def test_standard_errors_want_a_point(fitted):
    with pytest.raises(UnsupportedModelError, match=r"draws of it.*'item'"):
        standard_errors(fitted)
