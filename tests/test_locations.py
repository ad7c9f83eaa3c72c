import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.optimize import minimize
from torch.distributions import biject_to, transforms

from hbmeta.errors import ProgramError
from hbmeta.locations import location

torch_dist = torch.distributions


def number(*values: float) -> torch.Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


CASES = {
    "Normal": dist.Normal(number(0.7), number(2.0)),
    "Laplace": dist.Laplace(number(0.7), number(2.0)),
    "Logistic": dist.Logistic(number(0.7), number(2.0)),
    "SoftLaplace": dist.SoftLaplace(number(0.7), number(2.0)),
    "AsymmetricLaplace": dist.AsymmetricLaplace(number(0.7), number(2.0), number(1.6)),
    "Cauchy": dist.Cauchy(number(0.7), number(2.0)),
    "StudentT": dist.StudentT(number(0.8), number(0.7), number(2.0)),
    "Gumbel": dist.Gumbel(number(0.7), number(2.0)),
    "MultivariateNormal": dist.MultivariateNormal(
        number(0.7, -1.0), number(2.0, 0.5, 0.5, 1.0).reshape(2, 2)
    ),
    "LowRankMultivariateNormal": dist.LowRankMultivariateNormal(
        number(0.7, -1.0), number(1.0, 2.0)[:, None], number(0.5, 0.5)
    ),
    "Gamma": dist.Gamma(number(0.6), number(3.0)),
    "Chi2": dist.Chi2(number(3.0)),
    "Exponential": dist.Exponential(number(3.0)),
    "InverseGamma": dist.InverseGamma(number(2.5), number(3.0)),
    "Beta": dist.Beta(number(0.6), number(2.0)),
    "Dirichlet": dist.Dirichlet(number(0.6, 2.0, 1.2)),
    "Uniform": dist.Uniform(number(-1.0), number(4.0)),
    "HalfNormal": dist.HalfNormal(number(2.5)),
    "HalfCauchy": dist.HalfCauchy(number(2.5)),
    "half Student-t": dist.FoldedDistribution(dist.StudentT(number(4.0), number(0.0), number(2.5))),
    "Weibull": dist.Weibull(number(2.5), number(1.7)),
    "LKJCholesky": dist.LKJCholesky(3, number(1.5)),
    "LogNormal": dist.LogNormal(number(0.7), number(0.5)),
    "AffineBeta": dist.AffineBeta(number(2.0), number(3.0), number(-1.0), number(4.0)),
    "an affine map of StudentT": dist.TransformedDistribution(
        dist.StudentT(number(3.0), number(0.0), number(1.0)),
        [transforms.AffineTransform(number(0.7), number(2.0))],
    ),
    "sigmoid of Normal": dist.TransformedDistribution(
        dist.Normal(number(0.7), number(0.5)), [transforms.SigmoidTransform()]
    ),
    "tanh of Normal": dist.TransformedDistribution(
        dist.Normal(number(0.7), number(0.5)), [transforms.TanhTransform()]
    ),
    "a vector": dist.Gamma(number(0.6, 2.0), number(3.0, 1.0)).to_event(1),
    "an expanded scalar": dist.HalfNormal(number(2.5)).expand([2]).to_event(1),
    "masked": dist.HalfCauchy(number(2.5)).mask(True),
    "an elementary family of torch": torch_dist.Gamma(number(0.6), number(3.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_is_the_mode_in_unconstrained_space(name):
    prior = CASES[name]
    transform = biject_to(prior.support)
    found = location(prior, "a")
    assert found.shape == prior.batch_shape + prior.event_shape
    start = transform.inv(found)

    def negative(vector: np.ndarray) -> float:
        u = torch.from_numpy(vector).reshape(start.shape)
        x = transform(u)
        return -float(prior.log_prob(x).sum() + transform.log_abs_det_jacobian(u, x).sum())

    # Nelder-Mead: it needs no gradient, which the Laplace families lack at their mode.
    best = minimize(
        negative,
        start.reshape(-1).numpy() + 0.3,
        method="Nelder-Mead",
        options={"xatol": 1e-9, "fatol": 1e-14, "maxiter": 4000, "maxfev": 4000},
    )
    assert best.success
    np.testing.assert_allclose(start.reshape(-1), best.x, atol=1e-5)


def test_other_transforms_push_the_base_forward():
    prior = dist.TransformedDistribution(
        dist.Normal(number(0.7), number(0.5)), [transforms.SoftplusTransform()]
    )
    torch.testing.assert_close(location(prior, "a"), torch.nn.functional.softplus(number(0.7)))


@pytest.mark.parametrize(
    "family",
    [
        lambda t: dist.Normal(t, 1.0),
        lambda t: dist.Gamma(t, 2.0),
        lambda t: dist.HalfNormal(t),
        lambda t: dist.StudentT(3.0, t, 1.0),
        lambda t: dist.LogNormal(t, 1.0),
        lambda t: dist.Dirichlet(torch.stack([t, 1 + 0 * t])),
    ],
)
def test_is_differentiable_in_the_parameters(family):
    parameter = number(1.3).requires_grad_()
    (gradient,) = torch.autograd.grad(location(family(parameter), "a").reshape(-1)[0], parameter)
    assert float(gradient) > 0


@pytest.mark.parametrize(
    "prior",
    [
        dist.VonMises(number(0.0), number(1.0)),
        dist.SkewLogistic(number(0.7), number(2.0), number(1.6)),
        dist.MixtureSameFamily(
            dist.Categorical(number(0.5, 0.5)), dist.Normal(number(0.0, 3.0), number(1.0, 1.0))
        ),
    ],
)
def test_a_family_without_an_entry_is_refused(prior):
    with pytest.raises(ProgramError) as caught:
        location(prior, "scale_of_noise")
    assert "'scale_of_noise'" in caught.value.where
    assert caught.value.found == type(prior).__name__
    assert "bijective transform of a Normal" in caught.value.do
