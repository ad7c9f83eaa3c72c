"""Posteriors as ArviZ InferenceData, dims named after the plates.

    posterior        (chain, draw, ...) global sites that were drawn; (chain, draw, task, ...) local
                     sites, latent and deterministic, constrained
    log_likelihood   (chain, draw, obs)
    observed_data    (obs, ...), constant_data x (obs, feature)
    sample_stats     diverging, lp and step_size of a sampler

Rows stay flat: `obs` has the coordinates obs_task, the label of the row's task, and obs_point, its
number within the task. Padding has no place here: `arviz.loo` of padded cells is NaN. A θ held at a
point has no draws: its global sites stand in constant_data, one value each, not in posterior.
A posterior without chains is one chain: fresh draws of a Gaussian, a single draw of a point, and
weighted draws resampled to equal weights. y, log-likelihood and sites are in the units of the
model; attributes y_location and y_scale lead back to the data's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import arviz
import numpy as np
import torch
from torch import Tensor

from hbmeta import __version__
from hbmeta.densities import Delta, Empirical, equal_draws

if TYPE_CHECKING:
    from hbmeta.fitted import Fitted
    from hbmeta.posterior import TaskPosterior

__all__ = ["fitted_to_inference_data", "posterior_to_inference_data"]

_RESERVED = ("chain", "draw", "task", "point", "obs", "feature", "obs_task", "obs_point", "x")

_POINT = "a point estimate: one draw, without spread"
_RESAMPLED = "weighted draws, resampled to equal weights, for each task by itself"
_INDEPENDENT = "independent draws of a Gaussian in unconstrained space"


def fitted_to_inference_data(
    fitted: Fitted, draws: int = 1000, seed: int = 0
) -> arviz.InferenceData:
    """The posterior of a fit: θ where it was drawn, and φ of the tasks fitted on.

    Args:
        fitted: the fit.
        draws: draws of a Gaussian posterior, and of a weighted one; chains come whole.
        seed: of these draws.
    Returns:
        InferenceData as the module says, sample_stats where the strategy is a sampler. Module
        parameters, which have no prior, are not in it.
    """
    posterior = fitted.posterior
    data = _Builder(posterior, draws, seed)
    attributes = {
        "strategy": fitted.strategy.name,
        "settings": json.dumps(fitted.strategy.settings()),
        "theta": "draws" if fitted.drawn else "point",
        "fit_seed": fitted.seed,
    }
    if fitted.problem.sites.globals or fitted.problem.sites.deterministic_global:
        values = fitted.globals()
        if fitted.drawn:
            data.add_drawn(values)
        else:
            data.add_constants(values)
    data.add_statistics(fitted.info)
    return data.build(attributes)


def posterior_to_inference_data(
    posterior: TaskPosterior, draws: int = 1000, seed: int = 0
) -> arviz.InferenceData:
    """The local sites of a batch of tasks, with their support.

    Global sites are not in it: draws of θ that are weighted by each task apart have no posterior in
    common. `Fitted.to_inference_data` has them.

    Args:
        posterior: q(φ | S).
        draws: draws of a Gaussian posterior, and of a weighted one; chains come whole.
        seed: of these draws.
    Returns:
        InferenceData as the module says.
    """
    return _Builder(posterior, draws, seed).build({})


class _Builder:
    """Collects the groups of one posterior."""

    def __init__(self, posterior: TaskPosterior, draws: int, seed: int) -> None:
        self.posterior, self.seed = posterior, seed
        sites = posterior.problem.sites
        every = (
            *sites.globals,
            *sites.deterministic_global,
            *sites.locals,
            *sites.deterministic_local,
            *sites.observed,
        )
        self.names = _names(site.name for site in every)
        self.response = self.names[sites.response]
        self.labels = _labels(posterior.ids)
        self.coords: dict[str, Any] = {"task": self.labels}
        self._name_entries(getattr(posterior.problem.program, "coordinates", dict)())
        self.sites: dict[str, Any] = {}
        self.dims: dict[str, list[str]] = {}
        self.constants: dict[str, Any] = {}
        self.statistics: dict[str, Any] = {}
        self.log_likelihood: Any = None
        self._add_local(draws)

    def _name_entries(self, coordinates: Mapping[str, list[str]]) -> None:
        sites = self.posterior.problem.sites
        levels = (
            sites.globals,
            sites.deterministic_global,
            sites.locals,
            sites.deterministic_local,
        )
        for site in (site for level in levels for site in level):
            entries = coordinates.get(site.name)
            if entries is not None and site.shape[-1:] == (len(entries),):
                self.coords[f"{self.names[site.name]}_dim_{len(site.shape) - 1}"] = entries

    def _add_local(self, draws: int) -> None:
        posterior, density, support = self.posterior, self.posterior.density, self.posterior.support
        self.chains, self.kind, wanted = 1, _INDEPENDENT, draws
        if isinstance(density, Delta):
            self.kind = _POINT
        elif isinstance(density, Empirical):
            wanted, self.kind = density.phi.shape[0], _RESAMPLED
            if density.log_weights is None:
                self.chains = posterior.chains
                self.kind = f"{self.chains} chain{'s' if self.chains > 1 else ''}"
        values, weights = posterior.values(wanted, self.seed)
        has_rows = support.flat_y is not None and support.n_points > 0
        rows = posterior.log_likelihood(wanted, self.seed)[0] if has_rows else None
        if weights is not None:
            # One choice for φ and the log-likelihood, so that they stay draws of each other.
            index = equal_draws(weights, draws, self.seed + 1)
            values = {name: _taken(value, index) for name, value in values.items()}
            rows = None if rows is None else _taken(rows, index[:, support.task])
        for name, value in values.items():
            key = self.names[name]
            self.sites[key] = self._by_chain(value)
            self.dims[key] = ["task", *_own_dims(key, value.ndim - 2)]
        if rows is not None:
            self.log_likelihood = self._by_chain(rows)

    def _by_chain(self, values: Tensor) -> Any:
        array = _array(values)
        return array.reshape(self.chains, array.shape[0] // self.chains, *array.shape[1:])

    def add_drawn(self, values: Mapping[str, Tensor]) -> None:
        """Global sites (draws, *shape), in the chains of the fit."""
        drawn = {self.names[name]: value for name, value in values.items()}
        self.dims |= {key: _own_dims(key, value.ndim - 1) for key, value in drawn.items()}
        self.sites = {key: self._by_chain(value) for key, value in drawn.items()} | self.sites

    def add_constants(self, values: Mapping[str, Tensor]) -> None:
        """Global sites that are held at a point."""
        for name, value in values.items():
            key = self.names[name]
            self.constants[key] = _array(value)
            self.dims[key] = _own_dims(key, value.ndim)

    def add_statistics(self, info: Mapping[str, Any]) -> None:
        """What a sampler measured at each draw, under the names that ArviZ gives it."""
        if "diverging" not in info:
            return
        diverging = info["diverging"].cpu().numpy()
        step_size = info["step_size"].cpu().numpy()[:, None]
        self.statistics = {
            "diverging": diverging,
            "lp": info["log_density"].cpu().numpy(),
            "step_size": np.broadcast_to(step_size, diverging.shape).copy(),
        }

    def build(self, attributes: Mapping[str, Any]) -> arviz.InferenceData:
        """The groups, each with all attributes."""
        support, units = self.posterior.support, self.posterior.units
        renamed = {site: name for site, name in self.names.items() if site != name}
        attributes = {
            "inference_library": "hbmeta",
            "inference_library_version": __version__,
            **attributes,
            "program": self.posterior.problem.name,
            "draws": self.kind,
            "seed": self.seed,
            "y_location": units.location,
            "y_scale": units.scale,
            "renamed_sites": json.dumps(renamed),
        }
        groups = {"posterior": self._dataset(self.sites, attributes, sampled=True)}
        if self.statistics:
            groups["sample_stats"] = self._dataset(self.statistics, attributes, sampled=True)
        constants = dict(self.constants)
        if support.n_points:
            self.dims[self.response] = ["obs"]
            if self.log_likelihood is not None:
                found = {self.response: self.log_likelihood}
                groups["log_likelihood"] = self._dataset(found, attributes, sampled=True)
            if support.flat_y is not None:
                y = _array(support.flat_y)
                self.dims[self.response] = ["obs", *_own_dims(self.response, y.ndim - 1)]
                found = {self.response: y}
                groups["observed_data"] = self._dataset(found, attributes, sampled=False)
            if support.features:
                constants["x"] = _array(support.flat_x)
        if constants:
            groups["constant_data"] = self._dataset(constants, attributes, sampled=False)
        return arviz.InferenceData(**groups, attrs=dict(attributes))

    def _dataset(
        self, values: Mapping[str, Any], attributes: Mapping[str, Any], *, sampled: bool
    ) -> Any:
        support = self.posterior.support
        dataset = arviz.dict_to_dataset(
            {name: value for name, value in values.items() if value.ndim},
            attrs=dict(attributes),
            coords={**self.coords, "feature": list(support.features)},
            dims={**self.dims, "x": ["obs", "feature"]},
            default_dims=["chain", "draw"] if sampled else [],
        )
        # Of a number ArviZ would make a vector of one.
        dataset = dataset.assign({k: ((), value) for k, value in values.items() if not value.ndim})
        if "obs" not in dataset.dims:
            return dataset
        task = support.task.cpu().numpy()
        point = np.arange(len(task)) - support.offsets.cpu().numpy()[task]
        return dataset.assign_coords(obs_task=("obs", self.labels[task]), obs_point=("obs", point))


def _names(sites: Iterable[str]) -> dict[str, str]:
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


def _labels(ids: Iterable[Any]) -> Any:
    """The tasks' labels as one array; text where some are numbers and some are not."""
    labels = list(ids)
    whole = all(isinstance(label, int) for label in labels)
    return np.array(labels if whole else [str(label) for label in labels])


def _own_dims(name: str, count: int) -> list[str]:
    return [f"{name}_dim_{number}" for number in range(count)]


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """values (draws, tasks, ...) at index (n, tasks), (n, tasks, ...)."""
    trailing = values.shape[2:]
    full = index.reshape(*index.shape, *(1,) * len(trailing)).expand(*index.shape, *trailing)
    return values.gather(0, full.to(values.device))


def _array(values: Tensor) -> Any:
    """As an array; bfloat16, which NumPy has not, as float32."""
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
