"""What a posterior gives out, against SciPy and dense formulas."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from hbmeta import posterior as posterior_module
from hbmeta import problem as problem_module
from hbmeta.densities import Delta, Empirical, Gaussian
from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.inference import AmortizedGuide
from hbmeta.posterior import TaskPosterior, Units
from hbmeta.problem import Problem
from hbmeta.tasks import Tasks
from tests import cases, fits, reference


def rates(x, y=None):
    """A positive local site and a real vector."""
    with pyro.plate("task", x.shape[0], dim=-2):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.deterministic("squared", rate.square())
        with pyro.plate("point", x.shape[1], dim=-1):
            mean = rate * x[..., 0] + shift.sum(-1)
            return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def rates_flat(x, y=None, *, task, n_tasks):
    with pyro.plate("task", n_tasks, dim=-1):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.deterministic("squared", rate.square())
    with pyro.plate("point", x.shape[0], dim=-1):
        mean = rate[task] * x[..., 0] + shift[task].sum(-1)
        return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def shares(x, y=None):
    """A local site on the simplex."""
    with pyro.plate("task", x.shape[0], dim=-2):
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("point", x.shape[1], dim=-1):
            return pyro.sample("y", dist.Normal(share[..., 0], 0.5), obs=y)


def ragged() -> Tasks:
    rng = np.random.default_rng(0)
    counts = (2, 4, 1)
    rows = sum(counts)
    return Tasks.from_flat(
        rng.standard_normal((rows, 1)),
        rng.standard_normal(rows),
        np.repeat(np.arange(3), counts),
        3,
        ids=["a", "b", "c"],
    )


def gaussian(tasks: int, size: int, *, seed=0, diagonal=False) -> Gaussian:
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((tasks, size, size)) * 0.4
    covariance = torch.tensor(root @ root.transpose(0, 2, 1) + 0.1 * np.eye(size))
    tril = torch.linalg.cholesky(covariance)
    scale = tril.diagonal(dim1=-2, dim2=-1) if diagonal else tril
    return Gaussian(torch.tensor(rng.standard_normal((tasks, size))), scale)


def build(program=rates, *, density=None, **more) -> TaskPosterior:
    tasks = ragged()
    problem = Problem(program, tasks)
    size = problem.sites.phi_size
    return TaskPosterior(problem, {}, density or gaussian(3, size), tasks, **more)


# Draws and moments


@pytest.mark.parametrize("program", [rates, rates_flat])
def test_draws_are_those_of_the_density_pushed_through_the_supports(program):
    posterior = build(program)
    n = 20_000
    draws = posterior.sample(n, seed=3)
    assert {k: tuple(v.shape) for k, v in draws.items()} == {
        "rate": (n, 3),
        "shift": (n, 3, 2),
        "squared": (n, 3),
    }
    loc, sd = posterior.density.mean, posterior.density.sd
    unconstrained = torch.cat([draws["rate"].log()[..., None], draws["shift"]], -1)
    # 9 means and 9 sds at 5 standard errors: false-alarm rate below 2e-5.
    assert bool(((unconstrained.mean(0) - loc).abs() < 5 * sd / n**0.5).all())
    assert bool(((unconstrained.std(0) / sd - 1).abs() < 5 / (2 * n) ** 0.5).all())
    torch.testing.assert_close(draws["squared"], draws["rate"].square())


def test_draws_are_a_function_of_the_seed(untouched):
    posterior = build()
    with untouched():
        first, again, other = (posterior.sample(10, seed=s)["rate"] for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("diagonal", [False, True])
def test_moments_are_those_of_the_sites(diagonal):
    density = gaussian(3, 3, diagonal=diagonal)
    mean, sd = build(density=density).moments(draws=40_000)["rate"]
    loc, variance = density.loc[:, 0], density.sd[:, 0].square()
    expected = torch.exp(loc + variance / 2)
    spread = expected * torch.expm1(variance).sqrt()
    # 3 means at 5 standard errors: false-alarm rate below 2e-6; sds of a log-normal to 5 %.
    assert bool(((mean - expected).abs() < 5 * spread / 200).all())
    torch.testing.assert_close(sd, spread, rtol=0.05, atol=0.0)


def test_weighted_draws_have_weighted_moments_and_are_drawn_by_weight():
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(50, 3, 3, generator=generator, dtype=torch.float64)
    log_weights = 2 * torch.randn(50, 3, generator=generator, dtype=torch.float64)
    posterior = build(density=Empirical(phi, log_weights))
    weights = log_weights.softmax(0)
    rate = phi[..., 0].exp()
    mean = (weights * rate).sum(0)
    sd = (weights * (rate - mean).square()).sum(0).sqrt()
    found_mean, found_sd = posterior.moments()["rate"]
    torch.testing.assert_close(found_mean, mean)
    torch.testing.assert_close(found_sd, sd)
    n = 20_000
    drawn = posterior.sample(n)["rate"]
    # 3 means at 5 standard errors: false-alarm rate below 2e-6.
    assert bool(((drawn.mean(0) - mean).abs() < 5 * sd / n**0.5).all())


def test_few_draws_of_many_weighted_ones_use_all_of_them():
    """All of the weight on one draw that thinning to five would leave out."""
    phi = torch.arange(100.0).double()[:, None, None].expand(100, 3, 3) / 100
    log_weights = torch.full((100, 3), -torch.inf).double()
    log_weights[37] = 0.0
    drawn = build(density=Empirical(phi, log_weights)).sample(5)["shift"]
    torch.testing.assert_close(drawn, torch.full_like(drawn, 0.37))


def test_stored_draws_come_whole_thinned_or_with_replacement():
    phi = torch.randn(20, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    posterior = build(density=Empirical(phi))
    torch.testing.assert_close(posterior.sample(20)["shift"], phi[..., 1:])
    thinned = posterior.sample(5)["shift"]
    torch.testing.assert_close(thinned, phi[[0, 5, 10, 14, 19], ..., 1:])
    more = posterior.sample(60)["shift"]
    stored = {tuple(row) for row in phi[:, 0, 1:].tolist()}
    assert more.shape == (60, 3, 2)
    assert {tuple(row) for row in more[:, 0].tolist()} <= stored


def test_a_point_has_no_spread():
    loc = gaussian(3, 3).loc
    posterior = build(density=Delta(loc))
    mean, sd = posterior.moments()["rate"]
    torch.testing.assert_close(mean, loc[:, 0].exp())
    assert torch.equal(sd, torch.zeros_like(sd))
    torch.testing.assert_close(posterior.sample(4)["rate"], loc[:, 0].exp().expand(4, 3))


def test_no_draws_are_refused():
    with pytest.raises(DataError, match="n of 1 or more"):
        build().sample(0)


# Densities


@pytest.mark.parametrize("program", [rates, rates_flat])
def test_log_prob_is_that_of_the_sites_with_the_jacobian(program):
    posterior = build(program)
    draws = posterior.sample(6)
    found = posterior.log_prob(draws)
    assert found.shape == (6, 3)
    unconstrained = torch.cat([draws["rate"].log()[..., None], draws["shift"]], -1).numpy()
    for i in range(3):
        normal = stats.multivariate_normal(
            posterior.density.loc[i].numpy(), posterior.density.covariance[i].numpy()
        )
        # The density of r = exp(u) is that of u over |dr/du| = r.
        expected = normal.logpdf(unconstrained[:, i]) - draws["rate"][:, i].log().numpy()
        np.testing.assert_allclose(found[:, i], expected, rtol=1e-10)


def test_log_prob_of_independent_sites_is_a_log_normal():
    density = gaussian(3, 3, diagonal=True)
    posterior = build(density=density)
    rate = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    found = posterior.log_prob({"rate": rate, "shift": torch.zeros(3, 2)})
    loc, sd = density.loc.numpy(), density.scale.numpy()
    expected = stats.lognorm(sd[:, 0], scale=np.exp(loc[:, 0])).logpdf(rate.numpy())
    expected += stats.norm(loc[:, 1:], sd[:, 1:]).logpdf(0.0).sum(1)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_log_prob_on_a_simplex_integrates_to_one():
    density = Gaussian(torch.zeros(3, 2).double(), 0.5 * torch.ones(3, 2).double())
    posterior = build(shares, density=density)
    grid = (torch.arange(200) + 0.5).double() / 200
    a, b = torch.meshgrid(grid, grid, indexing="ij")
    inside = a + b < 1
    points = torch.stack([a[inside], b[inside], (1 - a - b)[inside]], -1)
    log_prob = posterior.log_prob({"share": points[:, None].expand(-1, 3, 3)})
    total = log_prob.exp().sum(0) / 200**2
    # The midpoint rule on this smooth density, zero at the edges, errs by less than 1e-3.
    torch.testing.assert_close(total, torch.ones(3).double(), rtol=0, atol=1e-3)


def test_log_prob_wants_all_sites():
    with pytest.raises(DataError, match="no 'shift'"):
        build().log_prob({"rate": torch.ones(3)})


@pytest.mark.parametrize("name", ["NUTS", "MAML"])
def test_points_and_draws_have_no_density(name):
    posterior = fits.fitted(name).posterior
    with pytest.raises(UnsupportedModelError, match="a posterior with a density"):
        posterior.log_prob(posterior.sample(3))


def test_kl_is_the_closed_form_and_the_mean_of_the_log_ratio():
    first, second = build(), build(density=gaussian(3, 3, seed=5))
    found = first.kl(second)
    for i in range(3):
        m, c = first.density.loc[i].numpy(), first.density.covariance[i].numpy()
        n, d = second.density.loc[i].numpy(), second.density.covariance[i].numpy()
        inverse = np.linalg.inv(d)
        expected = 0.5 * (
            np.trace(inverse @ c)
            + (n - m) @ inverse @ (n - m)
            - 3
            + np.linalg.slogdet(d)[1]
            - np.linalg.slogdet(c)[1]
        )
        assert float(found[i]) == pytest.approx(expected, rel=1e-10)
    draws = first.sample(20_000)
    ratio = first.log_prob(draws) - second.log_prob(draws)
    # 3 means at 5 standard errors: false-alarm rate below 2e-6.
    assert bool(((ratio.mean(0) - found).abs() < 5 * ratio.std(0) / 20_000**0.5).all())
    torch.testing.assert_close(first.kl(first), torch.zeros(3).double(), atol=1e-12, rtol=0)
    diagonal = build(density=gaussian(3, 3, diagonal=True))
    assert bool((diagonal.kl(first) > 0).all())


def test_kl_refuses_what_it_cannot_compare():
    posterior = build()
    with pytest.raises(UnsupportedModelError, match="two Gaussian posteriors"):
        posterior.kl(build(density=Delta(torch.zeros(3, 3).double())))
    with pytest.raises(UnsupportedModelError, match="the same local sites"):
        posterior.kl(build(shares))
    with pytest.raises(DataError, match="the same 3 tasks"):
        posterior.kl(posterior.select(["b", "a", "c"]))


# Some of the tasks


def test_select_is_the_posterior_of_these_tasks():
    posterior = build(info={"note": "kept", "per_task": torch.zeros(3)}, units=Units(2.0, 3.0))
    chosen = posterior.select(["c", "a"])
    assert chosen.ids == ("c", "a")
    torch.testing.assert_close(chosen.density.loc, posterior.density.loc[[2, 0]])
    assert chosen.support.same_data(posterior.support.select(["c", "a"]))
    assert chosen.units == posterior.units
    assert chosen.info == {"note": "kept"}
    with pytest.raises(DataError, match="an id among"):
        posterior.select(["z"])


def test_a_selection_predicts_as_the_whole():
    posterior, _ = linear()
    tasks, ids = query(), ["t2", "t0"]
    whole, chosen = posterior.predict(tasks), posterior.select(ids).predict(tasks.select(ids))
    torch.testing.assert_close(chosen.mean, whole.mean[[2, 0]])


# Predictions


def linear(name="linear_own_nested") -> tuple[TaskPosterior, cases.Case]:
    """The exact posterior of a linear-Gaussian case."""
    case = cases.case(name)
    known = [
        reference.gaussian_posterior(
            *cases.rows_of(case.tasks, i), cases.MEAN, cases.COVARIANCE, cases.NOISE
        )
        for i in range(case.tasks.n_tasks)
    ]
    loc = torch.tensor(np.array([mean for mean, _ in known]))
    tril = torch.linalg.cholesky(torch.tensor(np.array([covariance for _, covariance in known])))
    problem = Problem(case.program, case.tasks)
    return TaskPosterior(problem, {}, Gaussian(loc, tril), case.tasks), case


def query() -> Tasks:
    rng = np.random.default_rng(3)
    counts = (3, 1, 4, 2)
    task = np.repeat(np.arange(4), counts)
    x = np.stack([np.ones(10), rng.uniform(-2, 2, 10)], 1)
    y = rng.standard_normal(10)
    ids = [f"t{i}" for i in range(4)]
    return Tasks.from_flat(x, y, task, 4, ids=ids, features=("intercept", "x0"))


def dense(tasks: Tasks, posterior: TaskPosterior, i: int):
    """Mean and covariance of all rows of a task: X m, X C Xᵀ + s² I."""
    X, y = cases.rows_of(tasks, i)
    m, c = posterior.density.loc[i].numpy(), posterior.density.covariance[i].numpy()
    return X @ m, X @ c @ X.T + cases.NOISE**2 * np.eye(len(y)), y


@pytest.mark.parametrize("name", ["linear_own_nested", "linear_own_flat", "linear_given_theta"])
def test_linear_gaussian_predictions_are_exact(name):
    posterior, _ = linear(name)
    tasks = query()
    predictive = posterior.predict(tasks)
    assert predictive.n_draws == 1
    joint = predictive.log_prob(tasks.y, joint=True)
    for i in range(4):
        mean, covariance, y = dense(tasks, posterior, i)
        rows = slice(0, len(y))
        np.testing.assert_allclose(predictive.mean[i, rows], mean, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(predictive.variance[i, rows], np.diag(covariance), rtol=1e-9)
        expected = stats.multivariate_normal(mean, covariance).logpdf(y)
        assert float(joint[i]) == pytest.approx(expected, rel=1e-10)


BENT = {
    "clamp": lambda z: z.clamp(min=0.0),
    "from below": lambda z: z.clamp(max=0.0),
    "absolute": torch.abs,
    "dead zone": lambda z: z - z.clamp(-1.0, 1.0),
    "beyond three": lambda z: z.clamp(min=-3.0),
}


@pytest.mark.parametrize("bend", BENT)
@pytest.mark.parametrize("size", [1, 3])
def test_a_bend_on_either_side_is_no_line(bend, size):
    """A function that is linear to one side of φ̂ has moments and predictions from draws."""

    def program(x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))
            effect = pyro.deterministic("effect", BENT[bend](z.sum(-1) / size**0.5))
            pyro.deterministic("line", 2.0 * z.sum(-1))
            with pyro.plate("point", x.shape[1], dim=-1):
                return pyro.sample("y", dist.Normal(effect, 0.5), obs=y)

    tasks = Tasks(np.zeros((2, 1, 1)), np.zeros((2, 1)))
    loc = torch.tensor([[0.3], [0.6]], dtype=torch.float64).expand(2, size) / size**0.5
    posterior = TaskPosterior(
        Problem(program, tasks), {}, Gaussian(loc, torch.ones_like(loc)), tasks
    )
    # E and sd of bend(N(m, 1)) by a fine sum.
    grid = torch.linspace(-9.0, 9.0, 100_001, dtype=torch.float64)
    weight = torch.exp(-0.5 * grid.square())
    weight = weight / weight.sum()
    bent = BENT[bend](torch.tensor([[0.3], [0.6]], dtype=torch.float64) + grid)
    mean = (weight * bent).sum(-1)
    sd = ((weight * bent.square()).sum(-1) - mean.square()).sqrt()
    n = 20_000
    moments = posterior.moments(n)
    # 2 means at 5 standard errors; sds to 5 %, at least 4 of their standard errors.
    assert bool(((moments["effect"][0] - mean).abs() < 5 * sd / n**0.5).all())
    torch.testing.assert_close(moments["effect"][1], sd, rtol=0.05, atol=0)
    predictive = posterior.predict(torch.zeros(2, 1, 1), draws=n)
    assert predictive.n_draws == n
    assert bool(((predictive.mean[:, 0] - mean).abs() < 5 * sd / n**0.5).all())
    # What is a line beside it stays exact.
    torch.testing.assert_close(moments["line"][0], 2.0 * loc.sum(-1))


def test_exact_predictions_agree_with_the_mixture_of_draws(monkeypatch):
    posterior, _ = linear()
    tasks = query()
    exact = posterior.predict(tasks)
    monkeypatch.setattr(posterior_module, "linear_gaussian", lambda *_: None)
    n = 20_000
    mixture = posterior.predict(tasks, draws=n)
    assert mixture.n_draws == n
    real = tasks.mask
    spread = (exact.variance - cases.NOISE**2).clamp_min(0).sqrt()
    # 10 means at 5 standard errors: false-alarm rate below 6e-6; variances to 5 %.
    assert bool(((mixture.mean - exact.mean).abs() < 5 * spread / n**0.5)[real].all())
    torch.testing.assert_close(mixture.variance[real], exact.variance[real], rtol=0.05, atol=0)
    # Half a standard deviation off, where the mixture's densities have errors below 1 %.
    y = exact.mean + 0.5 * exact.sd
    torch.testing.assert_close(
        mixture.log_prob(y)[real], exact.log_prob(y)[real], rtol=0, atol=0.05
    )
    torch.testing.assert_close(
        mixture.log_prob(y, joint=True), exact.log_prob(y, joint=True), rtol=0, atol=0.05
    )


def test_draws_of_exact_predictions_are_joint_over_the_rows_of_a_task():
    posterior, _ = linear()
    tasks = query()
    n = 20_000
    drawn = posterior.predict(tasks).sample(n, seed=2)
    for i in range(4):
        mean, covariance, y = dense(tasks, posterior, i)
        mine = drawn[:, i, : len(y)].numpy()
        sd = np.sqrt(np.diag(covariance))
        error = np.sqrt(np.outer(sd**2, sd**2) + covariance**2) / n**0.5
        # 10 means and 30 covariances at 5 standard errors: false-alarm rate below 3e-5.
        assert (np.abs(mine.mean(0) - mean) < 5 * sd / n**0.5).all()
        assert (np.abs(np.cov(mine.T).reshape(covariance.shape) - covariance) < 5 * error).all()


def test_what_is_not_linear_in_phi_is_a_mixture():
    assert build().predict(torch.ones(3, 2, 1).double(), draws=50).n_draws == 50


def test_weights_of_draws_count_in_predictions():
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(20, 3, 3, generator=generator, dtype=torch.float64)
    log_weights = 2 * torch.randn(20, 3, generator=generator, dtype=torch.float64)
    found = build(density=Empirical(phi, log_weights)).predict(2 * torch.ones(3, 1, 1).double())
    each = 2 * phi[..., 0].exp() + phi[..., 1:].sum(-1)
    expected = (log_weights.softmax(0) * each).sum(0)
    torch.testing.assert_close(found.mean[:, 0], expected)


@pytest.mark.parametrize("draws", [400, 50])
def test_draws_of_theta_go_with_their_draws_of_phi(draws):
    """Also where they are thinned: draw s of both, never of one."""
    fitted = fits.fitted("NUTS")
    kept = torch.linspace(0, 399, draws).round().long()
    theta = {name: value[kept] for name, value in fitted.globals().items()}
    tasks = fitted.tasks
    z = fitted.density.phi[kept][:, tasks.task, 0]
    mean = theta["mean"] + theta["scale"] * z + theta["fixed"] * tasks.flat_x[:, 0]
    location, scale = fitted.units
    found = fitted.posterior.predict(tasks, draws=draws)
    torch.testing.assert_close(tasks.unpad(found.mean), location + scale * mean.mean(0))
    variance = mean.var(0, correction=0) + theta["noise"].square().mean()
    torch.testing.assert_close(tasks.unpad(found.variance), scale**2 * variance)
    coefficients = fitted.posterior.sample(draws)["coefficients"][..., 0]
    expected = theta["mean"] + theta["scale"] * fitted.density.phi[kept][..., 0]
    torch.testing.assert_close(coefficients, expected)


def test_predictions_are_in_the_units_of_the_data():
    plain = build()
    scaled = build(units=Units(50.0, 10.0))
    x = torch.ones(3, 2, 1).double()
    torch.testing.assert_close(scaled.predict(x).mean, 50 + 10 * plain.predict(x).mean)
    torch.testing.assert_close(scaled.predict(x).sd, 10 * plain.predict(x).sd)
    assert plain.units == Units(0.0, 1.0)


def test_predict_wants_the_same_tasks_and_features():
    posterior = build()
    with pytest.raises(DataError, match="inputs of these 3 tasks"):
        posterior.predict(ragged()[:2])
    other = Tasks(torch.ones(3, 2, 1).double(), ids=posterior.ids, features=["other"])
    with pytest.raises(DataError, match="features"):
        posterior.predict(other)


# Tasks without data


@pytest.mark.parametrize("program", [rates, rates_flat])
def test_a_support_without_rows(program):
    tasks = ragged()
    nothing = tasks.keep(torch.zeros(tasks.n_points, dtype=torch.bool))
    posterior = TaskPosterior(Problem(program, tasks), {}, gaussian(3, 3), nothing)
    assert posterior.sample(4)["rate"].shape == (4, 3)
    assert posterior.log_prob(posterior.sample(4)).shape == (4, 3)
    assert posterior.log_likelihood(4)[0].shape == (4, 0)
    assert posterior.predict(nothing).mean.shape == (3, 1)
    assert bool(posterior.predict(tasks).mean.isfinite().all())


@pytest.mark.parametrize("program", [rates, rates_flat])
def test_log_likelihood_is_that_of_each_row(program):
    posterior = build(program)
    found, weights = posterior.log_likelihood(5)
    assert weights is None
    draws, tasks = posterior.sample(5), posterior.support
    mean = draws["rate"][:, tasks.task] * tasks.flat_x[:, 0] + draws["shift"].sum(-1)[:, tasks.task]
    expected = stats.norm(mean.numpy(), 0.5).logpdf(tasks.flat_y.numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_log_likelihood_wants_y():
    tasks = ragged()
    inputs = Tasks.from_flat(tasks.flat_x, None, tasks.task, 3, ids=tasks.ids)
    posterior = TaskPosterior(Problem(rates, tasks), {}, gaussian(3, 3), inputs)
    with pytest.raises(DataError, match="a support with y"):
        posterior.log_likelihood()


def test_repr_says_what_it_is():
    assert repr(build()) == "TaskPosterior(Gaussian, tasks=3, phi_size=3)"


def test_kl_refuses_supports_that_depend_on_theta():
    def program(x, y=None):
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        with pyro.plate("task", x.shape[0], dim=-2):
            level = pyro.sample("level", dist.Uniform(-top, top))
            with pyro.plate("point", x.shape[1], dim=-1):
                pyro.sample("y", dist.Normal(level, 1.0), obs=y)

    generator = torch.Generator().manual_seed(0)
    y = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    tasks = Tasks(torch.zeros(3, 4, 1, dtype=torch.float64), y)
    guide = AmortizedGuide(hidden=4)
    first, second = (
        guide.fit(program, tasks, steps=3, seed=seed, compile=False).adapt(tasks) for seed in (0, 1)
    )
    assert torch.allclose(first.kl(first), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    with pytest.raises(UnsupportedModelError, match="'level' with a support that depends on θ"):
        first.kl(second)


def test_a_closed_prediction_draws_nothing(monkeypatch):
    """1,000 draws for each of 100,000 tasks would take longer than all else."""
    posterior = fits.adapted("ExactLinear")
    expected = posterior.predict(posterior.support).mean

    def refuse(*_):
        raise AssertionError("drawn")

    monkeypatch.setattr(TaskPosterior, "particles", refuse)
    assert torch.equal(posterior.predict(posterior.support).mean, expected)


@pytest.mark.parametrize("cells", [1, 30])
def test_draws_in_parts_are_draws_at_once(cells, monkeypatch):
    posterior = fits.adapted("AmortizedGuide")
    once = posterior.values(50)[0]
    likelihood = posterior.problem.particle_log_likelihood
    batch = posterior.problem.batch(posterior.support)
    particles = posterior.particles(50)
    whole = likelihood(particles.theta, particles.drawn, particles.phi, batch)
    monkeypatch.setattr(problem_module, "_CELLS", cells)
    for name, value in posterior.values(50)[0].items():
        torch.testing.assert_close(value, once[name], atol=1e-12, rtol=0)
    parts = likelihood(particles.theta, particles.drawn, particles.phi, batch)
    torch.testing.assert_close(parts, whole, atol=1e-12, rtol=1e-12)
