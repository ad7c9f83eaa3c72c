"""`hbmeta diagnose`: a line per kept fit, all about one, and a file that reads back."""

import json

import numpy as np
import pandas as pd
import pytest

from hbmeta import cli, diagnose, load
from hbmeta.diagnosis import Diagnosis

KEPT = ("exact", "complete_pooling")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on 30 groups of 5, enough for θ at a point to cost little."""
    folder = tmp_path_factory.mktemp("diagnosed")
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(30), 5)
    score = 2.0 * rng.standard_normal(30)[group] + rng.standard_normal(150)
    pd.DataFrame({"group": group, "score": score}).to_csv(folder / "t.csv", index=False)
    columns = [str(folder / "t.csv"), "--group", "group", "--y", "score", "--groups", "28"]
    options = ["--strategies", ",".join(KEPT), "--compile", "graph", "--out", str(folder / "run")]
    assert cli.main(["compare", *columns, *options]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    """What is printed of all fits, and the file."""
    path = tmp_path_factory.mktemp("diagnosis") / "diagnosis.json"
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda text, **_: lines.append(str(text)))
        figures = ["--figures", str(path.parent / "figures")]
        assert cli.main(["diagnose", str(run), "--out", str(path), *figures]) == 0
    drawn = sorted(figure.name for figure in (path.parent / "figures").iterdir())
    assert drawn == ["pareto_k.png", "verdicts.png"]
    return "\n".join(lines), json.loads(path.read_text(encoding="utf-8"))


def test_a_line_per_fit_then_the_first_that_is_not_right(written):
    printed, content = written
    lines = printed.splitlines()
    assert lines[0] == "POSTERIORS OF 28 GROUPS"
    assert lines[1].split() == ["posterior", "means", "alone", "wrong", "parameters", "symptoms"]
    cells = {line.split()[0]: line.split() for line in lines[2:4]}
    assert tuple(cells) == tuple(content) == KEPT
    found = {name: Diagnosis.from_json(json.dumps(one)) for name, one in content.items()}
    for name, one in found.items():
        wrong = sum(parameter.verdict == "wrong" for parameter in one.parameters)
        number = [str(wrong), "of", str(len(one.parameters))]
        assert cells[name][1:6] == [one.verdict, one.verdict_of_means, *number]
    assert (cells["exact"][1], cells["complete_pooling"][1]) == ("right", "wrong")
    assert lines[3].endswith("  point estimate")
    assert lines[4].startswith("Judged by nested Laplace")
    assert lines[4].endswith(": exact, complete_pooling.")
    # exact is right, so that the other is told of.
    assert printed.endswith(str(found["complete_pooling"]))
    assert "COMPLETE_POOLING" in printed


def test_one_fit_alone_is_what_the_function_says(run, capsys):
    arguments = ["--strategy", "complete_pooling", "--reference", "none", "--seed", "3"]
    assert cli.main(["diagnose", str(run), *arguments]) == 0
    fitted = load(run / "fits" / "complete_pooling.safetensors")
    assert capsys.readouterr().out == f"{diagnose(fitted, reference=None, seed=3)}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["NOWHERE"], "needed the folder that hbmeta compare --out wrote"),
        (["RUN", "--strategy", "maml"], "needed a fit among exact, complete_pooling"),
        (["RUN", "--strategy", "exact", "--out", "RUN"], "run"),
    ],
)
def test_mistakes_are_said_in_one_message(run, capsys, arguments, message):
    given = [str(run) if argument == "RUN" else argument for argument in arguments]
    assert cli.main(["diagnose", *given]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("hbmeta: ")
    assert captured.err.count("\n") == 1
