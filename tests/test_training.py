"""The training loop: what it minimises, what it warns of, how it stops and resumes."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import hbmeta as hb
from hbmeta import feeding, models, training
from hbmeta.course import Course
from hbmeta.errors import ConvergenceError, FileError
from hbmeta.files import read_tensors
from hbmeta.inference import MAML, AmortizedGuide
from hbmeta.problem import Problem
from hbmeta.tasks import Episode, LinearTasks, Sinusoids, Tasks
from hbmeta.training import prior_scales
from hbmeta.triangular import positive_definite_at
from tests import reference
from tests.cases import case, eight_schools_centered, rows_of

# Fits of a few steps end far from the modes of their tasks, which is not what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:.*near the mode of log p")

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


def interrupted_and_resumed(strategy, model, data, path, monkeypatch, **settings):
    """A fit that was stopped after 23 steps, of which 20 were saved, and continued."""
    monkeypatch.setattr(training, "_CHECKPOINT_EVERY", 10)
    record, seen = Course.record, []

    def interrupt(course, loss):
        record(course, loss)
        seen.append(loss)
        if len(seen) == 23:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Course, "record", interrupt)
        with pytest.raises(KeyboardInterrupt):
            strategy.fit(model, data, checkpoint=path, **settings)
    assert len(read_tensors(path)[0]["losses"]) == 20
    return strategy.fit(model, data, checkpoint=path, **settings)


def same_bits(one, other):
    assert one.history == other.history
    assert all(torch.equal(one.theta[k], other.theta[k]) for k in other.theta)
    if other.own is not None:
        state = other.own.state_dict()
        assert all(torch.equal(value, state[k]) for k, value in one.own.state_dict().items())


def test_interrupted_training_resumes_to_the_same_bits(tmp_path, monkeypatch):
    known = case("varying_intercepts")
    strategy = AmortizedGuide(hidden=8)
    whole = strategy.fit(known.program, known.tasks, steps=25, **EAGER)
    path = tmp_path / "checkpoint.safetensors"
    settings = {"steps": 25, **EAGER}
    resumed = interrupted_and_resumed(
        strategy, known.program, known.tasks, path, monkeypatch, **settings
    )
    same_bits(resumed, whole)
    with pytest.raises(FileError, match="the checkpoint of this very fit"):
        AmortizedGuide(hidden=9).fit(known.program, known.tasks, checkpoint=path, **settings)


@pytest.mark.parametrize(
    ("strategy", "steps_per_draw"),
    [
        (MAML(steps=1, step_size=0.05), 1),
        (MAML(steps=1, step_size=0.05), 32),
        (AmortizedGuide(hidden=4), 8),
    ],
)
@pytest.mark.filterwarnings("ignore:MAML. the loss does not depend on scale")
def test_a_source_resumes_to_the_same_bits(strategy, steps_per_draw, tmp_path, monkeypatch):
    """Step 20, where it goes on, lies inside of a draw of 8 or 32 steps."""
    monkeypatch.setattr(feeding, "_STEPS_PER_DRAW", steps_per_draw)
    source = LinearTasks([0.0, 1.0], [[1.0, 0.0], [0.0, 1.0]], noise=0.3, shots=(1, 4), queries=3)
    model = models.LinearRegression()
    settings = {"steps": 40, "tasks_per_step": 3, **EAGER}
    whole = strategy.fit(model, source, **settings)
    path = tmp_path / "checkpoint.safetensors"
    resumed = interrupted_and_resumed(strategy, model, source, path, monkeypatch, **settings)
    same_bits(resumed, whole)
    other = strategy.fit(model, source, **{**settings, "seed": 1})
    assert all(not torch.equal(other.theta[k], whole.theta[k]) for k in ("mean", "noise"))
    assert not set(other.history) & set(whole.history)


def test_untouched_theta_is_found_without_side_effects(untouched):
    known = case("two_coefficients")
    with untouched(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = MAML(steps=1).fit(known.program, known.tasks, steps=3, **EAGER)
    assert fitted.info["untouched"] == ["scale"]


# Precision


def sines(dtype, n_tasks=40, seed=1):
    return Sinusoids().sample(n_tasks, seed=seed).all.to(dtype=dtype)


SMALL = models.NeuralRegression(hidden=(20, 20))


FALLING = {"steps": 120, "learning_rate": 0.02, "seed": 0, "progress": False}


@pytest.mark.parametrize("tier", [False, "graph"])
def test_half_precision_learns_as_single_precision_does(tier):
    """MAML on sines without a setting of its own; float32 is the plain reference.

    No chance is involved: the seeds are fixed. In 120 steps the loss falls by 1.2 nats.
    """
    dtypes = (torch.float32, torch.bfloat16) if tier is False else (torch.bfloat16, torch.float16)
    fits = [
        MAML(steps=1, step_size=0.01).fit(SMALL, sines(dtype, 25), compile=tier, **FALLING)
        for dtype in dtypes
    ]
    for dtype, fitted in zip(dtypes, fits, strict=True):
        history = torch.tensor(fitted.history)
        assert float(history[-20:].mean()) < float(history[:10].mean()) - 1.0
        assert {value.dtype for value in fitted.theta.values()} == {dtype}
    one, other = (torch.tensor(fitted.history) for fitted in fits)
    torch.testing.assert_close(one, other, rtol=0.03, atol=0.0)


def test_small_steps_are_not_lost_in_bfloat16():
    """Steps of 3e-5 on weights of about 0.1, whose neighbours in bfloat16 are 5e-4 apart."""
    settings = {"steps": 60, "learning_rate": 3e-5, "decay": False, **EAGER}
    single, half = (
        MAML(steps=1, step_size=0.01).fit(SMALL, sines(dtype), **settings)
        for dtype in (torch.float32, torch.bfloat16)
    )
    start = dict(SMALL.bind(sines(torch.float32)).named_parameters())
    moved, wanted = (
        torch.cat([(f.theta[k].float() - start[k].float()).detach().flatten() for k in start])
        for f in (half, single)
    )
    # 60 steps of one sign are 1.8e-3; what is left of them after rounding points the same way.
    assert float(torch.cosine_similarity(moved, wanted, 0)) > 0.8


@pytest.mark.filterwarnings("ignore:to_inference_data. φ is a point:UserWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fits_in_half_precision_adapt_predict_compare_and_are_saved(dtype, tmp_path):
    fitted = MAML(steps=1, step_size=0.01).fit(SMALL, sines(dtype), steps=10, **EAGER)
    plain = MAML(steps=1, step_size=0.01).fit(SMALL, sines(torch.float32), steps=10, **EAGER)
    new = Sinusoids().sample(6, seed=9)
    found = fitted.adapt(new.support.to(dtype=dtype)).predict(new.query.x)
    wanted = plain.adapt(new.support).predict(new.query.x)
    torch.testing.assert_close(found.mean, wanted.mean, rtol=0.05, atol=0.05)
    torch.testing.assert_close(found.quantile(0.9), wanted.quantile(0.9), rtol=0.05, atol=0.05)
    table = hb.compare({"half": fitted, "single": plain}, new)
    nll = {row.name: row.scores["nll"].value for row in table.rows}
    assert nll["half"] == pytest.approx(nll["single"], rel=0.05)
    assert fitted.posterior.to_inference_data().posterior.sizes["task"] == 40
    fitted.save(tmp_path / "fit")
    again = hb.load(tmp_path / "fit")
    assert all(torch.equal(again.theta[k], v) and v.dtype == dtype for k, v in fitted.theta.items())


def test_half_precision_counts_many_rows():
    """A running sum of ones in bfloat16 ends at 256: 600 rows of a flat task count as 600."""
    task = torch.tensor([0] * 600 + [1] * 2)
    x = torch.linspace(-1, 1, 602, dtype=torch.float64)[:, None]
    tasks = Tasks.from_flat(x, 2 * x[:, 0], task, 2, features=["x0"]).to(dtype=torch.bfloat16)
    problem = Problem(models.VaryingEffects(fixed=["x0"]).bind(tasks), tasks)
    assert problem.layout == "flat"
    assert problem.batch(tasks).counts.tolist() == [600.0, 2.0]
    fitted = MAML(steps=2, step_size=0.05).fit(
        models.VaryingEffects(fixed=["x0"]), tasks, steps=40, compile="graph", learning_rate=0.01
    )
    assert np.mean(fitted.history[-10:]) < np.mean(fitted.history[:5])


@pytest.mark.slow
def test_half_precision_compiled():
    tasks = sines(torch.bfloat16, 25)
    compiled, graph = (
        MAML(steps=1, step_size=0.01).fit(SMALL, tasks, compile=tier, **FALLING)
        for tier in (True, "graph")
    )
    assert compiled.info["tier"] == "compiled"
    torch.testing.assert_close(
        torch.tensor(compiled.history), torch.tensor(graph.history), rtol=0.03, atol=0.0
    )


def test_a_compiled_factor_that_fails_is_named_and_nothing_else_is():
    """Compiled code raises a RuntimeError, with frames below its first line."""
    text = "linalg.cholesky: the input is not positive-definite.\nframe #0: c10::Error"
    with (
        pytest.raises(ConvergenceError, match=r"one that is not, at step 3: .*definite\. Lower"),
        positive_definite_at("MAML.fit", "at step 3"),
    ):
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match=r"^shape"), positive_definite_at("MAML.fit", "at step"):
        raise RuntimeError("shape of linalg.cholesky")
