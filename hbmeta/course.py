"""The course of a training run: its losses, its progress bar, and what it warns of at the end.

Recording costs one list entry per step; every 50 steps the entries are looked at together, because
a look at a number costs as much as a small kernel, and on a GPU the wait for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hbmeta.drift import FAR, left_to_go
from hbmeta.errors import ConvergenceError

__all__ = ["Course"]

_LOOK_EVERY = 50
# Nats that a loss may rise by, and that no data come near, before it is warned of.
_FAR_ABOVE = 100.0
_HUGE = 1e9


class Course:
    """What a run of training leaves on its way.

    Args:
        name: of the strategy, for messages.
        rates: (steps,) the share of the learning rates that each step of the run is taken with.
        done: (steps so far,) losses of a run that is resumed.
        watched: global sites in units of their prior's scale, whose path is kept.
        progress: whether to draw a progress bar.
    """

    def __init__(
        self,
        name: str,
        rates: Tensor,
        done: Tensor,
        watched: Mapping[str, Tensor],
        *,
        progress: bool,
    ) -> None:
        self.name, self.rates, self.watched = name, rates, dict(watched)
        self.steps, self.number = len(rates), len(done)
        steps = self.steps
        self.losses = torch.zeros(steps, dtype=torch.float64)
        self.losses[: self.number] = done
        # NaN before a resumed step, which says nothing.
        size = sum(value.numel() for value in self.watched.values())
        self.path = torch.full((steps, size), torch.nan, dtype=torch.float32)
        self._losses: list[Tensor] = []
        self._path: list[Tensor] = []
        self._bar = tqdm(total=steps, initial=self.number, desc=name, disable=not progress)

    def record(self, loss: Tensor) -> None:
        """One more step is done: its loss, and where the watched sites are now.

        Raises:
            ConvergenceError: the loss became infinite or NaN; names the step.
        """
        self._losses.append(loss)
        if self.watched:
            self._path.append(torch.cat([v.detach().flatten() for v in self.watched.values()]))
        self.number += 1
        if self.number % _LOOK_EVERY == 0 or self.number == self.steps:
            self._look()

    def so_far(self) -> Tensor:
        """(steps so far,) the losses."""
        self._store()
        return self.losses[: self.number]

    def finish(self) -> list[str]:
        """Ends the run; warns of a loss that went astray and of θ that was still moving.

        Returns:
            The global sites with more than a prior scale left to go. False-alarm rate below 1e-4
            per coordinate for noise around a fixed point; see `hbmeta.drift`.
        """
        self._store()
        self._bar.close()
        far = left_to_go(self.path, self.rates).abs() > FAR
        masks = far.split([value.numel() for value in self.watched.values()])
        moving = [
            name.removeprefix("theta/")
            for name, mask in zip(self.watched, masks, strict=True)
            if bool(mask.any())
        ]
        complaints = [self._divergence()]
        if moving:
            complaints.append(
                f"theta was still moving ({', '.join(moving)}) when training ended: raise steps."
            )
        for complaint in filter(None, complaints):
            # Past train, learn and fit, to the line that called fit.
            warnings.warn(f"{self.name}: {complaint}", stacklevel=5)
        return moving

    def _store(self) -> None:
        rows = slice(self.number - len(self._losses), self.number)
        if self._losses:
            self.losses[rows] = torch.stack(self._losses).to(self.losses)
        if self._path:
            self.path[rows] = torch.stack(self._path).to(self.path)
        self._losses, self._path = [], []

    def _look(self) -> None:
        self._store()
        first = max(self.number - _LOOK_EVERY, 0)
        recent = self.losses[first : self.number]
        if not bool(torch.isfinite(recent).all()):
            step = first + int((~torch.isfinite(recent)).nonzero()[0])
            self._bar.close()
            raise ConvergenceError(
                f"{self.name}.fit",
                needed="a finite loss",
                found=f"{self.losses[step].item()} at step {step}",
                do="Lower step_size or the learning rates, or standardise x and y.",
            )
        self._bar.update(self.number - self._bar.n)
        self._bar.set_postfix(loss=f"{recent.mean():.4f}", refresh=False)

    def _divergence(self) -> str:
        """What to say where a loss that stayed finite shows that training went wrong.

        Losses are nats per point or per task, so that medians of the first and the last tenth are
        compared by their difference; far beyond any data is a loss of 1e9.
        """
        few = max(self.steps // 10, 1)
        first, last = float(self.losses[:few].median()), float(self.losses[-few:].median())
        if not last > min(_HUGE, first + max(_FAR_ABOVE, 10 * abs(first))):
            return ""
        return (
            f"the loss began at {first:.3g} and ended at {last:.3g}, so training has diverged. "
            "Lower step_size or the learning rates, or standardise x and y."
        )
