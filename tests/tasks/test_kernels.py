import gpytorch
import numpy as np
import pytest
import torch

from hbmeta.errors import CurvatureError
from hbmeta.tasks.kernels import cholesky_factor, correlation, noise_variance
from tests.reference import kernel_matrix

LENGTHSCALE, PERIOD = torch.tensor([0.3, 1.0, 2.5]).double(), torch.tensor([0.7, 1.0, 4.0]).double()
MODULES = {
    "rbf": gpytorch.kernels.RBFKernel,
    "matern12": lambda **settings: gpytorch.kernels.MaternKernel(nu=0.5, **settings),
    "matern32": lambda **settings: gpytorch.kernels.MaternKernel(nu=1.5, **settings),
    "matern52": lambda **settings: gpytorch.kernels.MaternKernel(nu=2.5, **settings),
    "periodic": gpytorch.kernels.PeriodicKernel,
}


def inputs():
    draw = torch.Generator().manual_seed(0)
    first = 6 * torch.rand(3, 7, generator=draw, dtype=torch.float64) - 3
    return first, torch.cat([first[:, :2], first[:, 2:5] ** 2], 1)  # two inputs are equal


@pytest.mark.parametrize("kernel", MODULES)
def test_kernels_are_those_of_gpytorch(kernel):
    module = MODULES[kernel](batch_shape=torch.Size([3])).double()
    module.lengthscale = LENGTHSCALE[:, None, None]
    if kernel == "periodic":
        module.period_length = PERIOD[:, None, None]
    first, second = inputs()
    with torch.no_grad():
        expected = module(first[..., None], second[..., None]).to_dense()
    distance = (first[:, :, None] - second[:, None]).abs()
    found = correlation(kernel, distance, {"lengthscale": LENGTHSCALE, "period": PERIOD})
    # gpytorch's Matérn and RBF take distances by an expansion that loses half of the digits at
    # distance 0 only; those entries are 1 here.
    apart = distance > 0
    torch.testing.assert_close(found[apart], expected[apart], rtol=1e-10, atol=1e-10)
    assert found[~apart].eq(1).all()
    assert int((~apart).sum()) == 6


@pytest.mark.parametrize("kernel", MODULES)
def test_kernels_are_those_of_the_reference(kernel):
    first, second = inputs()
    distance = (first[:, :, None] - second[:, None]).abs()
    found = correlation(kernel, distance, {"lengthscale": LENGTHSCALE, "period": PERIOD})
    for i in range(3):
        expected = kernel_matrix(
            kernel,
            first[i].numpy(),
            second[i].numpy(),
            lengthscale=float(LENGTHSCALE[i]),
            period=float(PERIOD[i]),
        )
        np.testing.assert_allclose(found[i].numpy(), expected, rtol=1e-12, atol=1e-14)


def test_noise_variance_has_a_floor():
    noise, scale = torch.tensor([0.0, 1e-5, 1e-3, 2.0]), torch.tensor([3.0, 1.0, 1.0, 1.0])
    expected = torch.tensor([9e-8, 1e-8, 1e-6, 4.0])
    torch.testing.assert_close(noise_variance(noise, scale), expected)


def test_a_factor_ignores_padding_and_names_what_is_not_positive_definite():
    good = torch.tensor([[4.0, 2.0], [2.0, 3.0]]).double()
    covariance = torch.stack([good, torch.full((2, 2), 7.0).double(), -good])
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    factor = cholesky_factor(covariance, mask, where="here")
    torch.testing.assert_close(factor[0] @ factor[0].T, good)
    torch.testing.assert_close(factor[1], torch.tensor([[7.0**0.5, 0.0], [0.0, 1.0]]).double())
    assert torch.equal(factor[2], torch.eye(2).double())
    mask[2] = True
    with pytest.raises(CurvatureError, match=r"smallest eigenvalue -5\.56 .* position 2"):
        cholesky_factor(covariance, mask, where="here")
