import pytest
import torch
from scipy import stats

from hbmeta.errors import DataError
from hbmeta.tasks import Clusters


def test_the_means_are_uniform_on_the_disk():
    # (r/R)² and the angle are uniform, without dependence: three tests at 1e-5 each.
    _, truth = Clusters(radius=2.0, shots=1, queries=1).sample_with_truth(1000, seed=0)
    means = truth["means"].flatten(0, 1)
    share = means.square().sum(-1) / 4.0
    angle = torch.atan2(means[:, 1], means[:, 0])
    assert stats.kstest(share, "uniform").pvalue > 1e-5
    assert stats.kstest(angle, "uniform", (-torch.pi, 2 * torch.pi)).pvalue > 1e-5
    assert stats.spearmanr(share, angle).pvalue > 1e-5


def test_the_points_lie_around_their_means():
    # 12,000 residuals: means, variances and covariance within 4.5 standard errors; five
    # comparisons, a false alarm of 3.5e-5.
    family = Clusters(ways=3, shots=5, queries=15, noise=0.5, dtype=torch.float64)
    episode, truth = family.sample_with_truth(200, seed=1)
    rows = [p.flat_x - truth["means"][p.task, p.flat_y] for p in (episode.support, episode.query)]
    residual = torch.cat(rows)
    n = len(residual)
    assert n == 12_000
    assert (residual.mean(0).abs() < 4.5 * 0.5 / n**0.5).all()
    covariance = residual.T.cov()
    assert ((covariance.diagonal() - 0.25).abs() < 4.5 * 0.25 * (2 / n) ** 0.5).all()
    assert abs(float(covariance[0, 1])) < 4.5 * 0.25 / n**0.5


def test_classes_are_balanced_and_in_no_order():
    # The label at each place of the support is uniform: chi-square with 2 degrees of freedom at 6
    # places, each at 1e-5, a false alarm of 6e-5. Neither is the next label the same more often
    # than it must be: (shots − 1) / (rows − 1) = 1/5.
    episode = Clusters(ways=3, shots=2, queries=4).sample(3000, seed=0)
    labels = episode.support.y
    assert labels.dtype == torch.int64
    for part, each in ((episode.support, 2), (episode.query, 4)):
        counts = torch.nn.functional.one_hot(part.y, 3).sum(1)
        assert counts.eq(each).all()
    for place in range(6):
        counts = torch.bincount(labels[:, place], minlength=3)
        assert stats.chisquare(counts).pvalue > 1e-5
    same = int((labels[:, 0] == labels[:, 1]).sum())
    assert stats.binomtest(same, 3000, 0.2).pvalue > 1e-5


def test_layout():
    episode, truth = Clusters(ways=4, shots=0, queries=2).sample_with_truth(3, seed=0)
    assert truth["means"].shape == (3, 4, 2)
    assert truth["means"].dtype == torch.float64
    assert episode.support.n_points == 0
    assert episode.query.features == ("x0", "x1")
    assert episode.query.dtype == torch.float32
    assert episode.query.y.shape == (3, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ways": 1}, "ways as a number of classes, at least 2; found 1"),
        ({"ways": 2.0}, "found 2.0"),
        ({"shots": -1}, "shots as a number of rows per class, at least 0"),
        ({"shots": (1, 5)}, r"found \(1, 5\)"),
        ({"queries": True}, "found True"),
        ({"radius": 0.0}, "radius as a finite number above 0"),
        ({"radius": (1.0, 2.0)}, "radius as a finite number above 0"),
        ({"noise": 0.0}, "noise as a finite number above 0"),
        ({"noise": float("nan")}, "found nan"),
        ({"dtype": torch.int64}, "found torch.int64"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(DataError, match=message) as caught:
        Clusters(**arguments)
    assert caught.value.where == "Clusters"
