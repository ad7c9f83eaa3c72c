"""Known answers of every bound, as a function of the module that is to give them.

`check(bounds)` raises AssertionError at the first wrong one. The tests call it with `hbmeta.bounds`
and, to see that it can fail, with every mutant of `mutants.py`. The numbers of T17 to T22 were
computed apart from hbmeta, to ten decimals; unequal tasks are compared with `plain`.
"""

import math

import numpy as np

from hbmeta.errors import DataError
from tests.bounds import plain

INF = math.inf

# R̂, K_H, K_i, T, m, δ
T20 = [
    {"risk": 0.1, "hyper_kl": 5, "task_kls": 2, "n_tasks": 200, "n_samples": 50, "delta": 0.05},
    {"risk": 0.05, "hyper_kl": 20, "task_kls": 5, "n_tasks": 1000, "n_samples": 100, "delta": 0.05},
    {"risk": 0.1, "hyper_kl": 0, "task_kls": 0, "n_tasks": 5, "n_samples": 2000, "delta": 0.1},
]
UNEQUAL = {
    "risks": [0.1, 0.3, 0.0, 0.25],
    "K_H": 1.5,
    "kls": [2.0, 0.5, 4.0, 0.0],
    "samples": [40, 100, 7, 2000],
    "delta": 0.1,
}
"""Four tasks of which no two have the same risk, KL or number of samples."""
ALIKE = {**UNEQUAL, "samples": [60, 60, 60, 60]}


def close(found, wanted, slack=1e-9):
    assert np.shape(found) == ()
    assert abs(float(found) - wanted) <= slack, (float(found), wanted)


def arguments(case):
    """A case of `plain` as the keywords of `hbmeta.bounds`."""
    return {
        "risk": case["risks"],
        "hyper_kl": case["K_H"],
        "task_kls": case["kls"],
        "n_samples": case["samples"],
        "n_tasks": len(case["risks"]),
        "delta": case["delta"],
    }


def refuses(call, **keywords):
    try:
        call(**keywords)
    except DataError:
        return
    raise AssertionError(f"{call.__name__} took {keywords}")


def inverses(b):
    """T17, and both ends of the range."""
    upper = [
        (0.1, 0.05, 0.2200786011),
        (0.0, 0.05, 0.0487705755),
        (0.5, 0.1, 0.7128786315),
        (1.0, 0.1, 1.0),
        (0.1, 0.0, 0.1),
        (0.02, 0.001, 0.0269131729),
        (0.3, INF, 1.0),
        (0.0, INF, 1.0),
        (0.9, 1000.0, 1.0),
    ]
    for q, c, p in upper:
        close(b.kl_inverse(q, c), p)
    for q, c, p in [(0.1, 0.05, 0.0312783963), (1.0, 0.05, 0.9512294245), (0.0, 0.3, 0.0)]:
        close(b.kl_inverse_lower(q, c), p)
    close(b.kl_inverse_lower(0.3, INF), 0.0)
    close(b.kl_inverse_lower(0.1, 0.0), 0.1, slack=0.0)
    close(b.kl_inverse(0.1, 0.0), 0.1, slack=0.0)
    assert float(b.kl_inverse(0.0, 1e-12)) >= 1e-12 * (1 - 5e-13)
    grid = np.linspace(0.05, 0.95, 19)
    for c in (1e-4, 0.01, 1.0):
        for q, high in zip(grid, b.kl_inverse(grid, c), strict=True):
            close(high, plain.inverse(q, c))


def single_task(b):
    """T18, and a second case of every bound for what R̂ = 0.05 cannot tell apart."""
    case = {"risk": 0.05, "kl": 10.0, "n_samples": 1000, "delta": 0.05}
    close(b.mcallester(**case).raw, 0.1498083437)
    close(b.maurer(**case).raw, 0.1425817398)
    close(b.seeger_kl(**case).raw, 0.1007818782)
    close(b.new_task(**case).raw, 0.1007818782)
    close(b.kl_inverse(0.05, (10.0 + math.log(1001 / 0.05)) / 1000), 0.1055877978)
    close(b.quadratic(**case).raw, 0.1119551419)
    close(b.thiemann(**case).raw, 0.1119551419)
    close(b.thiemann(**case, temperature=0.5533925538).raw, 0.1119551419)
    close(b.seeger_relaxed(**case).raw, 0.1256893269)
    for temperature, value in [(0.5, 0.0947543981), (1.0, 0.0965836632), (2.0, 0.1235687384)]:
        close(b.catoni(**case, temperature=temperature).raw, value)
    # The best temperature of Catoni's bound is the kl inverse without the 2√n.
    temperatures = np.linspace(0.01, 8.0, 4000)
    best = b.catoni(risk=0.2, kl=3.0, n_samples=50, delta=0.1, temperature=temperatures).raw.min()
    close(best, plain.inverse(0.2, (3.0 + math.log(10.0)) / 50), slack=1e-6)
    # Thiemann away from its best temperature, as printed.
    c = (3.0 + math.log(2 * math.sqrt(50) / 0.1)) / 50
    found = b.thiemann(risk=0.2, kl=3.0, n_samples=50, delta=0.1, temperature=1.4).raw
    close(found, 0.2 / 0.3 + c / (1.4 * 0.3))
    for temperature in (0.0, 2.0):
        refuses(b.thiemann, **case, temperature=temperature)
    refuses(b.catoni, **case, temperature=0.0)
    refuses(b.mcallester, risk=0.05, kl=10.0, n_samples=1, delta=0.05)
    close(b.maurer(risk=0.0, kl=0.0, n_samples=1, delta=0.5).raw, math.sqrt(math.log(4.0) / 2))


def over_tasks(b):
    """T20 and the terms of its first row."""
    wanted = {
        "amit_meir": (0.7380808766, 0.6243472121, 0.9139679282),
        "amit_meir_kl": (0.6903703005, 0.5590261135, 0.8897342109),
        "account_bound": (0.6909360915, 0.4999960326, 0.9706133837),
        "pentina_lampert": (1.0298997406, 1.3179298779, 1.5118263076),
        "joint_root": (0.4173027163, 0.3265640691, 0.7907073223),
        "joint_kl": (0.3674075993, 0.2456779613, 0.7465131469),
        "separate_roots": (0.6022502835, 0.4479358185, 0.9077417629),  # ε = 1/(2T)
    }
    for name, values in wanted.items():
        for case, value in zip(T20, values, strict=True):
            bound = getattr(b, name)(**case)
            close(bound.raw, value)
            close(bound.value, min(value, 1.0))
            close(bound.empirical, case["risk"], slack=0.0)
            assert bool(bound.vacuous) == (value >= 1.0)
    for case, value in zip(T20, (0.6636807143, 0.4897855027, 0.8461322784), strict=True):
        epsilon = case["delta"] / (2 * case["n_tasks"] * math.sqrt(case["n_samples"]))
        close(b.separate_roots(**case, epsilon=epsilon).raw, value)
    for case, value in zip(T20, (0.67102, 0.55302, 0.76315), strict=True):
        close(b.amit_meir_kl(**case, environment="kl").raw, value, slack=5.1e-6)
    terms = [
        ("amit_meir", 0.4506143179, 0.1874665586),
        ("account_bound", 0.3988806661, 0.1920554254),
        ("pentina_lampert", 0.3066643476, 0.6232353931),
    ]
    for name, within, across in terms:
        bound = getattr(b, name)(**T20[0])
        close(bound.within_task, within)
        close(bound.across_task, across)
    joint = b.joint_kl(**T20[0])
    close(joint.empirical + joint.within_task, 0.2073665631)
    for risk, K_H, T, value in [
        (0.1, 5, 200, 0.2294233519),
        (0.05, 20, 1000, 0.1172624272),
        (0.08, 3, 100, 0.2423083649),
    ]:
        found = b.query_split(risk=risk, hyper_kl=K_H, n_tasks=T, delta=0.05)
        close(found.raw, value)
        close(found.within_task, 0.0, slack=0.0)
        close(found.across_task, value - risk)


def unequal_tasks(b):
    """Every bound on four tasks of different sizes, against loops."""
    given = arguments(UNEQUAL)
    for name in ("amit_meir", "amit_meir_kl", "pentina_lampert", "joint_kl", "joint_root"):
        close(getattr(b, name)(**given).raw, getattr(plain, name)(**UNEQUAL))
        close(getattr(b, name)(**arguments(ALIKE)).raw, getattr(plain, name)(**ALIKE))
    close(b.amit_meir_kl(**given, environment="kl").raw, plain.amit_meir_kl_kl(**UNEQUAL))
    for epsilon in (None, 0.03):
        wanted = plain.separate_roots(**UNEQUAL, epsilon=1 / 8 if epsilon is None else epsilon)
        close(b.separate_roots(**given, epsilon=epsilon).raw, wanted)
    wanted = plain.query_split(UNEQUAL["risks"], 1.5, 0.1)
    close(b.query_split(risk=UNEQUAL["risks"], hyper_kl=1.5, n_tasks=4, delta=0.1).raw, wanted)
    # Other temperatures of Pentina & Lampert's, term by term.
    found = b.pentina_lampert(**given, task_temperature=3.0, sample_temperature=5.0)
    harmonic = 4 / sum(1 / m for m in UNEQUAL["samples"])
    wanted = (1 / 3 + 1 / 20) * (1.5 + math.log(20.0)) + 6.5 / 20 + 3 / 32 + 5 / (8 * harmonic)
    close(found.raw, 0.1625 + wanted)
    refuses(b.account_bound, **given)
    refuses(b.amit_meir_kl, **{**given, "risk": 0.2})
    refuses(b.separate_roots, **given, epsilon=1.5)
    refuses(b.separate_roots, **{**given, "n_samples": [1, 1, 1, 1]}, epsilon=0.9)


def sampled(b):
    """T21 and T22."""
    for risk, draws, one_sided, two_sided in [
        (0.1, 1000, 0.1312248591, 0.1336793810),
        (0.0, 1000, 0.0045945826, 0.0052843060),
        (0.03, 150_000, 0.0313560020, 0.0314559820),
    ]:
        close(b.monte_carlo(risk=risk, n_draws=draws, delta=0.01), one_sided)
        close(b.monte_carlo(risk=risk, n_draws=draws, delta=0.005), two_sided)
    limit = b.monte_carlo(risk=0.05, n_draws=1000, delta=0.01)
    close(limit, 0.0737101464)
    close(b.seeger_kl(risk=limit, kl=10.0, n_samples=1000, delta=0.04).raw, 0.1322145985)
    close(b.meta_test(risk=0.08, n_tasks=100, delta=0.05).raw, 0.1628512879)
    close(b.meta_test(risk=np.full(100, 0.08), n_tasks=100, delta=0.05).raw, 0.1628512879)
    close(b.hold_out(risk=0.08, n_samples=100, delta=0.05).raw, 0.1628512879)
    limit = float(b.clopper_pearson(errors=8, n_samples=100, delta=0.05).raw)
    close(limit, 0.1397171192)
    tail = sum(math.comb(100, k) * limit**k * (1 - limit) ** (100 - k) for k in range(9))
    close(tail, 0.05)
    close(b.clopper_pearson(errors=0, n_samples=100, delta=0.05).raw, 1 - 0.05**0.01)
    close(b.clopper_pearson(errors=7, n_samples=7, delta=0.05).raw, 1.0)
    refuses(b.clopper_pearson, errors=8, n_samples=7, delta=0.05)


def divergences(b):
    """T19."""
    theta, start = [0.5, -1.0, 2.0], 0.0
    close(b.gaussian_hyper_kl(theta, start, 0.1, 1.0), 8.0477552790)
    for ratio, cost in [(1e-5, 11.0129), (0.1, 1.8076), (0.5, 0.3181)]:
        close(b.gaussian_hyper_kl([0.0, 0.0], 0.0, 3.0 * ratio, 3.0), 2 * cost, slack=1.1e-4)
    mean, sd, centre = [0.2, 0.1], [0.3, 0.5], [0.0, 0.4]
    close(b.expected_kl_fixed_variance(mean, sd, centre, 0.2, 0.6), 0.6393576262)
    close(b.expected_kl_learned_variance(mean, sd, centre, [-1.0, 0.2], 0.2), 0.8915428800)
    A, offset, V = [[0.7, 0.1], [0.1, 0.5]], [0.2, -0.1], 0.04 * np.eye(2)
    close(b.expected_kl_affine(A, offset, V, centre, 0.2, 0.6), 1.5333356884)
    mixture = math.sqrt(0.6**2 + 0.2**2)
    close(b.diagonal_gaussian_kl(mean, sd, centre, mixture), 0.5683292530)
    # Five steps of 0.01 from θ_0, softened: ‖Δ‖² = ½.
    soft = b.diagonal_gaussian_kl([0.5, -0.5, 0.0], math.sqrt(0.02), 0.0, math.sqrt(0.05))
    close(soft, 5.4744360978)
    full = b.gaussian_kl(mean, np.diag(np.square(sd)), centre, mixture**2 * np.eye(2))
    close(full, 0.5683292530)
    factor = np.array([[0.1], [0.2]])
    own = np.diag(np.square(sd)) + factor @ factor.T
    prior = 0.36 * np.eye(2) + 4 * factor @ factor.T
    low = b.low_rank_gaussian_kl(mean, np.square(sd), factor, centre, 0.36, 2 * factor)
    close(low, float(b.gaussian_kl(mean, own, centre, prior)))
    shift = np.subtract(mean, centre)
    dense = np.trace(np.linalg.inv(prior) @ own) - 2 + shift @ np.linalg.inv(prior) @ shift
    close(low, 0.5 * (dense + math.log(np.linalg.det(prior) / np.linalg.det(own))))
    close(b.categorical_kl([0.5, 0.5, 0.0], [0.25, 0.25, 0.5]), math.log(2.0))
    assert float(b.diagonal_gaussian_kl([0.0], 0.0, 0.0, 1.0)) == INF
    assert float(b.categorical_kl([0.5, 0.5], [1.0, 0.0])) == INF


def edges(b):
    """An infinite KL, a bound above 1, arguments that no theorem allows."""
    one = {"risk": 0.2, "kl": INF, "n_samples": 50, "delta": 0.05}
    temperature = {"temperature": 1.0}
    found = [
        getattr(b, name)(**one, **(temperature if name == "catoni" else {}))
        for name in (
            "mcallester",
            "maurer",
            "seeger_kl",
            "quadratic",
            "thiemann",
            "seeger_relaxed",
            "catoni",
            "new_task",
        )
    ]
    found.append(b.seeger_relaxed(**{**one, "risk": 0.0}))
    for name in (
        "amit_meir",
        "amit_meir_kl",
        "account_bound",
        "separate_roots",
        "pentina_lampert",
        "joint_kl",
        "joint_root",
    ):
        bound = getattr(b, name)
        infinite = [{"hyper_kl": INF}, {"task_kls": INF}, {"hyper_kl": INF, "task_kls": INF}]
        found.extend(bound(**{**T20[0], **part}) for part in infinite)
        refuses(bound, **{**T20[0], "delta": 0.0})
        refuses(bound, **{**T20[0], "n_samples": 0})
        refuses(bound, **{**T20[0], "n_tasks": 0})
        refuses(bound, **{**T20[0], "task_kls": [1.0, 2.0]})
        refuses(bound, **{**T20[0], "hyper_kl": -1e-6})
    found.append(b.query_split(risk=0.2, hyper_kl=INF, n_tasks=50, delta=0.05))
    for bound in found:
        assert float(bound.value) == 1.0
        assert bool(bound.vacuous)
        for part in (bound.raw, bound.empirical, bound.within_task, bound.across_task):
            assert np.isfinite(part)
        close(bound.empirical + bound.within_task + bound.across_task, float(bound.raw))
    for name in ("amit_meir", "account_bound", "separate_roots", "amit_meir_kl"):
        refuses(getattr(b, name), **{**T20[0], "n_tasks": 1})
    for name in ("amit_meir", "account_bound"):
        refuses(getattr(b, name), **{**T20[0], "n_samples": 1})
    for bad in (
        {"risk": 1.1},
        {"risk": -0.1},
        {"risk": math.nan},
        {"risk": []},
        {"kl": -1e-6},
        {"kl": math.nan},
        {"n_samples": 0},
        {"n_samples": 2.5},
        {"n_samples": INF},
        {"delta": 0.0},
        {"delta": 1.0},
    ):
        refuses(b.seeger_kl, **{"risk": 0.1, "kl": 1.0, "n_samples": 50, "delta": 0.05, **bad})
    assert float(b.seeger_kl(risk=1 + 1e-12, kl=-1e-12, n_samples=9, delta=0.05)) == 1.0


def check(bounds):
    """Raises AssertionError, or DataError, unless all is right."""
    for part in (
        inverses,
        single_task,
        over_tasks,
        unequal_tasks,
        sampled,
        divergences,
        edges,
    ):
        part(bounds)
