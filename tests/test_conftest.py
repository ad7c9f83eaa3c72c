"""The fixture `untouched` notices what it promises to notice."""

import random
from collections.abc import Callable

import numpy as np
import pyro
import pytest
import torch

CHANGES: dict[str, Callable[[], object]] = {
    "random state of torch": lambda: torch.rand(()),
    "random state of NumPy": lambda: np.random.rand(),  # noqa: NPY002
    "random state of Python": random.random,
    "default dtype of torch": lambda: torch.set_default_dtype(torch.float64),
    "settings of Pyro": lambda: pyro.settings.set(module_local_params=True),
    "parameter store of Pyro": lambda: pyro.param("θ", torch.ones(2)),
}


@pytest.fixture(autouse=True)
def _restored():
    seeds = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    with pyro.get_param_store().scope(), pyro.settings.context(module_local_params=False):
        yield
    torch.set_default_dtype(torch.float32)
    torch.set_rng_state(seeds[0])
    np.random.set_state(seeds[1])  # noqa: NPY002
    random.setstate(seeds[2])


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_global_state_is_noticed(untouched, name):
    with pytest.raises(AssertionError, match=name), untouched():
        CHANGES[name]()


def test_a_parameter_changed_in_place_is_noticed(untouched):
    parameter = pyro.param("θ", torch.ones(2))
    with pytest.raises(AssertionError, match="parameter store"), untouched(), torch.no_grad():
        parameter.add_(1.0)


def test_own_generators_pass(untouched):
    pyro.param("θ", torch.ones(2))
    with untouched():
        torch.rand(3, generator=torch.Generator().manual_seed(0))
        np.random.default_rng(0).normal()
        with pyro.get_param_store().scope():
            pyro.param("φ", torch.ones(1))
