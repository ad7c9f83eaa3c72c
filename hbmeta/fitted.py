"""What `fit` returns: a strategy with its θ, ready for new tasks, data frames and files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hbmeta import __version__
from hbmeta.densities import Density
from hbmeta.errors import DataError, FileError, HbmetaError, UnsupportedModelError
from hbmeta.families import Flow, LowRank
from hbmeta.files import write_tensors
from hbmeta.models import HierarchicalModel
from hbmeta.models.responses import check_like_fit
from hbmeta.posterior import TaskPosterior, Units
from hbmeta.problem import Problem
from hbmeta.program import Program, Theta
from hbmeta.structured import DENSITIES
from hbmeta.tasks import Schema, Tasks, TaskSet
from hbmeta.tasks.checks import check_seed
from hbmeta.triangular import positive_definite_at

if TYPE_CHECKING:
    import arviz
    import pandas

    from hbmeta.inference.strategy import Strategy

__all__ = ["Fitted", "Seconds"]


@dataclass(frozen=True)
class Seconds:
    """Wall-clock seconds: all of `fit`, and the part of it spent tracing and compiling."""

    fit: float
    staging: float = 0.0


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fitted strategy. Adapting never changes θ.

    Attributes:
        strategy: the settings that were fitted.
        model: the program, as bound to the data.
        problem: its functional view.
        theta: module parameters and unconstrained global sites; draws where `drawn`.
        drawn: True where θ is a set of draws of its posterior, False where it is held at a point.
        own: what the strategy learned besides θ (an encoder), or None.
        tasks: the tasks of the fit.
        density: q over their φ, where the fit itself produced it; otherwise adapting gives it.
        history: loss of each recorded step.
        info: what was measured (R̂, effective draws, evidence, …); tensors, numbers and text.
        schema: how columns of a data frame become x and y, where the tasks came from one.
        seed: the seed of the fit.
        seconds: what it took.
    """

    strategy: Strategy
    model: Program
    problem: Problem
    theta: Theta
    drawn: bool
    own: nn.Module | None
    tasks: Tasks
    density: Density | None
    history: tuple[float, ...]
    info: dict[str, Any]
    schema: Schema | None
    seed: int
    seconds: Seconds
    chains: int = 1
    _cache: dict[str, TaskPosterior] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        kind = "draws" if self.drawn else "point"
        tasks, seconds = self.tasks.n_tasks, self.seconds.fit
        return f"Fitted({self.strategy!r}, theta={kind}, tasks={tasks}, seconds={seconds:.1f})"

    @property
    def units(self) -> Units:
        """y of the data = location + scale · y of the model."""
        return (
            Units() if self.schema is None else Units(self.schema.y_location, self.schema.y_scale)
        )

    @property
    def posterior(self) -> TaskPosterior:
        """The posterior of the tasks fitted on, as the fit left it; by id with `select`."""
        if "fit" not in self._cache:
            if self.density is None:
                self._cache["fit"] = self.adapt(self.tasks)
            else:
                self._cache["fit"] = TaskPosterior(
                    self.problem,
                    self.theta,
                    self.density,
                    self.tasks,
                    drawn=self.drawn,
                    chains=self.chains,
                    units=self.units,
                )
        return self._cache["fit"]

    def adapt(self, support: Tasks | TaskSet, *, seed: int = 0, **overrides: Any) -> TaskPosterior:
        """q(φ_i | S_i) of new tasks at the θ of the fit.

        Args:
            support: the tasks' support; a task without rows gets what the strategy says of a task
                without data.
            seed: for strategies that draw.
            overrides: settings of the strategy to change for this call, such as steps=10 for MAML;
                those that `strategy.adaptable()` names.
        Raises:
            DataError: the support is no tasks with y, its features are not those of the fit, y is
                of another kind or outside the response, or a setting cannot be changed.
            UnsupportedModelError: a setting that makes no sense for the program.
        """
        tasks = support.support if isinstance(support, TaskSet) else support
        self._check_support(tasks)
        seed = check_seed(seed, where="adapt")
        strategy = self.strategy
        if overrides:
            strategy = strategy.replaced(**overrides)
            strategy.check(self.problem)
        tasks = tasks.to(device=self.problem.device, dtype=self.problem.dtype)
        self._check_y(tasks)
        with positive_definite_at(f"{strategy.name}.adapt", "while adapting"):
            return strategy.adapt(self, tasks, seed)

    def posterior_of(self, support: Tasks) -> TaskPosterior:
        """The posterior of the fit where it saw these tasks with these data, else `adapt`."""
        if not all(self.saw(support)):
            return self.adapt(support)
        return (
            self.posterior if support.ids == self.tasks.ids else self.posterior.select(support.ids)
        )

    def saw(self, support: Tasks) -> list[bool]:
        """For each task, whether the fit saw it (by id) with these very rows, in any order."""
        if support.same_data(self.tasks):
            return [True] * support.n_tasks
        known = set(self.tasks.ids)
        return [
            i in known and _rows_of(support[k : k + 1]) == _rows_of(self.tasks.select([i]))
            for k, i in enumerate(support.ids)
        ]

    def globals(self) -> dict[str, Tensor]:
        """Constrained global sites: a value each, or draws (draws, *shape)."""
        batch = self.problem.batch(self.tasks[:1])
        names = [
            s.name for s in (*self.problem.sites.globals, *self.problem.sites.deterministic_global)
        ]
        if not self.drawn:
            with torch.no_grad():
                found = self.problem.run(self.theta, {}, batch, with_y=False).values
            return {name: found[name] for name in names}
        draws = next(self.theta[s.name] for s in self.problem.sites.globals).shape[0]
        phi = torch.zeros(draws, 1, self.problem.sites.phi_size, dtype=self.problem.dtype)
        found = self.problem.particle_values(self.theta, True, phi.to(self.problem.device), batch)
        return {name: found[name] for name in names}

    def predict(
        self,
        frame: pandas.DataFrame,
        *,
        support: pandas.DataFrame | None = None,
        interval: float = 0.9,
        seed: int = 0,
    ) -> pandas.DataFrame:
        """Predictions for the rows of a data frame, of known and of new groups.

        Args:
            frame: the columns of the fit; y is not needed.
            support: observed rows of new groups. A new group without any gets the prediction of a
                task without data.
            interval: probability of the central interval.
            seed: for strategies and families that draw.
        Returns:
            a frame with the index of `frame`: the group column, `status` ("known", "adapted" or
            "new"), `mean`, `sd`, `lower`, `upper`.
        """
        from hbmeta.framing import predict_frame

        return predict_frame(self, frame, support, interval, seed)

    def to_inference_data(self, *, draws: int = 1000, **more: Any) -> arviz.InferenceData:
        """ArviZ groups; arguments as of `hbmeta.inference_data.fitted_to_inference_data`."""
        from hbmeta.inference_data import fitted_to_inference_data

        return fitted_to_inference_data(self, draws, **more)

    def save(self, path: Any) -> None:
        """Writes one safetensors file with a JSON header, atomically; `hbmeta.load` reads it.

        The file holds the tasks of the fit (they carry its posterior): treat it as you treat them.
        """
        tensors: dict[str, Tensor] = {f"theta/{k}": v for k, v in self.theta.items()}
        if self.own is not None:
            tensors |= {f"own/{k}": v for k, v in self.own.state_dict().items()}
        tensors |= {"tasks/x": self.tasks.flat_x, "tasks/task": self.tasks.task}
        if self.tasks.flat_y is not None:
            tensors["tasks/y"] = self.tasks.flat_y
        kind = None
        if self.density is not None:
            kind = type(self.density).__name__
            for name, value in vars(self.density).items():
                if isinstance(value, Tensor):
                    tensors[f"density/{name}"] = value
        info: dict[str, Any] = {}
        for name, value in self.info.items():
            if isinstance(value, Tensor):
                tensors[f"info/{name}"] = value
            else:
                info[name] = value
        model = self.model.state() if isinstance(self.model, HierarchicalModel) else None
        header = {
            "kind": "fitted",
            "hbmeta": __version__,
            "strategy": self.strategy.name,
            "settings": self.strategy.settings(),
            "model": model,
            "program": self.problem.name,
            "layout": self.problem.layout,
            "sites": _sites_of(self.problem),
            "drawn": self.drawn,
            "density": kind,
            "ids": list(self.tasks.ids),
            "features": list(self.tasks.features),
            "history": list(self.history),
            "info": info,
            "schema": None if self.schema is None else self.schema.to_json(),
            "seed": self.seed,
            "seconds": [self.seconds.fit, self.seconds.staging],
            "chains": self.chains,
        }
        try:
            json.dumps(header)
        except TypeError as error:
            raise FileError(
                str(path),
                needed="settings and labels that JSON can hold",
                found=str(error),
                do="Use str or int ids.",
            ) from error
        write_tensors(path, tensors, header)

    def _check_support(self, tasks: Tasks) -> None:
        if not isinstance(tasks, Tasks):
            raise DataError(
                "adapt",
                needed="the support as Tasks or a TaskSet",
                found=type(tasks).__name__,
                do="Pass the support of an Episode; for a data frame call fitted.predict.",
            )
        if tasks.features != self.tasks.features:
            raise DataError(
                "adapt",
                needed=f"the features of the fit, {list(self.tasks.features)}",
                found=str(list(tasks.features)),
                do="Build the tasks from the same columns in the same order.",
            )
        y, known = tasks.flat_y, self.tasks.flat_y
        if y is None or (known is not None and y.shape[1:] != known.shape[1:]):
            raise DataError(
                "adapt",
                needed="y of the support, as in the fit",
                found=f"{tasks!r}",
                do="Build the tasks with y; those without data have no rows, tasks.keep(...).",
            )

    def _check_y(self, tasks: Tasks) -> None:
        if tasks.n_points == 0 or self.tasks.flat_y is None:
            return
        response = None
        if self.problem.layout != "joint":
            with torch.no_grad():
                batch = self.problem.batch(tasks)
                theta = self.problem.theta(batch) if self.drawn else self.theta
                response = self.problem.response(theta, {}, batch)
        check_like_fit(tasks, self.tasks.flat_y, response, where="adapt")


def _rows_of(tasks: Tasks) -> tuple[torch.dtype, list[list[float]]]:
    """The rows of x and y as a multiset."""
    rows = tasks.flat_x
    if tasks.flat_y is not None:
        y = tasks.flat_y.to(rows.dtype)
        rows = torch.cat([rows, y if y.dim() == 2 else y.unsqueeze(-1)], 1)
    return tasks.dtype, sorted(rows.tolist())


def _sites_of(problem: Problem) -> dict[str, list[Any]]:
    """Names, families and shapes of what a fit holds numbers for, as JSON gives them back."""
    return {
        "parameters": [[name, list(value.shape)] for name, value in problem.parameters()],
        "globals": [[s.name, s.family, list(s.shape)] for s in problem.sites.globals],
        "locals": [[s.name, s.family, list(s.shape)] for s in problem.sites.locals],
        "observed": [[s.name, s.family, list(s.shape)] for s in problem.sites.observed],
    }


def _require_same_sites(path: Any, saved: Mapping[str, Any], problem: Problem) -> None:
    """Raises, naming the first site or parameter that is not as saved."""
    found = _sites_of(problem)
    for level in found:
        was = {site[0]: site[1:] for site in saved.get(level, [])}
        now = {site[0]: site[1:] for site in found[level]}
        for name in [*was, *now]:
            if was.get(name) != now.get(name):
                raise UnsupportedModelError(
                    str(path),
                    needed=_described(level, name, was.get(name)),
                    found=f"{_described(level, name, now.get(name))} in {problem.name}",
                    do="Pass the program of the fit as model=.",
                )


def _described(level: str, name: str, kind: list[Any] | None) -> str:
    what = "parameter" if level == "parameters" else "site"
    if kind is None:
        return f"no {what} {name!r} among the {level}"
    return f"{what} {name!r} {', '.join(str(part) for part in kind)} among the {level}"


@contextlib.contextmanager
def _reading(path: Any) -> Iterator[None]:
    """What a file lacks, or holds in another shape, as an error about the file."""
    try:
        yield
    except HbmetaError:
        raise
    except (KeyError, RuntimeError, TypeError) as error:
        raise FileError(
            str(path),
            needed="a complete file of a fit",
            found=f"{type(error).__name__}: {error}",
            do="Save the fit again with this version.",
        ) from error


def fitted_from_file(
    path: Any,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    strategy: Strategy,
    model: Program,
) -> Fitted:
    """The inverse of `Fitted.save`, given the strategy and the program."""

    def group(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    with _reading(path):
        schema = None if header["schema"] is None else Schema.from_json(header["schema"])
        tasks = Tasks.from_flat(
            tensors["tasks/x"],
            tensors.get("tasks/y"),
            tensors["tasks/task"],
            len(header["ids"]),
            ids=header["ids"],
            features=header["features"],
        )
        problem = Problem(model, tasks, layout=header["layout"])
    _require_same_sites(path, header["sites"], problem)
    with _reading(path):
        theta = group("theta/")
        own = strategy.parameters(problem, tasks, header["seed"])
        if own is not None:
            own.load_state_dict(group("own/"))
        kinds: dict[str, Any] = {k.__name__: k for k in (*DENSITIES, LowRank, Flow)}
        density = (
            None if header["density"] is None else kinds[header["density"]](**group("density/"))
        )
        seconds = Seconds(*header["seconds"])
        info = {**header["info"], **group("info/")}
    return Fitted(
        strategy=strategy,
        model=model,
        problem=problem,
        theta=theta,
        drawn=header["drawn"],
        own=own,
        tasks=tasks,
        density=density,
        history=tuple(header["history"]),
        info=info,
        schema=schema,
        seed=header["seed"],
        seconds=seconds,
        chains=header["chains"],
    )
