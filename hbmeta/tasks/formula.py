r"""A mixed-effects formula taken apart: what all tasks share, and what varies between groups.

    response ~ common + (effects | group) + (effects || group) + offset(expression)

is the notation of lme4 and Bambi. The terms in parentheses with a bar are split off here; what is
left of them, and the effects, are formulas of their own, which `formulaic` reads.

| written | means |
|---|---|
| (1 + x \| g) | the coefficients of 1 and x vary between the groups of g, correlated |
| (x \| g), (0 + x \| g) | the same; that of x alone |
| (1 + x \|\| g) | uncorrelated, the columns of a categorical x too |
| (1 \| a:b) | a group for every pair of levels |
| (1 \| a/b) | (1 \| a) + (1 \| a:b), b nested in a |
| p(k, n) ~ ... | k successes of n trials, for the binomial family |
| offset(log(n)) | a column with coefficient 1 |

References:
    Bates, Mächler, Bolker, Walker (2015), Journal of Statistical Software 67(1), table 2.
    Capretto et al. (2022), Journal of Statistical Software 103(15), section 2.
"""

from __future__ import annotations

from dataclasses import dataclass

from hbmeta.errors import DataError

__all__ = ["GroupTerm", "ParsedFormula", "parse_formula"]

_WHERE = "from_formula"
_OPEN, _CLOSE, _QUOTES = "([{", ")]}", "`'\""
_PROPORTION = ("p", "prop", "proportion")


@dataclass(frozen=True)
class GroupTerm:
    """One term (effects | group).

    Args:
        effects: what varies, as a formula without a response.
        group: the columns whose joint levels are the groups, such as ("herd", "animal").
        correlated: one bar; False for two.
    """

    effects: str
    group: tuple[str, ...]
    correlated: bool = True

    @property
    def name(self) -> str:
        """The group as it is written, "herd:animal"."""
        return ":".join(self.group)


@dataclass(frozen=True)
class ParsedFormula:
    """A formula by parts.

    Args:
        response: an expression.
        trials: the expression of the number of trials, where the response is p(k, n).
        common: what all tasks share, as a formula without a response.
        groups: the terms that vary, nesting expanded.
        offsets: expressions.
    """

    response: str
    trials: str | None
    common: str
    groups: tuple[GroupTerm, ...]
    offsets: tuple[str, ...] = ()

    @property
    def group_names(self) -> tuple[str, ...]:
        """Every group once, in the order in which they are written."""
        return tuple(dict.fromkeys(term.name for term in self.groups))


def parse_formula(formula: str) -> ParsedFormula:
    """Take a formula apart.

    Raises:
        DataError: it has no response, no term (effects | group), or cannot be read; says where.
    Example:
        >>> parse_formula("reaction ~ days + (1 + days | subject)").groups
        (GroupTerm(effects='1 + days', group=('subject',), correlated=True),)
    """
    if not isinstance(formula, str):
        raise _error("a formula as text", type(formula).__name__)
    sides = [piece for _, piece in _split(formula, "~", formula)]
    if len(sides) != 2 or not all(sides):
        raise _error("a response, one ~, and terms", repr(formula))
    response, trials = _response(sides[0], formula)
    kept: list[str] = []
    groups: list[GroupTerm] = []
    offsets: list[str] = []
    for place, (sign, piece) in enumerate(_split(sides[1], "+-", formula)):
        inner = _inside(piece)
        bars = [] if inner is None else _split(inner, "|", formula)
        called = _called(piece)
        if len(bars) > 1:
            if sign == "-":
                raise _error("group terms that are added", f"- {piece}")
            groups += _group_terms([part for _, part in bars], piece)
        elif called is not None and called[0] == "offset" and sign == "+":
            offsets.append(called[1])
        else:
            _refuse_bar(piece, formula)
            if piece:
                kept.append(f"{sign} {piece}" if kept or sign == "-" else piece)
            elif place:  # before the first there may stand a sign
                raise _error("a term after each + and -", repr(formula))
    if not groups:
        raise _error(
            "a term (effects | group): what varies between tasks",
            repr(formula),
            "Add for example (1 | group).",
        )
    return ParsedFormula(response, trials, " ".join(kept) or "1", tuple(groups), tuple(offsets))


def _response(text: str, formula: str) -> tuple[str, str | None]:
    called = _called(text)
    if called is not None and called[0] == "cbind":
        raise _error(
            "p(successes, trials) for a binomial response",
            text,
            "cbind(k, n - k) of R is p(k, n) here.",
        )
    if called is None or called[0] not in _PROPORTION:
        _refuse_bar(text, formula)
        return text, None
    parts = [piece for _, piece in _split(called[1], ",", formula)]
    if len(parts) != 2 or not all(parts):
        raise _error("p(successes, trials)", text)
    return parts[0], parts[1]


def _group_terms(parts: list[str], piece: str) -> list[GroupTerm]:
    # "a | b" splits into two parts, "a || b" into three of which the second is empty.
    correlated = len(parts) == 2
    if not (correlated or (len(parts) == 3 and not parts[1])) or not parts[0] or not parts[-1]:
        raise _error("(effects | group) or (effects || group)", piece)
    found: list[GroupTerm] = []
    above: tuple[str, ...] = ()
    for level in _split(parts[-1], "/", piece):
        above += tuple(_name(part, piece) for _, part in _split(level[1], ":", piece))
        found.append(GroupTerm(parts[0], tuple(dict.fromkeys(above)), correlated))
    return found


def _name(text: str, piece: str) -> str:
    """A column's name, out of its backticks."""
    if len(text) > 2 and text[0] == text[-1] == "`" and "`" not in text[1:-1]:
        return text[1:-1]
    if not text.isidentifier():
        raise _error(
            "columns as the group, joined by : or /",
            piece,
            "Write other names in backticks; compute the column in the frame first.",
        )
    return text


def _refuse_bar(piece: str, formula: str) -> None:
    """A bar outside of a call is a group term that is not a summand of its own."""
    for bare in _bare(piece, formula):
        if "|" in bare:
            raise _error(
                "(effects | group) as a summand of its own",
                piece,
                "Write the group term as + (effects | group).",
            )


def _bare(text: str, formula: str) -> list[str]:
    """The parts of a text outside of calls and quotes, those inside bare parentheses apart."""
    found, plain, depth, start = [], "", 0, 0
    for index, character, level in _scan(text, formula):
        if level and not depth:
            called = index > 0 and (text[index - 1].isalnum() or text[index - 1] in "_.]")
            depth, start = level, -1 if called or character in _QUOTES + "[{" else index
        elif not level and depth:
            if start >= 0:
                found += _bare(text[start + 1 : index], formula)
            depth = 0
        elif not level:
            plain += character
    return [plain, *found]


def _scan(text: str, formula: str) -> list[tuple[int, str, int]]:
    """(position, character, depth); a bracket or a quote that closes stands at the depth outside.

    Raises:
        DataError: brackets or quotes that do not match.
    """
    found, stack = [], ""
    for index, character in enumerate(text):
        if stack and stack[-1] in _QUOTES:
            stack = stack[:-1] if character == stack[-1] else stack
        elif character in _OPEN + _QUOTES:
            stack += character
        elif character in _CLOSE:
            if not stack or _OPEN.index(stack[-1]) != _CLOSE.index(character):
                raise _error("brackets that match", repr(formula))
            stack = stack[:-1]
        found.append((index, character, len(stack)))
    if stack:
        raise _error(f"an end to {stack[-1]!r}", repr(formula))
    return found


def _split(text: str, separators: str, formula: str) -> list[tuple[str, str]]:
    """The pieces between separators outside of brackets and quotes, each with the one before it."""
    found, separator, start = [], "+", 0
    for index, character, depth in _scan(text, formula):
        if not depth and character in separators:
            found.append((separator, text[start:index].strip()))
            separator, start = character, index + 1
    found.append((separator, text[start:].strip()))
    return found


def _inside(piece: str) -> str | None:
    """What stands in the one pair of parentheses that encloses all of a piece."""
    if not piece.startswith("("):
        return None
    ends = [index for index, character, depth in _scan(piece, piece) if not depth]
    return piece[1:-1] if ends and ends[0] == len(piece) - 1 else None


def _called(piece: str) -> tuple[str, str] | None:
    """Name and arguments, where a piece is one call of a function."""
    name, bracket, rest = piece.partition("(")
    if not bracket or not name.strip().isidentifier():
        return None
    inner = _inside(bracket + rest)
    return None if inner is None else (name.strip(), inner.strip())


def _error(
    needed: str, found: str, do: str = "See the table in hbmeta.tasks.formula."
) -> DataError:
    return DataError(_WHERE, needed=needed, found=found, do=do)
