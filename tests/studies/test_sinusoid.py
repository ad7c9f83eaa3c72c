import json
import math

import pytest
import torch
from matplotlib.figure import Figure

from hbmeta import cli
from hbmeta.comparison import Comparison
from hbmeta.inference import MAML
from hbmeta.models import NeuralRegression
from hbmeta.studies import sinusoid, write
from hbmeta.studies.common import Outcome, entries
from hbmeta.studies.waves import error_by_step
from hbmeta.tasks import Sinusoids

# Chains are too short here to converge, and fit says so.
pytestmark = pytest.mark.filterwarnings("ignore:NUTS:UserWarning")

TINY = sinusoid.Budget(
    maml=2, guide=2, latent=2, scratch=3, draws=4, depth=2, tasks=4, sampled=2,
    hidden=(3,), predictive=3,
)  # fmt: skip
NAMES = ["maml 1 step", "maml 5 steps", "amortized", "latent np", "from scratch", "nuts"]


@pytest.fixture(scope="module")
def said():
    return []


@pytest.fixture(scope="module")
def outcome(said):
    return sinusoid.run(budget=TINY, compile=False, say=said.append)


def test_every_strategy_is_judged_on_the_same_waves(outcome, said):
    every, sampled = outcome.comparisons["all"], outcome.comparisons["sampled"]
    assert [row.name for row in every.rows] == NAMES[:-1]
    assert [row.name for row in sampled.rows] == NAMES
    assert set(every.support_points) == {5}
    assert set(every.points) == {50}
    assert sampled.ids == every.ids[:2]
    for row in sampled.rows:
        assert set(row.scores) >= {"nll", "rmse", "crps", "coverage_0.9"}
        assert all(math.isfinite(score.value) for score in row.scores.values())
    assert len(said) == len(NAMES) + 1
    assert all(len(line) <= 100 for line in outcome.text.splitlines())


def test_from_scratch_learned_nothing_before(outcome):
    assert "from scratch" in outcome.text
    scratch = outcome.comparisons["all"]["from scratch"]
    start = MAML(steps=3).fit(
        NeuralRegression(hidden=(3,)), Sinusoids(), steps=1, learning_rate=0, compile=False,
        progress=False,
    )  # fmt: skip
    test = Sinusoids(shots=5, queries=50, dtype=torch.float64).sample(4, seed=2**32)
    error = (start.adapt(test.support).predict(test.query).mean - test.query.y).square().mean()
    # Float32 in one of them.
    assert scratch.scores["rmse"].value == pytest.approx(float(error.sqrt()), rel=1e-4)


def test_figures_and_files(outcome, tmp_path):
    assert set(outcome.figures) == {"adaptation", "scratch", "steps", "bands"}
    write(tmp_path / "new", outcome)
    written = {path.name for path in (tmp_path / "new").iterdir()}
    assert written == {
        "summary.txt", "comparison_all.json", "comparison_sampled.json",
        "adaptation.png", "scratch.png", "steps.png", "bands.png",
    }  # fmt: skip
    text = (tmp_path / "new" / "comparison_all.json").read_text(encoding="utf-8")
    assert [row.name for row in Comparison.from_json(text).rows] == NAMES[:-1]
    assert (tmp_path / "new" / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_json_holds_the_tables(outcome):
    found = json.loads(outcome.to_json())
    assert set(found) == {"title", "text", "captions", "seconds", "all", "sampled"}
    assert Comparison.from_json(json.dumps(found["all"])).ids == outcome.comparisons["all"].ids


def test_error_by_step_is_the_mean_over_tasks():
    fitted = MAML(steps=1).fit(
        NeuralRegression(hidden=(3,)), Sinusoids(), steps=1, compile=False, progress=False
    )
    test = Sinusoids(shots=2, queries=(3, 6)).sample(4, seed=1)
    figure = error_by_step({"maml": fitted}, test, (0, 1, 2))
    shown = figure.axes[0].lines[0].get_ydata()
    for number, value in enumerate(shown):
        mean = fitted.adapt(test.support, steps=number).predict(test.query).mean
        each = [
            float((mean[i][m] - test.query.y[i][m]).square().mean())
            for i, m in enumerate(test.query.mask)
        ]
        assert value == pytest.approx(sum(each) / 4, rel=1e-5)


def test_entries_are_aligned_and_wrapped():
    text = entries({"a": "one two three", "long": "four"}, width=14)
    assert text.splitlines() == ["a     one two", "      three", "long  four"]


# The command


@pytest.fixture
def quickly(monkeypatch):
    seen = {}

    def run(**arguments):
        seen.update(arguments)
        return Outcome("Title", "text", {}, {}, {"one": Figure}, 0.0)

    monkeypatch.setattr(cli, "STUDIES", {"sinusoid": run})
    return seen


def test_the_command_runs_a_study(quickly, capsys, tmp_path):
    arguments = ["compare", "sinusoid", "--quick", "--seed", "3", "--out", str(tmp_path / "o")]
    assert cli.main(arguments) == 0
    assert (quickly["seed"], quickly["quick"], quickly["compile"]) == (3, True, "auto")
    assert capsys.readouterr().out.startswith("Title\n\ntext")
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"summary.txt", "one.png"}
    assert cli.main(["compare", "sinusoid", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Title"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--x", "a"], "--x"),
        (["--family", "poisson"], "--family"),
        (["--new-support", "2", "--groups", "3"], "--groups, --new-support"),
        (["--strategies", "nuts"], "--strategies"),
        (["--varying", "a"], "--varying"),
    ],
)
def test_options_that_do_not_apply_are_refused(quickly, capsys, given, named):
    assert cli.main(["compare", "sinusoid", *given]) == 2
    captured = capsys.readouterr()
    assert f"found {named}" in captured.err
    assert not captured.out
    assert not quickly
