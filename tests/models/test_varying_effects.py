import json
import warnings

import numpy as np
import pandas as pd
import pyro.poutine as poutine
import pytest
import torch
from scipy import stats
from torch.fx.experimental.proxy_tensor import make_fx

from hbmeta.errors import DataError, FileError, ProgramError, UnsupportedModelError
from hbmeta.models import Priors, VaryingEffects, model_from_state
from hbmeta.problem import Problem
from hbmeta.tasks import Tasks, from_frame, load_radon

FAMILIES = ["gaussian", "student_t", "bernoulli", "poisson", "binomial"]
FEATURES = ["dose", "age", "exposure", "trials"]
COUNTS = [3, 1, 0, 5]


def data(family: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tasks:
    """Four ragged tasks, one of them empty, with a response that the family can have."""
    draw = np.random.default_rng(seed)
    n = sum(COUNTS)
    x = np.column_stack(
        [
            draw.normal(2.0, 1.5, n),
            draw.uniform(20.0, 60.0, n),
            draw.uniform(-1.0, 1.0, n),
            draw.integers(1, 9, n),
        ]
    )
    y = {
        "gaussian": draw.normal(5.0, 3.0, n),
        "student_t": draw.standard_t(3.0, n),
        "bernoulli": draw.integers(0, 2, n).astype(float),
        "poisson": draw.poisson(3.0, n).astype(float),
        "binomial": np.floor(x[:, 3] * draw.uniform(size=n)),
    }[family]
    task = np.repeat(np.arange(len(COUNTS)), COUNTS)
    tensors = torch.tensor(x, dtype=dtype), torch.tensor(y, dtype=dtype)
    return Tasks.from_flat(*tensors, task, len(COUNTS), ids=list("abcd"), features=FEATURES)


def model(family: str, **arguments) -> VaryingEffects:
    arguments.setdefault("fixed", ["age"])
    arguments.setdefault("varying", ["intercept", "dose"])
    if family == "poisson":
        arguments.setdefault("offset", "exposure")
    if family == "binomial":
        arguments.setdefault("totals", "trials")
    return VaryingEffects(family=family, **arguments)


def unconstrained(problem: Problem, tasks: Tasks, seed: int = 1):
    """A point θ, φ away from the start."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {site.name: site.unconstrained_shape for site in problem.sites.globals}
    theta = {
        name: 0.3 * torch.randn(shape, generator=draw, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    size = (tasks.n_tasks, problem.sites.phi_size)
    return theta, torch.randn(size, generator=draw, dtype=torch.float64)


def log_likelihood(family: str, tasks: Tasks, values: dict, eta: np.ndarray) -> np.ndarray:
    """(rows,) log p(y | η) by scipy."""
    y, x = tasks.flat_y.numpy(), tasks.flat_x.numpy()
    if family == "gaussian":
        return stats.norm.logpdf(y, eta, values["noise"])
    if family == "student_t":
        return stats.t.logpdf(y, values["degrees_of_freedom"], eta, values["noise"])
    if family == "bernoulli":
        return stats.bernoulli.logpmf(y, 1 / (1 + np.exp(-eta)))
    if family == "poisson":
        return stats.poisson.logpmf(y, np.exp(eta + x[:, 2]))
    return stats.binom.logpmf(y, x[:, 3], 1 / (1 + np.exp(-eta)))


def log_prior(bound: VaryingEffects, values: dict) -> float:
    """log p(θ) with the Jacobians of exp, by scipy."""
    scales = bound.bound_scales
    total = stats.norm.logpdf(values["mean"], scales.mean_location, scales.mean_scale).sum()
    total += stats.halfnorm.logpdf(values["scale"], scale=scales.effect_scale).sum()
    total += np.log(values["scale"]).sum()
    if "fixed" in values:
        total += stats.norm.logpdf(values["fixed"], scales.fixed_location, scales.fixed_scale).sum()
    if "noise" in values:
        total += stats.halfnorm.logpdf(values["noise"], scale=scales.noise_scale)
        total += np.log(values["noise"])
    if "degrees_of_freedom" in values:
        nu = values["degrees_of_freedom"]
        total += stats.gamma.logpdf(nu, 2.0, scale=1 / 0.1) + np.log(nu)
    return float(total)


@pytest.mark.parametrize("layout", ["nested", "flat"])
@pytest.mark.parametrize("family", FAMILIES)
def test_densities_are_those_written_by_hand(family, layout):
    tasks = data(family)
    bound = model(family).bind(tasks)
    problem = Problem(bound, tasks, layout=layout)
    theta, phi = unconstrained(problem, tasks)
    # Away from saturation, where a logit rounds differently here and in scipy.
    theta["fixed"] = 0.02 * theta["fixed"]
    likelihood, local, shared = problem.terms(theta, phi, problem.batch(tasks))

    positive = ("scale", "noise", "degrees_of_freedom")
    values = {k: (v.exp() if k in positive else v).numpy() for k, v in theta.items()}
    coefficients = values["mean"] + values["scale"] * phi.numpy()
    x, task = tasks.flat_x.numpy(), tasks.task.numpy()
    eta = coefficients[task, 0] + coefficients[task, 1] * x[:, 0] + values["fixed"][0] * x[:, 1]
    cells = log_likelihood(family, tasks, values, eta)
    per_task = np.bincount(task, cells, minlength=len(COUNTS))

    np.testing.assert_allclose(likelihood, per_task, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(local, stats.norm.logpdf(phi).sum(1), rtol=1e-12)
    np.testing.assert_allclose(shared, log_prior(bound, values), rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_agree_with_their_gradients(family):
    tasks = data(family)
    bound = model(family).bind(tasks)
    found = []
    for layout in ("nested", "flat"):
        problem = Problem(bound, tasks, layout=layout)
        theta, phi = unconstrained(problem, tasks)
        inputs = [value.requires_grad_() for value in (phi, *theta.values())]
        terms = problem.terms(theta, phi, problem.batch(tasks))
        gradients = torch.autograd.grad(sum(term.sum() for term in terms), inputs)
        found.append([*terms, *gradients])
    for nested, flat in zip(*found, strict=True):
        torch.testing.assert_close(nested, flat, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", ["nested", "flat"])
@pytest.mark.parametrize("family", FAMILIES)
def test_can_be_traced_and_mapped(family, layout):
    tasks = data(family)
    problem = Problem(model(family).bind(tasks), tasks, layout=layout)
    batch = problem.batch(tasks)
    theta, phi = unconstrained(problem, tasks)

    def total(theta, phi):
        return sum(term.sum() for term in problem.terms(theta, phi, batch))

    graph = make_fx(torch.func.grad(total, (0, 1)))(theta, phi)
    other_theta, other_phi = unconstrained(problem, tasks, seed=2)
    torch.testing.assert_close(
        graph(other_theta, other_phi), torch.func.grad(total, (0, 1))(other_theta, other_phi)
    )
    both = {name: torch.stack([theta[name], other_theta[name]]) for name in theta}
    mapped = problem.particle_log_likelihood(both, True, torch.stack([phi, other_phi]), batch)
    torch.testing.assert_close(mapped[0], problem.log_likelihood(theta, phi, batch))
    torch.testing.assert_close(mapped[1], problem.log_likelihood(other_theta, other_phi, batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_follows_the_dtype_of_the_data(family):
    tasks = data(family, dtype=torch.float32)
    bound = model(family).bind(tasks)
    problem = Problem(bound, tasks)
    batch = problem.batch(tasks)
    terms = problem.terms(problem.theta(batch), torch.zeros(4, 2), batch)
    assert {term.dtype for term in terms} == {torch.float32}
    assert bound(tasks.x).dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_y_in_both_layouts(family):
    tasks = data(family)
    bound = model(family).bind(tasks)
    torch.manual_seed(0)
    nested = bound(tasks.x)
    flat = bound(tasks.flat_x, task=tasks.task, n_tasks=tasks.n_tasks)
    assert nested.shape == (4, 5)
    assert flat.shape == (9,)
    support = poutine.trace(bound).get_trace(tasks.x).nodes["y"]["fn"].support
    assert bool(support.check(nested).all())


def test_sites_are_those_of_the_docstring():
    tasks = data("student_t")
    sites = Problem(model("student_t").bind(tasks), tasks).sites
    assert {site.name: site.shape for site in sites.globals} == {
        "mean": (2,),
        "scale": (2,),
        "fixed": (1,),
        "noise": (),
        "degrees_of_freedom": (),
    }
    assert [(site.name, site.shape) for site in sites.locals] == [("z", (2,))]
    assert [(site.name, site.shape) for site in sites.deterministic_local] == [
        ("coefficients", (2,))
    ]
    assert sites.response == "y"


def test_given_degrees_of_freedom_are_no_site():
    tasks = data("student_t")
    bound = model("student_t", degrees_of_freedom=4.0).bind(tasks)
    problem = Problem(bound, tasks)
    batch = problem.batch(tasks)
    theta = problem.theta(batch)
    assert "degrees_of_freedom" not in theta
    response = problem.response(theta, torch.zeros(4, 2, dtype=torch.float64), batch)
    torch.testing.assert_close(response.df, torch.full((9,), 4.0, dtype=torch.float64))


def test_coefficients_are_deterministic_values():
    tasks = data("gaussian")
    problem = Problem(model("gaussian").bind(tasks), tasks)
    theta, phi = unconstrained(problem, tasks)
    values = problem.values(theta, phi, problem.batch(tasks))
    torch.testing.assert_close(
        values["coefficients"], theta["mean"] + theta["scale"].exp() * phi, rtol=1e-12, atol=0.0
    )


def test_is_the_radon_model_of_posteriordb():
    # alpha ~ N(mu_alpha, sigma_alpha); mu_alpha, beta ~ N(0, 10); sigma_alpha, sigma_y ~
    # half-N(0, 1); log_radon ~ N(alpha[county] + log_uppm beta1 + floor beta2, sigma_y).
    # With alpha = mu + sigma z the density of z is that of alpha times sigma_alpha^J.
    tasks = load_radon().tasks
    priors = Priors(
        intercept_location=0.0,
        intercept_scale=10.0,
        coefficient_scale=10.0,
        effect_scale=1.0,
        noise_scale=1.0,
    )
    bound = VaryingEffects(["log_uranium", "floor"], ["intercept"], priors=priors).bind(tasks)
    problem = Problem(bound, tasks)
    theta, z = unconstrained(problem, tasks)
    found = sum(float(term.sum()) for term in problem.terms(theta, z, problem.batch(tasks)))

    mu, sigma = float(theta["mean"]), float(theta["scale"].exp())
    beta, noise = theta["fixed"].numpy(), float(theta["noise"].exp())
    alpha = mu + sigma * z[:, 0].numpy()
    floor, uranium = tasks.flat_x.numpy().T
    predictor = alpha[tasks.task.numpy()] + uranium * beta[0] + floor * beta[1]
    expected = (
        stats.norm.logpdf(tasks.flat_y.numpy(), predictor, noise).sum()
        + stats.norm.logpdf(alpha, mu, sigma).sum()
        + len(alpha) * np.log(sigma)
        + stats.norm.logpdf([mu, *beta], 0.0, 10.0).sum()
        + stats.halfnorm.logpdf([sigma, noise]).sum()
        + np.log(sigma * noise)
    )
    assert found == pytest.approx(expected, rel=1e-12)


# Priors scaled from the data


def test_scaled_priors_are_those_of_bambi():
    tasks = data("gaussian")
    scales = model("gaussian").bind(tasks).bound_scales
    dose, age, y = tasks.flat_x[:, 0].numpy(), tasks.flat_x[:, 1].numpy(), tasks.flat_y.numpy()
    b_dose, b_age = 2.5 * y.std() / dose.std(), 2.5 * y.std() / age.std()
    intercept = np.sqrt(
        (2.5 * y.std()) ** 2 + (b_dose * dose.mean()) ** 2 + (b_age * age.mean()) ** 2
    )
    np.testing.assert_allclose(scales.mean_location, [y.mean(), 0.0])
    np.testing.assert_allclose(scales.mean_scale, [intercept, b_dose])
    np.testing.assert_allclose(scales.effect_scale, [2.5 * y.std(), b_dose])
    np.testing.assert_allclose((scales.fixed_location, scales.fixed_scale), [[0.0], [b_age]])
    np.testing.assert_allclose(scales.noise_scale, y.std())


@pytest.mark.parametrize(
    ("family", "location"), [("bernoulli", 0.0), ("binomial", 0.0), ("poisson", None)]
)
def test_scaled_priors_of_families_with_a_link(family, location):
    tasks = data(family)
    scales = model(family, fixed=["intercept"], varying=["dose"]).bind(tasks).bound_scales
    if location is None:
        exposure = tasks.flat_x[:, 2].exp().sum()
        location = float(((tasks.flat_y.sum() + 0.5) / exposure).log())
    dose = tasks.flat_x[:, 0].numpy()
    b = 2.5 / dose.std()
    np.testing.assert_allclose(scales.fixed_location, [location])
    np.testing.assert_allclose(scales.fixed_scale, [np.hypot(2.5, b * dose.mean())])
    np.testing.assert_allclose((scales.mean_scale, scales.effect_scale), [[b], [b]])
    assert scales.noise_scale is None


def test_counts_that_are_all_zero_have_a_finite_prior():
    tasks = Tasks([[[0.0], [1.0]]], [[0.0, 0.0]], features=["dose"])
    bound = VaryingEffects(fixed=[], family="poisson").bind(tasks)
    assert bound.bound_scales.mean_location == [pytest.approx(np.log(0.25))]


def test_a_bound_model_keeps_its_priors():
    tasks = data("gaussian")
    bound = model("gaussian").bind(tasks)
    part = bound.bind(tasks[[0, 3]])
    assert part.bound() == bound.bound()
    assert model("gaussian").bind(tasks[[0, 3]]).bound() != bound.bound()
    # Columns are found by name.
    other = Tasks.from_flat(
        tasks.flat_x.flip(1), tasks.flat_y, tasks.task, 4, features=FEATURES[::-1]
    )
    rebound = bound.bind(other)
    assert rebound.bound_scales == bound.bound_scales
    theta, phi = unconstrained(Problem(bound, tasks), tasks)
    first, second = Problem(bound, tasks), Problem(rebound, other)
    torch.testing.assert_close(
        first.log_likelihood(theta, phi, first.batch(tasks)),
        second.log_likelihood(theta, phi, second.batch(other)),
    )


def test_binding_leaves_the_model_as_it_was():
    unbound = model("gaussian")
    unbound.bind(data("gaussian"))
    assert unbound.bound() is None
    assert not list(unbound.buffers())


def test_classes_as_whole_numbers_are_a_bernoulli_response():
    tasks = data("bernoulli")
    labels = Tasks.from_flat(tasks.flat_x, tasks.flat_y.long(), tasks.task, 4, features=FEATURES)
    found = []
    for these in (tasks, labels):
        problem = Problem(model("bernoulli").bind(these), these)
        theta, phi = unconstrained(problem, these)
        found.append(problem.log_likelihood(theta, phi, problem.batch(these)))
    torch.testing.assert_close(*found)


# Saving


@pytest.mark.parametrize("family", FAMILIES)
def test_state_through_json_gives_the_same_densities(family):
    tasks = data(family)
    bound = model(family, priors=Priors(effect_scale=0.7)).bind(tasks)
    again = model_from_state(json.loads(json.dumps(bound.state(), allow_nan=False)))
    assert again.state() == bound.state()
    found = []
    for these in (bound, again):
        problem = Problem(these, tasks)
        theta, phi = unconstrained(problem, tasks)
        found.append(problem.terms(theta, phi, problem.batch(tasks)))
    for before, after in zip(*found, strict=True):
        assert torch.equal(before, after)


def test_state_of_an_unbound_model():
    unbound = model("student_t", degrees_of_freedom=5.0)
    again = model_from_state(json.loads(json.dumps(unbound.state())))
    assert again.bound() is None
    assert again.settings() == unbound.settings()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"class": "Regression"}, UnsupportedModelError, ["VaryingEffects", "model=program"]),
        ({"settings": {"colour": 1}}, FileError, ["colour"]),
        ({"bound": {"features": []}}, FileError, ["scales"]),
        ({"settings": {"family": "weibull"}}, FileError, ["weibull"]),
    ],
)
def test_a_foreign_state_is_refused(change, error, words):
    state = model("gaussian").bind(data("gaussian")).state()
    with pytest.raises(error) as caught:
        model_from_state({**state, **change})
    assert all(word in str(caught.value) for word in words)


def test_an_incomplete_state_is_refused():
    with pytest.raises(FileError, match="'bound'"):
        model_from_state({"class": "VaryingEffects"})


# Errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"family": "gamma"}, ["gaussian", "'gamma'", "HierarchicalModel"]),
        ({"fixed": "dose"}, ["fixed=['dose']"]),
        ({"varying": []}, ["varies", "CompletePooling"]),
        ({"fixed": ["dose"], "varying": ["dose"]}, ["'dose' in both", "out of fixed"]),
        ({"fixed": ["intercept"]}, ["'intercept' in both"]),
        ({"fixed": ["dose", "dose"]}, ["'dose' more than once"]),
        ({"offset": "exposure"}, ["'poisson' only", "'gaussian'", "Leave offset out"]),
        ({"totals": "trials"}, ["'binomial' only", "Leave totals out"]),
        ({"degrees_of_freedom": 3.0}, ["'student_t' only"]),
        ({"family": "student_t", "degrees_of_freedom": 0.0}, ["positive", "0.0"]),
        ({"family": "binomial"}, ["numbers of trials", "totals="]),
    ],
)
def test_impossible_arguments(arguments, words):
    with pytest.raises(DataError) as caught:
        VaryingEffects(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("effect_scale", 0.0), ("noise_scale", -1.0), ("intercept_location", float("nan"))],
)
def test_impossible_priors(name, value):
    with pytest.raises(DataError, match=name):
        Priors(**{name: value})


@pytest.mark.parametrize(
    "arguments",
    [
        {"fixed": ["doze"]},
        {"fixed": [], "varying": ["doze"]},
        {"family": "poisson", "offset": "doze"},
        {"family": "binomial", "totals": "doze"},
    ],
)
def test_an_unknown_column_is_named_with_the_nearest(arguments):
    family = arguments.pop("family", "gaussian")
    with pytest.raises(DataError) as caught:
        model(family, **arguments).bind(data(family))
    assert "'doze'" in caught.value.needed
    assert "'dose'" in caught.value.do


@pytest.mark.parametrize(
    ("family", "row", "value", "words"),
    [
        ("bernoulli", 3, 2.0, ["0 or 1", "2.0 in task 'b'"]),
        ("poisson", 0, -1.0, ["at least 0", "-1.0 in task 'a'"]),
        ("poisson", 8, 1.5, ["whole", "1.5 in task 'd'"]),
        ("binomial", 3, 20.0, ["'trials'", "20.0 in task 'b'"]),
        ("binomial", 3, 0.5, ["whole", "0.5 in task 'b'"]),
    ],
)
def test_a_response_outside_the_family_is_named(family, row, value, words):
    tasks = data(family)
    y = tasks.flat_y.clone()
    y[row] = value
    wrong = Tasks.from_flat(tasks.flat_x, y, tasks.task, 4, ids=tasks.ids, features=FEATURES)
    with pytest.raises(DataError) as caught:
        model(family).bind(wrong)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_numbers_of_trials_must_be_whole():
    tasks = data("binomial")
    x = tasks.flat_x.clone()
    x[4, 3] = 2.5
    wrong = Tasks.from_flat(x, tasks.flat_y, tasks.task, 4, ids=tasks.ids, features=FEATURES)
    with pytest.raises(DataError, match=r"2\.5 in task 'd'"):
        model("binomial").bind(wrong)


def test_a_constant_column_needs_a_scale():
    tasks = Tasks([[[3.0], [3.0]]], [[0.0, 1.0]], features=["dose"])
    with pytest.raises(DataError) as caught:
        VaryingEffects(["dose"]).bind(tasks)
    assert "'dose'" in caught.value.needed
    assert "coefficient_scale" in caught.value.do
    VaryingEffects(["dose"], priors=Priors(coefficient_scale=1.0)).bind(tasks)
    with pytest.raises(DataError, match="effect_scale"):
        VaryingEffects(varying=["dose"], priors=Priors(coefficient_scale=1.0)).bind(tasks)


def test_a_constant_response_needs_scales():
    tasks = Tasks([[[3.0], [4.0]]], [[1.0, 1.0]])
    with pytest.raises(DataError, match=r"found 1\.0 in all 2 rows"):
        VaryingEffects().bind(tasks)
    numbers = Priors(intercept_scale=1.0, effect_scale=1.0, noise_scale=1.0)
    VaryingEffects(priors=numbers).bind(tasks)


def test_a_column_called_intercept_must_be_the_constant():
    x = torch.ones(2, 3, 1, dtype=torch.float64)
    y = torch.arange(6, dtype=torch.float64).reshape(2, 3)
    VaryingEffects().bind(Tasks(x, y, features=["intercept"]))
    with pytest.raises(DataError, match="Rename"):
        VaryingEffects().bind(Tasks(2 * x, y, features=["intercept"]))


@pytest.mark.parametrize("y", [None, torch.zeros(2, 3, 2)])
def test_a_scalar_response_is_needed(y):
    with pytest.raises(DataError, match="one number y per row"):
        VaryingEffects().bind(Tasks(torch.zeros(2, 3, 1), y))


def test_an_unbound_model_says_so():
    tasks = data("gaussian")
    with pytest.raises(ProgramError, match="bind"):
        Problem(model("gaussian"), tasks)


def test_other_columns_than_those_bound_are_refused():
    bound = model("gaussian").bind(data("gaussian"))
    with pytest.raises(ProgramError, match="'dose', 'age'"):
        bound(torch.zeros(2, 3, 5))


def test_entries_of_vectors_are_named_after_their_columns():
    tasks = data("gaussian")
    bound = model("gaussian").bind(tasks)
    problem = Problem(bound, tasks)
    names = bound.coordinates()
    assert names["coefficients"] == ["intercept", "dose"]
    assert names["fixed"] == ["age"]
    sites = problem.sites.globals + problem.sites.locals + problem.sites.deterministic_local
    assert all(site.shape == (len(names[site.name]),) for site in sites if site.shape)


# Columns by the names of the data frame


def arms() -> Tasks:
    """Tasks of a data frame with a categorical column of three levels."""
    draw = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "clinic": np.repeat(["p", "q", "r"], 6),
            "arm": list("abcabc") * 3,
            "age": draw.normal(50, 5, 18),
            "y": draw.normal(0, 1, 18),
        }
    )
    return from_frame(frame, group="clinic", x=["arm", "age"], y="y").tasks


def test_a_categorical_column_stands_for_all_its_levels():
    tasks = arms()
    given = VaryingEffects(fixed=["arm", "age"])
    bound = given.bind(tasks)
    assert given.fixed == ("arm", "age")
    assert bound.fixed == ("arm[b]", "arm[c]", "age")
    long = VaryingEffects(fixed=["arm[b]", "arm[c]", "age"]).bind(tasks)
    assert bound.bound() == long.bound()
    assert bound.settings() == long.settings()
    assert bound.bind(tasks).fixed == bound.fixed
    assert VaryingEffects(fixed=["age"], varying=["intercept", "arm"]).bind(tasks).varying == (
        "intercept",
        "arm[b]",
        "arm[c]",
    )
    with pytest.raises(DataError, match=r"'arm\[b\]' in both"):
        VaryingEffects(fixed=["arm"], varying=["intercept", "arm[b]"]).bind(tasks)
    with pytest.raises(DataError, match="needed a column 'arms'"):
        VaryingEffects(fixed=["arms"]).bind(tasks)


def test_forgotten_columns_are_warned_of():
    tasks = arms()
    with pytest.warns(UserWarning, match=r"does not use the columns 'arm\[b\]', .*'age' of x"):
        bound = VaryingEffects().bind(tasks)
    with pytest.warns(UserWarning, match=r"does not use the columns 'arm\[c\]' of x"):
        VaryingEffects(fixed=["arm[b]"]).bind(tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bound.bind(tasks)
        VaryingEffects(fixed=["arm"]).bind(tasks)
        VaryingEffects(fixed=[]).bind(tasks)
        # Columns without a name of their own.
        VaryingEffects().bind(Tasks(tasks.x, tasks.y))
