"""The streamed predictive against dense mixtures in NumPy and SciPy."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import optimize, stats
from scipy.special import logsumexp

from hbmeta import mixtures
from hbmeta.errors import ConvergenceError, DataError, ProgramError, UnsupportedModelError
from hbmeta.predictive import Predictive
from hbmeta.scores import crps_draws, crps_normal
from hbmeta.tasks import Tasks

COUNTS = (3, 0, 1, 5)  # ragged, with an empty task
TASK = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))
N, DRAWS = sum(COUNTS), 6
IDS = ("a", "b", "c", "d")


def uniform(*shape, seed=0, low=0.0, high=1.0):
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)


def ragged_tasks(n_tasks=4):
    return Tasks.from_flat(torch.zeros(N, 1).double(), None, TASK, n_tasks, ids=IDS[:n_tasks])


class Stack:
    """Components from one function of the draws: parameters (draws, n, ...) → distribution."""

    def __init__(self, family, **parameters):
        self.family, self.parameters = family, parameters
        self.n_draws = len(next(iter(parameters.values())))
        self.asked = []

    def distribution(self, start, stop):
        self.asked.append((start, stop))
        return self.family(**{k: v[start:stop] for k, v in self.parameters.items()})


LOC, SCALE = uniform(DRAWS, N, seed=1, low=-2, high=2), uniform(DRAWS, N, seed=2, low=0.3, high=2)
DF, RATE = uniform(DRAWS, N, seed=3, low=3, high=9), uniform(DRAWS, N, seed=4, low=0.5, high=8)
PROBS = uniform(DRAWS, N, seed=5, low=0.05, high=0.95)
LOG_WEIGHTS = uniform(DRAWS, 4, seed=6, low=-2, high=2)

# name: components, SciPy's frozen distribution of the same parameters, a y for every row
FAMILIES = {
    "normal": (
        Stack(dist.Normal, loc=LOC, scale=SCALE),
        stats.norm(LOC, SCALE),
        uniform(N, seed=7, low=-3, high=3),
    ),
    "student": (
        Stack(dist.StudentT, df=DF, loc=LOC, scale=SCALE),
        stats.t(DF, LOC, SCALE),
        uniform(N, seed=7, low=-3, high=3),
    ),
    "gamma": (
        Stack(dist.Gamma, concentration=DF, rate=RATE),
        stats.gamma(DF, scale=1 / RATE),
        uniform(N, seed=7, low=0.1, high=3),
    ),
    "lognormal": (
        Stack(dist.LogNormal, loc=LOC, scale=0.5 * SCALE),
        stats.lognorm(0.5 * SCALE, scale=LOC.exp()),
        uniform(N, seed=7, low=0.1, high=3),
    ),
    "bernoulli": (
        Stack(dist.Bernoulli, probs=PROBS),
        stats.bernoulli(PROBS),
        (uniform(N, seed=7) > 0.5).double(),
    ),
    "poisson": (
        Stack(dist.Poisson, rate=RATE),
        stats.poisson(RATE),
        uniform(N, seed=7, high=9).floor(),
    ),
    "binomial": (
        Stack(lambda probs: dist.Binomial(12, probs), probs=PROBS),
        stats.binom(12, PROBS),
        uniform(N, seed=7, high=12).floor(),
    ),
}
EXACT = ["normal", "gamma", "lognormal"]


def dense_weights(log_weights):
    """(draws, n)."""
    if log_weights is None:
        return np.full((DRAWS, N), 1 / DRAWS)
    return log_weights.softmax(0)[:, TASK].numpy()


def dense_log_density(frozen, y):
    density = frozen.logpmf if hasattr(frozen.dist, "logpmf") else frozen.logpdf
    return density(y.numpy())


def per_task(rows):
    """Sums (..., n) over the rows of each task, by a loop."""
    out = np.zeros((*rows.shape[:-1], 4))
    for row, task in enumerate(TASK.tolist()):
        out[..., task] += rows[..., row]
    return out


@pytest.fixture(params=[None, LOG_WEIGHTS], ids=["equal", "weighted"])
def log_weights(request):
    return request.param


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return FAMILIES[request.param]


def flat(components, **settings):
    return Predictive(components, ragged_tasks(), padded=False, **settings)


# Dense references


def test_moments(family, log_weights):
    components, frozen, _ = family
    predictive, weights = flat(components, log_weights=log_weights), dense_weights(log_weights)
    mean = (weights * frozen.mean()).sum(0)
    second = (weights * (frozen.var() + frozen.mean() ** 2)).sum(0)
    np.testing.assert_allclose(predictive.mean, mean, rtol=1e-10)
    np.testing.assert_allclose(predictive.variance, second - mean**2, rtol=1e-9)
    np.testing.assert_allclose(predictive.sd, np.sqrt(second - mean**2), rtol=1e-9)


def test_log_prob(family, log_weights):
    components, frozen, y = family
    predictive, weights = flat(components, log_weights=log_weights), dense_weights(log_weights)
    expected = logsumexp(dense_log_density(frozen, y), b=weights, axis=0)
    np.testing.assert_allclose(predictive.log_prob(y), expected, rtol=1e-6, atol=1e-6)


def test_joint_log_prob_puts_the_mean_over_draws_outside_the_product_over_rows(family, log_weights):
    components, frozen, y = family
    predictive = flat(components, log_weights=log_weights)
    weights = np.full((DRAWS, 4), 1 / DRAWS)
    if log_weights is not None:
        weights = log_weights.softmax(0).numpy()
    expected = logsumexp(per_task(dense_log_density(frozen, y)), b=weights, axis=0)
    found = predictive.log_prob(y, joint=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    marginal = predictive.log_prob(y)
    assert float(found[1]) == 0.0  # no rows
    assert float(found[2]) == pytest.approx(float(marginal[3]))  # one row
    assert abs(float(found[3]) - float(marginal[4:].sum())) > 1e-3


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("level", [0.001, 0.05, 0.5, 0.95, 0.999])
def test_quantiles_solve_the_mixture_distribution_function(name, level, log_weights):
    components, frozen, _ = FAMILIES[name]
    predictive, weights = flat(components, log_weights=log_weights), dense_weights(log_weights)
    found = predictive.quantile(level)
    low, high = frozen.ppf(level).min(0), frozen.ppf(level).max(0)
    for row in range(N):

        def excess(x, row=row):
            return (weights * frozen.cdf(x)).sum(0)[row] - level

        expected = optimize.brentq(excess, low[row] - 1e-9, high[row] + 1e-9, xtol=1e-13)
        assert float(found[row]) == pytest.approx(expected, rel=1e-7, abs=1e-7)


def test_quantiles_from_draws_have_the_right_probability(family, log_weights):
    # 9 rows, 3 levels, 5 families, 2 kinds of weights. The error of F at a quantile of D draws
    # has standard deviation below sqrt(p (1 - p) / ESS), and ESS ≥ 4000 / 6 · (ESS of 6 weights).
    # 4.5 deviations: a false alarm has probability 270 · 7e-6 = 2e-3, and the seed is fixed.
    components, frozen, _ = family
    predictive, weights = flat(components, log_weights=log_weights), dense_weights(log_weights)
    effective = 4000 / DRAWS / (weights**2).sum(0)
    for level in (0.05, 0.5, 0.95):
        found = predictive.quantile(level).numpy()
        error = 4.5 * np.sqrt(level * (1 - level) / effective)
        assert ((weights * frozen.cdf(found)).sum(0) >= level - error).all()
        below = found - 1e-9 if components.family in (dist.Normal, dist.StudentT) else found - 1e-6
        assert ((weights * frozen.cdf(below)).sum(0) <= level + error + 1e-5).all()


@pytest.mark.parametrize("name", ["bernoulli", "poisson", "binomial"])
def test_quantiles_of_whole_numbers_are_whole(name):
    found = flat(FAMILIES[name][0], log_weights=LOG_WEIGHTS).quantile([0.1, 0.5, 0.9])
    assert torch.equal(found, found.round())


def test_cdf(family, log_weights):
    # As above: 9 · 4 · 2 comparisons from draws, 4.5 deviations.
    components, frozen, y = family
    weights = dense_weights(log_weights)
    expected = (weights * frozen.cdf(y.numpy())).sum(0)
    found = flat(components, log_weights=log_weights).cdf(y)
    if any(components is FAMILIES[name][0] for name in EXACT):
        np.testing.assert_allclose(found, expected, rtol=1e-7)
    else:
        error = 4.5 * np.sqrt(expected * (1 - expected) * DRAWS * (weights**2).sum(0) / 4000)
        assert (np.abs(found.numpy() - expected) <= error + 1e-12).all()


def test_crps_of_one_normal_is_the_closed_form():
    loc, scale, y = LOC[:1], SCALE[:1], FAMILIES["normal"][2]
    found = flat(Stack(dist.Normal, loc=loc, scale=scale)).crps(y)
    torch.testing.assert_close(found, crps_normal(loc[0], scale[0], y))


def test_crps_of_a_mixture_of_normals(log_weights):
    # E|X − y| and E|X − X'| are known for mixtures: A(m, v) = E|N(m, v)|. 4,000 draws of sd s
    # give a score of standard error below s / sqrt(ESS): 18 comparisons at 4.5 deviations.
    components, _, y = FAMILIES["normal"]
    weights = torch.as_tensor(dense_weights(log_weights))

    def absolute(mean, variance):
        z = mean / variance.sqrt()
        normal = torch.distributions.Normal(0.0, 1.0)
        return mean * (2 * normal.cdf(z) - 1) + 2 * variance.sqrt() * normal.log_prob(z).exp()

    pairs = absolute(LOC[:, None] - LOC[None], SCALE[:, None] ** 2 + SCALE[None] ** 2)
    spread = (weights[:, None] * weights[None] * pairs).sum((0, 1))
    expected = (weights * absolute(LOC - y, SCALE**2)).sum(0) - 0.5 * spread
    predictive = flat(components, log_weights=log_weights)
    error = 4.5 * predictive.sd * (DRAWS * (weights**2).sum(0) / 4000).sqrt()
    assert bool(((predictive.crps(y) - expected).abs() <= error).all())


def test_crps_is_that_of_the_draws():
    predictive = flat(FAMILIES["student"][0], log_weights=LOG_WEIGHTS)
    ((_, draws, log_weights),) = predictive._mixture.draws(0)
    y = FAMILIES["student"][2]
    torch.testing.assert_close(predictive.crps(y), crps_draws(draws, y, log_weights))


def test_coverage_is_membership_of_the_interval():
    y = FAMILIES["normal"][2]
    predictive = flat(FAMILIES["normal"][0])
    lower, upper = predictive.interval(0.5)
    torch.testing.assert_close(lower, predictive.quantile(0.25))
    torch.testing.assert_close(upper, predictive.quantile(0.75))
    assert torch.equal(predictive.coverage(y, 0.5), (lower <= y) & (y <= upper))
    assert predictive.coverage(lower, 0.5).all()  # ends included


@pytest.mark.parametrize("name", ["normal", "student"])
def test_coverage_of_y_from_the_model_is_nominal(name):
    # 2,000 tasks of one row with y from the predictive itself. At 0.9 the number covered has
    # standard deviation 0.0067 (and 0.0047 more from quantiles of 4,000 draws each, at most):
    # 4 deviations of 0.0082, a false alarm has probability 6e-5.
    tasks = Tasks(torch.zeros(2000, 1, 1))
    loc, scale = uniform(20, 2000, seed=1), uniform(20, 2000, seed=2, low=0.5)
    parameters = {"loc": loc, "scale": scale}
    family = dist.Normal
    if name == "student":
        family, parameters["df"] = dist.StudentT, torch.full_like(loc, 4.0)
    predictive = Predictive(Stack(family, **parameters), tasks)
    y = predictive.sample(1, seed=11)[0]
    assert float(predictive.coverage(y, 0.9).double().mean()) == pytest.approx(0.9, abs=0.033)


# Vectors and classes


def vector_components():
    loc = uniform(DRAWS, N, 2, seed=1)
    factor = torch.tensor([[1.0, 0.0], [0.6, 0.5]]).double().expand(DRAWS, N, 2, 2)
    return Stack(dist.MultivariateNormal, loc=loc, scale_tril=factor * SCALE[..., None, None])


def test_vectors(log_weights):
    components, y = vector_components(), uniform(N, 2, seed=8)
    predictive, weights = flat(components, log_weights=log_weights), dense_weights(log_weights)
    loc, factor = components.parameters["loc"], components.parameters["scale_tril"]
    cov = (factor @ factor.mT).numpy()
    mean = (weights[..., None] * loc.numpy()).sum(0)
    second = (weights[..., None] * (cov.diagonal(0, 2, 3) + loc.numpy() ** 2)).sum(0)
    np.testing.assert_allclose(predictive.mean, mean, rtol=1e-10)
    np.testing.assert_allclose(predictive.variance, second - mean**2, rtol=1e-9)
    log_density = np.array(
        [
            [stats.multivariate_normal(loc[s, r], cov[s, r]).logpdf(y[r]) for r in range(N)]
            for s in range(DRAWS)
        ]
    )
    expected = logsumexp(log_density, b=weights, axis=0)
    np.testing.assert_allclose(predictive.log_prob(y), expected, rtol=1e-8)
    # Marginals of each coordinate: 2 · 18 comparisons at 4.5 deviations, as above.
    sd = np.sqrt(cov.diagonal(0, 2, 3))
    error = 4.5 * np.sqrt(0.09 * DRAWS * (weights**2).sum(0) / 4000)[:, None]
    at = (weights[..., None] * stats.norm(loc, sd).cdf(predictive.quantile(0.9))).sum(0)
    assert (np.abs(at - 0.9) <= error).all()
    assert predictive.crps(y).shape == predictive.cdf(y).shape == (N, 2)
    assert predictive.sample(7).shape == (7, N, 2)


def test_independent_coordinates_agree_with_a_diagonal_covariance():
    loc, scale, y = uniform(DRAWS, N, 2, seed=1), uniform(DRAWS, N, 2, low=0.5), torch.zeros(N, 2)
    one = flat(Stack(lambda loc, scale: dist.Normal(loc, scale).to_event(1), loc=loc, scale=scale))
    two = flat(
        Stack(
            lambda loc, scale: dist.MultivariateNormal(loc, scale_tril=torch.diag_embed(scale)),
            loc=loc,
            scale=scale,
        )
    )
    torch.testing.assert_close(one.log_prob(y), two.log_prob(y))
    torch.testing.assert_close(one.variance, two.variance)


def test_probabilities(log_weights):
    weights = torch.as_tensor(dense_weights(log_weights))
    logits = uniform(DRAWS, N, 3, seed=9, low=-2, high=2)
    expected = (weights[..., None] * logits.softmax(-1)).sum(0)
    for family in (dist.Categorical, dist.OneHotCategorical):
        predictive = flat(Stack(family, logits=logits), log_weights=log_weights)
        torch.testing.assert_close(predictive.probabilities, expected)
    yes = flat(Stack(dist.Bernoulli, probs=PROBS), log_weights=log_weights).probabilities
    torch.testing.assert_close(yes[:, 1], (weights * PROBS).sum(0))
    torch.testing.assert_close(yes.sum(-1), torch.ones(N).double())


def test_labels_are_the_most_probable_classes(log_weights):
    weights = dense_weights(log_weights)
    logits = uniform(DRAWS, N, 3, seed=9, low=-2, high=2)
    slow = (weights[..., None] * logits.softmax(-1).numpy()).sum(0).argmax(-1)
    for family in (dist.Categorical, dist.OneHotCategorical):
        found = flat(Stack(family, logits=logits), log_weights=log_weights).labels
        assert found.dtype == torch.int64
        assert found.tolist() == slow.tolist()
    found = flat(Stack(dist.Bernoulli, probs=PROBS), log_weights=log_weights).labels
    assert found.tolist() == ((weights * PROBS.numpy()).sum(0) > 0.5).astype(int).tolist()
    padded = Predictive(Stack(dist.Categorical, logits=logits), ragged_tasks())
    assert padded.labels.shape == (4, 5)
    empty = Predictive(Stack(dist.Categorical, logits=logits), ragged_tasks()[1:2])
    assert empty.labels.shape == (1, 1)
    with pytest.raises(UnsupportedModelError, match="probabilities"):
        _ = flat(FAMILIES["normal"][0]).labels


def test_class_labels():
    logits = uniform(DRAWS, N, 3, seed=9, low=-2, high=2)
    predictive = Predictive(Stack(dist.Categorical, logits=logits), ragged_tasks())
    labels = TASK % 3
    expected = predictive.probabilities.log()
    padded = predictive.tasks.pad(labels)
    expected = expected.gather(-1, padded[..., None])[..., 0]
    torch.testing.assert_close(predictive.log_prob(padded), expected)
    torch.testing.assert_close(predictive.log_prob(labels), expected)
    draws = predictive.sample(5)
    assert draws.dtype == torch.int64
    assert draws.shape == (5, 4, 5)
    for refused in (
        lambda: predictive.mean,
        lambda: predictive.quantile(0.5),
        lambda: predictive.crps(labels),
        lambda: predictive.cdf(labels),
    ):
        with pytest.raises(UnsupportedModelError, match="Categorical"):
            refused()


def test_probabilities_of_numbers_are_refused():
    with pytest.raises(UnsupportedModelError, match="Normal"):
        _ = flat(FAMILIES["normal"][0]).probabilities


def test_y_that_no_component_can_produce_has_density_zero():
    assert torch.isneginf(flat(FAMILIES["poisson"][0]).log_prob(torch.full((N,), -1.0))).all()
    assert torch.isneginf(flat(FAMILIES["bernoulli"][0]).log_prob(torch.full((N,), 0.5))).all()
    labels = Stack(dist.Categorical, logits=torch.zeros(DRAWS, N, 3))
    assert torch.isneginf(flat(labels).log_prob(torch.full((N,), 7))).all()
    # Some components of a Uniform can produce y, others cannot.
    high = torch.arange(1.0, DRAWS + 1)[:, None].expand(DRAWS, N)
    uniforms = flat(Stack(dist.Uniform, low=torch.zeros(DRAWS, N), high=high))
    y = torch.full((N,), 4.5)
    expected = (1 / 5 + 1 / 6) / DRAWS
    torch.testing.assert_close(uniforms.log_prob(y).exp(), torch.full((N,), expected).double())
    cdf = (4 + 4.5 / 5 + 4.5 / 6) / DRAWS
    torch.testing.assert_close(uniforms.cdf(y), torch.full((N,), cdf).double())
    torch.testing.assert_close(uniforms.cdf(uniforms.quantile(0.3)), torch.full((N,), 0.3).double())


# Chunks


def everything(predictive, y):
    return [
        predictive.mean,
        predictive.variance,
        predictive.log_prob(y),
        predictive.log_prob(y, joint=True),
        predictive.quantile([0.1, 0.5]),
        predictive.cdf(y),
    ]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("cells", [1, 2 * N, 4 * N])
def test_chunks_change_nothing(name, cells, log_weights, monkeypatch):
    components, _, y = FAMILIES[name]
    whole = everything(flat(components, log_weights=log_weights), y)
    monkeypatch.setattr(mixtures, "_CELLS", cells)
    monkeypatch.setattr(mixtures, "_HELD", 1)
    components.asked.clear()
    parts = everything(flat(components, log_weights=log_weights), y)
    assert max(stop - start for start, stop in components.asked) == max(1, cells // N)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_blocks_of_rows_change_nothing(log_weights, monkeypatch):
    components, _, y = FAMILIES["student"]
    whole = flat(components, log_weights=log_weights)
    expected = [whole.quantile([0.1, 0.9]), whole.crps(y), whole.cdf(y)]
    monkeypatch.setattr(mixtures, "_HELD", 2 * 4002)  # two rows at a time
    for one, other in zip(
        [whole.quantile([0.1, 0.9]), whole.crps(y), whole.cdf(y)], expected, strict=True
    ):
        torch.testing.assert_close(one, other)


def test_many_draws_are_not_held_at_once(monkeypatch):
    monkeypatch.setattr(mixtures, "_CELLS", 10 * N)
    components = Stack(dist.Normal, loc=uniform(1000, N), scale=uniform(1000, N, low=0.5))
    predictive = flat(components)
    everything(predictive, torch.zeros(N))
    predictive.sample(50)
    assert max(stop - start for start, stop in components.asked) <= 10


def test_moments_are_computed_once():
    components = Stack(dist.Normal, loc=LOC, scale=SCALE)
    predictive = flat(components)
    _ = predictive.mean
    asked = len(components.asked)
    _ = predictive.variance, predictive.sd, predictive.mean
    assert len(components.asked) == asked


# Draws


def test_sample_has_the_moments_of_the_mixture(family, log_weights):
    # 9 rows · 14 cases; z of the mean beyond 4.5: probability 126 · 7e-6 = 9e-4 in all.
    components, _, _ = family
    predictive = flat(components, log_weights=log_weights)
    draws = predictive.sample(6000, seed=3).double()
    z = (draws.mean(0) - predictive.mean) / (predictive.sd / math.sqrt(6000))
    assert draws.shape == (6000, N)
    assert float(z.abs().max()) < 4.5


def test_rows_of_a_task_share_their_draw(log_weights):
    # Components far apart and narrow: the nearest one is the one that was drawn.
    far = 10.0 * torch.arange(DRAWS)[:, None].expand(DRAWS, N).double()
    components = Stack(dist.Normal, loc=far, scale=torch.full((DRAWS, N), 0.1).double())
    draws = flat(components, log_weights=log_weights).sample(3000)
    chosen = (draws / 10).round()
    for task in (0, 3):
        rows = chosen[:, task == TASK]
        assert torch.equal(rows, rows[:, :1].expand_as(rows))
    same = torch.equal(chosen[:, 0], chosen[:, 4])
    assert same == (log_weights is None)  # tasks share it only where the weights do
    # Frequencies: 6 components, 3 tasks, beyond 4.5 deviations has probability 2e-4 in all.
    for row, task in ((0, 0), (3, 2), (4, 3)):
        expected = torch.full((DRAWS,), 1 / DRAWS).double()
        if log_weights is not None:
            expected = log_weights[:, task].softmax(0)
        found = torch.bincount(chosen[:, row].long(), minlength=DRAWS) / 3000
        error = 4.5 * (expected * (1 - expected) / 3000).sqrt()
        assert bool(((found - expected).abs() <= error).all())


def test_sample_uses_every_component_before_any_again():
    far = 10.0 * torch.arange(DRAWS)[:, None].expand(DRAWS, N).double()
    components = Stack(dist.Normal, loc=far, scale=torch.full((DRAWS, N), 0.1).double())
    chosen = (flat(components).sample(2 * DRAWS) / 10).round()[:, 0]
    assert sorted(chosen[:DRAWS].tolist()) == sorted(chosen[DRAWS:].tolist()) == list(range(DRAWS))


@pytest.mark.parametrize("cells", [1, 20 * N, 100 * N])
def test_sample_in_small_ranges(cells, log_weights, monkeypatch):
    # z as in test_sample_has_the_moments_of_the_mixture.
    monkeypatch.setattr(mixtures, "_CELLS", cells)
    predictive = flat(FAMILIES["normal"][0], log_weights=log_weights)
    draws = predictive.sample(500, seed=3)
    z = (draws.mean(0) - predictive.mean) / (predictive.sd / math.sqrt(500))
    assert float(z.abs().max()) < 4.5
    assert len(draws.unique()) == draws.numel()  # no draw is used twice


def test_seeds():
    predictive = flat(FAMILIES["student"][0], log_weights=LOG_WEIGHTS, seed=5)
    assert torch.equal(predictive.sample(4), predictive.sample(4, seed=5))
    assert not torch.equal(predictive.sample(4), predictive.sample(4, seed=6))
    assert torch.equal(predictive.quantile(0.3), predictive.quantile(0.3))
    other = flat(FAMILIES["student"][0], log_weights=LOG_WEIGHTS, seed=6)
    assert not torch.equal(predictive.quantile(0.3), other.quantile(0.3))


def test_the_callers_state_is_untouched(family, untouched):
    components, _, y = family
    with untouched():
        predictive = flat(components, log_weights=LOG_WEIGHTS)
        everything(predictive, y)
        predictive.sample(3)
        predictive.crps(y)
        predictive.coverage(y, 0.5)


def test_no_gradients():
    components = Stack(dist.Normal, loc=LOC.clone().requires_grad_(), scale=SCALE)
    predictive = flat(components)
    y = torch.zeros(N)
    for found in (*everything(predictive, y), predictive.sample(3), predictive.crps(y)):
        assert not found.requires_grad


# Units


@pytest.mark.parametrize("name", ["normal", "student"])
def test_location_and_scale_are_those_of_a_rescaled_likelihood(name):
    a, b = -3.0, 2.5
    components, _, y = FAMILIES[name]
    moved = dict(components.parameters, loc=a + b * LOC, scale=b * SCALE)
    standard = flat(components, location=a, scale=b)
    direct = flat(Stack(components.family, **moved))
    y = a + b * y
    for one, other in zip(everything(standard, y), everything(direct, y), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(standard.sample(9), direct.sample(9))
    torch.testing.assert_close(standard.crps(y), direct.crps(y))
    assert torch.equal(standard.coverage(y, 0.5), direct.coverage(y, 0.5))


def test_the_volume_of_a_vector_has_a_factor_for_each_coordinate():
    components, y = vector_components(), uniform(N, 2, seed=8)
    found = flat(components, scale=3.0).log_prob(3.0 * y)
    torch.testing.assert_close(found, flat(components).log_prob(y) - 2 * math.log(3.0))


def test_an_exact_joint_density_is_used_in_the_units_of_the_data():
    seen = []

    def joint(y):
        seen.append(y)
        return torch.arange(4.0)

    components, _, y = FAMILIES["normal"]
    predictive = flat(components, joint=joint, location=1.0, scale=2.0)
    found = predictive.log_prob(1.0 + 2.0 * y, joint=True)
    torch.testing.assert_close(seen[0], y)
    expected = torch.arange(4.0) - torch.tensor(COUNTS) * math.log(2.0)
    torch.testing.assert_close(found, expected.double())


def test_float32_models_give_float64_results():
    components = Stack(dist.Normal, loc=LOC.float(), scale=SCALE.float())
    y = FAMILIES["normal"][2]
    one, other = flat(components), flat(FAMILIES["normal"][0])
    for found, expected in zip(everything(one, y), everything(other, y), strict=True):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert one.sample(2).dtype == torch.float32
    vectors = vector_components()
    vectors.parameters = {name: value.float() for name, value in vectors.parameters.items()}
    assert flat(vectors).log_prob(uniform(N, 2)).dtype == torch.float64


# Shapes


def test_padded_and_flat_results_agree(log_weights):
    components, _, y = FAMILIES["normal"]
    tasks = ragged_tasks()
    padded = Predictive(components, tasks, log_weights=log_weights)
    rows = flat(components, log_weights=log_weights)
    padded_y = torch.full((4, 5), torch.nan).double()
    padded_y[tasks.mask] = y
    padded_y[~tasks.mask] = 99.0  # what stands there is ignored
    for given in (y, padded_y):
        for name in ("log_prob", "cdf", "crps"):
            found = getattr(padded, name)(given)
            assert found.shape == (4, 5)
            torch.testing.assert_close(tasks.unpad(found), getattr(rows, name)(y))
        assert padded.coverage(given, 0.9).shape == (4, 5)
        assert padded.log_prob(given, joint=True).shape == (4,)
    assert padded.mean.shape == padded.sd.shape == padded.quantile(0.5).shape == (4, 5)
    assert padded.quantile([0.1, 0.5, 0.9]).shape == (3, 4, 5)
    assert padded.interval(0.9)[0].shape == (4, 5)
    torch.testing.assert_close(tasks.unpad(padded.sample(3), dim=1), rows.sample(3))
    vectors = Predictive(vector_components(), tasks)
    assert vectors.mean.shape == (4, 5, 2)
    assert vectors.quantile([0.1, 0.9]).shape == (2, 4, 5, 2)
    assert vectors.sample(3).shape == (3, 4, 5, 2)


class NeverAsked:
    n_draws = 3

    def distribution(self, start, stop):
        raise AssertionError("there are no rows to predict")


@pytest.mark.parametrize("joint", [None, NeverAsked().distribution])
def test_tasks_without_any_row(joint):
    tasks = Tasks.from_flat(torch.zeros(0, 1), None, torch.zeros(0).long(), 2)
    predictive = Predictive(NeverAsked(), tasks, joint=joint)
    y = torch.zeros(0)
    assert predictive.mean.shape == predictive.variance.shape == (2, 1)
    assert predictive.quantile([0.1, 0.9]).shape == (2, 2, 1)
    assert predictive.sample(5).shape == (5, 2, 1)
    assert predictive.log_prob(y).shape == predictive.crps(y).shape == predictive.cdf(y).shape
    assert predictive.coverage(y, 0.9).dtype == torch.bool
    assert predictive.log_prob(y, joint=True).tolist() == [0.0, 0.0]


# Infinite and unusable numbers


def test_student_t_without_variance():
    df = torch.full((DRAWS, N), 1.5).double()
    predictive = flat(Stack(dist.StudentT, df=df, loc=LOC, scale=SCALE))
    assert torch.isposinf(predictive.variance).all()
    torch.testing.assert_close(predictive.mean, LOC.mean(0))
    without_mean = flat(Stack(dist.StudentT, df=0.5 * df, loc=LOC, scale=SCALE))
    assert without_mean.mean.isnan().all()
    for found in (predictive, without_mean):
        lower, upper = found.interval(0.9)
        assert bool((lower.isfinite() & upper.isfinite() & (lower < upper)).all())


def test_a_cauchy_mixture_has_quantiles():
    predictive = flat(Stack(dist.Cauchy, loc=LOC, scale=SCALE))
    levels = [0.01, 0.5, 0.99]
    for level, found in zip(levels, predictive.quantile(levels), strict=True):
        torch.testing.assert_close(predictive.cdf(found), torch.full((N,), level).double())


def test_quantiles_of_components_far_apart():
    # Between the two F is flat at 0.5; at -1000 the spread is 1e-6 of the value.
    loc = torch.tensor([-1e3, 1e3]).double()[:, None].expand(2, N)
    predictive = flat(Stack(dist.Normal, loc=loc, scale=torch.full((2, N), 1e-3).double()))
    low, middle, high = predictive.quantile([0.25, 0.5, 0.75])
    torch.testing.assert_close(low, loc[0], rtol=1e-11, atol=0)
    torch.testing.assert_close(high, loc[1], rtol=1e-11, atol=0)
    assert bool((middle.abs() < 999).all())


def test_quantiles_stay_in_the_support():
    # Most of the first component's mass lies below 1e-8 and the second's near 10,000.
    shape = torch.tensor([1e-2, 1e4]).double()[:, None].expand(2, N)
    predictive = flat(Stack(dist.Gamma, concentration=shape, rate=torch.ones(2, N).double()))
    low, high = predictive.quantile([1e-6, 0.9])
    assert bool(((low >= 0) & (low < 1e-6)).all())
    torch.testing.assert_close(predictive.cdf(high), torch.full((N,), 0.9).double())


def test_a_transformed_distribution_has_moments_from_draws():
    # Logit-normal; 18 comparisons at 4.5 deviations of the mean, sd below 0.5.
    def family(loc, scale):
        base = dist.Normal(loc, scale)
        return dist.TransformedDistribution(base, [dist.transforms.SigmoidTransform()])

    predictive = flat(Stack(family, loc=LOC, scale=SCALE), log_weights=LOG_WEIGHTS)
    weights = torch.as_tensor(dense_weights(LOG_WEIGHTS))
    nodes, heights = np.polynomial.hermite_e.hermegauss(60)
    values = torch.sigmoid(LOC[..., None] + SCALE[..., None] * torch.as_tensor(nodes))
    mean = (values * torch.as_tensor(heights / heights.sum())).sum(-1)
    expected = (weights * mean).sum(0)
    error = 4.5 * 0.5 * (DRAWS * (weights**2).sum(0) / 4000).sqrt()
    assert bool(((predictive.mean - expected).abs() <= error).all())
    torch.testing.assert_close(
        predictive.cdf(predictive.quantile(0.2)), torch.full((N,), 0.2).double()
    )


def test_a_weight_of_zero_silences_its_draw():
    loc, scale = LOC.clone(), SCALE.clone()
    loc[1] = 1e6
    log_weights = torch.zeros(DRAWS, 4).double()
    log_weights[1] = -torch.inf
    found = flat(Stack(dist.Normal, loc=loc, scale=scale), log_weights=log_weights)
    keep = [0, 2, 3, 4, 5]
    expected = flat(Stack(dist.Normal, loc=loc[keep], scale=scale[keep]))
    y = torch.zeros(N)
    for one, other in zip(everything(found, y), everything(expected, y), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_parameters_that_are_not_finite_name_the_task(bad):
    loc = LOC.clone()
    loc[4, 3] = bad  # row 3 is the only row of task "c"
    predictive = flat(
        Stack(lambda **p: dist.Normal(**p, validate_args=False), loc=loc, scale=SCALE)
    )
    for use in (
        lambda: predictive.mean,
        lambda: predictive.log_prob(torch.zeros(N)),
        lambda: predictive.sample(20),
        lambda: predictive.quantile(0.5),
    ):
        with pytest.raises(ConvergenceError, match=r"loc of Normal.*task 'c'"):
            use()


def test_masked_likelihoods_are_seen_through():
    mask = torch.zeros(DRAWS, N, dtype=torch.bool)

    def family(loc, scale):
        return dist.Normal(loc, scale).mask(mask[: len(loc)])

    y = torch.zeros(N)
    masked, plain = flat(Stack(family, loc=LOC, scale=SCALE)), flat(FAMILIES["normal"][0])
    for one, other in zip(everything(masked, y), everything(plain, y), strict=True):
        torch.testing.assert_close(one, other)


def test_weights_are_checked():
    components = FAMILIES["normal"][0]
    with pytest.raises(DataError, match=r"\(6, 4\)"):
        flat(components, log_weights=torch.zeros(DRAWS, N))
    bad = torch.zeros(DRAWS, 4)
    bad[0, 2] = torch.nan
    with pytest.raises(ConvergenceError, match="task 'c'"):
        flat(components, log_weights=bad)


def test_a_forgotten_event_dimension_is_found():
    components = Stack(dist.Normal, loc=torch.zeros(DRAWS, N, 2), scale=torch.ones(DRAWS, N, 2))
    with pytest.raises(ProgramError, match="to_event"):
        _ = flat(components).mean


def test_arguments_are_checked():
    predictive = flat(FAMILIES["normal"][0])
    with pytest.raises(DataError, match="positive scale"):
        flat(FAMILIES["normal"][0], scale=0.0)
    with pytest.raises(DataError, match=r"\(4, 5\), padded, or \(9,\), flat"):
        predictive.log_prob(torch.zeros(4, 4))
    with pytest.raises(DataError, match="task 'd'"):
        predictive.log_prob(torch.where(torch.arange(N) == 6, torch.nan, torch.zeros(N)))
    with pytest.raises(DataError, match=r"0\.9, not 90"):
        predictive.interval(90)
    with pytest.raises(DataError, match=r"0\.9, not 90"):
        predictive.quantile([0.5, 1.0])
    with pytest.raises(DataError, match="n of 1 or more"):
        predictive.sample(0)


def test_repr():
    assert repr(flat(FAMILIES["normal"][0])) == "Predictive(4 tasks, 9 points, 6 draws)"
