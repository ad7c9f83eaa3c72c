"""ArviZ groups: names, dims and numbers, and that ArviZ can work with them."""

import json
import warnings

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

import hbmeta
from hbmeta.densities import Delta, Empirical, Gaussian
from hbmeta.inference import MAML
from hbmeta.inference_data import fitted_to_inference_data, posterior_to_inference_data
from hbmeta.posterior import TaskPosterior
from hbmeta.problem import Problem
from hbmeta.tasks import Tasks
from tests import cases, fits

every_strategy = pytest.mark.parametrize("name", fits.STRATEGIES)


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
    data = fitted.to_inference_data()
    posterior = data.posterior
    assert set(data.groups()) == {
        *("posterior", "sample_stats", "log_likelihood", "observed_data", "constant_data")
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
    data, tasks = fitted.to_inference_data(), fitted.tasks
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
    stats_of = fitted.to_inference_data().sample_stats
    assert all(stats_of[name].dims == ("chain", "draw") for name in stats_of)
    np.testing.assert_array_equal(stats_of["diverging"], fitted.info["diverging"])
    np.testing.assert_array_equal(stats_of["lp"], fitted.info["log_density"])
    np.testing.assert_array_equal(stats_of["step_size"][:, 0], fitted.info["step_size"])


def test_arviz_can_work_with_it():
    data = fits.fitted("NUTS").to_inference_data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 400 draws are few, and ArviZ says so
        loo = arviz.loo(data, pointwise=True)
        summary = arviz.summary(data)
        axes = arviz.plot_forest(data, var_names=["coefficients"])
    assert np.isfinite([loo.elpd_loo, loo.se, loo.p_loo]).all()
    assert loo.loo_i.dims == ("obs",)
    assert np.isfinite(loo.loo_i).all()
    assert "coefficients[a, intercept]" in summary.index
    assert np.isfinite(summary.to_numpy(dtype=float)).all()
    labels = [text.get_text() for text in axes[0].get_yticklabels()]
    assert {label[-3:] for label in labels} == {f"[{school}]" for school in "abcdef"}
    import matplotlib.pyplot as plt

    plt.close("all")


# Strategies that hold θ at a point


@every_strategy
def test_every_fit_survives_a_file(name, tmp_path):
    data = fits.fitted(name).to_inference_data(draws=20)
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
    data = fitted_to_inference_data(fitted, draws=10, seed=5)
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
    [("MAML", 1, "a point estimate"), ("ExactLinear", 30, "independent draws of a Gaussian")],
)
def test_a_point_theta_is_a_constant_and_never_draws(name, draws, kind):
    fitted = fits.fitted(name)
    data = fitted.to_inference_data(draws=30)
    assert set(data.posterior.data_vars) == {"z", "coefficients"}
    assert dict(data.posterior.sizes)["chain"] == 1
    assert dict(data.posterior.sizes)["draw"] == draws
    assert data.posterior.attrs["draws"].startswith(kind)
    assert "sample_stats" not in data.groups()
    for site, value in fitted.globals().items():
        np.testing.assert_array_equal(data.constant_data[site], value)
    assert data.constant_data["mean"].dims == ("mean_dim_0",)
    assert data.constant_data["noise"].dims == ()
    expected = fitted.posterior.sample(draws)["coefficients"]
    np.testing.assert_array_equal(data.posterior["coefficients"][0], expected)


def test_a_program_without_global_sites():
    fitted = fits.fit(MAML(), cases.case("linear_own_flat").tasks, cases.linear_flat)
    data = fitted.to_inference_data()
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
    constants = fitted.to_inference_data().constant_data
    assert constants["x"].dims == ("obs", "feature")
    assert constants["x_"].dims == ()


def test_whole_numbers_stay_labels_of_tasks():
    data = awkward_posterior(ids=(30, 10, 20)).to_inference_data(draws=2)
    assert data.posterior["task"].values.tolist() == [30, 10, 20]
    assert data.posterior["task"].dtype.kind == "i"


def test_a_point_is_a_single_draw():
    posterior = awkward_posterior(density=Delta(torch.zeros(3, 7).double()))
    assert dict(posterior.to_inference_data().posterior.sizes)["draw"] == 1


def test_tasks_without_data_have_a_posterior_alone():
    posterior = awkward_posterior()
    nothing = posterior.support.keep(torch.zeros(6, dtype=torch.bool))
    empty = TaskPosterior(posterior.problem, posterior.theta, posterior.density, nothing)
    assert empty.to_inference_data(draws=5).groups() == ["posterior"]
    inputs = Tasks.from_flat(
        posterior.support.flat_x, None, posterior.support.task, 3, ids=posterior.ids
    )
    blind = TaskPosterior(posterior.problem, posterior.theta, posterior.density, inputs)
    assert set(blind.to_inference_data(draws=5).groups()) == {"posterior", "constant_data"}


def test_the_seed_decides(untouched):
    posterior = awkward_posterior()
    with untouched():
        first, again, other = (posterior.to_inference_data(draws=4, seed=s) for s in (0, 0, 1))
    assert first.posterior.equals(again.posterior)
    assert not first.posterior.equals(other.posterior)
