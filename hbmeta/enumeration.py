"""Programs that model more than y at a point: p(y | the rest, φ) by enumeration of y.

Model: (y, z) | φ, θ with y a class and z what else the program observes at the point, such as an
embedding of x (a class-conditional model). Given φ,

    p(y = k | z, φ) = p(k, z | φ) / Σ_l p(l, z | φ),

and given a posterior q(φ | S) the point's own z weighs the draws of φ,

    p(y = k | z, S) = Σ_s w_s p(k, z | φ_s) / Σ_s w_s Σ_l p(l, z | φ_s).

Where z given y is Gaussian with a mean linear in φ and q(φ | S) is Gaussian, φ is integrated out in
closed form: z | y = k, S ~ N(m_k, Σ + V_k) with V_k the covariance of the class's mean under q.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical

from hbmeta.densities import Gaussian
from hbmeta.errors import UnsupportedModelError
from hbmeta.likelihoods import evaluating
from hbmeta.program import Batch, Phi, Theta
from hbmeta.tasks import Tasks

if TYPE_CHECKING:
    from hbmeta.components import Particles
    from hbmeta.problem import Problem

__all__ = [
    "Classes",
    "Integrated",
    "class_cells",
    "class_logits",
    "count_classes",
    "integrated",
    "is_linear_gaussian",
]


def no_joint(y: Tensor) -> Tensor:
    """Refuses: labels of several points depend on each other through φ and through all their z.

    In closed form p(y_Q | z_Q, S) needs the sum over every labelling of the points; of draws of φ
    hardly one would carry all the weight that the z of a whole task give.
    """
    raise UnsupportedModelError(
        "Predictive.log_prob",
        needed="a response alone at a point, for the joint probability of the labels of a task",
        found="a joint model of label and embedding with φ uncertain",
        do="Use the probability of each point by itself: joint=False.",
    )


def count_classes(problem: Problem, batch: Batch) -> int | None:
    """Number of values of y to enumerate; None where y is all that a point observes."""
    if problem.layout == "joint" or len(problem.sites.observed) < 2:
        return None
    with torch.no_grad():
        response = problem.response(problem.theta(batch), {}, batch)
    while hasattr(response, "base_dist"):
        response = response.base_dist
    if isinstance(response, Categorical):
        return int(response.logits.shape[-1])
    return 2 if isinstance(response, Bernoulli) else None


def class_cells(
    problem: Problem, theta: Mapping[str, Tensor], phi: Phi | Tensor, batch: Batch
) -> Tensor:
    """(*cells, classes) log p(y = k, z | φ, θ) for every k."""
    assert problem.classes is not None
    by_site = problem.sites.from_vector(phi) if isinstance(phi, Tensor) else phi
    cells = []
    for k in range(problem.classes):
        y = _all(batch, k, problem)
        out = problem.run(theta, by_site, replace(batch, y=y), with_y=True)
        assert out.log_likelihood is not None
        cells.append(out.log_likelihood)
    return torch.stack(cells, -1)


def _all(batch: Batch, k: int, problem: Problem) -> Tensor:
    """y = k at every cell, in the dtype that the program got y in."""
    return torch.full_like(batch.weight, k, dtype=problem.y_dtype)


class Classes:
    """p(y | z, φ_s, θ_s) at flat rows for every draw, and how well a draw explains z.

    Attributes:
        log_evidence: (draws, rows) log p(z | φ_s, θ_s), which weighs the draws of a row.
    """

    def __init__(
        self, problem: Problem, particles: Particles, tasks: Tasks, support: Tasks
    ) -> None:
        self.problem, self.particles = problem, particles
        self.batch = problem.batch(tasks, support)
        self.n_draws = int(particles.phi.shape[0])
        width = max(1, 4_000_000 // max(1, tasks.n_points * (problem.classes or 1)))
        parts = [
            self._logits(start, min(start + width, self.n_draws)).logsumexp(-1)
            for start in range(0, self.n_draws, width)
        ]
        self.log_evidence = torch.cat(parts)

    def _logits(self, start: int, stop: int) -> Tensor:
        p = self.particles.part(start, stop, self.problem)

        def cells(t: Theta, one: Tensor) -> Tensor:
            return class_cells(self.problem, t, one, self.batch)

        found: Tensor = self.problem.over(cells, p.theta, p.drawn, p.phi)
        return found if self.batch.task is not None else found[:, self.batch.mask]

    def distribution(self, start: int, stop: int) -> Any:
        """p(y | z, φ_s) of draws start to stop, batch shape (stop − start, rows)."""
        return _family(self.problem, self._logits(start, stop))


def _family(problem: Problem, logits: Tensor) -> Any:
    observed = {site.name: site.family for site in problem.sites.observed}
    if observed[problem.sites.response] == "Bernoulli":
        return Bernoulli(logits=logits[..., 1] - logits[..., 0], validate_args=False)
    return Categorical(logits=logits, validate_args=False)


class Integrated:
    """One classifier with φ integrated out, at flat rows: logits (rows, classes)."""

    n_draws = 1

    def __init__(self, problem: Problem, logits: Tensor) -> None:
        self.problem, self.logits = problem, logits

    def distribution(self, start: int, stop: int) -> Any:
        """p(y | z, S) of every row, batch shape (1, rows)."""
        return _family(self.problem, self.logits.unsqueeze(0))


def integrated(
    problem: Problem, theta: Theta, density: Gaussian, tasks: Tasks, support: Tasks
) -> Integrated | None:
    """p(y | z, S) in closed form, or None where z given y is not linear-Gaussian in φ."""
    with evaluating():
        batch = problem.batch(tasks, support)
        if not is_linear_gaussian(problem, theta, density, batch):
            return None
        logits = class_logits(problem, theta, density, batch)
    return Integrated(problem, logits if batch.task is not None else logits[batch.mask])


def class_logits(problem: Problem, theta: Theta, density: Gaussian, batch: Batch) -> Tensor:
    """(*cells, classes) log π_k + log N(z; m_k, Σ + V_k), φ integrated out; differentiable."""
    assert problem.classes is not None
    (name,) = (s.name for s in problem.sites.observed if s.name != problem.sites.response)
    one = _first_rows(batch)
    tril = torch.diag_embed(density.scale) if density.diagonal else density.scale
    points = density.loc + torch.cat([torch.zeros_like(tril[:, :, 0])[None], tril.permute(2, 0, 1)])
    found = problem.run(theta, problem.sites.from_vector(density.loc), batch, with_y=True)
    z, prior = found.observed[name][1], _log_prior(found.response)
    index = batch.task
    logits = []
    for k in range(problem.classes):
        y = _all(one, k, problem)

        def law(phi: Tensor, y: Tensor = y) -> tuple[Tensor, Tensor]:
            out = problem.run(theta, problem.sites.from_vector(phi), replace(one, y=y), with_y=True)
            return _moments(out.observed[name][0])

        means, scales = torch.vmap(law)(points)
        if index is None:
            means, scales = means[:, :, 0], scales[:, :, 0]
        columns = means[1:] - means[:1]
        covariance = torch.einsum("jtd,jte->tde", columns, columns)
        covariance = covariance + torch.diag_embed(scales[0].square())
        factor, _ = torch.linalg.cholesky_ex(covariance)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        if index is None:
            white = torch.linalg.solve_triangular(
                factor, (z - means[0].unsqueeze(1)).mT, upper=False
            ).mT
            log_det = log_det.unsqueeze(1)
        else:
            residual = (z - means[0][index]).unsqueeze(-1)
            white = torch.linalg.solve_triangular(factor[index], residual, upper=False).squeeze(-1)
            log_det = log_det[index]
        logits.append(prior[..., k] - 0.5 * white.square().sum(-1) - log_det)
    return torch.stack(logits, -1)


def _first_rows(batch: Batch) -> Batch:
    """One cell of each task; which of them, and its x, does not matter."""
    if batch.task is None:
        y = None if batch.y is None else batch.y[:, :1]
        return replace(batch, x=batch.x[:, :1], y=y, weight=batch.weight[:, :1])
    row = _first_of(batch)
    task = torch.arange(batch.n_tasks, device=batch.x.device)
    y = None if batch.y is None else batch.y[row]
    return Batch(batch.x[row], y, batch.weight[row], task, batch.n_tasks)


def _log_prior(response: Any) -> Tensor:
    """(*cells, classes) log p(y = k)."""
    while hasattr(response, "base_dist"):
        response = response.base_dist
    if isinstance(response, Bernoulli):
        return torch.stack(
            [(-response.logits).sigmoid().log(), response.logits.sigmoid().log()], -1
        )
    return response.logits.log_softmax(-1)  # type: ignore[no-any-return]


def _moments(law: Any) -> tuple[Tensor, Tensor]:
    """Mean and sds (*cells, d) of an independent Normal."""
    shape = law.batch_shape + law.event_shape
    while hasattr(law, "base_dist"):
        law = law.base_dist
    return law.loc.expand(shape), law.scale.expand(shape)


def is_linear_gaussian(problem: Problem, theta: Theta, density: Gaussian, batch: Batch) -> bool:
    """Whether z given y is one vector, Normal with a mean linear in φ and the same at every row.

    Tested, not declared: the mean of z is compared at probes to both sides of φ̂ and at the rows of
    each task, and p(y | φ) and the spread of z must not move with φ.
    """
    others = [s for s in problem.sites.observed if s.name != problem.sites.response]
    if len(others) != 1 or others[0].family != "Normal" or len(others[0].shape) != 1:
        return False
    name = others[0].name
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(density.loc.shape, generator=generator, dtype=torch.float64)
    # At least a standard deviation in every whitened direction.
    noise = noise + noise.sign()
    step = density.draw(noise.to(density.loc)[None])[0] - density.loc
    tolerance = 1e-9 if problem.dtype == torch.float64 else 1e-4
    for k in range(problem.classes or 0):
        known = replace(batch, y=_all(batch, k, problem))
        points = [density.loc + side * step for side in (0.0, 1.0, -1.0, 3.0, -3.0)]
        found = [
            problem.run(theta, problem.sites.from_vector(p), known, with_y=True) for p in points
        ]
        laws = [_moments(out.observed[name][0]) for out in found]
        (m0, s0), (m1, _), _, (m3, s3), _ = laws
        scale = sum(m.abs().max() for m, _ in laws) + 1e-12
        prior = _log_prior(found[0].response)
        same = []
        for side, (m, s), out in zip((-1.0, 3.0, -3.0), laws[2:], found[2:], strict=True):
            same.append((m0 + side * (m1 - m0) - m).abs().max() / scale)
            same.append((s0 - s).abs().max() / s0.abs().max())
            same.append((prior - _log_prior(out.response)).abs().max())
        # The same law at every row of a task: only z itself depends on x.
        first = m3[:, :1] if batch.task is None else m3[_first_of(batch)][batch.task]
        same.append((m3 - first).abs().max() / scale)
        first = s3[:, :1] if batch.task is None else s3[_first_of(batch)][batch.task]
        same.append((s3 - first).abs().max() / s3.abs().max())
        if not bool(torch.stack(same).max() <= tolerance):
            return False
    return True


def _first_of(batch: Batch) -> Tensor:
    """(tasks,) the first row of every task of a flat batch; 0 for a task without rows."""
    assert batch.task is not None
    rows = torch.arange(len(batch.task), device=batch.x.device)
    out = torch.full((batch.n_tasks,), len(rows), dtype=torch.int64, device=batch.x.device)
    return out.scatter_reduce(0, batch.task, rows, "amin").clamp_max(len(rows) - 1)
