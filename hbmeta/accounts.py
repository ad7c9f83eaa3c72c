"""The record that `ledger` returns: what a meta-step of each strategy costs, as plain numbers."""

from __future__ import annotations

import json
import os
import statistics
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hbmeta.errors import FileError
from hbmeta.rows import as_json, unknown_name
from hbmeta.tables import aligned

if TYPE_CHECKING:
    import pandas

__all__ = ["Entry", "Ledger", "cost_ratio"]

_MEBIBYTE = 2**20


def cost_ratio(steps: int, c: float) -> float:
    """(N + 1 + c N) / (N + 1): MAML's cost in units of first-order MAML's, N = `steps`.

    Args:
        steps: N, inner steps.
        c: what a Hessian-vector product costs, in gradients. 2 gives 8/3 at N = 5, and 3 at most.
    """
    return (steps + 1 + c * steps) / (steps + 1)


@dataclass(frozen=True)
class Entry:
    """What one meta-step of a strategy costs.

    Attributes:
        name: the caller's name of it.
        strategy: its class.
        settings: its settings.
        gradients: gradients of the tasks' losses in φ, each of all tasks at once; None where the
            strategy does not count them.
        products: Hessian-vector products, likewise.
        graph_kept: whether a product goes back through the graph of a gradient that is counted.
        moving: numbers of φ that move, per task; None where nothing is counted.
        loss: the value, where training starts.
        times: seconds of one meta-step in every round.
        peak_bytes: the most bytes of tensors that a meta-step held at once, its result included,
            beyond data and θ.
        tier: how it ran: "eager", "graph" or "compiled".
        seconds_staging: spent on tracing and compiling it, once in a fit.
    """

    name: str
    strategy: str
    settings: Mapping[str, Any]
    gradients: int | None
    products: int | None
    graph_kept: bool
    moving: int | None
    loss: float
    times: tuple[float, ...]
    peak_bytes: int
    tier: str
    seconds_staging: float

    @property
    def seconds(self) -> float:
        """Of one meta-step, the median over rounds."""
        return statistics.median(self.times)


@dataclass(frozen=True)
class Ledger:
    """What one meta-step of each strategy costs on the same tasks.

    Attributes:
        entries: one per strategy, in the caller's order.
        baseline: the strategy that ratios are to; None where there is none.
        gradient_times: seconds of one gradient of the support loss in φ, of all tasks at once, in
            every round.
        product_times: likewise of one Hessian-vector product by itself.
        tier: how these two ran.
        program: the model or program.
        n_tasks: tasks in the step.
        support_points: rows of all supports.
        query_points: rows of all queries.
        phi_size: numbers in a task's φ.
        dtype: of the data.
        device: where it ran.
        threads: of torch, while it ran.
        steps: training steps of the fit that the staging is meant for.
        seed: of tasks, of what the strategies learn, and of noise.
        versions: of hbmeta and of the packages under it.
    """

    entries: tuple[Entry, ...]
    baseline: str | None
    gradient_times: tuple[float, ...]
    product_times: tuple[float, ...]
    tier: str
    program: str
    n_tasks: int
    support_points: int
    query_points: int
    phi_size: int
    dtype: str
    device: str
    threads: int
    steps: int
    seed: int
    versions: Mapping[str, str]

    def __getitem__(self, name: str) -> Entry:
        """The entry of a strategy."""
        entries = {entry.name: entry for entry in self.entries}
        if name not in entries:
            raise unknown_name(name, entries, needed="an entry of", where="Ledger")
        return entries[name]

    @property
    def c(self) -> float:
        """Seconds of a Hessian-vector product by itself, in those of a gradient.

        The median over rounds of their ratio in a round, as all ratios here: what slows the machine
        down for a while hits both.
        """
        return _paired(self.product_times, self.gradient_times)

    def ratio(self, name: str) -> float | None:
        """Seconds of a meta-step in those of the baseline's; None without a baseline."""
        if self.baseline is None:
            return None
        return _paired(self[name].times, self[self.baseline].times)

    def formula(self, name: str, *, graph_kept: bool = False) -> float | None:
        """What the counts and c make the ratio to be; (N + 1 + c N) / (N + 1) for MAML to FOMAML.

        Args:
            name: of the entry.
            graph_kept: with c − 1 in the place of c, for entries whose products go back through
                gradients that are counted; None for others.
        Returns:
            None where one of the two is not counted, or moves a part of φ only, so that its
            gradients are others than c was measured on.
        """
        if self.baseline is None:
            return None
        one, other = (self._gradients(n, graph_kept) for n in (name, self.baseline))
        if one is None or other is None or (graph_kept and not self[name].graph_kept):
            return None
        return one / other

    def _gradients(self, name: str, graph_kept: bool) -> float | None:
        """The cost of a meta-step in gradients."""
        entry = self[name]
        if entry.gradients is None or entry.products is None or entry.moving != self.phi_size:
            return None
        if not entry.products:
            return float(entry.gradients)
        c = self.c - 1.0 if graph_kept and entry.graph_kept else self.c
        return entry.gradients + c * entry.products

    def __str__(self) -> str:
        lines = [
            f"One meta-step on {self.n_tasks} tasks: {self.support_points} support and "
            f"{self.query_points} query points, φ of {self.phi_size:,} numbers per task",
            f"{self.program}, {self.dtype} on {self.device}, {self.threads} "
            f"thread{'s' * (self.threads != 1)}; medians of {len(self.gradient_times)} rounds",
            "",
            *aligned(*self._cells()),
            "",
        ]
        gradient, product = (
            _milliseconds(statistics.median(t)) for t in (self.gradient_times, self.product_times)
        )
        remarks = [
            "Gradients and Hessian-vector products are those of all tasks at once.",
            f"Measured ({self.tier}): {gradient} ms for a gradient, {product} ms for a product by "
            f"itself: c = {self.c:.2f}.",
        ]
        if self.baseline is not None:
            remarks.append(
                "formula: (gradients + c · products) / gradients of the baseline, which is "
                "(N + 1 + c N) / (N + 1) for MAML; graph kept: with c − 1 in the place of c, "
                "because the gradient under a product has been computed."
            )
        lines += [textwrap.fill(text, 104, subsequent_indent="  ") for text in remarks]
        return "\n".join(lines)

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        head = ["", "gradients", "products", "ms"]
        if self.baseline is not None:
            head += [f"ms / {self.baseline}", "formula", "graph kept"]
        head += ["peak MiB", "tier"]
        body = []
        for entry in self.entries:
            cells = [entry.name, *(_count(n) for n in (entry.gradients, entry.products))]
            cells.append(_milliseconds(entry.seconds))
            if self.baseline is not None:
                found = [self.ratio(entry.name), self.formula(entry.name)]
                found.append(self.formula(entry.name, graph_kept=True))
                cells += ["–" if value is None else f"{value:.2f}" for value in found]
            body.append([*cells, f"{entry.peak_bytes / _MEBIBYTE:.2f}", entry.tier])
        return head, body

    def to_frame(self) -> pandas.DataFrame:
        """One line per strategy: counts, seconds, bytes, and the ratios to the baseline."""
        import pandas as pd

        records = []
        for entry in self.entries:
            record = {k: v for k, v in vars(entry).items() if k not in ("settings", "times")}
            record["seconds"] = entry.seconds
            record["ratio"] = self.ratio(entry.name)
            record["formula"] = self.formula(entry.name)
            record["formula_graph_kept"] = self.formula(entry.name, graph_kept=True)
            records.append(record)
        frame = pd.DataFrame.from_records(records).set_index("name")
        counts = dict.fromkeys(("gradients", "products", "moving"), "Int64")
        ratios = dict.fromkeys(("ratio", "formula", "formula_graph_kept"), float)
        return frame.astype({**counts, **ratios})

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """All numbers as strict JSON, which `from_json` reads; also into a file, atomically."""
        content = {"kind": "ledger", **asdict(self), "c": self.c}
        return as_json(content, path)

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """The ledger that `to_json` wrote.

        Raises:
            FileError: the text is none.
        """
        try:
            fields = json.loads(text)
            if fields.pop("kind") != "ledger":
                raise ValueError("another kind of record")
            fields.pop("c")
            fields |= {name: tuple(fields[name]) for name in ("gradient_times", "product_times")}
            entries = tuple(
                Entry(**{**entry, "times": tuple(entry["times"])})
                for entry in fields.pop("entries")
            )
            return cls(entries=entries, **fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(
                "Ledger.from_json",
                needed="the text that Ledger.to_json wrote",
                found=f"{type(error).__name__}: {error}",
                do="Write it anew with ledger.to_json().",
            ) from error


def _paired(times: tuple[float, ...], other: tuple[float, ...]) -> float:
    return statistics.median(one / two for one, two in zip(times, other, strict=True))


def _count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"
