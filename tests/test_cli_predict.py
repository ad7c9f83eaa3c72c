"""As a new user would: awkward tables from the command line to a predictions file."""

import json
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from hbmeta import cli, inference, study

FAST = ["--compile", "graph", "--seed", "1"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Few steps: what is tested is the way, not the fit."""
    for name, choice in study.STRATEGIES.items():
        steps = 3 if choice.steps > 1 else 1
        monkeypatch.setitem(study.STRATEGIES, name, replace(choice, steps=steps))
    small = inference.NUTS(draws=8, warmup=10, chains=2, max_tree_depth=3, processes=1)
    monkeypatch.setitem(study.STRATEGIES, "nuts", study.Choice(small))


def written(path, groups, sizes, *, seed=0):
    """Scores against hours around 50, with an effect of each group."""
    rng = np.random.default_rng(seed)
    group = np.repeat(groups, sizes)
    effect = dict(zip(groups, rng.standard_normal(len(groups)), strict=True))
    hours = rng.uniform(0, 8, len(group))
    score = 50 + 3 * hours + 5 * np.array([effect[g] for g in group]) + rng.normal(0, 2, len(group))
    frame = pd.DataFrame({"Schule": group, "hours": hours, "score": score})
    frame.to_csv(path, index=False)
    return frame


UMLAUTS = ["Zürich Süd", "Köln Mitte", "Åre", "São Paulo", "Łódź", "Genève 2"]


def run(capsys, *arguments):
    code = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def compared(capsys, tmp_path, *arguments, strategies="exact"):
    code, out, err = run(
        capsys, "compare", *arguments, "--strategies", strategies, "--out", tmp_path / "run", *FAST
    )
    assert code == 0, err
    return out, err


def predicted(capsys, tmp_path, new, *arguments):
    path = tmp_path / "predictions.csv"
    code, out, err = run(capsys, "predict", tmp_path / "run", new, "--out", path, *arguments)
    assert code == 0, err
    assert out == ""
    return pd.read_csv(path), err


def test_umlauts_spaces_and_missing_values_by_formula(capsys, tmp_path):
    frame = written(tmp_path / "a.csv", UMLAUTS, [6, 5, 7, 4, 6, 5])
    frame.loc[[3, 10], "hours"] = np.nan
    frame = frame.rename(columns={"Schule": "Schule im Bezirk"})
    frame.to_csv(tmp_path / "a.csv", index=False)
    formula = "score ~ hours + (1 | `Schule im Bezirk`)"
    out, err = compared(capsys, tmp_path, formula, tmp_path / "a.csv")
    assert "2 of 33 rows have a missing value" in err
    assert "fixed[hours]" in out
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["formula"] == formula
    new = frame.drop(columns="score").iloc[[0, 3, 8, 20, 30]].copy()
    new.loc[30, "Schule im Bezirk"] = "Überlingen"
    new.to_csv(tmp_path / "new.csv", index=False)
    found, err = predicted(capsys, tmp_path, tmp_path / "new.csv")
    assert list(found) == [*new, "status", "mean", "sd", "lower", "upper"]
    assert found["Schule im Bezirk"].tolist() == new["Schule im Bezirk"].tolist()
    assert found["status"].isna().tolist() == [False, True, False, False, False]
    assert found["status"].iloc[4] == "new"
    good = found.dropna()
    assert ((good["lower"] < good["mean"]) & (good["mean"] < good["upper"])).all()
    assert "5 rows predicted by exact" in err
    assert "1 with a missing value, which have no prediction" in err
    assert "1 of groups without data" in err


def test_groups_of_one_row(capsys, tmp_path):
    frame = written(tmp_path / "b.csv", [f"s{i}" for i in range(12)], [1] * 6 + [3] * 6)
    arguments = [tmp_path / "b.csv", "--group", "Schule", "--x", "hours", "--y", "score"]
    compared(capsys, tmp_path, *arguments, "--standardise", "all")
    found, err = predicted(capsys, tmp_path, tmp_path / "b.csv", "--interval", "0.5")
    assert len(found) == len(frame)
    # What the comparison held out is in the table of the run, and is adapted to.
    assert set(found["status"]) == {"known", "adapted"}
    assert "adapted to their observed rows" in err
    assert found["mean"].between(20, 120).all()


def test_two_hundred_groups_of_two(capsys, tmp_path):
    written(tmp_path / "c.csv", list(range(200)), [2] * 200)
    formula = "score ~ hours + (1 | Schule)"
    compared(capsys, tmp_path, formula, tmp_path / "c.csv", strategies="exact,no_pooling")
    found, _ = predicted(capsys, tmp_path, tmp_path / "c.csv", "--strategy", "no_pooling")
    assert len(found) == 400
    assert found["mean"].notna().all()
    assert found["status"].value_counts().to_dict() == {"known": 320, "adapted": 80}


def test_a_program_of_ones_own(capsys, tmp_path, monkeypatch):
    written(tmp_path / "d.csv", list("abcdef"), [4] * 6)
    text = """
        import pyro
        import pyro.distributions as dist

        def line(x, y=None, *, task, n_tasks):
            slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
            noise = pyro.sample("noise", dist.HalfNormal(10.0))
            with pyro.plate("task", n_tasks, dim=-1):
                level = pyro.sample("level", dist.Normal(50.0, 20.0))
            with pyro.plate("point", x.shape[0], dim=-1):
                mean = level[task] + slope * x[:, 0]
                return pyro.sample("y", dist.Normal(mean, noise), obs=y)
        """
    module = "my_programs_for_a_test"
    (tmp_path / f"{module}.py").write_text("\n".join(r[8:] for r in text.splitlines()))
    monkeypatch.chdir(tmp_path)
    arguments = ["--group", "Schule", "--x", "hours", "--y", "score"]
    before = list(sys.path)
    out, _ = compared(capsys, tmp_path, f"{module}:line", "d.csv", *arguments)
    assert "slope" in out
    found, _ = predicted(capsys, tmp_path, "d.csv")
    assert found["mean"].notna().all()
    assert sys.path == before
    code, _, err = run(capsys, "compare", f"{module}:lime", "d.csv", *arguments, *FAST)
    assert code == 2
    assert "has no attribute 'lime'" in err
    monkeypatch.delitem(sys.modules, module)


def test_to_standard_output(capsys, tmp_path):
    written(tmp_path / "e.csv", list("abcdef"), [4] * 6)
    compared(capsys, tmp_path, "score ~ hours + (1 | Schule)", tmp_path / "e.csv")
    code, out, err = run(capsys, "predict", tmp_path / "run", tmp_path / "e.csv")
    assert code == 0
    assert out.splitlines()[0] == "Schule,hours,score,status,mean,sd,lower,upper"
    assert len(out.splitlines()) == 25
    assert err.startswith("hbmeta: 24 rows predicted by exact: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "NOWHERE", "TABLE"], "needed the folder that hbmeta compare --out wrote"),
        (["predict", "RUN", "missing.csv"], "No such file"),
        (["predict", "RUN", "TABLE", "--strategy", "maml"], "needed a fit among exact"),
        (["predict", "RUN", "TABLE", "--interval", "90"], "Pass 0.9, not 90"),
        (["predict", "RUN", "BAD"], "'hours'"),
        (["predict", "RUN", "TAKEN"], "'mean'"),
        (["compare", "score ~ hours + (1 | Schule)"], "a table after the formula"),
        (["compare", "score ~ hours + (1 | Schul)", "TABLE"], "Schul"),
        (["compare", "score ~ hours + (1 | Schule)", "TABLE", "--x", "hours"], "--x"),
        (["compare", "nowhere_at_all:program", "TABLE"], "No module named 'nowhere_at_all'"),
        (["compare", "score ~ hours", "TABLE"], "group"),
    ],
)
def test_mistakes_are_said_in_one_message(kept, capsys, arguments, message):
    names = {"RUN": "run", "TABLE": "t.csv", "BAD": "bad.csv", "TAKEN": "taken.csv"}
    given = [str(kept / names[a]) if a in names else a for a in arguments]
    code, out, err = run(capsys, *given, *([] if "predict" in given else FAST))
    assert code == 2
    assert out == ""
    assert message in err
    assert err.startswith("hbmeta: ")
    assert err.count("\n") == 1


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    frame = written(folder / "t.csv", list("abcdef"), [4] * 6)
    frame.drop(columns="hours").to_csv(folder / "bad.csv", index=False)
    frame.assign(mean=0).to_csv(folder / "taken.csv", index=False)
    arguments = ["score ~ hours + (1 | Schule)", str(folder / "t.csv"), "--strategies", "exact"]
    assert cli.main(["compare", *arguments, "--out", str(folder / "run"), *FAST]) == 0
    return folder
