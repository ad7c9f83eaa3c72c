"""The information that one observation carries about the parameters of its distribution.

For y ~ p(y | η) with parameters η (loc and scale, logits, …) a matrix R with

    Rᵀ R = F(η) = E[∇ log p(y | η) ∇ log p(y | η)ᵀ],

the Fisher information, which is never negative and goes with any parametrisation as a metric does:
Jᵀ F J is the same whether η or a function of it is differentiated. In the natural parameters of an
exponential family F is the Hessian of −log p(y | η) itself, whatever y is. For a family that is not
listed here the Hessian of −log p(y | η) at y takes its place, its negative eigenvalues set to zero.

References:
    Martens (2020), JMLR 21(146), §8 and §9, for Fisher and generalised Gauss–Newton matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from hbmeta.curvature import gradient_and_hessian
from hbmeta.rebuilding import rebuild, tensors_of

__all__ = ["Observation", "observations"]

Depends = Callable[[Tensor], bool]


class Observation(NamedTuple):
    """Parameters of the distributions at every cell, and a root of the information about them.

    Attributes:
        parameters: η (*cells, raw).
        root: R (*cells, rows, raw).
    """

    parameters: Tensor
    root: Tensor


def observations(distribution: Any, value: Tensor, depends: Depends) -> Observation | None:
    """η and R of an observed site; None where no parameter depends on φ.

    Args:
        distribution: of the site, batch shape the cells.
        value: y (*cells, *event).
        depends: whether a tensor is a function of φ.
    """
    cells = torch.Size(distribution.batch_shape)
    base = distribution
    while isinstance(base, dist.ExpandedDistribution | dist.MaskedDistribution):
        base = base.base_dist
    own = 0
    if isinstance(base, torch.distributions.Independent):
        own = base.reinterpreted_batch_ndims
        base = base.base_dist
        while isinstance(base, dist.ExpandedDistribution | dist.MaskedDistribution):
            base = base.base_dist
    known = _known(base, depends)
    if known is None:
        return _observed(distribution, value, depends)
    parameters, root = known
    if not parameters.numel() or not depends(parameters):
        return None
    # A base may have fewer batch dimensions than the cells, and dimensions of its own behind them.
    event = torch.Size(base.batch_shape)[len(base.batch_shape) - own :] if own else torch.Size()
    raw = parameters.shape[-1]
    full = cells + event
    parameters = parameters.expand((*full, raw))
    root = root.expand(full + root.shape[-2:])
    if not own:
        return Observation(parameters, root)
    # Entries of a vector are independent: a block of R for each.
    count, rows = event.numel(), root.shape[-2]
    blocks = root.reshape(*cells, count, rows, 1, raw)
    chosen = torch.eye(count, dtype=root.dtype, device=root.device).reshape(count, 1, count, 1)
    whole = (blocks * chosen).reshape(*cells, count * rows, count * raw)
    return Observation(parameters.reshape(*cells, count * raw), whole)


def _known(base: Any, depends: Depends) -> tuple[Tensor, Tensor] | None:
    """η (..., raw) and R (..., rows, raw) of a family with a closed form, else None."""
    for family in type(base).__mro__:
        if family.__name__ in _FAMILIES:
            return _FAMILIES[family.__name__](base, depends)
    return None


Known = tuple[Tensor, Tensor] | None


def _independent(depends: Depends, *pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """η and R where F is diagonal: pairs of a parameter and the square root of its entry."""
    pairs = tuple((p, r) for p, r in pairs if depends(p)) or pairs[:1]
    shape = torch.broadcast_shapes(*(t.shape for pair in pairs for t in pair))
    parameters = torch.stack([p.expand(shape) for p, _ in pairs], -1)
    return parameters, torch.diag_embed(torch.stack([r.expand(shape) for _, r in pairs], -1))


def _location_scale(
    first: Callable[[Any], Any], second: Callable[[Any], Any]
) -> Callable[[Any, Depends], Known]:
    """Families with F = diag(a, b) / scale² in (loc, scale)."""

    def known(base: Any, depends: Depends) -> Known:
        if depends(torch.as_tensor(getattr(base, "df", 0.0))):
            return None
        one = 1.0 / base.scale
        return _independent(
            depends, (base.loc, one * first(base) ** 0.5), (base.scale, one * second(base) ** 0.5)
        )

    return known


def _bernoulli(base: Any, depends: Depends) -> Known:
    # In the logit η, F = p (1 − p).
    logits = base.logits
    return _independent(depends, (logits, _logistic_sd(logits)))


def _binomial(base: Any, depends: Depends) -> Known:
    logits = base.logits
    return _independent(depends, (logits, base.total_count**0.5 * _logistic_sd(logits)))


def _logistic_sd(logits: Tensor) -> Tensor:
    """√(p (1 − p)), also where p is 0 or 1 to rounding."""
    return (0.5 * torch.nn.functional.logsigmoid(logits)).exp() * (
        0.5 * torch.nn.functional.logsigmoid(-logits)
    ).exp()


def _poisson(base: Any, depends: Depends) -> Known:
    return _independent(depends, (base.rate, base.rate.rsqrt()))


def _exponential(base: Any, depends: Depends) -> Known:
    return _independent(depends, (base.rate, 1.0 / base.rate))


def _negative_binomial(base: Any, depends: Depends) -> Known:
    if depends(torch.as_tensor(base.total_count)):
        return None
    # In the logit, with r counts, ∂ log p / ∂η = y (1 − p) − r p has variance r p.
    logits = base.logits
    p_root = (0.5 * torch.nn.functional.logsigmoid(logits)).exp()
    return _independent(depends, (logits, base.total_count**0.5 * p_root))


def _gamma(base: Any, depends: Depends) -> Known:
    a, b = torch.broadcast_tensors(base.concentration, base.rate)
    # F = [[ψ₁(a), −1/b], [−1/b, a/b²]] = L Lᵀ with L lower triangular, R = Lᵀ.
    first = torch.polygamma(1, a).sqrt()
    off = -1.0 / (b * first)
    last = (a / b.square() - off.square()).sqrt()
    root = torch.stack(
        [torch.stack([first, off], -1), torch.stack([torch.zeros_like(off), last], -1)], -2
    )
    return torch.stack([a, b], -1), root


def _categorical(base: Any, depends: Depends) -> Known:
    # F = diag(p) − p pᵀ: rows √p_c (e_c − p).
    logits = base.logits
    p = logits.exp()
    identity = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    return logits, (0.5 * logits).exp().unsqueeze(-1) * (identity - p.unsqueeze(-2))


def _multivariate_normal(base: Any, depends: Depends) -> Known:
    if depends(base.scale_tril):
        return None
    identity = torch.eye(base.loc.shape[-1], dtype=base.loc.dtype, device=base.loc.device).expand(
        base.scale_tril.shape
    )
    return base.loc, torch.linalg.solve_triangular(base.scale_tril, identity, upper=False)


_FAMILIES: dict[str, Callable[[Any, Depends], Known]] = {
    "Normal": _location_scale(lambda d: 1.0, lambda d: 2.0),
    "LogNormal": _location_scale(lambda d: 1.0, lambda d: 2.0),
    "Laplace": _location_scale(lambda d: 1.0, lambda d: 1.0),
    "Cauchy": _location_scale(lambda d: 0.5, lambda d: 0.5),
    "StudentT": _location_scale(lambda d: (d.df + 1) / (d.df + 3), lambda d: 2 * d.df / (d.df + 3)),
    "Bernoulli": _bernoulli,
    "Binomial": _binomial,
    "Poisson": _poisson,
    "Exponential": _exponential,
    "NegativeBinomial": _negative_binomial,
    "Gamma": _gamma,
    "Categorical": _categorical,
    "MultivariateNormal": _multivariate_normal,
}


def _observed(distribution: Any, value: Tensor, depends: Depends) -> Observation | None:
    """η and a root of the positive part of −∇² log p(y | η), for any family."""
    cells = torch.Size(distribution.batch_shape)
    tensors, spec = tensors_of(distribution)
    names = [name for name, tensor in tensors.items() if depends(tensor)]
    if not names:
        return None
    shapes = [tensors[name].shape[len(cells) :] for name in names]
    flat = torch.cat([tensors[name].reshape(*cells, -1) for name in names], -1)
    sizes = [shape.numel() for shape in shapes]

    def log_prob(eta: Tensor) -> Tensor:
        parts = eta.split(sizes, -1)
        pairs = zip(names, parts, shapes, strict=True)
        moved = {name: part.reshape(cells + shape) for name, part, shape in pairs}
        found: Tensor = rebuild(spec, {**tensors, **moved}).log_prob(value)
        return found

    _, _, hessian = gradient_and_hessian(log_prob, flat, create_graph=flat.requires_grad)
    if flat.shape[-1] == 1:
        return Observation(flat, _root_or_zero(-hessian))
    values, vectors = torch.linalg.eigh(-hessian)
    return Observation(flat, _root_or_zero(values).unsqueeze(-1) * vectors.mT)


def _root_or_zero(values: Tensor) -> Tensor:
    """√ of what is positive, 0 elsewhere, with finite derivatives."""
    positive = values > 0
    root = torch.where(positive, values, torch.ones_like(values)).sqrt()
    return torch.where(positive, root, torch.zeros_like(root))
