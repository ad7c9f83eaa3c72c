import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch

from hbmeta.errors import DataError
from hbmeta.tasks.columns import Column
from hbmeta.tasks.design import Design
from hbmeta.tasks.formula_parts import FormulaPart, variables
from hbmeta.tasks.schema import Schema

LABELS = ["Grün Ost", "Süd", "Grün West", "ß"]


def table(n: int = 60, seed: int = 0) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "y": draw.normal(size=n),
            "x": draw.normal(size=n),
            "w": draw.uniform(1.0, 9.0, n),
            "my col": draw.normal(size=n),
            "arm": draw.choice(["a", "b", "c"], n),
            "sex": pd.Categorical(draw.choice(["m", "f"], n), categories=["m", "f", "unused"]),
            "flag": draw.random(n) > 0.5,
            "year": draw.integers(2001, 2004, n),
            "town": [LABELS[i % 4] for i in range(n)],
            "street": [f"{1 + i % 3}" for i in range(n)],
            "number": [i % 5 for i in range(n)],
        }
    )


PARTS = {
    "1 + x + arm": ["Intercept", "x", "arm[T.b]", "arm[T.c]"],
    "0 + arm": ["arm[a]", "arm[b]", "arm[c]"],
    "x * arm": ["Intercept", "x", "arm[T.b]", "arm[T.c]", "x:arm[T.b]", "x:arm[T.c]"],
    "C(year)": ["Intercept", "C(year)[T.2002]", "C(year)[T.2003]"],
    "sex": ["Intercept", "sex[T.f]"],
    "flag": ["Intercept", "flag"],
    "C(arm, contr.sum)": ["Intercept", "C(arm, contr.sum)[S.a]", "C(arm, contr.sum)[S.b]"],
    "bs(x, df=4)": ["Intercept", *(f"bs(x, df=4)[{i}]" for i in range(1, 5))],
    "cs(x, df=3)": ["Intercept", *(f"cs(x, df=3)[{i}]" for i in range(1, 4))],
    "poly(x, 2)": ["Intercept", "poly(x, 2)[1]", "poly(x, 2)[2]"],
    "scale(w):arm": ["Intercept", *(f"scale(w):arm[{a}]" for a in "abc")],
    "center(x) + I(x**2) - 1": ["center(x)", "I(x ** 2)"],
    "np.log(w) + np.where(x > 0, 1, 0)": ["Intercept", "np.log(w)", "np.where(x > 0, 1, 0)"],
    "log(`my col`**2)": ["Intercept", "log(`my col` ** 2)"],
    "0": [],
}


@pytest.mark.parametrize("text", PARTS)
def test_a_part_makes_the_same_columns_of_any_rows_after_json(text):
    frame = table()
    needed = list(variables(text, list(frame.columns)))
    values = frame[needed]
    if "sex" in needed:
        values = values.assign(sex=values["sex"].cat.remove_unused_categories())
    part, columns = FormulaPart.learn(text, values)
    assert list(columns.columns) == PARTS[text]
    fields = json.loads(json.dumps(asdict(part)))
    again = FormulaPart(**{**fields, "names": tuple(fields["names"])})
    for rows in (slice(None), slice(7, 9)):
        pd.testing.assert_frame_equal(
            again.columns(values[rows]), columns[rows], rtol=1e-13, atol=1e-13
        )


def test_transforms_keep_what_they_learned():
    part, _ = FormulaPart.learn("center(x)", pd.DataFrame({"x": [1.0, 2.0, 6.0]}))
    assert part.columns(pd.DataFrame({"x": [10.0]}))["center(x)"].tolist() == [7.0]


@pytest.mark.parametrize(
    "text",
    [
        *("__import__('os').getcwd()", "eval('1')", "np.random.seed(1)", "np.save('a', x)"),
        *("C(arm, contr.__class__)", "np.add.reduce(x)", "Q('x')", "lag(x)", "hashed(arm)"),
        *("(x).sum()", "I([z for z in x])", "I((lambda: x)())", "log(x.values)"),
    ],
)
def test_an_expression_computes_columns_and_nothing_else(text):
    with pytest.raises(DataError, match=r"from_formula: needed (arithmetic|terms|a column)"):
        variables(text, list(table().columns))


def test_names_the_nearest_column():
    with pytest.raises(DataError, match=r"needed a column 'arms'.*Was 'arm' meant"):
        variables("x + arms", list(table().columns))
    with pytest.raises(DataError, match=r"needed a column 'yaer'.*Was 'year' meant"):
        variables("C(yaer)", list(table().columns))


@pytest.mark.parametrize(
    ("text", "found"),
    [("log(w - 100)", "finite values"), ("log(arm)", "values from which"), ("x +* 2", "can read")],
)
def test_a_part_says_what_cannot_be_computed(text, found):
    with pytest.raises(DataError, match=found):
        FormulaPart.learn(text, table())


# The whole design


def test_columns_of_x_stand_in_the_stated_order():
    formula = "y ~ x + arm + offset(log(w)) + (1+x+w|number) + (1|town:street) + (0+flag|town)"
    frame = table()
    design = Design.learn(formula, frame, "number")
    assert design.features == (
        *("x", "arm[T.b]", "arm[T.c]", "w", "flag", "offset(log(w))"),
        *("code(town:street)", "code(town)"),
    )
    assert [(b.group, b.columns, b.correlated) for b in design.blocks] == [
        ("number", ("Intercept", "x", "w"), True),
        ("town:street", ("Intercept",), True),
        ("town", ("flag",), True),
    ]
    out, rows = design.table(frame, missing="raise", need_y=True)
    assert rows.tolist() == list(range(60))
    np.testing.assert_array_equal(out["x"], frame["x"])
    np.testing.assert_array_equal(out["arm[T.c]"], frame["arm"] == "c")
    np.testing.assert_array_equal(out["offset(log(w))"], np.log(frame["w"]))
    codes = {label: code for code, label in enumerate(dict.fromkeys(frame["town"]))}
    np.testing.assert_array_equal(out["code(town)"], frame["town"].map(codes))
    pairs = [
        f"{town}:{street}" for town, street in zip(frame["town"], frame["street"], strict=True)
    ]
    assert [design.levels["town:street"][int(i)] for i in out["code(town:street)"]] == pairs
    np.testing.assert_array_equal(out["number"], frame["number"])
    np.testing.assert_array_equal(out["y"], frame["y"])


def test_the_group_with_the_most_levels_is_the_task():
    assert Design.learn("y ~ (1 | street) + (1 | number) + (1 | town)", table()).task == "number"
    assert Design.learn("y ~ (1 | town/street)", table()).task == "town:street"
    # As many levels: the first.
    frame = table().assign(other=lambda f: f["town"])
    assert Design.learn("y ~ (1 | other) + (1 | town)", frame).task == "other"


def schema_of(design: Design) -> Schema:
    x = tuple(Column(name, "numeric") for name in design.features)
    return Schema(
        design.label, x, Column(design.response, "numeric"), "drop", "raise", "float64", design
    )


@pytest.mark.parametrize(
    "formula",
    [
        "y ~ scale(x) * arm + bs(w, df=4) + (1 + poly(x, 2) | town/street)",
        "p(number, number + 3) ~ sex + (1 | `town`)",
        "log(w) ~ year + (1 | year)",
    ],
)
def test_a_schema_reads_tables_as_before_after_json(formula):
    frame = table()
    schema = schema_of(Design.learn(formula, frame))
    again = Schema.from_json(schema.to_json())
    rows = frame.iloc[3:30]
    before, after = schema.encode(frame, need_y=True).tasks, again.encode(rows, need_y=True)
    assert after.tasks.features == before.features
    # Rows by their place in the table, whatever the order of the groups.
    whole = schema.encode(frame, need_y=True)
    place = {row: flat for flat, row in enumerate(whole.rows)}
    chosen = [place[row + 3] for row in after.rows]
    torch.testing.assert_close(after.tasks.flat_x, whole.tasks.flat_x[chosen], atol=1e-13, rtol=0)
    torch.testing.assert_close(after.tasks.flat_y, whole.tasks.flat_y[chosen], atol=0, rtol=0)


def test_a_predictor_may_have_the_name_of_the_group():
    design = Design.learn("y ~ year + (1 | year)", table())
    assert (design.label, design.features) == ("(year)", ("year",))


def test_rows_with_a_missing_value_are_left_out():
    frame = table()
    frame.loc[2, "town"], frame.loc[5, "x"], frame.loc[9, "w"] = None, np.nan, np.nan
    design = Design.learn("y ~ center(x) + (1 | town)", frame)
    encoded = schema_of(design).encode(frame, need_y=True)
    assert encoded.dropped == 2  # w is no column of the formula
    kept = frame.drop(index=[2, 5])
    centred = design.table(kept, missing="raise", need_y=False)[0]["center(x)"]
    assert abs(float(centred.mean())) < 1e-12


def test_labels_of_the_task_keep_their_type():
    frame = table().assign(half=lambda f: f["number"].astype(float))
    assert schema_of(Design.learn("y ~ (1 | half)", frame)).encode(frame).tasks.ids == tuple(
        range(5)
    )
    ids = schema_of(Design.learn("y ~ (1 | town)", frame)).encode(frame).tasks.ids
    assert ids == tuple(LABELS)


BAD = {
    "unknown group": ("y ~ (1 | twon)", {}, "one column 'twon'.*Was 'town' meant"),
    "unknown response": ("z ~ (1 | town)", {}, "a column 'z' of the table"),
    "unknown column": ("y ~ xx + (1 | town)", {}, "a column 'xx'"),
    "one group": ("y ~ (1 | one)", {}, "two groups or more of 'one'"),
    "no such task": ("y ~ (1 | town)", {"group": "street"}, "group= as one of 'town'"),
    "an effect twice": ("y ~ (1 + x | town) + (1 | town)", {}, "'Intercept' more than once"),
    "no effect": ("y ~ (0 | town)", {}, "each effect once .* at least one; found none"),
    "one level": ("y ~ same + (1 | town)", {}, "at least two levels"),
    "a response of all rows": ("scale(y) ~ (1 | town)", {}, "computed row by row"),
    "a group of halves": ("y ~ (1 | w)", {}, "words or whole numbers in the group column 'w'"),
}


@pytest.mark.parametrize("name", BAD)
def test_says_what_is_wrong_with_a_table(name):
    formula, arguments, found = BAD[name]
    frame = table().assign(one="a", same="a")
    with pytest.raises(DataError, match=found):
        Design.learn(formula, frame, **arguments).table(frame, missing="drop", need_y=True)


def test_new_tables_may_have_new_tasks_and_nothing_else_that_is_new():
    frame = table()
    schema = schema_of(Design.learn("y ~ arm + C(year) + (1 | number) + (1 | town)", frame))
    new = frame.head(3).assign(number=99)
    assert schema.encode(new).tasks.ids == (99,)
    with pytest.raises(DataError, match=r"the levels of 'arm' that were learned.*found 'd'"):
        schema.encode(new.assign(arm="d"))
    with pytest.raises(DataError, match=r"values from which 'arm \+ C\(year\)'"):
        schema.encode(new.assign(year=1999))
    with pytest.raises(DataError, match=r"levels of 'town' that were fitted.*group='town'"):
        schema.encode(new.assign(town="Nord"))
    with pytest.raises(DataError, match=r"numbers in 'year', as they were learned"):
        schema.encode(new.assign(year="2001"))
    with pytest.raises(DataError, match=r"a column 'arm'|one column 'arm'"):
        schema.encode(new.drop(columns="arm"))


def test_a_file_cannot_hold_another_expression():
    schema = schema_of(Design.learn("y ~ log(w) + (1 | town)", table()))
    text = schema.to_json().replace("log(w)", "eval(w)")
    with pytest.raises(DataError, match=r"the function 'eval'"):
        Schema.from_json(text)
