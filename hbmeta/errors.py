"""Errors that say what was needed, what was found, and what to do."""

from __future__ import annotations

from typing import Any

__all__ = [
    "ConvergenceError",
    "CurvatureError",
    "DataError",
    "FileError",
    "HbmetaError",
    "ProgramError",
    "StagingError",
    "UnsupportedModelError",
]


class HbmetaError(Exception):
    """Base of every error that the toolkit raises on purpose.

    Args:
        where: the function, class or file that noticed it.
        needed: what the caller had to provide.
        found: what was provided instead, with the offending value.
        do: the next thing to try.
    """

    def __init__(self, where: str, *, needed: str, found: str, do: str) -> None:
        self.where, self.needed, self.found, self.do = where, needed, found, do
        super().__init__(f"{where}: needed {needed}; found {found}. {do}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuilds from the parts, so that an error survives the way out of a worker process."""
        return _rebuild, (type(self), self.where, self.needed, self.found, self.do)


def _rebuild(kind: type[HbmetaError], where: str, needed: str, found: str, do: str) -> HbmetaError:
    return kind(where, needed=needed, found=found, do=do)


class DataError(HbmetaError, ValueError):
    """The data, or an argument that describes them, cannot be used."""


class ProgramError(HbmetaError, ValueError):
    """A Pyro program breaks the three-level convention; names the site and the plate."""


class UnsupportedModelError(HbmetaError, TypeError):
    """A pair of model and strategy that makes no sense; says which strategy does."""


class ConvergenceError(HbmetaError, RuntimeError):
    """An iterative method produced non-finite numbers or missed its tolerance."""


class CurvatureError(HbmetaError, ArithmeticError):
    """A curvature matrix is not positive definite; names the task and its smallest eigenvalue."""


class FileError(HbmetaError, OSError):
    """A saved file is missing, corrupt, truncated, of another kind or of a newer version."""


class StagingError(HbmetaError, RuntimeError):
    """A function cannot be traced, or its graph disagrees with it."""
