import pytest

from hbmeta.errors import DataError
from hbmeta.tasks.formula import GroupTerm, parse_formula

READ = {
    "y ~ (1 | g)": ("y", None, "1", [("1", "g", True)], ()),
    "reaction ~ days + (1 + days | subject)": (
        *("reaction", None, "days"),
        *([("1 + days", "subject", True)], ()),
    ),
    "y~x+(x||g)": ("y", None, "x", [("x", "g", False)], ()),
    "y ~ 0 + x + (0 + x | g)": ("y", None, "0 + x", [("0 + x", "g", True)], ()),
    "y ~ -1 + x + (1 | g)": ("y", None, "- 1 + x", [("1", "g", True)], ()),
    "y ~ (1 | g) - 1": ("y", None, "- 1", [("1", "g", True)], ()),
    "y ~ x + (1 | a:b)": ("y", None, "x", [("1", "a:b", True)], ()),
    "y ~ x + (1 | a/b)": ("y", None, "x", [("1", "a", True), ("1", "a:b", True)], ()),
    "y ~ (x || a/b/c)": (
        *("y", None, "1"),
        *([("x", "a", False), ("x", "a:b", False), ("x", "a:b:c", False)], ()),
    ),
    "y ~ (1 | s) + (1 | d)": ("y", None, "1", [("1", "s", True), ("1", "d", True)], ()),
    "p(k, n) ~ period + (1 | herd)": ("k", "n", "period", [("1", "herd", True)], ()),
    "proportion(k, a + b) ~ (1 | herd)": ("k", "a + b", "1", [("1", "herd", True)], ()),
    "y ~ log(x) + offset(log(n)) + (1 | g)": (
        *("y", None, "log(x)"),
        *([("1", "g", True)], ("log(n)",)),
    ),
    "log(y) ~ bs(x, df=4) * I(x**-2) + (poly(x, 2) | g)": (
        *("log(y)", None, "bs(x, df=4) * I(x**-2)"),
        *([("poly(x, 2)", "g", True)], ()),
    ),
    "y ~ (a + b):c - a + (1 | g)": ("y", None, "(a + b):c - a", [("1", "g", True)], ()),
    "y ~ x + (1 | `größe in cm`)": ("y", None, "x", [("1", "größe in cm", True)], ()),
    "`my y` ~ `a + (b | c)` + (1 | g)": (
        *("`my y`", None, "`a + (b | c)`"),
        *([("1", "g", True)], ()),
    ),
    "y ~ C(z, contr.treatment('a|b')) + (1 | g)": (
        *("y", None, "C(z, contr.treatment('a|b'))"),
        *([("1", "g", True)], ()),
    ),
    "y ~ I(a | b) + {x + 1} + (1 | g)": ("y", None, "I(a | b) + {x + 1}", [("1", "g", True)], ()),
    "y ~ x * z + ( 1 + x * z | g ) + (1 | schüler)": (
        *("y", None, "x * z"),
        *([("1 + x * z", "g", True), ("1", "schüler", True)], ()),
    ),
}


@pytest.mark.parametrize("formula", READ)
def test_takes_a_formula_apart(formula):
    found = parse_formula(formula)
    groups = [(term.effects, term.name, term.correlated) for term in found.groups]
    assert (found.response, found.trials, found.common, groups, found.offsets) == READ[formula]


def test_a_group_in_backticks_may_hold_a_colon():
    (term,) = parse_formula("y ~ (1 | `a:b`:c)").groups
    assert term == GroupTerm("1", ("a:b", "c"))


REFUSED = {
    "y ~ x": r"a term \(effects \| group\)",
    "y x": "a response, one ~",
    "~ x + (1 | g)": "a response, one ~",
    "y ~": "a response, one ~",
    "y ~ x ~ (1 | g)": "a response, one ~",
    "y ~ x - (1 | g)": "group terms that are added",
    "y ~ x * (1 | g)": "a summand of its own",
    "y ~ x | g": "a summand of its own",
    "y ~ x + ((1 | g))": "a summand of its own",
    "y ~ (x + (1 | g)):z + (1 | h)": "a summand of its own",
    "y | z ~ (1 | g)": "a summand of its own",
    "y ~ (1 || )": r"\(effects \| group\) or",
    "y ~ ( | g)": r"\(effects \| group\) or",
    "y ~ (1 ||| g)": r"\(effects \| group\) or",
    "y ~ (1 | g": r"an end to '\('",
    "y ~ (1 | g])": "brackets that match",
    "y ~ x + 'a + (1 | g)": 'an end to "\'"',
    "y ~ (1 | f(g))": "columns as the group",
    "y ~ (1 | g + h)": "columns as the group",
    "y ~ (1 | g/)": "columns as the group",
    "y ~ x + + (1 | g)": r"a term after each \+",
    "y ~ (1 | g) +": r"a term after each \+",
    "cbind(k, n) ~ (1 | g)": r"p\(k, n\)",
    "p(k) ~ (1 | g)": r"p\(successes, trials\)",
}


@pytest.mark.parametrize("formula", REFUSED)
def test_says_what_it_cannot_read(formula):
    with pytest.raises(DataError, match=REFUSED[formula]):
        parse_formula(formula)


def test_wants_text():
    with pytest.raises(DataError, match="a formula as text; found int"):
        parse_formula(3)
