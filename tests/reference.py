"""Slow, dense mathematics to test against, in NumPy and SciPy; imports nothing of hbmeta.

Formulas are written another way than in the package where there is one: posteriors by
conditioning the joint Gaussian of (φ, y), iterates by matrix powers, evidence by the dense density.
"""

import arviz
import numpy as np
from scipy import integrate, optimize, stats


def gaussian_posterior(X, y, mean, covariance, noise):
    """Mean and covariance of φ | y for φ ~ N(mean, covariance), y ~ N(X φ, noise² I)."""
    X, mean, covariance = np.asarray(X), np.asarray(mean), np.asarray(covariance)
    marginal = X @ covariance @ X.T + noise**2 * np.eye(len(X))
    gain = np.linalg.solve(marginal, X @ covariance).T
    return mean + gain @ (np.asarray(y) - X @ mean), covariance - gain @ X @ covariance


def log_evidence(X, y, mean, covariance, noise):
    """log N(y; X mean, X covariance Xᵀ + noise² I); 0 without rows."""
    X = np.asarray(X)
    if not len(X):
        return 0.0
    marginal = X @ np.asarray(covariance) @ X.T + noise**2 * np.eye(len(X))
    return float(stats.multivariate_normal(X @ np.asarray(mean), marginal).logpdf(np.asarray(y)))


def predictive(X_new, X, y, mean, covariance, noise):
    """Mean and covariance of new rows of the same task given its rows (X, y)."""
    at, spread = gaussian_posterior(X, y, mean, covariance, noise)
    X_new = np.asarray(X_new)
    return X_new @ at, X_new @ spread @ X_new.T + noise**2 * np.eye(len(X_new))


def least_squares(X, y):
    """The maximum likelihood estimate of φ for y ~ N(X φ, σ² I)."""
    return np.linalg.lstsq(np.asarray(X), np.asarray(y), rcond=None)[0]


def type_two(means, counts, noise_variance):
    """(μ̂, τ̂², negative log-likelihood of the means): the score's root, or 0."""
    y, error = np.asarray(means, float), noise_variance / np.asarray(counts, float)

    def mean_at(variance):
        weights = 1 / (variance + error)
        return weights @ y / weights.sum()

    def negative_log_likelihood(variance):
        sd = np.sqrt(variance + error)
        return -stats.norm(mean_at(variance), sd).logpdf(y).sum()

    def score(variance):
        v = variance + error
        return ((y - mean_at(variance)) ** 2 / v**2 - 1 / v).sum()

    if score(0.0) <= 0:
        variance = 0.0
    else:
        variance = optimize.brentq(score, 0.0, np.ptp(y) ** 2, xtol=1e-15, rtol=1e-14)
    return mean_at(variance), variance, negative_log_likelihood(variance)


def map_estimate(hessian, optimum, prior_mean, precision):
    """Maximum of −½ (φ−optimum)ᵀH(φ−optimum) − ½ (φ−prior_mean)ᵀΛ(φ−prior_mean)."""
    return np.linalg.solve(hessian + precision, hessian @ optimum + precision @ prior_mean)


def implied_precision(hessian, preconditioner, steps):
    """Λ = H M (I − M)⁻¹ with M = (I − P H)^N, densely."""
    identity = np.eye(len(hessian))
    m = np.linalg.matrix_power(identity - preconditioner @ hessian, steps)
    return hessian @ m @ np.linalg.inv(identity - m)


def descended(hessian, optimum, start, step_size, steps):
    """φ_N = φ̂ + (I − αH)^N (φ₀ − φ̂)."""
    power = np.linalg.matrix_power(np.eye(len(hessian)) - step_size * hessian, steps)
    return optimum + power @ (np.asarray(start) - optimum)


def descent_path(gradient, start, step_size, steps):
    """φ_0 … φ_N of plain gradient descent, by a loop."""
    path = [np.asarray(start, float)]
    for _ in range(steps):
        path.append(path[-1] - step_size * gradient(path[-1]))
    return path


def descent_jacobian(hessian, path, step_size):
    """∂φ_N/∂φ_0 = A_{N−1} ⋯ A_0 with A_n = I − α∇²L(φ_n), along a path of N + 1 points."""
    jacobian = np.eye(len(path[0]))
    for point in path[:-1]:
        jacobian = (np.eye(len(point)) - step_size * hessian(point)) @ jacobian
    return jacobian


def finite_difference(function, point, width=1e-6):
    """Central differences of a function of a vector."""
    point = np.asarray(point, float)
    steps = width * np.eye(len(point))
    return np.array([(function(point + s) - function(point - s)) / (2 * width) for s in steps])


def normal_means_posterior(y, sigma, mean_scale, spread_scale):
    """Exact moments of y_i ~ N(φ_i, σ_i²), φ_i ~ N(μ, τ²), μ ~ N(0, mean_scale²), τ ~ HalfCauchy.

    μ and φ are integrated out in closed form, τ by quadrature (the eight schools of Rubin, 1981).

    Returns:
        a dict: mean and sd of each φ_i ("effect", (tasks,) each), of μ and of τ.
    """
    y, sigma = np.asarray(y, float), np.asarray(sigma, float)

    def given(tau):
        """Log density of τ and y, then mean and second moment of φ and of μ given both."""
        v = sigma**2 + tau**2
        variance = 1 / ((1 / v).sum() + 1 / mean_scale**2)
        mean = variance * (y / v).sum()
        marginal = np.diag(v) + mean_scale**2
        log_joint = stats.multivariate_normal(np.zeros(len(y)), marginal).logpdf(y)
        log_joint += stats.halfcauchy(scale=spread_scale).logpdf(tau)
        shrink = sigma**2 / v  # φ = (1 − shrink) y + shrink μ + noise
        effect = (1 - shrink) * y + shrink * mean
        spread = tau**2 * shrink + shrink**2 * variance
        return log_joint, np.concatenate([effect, [mean, tau], effect**2 + spread,
                                          [mean**2 + variance, tau**2]])  # fmt: skip

    shift = given(1.0)[0]

    def integrand(u):
        # τ = exp(u) covers small and large values alike.
        log_joint, moments = given(np.exp(u))
        return np.exp(log_joint - shift + u) * np.concatenate([[1.0], moments])

    total = integrate.quad_vec(integrand, -15.0, 12.0, epsabs=1e-12, epsrel=1e-10)[0]
    first, second = np.split(total[1:] / total[0], 2)
    sd = np.sqrt(second - first**2)
    return {
        "effect": (first[:-2], sd[:-2]),
        "mu": (first[-2], sd[-2]),
        "tau": (first[-1], sd[-1]),
    }


def kernel_matrix(kernel, x, z, *, lengthscale, period=1.0, **_):
    """Correlations of a Gaussian process of one input, entry by entry."""
    formulas = {
        "rbf": lambda d: np.exp(-0.5 * (d / lengthscale) ** 2),
        "matern12": lambda d: np.exp(-d / lengthscale),
        "matern32": lambda d: (1 + 3**0.5 * d / lengthscale) * np.exp(-(3**0.5) * d / lengthscale),
        "matern52": lambda d: (
            (1 + 5**0.5 * d / lengthscale + 5 / 3 * (d / lengthscale) ** 2)
            * np.exp(-(5**0.5) * d / lengthscale)
        ),
        "periodic": lambda d: np.exp(-2 * np.sin(np.pi * d / period) ** 2 / lengthscale),
    }
    return np.array([[formulas[kernel](abs(a - b)) for b in z] for a in x]).reshape(len(x), len(z))


def monte_carlo_error(chains, kind):
    """Standard error of the mean or the sd of (chains, draws, ...) draws.

    sd = √m₂, so that its error is that of m₂ over 2 sd. (ArviZ 0.23 has it as method="sd", which
    fails where Numba is installed and NumPy is 2.4 or newer.)
    """
    if kind == "sd":
        error = monte_carlo_error((chains - chains.mean((0, 1))) ** 2, "mean")
        return error / (2 * chains.std((0, 1)))
    return arviz.mcse(arviz.convert_to_dataset(chains), method="mean")["x"].values
