"""Adam on a bound over tasks.

Minimises F(R̂, K, K_H) over θ̂ and, where they are free, (μ_i, σ_i). A step descends on the tangent
of F at the risks and divergences of all tasks as they were last seen, estimated from the tasks of
the step (`hbmeta.inference.bound_problem`), whose new values it then writes down. With all tasks in
every step that is the gradient of F itself, but for the weights being those of the step before.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from hbmeta.course import Course
from hbmeta.densities import Gaussian
from hbmeta.inference.bound_problem import BoundProblem
from hbmeta.normals import bounded
from hbmeta.problem import Problem
from hbmeta.resuming import Checkpoint
from hbmeta.staging import Staged
from hbmeta.training import Learned, Options, checkpoint_due, identity, shares, show_progress
from hbmeta.triangular import positive_definite_at
from hbmeta.variational.training import TINY, Adam, learning_rates, tasks_of_step

if TYPE_CHECKING:
    from hbmeta.inference.pac_bayes import PACBayes

__all__ = ["learn_by_bound"]


def learn_by_bound(strategy: PACBayes, problem: Problem, data: Any, options: Options) -> Learned:
    """Adam on the bound; see the module's docstring.

    `info` holds "bound", the value at the last step (an estimate, no certificate), "hyper_kl" and
    "dimension".
    """
    bound = BoundProblem(strategy, problem, data, options)
    moving, names = bound.moving, bound.fix_untouched()
    if names:
        warnings.warn(
            f"{strategy.name}: the loss does not depend on {', '.join(names)}, so it stays where "
            "it starts.",
            stacklevel=4,
        )
    if not moving.free:
        return Learned(theta=moving.settle(), info={"untouched": names})
    staged = Staged(
        bound.gradient,
        tier=options.tier,
        expected_calls=options.steps,
        check_every=max(options.steps // 4, 1),
    )
    rates = learning_rates(moving, options)
    optimisers = {key: Adam(moving.free[key], rates[key], TINY, rows=False) for key in moving.free}
    if bound.rows is not None:
        optimisers["rows"] = Adam(bound.rows, strategy.rate, TINY, rows=True)
    state = {
        f"{label}/{key}": value
        for label, adam in optimisers.items()
        for key, value in adam.state.items()
    } | {"table/risks": bound.table.risks, "table/kls": bound.table.kls}
    generator = torch.Generator().manual_seed(options.seed + 1)
    bound.fill(torch.Generator().manual_seed(options.seed + 2))
    done = torch.zeros(0)
    checkpoint = None
    if options.checkpoint is not None:
        whose = identity(options, strategy, problem, bound.tasks)
        checkpoint = Checkpoint(options.checkpoint, whose)
        kept, done = checkpoint.take_up(state, generator)
        for label, value in kept.items():
            state[label].copy_(value)
    share_of_steps = shares(options)
    course = Course(
        strategy.name, share_of_steps, done, moving.scaled,
        progress=show_progress(options.progress),
    )  # fmt: skip
    for number, share in enumerate(share_of_steps.tolist()[len(done) :], start=len(done)):
        chosen = tasks_of_step(number, options, bound.n_tasks, bound.each)
        at = chosen if chosen is None else chosen.to(problem.device)
        found = bound.tangent()
        with positive_definite_at(f"{strategy.name}.fit", f"at training step {number}"):
            terms, gradients = staged(
                moving.free, bound.part(at), bound.draw(generator), bound.weights(found, at)
            )
        bound.note(at, terms)
        for label, gradient in zip(optimisers, gradients, strict=True):
            # Of each task's own terms, not of their mean.
            own = label == "rows"
            optimisers[label].step(
                bound.each * gradient if own else gradient, share, at if own else None
            )
        course.record(found.value)
        if checkpoint is not None and checkpoint_due(number):
            checkpoint.keep(state, course.so_far(), generator)
    info: dict[str, Any] = {
        "untouched": names,
        "still_moving": course.finish(),
        "tier": staged.tier,
    }
    last = bound.tangent()
    with torch.no_grad():
        info |= {"bound": float(last.value), "hyper_kl": float(bound.hyper_kl(moving.free))}
    info["dimension"] = bound.dimension
    density = None
    if bound.rows is not None:
        u, raw = bound.rows.chunk(2, -1)
        loc, scale = bound.frame
        density = Gaussian(loc + scale * u, scale * bounded(raw).exp())
    return Learned(
        theta=moving.settle(),
        density=density,
        history=course.losses.tolist(),
        info=info,
        seconds_staging=staged.seconds_staging,
    )
