"""A fit that was saved and loaded predicts as before; other files are refused, and say why."""

import json

import pyro
import pyro.distributions as dist
import pytest
import torch

import hbmeta.training
from hbmeta import inference
from hbmeta.errors import FileError, HbmetaError, UnsupportedModelError
from hbmeta.files import read_tensors, write_tensors
from hbmeta.fitted import Fitted
from hbmeta.inference import MAML, AmortizedGuide, Strategy
from hbmeta.loading import load, strategies, strategy_from_settings
from hbmeta.models import HierarchicalModel, LinearRegression, VaryingEffects
from tests import cases, fits


class OwnModel(LinearRegression):
    """A person's own class, with the sites of a ready-made one."""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "fits" / "fit.hbmeta"


def rewritten(path, **changes):
    """The file with other entries in its header; None takes one away."""
    tensors, header = read_tensors(path)
    header = {k: v for k, v in (header | changes).items() if k not in changes or v is not None}
    write_tensors(path, tensors, header)


def assert_same(first: Fitted, second: Fitted) -> None:
    assert first.strategy == second.strategy
    assert first.theta.keys() == second.theta.keys()
    assert all(torch.equal(first.theta[k], second.theta[k]) for k in first.theta)
    assert (first.drawn, first.chains, first.seed) == (second.drawn, second.chains, second.seed)
    assert (first.schema, first.history) == (second.schema, second.history)
    assert (first.seconds, first.units) == (second.seconds, second.units)
    assert first.tasks.same_data(second.tasks)
    assert first.tasks.features == second.tasks.features
    assert first.info.keys() == second.info.keys()
    for name, value in first.info.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(9e9), second.info[name].nan_to_num(9e9))
        else:
            assert value == second.info[name]
    assert type(first.density) is type(second.density)


@pytest.mark.parametrize("name", fits.STRATEGIES)
def test_a_fit_of_a_ready_made_model_comes_back(name, path, untouched):
    fitted = fits.fitted(name)
    with untouched():
        fitted.save(path)
        loaded = load(path)
    assert isinstance(loaded.model, VaryingEffects)
    assert loaded.model.state() == fitted.model.state()
    assert loaded.problem.layout == fitted.problem.layout
    assert_same(fitted, loaded)
    new = fits.new_tasks()
    for before, after in (
        (fitted.posterior, loaded.posterior),
        (fits.adapted(name), loaded.adapt(new)),
    ):
        x = before.support
        for one, other in (
            (before.predict(x).mean, after.predict(x).mean),
            (before.predict(x).log_prob(x.y), after.predict(x).log_prob(x.y)),
        ):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for site, value in fitted.globals().items():
        torch.testing.assert_close(loaded.globals()[site], value, rtol=1e-12, atol=0)
    frame = fits.table("az", (2, 3))[["school", "hours"]]
    assert fitted.predict(frame).equals(loaded.predict(frame))


@pytest.mark.parametrize("strategy", [MAML(), AmortizedGuide(hidden=4)])
@pytest.mark.parametrize(
    ("tasks", "program"),
    [
        (fits.task_set().tasks, cases.two_coefficients),
        (fits.task_set().tasks, fits.Heads()),
        (cases.case("linear_own_flat").tasks, cases.linear_flat),
    ],
    ids=["nested", "module", "flat"],
)
def test_a_fit_of_ones_own_program_comes_back_with_it(strategy, tasks, program, path):
    fitted = fits.fit(strategy, tasks, program)
    fitted.save(path)
    loaded = load(path, model=program)
    assert_same(fitted, loaded)
    before, after = fitted.posterior.density.mean, loaded.posterior.density.mean
    torch.testing.assert_close(before, after, rtol=1e-12, atol=1e-12)


def test_ones_own_hierarchical_model_comes_back_bound(path):
    fitted = fits.fit(MAML(), cases.case("linear_own_flat").tasks, OwnModel(noise=0.4))
    fitted.save(path)
    loaded = load(path, model=OwnModel(noise=0.4))
    assert isinstance(loaded.model, HierarchicalModel)
    assert loaded.model.bound() == fitted.model.bound()
    assert torch.equal(loaded.posterior.density.loc, fitted.posterior.density.loc)
    with pytest.raises(UnsupportedModelError, match="model=program"):
        load(path)


def test_a_fit_in_single_precision_comes_back_in_it(path):
    fitted = fits.fit(MAML(), fits.task_set().tasks.to(dtype=torch.float32))
    fitted.save(path)
    loaded = load(path)
    assert loaded.problem.dtype == torch.float32
    assert torch.equal(loaded.posterior.density.loc, fitted.posterior.density.loc)


def test_a_fit_on_a_source_comes_back(path):
    tasks = cases.case("linear_own_flat").tasks

    class Source:
        def sample(self, n_tasks, *, seed):
            return tasks.split(2, seed=seed)

    fitted = fits.fit(MAML(), Source(), cases.linear_flat)
    fitted.save(path)
    assert_same(fitted, load(path, model=cases.linear_flat))


# Programs that do not fit


def test_ones_own_program_must_be_given(path):
    fits.fit(MAML(), cases.case("linear_own_flat").tasks, cases.linear_flat).save(path)
    with pytest.raises(UnsupportedModelError, match=r"'linear_flat' .* found no model="):
        load(path)


def test_another_program_is_refused(path):
    tasks = cases.case("linear_own_flat").tasks
    fits.fit(MAML(), tasks, cases.linear_flat).save(path)
    with pytest.raises(UnsupportedModelError, match="found model=linear_nested"):
        load(path, model=cases.linear_nested)
    with pytest.raises(UnsupportedModelError, match="found model=VaryingEffects"):
        load(path, model=VaryingEffects())


def test_another_program_of_the_same_name_is_refused(path):
    fits.fit(MAML(), program=fits.Heads(width=2)).save(path)
    with pytest.raises(UnsupportedModelError, match=r"parameter 'weight' \[1, 2\] .* \[1, 3\]"):
        load(path, model=fits.Heads(width=3))


def likelihood_of(family):
    """Programs of one name whose latent sites are the same."""

    def program(x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
            with pyro.plate("point", x.shape[1], dim=-1):
                return pyro.sample("y", family(effect, 1.0), obs=y)

    return program


def test_another_likelihood_is_refused(path):
    tasks = fits.task_set().tasks
    fits.fit(MAML(), tasks, likelihood_of(dist.Normal)).save(path)
    load(path, model=likelihood_of(dist.Normal))
    with pytest.raises(UnsupportedModelError) as caught:
        load(path, model=likelihood_of(dist.Laplace))
    assert caught.value.needed == "site 'y' Normal, [] among the observed"
    assert "site 'y' Laplace" in caught.value.found


def test_a_ready_made_model_is_the_one_in_the_file(path):
    fits.fitted("MAML").save(path)
    loaded = load(path, model=VaryingEffects(varying=["hours"]))
    assert loaded.model.state() == fits.fitted("MAML").model.state()
    with pytest.raises(UnsupportedModelError, match="found model=eight_schools"):
        load(path, model=cases.eight_schools)


# Files that are none


def test_a_missing_file(tmp_path):
    with pytest.raises(FileError, match="no such file"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_a_truncated_file(keep, path):
    fits.fitted("MAML").save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(FileError, match="damaged or foreign"):
        load(path)


def test_a_corrupt_file(path):
    fits.fitted("MAML").save(path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileError, match="checksum"):
        load(path)


def test_a_file_of_a_newer_version(path, monkeypatch):
    monkeypatch.setattr("hbmeta.files.VERSION", 2)
    fits.fitted("MAML").save(path)
    monkeypatch.undo()
    with pytest.raises(FileError, match="newer than 1"):
        load(path)


def test_a_checkpoint_is_no_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(hbmeta.training, "_CHECKPOINT_EVERY", 2)
    fits.fit(MAML(), checkpoint=tmp_path / "fit.checkpoint")
    with pytest.raises(FileError, match=r"'checkpoint'.*checkpoint= to fit"):
        load(tmp_path / "fit.checkpoint")


def test_an_unknown_strategy(path):
    fits.fitted("MAML").save(path)
    rewritten(path, strategy="MAMMAL")
    with pytest.raises(UnsupportedModelError, match=r"'MAMMAL'.*import the module that defines it"):
        load(path)


def test_settings_that_the_strategy_does_not_have(path):
    fits.fitted("MAML").save(path)
    rewritten(path, settings={"steps": 3, "learning": 0.1})
    with pytest.raises(FileError, match="settings of MAML"):
        load(path)


@pytest.mark.parametrize("entry", ["strategy", "sites", "ids", "chains"])
def test_a_file_without_one_of_its_entries(entry, path):
    fits.fitted("MAML").save(path)
    rewritten(path, **{entry: None})
    with pytest.raises(FileError, match=f"no '{entry}'"):
        load(path)


def test_a_file_without_one_of_its_tensors(path):
    fits.fitted("AmortizedGuide").save(path)
    tensors, header = read_tensors(path)
    own = next(name for name in tensors if name.startswith("own/"))
    for gone in ("tasks/x", own):
        write_tensors(path, {k: v for k, v in tensors.items() if k != gone}, header)
        with pytest.raises(FileError, match="a complete file of a fit"):
            load(path)


def test_every_refusal_names_the_file(path):
    fits.fitted("MAML").save(path)
    for changes in ({"strategy": "x"}, {"kind": "x"}, {"ids": None}):
        rewritten(path, **changes)
        with pytest.raises(HbmetaError) as error:
            load(path)
        assert str(path) in str(error.value)
        fits.fitted("MAML").save(path)


# Strategies by name


def test_strategies_are_those_that_can_be_imported():
    # Functions have small letters.
    names = {name for name in inference.__all__ if name[0].isupper() and name != "Strategy"}
    assert set(strategies()) == names
    for name, strategy in strategies().items():
        made = strategy_from_settings(name, json.loads(json.dumps(strategy().settings())))
        assert made == strategy()


def test_ones_own_strategy_is_found_once_it_is_imported():
    class Mine(MAML):
        pass

    found: Strategy = strategy_from_settings("Mine", {"steps": 2})
    assert found == Mine(steps=2)
