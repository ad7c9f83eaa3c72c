"""What a fit promises: θ stays, the posterior of the fit is kept, seeds decide, fits resume."""

import numpy as np
import pytest
import torch

import hbmeta.training
from hbmeta import models
from hbmeta.errors import DataError, FileError
from hbmeta.feeding import Feed
from hbmeta.fitted import Fitted, Seconds
from hbmeta.inference import MAML, AmortizedGuide, ProtoNet
from hbmeta.posterior import Units
from hbmeta.tasks import Tasks
from tests import fits

every_strategy = pytest.mark.parametrize("name", fits.STRATEGIES)


def state(fitted: Fitted) -> dict[str, torch.Tensor]:
    """All numbers that a fit has learned."""
    own = {} if fitted.own is None else fitted.own.state_dict()
    module = (
        fitted.problem.program.state_dict() if hasattr(fitted.problem.program, "state_dict") else {}
    )
    learned = {**fitted.theta, **{f"own/{k}": v for k, v in own.items()}, **module}
    return {name: value.clone() for name, value in learned.items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{different} differ"


def moments(posterior) -> torch.Tensor:
    return torch.stack(posterior.moments()["coefficients"])


# Adapting


@every_strategy
def test_adapting_never_changes_theta(name, untouched):
    fitted = fits.fitted(name)
    before = state(fitted)
    with untouched():
        posterior = fits.adapted(name)
        posterior.sample(5)
        posterior.predict(fits.new_tasks()).sample(3)
    assert_same(before, state(fitted))
    assert posterior.theta.keys() == fitted.theta.keys()
    if not fitted.drawn:
        assert all(torch.equal(posterior.theta[k], fitted.theta[k]) for k in fitted.theta)


@every_strategy
def test_adapting_is_a_function_of_the_support_and_the_seed(name):
    first, again = fits.adapted(name, seed=3), fits.adapted(name, seed=3)
    torch.testing.assert_close(moments(first), moments(again), rtol=0, atol=0)
    x = fits.new_tasks()
    torch.testing.assert_close(first.predict(x).mean, again.predict(x).mean, rtol=0, atol=0)


def test_another_seed_gives_other_draws():
    first, other = (fits.adapted("NUTS", seed=seed).density.phi for seed in (0, 1))
    assert not torch.equal(first, other)


@every_strategy
def test_tasks_are_adapted_independently(name):
    """One at a time as all at once: no task sees another's support."""
    tasks = fits.new_tasks()
    together = fits.adapted(name).density.mean
    for i in range(tasks.n_tasks):
        alone = fits.adapted(name, tasks[[i]]).density.mean[0]
        if name == "NUTS":  # draws: within 5 standard errors of 400 draws, sd about 0.5
            assert bool(((alone - together[i]).abs() < 0.2).all())
        else:
            torch.testing.assert_close(alone, together[i], rtol=1e-6, atol=1e-8)


@every_strategy
def test_tasks_without_data(name):
    tasks = fits.new_tasks()
    nothing = tasks.keep(torch.zeros(tasks.n_points, dtype=torch.bool))
    some = tasks.keep(tasks.task == 1)
    empty, partly = fits.adapted(name, nothing), fits.adapted(name, some)
    assert bool(moments(empty).isfinite().all())
    assert bool(empty.predict(tasks).mean.isfinite().all())
    tolerance = 0.2 if name == "NUTS" else 1e-6  # NUTS: as above
    torch.testing.assert_close(
        empty.density.mean[0], partly.density.mean[0], rtol=tolerance, atol=tolerance
    )


def test_a_setting_can_be_changed_for_one_call():
    fitted = fits.fitted("MAML")
    default, longer = fits.adapted("MAML"), fits.adapted("MAML", steps=10)
    assert fitted.strategy == fits.STRATEGIES["MAML"]
    support = fitted.problem.batch(fits.new_tasks())
    expected = MAML(steps=10, step_size=0.05).posterior(fitted.problem, fitted.theta, None, support)
    torch.testing.assert_close(longer.density.loc, expected.loc, rtol=0, atol=0)
    assert not torch.equal(longer.density.loc, default.density.loc)


def test_an_unknown_setting_is_refused():
    with pytest.raises(DataError, match="'stepsize'") as error:
        fits.fitted("MAML").adapt(fits.new_tasks(), stepsize=0.1)
    assert "step_size" in error.value.needed


def test_other_features_are_refused():
    tasks = Tasks(torch.ones(1, 2, 1), torch.ones(1, 2), features=["days"])
    with pytest.raises(DataError, match=r"the features of the fit, \['hours'\]"):
        fits.fitted("MAML").adapt(tasks)


CLASSES = Tasks(torch.tensor([[[0.0], [1.0], [2.0]]]), torch.tensor([[0, 1, 2]]), ids=["known"])
FAMILIES = {
    "classes": lambda: ProtoNet().fit(
        models.ClassConditional(None, 3), CLASSES, steps=1, compile=False, progress=False
    ),
    "network": lambda: MAML(steps=1).fit(
        models.NeuralClassifier(3, hidden=(2,)), CLASSES, steps=1, compile=False, progress=False
    ),
    "numbers": lambda: fits.fitted("NUTS"),
}


@pytest.mark.parametrize(
    ("family", "y", "words"),
    [
        ("classes", [0, 1, 3], "from 0 to 2 .*found 3 in task 'new'"),
        ("classes", [0.0, 1.0, 0.5], "from 0 to 2 .*found 0.5 in task 'new'"),
        ("network", [0, 1, 3], "from 0 to 2 .*found 3 in task 'new'"),
        ("network", [-1.0, 1.0, 2.0], "from 0 to 2 .*found -1.0 in task 'new'"),
        ("numbers", [0, 1, 3], "real numbers as y.*found 0 in task 'new'"),
    ],
)
def test_y_that_the_fit_could_not_have_is_refused(family, y, words):
    fitted = FAMILIES[family]()
    x, features = torch.zeros(1, 3, 1), fitted.tasks.features
    support = Tasks(x, torch.tensor([y]), ids=["new"], features=features)
    with pytest.raises(DataError, match=words):
        fitted.adapt(support)


def test_labels_of_a_support_may_be_of_any_dtype():
    fitted = FAMILIES["classes"]()
    first = fitted.adapt(CLASSES).density.loc
    single = Tasks(CLASSES.x, CLASSES.y.float(), ids=["known"])
    assert torch.equal(first, fitted.adapt(single).density.loc)


def test_the_dtype_of_the_support_does_not_matter():
    single = fits.adapted("MAML", fits.new_tasks().to(dtype=torch.float32))
    torch.testing.assert_close(moments(single), moments(fits.adapted("MAML")), rtol=1e-5, atol=1e-5)


def test_a_task_set_gives_its_support():
    known, new = fits.task_set().split(groups=0.5, seed=0)
    fitted = fits.fit(MAML(), known)
    assert fitted.tasks.same_data(known.support)
    posterior = fitted.adapt(new)
    assert posterior.support.same_data(new.support)


@pytest.mark.parametrize("strategy", [MAML(), AmortizedGuide(hidden=4)])
def test_an_episode_is_fitted_on_as_it_was_cut(strategy):
    episode = fits.task_set().split(seed=0).episode
    fitted = fits.fit(strategy, episode)
    assert fitted.tasks.same_data(episode.all)
    support, query = Feed(episode, "flat", strategy.needs, None, 0, None, None).step(0)
    if strategy.needs == "split":
        rows = torch.where(support.mask, 1, 0) + torch.where(query.mask, 2, 0)
        expected = Tasks.concatenate([episode.support, episode.query])
        first = torch.arange(expected.n_points) - expected.offsets[expected.task]
        in_support = first < episode.support.counts[expected.task]
        assert torch.equal(rows, torch.where(in_support, 1, 2))
    else:
        assert bool(query.mask.all())


# The posterior of the fit


@every_strategy
def test_the_posterior_of_the_fit_is_kept_by_id(name):
    fitted = fits.fitted(name)
    posterior = fitted.posterior
    assert fitted.posterior is posterior
    assert posterior.ids == fitted.tasks.ids
    assert fitted.posterior_of(fitted.tasks) is posterior
    ids = ["e", "a"]
    some = fitted.posterior_of(fitted.tasks.select(ids))
    assert some.ids == ("e", "a")
    positions = [fitted.tasks.position(i) for i in ids]
    torch.testing.assert_close(moments(some)[0], moments(posterior)[0][positions], atol=0.2, rtol=0)
    torch.testing.assert_close(some.density.mean, posterior.density.mean[positions])


def test_the_draws_of_the_fit_are_its_posterior():
    fitted = fits.fitted("NUTS")
    assert fitted.drawn
    assert fitted.chains == fitted.posterior.chains == 2
    assert fitted.posterior.density is fitted.density
    assert fitted.density.phi.shape == (400, 6, 1)


def test_other_data_of_known_tasks_are_adapted_to():
    fitted = fits.fitted("ExactLinear")
    fewer = fitted.tasks.keep(torch.arange(fitted.tasks.n_points) % 2 == 0)
    found = fitted.posterior_of(fewer)
    assert found.support.same_data(fewer)
    torch.testing.assert_close(found.density.loc, fitted.adapt(fewer).density.loc)
    assert not torch.equal(found.density.loc, fitted.posterior.density.loc)


# Level 1


@every_strategy
def test_globals_are_constrained_values_or_draws(name):
    fitted = fits.fitted(name)
    found = fitted.globals()
    lead = (400,) if fitted.drawn else ()
    shapes = {"mean": (1,), "scale": (1,), "fixed": (1,), "noise": ()}
    assert {k: tuple(v.shape) for k, v in found.items()} == {k: lead + v for k, v in shapes.items()}
    for site, value in found.items():
        positive = site in ("scale", "noise")
        expected = fitted.theta[site].exp() if positive else fitted.theta[site]
        torch.testing.assert_close(value, expected)


def test_globals_of_a_module_are_none():
    fitted = fits.fit(MAML(), program=fits.Heads())
    assert fitted.globals() == {}
    assert set(fitted.theta) == {"weight", "start"}


def test_units_are_those_of_the_schema():
    fitted = fits.fitted("MAML")
    score = fits.table()["score"]
    assert fitted.units.location == pytest.approx(score.mean())
    assert fitted.units.scale == pytest.approx(score.std(ddof=0))
    assert fits.fit(MAML(), fits.task_set().tasks).units == Units()


def test_repr_says_what_it_is():
    assert repr(fits.fitted("NUTS")).startswith("Fitted(NUTS(draws=200")
    assert "theta=point, tasks=6" in repr(fits.fitted("MAML"))


def test_seconds_and_history_are_recorded():
    fitted = fits.fitted("MAML")
    assert isinstance(fitted.seconds, Seconds)
    assert 0 <= fitted.seconds.staging < fitted.seconds.fit
    assert len(fitted.history) == 20
    assert np.isfinite(fitted.history).all()


# Seeds


@every_strategy
def test_the_seed_decides_and_global_state_stays(name, untouched):
    strategy = fits.TINY[name]
    with untouched():
        first, again, other = (fits.fit(strategy, seed=seed) for seed in (0, 0, 1))
    assert_same(state(first), state(again))
    assert first.history == again.history
    torch.testing.assert_close(moments(first.posterior), moments(again.posterior), rtol=0, atol=0)
    stochastic = name in ("NUTS", "MAML", "AmortizedGuide")
    differs = any(not torch.equal(first.theta[k], other.theta[k]) for k in first.theta)
    assert differs == stochastic


def test_fit_does_not_change_the_model():
    model = fits.Heads()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fitted = fits.fit(MAML(), program=model, learning_rate=0.1)
    assert_same(before, model.state_dict())
    assert not torch.equal(fitted.theta["weight"], before["weight"].double())


# Resuming


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        (MAML(steps=1), {}),
        (AmortizedGuide(hidden=4, draws=2), {}),
        (AmortizedGuide(hidden=4, draws=2), {"tasks_per_step": 3, "decay": False}),
    ],
)
def test_an_interrupted_fit_resumes_where_it_was(strategy, settings, tmp_path, monkeypatch):
    whole = fits.fit(strategy, steps=14, **settings)
    monkeypatch.setattr(hbmeta.training, "_CHECKPOINT_EVERY", 5)
    settings = {"steps": 14, "checkpoint": tmp_path / "fit.checkpoint", **settings}
    step = Feed.step

    def interrupt(feed, number):
        if number == 12:
            raise KeyboardInterrupt
        return step(feed, number)

    with monkeypatch.context() as patch:
        patch.setattr(Feed, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fits.fit(strategy, **settings)
    asked = []
    monkeypatch.setattr(
        Feed, "step", lambda feed, number: asked.append(number) or step(feed, number)
    )
    resumed = fits.fit(strategy, **settings)
    assert asked[-4:] == [10, 11, 12, 13]
    assert 9 not in asked
    assert_same(state(resumed), state(whole))
    assert resumed.history == whole.history


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"steps": 6}, "steps"),
        ({"learning_rate": 0.1}, "learning_rate"),
        ({"strategy": MAML(steps=2)}, "settings"),
        ({"strategy": AmortizedGuide(hidden=4)}, "strategy"),
        ({"data": fits.new_tasks()}, "data"),
    ],
)
def test_the_checkpoint_of_another_fit_is_refused(change, named, tmp_path, monkeypatch):
    monkeypatch.setattr(hbmeta.training, "_CHECKPOINT_EVERY", 2)
    settings = {"strategy": MAML(steps=1), "checkpoint": tmp_path / "fit.checkpoint", "steps": 4}
    fits.fit(**settings)
    with pytest.raises(FileError, match=f"found another {named}"):
        fits.fit(**settings | change)


def test_a_finished_fit_is_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(hbmeta.training, "_CHECKPOINT_EVERY", 2)
    settings = {"strategy": MAML(steps=1), "checkpoint": tmp_path / "fit.checkpoint", "steps": 4}
    first, again = fits.fit(**settings), fits.fit(**settings)
    assert_same(state(first), state(again))
    assert first.history == again.history
