"""Numbers with their standard errors, and columns of text, aligned."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["aligned", "digits_for", "plus_minus"]


def digits_for(errors: Sequence[float]) -> int:
    """Decimals that show two figures of the smallest standard error, from 1 to 4."""
    finite = [error for error in errors if math.isfinite(error) and error > 0]
    return 3 if not finite else min(4, max(1, 1 - math.floor(math.log10(min(finite)))))


def plus_minus(value: float, error: float, digits: int, sign: str = "") -> str:
    """A number such as "1.154 ± 0.021"; without the error where that is NaN."""
    if abs(value) >= 1e5 or not math.isfinite(value):
        return f"{value:{sign}.3g}"
    if math.isnan(error):
        return f"{value:{sign}.{digits}f}"
    return f"{value:{sign}.{digits}f} ± {error:.{digits}f}"


def aligned(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns as wide as their widest cell, the first flush left, the others right."""
    rows = [head, *body]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines
