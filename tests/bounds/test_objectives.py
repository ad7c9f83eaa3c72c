"""Bounds to learn by against the theorems, and their tangents."""

import numpy as np
import pytest
import torch

from hbmeta import bounds
from hbmeta.bounds.objectives import FLAT, OBJECTIVES, objective, risk_weight, tangent

SAMPLES = {"equal": [30.0] * 5, "unequal": [30.0, 25.0, 60.0, 31.0, 44.0]}


def arguments(n_samples="equal", *, seed=0, hyper_kl=0.4):
    rng = np.random.default_rng(seed)
    return {
        "risks": torch.tensor(rng.uniform(0.02, 0.3, 5)),
        "kls": torch.tensor(rng.uniform(0.1, 3.0, 5)),
        "hyper_kl": torch.tensor(hyper_kl, dtype=torch.float64),
        "n_samples": torch.tensor(SAMPLES[n_samples], dtype=torch.float64),
        "delta": 0.05,
    }


def theorem(name, risks, kls, hyper_kl, n_samples, delta, **_):
    within = {} if name == "query_split" else {"task_kls": kls, "n_samples": n_samples}
    return float(
        getattr(bounds, name)(
            risk=risks, hyper_kl=hyper_kl, n_tasks=len(risks), delta=delta, **within
        ).raw
    )


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_objective_is_the_theorem(name, samples):
    given = arguments(samples)
    if name == "query_split":  # two nats of δ among five tasks
        given["hyper_kl"] = torch.tensor(0.01, dtype=torch.float64)
    assert float(objective(name, **given)) == pytest.approx(theorem(name, **given), rel=1e-12)


@pytest.mark.parametrize("name", ["joint_kl", "query_split"])
def test_a_flat_kl_inverse_gives_way_to_its_root(name):
    """Else nothing would be learned; the root form is above the theorem and has a slope."""
    given = arguments(hyper_kl=60.0)
    assert theorem(name, **given) > FLAT
    found = tangent(name, **given)
    T, mean = 5, float(given["risks"].mean())
    if name == "query_split":
        root = mean + np.sqrt((60.0 + np.log(2 * np.sqrt(T) / 0.05)) / T / 2)
    else:
        root = float(
            bounds.joint_root(
                risk=given["risks"],
                hyper_kl=60.0,
                task_kls=given["kls"],
                n_samples=30,
                n_tasks=T,
                delta=0.05,
            ).raw
        )
    assert float(found.value) == pytest.approx(root, rel=1e-12)
    assert float(found.hyper_kl) > 1e-3


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_tangent_touches_and_stays_above(name, samples):
    """Slopes to 1e-6 (central differences of 1e-6); the bound is concave in all arguments."""
    given = arguments(samples, hyper_kl=0.05)
    found = tangent(name, **given)
    for part, key in (("risks", "risks"), ("kls", "kls"), ("hyper_kl", "hyper_kl")):
        value, slopes = given[key], getattr(found, part).reshape(-1)
        for i in range(value.numel()):
            step = torch.zeros(value.numel(), dtype=torch.float64)
            step[i] = 1e-6
            step = step.reshape(value.shape)
            up, down = (
                float(objective(name, **{**given, key: value + sign * step})) for sign in (1, -1)
            )
            assert float(slopes[i]) == pytest.approx((up - down) / 2e-6, abs=1e-6)
    for seed in range(1, 20):
        other = arguments(samples, seed=seed, hyper_kl=0.1 * seed / 10)
        line = (
            found.value
            + (found.risks * (other["risks"] - given["risks"])).sum()
            + (found.kls * (other["kls"] - given["kls"])).sum()
            + found.hyper_kl * (other["hyper_kl"] - given["hyper_kl"])
        )
        assert theorem(name, **other) <= float(line) + 1e-12


def test_the_weight_of_the_risk_is_the_ratio_of_the_slopes():
    """λ m = (∂B/∂R̂)/(∂B/∂KL) of the quadratic bound, by central differences: 1e-6."""
    for risk, kl, m in ((0.0, 1.0, 10), (0.2, 0.5, 7), (0.4, 30.0, 200)):

        def value(risk, kl, m=m):
            return float(bounds.quadratic(risk=risk, kl=kl, n_samples=m, delta=0.05).raw)

        # One-sided at a risk of 0, below which there is none.
        low = max(risk - 1e-6, 0.0)
        in_risk = (value(risk + 1e-6, kl) - value(low, kl)) / (risk + 1e-6 - low)
        in_kl = (value(risk, kl + 1e-5) - value(risk, kl - 1e-5)) / 2e-5
        found = risk_weight(*(torch.tensor(v, dtype=torch.float64) for v in (risk, kl, m)), 0.05)
        assert float(m * found) == pytest.approx(in_risk / in_kl, rel=1e-5)
