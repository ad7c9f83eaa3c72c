"""An amortized Gaussian guide: one network maps any support to its posterior.

Model: φ_i ~ p(φ | θ), y_ij ~ p(y | φ_i, θ).
Estimator: with N(m₀, P Pᵀ) the Gaussian expansion of the task prior, q(φ | S) = N(m, L Lᵀ) in the
whitened space u = P⁻¹(φ − m₀) collects one Gaussian factor per row, as Bayes' rule does,

    Λ = I + Σ_j r_j r_jᵀ,   η = Σ_j e_j,   (e_j, r_j) = network(x_j, y_j, c),
    c = mean_j h(x_j, y_j), log(1 + n),
    m = m₀ + P (Λ⁻¹ η + a(c)),   L = P chol(Λ⁻¹) diag(exp b(c)),

so that no rows give the prior and n rows contract like n rows. Networks and θ maximise the evidence
lower bound E_q[log p(y | φ) + log p(φ | θ) − log q(φ | S)].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hbmeta.curvature import gradient_and_hessian
from hbmeta.densities import Gaussian
from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.feeding import Needs
from hbmeta.inference.strategy import Strategy
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.tasks import Tasks
from hbmeta.triangular import covariance_factor

_FULL_UP_TO = 16
_FACTORS_UP_TO = 64
_PRODUCTS_UP_TO = 8

__all__ = ["AmortizedGuide", "SetEncoder"]


class SetEncoder(nn.Module):
    """Permutation-invariant map from a masked set of rows (x, y) to a Gaussian in whitened space.

    A row is standardised by the training rows and joined by the products of its entries (up to
    width 8): sums of those are the sufficient statistics of a linear-Gaussian task. Where φ has
    more than 64 entries there are no factors per row, only the summary's a and b.

    Args:
        location: (width,) mean of the training rows (x, y).
        scale: (width,) their standard deviations.
        hidden: width of the networks.
        size: entries of φ.
    """

    location: Tensor
    scale: Tensor

    def __init__(self, location: Tensor, scale: Tensor, hidden: int, size: int) -> None:
        super().__init__()
        self.register_buffer("location", location)
        self.register_buffer("scale", scale)
        width = location.shape[0]
        self.products = width <= _PRODUCTS_UP_TO
        features = width + (width * (width + 1) // 2 if self.products else 0)
        self.size, self.by_row = size, size <= _FACTORS_UP_TO
        self.summary = nn.Sequential(
            nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()
        )
        context = hidden + features + 1
        self.whole = nn.Sequential(
            nn.Linear(context, hidden), nn.SiLU(), nn.Linear(hidden, 2 * size)
        )
        _start_at(self.whole[-1], 0.0)
        if self.by_row:
            self.context = nn.Linear(context, hidden)
            self.row = nn.Linear(features, hidden)
            self.factor = nn.Linear(hidden, 2 * size)
            self.skip = nn.Linear(features, 2 * size)
            # Factors r start small but not at zero, where r rᵀ has no gradient.
            _start_at(self.factor, 0.1)
            _start_at(self.skip, 0.1)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """η (tasks, size), Σ_j r_j r_jᵀ (tasks, size, size) or None, a and b (tasks, size)."""
        rows = self._features(batch)
        counts = batch.counts.unsqueeze(-1)
        mean = self._sum(torch.cat([self.summary(rows), rows], -1), batch) / counts.clamp_min(1.0)
        context = torch.cat([mean, counts.log1p()], -1)
        shift, log_scale = (self.whole(context) * (counts > 0)).chunk(2, -1)
        if not self.by_row:
            return torch.zeros_like(shift), None, shift, log_scale
        inner = self.context(context)
        inner = inner.unsqueeze(-2) if batch.task is None else inner[batch.task]
        out = self.factor(nn.functional.silu(self.row(rows) + inner)) + self.skip(rows)
        eta, root = out.chunk(2, -1)
        squares = root.unsqueeze(-1) * root.unsqueeze(-2)
        total = self._sum(squares.flatten(-2), batch).unflatten(-1, (self.size, self.size))
        return self._sum(eta, batch), total, shift, log_scale

    def _features(self, batch: Batch) -> Tensor:
        y = batch.y if batch.y is not None else batch.x[..., :0]
        y = y.unsqueeze(-1) if y.ndim == batch.weight.ndim else y
        rows = (torch.cat([batch.x, y.to(batch.x.dtype)], -1) - self.location) / self.scale
        if not self.products:
            return rows
        first, second = torch.triu_indices(rows.shape[-1], rows.shape[-1], device=rows.device)
        return torch.cat([rows, rows[..., first] * rows[..., second]], -1)

    def _sum(self, rows: Tensor, batch: Batch) -> Tensor:
        weighted = rows * batch.weight.unsqueeze(-1)
        if batch.task is None:
            return weighted.sum(-2)
        empty = weighted.new_zeros(batch.n_tasks, weighted.shape[-1])
        return empty.index_add(0, batch.task, weighted)


def _start_at(layer: nn.Module, factor: float) -> None:
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.mul_(factor)
        layer.bias.mul_(factor)


@dataclass(frozen=True)
class AmortizedGuide(Strategy):
    """q(φ | S) = N(m(S), Σ(S)) from a set encoder, generated from the program's local sites.

    Keeps p(y | φ, θ) and p(φ | θ); approximates p(φ | S, θ) by a Gaussian in unconstrained space
    that one network gives for every support. Optimises the negative evidence lower bound: on all
    rows of each task in θ and the network, and on a random subset of them in the network alone, so
    that the guide serves any number of rows while θ is not biased towards fewer. θ is held at a
    point. The gradient of log q leaves the guide's parameters out of its second appearance (Roeder
    et al. 2017), which has no noise where q is exact. Exact on linear-Gaussian programs, up to
    training; a task without data gets the prior (its Gaussian expansion, where the prior is no
    Gaussian).

    Args:
        hidden: width of the encoder.
        covariance: "full", "diagonal", or "auto": full up to 16 parameters per task.
        draws: draws of φ per task and step, in pairs of opposite sign (rounded up).
    References:
        Kingma, Welling (2014), ICLR; Zaheer et al. (2017), NeurIPS, for the encoder.
    """

    needs: ClassVar[Needs] = "subset"

    hidden: int = 64
    covariance: Literal["auto", "full", "diagonal"] = "auto"
    draws: int = 4

    def __post_init__(self) -> None:
        if self.covariance not in ("auto", "full", "diagonal") or self.hidden < 1 or self.draws < 1:
            raise DataError(
                "AmortizedGuide",
                needed="covariance 'auto', 'full' or 'diagonal', and hidden and draws of 1 or more",
                found=f"covariance={self.covariance!r}, hidden={self.hidden}, draws={self.draws}",
                do="The defaults serve most programs.",
            )

    def _full(self, problem: Problem) -> bool:
        size = problem.sites.phi_size
        if self.covariance == "full" and size > 64:
            raise UnsupportedModelError(
                "AmortizedGuide",
                needed="at most 64 parameters per task for covariance='full'",
                found=str(size),
                do="Use covariance='diagonal'.",
            )
        return self.covariance == "full" or (self.covariance == "auto" and size <= _FULL_UP_TO)

    def parameters(self, problem: Problem, tasks: Tasks, seed: int) -> SetEncoder:
        """The encoder, initialised with `seed`, standardising rows by those of `tasks`."""
        assert tasks.flat_y is not None
        if self._full(problem):
            # Asked here once: the answer must not be computed inside a traced graph.
            _ = problem.diagonal_prior
        y = tasks.flat_y.unsqueeze(-1) if tasks.flat_y.ndim == 1 else tasks.flat_y
        rows = torch.cat([tasks.flat_x, y.to(tasks.flat_x.dtype)], -1)
        spread = rows.std(0) if rows.shape[0] > 1 else torch.ones_like(rows[0])
        spread = torch.where(spread > 1e-12, spread, torch.ones_like(spread))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = SetEncoder(rows.mean(0), spread, self.hidden, problem.sites.phi_size)
        return encoder.to(dtype=tasks.dtype, device=tasks.device)

    def noise(self, problem: Problem, n_tasks: int) -> dict[str, tuple[int, ...]]:
        """Standard normal draws for the bound on all rows and for that on a subset."""
        shape = ((self.draws + 1) // 2, n_tasks, problem.sites.phi_size)
        return {"all": shape, "subset": shape}

    def posterior(self, problem: Problem, theta: Theta, own: Any, support: Batch) -> Gaussian:
        """The guide at this support."""
        start = problem.location(theta, support)

        def log_prior(phi: Tensor) -> Tensor:
            return problem.log_task_prior(theta, phi, support)

        eta, factors, shift, log_scale = own(support)
        log_scale = log_scale.clamp(-12.0, 12.0)
        if not self._full(problem):
            sd = _diagonal_scale(log_prior, start)
            precision = torch.ones_like(sd)
            if factors is not None:
                precision = precision + factors.diagonal(dim1=-2, dim2=-1)
            loc = start + sd * (eta / precision + shift)
            return Gaussian(loc, sd * log_scale.exp() * precision.rsqrt())
        identity = torch.eye(start.shape[-1], dtype=start.dtype, device=start.device)
        root = covariance_factor(identity + factors)
        centre = (root @ (root.mT @ eta.unsqueeze(-1))).squeeze(-1) + shift
        tril = _full_scale(log_prior, start, problem.diagonal_prior)
        loc = start + (tril @ centre.unsqueeze(-1)).squeeze(-1)
        return Gaussian(loc, tril @ root * log_scale.exp().unsqueeze(-2))

    def loss(
        self,
        problem: Problem,
        theta: Theta,
        own: Any,
        support: Batch,
        query: Batch,
        noise: Mapping[str, Tensor],
    ) -> Tensor:
        """(tasks,) minus the bounds on all rows (query) and, θ held, on the subset (support)."""
        held = {name: value.detach() for name, value in theta.items()}
        whole = self._bound(problem, theta, own, query, noise["all"])
        # The support is part of the query's cells: with the same x and y, the encoding is shared.
        inside = Batch(query.x, query.y, support.weight, query.task, query.n_tasks)
        part = self._bound(problem, held, own, inside, noise["subset"])
        return -(whole + part)

    def _bound(
        self, problem: Problem, theta: Theta, own: Any, rows: Batch, noise: Tensor
    ) -> Tensor:
        density = self.posterior(problem, theta, own, rows)
        # ε and −ε: what is odd in ε, most of the noise of a gradient, cancels.
        phi = density.draw(torch.cat([noise, -noise]))

        def log_joint(one: Tensor) -> Tensor:
            likelihood, local, _ = problem.terms(theta, one, rows)
            return likelihood + local

        values = torch.vmap(log_joint)(phi)
        return (values - density.detach().log_prob(phi)).mean(0)


def _diagonal_scale(log_prior: Any, start: Tensor) -> Tensor:
    """1/√(−∂²/∂φ²) of the task prior; exact sds where its sites are independent."""
    phi = start if start.requires_grad else start.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(log_prior(phi).sum(), phi, create_graph=True)
        if not gradient.requires_grad:
            return torch.ones_like(start)
        (row,) = torch.autograd.grad(gradient.sum(), phi, create_graph=True, allow_unused=True)
    if row is None:
        return torch.ones_like(start)
    return torch.where(row < -1e-12, (-row).clamp_min(1e-12), torch.ones_like(row)).rsqrt()


def _full_scale(log_prior: Any, start: Tensor, diagonal: bool) -> Tensor:
    """Lower-triangular P with P Pᵀ the inverse curvature of the task prior at its location."""
    if diagonal:
        return torch.diag_embed(_diagonal_scale(log_prior, start))
    _, _, hessian = gradient_and_hessian(log_prior, start, create_graph=True)
    return covariance_factor(-hessian)
