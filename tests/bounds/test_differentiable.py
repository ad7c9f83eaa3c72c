"""Derivatives of the inverse of kl."""

import numpy as np
import pytest
import torch

from hbmeta import bounds
from hbmeta.bounds import differentiable_kl_inverse
from hbmeta.errors import DataError


def leaves(q, c):
    return (
        torch.tensor(q, dtype=torch.float64, requires_grad=True),
        torch.tensor(c, dtype=torch.float64, requires_grad=True),
    )


def test_derivatives_against_finite_differences():
    """First and second order; step 1e-6, the value is good to 1e-13, hence 1e-6 in the slope."""
    arguments = leaves([0.05, 0.3, 0.9, 0.01], [0.02, 0.4, 0.01, 1.5])
    assert torch.autograd.gradcheck(differentiable_kl_inverse, arguments, eps=1e-6, atol=1e-6)
    assert torch.autograd.gradgradcheck(
        differentiable_kl_inverse, arguments, eps=1e-6, atol=1e-4, rtol=1e-4
    )


def test_the_value_is_the_conservative_one_and_broadcasts():
    q, c = leaves([[0.1], [0.2]], [0.05, 0.1, 3.0])
    found = differentiable_kl_inverse(q, c)
    np.testing.assert_array_equal(found.detach().numpy(), bounds.kl_inverse(q, c))
    found.sum().backward()
    assert q.grad.shape == (2, 1)
    assert c.grad.shape == (3,)


def test_ends_have_finite_derivatives():
    """At q = 0 the slope in q is infinite, and at p = 1 both are 0; neither gives NaN."""
    q, c = leaves([0.0, 1.0, 0.5], [0.1, 0.1, 500.0])
    differentiable_kl_inverse(q, c).sum().backward()
    assert torch.isfinite(q.grad).all()
    assert q.grad[0] > 1.0
    assert float(c.grad[0]) == pytest.approx(np.exp(-0.1), rel=1e-9)
    assert (q.grad[1:] == 0.0).all()
    assert (c.grad[1:] == 0.0).all()


def test_float32_keeps_its_dtype_and_the_slope_of_float64():
    q, c = leaves([0.3], [1e-6])
    differentiable_kl_inverse(q, c).sum().backward()
    single = torch.tensor([0.3], requires_grad=True), torch.tensor([1e-6], requires_grad=True)
    found = differentiable_kl_inverse(*single)
    assert found.dtype == torch.float32
    found.sum().backward()
    for mine, exact in zip(single, (q, c), strict=True):
        assert float(mine.grad) == pytest.approx(float(exact.grad), rel=1e-6)


@pytest.mark.parametrize(("q", "c"), [(0.1, 0.0), (0.1, -1.0), (1.5, 0.1), (float("nan"), 0.1)])
def test_bad_arguments(q, c):
    with pytest.raises(DataError):
        differentiable_kl_inverse(*leaves([q], [c]))
