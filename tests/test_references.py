"""NUTS against stored reference posteriors; the figures and their false-alarm rate are stated in
benchmarks/references.py (below 1e-5 for the whole of a table at this number of draws)."""

import pytest

from benchmarks import references
from benchmarks.programs import radon_flat, radon_tasks
from hbmeta.inference import NUTS

DATA = references.Path(__file__).parent / "data" / "radon_hierarchical_intercept_moments.json"


def agree(rows):
    failed = [row for row in rows if not row.agrees]
    assert not failed, failed
    assert min(row.ess_bulk for row in rows) >= 4000
    assert max(row.r_hat for row in rows) < 1.01


def test_radon_in_the_flat_layout_agrees_with_quadrature():
    fitted = NUTS(draws=references.DRAWS).fit(radon_flat, radon_tasks(), seed=references.SEED)
    found = references.draws_by_name(fitted)
    rows = references.compare("radon", found, references.moments(DATA))
    assert len(rows) == 90
    agree(rows)


@pytest.mark.slow
def test_every_program_agrees_with_its_reference(data_folder):
    rows = references.radon(data_folder) + references.schools(data_folder)
    assert len(rows) == 3 * 90 + 10
    agree(rows)
