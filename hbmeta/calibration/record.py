"""What simulation-based calibration found: ranks by quantity, and what they say."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from hbmeta.calibration.uniformity import chi_squared, envelope_p
from hbmeta.errors import FileError
from hbmeta.rows import as_json
from hbmeta.tables import aligned

__all__ = ["Calibration", "Coverage", "Ranks"]

_LEVELS = (0.5, 0.8, 0.9)


class Coverage(NamedTuple):
    """How often a central interval held the truth.

    Attributes:
        nominal: probability of the interval, one that L draws can have.
        found: share of the simulations.
        low: lower end of the central 99 % of that share where the nominal one is right.
        high: upper end.
    """

    nominal: float
    found: float
    low: float
    high: float


@dataclass(frozen=True)
class Ranks:
    """The ranks of one quantity.

    Attributes:
        name: a coordinate of a site, "log likelihood", "distance to a random point", or the name
            that the caller gave it.
        ranks: of the truth among the draws, 0..draws, one per independent simulation.
        draws: L.
    """

    name: str
    ranks: tuple[int, ...]
    draws: int

    @property
    def chi_squared_p(self) -> float:
        """Asymptotic p-value of χ² of the histogram."""
        return chi_squared(self.ranks, self.draws)[2]

    @property
    def envelope_p(self) -> float:
        """Exact p-value of the ECDF against its simultaneous band."""
        return envelope_p(self.ranks, self.draws)

    @property
    def shift(self) -> float:
        """Mean of the normal scores of the ranks: 0 where q is right.

        Positive where the truth lies above the draws: q is too low. In sds of q where q is Gaussian
        with the right sd.
        """
        return float(self._scores.mean())

    @property
    def spread(self) -> float:
        """sd of the normal scores: 1 where q is right, above 1 where q is too narrow."""
        return float(self._scores.std())

    @property
    def _scores(self) -> Any:
        z: Any = stats.norm.ppf((np.asarray(self.ranks) + 0.5) / (self.draws + 1))
        return z if len(z) else np.zeros(1)

    def coverage(self, level: float) -> Coverage:
        """Of the central interval between draws whose probability is nearest to `level`."""
        cut = max(1, min(round((self.draws + 1) * (1.0 - level) / 2), self.draws // 2))
        nominal = 1.0 - 2 * cut / (self.draws + 1)
        ranks = np.asarray(self.ranks)
        inside = (ranks >= cut) & (ranks <= self.draws - cut)
        number = max(len(ranks), 1)
        low, high = stats.binom(number, nominal).interval(0.99)
        return Coverage(nominal, float(inside.sum()) / number, low / number, high / number)


@dataclass(frozen=True)
class Calibration:
    """Ranks of every quantity, and how they came about.

    Attributes:
        strategy: name of the strategy.
        settings: of the strategy, as JSON.
        program: name of the program.
        meaning: "joint" (every simulation is fitted) or "adapted" (a fit is adapted to each).
        simulations: how many were run.
        draws: L of each.
        seed: of the simulations.
        quantities: the ranks.
        failed: simulations that the strategy could not do, and why the first of them.
        reason: of the first failure.
        thinning: effective draws per kept draw (of the worst coordinate, a mean over simulations),
            where the strategy measures them; below 1 the draws depend on each other, which by
            itself makes ranks uneven.
        data: a fingerprint of the x, and of the y that priors may be scaled by.
    """

    strategy: str
    settings: str
    program: str
    meaning: str
    simulations: int
    draws: int
    seed: int
    quantities: tuple[Ranks, ...]
    failed: int = 0
    reason: str = ""
    thinning: float | None = None
    data: str = ""

    def passes(self, alpha: float = 0.01) -> bool:
        """Whether no quantity leaves its band.

        Args:
            alpha: false-alarm rate of all quantities together (Bonferroni).
        """
        return not self.uneven(alpha)

    def uneven(self, alpha: float = 0.01) -> tuple[Ranks, ...]:
        """The quantities whose ranks leave their band, the worst first."""
        level = alpha / max(len(self.quantities), 1)
        bad = [(q.envelope_p, q) for q in self.quantities]
        return tuple(q for p, q in sorted(bad, key=lambda pair: pair[0]) if p <= level)

    def verdict(self, alpha: float = 0.01) -> str:
        """What the ranks say, in words."""
        said = [_said(q) for q in self.uneven(alpha)]
        count = f"{self.simulations} simulations"
        if said:
            out = f"{self.strategy} is not calibrated ({count}): {'; '.join(said)}."
        else:
            out = (
                f"No sign against {self.strategy} in {count}, at a false-alarm rate of {alpha:g} "
                f"for all {len(self.quantities)} quantities together."
            )
        if self.failed:
            out += f" {self.failed} simulations failed and are not counted: {self.reason}"
        if self.thinning is not None and self.thinning < 1.0:
            out += (
                f" Draws were autocorrelated ({self.thinning:.2f} effective ones per draw kept), "
                "which by itself makes ranks uneven: let the sampler draw more."
            )
        return out

    def __str__(self) -> str:
        names = ["quantity", "ranks", "χ² p", "band p", "shift", "spread"]
        head = [*names, *(f"in {level:.0%}" for level in _LEVELS)]
        body = []
        for q in self.quantities:
            cells = [f"{q.chi_squared_p:.2g}", f"{q.envelope_p:.2g}"]
            cells += [f"{q.shift:+.2f}", f"{q.spread:.2f}"]
            cells += [f"{q.coverage(level).found:.0%}" for level in _LEVELS]
            body.append([q.name, str(len(q.ranks)), *cells])
        return "\n".join([*aligned(head, body), "", self.verdict()])

    def to_frame(self) -> pd.DataFrame:
        """One row per quantity."""
        rows = []
        for q in self.quantities:
            row = {
                "quantity": q.name,
                "ranks": len(q.ranks),
                "chi_squared_p": q.chi_squared_p,
                "envelope_p": q.envelope_p,
                "shift": q.shift,
                "spread": q.spread,
            }
            for level in _LEVELS:
                found = q.coverage(level)
                row[f"coverage_{found.nominal:.2f}"] = found.found
            rows.append(row)
        return pd.DataFrame(rows).set_index("quantity")

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """All ranks as JSON, which `from_json` reads back; also into a file, atomically."""
        return as_json({"kind": "calibration", **asdict(self), "verdict": self.verdict()}, path)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """The record that `to_json` wrote.

        Raises:
            FileError: the text is none.
        """
        try:
            fields = json.loads(text)
            if fields.pop("kind") != "calibration":
                raise ValueError("another kind of record")
            fields.pop("verdict")
            quantities = tuple(
                Ranks(q["name"], tuple(q["ranks"]), q["draws"]) for q in fields.pop("quantities")
            )
            return cls(quantities=quantities, **fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(
                "Calibration.from_json",
                needed="the text that Calibration.to_json wrote",
                found=f"{type(error).__name__}: {error}",
                do="Write it anew with calibration.to_json().",
            ) from error


def _said(ranks: Ranks) -> str:
    """What uneven ranks mean for the posterior."""
    number = len(ranks.ranks)
    parts: list[str] = []
    # Three standard errors of a mean and of an sd of normal scores.
    if abs(ranks.shift) > 3 * ranks.spread / number**0.5:
        parts.append("too low" if ranks.shift > 0 else "too high")
    if abs(ranks.spread - 1.0) > 3 / (2 * number) ** 0.5:
        parts.append("too narrow" if ranks.spread > 1 else "too wide")
    return f"{ranks.name} {_joined(parts)}"


def _joined(parts: Sequence[str]) -> str:
    return " and ".join(parts) if parts else "of another shape"
