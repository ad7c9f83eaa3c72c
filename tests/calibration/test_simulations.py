"""Exact posteriors pass, spoiled ones do not; both meanings; runs resume, and count failures."""

import dataclasses
import json

import pyro
import pyro.distributions as dist
import pytest
import torch

import hbmeta as hb
from hbmeta.calibration import Calibration
from hbmeta.calibration.ranking import rank
from hbmeta.calibration_plots import rank_plots
from hbmeta.densities import Gaussian
from hbmeta.errors import ConvergenceError, DataError, FileError, UnsupportedModelError
from hbmeta.inference import MAML, NUTS, ExactLinear, Laplace
from hbmeta.tasks import Tasks
from tests import cases, fits


@dataclasses.dataclass(frozen=True)
class Spoiled(ExactLinear):
    """The exact posterior, moved and squeezed on purpose."""

    narrow: float = 1.0
    shift: float = 0.0

    def posterior(self, problem, theta, own, support):
        exact = super().posterior(problem, theta, own, support)
        return Gaussian(exact.loc + self.shift * exact.sd, self.narrow * exact.scale)


@pytest.fixture(scope="module")
def exact():
    case = cases.case("linear_own_flat")
    return fits.fit(ExactLinear(), case.tasks, case.program)


def spoiled(exact, **how):
    return dataclasses.replace(exact, strategy=Spoiled(**how), _cache={})


@pytest.fixture(scope="module")
def passed(exact):
    return hb.sbc_adapted(exact, simulations=40, progress=False)


def test_an_exact_posterior_passes(passed):
    """One set of seeds in a hundred would fail; this one does not."""
    assert passed.passes(0.01)
    assert (passed.simulations, passed.meaning, passed.failed) == (40, "adapted", 0)
    names = [quantity.name for quantity in passed.quantities]
    assert names == [
        *("coefficients[0]", "coefficients[1]", "log likelihood", "distance to a random point")
    ]
    assert all(len(quantity.ranks) == 160 for quantity in passed.quantities)
    assert "No sign against ExactLinear in 40 simulations" in str(passed)
    coverage = passed.quantities[0].coverage(0.8)
    assert coverage.nominal == pytest.approx(0.8)
    assert coverage.low < coverage.found < coverage.high


@pytest.mark.parametrize(
    ("how", "said"),
    [({"narrow": 0.7}, "too narrow"), ({"narrow": 1.5}, "too wide"), ({"shift": 0.5}, "too high")],
)
def test_a_spoiled_posterior_fails(exact, how, said):
    """With 40 simulations of 4 tasks; the p-values are below 1e-4 for these."""
    found = hb.sbc_adapted(spoiled(exact, **how), simulations=40, progress=False)
    assert not found.passes(0.01)
    assert said in found.verdict()
    worst = found.uneven()[0]
    assert worst.envelope_p < 1e-4


def normal_mean(x, y=None):
    """θ and φ Gaussian, everything known: NUTS has nothing hard to do."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("task", x.shape[0], dim=-2):
        phi = pyro.sample("phi", dist.Normal(mean, 1.0))
        with pyro.plate("point", x.shape[1], dim=-1):
            return pyro.sample("y", dist.Normal(phi, 1.0), obs=y)


def few() -> Tasks:
    return Tasks(torch.zeros(3, 2, 1).double(), torch.zeros(3, 2).double())


def test_a_fit_in_every_simulation_ranks_level_one_too():
    """Laplace at a point θ leaves out the uncertainty of θ, and its ranks say so."""
    found = hb.sbc(normal_mean, Laplace(), few(), simulations=60, progress=False, compile=False)
    assert found.meaning == "joint"
    assert {q.name for q in found.quantities} >= {"phi, task 0", "phi, task 2", "log likelihood"}
    assert all(len(q.ranks) == 60 for q in found.quantities)
    assert max(q.spread for q in found.quantities if q.name.startswith("phi")) > 1.1


@pytest.mark.slow
def test_chains_pass_with_level_one_ranked():
    """100 fits of NUTS, thinned to 19 draws; one set of seeds in a hundred would fail."""
    strategy = NUTS(draws=100, chains=2, warmup=100, processes=1, parametrisation="as written")
    found = hb.sbc(
        normal_mean, strategy, few(), simulations=100, draws=19, progress=False, compile=True
    )
    assert found.quantities[0].name == "mean"
    assert found.passes(0.01)
    assert found.thinning is not None
    assert found.thinning > 1


def test_a_fit_that_drew_level_one_is_calibrated_for_new_tasks():
    fitted = fits.fit(
        NUTS(draws=200, chains=2, warmup=100, processes=1), few(), normal_mean, compile="graph"
    )
    found = hb.sbc_adapted(fitted, simulations=15, draws=49, progress=False)
    assert {q.name for q in found.quantities} >= {"phi", "log likelihood"}
    assert all(len(q.ranks) == 45 for q in found.quantities)
    assert found.passes(0.001)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(exact, tmp_path, passed):
    path = tmp_path / "sbc.json"
    hb.sbc_adapted(exact, simulations=15, progress=False, record=path)
    on = hb.sbc_adapted(exact, simulations=40, progress=False, record=path)
    assert on == passed
    assert Calibration.from_json(path.read_text(encoding="utf-8")) == on
    with pytest.raises(DataError, match="seed=1"):
        hb.sbc_adapted(exact, simulations=15, seed=1, progress=False, record=path)
    with pytest.raises(FileError, match="to_json wrote"):
        Calibration.from_json(json.dumps({"kind": "comparison"}))


def test_no_global_state(exact, untouched):
    with untouched():
        hb.sbc_adapted(exact, simulations=2, progress=False)


def test_a_quantity_of_the_callers(exact):
    found = hb.sbc_adapted(
        exact,
        simulations=10,
        progress=False,
        quantities={"sum": lambda sites: sites["coefficients"].sum(-1)},
    )
    ranks = next(q.ranks for q in found.quantities if q.name == "sum")
    assert len(ranks) == 40
    assert len(set(ranks)) > 10


def test_failures_are_counted(exact, monkeypatch):
    real, calls = ExactLinear.posterior, iter(range(100))

    def sometimes(self, *arguments):
        if next(calls) % 3 == 0:
            raise ConvergenceError("here", needed="luck", found="none", do="Try again.")
        return real(self, *arguments)

    monkeypatch.setattr(ExactLinear, "posterior", sometimes)
    found = hb.sbc_adapted(exact, simulations=6, progress=False)
    assert (found.simulations, found.failed) == (4, 2)
    assert "2 simulations failed and are not counted: here: needed luck" in found.verdict()


def test_what_has_no_ranks_is_refused(exact):
    point = fits.fit(MAML(), cases.case("linear_own_flat").tasks, cases.linear_flat)
    with pytest.raises(UnsupportedModelError, match="a point estimate"):
        hb.sbc_adapted(point, simulations=1, progress=False)
    case = cases.case("module_parameters")
    with pytest.raises(UnsupportedModelError, match="a prior for every level-1 parameter"):
        hb.sbc(case.program, Laplace(), case.tasks, simulations=1, progress=False)
    with pytest.raises(DataError, match="simulations"):
        hb.sbc_adapted(exact, simulations=0, progress=False)


def test_ties_go_either_way():
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0])
    found = {rank(draws, torch.tensor(1.0), generator) for _ in range(100)}
    assert found == {1, 2, 3, 4}


def test_the_figure(passed, exact):
    figure = rank_plots(passed)
    assert len(figure.axes) == 8
    assert figure.axes[0].get_title() == "coefficients[0]"
    with pytest.raises(DataError, match="'nothing'"):
        rank_plots(passed, names=["nothing"])
