import json
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from hbmeta.tasks import load_radon

FIXTURE = Path(__file__).parent.parent / "data" / "radon_posteriordb_head.csv"


def assert_equal_to_posteriordb(table):
    """Every number of the table, county by county, row by row, to the last digit."""
    radon = load_radon().support
    for index, rows in table.groupby("county_idx"):
        ours = radon[[int(index) - 1]]
        assert ours.flat_x[:, 0].tolist() == rows["floor_measure"].tolist()
        assert ours.flat_x[:, 1].tolist() == rows["log_uppm"].tolist()
        assert ours.flat_y.tolist() == rows["log_radon"].tolist()


def test_radon_in_numbers(untouched):
    with untouched():
        radon = load_radon()
    tasks = radon.support
    assert (tasks.n_points, tasks.n_tasks, tasks.max_points) == (919, 85, 116)
    assert radon.query is None
    assert radon.dropped == 0
    assert tasks.features == ("floor", "log_uranium")
    assert tasks.ids[0] == "AITKIN"
    assert tasks.ids[69] == "ST LOUIS"
    assert tasks.ids[84] == "YELLOW MEDICINE"
    assert tasks.flat_x[0].tolist() == [0.0, -0.507408136699532]
    assert tasks.flat_y[0] == 0.0953101798043249  # log(1.0 + 0.1)
    assert int(tasks.flat_x[:, 0].sum()) == 153
    assert tasks.flat_x[:, 0].unique().tolist() == [0.0, 1.0]
    assert float(tasks.flat_y.mean()) == pytest.approx(1.2647792371410602, abs=1e-14)
    # One uranium value per county.
    uranium = tasks.flat_x[:, 1]
    assert torch.equal(uranium, uranium[tasks.offsets][tasks.task])
    assert radon.support_rows.tolist() == list(range(919))


def test_radon_agrees_with_stored_rows_of_posteriordb():
    assert_equal_to_posteriordb(
        pd.read_csv(FIXTURE, converters={"log_uppm": float, "log_radon": float})
    )


def test_radon_agrees_with_posteriordb(data_folder):
    with zipfile.ZipFile(data_folder / "posteriordb/data/data/radon_mn.json.zip") as archive:
        content = json.loads(archive.read(archive.namelist()[0]))
    table = pd.DataFrame(
        {name: content[name] for name in ("county_idx", "floor_measure", "log_uppm", "log_radon")}
    )
    assert len(table) == 919
    assert_equal_to_posteriordb(table)


def test_radon_names_agree_with_a_second_copy(data_folder):
    # The counties of the R package HLMdiag, by name: same numbers of rows and of first floors.
    table = pd.read_csv(data_folder / "mixed_effects/HLMdiag/radon.csv")
    tasks = load_radon().support
    for name, rows in table.groupby("county.name"):
        ours = tasks.select([name])
        assert ours.n_points == len(rows)
        assert int(ours.flat_x[:, 0].sum()) == int(np.sum(rows["basement"]))
