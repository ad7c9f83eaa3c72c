"""Verdicts of `diagnose` against posteriors that are known to be right or made wrong on purpose."""

import dataclasses
import json
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import hbmeta
from hbmeta import inference
from hbmeta.densities import Empirical, Gaussian
from hbmeta.diagnosis import reference_fit
from hbmeta.diagnosis.observations import leave_one_out_pit
from hbmeta.diagnosis.records import summed_up
from hbmeta.diagnosis.verdicts import verdict_of
from hbmeta.errors import DataError, FileError
from hbmeta.tasks import Tasks
from tests.cases import case


def varying(x, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("task", x.shape[0], dim=-2):
        level = pyro.sample("level", dist.Normal(mu, tau))
        with pyro.plate("point", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(level + 0.5 * x[..., 0], 0.5), obs=y)


@pytest.fixture(scope="module")
def tasks():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (12, 6, 1))
    level = 1.0 + 0.7 * rng.standard_normal(12)
    y = level[:, None] + 0.5 * x[..., 0] + 0.5 * rng.standard_normal((12, 6))
    return Tasks(torch.from_numpy(x), torch.from_numpy(y), ids=[f"t{i}" for i in range(12)])


@pytest.fixture(scope="module")
def fitted(tasks):
    return inference.Laplace().fit(varying, tasks, compile=False)


def changed(fitted, *, shift=0.0, factor=1.0, tasks=slice(None)):
    """The fit with q moved by a number of its sds and widened by a factor, in some tasks."""
    density = fitted.posterior.density
    loc, scale = density.loc.clone(), density.scale.clone()
    loc[tasks] += shift * density.sd[tasks]
    scale[tasks] *= factor
    return dataclasses.replace(fitted, density=Gaussian(loc, scale), _cache={})


@pytest.fixture(scope="module")
def right(fitted, tasks):
    return hbmeta.diagnose(fitted, tasks)


def test_a_right_posterior_is_right(right, tasks):
    assert right.verdict == right.verdict_of_means == "right"
    assert {task.verdict for task in right.tasks} == {"right"}
    assert [task.id for task in right.tasks] == list(tasks.ids)
    assert "nested Laplace" in right.reference
    assert right.symptoms == ()
    assert max(task.pareto_k for task in right.tasks) < 0.5


@pytest.mark.parametrize(
    ("change", "means"),
    [({"shift": 0.6}, "wrong"), ({"factor": 0.5}, "right"), ({"factor": 1.7}, "right")],
)
def test_posteriors_that_were_made_wrong_are_wrong(fitted, tasks, change, means):
    found = hbmeta.diagnose(changed(fitted, **change), tasks, draws=1000)
    assert found.verdict == "wrong"
    assert found.verdict_of_means == means
    assert all(p.verdict == "wrong" and p.sure > 0.9 for p in found.parameters)


def test_only_the_tasks_that_are_wrong_are_named(fitted, tasks):
    found = hbmeta.diagnose(changed(fitted, shift=1.0, tasks=slice(3, 5)), tasks, draws=1000)
    assert [task.id for task in found.tasks if task.verdict == "wrong"] == ["t3", "t4"]
    assert found["t3"][0].shift == pytest.approx(1.0, abs=0.25)
    assert found["t3"][0].label == "level of 't3'"


def test_without_a_reference_weights_find_wrong_and_never_right(fitted, tasks):
    """They are given θ: an sd of 1.7 times that of p(φ | S, θ) is far outside their error."""
    untouched = hbmeta.diagnose(fitted, tasks, reference=None)
    assert untouched.verdict == "unverified"
    assert "given θ" in untouched.reference
    assert hbmeta.diagnose(changed(fitted, factor=1.7), tasks, reference=None).verdict == "wrong"
    narrow = hbmeta.diagnose(changed(fitted, factor=0.4), tasks, reference=None)
    assert [s.name for s in narrow.symptoms] == ["Pareto k̂ of q(φ | S)"]


def test_a_point_is_wrong_in_spread_and_judged_by_its_mean(tasks):
    fitted = inference.CompletePooling().fit(varying, tasks, compile=False)
    found = hbmeta.diagnose(fitted, tasks, draws=1000)
    assert found.verdict == "wrong"
    assert all(p.sd_ratio == 0.0 for p in found.parameters)
    assert "point estimate" in {s.name for s in found.symptoms}


def test_theta_at_a_point_is_named_where_it_matters():
    schools = case("eight_schools_centered")
    fitted = inference.Laplace().fit(schools.program, schools.tasks, compile=False)
    found = hbmeta.diagnose(fitted, schools.tasks)
    assert [s.name for s in found.symptoms] == ["θ at a point"]
    mean, sd = (np.asarray(values) for values in schools.posterior)
    own_mean, own_sd = fitted.posterior.moments()["effect"]
    shifts = {p.task: p.shift for p in found.parameters if p.site == "effect"}
    ratios = {p.task: p.sd_ratio for p in found.parameters if p.site == "effect"}
    # The exact posterior's; 2,000 draws of the reference have errors of 0.025 sd.
    exact = (own_mean.numpy() - mean) / sd
    assert np.abs(np.array([shifts[i] for i in schools.tasks.ids]) - exact).max() < 0.12
    exact = own_sd.numpy() / sd
    assert np.abs(np.array([ratios[i] for i in schools.tasks.ids]) - exact).max() < 0.1


def test_a_program_without_theta_is_judged_given_nothing():
    known = case("linear_own_nested")
    fitted = inference.ExactLinear().fit(known.program, known.tasks, compile=False)
    found = hbmeta.diagnose(fitted, known.tasks)
    assert found.verdict == "right"
    assert "the exact Gaussian" in found.reference
    assert max(abs(p.shift) for p in found.parameters) < 1e-9


@pytest.mark.slow
def test_chains_are_right_by_their_own_diagnostics_and_not_without(tasks):
    fitted = inference.NUTS(draws=400, warmup=300, processes=1).fit(varying, tasks, compile="graph")
    good = hbmeta.diagnose(fitted, tasks, reference=None)
    assert good.verdict == "right"
    assert {p.task for p in good.parameters} == {None, *tasks.ids}
    r_hat = fitted.info["r_hat"].clone()
    r_hat[0] = 1.2
    bad = dataclasses.replace(fitted, info={**fitted.info, "r_hat": r_hat})
    found = hbmeta.diagnose(bad, tasks, reference=None)
    assert found.verdict == "unverified"
    assert found.symptoms[0].name == "chains"
    assert "1.200" in found.symptoms[0].measured
    assert hbmeta.diagnose(fitted, tasks, draws=1000).verdict == "right"


def test_new_tasks_are_judged_together_with_those_of_the_fit(tasks):
    fitted = inference.Laplace().fit(varying, tasks[:10], compile=False)
    found = hbmeta.diagnose(fitted, tasks[10:], draws=1000)
    assert [task.id for task in found.tasks] == ["t10", "t11"]
    assert found.verdict == "right"


def test_the_model_is_blamed_for_what_it_does_not_predict(tasks, fitted):
    """Noise of 0.5 where the program has 0.1; and the right one is not blamed."""

    def too_sure(x, y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("task", x.shape[0], dim=-2):
            level = pyro.sample("level", dist.Normal(mu, tau))
            with pyro.plate("point", x.shape[1], dim=-1):
                pyro.sample("y", dist.Normal(level + 0.5 * x[..., 0], 0.1), obs=y)

    off = inference.Laplace().fit(too_sure, tasks, compile=False)
    found = hbmeta.diagnose(off, tasks, draws=1000)
    assert found.verdict == "right"  # of the posterior, which is not what is wrong
    (symptom,) = found.symptoms
    assert symptom.about == "model"
    assert "far out" in symptom.measured
    assert "Or the approximation" not in symptom.means


def test_leave_one_out_pit_is_that_of_the_posterior_without_the_row(fitted, tasks):
    """Given θ, in closed form: y_r | the rest ~ N(m, v + σ²), with the task's own posterior."""
    u = leave_one_out_pit(fitted.posterior, seed=0)
    values = fitted.globals()
    mu, tau = float(values["mu"]), float(values["tau"])
    x, y = tasks.flat_x[:, 0], tasks.flat_y
    for row in (0, 7, 40):
        rest = (tasks.task == tasks.task[row]) & (torch.arange(len(y)) != row)
        precision = tau**-2 + int(rest.sum()) / 0.25
        mean = (mu / tau**2 + float((y - 0.5 * x)[rest].sum()) / 0.25) / precision
        z = (float(y[row] - 0.5 * x[row]) - mean) / math.sqrt(1 / precision + 0.25)
        # 1,000 draws, a fifth of them effective at worst: errors of 0.02 at most.
        assert float(u[row]) == pytest.approx(0.5 * math.erfc(-z / math.sqrt(2)), abs=0.08)


def test_a_reference_that_is_there_gives_the_verdicts_of_one_that_is_made(fitted, tasks, right):
    made = reference_fit(fitted)
    assert made.strategy.name == "NestedLaplace"
    found = hbmeta.diagnose(fitted, tasks, reference=made)
    assert found.parameters == right.parameters
    assert (found.reference, found.symptoms) == (right.reference, right.symptoms)
    # One that fails its own check judges nothing, and that is said.
    failed = dataclasses.replace(made, info={**made.info, "pareto_k": 1.3})
    found = hbmeta.diagnose(fitted, tasks, reference=failed)
    assert found.verdict == "unverified"
    assert [s.name for s in found.symptoms] == ["reference by NestedLaplace"]
    assert "1.30" in found.symptoms[0].measured


def test_a_reference_of_something_else_is_refused(fitted, tasks):
    def other(x, y=None):
        return varying(x, y)

    made = reference_fit(fitted)
    few = inference.Laplace().fit(varying, tasks[:8], compile=False)
    renamed = inference.Laplace().fit(other, tasks, compile=False)
    for reference, fit, words in [
        (fitted, fitted, "one of Laplace"),
        (made, renamed, "one of the program varying, not of .*other"),
        (made, few, "fitted to other rows"),
    ]:
        with pytest.raises(DataError, match=words):
            hbmeta.diagnose(fit, reference=reference)
    # New tasks count among the rows that a reference has to know.
    hbmeta.diagnose(few, tasks[8:], reference=made, draws=300)


def test_programs_without_priors_of_theta_have_no_reference_in_common():
    known = case("linear_own_nested")
    fitted = inference.ExactLinear().fit(known.program, known.tasks, compile=False)
    assert reference_fit(fitted) is None


@pytest.mark.slow
def test_chains_judge_where_nested_laplace_does_not_apply():
    """More than 64 effects of level 1: too many for NestedLaplace, and NUTS draws them."""

    def program(x, y=None, *, task, n_tasks):
        tau = pyro.sample("tau", dist.LogNormal(0.0, 0.3))
        z = pyro.sample("z", dist.Normal(x.new_zeros(70), 1.0).to_event(1))
        with pyro.plate("task", n_tasks):
            person = pyro.sample("person", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("point", x.shape[0]):
            pyro.sample("y", dist.Normal(tau * z[x[:, 0].long()] + person[task], 1.5), obs=y)

    rng = np.random.default_rng(0)
    task, item = np.arange(60) % 10, rng.integers(0, 70, 60)
    y = np.linspace(-1.5, 1.5, 70)[item] + rng.standard_normal(10)[task]
    y += 1.5 * rng.standard_normal(60)
    tasks = Tasks.from_flat(item[:, None].astype(float), y, task, 10)
    fitted = inference.Laplace().fit(program, tasks, compile=False)
    found = hbmeta.diagnose(fitted)
    assert found.reference.startswith("NUTS (")
    (symptom,) = (s for s in found.symptoms if s.about == "reference")
    assert symptom.name == "reference by NestedLaplace"
    assert "found 71" in symptom.measured
    assert found.verdict_of_means == "right"
    assert hbmeta.diagnose(fitted, reference="nested").verdict != "right"


def test_verdicts_count_errors():
    assert verdict_of(0.0, 1.0, 2000, 4000) == ("right", pytest.approx(1.0, abs=1e-6))
    assert verdict_of(0.29, 1.0, 2000, 4000)[0] == "right"
    assert verdict_of(0.29, 1.0, 2000, 4000)[1] < 0.9
    assert verdict_of(0.32, 1.0, 2000, 4000)[0] == "wrong"
    assert verdict_of(0.2, 1.0, 30, 4000)[0] == "unverified"
    assert verdict_of(5.0, 1.0, 30, 4000)[0] == "wrong"
    assert verdict_of(math.inf, math.nan, 2000, 4000) == ("wrong", 1.0)
    assert summed_up(["right"] * 9 + ["wrong"]) == "right"
    assert summed_up(["right"] * 8 + ["wrong"] * 2) == "wrong"
    assert summed_up(["right"] * 8 + ["unverified"] * 2) == "unverified"


def test_the_record_prints_and_is_read_back(right, tmp_path):
    text = right.to_json(tmp_path / "diagnosis.json")
    assert hbmeta.Diagnosis.from_json((tmp_path / "diagnosis.json").read_text()) == right
    assert json.loads(text)["verdict"] == "right"
    assert "12 tasks: right" in str(right)
    assert "No symptoms." in str(right)
    assert list(right.to_frame().verdict) == ["right"] * 12
    with pytest.raises(FileError, match=r"Diagnosis\.to_json wrote"):
        hbmeta.Diagnosis.from_json(text.replace('"kind": "diagnosis"', '"kind": "fitted"'))


def test_the_seed_decides_and_the_state_of_others_is_left_alone(fitted, tasks, untouched):
    with untouched():
        one, same = (hbmeta.diagnose(fitted, tasks, draws=300, seed=5) for _ in range(2))
    assert one.parameters == same.parameters
    assert isinstance(fitted.posterior.density, Gaussian | Empirical)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"reference": "truth"}, "'truth'"),
        ({"draws": 50}, "50"),
        ({"tasks": 3}, "int"),
        ({"seed": 1.5}, "1.5"),
    ],
)
def test_bad_arguments_are_refused(fitted, tasks, arguments, found):
    with pytest.raises(DataError, match=found):
        hbmeta.diagnose(fitted, **{"tasks": tasks, **arguments})


def test_what_is_no_fit_is_refused(tasks):
    with pytest.raises(DataError, match="what fit returns"):
        hbmeta.diagnose(tasks)
