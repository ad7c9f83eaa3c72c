"""The generative program of the three levels, written once for all ready-made models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor

from hbmeta.errors import ProgramError
from hbmeta.files import JSON
from hbmeta.program import Context
from hbmeta.tasks import Tasks

__all__ = ["HierarchicalModel"]


class HierarchicalModel(PyroModule):
    """Base of the ready-made models: θ, then φ_i in plate `task`, then y_ij in plate `point`.

        θ ~ p(θ)               level_one()
        φ_i | θ ~ p(φ | θ)     task_prior(theta), one per task
        y_ij | φ_i, θ, x_ij    likelihood(theta, phi, x), one per point

    A subclass fills in these three, or replaces `forward` where all of them stand in one program
    (`FormulaModel`). Each is written for the cells as they come: in the nested
    layout φ is (tasks, 1, *event) and x (tasks, points, features), in the flat layout φ is
    (rows, *event), gathered by the group index, and x (rows, features), so that φ and x broadcast
    in both. θ has no task dimension. Numbers that a subclass needs are plain floats or buffers,
    so that they follow the dtype and the device of the model.

    A likelihood that depends on the x of the support too (batch statistics do) sets `takes_context`
    to "support" and takes it by a further keyword, `likelihood(theta, phi, x, *, context)`: x
    (tasks, rows, features) and weight (tasks, rows), 0 for rows that do not count. With "rows" the
    context of every batch is the batch itself, also where it is a query. Such a model has the
    nested layout alone.

    Example:
        >>> import torch
        >>> import pyro.distributions as dist
        >>> class Means(HierarchicalModel):
        ...     def level_one(self):
        ...         return {"scale": pyro.sample("scale", dist.HalfNormal(1.0))}
        ...
        ...     def task_prior(self, theta):
        ...         return {"mean": pyro.sample("mean", dist.Normal(0.0, theta["scale"]))}
        ...
        ...     def likelihood(self, theta, phi, x):
        ...         return dist.Normal(phi["mean"], 1.0)
        >>> Means()(torch.zeros(3, 5, 1)).shape
        torch.Size([3, 5])
    """

    takes_context: Literal["support", "rows"] | None = None
    """Whose rows the likelihood is given as `context`; see `hbmeta.program.takes_context`."""

    def level_one(self) -> dict[str, Tensor]:
        """Draw the global sites.

        Returns:
            θ: what the other two levels need, by name.
        """
        raise NotImplementedError

    def task_prior(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Draw the local sites; called inside plate `task`.

        Vectors per task end in `.to_event(1)`. What is computed from them may be recorded with
        `pyro.deterministic(name, value, event_dim=...)`.

        Args:
            theta: what `level_one` returned.
        Returns:
            φ: what the likelihood needs of each task, by name, (*cells of `task`, *event).
        """
        raise NotImplementedError

    def likelihood(
        self, theta: Mapping[str, Tensor], phi: Mapping[str, Tensor], x: Tensor
    ) -> TorchDistribution:
        """The distribution of y at each point.

        Args:
            theta: what `level_one` returned.
            phi: what `task_prior` returned, (tasks, 1, *event) or gathered to (rows, *event).
            x: (tasks, points, features) or (rows, features).
        Returns:
            A distribution of batch shape (tasks, points) or (rows,).
        """
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        task: Tensor | None = None,
        n_tasks: int | None = None,
        context: Context | None = None,
    ) -> Tensor:
        """Run the generative program; site "y" is observed where y is given.

        Args:
            x: (tasks, points, features) nested, (rows, features) flat.
            y: (tasks, points, ...) nested, (rows, ...) flat, in any dtype; None draws it.
            task: (rows,) group index of the flat layout.
            n_tasks: number of tasks of the flat layout.
            context: x and weight of the rows that y is conditioned on, where `takes_context` asks
                for them; x itself by default.
        Returns:
            y as given or drawn.
        Raises:
            ProgramError: only one of `task` and `n_tasks` was given.
        """
        if (task is None) != (n_tasks is None):
            raise ProgramError(
                type(self).__name__,
                needed="both `task` and `n_tasks` (flat layout), or neither (nested layout)",
                found="`n_tasks` alone" if task is None else "`task` alone",
                do="Pass the number of tasks with the group index of each row.",
            )
        # A whole-number y (labels, counts) as numbers: Bernoulli's density takes no integers.
        observed = None if y is None else y.to(x.dtype)
        given: dict[str, Any] = {}
        if self.takes_context is not None:
            given["context"] = (x, torch.ones_like(x[..., 0])) if context is None else context
        theta = self.level_one()
        if task is None:
            with pyro.plate("task", x.shape[0], dim=-2):
                phi = self.task_prior(theta)
                with pyro.plate("point", x.shape[1], dim=-1):
                    return self._draw(theta, phi, x, observed, **given)
        with pyro.plate("task", n_tasks, dim=-1):
            phi = self.task_prior(theta)
        rows = {name: value.index_select(0, task) for name, value in phi.items()}
        with pyro.plate("point", x.shape[0], dim=-1):
            return self._draw(theta, rows, x, observed, **given)

    def _draw(
        self,
        theta: Mapping[str, Tensor],
        phi: Mapping[str, Tensor],
        x: Tensor,
        observed: Tensor | None,
        **given: Any,
    ) -> Tensor:
        y: Tensor = pyro.sample("y", self.likelihood(theta, phi, x, **given), obs=observed)
        return y

    def bind(self, tasks: Tasks) -> Self:
        """A model that knows the columns of x and, where its priors need it, the scale of the data.

        Args:
            tasks: the data that will be fitted.
        Returns:
            A copy, or the model itself where it needs nothing of the data.
        """
        return self

    def coordinates(self) -> dict[str, list[str]]:
        """Names of the entries of vector sites, by site; labels in tables and plots."""
        return {}

    def settings(self) -> dict[str, JSON]:
        """The arguments of the constructor, as JSON can hold them."""
        return {}

    def bound(self) -> dict[str, JSON] | None:
        """What `bind` read from the data, as JSON can hold it; None where it was not called."""
        return None

    def restore(self, bound: Mapping[str, Any]) -> Self:
        """A copy bound as `bound()` says, without data."""
        return self

    def state(self) -> dict[str, JSON]:
        """What `model_from_state` needs to build this model again, as JSON can hold it."""
        return {
            "class": type(self).__name__,
            "settings": self.settings(),
            "bound": self.bound(),
        }
