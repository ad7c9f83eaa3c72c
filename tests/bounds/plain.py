"""The theorems once more, task by task in plain Python: slow and obvious, for one set of tasks.

Imports nothing of hbmeta. Each returns the right-hand side before it is cut off at 1.
"""

from math import inf, log, sqrt


def kl(q, p):
    """Binary kl(q‖p)."""
    total = 0.0
    for a, b in ((q, p), (1.0 - q, 1.0 - p)):
        if a > 0.0:
            total += a * log(a / b) if b > 0.0 else inf
    return total


def inverse(q, c):
    """Upper inverse by bisection."""
    low, high = q, 1.0
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if kl(q, middle) > c else (middle, high)
    return high


def average(values):
    return sum(values) / len(values)


def amit_meir(risks, K_H, kls, samples, delta):
    T = len(risks)
    gaps = [
        sqrt((K_H + K + log(2 * T * m / delta)) / (2 * (m - 1)))
        for K, m in zip(kls, samples, strict=True)
    ]
    return average(risks) + average(gaps) + sqrt((K_H + log(2 * T / delta)) / (2 * (T - 1)))


def per_task(risks, K_H, kls, samples, delta):
    T = len(risks)
    return average(
        [
            inverse(risk, (K_H + K + log(4 * T * sqrt(m) / delta)) / m)
            for risk, K, m in zip(risks, kls, samples, strict=True)
        ]
    )


def amit_meir_kl(risks, K_H, kls, samples, delta):
    T = len(risks)
    inner = per_task(risks, K_H, kls, samples, delta)
    return inner + sqrt((K_H + log(2 * T / delta)) / (2 * (T - 1)))


def amit_meir_kl_kl(risks, K_H, kls, samples, delta):
    T = len(risks)
    inner = per_task(risks, K_H, kls, samples, delta)
    return inverse(inner, (K_H + log(4 * sqrt(T) / delta)) / T)


def pentina_lampert(risks, K_H, kls, samples, delta):
    """As printed, in the authors' own grouping."""
    T = len(risks)
    m = T / sum(1.0 / n for n in samples)
    environment = (K_H + 1 / 8 - log(delta / 2)) / sqrt(T)
    tasks = (K_H + sum(kls)) / (T * sqrt(m)) + (1 / 8 - log(delta / 2) / T) / sqrt(m)
    return average(risks) + environment + tasks


def separate_roots(risks, K_H, kls, samples, delta, epsilon):
    T = len(risks)
    eta = T * epsilon + 2 * T * (T - 1) * epsilon**2
    gaps = [
        sqrt((K + log(2 * sqrt(m) / epsilon)) / (2 * m)) for K, m in zip(kls, samples, strict=True)
    ]
    environment = sqrt((K_H + log(2 * sqrt(T) / delta) + eta) / (2 * (T - 1)))
    return average(risks) + environment + average(gaps)


def joint_rates(K_H, kls, samples, delta):
    T = len(kls)
    if len(set(samples)) == 1:
        n = T * samples[0]
        within = (K_H + sum(kls) + log(4 * sqrt(n) / delta)) / n
    else:
        n = T * min(samples)
        within = (K_H + sum(kls) + log(2 * n / delta)) / (n - 1)
    return within, (K_H + log(4 * sqrt(T) / delta)) / T


def joint_kl(risks, K_H, kls, samples, delta):
    within, across = joint_rates(K_H, kls, samples, delta)
    return inverse(inverse(average(risks), within), across)


def joint_root(risks, K_H, kls, samples, delta):
    within, across = joint_rates(K_H, kls, samples, delta)
    return average(risks) + sqrt(within / 2) + sqrt(across / 2)


def query_split(risks, K_H, delta):
    T = len(risks)
    return inverse(average(risks), (K_H + log(2 * sqrt(T) / delta)) / T)
