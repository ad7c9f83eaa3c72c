"""Laplace: a Gaussian at the mode of every task, and θ at the maximum of its evidence.

Model: φ_i ~ p(φ | θ), y_ij ~ p(y | φ_i, θ).
Estimator: with f_i(φ) = log p(S_i | φ, θ) + log p(φ | θ) in unconstrained space,

    φ̂_i = argmax f_i,   q(φ | S_i) = N(φ̂_i, Λ_i⁻¹),   Λ_i = −∇²f_i(φ̂_i) or an approximation,
    log p(S_i | θ) ≈ f_i(φ̂_i) + (d/2) log 2π − ½ log det Λ_i,

and θ at the maximum of the summed evidence plus log p(θ), φ̂_i a function of θ that is
differentiated through (`hbmeta.laplace_evidence`). φ is integrated out, so a scale of a centered
hierarchy does not fall to zero as it does at the joint mode of θ and φ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hbmeta.conjugate_gradients import solve
from hbmeta.curvatures import DENSE, Kind, check_curvature, check_kind
from hbmeta.damping import check_damping, warn_of_damping
from hbmeta.densities import Transported
from hbmeta.effects import shared_effects
from hbmeta.errors import DataError
from hbmeta.evidence import maximise_evidence
from hbmeta.feeding import Needs, training_tasks
from hbmeta.inference.adapting import adapt_to_draws
from hbmeta.inference.approximation import approximate
from hbmeta.inference.crossed_laplace import (
    check_integrated,
    learn_crossed,
)
from hbmeta.inference.implicit_gradient import PRODUCTS_PER_SOLVE
from hbmeta.inference.laplace_gradient import EvidenceGradient, MinusEvidence
from hbmeta.inference.mode_search import ModeSearch
from hbmeta.inference.moving import site_names
from hbmeta.inference.softened import soften
from hbmeta.inference.strategy import Strategy
from hbmeta.laplace_evidence import kind_for_evidence, total_evidence
from hbmeta.modes import Modes, find_modes, warn_of_missed
from hbmeta.posterior import TaskPosterior
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.tasks import Tasks
from hbmeta.training import Learned, MetaGradient, Options

if TYPE_CHECKING:
    from hbmeta.fitted import Fitted

# Of the inner solver while θ of a network is trained, relative to its start.
_WHILE_TRAINING = 1e-3
_STEPS_WHILE_TRAINING = 20

__all__ = ["Laplace"]


@dataclass(frozen=True)
class Laplace(Strategy):
    """q(φ | S) = N(φ̂, Λ⁻¹) at the mode of the log joint.

    Keeps p(y | φ, θ) and p(φ | θ); replaces p(φ | S, θ) by its second-order expansion at the mode.
    θ is held at a point: the maximum of the Laplace evidence of all rows, plus log p(θ) in
    unconstrained space (`prior`). Exact, posterior and evidence, where the log joint is quadratic
    in φ (linear-Gaussian programs), with curvature "exact" or "ggn".

    Curvatures, Λ =
        "exact"       −∇²f; up to 64 parameters per task.
        "ggn"         generalised Gauss–Newton of the observations plus the prior's own curvature:
                      positive under a log-concave prior, at any φ; kept as few rows where a task
                      has fewer observations than parameters.
        "kronecker"   Gauss–Newton by Kronecker factors of dense layers (K-FAC).
        "diagonal"    the diagonal of "ggn": variances 1/Λ_jj, too small where entries correlate.
        "last_layer"  "ggn" of the last layer's sites, all others at φ̂ (no density; draws and
                      predictions only). For θ the evidence is that of "diagonal".

    Up to 64 parameters per task θ is found by L-BFGS, modes from those of the evaluation before.
    Above (networks), θ is trained by Adam on the negative evidence of tasks drawn at each step, its
    log determinant by the same curvature, its gradient through the mode by conjugate gradients;
    `steps`, `tasks_per_step` and the learning rates of `fit` say how.

    Args:
        curvature: which Λ.
        damping: δ, of Λ + δI. None: 0 where Λ is positive definite, and where it is not (no mode
            was found, or none is there) what gives its lowest direction the prior's largest
            variance; such tasks stand in info["damping"] and in a warning. A number holds for all
            tasks; with 0 such tasks raise. A fit holds what it chose at its first θ.
        prior: add log p(θ) to the evidence, with the Jacobian of unconstrained space; θ that is
            trained (above 64 parameters per task) always has it.
        tolerance: in nats: a search for a mode ends where one more Newton step would gain less
            (`hbmeta.modes`). Tasks that miss it are in info["met"] and in a warning.
        iterations: at most so many Newton steps for a mode.
        sites: of "last_layer": local sites that have a spread, by name or by a prefix of names up
            to a dot.
        integrated: level-1 sites that are integrated out with φ, by name: effects with a scale of
            their own among θ, such as lecturers of students (crossed random effects). At a point
            they and their scale have no mode. By itself (with the default curvature, damping and
            prior) Laplace integrates out all effects that it finds, in either form
            (`hbmeta.effects`), and says which in info["integrated"]. The fit then holds draws of
            them and of φ at the other θ, which stands at the maximum of the evidence
            (`hbmeta.crossed_evidence`).
    Raises:
        UnsupportedModelError: a program that has no such curvature, or effects of level 1 that
            would have to be held at a point together with their scale.
        CurvatureError: a curvature that is not positive definite, where damping is given.
        ConvergenceError: f is NaN or infinite.
        DataError: a setting out of its range.
    References:
        MacKay (1992), Neural Computation 4(3). Tierney, Kadane (1986), JASA 81(393). Grant, Finn,
        Levine, Darrell, Griffiths (2018), ICLR, for θ by the evidence ("LLAMA"). Daxberger et al.
        (2021), NeurIPS, for the curvatures of networks.
    """

    needs: ClassVar[Needs] = "subset"
    joint_loss: ClassVar[bool] = True

    curvature: Kind = "exact"
    damping: float | None = None
    prior: bool = True
    tolerance: float = 1e-9
    iterations: int = 100
    sites: tuple[str, ...] | None = None
    integrated: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_kind(self.curvature, self.name)
        check_damping(self.damping, self.name)
        number = isinstance(self.tolerance, int | float) and not isinstance(self.tolerance, bool)
        if not number or not 0 < self.tolerance < math.inf:
            raise DataError(
                self.name,
                needed="tolerance as a finite number of nats above 0",
                found=repr(self.tolerance),
                do="Leave it out for 1e-9.",
            )
        if type(self.iterations) is not int or self.iterations < 1:
            raise DataError(
                self.name,
                needed="iterations as a whole number of 1 or more",
                found=repr(self.iterations),
                do="Leave it out for 100.",
            )
        if self.sites is not None:
            object.__setattr__(self, "sites", site_names(self.sites, self.name))
            if self.curvature != "last_layer":
                raise DataError(
                    self.name,
                    needed='sites only with curvature="last_layer"',
                    found=f"curvature={self.curvature!r}, sites={self.sites!r}",
                    do="Leave sites out.",
                )

        self._check_crossed()

    def _check_crossed(self) -> None:
        # Files give lists for tuples.
        object.__setattr__(self, "integrated", site_names(self.integrated, self.name))
        if not self.integrated:
            return
        if self.curvature != "exact" or self.damping is not None or not self.prior:
            raise DataError(
                self.name,
                needed='curvature="exact", damping=None and prior=True with integrated',
                found=f"curvature={self.curvature!r}, damping={self.damping!r}, "
                f"prior={self.prior!r}",
                do="Leave them out.",
            )

    def adaptable(self) -> tuple[str, ...]:
        """What says how φ is expanded; nothing where the fit holds draws."""
        names = ("curvature", "damping", "tolerance", "iterations", "sites")
        return () if self.integrated else names

    def suited(self, problem: Problem, known: Tasks) -> Laplace:
        """With every effect that has a scale of its own integrated out, where settings allow."""
        check_integrated(problem, self.integrated, self.name)
        found = shared_effects(problem, problem.batch(known[:2]))
        plain = self.curvature == "exact" and self.damping is None and self.prior
        if found.names and not self.integrated and plain and problem.sites.phi_size <= DENSE:
            return replace(self, integrated=found.names)
        found.refuse_at_a_point(self.name, integrated=self.integrated)
        return self

    def check(self, problem: Problem) -> None:
        """A program that has this curvature, and sites that can be integrated out."""
        check_curvature(self.curvature, problem, self.name, self.sites)
        check_integrated(problem, self.integrated, self.name)

    @staticmethod
    def soften(
        fitted: Fitted,
        *,
        curvature: Kind = "ggn",
        damping: float | None = None,
        prior: Literal["task", "implied"] = "task",
        move: bool = False,
        sites: tuple[str, ...] | None = None,
    ) -> Fitted:
        """The fit of a strategy with one point per task, a Gaussian in the place of each point.

        θ stays as it was fitted. New tasks get the strategy's own point and the curvature there.

        Args:
            fitted: of MAML and its kin, ImplicitMAML, NoPooling, …
            curvature: as for `Laplace`, at the strategy's point.
            damping: as for `Laplace`.
            prior: "task", the program's own; or "implied", that which early stopping (or the
                damping of implicit MAML) stands for; see `hbmeta.inference.softened`.
            move: go on from the strategy's point to the mode of the log joint.
            sites: as for `Laplace`.
        Raises:
            UnsupportedModelError: a fit that has a spread already, or a curvature or an implied
                prior that it does not have.
        """
        return soften(
            fitted, curvature=curvature, damping=damping, prior=prior, move=move, sites=sites
        )

    # -- θ ----------------------------------------------------------------------------------------

    def learn(self, problem: Problem, data: Any, options: Options) -> Learned:
        """θ at the maximum of the evidence: by L-BFGS, or trained where φ is large."""
        if problem.sites.phi_size > DENSE:
            return super().learn(problem, data, options)
        tasks = training_tasks(data, options.seed).to(device=problem.device, dtype=problem.dtype)
        if self.integrated:
            return learn_crossed(
                self.name, problem, tasks, options, self.integrated, self.tolerance
            )
        batch = problem.batch(tasks)
        search = ModeSearch(self, problem, batch, tasks.ids, options)

        def evidence(theta: Theta, phi: Tensor, damping: Tensor) -> Tensor:
            return total_evidence(problem, theta, phi, batch, damping, self.curvature)

        found = maximise_evidence(
            problem,
            batch,
            evidence,
            prior=self.prior,
            options=options,
            where=self.name,
            beside=search,
        )
        found.info["modes_missed"] = search.missed()
        found.info["damping"] = [] if search.damping is None else search.damping.tolist()
        found.seconds_staging += search.seconds_staging
        return found

    def loss(
        self,
        problem: Problem,
        theta: Theta,
        own: Any,
        support: Batch,
        query: Batch,
        noise: Mapping[str, Tensor],
    ) -> Tensor:
        """(tasks,) minus the evidence of all rows (query); its gradient is the total derivative."""
        held = {name: value.detach() for name, value in theta.items()}
        with torch.no_grad():
            start = problem.location(held, query)
        found = find_modes(
            problem,
            held,
            query,
            start,
            tolerance=0.5 * _WHILE_TRAINING**2,
            iterations=_STEPS_WHILE_TRAINING,
        )
        pieces = MinusEvidence(problem, kind_for_evidence(self.curvature), self.damping or 0.0)
        losses, right = pieces.query_gradient(held, {}, query, query, found.point)
        solution = solve(
            lambda vector: pieces.product(held, {}, query, found.point, vector),
            right,
            tolerance=_WHILE_TRAINING,
            iterations=PRODUCTS_PER_SOLVE,
            where=self.name,
        )
        if not any(value.requires_grad for value in theta.values()):
            return losses
        with torch.enable_grad():
            value, through = pieces.through_minimum(theta, query, query, found.point, solution.x)
            return value + (through - through.detach())

    def meta_gradient(
        self, problem: Problem, own: nn.Module | None, options: Options
    ) -> MetaGradient:
        """The gradient in pieces; the search for the modes runs to its tolerance between them."""
        pieces = MinusEvidence(problem, kind_for_evidence(self.curvature), self.damping or 0.0)
        return EvidenceGradient(pieces, self.name, _STEPS_WHILE_TRAINING, _WHILE_TRAINING, options)

    # -- q(φ | S) ---------------------------------------------------------------------------------

    def posterior(self, problem: Problem, theta: Theta, own: Any, support: Batch) -> Transported:
        """N(φ̂, (Λ + δI)⁻¹) per task; a constant."""
        ids = tuple(range(support.n_tasks))
        theta = {name: value.detach() for name, value in theta.items()}
        with torch.no_grad():
            start = problem.location(theta, support)
        point = self._modes(problem, theta, support, start).point
        return approximate(self, problem, theta, point, support, ids=ids, where=self.name)[0]

    def adapt(self, fitted: Fitted, support: Tasks, seed: int) -> TaskPosterior:
        """The approximation at the fitted θ.

        The posterior's info holds, per task, "log_evidence", "damping", "met" (whether the search
        met its tolerance), "slope" (‖∇f‖ at φ̂) and "positive" (whether Λ was positive definite
        without damping). Of a fit with `integrated`: draws, as of NUTS.
        """
        if fitted.drawn:
            return adapt_to_draws(fitted, support, seed)
        problem, theta = fitted.problem, fitted.theta
        batch = problem.batch(support)
        with torch.no_grad():
            start = problem.location(theta, batch)
        found = self._modes(problem, theta, batch, start, seed)
        where = f"{self.name}.adapt"
        warn_of_missed(found, support.ids, where, stacklevel=4)
        density, damping, evidence = approximate(
            self, problem, theta, found.point, batch, ids=support.ids, where=where
        )
        warn_of_damping(damping, self.damping, support.ids, where, stacklevel=4)
        self._check_finite(density, support)
        info = {
            "log_evidence": evidence,
            "damping": damping.value,
            "met": found.met,
            "slope": found.slope,
            "positive": damping.positive,
        }
        return TaskPosterior(problem, theta, density, support, info=info, units=fitted.units)

    def _modes(
        self, problem: Problem, theta: Theta, batch: Batch, start: Tensor, seed: int = 0
    ) -> Modes:
        return find_modes(
            problem,
            theta,
            batch,
            start,
            tolerance=self.tolerance,
            iterations=self.iterations,
            seed=seed,
        )
