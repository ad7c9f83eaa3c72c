"""The contract: every strategy on every case, as tests/contract_matrix.py says; no skips."""

import contextlib
import math
import warnings
from functools import cache

import numpy as np
import pyro
import pytest
import torch

from hbmeta import errors, inference, models
from hbmeta.densities import Delta, Empirical, Gaussian
from hbmeta.loading import strategies
from hbmeta.tasks import Tasks
from tests import contract_matrix, reference
from tests.cases import NAMES, case, rows_of
from tests.contract_matrix import STRATEGIES, Refuses, Works

WORKING = contract_matrix.pairs(Works)
REFUSING = contract_matrix.pairs(Refuses)
# Cases whose posterior is known, on which NUTS must be right; the others only need some draws.
MEASURED = ("linear_own_nested", "linear_own_flat", "eight_schools", "gamma_poisson")

# Strategies that do not train by steps.
CLOSED = ("ExactLinear", "NoPooling", "CompletePooling", "ExactGP", "Quadrature")

# One point of φ per task.
POINTS = ("MAML", "FOMAML", "Reptile", "MetaSGD", "ANIL", "ImplicitMAML", "NoPooling")

# Cases on which L-BFGS takes thousands of evaluations: traced ones are cheaper.
NETWORKS = ("neural_regression", "neural_zero", "neural_classifier", "latent_process")

# Rounding decides to which of many equal modes or ridges a saddle at φ = 0 is left.
MANY_MODES = [
    (s, "neural_zero") for s in ("NUTS", "NoPooling", "Laplace", "Variational", "Pathfinder")
]

# The rest of the gradient lens: among them momentum, learned step sizes and recomputed steps. The
# inner problem of a ReLU network has kinks, which damping makes harmless.
LENS = {
    "FOMAML": lambda name: inference.FOMAML(steps=2, step_size=0.05, optimizer="momentum"),
    "Reptile": lambda name: inference.Reptile(steps=2, step_size=0.05),
    "MetaSGD": lambda name: inference.MetaSGD(step_size=0.05),
    "ANIL": lambda name: inference.ANIL(steps=2, step_size=0.05, recompute=True),
    "ImplicitMAML": lambda name: inference.ImplicitMAML(damping=100.0 if name in NETWORKS else 3.0),
}

# Draws and densities; chains and particles as few as show that the contract holds.
POSTERIORS = {
    "Laplace": lambda: inference.Laplace(),
    "Variational": lambda: inference.Variational(draws=2, fixed_draws=8),
    "SGLD": lambda: inference.SGLD(draws=20, warmup=20, thin=1, chains=2),
    "SGHMC": lambda: inference.SGHMC(draws=20, warmup=20, thin=1, chains=2),
    "ABML": lambda: inference.ABML(steps=2),
    "BMAML": lambda: inference.BMAML(steps=2, particles=3),
    "PLATIPUS": lambda: inference.PLATIPUS(steps=2, particles=6),
    "Pathfinder": lambda: inference.Pathfinder(paths=2, draws=100, iterations=8),
    "NestedLaplace": lambda: inference.NestedLaplace(draws=400, proposals=8, rounds=1),
    "PACBayes": lambda: inference.PACBayes(scale=1.0, steps=20),
}
# Where all of the contract is run fast; on the other programs their outcome is, the rest is slow.
EVERYWHERE = ("linear_given_theta", "varying_intercepts", "gamma_poisson", "neural_zero")


# Searches over all weights of networks, which take up to half a minute.
LONG = {
    ("Quadrature", "latent_process"),
    ("NoPooling", "latent_process"),
    ("CompletePooling", "latent_process"),
    ("NoPooling", "neural_zero"),
    ("CompletePooling", "neural_zero"),
    ("CompletePooling", "neural_regression"),
    ("Pathfinder", "neural_zero"),
    ("Variational", "neural_zero"),
}


def _marks(strategy, name):
    later = strategy in POSTERIORS and name not in EVERYWHERE
    return [pytest.mark.slow] * (later or (strategy, name) in LONG)


each_working_pair = pytest.mark.parametrize(
    ("strategy", "name"), [pytest.param(*pair, marks=_marks(*pair)) for pair in WORKING]
)


def strategy_of(strategy, name, *, small):
    """The settings of the suite, and the arguments of fit; `small` is the least that runs."""
    if strategy == "NUTS":
        draws, warmup, depth = (250, 250, 10) if name in MEASURED else (30, 30, 4)
        if small:
            draws, warmup, depth = 3, 4, 3
        chosen = inference.NUTS(draws=draws, warmup=warmup, max_tree_depth=depth, chains=2)
        return chosen, {"compile": False if small else "graph"}
    if strategy == "MAML":
        return inference.MAML(steps=3, step_size=0.05), {"steps": 2 if small else 20}
    if strategy in LENS:
        return LENS[strategy](name), {"steps": 2 if small else 5}
    if strategy in POSTERIORS:
        return POSTERIORS[strategy](), {"steps": 2 if small else 5}
    if strategy == "AmortizedGuide":
        return inference.AmortizedGuide(hidden=16), {"steps": 2 if small else 20}
    if strategy == "LatentNP":
        return inference.LatentNP(hidden=16, draws=4), {"steps": 2 if small else 20}
    if strategy == "Quadrature":
        several = name == "latent_process"
        return inference.Quadrature(nodes=32 if several else 100), {"compile": several and "graph"}
    if strategy == "ProtoNet":
        return inference.ProtoNet(plug_in=False), {"steps": 2 if small else 20}
    return getattr(inference, strategy)(), {"compile": name in NETWORKS and "graph"}


def fit(strategy, name, *, small=False):
    """The fit, and the warnings that it gave; those on short runs of samplers are expected."""
    chosen, arguments = strategy_of(strategy, name, small=small)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted = chosen.fit(
            case(name).program, case(name).tasks, **{"compile": False, "seed": 0, **arguments}
        )
    # Short chains are warned of.
    short = ("NUTS: ", "SGLD", "SGHMC", "Pathfinder: ", "NestedLaplace: ")
    found = [str(w.message) for w in caught if not str(w.message).startswith(short)]
    # A few training steps and inner steps end far from a mode.
    expected = ("torch.jit", "near the mode of log p(S, φ | θ)")
    return fitted, [message for message in found if not any(part in message for part in expected)]


fit_once = cache(fit)


@contextlib.contextmanager
def expected_warnings_allowed(fitted):
    """Short chains of NUTS leave few effective draws.

    The weights of a network have many modes and no finite maximum of the likelihood: there NUTS and
    NoPooling say so whenever they adapt.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="NUTS.adapt: task")
        warnings.filterwarnings("ignore", message="SG(LD|HMC)|Variational")
        if isinstance(fitted.model, models.NeuralRegression):
            no_maximum = "NoPooling.adapt: the likelihood has no maximum"
            for message in ("(NUTS|Pathfinder).adapt: the draws of task .* are poor", no_maximum):
                warnings.filterwarnings("ignore", message=message)
        yield


def adapt(fitted, support):
    with expected_warnings_allowed(fitted):
        return fitted.adapt(support, seed=3)


def tensors_of(posterior):
    """θ and the numbers of the density, by name."""
    density = {k: v for k, v in vars(posterior.density).items() if isinstance(v, torch.Tensor)}
    return {**posterior.theta, **density}


def without_task(tasks: Tasks, *empty: int) -> Tasks:
    """The tasks with the rows of some of them taken away."""
    return tasks.keep(~torch.isin(tasks.task, torch.tensor(empty)))


def centre(predictive):
    """The mean of y, or the probabilities of the classes."""
    numbers = predictive.tasks.flat_y.is_floating_point()
    return predictive.mean if numbers else predictive.probabilities


# The matrix


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        pytest.param(s, n, marks=[pytest.mark.slow] * ((s, n) in LONG))
        for n in NAMES
        for s in STRATEGIES
    ],
)
def test_outcome_is_as_committed(strategy, name):
    expected = contract_matrix.outcome(strategy, name)
    if isinstance(expected, Refuses):
        with pytest.raises(getattr(errors, expected.error)) as caught:
            fit(strategy, name, small=True)
        assert caught.value.needed == expected.needed
        assert expected.found in caught.value.found
        assert caught.value.do
        return
    fitted, messages = fit_once(strategy, name)
    if expected.warning:
        assert [m[: len(expected.warning)] for m in messages] == [expected.warning]
    else:
        assert messages == []
    with expected_warnings_allowed(fitted):
        assert fitted.posterior.ids == case(name).tasks.ids


def test_matrix_page_is_up_to_date():
    assert contract_matrix.PAGE.read_text(encoding="utf-8") == contract_matrix.render(), (
        "run python -m tests.contract_matrix"
    )


def test_matrix_is_complete():
    assert tuple(contract_matrix.MATRIX) == NAMES
    assert {len(row) for row in contract_matrix.MATRIX.values()} == {STRATEGIES.index("Laplace")}
    assert set(strategies()) == set(STRATEGIES)
    assert len(WORKING) + len(REFUSING) == len(NAMES) * len(STRATEGIES)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_adapting_may_change_settings_that_there_are(strategy):
    chosen, _ = strategy_of(strategy, "linear_given_theta", small=True)
    assert set(chosen.adaptable()) <= set(chosen.settings())
    assert chosen.replaced(**{name: getattr(chosen, name) for name in chosen.adaptable()}) == chosen


# What working means


@each_working_pair
def test_same_seed_gives_the_same_bits_and_leaves_no_trace(strategy, name, untouched):
    # Parameters of these names in the store must neither be read nor written.
    with pyro.get_param_store().scope():
        for parameter in ("noise", "weight", "mu"):
            pyro.get_param_store().setdefault(parameter, torch.tensor(77.0))
        # What has no small fit need not do the large one three times.
        made = fit_once(strategy, name)[0] if strategy in CLOSED else None
        runs = []
        with untouched():
            for fitted in (
                made or fit(strategy, name, small=True)[0],
                fit(strategy, name, small=True)[0],
            ):
                posterior = adapt(fitted, case(name).tasks)
                mean = centre(posterior.predict(case(name).tasks, draws=10))
                runs.append({**fitted.theta, **tensors_of(posterior), "mean of y": mean})
    first, second = runs
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key
        assert first[key].dtype == torch.float64, key


@each_working_pair
def test_order_of_support_rows_does_not_matter(strategy, name):
    tasks = case(name).tasks
    turned = Tasks.from_flat(
        tasks.flat_x.flip(0),
        tasks.flat_y.flip(0),
        tasks.task.flip(0),
        tasks.n_tasks,
        ids=tasks.ids,
        features=tasks.features,
    )
    fitted, _ = fit_once(strategy, name)
    posteriors = [adapt(fitted, part) for part in (tasks, turned)]
    if (strategy, name) in MANY_MODES:
        # No one answer to agree on: either search went up from the saddle.
        problem, batch = fitted.problem, fitted.problem.batch(tasks)
        start = problem.location(fitted.theta, batch)
        before = problem.log_likelihood(fitted.theta, start, batch)
        for posterior in posteriors:
            drawn = posterior.particles(1000)
            each = problem.particle_log_likelihood(fitted.theta, False, drawn.phi, batch)
            assert bool((each.amax(0) > before).all())
        return
    one, other = map(tensors_of, posteriors)
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-7, atol=1e-9)


@each_working_pair
def test_adapting_leaves_theta_and_predictions_are_finite(strategy, name):
    tasks = case(name).tasks
    fitted, _ = fit_once(strategy, name)
    before = {key: value.clone() for key, value in fitted.theta.items()}
    own = {} if fitted.own is None else {k: v.clone() for k, v in fitted.own.state_dict().items()}
    posterior = adapt(fitted, tasks)
    predictive = posterior.predict(tasks, draws=50)
    assert centre(predictive).shape[:2] == tasks.y.shape
    assert bool(torch.isfinite(centre(predictive)).all())
    if tasks.y.is_floating_point():
        assert predictive.mean.shape == predictive.variance.shape == tasks.y.shape
        assert bool((predictive.variance >= 0).all())
    assert bool(torch.isfinite(predictive.log_prob(tasks.y)).all())
    if fitted.problem.classes is not None and not isinstance(posterior.density, Delta):
        with pytest.raises(errors.UnsupportedModelError, match="joint probability of the labels"):
            predictive.log_prob(tasks.y, joint=True)
    else:
        joint = predictive.log_prob(tasks.y, joint=True)
        assert joint.shape == (tasks.n_tasks,)
        assert bool(torch.isfinite(joint).all())
    draws = posterior.sample(7, seed=1)
    sites = fitted.problem.sites
    assert set(draws) == {s.name for s in (*sites.locals, *sites.deterministic_local)}
    for site in sites.locals:
        assert draws[site.name].shape == (7, tasks.n_tasks, *site.shape)
        assert bool(torch.isfinite(draws[site.name]).all())
    assert before.keys() == fitted.theta.keys()
    assert all(torch.equal(before[key], fitted.theta[key]) for key in before)
    if fitted.own is not None:
        assert all(torch.equal(own[k], v) for k, v in fitted.own.state_dict().items())


@each_working_pair
def test_empty_support(strategy, name):
    tasks = case(name).tasks
    fitted, _ = fit_once(strategy, name)
    full = adapt(fitted, tasks)
    one_empty = adapt(fitted, without_task(tasks, 0))
    all_empty = adapt(fitted, without_task(tasks, *range(tasks.n_tasks)))
    # An empty task changes nothing for the others.
    others = torch.arange(1, tasks.n_tasks)
    with_it, without = (vars(p.density.select(others)) for p in (full, one_empty))
    for key, value in with_it.items():
        if value is not None:
            torch.testing.assert_close(value, without[key], rtol=1e-7, atol=1e-9)
    for posterior in (one_empty, all_empty):
        _check_prior(strategy, name, fitted, posterior)
    predictive = one_empty.predict(tasks, draws=50)
    assert bool(torch.isfinite(centre(predictive)).all())
    assert (
        all_empty.predict(without_task(tasks, *range(tasks.n_tasks)), draws=5).tasks.n_points == 0
    )


def _check_prior(strategy, name, fitted, posterior):
    """The first task, which has no rows, is what the strategy says of a task without data."""
    problem, density = fitted.problem, posterior.density
    batch = problem.batch(case(name).tasks)
    if strategy == "CompletePooling":
        torch.testing.assert_close(density.loc[0], fitted.info["phi"].reshape(-1), rtol=0, atol=0)
        return
    if strategy in ("ExactGP", "Quadrature"):
        _check_nodes_of_prior(name, fitted, posterior)
        return
    if strategy in ("SGLD", "SGHMC", "BMAML", "PLATIPUS"):
        # Chains that have not run long, and particles around a start: near the location.
        assert bool(torch.isfinite(density.phi[:, 0]).all())
        return
    if isinstance(density, Empirical):
        _check_draws_of_prior(name, fitted, posterior)
        return
    if strategy == "Variational" and not case(name).gaussian_prior:
        # The Gaussian that is nearest to the prior, wherever that is.
        assert bool(torch.isfinite(posterior.info["bound"]).all())
        return
    location = problem.location(fitted.theta, batch).detach()[0]
    close = 1e-6 if strategy == "Variational" else 1e-12  # the tolerance of its search
    torch.testing.assert_close(density.loc[0], location, rtol=close, atol=close)
    assert isinstance(density, Delta if strategy in POINTS else Gaussian)
    # A factorised Gaussian has no correlated prior.
    factorised = strategy in ("ABML", "PACBayes") and name.startswith("linear_")
    if isinstance(density, Gaussian) and case(name).gaussian_prior and not factorised:
        # Two Gaussians are the same where their densities agree at several points.
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            noise = torch.randn(density.loc.shape, generator=generator, dtype=torch.float64)
            phi = density.loc + density.sd * noise
            prior = problem.log_task_prior(fitted.theta, phi, batch)[0]
            torch.testing.assert_close(density.log_prob(phi)[0], prior, rtol=1e-8, atol=1e-8)


def _check_nodes_of_prior(name, fitted, posterior):
    """Nodes of the prior: they integrate to 1, and are where it is."""
    density = posterior.density
    assert float(posterior.info["log_evidence"][0]) == pytest.approx(0.0, abs=1e-5)
    if case(name).gaussian_prior:
        batch = fitted.problem.batch(case(name).tasks)
        location = fitted.problem.location(fitted.theta, batch)[0]
        assert bool(((density.mean[0] - location).abs() < 1e-5 * density.sd[0]).all())


def _check_draws_of_prior(name, fitted, posterior):
    """Draws of the prior: no data have evidence 1, and values are distributed as p(φ | θ_s)."""
    density, info = posterior.density, posterior.info
    log_evidence = info["log_evidence"][..., 0]
    if case(name).gaussian_prior and not int(posterior.support.counts.sum()):
        torch.testing.assert_close(
            log_evidence, torch.zeros_like(log_evidence), rtol=0.0, atol=1e-6
        )
    else:
        # Averages of importance weights, whose proposal may be chosen for the other tasks' sake.
        assert float(log_evidence.exp().mean()) == pytest.approx(1.0, abs=0.1)
    # The prior's own draws, at the same draws of θ, against the posterior's: the weighted means
    # differ by less than 5 standard errors (both counted), a false alarm in 1e-6 per number.
    assert bool(torch.isfinite(density.phi).all())
    mean, sd = density.mean[0], density.sd[0]
    location = _locations(fitted, posterior, case(name).tasks)
    effective = float(density.effective_draws[0])
    assert effective > 0.5 * density.phi.shape[0]
    assert bool(((mean - location).abs() < 5 * sd / math.sqrt(effective) + 0.5 * sd).all())


def _locations(fitted, posterior, tasks):
    """(phi_size,) mean over the draws of θ of the task prior's location, for the first task."""
    problem, theta = fitted.problem, posterior.theta
    batch = problem.batch(tasks)
    if not posterior.drawn:
        return problem.location(theta, batch)[0]
    draws = posterior.density.phi.shape[0]
    at = [problem.location({k: v[s] for k, v in theta.items()}, batch)[0] for s in range(draws)]
    return torch.stack(at).mean(0)


# Agreement with the exact posterior


@pytest.mark.parametrize("name", ["linear_given_theta", "linear_own_nested", "linear_own_flat"])
def test_exact_linear_is_exact(name):
    """Claimed to rounding: 1e-10 against the dense conditional of the joint Gaussian."""
    known = case(name)
    posterior = adapt(fit_once("ExactLinear", name)[0], known.tasks)
    np.testing.assert_allclose(posterior.density.loc, known.posterior[0], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(posterior.density.sd, known.posterior[1], rtol=1e-10)
    np.testing.assert_allclose(posterior.info["log_evidence"], known.log_evidence, rtol=1e-10)


@pytest.mark.parametrize("name", MEASURED)
def test_nuts_agrees_within_monte_carlo_error(name):
    """Means and sds within 4 of their Monte Carlo standard errors.

    A false alarm has probability 6e-5 per number where the error is known; it is estimated from 500
    draws, so say 1e-3, and there are 16 numbers per case: 2 % per case for an arbitrary seed.
    """
    known = case(name)
    fitted, _ = fit_once("NUTS", name)
    draws = fitted.posterior.values(10_000)[0][known.site]
    chains = draws.reshape(2, -1, *draws.shape[1:]).numpy()
    mean, sd = (np.asarray(v) for v in known.posterior)
    errors_of = {kind: reference.monte_carlo_error(chains, kind) for kind in ("mean", "sd")}
    assert (np.abs(chains.mean((0, 1)) - mean) < 4 * errors_of["mean"]).all()
    assert (np.abs(chains.std((0, 1)) - sd) < 4 * errors_of["sd"]).all()


def test_nuts_adapts_exactly_where_theta_is_given():
    """Linear-Gaussian: closed form. Gamma-Poisson: importance sampling, 5 standard errors."""
    known = case("linear_own_nested")
    posterior = adapt(fit_once("NUTS", "linear_own_nested")[0], known.tasks)
    np.testing.assert_allclose(posterior.density.loc, known.posterior[0], rtol=1e-8)
    np.testing.assert_allclose(posterior.density.sd, known.posterior[1], rtol=1e-8)
    np.testing.assert_allclose(posterior.info["log_evidence"], known.log_evidence, rtol=1e-8)
    known = case("gamma_poisson")
    posterior = adapt(fit_once("NUTS", "gamma_poisson")[0], known.tasks)
    mean, sd = posterior.moments()["rate"]
    effective = posterior.info["effective_draws"].numpy()
    assert (effective > 700).all()  # of 1,000
    assert (
        np.abs(mean.numpy() - known.posterior[0]) < 5 * known.posterior[1] / np.sqrt(effective)
    ).all()
    np.testing.assert_allclose(sd, known.posterior[1], rtol=0.15)
    np.testing.assert_allclose(posterior.info["log_evidence"], known.log_evidence, atol=0.05)


def test_nuts_adapts_to_the_joint_posterior_of_new_tasks():
    """Fitted on six schools, adapted to two: weighted draws give the posterior given all eight.

    Some 500 draws of θ reweighted by two schools: means within 0.25 and sds within 25 % of the sd.
    """
    known = case("eight_schools")
    chosen, arguments = strategy_of("NUTS", "eight_schools", small=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = chosen.fit(known.program, known.tasks[:6], seed=1, **arguments)
    posterior = adapt(fitted, known.tasks[6:])
    mean, sd = posterior.moments()["effect"]
    # Each new school joins the six by itself.
    for position in (0, 1):
        rows = [*range(6), 6 + position]
        y = [float(known.tasks.flat_y[i]) for i in rows]
        sigma = [float(known.tasks.flat_x[i, 0]) for i in rows]
        exact_mean, exact_sd = reference.normal_means_posterior(y, sigma, 5.0, 5.0)["effect"]
        assert abs(float(mean[position]) - exact_mean[-1]) < 0.25 * exact_sd[-1]
        assert float(sd[position]) == pytest.approx(exact_sd[-1], rel=0.25)


def test_nuts_fit_does_not_depend_on_the_order_of_rows():
    """In distribution: the means of two fits differ by less than 5 standard errors (1e-6 each)."""
    known = case("linear_own_nested")
    tasks = known.tasks
    turned = Tasks.from_flat(
        tasks.flat_x.flip(0), tasks.flat_y.flip(0), tasks.task.flip(0), tasks.n_tasks,
        ids=tasks.ids, features=tasks.features,
    )  # fmt: skip
    chosen, arguments = strategy_of("NUTS", "linear_own_nested", small=False)
    means, squares = [], 0.0
    for data in (tasks, turned):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fitted = chosen.fit(known.program, data, seed=2, **arguments)
        draws = fitted.density.phi.reshape(2, chosen.draws, -1).numpy()
        means.append(draws.mean((0, 1)))
        squares = squares + reference.monte_carlo_error(draws, "mean") ** 2
    assert (np.abs(means[0] - means[1]) < 5 * np.sqrt(squares)).all()


@pytest.mark.parametrize("name", ["linear_given_theta", "linear_own_flat", "gamma_poisson"])
def test_no_pooling_is_maximum_likelihood(name):
    known = case(name)
    posterior = adapt(fit_once("NoPooling", name)[0], known.tasks)
    found = posterior.values()[0][known.site][0]
    np.testing.assert_allclose(found, known.maximum_likelihood, rtol=1e-7)
    of_the_fit = fit_once("NoPooling", name)[0].posterior.values()[0][known.site][0]
    np.testing.assert_allclose(of_the_fit, known.maximum_likelihood, rtol=1e-4)


def test_complete_pooling_is_maximum_likelihood_of_all_rows():
    known = case("linear_given_theta")
    found = adapt(fit_once("CompletePooling", "linear_given_theta")[0], known.tasks).density.loc
    pooled = reference.least_squares(known.tasks.flat_x, known.tasks.flat_y)
    np.testing.assert_allclose(found, np.tile(pooled, (known.tasks.n_tasks, 1)), rtol=1e-5)
    known = case("gamma_poisson")
    posterior = adapt(fit_once("CompletePooling", "gamma_poisson")[0], known.tasks)
    rate = posterior.values()[0]["rate"][0]
    np.testing.assert_allclose(rate, float(known.tasks.flat_y.mean()), rtol=1e-5)


def _curvatures(known, reduction):
    """Per task: the curvature of the loss of the mean or the sum, and its minimum."""
    for i in range(known.tasks.n_tasks):
        X, y = rows_of(known.tasks, i)
        points = len(y) if reduction == "mean" else 1
        yield X.T @ X / 0.4**2 / points, reference.least_squares(X, y)


@pytest.mark.parametrize("strategy", ["MAML", "FOMAML", "Reptile", "ANIL"])
@pytest.mark.parametrize("name", ["linear_given_theta", "linear_own_flat"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_descent_is_the_closed_form_of_its_iterate(strategy, name, reduction):
    """Claimed to rounding: φ_N = φ̂ + (I − αH)^N (φ₀ − φ̂), with H of the mean or of the sum."""
    known = case(name)
    posterior = fit_once(strategy, name)[0].adapt(
        known.tasks, reduction=reduction, step_size=0.02, steps=3, optimizer="descent"
    )
    start = np.array([0.5, -1.0])
    curvatures = _curvatures(known, reduction)
    for found, (hessian, optimum) in zip(posterior.density.loc, curvatures, strict=True):
        end = reference.descended(hessian, optimum, start, 0.02, 3)
        np.testing.assert_allclose(found, end, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["linear_given_theta", "linear_own_flat"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_learned_step_is_scaled_per_parameter(name, reduction):
    """Claimed to rounding: φ_1 = φ₀ − a ∘ H (φ₀ − φ̂), with a as learned."""
    known = case(name)
    fitted, _ = fit_once("MetaSGD", name)
    (sizes,) = inference.step_sizes(fitted).values()
    assert not torch.allclose(sizes[0], sizes[1], rtol=1e-3, atol=0.0)
    posterior = fitted.adapt(known.tasks, reduction=reduction)
    start = np.array([0.5, -1.0])
    curvatures = _curvatures(known, reduction)
    for found, (hessian, optimum) in zip(posterior.density.loc, curvatures, strict=True):
        end = start - sizes.numpy() * (hessian @ (start - optimum))
        np.testing.assert_allclose(found, end, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["linear_given_theta", "linear_own_flat"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_implicit_maml_is_the_closed_form_of_its_minimum(name, reduction):
    """φ* = (H + λI)⁻¹ (H φ̂ + λ φ₀), to the tolerance over λ."""
    known = case(name)
    posterior = fit_once("ImplicitMAML", name)[0].adapt(
        known.tasks, reduction=reduction, damping=2.0, tolerance=1e-11
    )
    start = np.array([0.5, -1.0])
    curvatures = _curvatures(known, reduction)
    for found, (hessian, optimum) in zip(posterior.density.loc, curvatures, strict=True):
        end = np.linalg.solve(hessian + 2.0 * np.eye(2), hessian @ optimum + 2.0 * start)
        np.testing.assert_allclose(found, end, rtol=1e-8, atol=1e-9)
