"""Reads a three-level Pyro program: sites, plates, supports, and log densities per task.

A program is any callable that Pyro can run, in one of three layouts (docs/design.md, "Program"):

    nested   model(x, y=None)                    plates `task` (dim -2) and inside it `point` (-1)
    flat     model(x, y=None, *, task, n_tasks)  plates `task` and `point` apart; φ[task] per row
    joint    model(x, y=None, *, mask=None)      plate `task` (-1) alone: the points of a task
                                                 depend on each other given φ (a Gaussian process)

A nested program may ask for the rows of the support by the keyword `context`, (x, weight) of shape
(tasks, rows, features) and (tasks, rows): p(y | x, φ, θ) of a point may then depend on the x of the
support S, as batch statistics do. Where the support itself is predicted, it is its own context.

One handler runs the program with θ and φ given in unconstrained space and collects
log p(y | φ, θ), log p(φ | θ) and log p(θ), the last two with the Jacobian of the transform.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import biject_to

from hbmeta.batches import Batch, Context, Layout, Program
from hbmeta.errors import ProgramError
from hbmeta.locations import location
from hbmeta.sites import Phi, Theta

__all__ = [
    "Batch",
    "Context",
    "Evaluation",
    "Functional",
    "Layout",
    "Phi",
    "Program",
    "Theta",
    "evaluate",
    "isolated",
    "layouts",
    "program_name",
    "takes_context",
]


@dataclass
class Evaluation:
    """What one run of a program gave.

    Attributes:
        log_likelihood: log p(y | φ, θ) per cell, (tasks, points) or (rows,), not yet masked; None
            in the joint layout.
        log_factor: (tasks,) sum of `pyro.factor` terms inside `task`, and the log likelihood of
            the joint layout.
        log_local: (tasks,) log p(φ | θ) in unconstrained space.
        log_global: () log p(θ) in unconstrained space.
        values: constrained values of every latent and deterministic site.
        unconstrained: where each latent stood, and transforms: the maps to its support.
        response: the distribution of the response, cells as batch (tasks in the joint layout).
        observed: distribution and value of the other observed sites inside `point`.
    """

    log_likelihood: Tensor | None = None
    log_factor: Tensor | None = None
    log_local: Tensor | None = None
    log_global: Tensor | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    unconstrained: dict[str, Tensor] = field(default_factory=dict)
    transforms: dict[str, Any] = field(default_factory=dict)
    response: Any = None
    observed: dict[str, tuple[Any, Tensor]] = field(default_factory=dict)


@contextlib.contextmanager
def isolated(x: Tensor, *, validate: bool = False) -> Iterator[None]:
    """Runs a program on x without touching the parameter store, the validation switch or defaults.

    Inside, numbers written in the program (`Normal(0.0, 0.1)`) take the dtype and the device of x.
    Without the scope a module's parameters would be read from Pyro's global store, and the θ that
    was passed would be ignored without a word.
    """
    before = torch.get_default_dtype()
    elsewhere = contextlib.nullcontext() if x.device.type == "cpu" else x.device
    try:
        torch.set_default_dtype(x.dtype)
        with elsewhere, pyro.get_param_store().scope(), pyro.validation_enabled(validate):
            yield
    finally:
        torch.set_default_dtype(before)


def is_subsample(message: Any) -> bool:
    return type(message["fn"]).__name__ == "_Subsample"


def is_deterministic(message: Any) -> bool:
    if message["infer"].get("_deterministic"):
        return True
    fn = message["fn"]
    while isinstance(
        fn, (dist.MaskedDistribution, dist.ExpandedDistribution, torch.distributions.Independent)
    ):
        fn = fn.base_dist
    return bool(message["is_observed"]) and isinstance(fn, dist.Delta)


class _Run(Messenger):
    """Gives every latent its value from unconstrained space and collects the log densities.

    A latent without a value takes the location of its prior, pushed through the program so far.
    """

    def __init__(
        self,
        theta: Mapping[str, Tensor],
        phi: Mapping[str, Tensor],
        batch: Batch,
        response: str,
        densities: bool,
    ) -> None:
        super().__init__()
        self.densities = densities
        self.theta, self.phi, self.batch, self.name_of_response = theta, phi, batch, response
        self.nested = batch.layout == "nested"
        self.result = Evaluation()

    def _pyro_sample(self, message: Any) -> None:
        name = message["name"]
        if is_subsample(message) or message["is_observed"]:
            return
        fn = message["fn"]
        if name == self.name_of_response:
            # Only the distribution is wanted here; any value of the right shape will do. Labels
            # are whole, because a program may look something up by them.
            value = self.batch.x.new_zeros(fn.batch_shape + fn.event_shape)
            message["value"] = value.long() if fn.has_enumerate_support else value
            message["done"] = True
            return
        local = any(frame.name == "task" for frame in message["cond_indep_stack"])
        transform = biject_to(fn.support)
        given = self.phi.get(name) if local else self.theta.get(name)
        if given is None:
            value = location(fn, name)
            unconstrained = transform.inv(value)
        else:
            # φ is (tasks, *shape); a nested program wants (tasks, 1, *shape), the 1 being `point`.
            unconstrained = given.unsqueeze(1) if local and self.nested else given
            value = transform(unconstrained)
        self.result.transforms[name] = transform
        self.result.unconstrained[name] = unconstrained
        message["value"] = value
        message["done"] = True

    def _pyro_post_sample(self, message: Any) -> None:
        if is_subsample(message):
            return
        name, fn, value, out = message["name"], message["fn"], message["value"], self.result
        frames = [frame.name for frame in message["cond_indep_stack"]]
        local = "task" in frames
        if is_deterministic(message):
            out.values[name] = (
                value.squeeze(1) if local and self.nested and value.ndim > 1 else value
            )
            return
        if name == self.name_of_response and not message["is_observed"]:
            out.response = fn
            return
        if not self.densities:
            # A prior over the weights of a network costs more than the network.
            if name == self.name_of_response:
                out.response = fn
            elif not message["is_observed"]:
                out.values[name] = value.squeeze(1) if local and self.nested else value
            return
        if not value.is_floating_point():
            # Labels and counts as int64: densities want the dtype of the parameters.
            value = value.to(self.batch.x.dtype)
        log_prob = scale_and_mask(fn.log_prob(value), message["scale"], message["mask"])
        if message["is_observed"]:
            if name == self.name_of_response:
                out.response = fn
            elif "point" in frames and type(fn).__name__ != "Unit":
                out.observed[name] = (fn, value)
            if type(fn).__name__ == "Unit":
                if local:
                    out.log_factor = _add(
                        out.log_factor, _per_task(log_prob, self.batch, "point" in frames)
                    )
                else:
                    out.log_global = _add(out.log_global, log_prob.sum())
            elif "point" in frames:
                out.log_likelihood = _add(out.log_likelihood, log_prob)
            else:
                out.log_factor = _add(out.log_factor, _per_task(log_prob, self.batch, False))
            return
        transform, unconstrained = out.transforms[name], out.unconstrained[name]
        if transform is not torch.distributions.transforms.identity_transform:
            jacobian = transform.log_abs_det_jacobian(unconstrained, value)
            log_prob = log_prob + jacobian.reshape(*jacobian.shape[: log_prob.ndim], -1).sum(-1)
        if local:
            out.log_local = _add(out.log_local, _per_task(log_prob, self.batch, False))
            out.values[name] = value.squeeze(1) if self.nested else value
            out.unconstrained[name] = unconstrained.squeeze(1) if self.nested else unconstrained
        else:
            out.log_global = _add(out.log_global, log_prob.sum())
            out.values[name] = value


def _add(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term


def _per_task(log_prob: Tensor, batch: Batch, in_point: bool) -> Tensor:
    if in_point:
        return batch.per_task(torch.where(batch.mask, log_prob, torch.zeros_like(log_prob)))
    return log_prob.sum(-1) if batch.layout == "nested" else log_prob


def evaluate(
    program: Program,
    theta: Mapping[str, Tensor],
    phi: Mapping[str, Tensor],
    batch: Batch,
    *,
    response: str,
    with_y: bool = True,
    densities: bool = True,
) -> Evaluation:
    """Runs the program once at unconstrained θ and φ; latents not given sit at their location.

    Args:
        program: the program, in the layout of the batch.
        theta: module parameters by qualified name, global sites by name, unconstrained.
        phi: local sites by name, (tasks, *unconstrained_shape).
        batch: the data.
        response: name of the observed site that holds y.
        with_y: False leaves y out and gives only its distribution.
        densities: False leaves all log densities out, for values and the response alone.
    """
    parameters = {}
    runnable = program
    if isinstance(program, nn.Module):
        # Frozen ones too: Pyro would register them, which makes them require a gradient again.
        parameters = {
            name: theta[name] if name in theta else parameter.detach()
            for name, parameter in program.named_parameters()
        }
        if parameters:
            runnable = Functional(program, parameters)
    run = _Run(theta, phi, batch, response, densities)
    with isolated(batch.x), run:
        batch.run(runnable, with_y=with_y)
    return run.result


class Functional:
    """A module with other parameters in their place."""

    def __init__(self, module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        self.module, self.parameters = module, parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's result with these parameters."""
        return torch.func.functional_call(self.module, dict(self.parameters), args, kwargs)


def _keywords(program: Program) -> Mapping[str, inspect.Parameter]:
    target = program.forward if isinstance(program, nn.Module) else program
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):
        return {}


def takes_context(program: Program) -> Literal["support", "rows"] | None:
    """Whose rows the program is to be given as `context`, if it asks for any.

    "support": those of the support that a batch is predicted from, the batch's own where there is
    none. "rows": always those of the batch itself, a query too (transductive). An attribute
    `takes_context` of the program decides; without one the keyword `context` means "support".

    Raises:
        ProgramError: the attribute has another value.
    """
    asks = "support" if "context" in _keywords(program) else None
    found: Any = getattr(program, "takes_context", asks)
    if found not in ("support", "rows", None):
        raise ProgramError(
            program_name(program),
            needed="takes_context as 'support', 'rows' or None",
            found=repr(found),
            do="Correct the attribute.",
        )
    whose: Literal["support", "rows"] | None = found
    return whose


def layouts(program: Program) -> tuple[Layout, ...]:
    """The layouts that the program's signature offers."""
    offered = _offered(program)
    if takes_context(program) is None:
        return offered
    if "nested" not in offered:
        raise ProgramError(
            program_name(program),
            needed="the nested layout in a program with the keyword `context`",
            found=f"the {offered[0]} layout",
            do="Write def model(x, y=None, *, context=None), with plates `task` and `point`.",
        )
    return ("nested",)


def _offered(program: Program) -> tuple[Layout, ...]:
    parameters = _keywords(program)
    if "task" not in parameters:
        return ("joint",) if "mask" in parameters else ("nested",)
    if "n_tasks" not in parameters:
        raise ProgramError(
            program_name(program),
            needed="both keywords of the flat layout, `task` and `n_tasks`",
            found="`task` alone",
            do="Write def model(x, y=None, *, task, n_tasks).",
        )
    return (
        ("flat",) if parameters["task"].default is inspect.Parameter.empty else ("nested", "flat")
    )


def program_name(program: Program) -> str:
    """The name of a function, or the class of a module, for errors."""
    return getattr(program, "__name__", type(program).__name__)
