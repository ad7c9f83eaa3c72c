"""The ledger: what is counted is what happens, what is printed follows from what was measured."""

import itertools
import json
import math
import time
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from hbmeta import costs, models
from hbmeta.accounts import Entry, Ledger
from hbmeta.costs import cost_ratio, ledger
from hbmeta.errors import ConvergenceError, DataError, FileError, UnsupportedModelError
from hbmeta.inference import (
    ANIL,
    FOMAML,
    MAML,
    NUTS,
    AmortizedGuide,
    ExactLinear,
    ImplicitMAML,
    MetaSGD,
    Reptile,
    implicit_gradient,
)
from hbmeta.tasks import Sinusoids, Tasks

NETWORK = models.NeuralRegression(hidden=(4, 4), activation="tanh")
WAVES = Sinusoids(shots=5, queries=5)
QUICK = {"compile": False, "rounds": 1, "steps": 40, "tasks_per_step": 4}


@pytest.mark.parametrize(
    ("steps", "c", "ratio"),
    [
        (1, 2, 2.0), (3, 2, 2.5), (5, 2, 16 / 6), (10, 2, 31 / 11),
        (5, 1, 11 / 6), (5, 3, 3.5), (0, 2, 1.0), (10**9, 2, 3.0),
    ],
)  # fmt: skip
def test_the_formula(steps, c, ratio):
    """c is a convention; the ratio is below 3 for c = 2."""
    assert cost_ratio(steps, c) == pytest.approx(ratio, rel=1e-8)


# Counts against what autograd does: every pass through φ's node is seen.


class Seen(torch.autograd.Function):
    """φ itself; counts backward passes, and backward passes through those."""

    passes = 0
    products = 0

    @staticmethod
    def forward(ctx, phi):
        return phi.clone()

    @staticmethod
    def backward(ctx, along):
        Seen.passes += 1
        return SeenBack.apply(along)


class SeenBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, along):
        return along.clone()

    @staticmethod
    def backward(ctx, along):
        Seen.products += 1
        return along.clone()


class Watched(PyroModule):
    """y ~ N(tanh(x ⋅ φ_1) + φ_2, 1), φ seen on its way; only the location of φ is learned."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.tensor([0.3, -0.2]))

    def forward(self, x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            phi = pyro.sample("phi", dist.Normal(self.start, 1.0).to_event(1))
            if phi.requires_grad:
                phi = Seen.apply(phi)
            mean = torch.tanh(x[..., 0] * phi[..., 0]) + phi[..., 1]
            with pyro.plate("point", x.shape[1], dim=-1):
                return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


COUNTED = [
    MAML(steps=3),
    MAML(steps=1),
    MAML(steps=0),
    MAML(steps=3, optimizer="momentum"),
    MetaSGD(steps=2),
    FOMAML(steps=3),
    FOMAML(steps=3, learned_step="scalar"),
    Reptile(steps=3),
    ANIL(steps=2),
]


@pytest.mark.parametrize(
    "strategy",
    [replace(s, recompute=r) for s, r in itertools.product(COUNTED, (False, True))]
    + [ImplicitMAML(damping=2.0), ImplicitMAML(damping=0.5, tolerance=1e-5)],
    ids=lambda s: f"{s.name}{s.steps}-{getattr(s, 'recompute', '')}",
)
def test_counts_are_those_of_autograd(strategy, monkeypatch):
    found = {}

    def counted(call, device):
        Seen.passes = Seen.products = 0
        call()
        found["passes"], found["products"] = Seen.passes, Seen.products
        return 0

    monkeypatch.setattr(costs, "peak_bytes", counted)
    entry = ledger({"it": strategy}, Watched(), WAVES, **QUICK)["it"]
    assert entry.products == found["products"]
    # A product passes φ once more on its way back; by itself it takes a gradient besides.
    others = found["products"] * (1 if entry.graph_kept else 2)
    assert entry.gradients == found["passes"] - others
    assert entry.moving == 2


def test_counts_of_the_lens():
    found = {
        (s.steps, s.first_order, bool(s.recompute)): s.work()
        for s in (MAML(steps=5), MAML(steps=5, recompute=True), FOMAML(steps=5, recompute=True))
    }
    counts = {key: (work.gradients, work.products) for key, work in found.items()}
    assert counts == {(5, False, False): (6, 5), (5, False, True): (11, 5), (5, True, True): (6, 0)}
    # From ten steps on the chain recomputes by itself.
    assert MAML(steps=10).work() == MAML(steps=10, recompute=True).work()
    assert Reptile(steps=5).work().gradients == 5


# The record


@pytest.fixture(scope="module")
def lens() -> Ledger:
    strategies = {
        "maml": MAML(steps=2),
        "first": FOMAML(steps=2),
        "long": MAML(steps=4, recompute=True),
        "reptile": Reptile(steps=2),
        "head": ANIL(steps=2),
        "implicit": ImplicitMAML(damping=9.0),
        "guide": AmortizedGuide(hidden=8),
    }
    return ledger(strategies, NETWORK, WAVES, **{**QUICK, "rounds": 3})


def test_ratios_and_formulas(lens):
    assert lens.baseline == "first"
    assert lens.ratio("first") == lens.formula("first") == 1.0
    assert lens.c == pytest.approx(
        np.median([p / g for p, g in zip(lens.product_times, lens.gradient_times, strict=True)])
    )
    assert lens.formula("maml") == pytest.approx(cost_ratio(2, lens.c))
    assert lens.formula("maml", graph_kept=True) == pytest.approx(cost_ratio(2, lens.c - 1))
    assert lens.formula("long") == pytest.approx((9 + 4 * lens.c) / 3)
    assert lens.formula("long", graph_kept=True) == pytest.approx((5 + 4 * lens.c) / 3)
    assert lens.formula("reptile") == pytest.approx(2 / 3)
    implicit = lens["implicit"]
    expected = (implicit.gradients + lens.c * implicit.products) / 3
    assert lens.formula("implicit") == pytest.approx(expected)
    assert lens.formula("implicit", graph_kept=True) is None
    # Gradients of the head alone are others than c was measured on; a guide counts none.
    assert lens["head"].moving < lens.phi_size == lens["maml"].moving
    assert lens.formula("head") is None
    assert lens.formula("guide") is lens["guide"].gradients is None
    for entry in lens.entries:
        assert len(entry.times) == 3
        assert entry.seconds == sorted(entry.times)[1] > 0
        assert entry.peak_bytes > 0
        assert entry.tier == "eager"


def test_it_is_the_first_step_of_a_fit(lens):
    trained = {
        "maml": MAML(steps=2), "long": MAML(steps=4, recompute=True), "reptile": Reptile(steps=2),
        "implicit": ImplicitMAML(damping=9.0), "guide": AmortizedGuide(hidden=8),
    }  # fmt: skip
    for name, strategy in trained.items():
        fitted = strategy.fit(NETWORK, WAVES, steps=1, tasks_per_step=4, compile=False)
        assert lens[name].loss == pytest.approx(fitted.history[0], rel=1e-6)
        assert lens[name].settings == strategy.settings()


def test_print(lens):
    text = str(lens)
    head, first = text.splitlines()[3], text.splitlines()[5]
    assert head.split() == [
        "gradients", "products", "ms", "ms", "/", "first", "formula", "graph", "kept", "peak",
        "MiB", "tier",
    ]  # fmt: skip
    assert first.split()[:3] == ["first", "3", "0"]
    assert first.split()[4:7] == ["1.00", "1.00", "–"]
    assert "4 tasks: 20 support and 20 query points, φ of 33 numbers" in text
    assert f"c = {lens.c:.2f}" in text
    assert "(N + 1 + c N) / (N + 1)" in text
    assert max(map(len, text.splitlines())) <= 104


def test_json_and_frame(lens, tmp_path):
    text = lens.to_json(tmp_path / "ledger.json")
    assert (tmp_path / "ledger.json").read_text(encoding="utf-8") == text + "\n"
    assert Ledger.from_json(text) == lens
    assert json.loads(text)["c"] == lens.c
    frame = lens.to_frame()
    assert list(frame.index) == [entry.name for entry in lens.entries]
    assert frame.loc["maml", "products"] == 2
    assert frame.loc["guide", "products"] is not None
    assert frame["gradients"].isna().sum() == 1
    assert frame.loc["maml", "formula"] == lens.formula("maml")
    assert frame.loc["maml", "seconds"] == lens["maml"].seconds
    assert math.isnan(frame.loc["head", "formula"])
    for wrong in ("no json", json.dumps({"kind": "comparison"}), text.replace("products", "p")):
        with pytest.raises(FileError, match=r"Ledger\.to_json wrote"):
            Ledger.from_json(wrong)


def test_without_a_first_order_strategy_there_are_no_ratios():
    found = ledger({"maml": MAML(steps=1)}, NETWORK, WAVES, **QUICK)
    assert found.baseline is found.ratio("maml") is found.formula("maml") is None
    assert "formula" not in str(found)
    named = ledger(
        {"maml": MAML(steps=1), "two": MAML(steps=2)}, NETWORK, WAVES, baseline="maml", **QUICK
    )
    assert named.formula("two") == pytest.approx((3 + 2 * named.c) / (2 + named.c))
    kept = (3 + 2 * (named.c - 1)) / (2 + (named.c - 1))
    assert named.formula("two", graph_kept=True) == pytest.approx(kept)
    assert math.isnan(named.to_frame().loc["maml", "formula_graph_kept"]) is False


def slopes(x, y=None):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("task", x.shape[0], dim=-2):
        phi = pyro.sample("phi", dist.Normal(mean, 1.0))
        with pyro.plate("point", x.shape[1], dim=-1):
            return pyro.sample("y", dist.Normal(phi * x[..., 0], 1.0), obs=y)


def test_tiers_and_plain_tasks():
    """Both pieces and whole graphs are staged, and c is measured on the tier of the baseline."""
    data = WAVES.sample(3, seed=0).all
    strategies = {"long": MAML(steps=2, recompute=True), "first": FOMAML(steps=1)}
    found = ledger(strategies, slopes, data, compile="graph", rounds=1)
    assert {entry.tier for entry in found.entries} == {found.tier} == {"graph"}
    assert found.n_tasks == 3
    assert found.support_points + found.query_points == 30
    assert all(entry.seconds_staging > 0 for entry in found.entries)
    # A short fit is not worth a trace.
    short = ledger({"maml": MAML(steps=1)}, slopes, data, rounds=1, steps=5)
    assert short.tier == short["maml"].tier == "eager"


def test_nothing_is_fitted_and_no_state_is_left():
    model = models.NeuralRegression(hidden=(4,)).bind(WAVES.sample(2, seed=0).all)
    before = {name: value.clone() for name, value in model.named_parameters()}
    pyro.get_param_store().clear()
    random, generator = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    threads = torch.get_num_threads()
    ledger({"meta": MetaSGD(), "guide": AmortizedGuide(hidden=4)}, model, WAVES, **QUICK)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert (np.random.get_state()[1] == generator).all()  # noqa: NPY002
    assert torch.get_num_threads() == threads
    assert not pyro.get_param_store().keys()


def test_rounds_are_interleaved_and_seconds_are_those_of_a_call(monkeypatch):
    """On a clock that only calls move: a takes 20 ms, b 1 ms, and 2 ms in the second round."""
    clock, seen = [0.0], []

    def call(name, seconds):
        def run():
            late = name == "b" and seen.count("a") > 4
            seen.append(name)
            clock[0] += 2 * seconds if late else seconds

        return run

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    work = {("step", "a"): call("a", 0.02), ("step", "b"): call("b", 0.001)}
    found = costs._interleaved(work, 2, torch.device("cpu"))
    np.testing.assert_allclose(found["step", "a"], [0.02, 0.02], rtol=1e-9)
    np.testing.assert_allclose(found["step", "b"], [0.001, 0.002], rtol=1e-9)
    # Two calls to find how many make a round; then 2 of the long one, 30 of the short.
    assert "".join(seen) == "aabb" + 2 * ("aa" + 30 * "b")


# Memory


@pytest.mark.slow
def test_memory_of_the_lens(monkeypatch):
    """The whole graph grows with N, the chain by one φ a step, implicit gradients not at all."""
    for name in ("PRODUCTS_PER_STEP", "PRODUCTS_PER_SOLVE"):
        monkeypatch.setattr(implicit_gradient, name, 4)
    monkeypatch.setattr(costs, "_interleaved", lambda calls, *_: {k: [1.0] for k in calls})
    source, model = Sinusoids(shots=200, queries=5), models.NeuralRegression(hidden=(8, 8))
    found = {}
    for steps in (2, 8):
        strategies = {
            "whole": MAML(steps=steps, recompute=False),
            "chain": MAML(steps=steps, recompute=True),
            "first": FOMAML(steps=steps, recompute=False),
            "implicit": ImplicitMAML(steps=steps, tolerance=1e-12),
        }
        peaks = ledger(strategies, model, source, **QUICK)
        found[steps] = {entry.name: entry.peak_bytes for entry in peaks.entries}
        assert peaks["implicit"].gradients > steps
    assert found[8]["whole"] > 2.5 * found[2]["whole"]
    assert found[8]["chain"] < 0.4 * found[8]["whole"]
    # 6 more φ of 4 tasks in float32, and nothing else.
    phi = 4 * 4 * (8 + 8 + 64 + 8 + 8 + 1)
    assert abs(found[8]["chain"] - found[2]["chain"] - 6 * phi) < 0.2 * 6 * phi
    assert found[8]["first"] < 1.05 * found[2]["first"]
    assert found[8]["implicit"] < 1.05 * found[2]["implicit"]


# What is refused


@pytest.mark.parametrize(
    ("strategies", "kind", "words"),
    [
        ({}, DataError, ("one strategy or more", "none")),
        (MAML(), DataError, ("one strategy or more", "MAML")),
        ({"maml": MAML}, DataError, ("names that are text", "under 'maml'")),
        ({1: MAML()}, DataError, ("names that are text", "under 1")),
        ({"nuts": NUTS()}, UnsupportedModelError, ("gradient steps on θ", "NUTS under 'nuts'")),
        ({"exact": ExactLinear()}, UnsupportedModelError, ("gradient steps on θ", "ExactLinear")),
        ({"maml": MAML(sites=("b",))}, UnsupportedModelError, ("sites among", "'b'")),
    ],
)
def test_refused_strategies(strategies, kind, words):
    with pytest.raises(kind) as caught:
        ledger(strategies, NETWORK, WAVES, **QUICK)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"baseline": "mamI"}, DataError, "nearest name is 'maml'"),
        ({"rounds": 0}, DataError, "rounds=0"),
        ({"steps": 1.5}, DataError, "steps=1.5"),
        ({"seed": -1}, DataError, "-1"),
        ({"compile": "fast"}, DataError, "'fast'"),
        ({"tasks_per_step": 0}, DataError, "tasks_per_step"),
        ({"device": "nowhere"}, DataError, "'nowhere'"),
        ({"model": 3}, UnsupportedModelError, "a model"),
        ({"tasks": 3}, DataError, "needed Tasks"),
    ],
)
def test_refused_arguments(arguments, kind, words):
    known = {"strategies": {"maml": MAML(steps=1)}, "model": NETWORK, "tasks": WAVES, **QUICK}
    with pytest.raises(kind, match=words):
        ledger(**{**known, **arguments})


def known_slopes(x, y=None):
    with pyro.plate("task", x.shape[0], dim=-2):
        phi = pyro.sample("phi", dist.Normal(1.0, 1.0))
        with pyro.plate("point", x.shape[1], dim=-1):
            return pyro.sample("y", dist.Normal(phi * x[..., 0], 1.0), obs=y)


def test_nothing_to_learn_is_refused():
    data = WAVES.sample(3, seed=0).all
    with pytest.raises(UnsupportedModelError, match="it learns from known_slopes"):
        ledger({"it": MAML(steps=1)}, known_slopes, data, **{**QUICK, "tasks_per_step": None})


def test_an_infinite_loss_is_refused():
    episode = WAVES.sample(3, seed=0)
    far = Tasks(episode.all.x, 1e25 * episode.all.y)
    with pytest.raises(ConvergenceError, match="of far"):
        ledger({"far": MAML(steps=1)}, NETWORK, far, **{**QUICK, "tasks_per_step": None})


def test_unknown_entries_are_named(lens):
    with pytest.raises(DataError, match="nearest name is 'maml'"):
        lens["mam"]
    assert isinstance(lens["maml"], Entry)
