"""Oracles against dense formulas of one task, brute-force quadrature, and their own families."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

from hbmeta.errors import ConvergenceError, DataError
from hbmeta.oracles import bayes_clusters, bayes_sinusoid, known_clusters, known_kernel
from hbmeta.oracles.clusters import log_disk_mass
from hbmeta.tasks import Clusters, Episode, GaussianProcessTasks, LinearTasks, Sinusoids, Tasks
from tests.reference import kernel_matrix

TURN = 2 * math.pi


def rows_of(tasks, i):
    """x (n, features) and y (n,) of one task, in NumPy."""
    rows = tasks.task == i
    return tasks.flat_x[rows].double().numpy(), tasks.flat_y[rows].numpy()


def in_rows(predictive, values):
    """Values of the padded layout, flat."""
    return predictive.tasks.unpad(values)


def better(first, second):
    """How many standard errors the paired mean over tasks is above 0."""
    difference = first - second
    return float(difference.mean() / difference.std() * len(difference) ** 0.5)


# Gaussian processes


def one_task(x_s, y_s, x_q, y_q):
    part = [
        Tasks(np.array(x, float).reshape(1, -1, 1), np.array([y], float), features=["x"])
        for x, y in ((x_s, y_s), (x_q, y_q))
    ]
    return Episode(*part)


def fixed(family):
    """The truth of a family of one task whose hyperparameters are numbers."""
    return {
        name: torch.tensor([float(getattr(family, name))], dtype=torch.float64)
        for name in family.hyperparameters
    }


def test_known_kernel_gives_the_numbers_of_the_literature():
    """Computed in NumPy, independently of hbmeta."""
    family = GaussianProcessTasks(lengthscale=1.0, scale=1.0, noise=0.1)
    episode = one_task([-1, 0, 1.5], [0.5, -0.2, 1.0], [-0.5, 1.0], [0.1, 0.7])
    truth = {
        "lengthscale": torch.ones(1),
        "scale": torch.ones(1),
        "noise": torch.tensor([0.1], dtype=torch.float64),
    }
    predictive = known_kernel(family, episode, truth)
    expected = torch.tensor([[0.0722288988, 0.5410307299]], dtype=torch.float64)
    torch.testing.assert_close(predictive.mean, expected, atol=1e-9, rtol=0)
    variance = torch.tensor([[0.0414664231, 0.1027763055]], dtype=torch.float64)
    torch.testing.assert_close(predictive.variance, variance, atol=1e-9, rtol=0)
    joint = predictive.log_prob(episode.query.y, joint=True)
    assert float(joint[0]) == pytest.approx(0.8123536553, abs=1e-9)
    assert float(predictive.log_prob(episode.query.y).sum()) == pytest.approx(
        0.7589164113, abs=1e-9
    )
    # The covariance between the two points: half of the total correlation follows from it.
    factor = predictive._mixture.components.factor[0]
    covariance = factor @ factor.T
    assert float(covariance[0, 1]) == pytest.approx(-0.0323521183, abs=1e-9)
    gap = 0.5 * float(covariance.diagonal().log().sum() - covariance.logdet())
    assert gap == pytest.approx(0.1409115904, abs=1e-9)


@pytest.mark.parametrize("kernel", ["rbf", "matern12", "matern32", "matern52", "periodic"])
def test_known_kernel_against_one_task_at_a_time(kernel):
    family = GaussianProcessTasks(
        kernel=kernel, scale=(0.5, 2.0), noise=(0.05, 0.5), period=(1.0, 3.0),
        shots=(0, 8), queries=(0, 5),
    )  # fmt: skip
    episode, truth = family.sample_with_truth(30, seed=1)
    counts = episode.support.counts.tolist(), episode.query.counts.tolist()
    assert 0 in counts[0]
    assert 0 in counts[1]
    predictive = known_kernel(family, episode, truth)
    joint = predictive.log_prob(episode.query.y, joint=True)
    for i in range(30):
        at = {name: float(values[i]) for name, values in truth.items()}

        def covariance(x, z, at=at):
            return at["scale"] ** 2 * kernel_matrix(kernel, x[:, 0], z[:, 0], **at)

        def evidence(x, y, covariance=covariance, at=at):
            if not len(x):
                return 0.0
            spread = covariance(x, x) + at["noise"] ** 2 * np.eye(len(x))
            return stats.multivariate_normal(np.zeros(len(x)), spread).logpdf(y)

        (x, y), (x_new, y_new) = rows_of(episode.support, i), rows_of(episode.query, i)
        inverse = np.linalg.inv(covariance(x, x) + at["noise"] ** 2 * np.eye(len(x)))
        gain = covariance(x_new, x) @ inverse
        spread = covariance(x_new, x_new) - gain @ covariance(x, x_new)
        n = len(x_new)
        np.testing.assert_allclose(predictive.mean[i, :n], gain @ y, atol=1e-9)
        variance = spread.diagonal() + at["noise"] ** 2
        np.testing.assert_allclose(predictive.variance[i, :n], variance, atol=1e-9)
        both = evidence(np.concatenate([x, x_new]), np.concatenate([y, y_new]))
        assert float(joint[i]) == pytest.approx(both - evidence(x, y), abs=1e-8)


def test_draws_of_known_kernel_have_its_covariance():
    # 20,000 draws of 3 rows in each of 2 tasks: 6 means and 12 covariances within 4.5 standard
    # errors; a false alarm of 1.3e-4. Between the tasks: no correlation, 9 more.
    family = GaussianProcessTasks(lengthscale=(0.5, 2.0), shots=(0, 2), queries=(2, 3))
    episode, truth = family.sample_with_truth(2, seed=1)
    assert sorted(episode.query.counts.tolist()) == [2, 3]
    predictive = known_kernel(family, episode, truth)
    draws = in_rows_of_draws(predictive, predictive.sample(20_000, seed=0))
    components = predictive._mixture.components
    full = components.factor @ components.factor.mT
    blocks = [full[i, :n, :n] for i, n in enumerate(episode.query.counts.tolist())]
    expected = torch.block_diag(*blocks)
    sd = expected.diagonal().sqrt()
    assert ((draws.mean(0) - components.mean).abs() < 4.5 * sd / 20_000**0.5).all()
    error = ((expected.diagonal()[:, None] * expected.diagonal() + expected**2) / 20_000).sqrt()
    assert ((draws.T.cov() - expected).abs() < 4.5 * error).all()


def in_rows_of_draws(predictive, draws):
    return predictive.tasks.unpad(draws, dim=1)


def test_repeated_inputs_without_noise_are_interpolated():
    family = GaussianProcessTasks(lengthscale=1.0, scale=2.0, noise=0.0)
    episode = one_task([0.0, 0.0, 1.0], [0.5, 0.5, -1.0], [0.0, 1.0, 0.5], [0.5, -1.0, 0.0])
    predictive = known_kernel(family, episode, fixed(family))
    torch.testing.assert_close(
        predictive.mean[0, :2], torch.tensor([0.5, -1.0]).double(), atol=1e-6, rtol=0
    )
    # The jitter 1e-8 scale² is the noise of the rows and of their mean: between 1 and 2 times.
    assert float(predictive.variance[0, :2].min()) / 4e-8 >= 1.0
    assert float(predictive.variance[0, :2].max()) / 4e-8 <= 2.001


def test_nothing_beats_the_known_kernel():
    # Wrong lengthscales, scales or noises lose on average over 300 tasks, by more than 4 standard
    # errors; the true difference is 7 and more, so a false alarm is below 2e-3 in theory, with
    # this seed there is none.
    family = GaussianProcessTasks(shots=(3, 10), queries=10, noise=(0.1, 0.3))
    episode, truth = family.sample_with_truth(300, seed=0)
    y = episode.query.y
    best = known_kernel(family, episode, truth).log_prob(y, joint=True)
    for name in truth:
        for factor in (0.6, 1.6):
            wrong = known_kernel(family, episode, truth | {name: factor * truth[name]})
            assert better(best, wrong.log_prob(y, joint=True)) > 4


# Sine waves


def dense_waves(family, support, x_new, y_new, nodes=400):
    """log p(y_new | S) per row by Gauss-Legendre on the whole box of one task."""
    (a0, a1), (b0, b1) = (
        value if isinstance(value, tuple) else (value, value)
        for value in (family.amplitude, family.phase)
    )
    t, w = np.polynomial.legendre.leggauss(nodes)
    a, b = (low + (high - low) * (t + 1) / 2 for low, high in ((a0, a1), (b0, b1)))
    log_prior = np.log(np.outer(w / 2, w / 2))

    def log_normal(x, y):
        wave = a[:, None] * np.sin(x - b)
        return stats.norm(wave, family.noise).logpdf(y)

    x, y = support
    posterior = log_prior + sum((log_normal(*row) for row in zip(x[:, 0], y, strict=True)), 0.0)
    posterior = posterior - special.logsumexp(posterior)
    return [
        special.logsumexp(posterior + log_normal(*row))
        for row in zip(x_new[:, 0], y_new, strict=True)
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"phase": (0.0, TURN), "shots": (1, 4)},
        {"amplitude": 2.0},
        {"phase": 1.0},
        {"amplitude": 2.0, "phase": 1.0},
        {"amplitude": (0.0, 0.3), "phase": (1.0, 4.0), "dtype": torch.float64},
    ],
)
def test_bayes_sinusoid_against_the_whole_box(settings):
    family = Sinusoids(**({"noise": 0.3, "shots": (0, 4), "queries": 3} | settings))
    episode = family.sample(6, seed=0)
    found = bayes_sinusoid(family, episode).log_prob(episode.query.y)
    for i in range(6):
        expected = dense_waves(family, rows_of(episode.support, i), *rows_of(episode.query, i))
        np.testing.assert_allclose(found[i], expected, atol=1e-6)


def test_a_posterior_around_phase_zero_is_one_piece():
    """On the full circle, 0 and 2π are neighbours: as few nodes do for what lies on both sides."""
    family = Sinusoids(amplitude=(1.0, 5.0), phase=(0.0, TURN), noise=0.1, shots=5, queries=4)
    around = Sinusoids(amplitude=(1.0, 5.0), phase=(-0.05, 0.05), noise=0.1, shots=5, queries=4)
    episode = around.sample(5, seed=1)
    found = bayes_sinusoid(family, episode, nodes=(64, 128)).log_prob(episode.query.y)
    for i in range(5):
        expected = dense_waves(
            Sinusoids(amplitude=(1.0, 5.0), phase=(-math.pi, math.pi), noise=0.1),
            rows_of(episode.support, i), *rows_of(episode.query, i), nodes=800,
        )  # fmt: skip
        np.testing.assert_allclose(found[i], expected, atol=1e-6)


def test_a_narrow_posterior_is_that_of_a_linear_regression():
    """y = α sin x − β cos x: with little noise the prior no longer matters, (α, β) is Gaussian."""
    family = Sinusoids(amplitude=(1.0, 5.0), noise=1e-3, shots=10, queries=3, dtype=torch.float64)
    episode = family.sample(8, seed=0)
    predictive = bayes_sinusoid(family, episode)
    for i in range(8):
        (x, y), (x_new, _) = rows_of(episode.support, i), rows_of(episode.query, i)
        design, new = (np.hstack([np.sin(v), -np.cos(v)]) for v in (x, x_new))
        mean = new @ np.linalg.lstsq(design, y, rcond=None)[0]
        spread = new @ np.linalg.inv(design.T @ design) @ new.T
        sd = 1e-3 * np.sqrt(1 + spread.diagonal())
        # The prior 1/A in this plane moves the mean by sd · noise / A, and phases near the ends
        # of their range are cut; none of these tasks is.
        assert (np.abs(predictive.mean[i].numpy() - mean) < 0.01 * sd).all()
        np.testing.assert_allclose(predictive.sd[i], sd, rtol=0.01)


def test_more_nodes_change_nothing():
    family = Sinusoids(noise=0.3, shots=(5, 10))
    episode = family.sample(10, seed=4)
    y = episode.query.y
    half, full = (bayes_sinusoid(family, episode, nodes=n).log_prob(y) for n in (None, (128, 256)))
    assert float((half - full).abs().max()) < 1e-4


def test_bayes_sinusoid_fits_its_family():
    # P(Y ≤ y) of one row in each of 200 tasks is uniform: Kolmogorov-Smirnov at 1e-5.
    family = Sinusoids(noise=0.3, shots=(0, 6), queries=1)
    episode = family.sample(200, seed=7)
    level = bayes_sinusoid(family, episode).cdf(episode.query.y)
    assert stats.kstest(level[:, 0], "uniform").pvalue > 1e-5


def test_too_few_nodes_are_an_error():
    family = Sinusoids(noise=0.1, shots=1)
    episode = family.sample(3, seed=0)
    with pytest.raises(ConvergenceError, match="16 × 32 nodes") as caught:
        bayes_sinusoid(family, episode, nodes=(16, 32))
    assert "for task" in caught.value.found


# Clusters


@pytest.mark.parametrize("sd", [0.05, 0.35, 2.0, 30.0])
def test_the_mass_of_a_disk(sd):
    """Along the axis through the mean: ∫ N(u; ρ, sd²) P(|v| ≤ √(R² − u²)) du."""
    for centre in (0.0, 0.3, 1.9, 2.0, 2.2):

        def mass(u, centre=centre):
            across = special.erf(math.sqrt(4.0 - u * u) / (sd * 2**0.5))
            return math.exp(-0.5 * ((u - centre) / sd) ** 2) / (sd * TURN**0.5) * across

        near = min(centre, 2.0)
        breaks = [p for p in (near - 3 * sd, near, near + 3 * sd) if -2 < p < 2]
        expected, _ = integrate.quad(
            mass, -2, 2, points=breaks or None, epsabs=0, epsrel=1e-11, limit=200
        )
        at = torch.tensor([[centre]], dtype=torch.float64)
        found = log_disk_mass(at, torch.full_like(at, sd), 2.0)
        assert float(found) == pytest.approx(math.log(expected), abs=1e-9)
        halved = log_disk_mass(at, torch.full_like(at, sd), 2.0, nodes=32)
        assert float(found) == pytest.approx(float(halved), abs=1e-10)


def test_the_mass_of_a_disk_far_from_it():
    """Within s of the rim a disk looks like a half-plane: log Φ(−d/s), to the curvature of both."""
    at = torch.tensor([50.0 + 8.0]).double()
    found = float(log_disk_mass(at, torch.ones(1).double(), 50.0))
    assert found == pytest.approx(stats.norm.logcdf(-8.0), abs=0.1)
    assert math.isfinite(float(log_disk_mass(1e4 * at, torch.ones(1).double(), 50.0)))


def dense_clusters(family, support, x_new, nodes=120, angles=240):
    """p(y | x, S) of one task by quadrature over the disk: Gauss-Legendre in r², even angles."""
    t, w = np.polynomial.legendre.leggauss(nodes)
    r = family.radius * np.sqrt((t + 1) / 2)
    angle = np.arange(angles) * TURN / angles
    centres = np.stack([np.outer(r, np.cos(angle)), np.outer(r, np.sin(angle))], -1)
    log_prior = np.log(w / 2 / angles)[:, None]

    def log_normal(x):
        square = ((centres - x) ** 2).sum(-1) / family.noise**2
        return -0.5 * square - math.log(TURN * family.noise**2)

    x, y = support
    logits = np.empty((len(x_new), family.ways))
    for k in range(family.ways):
        posterior = log_prior + sum((log_normal(row) for row in x[y == k]), 0.0 * centres[..., 0])
        posterior -= special.logsumexp(posterior)
        logits[:, k] = [special.logsumexp(posterior + log_normal(row)) for row in x_new]
    return special.softmax(logits, -1)


@pytest.mark.parametrize(("shots", "noise"), [(0, 0.5), (1, 0.5), (3, 0.4), (2, 2.0)])
def test_bayes_clusters_against_the_whole_disk(shots, noise):
    family = Clusters(ways=3, shots=shots, queries=2, radius=1.5, noise=noise)
    episode = family.sample(4, seed=0)
    probabilities = bayes_clusters(family, episode).probabilities
    for i in range(4):
        expected = dense_clusters(family, rows_of(episode.support, i), rows_of(episode.query, i)[0])
        np.testing.assert_allclose(probabilities[i], expected, atol=1e-8)


def test_bayes_clusters_with_different_numbers_of_rows():
    """Classes of 0, 1 and 3 rows, in a task beside an empty one."""
    family = Clusters(ways=3, radius=1.5, noise=0.5)
    x = np.array([[0.5, 0.5], [-1.0, 0.2], [-1.2, 0.1], [-2.0, 0.0]])
    support = Tasks.from_flat(x, np.array([1, 2, 2, 2]), [1] * 4, 2)
    x_new = np.array([[[0.1, 0.2], [-1.0, 0.0]], [[0.4, 0.3], [3.0, -3.0]]])
    probabilities = bayes_clusters(family, Episode(support, Tasks(x_new))).probabilities
    torch.testing.assert_close(probabilities[0], torch.full((2, 3), 1 / 3).double())
    expected = dense_clusters(family, (x, np.array([1, 2, 2, 2])), x_new[1])
    np.testing.assert_allclose(probabilities[1], expected, atol=1e-8)


def test_known_clusters_against_the_formula():
    family = Clusters(ways=4, queries=3, noise=0.7)
    episode, truth = family.sample_with_truth(3, seed=0)
    found = known_clusters(family, episode, truth).probabilities
    for i in range(3):
        x, _ = rows_of(episode.query, i)
        means = truth["means"][i].numpy()
        density = np.array(
            [[stats.multivariate_normal(c, 0.49).pdf(row) for c in means] for row in x]
        )
        np.testing.assert_allclose(found[i], density / density.sum(-1, keepdims=True), atol=1e-10)


def test_many_rows_tell_the_means():
    family = Clusters(shots=4000, queries=5, noise=0.35)
    episode, truth = family.sample_with_truth(3, seed=0)
    bayes, known = bayes_clusters(family, episode), known_clusters(family, episode, truth)
    # A mean is off by 0.35/√4000 = 0.0055; a logit by 5 · 0.0055/0.35 at most, times a few.
    torch.testing.assert_close(bayes.probabilities, known.probabilities, atol=0.05, rtol=0)
    assert not torch.equal(bayes.probabilities, known.probabilities)


def test_the_order_of_classifiers():
    # Over 2,000 tasks of one shot: who knows the means is better than the Bayes classifier, which
    # is better than the nearest mean as if it were the true one. The differences are 20 and more
    # standard errors; 4 are asked for.
    family = Clusters(shots=1, queries=3, noise=0.6)
    episode, truth = family.sample_with_truth(2000, seed=0)
    y = episode.query.y
    known = known_clusters(family, episode, truth).log_prob(y).mean(1)
    bayes = bayes_clusters(family, episode).log_prob(y).mean(1)
    order = episode.support.y.argsort(1)[:, :, None].expand(-1, -1, 2)
    plugged = {"means": episode.support.x.gather(1, order)}
    nearest = known_clusters(family, episode, plugged).log_prob(y).mean(1)
    assert better(known, bayes) > 4
    assert better(bayes, nearest) > 4


# All of them


def test_oracles_leave_no_trace(untouched):
    gp, waves, clusters = GaussianProcessTasks(), Sinusoids(noise=0.3), Clusters()
    with untouched():
        episode, truth = gp.sample_with_truth(2, seed=0)
        known_kernel(gp, episode, truth).sample(2)
        episode = waves.sample(2, seed=0)
        one, two = (bayes_sinusoid(waves, episode).mean for _ in range(2))
        bayes_clusters(clusters, clusters.sample(2, seed=0)).sample(2)
    assert torch.equal(one, two)


def test_a_query_without_rows():
    waves, clusters = Sinusoids(noise=0.3, queries=0), Clusters(queries=0)
    gp = GaussianProcessTasks(queries=0)
    episode, truth = gp.sample_with_truth(2, seed=0)
    for predictive in (
        known_kernel(gp, episode, truth),
        bayes_sinusoid(waves, waves.sample(2, seed=0)),
        bayes_clusters(clusters, clusters.sample(2, seed=0)),
        known_clusters(clusters, *clusters.sample_with_truth(2, seed=0)),
    ):
        nothing = predictive.tasks.flat_y
        assert predictive.log_prob(nothing, joint=True).tolist() == [0.0, 0.0]


GP, WAVES, CLUSTERS = GaussianProcessTasks(), Sinusoids(noise=0.3), Clusters(ways=3)
DRAWN = GP.sample_with_truth(2, seed=0)
LABELLED = CLUSTERS.sample_with_truth(2, seed=0)


def changed(**entries):
    return DRAWN[1] | {name: torch.as_tensor(value).double() for name, value in entries.items()}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: known_kernel(WAVES, *DRAWN), "found Sinusoids and Episode"),
        (lambda: known_kernel(GP, DRAWN[0].support, DRAWN[1]), "GaussianProcessTasks and Tasks"),
        (lambda: known_kernel(GP, LABELLED[0], DRAWN[1]), "1 columns in x .* and a number as y"),
        (lambda: known_kernel(GP, DRAWN[0], {}), "'lengthscale' in the truth, .*; found none"),
        (lambda: known_kernel(GP, DRAWN[0], None), "found none"),
        (lambda: known_kernel(GP, DRAWN[0], changed(scale=1.0)), r"shape \(2,\); found shape \(\)"),
        (lambda: known_kernel(GP, DRAWN[0], changed(scale=[1.0, -1.0])), "above 0; found -1"),
        (lambda: known_kernel(GP, DRAWN[0], changed(noise=[-0.1, 1.0])), "noise of at least 0"),
        (lambda: known_kernel(GP, DRAWN[0], changed(noise=[1.0, math.nan])), "found NaN or inf"),
        (lambda: bayes_sinusoid(Sinusoids(), DRAWN[0]), "noise above 0; found noise=0.0"),
        (lambda: bayes_sinusoid(WAVES, DRAWN[0], nodes=64), "two whole numbers .* found 64"),
        (lambda: bayes_sinusoid(WAVES, DRAWN[0], nodes=(3, 8)), r"found \(3, 8\)"),
        (lambda: bayes_sinusoid(WAVES, LABELLED[0]), "1 columns in x"),
        (lambda: bayes_clusters(CLUSTERS, DRAWN[0]), "2 columns in x .* class labels 0 to 2"),
        (lambda: bayes_clusters(Clusters(ways=2), LABELLED[0]), "class labels 0 to 1"),
        (lambda: known_clusters(Clusters(ways=2, shots=0), *LABELLED), "class labels 0 to 1"),
        (lambda: known_clusters(CLUSTERS, LABELLED[0], DRAWN[1]), "'means' in the truth"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(DataError, match=message):
        call()


def test_an_episode_without_y_or_of_vectors():
    family = LinearTasks([0.0], [[1.0]], noise=0.1, intercept=False)
    episode = family.sample(2, seed=0)
    without = Tasks.from_flat(episode.support.flat_x, None, episode.support.task, 2)
    with pytest.raises(DataError, match=r"a number as y; found .*no y"):
        bayes_sinusoid(WAVES, Episode(without, episode.query))
