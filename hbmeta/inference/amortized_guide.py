"""An amortized Gaussian guide: one network maps any support to its posterior.

Model: φ_i ~ p(φ | θ), y_ij ~ p(y | φ_i, θ).
Estimator: with N(m₀, P Pᵀ) the Gaussian expansion of the task prior, q(φ | S) = N(m, L Lᵀ) in the
whitened space u = P⁻¹(φ − m₀) collects one Gaussian factor per row, as Bayes' rule does,

    Λ = I + Σ_j r_j r_jᵀ,   η = Σ_j e_j,   (e_j, r_j) = network(x_j, y_j, c),
    c = mean_j h(x_j, y_j), log(1 + n),
    m = m₀ + P (Λ⁻¹ η + a(c)),   L = P chol(Λ⁻¹) diag(exp b(c)),

so that no rows give the prior and n rows contract like n rows (`hbmeta.encoders`). Networks and θ
maximise the evidence lower bound E_q[log p(y | φ) + log p(φ | θ) − log q(φ | S)].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import Categorical

from hbmeta.curvature import gradient_and_hessian
from hbmeta.densities import Gaussian
from hbmeta.encoders import RowFeatures, SetEncoder
from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.feeding import Needs
from hbmeta.fitted import Fitted
from hbmeta.inference.strategy import Strategy
from hbmeta.posterior import TaskPosterior
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta
from hbmeta.tasks import Tasks
from hbmeta.triangular import covariance_factor

_FULL_AT_MOST = 64
# Rows whose activations stay in a core's cache; of a million at once every layer is written to
# memory and read back (100,000 tasks: 13 s in the place of 4).
_ROWS_AT_ONCE = 4_000

__all__ = ["AmortizedGuide", "require_proper_prior"]


@dataclass(frozen=True)
class AmortizedGuide(Strategy):
    """q(φ | S) = N(m(S), Σ(S)) from a set encoder, generated from the program's local sites.

    Keeps p(y | φ, θ) and p(φ | θ); approximates p(φ | S, θ) by a Gaussian in unconstrained space
    that one network gives for every support. Optimises the negative evidence lower bound: on all
    rows of each task in θ and the network, and on a random subset of them in the network alone, so
    that the guide serves any number of rows while θ is not biased towards fewer. θ is held at a
    point. The gradient of log q leaves the guide's parameters out of its second appearance (Roeder
    et al. 2017), which has no noise where q is exact. Exact on linear-Gaussian programs, up to
    training; a task without data gets the prior (its Gaussian expansion, where the prior is no
    Gaussian).

    Args:
        hidden: width of the encoder.
        covariance: "full", "diagonal", or "auto": full up to 16 parameters per task.
        draws: draws of φ per task and step, in pairs of opposite sign (rounded up).
        layers: hidden layers of the network that reads a row.
        frequencies: sines and cosines of every column of x that the encoder sees, for functions
            that bend often; of periods 4, 2, 4/3, … half-ranges of the column.
    Raises:
        UnsupportedModelError: a local site with a flat prior.
        DataError: a setting that cannot be used.
    References:
        Kingma, Welling (2014), ICLR; Zaheer et al. (2017), NeurIPS, for the encoder.
    """

    needs: ClassVar[Needs] = "subset"
    joint_loss: ClassVar[bool] = True
    located: ClassVar[bool] = False
    """Whether rows have a t_j; see `hbmeta.encoders`."""
    full_up_to: ClassVar[int] = 16
    """Largest φ for which covariance="auto" means a full one."""

    hidden: int = 64
    covariance: Literal["auto", "full", "diagonal"] = "auto"
    draws: int = 4
    layers: int = 1
    frequencies: int = 0

    def __post_init__(self) -> None:
        least = {"hidden": 1, "draws": 1, "layers": 1, "frequencies": 0}
        bad = [n for n, at_least in least.items() if not _whole(getattr(self, n), at_least)]
        if self.covariance not in ("auto", "full", "diagonal"):
            bad.append("covariance")
        if bad:
            raise DataError(
                self.name,
                needed="covariance 'auto', 'full' or 'diagonal'; hidden, draws and layers as whole "
                "numbers of 1 or more, frequencies of 0 or more",
                found=f"{bad[0]}={getattr(self, bad[0])!r}",
                do="The defaults serve most programs.",
            )

    def check(self, problem: Problem) -> None:
        """A task prior that is a density: the bound has no value under a flat one."""
        require_proper_prior(problem, self.name)

    def _full(self, problem: Problem) -> bool:
        size = problem.sites.phi_size
        if self.covariance == "full" and size > _FULL_AT_MOST:
            raise UnsupportedModelError(
                self.name,
                needed=f"at most {_FULL_AT_MOST} parameters per task for covariance='full'",
                found=str(size),
                do="Use covariance='diagonal'.",
            )
        return self.covariance == "full" or (self.covariance == "auto" and size <= self.full_up_to)

    def parameters(self, problem: Problem, tasks: Tasks, seed: int) -> SetEncoder:
        """The encoder, initialised with `seed`, standardising rows by those of `tasks`."""
        assert tasks.flat_y is not None
        if self._full(problem):
            # Asked here once: the answer must not be computed inside a traced graph.
            _ = problem.diagonal_prior
        features = RowFeatures(tasks, _classes(problem), self.frequencies)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = SetEncoder(
                features,
                self.hidden,
                self.layers,
                problem.sites.phi_size,
                located=self.located,
            )
        return encoder.to(dtype=tasks.dtype, device=tasks.device)

    def noise(self, problem: Problem, n_tasks: int) -> dict[str, tuple[int, ...]]:
        """Standard normal draws for the bound on all rows and for that on a subset."""
        shape = ((self.draws + 1) // 2, n_tasks, problem.sites.phi_size)
        return {"all": shape, "subset": shape}

    def posterior(self, problem: Problem, theta: Theta, own: Any, support: Batch) -> Gaussian:
        """The guide at this support."""
        start = problem.location(theta, support)

        def log_prior(phi: Tensor) -> Tensor:
            return problem.log_task_prior(theta, phi, support)

        eta, factors, shift, log_scale = own(support)
        log_scale = log_scale.clamp(-12.0, 12.0)
        if not self._full(problem):
            sd = _diagonal_scale(log_prior, start)
            precision = torch.ones_like(sd)
            if factors is not None:
                precision = precision + factors.diagonal(dim1=-2, dim2=-1).to(sd.dtype)
            loc = start + sd * (eta / precision + shift)
            return Gaussian(loc, sd * log_scale.exp() * precision.rsqrt())
        identity = torch.eye(start.shape[-1], dtype=factors.dtype, device=start.device)
        root = covariance_factor(identity + factors).to(start.dtype)
        centre = (root @ (root.mT @ eta.unsqueeze(-1))).squeeze(-1) + shift
        root = root * log_scale.exp().unsqueeze(-2)
        if problem.diagonal_prior:
            sd = _diagonal_scale(log_prior, start)
            return Gaussian(start + sd * centre, sd.unsqueeze(-1) * root)
        _, _, hessian = gradient_and_hessian(log_prior, start, create_graph=True)
        tril = covariance_factor(-hessian)
        loc = start + (tril @ centre.unsqueeze(-1)).squeeze(-1)
        return Gaussian(loc, tril @ root)

    def adapt(self, fitted: Fitted, support: Tasks, seed: int) -> TaskPosterior:
        """The guide at new tasks, a part of them at a time."""
        problem = fitted.problem
        each = max(1, _ROWS_AT_ONCE * support.n_tasks // max(support.n_points, 1))
        parts = [support[k : k + each] for k in range(0, support.n_tasks, each)]
        with torch.no_grad():
            found = [
                self.posterior(problem, fitted.theta, fitted.own, problem.batch(part))
                for part in (parts if len(parts) > 1 else [support])
            ]
        loc, scale = (torch.cat([getattr(q, name) for q in found]) for name in ("loc", "scale"))
        density = Gaussian(loc.detach(), scale.detach())
        self._check_finite(density, support)
        return TaskPosterior(problem, fitted.theta, density, support, units=fitted.units)

    def loss(
        self,
        problem: Problem,
        theta: Theta,
        own: Any,
        support: Batch,
        query: Batch,
        noise: Mapping[str, Tensor],
    ) -> Tensor:
        """(tasks,) minus the bounds on all rows (query) and, θ held, on the subset (support)."""
        held = {name: value.detach() for name, value in theta.items()}
        whole = self._bound(problem, theta, own, query, noise["all"])
        # The support is part of the query's cells: with the same x and y, the encoding is shared.
        inside = dataclasses.replace(query, weight=support.weight)
        part = self._bound(problem, held, own, inside, noise["subset"])
        return -(whole + part)

    def _bound(
        self, problem: Problem, theta: Theta, own: Any, rows: Batch, noise: Tensor
    ) -> Tensor:
        density = self.posterior(problem, theta, own, rows)
        # ε and −ε: what is odd in ε, most of the noise of a gradient, cancels.
        phi = density.draw(torch.cat([noise, -noise]))

        def log_joint(one: Tensor) -> Tensor:
            likelihood, local, _ = problem.terms(theta, one, rows)
            return likelihood + local

        values = torch.vmap(log_joint)(phi)
        return (values - density.detach().log_prob(phi)).mean(0)


def _diagonal_scale(log_prior: Any, start: Tensor) -> Tensor:
    """1/√(−∂²/∂φ²) of the task prior; exact sds where its sites are independent."""
    phi = start if start.requires_grad else start.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(log_prior(phi).sum(), phi, create_graph=True)
        if not gradient.requires_grad:
            return torch.ones_like(start)
        (row,) = torch.autograd.grad(gradient.sum(), phi, create_graph=True, allow_unused=True)
    if row is None:
        return torch.ones_like(start)
    return torch.where(row < -1e-12, (-row).clamp_min(1e-12), torch.ones_like(row)).rsqrt()


def require_proper_prior(problem: Problem, where: str) -> None:
    """Raises where some entry of φ has a flat prior, under which a bound has no value.

    Raises:
        UnsupportedModelError: names the site.
    """
    flat = _flat_site(problem)
    if flat is not None:
        raise UnsupportedModelError(
            where,
            needed="a proper task prior of every local site",
            found=f"a flat one of {flat!r}",
            do="Give it one: prior_scale of models.ClassConditional, a Normal in a program of "
            "your own.",
        )


def _flat_site(problem: Problem) -> str | None:
    """A local site whose log prior is linear in some entry of φ, in unconstrained space.

    No density is: it has to fall on both sides. Its gradient is the same everywhere, whereas that
    of a density with a kink (Laplace) changes its sign between two sides of the location.
    """
    batch = problem.one_row()
    theta = {name: value.detach() for name, value in problem.theta(batch).items()}
    with torch.no_grad():
        start = problem.location(theta, batch)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((2, *start.shape), generator=generator, dtype=torch.float64).to(start)

    def gradient(phi: Tensor) -> Tensor:
        phi = phi.requires_grad_()
        with torch.enable_grad():
            # A flat prior is no function of φ, which autograd refuses.
            value = problem.log_task_prior(theta, phi, batch).sum() + 0.0 * phi.sum()
            return torch.autograd.grad(value, phi)[0]

    same = [gradient(start + step) == gradient(start - step) for step in noise]
    flat = torch.stack(same).all(0).to(start)
    return next((n for n, v in problem.sites.from_vector(flat).items() if bool(v.any())), None)


def _classes(problem: Problem) -> int:
    """Number of classes where y is a label (Categorical), else 0."""
    batch = problem.one_row()
    theta = problem.theta(batch)
    with torch.no_grad():
        family = problem.response(theta, problem.location(theta, batch), batch)
    while isinstance(family, (MaskedDistribution, ExpandedDistribution)):
        family = family.base_dist
    return int(family.logits.shape[-1]) if isinstance(family, Categorical) else 0


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
