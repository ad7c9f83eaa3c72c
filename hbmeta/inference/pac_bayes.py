"""PAC-Bayes meta-learning: θ and a Gaussian per task that minimise a bound on new tasks' risk.

Model: φ_i ~ P_θ = p(φ | θ), y_ij ~ p(y | φ_i, θ), and a loss ℓ in [0, 1] (`hbmeta.bounded_loss`).
Estimator: with 𝒫 = N(θ_0, κ_P² I) around where θ starts, 𝒬 = N(θ̂, κ_Q² I), Q_i = N(μ_i, diag σ_i²),

    θ̂ = argmin F(R̂_1, …, R̂_T, K_1, …, K_T, K_H),
    R̂_i = E_{θ~𝒬} E_{φ~Q_i} ℓ on the m_i rows of task i,   K_i = E_{θ~𝒬} KL(Q_i ‖ P_θ),
    K_H = KL(𝒬 ‖ 𝒫) = ½ [D κ_Q²/κ_P² + ‖θ̂ − θ_0‖²/κ_P² − D + 2D log(κ_P/κ_Q)],

F the right-hand side of a theorem of `hbmeta.bounds` with all its constants. For "joint_kl" and
"amit_meir" the (μ_i, σ_i) are free numbers, minimised over together with θ̂. For "query_split" Q_i
is the map below of the support and the drawn θ, differentiated through, and X_i, the loss of Q_i on
the query, stands in the place of R̂_i; there is no K_i.

A task that training did not see, and every task that is certified on, gets the Q of the bound of
one task with the learned prior, from its own rows and θ alone: in units of the prior's spread,
μ = m + s u and σ = s e^ρ, from u = ρ = 0 by steps along

    ∇[KL(Q ‖ P_θ) + λ m R̂(Q)],   λ = (a + c)/(a + c + R̂),
    c = (KL + log(2√m/δ))/m,     a = √(c (c + 2R̂)),

whose fixed points are those of the bound (√(R̂ + c/2) + √(c/2))² (`bounds.quadratic`).

References: Amit, Meir (2018), ICML; Pérez-Ortiz et al. (2021), JMLR 22; Thiemann et al. (2017),
ALT, for λ. docs/certificates.md has the theorems.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hbmeta.bounded_loss import BoundedLoss
from hbmeta.bounds.objectives import OBJECTIVES, risk_weight
from hbmeta.densities import Gaussian
from hbmeta.errors import DataError
from hbmeta.inference.bound_problem import Terms
from hbmeta.inference.bound_training import learn_by_bound
from hbmeta.inference.prior_expansion import PriorExpansion, check_expansion, expanded_prior
from hbmeta.inference.strategy import Strategy
from hbmeta.normals import bounded
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.training import Learned, Options
from hbmeta.variational.noise import matched_noise
from hbmeta.variational.training import TINY, Adam

# Up to so many parameters per task the draws of a search stay the same in all of its steps.
_FIXED_UP_TO, _FIXED_DRAWS = 32, 16

__all__ = ["PACBayes"]


@dataclass(frozen=True)
class PACBayes(Strategy):
    """Q(φ | S) = N(μ, diag σ²) that minimises a PAC-Bayes bound; θ learned by a bound over tasks.

    Keeps p(φ | θ) (as its Gaussian expansion, exact for a Gaussian prior) and replaces the rest:
    −log p(y | φ) by a loss in [0, 1], p(θ) by the hyperprior 𝒫 = N(θ_0, κ_P² I), and the posterior
    by the minimiser of a bound. With few data it stays at the prior; it does not converge to
    p(φ | S, θ) as they grow. In coordinates of training: parameters of networks as they are, global
    sites unconstrained.

    What it certifies. The value that training minimises (`history`) is no certificate: risks are
    estimates from few draws, and the loss is the smooth one of training. `hbmeta.certify` measures
    anew, with the losses that it has:

        certify_task        one task, after its data, with the learned prior: all rows, Q from them;
        meta_test           tasks that the fit did not see;
        query_split         also tasks of the fit, for θ ~ N(θ̂, κ_Q² I), whatever the objective;
        joint_kl and kin    over a finite set of fits that were made on other tasks.

    Not covered: the Q_i of training with "joint_kl" and "amit_meir" together with their θ̂. They
    were optimised jointly, while the step from these tasks to new ones needs each to be one fixed
    map of its own data and the drawn prior; and for the map that `adapt` is,
    E_θ KL(Q_i(S_i, θ) ‖ P_θ) has no closed form under a Gaussian 𝒬. `certify` refuses that.

    A minibatch of tasks gives an unbiased gradient of the bound's tangent at the values that all
    tasks had when they were last seen (`hbmeta.bounds.objectives`).

    Args:
        objective: "joint_kl", "amit_meir" or "query_split", by their names in `hbmeta.bounds`. The
            last needs an Episode, whose cut into support and query is part of the theorem.
        scale: for a regression, the error (in the units of y that the model sees) from which all
            are about alike, 1 − exp(−(error/scale)²); fixed before the data.
        p_min: for classes, the share of every class that a prediction is mixed with before its
            cross-entropy, which then is at most log(1/p_min) and is divided by that.
        delta: δ of the bound that is minimised.
        hyperprior_scale: κ_P.
        hyperposterior_scale: κ_Q; θ is drawn with it at every step.
        draws: of φ per step, in pairs with those of θ of opposite sign; an even number.
        steps: of the search for a task's Q: plain descent, differentiated through, for
            "query_split" (None for 5); Adam otherwise (None for 300).
        step_size: of these steps, in nats per squared standard deviation of the prior for descent
            (None for 0.3), in standard deviations for Adam (None for 0.05), which also moves the
            (μ_i, σ_i) of training.
    Raises:
        UnsupportedModelError: points that depend on each other given φ; a regression without
            `scale`; a prior without a Gaussian expansion.
        DataError: a setting that cannot be used; a source of tasks; fewer than two rows in a task
            for "amit_meir"; no split for "query_split".
    References:
        Amit, Meir (2018), ICML; Pérez-Ortiz et al. (2021), JMLR 22.
    """

    objective: Literal["joint_kl", "amit_meir", "query_split"] = "joint_kl"
    scale: float | None = None
    p_min: float = 1e-4
    delta: float = 0.05
    hyperprior_scale: float = 1.0
    hyperposterior_scale: float = 0.03
    draws: int = 4
    steps: int | None = None
    step_size: float | None = None

    learns_spread: ClassVar[bool] = True

    def __post_init__(self) -> None:
        inside = {"p_min": 1.0, "delta": 1.0}
        for name in ("scale", "p_min", "delta", "hyperprior_scale", "hyperposterior_scale"):
            value, top = getattr(self, name), inside.get(name, math.inf)
            if name == "scale" and value is None:
                continue
            if not _number(value) or not 0.0 < value < top:
                raise self._bad(name, f"a number above 0 and below {top:g}")
        if self.step_size is not None and not (
            _number(self.step_size) and 0.0 < self.step_size < math.inf
        ):
            raise self._bad("step_size", "a positive number or None")
        if type(self.draws) is not int or self.draws < 2 or self.draws % 2:
            raise self._bad("draws", "an even whole number of 2 or more")
        if self.steps is not None and (type(self.steps) is not int or self.steps < 0):
            raise self._bad("steps", "a whole number of 0 or more, or None")
        if self.objective not in OBJECTIVES:
            raise self._bad("objective", f"one of {', '.join(OBJECTIVES)}")

    def _bad(self, name: str, needed: str) -> DataError:
        return DataError(
            self.name,
            needed=f"{name} as {needed}",
            found=f"{name}={getattr(self, name)!r}",
            do="Leave it out for the default.",
        )

    @property
    def splits(self) -> bool:
        """Whether risks are those of queries that Q did not see."""
        return self.objective == "query_split"

    @property
    def rate(self) -> float:
        """The step size in use."""
        default = 0.3 if self.splits else 0.05
        return default if self.step_size is None else self.step_size

    @property
    def searched(self) -> int:
        """The steps in use."""
        return (5 if self.splits else 300) if self.steps is None else self.steps

    def bounded_loss(self, problem: Problem) -> BoundedLoss:
        """ℓ for the response of this program."""
        return BoundedLoss.of(problem, self.p_min, self.scale, self.name)

    def adaptable(self) -> tuple[str, ...]:
        """What says how Q of a task is searched for."""
        return ("delta", "draws", "steps", "step_size")

    def check(self, problem: Problem) -> None:
        """A loss in [0, 1] and a prior with a Gaussian expansion."""
        self.bounded_loss(problem)
        check_expansion(problem, self.name, do="Use MAML and its meta-test certificate.")

    def learn(self, problem: Problem, data: Any, options: Options) -> Learned:
        """θ̂ and, but for "query_split", every (μ_i, σ_i); see `hbmeta.inference.bound_training`."""
        return learn_by_bound(self, problem, data, options)

    # -- Q of one task ----------------------------------------------------------------------------

    def posterior(self, problem: Problem, theta: Theta, own: Any, support: Batch) -> Gaussian:
        """Q(φ | S) at θ: a fixed map, whose draws do not depend on the batch; a constant."""
        loss = self.bounded_loss(problem)
        with torch.no_grad():
            found = expanded_prior(problem, theta, support)
        correlation = None if found.correlation is None else found.correlation.detach()
        prior = PriorExpansion(found.loc.detach(), found.scale.detach(), correlation)

        def slope(
            theta: Theta, prior: PriorExpansion, support: Batch, noise: Tensor, rows: Tensor
        ) -> Tensor:
            return self._slope(problem, loss, theta, prior, support, noise, rows, history=False)

        staged = problem.staged(("pac_bayes", self), slope, problem.tier, self.searched)
        rows = torch.zeros(*prior.loc.shape[:-1], 2 * prior.loc.shape[-1]).to(prior.loc)
        adam = Adam(rows, self.rate, TINY, rows=False)
        theta = {name: value.detach() for name, value in theta.items()}
        for number, noise in enumerate(self.search_noise(rows)):
            gradient = staged(theta, prior, support, noise, rows)
            if self.splits:
                rows -= self.rate * gradient
            else:
                share = 0.5 * (1 + math.cos(math.pi * number / self.searched))
                adam.step(gradient, share, None)
        u, raw = rows.chunk(2, -1)
        return Gaussian(prior.loc + prior.scale * u, prior.scale * bounded(raw).exp())

    def search_noise(self, like: Tensor) -> list[Tensor]:
        """(draws, 1, size) for each step of the search: the same for all tasks, θ and batches.

        Few parameters: fixed, with the first two moments exact, so that the search has an end. Many
        could hide from fixed draws, and see new ones at every step.
        """
        size = like.shape[-1] // 2
        if size <= _FIXED_UP_TO:
            draws = max(self.draws, _FIXED_DRAWS, 2 * size)
            return [matched_noise(draws, size, 0).to(like).unsqueeze(1)] * self.searched
        found = []
        for number in range(self.searched):
            generator = torch.Generator().manual_seed(number)
            half = torch.randn(
                (self.draws // 2, 1, size), generator=generator, dtype=torch.float64
            ).to(like)
            found.append(torch.cat([half, -half]))
        return found

    def _slope(
        self,
        problem: Problem,
        loss: BoundedLoss,
        theta: Theta,
        prior: PriorExpansion,
        support: Batch,
        noise: Tensor,
        rows: Tensor,
        *,
        history: bool,
    ) -> Tensor:
        """(tasks, 2 size) ∇[KL + λ m R̂] at rows = (u, raw), ρ = bounded(raw), λ held."""
        with torch.enable_grad():
            if not history:
                rows = rows.detach().requires_grad_()
            elif not rows.requires_grad:
                rows = rows.requires_grad_()
            u, raw = rows.chunk(2, -1)
            rho = bounded(raw)
            phi = prior.loc + prior.scale * (u + rho.exp() * noise)
            risk = _mean_risk(loss, problem, theta, phi, support)
            kl = prior.kl(u, rho)
            (of_risk,) = torch.autograd.grad(
                risk.sum(), rows, create_graph=history, retain_graph=True
            )
            (of_kl,) = torch.autograd.grad(kl.sum(), rows, create_graph=history)
            weight = support.counts * risk_weight(
                risk, kl, support.counts.clamp_min(1.0), self.delta
            )
            found = of_kl + weight.unsqueeze(-1) * of_risk
        return found if history else found.detach()

    # -- what a step of training sees -------------------------------------------------------------

    def noise(self, problem: Problem, n_tasks: int) -> dict[str, tuple[int, ...]]:
        """Standard normal draws of φ; those of θ come beside them."""
        return {"phi": (self.draws // 2, n_tasks, problem.sites.phi_size)}

    def free_terms(
        self,
        problem: Problem,
        loss: BoundedLoss,
        theta: Theta,
        frame: tuple[Tensor, Tensor],
        rows: Tensor,
        batch: Batch,
        noise: Tensor,
    ) -> Terms:
        """R̂_i and KL(Q_i ‖ P_θ) of Q_i = N(m_0 + s_0 u_i, (s_0 e^ρ_i)²) at one θ.

        Args:
            problem: the program.
            loss: ℓ.
            theta: a draw of 𝒬.
            frame: m_0 and s_0 (tasks, size), no functions of θ.
            rows: (tasks, 2 size) u and raw.
            batch: the rows of the tasks.
            noise: (draws, tasks, size).
        """
        loc, scale = frame
        u, raw = rows.chunk(2, -1)
        mean, log_sd = loc + scale * u, scale.log() + bounded(raw)
        prior = expanded_prior(problem, theta, batch)
        kl = prior.kl((mean - prior.loc) / prior.scale, log_sd - prior.scale.log())
        phi = mean + log_sd.exp() * noise
        return Terms(_mean_risk(loss, problem, theta, phi, batch), kl)

    def split_terms(
        self,
        problem: Problem,
        loss: BoundedLoss,
        theta: Theta,
        support: Batch,
        query: Batch,
        noise: Mapping[str, Tensor],
    ) -> Terms:
        """X_i at one θ, differentiable through the search; there is no K_i."""
        prior = expanded_prior(problem, theta, support)
        rows = torch.zeros_like(torch.cat([prior.loc, prior.loc], -1))
        for step in noise["search"]:
            slope = self._slope(problem, loss, theta, prior, support, step, rows, history=True)
            rows = rows - self.rate * slope
        u, raw = rows.chunk(2, -1)
        phi = prior.loc + prior.scale * (u + bounded(raw).exp() * noise["phi"])
        query = problem.given(query, support)
        risks = _mean_risk(loss, problem, theta, phi, query)
        return Terms(risks, torch.zeros_like(risks))


def _mean_risk(
    loss: BoundedLoss, problem: Problem, theta: Theta, phi: Tensor, batch: Batch
) -> Tensor:
    """(tasks,) the mean over draws φ (draws, tasks, size)."""
    found: Tensor = torch.vmap(lambda point: loss.per_task(problem, theta, point, batch))(phi)
    return found.mean(0)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
