import pytest
import torch

from hbmeta.errors import DataError
from hbmeta.tasks import LinearTasks

MEAN = [1.0, -0.5]
COVARIANCE = [[1.0, 0.3], [0.3, 0.5]]


def test_moments_of_the_family():
    # 4,000 tasks: means, covariances and noise within 4.5 standard errors. Seven comparisons, each
    # false once in 147,000 tries: a false alarm of 5e-5.
    n = 4000
    family = LinearTasks(MEAN, COVARIANCE, noise=0.4, shots=3, queries=0)
    episode, phi = family.sample_with_truth(n, seed=0)
    mean, covariance = torch.tensor(MEAN).double(), torch.tensor(COVARIANCE).double()
    variance = covariance.diagonal()
    assert ((phi.mean(0) - mean).abs() < 4.5 * (variance / n).sqrt()).all()
    # var of a sample covariance: (Σ_jj Σ_kk + Σ_jk²) / n
    error = ((variance[:, None] * variance + covariance**2) / n).sqrt()
    assert ((phi.T.cov() - covariance).abs() < 4.5 * error).all()
    support = episode.support
    residual = support.flat_y - (support.flat_x * phi[support.task]).sum(1)
    m = len(residual)
    assert abs(residual.mean()) < 4.5 * 0.4 / m**0.5
    assert abs(residual.var() - 0.16) < 4.5 * 0.16 * (2 / m) ** 0.5


def test_inputs_are_uniform_with_an_intercept():
    # 10,000 uniforms on [-1, 3]: mean 1 and variance 16/12 within 4.5 standard errors
    # (variance of the sample variance: 256/180/n); a false alarm of 1.4e-5.
    family = LinearTasks(MEAN, COVARIANCE, noise=1.0, shots=100, low=-1.0, high=3.0)
    support = family.sample(100, seed=0).support
    assert support.features == ("intercept", "x0")
    assert support.flat_x[:, 0].eq(1).all()
    x = support.flat_x[:, 1]
    assert -1 <= float(x.min()) < float(x.max()) <= 3
    assert abs(float(x.mean()) - 1) < 4.5 * (16 / 12 / 1e4) ** 0.5
    assert abs(float(x.var()) - 16 / 12) < 4.5 * (256 / 180 / 1e4) ** 0.5
    plain = LinearTasks(MEAN, COVARIANCE, noise=1.0, intercept=False).sample(2, seed=0)
    assert plain.support.features == ("x0", "x1")
    assert not plain.support.flat_x.eq(1).any()


def test_numbers_of_rows():
    fixed = LinearTasks(MEAN, COVARIANCE, noise=0.1, shots=5, queries=10).sample(4, seed=0)
    assert fixed.support.counts.tolist() == [5] * 4
    assert fixed.query.counts.tolist() == [10] * 4
    assert fixed.support.dtype == torch.float64
    ragged = LinearTasks(MEAN, COVARIANCE, noise=0.1, shots=(0, 3)).sample(200, seed=0)
    assert set(ragged.support.counts.tolist()) == {0, 1, 2, 3}  # missed once in 1e25 tries


def test_a_singular_covariance_is_allowed():
    _, phi = LinearTasks(MEAN, [[1.0, 2.0], [2.0, 4.0]], noise=0.1).sample_with_truth(50, seed=0)
    assert torch.allclose(phi[:, 1] + 0.5, 2 * (phi[:, 0] - 1))
    _, same = LinearTasks(MEAN, [[0.0, 0.0], [0.0, 0.0]], noise=0.1).sample_with_truth(3, seed=0)
    assert torch.equal(same, torch.tensor([MEAN] * 3).double())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"covariance": [[1.0, 2.0], [2.0, 1.0]]}, "smallest eigenvalue -1"),
        ({"covariance": [[1.0, 0.5], [0.0, 1.0]]}, "asymmetric"),
        ({"covariance": [[1.0]]}, r"shapes \(2,\) and \(1, 1\)"),
        ({"covariance": [[float("nan"), 0.0], [0.0, 1.0]]}, "finite mean and covariance"),
        ({"noise": 0.0}, "found 0.0"),
        ({"noise": float("nan")}, "found nan"),
        ({"low": 2.0}, "low=2.0, high=2.0"),
        ({"shots": -1}, "shots as a number of rows"),
        ({"shots": 1.5}, "shots as a number of rows"),
        ({"queries": (3, 2)}, "queries as a number of rows"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(DataError, match=message):
        LinearTasks(**{"mean": MEAN, "covariance": COVARIANCE, "noise": 0.1} | arguments)
