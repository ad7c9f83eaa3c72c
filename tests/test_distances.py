"""The posterior given θ, and what is said of it where its draws are poor."""

import math

import pytest
import torch

import hbmeta.conditional
from hbmeta import distances
from hbmeta.distances import given_theta
from hbmeta.inference import MAML
from hbmeta.tasks import Tasks
from tests.cases import case
from tests.test_conditional import squared


@pytest.fixture(scope="module")
def squares():
    """A fit of y ~ N(φ², 0.1²), whose prior's location is a minimum of the likelihood."""
    y = [[1.0, 1.1, 0.9], [2.0, 2.1, 1.9], [-0.1, 0.0, 0.1]]
    tasks = Tasks(torch.zeros(3, 3, 1).double(), torch.tensor(y).double(), ids=["a", "b", "c"])
    with pytest.warns(UserWarning, match="does not depend on"):
        fitted = MAML(steps=1).fit(squared, tasks, steps=1, compile=False, progress=False)
    return fitted, tasks


def test_nothing_is_said_of_a_good_one(squares):
    fitted, tasks = squares
    posterior, remark = given_theta(fitted, tasks, 1000, 0)
    assert remark == ""
    assert posterior.ids == tasks.ids


def test_a_mode_that_was_not_found_is_told_of(squares, monkeypatch):
    """Without a step: the start is a minimum in two tasks, where the curvature is upwards."""
    fitted, tasks = squares
    monkeypatch.setattr(
        hbmeta.conditional,
        "maximise",
        lambda function, start, **_: (start, torch.zeros(start.shape[:-1], dtype=torch.bool)),
    )
    posterior, remark = given_theta(fitted, tasks, 1000, 0)
    assert posterior is not None
    assert remark.startswith(
        "no mode was found for 3 of 3 tasks; the curvature is not that of a maximum for 2 of 3 "
        "tasks"
    )


@pytest.mark.parametrize(("fewest", "remark"), [(42.0, "42 effective draws"), (100.0, "")])
def test_few_effective_draws_are_told_of(squares, monkeypatch, fewest, remark):
    fitted, tasks = squares
    conditional = distances.conditional

    def few(*arguments, **settings):
        density, info = conditional(*arguments, **settings)
        return density, info | {"effective_draws": torch.tensor([500.0, fewest, 800.0])}

    monkeypatch.setattr(distances, "conditional", few)
    assert given_theta(fitted, tasks, 1000, 0)[1] == remark


def test_draws_without_weights_are_told_of(squares, monkeypatch):
    fitted, tasks = squares
    info = {
        "converged": torch.tensor([True] * 3),
        "positive": torch.tensor([True] * 3),
        "effective_draws": torch.full((3,), math.nan),
    }
    density = given_theta(fitted, tasks, 10, 0)[0].density
    monkeypatch.setattr(distances, "conditional", lambda *_, **__: (density, info))
    assert given_theta(fitted, tasks, 1000, 0)[1] == "nan effective draws"


def test_too_many_parameters_are_the_reason_for_none():
    known = case("neural_regression")
    fitted = MAML(steps=1).fit(known.program, known.tasks, steps=1, compile=False, progress=False)
    posterior, remark = given_theta(fitted, known.tasks, 10, 0)
    assert posterior is None
    assert remark == "needed at most 64 parameters per task (the curvature is dense); found 97"
