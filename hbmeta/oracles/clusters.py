"""The best classifiers of Gaussian clusters: with the means known, and given a support."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical

from hbmeta.enumeration import no_joint
from hbmeta.oracles.checks import check_episode, truth_of
from hbmeta.oracles.circle import circle_logits
from hbmeta.oracles.quadrature import gauss_legendre, mass_interval
from hbmeta.predictive import Predictive
from hbmeta.tasks import Clusters, Episode

__all__ = ["bayes_clusters", "known_clusters", "log_disk_mass"]


def known_clusters(family: Clusters, episode: Episode, truth: Mapping[str, Tensor]) -> Predictive:
    """Classify with the true class means: p(y = k | x) ∝ exp(−|x − c_k|² / (2 noise²)).

    Each row by itself: that every class has as many query rows as every other is not used.

    Args:
        family: its noise is known.
        episode: of which only the x of the query are read.
        truth: "means" (tasks, ways, 2), as `sample_with_truth` returns them.
    Raises:
        DataError: an episode or a truth that is none of the family.
    Example:
        >>> family = Clusters(ways=3, queries=2)
        >>> episode, truth = family.sample_with_truth(4, seed=0)
        >>> known_clusters(family, episode, truth).probabilities.shape
        torch.Size([4, 6, 3])
    """
    where = "known_clusters"
    check_episode(family, Clusters, episode, 2, where=where)
    query, shape = episode.query, (episode.n_tasks, family.ways, 2)
    means = truth_of(truth, "means", shape, query.device, where=where)
    distance = (query.flat_x.double()[:, None] - means[query.task]).square().sum(-1)
    return Predictive(_Classes(-distance / (2 * family.noise**2)), query)


def bayes_clusters(family: Clusters, episode: Episode) -> Predictive:
    """Classify with all that the support says about the class means: the best classifier given S.

    Given S the means are independent, with p(c_k | S) ∝ N(c_k; m_k, σ²/n_k I₂) on the disk, where
    m_k is the mean of the n_k support rows of class k. Let D(ρ, s) be the mass within the disk of
    a round Gaussian with standard deviation s, centred at distance ρ from 0. Then

        p(x | y = k, S) = N(x; m_k, σ² (1 + 1/n_k) I₂) D(|m_x|, σ/√(n_k+1)) / D(|m_k|, σ/√n_k),

    with m_x = (n_k m_k + x)/(n_k + 1), and D(|x|, σ)/(π R²) for a class without support. D is an
    integral over the radius, r s⁻² exp(−(r² + ρ²)/(2s²)) I₀(rρ/s²), taken by 64 Gauss-Legendre
    nodes where its mass lies (8 s around it), with an error below 1e-12 of log D. Small noise and
    many shots are no limit. Classes are equally likely, as in the family. For means on a circle see
    `hbmeta.oracles.circle`.

    Each row by itself, as if it were the only one of the query. Rows of one task depend on each
    other through the means; their joint probability is not computed, and asking for it raises.

    Args:
        family: its radius and its noise are known.
        episode: the support to condition on; of the query only x is read.
    Raises:
        DataError: an episode that is none of the family.
    Example:
        >>> family = Clusters(ways=3, shots=1, queries=2)
        >>> bayes_clusters(family, family.sample(4, seed=0)).probabilities.shape
        torch.Size([4, 6, 3])
    """
    where = "bayes_clusters"
    y = check_episode(family, Clusters, episode, 2, where=where)
    if family.placement == "circle":
        classes = _Classes(circle_logits(family, episode))
        return Predictive(classes, episode.query, joint=no_joint)
    support, query, ways = episode.support, episode.query, family.ways
    x, at = support.flat_x.double(), query.flat_x.double()[:, None]
    group = support.task * ways + y.long()
    count = torch.bincount(group, minlength=episode.n_tasks * ways).double()
    total = x.new_zeros(len(count), 2).index_add(0, group, x)
    shape = (episode.n_tasks, ways)
    mean = (total / count.clamp(min=1)[:, None]).reshape(*shape, 2)
    n = count.reshape(shape)
    radius, noise = float(family.radius), float(family.noise)
    before = log_disk_mass(mean.norm(dim=-1), noise / n.clamp(min=1).sqrt(), radius)
    n, mean, before = n[query.task], mean[query.task], before[query.task]
    after = log_disk_mass(
        ((n[..., None] * mean + at) / (n[..., None] + 1)).norm(dim=-1),
        noise / (n + 1).sqrt(),
        radius,
    )
    variance = noise**2 * (1 + 1 / n.clamp(min=1))
    log_normal = -(at - mean).square().sum(-1) / (2 * variance) - (2 * math.pi * variance).log()
    prior = -math.log(math.pi * radius**2)
    logits = after + torch.where(n > 0, log_normal - before, prior)
    return Predictive(_Classes(logits), query, joint=no_joint)


@dataclass(frozen=True, eq=False)
class _Classes:
    """One Categorical per row, logits (n, ways)."""

    logits: Tensor
    n_draws: int = 1

    def distribution(self, start: int, stop: int) -> Any:
        """The classes of every row, batch shape (1, n)."""
        return Categorical(logits=self.logits[None], validate_args=False)


def log_disk_mass(centre: Tensor, sd: Tensor, radius: float, nodes: int = 64) -> Tensor:
    """log P(|Z| ≤ radius) for Z ~ N(m, sd² I₂) in the plane, |m| = centre; elementwise."""
    nearest = centre.clamp(max=radius)
    low, high = mass_interval(centre, nearest, sd**2, 0.0, radius)
    t, weight = gauss_legendre(nodes, centre)
    out = torch.full_like(centre, -torch.inf)
    for at, share in zip(t.tolist(), weight.log().tolist(), strict=True):
        r = 0.5 * (low + high) + 0.5 * (high - low) * at
        bessel = torch.special.i0e(r * centre / sd**2).log()  # of exp(−z) I₀(z), no overflow
        value = bessel + r.log() - 0.5 * ((r - centre) / sd) ** 2
        out = torch.logaddexp(out, value + share)
    return out + (0.5 * (high - low)).log() - 2 * sd.log()
