"""Networks whose weights are the parameters of a task: what MAML adapts, as a three-level program.

    φ_i = all weights of a network, one local site per tensor,  φ_i ~ N(θ, s²)
    y_ij ~ p(y | f_φi(x_ij))

θ is the initialisation that tasks share. Gradient descent on a task's own loss from the location of
this prior is MAML (Grant et al. 2018 read its early stopping as a prior; docs/theory.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import pyro
import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from hbmeta.errors import DataError
from hbmeta.files import JSON
from hbmeta.models.batch_norm import Policy
from hbmeta.models.networks import Activation
from hbmeta.models.neural_model import NeuralModel, positive
from hbmeta.program import Context
from hbmeta.tasks import Tasks

__all__ = ["NeuralClassifier", "NeuralRegression"]


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
        batch_norm: which rows an nn.BatchNorm1d, 2d or 3d of `network` takes its statistics from:
            "support", those of the task's support (the stored ones where it has fewer than two
            values of a channel), so that a prediction depends on its own row and the support alone
            (a few rows that are nearly equal put others far out: "stored" is safer there);
            "stored", the running statistics that the network came with; "query", the rows that are
            predicted together (transductive: common in published code, and noted by `compare`).
            Running statistics are never updated; weight and bias are part of φ.
    Raises:
        DataError, ProgramError: an argument or a network that cannot be used (Dropout, and whatever
            else draws random numbers or changes while it runs, is refused).
    References:
        Finn, Abbeel, Levine (2017), ICML, §5.1, for the network 1-40-40-1. Neal (1996), Bayesian
        Learning for Neural Networks, for the prior of mean="zero". Bronskill et al. (2020), ICML,
        for batch norm in meta-learning.
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
        batch_norm: Policy = "support",
    ) -> None:
        super().__init__(hidden, network, mean, prior_scale, activation, seed, batch_norm)
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
        self,
        theta: Mapping[str, Tensor],
        phi: Mapping[str, Tensor],
        x: Tensor,
        context: Context | None = None,
    ) -> TorchDistribution:
        """N(f_φ(x), noise²)."""
        found = self.network_outputs(phi, x, context)
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
        batch_norm: as in `NeuralRegression`.
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
        *,
        batch_norm: Policy = "support",
    ) -> None:
        super().__init__(hidden, network, mean, prior_scale, activation, seed, batch_norm)
        if type(ways) is not int or ways < 2:
            raise DataError(
                "NeuralClassifier",
                needed="ways as a whole number of 2 or more",
                found=repr(ways),
                do="Pass the number of classes.",
            )
        self.ways = ways

    def likelihood(
        self,
        theta: Mapping[str, Tensor],
        phi: Mapping[str, Tensor],
        x: Tensor,
        context: Context | None = None,
    ) -> TorchDistribution:
        """Categorical(logits=f_φ(x))."""
        return dist.Categorical(logits=self.network_outputs(phi, x, context))

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
