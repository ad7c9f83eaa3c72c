"""Fixtures for all tests."""

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent

# The models of the tests are so small that a second thread costs more than it saves.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of reference data: HBMETA_DATA, or shared/data beside the repository."""
    default = REPOSITORY.parent / "shared" / "data"
    folder = Path(os.environ.get("HBMETA_DATA") or default).resolve()
    if not folder.is_dir():
        pytest.skip(f"needs the reference data at {folder}; set HBMETA_DATA to their folder")
    return folder


@pytest.fixture
def untouched() -> Callable[[], AbstractContextManager[None]]:
    """A context manager that asserts that its block leaves no trace in global state.

    It looks at the random states of torch, NumPy and Python, torch's default dtype, Pyro's
    settings (validation among them) and its parameter store.

        def test_fit(untouched):
            with untouched():
                strategy.fit(model, tasks, seed=0)
    """
    return _untouched


@contextlib.contextmanager
def _untouched() -> Iterator[None]:
    before = _global_state()
    yield
    after = _global_state()
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, f"the block changed the caller's {', '.join(changed)}"


def _global_state() -> dict[str, object]:
    algorithm, keys, *position = np.random.get_state(legacy=True)  # noqa: NPY002
    store = pyro.get_param_store()
    return {
        "random state of torch": torch.get_rng_state().tolist(),
        "random state of NumPy": (algorithm, keys.tolist(), position),
        "random state of Python": random.getstate(),
        "default dtype of torch": torch.get_default_dtype(),
        "settings of Pyro": pyro.settings.get(),
        "parameter store of Pyro": {
            name: (id(value), value._version, value.tolist())
            for name, value in store.get_state()["params"].items()
        },
    }
