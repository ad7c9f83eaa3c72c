"""Variational inference: a density for every task, with numbers of its own, by optimisation.

Model: φ_i ~ p(φ | θ), y_i ~ p(y | φ_i, θ), in either layout.
Estimator: q_λ(φ_i) of a family (`hbmeta.families`) with

    λ_i = argmax L(λ_i, θ),   θ = argmax Σ_i L(λ_i, θ) + log p(θ),   L ≤ log p(S_i | θ)

the ELBO or another bound (`hbmeta.variational.objectives`); or one Gaussian over θ and all φ_i,
q(θ) Π_i q(φ_i | θ), where θ is a distribution (`hbmeta.variational.joint_guide`). Adam on
minibatches of tasks leads near the optimum; truncated Newton on the bound with fixed noise ends
there.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hbmeta.densities import Transported
from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.families import Diagonal, Family, FlowFamily, Frame, FullRank, LowRankFamily
from hbmeta.feeding import training_tasks
from hbmeta.fitted import Fitted
from hbmeta.inference.adapting import adapt_to_draws
from hbmeta.inference.amortized_guide import AmortizedGuide, require_proper_prior
from hbmeta.inference.strategy import Strategy
from hbmeta.posterior import TaskPosterior
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.resuming import Checkpoint
from hbmeta.tasks import Episode, Tasks, TaskSet
from hbmeta.training import Learned, Options, identity, train
from hbmeta.variational import (
    Bound,
    JointDensity,
    LocalSearch,
    as_frame,
    learn_distribution,
    learn_point,
    prior_frame,
)

_DENSE_AT_MOST = 64
_FULL_UP_TO = 16
_FAMILIES = ("auto", "diagonal", "full", "low_rank", "flow")
_ALPHA = {"elbo": 1.0, "iwae": 0.0}
# A gradient norm below this is worth no warning: q is that share of its sd from where it should be.
_STEEP = 1e-2
_OF_THE_ENCODER = ("hidden", "covariance", "draws", "layers", "frequencies")

__all__ = ["Variational"]


@dataclass(frozen=True)
class Variational(Strategy):
    """q(φ_i | S_i) of a family, optimised for each task; fits any three-level program.

    Keeps p(y | φ, θ), p(φ | θ) and p(θ); approximates p(φ | S, θ) by the member of a family with
    the highest bound. θ is held at the maximum of Σ_i bound_i + log p(θ), or is given a Gaussian
    q(θ) with φ linear in it.

    How. `fit` takes `steps` of Adam on θ and all λ_i with fresh noise; a step sees
    `tasks_per_step` tasks, whose loss is averaged and whose prior is log p(θ) over all tasks. Then
    the noise is fixed (its first two moments exact) and truncated Newton ends the search: over θ
    and all λ_i together where every step saw all tasks and θ is global sites, over λ alone
    otherwise. `adapt` starts from the Gaussian expansion of the task prior (or, `amortized`, from
    the network's answer), holds θ, and takes the same Newton steps; tasks that miss the tolerance
    are in `info["met"]` and in a warning. Flows and bounds other than the ELBO are searched by
    Adam with noise seeded by `seed`, from the best Gaussian on (`hbmeta.variational.local`).

    Where it is exact: a full family, and a low-rank one of rank phi_size − 1, on linear-Gaussian
    programs, where the ELBO is the evidence; with theta="distribution" their joint posterior given
    Normal priors of θ. The diagonal family then has the exact mean and the variances 1/Λ_jj: too
    small. A task without rows gets the prior's Gaussian expansion or what is nearer to the prior.

    Args:
        family: "diagonal" (mean field), "full", "low_rank" (diagonal and rank), "flow", or "auto":
            full up to 16 parameters per task, else diagonal.
        rank: of "low_rank", below the parameters per task.
        objective: "elbo", "iwae" (importance weighted, with `draws` draws inside the logarithm) or
            "renyi" (of order `alpha`).
        draws: per task and step.
        alpha: order of the Rényi bound: 1 is the ELBO, 0 is "iwae".
        theta: "point", or "distribution": q(θ) full up to 64 global values, else diagonal, with φ
            linear in the short sites alone and no search after `steps`.
        amortized: train an `AmortizedGuide` for θ and for where q starts, and search from there on
            for each task (semi-amortized). See `refine` for a guide that is fitted already.
        steps: of the search for a task's q: Newton steps, or Adam's for a flow and for bounds other
            than the ELBO. None for as many as the tolerance needs (at most 60), and 600.
        tolerance: of that search, on the gradient's norm in nats per unit of λ, which is measured
            in standard deviations of where q starts (1e-3 at least in float32).
        fixed_draws: of the fixed noise; at least twice the parameters per task for a full family.
        step_size: Adam's for λ.
        hidden: width of a flow's networks.
        encoder: settings of the `AmortizedGuide` where `amortized`; None for its defaults.
    Raises:
        UnsupportedModelError: a flat task prior; too many parameters per task for the family; no
            global site for theta="distribution"; effects of level 1 whose scale is of level 1 too
            for theta="point".
        DataError: a setting that cannot be used, or a source of tasks (unless `amortized`).
    References:
        Kingma, Welling (2014), ICLR; Roeder et al. (2017), NeurIPS, for gradients; Burda et al.
        (2016), ICLR; Li, Turner (2016), NeurIPS; Tucker et al. (2019), ICLR; Giordano et al.
        (2024), JMLR 25, for fixed noise; Kim et al. (2018), ICML, for semi-amortized inference.
    """

    joint_loss: ClassVar[bool] = True

    family: Literal["auto", "diagonal", "full", "low_rank", "flow"] = "auto"
    rank: int = 2
    objective: Literal["elbo", "iwae", "renyi"] = "elbo"
    draws: int = 8
    alpha: float = 0.5
    theta: Literal["point", "distribution"] = "point"
    amortized: bool = False
    steps: int | None = None
    tolerance: float = 1e-6
    fixed_draws: int = 128
    step_size: float = 0.02
    hidden: int = 16
    encoder: dict[str, Any] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self) -> None:
        whole = {"rank": 1, "draws": 1, "fixed_draws": 2, "hidden": 1}
        bad = [name for name, least in whole.items() if not _whole(getattr(self, name), least)]
        if self.steps is not None and not _whole(self.steps, 0):
            bad.append("steps")
        for name, allowed in (
            ("family", _FAMILIES),
            ("objective", ("elbo", "iwae", "renyi")),
            ("theta", ("point", "distribution")),
            ("amortized", (True, False)),
        ):
            if getattr(self, name) not in allowed:
                bad.append(name)
        for name, least in (("alpha", -1e-300), ("tolerance", 0.0), ("step_size", 0.0)):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and least < value < math.inf):
                bad.append(name)
        if bad:
            raise DataError(
                self.name,
                needed=f"family among {', '.join(_FAMILIES)}; objective elbo, iwae or renyi; theta "
                "point or distribution; whole rank, draws and hidden of 1, fixed_draws of 2 and "
                "steps of 0 or more; alpha of 0 or more; tolerance and step_size above 0",
                found=f"{bad[0]}={getattr(self, bad[0])!r}",
                do="The defaults serve most programs.",
            )
        if self.theta == "distribution":
            self._check_distribution()

    def _check_distribution(self) -> None:
        wrong = {
            "family": self.family in ("low_rank", "flow"),
            "objective": self.objective != "elbo",
            "amortized": self.amortized,
        }
        name = next((name for name, is_wrong in wrong.items() if is_wrong), None)
        if name is not None:
            raise DataError(
                self.name,
                needed="for theta='distribution' a Gaussian q(φ | θ) (family diagonal or full), "
                "objective='elbo' and amortized=False",
                found=f"{name}={getattr(self, name)!r}",
                do="Use theta='point', or NUTS.",
            )

    def adaptable(self) -> tuple[str, ...]:
        """What says how q of a task is found; nothing where the fit holds draws."""
        if self.theta == "distribution":
            return ()
        return tuple(n for n in self.settings() if n not in ("theta", "amortized", "encoder"))

    def suited(self, problem: Problem, known: Tasks) -> Strategy:
        """With the encoder written down; effects with a scale of their own want q(θ)."""
        if self.theta == "point":
            super().suited(problem, known)
        if not self.amortized or self.encoder is not None:
            return self
        # The encoder is that of the fit, whichever family adapts.
        full = self.gaussian(problem).full_frame
        return dataclasses.replace(self, encoder={"covariance": "full" if full else "diagonal"})

    def check(self, problem: Problem) -> None:
        """A task prior that is a density, and a family that φ is neither too long nor short for."""
        require_proper_prior(problem, self.name)
        size = problem.sites.phi_size
        if self.family in ("full", "flow") and size > _DENSE_AT_MOST:
            raise UnsupportedModelError(
                self.name,
                needed=f"at most {_DENSE_AT_MOST} parameters per task for family={self.family!r}",
                found=str(size),
                do="Use family='low_rank' or 'diagonal'.",
            )
        if self.family == "low_rank" and self.rank >= size:
            raise UnsupportedModelError(
                self.name,
                needed="a rank below the number of parameters per task",
                found=f"rank {self.rank} with {size}",
                do="Lower rank, or use family='full'.",
            )
        if self.theta == "distribution" and not problem.sites.globals:
            raise UnsupportedModelError(
                self.name,
                needed="global sites to have a distribution",
                found=f"none in {problem.name}",
                do="Use theta='point'.",
            )

    # -- what the settings mean for a program -----------------------------------------------------

    @property
    def bound(self) -> Bound:
        """L."""
        return Bound(_ALPHA.get(self.objective, float(self.alpha)), self.draws)

    def gaussian(self, problem: Problem) -> Family:
        """The family of Gaussians that is meant, or that a flow starts from."""
        size = problem.sites.phi_size
        if self.family == "low_rank":
            return LowRankFamily(size, self.rank)
        full = self.family == "full" or (self.family != "diagonal" and size <= _FULL_UP_TO)
        return FullRank(size) if full else Diagonal(size)

    def search(self, problem: Problem) -> LocalSearch:
        """How q of a task of this program is found."""
        gaussian = self.gaussian(problem)
        bent = FlowFamily(problem.sites.phi_size, self.hidden)
        return LocalSearch(
            name=self.name,
            problem=problem,
            family=bent if self.family == "flow" else gaussian,
            gaussian=gaussian,
            bound=self.bound,
            draws=self.fixed_draws,
            tolerance=self.tolerance,
            steps=self.steps,
            step_size=self.step_size,
        )

    @property
    def _guide(self) -> AmortizedGuide:
        return AmortizedGuide(**(self.encoder or {}))

    def parameters(self, problem: Problem, tasks: Tasks, seed: int) -> nn.Module | None:
        """The encoder, where q starts at its answer; the joint density, where θ has one."""
        if self.theta == "distribution":
            return JointDensity.empty(problem, tasks.n_tasks, self.gaussian(problem))
        if not self.amortized:
            return None
        return self._guide.parameters(problem, tasks, seed)

    # -- q of a task, θ held ----------------------------------------------------------------------

    def posterior(self, problem: Problem, theta: Theta, own: Any, support: Batch) -> Transported:
        """q(φ | S) at θ; without history."""
        frame = self._start(problem, theta, own, support)
        return self.search(problem).find(theta, frame, support, 0)[0]

    def adapt(self, fitted: Fitted, support: Tasks, seed: int) -> TaskPosterior:
        """q(φ | S) of new tasks at the fitted θ; in `info` "bound", "residual" and "met".

        Where θ is a distribution: draws of (θ, φ) with the weight p(S_new | θ), as NUTS's.
        """
        if fitted.drawn:
            return adapt_to_draws(fitted, support, seed)
        problem, theta = fitted.problem, fitted.theta
        batch = problem.batch(support)
        frame = self._start(problem, theta, fitted.own, batch)
        density, info = self.search(problem).find(theta, frame, batch, seed)
        self._check_finite(density, support)
        self._warn(info, support.ids, f"{self.name}.adapt")
        return TaskPosterior(problem, theta, density, support, info=info, units=fitted.units)

    def _start(self, problem: Problem, theta: Theta, own: Any, batch: Batch) -> Frame:
        """Where the search begins: the prior's expansion, or the network's answer."""
        full = self.gaussian(problem).full_frame
        if own is None:
            return prior_frame(problem, theta, batch, full=full)
        with torch.no_grad():
            answer = self._guide.posterior(problem, theta, own, batch)
        return as_frame(answer.detach(), full=full)

    def _warn(self, info: dict[str, Tensor], ids: tuple[Any, ...], where: str) -> None:
        """Of a search that was left to end by itself and did not."""
        missed = ~info["met"]
        if self.steps is not None or not bool(missed.any()):
            return
        steep = torch.where(missed, info["residual"], torch.zeros_like(info["residual"]))
        worst = int(steep.nan_to_num(torch.inf).argmax())
        if float(steep[worst]) <= _STEEP:
            return
        warnings.warn(
            f"{where}: the search for q ended above its tolerance for {int(missed.sum())} tasks, "
            f"worst {ids[worst]!r} (gradient norm {float(steep[worst]):.2g}). Raise steps or "
            "fixed_draws, or standardise x and y.",
            stacklevel=4,
        )

    # -- θ ----------------------------------------------------------------------------------------

    def learn(self, problem: Problem, data: Any, options: Options) -> Learned:
        """θ and every λ_i; see the class.

        Raises:
            DataError: a source of tasks, of which every one would have a λ_i of its own.
        """
        if self.amortized:
            return train(self._guide, problem, data, options)
        if not isinstance(data, Tasks | Episode | TaskSet):
            raise DataError(
                f"{self.name}.fit",
                needed="tasks that are there at every step: each has numbers of its own",
                found=f"{type(data).__name__}, which draws new ones without end",
                do="Pass source.sample(n, seed=0).all, or use amortized=True or AmortizedGuide.",
            )
        tasks = training_tasks(data, options.seed).to(device=problem.device, dtype=problem.dtype)
        options = _checked(options, tasks.n_tasks)
        if options.checkpoint is not None:
            whose = identity(options, self, problem, tasks)
            on = Checkpoint(options.checkpoint, whose)
            options = dataclasses.replace(options, checkpoint=on)
        if self.theta == "distribution":
            return learn_distribution(
                self.name,
                problem,
                tasks,
                options,
                self.gaussian(problem),
                draws=self.draws,
                fixed_draws=self.fixed_draws,
                step_size=self.step_size,
                tolerance=self.tolerance,
            )
        learned, local = learn_point(self.search(problem), tasks, options)
        if local:
            self._warn(local, tasks.ids, f"{self.name}.fit")
        return learned

    def refine(self, fitted: Fitted, *, steps: int | None = None) -> Fitted:
        """A fitted AmortizedGuide, from whose answer every task's q is searched on for.

        Args:
            fitted: by `AmortizedGuide.fit`. Its θ and its network stay as they are.
            steps: of the search; 0 gives the guide's own answers (in this family). None as in the
                settings.
        Returns:
            a fit of this strategy with amortized=True, for all that a fit does.
        Raises:
            UnsupportedModelError: a fit of another strategy, or one that holds θ as draws.
        """
        guide = fitted.strategy
        if type(guide) is not AmortizedGuide:
            raise UnsupportedModelError(
                f"{self.name}.refine",
                needed="a fit of AmortizedGuide",
                found=f"one of {guide.name}",
                do="Fit AmortizedGuide, or this strategy with amortized=True.",
            )
        chosen = dataclasses.replace(
            self,
            amortized=True,
            steps=self.steps if steps is None else steps,
            encoder={k: v for k, v in guide.settings().items() if k in _OF_THE_ENCODER},
        )
        chosen.check(fitted.problem)
        return dataclasses.replace(fitted, strategy=chosen, density=None, _cache={})


def _checked(options: Options, n_tasks: int) -> Options:
    """tasks_per_step that the tasks can give; all of them at every step is None."""
    wanted = options.tasks_per_step
    if wanted is None or wanted == n_tasks:
        return dataclasses.replace(options, tasks_per_step=None)
    if not _whole(wanted, 1) or wanted > n_tasks:
        raise DataError(
            "fit",
            needed=f"tasks_per_step between 1 and {n_tasks}",
            found=str(wanted),
            do="Leave it out to use all tasks at every step.",
        )
    return options


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
