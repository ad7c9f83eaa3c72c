"""The latent neural process: the amortized guide, trained on how its draws predict held-out points.

With C the support (context), T the query (targets) and q(φ | ·) the encoder, the objectives are

    np     E_{q(φ|C∪T)} log p(y_T | x_T, φ) − KL(q(φ | C∪T) ‖ q(φ | C))
    npml   log (1/K) Σ_k p(y_T | x_T, φ_k),                           φ_k ~ q(φ | C)
    iw     log (1/K) Σ_k p(y_T | x_T, φ_k) q(φ_k | C) / q(φ_k | C∪T), φ_k ~ q(φ | C∪T)

with p(y_T | x_T, φ) = Π_j p(y_j | x_j, φ). By Jensen's inequality all three are, in expectation, at
most log ∫ p(y_T | x_T, φ) q(φ | C) dφ, in which q(φ | C) stands where the model has p(φ | C, θ).
They bound how well the encoder's predictive does, and not log p(y_T | x_T, C, θ): with a q(φ | C)
that is not p(φ | C, θ) they can lie above that. "np" is "iw" with K = 1 and its KL in closed form;
"npml" and "iw" do not fall, in expectation, as K grows. Where a point observes more than y (a
class-conditional program), the predictive weighs the draws by the point's own embedding; the
objectives do not, and then bound only what the draws of q(φ | C) predict with equal weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from hbmeta.densities import Gaussian
from hbmeta.errors import DataError
from hbmeta.feeding import Needs
from hbmeta.inference.amortized_guide import AmortizedGuide
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta

Objective = Literal["np", "npml", "iw"]

__all__ = ["LatentNP", "Objective", "neural_process_objective"]


def neural_process_objective(
    objective: Objective,
    log_likelihood: Callable[[Tensor], Tensor],
    context: Gaussian,
    both: Gaussian | None,
    noise: Tensor,
) -> Tensor:
    """(tasks,) the value of an objective, to be maximised; see the module's docstring.

    All are joint over the targets of a task. Their common upper bound in expectation is
    log ∫ p(y_T | x_T, φ) q(φ | C) dφ.

    Args:
        objective: "np", "npml" or "iw".
        log_likelihood: φ (tasks, phi_size) to log p(y_T | x_T, φ) (tasks,), summed over targets.
        context: q(φ | C).
        both: q(φ | C ∪ T); not read by "npml".
        noise: (K, tasks, phi_size) standard normal draws.
    """
    if objective == "npml":
        return _log_mean(torch.vmap(log_likelihood)(context.draw(noise)))
    assert both is not None
    phi = both.draw(noise)
    values = torch.vmap(log_likelihood)(phi)
    if objective == "np":
        return values.mean(0) - both.kl(context)
    return _log_mean(values + context.log_prob(phi) - both.log_prob(phi))


def _log_mean(values: Tensor) -> Tensor:
    return torch.logsumexp(values, 0) - math.log(values.shape[0])


@dataclass(frozen=True)
class LatentNP(AmortizedGuide):
    """q(φ | S) = N(m(S), Σ(S)) from a set encoder, trained to predict a query from a support.

    Keeps p(y | φ, θ); replaces p(φ | S, θ) by what the encoder gives, for every S but the empty
    one, where it gives the task prior (its Gaussian expansion). θ and the encoder together maximise
    one of three objectives, which bound log ∫ p(y_T | x_T, φ) q(φ | S) dφ from below. That is not
    log p(y_T | x_T, S, θ): θ and q are free to be no model and no posterior of each other, which
    serves prediction. Where q is to approximate p(φ | S, θ), use AmortizedGuide. Exact on
    linear-Gaussian programs with θ given, up to training.

    The targets are the rows of the query; with `context_in_targets` those of the support too, which
    are then scored by φ that has seen them (the first papers' convention). A task's loss is divided
    by its number of targets, so that tasks count alike. Needs tasks with two rows or more, or a
    source or an Episode. Works on any program: φ is whatever it has.

    Args:
        hidden: width of the encoder.
        covariance: "full", "diagonal", or "auto": full up to 64 parameters per task. Diagonal
            encoders were far behind on functions from a Gaussian process (docs/design.md).
        draws: K, draws of φ per task and step.
        layers: hidden layers of the network that reads a row.
        frequencies: sines and cosines of every column of x that the encoder sees; see
            `AmortizedGuide`.
        objective: "np", "npml" or "iw".
        context_in_targets: whether the support is scored as well.
    Raises:
        DataError: a setting that cannot be used.
    References:
        Garnelo et al. (2018), arXiv:1807.01622, for "np"; Foong et al. (2020), NeurIPS, for "npml";
        Burda, Grosse, Salakhutdinov (2016), ICLR, for "iw"; Volpp et al. (2021), ICLR, for
        encoders that multiply Gaussian factors.
    """

    needs: ClassVar[Needs] = "split"
    # p(y | x, φ) is all that is trained on.
    joint_loss: ClassVar[bool] = False
    located: ClassVar[bool] = True
    full_up_to: ClassVar[int] = 64

    hidden: int = 128
    draws: int = 8
    layers: int = 2
    frequencies: int = 8
    objective: Objective = "npml"
    context_in_targets: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective not in get_args(Objective):
            raise DataError(
                "LatentNP",
                needed=f"objective {', '.join(map(repr, get_args(Objective)))}",
                found=repr(self.objective),
                do="'npml' predicts best; 'np' is the published one.",
            )
        if not isinstance(self.context_in_targets, bool):
            raise DataError(
                "LatentNP",
                needed="context_in_targets as True or False",
                found=repr(self.context_in_targets),
                do="Pass False to score the query alone.",
            )

    def noise(self, problem: Problem, n_tasks: int) -> dict[str, tuple[int, ...]]:
        """Standard normal draws, K for each task."""
        return {"phi": (self.draws, n_tasks, problem.sites.phi_size)}

    def loss(
        self,
        problem: Problem,
        theta: Theta,
        own: Any,
        support: Batch,
        query: Batch,
        noise: Mapping[str, Tensor],
    ) -> Tensor:
        """(tasks,) minus the objective, per target."""
        everything = _union(support, query)
        context = self.posterior(problem, theta, own, support)
        npml = self.objective == "npml"
        both = None if npml else self.posterior(problem, theta, own, everything)

        def log_likelihood(phi: Tensor) -> Tensor:
            if not self.context_in_targets:
                return problem.log_predictive(theta, phi, support, query)
            if problem.layout == "joint":
                return problem.log_likelihood(theta, phi, everything)
            return problem.log_predictive(theta, phi, support, everything)

        bound = neural_process_objective(
            self.objective, log_likelihood, context, both, noise["phi"]
        )
        targets = everything if self.context_in_targets else query
        return -bound / targets.counts.clamp_min(1.0)


def _union(support: Batch, query: Batch) -> Batch:
    """The rows of both, as one batch."""
    if support.task is None:
        return support.beside(query)
    assert query.task is not None
    assert support.y is not None
    assert query.y is not None
    return replace(
        support,
        x=torch.cat([support.x, query.x]),
        y=torch.cat([support.y, query.y]),
        weight=torch.cat([support.weight, query.weight]),
        task=torch.cat([support.task, query.task]),
    )
