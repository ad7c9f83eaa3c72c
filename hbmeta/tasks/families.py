"""What the synthetic families share: tasks as a function of a seed, with the truth behind them."""

from __future__ import annotations

import abc
from typing import Generic, TypeVar

import torch

from hbmeta.tasks.batch import Episode
from hbmeta.tasks.checks import generator
from hbmeta.tasks.ranges import check_n_tasks

__all__ = ["Family"]

Truth = TypeVar("Truth")
"""What made the tasks: tensors with a first axis of tasks."""


class Family(abc.ABC, Generic[Truth]):
    """A source of tasks whose law is known; what its truth is, each family says."""

    def sample(self, n_tasks: int, *, seed: int) -> Episode:
        """Draw tasks; see `sample_with_truth`."""
        return self.sample_with_truth(n_tasks, seed=seed)[0]

    def sample_with_truth(self, n_tasks: int, *, seed: int) -> tuple[Episode, Truth]:
        """Draw tasks and the truth that made them.

        Args:
            n_tasks: number of tasks, at least 1.
            seed: the draw is a function of the seed alone.
        Returns:
            The episode, ids 0..n_tasks-1, and the truth of the family.
        Raises:
            DataError: an impossible number of tasks or seed.
        """
        where = f"{type(self).__name__}.sample"
        check_n_tasks(n_tasks, where=where)
        return self._draw(n_tasks, generator(seed, where=where))

    @abc.abstractmethod
    def _draw(self, n_tasks: int, draw: torch.Generator) -> tuple[Episode, Truth]:
        """Tasks and truth from checked arguments; all that is random comes from the generator."""
