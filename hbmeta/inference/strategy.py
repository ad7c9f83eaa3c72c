"""The base of every inference strategy: a frozen set of settings that turns a program into a fit.

A strategy's author writes as little as the method has of its own:

    parameters   what it learns besides θ (an encoder), or nothing
    posterior    q(φ | S) at a θ
    loss         what training minimises; by default −log p(Q | φ, S) per query point
    noise        the random numbers that the loss takes as inputs

and, where one graph of `loss` would be too large or an inner solver runs until it has converged,

    meta_gradient   the gradient of the mean loss, computed in pieces

A method that is no gradient descent on a loss overrides `learn` instead (a sampler, a closed form).
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hbmeta.compilation import HALVES
from hbmeta.densities import Delta, Density, Empirical, Transported
from hbmeta.effects import shared_effects
from hbmeta.errors import ConvergenceError, DataError, UnsupportedModelError
from hbmeta.feeding import Needs, training_tasks
from hbmeta.fitted import Fitted, Seconds
from hbmeta.models import HierarchicalModel
from hbmeta.nearness import centre_of, complaint, distance_to_mode, measurable
from hbmeta.posterior import TaskPosterior
from hbmeta.problem import Problem
from hbmeta.program import Batch, Program, Theta
from hbmeta.staging import tier_of
from hbmeta.starts import require_finite_start
from hbmeta.tasks import Tasks, TaskSet
from hbmeta.tasks.checks import check_seed
from hbmeta.training import Learned, MetaGradient, Options, train
from hbmeta.triangular import NotPositiveDefinite, positive_definite_at

_CELLS_FOR_THREADS = 50_000
# Tasks of a fit whose distance to their mode is looked at.
_LOOKED_AT = 1000

__all__ = ["Strategy", "on_device", "threads_for"]


@dataclass(frozen=True)
class Strategy(abc.ABC):
    """Settings of an approximation of p(φ | S, θ), and how to fit and to adapt it."""

    needs: ClassVar[Needs] = "split"
    """Whether the loss wants a query apart from the support, or all rows with a support inside."""
    learns_spread: ClassVar[bool] = True
    """Whether it estimates how much tasks vary, which takes two of them."""
    keeps_prior: ClassVar[bool] = True
    """Whether it keeps p(φ | θ), at least its location, or drops it."""
    without_phi: ClassVar[bool] = False
    """Whether it takes programs in which nothing differs between tasks but the data."""
    seeks_mode: ClassVar[bool] = False
    """Whether q(φ | S) comes from steps towards high log p(S | φ, θ), which may end too soon."""
    joint_loss: ClassVar[bool] = False
    """Whether θ is trained by a density of all that is observed, embeddings of x included."""

    @property
    def name(self) -> str:
        """The name of the class, under which it is saved."""
        return type(self).__name__

    def settings(self) -> dict[str, Any]:
        """The settings, as JSON can hold them."""
        return dataclasses.asdict(self)

    def adaptable(self) -> tuple[str, ...]:
        """Names of the settings that `adapt` uses and may change for a call; none by default."""
        return ()

    def replaced(self, **overrides: Any) -> Strategy:
        """The strategy with other settings for a call of `adapt`.

        Raises:
            DataError: a setting that is unknown, or that belongs to the fit.
        """
        able = self.adaptable()
        name = next((name for name in overrides if name not in able), None)
        if name is not None:
            known = name in [f.name for f in dataclasses.fields(self)]
            raise DataError(
                f"{self.name}.adapt",
                needed="settings that adapting can change, "
                + (f"among {', '.join(map(repr, able))}" if able else "of which there are none"),
                found=f"{name}={overrides[name]!r}" if known else repr(name),
                do="Leave it out, or fit anew with it." if known else "Correct the name.",
            )
        return dataclasses.replace(self, **overrides)

    # -- what an author writes ------------------------------------------------------------------

    def parameters(self, problem: Problem, tasks: Tasks, seed: int) -> nn.Module | None:
        """What the strategy learns besides θ, initialised with `seed`; None by default."""
        return None

    @abc.abstractmethod
    def posterior(self, problem: Problem, theta: Theta, own: Any, support: Batch) -> Density:
        """q(φ | S) at θ; differentiable in θ and in the parameters of `own`."""

    def loss(
        self,
        problem: Problem,
        theta: Theta,
        own: Any,
        support: Batch,
        query: Batch,
        noise: Mapping[str, Tensor],
    ) -> Tensor:
        """(tasks,) what training minimises; by default −log p(Q | φ̂, S, θ) per query point."""
        density = self.posterior(problem, theta, own, support)
        if not isinstance(density, Delta):
            raise UnsupportedModelError(
                self.name,
                needed="a point posterior (Delta) for the default loss",
                found=type(density).__name__,
                do="Override loss() in the strategy.",
            )
        log_predictive = problem.log_predictive(theta, density.loc, support, query)
        return -log_predictive / query.counts.clamp_min(1.0)

    def noise(self, problem: Problem, n_tasks: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the standard normal draws that `loss` takes; none by default."""
        return {}

    def meta_gradient(
        self, problem: Problem, own: nn.Module | None, options: Options
    ) -> MetaGradient | None:
        """How to compute the gradient of the mean loss in pieces; None for one graph of `loss`."""
        return None

    def check(self, problem: Problem) -> None:
        """Raises UnsupportedModelError where the strategy makes no sense for the program."""
        return  # every program is welcome, unless a strategy says otherwise

    def suited(self, problem: Problem, known: Tasks) -> Strategy:
        """The strategy as it will run on this program: itself, unless it says otherwise.

        Raises:
            UnsupportedModelError: θ holds effects and a scale of theirs, which would stay at a
                point together (`hbmeta.effects`).
        """
        shared_effects(problem, problem.batch(known[:2])).refuse_at_a_point(self.name)
        return self

    def learn(self, problem: Problem, data: Any, options: Options) -> Learned:
        """Finds θ and `own`; by default gradient descent on `loss`."""
        return train(self, problem, data, options)

    def adapt(self, fitted: Fitted, support: Tasks, seed: int) -> TaskPosterior:
        """q(φ | S) of new tasks at the fitted θ."""
        problem = fitted.problem
        batch = problem.batch(support)
        with torch.no_grad():
            density = self.posterior(problem, fitted.theta, fitted.own, batch)
        density = _detached(density)
        self._check_finite(density, support)
        return TaskPosterior(problem, fitted.theta, density, support, units=fitted.units)

    # -- what nobody overrides ------------------------------------------------------------------

    def fit(
        self,
        model: Program,
        tasks: Any,
        *,
        steps: int = 2000,
        tasks_per_step: int | None = None,
        learning_rate: float = 1e-3,
        theta_learning_rate: float = 3e-2,
        decay: bool = True,
        seed: int = 0,
        device: str | torch.device | None = None,
        compile: bool | str = "auto",
        checkpoint: Any = None,
        progress: bool | None = None,
    ) -> Fitted:
        """Fits the strategy to a model and its tasks.

        Args:
            model: a ready-made model or any Pyro program in the nested or flat layout.
            tasks: Tasks, an Episode, a TaskSet (its support is used) or a source of tasks.
            steps: training steps (ignored by strategies that do not train).
            tasks_per_step: tasks in a step; None for all of them (25 of a source).
            learning_rate: Adam's, for networks.
            theta_learning_rate: Adam's, for global sites, in units of their prior's scale.
            decay: lower both to zero along a half cosine.
            seed: of everything random; the caller's random state is left alone.
            device: where to run; the device of the data by default.
            compile: "auto" lets the length of the fit decide; True, False, or a tier's name.
                `adapt` keeps to it; True leaves its searches to "auto".
            checkpoint: file to resume an interrupted fit from, and to write to on the way.
            progress: show progress; by default where standard error is a terminal.
        Returns:
            Fitted.
        Raises:
            UnsupportedModelError: the strategy makes no sense for this program.
            DataError, ProgramError: the data or the program cannot be used.
            ConvergenceError: the program's density is not finite where a fit starts, the loss
                became infinite or NaN, or steps led where the program's own covariance is not
                positive definite.
        """
        start = time.perf_counter()
        where = f"{self.name}.fit"
        tier = tier_of(compile)
        seed = check_seed(seed, where=where)
        if not callable(model):
            raise UnsupportedModelError(
                where,
                needed="a model: a HierarchicalModel or a Pyro program",
                found=type(model).__name__,
                do="Pass the model first and the tasks second.",
            )
        if not isinstance(steps, int) or steps < 1:
            raise DataError(
                where,
                needed="steps as a whole number of 1 or more",
                found=f"steps={steps!r}",
                do="Pass for example steps=2000.",
            )
        if not all(0 <= rate < float("inf") for rate in (learning_rate, theta_learning_rate)):
            raise DataError(
                where,
                needed="learning rates of 0 or more",
                found=f"learning_rate={learning_rate}, theta_learning_rate={theta_learning_rate}",
                do="Leave them out for the defaults.",
            )
        known = training_tasks(tasks, seed)
        if device is not None:
            known = on_device(known, device, where)
        bound = model.bind(known) if isinstance(model, HierarchicalModel) else model
        problem = Problem(bound, known)
        if self.learns_spread and known.n_tasks < 2 and problem.sites.globals:
            raise DataError(
                where,
                needed="two groups or more, to estimate how much they vary",
                found="one group",
                do="Use NoPooling or NUTS for a single group.",
            )
        # Whether a compilation pays in `adapt`, the length of its own searches decides.
        problem.tier = "auto" if tier == "compiled" else tier
        self._check_precision(problem)
        self.check_levels(problem)
        chosen = self.suited(problem, known)
        chosen.check(problem)
        require_finite_start(problem, known, where)
        options = Options(
            steps=steps, tasks_per_step=tasks_per_step, learning_rate=learning_rate,
            theta_learning_rate=theta_learning_rate, decay=decay, seed=seed, tier=tier,
            checkpoint=checkpoint, progress=progress,
        )  # fmt: skip
        with threads_for(known), positive_definite_at(where, "in the fit"):
            learned = chosen.learn(problem, tasks, options)
            if self.seeks_mode and measurable(problem):
                learned.info["distance_to_mode"] = self._looked_at(problem, learned, known)
        schema = tasks.schema if isinstance(tasks, TaskSet) else None
        return Fitted(
            strategy=chosen,
            model=bound,
            problem=problem,
            theta={k: v.detach() for k, v in learned.theta.items()},
            drawn=learned.drawn,
            own=learned.own,
            tasks=known,
            density=learned.density,
            history=tuple(learned.history),
            info=learned.info,
            schema=schema,
            seed=seed,
            seconds=Seconds(time.perf_counter() - start, learned.seconds_staging),
            chains=learned.chains,
        )

    def _looked_at(self, problem: Problem, learned: Learned, known: Tasks) -> Tensor:
        """(tasks,) how far q lies from the mode of each task's log joint.

        What has a spread, and so claims to be a posterior, warns where that is far.
        """
        some = known[:_LOOKED_AT].to(device=problem.device, dtype=problem.dtype)
        batch = problem.batch(some)
        try:
            with torch.no_grad():
                density = self.posterior(problem, learned.theta, learned.own, batch)
            found = distance_to_mode(problem, learned.theta, centre_of(density), batch)
        except NotPositiveDefinite:  # which adapting will say; θ is fitted
            return torch.full((some.n_tasks,), torch.nan)
        if not isinstance(density, Delta) and (text := complaint(found, some.ids)):
            warnings.warn(f"{self.name}: {text}", stacklevel=3)
        return found

    def check_levels(self, problem: Problem) -> None:
        """Refuses programs without φ, and embeddings that the strategy would shrink to nothing."""
        if not problem.sites.locals and not self.without_phi:
            raise UnsupportedModelError(
                self.name,
                needed="task parameters φ to infer",
                found=f"none in {problem.name}: every hyperparameter is known",
                do="Use ExactGP, or leave a hyperparameter to be inferred.",
            )
        # Without classes to enumerate, a query's loss too is a density of all that is observed.
        joint = self.joint_loss or problem.classes is None
        if joint and len(problem.sites.observed) > 1 and (name := problem.moving_observation):
            raise UnsupportedModelError(
                self.name,
                needed="observations that θ does not transform, because it maximises their density",
                found=f"observed site {name!r}, whose value depends on θ (an embedding that is "
                "learned would shrink to nothing)",
                do="Use ProtoNet or MAML, which train on p(y | x), or fix the embedding with "
                "requires_grad_(False).",
            )

    def _check_precision(self, problem: Problem) -> None:
        if problem.dtype in HALVES and type(self).learn is not Strategy.learn:
            raise DataError(
                f"{self.name}.fit",
                needed="data in float32 or float64: a sampler, a search and a Cholesky factor "
                "need more digits than half precision has",
                found=str(problem.dtype).removeprefix("torch."),
                do="Pass tasks.to(dtype=torch.float32); MAML and its kin train in half precision.",
            )

    def _check_finite(self, density: Density, support: Tasks) -> None:
        if isinstance(density, Empirical):
            values = density.phi
        else:
            values = density.loc if isinstance(density, Delta) else density.centre
        finite = torch.isfinite(values).all(-1)
        finite = finite.all(0) if finite.ndim == 2 else finite
        if not bool(finite.all()):
            bad = support.ids[int((~finite).nonzero()[0])]
            raise ConvergenceError(
                f"{self.name}.adapt",
                needed="finite task parameters",
                found=f"NaN or infinity for task {bad!r}",
                do="Lower step_size, or standardise x and y.",
            )


def on_device(tasks: Tasks, device: str | torch.device, where: str) -> Tasks:
    """The tasks there; DataError where this build of torch cannot use the device."""
    try:
        return tasks.to(device=torch.device(device))
    except (AssertionError, RuntimeError) as error:  # which of them depends on torch's build
        raise DataError(
            where,
            needed="a device that this build of torch can use here",
            found=f"{str(device)!r} ({str(error).splitlines()[0]})",
            do="Leave device out to stay where the data are.",
        ) from error


@contextlib.contextmanager
def threads_for(tasks: Tasks) -> Iterator[None]:
    """One thread for small data: a second waits more than it works, above all on a busy machine."""
    before = torch.get_num_threads()
    small = tasks.device.type == "cpu" and tasks.n_tasks * tasks.max_points < _CELLS_FOR_THREADS
    try:
        torch.set_num_threads(1 if small else before)
        yield
    finally:
        torch.set_num_threads(before)


def _detached(density: Density) -> Density:
    if isinstance(density, Delta):
        return Delta(density.loc.detach())
    if isinstance(density, Transported):
        return density.detach()
    return density
