"""ANIL: MAML that adapts the head alone.

Model and estimator: those of MAML, with the last group of local sites adapted (the last layer of a
network) and the others kept at the location of their prior, which is learned: "almost no inner
loop".
"""

from __future__ import annotations

from dataclasses import dataclass

from hbmeta.inference.gradient_strategy import GradientStrategy
from hbmeta.problem import Problem

__all__ = ["ANIL"]


@dataclass(frozen=True)
class ANIL(GradientStrategy):
    """MAML whose inner loop moves the last sites only: those that share the last one's prefix.

    "layer3.weight" and "layer3.bias" of a network; the last site where names have no dots. `sites`
    says otherwise. A program whose sites all are that group has no body, and ANIL is MAML there.
    Keeps p(y | φ, θ) and, of the sites that stay, the location of the prior. With
    all sites it is MAML; exact where MAML is, as the MAP over the sites that move.

    Args: those of `GradientStrategy`.

    References:
        Raghu, Raghu, Bengio, Vinyals (2020), ICLR.
    """

    def moving(self, problem: Problem) -> tuple[str, ...]:
        """The last group of sites, unless `sites` names others."""
        if self.sites is not None or not problem.sites.locals:
            return super().moving(problem)
        last = problem.sites.locals[-1].name.rpartition(".")[0]
        names = [site.name for site in problem.sites.locals]
        return tuple(n for n in names if n.rpartition(".")[0] == last) if last else (names[-1],)
