"""`hbmeta certify`: certificates of several strategies on new tasks, and checks of written ones.

The strategies are fitted on known tasks and certified on new ones. With k of them δ is shared by
k + 1 statements, which then hold together:

    meta_test     one per strategy, as fitted
    query_split   one for the choice among them: 𝒫 is uniform over the k fits, all made before the
                  new tasks were looked at, and 𝒬 may follow from these; K_H ≤ log k
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hbmeta import inference, models
from hbmeta.certification import Certificate, FiniteHyperprior
from hbmeta.certification import certify as bounded
from hbmeta.cli.sources import read
from hbmeta.errors import DataError, FileError
from hbmeta.fitted import Fitted
from hbmeta.inference import Strategy
from hbmeta.loading import load
from hbmeta.tables import aligned
from hbmeta.tasks import Clusters, Episode, TaskSet, from_frame, load_radon

__all__ = ["certify"]

CLUSTERS = {"known": 200, "new": 1000}
EFFECTS: dict[str, tuple[Strategy, int]] = {
    "laplace": (inference.Laplace(), 200),
    "exact": (inference.ExactLinear(), 500),
    "maml": (inference.MAML(steps=5, step_size=0.05), 500),
    "complete_pooling": (inference.CompletePooling(), 500),
}
PROTOTYPES: dict[str, tuple[Strategy, int]] = {
    "prototypes": (inference.ProtoNet(), 1),
    "integrated": (inference.ProtoNet(plug_in=False), 1),
}


def certify(arguments: argparse.Namespace) -> int:
    """Prints certificates, or what a check of one found.

    Returns:
        The exit status: 0, or 1 where a certificate is not what it says.
    """
    if arguments.check is not None:
        return _check(arguments)
    if arguments.data is None:
        raise DataError(
            "certify", needed="radon, clusters or a table", found="none", do="Name one."
        )
    known, new, model, loss = _data(arguments)
    strategies = PROTOTYPES if arguments.data == "clusters" else EFFECTS
    fits: dict[str, Fitted] = {}
    for name, (strategy, steps) in strategies.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fits[name] = strategy.fit(
                model(), known, steps=steps, seed=arguments.seed, compile="graph", progress=False
            )
    each = {"delta": arguments.delta / (len(fits) + 1), "seed": arguments.seed, **loss}
    found = {
        name: bounded(fit, new, bound="meta_test", shots=arguments.shots, **each)
        for name, fit in fits.items()
    }
    first = next(iter(fits.values()))
    hyperprior = FiniteHyperprior(list(fits.values()))
    found["the choice"] = bounded(first, new, bound="query_split", hyperprior=hyperprior, **each)
    print(_table(found, arguments.delta))
    if arguments.out is not None:
        for name, one in found.items():
            one.to_json(arguments.out / f"{name.replace(' ', '_')}.json")
        for name, fit in fits.items():
            fit.save(arguments.out / f"{name}.safetensors")
    return 0


def _data(
    arguments: argparse.Namespace,
) -> tuple[Any, Episode, Callable[[], Any], dict[str, Any]]:
    """Known tasks, new ones that all have a query and as many shots, the model, the loss."""
    seed, shots = arguments.seed, arguments.shots
    if arguments.data == "clusters":
        family = Clusters(shots=shots, dtype=torch.float64)
        arguments.shots = shots * family.ways
        taught = family.sample(CLUSTERS["known"], seed=seed)
        new = family.sample(CLUSTERS["new"], seed=seed + 1)
        return taught, new, lambda: models.ClassConditional(None, family.ways), {}
    if arguments.data == "radon":
        table, fixed = load_radon(), ["floor", "log_uranium"]
    else:
        table, fixed = _table_of(arguments)
    known, others = table.split(groups=0.5, new_support=shots, seed=seed)
    return (
        known,
        _with_shots(others, shots),
        lambda: models.VaryingEffects(fixed=fixed, varying=["intercept"]),
        {"loss": "truncated-squared", "scale": arguments.scale},
    )


def _table_of(arguments: argparse.Namespace) -> tuple[TaskSet, list[str]]:
    if arguments.group is None or arguments.y is None:
        raise DataError(
            "certify",
            needed="--group and --y of a table",
            found="none",
            do="Name its columns: --group school --x hours --y score.",
        )
    frame = read(arguments.data)
    table = from_frame(frame, group=arguments.group, x=arguments.x, y=arguments.y)
    return table, list(table.features)


def _with_shots(tasks: TaskSet, shots: int) -> Episode:
    """The groups of more than so many rows: the environment that is certified."""
    whole = tasks.episode_of_all
    chosen = (whole.support.counts == shots) & (whole.query.counts > 0)
    if int(chosen.sum()) < 2:
        raise DataError(
            "certify",
            needed=f"two new groups of more than {shots} rows",
            found=f"{int(chosen.sum())}",
            do="Lower --shots.",
        )
    return whole[chosen.nonzero()[:, 0]]


def _table(found: dict[str, Certificate], delta: float) -> str:
    one = next(iter(found.values()))
    head = ["", "certificate", "measured", "theorem", "δ"]
    body = [
        [
            name,
            f"{c.statement.raw:.4f}" + (" (vacuous)" if c.vacuous else ""),
            f"{c.statement.measured:.4f}",
            c.bound,
            f"{c.delta:.4g}",
        ]
        for name, c in found.items()
    ]
    return "\n".join(
        [
            f"Expected loss on a new task, {one.n_tasks} tasks certified on. All rows hold "
            f"together with probability at least {1 - delta:g};",
            '"the choice" is the fit that these tasks choose, and has paid for choosing.',
            "",
            *aligned(head, body),
            "",
            str(found["the choice"]),
        ]
    )


def _check(arguments: argparse.Namespace) -> int:
    try:
        text = Path(arguments.check).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise FileError(
            arguments.check, needed="a certificate", found=str(error), do="Check the name."
        ) from error
    certificate = Certificate.from_json(text)
    evidence: dict[str, Any] = {}
    if arguments.fit is not None and arguments.data is not None:
        evidence = {"fitted": load(arguments.fit), "tasks": _data(arguments)[1]}
    complaints = certificate.check(**evidence)
    print(certificate.claim())
    what = "arithmetic and risks" if evidence else "arithmetic"
    for complaint in complaints:
        print(f"WRONG: {complaint}")
    print(f"{arguments.check}: " + ("not to be believed" if complaints else f"{what} hold"))
    return 1 if complaints else 0
