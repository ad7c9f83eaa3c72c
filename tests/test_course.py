"""What a run of training leaves on its way: losses, a path, warnings at its end."""

import warnings

import pytest
import torch

from hbmeta.course import Course
from hbmeta.errors import ConvergenceError

NOTHING = torch.zeros(0, dtype=torch.float64)


def run(losses, watched=None, positions=None, done=NOTHING, **settings):
    """A course with these losses; the watched site stands at these positions after each step."""
    rates = torch.ones(len(done) + len(losses), dtype=torch.float64)
    watched = {} if watched is None else watched
    course = Course("Name", rates, done, watched, **{"progress": False, **settings})
    for number, loss in enumerate(losses):
        for value in watched.values():
            value.fill_(positions[number])
        course.record(torch.tensor(loss))
    return course


@pytest.mark.parametrize("steps", [1, 49, 50, 51, 130])
def test_all_losses_are_kept(steps):
    losses = [float(number % 7) for number in range(steps)]
    course = run(losses)
    assert course.so_far().tolist() == losses
    assert course.finish() == []
    assert course.losses.tolist() == losses


def test_losses_so_far_may_be_asked_for_between_looks():
    rates = torch.ones(70, dtype=torch.float64)
    course = Course("Name", rates, torch.tensor([9.0, 8.0]), {}, progress=False)
    for number in range(3):
        course.record(torch.tensor(float(number), dtype=torch.bfloat16))
        assert course.so_far().tolist() == [9.0, 8.0, 0.0, 1.0, 2.0][: number + 3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_step_that_is_not_finite_is_named(bad):
    with pytest.raises(ConvergenceError, match=r"Name\.fit.*at step 57"):
        run([1.0] * 57 + [bad] * 50)


def test_a_loss_that_ends_far_away_is_warned_of():
    with pytest.warns(UserWarning, match="Name: the loss began at 1 and ended at 200, so training"):
        run([1.0] * 10 + [200.0] * 10).finish()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run([1.0] * 10 + [90.0] * 10).finish()
        # One step astray is none: medians are compared.
        run([1.0] * 19 + [1e12]).finish()


def test_a_site_on_its_way_is_named_and_one_at_rest_is_not():
    """θ = 40 (1 − e^(−s/200)) at s = 400 has 40 e^(−2) = 5.4 scales to go."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.01 * torch.randn(400, generator=generator)
    way = [float(40 * (1 - torch.exp(torch.tensor(-s / 200.0))) + noise[s]) for s in range(400)]
    with pytest.warns(UserWarning, match=r"theta was still moving \(site\) .* raise steps"):
        assert run([1.0] * 400, {"theta/site": torch.zeros(2)}, way).finish() == ["site"]
    at_rest = run([1.0] * 400, {"theta/site": torch.zeros(2)}, noise.tolist())
    assert at_rest.finish() == []
    # After a resume the path begins late, which says nothing.
    resumed = run([1.0] * 400, {"theta/site": torch.zeros(2)}, way, torch.ones(4000).double())
    assert resumed.finish() == []


def test_a_bar_counts_on_from_a_resumed_step(capsys):
    course = run([0.25] * 60, done=torch.ones(40, dtype=torch.float64), progress=True)
    course.finish()
    shown = capsys.readouterr().err
    assert "Name" in shown
    assert "100/100" in shown
    assert "loss=0.25" in shown
