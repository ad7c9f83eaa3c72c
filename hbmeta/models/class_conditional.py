"""A Gaussian per class in an embedding space: φ the class means of each task.

Model: c_ik ~ N(0, τ² I) or flat, y_ij ~ Categorical(π), f(x_ij) | y_ij = k ~ N(c_ik, σ² I),
a joint model of label and embedding, so that

    p(y = k | x, φ) = softmax_k(log π_k − ‖f(x) − c_k‖² / 2σ²).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from hbmeta.errors import DataError, ProgramError
from hbmeta.files import JSON
from hbmeta.models.hierarchical import HierarchicalModel
from hbmeta.models.networks import (
    check_hidden,
    check_layers,
    check_on_rows,
    describe,
    perceptron,
)
from hbmeta.models.neural_model import positive
from hbmeta.program import Context
from hbmeta.tasks import Tasks
from hbmeta.tasks.checks import check_seed

__all__ = ["ClassConditional"]

_WHERE = "ClassConditional"


class ClassConditional(HierarchicalModel):
    """Classes as Gaussians around means of each task's own, in an embedding shared by all tasks.

    σ² = ½, a flat prior and plug-in means are prototypical networks to the letter: softmax of minus
    the squared distance (softmax of minus half of it, which is often stated, belongs to σ = 1).
    Labels are 0..ways−1. Two sites are observed, "y" and "embedding": posteriors of φ use the joint
    density of a support, predictions p(y | x, φ) by enumeration of y. A likelihood of the embedding
    is no objective for the embedding (it shrinks to nothing), so strategies that train by one
    refuse a learned embedding.

    Args:
        embedding: None, f(x) = x; widths such as (64, 32) for a perceptron, whose weights are θ; or
            a module, (points, features) to (points, dimensions), a fixed function of each row; its
            frozen parameters stay as they are.
        ways: number of classes of a task.
        noise: σ, standard deviation within a class, in units of the embedding.
        prior_scale: τ, standard deviation of class means around 0; None for a flat prior.
        probabilities: π, (ways,); equal by default.
        seed: of the perceptron's initialisation.
    Raises:
        DataError: impossible settings.
    References:
        Snell, Swersky, Zemel (2017), NeurIPS; the Gaussian view: Murphy (2012),
        Machine Learning, §4.2.
    Example:
        >>> import torch
        >>> ClassConditional(None, ways=3)(torch.zeros(2, 6, 4), torch.zeros(2, 6)).shape
        torch.Size([2, 6])
    """

    def __init__(
        self,
        embedding: Sequence[int] | nn.Module | None = None,
        ways: int = 5,
        *,
        noise: float = 0.5**0.5,
        prior_scale: float | None = None,
        probabilities: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not (isinstance(ways, int) and ways >= 2):
            raise DataError(
                _WHERE, needed="ways of 2 or more", found=repr(ways), do="Pass for example ways=5."
            )
        self.ways, self.seed = ways, check_seed(seed, where=_WHERE)
        self.noise = positive(noise, "noise", _WHERE)
        self.prior_scale = None
        if prior_scale is not None:
            self.prior_scale = positive(prior_scale, "prior_scale", _WHERE, "or None (flat)")
        self.probabilities = None if probabilities is None else _probabilities(probabilities, ways)
        self.hidden: tuple[int, ...] | None = None
        self.network: nn.Module | None = None
        if isinstance(embedding, nn.Module):
            self.network = embedding
        elif embedding is not None:
            self.hidden = check_hidden(embedding, "relu", _WHERE)
            if not self.hidden:
                raise DataError(
                    _WHERE,
                    needed="widths of an embedding, the last its dimension",
                    found="none",
                    do="Pass None for the inputs themselves.",
                )
        self.own = isinstance(embedding, nn.Module)
        self.dimension: int | None = None
        self.inputs: int | None = None

    def level_one(self) -> dict[str, Tensor]:
        """No global sites: the weights of the embedding are parameters of the module."""
        return {}

    def task_prior(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """φ: "means" (ways, dimension)."""
        assert self.dimension is not None
        shape = (self.ways, self.dimension)
        prior: TorchDistribution
        if self.prior_scale is None:
            prior = dist.ImproperUniform(constraints.real, (), shape)
        else:
            prior = dist.Normal(0.0, self.prior_scale).expand(shape).to_event(2)
        return {"means": pyro.sample("means", prior)}

    def likelihood(
        self, theta: Mapping[str, Tensor], phi: Mapping[str, Tensor], x: Tensor
    ) -> TorchDistribution:
        """Categorical(π), the label before the embedding is seen."""
        if self.probabilities is None:
            logits = x.new_zeros(self.ways)
        else:
            logits = torch.log(torch.tensor(self.probabilities, dtype=x.dtype, device=x.device))
        return dist.Categorical(logits=logits.expand(*x.shape[:-1], self.ways))

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        task: Tensor | None = None,
        n_tasks: int | None = None,
        context: Context | None = None,
    ) -> Tensor:
        """Run the generative program; see `HierarchicalModel.forward`. Labels in any dtype."""
        if self.dimension is None or self.inputs != x.shape[-1]:
            # Outside of a fit: the dimensions are those of this x.
            self._dimensions(x)
        return super().forward(x, y, task=task, n_tasks=n_tasks, context=context)

    def _draw(
        self,
        theta: Mapping[str, Tensor],
        phi: Mapping[str, Tensor],
        x: Tensor,
        observed: Tensor | None,
        **given: Any,
    ) -> Tensor:
        label: Tensor = super()._draw(theta, phi, x, observed, **given)
        classes = torch.arange(self.ways, device=x.device)
        chosen = (label.unsqueeze(-1) == classes).to(x.dtype)
        mean = (chosen.unsqueeze(-2) @ phi["means"].to(x.dtype)).squeeze(-2)
        law = dist.Normal(mean, self.noise).to_event(1)
        pyro.sample("embedding", law, obs=self.embed(x))
        return label

    def embed(self, x: Tensor) -> Tensor:
        """f(x), (..., dimension)."""
        if self.network is None:
            return x
        found: Tensor = self.network(x.reshape(-1, x.shape[-1]))
        return found.reshape(*x.shape[:-1], found.shape[-1])

    def bind(self, tasks: Tasks) -> Self:
        """A copy that knows the width of x and of the embedding.

        Raises:
            DataError: labels outside 0..ways−1.
            ProgramError: an embedding that does not run on x, or is no fixed function of one row.
        """
        y = tasks.flat_y
        if y is not None and len(y):
            bad = (y < 0) | (y >= self.ways) | (y != y.round() if y.is_floating_point() else False)
            if y.dim() != 1 or bool(torch.as_tensor(bad).any()):
                raise DataError(
                    f"{_WHERE}.bind",
                    needed=f"labels 0..{self.ways - 1}, one per row",
                    found=f"y of shape {tuple(y.shape)} from {float(y.min()):g} to "
                    f"{float(y.max()):g}",
                    do="Set ways to the number of classes of a task and number them from 0.",
                )
        model = copy.deepcopy(self)
        if self.own:
            assert self.network is not None
            check_layers(self.network, f"{_WHERE}, embedding")
        model._dimensions(tasks.flat_x[:8])
        if self.own:
            assert self.network is not None
            assert model.dimension is not None
            check_on_rows(self.network, tasks.flat_x, model.dimension, _WHERE, "embedding")
        return model.to(dtype=tasks.dtype, device=tasks.device)

    def _dimensions(self, x: Tensor) -> None:
        """Builds the perceptron for x where there is none yet, and reads the dimension."""
        self.inputs = int(x.shape[-1])
        if self.hidden is not None:
            network = perceptron(self.inputs, self.hidden[:-1], self.hidden[-1], "relu", self.seed)
            self.network = network.to(dtype=x.dtype, device=x.device)
        rows = torch.zeros(2, self.inputs, dtype=x.dtype, device=x.device)
        try:
            # A module of a person's own may draw numbers, which is only refused later.
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                network_of_x = copy.deepcopy(self.network)
                found = rows if network_of_x is None else network_of_x.to(rows)(rows)
        except Exception as error:
            said = next(iter(str(error).splitlines()), "")
            raise ProgramError(
                f"{_WHERE}, embedding",
                needed=f"a module that runs on x of {self.inputs} columns",
                found=f"{type(error).__name__}: {said}",
                do="Check its number of inputs.",
            ) from error
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(rows):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ProgramError(
                f"{_WHERE}, embedding",
                needed="a module (points, features) to (points, dimensions)",
                found=f"{shape} from x {tuple(rows.shape)}",
                do="Return one vector per row, for example with torch.nn.Flatten at the end.",
            )
        self.dimension = int(found.shape[-1])

    def bound(self) -> dict[str, JSON] | None:
        """The width of x."""
        return None if self.inputs is None else {"inputs": self.inputs}

    def restore(self, bound: Mapping[str, Any]) -> Self:
        """A copy for x of that width."""
        model = copy.deepcopy(self)
        model._dimensions(torch.zeros(1, int(bound["inputs"]), dtype=torch.float64))
        return model

    def settings(self) -> dict[str, JSON]:
        """The arguments of the constructor; of a module of a person's own, its description."""
        embedding: JSON = None if self.hidden is None else list(self.hidden)
        if self.own:
            assert self.network is not None
            embedding = describe(self.network)
        return {
            "embedding": embedding,
            "ways": self.ways,
            "noise": self.noise,
            "prior_scale": self.prior_scale,
            "probabilities": self.probabilities,
            "seed": self.seed,
        }

    def state(self) -> dict[str, JSON]:
        """As for every model; with a module of a person's own, no file can build it again."""
        state = super().state()
        if self.own:
            state["class"] = f"{type(self).__name__}(embedding={type(self.network).__name__})"
        return state


def _probabilities(given: Any, ways: int) -> list[float]:
    """π, checked."""
    try:
        found = [float(p) for p in given]
    except (TypeError, ValueError):
        found = []
    if len(found) == ways and all(p > 0 for p in found) and abs(sum(found) - 1.0) <= 1e-9:
        return found
    raise DataError(
        _WHERE,
        needed=f"{ways} positive probabilities of sum 1",
        found=repr(given),
        do="Leave them out for equal ones.",
    )
