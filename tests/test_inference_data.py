"""ArviZ groups: names, dims and numbers, and that ArviZ can work with them."""

import json
import warnings

import arviz
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from scipy import stats

import hbmeta
from hbmeta.densities import Delta, Empirical, Gaussian
from hbmeta.inference import MAML, Laplace, NestedLaplace
from hbmeta.inference_data import fitted_to_inference_data, posterior_to_inference_data
from hbmeta.posterior import TaskPosterior
from hbmeta.problem import Problem
from hbmeta.tasks import Episode, Tasks
from tests import cases, fits

every_strategy = pytest.mark.parametrize("name", fits.STRATEGIES)


def in_peace(fitted, **arguments):
    """Of any fit: a point estimate is warned of, and that is tested by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return fitted_to_inference_data(fitted, **arguments)


def awkward(x, y=None):
    """Sites with the names of dimensions, a slash, a matrix per task, vectors observed."""
    x_site = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("task", x.shape[0], dim=-2):
        point = pyro.sample("point", dist.Normal(x_site, 1.0))
        matrix = pyro.sample("net/weight", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
        pyro.deterministic("task_", point.exp())
        with pyro.plate("point", x.shape[1], dim=-1):
            slope = point * x[..., 0]
            mean = torch.stack([slope + matrix.sum((-1, -2)), slope], -1)
            return pyro.sample("obs", dist.Normal(mean, 1.0).to_event(1), obs=y)


def awkward_posterior(*, ids=("a", 7, "c"), density=None) -> TaskPosterior:
    rng = np.random.default_rng(0)
    tasks = Tasks.from_flat(
        rng.standard_normal((6, 1)), rng.standard_normal((6, 2)), [0, 0, 0, 2, 2, 1], 3, ids=ids
    )
    loc = torch.tensor(rng.standard_normal((3, 7)))
    problem = Problem(awkward, tasks)
    theta = {"x": torch.tensor(0.3).double()}
    return TaskPosterior(problem, theta, density or Gaussian(loc, torch.ones_like(loc)), tasks)


# A fit by NUTS


def test_chains_come_whole_with_names_from_the_plates():
    fitted = fits.fitted("NUTS")
    data = fitted.to_inference_data(prior_draws=2)
    posterior = data.posterior
    assert set(data.groups()) == {
        *("posterior", "posterior_predictive", "sample_stats", "log_likelihood"),
        *("prior", "prior_predictive", "observed_data", "constant_data"),
    }
    assert posterior["coefficients"].dims == ("chain", "draw", "task", "coefficients_dim_0")
    assert posterior["coefficients"].shape == (2, 200, 6, 1)
    assert posterior["mean"].dims == ("chain", "draw", "mean_dim_0")
    assert posterior["noise"].dims == ("chain", "draw")
    assert posterior["task"].values.tolist() == list(fitted.tasks.ids)
    assert posterior["coefficients_dim_0"].values.tolist() == ["intercept"]
    assert posterior["fixed_dim_0"].values.tolist() == ["hours"]
    # Chain c, draw d is stored draw 200 c + d, of θ and of φ alike.
    noise = fitted.theta["noise"].exp().reshape(2, 200)
    np.testing.assert_allclose(posterior["noise"], noise)
    z = fitted.density.phi.reshape(2, 200, 6, 1)
    np.testing.assert_allclose(posterior["z"], z)
    expected = (
        posterior["mean"].values[:, :, None] + posterior["scale"].values[:, :, None] * z.numpy()
    )
    np.testing.assert_allclose(posterior["coefficients"], expected)


def test_rows_are_flat_and_know_their_task():
    fitted = fits.fitted("NUTS")
    data, tasks = fitted.to_inference_data(prior_draws=0), fitted.tasks
    y = data.observed_data["y"]
    assert y.dims == ("obs",)
    np.testing.assert_array_equal(y, tasks.flat_y)
    assert y["obs_task"].values.tolist() == [tasks.ids[i] for i in tasks.task]
    numbers = [number for count in tasks.counts.tolist() for number in range(count)]
    assert y["obs_point"].values.tolist() == numbers
    x = data.constant_data["x"]
    assert x.dims == ("obs", "feature")
    assert x["feature"].values.tolist() == ["hours"]
    np.testing.assert_array_equal(x, tasks.flat_x)
    posterior = data.posterior
    effect = posterior["coefficients"].values[..., tasks.task.numpy(), 0]
    mean = effect + posterior["fixed"].values * tasks.flat_x[:, 0].numpy()
    expected = stats.norm(mean, posterior["noise"].values[..., None]).logpdf(tasks.flat_y.numpy())
    log_likelihood = data.log_likelihood["y"]
    assert log_likelihood.dims == ("chain", "draw", "obs")
    np.testing.assert_allclose(log_likelihood, expected, rtol=1e-8, atol=1e-8)


def test_what_the_sampler_measured():
    fitted = fits.fitted("NUTS")
    stats_of = fitted.to_inference_data(prior_draws=0).sample_stats
    assert set(stats_of) == {"log_p", "lp", "diverging", "step_size"}
    assert all(stats_of[name].dims == ("chain", "draw") for name in stats_of if name != "log_p")
    assert stats_of["log_p"].dims == ("chain", "draw", "task")
    np.testing.assert_array_equal(stats_of["diverging"], fitted.info["diverging"])
    np.testing.assert_array_equal(stats_of["lp"], fitted.info["log_density"])
    np.testing.assert_array_equal(stats_of["step_size"][:, 0], fitted.info["step_size"])


@pytest.fixture(scope="module")
def converted():
    """A fit that draws, one by a density of every task, and one by a network."""
    found = {name: fits.fitted(name) for name in ("NUTS", "AmortizedGuide")}
    found["Laplace"] = fits.fit(Laplace(), steps=20)
    new = Episode(fits.new_tasks(), fits.new_tasks(seed=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # new tasks leave few of so few draws of θ
        return {
            name: fitted.to_inference_data(draws=200, new=new, prior_draws=20)
            for name, fitted in found.items()
        }


@pytest.mark.parametrize("name", ["NUTS", "Laplace", "AmortizedGuide"])
def test_arviz_can_work_with_every_fit(converted, name):
    data = converted[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 400 draws are few, and ArviZ says so
        loo = arviz.loo(data, pointwise=True)
        pit = arviz.loo_pit(data, y="y")
        summary = arviz.summary(data)
        axes = arviz.plot_forest(data, var_names=["coefficients"])
        arviz.plot_ppc(data)
        arviz.plot_ppc(data, group="prior")
    assert np.isfinite([loo.elpd_loo, loo.se, loo.p_loo]).all()
    assert loo.loo_i.dims == ("obs",)
    assert np.isfinite(loo.loo_i).all()
    assert ((pit >= 0) & (pit <= 1)).all()
    schools = data.posterior["task"].values.tolist()
    assert f"coefficients[{schools[0]}, intercept]" in summary.index
    assert np.isfinite(summary.drop(columns="r_hat").to_numpy(dtype=float)).all()
    labels = [text.get_text() for text in axes[0].get_yticklabels()]
    assert {label[-3:] for label in labels} == {f"[{school}]" for school in schools}
    assert set(data.predictions["obs_task"].values) == {"y", "z"}
    assert data.predictions["y"].dims == ("chain", "draw", "obs")
    assert data.predictions_constant_data["x"].dims == ("obs", "feature")
    plt.close("all")


def test_leave_one_out_is_that_of_the_density_of_a_row_given_its_own_task():
    """By importance sampling from scratch: 1 / mean of 1 / p(y_r | φ_i, θ), unsmoothed."""
    fitted = fits.fitted("ExactLinear")
    data = fitted.to_inference_data(draws=4000, prior_draws=0)
    effect = data.posterior["coefficients"].values[0, :, fitted.tasks.task.numpy(), 0].T
    slope = float(fitted.globals()["fixed"])
    noise = float(fitted.globals()["noise"])
    mean = effect + slope * fitted.tasks.flat_x[:, 0].numpy()
    density = stats.norm(mean, noise).pdf(fitted.tasks.flat_y.numpy())
    expected = -np.log((1 / density).mean(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = arviz.loo(data, pointwise=True, reff=1.0)
    # 0.14 at most here: one heavy tail, which smoothing cuts. A row given another task's φ is
    # off by whole nats.
    np.testing.assert_allclose(found.loo_i, expected, atol=0.3)


def test_leave_one_out_of_eight_schools_is_that_of_the_draws_that_come_with_arviz():
    """Stored runs by PyMC of the centered and the non-centered form: −30.78 and −30.72.

    Four Monte Carlo errors of the difference, 0.05 as between these two runs.
    """
    schools = cases.case("eight_schools")
    fitted = NestedLaplace().fit(schools.program, schools.tasks, compile="graph", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = arviz.loo(fitted.to_inference_data(prior_draws=0), pointwise=True)
        stored = [
            arviz.loo(arviz.load_arviz_data(name), pointwise=True)
            for name in ("centered_eight", "non_centered_eight")
        ]
    for theirs in stored:
        assert found.elpd_loo == pytest.approx(theirs.elpd_loo, abs=0.2)
        assert found.se == pytest.approx(theirs.se, abs=0.2)
        np.testing.assert_allclose(found.loo_i, theirs.loo_i, atol=0.1)


# Densities and replicated data


def test_weights_of_an_exact_posterior_are_all_the_evidence():
    """log p(y, φ | θ) − log q(φ) = log p(y | θ), whatever φ was drawn."""
    fitted = fits.fitted("ExactLinear")
    statistics = fitted.to_inference_data(draws=50, prior_draws=0).sample_stats
    difference = (statistics["log_p"] - statistics["log_q"]).values[0]
    evidence = fitted.posterior.info["log_evidence"].numpy()
    np.testing.assert_allclose(difference, np.tile(evidence, (50, 1)), rtol=1e-9)
    prior = fitted.problem.log_prior(fitted.theta, fitted.problem.batch(fitted.tasks))
    total = statistics["log_p"].sum("task") + float(prior)
    np.testing.assert_allclose(statistics["lp"], total, rtol=1e-12)


@pytest.mark.parametrize("name", ["NUTS", "AmortizedGuide"])
def test_replicated_data_belong_to_their_draw(name):
    """y_rep − E[y | draw] has the sd of the noise; of another draw it would be wider."""
    fitted = fits.fitted(name)
    data = fitted.to_inference_data(draws=2000, prior_draws=0)
    posterior, task = data.posterior, fitted.tasks.task.numpy()
    level_one = posterior if name == "NUTS" else data.constant_data
    mean = posterior["coefficients"].values[..., task, 0]
    mean = mean + level_one["fixed"].values * fitted.tasks.flat_x[:, 0].numpy()
    noise = level_one["noise"].values[..., None]
    standard = (data.posterior_predictive["y"].values - mean) / noise
    # At least 14,000 numbers: five standard errors of a variance are 5 sqrt(2 / n) < 0.06, which
    # one seed in two million misses.
    assert standard.var() == pytest.approx(1.0, abs=0.06)
    assert standard.mean() == pytest.approx(0.0, abs=0.043)


def test_the_prior_is_that_of_the_program():
    fitted = fits.fitted("AmortizedGuide")
    data = fitted.to_inference_data(draws=1, prior_draws=300)
    assert data.posterior.attrs["prior"] == "300 independent draws"
    prior = data.prior
    assert prior["coefficients"].dims == ("chain", "draw", "task", "coefficients_dim_0")
    expected = prior["mean"].values[:, :, None] + prior["scale"].values[:, :, None] * prior["z"]
    np.testing.assert_allclose(prior["coefficients"], expected)
    # z ~ N(0, 1): one seed in a million gives a distance of 0.064 with 1,800 draws.
    assert stats.kstest(prior["z"].values.ravel(), "norm").statistic < 0.064
    assert data.prior_predictive["y"].dims == ("chain", "draw", "obs")


def test_a_program_without_a_proper_prior_has_none():
    case = cases.case("class_conditional")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = fits.fit(MAML(), case.tasks, case.program)
        data = fitted.to_inference_data(draws=2)
    assert data.posterior.attrs["prior"].startswith("left out: ")
    assert "prior" not in data.groups()
    assert data.posterior_predictive["y"].dtype.kind == "i"


def test_functions_are_replicated_jointly():
    case = cases.case("gaussian_process_learned")
    data = fits.fit(Laplace(), case.tasks, case.program).to_inference_data(draws=3, prior_draws=2)
    assert data.posterior_predictive["y"].shape == (1, 3, case.tasks.n_points)
    assert np.isfinite(data.posterior_predictive["y"]).all()


def test_predictions_need_rows(untouched):
    fitted = fits.fitted("AmortizedGuide")
    with untouched(), pytest.raises(hbmeta.errors.DataError, match="new as an Episode"):
        fitted.to_inference_data(draws=2, prior_draws=0, new=fitted.tasks)
    posterior = fitted.posterior
    nothing = posterior.support.keep(torch.zeros(posterior.support.n_points, dtype=torch.bool))
    with pytest.raises(hbmeta.errors.DataError, match="rows to predict"):
        posterior.to_inference_data(draws=2, query=nothing)


def test_predictions_are_in_the_units_of_the_model():
    posterior = fits.adapted("ExactLinear")
    query = fits.new_tasks(seed=2)
    data = posterior.to_inference_data(draws=3000, query=query)
    drawn = data.predictions["y"].values[0]
    predictive = posterior.predict(query)
    location, scale = posterior.units
    mean = (query.unpad(predictive.mean) - location) / scale
    sd = query.unpad(predictive.sd) / scale
    # Six rows; six standard errors of a mean of 3,000.
    np.testing.assert_allclose(drawn.mean(0), mean, atol=float(6 * sd.max() / 3000**0.5))


def test_the_container_of_later_versions(monkeypatch):
    """ArviZ 1.0 has no InferenceData; its functions take xarray's DataTree with these groups."""
    fitted = fits.fitted("AmortizedGuide")
    before = fitted.to_inference_data(draws=3, prior_draws=2)
    monkeypatch.delattr(arviz, "InferenceData")
    after = fitted.to_inference_data(draws=3, prior_draws=2)
    assert isinstance(after, xarray.DataTree)
    assert set(after.children) == set(before.groups())
    assert all(after[name].to_dataset().equals(before[name]) for name in before.groups())
    assert after.attrs == before.attrs


# Strategies that hold θ at a point


@every_strategy
def test_every_fit_survives_a_file(name, tmp_path):
    data = in_peace(fits.fitted(name), draws=20, prior_draws=3)
    arviz.InferenceData.to_netcdf(data, str(tmp_path / "fit.nc"))
    loaded = arviz.from_netcdf(str(tmp_path / "fit.nc"))
    assert set(loaded.groups()) == set(data.groups())
    for group in data.groups():
        assert loaded[group].equals(data[group]), group
        assert loaded[group].attrs == data[group].attrs
    assert loaded.attrs == data.attrs


@every_strategy
def test_attributes_say_what_it_is(name):
    fitted = fits.fitted(name)
    data = in_peace(fitted, draws=10, seed=5, prior_draws=1)
    for attributes in (data.attrs, data.posterior.attrs):
        assert attributes["inference_library"] == "hbmeta"
        assert attributes["inference_library_version"] == hbmeta.__version__
        assert attributes["strategy"] == name
        assert json.loads(attributes["settings"]) == fits.STRATEGIES[name].settings()
        assert (attributes["seed"], attributes["fit_seed"]) == (5, 0)
        assert attributes["theta"] == ("draws" if name == "NUTS" else "point")
        assert (attributes["y_location"], attributes["y_scale"]) == fitted.units


@pytest.mark.parametrize(
    ("name", "draws", "kind"),
    [("MAML", 1, "a point estimate"), ("ExactLinear", 30, "independent draws of a density")],
)
def test_a_point_theta_is_a_constant_and_never_draws(name, draws, kind):
    fitted = fits.fitted(name)
    data = in_peace(fitted, draws=30, prior_draws=2)
    assert set(data.posterior.data_vars) == {"z", "coefficients"}
    assert dict(data.posterior.sizes)["chain"] == 1
    assert dict(data.posterior.sizes)["draw"] == draws
    assert data.posterior.attrs["draws"].startswith(kind)
    assert set(data.sample_stats) == {"log_p", "lp"} | ({"log_q"} if draws > 1 else set())
    for site, value in fitted.globals().items():
        np.testing.assert_array_equal(data.constant_data[site], value)
    assert data.constant_data["mean"].dims == ("mean_dim_0",)
    assert data.constant_data["noise"].dims == ()
    expected = fitted.posterior.sample(draws)["coefficients"]
    np.testing.assert_array_equal(data.posterior["coefficients"][0], expected)


def test_a_program_without_global_sites():
    fitted = fits.fit(MAML(), cases.case("linear_own_flat").tasks, cases.linear_flat)
    with pytest.warns(UserWarning, match="point estimate, so there is one draw and no sd"):
        data = fitted.to_inference_data(prior_draws=2)
    assert set(data.constant_data.data_vars) == {"x"}
    assert data.posterior["coefficients"].dims[-1] == "coefficients_dim_0"


# Posteriors of new tasks


def test_weighted_draws_are_resampled_with_their_likelihood():
    posterior = fits.adapted("NUTS")
    assert posterior.density.log_weights is not None
    data = posterior.to_inference_data(draws=50, seed=1)
    assert dict(data.posterior.sizes)["draw"] == 50
    assert data.posterior.attrs["draws"].startswith("weighted draws, resampled")
    assert set(data.posterior.data_vars) == {"z", "coefficients"}
    expected = posterior.sample(50, seed=1)["coefficients"]
    np.testing.assert_array_equal(data.posterior["coefficients"][0], expected)
    # Each row's likelihood belongs to the draw of its own task: find it among the stored ones.
    values, _ = posterior.values(400)
    rows, _ = posterior.log_likelihood(400)
    for row, task in enumerate(posterior.support.task.tolist()):
        stored = {
            float(c): float(v) for c, v in zip(values["z"][:, task, 0], rows[:, row], strict=True)
        }
        chosen = data.posterior["z"].values[0, :, task, 0]
        found = data.log_likelihood["y"].values[0, :, row]
        np.testing.assert_array_equal(found, [stored[float(c)] for c in chosen])


def test_weights_count():
    phi = torch.arange(4.0).double()[:, None, None].expand(4, 3, 7).contiguous()
    log_weights = torch.full((4, 3), -torch.inf).double()
    log_weights[torch.tensor([2, 0, 3]), torch.arange(3)] = 0.0
    data = posterior_to_inference_data(awkward_posterior(density=Empirical(phi, log_weights)), 5)
    np.testing.assert_array_equal(data.posterior["point_"], np.tile([2.0, 0.0, 3.0], (1, 5, 1)))


def test_names_of_dimensions_stay_free():
    data = awkward_posterior().to_inference_data(draws=10)
    posterior = data.posterior
    assert set(posterior.data_vars) == {"point_", "net_weight", "task_"}
    assert posterior["point_"].dims == ("chain", "draw", "task")
    assert posterior["net_weight"].dims[2:] == ("task", "net_weight_dim_0", "net_weight_dim_1")
    assert posterior["task"].values.tolist() == ["a", "7", "c"]
    assert data.observed_data["obs_"].dims == ("obs", "obs__dim_0")
    assert data.log_likelihood["obs_"].dims == ("chain", "draw", "obs")
    assert json.loads(posterior.attrs["renamed_sites"]) == {
        "x": "x_",
        "point": "point_",
        "net/weight": "net_weight",
        "obs": "obs_",
    }


def test_awkward_names_survive_a_file(tmp_path):
    data = awkward_posterior().to_inference_data(draws=10)
    data.to_netcdf(str(tmp_path / "fit.nc"))
    loaded = arviz.from_netcdf(str(tmp_path / "fit.nc"))
    assert all(loaded[group].equals(data[group]) for group in data.groups())


def test_a_global_site_called_x_does_not_hide_the_inputs():
    tasks = awkward_posterior().support
    fitted = fits.fit(MAML(), tasks, awkward)
    constants = in_peace(fitted, prior_draws=0).constant_data
    assert constants["x"].dims == ("obs", "feature")
    assert constants["x_"].dims == ()


def test_whole_numbers_stay_labels_of_tasks():
    data = awkward_posterior(ids=(30, 10, 20)).to_inference_data(draws=2)
    assert data.posterior["task"].values.tolist() == [30, 10, 20]
    assert data.posterior["task"].dtype.kind == "i"


def test_a_point_is_a_single_draw():
    posterior = awkward_posterior(density=Delta(torch.zeros(3, 7).double()))
    with pytest.warns(UserWarning, match="no sd"):
        data = posterior.to_inference_data()
    assert dict(data.posterior.sizes)["draw"] == 1


def test_tasks_without_data_have_a_posterior_alone():
    posterior = awkward_posterior()
    nothing = posterior.support.keep(torch.zeros(6, dtype=torch.bool))
    empty = TaskPosterior(posterior.problem, posterior.theta, posterior.density, nothing)
    assert empty.to_inference_data(draws=5).groups() == ["posterior", "sample_stats"]
    inputs = Tasks.from_flat(
        posterior.support.flat_x, None, posterior.support.task, 3, ids=posterior.ids
    )
    blind = TaskPosterior(posterior.problem, posterior.theta, posterior.density, inputs)
    found = blind.to_inference_data(draws=5)
    assert set(found.groups()) == {"posterior", "sample_stats", "constant_data"}
    assert set(found.sample_stats) == {"log_q"}


def test_the_seed_decides(untouched):
    posterior = awkward_posterior()
    with untouched():
        first, again, other = (posterior.to_inference_data(draws=4, seed=s) for s in (0, 0, 1))
    assert first.posterior.equals(again.posterior)
    assert not first.posterior.equals(other.posterior)
