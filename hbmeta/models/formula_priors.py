"""Weakly informative priors of a formula's model, scaled from the data as Bambi scales them.

With m_c and s_c mean and standard deviation of column c over all rows (n in the denominator), and
m_y, s_y those of y for "gaussian" and "student_t", 0 and 1 for the families with a link:

| site | prior |
|---|---|
| "fixed", column c | N(0, b_c²), b_c = 2.5 s_y / s_c |
| "fixed", the constant | N(m_y, a²), a² = (2.5 s_y)² + Σ_c (b_c m_c)² over the common columns c |
| "scale" | HalfNormal(b_c) of column c, HalfNormal(a) of the constant |
| "correlation" | LKJ(1), uniform over correlation matrices |
| "noise" | half Student-t(4, s_y) ("gaussian", "student_t") |
| "degrees_of_freedom" | Gamma(2, 0.1) ("student_t") |
| "shape" | HalfCauchy(1) ("negative_binomial") |

A prior that a person gives is a distribution, or its text. It stands for a site ("scale",
"noise"), for every entry where it is one of a number, or for one coefficient by the name of its
column, and is then a Normal.

The sum in a² lets the constant, which is that of columns as they are, wander as far as the slopes
take it from the mean of the data. Bambi gives the same prior to the constant of centred columns,
and takes the coefficients of a group as independent; the LKJ prior is the default of brms. On the
logit scale Bambi 0.16 narrows the common coefficients (1 for a category, 1 / s_c for a number, 1.5
for the constant), which is not taken over: on the 56 rows of cbpp it moves a coefficient from the
−1.58 of lme4 to −1.29. The numbers are rounded to four digits, since they are read: the program
that is printed is the model.

References:
    Capretto et al. (2022), Bambi, Journal of Statistical Software 103(15), section 3; the rules are
    those of its bambi/priors/scaler.py and bambi/defaults. Bürkner (2017), brms, Journal of
    Statistical Software 80(1). Lewandowski, Kurowicka, Joe (2009), Journal of Multivariate Analysis
    100(9).
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import pyro.distributions as dist
import torch
from torch import Tensor

from hbmeta.errors import DataError
from hbmeta.rebuilding import tensors_of
from hbmeta.tasks import Tasks
from hbmeta.tasks.design import Block, Design
from hbmeta.tasks.formula_parts import INTERCEPT

__all__ = ["FORMULA_FAMILIES", "FormulaFamily", "Prior", "prior_text", "priors_of", "site_names"]

FormulaFamily = Literal[
    "gaussian", "student_t", "bernoulli", "binomial", "poisson", "negative_binomial"
]
FORMULA_FAMILIES: tuple[FormulaFamily, ...] = get_args(FormulaFamily)
Prior = str | torch.distributions.Distribution
"""A distribution of pyro.distributions, or its text, such as "Normal(0, 10)"."""

_WHERE = "from_formula"
_MEASURED = ("gaussian", "student_t")
_NODES = (
    *(ast.Expression, ast.Call, ast.keyword, ast.Attribute, ast.Name, ast.Load, ast.Constant),
    *(ast.List, ast.UnaryOp, ast.USub),
)


def site_names(design: Design) -> list[tuple[Block, str]]:
    """Every block with what its sites' names end in: "" for the first of the task."""
    found: list[tuple[Block, str]] = []
    taken: set[str] = set()
    for block in design.blocks:
        own = block.group == design.task
        stem = "" if own else "_" + _identifier(block.group)
        suffix, count = stem, 1
        while suffix in taken:
            count += 1
            suffix = f"{stem}_{count}"
        taken.add(suffix)
        found.append((block, suffix))
    return found


def _identifier(name: str) -> str:
    """What may stand behind an underscore in a name of Python."""
    return "".join(c if f"_{c}".isidentifier() else "_" for c in name)


def shapes_of(design: Design, family: FormulaFamily) -> dict[str, tuple[int, ...]]:
    """The sites of level 1 that have a prior to choose, and their shapes, in their order."""
    shapes: dict[str, tuple[int, ...]] = {}
    if design.common:
        shapes["fixed"] = (len(design.common),)
    for block, suffix in site_names(design):
        size = len(block.columns)
        shapes[f"scale{suffix}"] = (size,)
        if block.correlated and size > 1:
            shapes[f"correlation{suffix}"] = (size, size)
    if family in _MEASURED:
        shapes["noise"] = ()
    if family == "student_t":
        shapes["degrees_of_freedom"] = ()
    if family == "negative_binomial":
        shapes["shape"] = ()
    return shapes


def priors_of(
    design: Design, family: FormulaFamily, tasks: Tasks, given: Mapping[str, Prior]
) -> dict[str, str]:
    """The text of the prior of every site of level 1, by its name.

    Args:
        design: the columns.
        family: of the response.
        tasks: the data, with the features of the design and y.
        given: priors of sites or of columns, in place of those of the module.
    Raises:
        DataError: a name that is neither, a text that is no prior, or a column, or y, without
            spread.
    """
    shapes = shapes_of(design, family)
    names = [*shapes, *design.common]
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            raise DataError(
                _WHERE,
                needed=f"priors of {', '.join(map(repr, names))}",
                found=repr(name),
                do=f"Was {near[0]!r} meant?" if near else "Correct the name.",
            )
    columns = {name: prior for name, prior in given.items() if name not in shapes}
    texts = _scaled(design, family, tasks, {n: _normal(p, n) for n, p in columns.items()})
    return {name: prior_text(given.get(name, texts[name]), name, shapes[name]) for name in shapes}


def _scaled(
    design: Design,
    family: FormulaFamily,
    tasks: Tasks,
    columns: Mapping[str, tuple[float, float]],
) -> dict[str, str]:
    """The priors of the module, single coefficients as given."""
    assert tasks.flat_y is not None
    y = tasks.flat_y.detach().double()
    measured = family in _MEASURED
    centre, spread = (float(y.mean()), _spread(y, "y")) if measured else (0.0, 1.0)

    def column(name: str) -> Tensor:
        return tasks.flat_x[:, design.features.index(name)].double()

    def slope(name: str) -> float:
        return 2.5 * spread / _spread(column(name), f"column {name!r}")

    common = [name for name in design.common if name != INTERCEPT]
    variance = sum((slope(name) * float(column(name).mean())) ** 2 for name in common)
    constant = float(((2.5 * spread) ** 2 + variance) ** 0.5)

    def scale(name: str) -> float:
        return constant if name == INTERCEPT else slope(name)

    normal = [
        columns.get(name, (centre if name == INTERCEPT else 0.0, scale(name)))
        for name in design.common
    ]
    texts = {
        "fixed": f"Normal({_vector([m for m, _ in normal])}, {_vector([s for _, s in normal])})"
    }
    for block, suffix in site_names(design):
        texts[f"scale{suffix}"] = f"HalfNormal({_vector([scale(n) for n in block.columns])})"
        texts[f"correlation{suffix}"] = f"LKJCholesky({len(block.columns)}, 1.0)"
    return texts | {
        "noise": f"FoldedDistribution(StudentT(4.0, 0.0, {_number(spread)}))",
        "degrees_of_freedom": "Gamma(2.0, 0.1)",
        "shape": "HalfCauchy(1.0)",
    }


def prior_text(given: Prior, name: str, shape: tuple[int, ...]) -> str:
    """A prior as an expression of a program, in which `dist` and `x` are known.

    Args:
        given: a distribution with numbers as parameters, or a text.
        name: of the site, for the message.
        shape: of the site. A prior of one number is that of each entry.
    Raises:
        DataError: it is no call of a distribution with numbers, or has another shape.
    """
    text = given if isinstance(given, str) else _written(given)
    try:
        tree = _Prefixed().visit(ast.parse(text.strip(), mode="eval"))
        found = _evaluated(ast.fix_missing_locations(tree))
    except (AttributeError, NotImplementedError, SyntaxError, TypeError, ValueError) as error:
        raise DataError(
            _WHERE,
            needed=f"the prior of {name!r} as a distribution of Pyro with numbers, such as "
            '"Normal(0, 10)"',
            found=f"{text!r} ({error})",
            do="Edit the program, model.source, for a prior of another kind.",
        ) from error
    text = ast.unparse(tree)
    found_shape = tuple(found.batch_shape + found.event_shape)
    if not found_shape and shape:
        return f"{text}.expand([{shape[0]}]).to_event(1)"
    if found_shape != shape:
        raise DataError(
            _WHERE,
            needed=f"a prior of {name!r} of one number, or of shape {shape}",
            found=f"{text} of shape {found_shape}",
            do='Write for example "HalfNormal(10.0)", or "LKJCholesky(2, 4.0)" of a correlation.',
        )
    return f"{text}.to_event({len(found.batch_shape)})" if found.batch_shape else text


class _Prefixed(ast.NodeTransformer):
    """Writes `dist.` before the families of Pyro that stand without it."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return node if isinstance(node.value, ast.Name) else self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return (
            node
            if node.id == "x"
            else ast.Attribute(ast.Name("dist", ast.Load()), node.id, ast.Load())
        )


def _evaluated(tree: ast.Expression) -> Any:
    """The distribution, of an expression that holds families, numbers and x.new_tensor alone."""
    for node in ast.walk(tree):
        if not isinstance(node, _NODES):
            raise ValueError(f"a {type(node).__name__} in it")
        if isinstance(node, ast.Constant) and type(node.value) not in (int, float):
            raise ValueError(f"{node.value!r} in it")
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if owner == "dist":
                family = getattr(dist, node.attr, None)
                known = isinstance(family, type) and issubclass(
                    family, torch.distributions.Distribution
                )
            else:
                known = (owner, node.attr) in (
                    ("x", "new_tensor"),
                    ("", "expand"),
                    ("", "to_event"),
                )
            if not known:
                raise ValueError(f"no distribution {node.attr!r}")
    code = compile(tree, "<prior>", "eval")
    found = eval(code, {"__builtins__": {}, "dist": dist, "x": torch.zeros(())})
    if not isinstance(found, torch.distributions.Distribution):
        raise ValueError("no distribution")
    return found


def _written(given: Any) -> str:
    """A distribution with numbers as parameters as the call that makes it."""
    if not isinstance(given, torch.distributions.Distribution) or given.batch_shape:
        raise DataError(
            _WHERE,
            needed="priors as text, or as distributions of one number",
            found=repr(given),
            do='Write for example "Normal(0, 10)" or dist.Normal(0.0, 10.0).',
        )
    tensors, spec = tensors_of(given)
    values = {name: value.tolist() for name, value in tensors.items()} | dict(spec.fixed)
    return f"{spec.family.__name__}({', '.join(f'{k}={v!r}' for k, v in values.items())})"


def _normal(given: Prior, name: str) -> tuple[float, float]:
    """Mean and standard deviation of the prior of one coefficient."""
    found = _evaluated(ast.parse(prior_text(given, name, ()), mode="eval"))
    if not isinstance(found, torch.distributions.Normal):
        raise DataError(
            _WHERE,
            needed=f"a Normal as the prior of the coefficient of {name!r}",
            found=type(found).__name__,
            do="Give a prior for the whole site 'fixed', or edit the program, model.source.",
        )
    return float(found.loc), float(found.scale)


def _number(value: float) -> str:
    """Four digits, as a Python float."""
    return repr(float(f"{value:.4g}"))


def _vector(values: Sequence[float]) -> str:
    """A tensor in the dtype and on the device of x, as text."""
    return f"x.new_tensor([{', '.join(map(_number, values))}])"


def _spread(values: Tensor, what: str) -> float:
    if bool((values == values[0]).all()):
        raise DataError(
            _WHERE,
            needed=f"{what} with different values, to scale a prior from its standard deviation",
            found=f"{float(values[0])!r} in all {len(values)} rows",
            do="Take the term out of the formula, or check how the table was filtered.",
        )
    return float(values.std(correction=0))
