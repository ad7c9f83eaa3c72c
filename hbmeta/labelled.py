"""Named arrays: datasets with dims and labels, and ArviZ's container of them.

All that depends on the version of ArviZ is `container`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import arviz
import numpy as np
import torch
import xarray
from torch import Tensor

__all__ = ["array", "container", "dataset", "labels_of", "own_dims", "variable_names"]

_RESERVED = ("chain", "draw", "task", "point", "obs", "feature", "obs_task", "obs_point", "x")


def container(groups: Mapping[str, xarray.Dataset], attributes: Mapping[str, Any]) -> Any:
    """The groups as what ArviZ works on: InferenceData up to 0.x, xarray's DataTree from 1.0 on."""
    if hasattr(arviz, "InferenceData"):
        named: Any = groups  # its own signature takes these for its flags
        return arviz.InferenceData(**named, attrs=dict(attributes))
    tree = xarray.DataTree.from_dict({f"/{name}": group for name, group in groups.items()})
    tree.attrs.update(attributes)
    return tree


def dataset(
    values: Mapping[str, Any],
    dims: Mapping[str, list[str]],
    coords: Mapping[str, Any],
    attributes: Mapping[str, Any],
    *,
    sampled: bool,
) -> xarray.Dataset:
    """One group.

    Args:
        values: arrays by variable.
        dims: names of the axes of each, without those of chain and draw.
        coords: labels by name of an axis; numbers from 0 on where there are none.
        attributes: of the group.
        sampled: whether the arrays begin with the axes chain and draw.
    """
    first = ["chain", "draw"] if sampled else []
    variables = {name: ([*first, *dims.get(name, [])], value) for name, value in values.items()}
    sizes = {
        axis: length
        for axes, value in variables.values()
        for axis, length in zip(axes, np.shape(value), strict=True)
    }
    labels = {axis: coords.get(axis, np.arange(length)) for axis, length in sizes.items()}
    return xarray.Dataset(variables, coords=labels, attrs=dict(attributes))


def variable_names(sites: Iterable[str]) -> dict[str, str]:
    """Names of variables: no slash, which netCDF keeps for groups, and no name of a dimension."""
    out: dict[str, str] = {}
    taken = set(_RESERVED)
    for site in sites:
        name = site.replace("/", "_")
        while name in taken:
            name += "_"
        taken.add(name)
        out[site] = name
    return out


def labels_of(ids: Iterable[Any]) -> Any:
    """The tasks' labels as one array; text where some are numbers and some are not."""
    labels = list(ids)
    whole = all(isinstance(label, int) for label in labels)
    return np.array(labels if whole else [str(label) for label in labels])


def own_dims(name: str, count: int) -> list[str]:
    """Names of the axes of one value of a site."""
    return [f"{name}_dim_{number}" for number in range(count)]


def array(values: Tensor) -> Any:
    """As an array; bfloat16, which NumPy has not, as float32."""
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
