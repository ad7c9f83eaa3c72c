"""The predictive of a Gaussian process whose hyperparameters are known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

from hbmeta.errors import DataError
from hbmeta.likelihoods import seeded
from hbmeta.oracles.checks import check_episode, truth_of
from hbmeta.predictive import Predictive
from hbmeta.tasks import Episode, GaussianProcessTasks, Tasks
from hbmeta.tasks.kernels import cholesky_factor, noise_variance

__all__ = ["known_kernel"]


def known_kernel(
    family: GaussianProcessTasks, episode: Episode, truth: Mapping[str, Tensor]
) -> Predictive:
    """Condition the Gaussian process of each task, with its true hyperparameters, on its support.

    With K = scale² k + noise² I:  μ = K_QS K_SS⁻¹ y_S,  Σ = K_QQ − K_QS K_SS⁻¹ K_SQ, which holds
    the noise of y. One Normal per row; `log_prob(y, joint=True)` and `sample` use N(μ, Σ), so that
    log p(y_Q | S) = LML(S ∪ Q) − LML(S). A task without support gives the prior. Where noise is
    below 1e-4 scale, the family's jitter counts as noise (see `GaussianProcessTasks`).

    Args:
        family: names the kernel.
        episode: the support to condition on; of the query only x is read.
        truth: "lengthscale", "scale", "noise" and, for the periodic kernel, "period", (tasks,)
            each, as `sample_with_truth` returns them.
    Raises:
        DataError: an episode or a truth that is none of the family.
        CurvatureError: so many rows that a covariance is singular to rounding.
    Example:
        >>> family = GaussianProcessTasks(shots=5, queries=4)
        >>> episode, truth = family.sample_with_truth(3, seed=0)
        >>> known_kernel(family, episode, truth).log_prob(episode.query.y, joint=True).shape
        torch.Size([3])
    """
    where = "known_kernel"
    y = check_episode(family, GaussianProcessTasks, episode, 1, where=where)
    hyper = {}
    for name in family.hyperparameters:
        hyper[name] = truth_of(truth, name, (episode.n_tasks,), episode.support.device, where=where)
        zero = name == "noise"
        if bool((hyper[name] < 0.0).any()) or (not zero and bool((hyper[name] == 0.0).any())):
            raise DataError(
                where,
                needed=f"{name} of {'at least' if zero else 'above'} 0",
                found=f"{float(hyper[name].min()):g}",
                do="Pass the truth that sample_with_truth returned.",
            )
    support, query = episode.support, episode.query
    at_s, at_q = support.pad(support.flat_x[:, 0]), query.pad(query.flat_x[:, 0])
    variance = noise_variance(hyper["noise"], hyper["scale"])[:, None]
    k_ss = family.covariance(hyper, at_s, at_s) + torch.diag_embed(variance.expand(at_s.shape))
    k_qq = family.covariance(hyper, at_q, at_q) + torch.diag_embed(variance.expand(at_q.shape))
    # Padding cells of the support have rows of zeros here, so that they tell the query nothing.
    k_sq = family.covariance(hyper, at_s, at_q) * support.mask[:, :, None]
    factor = cholesky_factor(k_ss, support.mask, where=where)
    half = torch.linalg.solve_triangular(factor, k_sq, upper=False)
    white = torch.linalg.solve_triangular(factor, support.pad(y)[:, :, None], upper=False)
    conditional = cholesky_factor(k_qq - half.mT @ half, query.mask, where=where)
    mean = query.unpad((half.mT @ white)[..., 0])
    exact = _Gaussians(mean, conditional, query)
    return Predictive(exact, query, joint=exact.joint, joint_sample=exact.sample)


@dataclass(frozen=True, eq=False)
class _Gaussians:
    """One multivariate Normal per task: mean (n,), factor (tasks, points, points)."""

    mean: Tensor
    factor: Tensor
    tasks: Tasks
    n_draws: int = 1

    def distribution(self, start: int, stop: int) -> Any:
        """The marginal of every row, batch shape (1, n)."""
        sd = self.tasks.unpad(self.factor.square().sum(-1).sqrt())
        return Normal(self.mean[None], sd[None], validate_args=False)

    def joint(self, y: Tensor) -> Tensor:
        """(tasks,) log density of all rows of a task."""
        residual = torch.where(self.tasks.mask, self.tasks.pad(y - self.mean), 0.0)
        white = torch.linalg.solve_triangular(self.factor, residual[..., None], upper=False)
        # The diagonal of a padding cell is 1: its logarithm adds nothing.
        log_det = self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * math.log(2 * math.pi) * self.tasks.counts.double()
        out: Tensor = -0.5 * white.square().sum((-2, -1)) - log_det - constant
        return out

    def sample(self, n: int, seed: int) -> Tensor:
        """(n, rows) draws."""
        with seeded(seed, self.mean.device):
            normal = torch.randn(n, *self.factor.shape[:2], dtype=torch.float64)
        drawn = torch.einsum("tij,stj->sti", self.factor, normal.to(self.mean))
        return self.mean + self.tasks.unpad(drawn, dim=1)
