"""Bounds over tasks as functions of tensors, to learn by.

F(R̂_1, …, R̂_T, K_1, …, K_T, K_H) of `amit_meir`, `joint_kl` and `query_split`. Each is concave in
all of its arguments together: a root of a linear function is, and so is kl⁻¹, because kl is jointly
convex and kl⁻¹(q, c) = max {p : kl(q‖p) ≤ c}; both increase in what is put into them. A tangent at
any values v₀ is therefore above the bound and touches it at v₀,

    F(v) ≤ F(v₀) + Σ_i a_i (R̂_i − R̂_i⁰) + Σ_i b_i (K_i − K_i⁰) + c (K_H − K_H⁰),

and it is a sum over tasks, of which a minibatch gives an unbiased gradient, as it does not of F.
At v₀ the two gradients agree. To descend on tangents at the values that were last seen is to
majorise and minimise: no step of it that lowers the tangent raises the bound.

Where kl⁻¹ is 1 to three digits its derivatives vanish, and with them all learning: there the root
form stands in, which is above it (Pinsker) and whose derivatives do not.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hbmeta.bounds.differentiable import differentiable_kl_inverse

__all__ = ["OBJECTIVES", "Tangent", "objective", "risk_weight", "tangent"]

OBJECTIVES = ("joint_kl", "amit_meir", "query_split")
FLAT = 0.999
"""Above it a kl inverse is as good as 1, and its root form is taken in its place."""


class Tangent(NamedTuple):
    """The tangent of a bound at risks and divergences of all tasks.

    Attributes:
        value: () F.
        risks: (tasks,) a_i = ∂F/∂R̂_i.
        kls: (tasks,) b_i = ∂F/∂K_i.
        hyper_kl: () c = ∂F/∂K_H.
    """

    value: Tensor
    risks: Tensor
    kls: Tensor
    hyper_kl: Tensor


def objective(
    name: str, *, risks: Tensor, kls: Tensor, hyper_kl: Tensor, n_samples: Tensor, delta: float
) -> Tensor:
    """() the right-hand side of a bound, differentiable.

    Args:
        name: one of `OBJECTIVES`, as in `hbmeta.bounds`.
        risks: (tasks,) R̂_i in [0, 1]; mean query losses for query_split.
        kls: (tasks,) K_i; not used by query_split.
        hyper_kl: () K_H.
        n_samples: (tasks,) m_i, two or more for amit_meir; not used by query_split.
        delta: δ.
    """
    T = len(risks)
    mean = risks.mean()
    if name == "query_split":
        return _kl_or_root(mean, (hyper_kl + math.log(2 * math.sqrt(T) / delta)) / T)
    if name == "amit_meir":
        paid = hyper_kl + kls + torch.log(2 * T * n_samples / delta)
        within = (paid / (2 * (n_samples - 1))).sqrt().mean()
        return mean + within + ((hyper_kl + math.log(2 * T / delta)) / (2 * (T - 1))).sqrt()
    n = T * n_samples.min()
    equal = n_samples.min() == n_samples.max()
    paid, across = hyper_kl + kls.sum(), (hyper_kl + math.log(4 * math.sqrt(T) / delta)) / T
    within = torch.where(
        equal,
        (paid + torch.log(4 * n.sqrt() / delta)) / n,
        (paid + torch.log(2 * n / delta)) / (n - 1).clamp_min(1),
    )
    sharp = differentiable_kl_inverse(differentiable_kl_inverse(mean, within), across)
    return (
        sharp if float(sharp.detach()) < FLAT else mean + (within / 2).sqrt() + (across / 2).sqrt()
    )


def _kl_or_root(risk: Tensor, c: Tensor) -> Tensor:
    sharp = differentiable_kl_inverse(risk, c)
    return sharp if float(sharp.detach()) < FLAT else risk + (c / 2).sqrt()


def tangent(
    name: str, *, risks: Tensor, kls: Tensor, hyper_kl: Tensor, n_samples: Tensor, delta: float
) -> Tangent:
    """The value of a bound and its derivatives, in float64; arguments as of `objective`."""
    at = [value.detach().double().requires_grad_() for value in (risks, kls, hyper_kl)]
    with torch.enable_grad():
        value = objective(
            name,
            risks=at[0],
            kls=at[1],
            hyper_kl=at[2],
            n_samples=n_samples.detach().double(),
            delta=delta,
        )
        found = torch.autograd.grad(value, at, allow_unused=True)
    slopes = [torch.zeros_like(v) if g is None else g for v, g in zip(at, found, strict=True)]
    return Tangent(value.detach(), *slopes)


def risk_weight(risk: Tensor, kl: Tensor, n_samples: Tensor, delta: float) -> Tensor:
    """λ in (0, 1]: the `quadratic` bound of one task falls where KL + λ m R̂ does.

    With c = (KL + log(2√m/δ))/m and s = √(c (c + 2R̂)) that bound is B = R̂ + c + s, and

        ∂B/∂R̂ = (s + c)/s,   ∂B/∂c = (s + c + R̂)/s,   λ = (∂B/∂R̂)/(∂B/∂c) = (s + c)/(s + c + R̂).

    B is close to `seeger_kl` and never below it, and its derivatives do not vanish where it is
    vacuous. Broadcasts.
    """
    c = (kl + torch.log(2 * n_samples.sqrt() / delta)) / n_samples
    paid = (c * (c + 2 * risk)).sqrt() + c
    return paid / (paid + risk)
