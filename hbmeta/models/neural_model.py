"""The base of models whose φ is a network, without what y is given its outputs.

    φ_i = all weights of f, one local site per tensor,  φ_i ~ N(θ, s²) or N(0, s² / fan-in)

Outputs are f_φi(x_ij), or with batch norm f_φi(x_ij; x_S), S the rows that its statistics are from.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from hbmeta.errors import DataError, ProgramError
from hbmeta.files import JSON
from hbmeta.models.batch_norm import Policy, check_policy, has_batch_norm, with_rows
from hbmeta.models.hierarchical import HierarchicalModel
from hbmeta.models.networks import (
    Activation,
    apply_network,
    check_hidden,
    check_network,
    check_on_rows,
    describe,
    entry,
    fan_in,
    perceptron,
    tree,
)
from hbmeta.program import Context
from hbmeta.tasks import Tasks
from hbmeta.tasks.checks import check_seed

__all__ = ["NeuralModel", "positive"]

_LEARNED_START = 0.1


class NeuralModel(HierarchicalModel):
    """φ = every parameter tensor of a network, one local site each, named as in the network.

        mean="learned"   φ ~ N(θ, prior_scale²); θ starts at the network's own initialisation
        mean="zero"      φ ~ N(0, prior_scale² / fan-in) for weights, N(0, prior_scale²) for biases

    A subclass says how many outputs the network has and what y is given them. Only the nested
    layout is offered: the flat one would gather all weights for every row. Models take x and y as
    they are; standardise them where their units are far from 1 (`from_frame(standardise=...)`).
    """

    def __init__(
        self,
        hidden: Sequence[int],
        network: nn.Module | None,
        mean: Literal["learned", "zero"],
        prior_scale: float | Literal["learned"] | None,
        activation: Activation,
        seed: int,
        batch_norm: Policy,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        if mean not in ("learned", "zero"):
            raise DataError(
                where,
                needed="mean 'learned' or 'zero'",
                found=repr(mean),
                do="'learned' is for MAML, 'zero' for NUTS.",
            )
        if prior_scale is None:
            prior_scale = 0.1 if mean == "learned" else 1.0
        elif prior_scale != "learned":
            prior_scale = positive(prior_scale, "prior_scale", where, "or 'learned'")
        self.hidden = check_hidden(hidden, activation, where)
        self.activation: Activation = activation
        self.seed = check_seed(seed, where=where)
        self.given_mean, self.given_scale = mean, prior_scale
        # In tuples, networks stay plain modules: Pyro would make their weights level-1 parameters.
        given = None if network is None else copy.deepcopy(check_network(network, where))
        self.given: tuple[nn.Module, ...] = () if given is None else (given,)
        self.batch_norm = check_policy(batch_norm, given, where)
        self.has_batch_norm = given is not None and has_batch_norm(given)
        if self.has_batch_norm and batch_norm != "stored":
            self.takes_context = "support" if batch_norm == "support" else "rows"
        self.template: tuple[nn.Module, ...] = ()
        self.outputs = 1
        self.bound_features: tuple[str, ...] | None = None
        # Follows the model to the dtype and the device of the data.
        self.register_buffer("origin", torch.zeros((), dtype=torch.float64), persistent=False)

    def forward(  # type: ignore[override]
        self, x: Tensor, y: Tensor | None = None, *, context: Context | None = None
    ) -> Tensor:
        """The generative program, x (tasks, points, features); see `HierarchicalModel.forward`."""
        return super().forward(x, y, context=context)

    def level_one(self) -> dict[str, Tensor]:
        """θ: "mean.NAME" and "log_scale.NAME" for each tensor of the network, where learned."""
        if not self.template:
            raise ProgramError(
                type(self).__name__,
                needed="the number of inputs of the network",
                found="a model that is not bound to data",
                do="Call model.bind(tasks) first; fit does so.",
            )
        learned = {"mean": self.given_mean, "log_scale": self.given_scale}
        return {
            f"{kind}.{name}": entry(getattr(self, kind), name)
            for kind, how in learned.items()
            if how == "learned"
            for name in self._shapes
        }

    def task_prior(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """φ: the weights by name."""
        phi = {}
        for name, shape in self._shapes.items():
            zero = self.given_mean == "zero"
            loc = self.origin.expand(shape) if zero else theta[f"mean.{name}"]
            shrink = fan_in(shape) ** -0.5 if zero else 1.0
            scale: Tensor | float
            if self.given_scale == "learned":
                scale = theta[f"log_scale.{name}"].exp() * shrink
            else:
                scale = self.given_scale * shrink
            phi[name] = pyro.sample(name, dist.Normal(loc, scale).to_event(len(shape)))
        return phi

    def network_outputs(
        self, phi: Mapping[str, Tensor], x: Tensor, context: Context | None
    ) -> Tensor:
        """f_φ(x) (tasks, points, outputs)."""
        weights = {name: phi[name].squeeze(1) for name in self._shapes}
        return apply_network(self.template[0], weights, x, context)

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self.template[0].named_parameters()}

    def outputs_for(self, tasks: Tasks) -> int:
        """How many outputs the network needs for these tasks; raises where y is no response."""
        raise NotImplementedError

    def bind(self, tasks: Tasks) -> Self:
        """A copy with a network for the columns of x, where it starts, and its level-1 parameters.

        Raises:
            ProgramError: a given network does not take x, or is no function of one row.
            DataError: y is not what the model describes.
        """
        outputs = self.outputs_for(tasks)
        model = self.restore({"features": list(tasks.features), "outputs": outputs})
        rows = tasks.flat_x
        statistics = self.takes_context is not None
        where = type(self).__name__
        check_on_rows(model.template[0], rows, outputs, where, statistics=statistics)
        return model.to(dtype=tasks.dtype, device=tasks.device)

    def bound(self) -> dict[str, JSON] | None:
        """The names of the columns of x and the number of outputs, None if not bound."""
        if self.bound_features is None:
            return None
        return {"features": list(self.bound_features), "outputs": self.outputs}

    def restore(self, bound: Mapping[str, Any]) -> Self:
        """A copy bound to columns of x; weights at their initialisation."""
        model = copy.deepcopy(self)
        features: tuple[str, ...] = tuple(bound["features"])
        model.bound_features, model.outputs = features, int(bound["outputs"])
        made = perceptron(len(features), self.hidden, model.outputs, self.activation, self.seed)
        model.template = tuple(with_rows(network) for network in model.given) or (made,)
        start = {n: v.detach().double() for n, v in model.template[0].named_parameters()}
        if self.given_mean == "learned":
            model.mean = tree(start)
        if self.given_scale == "learned":
            first = math.log(_LEARNED_START if self.given_mean == "learned" else 1.0)
            scales = {n: torch.tensor(first, dtype=torch.float64) for n in start}
            model.log_scale = tree(scales)
        return model

    def settings(self) -> dict[str, JSON]:
        """The arguments of the constructor; of a network of a person's own, its description.

        "batch_norm" is among them where the network has any.
        """
        policy: dict[str, JSON] = {"batch_norm": self.batch_norm} if self.has_batch_norm else {}
        return policy | {
            "hidden": list(self.hidden),
            "network": describe(self.given[0]) if self.given else None,
            "mean": self.given_mean,
            "prior_scale": self.given_scale,
            "activation": self.activation,
            "seed": self.seed,
        }

    def state(self) -> dict[str, JSON]:
        """As for every model; with a network of a person's own, no file can build it again."""
        state = super().state()
        if self.given:
            state["class"] = f"{type(self).__name__}(network={type(self.given[0]).__name__})"
        return state


def positive(value: Any, name: str, where: str, otherwise: str = "") -> float:
    """A finite number above 0."""
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not 0 < number < math.inf:
        raise DataError(
            where,
            needed=f"{name} as a positive number {otherwise}".strip(),
            found=f"{value!r}",
            do=f"Pass for example {name}=0.5.",
        )
    return number
