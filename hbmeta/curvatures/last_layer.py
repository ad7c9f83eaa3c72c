"""Gauss–Newton curvature of some sites, those of a network's last layer; the others stay at φ̂."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hbmeta.curvatures.gauss_newton import DENSE
from hbmeta.curvatures.precision import Block, Dense
from hbmeta.curvatures.prior import prior_diagonal, prior_matrix
from hbmeta.curvatures.response import gram, response_rows
from hbmeta.errors import UnsupportedModelError
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta

__all__ = ["entries_of", "free_sites", "last_layer"]


def free_sites(problem: Problem, sites: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """Names of the local sites that have a spread.

    Args:
        problem: the program.
        sites: names, or prefixes of names up to a dot; None for the last layer: the sites that
            share with the last one what stands before the last dot in its name.
        where: for the error.
    Raises:
        UnsupportedModelError: no such sites.
    """
    names = [site.name for site in problem.sites.locals]
    wanted = tuple(sites) if sites is not None else ()
    if sites is None:
        prefix, dot, _ = names[-1].rpartition(".")
        if not dot:
            raise UnsupportedModelError(
                where,
                needed='sites named as the parameters of a network ("layer3.weight"), for '
                'curvature="last_layer"',
                found=f"local sites {', '.join(names)}",
                do="Name the sites that are to have a spread, sites=(...), or take another "
                "curvature.",
            )
        wanted = (prefix,)
    found = tuple(n for n in names if any(n == w or n.startswith(f"{w}.") for w in wanted))
    lost = [w for w in wanted if not any(n == w or n.startswith(f"{w}.") for n in names)]
    if lost or not found:
        raise UnsupportedModelError(
            where,
            needed=f"sites among the task parameters of {problem.name}: {', '.join(names)}",
            found=repr(lost[0]) if lost else "sites=()",
            do="Name a site, or what stands before a dot in its name.",
        )
    return found


def entries_of(problem: Problem, names: Sequence[str]) -> list[int]:
    """Positions in φ of the entries of these sites, in the order of the program."""
    found: list[int] = []
    start = 0
    for site in problem.sites.locals:
        if site.name in names:
            found += range(start, start + site.size)
        start += site.size
    return found


def last_layer(
    problem: Problem,
    theta: Theta,
    phi: Tensor,
    batch: Batch,
    names: Sequence[str],
    *,
    create_graph: bool = False,
) -> Block:
    """Λ of the entries of these sites given all others, (tasks, free, free)."""
    entries = entries_of(problem, names)
    rows = response_rows(problem, theta, phi, batch, columns=entries, create_graph=create_graph)
    if phi.shape[-1] <= DENSE:
        whole = prior_matrix(problem, theta, phi, batch, create_graph=create_graph)
        prior = whole[:, entries][:, :, entries]
    else:
        diagonal = prior_diagonal(problem, theta, phi, batch, create_graph=create_graph)
        prior = torch.diag_embed(diagonal[:, entries])
    return Block(Dense(prior + gram(rows, batch)), torch.tensor(entries, device=phi.device))
