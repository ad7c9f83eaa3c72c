"""Reads a fit back from its file; nothing is unpickled."""

from __future__ import annotations

from typing import Any

from hbmeta import inference
from hbmeta.errors import FileError, UnsupportedModelError
from hbmeta.files import read_tensors
from hbmeta.fitted import Fitted, fitted_from_file
from hbmeta.inference import Strategy
from hbmeta.inspection import program_name
from hbmeta.models import model_from_state
from hbmeta.program import Program

__all__ = ["load", "strategy_from_settings", "strategies"]


def strategies() -> dict[str, type[Strategy]]:
    """The strategies of the toolkit by name."""
    found = (getattr(inference, name) for name in inference.__all__ if name != "Strategy")
    return {strategy.__name__: strategy for strategy in found}


def strategy_from_settings(name: str, settings: dict[str, Any], where: str = "strategy") -> Strategy:
    """A strategy of the toolkit from its name and settings.

    Raises:
        UnsupportedModelError: no strategy has this name.
        FileError: the settings are not those of the strategy.
    """
    known = strategies() | {s.__name__: s for s in _subclasses(Strategy)}
    if name not in known:
        raise UnsupportedModelError(
            where,
            needed=f"a strategy among {', '.join(sorted(known))}",
            found=repr(name),
            do="Check the spelling, or import the module that defines it before loading.",
        )
    try:
        return known[name](**settings)
    except TypeError as error:
        raise FileError(
            where, needed=f"settings of {name}", found=str(error), do="Fit again with this version."
        ) from error


def _subclasses(base: type[Strategy]) -> list[type[Strategy]]:
    out = []
    for child in base.__subclasses__():
        out += [child, *_subclasses(child)]
    return out


def load(path: Any, *, model: Program | None = None) -> Fitted:
    """The fit that `Fitted.save` wrote.

    Args:
        path: the file.
        model: the program of the fit, for one that is not a ready-made model.
    Raises:
        FileError: missing, corrupt, truncated, of another kind or of a newer version.
        UnsupportedModelError: the fit was of a person's own program and `model` is not given, or it
            is another program.
    """
    tensors, header = read_tensors(path)
    if header.get("kind") != "fitted":
        raise FileError(
            str(path),
            needed="a file written by Fitted.save",
            found=f"an hbmeta file of kind {header.get('kind')!r}",
            do="Pass a checkpoint as checkpoint= to fit instead.",
        )
    strategy = strategy_from_settings(header["strategy"], header["settings"], str(path))
    if header["model"] is not None:
        program: Program = model_from_state(header["model"])
    elif model is not None:
        program = model
    else:
        raise UnsupportedModelError(
            str(path),
            needed=f"the program {header['program']!r} that was fitted",
            found="no model=",
            do="Call hbmeta.load(path, model=program) with the same function or module.",
        )
    if header["model"] is None and program_name(program) != header["program"]:
        raise UnsupportedModelError(
            str(path),
            needed=f"the program {header['program']!r} that was fitted",
            found=repr(program_name(program)),
            do="Pass the same function or module as model=.",
        )
    return fitted_from_file(path, tensors, header, strategy, program)
