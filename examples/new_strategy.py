"""A new strategy is one file: the posterior mode by one Newton step.

python examples/new_strategy.py

CONTRIBUTING.md walks through this file.
"""

from dataclasses import dataclass
from typing import Any

import torch

import hbmeta as hb
from hbmeta import inference, models, tasks
from hbmeta.curvature import expand, log_joint
from hbmeta.densities import Delta
from hbmeta.inference import Strategy
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta


@dataclass(frozen=True)
class NewtonStep(Strategy):
    """q(φ | S) = δ(φ₁), one Newton step on log p(S | φ, θ) p(φ | θ) from the prior's location.

    Keeps p(y | φ, θ) and p(φ | θ); replaces the posterior by its mode, to second order. Optimises
    the query loss through the step. Exact as the posterior mean on linear-Gaussian programs.
    """

    def posterior(self, problem: Problem, theta: Theta, own: Any, support: Batch) -> Delta:
        start = problem.location(theta, support)

        def function(phi: torch.Tensor) -> torch.Tensor:
            return log_joint(problem, theta, phi, support)

        return Delta(expand(function, start, newton=True, create_graph=True).loc)


def main(steps: int = 500) -> hb.Comparison:
    family = tasks.LinearTasks(mean=[1.0, -0.5], covariance=[[1.0, 0.3], [0.3, 0.5]], noise=0.5)
    model = models.LinearRegression(features=["intercept", "x0"])
    train, test = family.sample(60, seed=0), family.sample(40, seed=1)
    fits = {
        "exact": inference.ExactLinear().fit(model, train),
        "newton": NewtonStep().fit(model, train, steps=steps),
        "maml": inference.MAML(steps=3, step_size=0.1).fit(model, train, steps=steps),
    }
    comparison = hb.compare(fits, test, reference="exact")
    print(comparison)
    return comparison


if __name__ == "__main__":
    main()
