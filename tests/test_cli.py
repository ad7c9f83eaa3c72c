import json
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from hbmeta import __version__, cli, inference, study
from hbmeta.comparison import Comparison

FAST = ["--compile", "graph"]
FILES = {
    "run.json",
    "fits",
    "comparison_known.json",
    "comparison_new.json",
    "posterior.nc",
    "forest.png",
    "shrinkage.png",
    "scores.png",
    "scores_new.png",
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """All strategies with the least work that still runs."""
    small = {
        "nuts": inference.NUTS(draws=8, warmup=10, chains=2, max_tree_depth=3, processes=1),
        "amortized": inference.AmortizedGuide(hidden=4, draws=1),
    }
    for name, choice in study.STRATEGIES.items():
        strategy = small.get(name, choice.strategy)
        steps = 3 if choice.steps > 1 else 1
        monkeypatch.setitem(study.STRATEGIES, name, replace(choice, strategy=strategy, steps=steps))


@pytest.fixture
def table(tmp_path):
    """A CSV of 8 schools with words, numbers, counts and a column of two values."""
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "school": np.repeat([f"s{i}" for i in range(8)], 5),
            "age": random.normal(10, 2, 40),
            "sex": random.choice(["f", "m"], 40),
            "score": random.normal(100, 15, 40),
            "passed": random.integers(0, 2, 40),
            "absences": random.integers(0, 9, 40),
            "log_days": np.log(random.integers(100, 200, 40)),
        }
    )
    path = tmp_path / "schools.csv"
    frame.to_csv(path, index=False)
    return str(path)


def columns(table, y="score", x="age,sex"):
    return ["compare", table, "--group", "school", "--x", x, "--y", y, *FAST]


def test_radon_prints_two_tables_and_level_one(capsys):
    assert cli.main(["compare", "radon", "--strategies", "exact,complete_pooling", *FAST]) == 0
    out = capsys.readouterr().out
    assert out.index("HELD-OUT POINTS OF KNOWN GROUPS (68") < out.index("NEW GROUPS (17")
    assert out.count("joint NLL") == 2
    level_one = out[out.index("LEVEL 1") :].splitlines()
    assert level_one[1].split() == ["exact", "complete_pooling"]
    names = [line.split()[0] for line in level_one[2:]]
    expected = [
        "mean[intercept]",
        "scale[intercept]",
        "fixed[floor]",
        "fixed[log_uranium]",
        "noise",
    ]
    assert names == expected
    assert "–" in level_one[2]  # complete pooling has no task prior to estimate


def test_every_strategy_and_every_file(table, tmp_path, capsys):
    folder = tmp_path / "deep" / "out"
    assert cli.main([*columns(table), "--out", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == FILES
    for name in ("known", "new"):
        text = (folder / f"comparison_{name}.json").read_text(encoding="utf-8")
        found = Comparison.from_json(text)
        assert [row.name for row in found.rows] == list(study.STRATEGIES)
        assert found.reference == "nuts"
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    captured = capsys.readouterr()
    assert "Flag: nuts" in captured.out
    assert "hbmeta: warning: NUTS" in captured.err
    assert "Traceback" not in captured.err


def test_json_alone_on_stdout(table, capsys):
    arguments = [*columns(table), "--strategies", "nuts,no_pooling", "--json", "--seed", "3"]
    assert cli.main(arguments) == 0
    found = json.loads(
        capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )
    assert set(found) == {"known", "new", "level_one"}
    known = Comparison.from_json(json.dumps(found["known"]))
    assert known.seed == 3
    assert found["level_one"]["nuts"]["fixed[age]"]["sd"] > 0
    assert found["level_one"]["no_pooling"]["fixed[age]"]["sd"] is None
    assert "mean[intercept]" not in found["level_one"]["no_pooling"]


def test_columns_are_fixed_unless_they_vary(table, capsys):
    arguments = [*columns(table), "--varying", "intercept,age", "--standardise", "all"]
    assert cli.main([*arguments, "--strategies", "complete_pooling", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = found["known"]["rows"][0]
    # y was standardised, and its scores are in the units of the table (sd 15).
    assert 5 < row["scores"]["rmse"]["value"] < 40
    assert [n for n in found["level_one"]["complete_pooling"] if n.startswith("fixed")] == [
        "fixed[sex[m]]"
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--y", "passed", "--x", "age", "--family", "bernoulli", "--standardise", "all"],
        ["--y", "absences", "--x", "age", "--family", "poisson", "--offset", "log_days"],
    ],
)
def test_other_families(table, capsys, arguments):
    start = ["compare", table, "--group", "school", *arguments, *FAST]
    assert cli.main([*start, "--strategies", "exact,complete_pooling"]) == 0
    captured = capsys.readouterr()
    assert "exact is left out" in captured.err
    assert "quadratic" in captured.err
    assert "complete_pooling" in captured.out
    assert "fixed[log_days]" not in captured.out


def test_quick_runs_a_fifth(table, capsys, monkeypatch):
    seen = {}

    def fit_all(choices, *_, **__):
        seen.update(choices)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "fit_all", fit_all)
    monkeypatch.setitem(study.STRATEGIES, "maml", replace(study.STRATEGIES["maml"], steps=2000))
    assert cli.main([*columns(table), "--quick"]) == 130
    assert seen["maml"].steps == 400
    assert seen["nuts"].strategy.draws < inference.NUTS().draws
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", "0.5", "many", str(2**31)])
def test_a_seed_that_cannot_be_used(capsys, seed):
    assert cli.main(["compare", "gp", "--seed", seed]) == 2
    assert "argument --seed: needed a whole number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "radon", "--strategies", "nutz"], "names among nuts, amortized"),
        (["compare", "radon", "--strategies", ","], "found none"),
        (["compare", "radon", "--x", "floor"], "found --x"),
        (["compare", "radon", "--support", "0"], "--support: needed rows"),
        (["compare", "radon", "--family", "poisson"], "--family"),
        (["compare", "nowhere.csv", "--group", "g", "--y", "y"], "No such file"),
        (["compare", "gpp"], "no such study or file. Did you mean 'gp'?"),
        (["compare", "raddon"], "Did you mean 'radon'?"),
        (["compare", "FILE", "--y", "score"], "--group: needed a column"),
        (["compare", "FILE", "--group", "school"], "--y: needed a column"),
        (["compare", "FILE", "--group", "schol", "--y", "score"], "'school'"),
        (["compare", "FILE", "--group", "school", "--y", "score", "--x", "agee"], "'age'"),
        (["compare", "FILE", "--group", "school", "--y", "score", "--varying", "agee"], "agee"),
        (["compare", "FILE", "--group", "school", "--y", "score", "--groups", "99"], "groups=99"),
    ],
)
def test_mistakes_are_said_in_one_message(table, capsys, arguments, message):
    given = [table if argument == "FILE" else argument for argument in arguments]
    assert cli.main(given) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.startswith("hbmeta: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "content", [b"", b"a,b\n1,2\n1,2,3\n", b"\xff\xfe\x00garbage\n", b'a,b\n"1,2\n']
)
def test_unreadable_tables(tmp_path, capsys, content):
    path = tmp_path / "broken.csv"
    path.write_bytes(content)
    assert cli.main(["compare", str(path), "--group", "a", "--y", "b"]) == 2
    captured = capsys.readouterr()
    assert "broken.csv" in captured.err or "needed" in captured.err
    assert "Traceback" not in captured.err
    assert cli.main(["compare", str(tmp_path), "--group", "a", "--y", "b"]) == 2


def test_a_categorical_column_can_vary(table, capsys):
    arguments = [*columns(table), "--varying", "intercept,sex"]
    assert cli.main([*arguments, "--strategies", "complete_pooling", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["level_one"]["complete_pooling"]) == {"fixed[age]", "noise"}


def test_a_folder_that_cannot_be_written(table, tmp_path, capsys, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    arguments = [*columns(table), "--strategies", "complete_pooling", "--out", str(blocked)]
    with monkeypatch.context() as patch:
        # It is said before anything is fitted.
        patch.setattr(cli, "fit_all", lambda *_, **__: pytest.fail("fitted"))
        assert cli.main(arguments) == 2
    assert "folder" in capsys.readouterr().err


def test_help_version_and_usage(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"hbmeta {__version__}\n"
    assert cli.main(["compare", "--help"]) == 0
    out = capsys.readouterr().out
    assert "hbmeta compare radon --out" in out
    assert "--compile" not in out
    assert cli.main([]) == 2
    assert cli.main(["compare", "radon", "--seed", "x"]) == 2
    assert "usage" in capsys.readouterr().err
    assert cli.main(["compare", "radon", "--groups", "abc"]) == 2
    assert (
        "a share such as 0.8 or a whole number such as 20; found 'abc'" in capsys.readouterr().err
    )


def test_progress_on_a_terminal_only(table, capsys, monkeypatch):
    arguments = [*columns(table), "--strategies", "complete_pooling"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert cli.main(arguments) == 0
    assert "complete_pooling: fitted in" in capsys.readouterr().err


def test_the_command_leaves_no_trace(table, capsys, untouched):
    with untouched():
        assert cli.main([*columns(table), "--strategies", "maml,exact"]) == 0
    assert capsys.readouterr().out
