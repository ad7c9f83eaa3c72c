"""Where φ starts: the mode of a task prior's density in unconstrained space.

For x = T(u) with T the bijection of the support, the mode of p(u) = p(T(u)) |T'(u)| is

    Normal, Laplace, Logistic, MultivariateNormal     the mean (T is the identity)
    Cauchy, StudentT, Gumbel                          the location (no mean, or another point)
    Gamma, Exponential, Chi2, InverseGamma            the image of the mean: x^(a-1) e^(-bx) x is
                                                      largest at a/b
    Beta, Dirichlet, Uniform                          the image of the mean
    HalfNormal, HalfCauchy, Weibull                   the scale: x e^(-x²/2s²) and x / (1 + x²/s²)
                                                      peak at s
    StudentT folded at 0                              the scale: x (1 + x²/νs²)^(-(ν+1)/2) peaks
                                                      where νs² + x² = (ν+1) x²
    LKJCholesky                                       the identity
    ImproperUniform over the reals                    0, as good as any
    a bijective transform of one of these             its base's location, pushed through; the mode
                                                      where the map is affine in unconstrained
                                                      space (exp, sigmoid or tanh of a real base)

The location is differentiable in the parameters of the distribution, so a task prior's θ learns
through the start of gradient descent. Families without an entry raise: a start that is silently
wrong is worse than none.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, biject_to
from torch.distributions.transforms import identity_transform

from hbmeta.errors import ProgramError

_AT_MEAN = (
    torch.distributions.Normal,
    torch.distributions.Laplace,
    torch.distributions.MultivariateNormal,
    torch.distributions.LowRankMultivariateNormal,
    torch.distributions.Gamma,
    torch.distributions.Beta,
    torch.distributions.Dirichlet,
    torch.distributions.Uniform,
    torch.distributions.Exponential,
)
_AT_LOC = (
    torch.distributions.Cauchy,
    torch.distributions.StudentT,
    torch.distributions.Gumbel,
    dist.Logistic,
    dist.AsymmetricLaplace,
    dist.SoftLaplace,
)


def location(distribution: Distribution, where: str) -> Tensor:
    """The constrained point whose unconstrained image has the highest prior density.

    Args:
        distribution: a continuous prior, as it stands in a program (expanded, independent, masked).
        where: the name of the site, for the error.
    Returns:
        A tensor of shape batch_shape + event_shape.
    Raises:
        ProgramError: the family has no entry in the table above.
    """
    base = distribution
    if isinstance(base, dist.ExpandedDistribution):
        return location(base.base_dist, where).expand(base.batch_shape + base.event_shape)
    if isinstance(base, (torch.distributions.Independent, dist.MaskedDistribution)):
        return location(base.base_dist, where)
    # Half distributions are transforms of their full ones by a map that is no bijection: first.
    if isinstance(base, (torch.distributions.HalfNormal, torch.distributions.HalfCauchy)):
        return base.scale.expand(base.batch_shape)
    if isinstance(base, torch.distributions.Weibull):
        return base.scale.expand(base.batch_shape)
    if isinstance(base, dist.FoldedDistribution) and isinstance(base.base_dist, dist.StudentT):
        scale: Tensor = base.base_dist.scale
        return scale.expand(base.batch_shape)
    if isinstance(base, dist.InverseGamma):
        # 1/x is Gamma(a, b), whose location is a/b; the logarithm only changes sign.
        mean: Tensor = base.rate / base.concentration
        return mean
    if isinstance(base, _AT_LOC):
        centre: Tensor = base.loc
        return centre.expand(base.batch_shape)
    if isinstance(base, _AT_MEAN):
        return base.mean
    if isinstance(base, dist.ImproperUniform) and biject_to(base.support) is identity_transform:
        return torch.zeros(base.batch_shape + base.event_shape)
    if isinstance(base, torch.distributions.LKJCholesky):
        shape = base.batch_shape + base.event_shape
        like = base.concentration
        return torch.eye(base.dim, dtype=like.dtype, device=like.device).expand(shape)
    if isinstance(base, torch.distributions.TransformedDistribution) and all(
        transform.bijective for transform in base.transforms
    ):
        value = location(base.base_dist, where)
        for transform in base.transforms:
            value = transform(value)
        return value
    raise ProgramError(
        f"prior of site {where!r}",
        needed="a family whose mode in unconstrained space is known (see hbmeta.locations)",
        found=type(base).__name__,
        do="Write the site as a bijective transform of a Normal, or with a family of that table.",
    )
