import numpy as np
import pytest
import torch
from scipy import stats

from hbmeta.errors import DataError
from hbmeta.tasks import GaussianProcessTasks
from tests.reference import kernel_matrix

KERNELS = ["rbf", "matern12", "matern32", "matern52", "periodic"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_y_has_the_covariance_of_its_truth(kernel):
    # L⁻¹ y of each task's dense covariance, support and query together, is standard normal: about
    # 5,400 numbers, mean and variance within 4.5 standard errors, and neighbours uncorrelated; a
    # false alarm of 2e-5 per kernel.
    family = GaussianProcessTasks(
        kernel=kernel, scale=(0.5, 2.0), noise=(0.05, 0.5), period=(1.0, 3.0), shots=(0, 12)
    )
    episode, truth = family.sample_with_truth(200, seed=5)
    both = episode.all
    white, neighbours = [], []
    for i in range(both.n_tasks):
        at = {name: float(values[i]) for name, values in truth.items()}
        rows = both.task == i
        x, y = both.flat_x[rows, 0].numpy(), both.flat_y[rows].numpy()
        covariance = at["scale"] ** 2 * kernel_matrix(kernel, x, x, **at)
        covariance += at["noise"] ** 2 * np.eye(len(x))
        z = np.linalg.solve(np.linalg.cholesky(covariance), y)
        white.append(z)
        neighbours.append(z[1:] * z[:-1])
    z, products = np.concatenate(white), np.concatenate(neighbours)
    assert abs(z.mean()) < 4.5 / len(z) ** 0.5
    assert abs(z.var() - 1) < 4.5 * (2 / len(z)) ** 0.5
    assert abs(products.mean()) < 4.5 / len(products) ** 0.5


def test_hyperparameters_are_uniform_and_inputs_too():
    # Kolmogorov-Smirnov at 1e-5 each; a false alarm of 4e-5.
    family = GaussianProcessTasks(lengthscale=(0.5, 2.0), noise=(0.0, 0.3), scale=3.0, queries=1)
    episode, truth = family.sample_with_truth(1000, seed=0)
    assert set(truth) == {"lengthscale", "scale", "noise"}
    assert truth["scale"].eq(3.0).all()
    assert stats.kstest(truth["lengthscale"], "uniform", (0.5, 1.5)).pvalue > 1e-5
    assert stats.kstest(truth["noise"], "uniform", (0.0, 0.3)).pvalue > 1e-5
    for part in (episode.support, episode.query):
        assert stats.kstest(part.flat_x[:, 0], "uniform", (-2.0, 4.0)).pvalue > 1e-5
    assert set(episode.support.counts.tolist()) == set(range(3, 21))  # missed once in 1e23 tries
    assert set(GaussianProcessTasks(kernel="periodic").sample_with_truth(1, seed=0)[1]) == {
        *truth,
        "period",
    }


def test_without_noise_equal_inputs_have_nearly_equal_outputs():
    """The jitter of 1e-8 scale² keeps 120 rows on a short stretch from being singular."""
    family = GaussianProcessTasks(
        noise=0.0, scale=2.0, lengthscale=1.0, low=0.0, high=1e-3, shots=100
    )
    y = family.sample(3, seed=0).all.y
    # 360 draws of N(0, 4e-8) around f, within 6 sd (a false alarm of 7e-7), and f itself changes by
    # less than 6 sd of its slope, which is 2 per unit of x.
    assert y.isfinite().all()
    assert float((y - y.mean(1, keepdim=True)).abs().max()) < 6 * 2e-4 + 6 * 2e-3
    assert float(y.std(1).min()) > 1e-5


def test_dtype_is_that_of_the_data_only():
    """float32 rounds x first, and y is drawn in float64 at the rounded x."""
    wide, truth = GaussianProcessTasks(shots=3).sample_with_truth(5, seed=0)
    narrow, same = GaussianProcessTasks(shots=3, dtype=torch.float32).sample_with_truth(5, seed=0)
    assert narrow.query.dtype == narrow.query.flat_y.dtype == torch.float32
    assert torch.equal(truth["lengthscale"], same["lengthscale"])
    torch.testing.assert_close(narrow.query.flat_y.double(), wide.query.flat_y, atol=1e-4, rtol=0)


def test_no_rows_at_all():
    episode = GaussianProcessTasks(shots=0, queries=(0, 1)).sample(20, seed=0)
    assert episode.support.n_points == 0
    assert set(episode.query.counts.tolist()) == {0, 1}  # missed once in 5e5 tries


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": "RBF"}, "'matern12', 'matern32', 'matern52', 'periodic'; found 'RBF'"),
        ({"kernel": ["rbf"]}, r"found \['rbf'\]"),
        ({"lengthscale": 0.0}, "lengthscale as a finite number above 0"),
        ({"lengthscale": (1.0, 0.5)}, r"found \(1.0, 0.5\)"),
        ({"scale": (0.0, 1.0)}, "scale as a finite number above 0"),
        ({"noise": -0.1}, "noise as a finite number of at least 0"),
        ({"period": float("inf")}, "period as a finite number above 0"),
        ({"low": 2.0}, "low=2.0, high=2.0"),
        ({"shots": -1}, "shots as a number of rows"),
        ({"queries": 0.5}, "queries as a number of rows"),
        ({"dtype": torch.float16}, "found torch.float16"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(DataError, match=message) as caught:
        GaussianProcessTasks(**arguments)
    assert caught.value.where == "GaussianProcessTasks"
