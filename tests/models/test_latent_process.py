"""The decoder by hand in NumPy, what `bind` reads from the data, and the way through a file."""

import json

import numpy as np
import pytest
import torch
from scipy import stats

import hbmeta
from hbmeta.encoders import waves
from hbmeta.errors import DataError, ProgramError
from hbmeta.inference import LatentNP
from hbmeta.models import LatentProcess, model_from_state
from hbmeta.problem import Problem
from hbmeta.tasks import Tasks


def data(n_tasks: int = 3, points: int = 5, features: int = 2, seed: int = 0) -> Tasks:
    rng = np.random.default_rng(seed)
    x = rng.uniform(-3.0, 5.0, (n_tasks, points, features))
    return Tasks(x, np.sin(x[..., 0]))


def silu(a):
    return a / (1 + np.exp(-a))


def decoder_by_hand(weights, model, x, z):
    """Mean and sd (points,) of one task from the formulas of the docstring."""
    u = (x - np.array(model.bound()["middle"])) / np.array(model.bound()["half_range"])
    h = list(u.T)
    h += [np.sin(k * np.pi * column / 2) for column in u.T for k in range(1, model.frequencies + 1)]
    h += [np.cos(k * np.pi * column / 2) for column in u.T for k in range(1, model.frequencies + 1)]
    h = np.stack(h, 1)

    def layer(name, value):
        return value @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    out = silu(layer("of_x", h) + layer("of_z", z))
    out = layer("rest.3", silu(layer("rest.1", out)))
    mean = out[:, 0]
    if model.linear:
        basis = layer("basis.4", silu(layer("basis.2", silu(layer("basis.0", h)))))
        mean = mean + basis @ z
    if model.given_noise is not None:
        return mean, model.given_noise
    return mean, model.noise_floor + np.log1p(np.exp(out[:, 1]))


@pytest.mark.parametrize(
    "settings", [{}, {"linear": False}, {"noise": 0.3}, {"frequencies": 0}, {"noise_floor": 0.2}]
)
def test_density_is_that_of_the_docstring(settings):
    tasks = data()
    model = LatentProcess(latent=3, hidden=(6, 4), **{"frequencies": 2} | settings).bind(tasks)
    problem = Problem(model, tasks)
    assert problem.layout == "nested"
    assert [(site.name, site.shape) for site in problem.sites.locals] == [("z", (3,))]
    theta = problem.theta(problem.batch(tasks))
    assert set(theta) == {name for name, _ in model.named_parameters()}
    z = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    likelihood, local, shared = problem.terms(theta, z, problem.batch(tasks))
    weights = {name: value.numpy() for name, value in theta.items()}
    x, y = tasks.x.numpy(), tasks.y.numpy()
    for i in range(3):
        mean, sd = decoder_by_hand(weights, model, x[i], z[i].numpy())
        assert likelihood[i].item() == pytest.approx(stats.norm.logpdf(y[i], mean, sd).sum())
        assert np.min(sd) >= (0.3 if "noise" in settings else settings.get("noise_floor", 0.01))
    np.testing.assert_allclose(local, stats.norm.logpdf(z).sum(1), rtol=1e-12)
    assert float(shared) == 0.0


def test_waves():
    found = waves(torch.tensor([[0.5, -1.0]], dtype=torch.float64), 2)
    half = np.sqrt(0.5)
    wanted = [[0.5, -1.0, half, 1.0, -1.0, 0.0, half, 0.0, 0.0, -1.0]]
    np.testing.assert_allclose(found, wanted, atol=1e-15)
    assert waves(found, 0) is found


def test_x_is_read_in_the_units_of_the_data():
    """Other units of x, another origin: the same function, weights being the same."""
    tasks = data()
    moved = Tasks(tasks.x * 1000.0 - 7.0, tasks.y)
    here, there = (Problem(LatentProcess(latent=2, hidden=(4,)).bind(t), t) for t in (tasks, moved))
    z = torch.ones(3, 2, dtype=torch.float64)
    values = [
        p.log_likelihood(p.theta(p.batch(t)), z, p.batch(t))
        for p, t in ((here, tasks), (there, moved))
    ]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-9)
    constant = LatentProcess(latent=2, hidden=(4,)).bind(
        Tasks(torch.ones(2, 3, 1), torch.ones(2, 3))
    )
    assert constant.bound()["half_range"] == [1.0]


def test_seed_gives_the_weights_and_leaves_the_global_one():
    tasks, before = data(), torch.get_rng_state()
    first, again, other = (LatentProcess(latent=2, seed=s).bind(tasks) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.of_x.weight, again.of_x.weight)
    assert not torch.equal(first.of_x.weight, other.of_x.weight)


@pytest.mark.parametrize("bound", [True, False])
def test_state_builds_the_model_again(bound):
    model = LatentProcess(5, (7, 3), noise_floor=0.05, frequencies=1, linear=False, seed=2)
    model = model.bind(data()) if bound else model
    again = model_from_state(json.loads(json.dumps(model.state())))
    assert again.state() == model.state()
    shapes = [[(n, v.shape) for n, v in m.named_parameters()] for m in (model, again)]
    assert shapes[0] == shapes[1]


def test_a_saved_fit_predicts_the_same(tmp_path):
    tasks = data(4)
    model = LatentProcess(latent=3, hidden=(4,), frequencies=1)
    fitted = LatentNP(hidden=4, frequencies=1, draws=2).fit(
        model, tasks, steps=3, compile=False, progress=False
    )
    fitted.save(tmp_path / "fit")
    again = hbmeta.load(tmp_path / "fit")
    new = data(2, seed=1)
    predictions = [f.adapt(new).predict(new.x, draws=5).mean for f in (fitted, again)]
    assert torch.equal(*predictions)


def test_float32():
    tasks = data().to(dtype=torch.float32)
    model = LatentProcess(latent=2, hidden=(4,)).bind(tasks)
    assert model(tasks.x).dtype == torch.float32
    assert model(tasks.x).shape == (3, 5)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"latent": 0}, "0"),
        ({"hidden": ()}, r"\(\)"),
        ({"hidden": (8, 0)}, "0"),
        ({"noise": 0.0}, "0.0"),
        ({"noise_floor": float("inf")}, "inf"),
        ({"frequencies": -1}, "-1"),
        ({"linear": 1}, "1"),
        ({"seed": -1}, "-1"),
    ],
)
def test_settings_that_cannot_be_used(settings, found):
    with pytest.raises(DataError, match=f"found {found}"):
        LatentProcess(**settings)


def test_data_that_cannot_be_used():
    model = LatentProcess(latent=2, hidden=(4,))
    for y in (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, 2)):
        with pytest.raises(DataError, match="one real number y per row"):
            model.bind(Tasks(torch.ones(2, 3, 1), y))
    with pytest.raises(ProgramError, match="not bound"):
        model(torch.ones(2, 3, 1))
    with pytest.raises(ProgramError, match="x with 2 columns"):
        model.bind(data())(torch.ones(2, 3, 1, dtype=torch.float64))
