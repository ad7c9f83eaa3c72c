"""Functions made by one decoder network from a Gaussian code per task: the latent process.

    z_i ~ N(0, I),   y_ij ~ N(μ(x_ij, z_i), σ(x_ij, z_i)²)
    h(x) = (u, sin(k π u / 2), cos(k π u / 2), k = 1..frequencies),   u = (x − middle) / half-range
    a = W_x h(x) + W_z z + c
    μ = b(h(x))ᵀ z + f_μ(a),   σ = noise_floor + log(1 + exp f_σ(a))

b and f are networks. With f constant, y is a Gaussian process of the kernel b(x)ᵀ b(x′); f makes it
non-Gaussian, as a random lengthscale does. Sines and cosines let a small network bend often: alone,
it learns high frequencies last.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from hbmeta.encoders import waves
from hbmeta.errors import DataError, ProgramError
from hbmeta.files import JSON
from hbmeta.models.hierarchical import HierarchicalModel
from hbmeta.tasks import Tasks
from hbmeta.tasks.checks import check_seed

__all__ = ["LatentProcess"]

_WHERE = "LatentProcess"


class LatentProcess(HierarchicalModel):
    """φ_i = z_i ~ N(0, I), y_ij ~ N(μ(x_ij, z_i), σ(x_ij, z_i)²), with μ and σ from one decoder.

    The generative model of latent neural processes: all that tasks share is in the decoder's
    weights, which are level-1 parameters without a prior. `bind` reads the middle and half the
    range of every column of x from the data; the decoder sees x in these units, and a saved model
    keeps them. y is taken as it is: standardise it where its units are far from 1. Only the nested
    layout is offered: the flat one would gather z for every row.

    Args:
        latent: entries of z.
        hidden: widths of the decoder's layers; the first one is W_x h(x) + W_z z, so that the
            product with z is made once per task.
        noise: standard deviation of y given z, in the units of y, the same at all x; None lets the
            decoder give σ(x, z).
        noise_floor: smallest σ(x, z), in the units of y. Part of the model: without one the density
            of noiseless points has no bound. Not used where `noise` is given.
        frequencies: sines and cosines per column of x, of periods 4, 2, 4/3, … half-ranges;
            0 for none.
        linear: whether μ has the term b(x)ᵀ z.
        seed: of the initialisation; the global random state is left alone.
    Raises:
        DataError: a width, a number or a seed that cannot be used; in `bind`, y that is no number.
    References:
        Garnelo et al. (2018), Neural Processes, arXiv:1807.01622.
    Example:
        >>> tasks = Tasks(torch.linspace(-1, 1, 15).reshape(3, 5, 1), torch.zeros(3, 5))
        >>> LatentProcess(latent=4, hidden=(8,)).bind(tasks)(torch.zeros(3, 5, 1)).shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        latent: int = 32,
        hidden: Sequence[int] = (64, 64),
        noise: float | None = None,
        noise_floor: float = 0.01,
        *,
        frequencies: int = 8,
        linear: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.latent = _whole(latent, "latent", 1)
        if isinstance(hidden, str) or not isinstance(hidden, Sequence) or not hidden:
            raise DataError(
                _WHERE,
                needed="hidden as widths of layers, at least one",
                found=repr(hidden),
                do="Pass for example hidden=(64, 64).",
            )
        self.hidden = tuple(_whole(width, "hidden", 1) for width in hidden)
        self.given_noise = None if noise is None else _positive(noise, "noise")
        self.noise_floor = _positive(noise_floor, "noise_floor")
        self.frequencies = _whole(frequencies, "frequencies", 0)
        if not isinstance(linear, bool):
            raise DataError(
                _WHERE, needed="linear as True or False", found=repr(linear), do="Pass True."
            )
        self.linear = linear
        self.seed = check_seed(seed, where=_WHERE)
        self.bound_to: dict[str, Any] | None = None
        self.register_buffer("origin", torch.zeros((), dtype=torch.float64), persistent=False)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """The generative program, x (tasks, points, features); see `HierarchicalModel.forward`."""
        return super().forward(x, y)

    def level_one(self) -> dict[str, Tensor]:
        """Nothing: θ is the decoder's weights."""
        if self.bound_to is None:
            raise ProgramError(
                _WHERE,
                needed="the columns of x and their ranges",
                found="a model that is not bound to data",
                do="Call model.bind(tasks) first; fit does so.",
            )
        return {}

    def task_prior(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """φ: "z" (latent,); with it what the decoder makes of z alone, once per task."""
        standard = dist.Normal(self.origin, self.origin + 1.0).expand([self.latent]).to_event(1)
        z = pyro.sample("z", standard)
        return {"z": z, "inner": self.of_z(z)}

    def likelihood(
        self, theta: Mapping[str, Tensor], phi: Mapping[str, Tensor], x: Tensor
    ) -> TorchDistribution:
        """N(μ(x, z), σ(x, z)²)."""
        if x.shape[-1] != len(self.middle):
            raise ProgramError(
                _WHERE,
                needed=f"x with {len(self.middle)} columns, as bound",
                found=f"x {tuple(x.shape)}",
                do="Bind the model to tasks with these columns.",
            )
        u = waves((x - self.middle) / self.half_range, self.frequencies)
        out = self.rest(self.of_x(u) + phi["inner"])
        mean = out[..., 0]
        if self.linear:
            mean = mean + (self.basis(u) * phi["z"]).sum(-1)
        if self.given_noise is not None:
            return dist.Normal(mean, self.origin + self.given_noise)
        return dist.Normal(mean, self.noise_floor + nn.functional.softplus(out[..., 1]))

    def bind(self, tasks: Tasks) -> Self:
        """A copy with a decoder for the columns of x, which knows their ranges.

        Raises:
            DataError: no rows, or y that is not one number per row.
        """
        y = tasks.flat_y
        if not tasks.n_points or y is None or y.dim() != 1 or not y.is_floating_point():
            found = "no y" if y is None else f"y {tuple(y.shape)} of {y.dtype}"
            raise DataError(
                f"{_WHERE}.bind",
                needed="tasks with rows, and one real number y per row",
                found=found if tasks.n_points else "no rows",
                do="Pass y of shape (tasks, points) in float32 or float64.",
            )
        low, high = tasks.flat_x.double().amin(0), tasks.flat_x.double().amax(0)
        half = (high - low) / 2
        # A constant column says nothing; left at 1 it stays finite.
        half = torch.where(half > 0, half, torch.ones_like(half))
        bound = {
            "features": list(tasks.features),
            "middle": ((low + high) / 2).tolist(),
            "half_range": half.tolist(),
        }
        return self.restore(bound).to(dtype=tasks.dtype, device=tasks.device)

    def bound(self) -> dict[str, JSON] | None:
        """Columns of x, their middles and half-ranges; None if not bound."""
        return None if self.bound_to is None else dict(self.bound_to)

    def restore(self, bound: Mapping[str, Any]) -> Self:
        """A copy bound to columns of x, its weights at their initialisation."""
        model = copy.deepcopy(self)
        model.bound_to = {name: list(bound[name]) for name in ("features", "middle", "half_range")}
        for name in ("middle", "half_range"):
            value = torch.tensor(bound[name], dtype=torch.float64)
            model.register_buffer(name, value, persistent=False)
        columns = len(model.bound_to["features"])
        inputs = columns * (1 + 2 * self.frequencies)
        first = self.hidden[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model.of_x = _linear(inputs, first)
            model.of_z = _linear(self.latent, first, bias=False)
            layers: list[nn.Module] = [nn.SiLU()]
            for before, after in zip(self.hidden, self.hidden[1:], strict=False):
                layers += [_linear(before, after), nn.SiLU()]
            outputs = 1 if self.given_noise is not None else 2
            model.rest = nn.Sequential(*layers, _linear(self.hidden[-1], outputs))
            if self.linear:
                width = self.hidden[-1]
                model.basis = nn.Sequential(
                    _linear(inputs, width),
                    nn.SiLU(),
                    _linear(width, width),
                    nn.SiLU(),
                    _linear(width, self.latent),
                )
        return model

    def settings(self) -> dict[str, JSON]:
        """The arguments of the constructor."""
        return {
            "latent": self.latent,
            "hidden": list(self.hidden),
            "noise": self.given_noise,
            "noise_floor": self.noise_floor,
            "frequencies": self.frequencies,
            "linear": self.linear,
            "seed": self.seed,
        }


def _linear(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)


def _whole(value: Any, name: str, least: int) -> int:
    if type(value) is not int or value < least:
        raise DataError(
            _WHERE,
            needed=f"{name} as whole numbers of {least} or more",
            found=repr(value),
            do="Leave it out for the default.",
        )
    return value


def _positive(value: Any, name: str) -> float:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not 0 < value < math.inf:
        raise DataError(
            _WHERE,
            needed=f"{name} as a positive number, in the units of y",
            found=repr(value),
            do=f"Pass for example {name}=0.1" + (", or None." if name == "noise" else "."),
        )
    return float(value)
