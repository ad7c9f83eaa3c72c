"""The meta-gradient as a chain of inner steps that keeps φ_n alone (gradient checkpointing).

Forward, the states s_0 … s_N of the inner loop are kept, without their graphs. Backward,

    v_N = ∂L^Q/∂s_N,    v_n = (∂s_{n+1}/∂s_n)ᵀ v_{n+1},    n = N−1 … 0,

each product from the graph of one step, built anew at s_n and dropped again. θ and the learned step
sizes collect their share at every step. For plain descent v_n = v_{n+1} − α ∇²L^S(φ_n) v_{n+1}: the
result is that of the whole graph, for one more gradient per step. One step and its product are
staged once and serve any N.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from hbmeta.inference.inner_optimizers import State, inner_optimizer
from hbmeta.problem import Problem
from hbmeta.program import Batch, Functional, Phi, Theta
from hbmeta.staging import TIERS, Staged, Tier
from hbmeta.training import Options, mean_over_queries

if TYPE_CHECKING:
    from hbmeta.inference.gradient_strategy import GradientStrategy

Named = dict[str, Tensor]

# From so many steps on a whole graph takes long to compile: about 250 nodes a step of a network.
_LONG = 10

__all__ = ["Recomputed"]


class Recomputed:
    """Value and gradient of a gradient strategy's mean loss, step by step.

    Args:
        strategy: whose loop this is.
        problem: the program.
        own: the module of learned step sizes, or None.
        options: of the fit.
    """

    def __init__(
        self,
        strategy: GradientStrategy,
        problem: Problem,
        own: nn.Module | None,
        options: Options,
    ) -> None:
        self.strategy, self.problem, self.own = strategy, problem, own
        self.names = strategy.moving(problem)
        self.rule = inner_optimizer(strategy.optimizer, strategy.momentum)
        # Cut gradients make every step the identity: nothing to carry back, but to step sizes.
        self.carries_back = not strategy.first_order or own is not None

        def staged(function: Any, calls: int) -> Staged:
            return Staged(
                function,
                tier=options.tier,
                expected_calls=calls,
                check_every=max(calls // 4, 1),
            )

        chain = options.steps * strategy.steps
        self._start = staged(self._start_of, options.steps)
        self._start_back = staged(self._start_back_of, options.steps)
        self._forward = staged(self._step_of, chain)
        self._backward = staged(self._step_back_of, chain)
        self._end = staged(self._end_of, options.steps)
        self._touched: frozenset[str] | None = None
        self._numbers = [
            torch.tensor(float(n), dtype=problem.dtype, device=problem.device)
            for n in range(strategy.steps)
        ]

    @staticmethod
    def of(
        strategy: GradientStrategy, problem: Problem, own: nn.Module | None, options: Options
    ) -> Recomputed | None:
        """The chain, where the strategy's `recompute` asks for it."""
        if not Recomputed.wanted(strategy):
            return None
        return Recomputed(strategy, problem, own, options)

    @staticmethod
    def wanted(strategy: GradientStrategy) -> bool:
        """Whether `recompute` asks for the chain."""
        wanted = strategy.steps >= _LONG if strategy.recompute is None else strategy.recompute
        return wanted and strategy.steps > 0

    @property
    def pieces(self) -> tuple[Staged, ...]:
        """What is staged."""
        return (self._start, self._forward, self._end, self._backward, self._start_back)

    @property
    def tier(self) -> Tier:
        """The highest tier in use."""
        return max((piece.tier for piece in self.pieces), key=TIERS.index)

    @property
    def seconds_staging(self) -> float:
        """Of all pieces."""
        return sum(piece.seconds_staging for piece in self.pieces)

    def finish(self) -> dict[str, Any]:
        """How the gradient was computed."""
        return {"recomputed": True}

    def __call__(
        self,
        theta: Theta,
        own: Mapping[str, Tensor],
        support: Batch,
        query: Batch,
        noise: Mapping[str, Tensor],
    ) -> tuple[Tensor, Named]:
        """Mean loss and gradient; see `MetaGradient`."""
        theta = {name: value.detach() for name, value in theta.items()}
        parameters = {name: value.detach() for name, value in own.items()}
        inner = self.strategy.inner_batch(support, query)
        start = self._start(theta, inner)
        rest = {n: v for n, v in start.items() if n not in self.names}
        state = self.rule.start([start[n] for n in self.names])
        states = [state]
        for number in self._numbers:
            state = self._forward(theta, parameters, inner, rest, state, number)
            if self.carries_back:
                states.append(state)
        found = {**start, **dict(zip(self.names, state[0], strict=True))}
        loss, toward, collected = self._end(theta, start, found, support, query)
        if self.carries_back and self._numbers:
            toward, collected = self._carry_back(
                theta, parameters, inner, rest, states, toward, collected
            )
        gradient = self._start_back(theta, inner, toward)
        for name, value in collected.items():
            gradient[name] = gradient[name] + value if name in gradient else value
        return loss, gradient

    def _carry_back(
        self,
        theta: Theta,
        own: Named,
        inner: Batch,
        rest: Phi,
        states: list[State],
        toward: Phi,
        collected: Named,
    ) -> tuple[Phi, Named]:
        if self._touched is None:
            self._touched = self._find_touched(theta, own, inner, rest, states[0])
        carried = [[toward[n] for n in self.names]]
        carried += [[torch.zeros_like(v) for v in part] for part in states[0][1:]]
        leaves = {
            **{f"theta/{k}": v for k, v in theta.items()},
            **{f"own/{k}": v for k, v in own.items()},
            **{f"rest/{k}": v for k, v in rest.items()},
        }
        sums = {n: torch.zeros_like(v) for n, v in leaves.items() if n in self._touched}
        for number, state in zip(reversed(self._numbers), states[-2::-1], strict=True):
            carried, sums = self._backward(theta, own, inner, rest, state, number, carried, sums)
        toward = {**toward, **dict(zip(self.names, carried[0], strict=True))}
        collected = dict(collected)
        for name, value in sums.items():
            kind, _, site = name.partition("/")
            if kind == "rest":
                toward[site] = toward[site] + value
            else:
                collected[name] = collected[name] + value if name in collected else value
        return toward, collected

    # -- the pieces, each a function of tensors ---------------------------------------------------

    def _bound(self, parameters: Mapping[str, Tensor]) -> Any:
        return None if self.own is None else Functional(self.own, dict(parameters))

    def _start_of(self, theta: Theta, inner: Batch) -> Phi:
        with torch.no_grad():
            return self.problem.location_by_site(theta, inner)

    def _start_back_of(self, theta: Theta, inner: Batch, toward: Phi) -> Named:
        theta = _leaves(theta)
        with torch.enable_grad():
            start = self.problem.location_by_site(theta, inner)
            names = [n for n in toward if start[n].requires_grad]
            if not names:
                return {}
            return _gradients(
                [start[n] for n in names], [toward[n] for n in names], _prefixed("theta", theta)
            )

    def _step_of(
        self,
        theta: Theta,
        own: Named,
        inner: Batch,
        rest: Phi,
        state: State,
        number: Tensor,
        *,
        history: bool = False,
    ) -> State:
        with torch.set_grad_enabled(history):
            bound = self._bound(own)
            return self.strategy.inner_step(
                self.problem, theta, bound, inner, rest, state, number, history=history
            )

    def _step_back_of(
        self,
        theta: Theta,
        own: Named,
        inner: Batch,
        rest: Phi,
        state: State,
        number: Tensor,
        carried: State,
        sums: Named,
    ) -> tuple[State, Named]:
        found = self._product(theta, own, inner, rest, state, number, carried)
        flat = [value for part in state for value in part]
        back = [found.get(f"state/{i}", torch.zeros_like(v)) for i, v in enumerate(flat)]
        width = len(self.names)
        carried = [back[i : i + width] for i in range(0, len(back), width)]
        return carried, {n: v + found[n] if n in found else v for n, v in sums.items()}

    def _product(
        self,
        theta: Theta,
        own: Named,
        inner: Batch,
        rest: Phi,
        state: State,
        number: Tensor,
        carried: State,
    ) -> Named:
        theta, own, rest = _leaves(theta), _leaves(own), _leaves(rest)
        state = [[value.detach().requires_grad_() for value in part] for part in state]
        new = self._step_of(theta, own, inner, rest, state, number, history=True)
        pairs = [
            (value, along)
            for part, toward in zip(new, carried, strict=True)
            for value, along in zip(part, toward, strict=True)
            if value.requires_grad
        ]
        flat = [value for part in state for value in part]
        inputs = {
            **{f"state/{i}": v for i, v in enumerate(flat)},
            **_prefixed("theta", theta),
            **_prefixed("own", own),
            **_prefixed("rest", rest),
        }
        return _gradients([v for v, _ in pairs], [a for _, a in pairs], inputs)

    def _find_touched(
        self, theta: Theta, own: Named, inner: Batch, rest: Phi, state: State
    ) -> frozenset[str]:
        """What a step is a function of, besides its state."""
        ones = [[torch.ones_like(value) for value in part] for part in state]
        found = self._product(theta, own, inner, rest, state, self._numbers[0], ones)
        return frozenset(name for name in found if not name.startswith("state/"))

    def _end_of(
        self, theta: Theta, start: Phi, found: Phi, support: Batch, query: Batch
    ) -> tuple[Tensor, Phi, Named]:
        """The mean loss, its gradient in φ (of start and end together), and in θ."""
        theta, start, found = _leaves(theta), _leaves(start), _leaves(found)
        with torch.enable_grad():
            losses = self.strategy.end(self.problem, theta, start, found, support, query)
            loss = mean_over_queries(losses, query)
            inputs = {
                **_prefixed("theta", theta),
                **_prefixed("start", start),
                **_prefixed("found", found),
            }
            gradients = _gradients([loss], [torch.ones_like(loss)], inputs)
        toward = {}
        for name, value in start.items():
            parts = [gradients.pop(f"{kind}/{name}", None) for kind in ("start", "found")]
            known = [part for part in parts if part is not None]
            toward[name] = cast(Tensor, sum(known)) if known else torch.zeros_like(value)
        return loss.detach(), toward, gradients


def _leaves(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_() for name, value in values.items()}


def _prefixed(kind: str, values: Mapping[str, Tensor]) -> Named:
    return {f"{kind}/{name}": value for name, value in values.items()}


def _gradients(outputs: list[Tensor], along: list[Tensor], inputs: Named) -> Named:
    """The vector-Jacobian products that exist."""
    found = torch.autograd.grad(outputs, list(inputs.values()), along, allow_unused=True)
    return {n: g for n, g in zip(inputs, found, strict=True) if g is not None}
