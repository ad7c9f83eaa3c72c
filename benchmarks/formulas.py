"""Mixed-effects formulas on data that others have published estimates of.

    python -m benchmarks.formulas [--only NAME ...] [--quick] [--again]

needs $HBMETA_DATA or ../shared/data. Every formula is fitted by Laplace (θ at the mode of its
posterior density, the coefficients of the tasks integrated out) and by NUTS, and by Bambi with its
own defaults where that is installed; a Gaussian model of one group by maximum likelihood too
(ExactLinear), which is what lme4 and MixedModels.jl publish. Maximum likelihood has no priors: a
posterior mean of a standard deviation with few groups lies above it. Bambi takes the coefficients
of a group as independent. Where several groups are crossed, Laplace integrates all effects out.
Seconds are those of a whole fit, compiling included. InstEval is cut to its first 150 students.
The figure of a formula sets Laplace's posterior beside no and complete pooling; crossed groups are
left out of these two. What is done is kept under results/formulas; --again makes it anew. --quick
draws little and keeps nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.machine import describe
from benchmarks.programs import data_folder
from hbmeta import plots
from hbmeta.files import atomic, write_text
from hbmeta.fitted import Fitted
from hbmeta.inference import NUTS, CompletePooling, ExactLinear, Laplace, NoPooling
from hbmeta.models import FormulaModel, from_formula
from hbmeta.models.formula_priors import FormulaFamily, site_names
from hbmeta.tasks import TaskSet

SEED = 0
ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "results" / "formulas"
IMAGES = ROOT / "docs" / "images"
Estimates = dict[str, tuple[float, float | None]]
"""Mean and, where it was drawn, sd by parameter."""


@dataclass(frozen=True)
class Case:
    """A formula and a table.

    Attributes:
        published: estimates by parameter, and where they stand.
        students: keep the rows of so many levels of the first group.
        one_group: the formula without the groups that are crossed with the task.
    """

    name: str
    file: str
    formula: str
    family: FormulaFamily = "gaussian"
    published: dict[str, float] = field(default_factory=dict)
    source: str = ""
    students: int | None = None
    one_group: str = ""

    @property
    def image(self) -> str:
        """The name of the figure."""
        return f"pooling_{self.name.lower()}.png"

    def frame(self, folder: Path) -> pd.DataFrame:
        """The table."""
        frame = pd.read_csv(folder / "mixed_effects" / self.file, float_precision="round_trip")
        return frame if self.students is None else frame[frame["s"] <= self.students]


CASES = (
    Case(
        "sleepstudy",
        "lme4/sleepstudy.csv",
        "Reaction ~ Days + (1 + Days | Subject)",
        published={
            "Intercept": 251.405,
            "Days": 10.4673,
            "sd Intercept | Subject": 23.78047,
            "sd Days | Subject": 5.71683,
            "cor Intercept, Days | Subject": 0.08,
            "noise": 25.59182,
            "log likelihood": -875.9697,
        },
        source="MixedModels.jl, ML",
    ),
    Case("Orthodont", "nlme/Orthodont.csv", "distance ~ age * Sex + (1 + age | Subject)"),
    Case("Oxboys", "nlme/Oxboys.csv", "height ~ age + I(age**2) + (1 + age | Subject)"),
    Case("ChickWeight", "datasets/ChickWeight.csv", "weight ~ Time * C(Diet) + (1 + Time | Chick)"),
    Case(
        "Contraception",
        "mlmRev/Contraception.csv",
        "use ~ age + I(age**2) + urban + livch + (1 | district)",
        "bernoulli",
    ),
    Case(
        "cbpp",
        "lme4/cbpp.csv",
        "p(incidence, size) ~ C(period) + (1 | herd)",
        "binomial",
        published={
            "Intercept": -1.3983,
            "C(period)[T.2]": -0.9919,
            "C(period)[T.3]": -1.1282,
            "C(period)[T.4]": -1.5797,
            "sd Intercept | herd": 0.6421,
        },
        source="lme4, Laplace",
    ),
    Case(
        "VerbAgg",
        "lme4/VerbAgg.csv",
        "r2 ~ Anger + Gender + btype + situ + mode + (1 | id) + (1 | item)",
        "bernoulli",
        published={
            "Intercept": -0.152977,
            "Anger": 0.0573961,
            "Gender[T.M]": 0.320783,
            "btype[T.scold]": -1.05988,
            "btype[T.shout]": -2.10389,
            "situ[T.self]": -1.05438,
            "mode[T.want]": 0.706981,
            "sd Intercept | id": 1.339212,
            "sd Intercept | item": 0.342271,
        },
        source="MixedModels.jl, Laplace",
        one_group="r2 ~ Anger + Gender + btype + situ + mode + (1 | id)",
    ),
    Case(
        "Hsb82", "mlmRev/Hsb82.csv", "mAch ~ meanses * cses + sector * cses + (1 + cses | school)"
    ),
    Case(
        "InstEval",
        "lme4/InstEval.csv",
        "y ~ service + (1 | s) + (1 | d) + (1 | dept:service)",
        students=150,
        one_group="y ~ service + (1 | d)",
    ),
)


def estimates(model: FormulaModel, fitted: Any) -> Estimates:
    """Level 1 of a fit under the names of the formula; the effects of other groups left out."""
    found: Estimates = {}

    def put(name: str, value: torch.Tensor) -> None:
        # Draws of φ at one θ repeat that θ.
        spread = float(value.std()) if fitted.drawn else 0.0
        mean = float(value.mean())
        found[name] = (mean, spread if spread > 1e-9 * abs(mean) else None)

    values = fitted.globals()
    for i, name in enumerate(model.design.common):
        put(name, values["fixed"][..., i])
    for block, suffix in site_names(model.design):
        for i, name in enumerate(block.columns):
            put(f"sd {name} | {block.group}", values[f"scale{suffix}"][..., i])
        factor = values.get(f"correlation{suffix}")
        if factor is not None:
            correlation = factor @ factor.mT
            for i, first in enumerate(block.columns):
                for j, second in enumerate(block.columns[:i]):
                    put(f"cor {second}, {first} | {block.group}", correlation[..., j, i])
    for name in ("noise", "degrees_of_freedom", "shape"):
        if name in values:
            put(name, values[name])
    return found


def coded(frame: pd.DataFrame, tasks: TaskSet) -> pd.DataFrame:
    """The table with a response of two levels as 0 and 1, which Bambi would turn round."""
    assert tasks.schema is not None
    levels = tasks.schema.y_levels
    name = tasks.schema.y_name
    return frame.assign(**{name: (frame[name] == levels[1]).astype(int)}) if levels else frame


def bambi(case: Case, frame: pd.DataFrame, draws: int) -> tuple[Estimates, float]:
    """Bambi's posterior under the same names, and seconds."""
    import arviz
    from bambi import Model

    start = time.perf_counter()
    model = Model(case.formula, frame, family=case.family)
    drawn = model.fit(draws=draws, tune=500, chains=2, cores=1, random_seed=SEED, progressbar=False)
    seconds = time.perf_counter() - start
    summary = arviz.summary(drawn, kind="stats")
    found: Estimates = {}
    for label, row in summary.iterrows():
        value = (float(row["mean"]), float(row["sd"]))
        effect = re.fullmatch(r"(.+)\|(.+)_sigma(?:\[(.+)\])?", str(label))
        if effect is None:
            found["noise" if label == "sigma" else str(label)] = value
        else:
            name = "Intercept" if effect[1] == "1" else effect[1]
            found[f"sd {name} | {effect[2]}"] = value
    return found, seconds


def theirs(name: str) -> str:
    """Bambi's name of a coefficient: a:b[T.c] is "a:b[c]", a[T.c]:b is "a:b[c]"."""
    levels = re.findall(r"\[T\.([^\]]*)\]", name)
    bare = re.sub(r"\[T\.[^\]]*\]", "", name)
    return f"{bare}[{', '.join(levels)}]" if levels else bare


def draw(case: Case, frame: pd.DataFrame, tasks: TaskSet, laplace: Fitted) -> None:
    """The figure of partial pooling, into docs/images."""
    model = from_formula(case.one_group or case.formula, frame, case.family)
    alone, complete = (
        strategy.fit(model, model.tasks(frame), seed=SEED, progress=False).adapt(model.tasks(frame))
        for strategy in (NoPooling(), CompletePooling())
    )
    columns = next(b.columns for b in model.design.blocks if b.group == model.design.task)
    figure = plots.shrinkage(
        alone,
        complete,
        laplace.adapt(tasks),
        "coefficients",
        range(len(columns)),
        label=[f"{name} | {model.design.task}" for name in columns],
    )
    with atomic(IMAGES / case.image) as path:
        figure.savefig(path, dpi=90)


def table(case: Case, folder: Path, *, draws: int, figure: bool) -> list[str]:
    """The lines of one formula."""
    frame = case.frame(folder)
    model = from_formula(case.formula, frame, case.family)
    tasks = model.tasks(frame)
    columns: dict[str, Estimates] = {}
    if case.source:
        columns[case.source] = {name: (value, None) for name, value in case.published.items()}
    if case.family == "gaussian" and not model.design.levels:
        exact = ExactLinear().fit(model, tasks, seed=SEED, compile=False)
        likelihood = {"log likelihood": (float(exact.info["log_evidence"]), None)}
        columns["ExactLinear, ML"] = estimates(model, exact) | likelihood
    laplace = Laplace().fit(model, tasks, seed=SEED, progress=False)
    nuts = NUTS(draws=draws, chains=2, warmup=500, processes=1).fit(
        model, tasks, seed=SEED, progress=False
    )
    if figure:
        draw(case, frame, tasks, laplace)
    columns["Laplace"], columns["NUTS"] = estimates(model, laplace), estimates(model, nuts)
    seconds = {"Laplace": laplace.seconds.fit, "NUTS": nuts.seconds.fit}
    if importlib.util.find_spec("bambi") is not None:
        columns["Bambi"], seconds["Bambi"] = bambi(case, coded(frame, tasks), draws)
    groups = ", ".join(
        [f"{tasks.n_tasks} {model.design.task} (the task)"]
        + [f"{len(levels)} {name}" for name, levels in model.design.levels.items()]
    )
    lines = [
        f"## {case.name}: `{case.formula}`, {case.family}",
        "",
        f"{tasks.tasks.n_points:,} rows; {groups}.",
        "",
        f"| | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name in dict.fromkeys(name for found in columns.values() for name in found):
        if name not in columns["NUTS"] and name != "log likelihood":
            continue  # Bambi's name of another row
        cells = []
        for found in columns.values():
            value = found.get(name, found.get(theirs(name)))
            cells.append("–" if value is None else _cell(*value))
        lines.append(f"| {name.replace('|', chr(92) + '|')} | {' | '.join(cells)} |")
    times = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    quality = (
        f"NUTS: largest R̂ {_largest_r_hat(nuts):.3f}, {nuts.info['divergences']} divergences, "
    )
    quality += f"{nuts.info['parametrisation']['coefficients']}"
    shown = f"![Partial pooling of {case.name}](../../docs/images/{case.image})"
    return [*lines, "", f"Seconds: {times}. {quality}.", "", shown, ""]


def _largest_r_hat(fitted: Any) -> float:
    import arviz

    data = fitted.to_inference_data()
    names = [site.name for site in fitted.problem.sites.globals if site.name[:2] != "z_"]
    names = [name for name in names if name[:11] != "correlation"]
    found = arviz.rhat(data, var_names=names)
    return max(float(found[name].max()) for name in found)


def _cell(mean: float, sd: float | None) -> str:
    digits = f"{mean:.4f}" if abs(mean) > 500 else f"{mean:.4g}"
    return digits if sd is None else f"{mean:.4g} ± {sd:.2g}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Fits and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [case.name for case in CASES]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--quick", action="store_true", help="200 draws, no figure, nothing kept")
    parser.add_argument("--again", action="store_true", help="make anew what is kept")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"# Formulas\n\n{describe(SEED)}, one thread\n")
    for case in CASES:
        if case.name not in chosen.only:
            continue
        if chosen.quick:
            text = "\n".join(table(case, data_folder(), draws=200, figure=False))
        else:
            path = KEPT / f"{case.name}.md"
            if chosen.again or not path.exists():
                write_text(path, "\n".join(table(case, data_folder(), draws=1000, figure=True)))
            text = path.read_text()
        print(text, flush=True)


if __name__ == "__main__":
    main()
