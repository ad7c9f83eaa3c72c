"""A formula as a model: the program is written as text, and the text is what runs."""

from __future__ import annotations

import dataclasses
import hashlib
import linecache
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Self

import pandas as pd
import torch
from torch import Tensor

from hbmeta.errors import DataError
from hbmeta.files import JSON
from hbmeta.models.formula_priors import (
    FORMULA_FAMILIES,
    FormulaFamily,
    Prior,
    prior_text,
    priors_of,
    shapes_of,
    site_names,
)
from hbmeta.models.formula_program import write_program
from hbmeta.models.hierarchical import HierarchicalModel
from hbmeta.models.responses import check_response
from hbmeta.tasks import Schema, Tasks, TaskSet
from hbmeta.tasks.columns import Column
from hbmeta.tasks.design import Design

__all__ = ["FormulaModel", "from_formula"]

_WHERE = "from_formula"


class FormulaModel(HierarchicalModel):
    """The program of a formula: `source`, compiled.

    All three levels stand in the text, so that `forward` runs it in place of `level_one`,
    `task_prior` and `likelihood`, in the flat layout. A copy of the text that a person edits is a
    program like any other, and takes the same tasks.

    Global sites: "fixed" (common columns), "scale" and "correlation" of the task's coefficients,
    "scale_g", "correlation_g" and "z_g" of every other group g, and the family's "noise",
    "degrees_of_freedom" or "shape". Local site: "coefficients" (k,), those of the task itself, the
    population's included; "coefficients_2" of a second term of the task. Deterministic: "effects_g"
    (levels, k).

    With other groups "z_g" and "scale_g" have no sensible joint mode (`hbmeta.effects`): what holds
    θ at a point refuses them. Laplace integrates "z_g" out by itself; NUTS, Pathfinder and
    Variational(theta="distribution") draw them.

    Args:
        design: the columns, learned from a table.
        family: of the response.
        priors: an expression per site.
        schema: how a table becomes tasks.
    """

    def __init__(
        self,
        design: Design | Mapping[str, Any],
        family: FormulaFamily,
        priors: Mapping[str, str],
        schema: str,
    ) -> None:
        super().__init__()
        self.design = design if isinstance(design, Design) else Design.from_json(design)
        self.family = family
        shapes = shapes_of(self.design, family)
        self.priors = {name: prior_text(priors[name], name, shapes[name]) for name in shapes}
        self.schema = Schema.from_json(schema)
        self.source = write_program(self.design, family, self.priors)
        self._program = _compiled(self.source)

    def __str__(self) -> str:
        return self.source

    def __repr__(self) -> str:
        return f"FormulaModel({self.design.formula!r}, family={self.family!r})"

    def forward(  # type: ignore[override]  # one layout
        self, x: Tensor, y: Tensor | None = None, *, task: Tensor, n_tasks: int
    ) -> Tensor:
        """Run the program.

        Args:
            x: (rows, features), the columns that `source` lists.
            y: (rows,); None draws it.
            task: (rows,) group index.
            n_tasks: number of tasks.
        """
        y = None if y is None else y.to(x.dtype)
        found: Tensor = self._program(x, y, task=task, n_tasks=n_tasks)
        return found

    def tasks(self, frame: pd.DataFrame) -> TaskSet:
        """The tasks of a table: the one that the formula was written for, or a further one.

        Args:
            frame: a table with the columns of the formula. Rows with a missing value are left out
                (`dropped` counts them).
        Raises:
            DataError: a column is absent, a level of a column or of a group that is not the task
                was not learned, or y is what the family cannot have.
        """
        encoded = self.schema.encode(frame, need_y=True)
        tasks = encoded.tasks
        check_response(tasks, self.family, self.design.trials, where=f"{_WHERE}.tasks")
        return TaskSet(
            tasks,
            schema=self.schema,
            dropped=encoded.dropped,
            support_rows=torch.tensor(encoded.rows),
        )

    def bind(self, tasks: Tasks) -> Self:
        """The model itself, after a look at the columns.

        Raises:
            DataError: the tasks have other columns, or a dtype too coarse for the codes of groups.
        """
        if tasks.features != self.design.features:
            raise DataError(
                "FormulaModel.bind",
                needed=f"x with the columns of the formula: {list(self.design.features)}",
                found=str(list(tasks.features)),
                do="Build the tasks with model.tasks(frame).",
            )
        most = max((len(levels) for levels in self.design.levels.values()), default=0)
        if most * torch.finfo(tasks.dtype).eps > 1:
            raise DataError(
                "FormulaModel.bind",
                needed=f"a dtype that counts to {most}, the levels of a group, without rounding",
                found=str(tasks.dtype).removeprefix("torch."),
                do="Pass tasks.to(dtype=torch.float32).",
            )
        check_response(tasks, self.family, self.design.trials, where="FormulaModel.bind")
        return self

    def coordinates(self) -> dict[str, list[str]]:
        """The columns that coefficients belong to."""
        names = {"fixed": list(self.design.common)}
        for block, suffix in site_names(self.design):
            columns = list(block.columns)
            site = "coefficients" if block.group == self.design.task else "effects"
            names |= {f"scale{suffix}": columns, f"{site}{suffix}": columns}
        return names

    def settings(self) -> dict[str, JSON]:
        """The arguments of the constructor; the text is written from them again."""
        return {
            "design": dataclasses.asdict(self.design),
            "family": self.family,
            "priors": dict(self.priors),
            "schema": self.schema.to_json(),
        }


def from_formula(
    formula: str,
    frame: pd.DataFrame,
    family: FormulaFamily = "gaussian",
    *,
    group: str | None = None,
    priors: Mapping[str, Prior] | None = None,
    dtype: torch.dtype = torch.float64,
) -> FormulaModel:
    """A mixed-effects model from a formula, as a Pyro program that can be read and edited.

        y_ij ~ family(link⁻¹(η_ij)),   η_ij = Σ_c φ_ic x_ijc + Σ_f β_f x_ijf + other groups
        φ_i ~ N(μ, Σ),  Σ = diag(scale) L Lᵀ diag(scale),  L Lᵀ ~ LKJ(1)

    | family | y given η | link |
    |---|---|---|
    | gaussian | N(η, noise²) | identity |
    | student_t | StudentT(degrees_of_freedom, η, noise) | identity |
    | bernoulli | Bernoulli, y 0 or 1 or two levels, the first of which is 0 | logit |
    | binomial | Binomial(n), written p(k, n) ~ ... | logit |
    | poisson | Poisson | log |
    | negative_binomial | mean μ, variance μ + μ² / shape | log |

    The grammar stands in `hbmeta.tasks.formula`, the priors in `hbmeta.models.formula_priors`, the
    program in `model.source` (`print(model)`). What is not a group term is formulaic's: contrasts
    C(x), interactions, bs(), poly(), I(x**2), stateful transforms, which keep for later tables what
    they learned from this one.

    Args:
        formula: such as "reaction ~ days + (1 + days | subject)".
        frame: the table, one row per observation. Rows with a missing value in a column of the
            formula are left out, with a warning that counts them.
        family: one of the table.
        group: which group is the task; by default the one with the most levels, whose
            coefficients are then what a strategy integrates out. The effects of the others are
            drawn at level 1.
        priors: in place of the scaled ones, by site or column: {"noise": "HalfNormal(10)", "days":
            "Normal(0, 5)"}.
        dtype: floating dtype of the tasks.
    Returns:
        The model; `model.tasks(frame)` are the tasks to fit it on.
    Raises:
        DataError: the formula, the table, the family or a prior cannot be used.
    References:
        Bates, Mächler, Bolker, Walker (2015), Journal of Statistical Software 67(1). Capretto et
        al. (2022), Journal of Statistical Software 103(15).
    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame(
        ...     {
        ...         "subject": ["a", "a", "b", "b"],
        ...         "days": [0.0, 1.0, 0.0, 2.0],
        ...         "reaction": [250.0, 262.0, 240.0, 275.0],
        ...     }
        ... )
        >>> model = from_formula("reaction ~ days + (1 + days | subject)", frame)
        >>> model.tasks(frame)
        TaskSet(2 groups, 4 rows, not split, features [days])
    """
    if family not in FORMULA_FAMILIES:
        raise DataError(
            _WHERE,
            needed=f"a family among {', '.join(FORMULA_FAMILIES)}",
            found=repr(family),
            do="Edit the response in the text of one of them, model.source, for another.",
        )
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise DataError(
            _WHERE, needed="a floating dtype", found=f"{dtype!r}", do="Pass torch.float64."
        )
    design = Design.learn(formula, frame, group)
    if (design.trials is not None) != (family == "binomial"):
        raise DataError(
            _WHERE,
            needed="the response p(successes, trials) with family 'binomial', and there alone",
            found=f"{design.parsed.response!r} with family {family!r}",
            do='Write p(k, n) ~ ..., or pass family="bernoulli" for single trials.',
        )
    table, rows = design.table(frame, missing="drop", need_y=True)
    if len(rows) < len(frame):
        warnings.warn(
            f"{_WHERE}: {len(frame) - len(rows)} of {len(frame)} rows have a missing value in a "
            "column of the formula and are left out.",
            stacklevel=2,
        )
    y = Column.learn(table[design.response], standardise=False, where=_WHERE)
    if y.levels and (family != "bernoulli" or len(y.levels) > 2):
        raise DataError(
            _WHERE,
            needed="a numeric response, or one of two levels with family 'bernoulli'",
            found=f"{design.response!r} with the levels {', '.join(map(repr, y.levels[:8]))}",
            do="Choose another family, or compute a numeric column.",
        )
    x = tuple(Column(name, "numeric") for name in design.features)
    name = str(dtype).removeprefix("torch.")
    schema = Schema(design.label, x, y, "drop", "raise", name, design)
    tasks = schema.encode(frame, need_y=True).tasks
    check_response(tasks, family, design.trials, where=_WHERE)
    return FormulaModel(
        design, family, priors_of(design, family, tasks, priors or {}), schema.to_json()
    )


def _compiled(source: str) -> Callable[..., Tensor]:
    """The function `model` of a text; tracebacks show its lines."""
    name = f"<formula {hashlib.sha256(source.encode()).hexdigest()[:12]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"__name__": "hbmeta_formula"}
    exec(compile(source, name, "exec"), namespace)
    program: Callable[..., Tensor] = namespace["model"]
    return program
