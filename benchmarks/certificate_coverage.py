"""How often certificates fail where the truth is known: 400 sets of tasks in three environments.

    thresholds   labels 1[x > t] with 5 % noise, t ~ Beta(30, 15), x ~ U(0, 1); 21 thresholds, 21
                 priors, Gibbs posteriors: the true risk is 0.05 + 0.9 |h − t|; 0-1 loss
    lines        y = φᵀx + noise, φ ~ N(m, Σ); exact Gaussian posteriors under 5 priors, truncated
                 squared loss, whose mean under a Gaussian has a closed form
    clusters     3 classes of Gaussian points in the plane; class means shrunk by one of 8 amounts;
                 0-1 loss

In each the hyperposterior is the closed-form optimum over a finite set of priors, chosen on the
very data. A certificate fails where it is below the true risk of what it is about. Bounds are
loose, so that coverage catches gross errors only; the negative controls show what does: the risk on
the training samples is always below the truth where there is enough to fit, that on the queries in
about half of the sets.

    python -m benchmarks.certificate_coverage [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import binom, norm

from hbmeta import bounds
from hbmeta.bounds import Bound
from hbmeta.tables import aligned

__all__ = ["ENVIRONMENTS", "Coverage", "Sample", "coverage", "thresholds"]

Floats = npt.NDArray[np.float64]
DELTA = 0.05
WITHIN: dict[str, Callable[..., Bound]] = {
    "pentina_lampert": bounds.pentina_lampert,
    "amit_meir": bounds.amit_meir,
    "amit_meir_kl": bounds.amit_meir_kl,
    "account_bound": bounds.account_bound,
    "separate_roots": bounds.separate_roots,
    "joint_root": bounds.joint_root,
    "joint_kl": bounds.joint_kl,
}


@dataclass(frozen=True)
class Sample:
    """What a set of tasks gives for each of k priors.

    Attributes:
        training: (T, k) mean loss of the posterior on its own sample; None without posteriors.
        kls: (T, k) KL(Q_i ‖ P) in nats; None without posteriors.
        query: (T, k) mean loss on other points.
        evidence: (T, k) log Z_i, for the weights of the optimum; None takes the query losses.
    """

    training: Floats | None
    kls: Floats | None
    query: Floats
    evidence: Floats | None = None


@dataclass(frozen=True)
class Coverage:
    """Means over sets of tasks.

    Attributes:
        risk: the true risk.
        values: mean of each bound.
        failures: in how many sets it was below the true risk.
        sets: their number.
    """

    risk: float
    values: dict[str, float]
    failures: dict[str, int]
    sets: int

    @property
    def allowed(self) -> int:
        """The 99 % quantile of Binomial(sets, δ)."""
        return int(binom.ppf(0.99, self.sets, DELTA))


def coverage(
    draw: Callable[[np.random.Generator, int], Sample],
    truth: Floats,
    *,
    n_tasks: int,
    samples: int,
    sets: int,
    seed: int,
) -> Coverage:
    """The bounds on many sets of tasks.

    Args:
        draw: a set of so many tasks.
        truth: (k,) the true risk for each prior: over tasks, samples, posteriors and points.
        n_tasks: in a set.
        samples: of each task.
        sets: how many.
        seed: of all of them.
    """
    rng = np.random.default_rng(seed)
    values: dict[str, list[float]] = {}
    failures: dict[str, int] = {}
    risks = []

    def note(name: str, value: float, risk: float) -> None:
        values.setdefault(name, []).append(value)
        failures[name] = failures.get(name, 0) + int(value < risk)

    for _ in range(sets):
        one = draw(rng, n_tasks)
        k = one.query.shape[1]
        uniform = np.full(k, 1.0 / k)
        if one.training is not None and one.kls is not None and one.evidence is not None:
            # 𝒬*(k) ∝ 𝒫(k) exp((λ/(Tβ + λ)) Σ_i log Z_i(k)) with β = m and λ = √T.
            power = np.sqrt(n_tasks) / (n_tasks * samples + np.sqrt(n_tasks))
            weights = _softmax(power * one.evidence.sum(0))
            risk = float(weights @ truth)
            arguments = {
                "hyper_kl": float(bounds.categorical_kl(weights, uniform)),
                "task_kls": one.kls @ weights,
                "n_samples": samples,
                "n_tasks": n_tasks,
                "delta": DELTA,
            }
            for name, bound in WITHIN.items():
                note(name, float(bound(risk=one.training @ weights, **arguments)), risk)
            note("training risk alone", float((one.training @ weights).mean()), risk)
            risks.append(risk)
        weights = _softmax(-n_tasks * one.query.mean(0))
        risk = float(weights @ truth)
        query = one.query @ weights
        hyper_kl = float(bounds.categorical_kl(weights, uniform))
        found = bounds.query_split(risk=query, hyper_kl=hyper_kl, n_tasks=n_tasks, delta=DELTA)
        note("query_split", float(found), risk)
        risks.append(risk)
        first = one.query[:, 0]
        test = bounds.meta_test(risk=first, n_tasks=n_tasks, delta=DELTA)
        note("meta_test", float(test), float(truth[0]))
        note("query risk alone", float(first.mean()), float(truth[0]))
    means = {name: float(np.mean(found)) for name, found in values.items()}
    return Coverage(float(np.mean(risks)), means, failures, sets)


def _softmax(logits: Floats) -> Floats:
    raw = np.exp(logits - logits.max())
    found: Floats = raw / raw.sum()
    return found


# Thresholds

GRID = np.linspace(0.0, 1.0, 21)
_PRIORS = norm.pdf(GRID, GRID[:, None], 0.1)
_PRIORS /= _PRIORS.sum(1, keepdims=True)


def _gibbs(rng: np.random.Generator, n_tasks: int, m: int, queries: int) -> tuple[Sample, Floats]:
    """And the true risk (T, k) of each posterior on its own task."""
    t = rng.beta(30, 15, (n_tasks, 1))

    def errors(n: int) -> Floats:
        """(T, 21) of the thresholds, on n points."""
        x = rng.random((n_tasks, n))
        y = (x > t) ^ (rng.random((n_tasks, n)) < 0.05)
        # 1[x > h] is wrong on x > h with y = 0 and on x ≤ h with y = 1: sorted counts, by bins.
        at = np.minimum((x * 20).astype(int), 19) + 20 * np.arange(n_tasks)[:, None]
        ones, zeros = (
            np.bincount(at[chosen], minlength=20 * n_tasks).reshape(n_tasks, 20)
            for chosen in (y, ~y)
        )
        below = np.concatenate([np.zeros((n_tasks, 1)), ones.cumsum(1)], 1)
        above = zeros.sum(1, keepdims=True) - np.concatenate(
            [np.zeros((n_tasks, 1)), zeros.cumsum(1)], 1
        )
        found: Floats = (below + above) / n
        return found

    training, query = errors(m), errors(queries)
    true = 0.05 + 0.9 * np.abs(GRID - t)
    # Q(h) ∝ P(h) e^(−m R̂(h)), so that KL(Q‖P) = −m E_Q R̂ − log Z.
    boltzmann = np.exp(-m * training)
    z = boltzmann @ _PRIORS.T
    own = ((boltzmann * training) @ _PRIORS.T) / z
    sample = Sample(
        training=own,
        kls=np.maximum(-m * own - np.log(z), 0.0),
        query=((boltzmann * query) @ _PRIORS.T) / z,
        evidence=np.log(z),
    )
    return sample, ((boltzmann * true) @ _PRIORS.T) / z


def thresholds(
    n_tasks: int, samples: int, sets: int, *, queries: int = 10, seed: int = 0
) -> Coverage:
    """Gibbs posteriors over thresholds."""
    rng = np.random.default_rng(seed + 1)
    truth = np.mean([_gibbs(rng, 4000, samples, queries)[1].mean(0) for _ in range(10)], axis=0)
    return coverage(
        lambda r, T: _gibbs(r, T, samples, queries)[0],
        truth, n_tasks=n_tasks, samples=samples, sets=sets, seed=seed,
    )  # fmt: skip


# Lines

_MEANS = np.array([[0.0, 0.0], [1.0, -0.5], [2.0, 0.0], [0.0, -1.0], [3.0, 1.0]])
_COVARIANCE = np.array([[1.0, 0.3], [0.3, 0.5]])
_NOISE, _SCALE = 0.3, 2.0


def _truncated(error: Floats, variance: Floats) -> Floats:
    """E min(e²/c², 1) for e ~ N(error, variance), in closed form.

    With a = (−c − μ)/σ, b = (c − μ)/σ: E[e²; |e| < c] = (μ² + σ²)(Φ(b) − Φ(a)) −
    σ [(c + μ) φ(b) + (c − μ) φ(a)].
    """
    sd = np.sqrt(variance)
    a, b = (-_SCALE - error) / sd, (_SCALE - error) / sd
    inside = norm.cdf(b) - norm.cdf(a)
    edges = sd * ((_SCALE + error) * norm.pdf(b) + (_SCALE - error) * norm.pdf(a))
    found: Floats = ((error**2 + variance) * inside - edges) / _SCALE**2 + 1.0 - inside
    return found


def _lines(rng: np.random.Generator, n_tasks: int, m: int, queries: int) -> Sample:
    root = np.linalg.cholesky(_COVARIANCE)
    phi = _MEANS[1] + rng.standard_normal((n_tasks, 2)) @ root.T

    def points(n: int) -> tuple[Floats, Floats]:
        x = np.stack([np.ones((n_tasks, n)), rng.uniform(-2, 2, (n_tasks, n))], -1)
        noise = _NOISE * rng.standard_normal((n_tasks, n))
        return x, (x @ phi[..., None])[..., 0] + noise

    (x, y), (x_query, y_query) = points(m), points(queries)
    prior = np.linalg.inv(_COVARIANCE)
    covariance = np.linalg.inv(prior + x.swapaxes(1, 2) @ x / _NOISE**2)
    right = prior @ _MEANS.T + (x.swapaxes(1, 2) @ y[..., None]) / _NOISE**2
    means = covariance @ right  # (T, 2, k)

    def risk(x: Floats, y: Floats) -> Floats:
        spread = np.einsum("tni,tij,tnj->tn", x, covariance, x)[..., None]
        found: Floats = _truncated(y[..., None] - x @ means, spread).mean(1)
        return found

    shift = means - _MEANS.T
    kls = 0.5 * (
        (np.trace(prior @ covariance, axis1=1, axis2=2) - 2.0)[:, None]
        + np.einsum("tik,ij,tjk->tk", shift, prior, shift)
        + (np.linalg.slogdet(_COVARIANCE)[1] - np.linalg.slogdet(covariance)[1])[:, None]
    )
    training = risk(x, y)
    # −m R̂ − KL is log Z at the optimum, and a lower bound of it here.
    return Sample(training, kls, risk(x_query, y_query), -m * training - kls)


def lines(n_tasks: int, samples: int, sets: int, *, seed: int = 0) -> Coverage:
    """Gaussian posteriors of linear regressions."""
    rng = np.random.default_rng(seed + 1)
    truth = np.mean([_lines(rng, 4000, samples, 10).query.mean(0) for _ in range(10)], axis=0)
    return coverage(
        lambda r, T: _lines(r, T, samples, 10),
        truth, n_tasks=n_tasks, samples=samples, sets=sets, seed=seed,
    )  # fmt: skip


# Clusters

_SHRINKAGE = np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])


def _clusters(rng: np.random.Generator, n_tasks: int, shots: int, queries: int) -> Sample:
    ways = 3
    means = 1.5 * rng.standard_normal((n_tasks, ways, 1, 2))
    support = means + rng.standard_normal((n_tasks, ways, shots, 2))
    query = means + rng.standard_normal((n_tasks, ways, queries, 2))
    prototypes = support.mean(2)  # (T, ways, 2)
    losses = []
    for shrink in _SHRINKAGE:
        to = query[:, :, :, None, :] - shrink * prototypes[:, None, None]
        label = np.square(to).sum(-1).argmin(-1)
        wrong = label != np.arange(ways)[None, :, None]
        losses.append(wrong.mean((1, 2)))
    return Sample(None, None, np.stack(losses, -1))


def clusters(n_tasks: int, samples: int, sets: int, *, seed: int = 0) -> Coverage:
    """Classes of points in the plane, point masses: `query_split` and `meta_test` alone."""
    rng = np.random.default_rng(seed + 1)
    truth = np.mean([_clusters(rng, 4000, samples, 5).query.mean(0) for _ in range(10)], axis=0)
    return coverage(
        lambda r, T: _clusters(r, T, samples, 5),
        truth, n_tasks=n_tasks, samples=samples, sets=sets, seed=seed,
    )  # fmt: skip


ENVIRONMENTS: dict[str, tuple[Callable[..., Coverage], int, int]] = {
    "thresholds": (thresholds, 50, 20),
    "thresholds, more tasks": (thresholds, 200, 50),
    "lines": (lines, 100, 15),
    "clusters": (clusters, 200, 2),
}
"""Name, environment, tasks in a set, samples of a task."""


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description="coverage of the bounds over tasks")
    parser.add_argument("--quick", action="store_true", help="40 sets in place of 400")
    sets = 40 if parser.parse_args().quick else 400
    print(f"# Coverage of certificates, δ = {DELTA:g}\n")
    for name, (environment, n_tasks, samples) in ENVIRONMENTS.items():
        found = environment(n_tasks, samples, sets)
        print(
            f"## {name}: {sets} sets of {n_tasks} tasks of {samples} samples; true risk "
            f"{found.risk:.3f}; at most {found.allowed} failures allowed\n\n```"
        )
        body = [
            [bound, f"{value:.3f}", f"{found.failures[bound]}"]
            for bound, value in found.values.items()
        ]
        print("\n".join(aligned(["", "mean", "failures"], body)), end="\n```\n\n")


if __name__ == "__main__":
    main()
