"""Tests of uniform ranks: their false-alarm rates by simulation, bands against brute force."""

import itertools

import numpy as np
import pytest
from scipy import stats

from hbmeta.calibration.uniformity import (
    _band,
    _coverage,
    chi_squared,
    envelope,
    envelope_p,
    points,
)


def test_coverage_of_a_band_is_that_of_all_rank_vectors():
    """Four ranks on 0..3: all 256 vectors counted one by one."""
    number, draws, gamma = 4, 3, 0.3
    low, high = _band(number, draws, gamma)
    inside = 0
    for ranks in itertools.product(range(draws + 1), repeat=number):
        counts = np.array([sum(r < k for r in ranks) for k in points(draws)])
        inside += bool(((low <= counts) & (counts <= high)).all())
    assert 0 < inside < 256
    assert _coverage(number, draws, gamma) == pytest.approx(inside / 256, abs=1e-12)


def test_p_values_of_uniform_ranks_are_those_of_uniform_ranks():
    """p ≤ α at most α of the time: 400 sets, and one seed in 10,000 gives more than 5 % + 4 sd."""
    rng = np.random.default_rng(0)
    sets = rng.integers(0, 100, (400, 200))
    by_band = np.array([envelope_p(ranks, 99) for ranks in sets])
    by_histogram = np.array([chi_squared(ranks, 99)[2] for ranks in sets])
    most = stats.binom(400, 0.05).isf(1e-4) / 400
    assert 0.01 < (by_band <= 0.05).mean() <= most
    assert 0.01 < (by_histogram <= 0.05).mean() <= most


def test_the_band_is_left_where_the_p_value_is_small():
    """The two are one test: outside the band of α exactly where p ≤ α."""
    rng = np.random.default_rng(1)
    alpha, number, draws = 0.05, 60, 19
    band = envelope(number, draws, alpha)
    assert 1 - alpha <= _coverage(number, draws, 0.0) == 1.0
    outside, small = [], []
    for ranks in rng.integers(0, draws + 1, (150, number)):
        counts = np.array([(ranks < k).sum() for k in band.at])
        outside.append(bool(((counts < band.low) | (counts > band.high)).any()))
        small.append(envelope_p(ranks, draws) <= alpha)
    assert any(outside)
    assert sum(a != b for a, b in zip(outside, small, strict=True)) <= 1


def test_control_numbers_of_a_histogram():
    """2,000 simulations of N(0, 1), L = 99: χ² near 590 for sd × 0.7, 180 for a mean + 0.2 sd."""
    rng = np.random.default_rng(2)
    z = rng.standard_normal(2000)
    draws = rng.standard_normal((2000, 99))

    def statistic(q):
        ranks = (q < z[:, None]).sum(1)
        return chi_squared(ranks, 99)

    exact, bins, p = statistic(draws)
    assert bins == 20
    assert p > 1e-3
    assert exact < 44
    # The statistic of a multinomial has an sd near 2 sqrt(χ²): within four of them.
    assert statistic(0.7 * draws)[0] == pytest.approx(590, abs=200)
    assert statistic(draws + 0.2)[0] == pytest.approx(180, abs=110)


@pytest.mark.parametrize("ranks", [(), (3,), (60, 30)])
def test_few_ranks_prove_nothing(ranks):
    assert chi_squared(ranks, 99)[2] > 0.01
    assert envelope_p(ranks, 99) > 0.01
