"""What training moves: θ and a strategy's own parameters, in the units in which Adam moves them.

    global site       θ = θ_0 + s u,  u from 0, with s the scale of its prior in unconstrained space
    other parameter   itself

All are kept in float32 at least and handed to the program in the dtype of the data: a step of 1e-3
on a weight of 1 is lost in the rounding of bfloat16, whose neighbours of 1 are 8e-3 apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from hbmeta.program import Functional, Theta

__all__ = ["Moving", "at_least_single"]


def at_least_single(value: Tensor) -> Tensor:
    """The tensor, in float32 where it is of half precision."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


class Moving:
    """Tensors that an optimiser moves, and θ and `own` as functions of them.

    Args:
        start: θ where it starts, in the dtype of the data.
        scales: scale of the prior of each global site, in unconstrained space.
        own: what the strategy learns besides θ.
    """

    def __init__(self, start: Theta, scales: Theta, own: nn.Module | None) -> None:
        self.start, self.own = start, own
        self.scales = {name: at_least_single(value) for name, value in scales.items()}
        own_start = {} if own is None else {k: v.detach() for k, v in own.named_parameters()}
        self._dtypes = {f"theta/{k}": v.dtype for k, v in start.items()}
        self._dtypes |= {f"own/{k}": v.dtype for k, v in own_start.items()}
        # Dense, one after the other in memory: a fused optimiser walks along them.
        self.free = {
            f"theta/{name}": torch.zeros_like(self.scales[name])
            if name in scales
            else at_least_single(value).clone(memory_format=torch.contiguous_format)
            for name, value in start.items()
        } | {
            f"own/{name}": at_least_single(value).clone(memory_format=torch.contiguous_format)
            for name, value in own_start.items()
        }
        """By "theta/name" and "own/name", what moves."""
        self._own_names = tuple(own_start)

    @property
    def scaled(self) -> dict[str, Tensor]:
        """The global sites among what moves, in units of their prior's scale."""
        return {k: v for k, v in self.free.items() if k.removeprefix("theta/") in self.scales}

    def fix(self, names: Iterable[str]) -> None:
        """Leaves these where they start."""
        for name in names:
            self.free.pop(name)

    def unpack(self, free: Mapping[str, Tensor]) -> tuple[Theta, dict[str, Tensor]]:
        """θ and the strategy's own parameters by name, in the dtype of the data.

        Args:
            free: values for what moves; differentiable in them.
        """
        theta = {}
        for name, value in self.start.items():
            moved = free.get(f"theta/{name}")
            if moved is None:
                theta[name] = value
            elif name in self.scales:
                theta[name] = (at_least_single(value) + self.scales[name] * moved).to(value.dtype)
            else:
                theta[name] = moved.to(value.dtype)
        own = {k: free[f"own/{k}"].to(self._dtypes[f"own/{k}"]) for k in self._own_names}
        return theta, own

    def bound(self, own: Mapping[str, Tensor]) -> Functional | None:
        """The strategy's own module with these parameters; None if it has none."""
        return None if self.own is None else Functional(self.own, own)

    def pulled_back(self, gradients: Mapping[str, Tensor]) -> list[Tensor]:
        """Gradients in what moves, in its order, from those in θ and `own`; 0 where none is given.

        Args:
            gradients: by "theta/name" and "own/name".
        """
        found = []
        for key, value in self.free.items():
            gradient, name = gradients.get(key), key.removeprefix("theta/")
            if gradient is None:
                found.append(torch.zeros_like(value))
            elif name in self.scales:
                found.append(self.scales[name] * gradient.to(value.dtype))
            else:
                found.append(gradient.to(value.dtype))
        return found

    def settle(self) -> Theta:
        """θ where training ended; puts the strategy's own parameters into its module."""
        with torch.no_grad():
            theta, own = self.unpack(self.free)
        if self.own is not None:
            self.own.load_state_dict({**self.own.state_dict(), **own})
        return {name: value.detach() for name, value in theta.items()}
