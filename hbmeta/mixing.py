"""Split R̂ and effective sample sizes of Markov chains, all coordinates at a time.

Each chain is cut into halves, and the draws x of a coordinate are replaced by normal scores
z = Φ⁻¹((rank − 3/8) / (S + 1/4)) of their ranks among all S. With the mean w of the chains'
variances and the variance b of their n-draw means,

    R̂ = sqrt(((n − 1) w + n b) / (n w)),    of z and of the scores of |x − median|, the larger

    S_eff = S / τ,    τ = −1 + 2 Σ_{k<K} P_k + ρ_{2K},    P_k = ρ_{2k} + ρ_{2k+1}

where ρ_t is the autocorrelation at lag t of all chains together, Σ ends before the first pair K
that is not positive, and P is made non-increasing (Geyer). The bulk's is that of z, the tail's the
smaller of those of the indicators of the 5 % and 95 % quantiles.

Source: Vehtari, Gelman, Simpson, Carpenter, Bürkner (2021), Bayesian Analysis 16. The same numbers
as ArviZ gives, one coordinate at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.fft import irfft, next_fast_len, rfft
from scipy.special import ndtri
from scipy.stats import rankdata
from torch import Tensor

__all__ = ["Mixing", "mixing"]

Array = npt.NDArray[np.float64]
# Coordinates at a time, so that the copies stay small.
_AT_A_TIME = 256
# Draws that differ by less are one number.
_RESOLUTION = 1e-15


@dataclass(frozen=True)
class Mixing:
    """How well chains have mixed, by coordinate; NaN where a draw is.

    Attributes:
        r_hat: (size,) rank-normalised split R̂; NaN for a single chain.
        ess_bulk: (size,) effective sample size of the bulk.
        ess_tail: (size,) of the tails.
    """

    r_hat: Tensor
    ess_bulk: Tensor
    ess_tail: Tensor


def mixing(draws: Tensor) -> Mixing:
    """R̂ and effective sample sizes of (chains, draws, size), four draws or more."""
    found = []
    with np.errstate(all="ignore"):
        for some in draws.split(_AT_A_TIME, -1):
            x = some.permute(2, 0, 1).contiguous().numpy()
            rows = np.stack(_of(x))
            rows[:, np.isnan(x).any((1, 2))] = np.nan
            found.append(rows)
    r_hat, bulk, tail = torch.from_numpy(np.concatenate(found, 1)).unbind(0)
    return Mixing(r_hat if len(draws) > 1 else torch.full_like(r_hat, torch.nan), bulk, tail)


# Below, x is (size, chains, draws).


def _of(x: Array) -> tuple[Array, Array, Array]:
    halves = _halves(x)
    scores = _normal_scores(halves)
    folded = _normal_scores(abs(halves - np.median(halves, (1, 2), keepdims=True)))
    r_hat = np.maximum(_r_hat(scores), _r_hat(folded))
    edges = np.quantile(x, (0.05, 0.95), (1, 2), keepdims=True)
    low, high = (_effective(_halves((x <= edge).astype(np.float64))) for edge in edges)
    return r_hat, _effective(scores), np.minimum(low, high)


def _halves(x: Array) -> Array:
    """Twice as many chains of half the draws; the middle of an odd number goes."""
    half = x.shape[-1] // 2
    return np.concatenate((x[..., :half], x[..., -half:]), 1)


def _normal_scores(x: Array) -> Array:
    flat = x.reshape(len(x), -1)
    scores: Array = ndtri((rankdata(flat, axis=-1) - 3 / 8) / (flat.shape[-1] + 1 / 4))
    return scores.reshape(x.shape)


def _r_hat(x: Array) -> Array:
    n = x.shape[-1]
    within, between = x.var(-1, ddof=1).mean(-1), n * x.mean(-1).var(-1, ddof=1)
    r_hat: Array = np.sqrt((between / within + n - 1) / n)
    return r_hat


def _effective(x: Array) -> Array:
    _, chains, n = x.shape
    # The mean over chains of their autocovariances is that of their power spectra.
    length = next_fast_len(2 * n, real=True)
    means = x.mean(-1)
    spectrum = rfft(x - means[..., None], length)
    power = (np.square(spectrum.real) + np.square(spectrum.imag)).mean(1)
    covariance = irfft(power, length)[:, :n] / n
    first = covariance[:, :1]
    plus = first + means.var(-1, ddof=1)[:, None]
    rho = 1 - (first * n / (n - 1) - covariance) / plus
    rho[:, 0] = 1.0
    last = max((n - 3) // 2, 0)
    pairs = rho[:, : 2 * last + 2].reshape(len(x), last + 1, 2).sum(-1)
    ended = ~(pairs > 0)
    ended[:, last] = True
    end = ended.argmax(1)
    total = np.where(np.arange(last + 1) < end[:, None], np.minimum.accumulate(pairs, 1), 0.0)
    at = np.arange(len(x))
    rest, pair = rho[at, 2 * end], pairs[at, end]
    rest = np.where((rest > 0) | (pair >= 0), rest, 0.0)
    tau = np.maximum(2 * total.sum(1) + rest - 1, 1 / np.log10(chains * n))
    still = np.ptp(x.reshape(len(x), -1), 1) < _RESOLUTION
    ess: Array = np.where(still, chains * n, chains * n / tau)
    return ess
