"""The gradient lens as it is used: saved and loaded, resumed, adapted with other settings, staged.

A small network on sine waves, in double precision; every fit takes a second or less.
"""

import functools
from dataclasses import replace

import pytest
import torch

from hbmeta import models, tasks
from hbmeta.course import Course
from hbmeta.errors import DataError
from hbmeta.files import read_tensors
from hbmeta.inference import ANIL, FOMAML, MAML, ImplicitMAML, MetaSGD, Reptile, step_sizes
from hbmeta.loading import load, strategy_from_settings
from tests import fits
from tests.test_loading import assert_same

WAVES = tasks.Sinusoids(noise=0.3, shots=5, queries=5, dtype=torch.float64)
MODEL = models.NeuralRegression(hidden=(6,), activation="tanh")
HELD_OUT = WAVES.sample(4, seed=99)

# Between them every way of computing the gradient, and everything that is learned.
STRATEGIES = {
    "maml, recomputed": MAML(steps=3, step_size=0.02, recompute=True),
    "maml, adam": MAML(steps=2, step_size=0.02, optimizer="adam"),
    "fomaml": FOMAML(steps=2, step_size=0.02, learned_step="scalar"),
    "reptile": Reptile(steps=4, step_size=0.02, batches=2),
    "reptile, recomputed": Reptile(steps=4, step_size=0.02, recompute=True),
    "meta-sgd": MetaSGD(steps=2, step_size=0.02, per_step=True),
    "meta-sgd, recomputed": MetaSGD(step_size=0.02, recompute=True),
    "anil": ANIL(steps=2, step_size=0.02),
    "sites": MAML(steps=2, step_size=0.02, sites=("layer1.bias", "layer2"), learned_step="site"),
    "implicit": ImplicitMAML(damping=20.0, sites=("layer2",)),
}
each = pytest.mark.parametrize("name", STRATEGIES)


def fit(strategy, **settings):
    settings = {"steps": 4, "tasks_per_step": 4, "compile": False, "progress": False} | settings
    return strategy.fit(MODEL, WAVES, **settings)


@functools.cache
def fitted(name):
    return fit(STRATEGIES[name])


def numbers(found):
    """θ, the learned step sizes and φ of new tasks."""
    own = {} if found.own is None else found.own.state_dict()
    return {**found.theta, **own, "phi": found.adapt(HELD_OUT.support).density.loc}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


@each
def test_a_fit_comes_back(name, tmp_path, untouched):
    before = fitted(name)
    with untouched():
        before.save(tmp_path / "fit.hbmeta")
        after = load(tmp_path / "fit.hbmeta")
    assert after.strategy == STRATEGIES[name]
    assert_same(before, after)
    assert_equal(numbers(before), numbers(after))
    if before.own is not None:
        sizes = (step_sizes(f) for f in (before, after))
        assert_equal(*sizes)


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES.values() if s.sites is not None])
def test_settings_from_a_file_have_lists_for_tuples(strategy):
    settings = {**strategy.settings(), "sites": list(strategy.sites)}
    assert strategy_from_settings(strategy.name, settings) == strategy


@each
def test_a_fit_that_resumes_is_the_one_without_a_break(name, tmp_path, monkeypatch):
    whole, path = fitted(name), tmp_path / "on.safetensors"
    monkeypatch.setattr("hbmeta.training._CHECKPOINT_EVERY", 2)
    record, seen = Course.record, []

    def interrupt(self, *arguments, **named):
        seen.append(1)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return record(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Course, "record", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(STRATEGIES[name], checkpoint=path)
    assert len(read_tensors(path)[0]["losses"]) == 2
    resumed = fit(STRATEGIES[name], checkpoint=path)
    assert resumed.history == whole.history
    assert_equal(numbers(resumed), numbers(whole))


@each
def test_seeds_and_devices(name):
    found = numbers(fitted(name))
    assert_equal(numbers(fit(STRATEGIES[name], device="cpu", seed=0)), found)
    other = numbers(fit(STRATEGIES[name], seed=1))
    assert not torch.equal(other["phi"], found["phi"])


@pytest.mark.parametrize("name", ["maml, recomputed", "reptile", "meta-sgd", "implicit"])
def test_graphs_give_what_eager_steps_give(name):
    """To the rounding of sums taken in another order, over four steps of training."""
    found, staged = numbers(fitted(name)), fit(STRATEGIES[name], compile="graph")
    assert staged.info["tier"] == "graph"
    for key, value in numbers(staged).items():
        torch.testing.assert_close(value, found[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["maml, recomputed", "reptile", "meta-sgd", "anil"])
def test_settings_for_one_call(name):
    """What adapts with other settings is the strategy with these settings, at the same θ."""
    whole = fitted(name)
    problem, batch = whole.problem, whole.problem.batch(HELD_OUT.support)
    for settings in ({"steps": 7}, {"reduction": "sum", "step_size": 0.001}, {"batches": 3}):
        strategy = replace(whole.strategy, **settings)
        with torch.no_grad():
            expected = strategy.posterior(problem, whole.theta, whole.own, batch).loc
        found = whole.adapt(HELD_OUT.support, **settings)
        assert torch.equal(found.density.loc, expected)
        usual = whole.adapt(HELD_OUT.support).density.loc
        assert not torch.allclose(usual, expected, rtol=1e-6, atol=0.0)
        assert whole.strategy == STRATEGIES[name]


def test_no_step_is_the_start():
    whole = fitted("maml, adam")
    start = whole.problem.location(whole.theta, whole.problem.batch(HELD_OUT.support))
    assert torch.equal(whole.adapt(HELD_OUT.support, steps=0).density.loc, start)


def test_less_damping_moves_further():
    whole = fitted("implicit")
    support = HELD_OUT.support
    start = whole.problem.location(whole.theta, whole.problem.batch(support))
    moved = [
        whole.adapt(support, damping=damping).density.loc - start for damping in (1e6, 100.0, 20.0)
    ]
    lengths = torch.stack([part.norm(dim=-1) for part in moved])
    assert bool((lengths.diff(dim=0) > 0).all())
    assert bool((lengths[0] < 1e-3).all())
    # Sites that were not named stay.
    names = [site.name for site in whole.problem.sites.locals]
    by_site = dict(zip(names, whole.problem.sites.from_vector(moved[-1]).values(), strict=True))
    assert all(bool((by_site[n] == 0).all()) == (not n.startswith("layer2")) for n in names)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("meta-sgd", {"learned_step": None, "per_step": False}),
        ("meta-sgd", {"sites": ("layer2",)}),
        ("meta-sgd", {"per_step": False}),
        ("sites", {"sites": None}),
        ("anil", {"learned_step": "site"}),
    ],
)
def test_step_sizes_that_were_not_learned_are_refused(name, settings):
    with pytest.raises(DataError, match="settings that adapting can change"):
        fitted(name).adapt(HELD_OUT.support, **settings)


def test_one_step_size_serves_any_sites():
    whole = fitted("fomaml")
    moved = whole.adapt(HELD_OUT.support, sites="layer2").density.loc
    assert torch.isfinite(moved).all()
    assert step_sizes(whole).keys() == {s.name for s in whole.problem.sites.locals}


def test_bias_of_data_of_other_kinds():
    """Single precision, a split data frame, and sites that stay."""
    single = replace(WAVES, dtype=torch.float32).sample(4, seed=99)
    one, other = (FOMAML.bias(fitted("anil"), data) for data in (HELD_OUT, single))
    torch.testing.assert_close(one.gradient, other.gradient, rtol=1e-4, atol=1e-4)
    assert one.bias.shape == (4, fitted("anil").problem.sites.phi_size)
    split = fits.task_set().split(seed=0)
    of_frame = FOMAML.bias(fits.fitted("MAML"), split)
    assert of_frame.ids == split.episode.support.ids
    assert bool((of_frame.bias.norm(dim=-1) <= of_frame.bound * (1 + 1e-9)).all())
