"""A Gaussian around the point of another strategy: what MAML says, with a spread.

Model: φ_i ~ p(φ | θ), y_ij ~ p(y | φ_i, θ), fitted by a strategy with q(φ | S_i) = δ(φ̂_i).
Estimator: q(φ | S_i) = N(φ̂_i, Λ_i⁻¹) with φ̂_i where that strategy left it and either

    prior="task"       Λ_i = H_i − ∇² log p(φ̂_i | θ): the curvature of the log joint at φ̂_i;
    prior="implied"    Λ_i = H_i + P_i with the prior under which φ̂_i is a posterior mode: for N
                       steps of descent of size α on −log p(S_i | φ), and H_i = V diag(λ) Vᵀ,
                       P_i = V diag(λ q / (1 − q)) Vᵀ, q = (1 − αλ)^N (`hbmeta.theory`), so that
                       Λ_i = V diag(λ / (1 − q)) Vᵀ; for implicit MAML P_i = λ I.

H_i is the curvature of −log p(S_i | φ), generalised Gauss–Newton for "implied".
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hbmeta.curvature import log_joint
from hbmeta.curvatures import DENSE, Kind, check_curvature, check_kind
from hbmeta.curvatures.response import check_response, gram, response_rows
from hbmeta.damping import Damping, check_damping, warn_of_damping
from hbmeta.densities import Delta, Density, Gaussian, Transported
from hbmeta.derivatives import task_gradient
from hbmeta.errors import CurvatureError, DataError, UnsupportedModelError
from hbmeta.feeding import training_tasks
from hbmeta.inference.approximation import approximate
from hbmeta.inference.gradient_strategy import GradientStrategy
from hbmeta.inference.implicit_maml import ImplicitMAML
from hbmeta.inference.moving import site_names
from hbmeta.inference.strategy import Strategy
from hbmeta.modes import find_modes, warn_of_missed
from hbmeta.posterior import TaskPosterior
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.structured import LowRankPrecision, directions_of
from hbmeta.tasks import Tasks
from hbmeta.training import Learned, Options

if TYPE_CHECKING:
    from hbmeta.fitted import Fitted

__all__ = ["Softened", "soften"]


@dataclass(frozen=True)
class Softened(Strategy):
    """q(φ | S) = N(φ̂, Λ⁻¹) around the φ̂ of another strategy; made by `Laplace.soften`.

    Keeps p(y | φ, θ) and θ of that strategy; approximates p(φ | S, θ) by its second-order expansion
    at φ̂, which is its mode only where that strategy says so, or with `move`. Exact on
    linear-Gaussian programs with `move`, and with prior="implied" under the prior that early
    stopping implies there.

    Args:
        base: the strategy whose points are softened.
        curvature, damping, sites: as in `Laplace`.
        prior: "task", the program's p(φ | θ); or "implied", the one of the module's docstring: for
            MAML and its kin with plain descent on all sites at a given step size, and for implicit
            MAML. The program's own is then left out.
        move: go on from φ̂ to the mode of the log joint first.
    """

    base: Any
    curvature: Kind = "ggn"
    damping: float | None = None
    prior: Literal["task", "implied"] = "task"
    move: bool = False
    sites: tuple[str, ...] | None = None

    without_phi: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.base, Mapping):  # as a file has it
            object.__setattr__(self, "base", _rebuilt(self.base))
        if not isinstance(self.base, Strategy) or isinstance(self.base, Softened):
            raise DataError(
                self.name,
                needed="a strategy with a point per task as base",
                found=repr(self.base),
                do="Call Laplace.soften(fitted).",
            )
        check_kind(self.curvature, self.name)
        check_damping(self.damping, self.name)
        if self.prior not in ("task", "implied") or not isinstance(self.move, bool):
            raise DataError(
                self.name,
                needed="prior 'task' or 'implied', and move True or False",
                found=f"prior={self.prior!r}, move={self.move!r}",
                do="Choose one.",
            )
        if self.prior == "implied" and (self.curvature != "ggn" or self.move):
            raise DataError(
                self.name,
                needed='curvature="ggn" and no move with prior="implied"',
                found=f"curvature={self.curvature!r}, move={self.move!r}",
                do='The implied prior belongs to φ̂ as it is; or use prior="task".',
            )
        if self.sites is not None:
            object.__setattr__(self, "sites", site_names(self.sites, self.name))

    def settings(self) -> dict[str, Any]:
        """The settings, those of the base with its name."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return own | {"base": {"name": self.base.name, "settings": self.base.settings()}}

    def adaptable(self) -> tuple[str, ...]:
        """All but the base itself, and what the base says of its own."""
        own = [f.name for f in dataclasses.fields(self) if f.name != "base"]
        return (*own, *self.base.adaptable())

    def replaced(self, **overrides: Any) -> Strategy:
        """With other settings, of the base too."""
        own = {f.name for f in dataclasses.fields(self)} - {"base"}
        mine = {name: value for name, value in overrides.items() if name in own}
        base = self.base.replaced(**{k: v for k, v in overrides.items() if k not in own})
        return dataclasses.replace(self, **{"base": base, **mine})

    # -- what the base does -----------------------------------------------------------------------

    def parameters(self, problem: Problem, tasks: Tasks, seed: int) -> nn.Module | None:
        """Those of the base."""
        found: nn.Module | None = self.base.parameters(problem, tasks, seed)
        return found

    def learn(self, problem: Problem, data: Any, options: Options) -> Learned:
        """θ as the base learns it."""
        learned: Learned = self.base.learn(problem, data, options)
        if learned.density is not None:
            tasks = training_tasks(data, options.seed)
            batch = problem.batch(tasks.to(device=problem.device, dtype=problem.dtype))
            learned.density = self.around(
                problem, learned.theta, learned.density, batch, tasks.ids, self.name
            )[0]
        return learned

    def check(self, problem: Problem) -> None:
        """What the base and the curvature ask for."""
        self.base.check_levels(problem)
        self.base.check(problem)
        if self.prior == "implied":
            check_response(problem, self.name)
            _require_implied(self.base, problem, self.name)
        else:
            check_curvature(self.curvature, problem, self.name, self.sites)

    # -- and what is added ------------------------------------------------------------------------

    def posterior(self, problem: Problem, theta: Theta, own: Any, support: Batch) -> Transported:
        """N(φ̂, Λ⁻¹) per task; a constant."""
        with torch.no_grad():
            density = self.base.posterior(problem, theta, own, support)
        ids = tuple(range(support.n_tasks))
        return self.around(problem, theta, density, support, ids, self.name)[0]

    def adapt(self, fitted: Fitted, support: Tasks, seed: int) -> TaskPosterior:
        """The base's point of new tasks, softened.

        To the info of the base come, per task, "damping", "positive" (whether Λ was positive
        definite without damping) and "slope": ‖∇f‖ at φ̂, 0 at a mode of the log joint f.
        """
        found = self.base.adapt(fitted, support, seed)
        batch = fitted.problem.batch(support)
        where = f"{self.name}({self.base.name}).adapt"
        density, info = self.around(
            fitted.problem, fitted.theta, found.density, batch, support.ids, where
        )
        return TaskPosterior(
            fitted.problem, fitted.theta, density, support, info={**found.info, **info},
            units=fitted.units,
        )  # fmt: skip

    def around(
        self,
        problem: Problem,
        theta: Theta,
        density: Density,
        batch: Batch,
        ids: tuple[Any, ...],
        where: str,
    ) -> tuple[Transported, dict[str, Tensor]]:
        """The Gaussian around a point mass, and what goes into info."""
        if not isinstance(density, Delta):
            raise UnsupportedModelError(
                where,
                needed="a strategy with one point per task",
                found=f"{self.base.name}, whose posterior is {type(density).__name__}",
                do="It has a spread already; use it as it is.",
            )
        point = density.loc.detach()
        if self.move:
            modes = find_modes(problem, theta, batch, point)
            warn_of_missed(modes, ids, where, stacklevel=5)
            point = modes.point
        slope = task_gradient(lambda phi: log_joint(problem, theta, phi, batch), point)[1]
        info = {"slope": torch.linalg.vector_norm(slope, dim=-1)}
        if self.prior == "implied":
            return self._implied(problem, theta, point, batch, ids, where), info
        found, damping, _ = approximate(self, problem, theta, point, batch, ids=ids, where=where)
        _say(damping, self.damping, ids, where)
        return found, {**info, "damping": damping.value, "positive": damping.positive}

    def _implied(
        self,
        problem: Problem,
        theta: Theta,
        point: Tensor,
        batch: Batch,
        ids: tuple[Any, ...],
        where: str,
    ) -> Gaussian | LowRankPrecision:
        """N(φ̂, V diag((1 − q) / λ) Vᵀ), with (1 − q)/λ → αN as λ → 0."""
        rows = response_rows(problem, theta, point, batch)
        size = point.shape[-1]
        if size > DENSE and batch.task is None and rows.shape[1] < size:
            sigma, directions = directions_of(rows)
            variance, free = self._variances(sigma.square(), batch, ids, where)
            scale = free.sqrt().unsqueeze(-1).expand_as(point).contiguous()
            return LowRankPrecision(
                point, scale, directions, (variance / free.unsqueeze(-1)).sqrt()
            )
        values, vectors = torch.linalg.eigh(gram(rows, batch))
        variance, _ = self._variances(values.clamp_min(0), batch, ids, where)
        # The lower factor of V diag(v) Vᵀ is that of its square root's QR decomposition.
        root = (vectors * variance.sqrt().unsqueeze(-2)).mT
        upper = torch.linalg.qr(root).R
        signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(upper)
        return Gaussian(point, (signs.unsqueeze(-1) * upper).mT.contiguous())

    def _variances(
        self, curvature: Tensor, batch: Batch, ids: tuple[Any, ...], where: str
    ) -> tuple[Tensor, Tensor]:
        """1/Λ along directions of curvature λ (tasks, directions), and where λ = 0 (tasks,)."""
        base = self.base
        points = batch.counts.clamp_min(1.0)
        if isinstance(base, ImplicitMAML):
            # The damping of a mean loss is n times that on the sum.
            weight = points if base.reduction == "mean" else torch.ones_like(points)
            prior = base.damping * weight
            return 1 / (curvature + prior.unsqueeze(-1)), 1 / prior
        step = base.step_size / points if base.reduction == "mean" else base.step_size + 0 * points
        product = step.unsqueeze(-1) * curvature
        largest = product.amax(-1)
        if not bool((largest < 1).all()):
            worst = int(largest.argmax())
            raise CurvatureError(
                where,
                needed="steps times curvature below 1, for a prior that early stopping implies",
                found=f"{float(largest[worst]):.3g} in task {ids[worst]!r}",
                do='Lower step_size, or use prior="task".',
            )
        # 1 − (1 − αλ)^N without the difference of numbers near 1.
        left = -torch.expm1(base.steps * torch.log1p(-product))
        flat = curvature < 1e-150
        limit = (base.steps * step).unsqueeze(-1).expand_as(curvature)
        safe = torch.where(flat, torch.ones_like(curvature), curvature)
        return torch.where(flat, limit, left / safe), base.steps * step


def soften(
    fitted: Fitted,
    *,
    curvature: Kind = "ggn",
    damping: float | None = None,
    prior: Literal["task", "implied"] = "task",
    move: bool = False,
    sites: tuple[str, ...] | None = None,
) -> Fitted:
    """The fit with a Gaussian in the place of each point; see `Softened`."""
    where = "Laplace.soften"
    if fitted.drawn or isinstance(fitted.strategy, Softened):
        raise UnsupportedModelError(
            where,
            needed="a fit with one point per task, such as MAML's",
            found=f"one of {fitted.strategy.name}",
            do="It has a spread already; use it as it is.",
        )
    strategy = Softened(fitted.strategy, curvature, damping, prior, move, sites)
    strategy.check(fitted.problem)
    density, info = fitted.density, dict(fitted.info)
    if density is not None:
        batch = fitted.problem.batch(fitted.tasks)
        density, more = strategy.around(
            fitted.problem, fitted.theta, density, batch, fitted.tasks.ids, where
        )
        info |= more
    else:
        # Says at once where the strategy gives no point.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            strategy.adapt(fitted, fitted.tasks[:1], fitted.seed)
    return dataclasses.replace(fitted, strategy=strategy, density=density, info=info, _cache={})


def _say(damping: Damping, given: float | None, ids: tuple[Any, ...], where: str) -> None:
    warn_of_damping(damping, given, ids, where, stacklevel=6)


def _require_implied(base: Strategy, problem: Problem, where: str) -> None:
    """Raises where no Gaussian prior gives the points of the base.

    Raises:
        UnsupportedModelError: says which setting stands in the way.
    """
    found = ""
    if isinstance(base, ImplicitMAML):
        found = "sites that do not move" if base.sites is not None else ""
    elif not isinstance(base, GradientStrategy):
        found = base.name
    elif base.moving(problem) != tuple(site.name for site in problem.sites.locals):
        found = "sites that do not move"
    elif base.optimizer != "descent" or base.learned_step is not None or base.batches > 1:
        found = (
            f"optimizer={base.optimizer!r}, learned_step={base.learned_step!r}, "
            f"batches={base.batches}"
        )
    elif base.steps < 1:
        found = "no steps"
    if found:
        raise UnsupportedModelError(
            where,
            needed="plain gradient descent of all sites at a given step size, or implicit MAML, "
            'for prior="implied"',
            found=found,
            do='Use prior="task".',
        )


def _rebuilt(saved: Mapping[str, Any]) -> Strategy:
    """A strategy from its name and settings."""
    known: dict[str, Any] = {kind.__name__: kind for kind in _subclasses(Strategy)}
    name = saved.get("name")
    if name not in known:
        raise UnsupportedModelError(
            "Softened",
            needed=f"a base among {', '.join(sorted(known))}",
            found=repr(name),
            do="Import the module that defines it before loading.",
        )
    found: Strategy = known[name](**saved["settings"])
    return found


def _subclasses(base: type[Any]) -> list[type[Any]]:
    out: list[type[Any]] = []
    for child in base.__subclasses__():
        out += [child, *_subclasses(child)]
    return out
