"""One study: several strategies fitted to one model, their level-1 estimates, and its files."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hbmeta import inference, plots
from hbmeta.errors import ConvergenceError, CurvatureError, DataError, UnsupportedModelError
from hbmeta.files import atomic
from hbmeta.fitted import Fitted
from hbmeta.inference import Strategy
from hbmeta.program import Program
from hbmeta.records import Comparison
from hbmeta.tables import aligned
from hbmeta.tasks import TaskSet

__all__ = ["STRATEGIES", "Choice", "Estimates", "estimates", "fit_all", "level_one", "write"]

Estimates = Mapping[str, Mapping[str, float | None]]
"""By name of a level-1 coordinate: its "mean", and its "sd" or None where θ is a point."""


@dataclass(frozen=True)
class Choice:
    """A strategy as a study runs it, and its training steps."""

    strategy: Strategy
    steps: int = 1

    def quick(self) -> Choice:
        """A first look: a fifth of the work."""
        if isinstance(self.strategy, inference.NUTS):
            return replace(self, strategy=inference.NUTS(draws=300, warmup=300, chains=2))
        return replace(self, steps=max(1, self.steps // 5))


STRATEGIES = {
    "nuts": Choice(inference.NUTS()),
    "amortized": Choice(inference.AmortizedGuide(), steps=5000),
    "maml": Choice(inference.MAML(steps=5, step_size=0.05), steps=2000),
    "exact": Choice(inference.ExactLinear()),
    "no_pooling": Choice(inference.NoPooling()),
    "complete_pooling": Choice(inference.CompletePooling()),
}
"""The strategies of a study by name."""


def fit_all(
    choices: Mapping[str, Choice],
    model: Program,
    known: TaskSet,
    *,
    seed: int,
    compile: str = "auto",
    say: Callable[[str], None],
) -> dict[str, Fitted]:
    """Fit each strategy; those that do not suit the model or the data are warned of and left out.

    Args:
        choices: strategies and their steps, by name.
        model: the model of all of them.
        known: the tasks to fit on.
        seed: of every fit.
        compile: as for `Strategy.fit`.
        say: takes one line per strategy.
    Raises:
        DataError: the data cannot be used, or no strategy is left.
    """
    fits: dict[str, Fitted] = {}
    for name, choice in choices.items():
        start = time.perf_counter()
        try:
            fits[name] = choice.strategy.fit(
                model, known, steps=choice.steps, seed=seed, compile=compile, progress=False
            )
        except (UnsupportedModelError, ConvergenceError, CurvatureError) as error:
            warnings.warn(f"{name} is left out. {error}", stacklevel=2)
            continue
        say(f"{name}: fitted in {time.perf_counter() - start:.1f} s")
    if not fits:
        raise DataError(
            "compare", needed="a strategy that can fit this", found="none", do="Add nuts."
        )
    return fits


def estimates(
    fitted: Fitted, labels: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float | None]]:
    """Mean and sd of each coordinate of the level-1 sites; sd is None where θ is a point.

    Sites that the loss of the fit did not touch are left out, and so are "mean" and "scale" where
    the strategy drops the task prior.

    Args:
        fitted: the fit.
        labels: names of the coordinates, by site.
    """
    dropped = () if fitted.strategy.keeps_prior else ("mean", "scale")
    out: dict[str, dict[str, float | None]] = {}
    # These still stand where their prior put them, which is no estimate.
    untouched = fitted.info.get("untouched", ())
    for site, value in fitted.globals().items():
        if site in untouched or site in dropped:
            continue
        draws = (value if fitted.drawn else value.unsqueeze(0)).double()
        draws = draws.reshape(len(draws), -1)
        names = labels.get(site, [str(i) for i in range(draws.shape[1])])
        for index, column in enumerate(draws.T):
            name = f"{site}[{names[index]}]" if value.dim() > int(fitted.drawn) else site
            sd = float(column.std()) if fitted.drawn and len(column) > 1 else None
            out[name] = {"mean": float(column.mean()), "sd": sd}
    return out


def level_one(found: Mapping[str, Estimates]) -> list[str]:
    """A table of the estimates of every fit, one line per coordinate."""
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    body = []
    for name in names:
        cells = [name]
        for values in found.values():
            mean, sd = (values[name][key] if name in values else None for key in ("mean", "sd"))
            if mean is None:
                cells.append("–")
            else:
                cells.append(f"{mean:.3g}" if sd is None else f"{mean:.3g} ± {sd:.2g}")
        body.append(cells)
    return aligned(["", *found], body)


def write(
    folder: Path, fits: Mapping[str, Fitted], tables: Mapping[str, Comparison], label: str
) -> None:
    """Write tables as JSON, the draws of "nuts" for ArviZ, and figures, each file atomically.

    Args:
        folder: where to; made if it is missing.
        fits: as `fit_all` gave them.
        tables: comparisons on the "known" and the "new" tasks.
        label: what the first coefficient is called in figures.
    Raises:
        FileError: a file cannot be written.
    """
    for name, table in tables.items():
        table.to_json(folder / f"comparison_{name}.json")
    if "nuts" in fits:
        with atomic(folder / "posterior.nc") as path:
            fits["nuts"].to_inference_data().to_netcdf(str(path))
    pooled = {n: f.posterior for n, f in fits.items() if not n.endswith("pooling")}
    figures = {"scores": plots.scores(tables["known"]), "scores_new": plots.scores(tables["new"])}
    if pooled:
        figures["forest"] = plots.forest(pooled, label=label)
    if pooled and "no_pooling" in fits:
        common = fits["complete_pooling"].posterior if "complete_pooling" in fits else None
        figures["shrinkage"] = plots.shrinkage(
            fits["no_pooling"].posterior, common, next(iter(pooled.values())), label=label
        )
    for name, figure in figures.items():
        with atomic(folder / f"{name}.png") as path:
            figure.savefig(path)
