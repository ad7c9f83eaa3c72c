"""The meta-gradient of `ImplicitMAML` in pieces, each staged, the loops between them in Python.

    begin      θ, S            →  φ_0, f and ∇f there
    advance    φ, d            →  one product ∇²f(φ) d, and conjugate gradients' iteration on it
    attempt    φ, s            →  f and ∇f at φ + s, and what the search makes of them
    query      φ*              →  L^Q, ∂L^Q/∂φ
    product    φ*, p           →  A p, for v = A⁻¹ ∂L^Q/∂φ
    outer      φ*, v           →  d/dθ of the mean of L^Q

How long the loops run is known only on the way, so no graph could hold them; and because none does,
memory is that of one product, whatever the number of steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hbmeta.conjugate_gradients import Solution, solve
from hbmeta.errors import ConvergenceError, CurvatureError
from hbmeta.inference.proximal import Proximal
from hbmeta.inference.work import Work
from hbmeta.newton import Inner, Minima, Search, advance, attempt, begin, run
from hbmeta.program import Batch, Phi, Theta
from hbmeta.staging import TIERS, Staged, Tier
from hbmeta.training import Options, mean_over_queries

__all__ = ["Counts", "ImplicitGradient", "require_finite", "require_positive"]

# At most so many products for one Newton step, and for one solve with A.
PRODUCTS_PER_STEP = 60
PRODUCTS_PER_SOLVE = 200
# Products that would serve no more than this share of the tasks wait for the next Newton step: on
# sinusoids that spares a quarter of them.
_STRAGGLERS = 0.2
# What a meta-step of a network takes, roughly: for the decision whether compiling pays.
_ADVANCES, _ATTEMPTS, _PRODUCTS = 20, 8, 14
# Less than this share of (step, task) pairs is nothing to warn of.
_SHARE = 0.01


@dataclass
class Counts:
    """What a fit by implicit gradients took, and where it fell short.

    Attributes:
        steps: meta-steps.
        tasks: (step, task) pairs.
        gradients: evaluations of f and ∇f by the inner solver, of all tasks of a step at once.
        hessian_vector_products: by the inner solver, likewise.
        adjoint_products: by conjugate gradients for v, likewise.
        tolerance_missed: pairs whose inner solver ended above its tolerance.
        left_out: pairs left out of the gradient, for want of positive curvature.
        steps_left_out: steps in which a task was left out.
        largest_residual: largest ‖∇f‖ at a φ* that was used, in units of the loss per φ.
        largest_adjoint_residual: largest ‖A v − ∂L^Q/∂φ‖ / ‖∂L^Q/∂φ‖ of a task that was used.
    """

    steps: int = 0
    tasks: int = 0
    gradients: int = 0
    hessian_vector_products: int = 0
    adjoint_products: int = 0
    tolerance_missed: int = 0
    left_out: int = 0
    steps_left_out: int = 0
    largest_residual: float = 0.0
    largest_adjoint_residual: float = 0.0


class ImplicitGradient:
    """Mean query loss at the regularised minima, and its gradient; a `MetaGradient`.

    Args:
        proximal: f of the problem.
        where: name of the strategy, for messages.
        steps: Newton steps at most.
        tolerance: of the inner solver and of conjugate gradients; see `ImplicitMAML`.
        options: of the fit.
    """

    def __init__(
        self, proximal: Proximal, where: str, steps: int, tolerance: float, options: Options
    ) -> None:
        self.proximal, self.where, self.steps, self.tolerance = proximal, where, steps, tolerance
        self.counts = Counts()
        self._work = Work(0, 0)
        some = max(options.steps // 4, 1)

        def staged(function: Callable[..., Any], calls: int, check_every: int) -> Staged:
            return Staged(
                function,
                tier=options.tier,
                expected_calls=options.steps * calls,
                check_every=check_every,
            )

        self._begin = staged(self._begun, 1, some)
        # A comparison with the program would stumble over decisions that hang on a last digit; the
        # other pieces hold the same gradient and the same product.
        self._advance = staged(self._advanced, _ADVANCES, 0)
        self._attempt = staged(self._attempted, _ATTEMPTS, 0)
        self._query = staged(proximal.query_gradient, 1, some)
        self._product = staged(self._multiplied, _PRODUCTS, some)
        self._outer = staged(proximal.theta_gradient, 1, some)

    @property
    def pieces(self) -> tuple[Staged, ...]:
        """What is staged."""
        return (
            self._begin, self._advance, self._attempt, self._query, self._product, self._outer,
        )  # fmt: skip

    @property
    def tier(self) -> Tier:
        """The highest tier in use."""
        return max((piece.tier for piece in self.pieces), key=TIERS.index)

    @property
    def seconds_staging(self) -> float:
        """Of all pieces."""
        return sum(piece.seconds_staging for piece in self.pieces)

    def __call__(
        self,
        theta: Theta,
        own: Mapping[str, Tensor],
        support: Batch,
        query: Batch,
        noise: Mapping[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss and gradient; see `MetaGradient`.

        A task that is left out adds nothing to the gradient, and is counted in the mean.

        Raises:
            ConvergenceError: a loss or a product is NaN or infinite.
            CurvatureError: all tasks with a query lack positive curvature.
        """
        theta = {name: value.detach() for name, value in theta.items()}
        where = f"{self.where}.fit"
        rest, found = self.minima(theta, support)
        require_finite(found, where, self._now)
        losses, right = self._query(theta, rest, support, query, found.point)
        product = _bound(self._product, theta, rest, support, found.point)
        solution = solve(
            lambda vector: product(vector)[0],
            right,
            tolerance=self.tolerance,
            iterations=PRODUCTS_PER_SOLVE,
            where=where,
        )
        asked = query.counts > 0
        require_positive(solution, asked, self.proximal.damping, where, self._now)
        used = (asked & solution.positive).to(found.value.dtype)
        weights = used / asked.sum().clamp_min(1)
        gradient: dict[str, Tensor] = self._outer(
            theta, support, query, found.point, solution.x, weights
        )
        self._count(found, solution, asked)
        return mean_over_queries(losses, query), gradient

    def minima(self, theta: Theta, support: Batch) -> tuple[Phi, Minima]:
        """φ* of every task, and the sites that do not move."""
        centre, rest, search, inner = self._begin(theta, support)
        ahead = _bound(self._advance, theta, rest, support)
        trial = _bound(self._attempt, theta, rest, support, centre)
        width = len(Search._fields)

        def attempted(search: Search, inner: Inner) -> tuple[Search, Inner]:
            flat = trial(search, inner)
            return Search(*flat[:width]), Inner(*flat[width:])

        found = run(
            (search, inner),
            lambda search, inner: Inner(*ahead(search, inner)),
            attempted,
            steps=self.steps,
            products=PRODUCTS_PER_STEP,
            share=_STRAGGLERS,
        )
        return rest, found

    @property
    def _now(self) -> str:
        return f" at step {self.counts.steps}"

    def _count(self, found: Minima, solution: Solution, asked: Tensor) -> None:
        counts, lost = self.counts, int((asked & ~solution.positive).sum())
        counts.steps += 1
        counts.tasks += len(asked)
        counts.gradients += found.gradients
        counts.hessian_vector_products += found.products
        counts.adjoint_products += solution.products
        counts.tolerance_missed += int((~found.met).sum())
        counts.left_out += lost
        counts.steps_left_out += lost > 0
        used = asked & solution.positive
        residual = float(found.residual[used].max()) if bool(used.any()) else 0.0
        adjoint = float(solution.residual[used].max()) if bool(used.any()) else 0.0
        counts.largest_residual = max(counts.largest_residual, residual)
        counts.largest_adjoint_residual = max(counts.largest_adjoint_residual, adjoint)
        # Besides the inner solver's: ∇L^Q, and ∇f whose derivative in θ is taken.
        self._work = Work(found.gradients + 2, found.products + solution.products)

    def work(self) -> Work:
        """Gradients and Hessian-vector products of the last meta-step."""
        return self._work

    def finish(self) -> dict[str, Any]:
        """The counts; warns of tasks that were left out, and of minima that were not reached."""
        counts = self.counts
        if counts.left_out > _SHARE * counts.tasks:
            warnings.warn(
                f"{self.where}: {counts.left_out} of {counts.tasks} (step, task) pairs, in "
                f"{counts.steps_left_out} of {counts.steps} steps, were left out of the gradient: "
                "their curvature plus damping was not positive. Raise damping.",
                stacklevel=5,
            )
        if counts.tolerance_missed > _SHARE * counts.tasks:
            warnings.warn(
                f"{self.where}: {counts.tolerance_missed} of {counts.tasks} (step, task) pairs "
                "ended above the tolerance of the inner solver. Raise steps or damping; at the "
                "kinks of a ReLU network no gradient vanishes (tanh has none).",
                stacklevel=5,
            )
        return {"implicit": asdict(counts)}

    # -- the pieces, each a function of tensors ---------------------------------------------------

    def _begun(self, theta: Theta, support: Batch) -> tuple[Tensor, Phi, Search, Inner]:
        centre, rest = self.proximal.start(theta, support)

        def f(point: Tensor) -> tuple[Tensor, Tensor]:
            return self.proximal.value_and_gradient(theta, rest, support, centre, point)

        return centre, rest, *begin(f, centre, self.tolerance)

    def _advanced(
        self, theta: Theta, rest: Phi, support: Batch, search: Search, inner: Inner
    ) -> Inner:
        def product(vector: Tensor) -> Tensor:
            return self.proximal.product(theta, rest, support, search.point, vector)

        return advance(product, search, inner)

    def _attempted(
        self,
        theta: Theta,
        rest: Phi,
        support: Batch,
        centre: Tensor,
        search: Search,
        inner: Inner,
    ) -> tuple[Search, Inner]:
        def f(point: Tensor) -> tuple[Tensor, Tensor]:
            return self.proximal.value_and_gradient(theta, rest, support, centre, point)

        return attempt(f, search, inner)

    def _multiplied(
        self, theta: Theta, rest: Phi, support: Batch, point: Tensor, vector: Tensor
    ) -> list[Tensor]:
        return [self.proximal.product(theta, rest, support, point, vector)]


def _bound(staged: Staged, *fixed: Any) -> Callable[..., list[Tensor]]:
    """The staged function with its first arguments given, to a flat list of tensors.

    The first call is counted, checked and may climb a tier; from there on, what it found is called
    without looking at trees and keys again, which would take longer than a small graph.
    """
    bare: Callable[..., list[Tensor]] | None = None
    # A clone is dense in memory, as the graph expects.
    tensors = [v.clone() for v in pytree.tree_leaves(fixed) if isinstance(v, Tensor)]

    def call(*moving: Tensor | Search | Inner) -> list[Tensor]:
        nonlocal bare
        if bare is not None:
            flat = (v for m in moving for v in ((m,) if isinstance(m, Tensor) else m))
            return list(bare(*tensors, *flat))
        result = staged(*fixed, *moving)
        if staged.tier != "eager":
            bare = staged.flat(*fixed, *moving)
        return pytree.tree_leaves(result)

    return call


def require_finite(
    found: Minima, where: str, when: str = "", ids: Sequence[Any] | None = None
) -> None:
    """Raises where f or its gradient is NaN or infinite where a search ended.

    Raises:
        ConvergenceError: says for how many tasks, and names one where ids are given.
    """
    finite = torch.isfinite(found.value) & torch.isfinite(found.residual)
    if not bool(finite.all()):
        named = "" if ids is None else f" (task {ids[int((~finite).nonzero()[0])]!r})"
        raise ConvergenceError(
            where,
            needed="a finite support loss where the task parameters start",
            found=f"NaN or infinity in {int((~finite).sum())} of {len(finite)} tasks{named}{when}",
            do="Lower the learning rates, or standardise x and y.",
        )


def require_positive(
    solution: Solution, asked: Tensor, damping: float, where: str, when: str = ""
) -> None:
    """Raises where no task that matters has positive curvature.

    Args:
        solution: of conjugate gradients with A = ∇²L^S + damping.
        asked: (tasks,) which matter.
        damping: λ.
        where: for the error.
        when: for the error.
    Raises:
        CurvatureError: says how much damping is needed at least.
    """
    if bool(asked.any()) and not bool((asked & solution.positive).any()):
        # Of the task that comes closest.
        lowest = damping - float(solution.curvature[asked].max())
        raise CurvatureError(
            where,
            needed=f"damping above {lowest:.3g}, minus the smallest curvature of the support loss",
            found=f"damping={damping:g}, and curvature that is not positive in all "
            f"{int(asked.sum())} tasks{when}",
            do="Raise damping.",
        )
