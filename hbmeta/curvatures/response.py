"""What each observation says about φ: rows whose Gram matrix is the Gauss–Newton curvature.

With η_c(φ) the parameters of the distribution at cell c, R_cᵀ R_c = F(η_c) the information about
them (`curvatures.information`) and J_c = ∂η_c/∂φ, a task has the rows R_c J_c, and

    G_i = Σ_c J_cᵀ F(η_c) J_c = Σ_c (R_c J_c)ᵀ (R_c J_c).

G_i is the Hessian of −log p(S_i | φ) where η is linear in φ and natural (a logit, a log rate, a
mean of given variance), its expectation over y given φ always, and never negative. Rows come by one
backward pass each, or column by column where a task has more rows than φ has entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hbmeta.curvatures.information import observations
from hbmeta.errors import UnsupportedModelError
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta

__all__ = ["check_response", "gram", "log_rest", "response_rows"]


def response_rows(
    problem: Problem,
    theta: Theta,
    phi: Tensor,
    batch: Batch,
    *,
    columns: Sequence[int] | None = None,
    create_graph: bool = False,
) -> Tensor:
    """R_c J_c of every cell, 0 where the cell does not count.

    Args:
        problem: the program, in the nested or the flat layout.
        theta: θ.
        phi: the point (tasks, phi_size).
        batch: the rows.
        columns: entries of φ that are wanted; None for all.
        create_graph: keep the history, to differentiate the result in φ and θ.
    Returns:
        (tasks, points · rows, columns) nested, (rows, rows per cell, columns) flat.
    """
    phi = phi if phi.requires_grad else phi.detach().requires_grad_()
    wanted = range(phi.shape[-1]) if columns is None else columns
    found = []
    with torch.enable_grad():
        for parameters, root in _observed(problem, theta, phi, batch):
            n_rows = root.shape[-2]
            by_row = batch.task is None and parameters.shape[1] * n_rows < len(wanted)
            take = _by_row if by_row else _by_column
            found.append(take(parameters, root, phi, wanted, create_graph))
        cells = batch.weight.shape
        if not found:
            found.append(phi.new_zeros(*cells, 1, len(wanted)))
        rows = torch.cat(found, -2)
        on = batch.mask.reshape(*cells, 1, 1)
        rows = torch.where(on, rows, torch.zeros_like(rows))
    if batch.task is None:
        rows = rows.flatten(1, 2)
    return rows if create_graph else rows.detach()


def gram(rows: Tensor, batch: Batch) -> Tensor:
    """G (tasks, size, size) from the rows of `response_rows`."""
    if batch.task is None:
        return rows.mT @ rows
    # Column by column: all products of all rows at once would take rows × size².
    parts = [
        rows.new_zeros(batch.n_tasks, rows.shape[-1]).index_add(
            0, batch.task, (rows[..., j : j + 1] * rows).sum(-2)
        )
        for j in range(rows.shape[-1])
    ]
    return torch.stack(parts, -2)


def log_rest(problem: Problem, theta: Theta, phi: Tensor, batch: Batch) -> Tensor:
    """(tasks,) log p(φ | θ) and factors of the task: all of the log joint but the observations."""
    out = problem.run(theta, problem.sites.from_vector(phi), batch, with_y=True)
    total = out.log_local
    if out.log_factor is not None:
        total = out.log_factor if total is None else total + out.log_factor
    return phi.new_zeros(batch.n_tasks) if total is None else total


def check_response(problem: Problem, where: str) -> None:
    """Raises where the observations do not make up log p(S | φ).

    Raises:
        UnsupportedModelError: points that depend on each other given φ, observations that are
            weighted or masked by the program itself.
    """
    if problem.layout == "joint":
        raise UnsupportedModelError(
            where,
            needed="points that are independent given φ, for a Gauss–Newton curvature",
            found="the joint layout",
            do='Use curvature="exact".',
        )
    batch = problem.one_row()
    theta = {name: value.detach() for name, value in problem.theta(batch).items()}
    with torch.no_grad():
        start = problem.location(theta, batch)
        out = problem.run(theta, problem.sites.from_vector(start), batch, with_y=True)
        assert out.log_likelihood is not None
        pairs = [(out.response, _value(batch)), *out.observed.values()]
        total = sum(fn.log_prob(value) for fn, value in pairs)
    if not torch.allclose(total, out.log_likelihood, rtol=1e-6, atol=1e-9):
        raise UnsupportedModelError(
            where,
            needed="observations that enter with weight 1, for a Gauss–Newton curvature",
            found=f"a scaled or masked one in {problem.name} (poutine.scale, poutine.mask)",
            do='Use curvature="exact".',
        )


def _value(batch: Batch) -> Tensor:
    assert batch.y is not None
    y = batch.y
    return y if y.is_floating_point() else y.to(batch.x.dtype)


def _observed(
    problem: Problem, theta: Theta, phi: Tensor, batch: Batch
) -> list[tuple[Tensor, Tensor]]:
    """η and R of each observed site whose distribution depends on φ."""
    out = problem.run(theta, problem.sites.from_vector(phi), batch, with_y=True)
    found = []

    def depends(tensor: Tensor) -> bool:
        if not tensor.requires_grad:
            return False
        (gradient,) = torch.autograd.grad(tensor.sum(), phi, retain_graph=True, allow_unused=True)
        return gradient is not None

    pairs: list[tuple[Any, Tensor]] = [(out.response, _value(batch)), *out.observed.values()]
    for distribution, value in pairs:
        one = observations(distribution, value, depends)
        if one is not None:
            found.append((one.parameters, one.root))
    return found


def _by_row(
    parameters: Tensor, root: Tensor, phi: Tensor, wanted: Sequence[int], create_graph: bool
) -> Tensor:
    """(tasks, points, rows, columns): one backward pass for each point and row."""
    points = []
    whole = len(wanted) == phi.shape[-1]
    for p in range(parameters.shape[1]):
        each = []
        for row in range(root.shape[-2]):
            (found,) = torch.autograd.grad(
                parameters[:, p], phi, root[:, p, row], create_graph=create_graph, retain_graph=True
            )
            each.append(found if whole else found[:, list(wanted)])
        points.append(torch.stack(each, 1))
    return torch.stack(points, 1)


def _by_column(
    parameters: Tensor, root: Tensor, phi: Tensor, wanted: Sequence[int], create_graph: bool
) -> Tensor:
    """(*cells, rows, columns): Jᵀu is linear in u, so that its gradient in u is a column of J."""
    u = torch.zeros_like(parameters, requires_grad=True)
    (pulled,) = torch.autograd.grad(parameters, phi, u, create_graph=True, retain_graph=True)
    columns = []
    for j in wanted:
        (column,) = torch.autograd.grad(
            pulled[:, j].sum(), u, create_graph=create_graph, retain_graph=True, allow_unused=True
        )
        columns.append(torch.zeros_like(parameters) if column is None else column)
    return root @ torch.stack(columns, -1)
