"""The three-level program, written once, and its ready-made instances."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hbmeta.errors import FileError, UnsupportedModelError
from hbmeta.models.class_conditional import ClassConditional
from hbmeta.models.formula import FormulaModel, from_formula
from hbmeta.models.gaussian_process import GaussianProcess
from hbmeta.models.hierarchical import HierarchicalModel
from hbmeta.models.latent_process import LatentProcess
from hbmeta.models.linear_regression import LinearRegression
from hbmeta.models.neural import NeuralClassifier, NeuralRegression
from hbmeta.models.varying_effects import Priors, VaryingEffects

__all__ = [
    "READY_MADE",
    "ClassConditional",
    "FormulaModel",
    "GaussianProcess",
    "HierarchicalModel",
    "LatentProcess",
    "LinearRegression",
    "NeuralClassifier",
    "NeuralRegression",
    "Priors",
    "VaryingEffects",
    "from_formula",
    "model_from_state",
]

READY_MADE: dict[str, type[HierarchicalModel]] = {
    "ClassConditional": ClassConditional,
    "FormulaModel": FormulaModel,
    "GaussianProcess": GaussianProcess,
    "LatentProcess": LatentProcess,
    "LinearRegression": LinearRegression,
    "NeuralClassifier": NeuralClassifier,
    "NeuralRegression": NeuralRegression,
    "VaryingEffects": VaryingEffects,
}
"""The models that a saved file can name."""


def model_from_state(state: Mapping[str, Any]) -> HierarchicalModel:
    """Build a ready-made model as it was when `HierarchicalModel.state` was called, without data.

    Args:
        state: what `state()` returned, also after a passage through JSON.
    Returns:
        The model, bound as it was; values of its parameters, if it has any, are not in the state.
    Raises:
        UnsupportedModelError: the class is none of the ready-made ones.
        FileError: the state is incomplete, or its arguments are not those of the class.
    """
    where = "model_from_state"
    if not {"class", "settings", "bound"} <= state.keys():
        raise FileError(
            where,
            needed="the entries 'class', 'settings' and 'bound'",
            found=f"{sorted(state)}",
            do="Save the model again.",
        )
    name = state["class"]
    if name not in READY_MADE:
        raise UnsupportedModelError(
            where,
            needed=f"a ready-made model: {', '.join(READY_MADE)}",
            found=f"class {name!r}",
            do="Load a model of your own with hbmeta.load(path, model=program).",
        )
    try:
        model = READY_MADE[name](**state["settings"])
        return model if state["bound"] is None else model.restore(state["bound"])
    except (TypeError, ValueError, KeyError) as error:
        raise FileError(
            where,
            needed=f"settings and bound state of {name}",
            found=f"{type(error).__name__}: {error}",
            do="Load it with the version of hbmeta that saved it, or save the model again.",
        ) from error
