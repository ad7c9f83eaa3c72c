"""Curvatures of the log joint of a task, by name: what Laplace approximations take for −∇²f."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from hbmeta.curvatures.exact import exact
from hbmeta.curvatures.gauss_newton import DENSE, diagonal_gauss_newton, gauss_newton
from hbmeta.curvatures.kronecker import check_kronecker, kronecker
from hbmeta.curvatures.last_layer import free_sites, last_layer
from hbmeta.curvatures.precision import Precision
from hbmeta.curvatures.prior import check_diagonal
from hbmeta.curvatures.response import check_response
from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta

Kind = Literal["exact", "ggn", "kronecker", "diagonal", "last_layer"]

__all__ = ["DENSE", "Kind", "Precision", "check_curvature", "check_kind", "precision_of"]


def check_kind(kind: str, where: str) -> None:
    """Raises where no curvature has this name.

    Raises:
        DataError: names those that there are.
    """
    if kind not in get_args(Kind):
        raise DataError(
            where,
            needed=f"curvature among {', '.join(map(repr, get_args(Kind)))}",
            found=repr(kind),
            do='"exact" is for few parameters per task, "ggn" for networks.',
        )


def check_curvature(
    kind: Kind, problem: Problem, where: str, sites: Sequence[str] | None = None
) -> None:
    """Raises where the program has no such curvature.

    Raises:
        UnsupportedModelError: says why, and which other one to take.
    """
    size = problem.sites.phi_size
    if kind == "exact" and size > DENSE:
        raise UnsupportedModelError(
            where,
            needed=f'at most {DENSE} parameters per task for curvature="exact" (it is dense)',
            found=str(size),
            do='Use curvature="ggn", or "kronecker", "diagonal" or "last_layer" for networks.',
        )
    if kind == "exact":
        return
    check_response(problem, where)
    if kind == "last_layer":
        free_sites(problem, sites, where)
    if kind == "kronecker" or size > DENSE:
        check_diagonal(problem, where)
    if kind == "kronecker":
        check_kronecker(problem, where)


def precision_of(
    kind: Kind,
    problem: Problem,
    theta: Theta,
    phi: Tensor,
    batch: Batch,
    *,
    sites: Sequence[str] | None = None,
    create_graph: bool = False,
) -> Precision:
    """Λ of every task at φ, by the curvature of that name.

    Args:
        kind: its name.
        problem: the program; see `check_curvature`.
        theta: θ.
        phi: the point (tasks, phi_size).
        batch: the rows.
        sites: of "last_layer", by name or prefix; by default those of the network's last layer.
        create_graph: keep the history, to differentiate in φ and θ.
    """
    if kind == "exact":
        return exact(problem, theta, phi, batch, create_graph=create_graph)
    if kind == "ggn":
        return gauss_newton(problem, theta, phi, batch, create_graph=create_graph)
    if kind == "kronecker":
        return kronecker(problem, theta, phi, batch, create_graph=create_graph)
    if kind == "diagonal":
        return diagonal_gauss_newton(problem, theta, phi, batch, create_graph=create_graph)
    names = free_sites(problem, sites, 'curvature="last_layer"')
    return last_layer(problem, theta, phi, batch, names, create_graph=create_graph)
