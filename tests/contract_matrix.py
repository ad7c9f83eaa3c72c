"""What works with what: the committed outcome of every strategy on every case, and its page.

The contract suite (tests/test_contract.py) fails where an outcome differs from this table, also
where a strategy works that the table says refuses. `python -m tests.contract_matrix` writes the
page docs/matrix.md anew.
"""

from dataclasses import dataclass
from pathlib import Path

from tests.cases import NAMES, case

PAGE = Path(__file__).resolve().parent.parent / "docs" / "matrix.md"
STRATEGIES = (
    *("NUTS", "ExactLinear", "AmortizedGuide", "MAML", "NoPooling", "CompletePooling"),
    *("ExactGP", "Quadrature", "ProtoNet", "LatentNP"),
    *("FOMAML", "Reptile", "MetaSGD", "ANIL", "ImplicitMAML"),
    *("Laplace", "Variational", "SGLD", "SGHMC", "ABML", "BMAML", "PLATIPUS"),
    *("Pathfinder", "NestedLaplace", "PACBayes"),
)


@dataclass(frozen=True)
class Works:
    """It fits, adapts and predicts; with a warning that begins like this, if there is one."""

    warning: str = ""


@dataclass(frozen=True)
class Refuses:
    """It raises this error of hbmeta.errors, which says what was needed and what was found."""

    error: str
    needed: str
    found: str


WORKS = Works()
ONE_ROW = Refuses(
    "DataError",
    "tasks with two rows or more, to split into support and query",
    "one row per task",
)
POINTS_APART = Refuses(
    "UnsupportedModelError",
    "a program of the joint layout (keyword `mask`), such as models.GaussianProcess",
    "layout, whose points are independent given φ",
)
NO_EMBEDDING = Refuses(
    "UnsupportedModelError",
    "a joint model of label and embedding (models.ClassConditional): two observed sites per point, "
    "one of them the label y",
    "observed sites ['y']",
)
NO_THETA = Refuses(
    "UnsupportedModelError",
    "between 1 and 64 values of global sites to integrate out",
    "0",
)
NO_MAXIMUM = Works("NoPooling: the likelihood has no maximum")
# ExactGP, Quadrature, ProtoNet and LatentNP on a regression with up to three parameters per task.
PLAIN = (POINTS_APART, WORKS, NO_EMBEDDING, WORKS)
# The other members of the gradient lens, where nothing stands in their way.
LENS = (WORKS,) * 5


def _not_quadratic(families: str) -> Refuses:
    return Refuses(
        "UnsupportedModelError",
        "a log joint that is quadratic in φ (Normal throughout, means linear in φ)",
        f"families: {families}",
    )


def _no_prior(parameter: str) -> Refuses:
    return Refuses(
        "UnsupportedModelError",
        "a prior for every level-1 parameter",
        f"module parameter {parameter!r} without one",
    )


def _many_for_a_grid(size: int) -> Refuses:
    needed = "at most 3 parameters per task (the grid is a product)"
    return Refuses("UnsupportedModelError", needed, str(size))


def _many_alone(size: int) -> Refuses:
    needed = "at most 64 parameters per task (the curvature is dense)"
    return Refuses("UnsupportedModelError", needed, str(size))


def _at_zero(strategy: str, site: str) -> Works:
    return Works(f"{strategy}: the estimate of {site} is zero")


def _grid_at_zero(site: str) -> tuple[Works | Refuses, ...]:
    return (POINTS_APART, _at_zero("Quadrature", site), NO_EMBEDDING, WORKS)


def _stays(site: str, strategy: str = "MAML") -> Works:
    return Works(f"{strategy}: the loss does not depend on {site}")


def _lens_stays(site: str) -> tuple[Works | Refuses, ...]:
    return tuple(_stays(site, strategy) for strategy in STRATEGIES[10:15])


def _many_for_a_hessian(size: int) -> Refuses:
    needed = 'at most 64 parameters per task for curvature="exact" (it is dense)'
    return Refuses("UnsupportedModelError", needed, str(size))


# Strategies in the order of STRATEGIES; those after ImplicitMAML are in _ELSEWHERE.
MATRIX: dict[str, tuple[Works | Refuses, ...]] = {
    "linear_given_theta": (WORKS, WORKS, WORKS, WORKS, WORKS, WORKS, *PLAIN, *LENS),
    "linear_own_nested": (WORKS, WORKS, WORKS, WORKS, WORKS, WORKS, *PLAIN, *LENS),
    "linear_own_flat": (WORKS, WORKS, WORKS, WORKS, WORKS, WORKS, *PLAIN, *LENS),
    "varying_intercepts": (WORKS, WORKS, WORKS, WORKS, WORKS, WORKS, *PLAIN, *LENS),
    "ragged_one_row": (WORKS, WORKS, WORKS, WORKS, WORKS, WORKS, *PLAIN, *LENS),
    "two_coefficients": (
        WORKS,
        WORKS,
        WORKS,
        _stays("scale"),
        WORKS,
        WORKS,
        *PLAIN,
        *_lens_stays("scale"),
    ),
    "eight_schools": (
        *(WORKS, _at_zero("ExactLinear", "tau"), WORKS, ONE_ROW, WORKS, WORKS),
        *(*_grid_at_zero("tau")[:3], ONE_ROW),
        # Reptile takes all points of a task, and needs no split.
        *(ONE_ROW, WORKS, ONE_ROW, ONE_ROW, ONE_ROW),
    ),
    "eight_schools_centered": (
        *(WORKS, _at_zero("ExactLinear", "tau"), WORKS, ONE_ROW, WORKS, WORKS),
        *(*_grid_at_zero("tau")[:3], ONE_ROW),
        *(ONE_ROW, _stays("tau", "Reptile"), ONE_ROW, ONE_ROW, ONE_ROW),
    ),
    "bernoulli": (
        *(WORKS, _not_quadratic("Bernoulli, Normal"), WORKS, WORKS, WORKS, WORKS),
        *_grid_at_zero("scale"),
        *LENS,
    ),
    "poisson_offset": (
        WORKS,
        _not_quadratic("Normal, Poisson"),
        WORKS,
        WORKS,
        WORKS,
        WORKS,
        *PLAIN,
        *LENS,
    ),
    "student_t": (
        WORKS,
        _not_quadratic("Normal, StudentT"),
        WORKS,
        WORKS,
        WORKS,
        WORKS,
        *PLAIN,
        *LENS,
    ),
    "gamma_poisson": (
        WORKS,
        _not_quadratic("Gamma, Poisson"),
        WORKS,
        WORKS,
        WORKS,
        WORKS,
        *PLAIN,
        *LENS,
    ),
    "lognormal_poisson": (
        WORKS,
        _not_quadratic("LogNormal, Poisson"),
        WORKS,
        _stays("spread"),
        WORKS,
        WORKS,
        *PLAIN,
        *_lens_stays("spread"),
    ),
    "module_parameters": (_no_prior("weight"), WORKS, WORKS, WORKS, WORKS, WORKS, *PLAIN, *LENS),
    "gaussian_process": (
        *(WORKS, _not_quadratic("MultivariateNormal, Uniform"), WORKS, WORKS, WORKS, WORKS),
        *(WORKS, WORKS, NO_EMBEDDING, WORKS),
        *LENS,
    ),
    "gaussian_process_learned": (
        *(WORKS, _not_quadratic("LogNormal, MultivariateNormal"), WORKS),
        *(_stays("lengthscale_spread"), WORKS, WORKS, _at_zero("ExactGP", "lengthscale_spread")),
        *(_at_zero("Quadrature", "lengthscale_spread"), NO_EMBEDDING, WORKS),
        *_lens_stays("lengthscale_spread"),
    ),
    "class_conditional": (
        *(WORKS, WORKS, WORKS, WORKS, WORKS, WORKS, POINTS_APART, _many_for_a_grid(6), WORKS),
        WORKS,
        *LENS,
    ),
    "neural_regression": (
        *(_no_prior("mean.layer1.weight"), _not_quadratic("Normal"), WORKS, WORKS),
        *(_many_alone(97), WORKS, POINTS_APART, _many_for_a_grid(97), NO_EMBEDDING, WORKS),
        *LENS,
    ),
    "neural_zero": (
        *(WORKS, _not_quadratic("Normal"), WORKS, WORKS, NO_MAXIMUM, WORKS),
        *(POINTS_APART, _many_for_a_grid(7), NO_EMBEDDING, WORKS),
        *LENS,
    ),
    "neural_classifier": (
        *(_no_prior("mean.layer1.weight"), _not_quadratic("Categorical, Normal"), WORKS, WORKS),
        *(_many_alone(75), WORKS, POINTS_APART, _many_for_a_grid(75), NO_EMBEDDING, WORKS),
        *LENS,
    ),
    "latent_process": (
        *(_no_prior("of_x.weight"), _not_quadratic("Normal"), WORKS, WORKS, WORKS, WORKS),
        *(POINTS_APART, WORKS, NO_EMBEDDING, WORKS),
        *LENS,
    ),
}


# Strategies that work on every program, but for these.
_ELSEWHERE = {
    ("Laplace", "neural_regression"): _many_for_a_hessian(97),
    ("Laplace", "neural_classifier"): _many_for_a_hessian(75),
    # The kinks of a ReLU network, which eight fixed draws do not smooth.
    ("Variational", "neural_regression"): Works("Variational.fit: the search for q ended above"),
    ("PLATIPUS", "two_coefficients"): _stays("scale", "PLATIPUS"),
    ("PLATIPUS", "lognormal_poisson"): _stays("spread", "PLATIPUS"),
    ("PLATIPUS", "gaussian_process_learned"): _stays("lengthscale_spread", "PLATIPUS"),
    ("Pathfinder", "module_parameters"): _no_prior("weight"),
    ("Pathfinder", "neural_regression"): _no_prior("mean.layer1.weight"),
    ("Pathfinder", "neural_classifier"): _no_prior("mean.layer1.weight"),
    ("Pathfinder", "latent_process"): _no_prior("of_x.weight"),
    ("NestedLaplace", "module_parameters"): _no_prior("weight"),
    ("NestedLaplace", "neural_regression"): _no_prior("mean.layer1.weight"),
    ("NestedLaplace", "neural_classifier"): _no_prior("mean.layer1.weight"),
    ("NestedLaplace", "latent_process"): _no_prior("of_x.weight"),
} | {
    (strategy, name): ONE_ROW
    for strategy in ("ABML", "BMAML", "PLATIPUS")
    for name in ("eight_schools", "eight_schools_centered")
}
# A bounded loss of E[y | x, φ] does not see how y spreads around it.
_ELSEWHERE |= {
    ("PACBayes", name): _stays("noise", "PACBayes")
    for name in (
        *("varying_intercepts", "ragged_one_row", "two_coefficients", "student_t"),
        "module_parameters",
    )
}
_ELSEWHERE |= {
    ("PACBayes", name): Refuses(
        "UnsupportedModelError",
        "points that are independent given φ: the theorem is about their losses",
        "the joint layout of",
    )
    for name in ("gaussian_process", "gaussian_process_learned")
}
_ELSEWHERE |= {
    ("NestedLaplace", name): NO_THETA
    for name in (
        *("linear_given_theta", "linear_own_nested", "linear_own_flat", "gamma_poisson"),
        *("gaussian_process", "class_conditional", "neural_zero"),
    )
}


def outcome(strategy: str, name: str) -> Works | Refuses:
    """The committed outcome of a strategy on a case."""
    position = STRATEGIES.index(strategy)
    row = MATRIX[name]
    return row[position] if position < len(row) else _ELSEWHERE.get((strategy, name), WORKS)


def pairs(kind: type) -> list[tuple[str, str]]:
    """All (strategy, case) whose outcome is of that kind."""
    return [(s, n) for n in NAMES for s in STRATEGIES if isinstance(outcome(s, n), kind)]


_INTRODUCTION = """# What works with what

Every inference strategy on every small program of the test suite (`tests/cases.py`). This page is
written by `python -m tests.contract_matrix`; the tests fail where it is out of date, and where an
outcome is not the one given here.

**works** means that the contract holds: the same seed gives the same answer to the last bit; the
caller's random state, Pyro's settings and its parameter store are left alone; adapting to new
tasks does not change θ; the order of support rows does not matter (but for Bayesian networks under
NUTS and no pooling, where rounding chooses one of many modes, and for inner minibatches); a task
without support gets the task prior (exact strategies, the amortized guide and the latent neural
process) or its location (point estimates), and changes nothing for the other tasks; predictions are
finite and shaped as y; and where the posterior is known and the strategy claims to give it, they
agree. **refuses** means that `fit` raises an error that says what was needed, what was found and
what to do.
"""


def render() -> str:
    """The page as Markdown."""
    notes: list[str] = []

    def mark(entry: Works | Refuses) -> str:
        if isinstance(entry, Works):
            if not entry.warning:
                return "works"
            word, note = "works", f"With a warning: “{entry.warning} …”."
        else:
            word = "refuses"
            note = f"`{entry.error}`: needed {entry.needed}; found {entry.found}."
        if note not in notes:
            notes.append(note)
        return f"{word} [{notes.index(note) + 1}]"

    lines = [_INTRODUCTION]
    lines.append("| program | " + " | ".join(f"`{s}`" for s in STRATEGIES) + " |")
    lines.append("|---" * (len(STRATEGIES) + 1) + "|")
    for name in NAMES:
        cells = [mark(outcome(s, name)) for s in STRATEGIES]
        lines.append(f"| {case(name).about} | " + " | ".join(cells) + " |")
    lines.append("")
    lines += [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render(), encoding="utf-8")
