"""The training loop: what it minimises, what it warns of, how it stops and resumes."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from hbmeta import models
from hbmeta.errors import ConvergenceError, FileError
from hbmeta.inference import MAML, AmortizedGuide
from hbmeta.problem import Problem
from hbmeta.tasks import Episode, LinearTasks, Tasks
from hbmeta.training import prior_scales
from tests import reference
from tests.cases import case, eight_schools_centered, rows_of

EAGER = {"compile": False, "seed": 0, "progress": False}


def schools() -> Episode:
    """Eight schools with the only row of a school as support and as query."""
    tasks = case("eight_schools").tasks
    return Episode(tasks, tasks)


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        (MAML(steps=3, step_size=0.05), "varying_intercepts"),
        (AmortizedGuide(hidden=16), "varying_intercepts"),
        (MAML(steps=3, step_size=0.05), "module_parameters"),
        (AmortizedGuide(hidden=16), "module_parameters"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*theta was still moving")
def test_loss_goes_down(strategy, name):
    known = case(name)
    fitted = strategy.fit(
        known.program, known.tasks, steps=300, compile="graph", learning_rate=0.01
    )
    history = torch.tensor(fitted.history)
    assert history.shape == (300,)
    assert float(history[-50:].mean()) < float(history[:20].mean()) - 0.05
    assert fitted.info["tier"] == "graph"
    assert 0 < fitted.seconds.staging < fitted.seconds.fit


def test_theta_that_is_still_moving_is_named():
    """AmortizedGuide on few steps: the scale is far from where 5,000 steps leave it."""
    known = case("varying_intercepts")
    with pytest.warns(UserWarning, match=r"still moving \(.*scale.*\).*raise steps"):
        short = AmortizedGuide(hidden=16).fit(
            known.program, known.tasks, steps=300, compile="graph", learning_rate=0.01
        )
    assert "scale" in short.info["still_moving"]
    long = MAML(steps=3, step_size=0.05).fit(
        known.program, known.tasks, steps=300, compile="graph", learning_rate=0.01
    )
    assert long.info["still_moving"] == []


def test_module_parameters_are_learned_and_the_module_is_left_alone():
    known = case("module_parameters")
    before = {name: value.clone() for name, value in known.program.named_parameters()}
    fitted = MAML(steps=2, step_size=0.05).fit(
        known.program, known.tasks, steps=20, learning_rate=0.05, **EAGER
    )
    assert set(fitted.theta) == set(before) == {"weight", "bend", "start", "noise_unconstrained"}
    for name, value in known.program.named_parameters():
        assert torch.equal(value, before[name])
        assert not torch.allclose(fitted.theta[name], before[name].double())
        assert not fitted.theta[name].requires_grad


def test_theta_without_gradient_is_named_and_stays():
    """Centered eight schools under MAML: the query loss is no function of τ."""
    with pytest.warns(UserWarning, match="MAML: the loss does not depend on tau, so it stays"):
        fitted = MAML(steps=3, step_size=1.0).fit(
            eight_schools_centered, schools(), steps=30, **EAGER
        )
    start = fitted.problem.theta(fitted.problem.batch(fitted.tasks))
    assert torch.equal(fitted.theta["tau"], start["tau"])
    assert float(fitted.globals()["tau"]) == pytest.approx(5.0)  # the scale of its HalfCauchy
    assert not torch.allclose(fitted.theta["mu"], start["mu"])
    assert fitted.info["untouched"] == ["tau"]


def test_nothing_to_learn():
    """θ given and a strategy without parameters of its own: no steps, no warning."""
    known = case("linear_given_theta")
    fitted = MAML().fit(known.program, known.tasks, **EAGER)
    assert fitted.theta == {}
    assert fitted.history == ()


def test_only_a_theta_without_gradient():
    """Nothing is left to train; what stays is said."""

    def program(x, y=None):
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        with pyro.plate("task", x.shape[0], dim=-2):
            phi = pyro.sample("phi", dist.Normal(0.0, spread))
            with pyro.plate("point", x.shape[1], dim=-1):
                return pyro.sample("y", dist.Normal(phi, 1.0), obs=y)

    with pytest.warns(UserWarning, match="does not depend on spread"):
        fitted = MAML().fit(program, case("varying_intercepts").tasks, **EAGER)
    assert fitted.info["untouched"] == ["spread"]


def test_divergence_names_the_step():
    known = case("module_parameters")
    with pytest.raises(
        ConvergenceError, match=r"MAML\.fit: needed a finite loss; found .* at step \d+"
    ):
        MAML(steps=60, step_size=1e3).fit(known.program, known.tasks, steps=100, **EAGER)


def test_a_loss_that_ends_far_away_is_warned_of():
    known = case("varying_intercepts")
    with pytest.warns(UserWarning, match="MAML: the loss began at .* training has diverged"):
        MAML(steps=5, step_size=1e3).fit(known.program, known.tasks, steps=3, **EAGER)
    # A loss that rises, by a learning rate that is far too large.
    with pytest.warns(UserWarning, match="training has diverged"):
        MAML(steps=1, step_size=0.01).fit(
            known.program, known.tasks, steps=20, theta_learning_rate=30.0, decay=False, **EAGER
        )


def test_tasks_without_a_query_do_not_dilute_the_prior():
    """−log p(θ)/T counts the tasks that the mean of the losses counts."""
    tasks = case("varying_intercepts").tasks
    first = tasks.leading(torch.arange(float(tasks.n_points)), tasks.counts // 2)
    whole = Episode(tasks.keep(first), tasks.keep(~first))
    n = tasks.n_tasks

    def with_empty(part):
        return Tasks.from_flat(
            part.flat_x, part.flat_y, part.task, n + 3, features=part.features, ids=range(n + 3)
        )

    padded = Episode(with_empty(whole.support), with_empty(whole.query))
    strategy, program = MAML(steps=2, step_size=0.05), models.VaryingEffects(fixed=["x0"])
    one, other = (
        strategy.fit(program.bind(tasks), data, steps=20, **EAGER) for data in (whole, padded)
    )
    for name, value in one.theta.items():
        torch.testing.assert_close(other.theta[name], value, rtol=1e-9, atol=1e-12)


def test_theta_minimises_loss_and_prior_over_tasks():
    """MAML on a linear program is quadratic in θ: its optimum solves a linear system.

    φ_N = φ̂ + M (θ − φ̂), M = (I − αH)^N, and θ minimises, over T tasks with n_i query rows,
    (1/T) [Σ_i ‖y_i − X_i φ_N‖² / (2 σ² n_i) + ‖θ‖² / (2 s²)].
    """
    sigma, scale, alpha, steps = 0.5, 0.7, 0.05, 2
    family = LinearTasks(
        [1.0, -0.5], [[0.5, 0.0], [0.0, 0.5]], noise=sigma, shots=(2, 5), queries=(1, 4)
    )
    episode = family.sample(6, seed=0)
    model = models.LinearRegression(covariance=[1.0, 1.0], noise=sigma, prior_mean_scale=scale)
    fitted = MAML(steps=steps, step_size=alpha).fit(
        model, episode, steps=600, compile="graph", theta_learning_rate=0.05
    )
    left, right = np.eye(2) / scale**2, np.zeros(2)
    for i in range(6):
        X, y = rows_of(episode.support, i)
        hessian = X.T @ X / sigma**2 / len(y)
        m = np.linalg.matrix_power(np.eye(2) - alpha * hessian, steps)
        fixed = (np.eye(2) - m) @ reference.least_squares(X, y)
        X, y = rows_of(episode.query, i)
        design = X @ m / (sigma * len(y) ** 0.5)
        left += design.T @ design
        right += design.T @ (y - X @ fixed) / (sigma * len(y) ** 0.5)
    np.testing.assert_allclose(fitted.theta["mean"], np.linalg.solve(left, right), atol=1e-4)


def test_prior_scales_are_standard_deviations_in_unconstrained_space():
    tasks = case("varying_intercepts").tasks
    model = case("varying_intercepts").program.bind(tasks)
    problem = Problem(model, tasks)
    batch = problem.batch(tasks)
    scales = prior_scales(problem, problem.theta(batch), batch)
    torch.testing.assert_close(scales["mean"], model.mean_scale)
    torch.testing.assert_close(scales["fixed"], model.fixed_scale)
    # log of a HalfNormal at its mode u = log s: −½ e^(2(u − log s)) + u has curvature 2.
    torch.testing.assert_close(scales["noise"], torch.tensor(0.5**0.5, dtype=torch.float64))


def test_learning_does_not_depend_on_the_units_of_y():
    """θ moves in units of its prior's scale: y in thousandths gives the same θ in those units."""
    tasks = case("varying_intercepts").tasks
    found = []
    for unit in (1.0, 1000.0):
        scaled = type(tasks).from_flat(
            tasks.flat_x, tasks.flat_y * unit, tasks.task, tasks.n_tasks, features=tasks.features
        )
        model = models.VaryingEffects(fixed=["x0"])
        fitted = AmortizedGuide(hidden=8).fit(model, scaled, steps=60, **EAGER)
        found.append(fitted.globals()["mean"] / unit)
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)


def test_graph_and_eager_train_alike():
    known = case("ragged_one_row")
    fits = [
        MAML(steps=2).fit(known.program, known.tasks, steps=25, compile=tier, seed=1)
        for tier in (False, "graph")
    ]
    for name in fits[0].theta:
        torch.testing.assert_close(fits[0].theta[name], fits[1].theta[name], rtol=1e-9, atol=1e-11)


def test_tasks_per_step_and_sources_train():
    known = case("varying_intercepts")
    fitted = MAML(steps=2).fit(known.program, known.tasks, steps=10, tasks_per_step=2, **EAGER)
    assert len(fitted.history) == 10
    family = LinearTasks([0.0, 1.0], [[1.0, 0.0], [0.0, 1.0]], noise=0.3, shots=4, queries=4)
    fitted = AmortizedGuide(hidden=8).fit(
        models.LinearRegression(), family, steps=10, tasks_per_step=3, **EAGER
    )
    assert set(fitted.theta) == {"mean", "scale", "noise"}


def test_interrupted_training_resumes_to_the_same_bits(tmp_path, monkeypatch):
    from hbmeta import training

    monkeypatch.setattr(training, "_CHECKPOINT_EVERY", 10)
    known = case("varying_intercepts")
    strategy = AmortizedGuide(hidden=8)
    whole = strategy.fit(known.program, known.tasks, steps=25, **EAGER)
    path = tmp_path / "checkpoint.safetensors"
    real, calls = training._check, []

    def interrupted(*arguments):
        calls.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        strategy.fit(known.program, known.tasks, steps=25, checkpoint=path, **EAGER)
    monkeypatch.setattr(training, "_check", real)
    assert path.exists()
    resumed = strategy.fit(known.program, known.tasks, steps=25, checkpoint=path, **EAGER)
    assert resumed.history == whole.history
    assert all(torch.equal(resumed.theta[k], whole.theta[k]) for k in whole.theta)
    state = whole.own.state_dict()
    assert all(torch.equal(value, state[k]) for k, value in resumed.own.state_dict().items())
    with pytest.raises(FileError, match="the checkpoint of this very fit"):
        AmortizedGuide(hidden=9).fit(known.program, known.tasks, steps=25, checkpoint=path, **EAGER)


def test_untouched_theta_is_found_without_side_effects(untouched):
    known = case("two_coefficients")
    with untouched(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = MAML(steps=1).fit(known.program, known.tasks, steps=3, **EAGER)
    assert fitted.info["untouched"] == ["scale"]
