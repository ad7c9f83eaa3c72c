"""What must hold of every bound at any argument: direction, order, limits, broadcasting.

Arguments are drawn by hypothesis from a fixed seed; comparisons allow 1e-12 for rounding.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hbmeta import bounds
from hbmeta.errors import DataError
from tests.bounds import plain

SLACK = 1e-12
EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True)

SINGLE = {
    "mcallester": {},
    "maurer": {},
    "seeger_kl": {},
    "quadratic": {},
    "seeger_relaxed": {},
    "thiemann": {},
    "catoni": {"temperature": 1.3},
    "new_task": {},
}
OVER_TASKS = {
    "amit_meir": {},
    "amit_meir_kl": {},
    "account_bound": {},
    "separate_roots": {},
    "pentina_lampert": {},
    "joint_kl": {},
    "joint_root": {},
}
# log T stands inside the within-task term of the others.
FALL_IN_TASKS = {"pentina_lampert", "joint_kl", "joint_root"}

risks = st.floats(0.0, 1.0)
kls = st.floats(0.0, 200.0)
deltas = st.floats(1e-6, 0.5)
samples = st.integers(2, 100_000)
tasks = st.integers(2, 100_000)
factors = st.floats(1.0, 5.0)
single_cases = st.fixed_dictionaries(
    {"risk": risks, "kl": kls, "n_samples": samples, "delta": deltas}
)
task_cases = st.fixed_dictionaries(
    {
        "risk": risks,
        "hyper_kl": kls,
        "task_kls": kls,
        "n_samples": samples,
        "n_tasks": tasks,
        "delta": deltas,
    }
)
names_single = st.sampled_from(sorted(SINGLE))
names_tasks = st.sampled_from(sorted(OVER_TASKS))


def single(name, case, **changed):
    return getattr(bounds, name)(**{**case, **SINGLE[name], **changed})


def over_tasks(name, case, **changed):
    return getattr(bounds, name)(**{**case, **OVER_TASKS[name], **changed})


def not_above(smaller, larger):
    """≤ for bounds or numbers, up to rounding."""
    low, high = (np.asarray(b.raw if isinstance(b, bounds.Bound) else b) for b in (smaller, larger))
    assert (low <= high + SLACK * (1.0 + np.abs(high))).all(), (low, high)


def rises(bound, case, factor):
    """In the risk, in every KL, in 1/δ."""
    now = bound(case)
    not_above(now, bound(case, risk=case["risk"] + (1.0 - case["risk"]) * (1.0 - 1.0 / factor)))
    not_above(now, bound(case, delta=case["delta"] / factor))
    for kl in {"kl", "hyper_kl", "task_kls"} & set(case):
        not_above(now, bound(case, **{kl: factor * case[kl] + factor - 1.0}))


def is_whole(bound, case):
    """The terms add up, the value is the right-hand side cut off at 1, and none is negative."""
    found = bound(case)
    assert found.value == min(1.0, found.raw)
    assert found.vacuous == (found.raw >= 1.0)
    total = found.empirical + found.within_task + found.across_task
    assert float(total) == pytest.approx(float(found.raw), rel=1e-12)
    assert min(found.within_task, found.across_task) >= -SLACK
    not_above(case["risk"], found)


@EXAMPLES
@given(names_single, single_cases, factors)
def test_direction_for_one_task(name, case, factor):
    def bound(case, **changed):
        return single(name, case, **changed)

    is_whole(bound, case)
    rises(bound, case, factor)
    more = int(np.ceil(case["n_samples"] * factor))
    not_above(bound(case, n_samples=more), bound(case))


@settings(EXAMPLES, max_examples=80)
@given(names_tasks, task_cases, factors)
def test_direction_over_tasks(name, case, factor):
    def bound(case, **changed):
        return over_tasks(name, case, **changed)

    is_whole(bound, case)
    rises(bound, case, factor)
    more = int(np.ceil(case["n_samples"] * factor))
    not_above(bound(case, n_samples=more), bound(case))
    more = int(np.ceil(case["n_tasks"] * factor))
    if name in FALL_IN_TASKS:
        not_above(bound(case, n_tasks=more), bound(case))
    else:
        not_above(bound(case, n_tasks=more).across_task, bound(case).across_task)


@EXAMPLES
@given(task_cases, factors)
def test_direction_of_bounds_without_a_within_task_term(case, factor):
    more = int(np.ceil(case["n_tasks"] * factor))

    def split(case, **changed):
        kept = {name: case[name] for name in ("risk", "hyper_kl", "n_tasks", "delta")}
        return bounds.query_split(**{**kept, **changed})

    def fresh(case, **changed):
        kept = {name: case[name] for name in ("risk", "n_tasks", "delta")}
        return bounds.meta_test(**{**kept, **changed})

    for bound in (split, fresh):
        not_above(bound(case, n_tasks=more), bound(case))
        not_above(bound(case), bound(case, delta=case["delta"] / factor))
    not_above(split(case), split(case, hyper_kl=case["hyper_kl"] * factor))
    # A single prior: what is left is a bound on a sample of tasks, dearer by log(2√T) alone.
    alone = split(case, hyper_kl=0.0)
    not_above(fresh(case), alone)
    wanted = fresh(case, delta=case["delta"] / (2.0 * np.sqrt(case["n_tasks"])))
    assert float(alone.raw) == pytest.approx(float(wanted.raw), rel=1e-12)


@EXAMPLES
@given(single_cases, st.floats(0.01, 1.99))
def test_order_for_one_task(case, temperature):
    not_above(single("seeger_kl", case), single("quadratic", case))
    not_above(single("quadratic", case), single("seeger_relaxed", case))
    not_above(single("seeger_kl", case), single("maurer", case))
    not_above(single("maurer", case), single("mcallester", case))
    not_above(single("thiemann", case), single("thiemann", case, temperature=temperature))
    best = float(single("thiemann", case).raw)
    assert best == pytest.approx(float(single("quadratic", case).raw), rel=1e-12)
    chernoff = bounds.kl_inverse(
        case["risk"], (case["kl"] - np.log(case["delta"])) / case["n_samples"]
    )
    not_above(chernoff, single("catoni", case, temperature=3.0 * temperature))


@EXAMPLES
@given(task_cases)
def test_order_over_tasks(case):
    not_above(over_tasks("joint_kl", case), over_tasks("joint_root", case))
    not_above(over_tasks("amit_meir_kl", case), over_tasks("amit_meir", case))
    not_above(over_tasks("amit_meir_kl", case, environment="kl"), over_tasks("amit_meir_kl", case))
    epsilon = case["delta"] / (2.0 * case["n_tasks"] * np.sqrt(case["n_samples"]))
    not_above(
        over_tasks("separate_roots", case, epsilon=epsilon), over_tasks("account_bound", case)
    )
    split = {name: case[name] for name in ("risk", "hyper_kl", "n_tasks", "delta")}
    not_above(bounds.query_split(**split), over_tasks("joint_kl", case))


@EXAMPLES
@given(st.lists(st.tuples(risks, kls), min_size=3, max_size=3), task_cases)
def test_means_over_tasks_can_only_raise_a_bound(pairs, case):
    """√ and kl⁻¹ are concave, the latter in both arguments jointly."""
    own = {"risk": [risk for risk, _ in pairs], "task_kls": [kl for _, kl in pairs], "n_tasks": 3}
    mean = {**own, "risk": np.mean(own["risk"]), "task_kls": np.mean(own["task_kls"])}
    for name in OVER_TASKS:
        not_above(over_tasks(name, case, **own), over_tasks(name, case, **mean))


def test_amit_and_meirs_bound_rises_again_for_many_tasks():
    """m = 5, K = 0, δ = 0.05: smallest at T = 343, because of log T inside the task term."""
    T = np.arange(2, 5000)
    bound = bounds.amit_meir(
        risk=0.0, hyper_kl=0.0, task_kls=0.0, n_samples=5, n_tasks=T, delta=0.05
    )
    assert T[bound.raw.argmin()] == 343
    assert (np.diff(bound.raw[342:]) > 0.0).all()


@pytest.mark.parametrize(
    ("delta", "separate", "account", "kl"),
    [
        (0.1, (4, 12, 58, 458), None, None),
        (0.05, (4, 14, 64, 496), (4, 16, 71, 535), (2, 8, 21, 62)),
    ],
)
def test_tasks_that_the_environment_term_alone_needs(delta, separate, account, kl):
    """Tasks for a term of at most 1, 0.5, 0.25, 0.1 at K_H = 0."""
    T = np.arange(2, 1000)
    case = {"hyper_kl": 0.0, "task_kls": 0.0, "n_samples": 5, "n_tasks": T, "delta": delta}

    def least(term):
        return tuple(T[(term <= level).argmax()] for level in (1.0, 0.5, 0.25, 0.1))

    assert least(bounds.amit_meir(risk=0.0, **case).across_task) == separate
    if account:
        assert least(bounds.account_bound(risk=0.0, **case).across_task) == account
    if kl:
        rate = np.log(4.0 * np.sqrt(T) / delta) / T
        assert least(bounds.kl_inverse(0.0, rate)) == kl


def test_limits_of_much_data():
    """Everything vanishes but what K_i/m and the number of tasks leave."""
    many = {"hyper_kl": 3.0, "task_kls": 2.0, "n_samples": 10**15, "delta": 0.05}
    for name in OVER_TASKS:
        bound = over_tasks(name, {**many, "risk": 0.2, "n_tasks": 10**13})
        assert float(bound.raw) == pytest.approx(0.2, abs=2e-5)
    for name in set(SINGLE) - {"catoni"}:
        bound = single(name, {"risk": 0.2, "kl": 3.0, "n_samples": 10**15, "delta": 0.05})
        assert float(bound.raw) == pytest.approx(0.2, abs=1e-6)
    joint = bounds.joint_kl(**many, risk=0.2, n_tasks=20)
    rate = (3.0 + np.log(4.0 * np.sqrt(20) / 0.05)) / 20
    assert float(joint.raw) == pytest.approx(plain.inverse(0.2, rate), abs=1e-6)


def test_broadcasting_is_a_loop():
    risk = np.array([0.1, 0.2, 0.3])[:, None]
    n = np.array([20, 300])
    for name in SINGLE:
        case = {"risk": risk, "kl": 2.0, "n_samples": n, "delta": 0.05}
        found = single(name, case)
        for part in ("value", "raw", "empirical", "within_task", "across_task", "vacuous"):
            assert getattr(found, part).shape == (3, 2)
        for i in range(3):
            for j in range(2):
                alone = single(name, {**case, "risk": risk[i, 0], "n_samples": n[j]})
                # An array takes as many steps of Newton's method as its slowest entry.
                assert found.raw[i, j] == pytest.approx(float(alone.raw), rel=1e-14)
    rng = np.random.default_rng(0)
    per_task = {"risk": rng.random((2, 1, 4)), "task_kls": rng.random(4), "n_samples": 30}
    case = {**per_task, "hyper_kl": np.array([0.0, 1.0, 2.0]), "n_tasks": 4, "delta": 0.1}
    for name in OVER_TASKS:
        found = over_tasks(name, case)
        assert found.raw.shape == found.empirical.shape == (2, 3)
        for i in range(2):
            for j in range(3):
                alone = over_tasks(name, {**case, "risk": case["risk"][i, 0], "hyper_kl": float(j)})
                assert found.raw[i, j] == pytest.approx(float(alone.raw), rel=1e-13)


def test_tensors_are_taken_and_arguments_left_alone():
    risk = torch.tensor([0.1, 0.3], dtype=torch.float32, requires_grad=True)
    case = {"hyper_kl": 1.0, "task_kls": np.array([2.0, 3.0]), "n_samples": 50, "delta": 0.05}
    bound = bounds.joint_kl(risk=risk, n_tasks=2, **case)
    again = bounds.joint_kl(risk=risk.detach().double().numpy(), n_tasks=2, **case)
    assert bound.raw == again.raw
    assert float(bound) == float(np.asarray(bound)) == float(bound.value)
    given = np.array([0.1, 0.3])
    bounds.maurer(risk=given, kl=np.inf, n_samples=10, delta=0.05)
    np.testing.assert_array_equal(given, [0.1, 0.3])


def test_an_infinite_kl_is_booked_on_its_own_term():
    case = {"risk": 0.2, "hyper_kl": 1.0, "task_kls": 1.0, "n_samples": 50, "n_tasks": 9}
    bound = bounds.separate_roots(**{**case, "hyper_kl": np.inf}, delta=0.05)
    assert (bound.within_task, bound.across_task) == (0.0, 0.8)
    bound = bounds.separate_roots(**{**case, "task_kls": np.inf}, delta=0.05)
    assert (bound.within_task, bound.across_task) == (0.8, 0.0)
    bound = bounds.separate_roots(**{**case, "hyper_kl": np.array([1.0, np.inf])}, delta=0.05)
    assert list(bound.raw == 1.0) == [False, True]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda c: bounds.amit_meir(**{**c, "risk": [0.1, 0.2]}), r"risk\[\.\.\., None\]"),
        (lambda c: bounds.amit_meir(**{**c, "hyper_kl": [1, 2], "delta": [0.1] * 3}), "broadcast"),
        (lambda c: bounds.amit_meir(**{**c, "risk": "low"}), "'low'"),
        (lambda c: bounds.amit_meir_kl(**c, environment="both"), "'both'"),
        (lambda c: bounds.account_bound(**{**c, "n_samples": [5, 6, 7]}), "separate_roots"),
        (lambda c: bounds.separate_roots(**c, epsilon=2.0), "epsilon"),
        (lambda c: bounds.separate_roots(**{**c, "hyper_kl": [1, 2]}, epsilon=[0.1] * 3), "broad"),
        (lambda c: bounds.pentina_lampert(**c, task_temperature=0.0), "positive"),
        (
            lambda c: bounds.pentina_lampert(
                **c, task_temperature=[1, 2], sample_temperature=[1, 2, 3]
            ),
            "broadcast",
        ),
        (lambda c: bounds.joint_kl(**{**c, "n_tasks": 2.5}), "whole numbers"),
        (lambda c: bounds.joint_kl(**{**c, "risk": None}), "None"),
    ],
)
def test_bad_arguments_name_what_to_do(call, match):
    case = {"risk": 0.1, "hyper_kl": 1.0, "task_kls": 2.0, "n_samples": 50, "n_tasks": 3}
    with pytest.raises(DataError, match=match):
        call({**case, "delta": 0.05})
