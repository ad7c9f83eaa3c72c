"""The known answers tell every wrong version of a bound from the right one."""

import inspect

import pytest

from hbmeta import bounds
from hbmeta.errors import DataError
from tests.bounds import mutants, vectors


def test_there_are_enough_and_every_file_has_some():
    assert len(set(mutants.MUTANTS)) == len(mutants.MUTANTS) >= 40
    changed = {file for file, _, _ in mutants.MUTANTS}
    # These two are held against the bounds themselves, in tests of their own.
    assert set(mutants.FILES) - changed == {"__init__", "differentiable", "objectives"}
    assert {path.stem for path in mutants.FOLDER.glob("*.py")} == set(mutants.FILES)


def test_the_unchanged_package_passes():
    """Rebuilt by the same machinery with a comment changed: else nothing would be shown below."""
    with mutants.mutated("inverse", "ITERATIONS = 100", "ITERATIONS = 101") as same:
        assert same is not bounds
        assert same.maurer is not bounds.maurer
        vectors.check(same)
    assert inspect.getmodule(bounds.maurer).maurer is bounds.maurer


@pytest.mark.parametrize("change", mutants.MUTANTS)
@pytest.mark.filterwarnings("ignore")
def test_mutant_is_caught(change):
    with mutants.mutated(*change) as wrong, pytest.raises((AssertionError, DataError)):
        vectors.check(wrong)
