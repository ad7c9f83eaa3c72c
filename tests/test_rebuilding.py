"""Distributions taken apart and put together: the same densities, at any leading dimensions."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import transforms

from hbmeta.errors import UnsupportedModelError
from hbmeta.rebuilding import rebuild, tensors_of

SHAPE = (2, 3)
TRIL = torch.tensor([[1.0, 0.0], [0.4, 0.7]], dtype=torch.float64)


def mixture(a, *, event=False):
    """Weights without a batch of their own; components along a last dimension."""
    weights = dist.Categorical(probs=torch.tensor([0.3, 0.7], dtype=a.dtype))
    places = torch.stack([a, a + 3.0], -1)
    if event:
        places = torch.stack([places, -places], -1)
        return dist.MixtureSameFamily(weights, dist.Normal(places, 0.5).to_event(1))
    return dist.MixtureSameFamily(weights, dist.Normal(places, 0.5))


# Each takes a parameter of the shape of the cells, as a program does.
FAMILIES = {
    "Normal": lambda a: dist.Normal(a, 0.5),
    "StudentT": lambda a: dist.StudentT(4.0, a, 0.5),
    "Laplace": lambda a: dist.Laplace(a, 0.5),
    "Bernoulli logits": lambda a: dist.Bernoulli(logits=a),
    "Bernoulli probs": lambda a: dist.Bernoulli(probs=a.sigmoid()),
    "Categorical": lambda a: dist.Categorical(logits=torch.stack([a, -a, 0 * a], -1)),
    "Poisson": lambda a: dist.Poisson(a.exp()),
    "NegativeBinomial": lambda a: dist.NegativeBinomial(3.0, logits=a),
    "Binomial": lambda a: dist.Binomial(7, logits=a),
    "Multinomial": lambda a: dist.Multinomial(5, logits=torch.stack([a, -a], -1)),
    "BetaBinomial": lambda a: dist.BetaBinomial(a.exp(), 2.0 * a.exp(), 6.0 * torch.ones_like(a)),
    "Beta": lambda a: dist.Beta(a.exp(), 2.0),
    "LogNormal": lambda a: dist.LogNormal(a, 0.5),
    "HalfNormal": lambda a: dist.HalfNormal(a.exp()),
    "Weibull": lambda a: dist.Weibull(a.exp(), 1.5),
    "Gumbel": lambda a: dist.Gumbel(a, 0.5),
    "InverseGamma": lambda a: dist.InverseGamma(a.exp() + 3.0, 2.0 * torch.ones_like(a)),
    "MultivariateNormal": lambda a: dist.MultivariateNormal(
        torch.stack([a, -a], -1), scale_tril=TRIL.to(a)
    ),
    "MultivariateNormal covariance": lambda a: dist.MultivariateNormal(
        torch.stack([a, -a], -1), covariance_matrix=(TRIL @ TRIL.mT).to(a)
    ),
    "Independent": lambda a: dist.Normal(torch.stack([a, -a], -1), 0.5).to_event(1),
    "Masked": lambda a: dist.Normal(a, 0.5).mask(torch.ones_like(a, dtype=torch.bool)),
    "Expanded": lambda a: dist.ExpandedDistribution(dist.Normal(a[..., :1], 0.5), a.shape),
    "Expanded Independent": lambda a: dist.ExpandedDistribution(
        dist.Normal(torch.zeros(1, 2).to(a), 0.5).to_event(1), a.shape
    ),
    "expand": lambda a: dist.Normal(a[..., :1], 0.5).expand(a.shape),
    "MixtureSameFamily": mixture,
    "MixtureSameFamily of vectors": lambda a: mixture(a, event=True),
    "ZeroInflatedPoisson": lambda a: dist.ZeroInflatedPoisson(
        a.exp(), gate=torch.tensor(0.2).to(a)
    ),
    "ZeroInflatedPoisson logits": lambda a: dist.ZeroInflatedPoisson(a.exp(), gate_logits=a),
    "ZeroInflatedNegativeBinomial": lambda a: dist.ZeroInflatedNegativeBinomial(
        3.0, logits=a, gate=torch.tensor(0.2).to(a)
    ),
    "ZeroInflatedDistribution": lambda a: dist.ZeroInflatedDistribution(
        dist.Poisson(a.exp()), gate=torch.tensor(0.2).to(a)
    ),
    "TransformedDistribution": lambda a: dist.TransformedDistribution(
        dist.Normal(a, 0.5),
        [
            transforms.AffineTransform(1.0, a.exp()),
            transforms.SigmoidTransform().inv.inv,
            transforms.ExpTransform(),
        ],
    ),
    "TransformedDistribution composed": lambda a: dist.TransformedDistribution(
        dist.Normal(a, 0.5),
        transforms.ComposeTransform(
            [transforms.SigmoidTransform(), transforms.PowerTransform(a.exp())]
        ),
    ),
    "TransformedDistribution of nothing": lambda a: dist.TransformedDistribution(
        dist.Normal(a, 0.5), []
    ),
}


def parameter(*leading):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*leading, *SHAPE, generator=generator, dtype=torch.float64)


def draw(distribution):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        # torch draws from no mixture whose weights have fewer dimensions than its components.
        return distribution.expand(distribution.batch_shape).sample()


@pytest.fixture(params=FAMILIES, ids=str)
def make(request):
    # Programs run without validation (under vmap it would branch on values of tensors).
    with pyro.validation_enabled(False):
        yield FAMILIES[request.param]


def test_round_trip(make):
    given = make(parameter())
    tensors, spec = tensors_of(given)
    found = rebuild(spec, tensors)
    assert (found.batch_shape, found.event_shape) == (given.batch_shape, given.event_shape)
    assert all(tensor.shape[:2] == SHAPE for tensor in tensors.values())
    y = draw(given)
    torch.testing.assert_close(found.log_prob(y), given.log_prob(y), rtol=1e-12, atol=1e-12)
    assert draw(found).shape == y.shape
    # And once more: a predictive takes rebuilt distributions apart to pick cells.
    again, spec_again = tensors_of(found)
    torch.testing.assert_close(rebuild(spec_again, again).log_prob(y), found.log_prob(y))


def test_chosen_cells(make):
    """The cells that a mask leaves, as for rows of padded tasks."""
    given = make(parameter())
    chosen = torch.tensor([[True, False, True], [False, True, True]])
    tensors, spec = tensors_of(given)
    found = rebuild(spec, {name: tensor[chosen] for name, tensor in tensors.items()})
    assert tuple(found.batch_shape) == (4,)
    y = draw(given)
    expected = given.log_prob(y)[chosen]
    torch.testing.assert_close(found.log_prob(y[chosen]), expected, rtol=1e-12, atol=1e-12)


def test_draws_by_vmap(make):
    draws = parameter(5)
    kept = {}

    def apart(a):
        tensors, kept["spec"] = tensors_of(make(a))
        return tensors

    tensors = torch.vmap(apart)(draws)
    found = rebuild(kept["spec"], tensors)
    assert tuple(found.batch_shape) == (5, *SHAPE)
    each = [make(a) for a in draws]
    y = torch.stack([draw(d) for d in each])
    expected = torch.stack([d.log_prob(v) for d, v in zip(each, y, strict=True)])
    torch.testing.assert_close(found.log_prob(y), expected, rtol=1e-12, atol=1e-12)
    assert draw(found).shape == y.shape


def test_a_mask_is_dropped():
    mask = torch.tensor([[True, False, True], [True, True, True]])
    tensors, spec = tensors_of(dist.Normal(parameter(), 1.0).mask(mask))
    y = torch.zeros(SHAPE, dtype=torch.float64)
    expected = dist.Normal(parameter(), 1.0).log_prob(y)
    torch.testing.assert_close(rebuild(spec, tensors).log_prob(y), expected)


class Scaled(transforms.Transform):
    domain = codomain = torch.distributions.constraints.real
    bijective = True

    def __init__(self, by):
        super().__init__()
        self.by = by

    def _call(self, x):
        return self.by * x


class Forgetful(dist.Normal):
    def __init__(self, centre):
        super().__init__(2 * centre, 1.0)


class Open(dist.Normal):
    def __init__(self, **settings):
        super().__init__(**settings)


@pytest.mark.parametrize(
    ("distribution", "found"),
    [
        (dist.TransformedDistribution(dist.Normal(0.0, 1.0), Scaled(torch.ones(()))), "Scaled"),
        (Forgetful(torch.zeros(2)), "'centre'"),
        (Open(loc=torch.zeros(2), scale=torch.ones(2)), "no names"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused(distribution, found):
    with pytest.raises(UnsupportedModelError, match=found):
        tensors_of(distribution)
