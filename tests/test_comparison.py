import dataclasses
import json
import math
import warnings

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch

from hbmeta import inference, models, plots, tasks
from hbmeta.comparison import Comparison, compare
from hbmeta.densities import Delta, Gaussian
from hbmeta.distances import Distance, distance_between, shared_sites
from hbmeta.errors import DataError, FileError
from hbmeta.predictive import Predictive
from hbmeta.rows import Row, Score
from hbmeta.scores import crps_normal
from hbmeta.tables import aligned, digits_for, plus_minus

LEVELS = (0.5, 0.9)
QUIET = {"progress": False, "seed": 0}


@pytest.fixture(scope="module")
def data():
    """7 groups of 1 to 9 rows, y in units of its own (10 + 5 z); one group has no query."""
    random = np.random.default_rng(0)
    counts = (1, 4, 5, 6, 7, 8, 9)
    group = np.repeat([f"g{i}" for i in range(len(counts))], counts)
    x = random.normal(size=len(group))
    effect = np.repeat(random.normal(size=len(counts)), counts)
    y = 10 + 5 * (effect + 0.5 * x + 0.5 * random.normal(size=len(group)))
    frame = pd.DataFrame({"group": group, "x": x, "y": y})
    return tasks.from_frame(frame, group="group", x="x", y="y", standardise=["y"]).split(
        support=0.6, seed=1
    )


@pytest.fixture(scope="module")
def model():
    return models.VaryingEffects(fixed=["x"])


@pytest.fixture(scope="module")
def fits(data, model):
    settings = {"compile": "graph", "seed": 0, "progress": False}
    strategy = inference.NUTS(draws=600, warmup=300, chains=4, target_accept=0.95, processes=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no test here needs it to have converged
        # Thousands of gradients: compiling them takes seconds, not doing so half a minute.
        nuts = strategy.fit(model, data, seed=0, progress=False)
    return {
        "nuts": nuts,
        "exact": inference.ExactLinear().fit(model, data, **settings),
        "no_pooling": inference.NoPooling().fit(model, data, **settings),
    }


@pytest.fixture(scope="module")
def compared(fits, data):
    return compare(fits, data, reference="nuts", levels=LEVELS)


def by_hand(fitted, data):
    """Scores of a Gaussian fit, row by row, in the units of the table."""
    episode = data.episode
    posterior = fitted.posterior_of(episode.support)
    predictive = posterior.predict(episode.query)
    location, scale = data.schema.y_location, data.schema.y_scale
    out = []
    for i in range(episode.n_tasks):
        task = []
        for j in range(int(episode.query.counts[i])):
            y = location + scale * float(episode.query.y[i, j])
            mean, sd = float(predictive.mean[i, j]), float(predictive.sd[i, j])
            z = (y - mean) / sd
            # |z| of a central Normal interval of probability 0.5 and 0.9.
            task.append(
                (
                    0.5 * z**2 + math.log(sd) + 0.5 * math.log(2 * math.pi),
                    (y - mean) ** 2,
                    float(crps_normal(torch.tensor(mean), torch.tensor(sd), torch.tensor(y))),
                    float(abs(z) <= 0.6744898),
                    float(abs(z) <= 1.6448536),
                )
            )
        out.append(np.mean(task, 0))
    return np.array(out)  # (tasks, scores)


# Scores


@pytest.mark.parametrize("name", ["exact", "no_pooling"])
def test_scores_are_those_of_a_loop(fits, data, compared, name):
    scores = compared[name].scores
    table = by_hand(fits[name], data)
    n = len(table)
    for index, key in ((0, "nll"), (2, "crps"), (3, "coverage_0.5"), (4, "coverage_0.9")):
        assert scores[key].value == pytest.approx(table[:, index].mean(), rel=1e-5)
        error = table[:, index].std(ddof=1) / math.sqrt(n)
        assert scores[key].standard_error == pytest.approx(error, rel=1e-4)
    root = math.sqrt(table[:, 1].mean())
    assert scores["rmse"].value == pytest.approx(root, rel=1e-6)
    delta = table[:, 1].std(ddof=1) / math.sqrt(n) / (2 * root)
    assert scores["rmse"].standard_error == pytest.approx(delta, rel=1e-6)
    np.testing.assert_allclose(compared[name].nll_by_task, table[:, 0], rtol=1e-5)


def test_differences_are_paired(fits, data):
    pair = {name: fits[name] for name in ("exact", "no_pooling")}
    found = compare(pair, data, reference="exact", levels=LEVELS)["no_pooling"].scores
    a, b = by_hand(pair["no_pooling"], data), by_hand(pair["exact"], data)
    difference = a[:, 0] - b[:, 0]
    assert found["nll"].difference == pytest.approx(difference.mean(), rel=1e-4)
    error = difference.std(ddof=1) / math.sqrt(len(a))
    assert found["nll"].difference_error == pytest.approx(error, rel=1e-4)
    roots = [math.sqrt(t[:, 1].mean()) for t in (a, b)]
    assert found["rmse"].difference == pytest.approx(roots[0] - roots[1], rel=1e-5)
    influence = a[:, 1] / (2 * roots[0]) - b[:, 1] / (2 * roots[1])
    error = influence.std(ddof=1) / math.sqrt(len(a))
    assert found["rmse"].difference_error == pytest.approx(error, rel=1e-4)


def test_joint_nll_of_independent_rows_is_the_marginal_one(compared):
    scores = compared["no_pooling"].scores  # a point: rows are independent
    assert scores["joint_nll"].value == pytest.approx(scores["nll"].value, rel=1e-9)
    scores = compared["exact"].scores
    assert scores["joint_nll"].value != pytest.approx(scores["nll"].value, rel=1e-4)


def test_tasks_without_query_are_left_out_and_counted(compared, data):
    assert compared.without_query == ("g0",)
    assert "g0" not in compared.ids
    assert len(compared.ids) == 6
    assert sum(compared.points) == data.query.n_points
    as_episode = data.episode_of_all
    assert as_episode.without_query == ("g0",)


def test_an_episode_gives_the_numbers_of_its_task_set(fits, data, compared):
    same = compare(fits, data.episode_of_all, reference="nuts", levels=LEVELS)
    for row in same.rows:
        assert row.scores == compared[row.name].scores
    assert same.without_query == compared.without_query


def test_the_lowest_nll_is_the_baseline_without_a_reference(fits, data):
    found = compare(fits, data)
    assert found.reference is None
    assert found.baseline == found.best("nll")
    assert found[found.baseline].scores["nll"].difference is None
    assert all(row.distance is None for row in found.rows)
    assert "No reference" in found.verdict()
    assert found.baseline in str(found)


def test_one_task_has_no_standard_error(fits, data):
    found = compare(fits, data.episode[[2]], reference="nuts")
    assert math.isnan(found["exact"].scores["nll"].standard_error)
    assert "±" not in str(found).partition("Distance")[0].partition("\n")[2]
    assert Comparison.from_json(found.to_json()).to_json() == found.to_json()


def test_a_bernoulli_model_is_scored_by_its_density():
    random = np.random.default_rng(2)
    frame = pd.DataFrame({"group": np.repeat(list("abcd"), 8), "y": random.integers(0, 2, 32)})
    split = tasks.from_frame(frame, group="group", x=[], y="y").split(support=0.5, seed=0)
    fit = inference.CompletePooling().fit(
        models.VaryingEffects(family="bernoulli"), split, compile="graph", progress=False
    )
    row = compare({"complete": fit}, split)["complete"]
    p = float(split.support.flat_y.mean())
    y = split.query.flat_y
    slow = -(y * math.log(p) + (1 - y) * math.log(1 - p))
    # Four query rows in each task; the prior moves p by little.
    assert row.scores["nll"].value == pytest.approx(float(slow.mean()), abs=0.02)


# Distances


def test_distance_is_that_of_a_loop():
    random = np.random.default_rng(1)
    shapes = {"a": (5, 2), "b": (5,)}
    first, second = (
        {
            n: (torch.tensor(random.normal(size=s)), torch.tensor(random.uniform(0.5, 2, size=s)))
            for n, s in shapes.items()
        }
        for _ in range(2)
    )
    found = distance_between(first, second, ("a", "b"))
    d, r = [], []
    for name in shapes:
        for m, s, m0, s0 in zip(
            *(v.flatten().tolist() for v in (*first[name], *second[name])), strict=True
        ):
            d.append(abs(m - m0) / s0)
            r.append(s / s0)
    assert found.mean_difference == pytest.approx(np.mean(d))
    assert found.largest_difference == pytest.approx(max(d))
    assert (found.sd_ratio_low, found.sd_ratio_high) == pytest.approx((min(r), max(r)))
    close = [x <= 0.3 and 0.75 <= y <= 1.33 for x, y in zip(d, r, strict=True)]
    assert found.share_close == pytest.approx(np.mean(close))
    assert found.sd_ratio == pytest.approx(float(torch.tensor(r).median()))


def test_a_coordinate_without_spread_in_the_reference_does_not_count():
    moments = {"a": (torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]]))}
    reference = {"a": (torch.tensor([[0.5, 0.0]]), torch.tensor([[1.0, 0.0]]))}
    assert distance_between(moments, reference, ("a",)).mean_difference == pytest.approx(0.5)
    point = {"a": (torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2))}
    assert distance_between(moments, point, ("a",)) is None
    assert distance_between(moments, reference, ()) is None


def test_distances_of_an_exact_fit_and_of_points(compared):
    exact, none = compared["exact"], compared["no_pooling"]
    assert compared["nuts"].distance is None
    assert compared["nuts"].distance_given_theta is None
    # The same density twice: draws of the same seed, so only rounding is left.
    assert exact.distance_given_theta.mean_difference < 1e-6
    assert exact.distance_given_theta.sd_ratio == pytest.approx(1.0, abs=1e-6)
    assert exact.distance.sites == ("coefficients",)
    assert exact.distance.mean_difference < 0.3
    assert 0.5 < exact.distance.sd_ratio < 1.2
    assert none.distance.sd_ratio == none.distance.sd_ratio_high == 0.0
    assert not none.distance.close


def test_a_known_shift_and_spread_are_found(fits, data):
    exact = fits["exact"]
    density = exact.posterior.density
    sd = density.sd
    moved = dataclasses.replace(
        exact, density=Gaussian(density.loc + 0.7 * sd, density.scale * 1.5), _cache={}
    )
    row = compare({"exact": exact, "moved": moved}, data, reference="exact")["moved"]
    # One coordinate, linear in φ; both draw with one seed, so the shift is exact but for the
    # sample mean of the draws, within 0.5 / √4000 of a standard deviation.
    assert row.distance.mean_difference == pytest.approx(0.7, abs=0.05)
    assert row.distance.sd_ratio == pytest.approx(1.5, abs=1e-6)


def test_centred_and_non_centred_programs_share_their_coefficients(fits, data):
    def centred(x, y=None):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        with pyro.plate("task", x.shape[0], dim=-2):
            phi = pyro.sample("coefficients", dist.Normal(mean, 1.0).to_event(1))
            with pyro.plate("point", x.shape[1], dim=-1):
                return pyro.sample("y", dist.Normal(phi[..., 0], noise), obs=y)

    other = inference.ExactLinear().fit(centred, data, compile="graph", progress=False)
    assert shared_sites(fits["nuts"].posterior, other.posterior) == ("coefficients",)
    assert shared_sites(other.posterior, fits["nuts"].posterior) == ("coefficients",)
    found = compare({**fits, "centred": other}, data, reference="nuts")
    assert found["centred"].distance.sites == ("coefficients",)


def test_programs_without_a_common_site_are_noted(fits, data):
    def other(x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
            with pyro.plate("point", x.shape[1], dim=-1):
                return pyro.sample("y", dist.Normal(level, 1.0), obs=y)

    fit = inference.ExactLinear().fit(other, data, compile="graph", progress=False)
    found = compare({"nuts": fits["nuts"], "other": fit}, data, reference="nuts")
    assert found["other"].distance is None
    assert any("no local site" in note for note in found.notes)
    assert found["other"].distance_given_theta.mean_difference < 1e-6


# Flags and the verdict


def test_a_reference_that_did_not_converge_is_flagged(data, model, fits):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the same is said by fit
        short = inference.NUTS(draws=20, warmup=100, chains=2, processes=1).fit(
            model, data, compile="graph", seed=0, progress=False
        )
    found = compare({"nuts": short, "exact": fits["exact"]}, data, reference="nuts")
    assert any("effective sample size" in flag for flag in found.flags)
    assert found.verdict().startswith("No verdict")
    assert "Flag: nuts" in str(found)
    assert not any(note.startswith("nuts:") for note in found.notes)
    # The same is said of it where it is not the reference.
    found = compare({"nuts": short, "exact": fits["exact"]}, data, reference="exact")
    assert found.flags == ()
    notes = [note for note in found.notes if note.startswith("nuts: ")]
    assert any("effective sample size" in note for note in notes)
    assert ".." not in str(found)


def test_one_chain_and_few_effective_draws_are_flagged(data, fits):
    nuts = fits["nuts"]
    info = {**nuts.info, "r_hat": torch.full_like(nuts.info["r_hat"], math.nan)}
    found = compare({"nuts": dataclasses.replace(nuts, info=info)}, data, reference="nuts")
    assert any("R̂ is not known" in flag for flag in found.flags)

    posterior = nuts.posterior
    posterior.info["effective_draws"] = torch.tensor([4.0] + [500.0] * (len(posterior.ids) - 1))
    cached = dataclasses.replace(nuts, _cache={"fit": posterior})
    everyone = tasks.Episode(data.support, data.support)
    found = compare({"nuts": cached}, everyone, reference="nuts")
    del posterior.info["effective_draws"]
    assert any("least: 4, 'g0'" in flag for flag in found.flags)


def row(name, distance=None, nll=1.0):
    scores = {"nll": Score(nll, 0.1, 0.0, 0.1)}
    return Row(name, "S", {}, "p", "point", 0, scores, (nll,), distance, None, 1.0, 0.5, 0.1)


def record(*rows, flags=(), reference="ref"):
    return Comparison(
        (row("ref"), *rows), reference, "ref", ("a",), (1,), (1,), (), (0.9,), 10, 0, flags, (), {}
    )


def test_the_verdict_follows_its_rule():
    near = Distance(("z",), 0.05, 0.2, 1.0, 0.9, 1.1, 1.0)
    point = Distance(("z",), 0.05, 0.2, 0.0, 0.0, 0.0, 0.0)
    some_off = Distance(("z",), 0.09, 0.9, 1.0, 0.9, 1.1, 0.89)
    far = Distance(("z",), 0.11, 0.2, 1.0, 0.9, 1.1, 1.0)
    rows = row("near", near), row("point", point), row("some", some_off), row("far", far)
    assert record(*rows).verdict() == (
        "Close to ref: near; close in the mean but not in the spread: point; "
        "close in the mean but not in every task: some; not: far."
    )
    assert record(*rows, flags=("R̂ is 1.1.",)).verdict().startswith("No verdict: ref is flagged")
    assert "can be compared" in record(row("other")).verdict()


# The record


def test_json_comes_back(compared):
    text = compared.to_json()
    again = Comparison.from_json(text)
    assert again.to_json() == text
    assert str(again) == str(compared)
    assert again["exact"] == compared["exact"]
    parsed = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no strict JSON"))
    assert parsed["versions"]["torch"] == torch.__version__
    assert parsed["rows"][0]["settings"]["chains"] == 4


def test_json_goes_into_a_file(compared, tmp_path):
    path = tmp_path / "deep" / "comparison.json"
    text = compared.to_json(path)
    assert path.read_text(encoding="utf-8") == text + "\n"


def test_infinite_scores_survive_json():
    one = record(row("worse", nll=math.inf))
    again = Comparison.from_json(one.to_json())
    assert again["worse"].scores["nll"].value == math.inf
    assert again["worse"].nll_by_task == (math.inf,)
    assert "inf" in str(again)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "fitted"}', '{"kind": "comparison"}'])
def test_other_json_is_refused(text):
    with pytest.raises(FileError, match="from_json"):
        Comparison.from_json(text)


def test_frame_has_one_row_per_fit(compared):
    frame = compared.to_frame()
    assert list(frame.index) == ["nuts", "exact", "no_pooling"]
    assert frame.loc["exact", "nll"] == compared["exact"].scores["nll"].value
    assert frame.loc["exact", "sd_ratio"] == compared["exact"].distance.sd_ratio
    assert math.isnan(frame.loc["nuts", "nll_difference"])
    assert (frame["seconds_fit"] > 0).all()


def test_nll_by_task_has_the_persons_ids(compared):
    by_task = compared.nll_by_task("exact")
    assert list(by_task) == list(compared.ids)
    mean = np.mean(list(by_task.values()))
    assert mean == pytest.approx(compared["exact"].scores["nll"].value)


def test_the_table_names_what_it_compares(compared):
    text = str(compared)
    assert "6 tasks" in text
    assert "(1 more have none)" in text
    assert text.count(" *") >= 4
    assert "Distance d of q(φ | S) to nuts" in text
    assert max(map(len, text.splitlines())) <= 110


def test_numbers_align():
    assert digits_for([0.021, 0.3]) == 3
    assert digits_for([math.nan]) == 3
    assert digits_for([12.0]) == 1
    assert plus_minus(1.15444, 0.0211, 3) == "1.154 ± 0.021"
    assert plus_minus(-0.5, 0.1, 2, "+") == "-0.50 ± 0.10"
    assert plus_minus(1.5, math.nan, 2) == "1.50"
    assert plus_minus(math.inf, math.nan, 2) == "inf"
    assert plus_minus(1.234e7, 1.0, 2) == "1.23e+07"
    assert aligned(["", "b"], [["long", "1"], ["x", "22"]]) == ["       b", "long   1", "x     22"]


# What is refused


def test_arguments_that_cannot_be_used(fits, data):
    with pytest.raises(DataError, match="one fit or more"):
        compare({}, data)
    with pytest.raises(DataError, match="by name; found Fitted"):
        compare(fits["nuts"], data)
    with pytest.raises(DataError, match="found NUTS under 'nuts'"):
        compare({"nuts": inference.NUTS()}, data)
    with pytest.raises(DataError, match="nearest name is 'nuts'"):
        compare(fits, data, reference="nutz")
    with pytest.raises(DataError, match="levels between 0 and 1"):
        compare(fits, data, levels=(90,))
    with pytest.raises(DataError, match=r"levels between 0 and 1.*found levels=0\.9"):
        compare(fits, data, levels=0.9)
    with pytest.raises(DataError, match="support and query"):
        compare(fits, data.support)


def test_data_without_a_query(fits, data):
    empty = data.support.keep(torch.zeros(data.support.n_points, dtype=torch.bool))
    with pytest.raises(DataError, match="no query row in any of 7 tasks"):
        compare(fits, tasks.Episode(data.support, empty))
    with pytest.raises(DataError, match="not split"):
        compare(fits, tasks.TaskSet(data.support))


def test_fits_of_other_columns_or_units(fits, data, model):
    renamed = tasks.Tasks.from_flat(
        data.support.flat_x, data.support.flat_y, data.support.task, 7, features=["w"]
    )
    other = inference.CompletePooling().fit(
        models.VaryingEffects(fixed=["w"]), renamed, compile="graph", progress=False
    )
    with pytest.raises(DataError, match=r"features \['x'\].*'other'"):
        compare({**fits, "other": other}, data)
    bare = inference.CompletePooling().fit(model, data.support, compile="graph", progress=False)
    with pytest.raises(DataError, match="units"):
        compare({**fits, "bare": bare}, data)


def test_compare_leaves_no_trace(fits, data, untouched):
    with untouched():
        compare(fits, data, reference="nuts", draws=50)


def test_the_same_seed_gives_the_same_numbers(fits, data):
    first, second = (compare(fits, data, reference="nuts", draws=100, seed=3) for _ in range(2))
    assert [r.scores for r in first.rows] == [r.scores for r in second.rows]
    assert [r.distance for r in first.rows] == [r.distance for r in second.rows]


def test_a_point_reference_has_no_distances(fits, data):
    point = dataclasses.replace(
        fits["exact"], density=Delta(fits["exact"].posterior.density.loc), _cache={}
    )
    found = compare({"point": point, "exact": fits["exact"]}, data, reference="point")
    assert found["exact"].distance is None
    assert any("holds θ at a point" in note for note in found.notes)


@pytest.fixture(scope="module")
def seen_and_honest():
    """Fits on support and query, and on the support alone."""
    episode = tasks.LinearTasks([0.0, 1.0], [[1.0, 0.0], [0.0, 1.0]], 0.5).sample(4, seed=0)
    strategy, regression = inference.ExactLinear(), models.LinearRegression()
    settings = {"compile": False, **QUIET}
    return {
        "seen": strategy.fit(regression, episode, **settings),
        "honest": strategy.fit(regression, episode.support, **settings),
    }, episode


def test_a_fit_that_saw_the_query_is_named_and_does_not_win(seen_and_honest):
    pair, episode = seen_and_honest
    found = compare(pair, episode, reference="seen")
    assert next(n for n in found.notes if "held-out" in n).startswith(
        "seen: was fitted on the held-out points of 4"
    )
    assert found["seen"].saw_query
    assert not found["honest"].saw_query
    # It has the lower NLL, and is neither the best nor what differences are to.
    assert found["seen"].scores["nll"].value < found["honest"].scores["nll"].value
    assert found.best("nll") == found.baseline == "honest"
    (line,) = [x for x in str(found).splitlines()[:5] if x.startswith("seen")]
    assert "*" not in line
    assert compare(pair, episode, baseline="seen").baseline == "seen"


def test_without_an_honest_fit_there_is_no_baseline_and_no_best(seen_and_honest):
    pair, episode = seen_and_honest
    found = compare({"seen": pair["seen"], "too": pair["seen"]}, episode)
    assert found.baseline is None
    assert found.best("nll") is None
    assert found["too"].scores["nll"].difference is None
    assert "no test of any fit" in found.verdict()
    assert " *" not in str(found).partition("\n")[2]
    assert Comparison.from_json(found.to_json()) == found
    assert len(plots.scores(found).axes) == 1


# Notes on θ


def test_theta_that_was_still_moving_is_noted(fits, data):
    moving = dataclasses.replace(fits["exact"], info={"still_moving": ["scale", "mean"]})
    (note,) = compare({"exact": moving}, data).notes
    assert note == "exact: theta was still moving at the end (scale, mean); raise steps"


def test_pooling_records_what_it_did_not_estimate(seen_and_honest):
    # Centred: the likelihood given φ is no function of the prior's mean and scale.
    _, episode = seen_and_honest
    for strategy in (inference.NoPooling(), inference.CompletePooling()):
        fit = strategy.fit(models.LinearRegression(), episode.support, compile=False, **QUIET)
        assert sorted(fit.info["untouched"]) == ["mean", "scale"]


@pytest.mark.parametrize("info", [{"untouched": ["scale"]}, {}])
def test_no_distance_given_theta_where_the_task_prior_was_not_estimated(fits, data, info):
    """By name, or because the strategy drops p(φ | θ) whatever the program."""
    which = "exact" if info else "no_pooling"
    other = dataclasses.replace(fits[which], info=info)
    found = compare({"exact": fits["exact"], "other": other}, data, reference="exact")
    assert found["other"].distance_given_theta is None
    assert found["other"].distance is not None
    expected = "did not estimate scale" if info else "NoPooling drops p(φ | θ)"
    assert any(note.startswith("other: ") and expected in note for note in found.notes)


# Classes


def classes(kind):
    """5 tasks of 2 to 20 answers 0 or 1; the first has no held-out answer."""
    random = np.random.default_rng(2)
    counts = (1, 4, 8, 12, 20)
    group = np.repeat(list("abcde"), counts)
    y = random.integers(0, 2, len(group)).astype(kind)
    frame = pd.DataFrame({"group": group, "y": y})
    return tasks.from_frame(frame, group="group", x=[], y="y").split(support=0.5, seed=0)


@pytest.fixture(scope="module", params=["int64", "float64"])
def answers(request):
    """Fits of answers given as labels and as numbers: the scores are the same."""
    split = classes(request.param)
    model = models.VaryingEffects(family="bernoulli")
    settings = {"compile": False, **QUIET}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # tasks of equal answers have no maximum
        return {
            "complete": inference.CompletePooling().fit(model, split, **settings),
            "none": inference.NoPooling().fit(model, split, **settings),
        }, split


def slow_class_scores(fitted, episode):
    """Accuracy, Brier score, and of every point (task, weight, correct, confidence)."""
    predicted = fitted.posterior_of(episode.support).predict(episode.query).probabilities
    hits, briers, points = [], [], []
    for i, count in enumerate(episode.query.counts.tolist()):
        task_hits, task_briers = [], []
        for j in range(count):
            p, y = predicted[i, j].tolist(), int(episode.query.y[i, j])
            task_hits.append(float(p[y] > p[1 - y]))
            task_briers.append((p[y] - 1) ** 2 + p[1 - y] ** 2)
            points.append((i, 1 / count, task_hits[-1], max(p)))
        hits.append(np.mean(task_hits))
        briers.append(np.mean(task_briers))
    return np.array(hits), np.array(briers), points


def slow_calibration_error(points, bins=15):
    total = sum(weight for _, weight, _, _ in points)
    out = 0.0
    for b in range(bins):
        inside = [x for x in points if b / bins < x[3] <= (b + 1) / bins]
        out += abs(sum(w * (hit - c) for _, w, hit, c in inside)) / total
    return out


def slow_jackknife(values):
    values, n = np.array(values), len(values)
    return math.sqrt((n - 1) / n * ((values - values.mean()) ** 2).sum())


def test_scores_of_classes_are_those_of_a_loop(answers):
    fits, split = answers
    found = compare(fits, split, baseline="complete")
    assert set(found["none"].scores) == {"nll", "joint_nll", "accuracy", "brier", "ece"}
    slow = {name: slow_class_scores(fit, split.episode) for name, fit in fits.items()}
    left_out = {}
    for name, (hits, briers, points) in slow.items():
        scores = found[name].scores
        for key, values in (("accuracy", hits), ("brier", briers)):
            assert scores[key].value == pytest.approx(values.mean(), rel=1e-6)
            error = values.std(ddof=1) / math.sqrt(len(values))
            assert scores[key].standard_error == pytest.approx(error, rel=1e-6)
        assert scores["ece"].value == pytest.approx(slow_calibration_error(points), abs=1e-7)
        left_out[name] = [
            slow_calibration_error([x for x in points if x[0] != i]) for i in range(len(hits))
        ]
        error = slow_jackknife(left_out[name])
        assert scores["ece"].standard_error == pytest.approx(error, rel=1e-5)
    score = found["none"].scores["ece"]
    values = [slow_calibration_error(slow[n][2]) for n in ("none", "complete")]
    assert score.difference == pytest.approx(values[0] - values[1], abs=1e-7)
    error = slow_jackknife(np.subtract(left_out["none"], left_out["complete"]))
    assert score.difference_error == pytest.approx(error, rel=1e-5)
    paired = slow["none"][0] - slow["complete"][0]
    score = found["none"].scores["accuracy"]
    assert score.difference == pytest.approx(paired.mean(), abs=1e-9)
    error = paired.std(ddof=1) / math.sqrt(len(paired))
    assert score.difference_error == pytest.approx(error, abs=1e-9)
    assert "accuracy − complete" in str(found)


def test_more_accuracy_is_better_and_nan_is_never_the_best():
    def scored(name, **values):
        return dataclasses.replace(
            row(name), scores={key: Score(value, 0.1) for key, value in values.items()}
        )

    nan = math.nan
    rows = (
        scored("low", accuracy=0.2, nll=nan, brier=nan, ece=math.inf),
        scored("high", accuracy=0.9, nll=nan, brier=0.5, ece=math.inf),
    )
    found = dataclasses.replace(record(), rows=rows, reference=None, baseline="low")
    assert found.best("accuracy") == "high"
    assert found.best("brier") == "high"
    assert found.best("nll") is None
    assert found.best("ece") is None
    lines = {line.split()[0]: line for line in str(found).splitlines()[2:5] if line.strip()}
    assert lines["low"].count("*") == 0
    assert lines["high"].count("*") == 2
    with pytest.raises(DataError, match="nearest name is 'nll'"):
        found.best("nl")
    with pytest.raises(DataError, match="nearest name is 'high'"):
        found["hi"]


def test_the_star_needs_a_score_that_all_honest_fits_have():
    def scored(name, *keys, **settings):
        scores = {key: Score(0.5, 0.1) for key in keys}
        return dataclasses.replace(row(name), scores=scores, **settings)

    def stars(*rows):
        table = dataclasses.replace(record(), rows=rows, reference=None, baseline=None)
        return sum(line.count("*") for line in str(table).splitlines()[1:])

    both = scored("both", "nll", "rmse")
    assert stars(both, scored("other", "nll", "rmse")) == 2
    assert stars(both, scored("other", "nll")) == 1
    assert stars(both, scored("saw", "nll", "rmse", saw_query=True)) == 0
    assert stars(both, scored("knows", "nll", "rmse", strategy="oracle")) == 0


# Oracles


class Certain:
    """Components that say P(1) = p for every row."""

    n_draws = 1

    def __init__(self, p, n):
        self.p, self.n = p, n

    def distribution(self, start, stop):
        return dist.Bernoulli(torch.full((1, self.n), self.p, dtype=torch.float64))


def oracle_of(query, p=0.5, **settings):
    return Predictive(Certain(p, query.n_points), query, **settings)


def test_an_oracle_is_a_row_of_scores(answers):
    fits, split = answers
    whole, judged = split.query, split.episode.query
    oracles = {
        "whole": oracle_of(whole),
        "judged": oracle_of(judged),
        "flat": oracle_of(whole, padded=False),
    }
    found = compare(fits, split, oracles=oracles, baseline="whole")
    assert [row.name for row in found.rows] == [*fits, *oracles]
    for name in oracles:
        row = found[name]
        assert row.strategy == "oracle"
        assert row.theta is row.seconds_fit is row.distance is row.seed is None
        assert row.scores["nll"].value == pytest.approx(math.log(2))
        assert row.nll_by_task == pytest.approx((math.log(2),) * 4)
    assert found["judged"].scores["nll"].difference == pytest.approx(0.0)
    assert found["whole"].scores["nll"].difference is None
    assert found["none"].scores["nll"].difference_error > 0
    # The table: no star, no seconds.
    lines = [line for line in str(found).splitlines() if line.startswith("whole")]
    assert len(lines) == 2
    assert "*" not in lines[0]
    assert lines[1].split()[-3:] == ["–", "–", "–"]
    assert Comparison.from_json(found.to_json()) == found
    frame = found.to_frame()
    assert frame.loc["whole", "strategy"] == "oracle"
    assert math.isnan(frame.loc["whole", "seconds_fit"])
    assert len(plots.scores(found).axes) == 2


def test_a_perfect_oracle_does_not_take_the_star(answers):
    fits, split = answers

    class Knowing(Certain):
        def distribution(self, start, stop):
            return dist.Bernoulli(0.98 * split.query.flat_y.double()[None] + 0.01)

    oracles = {"knowing": Predictive(Knowing(0.0, 0), split.query)}
    found = compare(fits, split, oracles=oracles)
    assert found["knowing"].scores["accuracy"].value == 1.0
    assert found["knowing"].scores["brier"].value == pytest.approx(2 * 0.01**2)
    assert found["knowing"].scores["ece"].value == pytest.approx(0.01)
    assert found.best("nll") in fits
    assert found.baseline in fits


def test_a_row_of_another_kind_has_other_scores(answers):
    """A Normal oracle beside classifiers: what both have is compared, the rest stands alone."""
    fits, split = answers

    class Bell(Certain):
        def distribution(self, start, stop):
            return dist.Normal(torch.full((1, self.n), 0.5), 1.0)

    found = compare(
        fits, split, oracles={"bell": Predictive(Bell(0, split.query.n_points), split.query)}
    )
    scores = found["bell"].scores
    assert set(scores) == {
        "nll", "joint_nll", "rmse", "crps", "coverage_0.5", "coverage_0.9", "coverage_0.95"
    }  # fmt: skip
    assert scores["rmse"].value == pytest.approx(0.5)
    assert scores["nll"].difference is not None
    assert scores["rmse"].difference is None


def test_oracles_and_baselines_that_are_refused(answers):
    fits, split = answers
    query = split.query
    good = {"even": oracle_of(query)}
    with pytest.raises(DataError, match=r"baseline as one of the rows.*nearest name is 'even'"):
        compare(fits, split, oracles=good, baseline="evan")
    with pytest.raises(DataError, match=r"reference as one of the fits.*'even'"):
        compare(fits, split, oracles=good, reference="even")
    with pytest.raises(DataError, match="Tensor under 'even'"):
        compare(fits, split, oracles={"even": torch.zeros(3)})
    with pytest.raises(DataError, match="names that no fit has; found Predictive under 'none'"):
        compare(fits, split, oracles={"none": oracle_of(query)})
    with pytest.raises(DataError, match="oracles by name; found Predictive"):
        compare(fits, split, oracles=oracle_of(query))
    with pytest.raises(DataError, match=r"oracle 'even' of \d+ rows of 2 tasks"):
        compare(fits, split, oracles={"even": oracle_of(split.episode.query[:2])})
    with pytest.raises(DataError, match="other numbers of rows by task"):
        compare(fits, split, oracles={"even": oracle_of(split.support)})


def test_an_oracle_of_another_draw_of_the_same_family_is_refused(seen_and_honest):
    pair, episode = seen_and_honest
    family = tasks.LinearTasks([0.0, 1.0], [[1.0, 0.0], [0.0, 1.0]], 0.5)
    other = family.sample(4, seed=1)
    fit = pair["honest"]
    oracle = fit.adapt(other.support).predict(other.query)
    with pytest.raises(DataError, match="with another x"):
        compare({"exact": fit}, episode, oracles={"oracle": oracle})
    right = fit.adapt(episode.support).predict(episode.query)
    found = compare({"exact": fit}, episode, oracles={"same": right})
    assert found["same"].scores["rmse"].value == found["exact"].scores["rmse"].value
