import json
import traceback
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from scipy import stats
from torch.fx.experimental.proxy_tensor import make_fx

import hbmeta as hb
from hbmeta.errors import DataError, FileError, UnsupportedModelError
from hbmeta.inference import AmortizedGuide, ExactLinear, Laplace
from hbmeta.models import FormulaModel, from_formula, model_from_state
from hbmeta.parametrisation import choosable_sites
from hbmeta.problem import Problem
from hbmeta.program import isolated

DATA = Path(__file__).resolve().parents[1] / "data"
SLEEP = "reaction ~ days + (1 + days | subject)"


def sleep() -> pd.DataFrame:
    return pd.read_csv(DATA / "sleepstudy.csv")


def ratings(n: int = 48, seed: int = 3) -> pd.DataFrame:
    """Eight raters, six items in three rooms, and a response for every family."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=n)
    return pd.DataFrame(
        {
            "rater": [f"Prüfer {i % 8}" for i in range(n)],
            "item": [int(i) for i in draw.integers(1, 7, n)],
            "room": draw.choice(["r", "s", "t"], n),
            "x": x,
            "z": draw.normal(2.0, 3.0, n),
            "arm": draw.choice(["a", "b", "c"], n),
            "size": draw.integers(5, 12, n),
            "gaussian": 2.0 + x + draw.normal(size=n),
            "student_t": draw.standard_t(3.0, n),
            "bernoulli": draw.integers(0, 2, n),
            "binomial": draw.integers(0, 5, n),
            "poisson": draw.poisson(3.0, n),
            "negative_binomial": draw.poisson(draw.gamma(1.0, 3.0, n)),
        }
    )


def traced(program, tasks, values=None, seed=0):
    """A trace of a program on tasks, latents drawn where they are not given."""
    run = program if values is None else poutine.condition(program, values)
    with torch.random.fork_rng(devices=[]), isolated(tasks.flat_x):
        torch.manual_seed(seed)
        trace = poutine.trace(run).get_trace(
            tasks.flat_x, tasks.flat_y, task=tasks.task, n_tasks=tasks.n_tasks
        )
        trace.compute_log_prob()
    return trace


def drawn(trace) -> dict[str, torch.Tensor]:
    return {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"]
        if type(site["fn"]).__name__ != "_Subsample"
    }


def arrays(values) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in values.items()}


# Against truth


def test_log_joint_is_that_of_a_program_written_by_hand():
    """A random intercept, beside the same model as a person writes it: equal to 1e-12."""
    frame = sleep()
    y, days = frame["reaction"].to_numpy(), frame["days"].to_numpy()
    numbers = [float(f"{v:.4g}") for v in (y.mean(), y.std(), 2.5 * y.std() / days.std())]
    wide = float(f"{np.hypot(2.5 * y.std(), 2.5 * y.std() / days.std() * days.mean()):.4g}")

    def by_hand(x, y=None, *, task, n_tasks):
        intercept = pyro.sample("intercept", dist.Normal(numbers[0], wide))
        slope = pyro.sample("slope", dist.Normal(0.0, numbers[2]))
        spread = pyro.sample("spread", dist.HalfNormal(wide))
        noise = pyro.sample("sd", dist.HalfNormal(1.0).mask(False))
        half_t = dist.StudentT(4.0, 0.0, numbers[1]).log_prob(noise) + np.log(2.0)
        pyro.factor("half_t", half_t)
        with pyro.plate("task", n_tasks, dim=-1):
            own = pyro.sample("own", dist.Normal(intercept, spread))
        with pyro.plate("point", x.shape[0], dim=-1):
            pyro.sample("y", dist.Normal(own[task] + slope * x[:, 0], noise), obs=y)

    model = from_formula("reaction ~ days + (1 | subject)", frame)
    tasks = model.tasks(frame).tasks
    for seed in range(3):
        trace = traced(model, tasks, seed=seed)
        found = drawn(trace)
        values = {
            "intercept": found["fixed"][0],
            "slope": found["fixed"][1],
            "spread": found["scale"][0],
            "sd": found["noise"],
            "own": found["coefficients"][:, 0],
        }
        expected = traced(by_hand, tasks, values).log_prob_sum()
        torch.testing.assert_close(trace.log_prob_sum(), expected, rtol=1e-12, atol=1e-9)


def test_log_joint_of_correlated_effects_is_scipys():
    frame = sleep()
    model = from_formula(SLEEP, frame)
    tasks = model.tasks(frame).tasks
    trace = traced(model, tasks)
    v = arrays(drawn(trace))
    y, days = frame["reaction"].to_numpy(), frame["days"].to_numpy()
    slope = 2.5 * y.std() / days.std()
    wide = np.hypot(2.5 * y.std(), slope * days.mean())
    scales = [float(f"{s:.4g}") for s in (wide, slope)]
    centre, spread = float(f"{y.mean():.4g}"), float(f"{y.std():.4g}")
    factor = v["scale"][:, None] * v["correlation"]
    own = v["coefficients"][pd.factorize(frame["subject"])[0]]
    expected = (
        stats.norm.logpdf(v["fixed"], [centre, 0.0], scales).sum()
        + stats.halfnorm.logpdf(v["scale"], scale=scales).sum()
        + np.log(0.5)  # LKJ(1) of two: the correlation is uniform on (-1, 1)
        + np.log(2.0)
        + stats.t.logpdf(v["noise"], 4.0, scale=spread)
        + stats.multivariate_normal.logpdf(v["coefficients"], v["fixed"], factor @ factor.T).sum()
        + stats.norm.logpdf(y, own[:, 0] + own[:, 1] * days, v["noise"]).sum()
    )
    np.testing.assert_allclose(float(trace.log_prob_sum()), expected, rtol=1e-11)


def test_exact_linear_takes_it_and_is_the_closed_form():
    frame = sleep()
    model = from_formula(SLEEP, frame)
    known = model.tasks(frame)
    fitted = ExactLinear().fit(model, known, compile=False)
    v = arrays(fitted.globals())
    factor = v["scale"][:, None] * v["correlation"]
    covariance, noise = factor @ factor.T, v["noise"] ** 2
    posterior = fitted.adapt(known.tasks)
    for i, subject in enumerate(known.ids[:3]):
        rows = frame[frame["subject"] == subject]
        design = np.column_stack([np.ones(len(rows)), rows["days"]])
        precision = np.linalg.inv(covariance) + design.T @ design / noise
        mean = np.linalg.solve(
            precision,
            np.linalg.solve(covariance, v["fixed"]) + design.T @ rows["reaction"] / noise,
        )
        evidence = stats.multivariate_normal.logpdf(
            rows["reaction"],
            design @ v["fixed"],
            design @ covariance @ design.T + noise * np.eye(len(rows)),
        )
        np.testing.assert_allclose(posterior.density.loc[i], mean, rtol=1e-8)
        tril = posterior.density.scale[i].numpy()
        np.testing.assert_allclose(tril @ tril.T, np.linalg.inv(precision), rtol=1e-7)
        np.testing.assert_allclose(posterior.info["log_evidence"][i], evidence, rtol=1e-9)


def test_crossed_and_nested_groups_stand_at_level_one():
    frame = ratings()
    formula = (
        "gaussian ~ x + arm + z + offset(log(size)) + (1 + z | rater) + (0 + x + arm || rater)"
        " + (1 + x | item) + (1 | room/item)"
    )
    model = from_formula(formula, frame, group="rater")
    tasks = model.tasks(frame)
    trace = traced(model, tasks.tasks, seed=1)
    v = arrays(drawn(trace))
    # Back to the order of the table.
    order = tasks.support_rows.numpy()
    eta = np.empty(len(frame))
    eta[order] = trace.nodes["y"]["fn"].loc.numpy()
    rater = pd.factorize(frame["rater"])[0]
    item, room = pd.factorize(frame["item"])[0], pd.factorize(frame["room"])[0]
    both = pd.factorize(frame["room"] + ":" + frame["item"].astype(str))[0]
    x, z = frame["x"].to_numpy(), frame["z"].to_numpy()
    arms = np.column_stack([(frame["arm"] == a).to_numpy(float) for a in "abc"])
    factor = v["scale_item"][:, None] * v["correlation_item"]
    by_item = v["z_item"] @ factor.T
    assert model.design.common == ("Intercept", "x", "arm[T.b]", "arm[T.c]", "z")
    first, second = v["coefficients"][rater], v["coefficients_2"][rater]
    expected = (
        first[:, 0]
        + first[:, 1] * z
        + second[:, 0] * x
        + (second[:, 1:] * arms).sum(1)
        + arms[:, 1:] @ v["fixed"][2:4]
        + np.log(frame["size"])
        + by_item[item, 0]
        + by_item[item, 1] * x
        + v["scale_room"][0] * v["z_room"][room, 0]
        + v["scale_room_item"][0] * v["z_room_item"][both, 0]
    )
    np.testing.assert_allclose(eta, expected, rtol=1e-12, atol=1e-12)
    # The means: of the constant and z in the first block, of x alone in the second.
    np.testing.assert_array_equal(trace.nodes["coefficients"]["fn"].loc[0], v["fixed"][[0, 4]])
    np.testing.assert_array_equal(
        trace.nodes["coefficients_2"]["fn"].base_dist.loc[0], [v["fixed"][1], 0.0, 0.0, 0.0]
    )


RESPONSES = {
    "gaussian": lambda y, eta, v, n: stats.norm.logpdf(y, eta, v["noise"]),
    "student_t": lambda y, eta, v, n: stats.t.logpdf(y, v["degrees_of_freedom"], eta, v["noise"]),
    "bernoulli": lambda y, eta, v, n: stats.bernoulli.logpmf(y, 1 / (1 + np.exp(-eta))),
    "binomial": lambda y, eta, v, n: stats.binom.logpmf(y, n, 1 / (1 + np.exp(-eta))),
    "poisson": lambda y, eta, v, n: stats.poisson.logpmf(y, np.exp(eta)),
    "negative_binomial": lambda y, eta, v, n: stats.nbinom.logpmf(
        y, v["shape"], v["shape"] / (v["shape"] + np.exp(eta))
    ),
}


@pytest.mark.parametrize("family", RESPONSES)
def test_likelihood_is_scipys_and_predictions_follow(family):
    frame = ratings()
    response = "p(binomial, size)" if family == "binomial" else family
    model = from_formula(f"{response} ~ x + (1 | rater)", frame, family)
    tasks = model.tasks(frame)
    values = {"fixed": torch.tensor([0.3, 0.4]), "scale": torch.tensor([0.6])}
    trace = traced(model, tasks.tasks, {n: v.double() for n, v in values.items()}, seed=2)
    v = arrays(drawn(trace)) | arrays(values)
    rows = frame.iloc[tasks.support_rows.numpy()]
    eta = v["coefficients"][tasks.tasks.task.numpy(), 0] + v["fixed"][1] * rows["x"].to_numpy()
    expected = RESPONSES[family](rows[family].to_numpy(), eta, v, rows["size"].to_numpy())
    np.testing.assert_allclose(trace.nodes["y"]["log_prob"], expected, rtol=1e-6, atol=1e-9)
    predictive = Laplace().fit(model, tasks, compile=False).predict(frame.head(4))
    assert predictive["status"].tolist() == ["known"] * 4
    assert (predictive["lower"] <= predictive["mean"]).all()
    assert (predictive["mean"] <= predictive["upper"]).all()


# The text


def program_of(source: str):
    namespace: dict[str, object] = {}
    exec(source, namespace)
    return namespace["model"]


FORMULAS = [
    (SLEEP, sleep, "gaussian"),
    ("bernoulli ~ x * arm + z + (1 + x || rater) + (1 | item)", ratings, "bernoulli"),
    ("p(binomial, size) ~ 0 + arm + (1 | room:item)", ratings, "binomial"),
    ("negative_binomial ~ bs(x, df=5) + (1 + arm | room) + (0 + z | room)", ratings, None),
]


@pytest.mark.parametrize(("formula", "frame", "family"), FORMULAS)
def test_the_text_is_the_program(formula, frame, family):
    frame = frame()
    model = from_formula(formula, frame, family or "negative_binomial")
    assert str(model) == model.source
    assert all(len(line) <= 100 for line in model.source.splitlines())
    tasks = model.tasks(frame).tasks
    program = program_of(model.source)
    trace = traced(model, tasks)
    again = traced(program, tasks, drawn(trace))
    assert float(trace.log_prob_sum()) == float(again.log_prob_sum())
    assert Problem(program, tasks).sites == Problem(model, tasks).sites


def test_an_edited_text_is_a_program_too():
    frame = sleep()
    model = from_formula(SLEEP, frame)
    edited = model.source.replace("dist.Normal(eta, noise)", "dist.StudentT(4.0, eta, noise)")
    assert edited != model.source
    tasks = model.tasks(frame)
    fitted = Laplace().fit(program_of(edited), tasks, compile=False)
    assert fitted.problem.sites.observed[0].family == "StudentT"
    assert fitted.predict(frame.head(2))["status"].tolist() == ["known", "known"]


def test_tracebacks_show_the_text():
    model = from_formula(SLEEP, sleep())
    with torch.random.fork_rng(devices=[]), pytest.raises(IndexError) as caught:
        model(torch.zeros(3, 0), task=torch.zeros(3, dtype=torch.int64), n_tasks=1)
    assert "x[:, 0]" in "".join(traceback.format_tb(caught.value.__traceback__))


def test_a_formula_cannot_end_the_docstring_of_its_program():
    frame = ratings().assign(**{'a """ b': lambda f: f["x"]})
    frame["arm"] = frame["arm"].replace({"b": "b\\"})
    model = from_formula('gaussian ~ `a """ b` + arm + (1 | rater)', frame)
    namespace: dict[str, object] = {}
    exec(model.source, namespace)
    assert namespace["__doc__"].startswith('gaussian ~ `a """ b` + arm + (1 | rater)')
    assert "    1  arm[T.b\\]\n" in namespace["__doc__"]


# Priors


def test_priors_are_scaled_as_bambis():
    """The rules of Bambi's PriorScaler, on columns that are not centred."""
    frame = ratings()
    model = from_formula("gaussian ~ x + z + (1 + x | rater) + (0 + arm | item)", frame)
    y, x, z = (frame[name].to_numpy() for name in ("gaussian", "x", "z"))
    slopes = {"x": 2.5 * y.std() / x.std(), "z": 2.5 * y.std() / z.std()}
    wide = np.sqrt(
        (2.5 * y.std()) ** 2 + (slopes["x"] * x.mean()) ** 2 + (slopes["z"] * z.mean()) ** 2
    )
    trace = traced(model, model.tasks(frame).tasks)

    def base(name):
        return trace.nodes[name]["fn"].base_dist

    np.testing.assert_allclose(base("fixed").loc, [y.mean(), 0.0, 0.0], rtol=5e-4)
    np.testing.assert_allclose(base("fixed").scale, [wide, slopes["x"], slopes["z"]], rtol=5e-4)
    np.testing.assert_allclose(base("scale").scale, [wide, slopes["x"]], rtol=5e-4)
    arms = [2.5 * y.std() / (frame["arm"] == a).to_numpy().std() for a in "abc"]
    np.testing.assert_allclose(base("scale_item").scale, arms, rtol=5e-4)
    assert trace.nodes["correlation"]["fn"].concentration == 1.0
    np.testing.assert_allclose(base("noise").scale, y.std(), rtol=5e-4)
    link = from_formula("poisson ~ x + (1 | rater)", frame, "poisson")
    wide = np.hypot(2.5, 2.5 / x.std() * x.mean())
    prior = traced(link, link.tasks(frame).tasks).nodes["fixed"]["fn"].base_dist
    np.testing.assert_allclose(prior.loc, [0.0, 0.0])
    np.testing.assert_allclose(prior.scale, [wide, 2.5 / x.std()], rtol=5e-4)


def test_priors_are_those_that_bambi_prints():
    """bambi.Model(SLEEP, frame) of Bambi 0.16.0 on the same table; ours have four digits."""
    frame = sleep()
    model = from_formula(SLEEP, frame)
    trace = traced(model, model.tasks(frame).tasks)
    fixed, scale, noise = (trace.nodes[n]["fn"].base_dist for n in ("fixed", "scale", "noise"))
    np.testing.assert_allclose(fixed.loc, [285.8774, 0.0], rtol=5e-4)
    np.testing.assert_allclose(fixed.scale, [245.6466, 46.0138], rtol=5e-4)
    np.testing.assert_allclose(scale.scale, [245.6466, 46.0138], rtol=5e-4)
    np.testing.assert_allclose([noise.df, noise.loc, noise.scale], [4.0, 0.0, 52.8659], rtol=5e-4)


def test_priors_of_ones_own():
    priors = {
        "x": "Normal(1, 0.5)",
        "scale": dist.HalfCauchy(2.0),
        "correlation": "dist.LKJCholesky(2, 4.0)",
        "noise": "Exponential(rate=0.5)",
    }
    frame = ratings()
    model = from_formula("gaussian ~ x + (1 + x | rater)", frame, priors=priors)
    trace = traced(model, model.tasks(frame).tasks)
    v = arrays(drawn(trace))
    prior = trace.nodes["fixed"]["fn"].base_dist
    assert (prior.loc[1], prior.scale[1]) == (1.0, 0.5)
    np.testing.assert_allclose(
        trace.nodes["scale"]["log_prob"], stats.halfcauchy.logpdf(v["scale"], scale=2.0).sum()
    )
    assert trace.nodes["correlation"]["fn"].concentration == 4.0
    np.testing.assert_allclose(
        trace.nodes["noise"]["log_prob"], stats.expon.logpdf(v["noise"], scale=2.0)
    )


BAD_PRIORS = {
    "a name that is none": ({"nois": "HalfNormal(1)"}, "Was 'noise' meant"),
    "no distribution": ({"noise": "Half(1)"}, "no distribution 'Half'"),
    "code": ({"noise": "__import__('os')"}, "the prior of 'noise'.*__import__"),
    "code in an argument": ({"noise": "HalfNormal(print(1))"}, "no distribution 'print'"),
    "another attribute": ({"noise": "HalfNormal(1).__class__(2)"}, "no distribution"),
    "text as a number": ({"noise": "HalfNormal('a')"}, "'a' in it"),
    "a negative scale": ({"noise": "HalfNormal(-1.0)"}, "the prior of 'noise'"),
    "a vector": ({"scale": "HalfNormal(x.new_tensor([1.0, 2.0, 3.0]))"}, r"of shape \(3,\)"),
    "a coefficient": ({"x": "StudentT(3, 0, 1)"}, "a Normal as the prior of the coefficient"),
    "batches": ({"noise": dist.HalfNormal(torch.ones(2))}, "distributions of one number"),
}


@pytest.mark.parametrize("name", BAD_PRIORS)
def test_says_what_is_wrong_with_a_prior(name):
    priors, found = BAD_PRIORS[name]
    with pytest.raises(DataError, match=found):
        from_formula("gaussian ~ x + (1 + x | rater)", ratings(), priors=priors)


# Strategies, new tables, files


def test_strategies_see_a_site_that_can_be_centered():
    frame = sleep()
    for formula in (SLEEP, "reaction ~ days + (1 + days || subject)"):
        model = from_formula(formula, frame)
        problem = Problem(model, model.tasks(frame).tasks)
        assert problem.layout == "flat"
        assert choosable_sites(problem, problem.batch(model.tasks(frame).tasks)) == (
            "coefficients",
        )


def test_a_traced_graph_agrees_with_the_program():
    frame = ratings()
    formula = "poisson ~ x + arm * z + (1 + x | rater) + (1 + z | item)"
    model = from_formula(formula, frame, "poisson")
    problem = Problem(model, model.tasks(frame).tasks)
    batch = problem.batch(model.tasks(frame).tasks)
    draw = torch.Generator().manual_seed(0)

    def near(value):
        return value + 0.1 * torch.randn(value.shape, generator=draw, dtype=value.dtype)

    theta = {name: near(value) for name, value in problem.theta(batch).items()}
    phi = near(problem.location(theta, batch))

    def gradients(theta, phi):
        phi = phi.requires_grad_()
        moving = {name: value.requires_grad_() for name, value in theta.items()}
        total = sum(term.sum() for term in problem.terms(moving, phi, batch))
        return torch.autograd.grad(total, [phi, *moving.values()])

    def clones():
        return {name: value.detach().clone() for name, value in theta.items()}, phi.clone()

    found = make_fx(gradients)(*clones())(*clones())
    torch.testing.assert_close(found, list(gradients(*clones())), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_strategies_fit_crossed_groups():
    frame = ratings()
    model = from_formula("poisson ~ x + (1 + x | rater) + (1 | item)", frame, "poisson")
    tasks = model.tasks(frame)
    fits = [Laplace().fit(model, tasks, compile=tier) for tier in (False, "graph")]
    found = [fitted.globals()["fixed"] for fitted in fits]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert fits[0].info["integrated"] == ["z_item"]
    with pytest.raises(UnsupportedModelError, match=r"'z_item'.*Laplace\(integrated"):
        AmortizedGuide().fit(model, tasks, steps=60, seed=0)


def test_predictions_for_known_and_new_groups_after_a_file(tmp_path):
    frame = sleep()
    model = from_formula("reaction ~ scale(days) + (1 + scale(days) | subject)", frame)
    fitted = ExactLinear().fit(model, model.tasks(frame), compile=False)
    rows = pd.DataFrame({"subject": ["s01", "new", "Jörg M"], "days": [3, 4, 5]})
    support = pd.DataFrame({"subject": ["new"], "days": [0], "reaction": [300.0]})
    before = fitted.predict(rows, support=support)
    assert before["status"].tolist() == ["known", "adapted", "new"]
    fitted.save(tmp_path / "fit")
    pd.testing.assert_frame_equal(hb.load(tmp_path / "fit").predict(rows, support=support), before)
    # A new group without rows is the population: fixed · (1, (5 − mean) / sd).
    days = frame["days"]
    expected = arrays(fitted.globals())["fixed"] @ [1.0, (5 - days.mean()) / days.std(ddof=1)]
    np.testing.assert_allclose(before["mean"].iloc[2], expected, rtol=1e-9)


def test_predictions_for_a_nested_task_show_both_columns():
    frame = ratings()
    model = from_formula("gaussian ~ x + (1 | room/item)", frame)
    fitted = Laplace().fit(model, model.tasks(frame), compile=False)
    found = fitted.predict(frame.head(2))
    assert list(found.columns[:3]) == ["room", "item", "status"]
    with pytest.raises(DataError, match="levels of 'room' that were fitted"):
        fitted.predict(frame.head(2).assign(room="u"))


def test_effects_of_other_groups_reach_arviz():
    frame = ratings()
    model = from_formula("gaussian ~ x + (1 | rater) + (1 + x | item)", frame)
    fitted = Laplace().fit(model, model.tasks(frame), compile=False)
    posterior = fitted.to_inference_data().posterior
    assert posterior["coefficients"].shape[-2:] == (8, 1)
    assert fitted.globals()["effects_item"].shape[-2:] == (6, 2)


def test_a_model_is_built_again_from_its_state():
    frame = ratings()
    model = from_formula("poisson ~ bs(x, df=4) + arm + (1 | rater) + (1 | item)", frame, "poisson")
    again = model_from_state(json.loads(json.dumps(model.state())))
    assert isinstance(again, FormulaModel)
    assert again.source == model.source
    tables = [m.tasks(frame.iloc[5:20]).tasks for m in (model, again)]
    torch.testing.assert_close(tables[0].flat_x, tables[1].flat_x, rtol=0, atol=0)


def test_a_state_cannot_hold_another_prior():
    state = from_formula(SLEEP, sleep()).state()
    state["settings"]["priors"]["noise"] = "print(1)"
    with pytest.raises(FileError, match="no distribution 'print'"):
        model_from_state(state)


# What it says


def test_missing_rows_are_counted_in_a_warning():
    frame = sleep()
    frame.loc[3, "reaction"] = np.nan
    frame.loc[[8, 9], "days"] = np.nan
    with pytest.warns(UserWarning, match="3 of 180 rows have a missing value"):
        model = from_formula(SLEEP, frame)
    assert model.tasks(frame).dropped == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_formula(SLEEP, frame.dropna())


def test_two_levels_of_a_bernoulli_response():
    frame = ratings().assign(use=lambda f: f["bernoulli"].map({0: "N", 1: "Y"}))
    tasks = from_formula("use ~ x + (1 | rater)", frame, "bernoulli").tasks(frame)
    assert tasks.schema.y_levels == ("N", "Y")
    np.testing.assert_array_equal(
        tasks.tasks.flat_y, frame["bernoulli"].to_numpy()[tasks.support_rows]
    )


def test_the_task_is_a_choice_and_is_said():
    frame = ratings()
    formula = "gaussian ~ x + (1 | rater) + (1 | item)"
    assert (
        "The task is rater. Other groups: item (6 levels)." in from_formula(formula, frame).source
    )
    model = from_formula(formula, frame, group="item")
    assert "The task is item. Other groups: rater (8 levels)." in model.source
    assert model.tasks(frame).n_tasks == 6


BAD = {
    "family": ("gaussian ~ (1 | rater)", "gamma", "a family among gaussian"),
    "no trials": ("binomial ~ (1 | rater)", "binomial", r"p\(successes, trials\) with family"),
    "trials": ("p(binomial, size) ~ (1 | rater)", "poisson", r"p\(successes, trials\) with"),
    "too few trials": ("p(size, binomial) ~ (1 | rater)", "binomial", "whole y between 0 and"),
    "halves as counts": ("gaussian ~ (1 | rater)", "poisson", r"whole y of at least 0 \(poisson"),
    "negative counts": ("item - 3 ~ (1 | rater)", "negative_binomial", r"\(negative_binomial\)"),
    "text as numbers": ("arm ~ (1 | rater)", "gaussian", "a numeric response"),
    "three levels": ("arm ~ (1 | rater)", "bernoulli", "two levels with family 'bernoulli'"),
    "a constant": ("gaussian ~ one + (1 | rater)", "gaussian", "column 'one' with different"),
    "a constant y": ("one ~ (1 | rater)", "gaussian", "y with different values"),
    "one group": ("gaussian ~ (1 | one)", "gaussian", "two groups or more of 'one'"),
    "no group": ("gaussian ~ x", "gaussian", r"a term \(effects \| group\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_says_what_does_not_fit(name):
    formula, family, found = BAD[name]
    with pytest.raises(DataError, match=found):
        from_formula(formula, ratings().assign(one=1), family)


def test_refuses_tasks_of_other_columns_and_dtypes_that_round_codes():
    frame = ratings(600).assign(item=lambda f: np.arange(600) // 2, rater=np.arange(600))
    model = from_formula("gaussian ~ x + (1 | rater) + (1 | item)", frame, group="rater")
    tasks = model.tasks(frame).tasks
    with pytest.raises(DataError, match="counts to 300"):
        model.bind(tasks.to(dtype=torch.bfloat16))
    assert model.bind(tasks.to(dtype=torch.float32)) is model
    other = from_formula("gaussian ~ z + (1 | rater)", frame)
    with pytest.raises(DataError, match="the columns of the formula"):
        other.bind(tasks)
    with pytest.raises(DataError, match="a floating dtype"):
        from_formula("gaussian ~ x + (1 | rater)", frame, dtype=torch.int64)
