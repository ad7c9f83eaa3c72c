"""The one meta-training loop: a staged value and gradient, Adam, history, resume.

Minimises mean_i loss_i − log p(θ) / T over θ and the strategy's own parameters, the mean over the
tasks that can have a query row, of which there are T. Global sites move in units of their prior's
scale, so that one learning rate serves an intercept of 250 and a slope of 0.1. A θ that the data's
loss does not touch is named in a warning and stays where it is: its prior alone would pull it to a
mode that means nothing.
"""

from __future__ import annotations

import hashlib
import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hbmeta.curvature import gradient_and_hessian
from hbmeta.densities import Delta, Empirical, Gaussian
from hbmeta.drift import FAR, left_to_go
from hbmeta.errors import ConvergenceError, FileError
from hbmeta.feeding import Feed, training_tasks
from hbmeta.files import read_tensors, write_tensors
from hbmeta.problem import Problem
from hbmeta.program import Batch, Functional, Theta
from hbmeta.staging import Staged, Tier
from hbmeta.tasks import Tasks

if TYPE_CHECKING:
    from hbmeta.inference.strategy import Strategy

__all__ = ["Learned", "Options", "prior_scales", "show_progress", "train"]

_CHECKPOINT_EVERY = 500
# Nats that a loss may rise by, and that no data come near, before it is warned of.
_FAR_ABOVE = 100.0
_HUGE = 1e9


@dataclass(frozen=True)
class Options:
    """How to fit; see `Strategy.fit`."""

    steps: int = 2000
    tasks_per_step: int | None = None
    learning_rate: float = 1e-3
    theta_learning_rate: float = 3e-2
    decay: bool = True
    seed: int = 0
    tier: Tier | Literal["auto"] = "auto"
    checkpoint: Any = None
    progress: bool | None = None


@dataclass
class Learned:
    """What learning found; see `Fitted` for the fields."""

    theta: Theta
    own: nn.Module | None = None
    drawn: bool = False
    density: Delta | Gaussian | Empirical | None = None
    history: list[float] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    seconds_staging: float = 0.0
    chains: int = 1


def show_progress(progress: bool | None) -> bool:
    """Whether to draw a progress bar: as asked, else where standard error is a terminal."""
    return sys.stderr.isatty() if progress is None else progress


def prior_scales(problem: Problem, theta: Theta, batch: Batch) -> Theta:
    """1/√curvature of log p(θ) at its location, per coordinate; 1 where that is not positive."""
    sites = problem.sites
    if not sites.globals:
        return {}
    start = sites.theta_to_vector(theta).unsqueeze(0)

    def function(vector: Tensor) -> Tensor:
        return problem.log_prior({**theta, **sites.theta_from_vector(vector[0])}, batch).unsqueeze(
            0
        )

    _, _, hessian = gradient_and_hessian(function, start)
    curvature = -hessian[0].diagonal()
    scale = torch.where(
        curvature > 1e-12, curvature.clamp_min(1e-12).rsqrt(), torch.ones_like(curvature)
    )
    return sites.theta_from_vector(scale)


def train(strategy: Strategy, problem: Problem, data: Any, options: Options) -> Learned:
    """Adam on the strategy's loss; see the module's docstring.

    Raises:
        ConvergenceError: the loss became NaN or infinite; names the step.
        FileError: the checkpoint belongs to another fit.
    """
    tasks = training_tasks(data, options.seed).to(device=problem.device, dtype=problem.dtype)
    whole = problem.batch(tasks)
    own = strategy.parameters(problem, tasks, options.seed)
    if own is not None:
        own = own.to(device=problem.device, dtype=problem.dtype)
    feed = Feed(
        data,
        problem.layout,
        strategy.needs,
        options.tasks_per_step,
        options.seed,
        problem.device,
        problem.dtype,
    )
    n_tasks = feed.n_contributing or options.steps * (options.tasks_per_step or 25)
    start = problem.theta(whole)
    scales = prior_scales(problem, start, whole)
    own_start = {} if own is None else {k: v.detach().clone() for k, v in own.named_parameters()}

    def unpack(free: Mapping[str, Tensor]) -> tuple[Theta, Any]:
        theta = {}
        for name, value in start.items():
            moved = free.get(f"theta/{name}")
            if moved is None:
                theta[name] = value
            elif name in scales:
                theta[name] = value + scales[name] * moved
            else:
                theta[name] = moved
        return theta, None if own is None else Functional(
            own, {k: free[f"own/{k}"] for k in own_start}
        )

    def data_loss(
        free: Mapping[str, Tensor], support: Batch, query: Batch, noise: Mapping[str, Tensor]
    ) -> Tensor:
        theta, bound = unpack(free)
        losses = strategy.loss(problem, theta, bound, support, query, noise)
        used = (query.counts > 0).to(losses.dtype)
        return (losses * used).sum() / used.sum().clamp_min(1.0)

    def value_and_gradient(
        free: dict[str, Tensor], support: Batch, query: Batch, noise: dict[str, Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        free = {k: v.detach().requires_grad_() for k, v in free.items()}
        theta, _ = unpack(free)
        loss = data_loss(free, support, query, noise) - problem.log_prior(theta, query) / n_tasks
        gradients = torch.autograd.grad(loss, list(free.values()), allow_unused=True)
        filled = [
            torch.zeros_like(v) if g is None else g
            for g, v in zip(gradients, free.values(), strict=True)
        ]
        return loss.detach(), filled

    free = {
        f"theta/{k}": torch.zeros_like(v) if k in scales else v.clone() for k, v in start.items()
    }
    free |= {f"own/{k}": v for k, v in own_start.items()}
    if not free:
        # A program with θ given and a strategy that learns nothing of its own.
        return Learned(theta=start, own=own, info={"untouched": []})
    shapes = strategy.noise(problem, feed.step(0)[0].n_tasks)
    noise_generator = torch.Generator().manual_seed(options.seed + 1)

    def draw_noise() -> dict[str, Tensor]:
        return {
            k: torch.randn(s, generator=noise_generator, dtype=torch.float64).to(whole.x)
            for k, s in shapes.items()
        }

    untouched = _untouched(data_loss, free, feed, draw_noise)
    for name in untouched:
        free.pop(name)
    if untouched:
        warnings.warn(
            f"{strategy.name}: the loss does not depend on {', '.join(_names(untouched))}, so it "
            "stays at its prior's location. A non-centered program or another strategy would learn "
            "it.",
            stacklevel=4,
        )
    if not free:
        return Learned(theta=start, own=own, info={"untouched": _names(untouched)})
    noise_generator.manual_seed(options.seed + 1)

    staged = Staged(
        value_and_gradient,
        tier=options.tier,
        expected_calls=options.steps,
        check_every=max(options.steps // 4, 1),
    )
    scaled = {k: v for k, v in free.items() if k.removeprefix("theta/") in scales}
    groups = [
        {"params": list(scaled.values()), "lr": options.theta_learning_rate},
        {"params": [v for k, v in free.items() if k not in scaled], "lr": options.learning_rate},
    ]
    optimizer = torch.optim.Adam([g for g in groups if g["params"]], foreach=True)
    rates = [g["lr"] for g in optimizer.param_groups]
    for value in free.values():
        value.grad = torch.zeros_like(value)
    history: list[float] = []
    identity = _identity(options, strategy, problem, tasks)
    first = _resume(options, identity, free, optimizer, history, noise_generator)
    bar = tqdm(
        total=options.steps,
        initial=first,
        desc=strategy.name,
        disable=not show_progress(options.progress),
    )
    losses = torch.zeros(options.steps, dtype=torch.float64)
    losses[:first] = torch.tensor(history, dtype=torch.float64)
    # Global sites in units of their prior's scale; NaN before a resumed step, which says nothing.
    path = whole.x.new_full((options.steps, sum(v.numel() for v in scaled.values())), torch.nan)
    clock = torch.ones(options.steps, dtype=torch.float64)
    for number in range(first, options.steps):
        support, query = feed.step(number)
        loss, gradients = staged(free, support, query, draw_noise())
        losses[number] = loss
        for value, gradient in zip(free.values(), gradients, strict=True):
            value.grad = gradient
        if options.decay:
            factor = 0.5 * (1 + math.cos(math.pi * number / options.steps))
            clock[number] = factor
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        optimizer.step()
        if scaled:
            path[number] = torch.cat([value.detach().flatten() for value in scaled.values()])
        if number % 50 == 49 or number == options.steps - 1:
            _check(strategy, losses, number)
            bar.update(number + 1 - bar.n)
            bar.set_postfix(
                loss=f"{losses[max(number - 49, 0) : number + 1].mean():.4f}", refresh=False
            )
        if options.checkpoint is not None and (number + 1) % _CHECKPOINT_EVERY == 0:
            _save(options, identity, free, optimizer, losses[: number + 1], noise_generator)
    bar.close()
    _warn_of_divergence(strategy, losses)
    moving = _still_moving(strategy, scaled, path, clock)
    theta, _ = unpack(free)
    if own is not None:
        own.load_state_dict(
            {**own.state_dict(), **{k: free[f"own/{k}"].detach() for k in own_start}}
        )
    return Learned(
        theta=theta,
        own=own,
        history=losses.tolist(),
        info={"untouched": _names(untouched), "still_moving": moving, "tier": staged.tier},
        seconds_staging=staged.seconds_staging,
    )


def _names(untouched: list[str]) -> list[str]:
    return [name.removeprefix("theta/").removeprefix("own/") for name in untouched]


def _untouched(data_loss: Any, free: dict[str, Tensor], feed: Feed, draw_noise: Any) -> list[str]:
    """θ that the data's loss is no function of, found from one eager gradient."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in free.items()}
    support, query = feed.step(0)
    loss = data_loss(leaves, support, query, draw_noise())
    if not loss.requires_grad:
        return [k for k in leaves if k.startswith("theta/")]
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return [
        k for k, g in zip(leaves, gradients, strict=True) if g is None and k.startswith("theta/")
    ]


def _check(strategy: Strategy, losses: Tensor, number: int) -> None:
    recent = losses[max(number - 49, 0) : number + 1]
    if not bool(torch.isfinite(recent).all()):
        step = max(number - 49, 0) + int((~torch.isfinite(recent)).nonzero()[0])
        raise ConvergenceError(
            f"{strategy.name}.fit",
            needed="a finite loss",
            found=f"{losses[step].item()} at step {step}",
            do="Lower step_size or the learning rates, or standardise x and y.",
        )


def _warn_of_divergence(strategy: Strategy, losses: Tensor) -> None:
    """Warns where a loss that stayed finite says that training went wrong.

    Losses are nats per point or per task, so that medians of the first and the last tenth are
    compared by their difference; far beyond any data is a loss of 1e9.
    """
    few = max(len(losses) // 10, 1)
    first, last = float(losses[:few].median()), float(losses[-few:].median())
    if last > _HUGE or last > first + max(_FAR_ABOVE, 10 * abs(first)):
        warnings.warn(
            f"{strategy.name}: the loss began at {first:.3g} and ended at {last:.3g}, so training "
            "has diverged. Lower step_size or the learning rates, or standardise x and y.",
            stacklevel=5,
        )


def _still_moving(
    strategy: Strategy, scaled: Mapping[str, Tensor], path: Tensor, clock: Tensor
) -> list[str]:
    """Global sites with more than a prior scale left to go at the end of training; warns of them.

    False-alarm rate below 1e-4 per coordinate for noise around a fixed point; see `hbmeta.drift`.
    """
    far = (left_to_go(path, clock).abs() > FAR).split([v.numel() for v in scaled.values()])
    names = [name for name, mask in zip(scaled, far, strict=True) if bool(mask.any())]
    if names:
        warnings.warn(
            f"{strategy.name}: theta was still moving ({', '.join(_names(names))}) when training "
            "ended: raise steps.",
            stacklevel=5,
        )
    return _names(names)


def _identity(
    options: Options, strategy: Strategy, problem: Problem, tasks: Tasks
) -> dict[str, Any]:
    """What tells one fit from another: strategy, program, data and the settings of the training."""
    digest = hashlib.sha256(repr((tasks.ids, tasks.features)).encode())
    for values in (tasks.flat_x, tasks.flat_y, tasks.task):
        if values is not None:
            digest.update(values.detach().cpu().contiguous().numpy().tobytes())
    return {
        "kind": "checkpoint",
        "strategy": strategy.name,
        "settings": strategy.settings(),
        "program": problem.name,
        "steps": options.steps,
        "tasks_per_step": options.tasks_per_step,
        "learning_rate": options.learning_rate,
        "theta_learning_rate": options.theta_learning_rate,
        "decay": options.decay,
        "seed": options.seed,
        "data": digest.hexdigest(),
    }


def _save(
    options: Options,
    identity: dict[str, Any],
    free: Any,
    optimizer: Any,
    losses: Tensor,
    generator: Any,
) -> None:
    tensors = {f"free/{k}": v for k, v in free.items()}
    for name, value in free.items():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            tensors[f"adam/{key}/{name}"] = torch.as_tensor(optimizer.state[value][key])
    tensors["losses"] = losses
    tensors["generator"] = generator.get_state()
    write_tensors(options.checkpoint, tensors, identity)


def _resume(
    options: Options,
    identity: dict[str, Any],
    free: dict[str, Tensor],
    optimizer: Any,
    history: list[float],
    generator: Any,
) -> int:
    """Continues from the checkpoint, where there is one; the number of steps already done."""
    if options.checkpoint is None or not Path(options.checkpoint).exists():
        return 0
    tensors, header = read_tensors(options.checkpoint)
    different = [key for key in identity if header.get(key) != identity[key]]
    names = {k.removeprefix("free/") for k in tensors if k.startswith("free/")}
    if different or names != set(free):
        raise FileError(
            str(options.checkpoint),
            needed="the checkpoint of this very fit",
            found=f"another {different[0] if different else 'model'}",
            do="Delete the file to start anew, or name another one.",
        )
    with torch.no_grad():
        for name, value in free.items():
            value.copy_(tensors[f"free/{name}"])
            optimizer.state[value] = {
                key: tensors[f"adam/{key}/{name}"].clone()
                for key in ("exp_avg", "exp_avg_sq", "step")
            }
    generator.set_state(tensors["generator"])
    history.extend(tensors["losses"].tolist())
    return len(history)
