"""The moment inequality behind `separate_roots`, by complete enumeration of a small world.

Two kinds of tasks, two hypotheses with a uniform prior P, m binary losses of each hypothesis, a
base learner that puts all its mass on the hypothesis of smaller empirical risk. Notation as in
docs/certificates.md, proof of Theorem R, steps 1 to 2:

    E[e^(2(T−1)A²) ∏_i w_i] ≤ 2√T e^η,     1 ≤ E w ≤ 1 + ε.
"""

import itertools
import math

import numpy as np
import pytest

RISKS = {"easy": (0.1, 0.9), "hard": (0.95, 0.6)}
"""True risk of each hypothesis on each kind of task."""


def outcomes(m):
    """Probability, Z and X of every outcome of one task, P fixed."""
    found = []
    for risks, errors in itertools.product(
        RISKS.values(), itertools.product(range(m + 1), repeat=2)
    ):
        chance = 1.0 / len(RISKS)
        for risk, k in zip(risks, errors, strict=True):
            chance *= math.comb(m, k) * risk**k * (1.0 - risk) ** (m - k)
        gaps = [risk - k / m for risk, k in zip(risks, errors, strict=True)]
        Z = math.log(np.mean([math.exp(2.0 * m * gap**2) for gap in gaps]))
        found.append((chance, Z, risks[errors[1] < errors[0]]))
    return np.array(found)


@pytest.mark.parametrize("T", [2, 3])
@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 1.0])
def test_moment_inequality(T, m, epsilon):
    chance, Z, X = outcomes(m).T
    assert chance.sum() == pytest.approx(1.0)
    assert (Z >= 0.0).all()
    assert chance @ np.exp(Z) <= 2.0 * math.sqrt(m)
    w = np.maximum(1.0, np.exp(Z - math.log(2.0 * math.sqrt(m) / epsilon)))
    assert 1.0 <= chance @ w <= 1.0 + epsilon
    mean = chance @ X
    # All outcomes of T tasks, along T axes.
    average = sum(np.meshgrid(*[X / T] * T, indexing="ij"))
    together = math.prod(np.meshgrid(*[chance * w] * T, indexing="ij"))
    A = np.maximum(mean - average, 0.0)
    moment = (together * np.exp(2.0 * (T - 1.0) * A**2)).sum()
    eta = T * epsilon + 2.0 * T * (T - 1.0) * epsilon**2
    assert 1.0 < moment <= 2.0 * math.sqrt(T) * math.exp(eta)
    assert A.max() > 0.2  # the tasks do differ
