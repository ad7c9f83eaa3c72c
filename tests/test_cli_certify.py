"""`hbmeta certify`: a table of certificates, their files, and checks of these."""

import json

import pytest

from hbmeta import cli
from hbmeta.cli import certifying
from tests import fits


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Certificates of clusters, on fewer tasks than a person would take."""
    folder = tmp_path_factory.mktemp("certificates")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certifying, "CLUSTERS", {"known": 6, "new": 40})
        assert cli.main(["certify", "clusters", "--shots", "2", "--out", str(folder)]) == 0
    return folder


def test_every_strategy_and_the_choice_are_certified_together(written, capsys):
    files = sorted(path.name for path in written.glob("*.json"))
    assert files == ["integrated.json", "prototypes.json", "the_choice.json"]
    deltas = [json.loads((written / name).read_text())["delta"] for name in files]
    assert sum(deltas) == pytest.approx(0.05)
    assert cli.main(["certify", "--check", str(written / files[0])]) == 0
    assert "arithmetic hold" in capsys.readouterr().out


def test_risks_are_measured_again_with_the_fit_and_the_data(written, capsys, monkeypatch):
    monkeypatch.setattr(certifying, "CLUSTERS", {"known": 6, "new": 40})
    again = ["--fit", str(written / "integrated.safetensors"), "--shots", "2"]
    check = ["certify", "clusters", "--check", str(written / "integrated.json"), *again]
    assert cli.main(check) == 0
    assert "arithmetic and risks hold" in capsys.readouterr().out
    assert cli.main([*check, "--seed", "1"]) == 1
    assert "not those of the certificate" in capsys.readouterr().out


def test_a_file_that_contradicts_itself_ends_with_1(written, tmp_path, capsys):
    content = json.loads((written / "prototypes.json").read_text())
    content["statements"][0]["value"] *= 0.5
    (tmp_path / "forged.json").write_text(json.dumps(content))
    assert cli.main(["certify", "--check", str(tmp_path / "forged.json")]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_a_table_of_groups(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        certifying,
        "EFFECTS",
        {n: (certifying.EFFECTS[n][0], 3) for n in ("exact", "complete_pooling")},
    )
    frame = fits.table("abcdefgh", (6,) * 8)
    frame.to_csv(tmp_path / "schools.csv", index=False)
    columns = ["--group", "school", "--x", "hours", "--y", "score", "--scale", "40"]
    assert cli.main(["certify", str(tmp_path / "schools.csv"), *columns]) == 0
    text = capsys.readouterr().out
    assert "4 tasks certified on" in text
    assert "the choice" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "radon, clusters or a table"),
        (["none.csv", "--group", "a", "--y", "b"], "none.csv"),
        (["none.csv"], "--group and --y"),
        (["--check", "none.json"], "a certificate"),
    ],
)
def test_what_cannot_be_used_ends_with_2(arguments, says, capsys):
    assert cli.main(["certify", *arguments]) == 2
    assert says in capsys.readouterr().err
