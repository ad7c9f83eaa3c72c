"""Figures of single tasks: what is drawn is what was predicted."""

import math

import matplotlib as mpl

mpl.use("Agg")
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from hbmeta import inference, panels, tasks
from hbmeta.densities import Delta, Empirical, Gaussian
from hbmeta.drawing import view_of
from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.posterior import TaskPosterior
from hbmeta.predictive import Predictive
from hbmeta.styles import class_style
from tests import fits

GRID = np.linspace(-2.0, 2.0, 21)


class Fixed:
    """One likelihood, the same whatever the draws."""

    n_draws = 1

    def __init__(self, family):
        self.family = family

    def distribution(self, start, stop):
        return self.family


def line_tasks(**settings):
    """The grid for tasks "a" and "b", its rows shuffled."""
    order = np.random.default_rng(0).permutation(len(GRID))
    x = np.stack([GRID[order], 10 + GRID[order]])[..., None]
    return tasks.Tasks(x, ids=["a", "b"], features=["dose"], **settings)


def bell(slope, sd, **settings):
    grid = line_tasks()
    mean = slope * grid.flat_x[:, 0]
    return Predictive(Fixed(dist.Normal(mean[None], sd)), grid, location=5.0, scale=2.0, **settings)


SUPPORT = tasks.Tasks(
    [[[-1.0], [0.5]], [[9.0], [11.0]]], [[-1.0, 0.2], [0.0, 1.0]], ids=["a", "b"], features=["dose"]
)


def line_of(axis, marker):
    (found,) = [x for x in axis.get_lines() if x.get_marker() == marker]
    return np.asarray(found.get_xdata()), np.asarray(found.get_ydata())


# Bands


@pytest.mark.parametrize("padded", [True, False])
def test_bands_are_the_mean_and_the_quantiles_in_units_of_y(padded):
    truth = {"f": (GRID[::-1], GRID[::-1] ** 2)}
    figure = panels.bands(
        {"nuts": bell(1.0, 0.3, padded=padded), "maml": bell(-1.0, 0.3, padded=padded)},
        SUPPORT, query=SUPPORT, truth=truth, task="a", levels=(0.9, 0.5), labels=("x (mg)", None),
    )  # fmt: skip
    left, right = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["nuts", "maml"]
    assert left.get_ylim() == right.get_ylim()
    assert left.get_xlabel() == "x (mg)"
    assert left.get_ylabel() == "y"
    mean = left.get_lines()[0]
    np.testing.assert_allclose(mean.get_xdata(), GRID)
    np.testing.assert_allclose(mean.get_ydata(), 5 + 2 * GRID)
    # The outer band first: 5 + 2 (x ± 1.645 · 0.3).
    for band, z in zip(left.collections, stats.norm.ppf([0.95, 0.75]), strict=True):
        corners = band.get_paths()[0].vertices
        top = max(y for x, y in corners if abs(x - 2.0) < 1e-9)
        assert top == pytest.approx(5 + 2 * (2.0 + 0.3 * z), abs=1e-6)
    x, y = line_of(left, "o")
    np.testing.assert_allclose((x, y), ([-1.0, 0.5], [3.0, 5.4]))
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["mean", "50 % interval", "90 % interval", "support", "held out", "f"]


def test_a_runaway_strategy_does_not_squeeze_the_others():
    wild = bell(1e6, 0.3)
    figure = panels.bands({"a": bell(1.0, 0.3), "wild": wild}, SUPPORT, task="a")
    low, high = figure.axes[0].get_ylim()
    assert -20 < low < 0 < 10 < high < 30  # the bulk is 5 ± 5
    assert len(line_of(figure.axes[1], "^")[0]) == 1  # cut off above, and below
    assert len(line_of(figure.axes[1], "v")[0]) == 1
    assert not [x for x in figure.axes[0].get_lines() if x.get_marker() == "^"]


def test_bands_of_another_task():
    figure = panels.bands({"a": bell(1.0, 0.3)}, SUPPORT, task="b")
    assert figure.axes[0].get_xlim() == (8.0, 12.0)


def test_views():
    assert view_of([(0.0, 1.0), (0.2, 0.8), (-0.1, 1.1)]) == pytest.approx((-0.16, 1.16))
    low, high = view_of([(0.0, 1.0), (-1e9, 1e9)])  # a quarter of the width to each side
    assert (low, high) == pytest.approx((-0.325, 1.325))
    assert view_of([(3.0, 3.0), (7.0, 7.0)]) == pytest.approx((2.8, 7.2))
    assert view_of([(0.0, 1.0)], keep=(5.0, 6.0)) == pytest.approx((-0.3, 6.3))
    low, high = view_of([(3.0, 3.0)])
    assert low < 3.0 < high
    assert view_of([(math.nan, math.inf)]) == (0.0, 1.0)


# Regions


def square_tasks():
    values = torch.linspace(-1.0, 1.0, 9, dtype=torch.float64)
    x = torch.cartesian_prod(values, values)[torch.randperm(81, generator=torch.Generator())]
    return tasks.Tasks(x[None], ids=["a"], features=["u", "v"])


def classifier(logits, grid):
    return Predictive(Fixed(dist.Categorical(logits=logits[None])), grid)


CLASSES = tasks.Tasks(
    [[[-0.5, 0.0], [0.5, 0.2], [0.4, 0.1]]], torch.tensor([[0, 1, 1]]), ids=["a"],
    features=["u", "v"],
)  # fmt: skip


def test_regions_have_the_hue_of_the_most_probable_class():
    grid = square_tasks()
    u = grid.flat_x[:, 0]
    sharp = classifier(torch.stack([-20 * u, 20 * u, u - 90], -1), grid)
    even = classifier(torch.zeros(81, 3, dtype=torch.float64), grid)
    figure = panels.regions({"sharp": sharp, "even": even}, CLASSES, query=CLASSES)
    left, right = figure.axes
    (mesh,) = [x for x in left.collections if x.__class__.__name__ == "QuadMesh"]
    colours = np.asarray(mesh.get_array())  # (v, u, rgb)
    assert colours.shape == (9, 9, 3)
    for k, column in ((0, 0), (1, 8)):
        expected = 1 - 0.65 * (1 - np.array(mpl.colors.to_rgb(class_style(k)[0])))
        np.testing.assert_allclose(colours[:, column], np.tile(expected, (9, 1)), atol=1e-6)
    (mesh,) = [x for x in right.collections if x.__class__.__name__ == "QuadMesh"]
    assert np.asarray(mesh.get_array()).min() > 0.94  # no class is more probable: nearly white
    marks = {x.get_marker(): len(x.get_xdata()) for x in left.get_lines() if x.get_mec() == "black"}
    assert marks == {class_style(0)[1]: 1, class_style(1)[1]: 2}
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["class 0", "class 1", "class 2", "held out"]
    assert left.get_xlabel() == "u"
    assert left.get_ylabel() == "v"


def test_classes_differ_in_colour_or_marker():
    assert len({class_style(k) for k in range(56)}) == 56
    assert len({class_style(k)[0] for k in range(8)}) == 8


# Densities


def gaussian(loc, tril):
    """q(φ) of a program whose site is φ itself, two coordinates, tasks "a" to "f"."""
    fit = fits.fit(inference.MAML(), program=fits.Heads())
    n = len(fit.tasks.ids)
    density = Gaussian(loc.expand(n, 2).clone(), tril.expand(n, 2, 2).clone())
    return TaskPosterior(fit.problem, fit.theta, density, fit.tasks)


@pytest.fixture(scope="module")
def posteriors():
    loc = torch.tensor([0.5, -1.0], dtype=torch.float64)
    tril = torch.tensor([[1.0, 0.0], [0.5, 0.2]], dtype=torch.float64)
    exact = gaussian(loc, tril)
    noise = torch.randn(
        4000, *exact.density.loc.shape, generator=torch.Generator().manual_seed(0)
    ).double()

    def like(density):
        return TaskPosterior(exact.problem, exact.theta, density, exact.support)

    return {
        "exact": exact,
        "nuts": like(Empirical(exact.density.draw(noise))),
        "weighted": like(Empirical(exact.density.draw(noise), noise[..., 0])),
        "maml": like(Delta(exact.density.loc + 0.3)),
        "no_pooling": like(Delta(exact.density.loc + 1e6)),
    }


def curve(axis, colour):
    (found,) = [x for x in axis.get_lines() if x.get_color() == colour and len(x.get_xdata()) > 9]
    return np.asarray(found.get_xdata()), np.asarray(found.get_ydata())


def test_densities_are_exact_for_gaussians_and_smooth_for_draws(posteriors):
    chosen = {name: posteriors[name] for name in ("exact", "nuts")}
    figure = panels.densities(chosen, task="b")
    first, second, _ = figure.axes
    for axis, mean, sd in ((first, 0.5, 1.0), (second, -1.0, math.hypot(0.5, 0.2))):
        x, y = curve(axis, "#009E73")
        np.testing.assert_allclose(y, stats.norm(mean, sd).pdf(x), rtol=1e-6)
        x, y = curve(axis, "#000000")
        # Five times the error of the height of smoothed draws, √(f / (2 √π n h)) = 0.03 f, and
        # the 5 % that smoothing lowers the peak by.
        np.testing.assert_allclose(y, stats.norm(mean, sd).pdf(x), atol=0.2 * 0.4 / sd)
    assert first.get_xlabel() == "head[0]"
    assert figure.legends[0].get_title().get_text().startswith("task b")


def test_the_joint_region_holds_its_probability(posteriors):
    figure = panels.densities({"exact": posteriors["exact"]}, task="b")
    covariance = np.array([[1.0, 0.5], [0.5, 0.29]])
    rings = [np.stack(x.get_data(), -1) for x in figure.axes[2].get_lines()]
    for ring, mass in zip(rings, (0.5, 0.9), strict=True):
        offset = ring - [0.5, -1.0]
        squared = np.einsum("ni,ij,nj->n", offset, np.linalg.inv(covariance), offset)
        np.testing.assert_allclose(squared, stats.chi2(2).ppf(mass), rtol=1e-6)


def test_draws_have_regions_of_the_same_size(posteriors):
    figure = panels.densities({"nuts": posteriors["nuts"]}, task="b")
    (contours,) = figure.axes[2].collections
    covariance = np.array([[1.0, 0.5], [0.5, 0.29]])
    inner, outer = contours.get_paths()[::-1]  # the higher level lies inside
    for path, mass in ((inner, 0.5), (outer, 0.9)):
        offset = path.vertices - [0.5, -1.0]
        squared = np.einsum("ni,ij,nj->n", offset, np.linalg.inv(covariance), offset)
        # Smoothing widens them, more in the narrow direction.
        assert np.median(squared) == pytest.approx(stats.chi2(2).ppf(mass), rel=0.35)


def test_weights_move_a_density(posteriors):
    """Weights exp(ε₀) turn N(0, 1) into N(1, 1): the first coordinate moves by one."""
    figure = panels.densities({"weighted": posteriors["weighted"]}, task="b", coordinates=[0])
    (axis,) = figure.axes
    x, y = curve(axis, axis.get_lines()[0].get_color())
    # 4000 / e draws count: the standard error is 0.026, and five of them 0.13.
    assert np.trapezoid(x * y, x) / np.trapezoid(y, x) == pytest.approx(1.5, abs=0.13)


def test_points_are_lines_and_runaways_arrows(posteriors):
    figure = panels.densities(posteriors, task="b", site="head", labels=["left", "right"])
    first, _, joint = figure.axes
    x, _ = line_of(first, "D")
    assert x == pytest.approx([0.8])
    low, high = first.get_xlim()
    assert -8 < low < -2 < 3 < high < 9
    assert len(line_of(first, ">")[0]) == 1
    x, y = line_of(joint, "D")
    np.testing.assert_allclose((x, y), ([0.8], [-0.7]))
    assert line_of(joint, ">")[0] == pytest.approx([joint.get_xlim()[1]])
    assert (joint.get_xlabel(), joint.get_ylabel()) == ("left", "right")


def test_densities_of_a_site_of_one_coordinate_and_of_points_alone():
    one = fits.fitted("ExactLinear").posterior
    assert len(panels.densities({"exact": one}).axes) == 1
    panels.densities({"maml": fits.fitted("MAML").posterior}, task="c")


# Learning curves


def test_learning_curves_have_an_axis_each():
    given = {name: fits.fitted(name) for name in ("MAML", "ExactLinear", "AmortizedGuide")}
    figure = panels.learning_curves(given, window=4)
    assert len(figure.axes) == 2
    assert figure.axes[0].get_title() == "MAML, mean of 4 steps"
    raw, smooth = figure.axes[0].get_lines()
    history = np.array(fits.fitted("MAML").history)
    np.testing.assert_allclose(raw.get_ydata(), history)
    assert smooth.get_ydata()[0] == pytest.approx(history[:4].mean())
    assert raw.get_alpha() < 0.5
    assert len(panels.learning_curves({f"fit {i}": given["MAML"] for i in range(4)}).axes) == 4


# What is refused


def test_figures_are_saved_and_settings_stay(tmp_path, untouched):
    before = dict(mpl.rcParams)
    with untouched():
        figure = panels.bands({"a": bell(1.0, 0.3)}, SUPPORT)
        figure.savefig(tmp_path / "bands.png")
        panels.densities({"exact": fits.fitted("ExactLinear").posterior})
    assert dict(mpl.rcParams) == before


def test_what_cannot_be_drawn_is_refused(posteriors):
    for function in (panels.bands, panels.regions):
        with pytest.raises(DataError, match="one or more by name"):
            function({}, SUPPORT)
    good = {"a": bell(1.0, 0.3)}
    with pytest.raises(DataError, match="'z'"):
        panels.bands(good, SUPPORT, task="z")
    with pytest.raises(DataError, match="levels between 0 and 1"):
        panels.bands(good, SUPPORT, levels=(90,))
    with pytest.raises(DataError, match=r"levels between 0 and 1; found 0\.9"):
        panels.bands(good, SUPPORT, levels=0.9)
    with pytest.raises(DataError, match=r"found Fitted 'a'.*posterior\.predict\(grid\)"):
        panels.bands({"a": fits.fitted("ExactLinear")}, SUPPORT)
    with pytest.raises(DataError, match="predictives by name; found Predictive"):
        panels.bands(good["a"], SUPPORT)
    with pytest.raises(DataError, match="of one length; found 2 and 3 numbers"):
        panels.bands(good, SUPPORT, truth={"f": ([0, 1], [1, 2, 3])})
    with pytest.raises(DataError, match="found Tensor for 'f'"):
        panels.bands(good, SUPPORT, truth={"f": torch.zeros(2)})
    with pytest.raises(DataError, match="points with y"):
        panels.bands(good, line_tasks())
    grid = square_tasks()
    even = classifier(torch.zeros(81, 3, dtype=torch.float64), grid)
    with pytest.raises(DataError, match="81 rows of 2 features in 'even'"):
        panels.bands({"even": even}, CLASSES)
    with pytest.raises(DataError, match="21 rows of 1 features"):
        panels.regions(good, SUPPORT)
    part = grid.keep(torch.arange(81) > 0)
    with pytest.raises(DataError, match="80 rows of 9 and 9"):
        panels.regions({"part": classifier(torch.zeros(80, 3), part)}, CLASSES)
    flat = Predictive(Fixed(dist.Normal(torch.zeros(1, 81), 1.0)), grid)
    with pytest.raises(UnsupportedModelError, match="Bernoulli"):
        panels.regions({"normal": flat}, CLASSES)
    with pytest.raises(DataError, match="a posterior or more"):
        panels.densities({})
    with pytest.raises(DataError, match="'z9'"):
        panels.densities(posteriors, task="z9")
    for coordinates in ([2], [0, 0], [-1], [], [0, 1, 0]):
        with pytest.raises(DataError, match="one or two coordinates"):
            panels.densities(posteriors, coordinates=coordinates)
    with pytest.raises(DataError, match="training history"):
        panels.learning_curves({"exact": fits.fitted("ExactLinear")})
    with pytest.raises(DataError, match="window from 1 to 20"):
        panels.learning_curves({"maml": fits.fitted("MAML")}, window=21)
