"""Reads the sites of a program from one validated run and checks the three-level convention."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.distributions import biject_to

from hbmeta.errors import DataError, ProgramError
from hbmeta.locations import location
from hbmeta.program import (
    Batch,
    Program,
    is_deterministic,
    is_subsample,
    isolated,
    program_name,
)
from hbmeta.sites import Site, Sites

__all__ = ["inspect_program"]


class _Inspect(Messenger):
    """Records every site of one run, latents drawn at their prior's location."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.messages: list[dict[str, Any]] = []
        own = program.parameters() if isinstance(program, nn.Module) else ()
        self.own = {id(parameter) for parameter in own}

    def _pyro_sample(self, message: Any) -> None:
        if (
            not (is_subsample(message) or message["is_observed"])
            and not message["fn"].has_enumerate_support
        ):
            with contextlib.suppress(ProgramError, NotImplementedError):
                message["value"] = location(message["fn"], message["name"])
                message["done"] = True

    def _pyro_post_sample(self, message: Any) -> None:
        if not is_subsample(message):
            self.messages.append(dict(message))

    def _pyro_param(self, message: Any) -> None:
        # A PyroModule announces its own parameters: a plain one as the initial value, a PyroParam
        # with its constraint, and with no initial value because it put it into the store before.
        initial = message["args"][1:]
        if not self.own or (initial and id(initial[0]) not in self.own):
            raise ProgramError(
                f"pyro.param {message['name']!r}",
                needed="level-1 parameters by pyro.sample or as nn.Parameter of a PyroModule",
                found="a pyro.param statement",
                do="Draw it with pyro.sample, or make the program a PyroModule that owns it.",
            )
        if initial:
            # Past Pyro's store, which would make a frozen parameter require a gradient.
            message["value"], message["done"] = initial[0], True


def inspect_program(program: Program, batch: Batch) -> Sites:
    """Reads the sites of a program from one validated run on real data.

    Args:
        program: the program.
        batch: data with at least one row; its layout is the one that is checked.
    Returns:
        The sites by level.
    Raises:
        ProgramError: the program breaks the convention; names the site and the plate.
        DataError: y lies outside the support of the response; names the site and a value.
    """
    name = program_name(program)
    record = _Inspect(program)
    with torch.random.fork_rng(devices=[]), isolated(batch.x, validate=True):
        torch.manual_seed(0)
        with record:
            try:
                batch.run(program, with_y=True)
            except (ProgramError, DataError):
                raise
            except Exception as error:
                # A site that broke the convention before is the likelier cause.
                _Reader(name, batch).check(record.messages)
                y = None if batch.y is None else tuple(batch.y.shape)
                said = next(iter(str(error).splitlines()), "")
                raise ProgramError(
                    name,
                    needed=f"a program that runs on x {tuple(batch.x.shape)}, y {y}"
                    f" in the {batch.layout} layout",
                    found=f"{type(error).__name__}: {said}",
                    do=_remedy(str(error)),
                ) from error
        return _Reader(name, batch).read(record.messages)


def _remedy(error: str) -> str:
    if "inside plate" in error:
        return "Add .to_event(1) to vectors, and check the size and dim of the plate."
    if "scale_tril" in error or "PositiveDefinite" in error:
        return "The covariance is singular: add noise, or drop points with equal x."
    if "dtype" in error:
        return "Make the program's constants in the dtype of x, or convert: tasks.to(dtype=...)."
    return "Call it on these shapes by hand to see where it fails."


class _Reader:
    """Checks the convention site by site and sorts the sites into levels."""

    def __init__(self, name: str, batch: Batch) -> None:
        self.name, self.batch = name, batch
        self.layout, self.nested = batch.layout, batch.layout == "nested"
        self.frames: dict[str, Any] = {}

    def read(self, messages: list[dict[str, Any]]) -> Sites:
        groups: dict[str, list[Site]] = {
            key: [] for key in ("global", "local", "observed", "det_local", "det_global")
        }
        seen: set[str] = set()
        for message in messages:
            if message["name"] in seen:
                raise self.error(
                    message,
                    "a name of its own for every site",
                    "two sites of this name",
                    "Rename one.",
                )
            seen.add(message["name"])
            self.check_plates(message)
            frames = [frame.name for frame in message["cond_indep_stack"]]
            local = "task" in frames
            if is_deterministic(message):
                value = message["value"]
                shape = (
                    tuple(value.shape[2 if self.nested else 1 :]) if local else tuple(value.shape)
                )
                key = (
                    "det_local"
                    if local and "point" not in frames
                    else "det_global"
                    if not local
                    else None
                )
                if key:
                    groups[key].append(
                        Site(message["name"], "deterministic", "Delta", shape, shape, True)
                    )
            elif message["is_observed"]:
                if type(message["fn"]).__name__ != "Unit":
                    groups["observed"].append(self.observed(message, frames))
            else:
                groups["local" if local else "global"].append(self.latent(message, local, frames))
        self.check_whole(groups, messages)
        response = self.response(groups["observed"], messages)
        return Sites(
            tuple(groups["global"]),
            tuple(groups["local"]),
            tuple(groups["observed"]),
            tuple(groups["det_local"]),
            tuple(groups["det_global"]),
            response,
        )

    def check(self, messages: list[dict[str, Any]]) -> None:
        """Raises at the first site that breaks the convention, of a run that may have failed."""
        for message in messages:
            self.check_plates(message)
            if not (message["is_observed"] or is_deterministic(message)):
                frames = [frame.name for frame in message["cond_indep_stack"]]
                self.latent(message, "task" in frames, frames)

    def error(self, message: Mapping[str, Any], needed: str, found: str, do: str) -> ProgramError:
        return ProgramError(
            f"{self.name}, site {message['name']!r}", needed=needed, found=found, do=do
        )

    def check_plates(self, message: Mapping[str, Any]) -> None:
        rows = self.batch.x.shape[0 if self.layout == "flat" else 1]
        cells = {"task": self.batch.n_tasks, "point": rows}
        names = [frame.name for frame in message["cond_indep_stack"]]
        if self.layout == "joint" and "point" in names:
            raise self.error(
                message,
                "no plate `point` in a program with the keyword `mask` (joint layout)",
                "one",
                "Leave the keyword `mask` out: points that are independent given φ need none.",
            )
        if self.layout == "flat" and "task" in names and "point" in names:
            raise self.error(
                message,
                "plates `task` and `point` side by side in the flat layout",
                "`point` nested inside `task`",
                "Leave the `task` plate before `point` and index φ by `task`.",
            )
        for frame in message["cond_indep_stack"]:
            known = self.frames.setdefault(frame.name, frame)
            if names.count(frame.name) > 1 or (known.size, known.dim) != (frame.size, frame.dim):
                raise self.error(
                    message,
                    f"one plate named {frame.name!r}",
                    f"two (sizes {known.size} and {frame.size}, dims {known.dim} and {frame.dim})",
                    "Give the other plate a name of its own.",
                )
            if frame.name in cells and frame.size != cells[frame.name]:
                raise self.error(
                    message,
                    f"plate {frame.name!r} of size {cells[frame.name]}, without subsampling",
                    f"size {frame.size}",
                    "Size it by the shape of x (or n_tasks); fit(tasks_per_step=...) subsamples.",
                )
            expected = -2 if self.nested and frame.name == "task" else -1
            if frame.name in cells and frame.dim != expected:
                raise self.error(
                    message,
                    f"plate {frame.name!r} at dim {expected} in the {self.batch.layout} layout",
                    f"dim {frame.dim}",
                    f"Write pyro.plate({frame.name!r}, ..., dim={expected}).",
                )

    def latent(self, message: Mapping[str, Any], local: bool, frames: list[str]) -> Site:
        fn = message["fn"]
        if "point" in frames:
            raise self.error(
                message,
                "latent sites outside plate 'point'",
                "a latent inside plate 'point'",
                "Pass obs=y if it is the response; otherwise make it a task parameter, or integrate"
                " it out in the likelihood.",
            )
        if fn.support.is_discrete:
            raise self.error(
                message,
                "continuous latent sites",
                f"a discrete {'local' if local else 'global'} latent ({_family(fn)})",
                "Sum it out in the likelihood (for a mixture: dist.MixtureSameFamily).",
            )
        extra = [name for name in frames if name != "task"]
        if local and extra:
            raise self.error(
                message,
                "task parameters in plate 'task' alone",
                f"a further plate {extra[0]!r}",
                "Draw them as one vector: .expand([k]).to_event(1) inside `task`.",
            )
        batch_shape = tuple(fn.batch_shape)
        if local:
            expected = (self.batch.n_tasks, 1) if self.nested else (self.batch.n_tasks,)
            if batch_shape != expected:
                raise self.error(
                    message,
                    f"batch shape {expected} from plate 'task'",
                    f"batch shape {batch_shape}, with a dimension that is no plate",
                    "Add .to_event(1) for a vector of parameters per task.",
                )
            shape = tuple(fn.event_shape)
        else:
            if self.batch.n_tasks > 1 and batch_shape[:1] == (self.batch.n_tasks,) and not frames:
                raise self.error(
                    message,
                    "plate 'task' around parameters of the tasks",
                    f"a site of batch shape {batch_shape} outside every plate",
                    "Draw it in `with pyro.plate('task', ...)`, or add .to_event(1) at level 1.",
                )
            shape = batch_shape + tuple(fn.event_shape)
        transform = biject_to(fn.support)
        full = tuple(transform.inverse_shape(fn.batch_shape + fn.event_shape))
        unconstrained = full[len(batch_shape) :] if local else full
        real = transform is torch.distributions.transforms.identity_transform
        return Site(
            message["name"], "local" if local else "global", _family(fn), shape, unconstrained, real
        )

    def observed(self, message: Mapping[str, Any], frames: list[str]) -> Site:
        fn, value = message["fn"], message["value"]
        if "task" not in frames and "point" not in frames:
            raise self.error(
                message,
                "observed sites inside plates 'task' and 'point'",
                "an observed site outside both",
                "Draw y inside `with pyro.plate('task', ...)` and `with pyro.plate('point', ...)`.",
            )
        if "point" in frames:
            if self.nested and "task" not in frames:
                raise self.error(
                    message, "plate 'task' around it", f"plates {frames}", "Nest the plates."
                )
            cells = (
                (self.batch.n_tasks, self.batch.x.shape[1])
                if self.nested
                else (self.batch.x.shape[0],)
            )
            if tuple(fn.batch_shape) != cells:
                raise self.error(
                    message,
                    f"batch shape {cells} from the plates",
                    f"batch shape {tuple(fn.batch_shape)}",
                    "Check the shape of its parameters, and .to_event(1) for vectors.",
                )
        elif self.layout == "joint":
            expected = ((self.batch.n_tasks,), (self.batch.x.shape[1],))
            if (tuple(fn.batch_shape), tuple(fn.event_shape)) != expected:
                raise self.error(
                    message,
                    f"batch shape {expected[0]} and event shape {expected[1]}: all points of a "
                    "task as one observation",
                    f"batch shape {tuple(fn.batch_shape)}, event shape {tuple(fn.event_shape)}",
                    "Use a distribution over vectors, such as MultivariateNormal.",
                )
        else:
            raise self.error(
                message,
                "plate 'point' around the observations",
                f"plates {frames}, batch shape {tuple(fn.batch_shape)}",
                "Add `with pyro.plate('point', x.shape[-2]):` around the observed site; or give "
                "the program the keyword `mask` where points depend on each other given φ.",
            )
        inside = fn.support.check(value)
        while inside.ndim > len(fn.batch_shape):
            inside = inside.all(-1)
        bad = ~inside if self.layout == "joint" else ~inside & self.batch.mask
        if bool(bad.any()):
            offending, rows = value[bad][0].tolist(), int(self.batch.mask.sum())
            raise DataError(
                f"{self.name}, site {message['name']!r}",
                needed=f"data in the support of {_family(fn)} ({fn.support})",
                found=f"{offending} in {int(bad.sum())} of {rows} rows",
                do="Correct these rows, or choose a family whose support holds them.",
            )
        return Site(
            message["name"], "observed", _family(fn), tuple(fn.event_shape), tuple(fn.event_shape)
        )

    def check_whole(self, groups: Mapping[str, list[Site]], messages: list[dict[str, Any]]) -> None:
        if "task" not in self.frames:
            raise ProgramError(
                self.name,
                needed="a plate named 'task' over the tasks",
                found=f"plates {sorted(self.frames) or 'none'}",
                do="Draw φ in `with pyro.plate('task', n, dim=-2):` (nested; dim=-1 if flat).",
            )
        if not groups["observed"]:
            deterministic = [s.name for s in groups["det_local"] + groups["det_global"]] + [
                m["name"] for m in messages if is_deterministic(m)
            ]
            found = (
                f"deterministic site {deterministic[-1]!r}, which is no data"
                if deterministic
                else "none"
            )
            raise ProgramError(
                self.name,
                needed="an observed site: pyro.sample(name, distribution, obs=y) inside `point`",
                found=found,
                do="Pass y as obs of a distribution; pyro.deterministic adds nothing to log p(y).",
            )
        # A function that is integrated out may leave nothing else that differs between tasks.
        if not groups["local"] and self.layout != "joint":
            raise ProgramError(
                self.name,
                needed="at least one latent site inside plate 'task' (the task parameters φ)",
                found=f"latents {[s.name for s in groups['global']] or 'none'}, all outside it",
                do="Draw what differs between tasks inside plate 'task'.",
            )

    def response(self, observed: list[Site], messages: list[dict[str, Any]]) -> str:
        names = [site.name for site in observed]
        takes_y = [m["name"] for m in messages if m["name"] in names and self.holds_y(m["value"])]
        if len(takes_y) == 1 or (takes_y and len(names) > 1):
            return str(takes_y[0])
        raise ProgramError(
            self.name,
            needed="one observed site that takes y as it is (obs=y), to name predictions by",
            found=f"observed sites {names}" + ("" if takes_y else ", none of which holds y itself"),
            do="Pass y itself as obs of the site that is to be predicted; transform y in the tasks "
            "(from_frame(standardise=...)), not in the program.",
        )

    def holds_y(self, value: torch.Tensor) -> bool:
        """Whether a site observes y and not something made of it (another dtype is still y)."""
        y = self.batch.y
        if y is None or value.shape != y.shape:
            return False
        return bool(torch.eq(value, y)[self.batch.mask].all())


def _family(fn: Any) -> str:
    while isinstance(
        fn, (dist.MaskedDistribution, dist.ExpandedDistribution, torch.distributions.Independent)
    ):
        fn = fn.base_dist
    return type(fn).__name__
