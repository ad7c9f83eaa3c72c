import math

import pytest

from hbmeta.studies import clusters

# Chains are too short here to converge, and fit says so.
pytestmark = pytest.mark.filterwarnings("ignore:NUTS:UserWarning")

TINY = clusters.Budget(proto=3, maml=2, draws=60, tasks=6, sampled=2)
FITS = ["prototypes", "learned protonet", "bayesian protonet", "maml"]
ORACLES = ["bayes-optimal", "means known"]


@pytest.fixture(scope="module")
def outcome():
    return clusters.run(budget=TINY, compile=False)


def test_both_settings_have_every_classifier_and_the_oracles(outcome):
    assert set(outcome.comparisons) == {"easy", "easy_sampled", "hard", "hard_sampled"}
    for name, table in outcome.comparisons.items():
        fits = [*FITS, "nuts"] if name.endswith("sampled") else FITS
        assert [row.name for row in table.rows] == [*fits, *ORACLES]
        assert table.baseline == "bayes-optimal"
        for row in table.rows:
            assert {"nll", "accuracy", "brier", "ece"} <= set(row.scores)
            assert all(math.isfinite(score.value) for score in row.scores.values())
        assert not any(row.saw_query for row in table.rows)
    assert all(len(line) <= 100 for line in outcome.text.splitlines())


def test_on_the_circle_prototypes_make_no_errors(outcome):
    easy = {row.name: row.scores["accuracy"].value for row in outcome.comparisons["easy"].rows}
    # An error has probability 3e-5 per point where the means are known; these are 450 points.
    assert easy["prototypes"] > 0.99
    assert easy["means known"] > 0.99


def test_draws_and_closed_form_are_one_posterior(outcome):
    rows = {row.name: row.scores for row in outcome.comparisons["hard_sampled"].rows}
    assert rows["nuts"]["nll"].value == pytest.approx(
        rows["bayesian protonet"]["nll"].value, abs=0.05
    )


def test_figures_can_be_drawn(outcome):
    assert set(outcome.figures) == {"regions_easy", "regions_hard"}
    assert len(outcome.figures["regions_hard"]().axes) == 5
