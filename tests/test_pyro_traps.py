"""Where plain Pyro is wrong without a word, and hbmeta is not.

Each test shows Pyro's own answer first, so that it fails too if Pyro should mend its ways. (The
centered hierarchy under a Laplace approximation is in tests/inference/test_laplace.py.)
"""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import hbmeta
from hbmeta.inference import ExactLinear, Variational
from hbmeta.tasks import Tasks

# Of Pyro and torch about each other.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TASKS, POINTS, NOISE = 12, 4, 0.5


@pytest.fixture(autouse=True)
def own_store():
    """Plain Pyro writes into global state; none of it must reach another test."""
    with pyro.get_param_store().scope(), torch.random.fork_rng(), pyro.validation_enabled(False):
        pyro.clear_param_store()
        torch.manual_seed(0)
        yield


def program(x, y=None):
    with pyro.plate("task", x.shape[0], dim=-2):
        phi = pyro.sample("phi", dist.Normal(0.0, 2.0))
        with pyro.plate("point", x.shape[1], dim=-1):
            return pyro.sample("y", dist.Normal(phi + 0 * x[..., 0], NOISE), obs=y)


def data(shift=0.0) -> Tasks:
    rng = np.random.default_rng(0)
    truth = np.linspace(-3, 3, TASKS)
    y = shift + truth[:, None] + NOISE * rng.standard_normal((TASKS, POINTS))
    return Tasks(np.zeros((TASKS, POINTS, 1)), y)


def fit(strategy, tasks, **settings):
    settings = {"steps": 2, "compile": False, "progress": False} | settings
    return strategy.fit(program, tasks, **settings)


def exact_mean(tasks: Tasks):
    """Of N(0, 2²) and POINTS rows of noise 0.5, per task."""
    precision = 1 / 4 + POINTS / NOISE**2
    return tasks.y.sum(-1) / NOISE**2 / precision


def train(guide, model, *args, steps=300, rate=0.05):
    inference = SVI(model, guide, pyro.optim.Adam({"lr": rate}), Trace_ELBO())
    for _ in range(steps):
        inference.step(*args)


def test_a_subsampled_plate_and_a_full_rank_guide():
    """Pyro sizes the guide by the tasks of its first minibatch: one φ for several tasks."""
    tasks = data()

    def subsampled(x, y):
        with pyro.plate("task", TASKS, subsample_size=3, dim=-2) as index:
            phi = pyro.sample("phi", dist.Normal(torch.zeros(1).double(), 2.0))
            with pyro.plate("point", POINTS, dim=-1):
                pyro.sample("y", dist.Normal(phi + 0 * x[index, :, 0], NOISE), obs=y[index])

    guide = AutoMultivariateNormal(subsampled)
    train(guide, subsampled, tasks.x, tasks.y)
    # 3 values for 12 tasks, and what they mean is gone: all near the mean of all tasks.
    assert guide.latent_dim == 3
    found = guide.median()["phi"].flatten()
    assert float(found.abs().max()) < 1.5 < float(exact_mean(tasks).abs().max())

    fitted = fit(Variational(family="full"), tasks, tasks_per_step=3, steps=50)
    density = fitted.posterior.density
    assert density.loc.shape == (TASKS, 1)
    # Newton ends the search for q, with θ given here: its own tolerance.
    torch.testing.assert_close(density.loc[:, 0], exact_mean(tasks), rtol=0, atol=1e-6)


def test_two_fits_in_one_process():
    """Pyro's second guide has the first one's parameters, and overwrites them."""
    tasks = {"first": data(), "second": data(shift=5.0)}
    guides = {name: AutoNormal(program) for name in tasks}
    train(guides["first"], program, tasks["first"].x, tasks["first"].y)
    before = guides["first"].median()["phi"].clone()
    guides["second"](tasks["second"].x, tasks["second"].y)
    # Not where a new guide starts (near 0), but where the first one ended.
    torch.testing.assert_close(guides["second"].median()["phi"], before)
    train(guides["second"], program, tasks["second"].x, tasks["second"].y)
    after = guides["first"].median()["phi"]
    assert float((after - before).mean()) > 3

    first = fit(Variational(), tasks["first"])
    kept = first.posterior.density.loc.clone()
    second = fit(Variational(), tasks["second"])
    for fitted, name in ((first, "first"), (second, "second")):
        found = fitted.adapt(tasks[name]).density.loc[:, 0]
        torch.testing.assert_close(found, exact_mean(tasks[name]), rtol=0, atol=1e-6)
    assert torch.equal(first.posterior.density.loc, kept)


def test_predictive_that_returns_the_data():
    """Called as the guide was trained, Predictive hands y back: no spread, no error."""
    tasks = data()
    guide = AutoNormal(program)
    train(guide, program, tasks.x, tasks.y, steps=50)
    drawn = Predictive(program, guide=guide, num_samples=50, return_sites=["y"])(tasks.x, tasks.y)
    assert float(drawn["y"].std(0).max()) == 0.0
    torch.testing.assert_close(drawn["y"][0], tasks.y)

    predictive = fit(Variational(), tasks).posterior.predict(tasks)
    # Given the rows: Var = 0.5² + 1/(1/4 + 4/0.5²).
    sd = (NOISE**2 + 1 / (1 / 4 + POINTS / NOISE**2)) ** 0.5
    torch.testing.assert_close(predictive.sd.flatten(), torch.full((48,), sd).double())
    wanted = exact_mean(tasks).repeat_interleave(POINTS)
    torch.testing.assert_close(predictive.mean.flatten(), wanted, rtol=0, atol=1e-6)


def test_saving_and_loading_a_guide_before_its_first_call(tmp_path):
    """A guide has no parameters before its first call: nothing is saved, nothing is loaded."""
    tasks = data()
    trained = AutoNormal(program)
    assert trained.state_dict() == {}
    train(trained, program, tasks.x, tasks.y)
    state = {k: v.clone() for k, v in trained.state_dict().items()}
    wanted = trained.median()["phi"].clone()
    pyro.clear_param_store()
    fresh = AutoNormal(program)
    left_over = fresh.load_state_dict(state, strict=False)
    assert set(left_over.unexpected_keys) == set(state)
    fresh(tasks.x, tasks.y)
    assert float((fresh.median()["phi"] - wanted).abs().max()) > 1

    fitted = fit(Variational(), tasks)
    fitted.save(tmp_path / "fit.safetensors")
    again = hbmeta.load(tmp_path / "fit.safetensors", model=program)
    assert torch.equal(again.posterior.density.loc, fitted.posterior.density.loc)
    torch.testing.assert_close(
        again.adapt(tasks).density.loc[:, 0], exact_mean(tasks), rtol=0, atol=1e-6
    )
    assert torch.equal(again.adapt(tasks).density.loc, fitted.adapt(tasks).density.loc)


def test_the_exact_mean_of_this_page():
    """What the tests above hold themselves against."""
    tasks = data()
    torch.testing.assert_close(
        fit(ExactLinear(), tasks).posterior.density.loc[:, 0], exact_mean(tasks)
    )
