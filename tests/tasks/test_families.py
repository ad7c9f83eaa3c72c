"""What every synthetic family keeps: tasks are a function of the seed, and of it alone."""

import pytest
import torch

from hbmeta.errors import DataError
from hbmeta.tasks import Clusters, GaussianProcessTasks, LinearTasks, Sinusoids

FAMILIES = [
    Clusters(),
    GaussianProcessTasks(),
    LinearTasks([1.0, -0.5], [[1.0, 0.3], [0.3, 0.5]], noise=0.1, shots=(2, 5)),
    Sinusoids(noise=0.1, shots=(2, 5)),
]
every_family = pytest.mark.parametrize(
    "family", FAMILIES, ids=[type(family).__name__ for family in FAMILIES]
)


def tensors(truth):
    return {"phi": truth} if isinstance(truth, torch.Tensor) else truth


@every_family
def test_sampling_is_a_function_of_the_seed(family, untouched):
    before = repr(family)
    with untouched():
        first, truth = family.sample_with_truth(5, seed=3)
        again, truth_again = family.sample_with_truth(5, seed=3)
        plain = family.sample(5, seed=3)
        other = family.sample(5, seed=4)
    for same in (again, plain):
        assert first.support.same_data(same.support)
        assert first.query.same_data(same.query)
    truth, truth_again = tensors(truth), tensors(truth_again)
    assert truth.keys() == truth_again.keys()
    assert all(torch.equal(truth[name], truth_again[name]) for name in truth)
    assert all(len(values) == 5 for values in truth.values())
    assert not first.query.same_data(other.query)
    assert repr(family) == before


@every_family
@pytest.mark.parametrize("n_tasks", [0, 1.5, True, None])
def test_impossible_numbers_of_tasks(family, n_tasks):
    with pytest.raises(DataError, match="n_tasks of at least 1") as caught:
        family.sample(n_tasks, seed=0)
    assert caught.value.where == f"{type(family).__name__}.sample"
