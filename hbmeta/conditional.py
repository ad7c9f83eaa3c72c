"""Draws from p(φ_i | S_i, θ) for a given θ, or for many draws of θ, with the evidence p(S_i | θ).

Importance sampling from the second-order expansion at the mode: φ_k ~ q = N(φ̂, (−H)⁻¹), or a
Student-t of the same place and shape where the weights of the Gaussian vary, and

    w_k = p(S_i, φ_k | θ) / q(φ_k),     p(S_i | θ) ≈ mean_k w_k (unbiased),

exact where the log joint is quadratic in φ, because then every w_k equals the evidence. Only the
mode that is found is covered: of two far apart the other is missed. For draws
θ_s of a posterior given other tasks, the pair (θ_s, φ_s) with weight p(S_new | θ_s) is a draw of
the joint posterior that saw S_new too; one φ_s per θ_s is taken from its w_k.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hbmeta.curvature import expand, gradient_and_hessian, log_joint, maximise
from hbmeta.densities import Empirical, Gaussian
from hbmeta.errors import UnsupportedModelError
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta

_DENSE_LIMIT = 64
_DEGREES_OF_FREEDOM = 7.0
# A relative spread of the weights below this is rounding: the log joint is quadratic.
_CONSTANT = 1e-6

# Below this share of useful proposals the draws of a task are warned of.
_POOR = 0.1
# A mode must be found at this share of the draws of θ.
_MOST = 0.9
# The smallest curvature, as a share of the largest, of a proposal without a mode.
_LEAST = 1e-3

__all__ = ["conditional", "conditional_over_draws", "warn_of_proposals"]


def _check_size(problem: Problem, where: str) -> None:
    if problem.sites.phi_size > _DENSE_LIMIT:
        raise UnsupportedModelError(
            where,
            needed=f"at most {_DENSE_LIMIT} parameters per task (the curvature is dense)",
            found=f"{problem.sites.phi_size}",
            do="Fit these tasks together with the others, or adapt with an amortized strategy.",
        )


def conditional(
    problem: Problem, theta: Theta, support: Batch, *, draws: int = 1000, seed: int = 0
) -> tuple[Gaussian | Empirical, dict[str, Tensor]]:
    """p(φ | S, θ) at one θ: the exact Gaussian where there is one, weighted draws otherwise.

    Returns:
        the density, and info, each (tasks,): log_evidence, effective_draws, proposal_efficiency
        (their share of the draws), converged (a mode was found) and positive (the curvature there
        was that of a maximum). `warn_of_proposals` puts what is bad into words.
    """
    _check_size(problem, "the posterior given θ")
    theta = {name: value.detach() for name, value in theta.items()}

    def function(phi: Tensor) -> Tensor:
        return log_joint(problem, theta, phi, support)

    with torch.no_grad():
        start = problem.location(theta, support)
    loc, tril, converged, positive = _proposal(function, start, seed)
    phi, log_w, exact = _weighted(
        problem, theta, set(), loc.unsqueeze(0), tril.unsqueeze(0), support, draws, seed
    )
    log_w, info = log_w[0], {"converged": converged, "positive": positive}
    info["log_evidence"] = torch.logsumexp(log_w, 0) - math.log(draws)
    if bool(exact.all()):
        info["effective_draws"] = torch.full_like(log_w[0], float(draws))
        info["proposal_efficiency"] = torch.ones_like(log_w[0])
        return Gaussian(loc, tril), info
    density = Empirical(phi[0], log_w)
    info["effective_draws"] = density.effective_draws
    info["proposal_efficiency"] = density.effective_draws / draws
    return density, info


def conditional_over_draws(
    problem: Problem, theta: Theta, support: Batch, *, proposals: int = 16, seed: int = 0
) -> tuple[Empirical, dict[str, Tensor]]:
    """One φ for each draw of θ, weighted by the evidence of the new support under that θ.

    Args:
        problem: the program on its data.
        theta: global sites with a first axis of draws.
        support: rows of the new tasks.
        proposals: importance draws per θ and task.
        seed: of the proposals and of the choice among them.
    Returns:
        the weighted draws, and info: log_evidence (draws, tasks), effective_draws (tasks,),
        proposal_efficiency (tasks,), the mean share of useful proposals per θ, and for each task
        whether converged and positive (see `conditional`) hold at nine in ten draws of θ.
    """
    _check_size(problem, "adapting to new tasks from draws of θ")
    names = {site.name for site in problem.sites.globals}
    n_draws = next(iter(theta[name] for name in names)).shape[0]
    axes = {name: 0 if name in names else None for name in theta}
    theta = {name: value.detach() for name, value in theta.items()}

    def function(phi: Tensor) -> Tensor:
        return torch.vmap(lambda t, p: log_joint(problem, t, p, support), in_dims=(axes, 0))(
            theta, phi
        )

    with torch.no_grad():
        start = torch.vmap(lambda t: problem.location(t, support), in_dims=(axes,))(theta)
    start = start.expand(n_draws, support.n_tasks, problem.sites.phi_size)
    loc, tril, converged, positive = _proposal(function, start, seed)
    phi, log_w, _ = _weighted(problem, theta, names, loc, tril, support, proposals, seed)
    shares = torch.softmax(log_w, 1)
    picked = _pick(shares, seed)
    index = picked[:, None, :, None].expand(n_draws, 1, support.n_tasks, phi.shape[-1])
    evidence = torch.logsumexp(log_w, 1) - math.log(proposals)
    density = Empirical(phi.gather(1, index).squeeze(1), evidence)
    info = {
        "log_evidence": evidence,
        "effective_draws": density.effective_draws,
        "proposal_efficiency": (1.0 / shares.square().sum(1) / proposals).mean(0),
        "converged": converged.double().mean(0) >= _MOST,
        "positive": positive.double().mean(0) >= _MOST,
    }
    return density, info


def warn_of_proposals(
    info: dict[str, Tensor], ids: tuple[Any, ...], where: str, stacklevel: int = 4
) -> None:
    """Warns, naming the worst task, where the draws of φ cannot be trusted.

    Args:
        info: of `conditional` or `conditional_over_draws`.
        ids: of the tasks.
        where: who asked.
        stacklevel: of the warning.
    """
    efficiency = info["proposal_efficiency"]
    lost = ~(info["converged"] & info["positive"])
    poor = lost | ~(efficiency >= _POOR)
    if not bool(poor.any()):
        return
    # Lost ones first, then by efficiency.
    worst = int((efficiency.nan_to_num(0.0) - 2.0 * lost.to(efficiency)).argmin())
    why = "no mode of p(φ | S, θ) was found" if bool(lost[worst]) else "φ is far from Gaussian"
    warnings.warn(
        f"{where}: the draws of task {ids[worst]!r} are poor ({why}; proposal efficiency "
        f"{float(efficiency[worst]):.2f}; {int(poor.sum())} of {len(ids)} tasks). Fit these tasks "
        "together with the others, or reparametrise φ.",
        stacklevel=stacklevel,
    )


def _proposal(
    function: Callable[[Tensor], Tensor], start: Tensor, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Place, factor of the covariance, whether a mode was found, and whether it is a maximum.

    Where −H is not positive definite its eigenvalues are taken by their size: any proposal is
    valid, and this one is as wide as f is flat.
    """
    mode, converged = maximise(function, start, seed=seed)
    found = expand(function, mode)
    loc, tril = found.loc.detach(), found.tril.detach()
    if not bool(found.positive.all()):
        curvature = -gradient_and_hessian(function, mode)[2]
        # Far out a θ may leave no finite density; its weight will be NaN, whatever the proposal.
        lost = ~curvature.isfinite().flatten(-2).all(-1)[..., None, None]
        identity = torch.eye(mode.shape[-1], dtype=mode.dtype, device=mode.device)
        values, vectors = torch.linalg.eigh(torch.where(lost, identity, curvature))
        size = values.abs()
        size = torch.maximum(size, _LEAST * size.amax(-1, keepdim=True)).clamp_min(_LEAST)
        wide = torch.linalg.cholesky((vectors / size.unsqueeze(-2)) @ vectors.mT)
        tril = torch.where(found.positive[..., None, None], tril, wide)
    return loc, tril, converged, found.positive


def _weighted(
    problem: Problem,
    theta: Theta,
    drawn: set[str],
    loc: Tensor,
    tril: Tensor,
    support: Batch,
    proposals: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Proposals (thetas, proposals, tasks, phi_size), their log weights, and which tasks are exact.

    A task whose Gaussian weights are all equal (a quadratic log joint, a task without data) keeps
    them; the others get the heavy tails.
    """
    n_thetas, n_tasks = loc.shape[0], loc.shape[1]
    repeated = {
        name: value.repeat_interleave(proposals, 0) if name in drawn else value
        for name, value in theta.items()
    }

    def weigh(heavy: bool) -> tuple[Tensor, Tensor]:
        phi, log_q = _propose(loc, tril, proposals, seed, heavy=heavy)
        flat = phi.reshape(n_thetas * proposals, n_tasks, -1)
        log_joint = _weigh(problem, repeated, drawn, flat, support)
        return phi, log_joint.reshape(n_thetas, proposals, n_tasks) - log_q

    phi, log_w = weigh(False)
    exact = (log_w.amax(1) - log_w.amin(1)).amax(0) < _CONSTANT
    if bool(exact.all()):
        return phi, log_w, exact
    heavy_phi, heavy_w = weigh(True)
    return torch.where(exact[:, None], phi, heavy_phi), torch.where(exact, log_w, heavy_w), exact


def _propose(
    loc: Tensor, tril: Tensor, draws: int, seed: int, *, heavy: bool
) -> tuple[Tensor, Tensor]:
    """Draws (thetas, draws, tasks, phi_size) and their log density, Gaussian or Student-t."""
    generator = torch.Generator().manual_seed(seed)
    size = loc.shape[-1]
    shape = (loc.shape[0], draws, *loc.shape[1:])
    noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(loc)
    log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1).unsqueeze(1)
    squared = noise.square().sum(-1)
    if heavy:
        # t = z √(ν / χ²_ν)
        df = _DEGREES_OF_FREEDOM
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            chi = torch.distributions.Chi2(torch.tensor(df)).sample(shape[:-1]).to(loc)
        noise = noise * (df / chi).sqrt().unsqueeze(-1)
        squared = noise.square().sum(-1)
        constant = (
            math.lgamma((df + size) / 2) - math.lgamma(df / 2) - 0.5 * size * math.log(df * math.pi)
        )
        log_q = constant - 0.5 * (df + size) * torch.log1p(squared / df) - log_det
    else:
        log_q = -0.5 * squared - 0.5 * size * math.log(2 * math.pi) - log_det
    phi = loc.unsqueeze(1) + (tril.unsqueeze(1) @ noise.unsqueeze(-1)).squeeze(-1)
    return phi, log_q


def _weigh(problem: Problem, theta: Theta, names: set[str], phi: Tensor, support: Batch) -> Tensor:
    """(draws, tasks) log joint at each draw; `names` are the sites that have draws, all or none."""
    found: Tensor = problem.over(
        lambda t, p: log_joint(problem, t, p, support), theta, bool(names), phi, support
    )
    return found


def _pick(shares: Tensor, seed: int) -> Tensor:
    """(thetas, tasks) index of one proposal, drawn by its share (inverse of the cumulative sum)."""
    generator = torch.Generator().manual_seed(seed + 2)
    u = torch.rand((shares.shape[0], 1, shares.shape[2]), generator=generator, dtype=torch.float64)
    below = (shares.cumsum(1) < u.to(shares)).sum(1)
    return below.clamp_max(shares.shape[1] - 1)
