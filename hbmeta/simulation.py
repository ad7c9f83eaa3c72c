"""Draws of θ, φ and y from a program's own prior, on given x.

    θ ~ p(θ),   φ_i ~ p(φ | θ),   y_ij ~ p(y | φ_i, θ, x_ij)

One run of the program is one draw. Module parameters have no prior and stay as they are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pyro.distributions import MaskedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import biject_to

from hbmeta.errors import ConvergenceError, UnsupportedModelError
from hbmeta.likelihoods import evaluating, seeded
from hbmeta.problem import Problem
from hbmeta.program import Functional, Theta, is_deterministic, is_subsample, isolated
from hbmeta.tasks import Tasks

__all__ = ["Simulated", "simulate"]


@dataclass
class Simulated:
    """One draw of everything.

    Attributes:
        theta: module parameters as given, and global sites, unconstrained.
        phi: (tasks, phi_size), unconstrained.
        values: every latent and deterministic site, constrained; local ones (tasks, *shape).
        tasks: the x that were given, with the y that was drawn, in the units of the model.
    """

    theta: Theta
    phi: Tensor
    values: dict[str, Tensor]
    tasks: Tasks


def simulate(
    problem: Problem, parameters: Mapping[str, Tensor], tasks: Tasks, seed: int
) -> Simulated:
    """One draw of (θ, φ, y).

    Args:
        problem: the program.
        parameters: of its module, and those global sites that are held, unconstrained.
        tasks: x and the layout; a y that they may have is not read.
        seed: of the draw; the caller's random state is left alone.
    Raises:
        UnsupportedModelError: a prior that cannot be drawn from (improper, masked out, a factor),
            or a program that observes more than y.
        ConvergenceError: the prior drew a y that is not finite.
    """
    batch = problem.batch(tasks)
    batch = problem.given(batch, batch)
    program = problem.program
    if isinstance(program, nn.Module):
        held = {n: parameters.get(n, p.detach()) for n, p in program.named_parameters()}
        program = Functional(program, held) if held else program
    run = _Draw(problem, parameters)
    with seeded(seed, problem.device), isolated(batch.x), evaluating(), run:
        batch.run(program, with_y=False)
    assert run.y is not None
    y = run.y if batch.task is not None else tasks.unpad(run.y) if tasks.n_points else run.y[:0, 0]
    if not bool(y.isfinite().all()):
        raise ConvergenceError(
            problem.name,
            needed="a prior whose y are finite numbers",
            found="NaN or infinity among draws of y",
            do="Give the level-1 sites narrower priors.",
        )
    own = {name: value for name, value in parameters.items() if name not in run.theta}
    phi = problem.sites.to_vector(run.phi) if run.phi else batch.x.new_zeros(tasks.n_tasks, 0)
    full = Tasks.from_flat(
        tasks.flat_x,
        y[: tasks.n_points].to(problem.y_dtype),
        tasks.task,
        tasks.n_tasks,
        ids=tasks.ids,
        features=tasks.features,
    )
    return Simulated({**own, **run.theta}, phi, run.values, full)


@dataclass
class _Draw(Messenger):
    """Lets every latent be drawn, but for those that are held, and writes down what was drawn."""

    problem: Problem
    held: Mapping[str, Tensor]
    theta: Theta = field(default_factory=dict)
    phi: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    y: Tensor | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def _pyro_sample(self, message: Any) -> None:
        if is_subsample(message) or is_deterministic(message):
            return
        name, fn = message["name"], message["fn"]
        if message["is_observed"]:
            factor = type(fn).__name__ == "Unit"
            raise self._refused(
                "no factors" if factor else "a program that observes y alone",
                f"pyro.factor {name!r}" if factor else f"observed site {name!r} beside y",
            )
        if name == self.problem.sites.response:
            return
        if name in self.held:
            message["value"] = biject_to(fn.support)(self.held[name])
        else:
            if _masked(fn):
                raise self._refused("a proper prior of every site", f"a masked one of {name!r}")
            try:
                message["value"] = fn.sample()
            except NotImplementedError as error:
                found = f"{type(fn).__name__} at site {name!r}, which cannot be drawn from"
                raise self._refused("a proper prior of every site", found) from error
        message["done"] = True

    def _pyro_post_sample(self, message: Any) -> None:
        if is_subsample(message):
            return
        name, fn, value = message["name"], message["fn"], message["value"]
        local = any(frame.name == "task" for frame in message["cond_indep_stack"])
        nested = local and self.problem.layout == "nested" and value.ndim > 1
        if name == self.problem.sites.response:
            self.y = value
            return
        self.values[name] = value.squeeze(1) if nested else value
        if is_deterministic(message):
            return
        unconstrained = biject_to(fn.support).inv(value)
        if local:
            self.phi[name] = unconstrained.squeeze(1) if nested else unconstrained
        else:
            self.theta[name] = unconstrained

    def _refused(self, needed: str, found: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.problem.name} (draws from the prior)",
            needed=needed,
            found=found,
            do="Write the program with proper priors, y its only data.",
        )


def _masked(fn: Any) -> bool:
    """Whether a prior is masked out, which leaves a flat one."""
    while fn is not None:
        if isinstance(fn, MaskedDistribution):
            return True
        fn = getattr(fn, "base_dist", None)
    return False
