import math

import pytest

from hbmeta.studies import gaussian_process
from hbmeta.studies.gaussian_process import agreement

# Chains are too short here to converge, and fit says so.
pytestmark = pytest.mark.filterwarnings("ignore:NUTS:UserWarning")

TINY = gaussian_process.Budget(latent=2, maml=2, draws=200, tasks=3, sampled=20)
NAMES = ["exact", "latent np", "maml", "exact, ℓ known"]


@pytest.fixture(scope="module")
def outcome():
    return gaussian_process.run(budget=TINY, compile=False)


def test_exact_predictives_are_rows_beside_the_others(outcome):
    every, sampled = outcome.comparisons["all"], outcome.comparisons["sampled"]
    assert [row.name for row in every.rows] == NAMES
    assert [row.name for row in sampled.rows] == ["exact", "nuts", *NAMES[1:]]
    assert set(every.support_points) == {10}
    assert every.baseline == sampled.reference == "exact"
    assert [row.is_oracle for row in every.rows] == [False, False, False, True]
    for row in sampled.rows:
        assert all(math.isfinite(score.value) for score in row.scores.values())
    assert all(len(line) <= 100 for line in outcome.text.splitlines())


def test_draws_of_the_lengthscale_agree_with_quadrature(outcome):
    nuts = next(row for row in outcome.comparisons["sampled"].rows if row.name == "nuts")
    assert nuts.distance.sites == ("lengthscale",)
    # 800 draws, an effective number of 200 or more: a standard error of at most 0.07 sd each, so
    # that one of three is 0.3 off with probability 6e-5.
    assert nuts.distance.largest_difference < 0.3
    assert nuts.distance.sd_ratio == pytest.approx(1.0, abs=0.2)


@pytest.mark.slow
def test_agreement_counts_standard_errors():
    fits = {}

    def keep(plans, **settings):
        fits.update(real(plans, **settings))
        return fits

    real = gaussian_process.fit_plans
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaussian_process, "fit_plans", keep)
        gaussian_process.run(budget=TINY, compile=False, seed=1)
    largest, n = agreement(fits["nuts"], fits["exact"])
    # Of three independent z the largest is above 4 with probability 1.9e-4.
    assert n == 3
    assert 0.0 < largest < 4.0


def test_figures_can_be_drawn(outcome):
    assert set(outcome.figures) == {"bands", "lengthscale", "learning"}
    assert len(outcome.figures["bands"]().axes) == 4
    assert outcome.figures["lengthscale"]().axes
