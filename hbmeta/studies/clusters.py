"""Classes in the plane: what to make of five points of each of five classes.

    x | y = k ~ N(c_ik, σ² I)

Easy: the means c_ik evenly spaced around a circle of radius 2.5, σ = 0.35; every sensible
classifier is right. Hard: uniform on the disk of that radius, σ = 1.2; classes overlap, and what
counts is the distance to the Bayes-optimal classifier, which knows the disk and σ and integrates
the means out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from matplotlib.figure import Figure

from hbmeta import panels
from hbmeta.comparison import compare
from hbmeta.fitted import Fitted
from hbmeta.inference import MAML, NUTS, ProtoNet
from hbmeta.models import ClassConditional, NeuralClassifier
from hbmeta.oracles import bayes_clusters, known_clusters
from hbmeta.records import Comparison
from hbmeta.studies.common import Outcome, Plan, Say, Study, entries, fit_plans
from hbmeta.tasks import Clusters, Episode, Tasks
from hbmeta.tasks.clusters import Placement

__all__ = ["Budget", "run"]

_WAYS, _RADIUS = 5, 2.5
_SETTINGS: tuple[tuple[str, Placement, float], ...] = (
    ("easy", "circle", 0.35),
    ("hard", "disk", 1.2),
)
_BAYES, _KNOWN = "bayes-optimal", "means known"


@dataclass(frozen=True)
class Budget:
    """How much work the study is.

    Attributes:
        proto: training steps of the learned embedding, 8 tasks each.
        maml: training steps of MAML, 25 tasks each.
        draws: draws and warm-up steps of NUTS, per chain.
        tasks: held-out tasks per setting.
        sampled: how many of them NUTS is run on.
    """

    proto: int = 3_000
    maml: int = 6_000
    draws: int = 500
    tasks: int = 400
    sampled: int = 20


def _find(budget: Budget, seed: int, say: Say, compile: bool | str) -> Outcome:
    budget = replace(budget, sampled=min(budget.sampled, budget.tasks))
    tables: dict[str, Comparison] = {}
    captions: dict[str, str] = {}
    lines: dict[str, str] = {}
    figures: dict[str, Callable[[], Figure]] = {}
    for label, placement, noise in _SETTINGS:
        family = Clusters(ways=_WAYS, noise=noise, radius=_RADIUS, placement=placement)
        held_out = replace(family, dtype=torch.float64)
        test, truth = held_out.sample_with_truth(budget.tasks, seed=2**32 + seed)
        sampled = test[torch.arange(budget.sampled)]
        few = {name: values[: budget.sampled] for name, values in truth.items()}
        fits = fit_plans(
            _plans(family, sampled, budget), seed=seed, compile=compile, say=_named(say, label)
        )
        whole = {name: fitted for name, fitted in fits.items() if name != "nuts"}
        for key, some, data, known in (
            (label, whole, test, truth),
            (f"{label}_sampled", fits, sampled, few),
        ):
            oracles = {
                _BAYES: bayes_clusters(held_out, data),
                _KNOWN: known_clusters(held_out, data, known),
            }
            tables[key] = compare(some, data, baseline=_BAYES, oracles=oracles, seed=seed)
        captions[label] = f"{label}: {budget.tasks} new tasks"
        captions[f"{label}_sampled"] = f"{label}: the first {budget.sampled}, with NUTS"
        lines[label] = f"Means on the {placement}, noise {noise}. {_behind(tables[label])}"
        figures[f"regions_{label}"] = _regions(fits, sampled)
    return Outcome(
        title="Clusters in the plane: prototypes, a network, draws, and the optimal classifier",
        text=_text(lines, budget),
        comparisons=tables,
        captions=captions,
        figures=figures,
    )


run = Study(
    _find, full=Budget(), quick=Budget(proto=300, maml=500, draws=200, tasks=100, sampled=5)
)
"""Both settings: 5 ways, 5 shots, 15 query points per class."""


def _named(say: Say, label: str) -> Say:
    return lambda line: say(f"{label}: {line}")


def _plans(family: Clusters, sampled: Episode, budget: Budget) -> dict[str, Plan]:
    # The Gaussian with the variance of a mean: R²/2 per coordinate on the circle, R²/4 on the disk.
    spread = _RADIUS / (2.0**0.5 if family.placement == "circle" else 2.0)
    conjugate = ClassConditional(None, _WAYS, noise=family.noise, prior_scale=spread)
    return {
        "prototypes": Plan(ProtoNet(), ClassConditional(None, _WAYS), sampled.support),
        "learned protonet": Plan(
            ProtoNet(),
            ClassConditional((64, 32), _WAYS),
            family,
            {"steps": budget.proto, "tasks_per_step": 8},
        ),
        "bayesian protonet": Plan(ProtoNet(plug_in=False), conjugate, sampled.support),
        "maml": Plan(
            MAML(steps=5, step_size=0.4),
            NeuralClassifier(_WAYS, hidden=(64,)),
            family,
            {"steps": budget.maml},
        ),
        "nuts": Plan(
            NUTS(draws=budget.draws, warmup=budget.draws, chains=4), conjugate, sampled.support
        ),
    }


def _behind(table: Comparison) -> str:
    """Accuracy of the optimal classifier, and how far the others are behind it, in points."""
    rows = {row.name: row.scores["accuracy"] for row in table.rows}
    best = rows.pop(_BAYES)
    value, error = 100 * best.value, 100 * best.standard_error
    parts = [f"Bayes-optimal accuracy {value:.2f} ± {error:.2f} %"]
    for name, score in rows.items():
        if score.difference is not None and score.difference_error is not None:
            points, error = 100 * score.difference, 100 * score.difference_error
            parts.append(f"{name} {points:+.2f} ± {error:.2f}")
    return "; ".join(parts) + " (points, paired over tasks)."


def _text(lines: Mapping[str, str], budget: Budget) -> str:
    said = {
        "tasks": "5 classes, 5 points of each to learn from, 15 of each to be judged by.",
        "prototypes": "The published rule on the inputs themselves: nearest class mean. With equal "
        "shots the best rule under a flat prior is the same, so that only its confidence is off.",
        "protonet": f"The same in an embedding 2-64-32 learned in {budget.proto:,} steps of 8 "
        "tasks; and the Gaussian posterior of the means with σ known and a Gaussian prior of the "
        "true variance, integrated out.",
        "maml": "A classifier 2-64-5, 5 gradient steps from a start learned in "
        f"{budget.maml:,} steps of 25 tasks.",
        "nuts": "Draws of the means of that Gaussian model, which must give what its closed form "
        "gives.",
        "oracles": "Bayes-optimal: knows where means lie and σ, integrates them out. Means known: "
        "what is left to gain by more points.",
    }
    return entries({**said, **lines})


def _regions(fits: Mapping[str, Fitted], sampled: Episode) -> Callable[[], Figure]:
    def draw() -> Figure:
        one = sampled[torch.arange(1)]
        ends = torch.linspace(-4.0, 4.0, 81, dtype=torch.float64)
        grid = torch.cartesian_prod(ends, ends).unsqueeze(0)
        x = Tasks(grid, ids=one.support.ids, features=one.support.features)
        found = {n: f.posterior_of(one.support).predict(x, draws=200) for n, f in fits.items()}
        return panels.regions(found, one.support, query=one.query, labels=("x₁", "x₂"))

    return draw
