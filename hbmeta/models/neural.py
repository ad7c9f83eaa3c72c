"""Networks whose weights are the parameters of a task: what MAML adapts, as a three-level program.

    φ_i = all weights of a network, one local site per tensor,  φ_i ~ N(θ, s²)
    y_ij ~ p(y | f_φi(x_ij))

θ is the initialisation that tasks share. Gradient descent on a task's own loss from the location of
this prior is MAML (Grant et al. 2018 read its early stopping as a prior; docs/theory.md).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from hbmeta.errors import DataError, ProgramError
from hbmeta.files import JSON
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
from hbmeta.tasks import Tasks
from hbmeta.tasks.checks import check_seed

__all__ = ["NeuralClassifier", "NeuralModel", "NeuralRegression"]

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
        self.template: tuple[nn.Module, ...] = ()
        self.outputs = 1
        self.bound_features: tuple[str, ...] | None = None
        # Follows the model to the dtype and the device of the data.
        self.register_buffer("origin", torch.zeros((), dtype=torch.float64), persistent=False)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """The generative program, x (tasks, points, features); see `HierarchicalModel.forward`."""
        return super().forward(x, y)

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

    def network_outputs(self, phi: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """f_φ(x) (tasks, points, outputs)."""
        weights = {name: phi[name].squeeze(1) for name in self._shapes}
        return apply_network(self.template[0], weights, x)

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
        check_on_rows(model.template[0], rows, outputs, type(self).__name__)
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
        model.template = model.given or (made,)
        start = {n: v.detach().double() for n, v in model.template[0].named_parameters()}
        if self.given_mean == "learned":
            model.mean = tree(start)
        if self.given_scale == "learned":
            first = math.log(_LEARNED_START if self.given_mean == "learned" else 1.0)
            scales = {n: torch.tensor(first, dtype=torch.float64) for n in start}
            model.log_scale = tree(scales)
        return model

    def settings(self) -> dict[str, JSON]:
        """The arguments of the constructor; of a network of a person's own, its description."""
        return {
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


class NeuralRegression(NeuralModel):
    """φ_i = the weights of a network, y_ij ~ N(f_φi(x_ij), noise²).

    With noise = √½ the negative log-likelihood is −log p(y | φ) = (y − f_φ(x))² + ½ log π, so that
    its mean is the mean squared error plus 0.572 and MAML's inner steps are those of the paper.
    NUTS takes the model with mean="zero" (a Bayesian neural network, nothing shared between tasks
    but the noise), whose small networks, up to 64 weights, also adapt to new tasks under NUTS.

    Args:
        hidden: widths of the hidden layers.
        noise: standard deviation of y given φ, in the units of y; None learns it, a global site
            with prior HalfNormal(prior_noise). Gradients of the loss, and so MAML's inner steps,
            go with 1 / noise²: lower step_size where the noise is small.
        network: any module (points, features) to (points, outputs), in place of `hidden`. Its
            parameters are copied: they are where θ starts. A fit of such a model is loaded with
            hbmeta.load(path, model=...).
        mean: "learned": φ ~ N(θ, prior_scale²) with θ a parameter; "zero": no θ,
            φ ~ N(0, prior_scale² / fan-in), biases N(0, prior_scale²).
        prior_scale: a positive number, or "learned": one per tensor. By default 0.1 around a
            learned mean and 1 around zero.
        activation: "relu" or "tanh".
        seed: of the initialisation; the global random state is left alone.
        prior_noise: scale of the prior of `noise`, units of y.
    Raises:
        DataError, ProgramError: an argument or a network that cannot be used (see `network`:
            layers with running averages or random numbers, BatchNorm and Dropout, are refused).
    References:
        Finn, Abbeel, Levine (2017), ICML, §5.1, for the network 1-40-40-1. Neal (1996), Bayesian
        Learning for Neural Networks, for the prior of mean="zero".
    Example:
        >>> model = NeuralRegression(hidden=(8,)).bind(
        ...     Tasks(torch.zeros(3, 5, 1), torch.ones(3, 5))
        ... )
        >>> model(torch.zeros(3, 5, 1)).shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        hidden: Sequence[int] = (40, 40),
        noise: float | None = 0.5**0.5,
        network: nn.Module | None = None,
        mean: Literal["learned", "zero"] = "learned",
        prior_scale: float | Literal["learned"] | None = None,
        activation: Activation = "relu",
        seed: int = 0,
        *,
        prior_noise: float = 1.0,
    ) -> None:
        super().__init__(hidden, network, mean, prior_scale, activation, seed)
        where = "NeuralRegression"
        self.given_noise = None if noise is None else positive(noise, "noise", where, "or None")
        self.prior_noise = positive(prior_noise, "prior_noise", where)

    def level_one(self) -> dict[str, Tensor]:
        """θ of the weights, and "noise" () where it is learned."""
        theta = super().level_one()
        if self.given_noise is None:
            scale = self.origin + self.prior_noise
            theta["noise"] = pyro.sample("noise", dist.HalfNormal(scale))
        return theta

    def likelihood(
        self, theta: Mapping[str, Tensor], phi: Mapping[str, Tensor], x: Tensor
    ) -> TorchDistribution:
        """N(f_φ(x), noise²)."""
        found = self.network_outputs(phi, x)
        # A number where it is given: a compiled graph takes it as a literal.
        noise = theta["noise"] if self.given_noise is None else self.given_noise
        if self.outputs == 1:
            return dist.Normal(found.squeeze(-1), noise)
        vector: TorchDistribution = dist.Normal(found, noise).to_event(1)
        return vector

    def outputs_for(self, tasks: Tasks) -> int:
        """1 for numbers, k for vectors."""
        y = tasks.flat_y
        if y is None or y.dim() == 1:
            return 1
        if y.shape[1] < 2:
            raise DataError(
                "NeuralRegression.bind",
                needed="y as numbers (tasks, points), or vectors of two entries or more",
                found="vectors of one entry",
                do="Take the last dimension off: y[..., 0].",
            )
        return int(y.shape[1])

    def settings(self) -> dict[str, JSON]:
        """The arguments of the constructor."""
        return super().settings() | {"noise": self.given_noise, "prior_noise": self.prior_noise}


class NeuralClassifier(NeuralModel):
    """φ_i = the weights of a network, y_ij ~ Categorical(softmax f_φi(x_ij)) over `ways` classes.

    Args:
        ways: number of classes; y holds the labels 0, …, ways − 1.
        hidden: widths of the hidden layers.
        network: as in `NeuralRegression`, with `ways` outputs.
        mean: as in `NeuralRegression`.
        prior_scale: as in `NeuralRegression`.
        activation: "relu" or "tanh".
        seed: of the initialisation.
    Raises:
        DataError, ProgramError: as in `NeuralRegression`; labels outside 0, …, ways − 1.
    References:
        Finn, Abbeel, Levine (2017), ICML, §5.2.
    """

    def __init__(
        self,
        ways: int,
        hidden: Sequence[int] = (64,),
        network: nn.Module | None = None,
        mean: Literal["learned", "zero"] = "learned",
        prior_scale: float | Literal["learned"] | None = None,
        activation: Activation = "relu",
        seed: int = 0,
    ) -> None:
        super().__init__(hidden, network, mean, prior_scale, activation, seed)
        if type(ways) is not int or ways < 2:
            raise DataError(
                "NeuralClassifier",
                needed="ways as a whole number of 2 or more",
                found=repr(ways),
                do="Pass the number of classes.",
            )
        self.ways = ways

    def likelihood(
        self, theta: Mapping[str, Tensor], phi: Mapping[str, Tensor], x: Tensor
    ) -> TorchDistribution:
        """Categorical(logits=f_φ(x))."""
        return dist.Categorical(logits=self.network_outputs(phi, x))

    def outputs_for(self, tasks: Tasks) -> int:
        """One per class."""
        y = tasks.flat_y
        if y is not None and len(y):
            whole = y.dim() == 1 and bool((y == y.round()).all() if y.is_floating_point() else True)
            if not whole or int(y.min()) < 0 or int(y.max()) >= self.ways:
                found = f"{float(y.min())} to {float(y.max())}, y {tuple(y.shape)} of {y.dtype}"
                raise DataError(
                    "NeuralClassifier.bind",
                    needed=f"labels from 0 to {self.ways - 1} as y, one per row",
                    found=found,
                    do="Number the classes from 0, or raise ways.",
                )
        return self.ways

    def settings(self) -> dict[str, JSON]:
        """The arguments of the constructor."""
        return {"ways": self.ways, **super().settings()}


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
