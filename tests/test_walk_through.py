"""The walk through an analysis in docs/ runs, and prints what it shows."""

import re

import matplotlib as mpl

mpl.use("Agg")
import pytest

from tests.conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "walk_through.md"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def close(shown: str, printed: str) -> bool:
    """A count within 2, a probability within 0.04: eight standard errors of 4,000 draws."""
    return abs(float(shown) - float(printed)) <= (0.04 if "." in shown else 2)


@pytest.mark.filterwarnings("ignore")
def test_the_walk_prints_what_it_shows(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs" / "images").mkdir(parents=True)
    (tmp_path / "hbmeta").symlink_to(REPOSITORY / "hbmeta")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    shown = 0
    for language, block in re.findall(r"```(python|text)\n(.*?)```", PAGE.read_text("utf-8"), re.S):
        if language == "python":
            exec(compile(block, str(PAGE), "exec"), namespace)
            continue
        printed = capsys.readouterr().out
        shown += 1
        assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", block).split()
        pairs = zip(NUMBER.findall(block), NUMBER.findall(printed), strict=True)
        assert all(close(*pair) for pair in pairs), printed
    assert shown == 5
    for name in ("walk_through", "walk_through_verdicts", "walk_through_checks"):
        assert (tmp_path / "docs" / "images" / f"{name}.png").stat().st_size > 10_000
