"""Programs whose points depend on each other given φ: conditioning a function on its support.

Model: y_i | φ_i, θ ~ N(m, K) over all points of a task together (joint layout), of which some are
masked out. With the points of S first and K = L Lᵀ,

    L = [[L_S, 0], [B, L_Q]],    y_Q | y_S ~ N(m_Q + B L_S⁻¹ (y_S − m_S), L_Q L_Qᵀ),

so that the Cholesky factor of S ∪ Q holds the conditional law of Q (Rasmussen and Williams 2006,
eq. 2.19 and A.6); any program's joint density of Q is log p(S ∪ Q | φ) − log p(S | φ).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hbmeta.densities import equal_draws
from hbmeta.errors import ProgramError, UnsupportedModelError
from hbmeta.likelihoods import seeded
from hbmeta.program import Batch
from hbmeta.tasks import Tasks

if TYPE_CHECKING:
    from hbmeta.components import Particles
    from hbmeta.problem import Problem

_NUMBERS = 4_000_000
"""Entries of covariance matrices held at once."""

__all__ = ["Functions", "check_mask", "leave_one_out"]


def check_mask(problem: Problem, tasks: Tasks) -> None:
    """Raises where log p(y | φ) depends on points that the mask takes out.

    Raises:
        ProgramError: it does, or it is not finite.
    """
    batch = problem.batch(tasks[:1])
    theta = problem.theta(batch)
    extra = replace(batch, x=batch.x[:, :1], weight=torch.zeros_like(batch.weight[:, :1]))
    assert batch.y is not None
    values = []
    with torch.no_grad():
        phi = problem.location(theta, batch)
        for shift in (0.0, 1.0):
            other = replace(extra, x=extra.x + shift, y=batch.y[:, :1] + shift)
            values.append(problem.log_likelihood(theta, phi, batch.beside(other)))
        values.append(problem.log_likelihood(theta, phi, batch))
    scale = 1e-6 if problem.dtype == torch.float64 else 1e-3
    spread = max(values).sub(min(values)).abs()
    if not bool(spread <= scale * (1.0 + values[0].abs())):
        raise ProgramError(
            problem.name,
            needed="a log likelihood that does not depend on points with mask False",
            found=f"log likelihoods {', '.join(f'{float(v):.6g}' for v in values)} of the same "
            "data beside a masked point",
            do="Decouple masked points: K ∘ m mᵀ + diag((1 − m) / 2π), and y equal to the mean "
            "there, add nothing to the log density of a MultivariateNormal.",
        )


def _normal(response: Any) -> tuple[Tensor, Tensor]:
    """Mean (..., n) and Cholesky factor (..., n, n) of a joint response."""
    if not isinstance(response, torch.distributions.MultivariateNormal):
        raise UnsupportedModelError(
            "predictions of a function",
            needed="a MultivariateNormal response in the joint layout",
            found=type(response).__name__,
            do="Write the points of a task as one MultivariateNormal.",
        )
    return response.loc, response.scale_tril


def leave_one_out(response: Any, batch: Batch) -> Tensor:
    """(..., tasks, points) log p(y_j | y of the other points of the task) of a joint response.

    With P = K⁻¹ and r = P (y − m): log N(r_j / P_jj; 0, 1 / P_jj) (Sundararajan, Keerthi 2001).
    """
    loc, tril = _normal(response)
    assert batch.y is not None
    residual = torch.where(batch.mask, batch.y - loc, torch.zeros_like(loc))
    identity = torch.eye(tril.shape[-1], dtype=tril.dtype, device=tril.device).expand(tril.shape)
    precision = torch.cholesky_solve(identity, tril)
    variance = 1.0 / precision.diagonal(dim1=-2, dim2=-1)
    error = (precision @ residual.unsqueeze(-1)).squeeze(-1) * variance
    law = torch.distributions.Normal(0.0, variance.sqrt(), validate_args=False)
    found: Tensor = law.log_prob(error)
    return found


class Functions:
    """p(y | S, φ_s, θ_s) at the rows of a query: marginals, and the joint law of each task.

    Args:
        problem: a program of the joint layout.
        particles: draws of (θ, φ), weighted or not.
        support: what the function is conditioned on.
        tasks: the rows to predict; the tasks of `support`.
    """

    def __init__(
        self, problem: Problem, particles: Particles, support: Tasks, tasks: Tasks
    ) -> None:
        self.problem, self.particles, self.tasks = problem, particles, tasks
        self.support, self.query = problem.batch(support), problem.batch(tasks)
        self.n_draws = int(particles.phi.shape[0])
        width = self.support.x.shape[1] + self.query.x.shape[1]
        self._chunk = max(1, _NUMBERS // (tasks.n_tasks * width * width))
        parts = []
        for start, stop in self._chunks():
            loc, tril = self._law(start, stop)
            sd = tril.square().sum(-1).sqrt()
            parts.append(torch.stack([loc, sd])[:, :, self.query.mask])
        self._loc, self._sd = torch.cat(parts, 1).unbind(0)

    def _chunks(self) -> list[tuple[int, int]]:
        starts = range(0, self.n_draws, self._chunk)
        return [(start, min(start + self._chunk, self.n_draws)) for start in starts]

    def _over(self, function: Any, start: int, stop: int) -> Any:
        p = self.particles.part(start, stop, self.problem)
        return function(p.theta, p.drawn, p.phi)

    def _law(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Mean (draws, tasks, points) and Cholesky factor of the query given the support."""
        n = self.support.x.shape[1]
        inputs = replace(self.query, y=None)
        both = replace(self.support, y=None).beside(inputs)

        def response(theta: Any, drawn: bool, phi: Tensor) -> Any:
            return self.problem.particle_response(theta, drawn, phi, both)

        loc, tril = _normal(self._over(response, start, stop))
        y = self.support.y
        assert y is not None
        residual = torch.where(self.support.mask, y - loc[..., :n], torch.zeros_like(y))
        white = torch.linalg.solve_triangular(
            tril[..., :n, :n], residual.unsqueeze(-1), upper=False
        )
        return loc[..., n:] + (tril[..., n:, :n] @ white).squeeze(-1), tril[..., n:, n:]

    def distribution(self, start: int, stop: int) -> Any:
        """The marginal of each row, batch shape (stop − start, rows)."""
        return torch.distributions.Normal(
            self._loc[start:stop], self._sd[start:stop], validate_args=False
        )

    def _log_weights(self) -> Tensor:
        weights = self.particles.log_weights
        if weights is None:
            weights = torch.zeros(self.n_draws, 1, dtype=torch.float64, device=self._loc.device)
        return torch.log_softmax(weights.double(), 0)

    def joint(self, y: Tensor) -> Tensor:
        """(tasks,) log Σ_s w_s p(y_Q | S, φ_s, θ_s), flat y (rows,) in the units of the model."""
        query = replace(self.query, y=self.tasks.pad(y.to(self.query.x.dtype)))
        parts = []
        for start, stop in self._chunks():

            def density(theta: Any, drawn: bool, phi: Tensor) -> Any:
                def one(t: Any, p: Tensor) -> Tensor:
                    return self.problem.log_predictive(t, p, self.support, query)

                return self.problem.over(one, theta, drawn, phi)

            parts.append(self._over(density, start, stop))
        return torch.logsumexp(torch.cat(parts).double() + self._log_weights(), 0)

    def sample(self, n: int, seed: int) -> Tensor:
        """(n, rows) draws of y, joint over the rows of a task."""
        n_tasks, points = self.query.weight.shape
        weights = self._log_weights().expand(self.n_draws, n_tasks)
        chosen = equal_draws(weights, n, seed)
        with seeded(seed + 1, self._loc.device):
            noise = torch.randn(n, n_tasks, points, dtype=torch.float64).to(self._loc)
        out = torch.empty_like(noise)
        for start, stop in self._chunks():
            which, task = ((chosen >= start) & (chosen < stop)).nonzero(as_tuple=True)
            if not len(which):
                continue
            loc, tril = self._law(start, stop)
            draw = chosen[which, task] - start
            moved = (tril[draw, task] @ noise[which, task].unsqueeze(-1)).squeeze(-1)
            out[which, task] = loc[draw, task] + moved
        return out[:, self.query.mask]
