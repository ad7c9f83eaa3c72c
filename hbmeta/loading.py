"""Reads a fit back from its file; nothing is unpickled."""

from __future__ import annotations

import json
from typing import Any

from hbmeta import inference
from hbmeta.errors import FileError, UnsupportedModelError
from hbmeta.files import read_tensors
from hbmeta.fitted import Fitted, fitted_from_file
from hbmeta.inference import Strategy
from hbmeta.models import READY_MADE, HierarchicalModel, model_from_state
from hbmeta.program import Program, program_name

__all__ = ["load", "strategies", "strategy_from_settings"]

_HEADER = (
    *("strategy", "settings", "model", "program", "layout", "drawn", "density", "ids", "features"),
    *("sites", "history", "info", "schema", "seed", "seconds", "chains"),
)


def strategies() -> dict[str, type[Strategy]]:
    """The strategies of the toolkit by name."""
    found = (getattr(inference, name) for name in inference.__all__)
    return {
        one.__name__: one
        for one in found
        if isinstance(one, type) and issubclass(one, Strategy) and one is not Strategy
    }


def strategy_from_settings(
    name: str, settings: dict[str, Any], where: str = "strategy"
) -> Strategy:
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
        strategy: Strategy = known[name](**settings)
        return strategy
    except TypeError as error:
        raise FileError(
            where, needed=f"settings of {name}", found=str(error), do="Fit again with this version."
        ) from error


def _subclasses(base: type[Any]) -> list[type[Any]]:
    out: list[type[Any]] = []
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
            is another program; or no strategy has the name in the file.
    """
    tensors, header = read_tensors(path)
    if header.get("kind") != "fitted":
        raise FileError(
            str(path),
            needed="a file written by Fitted.save",
            found=f"an hbmeta file of kind {header.get('kind')!r}",
            do="Pass a checkpoint as checkpoint= to fit instead.",
        )
    missing = [key for key in _HEADER if key not in header]
    if missing:
        raise FileError(
            str(path),
            needed="a complete file of a fit",
            found=f"no {missing[0]!r}",
            do="Save the fit again with this version.",
        )
    strategy = strategy_from_settings(header["strategy"], header["settings"], str(path))
    return fitted_from_file(path, tensors, header, strategy, _program(path, header, model))


def _program(path: Any, header: dict[str, Any], model: Program | None) -> Program:
    """The program of the fit: a ready-made model from the file, any other one as given."""
    state = header["model"]
    name = header["program"] if model is None else program_name(model)
    ready_made = state is not None and state["class"] in READY_MADE
    if name != header["program"] or (model is None and not ready_made):
        raise UnsupportedModelError(
            str(path),
            needed=f"the program {header['program'] if state is None else state['class']!r} that "
            "was fitted, which the file cannot build again",
            found="no model=" if model is None else f"model={name}",
            do="Call hbmeta.load(path, model=program) with the same function or module.",
        )
    if ready_made:
        return model_from_state(state)
    assert model is not None
    if isinstance(model, HierarchicalModel) and state is not None:
        _require_same_settings(path, dict(model.settings()), state["settings"])
    if isinstance(model, HierarchicalModel) and state is not None and state["bound"] is not None:
        return model.restore(state["bound"])
    return model


def _require_same_settings(path: Any, given: Any, saved: Any) -> None:
    """Raises where a model has another setting than the one that was fitted."""
    given = json.loads(json.dumps(given))  # tuples become lists, as in the file
    for key in sorted({*given, *saved}):
        if given.get(key) != saved.get(key):
            raise UnsupportedModelError(
                str(path),
                needed=f"a model with {key}={saved.get(key)!r}, as fitted",
                found=repr(given.get(key)),
                do="Pass the model of the fit as model=.",
            )
