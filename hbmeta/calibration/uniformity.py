"""Whether N ranks are uniform on 0..L: χ² of their histogram, and a band around their ECDF.

The ranks below k of N independent uniform ones are binomial, c_k ~ B(N, k / (L + 1)), and
c_1 ≤ c_2 ≤ … is a Markov chain,

    c_{j+1} | c_j ~ c_j + B(N − c_j, (z_{j+1} − z_j) / (1 − z_j)),      z_j = k_j / (L + 1).

A band that leaves γ/2 outside on either side at every z_j holds the whole chain with a probability
that one pass along the chain gives exactly. γ is chosen so that it is 1 − α: a band with a
simultaneous false-alarm rate of at most α (counts are whole). The smallest γ whose band the ranks
leave gives a p-value in the same way.

References:
    Säilynoja, Bürkner, Vehtari (2022), Graphical test for discrete uniformity and its applications
    in goodness-of-fit evaluation, Statistics and Computing 32, Algorithm 2.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

__all__ = ["Envelope", "chi_squared", "envelope", "envelope_p", "points"]

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]

# Points at which the ECDF is looked at: more cost more and hardly see more.
_POINTS = 20
# χ² wants so many ranks in each bin.
_PER_BIN = 20
_BINS = 20


class Envelope(NamedTuple):
    """A simultaneous band for counts of ranks.

    Attributes:
        at: (points,) k: what is counted is the ranks below k.
        low: (points,) smallest count inside the band.
        high: (points,) largest.
    """

    at: Whole
    low: Whole
    high: Whole


def chi_squared(ranks: Sequence[int] | Whole, draws: int) -> tuple[float, int, float]:
    """χ² of the ranks' histogram, its bins, and the p-value.

    The bins are of equal probability: as many as divide L + 1, at most 20, with 20 ranks or more in
    each, and 2 at least. The p-value is asymptotic.

    Args:
        ranks: of the truth among the draws, 0..draws.
        draws: L.
    """
    values = np.asarray(ranks, dtype=np.int64)
    most = max(2, min(_BINS, len(values) // _PER_BIN))
    bins = max((b for b in range(2, most + 1) if (draws + 1) % b == 0), default=1)
    if bins == 1 or not len(values):
        return 0.0, bins, 1.0
    counts = np.bincount(values * bins // (draws + 1), minlength=bins)
    expected = len(values) / bins
    statistic = float(((counts - expected) ** 2).sum() / expected)
    return statistic, bins, float(stats.chi2.sf(statistic, bins - 1))


def points(draws: int) -> Whole:
    """The k at which ranks below k are counted: all of 1..L, or about 20 of them."""
    wanted = np.linspace(0, draws + 1, min(draws, _POINTS) + 2)[1:-1]
    return np.unique(wanted.round().astype(np.int64))


@functools.lru_cache(maxsize=64)
def envelope(number: int, draws: int, alpha: float) -> Envelope:
    """The band that N uniform ranks leave anywhere with probability α at most.

    Args:
        number: N.
        draws: L.
        alpha: false-alarm rate of the whole band.
    """
    low, high = 0.0, alpha
    # A band of γ = α at each point is too narrow for all of them, one of γ = 0 is never left.
    for _ in range(30):
        gamma = 0.5 * (low + high)
        if 1.0 - _coverage(number, draws, gamma) > alpha:
            high = gamma
        else:
            low = gamma
    return Envelope(points(draws), *_band(number, draws, low))


def envelope_p(ranks: Sequence[int] | Whole, draws: int) -> float:
    """The probability that N uniform ranks go as far out somewhere as these do.

    Args:
        ranks: of the truth among the draws, 0..draws.
        draws: L.
    """
    values = np.asarray(ranks, dtype=np.int64)
    if not len(values):
        return 1.0
    at, number = points(draws), len(values)
    counts = np.searchsorted(np.sort(values), at, side="left")
    law = stats.binom(number, at / (draws + 1))
    outer = 2.0 * np.minimum(law.cdf(counts), law.sf(counts - 1))
    gamma = min(1.0, float(outer.min()))
    # The counts just outside the band of a γ a little larger than theirs.
    return 1.0 - _coverage(number, draws, gamma * (1.0 + 1e-9))


def _band(number: int, draws: int, gamma: float) -> tuple[Whole, Whole]:
    """Counts with P(C ≤ c) > γ/2 and P(C ≥ c) > γ/2."""
    law = stats.binom(number, points(draws) / (draws + 1))
    low = law.ppf(0.5 * gamma).astype(np.int64)
    low = np.where(law.cdf(low) <= 0.5 * gamma, low + 1, low)
    high = law.isf(0.5 * gamma).astype(np.int64)
    high = np.where(law.sf(high - 1) <= 0.5 * gamma, high - 1, high)
    return np.maximum(low, 0), np.minimum(high, number)


@functools.lru_cache(maxsize=512)
def _coverage(number: int, draws: int, gamma: float) -> float:
    """P(low_j ≤ c_j ≤ high_j for all j), by one pass along the chain."""
    low, high = _band(number, draws, gamma)
    if (low > high).any():
        return 0.0
    z = points(draws) / (draws + 1)
    counts, mass, before = np.zeros(1, dtype=np.int64), np.ones(1), 0.0
    for end, first, last in zip(z, low, high, strict=True):
        following = np.arange(first, last + 1)
        step = following[:, None] - counts[None, :]
        share = (end - before) / (1.0 - before)
        mass = stats.binom.pmf(step, number - counts[None, :], share) @ mass
        counts, before = following, end
    return float(min(mass.sum(), 1.0))
