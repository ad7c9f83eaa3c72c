"""Chains that cannot run say why, in whatever way they run."""

import pytest
import torch

from hbmeta.chains import run_chains
from hbmeta.errors import ConvergenceError
from hbmeta.joint_density import Potential


@pytest.mark.parametrize("processes", [1, 2])
def test_the_sampler_is_quoted_without_its_stack(processes):
    """A density without a value: one after another, and in processes."""

    def density(vector):
        return torch.tensor(torch.nan, dtype=torch.float64), torch.zeros_like(vector)

    with pytest.raises(ConvergenceError, match=r"chain 0 stopped: .*BadLogp\(NaN\)") as said:
        run_chains(
            Potential(density), torch.zeros(2, 1, dtype=torch.float64), draws=3, warmup=3, seed=0,
            target_accept=0.8, max_tree_depth=3, processes=processes, progress=False, where="test",
        )  # fmt: skip
    assert "backtrace" not in str(said.value)
    assert "\n" not in str(said.value)
