"""The Pyro program of a formula, written as text.

    fixed ~ p                                    coefficients β of the common columns
    scale, correlation ~ p                       Σ = diag(scale) L Lᵀ diag(scale)
    φ_i | θ ~ N(μ, Σ), i a task                  μ_c = β_c where column c is common too, else 0
    u_l = diag(scale) L z_l, z_l ~ N(0, I)       level l of another group, at level 1
    η_ij = Σ_c φ_ic x_ijc + Σ_{f not in φ} β_f x_ijf + Σ_groups u_l(ij) · x_ij (+ offset)
    y_ij ~ family(link⁻¹(η_ij))

is the model of lme4 with b_i = φ_i − μ: written around β, so that φ_i are the coefficients of task
i itself, that strategies start at what tasks have in common, and that NUTS may choose between φ and
its standardised form. The text is all there is of the model: it is what runs.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from hbmeta.models.formula_priors import FormulaFamily, site_names
from hbmeta.tasks.design import Design

__all__ = ["write_program"]

_WIDTH = 96
# Consecutive columns from this number on are one product, fewer are written term by term.
_RUN = 4

_RESPONSES: dict[FormulaFamily, tuple[str, str]] = {
    "gaussian": ("identity link", "dist.Normal(eta, noise)"),
    "student_t": ("identity link", "dist.StudentT(degrees_of_freedom, eta, noise)"),
    "bernoulli": ("logit link", "dist.Bernoulli(logits=eta)"),
    "binomial": ("logit link", "dist.Binomial({trials}, logits=eta)"),
    "poisson": ("log link", "dist.Poisson(eta.exp())"),
    # Mean μ = e^η, variance μ + μ² / shape.
    "negative_binomial": (
        "log link, variance μ + μ² / shape",
        "dist.NegativeBinomial(shape, logits=eta - shape.log())",
    ),
}


def write_program(design: Design, family: FormulaFamily, priors: Mapping[str, str]) -> str:
    """The source of a module with a function `model` in the flat layout.

    Args:
        design: the columns of x, the task and the other groups.
        family: of the response.
        priors: an expression for every site that has one, of `priors_of`.
    """
    features = design.features
    position = {name: index for index, name in enumerate(features)}
    link, response = _RESPONSES[family]
    head = _header(design, family, link)
    top: list[str] = []  # level 1
    tasks: list[str] = []  # inside the plate `task`
    rows: list[str] = []  # inside the plate `point`
    terms: list[str] = []
    varying: set[str] = set()

    def sample(name: str) -> None:
        top.append(f'{name} = pyro.sample("{name}", {priors[name]})')

    if design.common:
        top.append(_comment("Coefficients: " + ", ".join(design.common)))
        sample("fixed")
    for block, suffix in site_names(design):
        columns, group = block.columns, block.group
        size, scale = len(columns), f"scale{suffix}"
        correlated = f"correlation{suffix}" in priors
        top.append(_comment(f"Spread between the groups of {group}: {', '.join(columns)}"))
        sample(scale)
        if correlated:
            sample(f"correlation{suffix}")
        factor = f"{scale}[:, None] * correlation{suffix}"
        if group == design.task:
            site = f"coefficients{suffix}"
            mean = _mean(columns, [n for n in design.common if n not in varying], design.common)
            prior = f"dist.Normal({mean}, {scale}).to_event(1)"
            if correlated:
                prior = f"dist.MultivariateNormal({mean}, scale_tril={factor})"
            tasks.append(f'{site} = pyro.sample("{site}", {prior})')
            rows.append(f"rows{suffix} = {site}[task]")
            varying |= set(columns)
        else:
            site, count = f"effects{suffix}", len(design.levels[group])
            top.append(_comment(f"Effects of the {count} levels of {group}"))
            top.append(
                f'z{suffix} = pyro.sample("z{suffix}", '
                f"dist.Normal(x.new_zeros({count}, {size}), 1.0).to_event(2))"
            )
            value = f"z{suffix} @ ({factor}).mT" if correlated else f"z{suffix} * {scale}"
            top.append(f'{site} = pyro.deterministic("{site}", {value}, event_dim=2)')
            rows.append(f"rows{suffix} = {site}[x[:, {position[f'code({group})']}].long()]")
        pairs = [(j, position.get(name)) for j, name in enumerate(columns)]
        terms += _terms(f"rows{suffix}[:, {{}}]", pairs, by_row=True)
    for name in ("noise", "degrees_of_freedom", "shape"):
        if name in priors:
            sample(name)
    alone = [(i, position.get(n)) for i, n in enumerate(design.common) if n not in varying]
    terms += _terms("fixed[{}]", alone, by_row=False)
    if design.offset is not None:
        terms.append(f"x[:, {position[design.offset]}]")
    trials = "" if design.trials is None else f"x[:, {position[design.trials]}]"
    lines = [
        *(_wrapped(line, 4) for line in top),
        '    with pyro.plate("task", n_tasks, dim=-1):',
        _wrapped(_comment(f"Coefficients of each {design.task}"), 8),
        *(_wrapped(line, 8) for line in tasks),
        '    with pyro.plate("point", x.shape[0], dim=-1):',
        *(_wrapped(line, 8) for line in rows),
        *(f"        {line}" for line in _sum(terms)),
        _wrapped(f'return pyro.sample("y", {response.format(trials=trials)}, obs=y)', 8),
    ]
    return head + "\n".join(lines) + "\n"


def _header(design: Design, family: str, link: str) -> str:
    others = [f"{name} ({len(levels)} levels)" for name, levels in design.levels.items()]
    about = [
        f"Family {family}, {link}.",
        f"The task is {design.task}." + (f" Other groups: {', '.join(others)}." if others else ""),
    ]
    paragraphs = "\n\n".join(textwrap.fill(line, _WIDTH + 4) for line in about)
    columns = [f"    {i}  {name}" for i, name in enumerate(design.features)]
    listed = "Columns of x:\n" + "\n".join(columns) if columns else "x has no columns."
    text = f"{design.formula}\n\n{paragraphs}\n\n{listed}\n"
    # A formula may hold what ends or escapes a docstring.
    quoted = text.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    return (
        f'"""{quoted}"""\n\nimport pyro\nimport pyro.distributions as dist\nimport torch\n\n\n'
        "def model(x, y=None, *, task, n_tasks):\n"
    )


def _mean(columns: Sequence[str], free: Sequence[str], common: Sequence[str]) -> str:
    """μ of a block: the common coefficient of each column that has one and is not taken yet."""
    at = [list(common).index(name) if name in free else None for name in columns]
    if all(i is None for i in at):
        return f"x.new_zeros({len(columns)})"
    if at == list(range(len(common))):
        return "fixed"
    first = at[0]
    if first is not None and at == list(range(first, first + len(at))):
        return f"fixed[{first or ''}:{first + len(at)}]"
    entries = ["x.new_zeros(())" if i is None else f"fixed[{i}]" for i in at]
    return f"torch.stack([{', '.join(entries)}])"


def _terms(coefficient: str, pairs: Sequence[tuple[int, int | None]], *, by_row: bool) -> list[str]:
    """Σ coefficient[i] x[:, c] over pairs (i, c), c None being the constant."""
    found: list[str] = []
    rest = list(pairs)
    while rest:
        i, c = rest[0]
        if c is None:
            found.append(coefficient.format(i))
            del rest[0]
            continue
        length = 1
        while length < len(rest) and rest[length] == (i + length, c + length):
            length += 1
        if length < _RUN:
            found.append(f"{coefficient.format(i)} * x[:, {c}]")
            del rest[0]
            continue
        several, columns = coefficient.format(f"{i}:{i + length}"), f"x[:, {c}:{c + length}]"
        product = f"({several} * {columns}).sum(-1)" if by_row else f"{columns} @ {several}"
        found.append(product)
        del rest[:length]
    return found


def _sum(terms: Sequence[str]) -> list[str]:
    """`eta` as the sum of the terms, as many in a line as it holds."""
    lines = [f"eta = {terms[0]}"]
    for term in terms[1:]:
        longer = f"{lines[-1]} + {term}"
        if len(longer) <= _WIDTH - 8:
            lines[-1] = longer
        else:
            lines.append(f"eta = eta + {term}")
    return lines


def _comment(text: str) -> str:
    return "# " + " ".join(text.split())


def _wrapped(line: str, indent: int) -> str:
    """A comment, or a statement that is one call, on several lines where it is too long."""
    space = " " * indent
    if indent + len(line) <= _WIDTH:
        return space + line
    if line.startswith("#"):
        return _filled(line, space, f"{space}# ")
    head, bracket, rest = line.partition("(")
    inner = f"{space}    "
    arguments = rest[:-1]
    if len(inner) + len(arguments) > _WIDTH:  # the name of the site in a line of its own
        name, comma, arguments = arguments.partition(",")
        head, bracket = f"{head}{bracket}\n{inner}{name}{comma}", ""
    filled = _filled(arguments.strip(), inner, f"{inner}    ")
    return f"{space}{head}{bracket}\n{filled}\n{space})"


def _filled(text: str, first: str, further: str) -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=further,
        break_long_words=False,
        break_on_hyphens=False,
    )
