"""The scripts that a newcomer reads run with small settings, and show what they claim."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import hbmeta as hb
from examples import gradient_lens, new_strategy, own_frame, own_program, three_lenses
from hbmeta import models, tasks
from hbmeta.conditional import conditional
from hbmeta.loading import load
from tests.cases import SCHOOLS_SIGMA, SCHOOLS_Y
from tests.conftest import REPOSITORY

# Chains this short are warned of (split R̂, effective draws), which is right.
short_chains = pytest.mark.filterwarnings("ignore:NUTS. (split|an effective):UserWarning")
SHORT = {"draws": 200, "steps": 50}


def rows(printed: str) -> set[str]:
    """The first words of the lines of what was printed."""
    return {line.split()[0] for line in printed.splitlines() if line.split()}


def mode_of_tau() -> float:
    """Eight schools: τ at the mode of p(μ, log τ | y), the effects integrated out, on a grid."""
    tau = np.linspace(0.1, 20.0, 20_000)[:, None]
    y, variance = np.array(SCHOOLS_Y), np.array(SCHOOLS_SIGMA) ** 2 + tau**2
    # Given τ, the mode in μ ~ N(0, 5²) is the precision-weighted mean.
    mu = ((y / variance).sum(1) / ((1 / variance).sum(1) + 1 / 25))[:, None]
    likelihood = -0.5 * (np.log(variance) + (y - mu) ** 2 / variance).sum(1)
    prior = -0.5 * mu**2 / 25 - np.log1p((tau / 5) ** 2) + np.log(tau)
    return float(tau[np.argmax(likelihood + prior[:, 0]), 0])


@short_chains
def test_own_program(capsys):
    lines = Path(own_program.__file__).read_text(encoding="utf-8").splitlines()
    assert sum(bool(line.strip()) for line in lines) < 40
    fits = own_program.main(**SHORT)
    printed = capsys.readouterr().out
    assert set(fits) == {"nuts", "amortized", "exact"} <= rows(printed)
    assert "8 tasks, 8 held-out points" in printed
    assert "Distance d of q(φ | S) to nuts" in printed
    tau = float(fits["exact"].globals()["tau"])
    assert tau == pytest.approx(mode_of_tau(), abs=0.002)
    assert f"'exact': {tau}" in printed


@short_chains
def test_own_frame(capsys):
    fits = own_frame.main(**SHORT)
    printed = capsys.readouterr().out
    assert {"nuts", "exact", "amortized", "no"} <= rows(printed)
    assert "18 tasks, 54 held-out points" in printed
    assert fits["nuts"].schema is not None
    predicted = re.findall(
        r"^\d +(s01|newcomer) +(known|adapted|new)((?: +[\d.]+){4})$", printed, re.M
    )
    assert [(who, status) for who, status, _ in predicted] == [
        ("s01", "known"),
        ("newcomer", "adapted"),
    ]
    # Milliseconds on day 10; of two days less is known than of seven.
    (_, sd, lower, upper), (_, wider, _, _) = (map(float, text.split()) for *_, text in predicted)
    assert 200 < lower < upper < 600
    assert sd < wider


def test_three_lenses(capsys):
    source = Path(three_lenses.__file__).read_text(encoding="utf-8")
    assert len(source.splitlines()) < 60
    three_lenses.main(steps=2)
    printed = capsys.readouterr().out
    assert [f"{lens} LENS" in printed for lens in ("GRADIENT", "BAYESIAN", "METRIC")] == [True] * 3
    assert {"waves", "exact", "latent", "bayes-optimal"} <= rows(printed)


def test_gradient_lens(capsys):
    source = Path(gradient_lens.__file__).read_text(encoding="utf-8")
    assert len(source.splitlines()) < 60
    comparison = gradient_lens.main(steps=2)
    printed = capsys.readouterr().out
    assert str(comparison) in printed
    assert {row.name for row in comparison.rows} == {*gradient_lens.STRATEGIES, "waves known"}
    learned = re.findall(r"^  (layer[12]\.(?:weight|bias)) +(0\.\d{4})$", printed, re.M)
    assert len(learned) == 4
    assert len({size for _, size in learned}) > 1  # two steps of 0.01 each way
    relative, cosine = map(float, re.findall(r" (-?\d\.\d{3})$", printed, re.M)[-2:])
    assert relative > 0.05
    assert -1.0 <= cosine < 1.0


@pytest.fixture(scope="module")
def newton():
    """The example's strategy on the example's family, and new tasks."""
    family = tasks.LinearTasks(
        mean=[1.0, -0.5], covariance=[[1.0, 0.3], [0.3, 0.5]], noise=0.5, shots=(0, 6)
    )
    model = models.LinearRegression(features=["intercept", "x0"])
    fitted = new_strategy.NewtonStep().fit(
        model, family.sample(60, seed=0), steps=20, compile=False, progress=False
    )
    return fitted, family.sample(40, seed=1)


def test_new_strategy(capsys):
    # A centered prior's scale is no part of MAML's loss, as its docstring says.
    with pytest.warns(UserWarning, match="MAML: the loss does not depend on scale"):
        comparison = new_strategy.main(steps=SHORT["steps"])
    printed = capsys.readouterr().out
    assert str(comparison) in printed
    assert {"exact", "newton", "maml"} <= rows(printed)
    found = {row.name: row for row in comparison.rows}
    assert found["newton"].strategy == "NewtonStep"
    assert found["newton"].distance_given_theta.largest_difference < 1e-8
    # Its scale was never estimated, so that p(φ | S, θ) at its θ means nothing.
    assert found["maml"].distance_given_theta is None


def test_a_newton_step_is_the_exact_posterior_mean(newton):
    fitted, new = newton
    adapted = fitted.adapt(new.support)
    exact, _ = conditional(fitted.problem, fitted.theta, fitted.problem.batch(new.support))
    torch.testing.assert_close(adapted.density.loc, exact.loc, rtol=1e-8, atol=1e-8)
    assert int(new.support.counts.min()) == 0  # without data too: the prior's mean


def test_a_new_strategy_is_saved_and_loaded(newton, tmp_path):
    fitted, new = newton
    fitted.save(tmp_path / "newton.hbmeta")
    loaded = load(tmp_path / "newton.hbmeta")
    assert hb.load is load
    assert loaded.strategy == new_strategy.NewtonStep()
    before, after = fitted.adapt(new.support), loaded.adapt(new.support)
    assert torch.equal(before.density.loc, after.density.loc)
    assert torch.equal(before.predict(new.query).mean, after.predict(new.query).mean)


def test_contributing_shows_the_new_strategy_as_it_is():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    source = inspect.getsource(new_strategy.NewtonStep)
    assert source.startswith("@dataclass")
    assert any(source in block for block in shown)
