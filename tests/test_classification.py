"""Scores of class probabilities against loops, known values and sampling distributions."""

import math

import numpy as np
import pytest
import torch
from torch import tensor

from hbmeta.classification import (
    accuracy,
    brier,
    calibration_gaps,
    expected_calibration_error,
)
from hbmeta.errors import DataError
from hbmeta.scoring import score_of


def random_points(n, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(n, k, generator=generator, dtype=torch.float64).softmax(-1)
    return p, torch.randint(0, k, (n,), generator=generator)


def slow_error(p, y, weights, bins):
    """Bin by bin: weight times |accuracy − confidence|."""
    total = 0.0
    for b in range(bins):
        inside = [i for i in range(len(y)) if b / bins < max(p[i]) <= (b + 1) / bins]
        if inside:
            w = np.array([weights[i] for i in inside])
            right = np.array([float(np.argmax(p[i]) == y[i]) for i in inside])
            confidence = np.array([max(p[i]) for i in inside])
            share = w.sum() / sum(weights)
            total += share * abs(np.average(right, weights=w) - np.average(confidence, weights=w))
    return total


def test_known_values():
    p = tensor([[1.0, 0.0], [0.0, 1.0], [0.25, 0.75]])
    y = tensor([0, 0, 1])
    assert accuracy(p, y).tolist() == [1.0, 0.0, 1.0]
    assert brier(p, y).tolist() == [0.0, 2.0, 0.125]  # the range is 0 to 2
    assert brier(p, y.double()).tolist() == [0.0, 2.0, 0.125]
    # Equal classes: the lowest counts as predicted.
    assert accuracy(tensor([[0.5, 0.5]] * 2), tensor([0, 1])).tolist() == [1.0, 0.0]


def test_brier_is_a_loop_and_keeps_its_digits():
    p, y = random_points(40, 5)
    slow = [sum((p[i, k] - float(k == y[i])) ** 2 for k in range(5)) for i in range(40)]
    np.testing.assert_allclose(brier(p, y).numpy(), slow, rtol=1e-12)
    near = tensor([[1.0 - 1e-9, 1e-9]], dtype=torch.float64)
    assert float(brier(near, tensor([0]))) == pytest.approx(2e-18, rel=1e-6)


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_error_is_a_loop(bins):
    p, y = random_points(300, 3)
    weights = torch.rand(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for w in (None, weights):
        slow = slow_error(p.tolist(), y.tolist(), [1.0] * 300 if w is None else w.tolist(), bins)
        found = expected_calibration_error(p, y, w, bins=bins)
        assert found == pytest.approx(slow, rel=1e-10)


def test_gaps_of_tasks_add_up_to_the_pooled_error():
    p, y = random_points(60, 4)
    task = tensor([0] * 10 + [2] * 45 + [3] * 5)  # task 1 is empty
    gaps = calibration_gaps(p, y, task, 4)
    assert gaps.shape == (4, 15)
    assert gaps[1].abs().sum() == 0.0
    counts = tensor([10, 0, 45, 5]).double()
    pooled = expected_calibration_error(p, y, 1.0 / counts[task])
    assert float((gaps.sum(0) / 3).abs().sum()) == pytest.approx(pooled, rel=1e-12)


def test_edges_belong_to_the_bin_below():
    # 0.6 and 1.0 end bins 9 and 15 of 15, in single precision too; 0.61 begins bin 10.
    p = tensor([[0.6, 0.4], [1.0, 0.0], [0.61, 0.39]])
    gaps = calibration_gaps(p, tensor([1, 1, 1]), tensor([0, 0, 0]), 1)
    assert gaps[0].nonzero()[:, 0].tolist() == [8, 9, 14]


def test_a_sure_classifier_is_judged_by_its_mistakes():
    p = tensor([[1.0, 0.0]] * 10)
    y = tensor([0] * 7 + [1] * 3)
    assert expected_calibration_error(p, y) == pytest.approx(0.3)


def test_bias_of_a_calibrated_classifier_is_the_stated_one():
    """All points in one bin, accuracy 0.8: E|noise| = √(2 · 0.16 / π n)."""
    generator = torch.Generator().manual_seed(0)
    n, repeats = 100, 2000
    wrong = torch.rand(repeats, n, generator=generator) > 0.8
    p = tensor([[0.8, 0.2]]).expand(n, 2)
    found = [expected_calibration_error(p, y) for y in wrong.long()]
    expected = math.sqrt(2 * 0.16 / (math.pi * n))
    # sd of |noise| is 0.024, its mean's 0.00054: 5 of them, a false alarm in 2 million (beside
    # the Normal limit, which is off by less at n = 100).
    assert np.mean(found) == pytest.approx(expected, abs=0.0027)


def test_jackknife_error_is_the_spread_of_repeated_experiments():
    """Tasks of their own accuracy, so that points of a task go together; overconfident by 0.1."""
    random = np.random.default_rng(0)
    n_tasks, points, repeats = 60, 10, 300
    values, errors = [], []
    task = torch.arange(n_tasks).repeat_interleave(points)
    for _ in range(repeats):
        right = np.repeat(random.beta(7, 3, n_tasks), points)
        y = torch.tensor((random.random(n_tasks * points) > right).astype(np.int64))
        p = torch.tensor([[0.8, 0.2]], dtype=torch.float64).expand(len(y), 2)
        score = score_of("ece", calibration_gaps(p, y, task, n_tasks).numpy(), None)
        values.append(score.value)
        errors.append(score.standard_error)
    # The sd of 300 values is known within 4 %: 0.2 is five such errors, false alarms below 1e-6.
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.2)


@pytest.mark.parametrize(
    ("p", "y", "message"),
    [
        (torch.full((3, 2), 0.5), torch.zeros(4), "shapes"),
        (torch.full((3, 2), 0.5), tensor([0, 1, 2]), r"from 0 to 1; found 2"),
        (torch.full((3, 2), 0.5), tensor([0.0, 0.5, 1.0]), "found 0.5"),
        (torch.full((3, 2), 0.5), tensor([0.0, math.nan, 1.0]), "found nan"),
        (torch.full((3, 2), 0.7), tensor([0, 1, 1]), "sum to 1"),
        (tensor([[-0.5, 1.5]]), tensor([0]), "at least 0"),
        (tensor([[math.nan, 1.0]]), tensor([0]), "sum to 1"),
    ],
)
def test_what_is_no_class_is_refused(p, y, message):
    for function in (accuracy, brier, expected_calibration_error):
        with pytest.raises(DataError, match=message):
            function(p, y)


def test_bins_and_weights_of_no_use_are_refused():
    p, y = random_points(5, 2)
    with pytest.raises(DataError, match="1 bin or more"):
        expected_calibration_error(p, y, bins=0)
    for weights in (torch.zeros(5), torch.ones(4), -torch.ones(5), tensor([math.nan] * 5)):
        with pytest.raises(DataError, match="weights of shape"):
            expected_calibration_error(p, y, weights)
    with pytest.raises(DataError, match="weights of shape"):
        expected_calibration_error(p[:0], y[:0])
