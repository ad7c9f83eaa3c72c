"""The inputs of bounds over tasks for a random θ: 𝒬 chosen on draws of its own, then measured.

Every bound holds for all 𝒬 at once, so that κ_Q and the weights of a finite set may be chosen after
the data. But the limit that measures the risk of the chosen 𝒬 takes draws that did not choose it.

    Gaussian   P_j ~ N(θ̂, κ_Q² I), Y_j = (1/T) Σ_i X_i(P_j), j = 1, …, M, M fixed in advance
    finite     R̂ = Σ_k w_k X̄_k, exactly; w_k ∝ e^(−τ s_k) with the τ in [0, ∞] of the least bound
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from hbmeta import bounds
from hbmeta.bounds.checks import Array
from hbmeta.certification.hyperpriors import FiniteHyperprior, GaussianHyperprior, Softened
from hbmeta.certification.losses import Loss
from hbmeta.certification.risks import gibbs_losses, predictive_losses
from hbmeta.certification.statements import state
from hbmeta.certification.task_priors import task_kls
from hbmeta.tasks import Episode
from hbmeta.tasks.checks import child_seeds

__all__ = ["finite_query_split", "gaussian_query_split", "within_tasks"]

PILOT = 20
TEMPERATURES = (0.0, *np.geomspace(1e-3, 1e2, 26).tolist(), np.inf)


def gaussian_query_split(
    softened: Softened,
    hyperprior: GaussianHyperprior,
    episode: Episode,
    loss: Loss,
    *,
    delta: float,
    evaluation_delta: float,
    draws: int,
    evaluations: int,
    seed: int,
    progress: bool | None,
) -> dict[str, Any]:
    """Inputs of `query_split` for 𝒬 = N(θ̂, κ_Q² I); δ is shared by the κ_P that are tried."""
    pilot_seed, fresh_seed = child_seeds(seed, 2, where="certify")
    n_tasks = episode.n_tasks
    known = {"dimension": softened.dimension, "distance": softened.distance}

    def least(sd: float) -> dict[str, float]:
        """The hyperprior of the smallest K_H, of those that share δ."""
        return min(({**known, "sd": sd, "prior_sd": p} for p in hyperprior.scales), key=_k_h)

    def risks(sd: float, n: int, seed: int, shown: bool | None) -> list[float]:
        generator = torch.Generator().manual_seed(seed)
        # tqdm shows nothing outside a terminal where disable is None.
        off = None if shown is None else not shown
        return [
            float(
                predictive_losses(
                    softened.draw(sd, generator), episode, loss, draws=draws, seed=seed
                ).mean()
            )
            for _ in tqdm(range(n), desc="certify", disable=off, leave=False)
        ]

    scales = hyperprior.posterior_scales
    chosen = scales[0]
    if len(scales) > 1:
        chosen = min(
            scales,
            key=lambda sd: float(
                bounds.query_split(
                    risk=float(np.mean(risks(sd, PILOT, pilot_seed, False))),
                    hyper_kl=_k_h(least(sd)),
                    n_tasks=n_tasks,
                    delta=delta,
                ).raw
            ),
        )
    return {
        "draws": risks(chosen, evaluations, fresh_seed, progress),
        "evaluation_delta": evaluation_delta,
        "hyper": least(chosen),
        "n_tasks": n_tasks,
        "delta": delta / len(hyperprior.scales),
        "grid": list(hyperprior.scales),
    }


def _k_h(hyper: dict[str, float]) -> float:
    mean = np.zeros(int(hyper["dimension"]))
    mean[0] = hyper["distance"]
    return float(bounds.gaussian_hyper_kl(mean, 0.0, hyper["sd"], hyper["prior_sd"]))


def finite_query_split(
    hyperprior: FiniteHyperprior,
    episode: Episode,
    loss: Loss,
    *,
    delta: float,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """Inputs of `query_split` for weights over a finite set; its risks are known exactly."""
    risks = [
        float(predictive_losses(fit, episode, loss, draws=draws, seed=seed).mean())
        for fit in hyperprior.fits
    ]
    inputs = {
        "candidates": risks,
        "prior_weights": hyperprior.prior_weights,
        "n_tasks": episode.n_tasks,
        "delta": delta,
    }
    options = [
        {**inputs, "weights": weights} for weights in _weights(episode.n_tasks * np.asarray(risks))
    ]
    return min(options, key=lambda option: state("query_split", option).raw)


def within_tasks(
    bound: str,
    hyperprior: FiniteHyperprior,
    episode: Episode,
    loss: Loss,
    *,
    delta: float,
    evaluation_delta: float,
    evaluations: int,
    seed: int,
    progress: bool | None,
) -> dict[str, Any]:
    """Inputs of a bound that pays within tasks: Q_i from all rows of task i, and a drawn prior.

    With w = 𝒬 over the fits, K_i = Σ_k w_k KL(Q_i^k ‖ P_k), and R̂ from draws of k and then of φ.
    """
    pilot_seed, choice_seed, fresh_seed = child_seeds(seed, 3, where="certify")
    tasks = episode.all
    posteriors = [fit.adapt(tasks, seed=seed) for fit in hyperprior.fits]
    kls = np.stack([task_kls(posterior, "certify") for posterior in posteriors])
    pilot = [
        float(gibbs_losses(one, tasks, loss, draws=PILOT, seed=pilot_seed).mean())
        for one in posteriors
    ]
    inputs: dict[str, Any] = {
        "prior_weights": hyperprior.prior_weights,
        "samples": tasks.counts.tolist(),
        "n_tasks": tasks.n_tasks,
        "delta": delta,
    }
    # m R̂_i + KL is −log Z_i for the Gibbs posterior at β = m, and above it for any other: weights
    # like those of PACOH's optimum 𝒬*(P) ∝ 𝒫(P) Π_i Z_i^τ, with τ free.
    scores = tasks.n_points * np.asarray(pilot) + kls.sum(-1)

    def with_weights(weights: list[float]) -> dict[str, Any]:
        return {**inputs, "weights": weights, "task_kls": (np.asarray(weights) @ kls).tolist()}

    weights = min(
        _weights(scores),
        key=lambda w: state(bound, {**with_weights(w), "candidates": pilot}).raw,
    )
    generator = np.random.default_rng(choice_seed)
    chosen = generator.choice(len(weights), size=evaluations, p=weights)
    drawn: list[Array] = []
    for k, posterior in enumerate(posteriors):
        n = int((chosen == k).sum())
        if n:
            found = gibbs_losses(
                posterior, tasks, loss, draws=n, seed=fresh_seed + k, progress=progress
            )
            drawn += [found.mean(-1)]
    return {
        **with_weights(weights),
        "draws": np.concatenate(drawn).tolist(),
        "evaluation_delta": evaluation_delta,
    }


def _weights(scores: Sequence[float] | Array) -> Iterator[list[float]]:
    """w ∝ e^(−τ s): uniform at τ = 0, all on the least score at τ = ∞."""
    above = np.asarray(scores) - np.min(scores)
    for temperature in TEMPERATURES:
        raw = (above == 0.0) * 1.0 if np.isinf(temperature) else np.exp(-temperature * above)
        yield (raw / raw.sum()).tolist()
