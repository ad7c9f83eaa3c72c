"""θ and a strategy's own parameters in the units and the precision in which Adam moves them."""

import pytest
import torch
from torch import nn

from hbmeta.movement import Moving, at_least_single


def moving(dtype, own=True):
    start = {"mean": torch.tensor([1.0, -2.0], dtype=dtype), "weight": torch.ones(2, 3).to(dtype).T}
    network = nn.Linear(2, 1).to(dtype) if own else None
    return Moving(start, {"mean": torch.tensor([0.5, 4.0], dtype=dtype)}, network)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_moves_is_single_and_what_the_program_sees_is_as_the_data(dtype):
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    found = moving(dtype)
    assert list(found.free) == ["theta/mean", "theta/weight", "own/weight", "own/bias"]
    assert {v.dtype for v in found.free.values()} == {kept}
    assert all(v.is_contiguous() for v in found.free.values())
    theta, own = found.unpack(found.free)
    assert all(torch.equal(theta[k], v) and v.dtype == dtype for k, v in found.start.items())
    assert all(torch.equal(own[k], v) for k, v in found.own.named_parameters())
    assert found.settle()["mean"].dtype == dtype
    assert at_least_single(torch.zeros(1, dtype=dtype)).dtype == kept


def test_small_steps_in_half_precision_add_up():
    """256 steps of 1e-3 on a weight of 1, whose neighbours in bfloat16 are 8e-3 away."""
    found = moving(torch.bfloat16, own=False)
    for _ in range(256):
        found.free["theta/weight"] += 1e-3
    torch.testing.assert_close(
        found.settle()["weight"], torch.full((3, 2), 1.256).bfloat16(), rtol=0.0, atol=0.0
    )


def test_sites_move_in_units_of_their_scale_and_gradients_follow():
    found = moving(torch.float64)
    leaves = {k: (v + 0.3).requires_grad_() for k, v in found.free.items()}
    theta, own = found.unpack(leaves)
    torch.testing.assert_close(theta["mean"], torch.tensor([1.15, -0.8], dtype=torch.float64))
    assert list(found.scaled) == ["theta/mean"]
    weights = {f"theta/{k}": torch.randn_like(v) for k, v in theta.items()}
    weights |= {f"own/{k}": torch.randn_like(v) for k, v in own.items()}
    parts = {**{f"theta/{k}": v for k, v in theta.items()}, **{f"own/{k}": own[k] for k in own}}
    total = sum((parts[k] * w).sum() for k, w in weights.items())
    expected = torch.autograd.grad(total, list(leaves.values()))
    torch.testing.assert_close(found.pulled_back(weights), list(expected))


def test_what_has_no_gradient_and_what_is_fixed():
    found = moving(torch.float64, own=False)
    zeros = found.pulled_back({"theta/mean": torch.ones(2, dtype=torch.float64)})[1]
    assert torch.equal(zeros, torch.zeros(3, 2, dtype=torch.float64))
    found.fix(["theta/weight"])
    assert list(found.free) == ["theta/mean"]
    assert torch.equal(found.unpack(found.free)[0]["weight"], found.start["weight"])
    assert found.bound({}) is None


def test_settling_fills_the_module():
    found = moving(torch.bfloat16)
    found.free["own/bias"].fill_(0.75)
    found.settle()
    assert found.own.bias.item() == 0.75
    assert found.own.bias.dtype == torch.bfloat16
    bound = found.bound(found.unpack({**found.free, "own/bias": torch.tensor([2.0])})[1])
    nothing = torch.zeros(1, 2, dtype=torch.bfloat16)
    assert bound(nothing).item() == 2.0
    assert found.own(nothing).item() == 0.75
