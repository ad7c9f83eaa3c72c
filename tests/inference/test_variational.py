"""Variational inference where the answer is known, in float64; what it refines, saves and holds."""

import functools
import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import hbmeta
from hbmeta.errors import DataError, FileError
from hbmeta.families import Flow, LowRank
from hbmeta.inference import AmortizedGuide, ExactLinear, Variational
from hbmeta.tasks import Tasks
from hbmeta.variational import Bound
from tests.cases import case
from tests.test_training import interrupted_and_resumed, same_bits

LINEAR = ("linear_own_nested", "linear_own_flat")


def fit(strategy, name, **settings):
    settings = {"steps": 2, "compile": False, "progress": False} | settings
    return strategy.fit(case(name).program, case(name).tasks, **settings)


@functools.cache
def exact(name):
    return fit(ExactLinear(), name).posterior.density


# Linear-Gaussian programs


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("family", ["full", "low_rank"])
def test_a_family_that_holds_the_posterior_finds_it(name, family):
    """Low rank with rank phi_size − 1 too. 1e-6: the tolerance of the search, in posterior sds."""
    fitted = fit(Variational(family=family, rank=1), name)
    for posterior in (fitted.posterior, fitted.adapt(case(name).tasks)):
        found, wanted = posterior.density, exact(name)
        torch.testing.assert_close(found.mean, wanted.mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.covariance, wanted.covariance, rtol=0, atol=1e-6)
    # The bound is then the evidence, to the square of that.
    evidence = torch.from_numpy(case(name).log_evidence)
    torch.testing.assert_close(posterior.info["bound"], evidence, rtol=0, atol=1e-9)
    assert bool(posterior.info["met"].all())


@pytest.mark.parametrize("name", LINEAR)
def test_mean_field_has_the_variances_given_all_else(name):
    """1/Λ_jj, at most the posterior's own; the ELBO is below the evidence by KL(q ‖ p)."""
    posterior = fit(Variational(family="diagonal"), name).adapt(case(name).tasks)
    found, wanted = posterior.density, exact(name)
    precision = torch.linalg.inv(wanted.covariance).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(found.mean, wanted.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.sd.square(), 1 / precision, rtol=1e-6, atol=0)
    assert bool((found.sd < 0.999 * wanted.sd).any())
    evidence = torch.from_numpy(case(name).log_evidence)
    gap = evidence - posterior.info["bound"]
    torch.testing.assert_close(gap, found.kl(wanted), rtol=1e-6, atol=1e-9)
    assert float(gap.min()) > 1e-4


def test_importance_weights_close_the_gap_with_k():
    """At a mean-field q, over groups of 1, 4 and 16 of 32,000 draws.

    Every step up is at least 0.04 nats, ten standard errors of the means here: no false alarm
    (probability below 1e-20).
    """
    name = "linear_own_nested"
    fitted = fit(Variational(family="diagonal"), name)
    density, batch = fitted.posterior.density, fitted.problem.batch(fitted.tasks)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((32_000, *density.loc.shape), generator=generator, dtype=torch.float64)
    phi = density.draw(noise)
    likelihood, local, _ = torch.vmap(lambda p: fitted.problem.terms(fitted.theta, p, batch))(phi)
    log_w = likelihood + local - density.log_prob(phi)
    values = [float(Bound(0.0, k).average(log_w).sum()) for k in (1, 4, 16)]
    elbo, evidence = float(log_w.mean(0).sum()), float(case(name).log_evidence.sum())
    assert values[0] == pytest.approx(elbo, abs=1e-9)
    assert np.diff([*values, evidence]).min() > 0.01
    # Every order between lies between.
    half = float(Bound(0.5, 16).average(log_w).sum())
    assert elbo < half < values[2]


@pytest.mark.parametrize("settings", [{"objective": "iwae"}, {"objective": "renyi", "alpha": 0.3}])
def test_other_bounds_stay_where_q_is_exact(settings):
    """Their gradients have no noise there, so that Adam does not move q: 1e-6."""
    name = "linear_own_nested"
    fitted = fit(Variational(family="full", steps=40, **settings), name)
    found = fitted.adapt(case(name).tasks)
    torch.testing.assert_close(found.density.mean, exact(name).mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.density.covariance, exact(name).covariance, rtol=0, atol=1e-6)
    evidence = torch.from_numpy(case(name).log_evidence)
    torch.testing.assert_close(found.info["bound"], evidence, rtol=0, atol=1e-9)


def test_orders_one_and_zero_are_the_elbo_and_the_weighted_bound():
    name = "gamma_poisson"
    tasks = case(name).tasks
    fitted = fit(Variational(family="diagonal"), name)
    pairs = (
        ({"objective": "renyi", "alpha": 1.0}, {"objective": "elbo"}),
        ({"objective": "renyi", "alpha": 0.0}, {"objective": "iwae"}),
    )
    for one, other in pairs:
        a, b = (fitted.adapt(tasks, steps=30, **settings) for settings in (one, other))
        torch.testing.assert_close(a.info["bound"], b.info["bound"])
        torch.testing.assert_close(a.density.loc, b.density.loc)
        torch.testing.assert_close(a.density.scale, b.density.scale)


# θ


@functools.cache
def type_two():
    return fit(ExactLinear(prior=True), "varying_intercepts", compile="graph")


def test_theta_at_a_point_is_the_mode_of_its_posterior():
    """With a full q the bound is the evidence: the same θ as by L-BFGS on that (its gtol: 1e-5)."""
    fitted = fit(Variational(), "varying_intercepts")
    for name, wanted in type_two().theta.items():
        torch.testing.assert_close(fitted.theta[name], wanted, rtol=0, atol=1e-4)
    found, wanted = fitted.posterior.density, type_two().posterior.density
    torch.testing.assert_close(found.mean, wanted.mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.sd, wanted.sd, rtol=1e-3, atol=0)
    assert float(fitted.info["bound"].sum()) == pytest.approx(
        type_two().info["log_evidence"], abs=1e-3
    )


def test_eight_schools_written_either_way():
    """The marginal mode of τ is 3.63; the joint mode of the centered program is at 0."""
    found = {
        name: fit(Variational(), name).globals()
        for name in ("eight_schools", "eight_schools_centered")
    }
    for values in found.values():
        assert float(values["tau"]) == pytest.approx(3.63, abs=0.01)
        assert float(values["mu"]) == pytest.approx(4.47, abs=0.01)


@pytest.mark.slow
def test_minibatches_of_tasks_lead_to_the_same_theta():
    """Noise of minibatches is left in θ: 0.1 in units of log or of y, a quarter of its own sd.

    A prior that was counted once per minibatch, in place of once, or a bound that was not scaled
    would move log-scales by more: 2.5 times the prior's weight shrinks them by over 0.2.
    """
    fitted = fit(Variational(), "varying_intercepts", tasks_per_step=2, steps=6000, compile="graph")
    for name, wanted in type_two().theta.items():
        torch.testing.assert_close(fitted.theta[name], wanted, rtol=0, atol=0.1)
    # Every task has its own q, whichever tasks the steps saw.
    density = fitted.posterior.density
    assert density.loc.shape[0] == case("varying_intercepts").tasks.n_tasks
    torch.testing.assert_close(density.mean, type_two().posterior.density.mean, rtol=0, atol=0.1)


MU_SD, PHI_SD, NOISE = 2.0, 0.8, 0.5


def normal_means(x, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, MU_SD))
    with pyro.plate("task", x.shape[0], dim=-2):
        phi = pyro.sample("phi", dist.Normal(mu, PHI_SD))
        with pyro.plate("point", x.shape[1], dim=-1):
            return pyro.sample("y", dist.Normal(phi + 0 * x[..., 0], NOISE), obs=y)


def means_data():
    rng = np.random.default_rng(0)
    counts = (3, 1, 4, 2)
    task = np.repeat(np.arange(4), counts)
    y = 1.0 + rng.normal(0, PHI_SD, 4)[task] + rng.normal(0, NOISE, len(task))
    return Tasks.from_flat(np.zeros((len(task), 1)), y, task, 4)


@functools.cache
def joint_fit():
    strategy = Variational(theta="distribution")
    return strategy.fit(normal_means, means_data(), steps=2, compile=False, progress=False)


def joint_truth():
    """Mean and covariance of (μ, φ_1..φ_4 | y), from the joint precision."""
    tasks = means_data()
    counts = tasks.counts.double().numpy()
    total = np.bincount(tasks.task.numpy(), tasks.flat_y.numpy())
    precision = np.zeros((5, 5))
    precision[0, 0] = 1 / MU_SD**2 + 4 / PHI_SD**2
    precision[0, 1:] = precision[1:, 0] = -1 / PHI_SD**2
    precision[np.arange(1, 5), np.arange(1, 5)] = 1 / PHI_SD**2 + counts / NOISE**2
    covariance = np.linalg.inv(precision)
    return covariance @ np.r_[0.0, total / NOISE**2], covariance


def test_a_distribution_of_theta_is_exact_where_all_is_gaussian():
    """q(μ) Π q(φ_i | μ) holds the joint posterior, correlations between tasks among it: 1e-6."""
    own = joint_fit().own
    root = torch.cat([own.theta_scale, own.slope[:, 0]], 0)
    covariance = root @ root.T
    covariance[1:, 1:] += torch.diag(own.scale[:, 0, 0].square())
    mean, wanted = joint_truth()
    found = torch.cat([own.theta_loc, own.loc[:, 0]]).numpy()
    np.testing.assert_allclose(found, mean, atol=1e-6, rtol=0)
    np.testing.assert_allclose(covariance.numpy(), wanted, atol=1e-6, rtol=0)


def effects(x, y=None):
    """μ and 70 level-1 values, more than have a full q(θ), beside one φ per task."""
    mu = pyro.sample("mu", dist.Normal(0.0, MU_SD))
    shared = pyro.sample("shared", dist.Normal(torch.zeros(70).to(x), PHI_SD).to_event(1))
    with pyro.plate("task", x.shape[0], dim=-2):
        phi = pyro.sample("phi", dist.Normal(mu, PHI_SD))
        with pyro.plate("point", x.shape[1], dim=-1):
            mean = phi + shared[x[..., 0].long()]
            return pyro.sample("y", dist.Normal(mean, NOISE), obs=y)


def test_a_long_theta_has_no_slope_for_every_value():
    """φ stays linear in μ; q of what is seen once is that of its own posterior given the rest.

    Every value of `shared` is seen once: precision 1/0.8² + 1/0.5² given φ. 5 % is the rest of
    Adam's noise; it is seeded.
    """
    rng = np.random.default_rng(0)
    x = np.arange(70.0).reshape(7, 10, 1)
    tasks = Tasks(x, rng.normal(0, 1.5, (7, 10)))
    strategy = Variational(theta="distribution")
    fitted = strategy.fit(effects, tasks, steps=600, compile=False, progress=False)
    assert fitted.own.slope.shape == (7, 1, 1)
    assert fitted.own.theta_scale.shape == (71,)
    sd = (1 / PHI_SD**2 + 1 / NOISE**2) ** -0.5
    assert float(fitted.own.theta_scale[1:].mean()) == pytest.approx(sd, rel=0.05)
    residual = tasks.y - fitted.own.loc[:, :1]
    wanted = (residual / NOISE**2 * sd**2).flatten()
    assert float((fitted.own.theta_loc[1:] - wanted).abs().mean()) < 0.1 * sd
    assert math.isfinite(fitted.info["bound"])
    assert "residual" not in fitted.info


def test_its_draws_are_pairs_of_theta_and_phi():
    """1,000 draws: means within 4.5 standard errors, 5 of them: a false alarm at 3e-5.

    The correlation of μ and φ_1 has standard error (1 − ρ²)/√1000, of which 5 are allowed.
    """
    fitted = joint_fit()
    mean, covariance = joint_truth()
    draws = torch.cat([fitted.theta["mu"].unsqueeze(1), fitted.posterior.density.phi[..., 0]], 1)
    error = np.sqrt(np.diag(covariance) / 1000)
    assert fitted.drawn
    assert bool((np.abs(draws.mean(0).numpy() - mean) < 4.5 * error).all())
    rho = covariance[0, 1] / math.sqrt(covariance[0, 0] * covariance[1, 1])
    found = float(torch.corrcoef(draws[:, :2].T)[0, 1])
    assert abs(found - rho) < 5 * (1 - rho**2) / math.sqrt(1000)


def test_new_tasks_weigh_the_draws_of_theta():
    """A task with y = 3: φ against the exact posterior of all five tasks, 0.15 of its sd."""
    fitted = joint_fit()
    new = Tasks([[[0.0], [0.0]]], [[3.0, 2.6]], ids=["new"])
    posterior = fitted.adapt(new)
    mean, covariance = joint_truth()
    # Given μ: precision 1/0.64 + 2/0.25; then one more observation of μ.
    slope = (1 / PHI_SD**2) / (1 / PHI_SD**2 + 2 / NOISE**2)
    spread = PHI_SD**2 + NOISE**2 / 2
    variance = 1 / (1 / covariance[0, 0] + 1 / spread)
    mu = variance * (mean[0] / covariance[0, 0] + 2.8 / spread)
    wanted = slope * mu + (1 - slope) * 2.8
    sd = math.sqrt(slope**2 * variance + 1 / (1 / PHI_SD**2 + 2 / NOISE**2))
    found_mean, found_sd = posterior.moments()["phi"]
    assert float(found_mean) == pytest.approx(wanted, abs=0.15 * sd)
    assert float(found_sd) == pytest.approx(sd, rel=0.15)
    # Tasks of the fit keep its draws.
    assert fitted.adapt(means_data()) is fitted.posterior


# Tasks without rows, and other families


def test_no_rows_give_the_prior():
    name = "linear_own_nested"
    fitted = fit(Variational(), name)
    empty = case(name).tasks.keep(torch.zeros(case(name).tasks.n_points, dtype=torch.bool))
    density = fitted.adapt(empty).density
    mean = torch.tensor([[0.5, -1.0]] * 4, dtype=torch.float64)
    covariance = torch.tensor([[[1.0, 0.3], [0.3, 0.5]]] * 4, dtype=torch.float64)
    torch.testing.assert_close(density.mean, mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(density.covariance, covariance, rtol=0, atol=1e-9)


def banana(x, y=None):
    """y ~ N(b + a², 0.2²): given y, b ≈ y − a² all along a."""
    with pyro.plate("task", x.shape[0], dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("point", x.shape[1], dim=-1):
            return pyro.sample("y", dist.Normal(b + a**2 + 0 * x[..., 0], 0.2), obs=y)


def test_a_flow_bends_where_a_gaussian_cannot():
    """log p(y) by a grid; the flow leaves less than half of the gap that the best Gaussian does."""
    data = Tasks([[[0.0]], [[0.0]]], [[0.5], [-0.5]])
    fitted = Variational().fit(banana, data, steps=1, compile=False, progress=False)
    gaussian = fitted.adapt(data)
    bent = fitted.adapt(data, family="flow", steps=400, draws=32)
    a, b = torch.meshgrid(*[torch.linspace(-7, 7, 1401).double()] * 2, indexing="ij")
    log_prior = -0.5 * (a**2 + b**2) - math.log(2 * math.pi)
    for task, y in enumerate((0.5, -0.5)):
        log_y = -0.5 * ((y - b - a**2) / 0.2) ** 2 - math.log(0.2 * math.sqrt(2 * math.pi))
        evidence = float((log_prior + log_y).flatten().logsumexp(0)) + 2 * math.log(0.01)
        left, before = (evidence - float(p.info["bound"][task]) for p in (bent, gaussian))
        # Quasi-random averages of 128 draws may be a few hundredths of a nat off.
        assert -0.1 < left < 0.5 * before
        assert before > 0.2
    assert isinstance(bent.density, Flow)


# Semi-amortized


@functools.cache
def amortized():
    with warnings.catch_warnings():  # θ still moves after so few steps
        warnings.simplefilter("ignore")
        return fit(AmortizedGuide(hidden=16), "two_coefficients", steps=100, compile="graph")


def test_refining_closes_the_gap_that_amortization_leaves():
    """Given θ the program is linear-Gaussian, so that the truth is known: KL falls to 1e-9."""
    fitted, tasks = amortized(), case("two_coefficients").tasks
    truth = (
        ExactLinear()
        .posterior(fitted.problem, fitted.theta, None, fitted.problem.batch(tasks))
        .detach()
    )
    found = [Variational().refine(fitted, steps=steps).adapt(tasks) for steps in (0, 2, None)]
    guide = fitted.adapt(tasks).density
    torch.testing.assert_close(found[0].density.loc, guide.loc)
    torch.testing.assert_close(found[0].density.scale, guide.scale)
    gaps = torch.stack([posterior.density.kl(truth) for posterior in found])
    assert float(gaps[0].min()) > 0.005
    assert bool((gaps[1] < 0.5 * gaps[0]).all())
    assert float(gaps[2].max()) < 1e-9
    bounds = torch.stack([posterior.info["bound"] for posterior in found])
    assert bool((bounds.diff(dim=0) > -1e-9).all())
    # E log p is quadratic, so that fixed noise gives the bound itself: the gap is the KL.
    torch.testing.assert_close(bounds[2] - bounds[0], gaps[0] - gaps[2], rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore:AmortizedGuide. theta was still moving")
def test_a_fit_may_be_amortized_from_the_start(tmp_path):
    strategy = Variational(amortized=True, encoder={"hidden": 8}, steps=1)
    fitted = fit(strategy, "two_coefficients", steps=5)
    tasks = case("two_coefficients").tasks
    fitted.save(tmp_path / "fit.safetensors")
    again = hbmeta.load(tmp_path / "fit.safetensors", model=case("two_coefficients").program)
    assert again.strategy == strategy
    torch.testing.assert_close(again.adapt(tasks).density.loc, fitted.adapt(tasks).density.loc)


@pytest.mark.filterwarnings("ignore:AmortizedGuide. theta was still moving")
def test_the_encoder_is_that_of_the_fit_in_every_family():
    fitted = fit(Variational(amortized=True, family="full", steps=0), "two_coefficients", steps=5)
    tasks = case("two_coefficients").tasks
    full, diagonal = fitted.adapt(tasks).density, fitted.adapt(tasks, family="diagonal").density
    assert full.scale.ndim == 3
    assert diagonal.scale.ndim == 2
    assert torch.equal(full.loc, diagonal.loc)
    with pytest.raises(DataError, match="found encoder="):
        fitted.adapt(tasks, encoder={"covariance": "diagonal"})


# Files, seeds and what cannot be


@pytest.mark.parametrize(
    ("settings", "kind"),
    [({"family": "low_rank", "rank": 1}, LowRank), ({"family": "flow", "steps": 3}, Flow)],
)
def test_densities_of_other_kinds_come_back(settings, kind, tmp_path):
    name = "linear_own_flat"
    fitted = fit(Variational(**settings), name)
    fitted.save(tmp_path / "fit.safetensors")
    again = hbmeta.load(tmp_path / "fit.safetensors", model=case(name).program)
    for a, b in ((again, fitted), (again.posterior, fitted.posterior)):
        assert repr(a).split(", seconds")[0] == repr(b).split(", seconds")[0]
    assert isinstance(again.posterior.density, kind)
    for key, value in vars(fitted.posterior.density).items():
        assert torch.equal(getattr(again.posterior.density, key), value)


def test_a_joint_density_comes_back(tmp_path):
    joint_fit().save(tmp_path / "fit.safetensors")
    again = hbmeta.load(tmp_path / "fit.safetensors", model=normal_means)
    assert torch.equal(again.theta["mu"], joint_fit().theta["mu"])
    for name, value in joint_fit().own.state_dict().items():
        assert torch.equal(again.own.state_dict()[name], value)


@pytest.mark.parametrize(
    "settings",
    [{}, {"family": "flow", "steps": 3}, {"objective": "iwae", "steps": 3}],
    ids=["full", "flow", "iwae"],
)
def test_the_seed_tells_and_the_caller_does_not(settings, untouched):
    name = "gamma_poisson"
    with untouched():
        first, second = (fit(Variational(**settings), name, seed=5) for _ in range(2))
        found = [f.adapt(case(name).tasks, seed=1).density for f in (first, second)]
    for key, value in vars(found[0]).items():
        assert torch.equal(getattr(found[1], key), value)


def test_orders_of_points_do_not_matter():
    name = "gamma_poisson"
    fitted, tasks = fit(Variational(), name), case(name).tasks
    order = torch.arange(tasks.n_points).flip(0)
    turned = Tasks.from_flat(
        tasks.flat_x[order], tasks.flat_y[order], tasks.task[order], 4, ids=tasks.ids,
        features=tasks.features,
    )  # fmt: skip
    found, wanted = fitted.adapt(turned).density, fitted.adapt(tasks).density
    torch.testing.assert_close(found.loc, wanted.loc, rtol=0, atol=1e-7)


def test_counts_under_a_wide_prior_do_not_overflow():
    """exp(φ) at two prior standard deviations is infinite here: q starts narrower."""

    def program(x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            rate = pyro.sample("log_rate", dist.Normal(0.0, 400.0))
            with pyro.plate("point", x.shape[1], dim=-1):
                return pyro.sample("y", dist.Poisson(rate.exp() + 0 * x[..., 0]), obs=y)

    data = Tasks(np.zeros((2, 6, 1)), [[3.0, 4, 2, 5, 3, 4], [60.0, 55, 70, 62, 58, 61]])
    fitted = Variational().fit(program, data, steps=1, compile=False, progress=False)
    density = fitted.posterior.density
    # The Gamma(Σy, n) posterior of the rate: log rate near log mean y, sd near 1/√Σy.
    total = data.y.sum(-1)
    torch.testing.assert_close(density.loc[:, 0], (total / 6).log(), rtol=0, atol=0.05)
    torch.testing.assert_close(density.sd[:, 0], total.rsqrt(), rtol=0.1, atol=0)


@pytest.mark.parametrize("theta", ["point", "distribution"])
@pytest.mark.parametrize("tasks_per_step", [None, 2])
def test_an_interrupted_fit_resumes_to_the_same_bits(theta, tasks_per_step, tmp_path, monkeypatch):
    strategy, path = Variational(theta=theta), tmp_path / "checkpoint.safetensors"
    settings = {"steps": 25, "tasks_per_step": tasks_per_step, "compile": False, "progress": False}
    with warnings.catch_warnings():
        # 25 steps of minibatches are few.
        warnings.simplefilter("ignore")
        whole = strategy.fit(normal_means, means_data(), **settings)
        resumed = interrupted_and_resumed(
            strategy, normal_means, means_data(), path, monkeypatch, **settings
        )
    same_bits(resumed, whole)
    with pytest.raises(FileError, match="the checkpoint of this very fit"):
        Variational(theta=theta, draws=9).fit(
            normal_means, means_data(), checkpoint=path, **settings
        )


def test_settings_of_an_encoder_do_not_cost_the_hash():
    one, other = (Variational(amortized=True, encoder={"hidden": 4}) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != Variational(amortized=True, encoder={"hidden": 5})
