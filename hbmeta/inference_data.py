"""Fits and posteriors as ArviZ InferenceData, dims named after the plates.

    posterior             (chain, draw, ...) global sites that were drawn; (chain, draw, task, ...)
                          local sites, latent and deterministic, constrained
    posterior_predictive  (chain, draw, obs, ...) y once more, from the likelihood at each draw
    log_likelihood        (chain, draw, obs) log p(y_r | φ_i, θ) with φ of the row's own task
    sample_stats          log_p (chain, draw, task) = log p(y_i, φ_i | θ) and, where q has a
                          density, log_q = log q(φ_i), both of unconstrained φ;
                          lp (chain, draw) = log p(θ) + Σ_i log_p; diverging, step_size of a sampler
    prior                 (chain, draw, ...) all sites, from the program's own prior
    prior_predictive      (chain, draw, obs, ...)
    predictions           (chain, draw, obs, ...) y of new tasks, predictions_constant_data their x
    observed_data         (obs, ...), constant_data x (obs, feature)

Rows stay flat: `obs` has the coordinates obs_task, the label of the row's task, and obs_point, its
number within the task. Padding has no place here: `arviz.loo` of padded cells is NaN. A θ held at a
point has no draws: its global sites stand in constant_data, one value each, not in posterior.
A posterior without chains is one chain: fresh draws of a Gaussian, a single draw of a point, and
weighted draws resampled to equal weights, which have no lp in common. log_p − log_q are the log
weights of importance sampling, so that `arviz.psislw` of a task's gives its k̂. y, log-likelihood
and sites are in the units of the model; attributes y_location and y_scale lead back to the data's.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hbmeta import __version__
from hbmeta.components import Mixture
from hbmeta.densities import Delta, Empirical, Transported, equal_draws
from hbmeta.errors import ConvergenceError, DataError, UnsupportedModelError
from hbmeta.labelled import array, container, dataset, labels_of, own_dims, variable_names
from hbmeta.likelihoods import evaluating, largest_parameter, seeded
from hbmeta.simulation import simulate
from hbmeta.tasks import Episode, Tasks

if TYPE_CHECKING:
    import arviz

    from hbmeta.fitted import Fitted
    from hbmeta.posterior import TaskPosterior

__all__ = ["fitted_to_inference_data", "posterior_to_inference_data"]

_POINT = "a point estimate: one draw, without spread"
_RESAMPLED = "weighted draws, resampled to equal weights, for each task by itself"
_INDEPENDENT = "independent draws of a density in unconstrained space"
# Numbers of y that are drawn at once.
_CELLS = 4_000_000


def fitted_to_inference_data(
    fitted: Fitted,
    draws: int = 1000,
    seed: int = 0,
    *,
    new: Episode | None = None,
    prior_draws: int = 200,
) -> arviz.InferenceData:
    """The posterior of a fit: θ where it was drawn, and φ of the tasks fitted on.

    Args:
        fitted: the fit.
        draws: draws of a Gaussian posterior, and of a weighted one; chains come whole.
        seed: of these draws.
        new: tasks whose query is predicted, once the fit is adapted to their support.
        prior_draws: of the program's own prior; 0 leaves those groups out, and so does a program
            without one (the attribute `prior` says why).
    Returns:
        InferenceData as the module says. Module parameters, which have no prior, are not in it.
    Warns:
        where φ is a point, which has no sd.
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
    if prior_draws:
        names = {site.name for site in fitted.problem.sites.globals}
        own = {name: value for name, value in fitted.theta.items() if name not in names}
        attributes["prior"] = data.add_prior(own, prior_draws)
    if new is not None:
        if not isinstance(new, Episode):
            raise DataError(
                "to_inference_data",
                needed="new as an Episode: the support to adapt to and the query to predict",
                found=type(new).__name__,
                do="Pass task_set.episode, or tasks.split(...).",
            )
        data.add_predictions(fitted.posterior_of(new.support), new.query)
    return data.build(attributes)


def posterior_to_inference_data(
    posterior: TaskPosterior, draws: int = 1000, seed: int = 0, *, query: Tasks | None = None
) -> arviz.InferenceData:
    """The local sites of a batch of tasks, with their support.

    Global sites are not in it: draws of θ that are weighted by each task apart have no posterior in
    common. `Fitted.to_inference_data` has them.

    Args:
        posterior: q(φ | S).
        draws: draws of a Gaussian posterior, and of a weighted one; chains come whole.
        seed: of these draws.
        query: rows of the same tasks to predict.
    Returns:
        InferenceData as the module says.
    Warns:
        where φ is a point, which has no sd.
    """
    data = _Builder(posterior, draws, seed)
    if query is not None:
        data.add_predictions(posterior, query)
    return data.build({})


class _Builder:
    """Collects the groups of one posterior."""

    def __init__(self, posterior: TaskPosterior, draws: int, seed: int) -> None:
        self.posterior, self.draws, self.seed = posterior, draws, seed
        self.problem, sites = posterior.problem, posterior.problem.sites
        latent = (
            *sites.globals,
            *sites.deterministic_global,
            *sites.locals,
            *sites.deterministic_local,
        )
        self.names = variable_names(site.name for site in (*latent, *sites.observed))
        self.response = self.names[sites.response]
        self.coords: dict[str, Any] = {"task": labels_of(posterior.ids)}
        entries: dict[str, list[str]] = getattr(self.problem.program, "coordinates", dict)()
        self.dims: dict[str, list[str]] = {"log_p": ["task"], "log_q": ["task"]}
        for site in latent:
            key, own = self.names[site.name], own_dims(self.names[site.name], len(site.shape))
            level = site in sites.locals or site in sites.deterministic_local
            self.dims[key] = ["task", *own] if level else own
            if site.shape[-1:] == (len(entries.get(site.name, ())),):
                self.coords[own[-1]] = entries[site.name]
        self.groups: dict[str, dict[str, Any]] = {}
        self.others: dict[str, tuple[dict[str, Any], Tasks, bool]] = {}
        self.constants: dict[str, Any] = {}
        self._add_draws()

    # -- what the posterior gives -----------------------------------------------------------------

    def _add_draws(self) -> None:
        posterior, density = self.posterior, self.posterior.density
        self.chains, self.kind, wanted = 1, _INDEPENDENT, self.draws
        if isinstance(density, Delta):
            self.kind = _POINT
            warnings.warn(
                "to_inference_data: φ is a point estimate, so there is one draw and no sd: spread, "
                "intervals and arviz.loo mean nothing. Use a strategy with a density for these.",
                stacklevel=5,
            )
        elif isinstance(density, Empirical):
            wanted, self.kind = density.phi.shape[0], _RESAMPLED
            if density.log_weights is None:
                self.chains = posterior.chains
                self.kind = f"{self.chains} chain{'s' if self.chains > 1 else ''}"
        self.wanted = wanted
        values, weights = posterior.values(wanted, self.seed)
        # One choice for φ and all that goes with it, so that they stay draws of each other.
        self.chosen = None if weights is None else equal_draws(weights, self.draws, self.seed + 1)
        local = {self.names[name]: self._by_chain(value) for name, value in values.items()}
        self.groups["posterior"] = local
        known = posterior.support.flat_y is not None
        self._add_log_densities(known)
        if known and posterior.support.n_points:
            rows = posterior.log_likelihood(wanted, self.seed)[0]
            self.groups["log_likelihood"] = {self.response: self._by_chain(rows, rows=True)}
            self.groups["posterior_predictive"] = {self.response: self._replicated()}

    def _add_log_densities(self, known: bool) -> None:
        posterior, problem = self.posterior, self.problem
        statistics = self.groups["sample_stats"] = {}
        particles = posterior.particles(self.wanted, self.seed)
        if known:
            batch = problem.batch(posterior.support)
            likelihood, local, level_one = problem.over(
                lambda t, p: problem.terms(t, p, batch),
                particles.theta, particles.drawn, particles.phi, batch,
            )  # fmt: skip
            log_p = likelihood + local
            statistics["log_p"] = self._by_chain(log_p)
            if self.chosen is None:
                statistics["lp"] = self._by_chain(level_one + log_p.sum(1))
        if isinstance(posterior.density, Transported):
            with torch.no_grad():
                statistics["log_q"] = self._by_chain(posterior.density.log_prob(particles.phi))

    def _replicated(self) -> Any:
        """y at each draw, in the order of the draws where rows are independent given φ."""
        posterior, problem, support = self.posterior, self.problem, self.posterior.support
        if problem.layout == "joint" or problem.classes is not None:
            n = self.wanted if self.chosen is None else self.draws
            n = 1 if isinstance(posterior.density, Delta) else n
            found = self._predicted(posterior, support, n)
            return self._array_by_chain(found)
        particles = posterior.particles(self.wanted, self.seed)
        mixture = Mixture(problem, particles, support, support)
        count, parts = particles.phi.shape[0], []
        with seeded(self.seed + 2, problem.device), evaluating():
            each = max(1, _CELLS // largest_parameter(mixture.distribution(0, 1)))
            for start in range(0, count, each):
                family = mixture.distribution(start, min(count, start + each))
                parts.append(family.sample())
        return self._by_chain(torch.cat(parts), rows=True)

    def _predicted(self, posterior: TaskPosterior, query: Tasks, n: int) -> Tensor:
        """(n, rows, ...) draws of y, in the units of the model."""
        predictive = posterior.predict(query, draws=self.wanted, seed=self.seed)
        found = query.unpad(predictive.sample(n, self.seed + 2), dim=1)
        if not found.is_floating_point():
            return found
        return (found - posterior.units.location) / posterior.units.scale

    def _by_chain(self, values: Tensor, *, rows: bool = False) -> Any:
        """(draws, tasks or rows, ...) as (chain, draw, ...), the chosen ones of weighted draws."""
        if self.chosen is not None:
            index = self.chosen[:, self.posterior.support.task] if rows else self.chosen
            values = _taken(values, index)
        return self._array_by_chain(values)

    def _array_by_chain(self, values: Tensor) -> Any:
        found = array(values)
        return found.reshape(self.chains, found.shape[0] // self.chains, *found.shape[1:])

    # -- what the fit and the caller add ----------------------------------------------------------

    def add_drawn(self, values: Mapping[str, Tensor]) -> None:
        """Global sites (draws, *shape), in the chains of the fit."""
        drawn = {self.names[name]: self._array_by_chain(value) for name, value in values.items()}
        self.groups["posterior"] = drawn | self.groups["posterior"]

    def add_constants(self, values: Mapping[str, Tensor]) -> None:
        """Global sites that are held at a point."""
        self.constants |= {self.names[name]: array(value) for name, value in values.items()}

    def add_statistics(self, info: Mapping[str, Any]) -> None:
        """What a sampler measured at each draw, under the names that ArviZ gives it."""
        if "diverging" not in info:
            return
        diverging = info["diverging"].cpu().numpy()
        step_size = info["step_size"].cpu().numpy()[:, None]
        self.groups["sample_stats"] |= {
            "diverging": diverging,
            "lp": info["log_density"].cpu().numpy(),
            "step_size": np.broadcast_to(step_size, diverging.shape).copy(),
        }

    def add_prior(self, parameters: Mapping[str, Tensor], draws: int) -> str:
        """Draws of the program's own prior on the same x; says what was done."""
        support = self.posterior.support
        try:
            found = [
                simulate(self.problem, parameters, support, self.seed + 3 + number)
                for number in range(draws)
            ]
        except (UnsupportedModelError, ConvergenceError) as error:
            return f"left out: {error}"
        self.groups["prior"] = {
            self.names[name]: np.stack([array(one.values[name]) for one in found])[None]
            for name in found[0].values
        }
        if support.n_points:
            ys = [array(one.tasks.flat_y) for one in found if one.tasks.flat_y is not None]
            self.groups["prior_predictive"] = {self.response: np.stack(ys)[None]}
        return f"{draws} independent draws"

    def add_predictions(self, posterior: TaskPosterior, query: Tasks) -> None:
        """y of the query of tasks that the fit was adapted to."""
        if not query.n_points:
            raise DataError(
                "to_inference_data",
                needed="rows to predict",
                found="a query without any",
                do="Split with a support below 1.",
            )
        n = 1 if isinstance(posterior.density, Delta) else self.draws
        drawn = {self.response: array(self._predicted(posterior, query, n))[None]}
        self.others["predictions"] = (drawn, query, True)
        if query.features:
            x = {"x": array(query.flat_x)}
            self.others["predictions_constant_data"] = (x, query, False)

    # -- all together -----------------------------------------------------------------------------

    def build(self, attributes: Mapping[str, Any]) -> arviz.InferenceData:
        """The groups, each with all attributes."""
        support, units = self.posterior.support, self.posterior.units
        renamed = {site: name for site, name in self.names.items() if site != name}
        attributes = {
            "inference_library": "hbmeta",
            "inference_library_version": __version__,
            **attributes,
            "program": self.problem.name,
            "draws": self.kind,
            "seed": self.seed,
            "y_location": units.location,
            "y_scale": units.scale,
            "renamed_sites": json.dumps(renamed),
        }
        parts: dict[str, tuple[dict[str, Any], Tasks, bool]] = {
            name: (values, support, True) for name, values in self.groups.items() if values
        }
        parts |= self.others
        constants = dict(self.constants)
        if support.n_points:
            if support.flat_y is not None:
                parts["observed_data"] = ({self.response: array(support.flat_y)}, support, False)
            if support.features:
                constants["x"] = array(support.flat_x)
        if constants:
            parts["constant_data"] = (constants, support, False)
        groups = {name: self._group(part, attributes) for name, part in parts.items()}
        found: arviz.InferenceData = container(groups, attributes)
        return found

    def _group(
        self, part: tuple[dict[str, Any], Tasks, bool], attributes: Mapping[str, Any]
    ) -> Any:
        values, tasks, sampled = part
        dims = {**self.dims, "x": ["obs", "feature"]}
        if self.response in values:
            event = values[self.response].ndim - 1 - 2 * sampled
            dims[self.response] = ["obs", *own_dims(self.response, event)]
        labels = labels_of(tasks.ids)
        coords = {**self.coords, "task": labels, "feature": list(tasks.features)}
        found = dataset(values, dims, coords, attributes, sampled=sampled)
        if "obs" not in found.dims:
            return found
        task = tasks.task.cpu().numpy()
        point = np.arange(len(task)) - tasks.offsets.cpu().numpy()[task]
        return found.assign_coords(obs_task=("obs", labels[task]), obs_point=("obs", point))


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """values (draws, tasks, ...) at index (n, tasks), (n, tasks, ...)."""
    trailing = values.shape[2:]
    full = index.reshape(*index.shape, *(1,) * len(trailing)).expand(*index.shape, *trailing)
    return values.gather(0, full.to(values.device))
