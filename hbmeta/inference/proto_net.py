"""Prototypical networks: the conjugate Gaussian over the class means of a task.

Model: c_ik ~ N(0, τ² I) or flat, y ~ Categorical(π), f(x) | y = k ~ N(c_ik, σ² I); any program
whose log joint of a support is a quadratic in φ with a diagonal curvature Λ.
Estimator: one Newton step from anywhere is exact,

    q(c_k | S) = N(m_k, v_k I),  1/v_k = 1/τ² + N_k/σ²,  m_k = v_k Σ_{y_j = k} f(x_j) / σ²,

(flat prior: the mean of the class, v_k = σ²/N_k), and θ, the embedding, minimises −log p(y | x, S)
of the query, y enumerated: plug-in, softmax_k(log π_k − ‖f(x) − m_k‖²/2σ²); else φ integrated out,
N(f(x); m_k, (σ² + v_k) I) in place of N(f(x); m_k, σ² I).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbmeta.curvature import log_joint
from hbmeta.densities import Delta, Gaussian
from hbmeta.enumeration import class_cells, class_logits, is_linear_gaussian
from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.inference.strategy import Strategy
from hbmeta.posterior import TaskPosterior
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.tasks import Tasks

__all__ = ["ProtoNet"]


@dataclass(frozen=True)
class ProtoNet(Strategy):
    """q(φ | S) of class means in closed form, plugged in or integrated out.

    Keeps p(y, f(x) | φ) and p(φ | θ). With `plug_in` q is a point, the published rule at σ² = ½
    under a flat prior; without it the Gaussian posterior, whose predictive has variance
    σ²(1 + 1/N_k) under a flat prior. With equal numbers of shots and a flat prior the two differ
    by a temperature alone; classes of few shots are spread out more, which plain prototypes ignore.
    Exact given θ (the Gaussian form); optimises the query's cross-entropy, not the likelihood of
    the embedding. Under a flat prior a class that a random split leaves without a support point has
    no posterior: in training it has probability 0 for the other points of its task, and its own
    points are left out.

    Args:
        plug_in: use the posterior mean as if it were known.
    Raises:
        UnsupportedModelError: the program is no class-conditional Gaussian model.
        DataError: under a flat prior, a class without a support point.
    References:
        Snell, Swersky, Zemel (2017), NeurIPS, eq. 1–2. Conjugate posterior: Murphy (2012), §4.6.1.
    """

    plug_in: bool = True

    def adaptable(self) -> tuple[str, ...]:
        """All settings."""
        return tuple(self.settings())

    def check(self, problem: Problem) -> None:
        """A class-conditional program, quadratic in φ with a diagonal curvature."""
        if problem.classes is None:
            raise UnsupportedModelError(
                self.name,
                needed="a joint model of label and embedding (models.ClassConditional): two "
                "observed sites per point, one of them the label y",
                found=f"observed sites {[s.name for s in problem.sites.observed]}",
                do="Use MAML, AmortizedGuide or NUTS for this program.",
            )
        theta, batch = problem.theta(problem.one_row()), problem.one_row()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            start = problem.location(theta, batch)
        noise = torch.randn((2, *start.shape), generator=generator, dtype=torch.float64).to(start)

        def gradient(phi: Tensor) -> Tensor:
            phi = phi.detach().requires_grad_()
            with torch.enable_grad():
                return torch.autograd.grad(log_joint(problem, theta, phi, batch).sum(), phi)[0]

        # With a constant diagonal curvature, g(φ + v) − g(φ) = diag(H) v for every v.
        at_start = gradient(start)
        diagonal = gradient(start + 1.0) - at_start
        errors = [(gradient(start + v) - at_start - diagonal * v).abs().max() for v in noise]
        limit = 1e-6 if start.dtype == torch.float64 else 1e-2
        if not float(torch.stack(errors).max()) <= limit * float(1.0 + diagonal.abs().max()):
            families = ", ".join(f"{s.name} {s.family}" for s in problem.sites.observed)
            raise UnsupportedModelError(
                self.name,
                needed="a log joint that is quadratic in φ with a diagonal curvature: Gaussian "
                "classes with independent coordinates around their means",
                found=f"another one (observed: {families})",
                do="Use MAML, AmortizedGuide or NUTS for this program.",
            )
        if not self.plug_in:
            self._check_integral(problem, theta, start)

    def _check_integral(self, problem: Problem, theta: Theta, phi: Tensor) -> None:
        """φ can be integrated out of p(f(x) | y, φ): the same Normal at two rows of a task."""
        x, y = (problem.one_row().x.reshape(1, -1), torch.zeros(2, dtype=problem.y_dtype))
        task = torch.zeros(2, dtype=torch.int64, device=x.device)
        rows = problem.batch(Tasks.from_flat(torch.cat([x, x + 1.0]), y.to(x.device), task, 1))
        with torch.no_grad():
            density = Gaussian(phi, torch.ones_like(phi))
            integrable = is_linear_gaussian(problem, theta, density, rows)
        if not integrable:
            observed = ", ".join(f"{s.name} {s.family} {s.shape}" for s in problem.sites.observed)
            raise UnsupportedModelError(
                self.name,
                needed="one vector f(x) per point, Normal with independent coordinates around a "
                "mean that depends on y and φ alone, to integrate φ out",
                found=f"another one (observed: {observed})",
                do="Use plug_in=True, or ExactLinear where nothing is learned.",
            )

    def adapt(self, fitted: Any, support: Tasks, seed: int) -> TaskPosterior:
        """The conjugate posterior of new tasks.

        Raises:
            DataError: under a flat prior, a class without a support point; names the task.
        """
        problem: Problem = fitted.problem
        batch = problem.batch(support)
        with torch.no_grad():
            mean, precision = _conjugate(problem, fitted.theta, batch)
        undefined = (precision <= 0).any(-1)
        if bool(undefined.any()):
            raise DataError(
                f"{self.name}.adapt",
                needed="a support point of every class, under a flat prior of the class means",
                found=f"none of some class in task {support.ids[int(undefined.nonzero()[0])]!r}",
                do="Give the model a prior_scale, or a support with every class.",
            )
        density = Delta(mean) if self.plug_in else Gaussian(mean, precision.rsqrt())
        return TaskPosterior(problem, fitted.theta, density, support, units=fitted.units)

    def posterior(
        self, problem: Problem, theta: Theta, own: Any, support: Batch
    ) -> Delta | Gaussian:
        """The conjugate posterior; a class without a prior and without points gets a wide one."""
        return self._density(*_conjugate(problem, theta, support))

    def loss(
        self,
        problem: Problem,
        theta: Theta,
        own: Any,
        support: Batch,
        query: Batch,
        noise: Mapping[str, Tensor],
    ) -> Tensor:
        """(tasks,) −log p(y | x, S) per query point of a class that has a posterior."""
        mean, precision = _conjugate(problem, theta, support)
        density = self._density(mean, precision)
        query = problem.given(query, support)
        if isinstance(density, Delta):
            logits = class_cells(problem, theta, density.loc, query)
        else:
            logits = class_logits(problem, theta, density, query)
        unknown = ((precision <= 0).unsqueeze(1) & _entries(problem, theta, support)).any(-1)
        unknown = unknown.unsqueeze(1) if query.task is None else unknown[query.task]
        # Not −∞, of which a task without any support would make NaN; exp of it is 0 as well.
        log_p = logits.masked_fill(unknown, torch.finfo(logits.dtype).min).log_softmax(-1)
        assert query.y is not None
        classes = torch.arange(logits.shape[-1], device=logits.device)
        chosen = (query.y.unsqueeze(-1) == classes) & query.mask.unsqueeze(-1) & ~unknown
        total = query.per_task(torch.where(chosen, log_p, torch.zeros_like(log_p)).sum(-1))
        counted = query.per_task(chosen.any(-1).to(log_p.dtype))
        return -total / counted.clamp_min(1.0)

    def _density(self, mean: Tensor, precision: Tensor) -> Delta | Gaussian:
        return Delta(mean) if self.plug_in else Gaussian(mean, precision.clamp_min(1e-6).rsqrt())


def _conjugate(problem: Problem, theta: Theta, support: Batch) -> tuple[Tensor, Tensor]:
    """Mean and diagonal precision (tasks, phi_size), differentiable in θ."""
    start = problem.location(theta, support).detach().requires_grad_()
    with torch.enable_grad():
        value = log_joint(problem, theta, start, support)
        (gradient,) = torch.autograd.grad(value.sum(), start, create_graph=True)
        # A diagonal Hessian times ones is its diagonal.
        (row,) = torch.autograd.grad(gradient.sum(), start, create_graph=True)
    precision = -row
    step = torch.where(precision > 0, gradient / precision.clamp_min(1e-12), 0.0)
    return start.detach() + step, precision


def _entries(problem: Problem, theta: Theta, support: Batch) -> Tensor:
    """(classes, phi_size) whether a point of class k says anything of entry j of φ.

    Found from the curvature that one row has as a point of every class, each a task of its own.
    """
    assert problem.classes is not None
    n = problem.classes
    with torch.no_grad():
        phi = problem.location(theta, support)[:1].expand(n, -1)
    labels = torch.arange(n, device=phi.device)
    if support.task is None:
        x, y = support.x[:1, :1].expand(n, -1, -1), labels.unsqueeze(-1)
        rows = Batch(x, y.to(problem.y_dtype), torch.ones_like(x[..., 0]), None, n)
    else:
        x = support.x[:1].expand(n, -1)
        rows = Batch(x, labels.to(problem.y_dtype), torch.ones_like(x[..., 0]), labels, n)
    phi = phi.detach().requires_grad_()
    held = {name: value.detach() for name, value in theta.items()}
    with torch.enable_grad():
        value = problem.log_likelihood(held, phi, rows)
        (gradient,) = torch.autograd.grad(value.sum(), phi, create_graph=True)
        (row,) = torch.autograd.grad(gradient.sum(), phi)
    return row < 0
