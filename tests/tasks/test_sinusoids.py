import math

import numpy as np
import pytest
import torch

from hbmeta.errors import DataError
from hbmeta.tasks import Sinusoids


def waves(tasks, truth):
    """A sin(x − b) of every flat row, in float64."""
    x = tasks.flat_x[:, 0].double()
    return truth["amplitude"][tasks.task] * torch.sin(x - truth["phase"][tasks.task])


def test_the_defaults_are_those_of_the_paper():
    episode, truth = Sinusoids().sample_with_truth(4, seed=0)
    assert episode.support.features == ("x",)
    assert episode.support.dtype == torch.float32
    assert episode.support.counts.tolist() == episode.query.counts.tolist() == [10] * 4
    for part in (episode.support, episode.query):
        assert torch.equal(part.flat_y, waves(part, truth).float())


@pytest.mark.parametrize(
    ("name", "low", "high"), [("amplitude", 0.1, 5.0), ("phase", 0.0, math.pi), ("x", -5.0, 5.0)]
)
def test_what_is_uniform(name, low, high):
    # 5,000 uniforms: mean and variance within 4.5 standard errors (variance of the sample variance
    # (high − low)⁴ / 180 / n); two comparisons, a false alarm of 1.4e-5.
    n = 5000
    episode, truth = Sinusoids(shots=1).sample_with_truth(n, seed=1)
    values = truth[name] if name in truth else episode.support.flat_x[:, 0].double()
    assert low <= float(values.min()) < float(values.max()) <= high
    assert abs(float(values.mean()) - (low + high) / 2) < 4.5 * (high - low) / (12 * n) ** 0.5
    spread = (high - low) ** 2
    assert abs(float(values.var()) - spread / 12) < 4.5 * spread / (180 * n) ** 0.5


@pytest.mark.parametrize(("turn", "expected"), [(math.pi, -2 / math.pi * 2.55), (2 * math.pi, 0.0)])
def test_the_mean_function(turn, expected):
    # E[y | x] = expected · cos x: its projection on cos x over 4,000 tasks of one row each is
    # within 4.5 standard errors; a false alarm of 7e-6.
    family = Sinusoids(phase=(0.0, turn), shots=1, queries=0)
    support = family.sample(4000, seed=0).support
    cos = support.flat_x[:, 0].cos()
    residual = (support.flat_y - expected * cos) * cos
    assert abs(float(residual.mean())) < 4.5 * float(residual.std()) / 4000**0.5


def test_noise():
    # 8,000 residuals: mean and variance within 4.5 standard errors; a false alarm of 1.4e-5.
    family = Sinusoids(noise=0.5, dtype=torch.float64)
    episode, truth = family.sample_with_truth(400, seed=2)
    residual = torch.cat([p.flat_y - waves(p, truth) for p in (episode.support, episode.query)])
    n = len(residual)
    assert abs(float(residual.mean())) < 4.5 * 0.5 / n**0.5
    assert abs(float(residual.var()) - 0.25) < 4.5 * 0.25 * (2 / n) ** 0.5


def test_fixed_numbers_and_ranges_of_rows():
    family = Sinusoids(amplitude=2, phase=[0.5, 0.5], shots=(0, 3), queries=(1, 2))
    episode, truth = family.sample_with_truth(200, seed=0)
    assert truth["amplitude"].eq(2.0).all()
    assert truth["phase"].eq(0.5).all()
    # Each missed once in 1e25 and 1e60 tries.
    assert set(episode.support.counts.tolist()) == {0, 1, 2, 3}
    assert set(episode.query.counts.tolist()) == {1, 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"amplitude": -1.0}, "amplitude as a finite number of at least 0"),
        ({"amplitude": (2.0, 1.0)}, r"found \(2.0, 1.0\)"),
        ({"amplitude": (1.0, 2.0, 3.0)}, r"found \(1.0, 2.0, 3.0\)"),
        ({"amplitude": "1"}, "found '1'"),
        ({"amplitude": True}, "found True"),
        ({"phase": (0.0, float("inf"))}, "phase as a finite number, or a range"),
        ({"low": 5.0}, "low=5.0, high=5.0"),
        ({"high": float("nan")}, "high=nan"),
        ({"low": None}, "low=None"),
        ({"noise": -0.1}, "noise as a finite number of at least 0"),
        ({"noise": (0.1, 0.2)}, "noise as a finite number"),
        ({"shots": 1.5}, "shots as a number of rows"),
        ({"queries": (3, 2)}, "queries as a number of rows"),
        ({"dtype": torch.int64}, "found torch.int64"),
        ({"dtype": "float32"}, "found 'float32'"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(DataError, match=message) as caught:
        Sinusoids(**arguments)
    assert caught.value.where == "Sinusoids"


def test_equal_settings_are_one_family():
    family = Sinusoids(noise=0.1, shots=(2, 5))
    family.sample(2, seed=3)
    assert family == Sinusoids(noise=0.1, shots=(2, 5))


def test_numbers_of_numpy_are_numbers():
    assert (
        Sinusoids(amplitude=np.float32(2.0), noise=np.float64(0.5))
        .sample(np.int64(2), seed=np.int64(0))
        .n_tasks
        == 2
    )
