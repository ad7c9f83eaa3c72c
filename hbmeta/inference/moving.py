"""Which local sites an inner loop moves; the others stay at the location of the task prior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.problem import Problem

__all__ = ["moving_sites", "site_names"]


def site_names(sites: Any, where: str) -> tuple[str, ...]:
    """Names as a tuple: a name stands for itself, and files give lists for tuples.

    Raises:
        DataError: they are no names.
    """
    names = (sites,) if isinstance(sites, str) else sites
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise DataError(
            where,
            needed="sites as a name or a tuple of names",
            found=repr(sites),
            do='Pass for example sites=("layer3",), or leave it out to move all sites.',
        )
    return tuple(names)


def moving_sites(problem: Problem, sites: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """Names of local sites, in the order of the program.

    Args:
        problem: the program.
        sites: names, or prefixes of names up to a dot ("layer3" for "layer3.weight" and
            "layer3.bias"); None for all.
        where: for the error.
    Raises:
        UnsupportedModelError: a name that no local site has, or none at all.
    """
    names = tuple(site.name for site in problem.sites.locals)
    if sites is None:
        return names
    for wanted in sites:
        if not any(name == wanted or name.startswith(f"{wanted}.") for name in names):
            raise UnsupportedModelError(
                where,
                needed=f"sites among the task parameters of {problem.name}: {', '.join(names)}",
                found=repr(wanted),
                do="Name a site, or what stands before a dot in its name.",
            )
    if not sites:
        raise UnsupportedModelError(
            where,
            needed="at least one site that moves",
            found="sites=()",
            do="Leave sites out to move all of them.",
        )
    return tuple(
        name for name in names if any(name == w or name.startswith(f"{w}.") for w in sites)
    )
