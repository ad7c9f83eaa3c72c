"""Checkpoints of the training loop: its state on the way, and what tells one fit from another.

A step is a function of the seed and its number, so that parameters, Adam's moments and the state of
the noise are all that an interrupted fit needs to end where it would have ended.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hbmeta.errors import FileError
from hbmeta.files import JSON, read_tensors, write_tensors
from hbmeta.tasks import Tasks

__all__ = ["Checkpoint", "digest"]

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def digest(tasks: Tasks) -> str:
    """A checksum of ids, features and every number of some tasks."""
    found = hashlib.sha256(repr((tasks.ids, tasks.features)).encode())
    for values in (tasks.flat_x, tasks.flat_y, tasks.task):
        if values is not None:
            # As bytes: NumPy has no bfloat16.
            plain = values.detach().cpu().contiguous().reshape(-1)
            found.update(plain.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """A file that training is saved to and resumed from.

    Args:
        path: the file.
        identity: what must agree for a fit to go on from it.
    """

    path: Any
    identity: Mapping[str, JSON]

    def save(
        self,
        free: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        losses: Tensor,
        noise: torch.Generator,
    ) -> None:
        """Writes parameters and the optimiser's state; see `keep`."""
        tensors = {f"free/{name}": value for name, value in free.items()}
        for name, value in free.items():
            for key in _MOMENTS:
                tensors[f"adam/{key}/{name}"] = torch.as_tensor(optimizer.state[value][key])
        self.keep(tensors, losses, noise)

    def resume(
        self,
        free: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        noise: torch.Generator,
    ) -> Tensor:
        """Takes up what `save` wrote, where there is something; the losses of the steps done.

        Raises:
            FileError: the file is damaged, or belongs to another fit.
        """
        names = {f"adam/{key}/{name}" for name in free for key in _MOMENTS}
        tensors, losses = self.take_up(names | {f"free/{name}" for name in free}, noise)
        if tensors:
            with torch.no_grad():
                for name, value in free.items():
                    value.copy_(tensors[f"free/{name}"])
                    optimizer.state[value] = {
                        key: tensors[f"adam/{key}/{name}"].clone() for key in _MOMENTS
                    }
        return losses

    def keep(self, state: Mapping[str, Tensor], losses: Tensor, noise: torch.Generator) -> None:
        """Writes the state after `len(losses)` steps, all at once or not at all."""
        tensors = {**state, "losses": losses, "generator": noise.get_state()}
        write_tensors(self.path, tensors, {"kind": "checkpoint", **self.identity})

    def take_up(
        self, names: Collection[str], noise: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What `keep` wrote and its losses, both empty without a file; sets the noise back.

        Args:
            names: of the state's tensors.
            noise: the generator of the fit.
        Raises:
            FileError: the file is damaged, or belongs to another fit.
        """
        if not Path(self.path).exists():
            return {}, torch.zeros(0, dtype=torch.float64)
        tensors, header = read_tensors(self.path)
        # As JSON has it: a tuple among the settings comes back as a list.
        wanted = json.loads(json.dumps({"kind": "checkpoint", **self.identity}))
        different = [key for key in wanted if header.get(key) != wanted[key]]
        if different or set(tensors) != {*names, "losses", "generator"}:
            raise FileError(
                str(self.path),
                needed="the checkpoint of this very fit",
                found=f"another {different[0] if different else 'model'}",
                do="Delete the file to start anew, or name another one.",
            )
        noise.set_state(tensors.pop("generator"))
        return tensors, tensors.pop("losses")
