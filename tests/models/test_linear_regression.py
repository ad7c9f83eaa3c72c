import json

import numpy as np
import pytest
import torch
from scipy import stats

from hbmeta.errors import DataError, ProgramError
from hbmeta.models import LinearRegression, model_from_state
from hbmeta.problem import Problem
from hbmeta.tasks import LinearTasks, Tasks

MEAN = [1.0, -0.5]
COVARIANCE = [[1.0, 0.3], [0.3, 0.5]]


def data(seed: int = 0) -> Tasks:
    return LinearTasks(MEAN, COVARIANCE, 0.2, shots=(1, 5)).sample(4, seed=seed).support


def by_hand(tasks: Tasks, phi: np.ndarray, noise: float) -> np.ndarray:
    """(tasks,) log p(y | φ)."""
    task = tasks.task.numpy()
    location = (tasks.flat_x.numpy() * phi[task]).sum(1)
    cells = stats.norm.logpdf(tasks.flat_y.numpy(), location, noise)
    return np.bincount(task, cells, minlength=tasks.n_tasks)


@pytest.mark.parametrize("layout", ["nested", "flat"])
@pytest.mark.parametrize("covariance", [COVARIANCE, [0.7, 0.2]])
def test_given_parameters_are_fixed(layout, covariance):
    tasks = data()
    problem = Problem(LinearRegression(MEAN, covariance, 0.2).bind(tasks), tasks, layout=layout)
    assert not problem.sites.globals
    assert [(site.name, site.shape) for site in problem.sites.locals] == [("coefficients", (2,))]
    phi = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    likelihood, local, shared = problem.terms({}, phi, problem.batch(tasks))
    dense = np.array(covariance) if np.ndim(covariance) == 2 else np.diag(covariance)
    prior = stats.multivariate_normal(MEAN, dense)
    np.testing.assert_allclose(likelihood, by_hand(tasks, phi.numpy(), 0.2), rtol=1e-12)
    np.testing.assert_allclose(local, prior.logpdf(phi), rtol=1e-12)
    assert float(shared) == 0.0
    location = problem.location({}, problem.batch(tasks))
    np.testing.assert_allclose(location, np.tile(MEAN, (4, 1)))


@pytest.mark.parametrize("layout", ["nested", "flat"])
def test_learned_parameters_have_the_priors_of_the_docstring(layout):
    tasks = data()
    model = LinearRegression(prior_mean_scale=3.0, prior_scale=2.0, prior_noise=0.5).bind(tasks)
    problem = Problem(model, tasks, layout=layout)
    theta = {
        "mean": torch.tensor([0.2, 0.9], dtype=torch.float64),
        "scale": torch.tensor([-0.4, 0.1], dtype=torch.float64),
        "noise": torch.tensor(-1.0, dtype=torch.float64),
    }
    phi = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    likelihood, local, shared = problem.terms(theta, phi, problem.batch(tasks))
    mean, log_scale, log_noise = (theta[name].numpy() for name in ("mean", "scale", "noise"))
    np.testing.assert_allclose(likelihood, by_hand(tasks, phi.numpy(), np.exp(-1.0)), rtol=1e-12)
    expected = stats.norm.logpdf(phi, mean, np.exp(log_scale)).sum(1)
    np.testing.assert_allclose(local, expected, rtol=1e-12)
    expected = (
        stats.norm.logpdf(mean, 0.0, 3.0).sum()
        + stats.halfnorm.logpdf(np.exp(log_scale), scale=2.0).sum()
        + log_scale.sum()
        + stats.halfnorm.logpdf(np.exp(log_noise), scale=0.5)
        + log_noise
    )
    assert float(shared) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("covariance", [COVARIANCE, [0.7, 0.2], None])
def test_particles_agree_with_single_draws(covariance):
    tasks = data()
    problem = Problem(LinearRegression(None, covariance).bind(tasks), tasks)
    batch = problem.batch(tasks)
    draw = torch.Generator().manual_seed(3)
    start = problem.theta(batch)
    theta = {
        name: torch.randn(3, *value.shape, generator=draw, dtype=torch.float64)
        for name, value in start.items()
    }
    phi = torch.randn(3, 4, 2, generator=draw, dtype=torch.float64)
    mapped = problem.particle_log_likelihood(theta, True, phi, batch)
    for index in range(3):
        one = {name: value[index] for name, value in theta.items()}
        torch.testing.assert_close(mapped[index], problem.log_likelihood(one, phi[index], batch))
    response = problem.particle_response(theta, True, phi, batch)
    assert response.batch_shape == (3, *batch.mask.shape)


def test_features_are_chosen_by_name():
    tasks = data()
    x = torch.cat([torch.full_like(tasks.flat_x[:, :1], 7.0), tasks.flat_x.flip(1)], 1)
    wider = Tasks.from_flat(x, tasks.flat_y, tasks.task, 4, features=["other", "x0", "intercept"])
    model = LinearRegression(MEAN, COVARIANCE, 0.2, features=["intercept", "x0"]).bind(wider)
    problem = Problem(model, wider)
    phi = torch.ones(4, 2, dtype=torch.float64)
    found = problem.log_likelihood({}, phi, problem.batch(wider))
    np.testing.assert_allclose(found, by_hand(tasks, phi.numpy(), 0.2), rtol=1e-12)


def test_many_columns_give_the_same_predictor():
    # More than a few columns go through a design matrix instead of term by term.
    x = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tasks = Tasks(x, x.sum(-1))
    problem = Problem(LinearRegression(torch.zeros(12), torch.ones(12), 1.0).bind(tasks), tasks)
    phi = torch.randn(3, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = problem.log_likelihood({}, phi, problem.batch(tasks))
    np.testing.assert_allclose(found, by_hand(tasks, phi.numpy(), 1.0), rtol=1e-12)


def test_fully_given_models_need_no_binding():
    torch.manual_seed(0)
    model = LinearRegression(MEAN, COVARIANCE, 0.2)
    assert model(torch.ones(3, 5, 2, dtype=torch.float64)).shape == (3, 5)
    task = torch.tensor([0, 0, 2])
    assert model(torch.ones(3, 2), task=task, n_tasks=3).shape == (3,)


@pytest.mark.parametrize(
    "model",
    [
        LinearRegression(),
        LinearRegression(MEAN, COVARIANCE, 0.1 + 0.2),
        LinearRegression(None, [0.1, 0.2], features=["x0", "intercept"], prior_noise=0.3),
    ],
)
def test_state_through_json(model):
    tasks = data()
    for these in (model, model.bind(tasks)):
        again = model_from_state(json.loads(json.dumps(these.state(), allow_nan=False)))
        assert again.state() == these.state()
    first, second = Problem(model.bind(tasks), tasks), Problem(again, tasks)
    batch = first.batch(tasks)
    phi = torch.ones(4, 2, dtype=torch.float64)
    for before, after in zip(
        first.terms(first.theta(batch), phi, batch),
        second.terms(second.theta(batch), phi, batch),
        strict=True,
    ):
        assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"covariance": [[1.0, 2.0], [2.0, 1.0]]}, ["positive definite", "eigenvalue -1"]),
        ({"covariance": [[1.0, 1.0], [1.0, 1.0]]}, ["positive definite", "diagonal"]),
        ({"covariance": [[1.0, 0.5], [0.0, 1.0]]}, ["asymmetric"]),
        ({"covariance": [[1.0, 0.5]]}, ["shape (1, 2)"]),
        ({"covariance": [1.0, 0.0]}, ["variance 0.0"]),
        ({"covariance": [1.0, float("nan")]}, ["nan"]),
        ({"mean": [[1.0]]}, ["vector (p,)"]),
        ({"mean": [float("inf")]}, ["finite"]),
        ({"noise": 0.0}, ["noise", "positive", "0.0"]),
        ({"noise": -1.0}, ["noise", "positive"]),
        ({"prior_scale": 0.0}, ["prior_scale"]),
        ({"mean": [1.0], "covariance": [1.0, 2.0]}, ["mean of 1", "covariance of 2"]),
        ({"mean": [1.0], "features": ["a", "b"]}, ["mean of 1", "features of 2"]),
        ({"features": ["a", "a"]}, ["different"]),
        ({"features": "a"}, ["list"]),
    ],
)
def test_impossible_arguments(arguments, words):
    with pytest.raises(DataError) as caught:
        LinearRegression(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_binding_needs_as_many_columns_as_coefficients():
    with pytest.raises(DataError, match="features"):
        LinearRegression([1.0, 2.0, 3.0]).bind(data())


def test_an_unknown_feature_is_named_with_the_nearest():
    with pytest.raises(DataError) as caught:
        LinearRegression(features=["intercpt"]).bind(data())
    assert "'intercept'" in caught.value.do


def test_an_unbound_model_says_so():
    with pytest.raises(ProgramError, match="bind"):
        LinearRegression()(torch.zeros(2, 3, 1))


def test_one_coefficient_is_not_spread_over_several_columns():
    with pytest.raises(ProgramError, match="1 columns"):
        LinearRegression([1.0], [1.0], 0.5)(torch.zeros(2, 3, 2))


def test_entries_of_vectors_are_named_after_their_columns():
    assert LinearRegression().coordinates() == {}
    assert LinearRegression(features=["x0"]).coordinates()["coefficients"] == ["x0"]
    bound = LinearRegression().bind(data())
    assert bound.coordinates()["scale"] == ["intercept", "x0"]
