"""The MAML meta-gradient as other libraries' own documentation has one write it.

Every peer computes the mean query loss of the tasks after N second-order steps on a 1-w-w-1 ReLU
network, and its gradient, from the same weights: {"layer1.weight": (w, 1), "layer1.bias": (w,), …}.
One that is not installed is left out; `pip install -c constraints.txt -e ".[peers]"` brings them.
All run on as many threads as torch is set to.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LAYERS = ("layer1", "layer2", "layer3")
Weights = dict[str, Tensor]
Step = Callable[[], tuple[Any, dict[str, Any]]]


@dataclass(frozen=True)
class Work:
    """Data (tasks, points, 1) and (tasks, points), weights, and the inner loop."""

    support: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]
    weights: Weights
    steps: int = 5
    step_size: float = 0.01


def network(weights: Weights, x: Tensor) -> Tensor:
    """(points, 1) to (points,)."""
    for number, layer in enumerate(LAYERS):
        x = nn.functional.linear(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"])
        if number < len(LAYERS) - 1:
            x = x.relu()
    return x[:, 0]


def loss_of(weights: Weights, x: Tensor, y: Tensor) -> Tensor:
    """The mean squared error of one task."""
    return (network(weights, x) - y).square().mean()


def torch_func(work: Work) -> Callable[..., tuple[Weights, Tensor]]:
    """`grad` of `vmap` of `grad`, as in the tutorial on per-sample gradients."""

    def task(weights: Weights, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        for _ in range(work.steps):
            gradients = torch.func.grad(loss_of)(weights, xs, ys)
            weights = {k: v - work.step_size * gradients[k] for k, v in weights.items()}
        return loss_of(weights, xq, yq)

    def mean(weights: Weights, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        return torch.vmap(task, in_dims=(None, 0, 0, 0, 0))(weights, xs, ys, xq, yq).mean()

    return torch.func.grad_and_value(mean)


def eager_functional(work: Work) -> Step:
    """torch.func, eager."""
    return functional(torch_func(work), work)


def compiled_functional(work: Work) -> Step:
    """torch.func under torch.compile."""
    return functional(torch.compile(torch_func(work)), work)


def functional(function: Callable[..., tuple[Weights, Tensor]], work: Work) -> Step:
    """The function at the data of the work."""

    def step() -> tuple[Tensor, dict[str, Any]]:
        gradients, value = function(work.weights, *work.support, *work.query)
        return value, gradients

    return step


def jax_step(work: Work) -> Step:
    """`jit` of `value_and_grad` of `vmap` of `grad`.

    NPROC is how many threads XLA starts. Of the ways to keep it to one thread, this one, with the
    work done on the calling thread, is the fastest: 1.24 ms, against 1.42 ms with a thread of its
    own and 2.1 ms with --xla_cpu_multi_thread_eigen=false; 1.75 ms with the defaults on two
    threads.
    """
    os.environ["NPROC"] = str(torch.get_num_threads())
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_cpu_enable_async_dispatch", False)

    def forward(weights: Any, x: Any) -> Any:
        for number, layer in enumerate(LAYERS):
            x = x @ weights[f"{layer}.kernel"] + weights[f"{layer}.bias"]
            if number < len(LAYERS) - 1:
                x = jax.nn.relu(x)
        return x[:, 0]

    def loss(weights: Any, x: Any, y: Any) -> Any:
        return jnp.mean((forward(weights, x) - y) ** 2)

    def task(weights: Any, xs: Any, ys: Any, xq: Any, yq: Any) -> Any:
        for _ in range(work.steps):
            gradients = jax.grad(loss)(weights, xs, ys)
            weights = jax.tree.map(lambda w, g: w - work.step_size * g, weights, gradients)
        return loss(weights, xq, yq)

    def mean(weights: Any, *data: Any) -> Any:
        return jnp.mean(jax.vmap(task, in_axes=(None, 0, 0, 0, 0))(weights, *data))

    function = jax.jit(jax.value_and_grad(mean))
    # (inputs, outputs), as its libraries keep them.
    weights = {
        name.replace("weight", "kernel"): jnp.array(value.T.numpy())
        for name, value in work.weights.items()
    }
    data = [jnp.array(value.numpy()) for value in (*work.support, *work.query)]
    return lambda: jax.block_until_ready(function(weights, *data))


class Network(nn.Module):
    """The same network as a module, for the peers that want one."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        for layer in LAYERS:
            outputs, inputs = weights[f"{layer}.weight"].shape
            setattr(self, layer, nn.Linear(inputs, outputs))
        self.load_state_dict({name: value.clone() for name, value in weights.items()})

    def forward(self, x: Tensor) -> Tensor:
        return self.layer3(self.layer2(self.layer1(x).relu()).relu())[:, 0]  # type: ignore[operator]


def torchopt_step(work: Work) -> Step:
    """TorchOpt's MetaSGD, task by task, state extracted and recovered as in its MAML example."""
    import torchopt

    model = Network(work.weights)
    inner = torchopt.MetaSGD(model, lr=work.step_size)

    def step() -> tuple[Tensor, dict[str, Any]]:
        model.zero_grad()
        network_state = torchopt.extract_state_dict(model)
        inner_state = torchopt.extract_state_dict(inner)
        losses = []
        for xs, ys, xq, yq in zip(*work.support, *work.query, strict=True):
            for _ in range(work.steps):
                inner.step((model(xs) - ys).square().mean())
            losses.append((model(xq) - yq).square().mean())
            torchopt.recover_state_dict(model, network_state)
            torchopt.recover_state_dict(inner, inner_state)
        total = torch.stack(losses).mean()
        total.backward()
        return total, {name: p.grad for name, p in model.named_parameters()}

    return step


def higher_step(work: Work) -> Step:
    """higher's innerloop_ctx, task by task, as in its MAML example."""
    import higher

    model = Network(work.weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=work.step_size)

    def step() -> tuple[float, dict[str, Any]]:
        optimizer.zero_grad()
        total = 0.0
        for xs, ys, xq, yq in zip(*work.support, *work.query, strict=True):
            with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (
                fast,
                inner,
            ):
                for _ in range(work.steps):
                    inner.step((fast(xs) - ys).square().mean())
                loss = (fast(xq) - yq).square().mean() / len(work.support[0])
                loss.backward()
                total += float(loss.detach())
        return total, {name: p.grad for name, p in model.named_parameters()}

    return step


_ALL: dict[str, tuple[str, Callable[[Work], Step]]] = {
    "JAX jit(vmap(grad))": ("jax", jax_step),
    "torch.func, compiled": ("torch", compiled_functional),
    "torch.func, eager": ("torch", eager_functional),
    "TorchOpt": ("torchopt", torchopt_step),
    "higher": ("higher", higher_step),
}


def in_torch(gradients: dict[str, Any]) -> Weights:
    """A peer's gradients as (outputs, inputs) tensors by the names of the weights."""
    found = {}
    for name, value in gradients.items():
        plain = value.detach() if isinstance(value, Tensor) else torch.tensor(np.array(value))
        found[name.replace("kernel", "weight")] = plain.T if name.endswith("kernel") else plain
    return found


def installed() -> tuple[dict[str, Callable[[Work], Step]], list[str]]:
    """The peers that are installed, and the names of the others."""
    there = {name: importlib.util.find_spec(module) for name, (module, _) in _ALL.items()}
    found = {name: make for name, (_, make) in _ALL.items() if there[name] is not None}
    return found, [name for name, spec in there.items() if spec is None]
