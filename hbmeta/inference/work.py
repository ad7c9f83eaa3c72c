"""What a meta-step of the gradient lens computes, counted for all its tasks at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

__all__ = ["Counted", "Work"]


@dataclass(frozen=True)
class Work:
    """Passes over the loss of the tasks in one meta-step; one pass serves all tasks at once.

    Attributes:
        gradients: of a loss in φ. Those that a product takes on its own way are not counted.
        products: Hessian-vector products.
        graph_kept: whether a product goes back through the graph of a gradient that is counted
            above, and so costs one gradient less than a product by itself.
    """

    gradients: int
    products: int
    graph_kept: bool = False


@runtime_checkable
class Counted(Protocol):
    """What knows its work: a strategy for which it is always the same, or the pieces of one."""

    def work(self) -> Work:
        """Of one meta-step; of pieces whose work depends on the data, of their last."""
        ...
