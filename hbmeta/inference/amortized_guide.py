"""An amortized Gaussian guide: one network maps any support to its posterior.

Model: φ_i ~ p(φ | θ), y_ij ~ p(y | φ_i, θ).
Estimator: q(φ | S) = N(m(S), L(S) L(S)ᵀ) with m and L relative to the task prior N(m₀, P Pᵀ),

    m = m₀ + P a(S),   L = P M(S),   (a, M) = head(mean_j h(x_j, y_j), log(1 + n)),   a = 0, M = I without data;

the network and θ maximise the evidence lower bound E_q[log p(y | φ) + log p(φ | θ) − log q(φ | S)].
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

_FULL_UP_TO = 16

__all__ = ["AmortizedGuide", "SetEncoder"]


class SetEncoder(nn.Module):
    """Permutation-invariant map from a masked set of rows (x, y) to `outputs` numbers per task.

    Rows are standardised by the training rows, passed through a network, and averaged over the rows
    of a task; the head sees the average and log(1 + n). Without rows the output is exactly zero, and
    the head starts at zero.
    """

    location: Tensor
    scale: Tensor

    def __init__(self, location: Tensor, scale: Tensor, hidden: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("location", location)
        self.register_buffer("scale", scale)
        width = location.shape[0]
        self.rows = nn.Sequential(
            nn.Linear(width, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
        )
        self.head = nn.Sequential(
            nn.Linear(hidden + 1, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, outputs),
        )
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, batch: Batch) -> Tensor:
        """(tasks, outputs) for a batch in either layout."""
        y = batch.y if batch.y is not None else batch.x[..., :0]
        y = y.unsqueeze(-1) if y.ndim == batch.weight.ndim else y
        rows = (torch.cat([batch.x, y.to(batch.x.dtype)], -1) - self.location) / self.scale
        encoded = self.rows(rows) * batch.weight.unsqueeze(-1)
        counts = batch.counts
        if batch.task is None:
            total = encoded.sum(-2)
        else:
            total = encoded.new_zeros(batch.n_tasks, encoded.shape[-1]).index_add(
                0, batch.task, encoded
            )
        mean = total / counts.clamp_min(1.0).unsqueeze(-1)
        out = self.head(torch.cat([mean, counts.log1p().unsqueeze(-1)], -1))
        return out * (counts > 0).unsqueeze(-1)


@dataclass(frozen=True)
class AmortizedGuide(Strategy):
    """q(φ | S) = N(m(S), Σ(S)) from a set encoder, generated from the program's local sites.

    Keeps p(y | φ, θ) and p(φ | θ); approximates p(φ | S, θ) by a Gaussian in unconstrained space that
    one network gives for every support. Optimises the negative evidence lower bound: on all rows of
    each task in θ and the network, and on a random subset of them in the network alone, so that the
    guide serves any number of rows while θ is not biased towards fewer. θ is held at a point. The
    gradient of log q leaves the guide's parameters out of its second appearance (Roeder et al.
    2017), which has no noise where q is exact. Exact on linear-Gaussian programs, up to training;
    a task without data gets the prior (its Gaussian expansion, where the prior is no Gaussian).

    Args:
        hidden: width of the encoder.
        covariance: "full", "diagonal", or "auto": full up to 16 parameters per task.
        draws: draws of φ per task and step.
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
        y = tasks.flat_y.unsqueeze(-1) if tasks.flat_y.ndim == 1 else tasks.flat_y
        rows = torch.cat([tasks.flat_x, y.to(tasks.flat_x.dtype)], -1)
        spread = rows.std(0) if rows.shape[0] > 1 else torch.ones_like(rows[0])
        spread = torch.where(spread > 1e-12, spread, torch.ones_like(spread))
        size = problem.sites.phi_size
        outputs = size + (size * (size + 1) // 2 if self._full(problem) else size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = SetEncoder(rows.mean(0), spread, self.hidden, outputs)
        return encoder.to(dtype=tasks.dtype, device=tasks.device)

    def noise(self, problem: Problem, n_tasks: int) -> dict[str, tuple[int, ...]]:
        """Standard normal draws for the bound on all rows and for that on a subset."""
        shape = (self.draws, n_tasks, problem.sites.phi_size)
        return {"all": shape, "subset": shape}

    def posterior(self, problem: Problem, theta: Theta, own: Any, support: Batch) -> Gaussian:
        """The guide at this support."""
        size = problem.sites.phi_size
        full = self._full(problem)
        start = problem.location(theta, support)

        def log_prior(phi: Tensor) -> Tensor:
            return problem.log_task_prior(theta, phi, support)

        out = own(support)
        shift, free = out[..., :size], out[..., size:]
        if not full:
            sd = _diagonal_scale(log_prior, start)
            return Gaussian(start + sd * shift, sd * free.clamp(-12.0, 12.0).exp())
        tril = _full_scale(log_prior, start)
        rows, columns = torch.tril_indices(size, size)
        # exp on the diagonal as values, not in place: the graph must stay functional.
        free = torch.where((rows == columns).to(free.device), free.clamp(-12.0, 12.0).exp(), free)
        flat = free.new_zeros(*free.shape[:-1], size * size)
        index = (rows * size + columns).to(free.device)
        change = flat.index_add(-1, index, free).reshape(*free.shape[:-1], size, size)
        loc = start + (tril @ shift.unsqueeze(-1)).squeeze(-1)
        return Gaussian(loc, tril @ change)

    def loss(
        self,
        problem: Problem,
        theta: Theta,
        own: Any,
        support: Batch,
        query: Batch,
        noise: Mapping[str, Tensor],
    ) -> Tensor:
        """(tasks,) minus the bound on all rows (query), and on the subset (support) at θ held still."""
        held = {name: value.detach() for name, value in theta.items()}
        whole = self._bound(problem, theta, own, query, noise["all"])
        part = self._bound(problem, held, own, support, noise["subset"])
        return -(whole + part)

    def _bound(
        self, problem: Problem, theta: Theta, own: Any, rows: Batch, noise: Tensor
    ) -> Tensor:
        density = self.posterior(problem, theta, own, rows)
        phi = density.draw(noise)

        def log_joint(one: Tensor) -> Tensor:
            likelihood, local, _ = problem.terms(theta, one, rows)
            return likelihood + local

        values = log_joint(phi[0]).unsqueeze(0) if phi.shape[0] == 1 else torch.vmap(log_joint)(phi)
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


def _full_scale(log_prior: Any, start: Tensor) -> Tensor:
    """P with P Pᵀ the inverse curvature of the task prior; the identity where that is not positive."""
    _, _, hessian = gradient_and_hessian(log_prior, start, create_graph=True)
    identity = torch.eye(start.shape[-1], dtype=start.dtype, device=start.device).expand(
        hessian.shape
    )
    factor, failed = torch.linalg.cholesky_ex(-hessian)
    safe = torch.where((failed == 0)[..., None, None], factor, identity)
    # −H = F Fᵀ, so F⁻ᵀ is a square root of the covariance. It is upper-triangular; a lower one keeps
    # the guide's L triangular, and comes from one more Cholesky.
    covariance = torch.cholesky_solve(identity, safe)
    return torch.linalg.cholesky_ex(covariance)[0]
