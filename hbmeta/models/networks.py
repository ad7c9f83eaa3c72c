"""Networks as functions of all their weights: f_φ with φ one tensor per parameter of a module.

    f(φ_i, x_i) for all tasks i at once   =   vmap over i of functional_call(network, φ_i, x_i)

A network is a template: its own weights say where φ starts, and are never read after that.
"""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from hbmeta.errors import DataError, ProgramError
from hbmeta.models.batch_norm import (
    TaskBatchNorm,
    has_batch_norm,
    is_batch_norm,
    row_weights,
    stored_digest,
)
from hbmeta.program import Context

Activation = Literal["relu", "tanh"]

__all__ = [
    "Activation",
    "Perceptron",
    "apply_network",
    "check_hidden",
    "check_layers",
    "check_network",
    "check_on_rows",
    "describe",
    "entry",
    "fan_in",
    "perceptron",
    "tree",
]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
# Sites of the models that a parameter of a network must not take the name of.
_TAKEN = ("y", "noise", "task", "point")
_ROWS = 8


def check_hidden(hidden: Sequence[int], activation: str, where: str) -> tuple[int, ...]:
    """The widths of the hidden layers.

    Raises:
        DataError: a width that is no whole number of 1 or more, or an unknown activation.
    """
    widths = tuple(hidden) if isinstance(hidden, Sequence) else (hidden,)
    if isinstance(hidden, str) or not all(type(w) is int and w >= 1 for w in widths):
        raise DataError(
            where,
            needed="hidden as widths of layers, whole numbers of 1 or more",
            found=f"{hidden!r}",
            do="Pass for example hidden=(40, 40); () is a linear model.",
        )
    if activation not in get_args(Activation):
        raise DataError(
            where,
            needed="activation 'relu' or 'tanh'",
            found=repr(activation),
            do="Choose one, or pass a module of your own as network=.",
        )
    return widths


class Perceptron(nn.Sequential):
    """Layers "layer1", "layer2", …, with torch's own initialisation drawn from `seed`, float64."""

    def __init__(
        self, inputs: int, hidden: Sequence[int], outputs: int, activation: str, seed: int
    ) -> None:
        sizes = [inputs, *hidden, outputs]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for number, (before, after) in enumerate(itertools.pairwise(sizes), 1):
                layers[f"layer{number}"] = nn.Linear(before, after, dtype=torch.float64)
                if number < len(sizes) - 1:
                    layers[f"activation{number}"] = _ACTIVATIONS[activation]()
        super().__init__(layers)

    def batched(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """What `apply_network` gives for any module, in fewer operations: h Wᵀ + b for all tasks.

        Products with a vector are written as such: a matrix product of width 1 is slower.
        """
        for name, layer in self.named_children():
            if not isinstance(layer, nn.Linear):
                x = layer(x)
                continue
            weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"].unsqueeze(-2)
            if layer.in_features == 1:
                x = x * weight.mT + bias
            elif layer.out_features == 1:
                x = (x * weight).sum(-1, keepdim=True) + bias
            else:
                x = x @ weight.mT + bias
        return x


def perceptron(
    inputs: int, hidden: Sequence[int], outputs: int, activation: str, seed: int
) -> nn.Module:
    """A `Perceptron`, as a module like any other."""
    return Perceptron(inputs, hidden, outputs, activation, seed)


def check_network(network: Any, where: str) -> nn.Module:
    """A module of a person's own that can serve as a template.

    Raises:
        DataError: it is no module with parameters, all of them to be learned.
        ProgramError: it has layers that draw random numbers or change while they run, or a
            parameter has the name of a site.
    """
    if not isinstance(network, nn.Module):
        raise DataError(
            where,
            needed="network as a torch.nn.Module, (points, features) to (points, outputs)",
            found=type(network).__name__,
            do="Pass for example torch.nn.Sequential(...).",
        )
    parameters = dict(network.named_parameters())
    frozen = [name for name, value in parameters.items() if not value.requires_grad]
    odd = [name for name, value in parameters.items() if not value.is_floating_point()]
    if not parameters or frozen or odd:
        raise DataError(
            where,
            needed="a network whose parameters are real numbers that differ between tasks",
            found=f"{(frozen or odd)[0]!r}, frozen or of another kind" if parameters else "none",
            do="Leave requires_grad on; a part that is not to adapt belongs into x.",
        )
    check_layers(network, f"{where}, network", batch_norm=True)
    clash = [name for name in parameters if name in _TAKEN]
    if clash:
        raise ProgramError(
            f"{where}, network",
            needed=f"parameters by other names than {', '.join(_TAKEN)}",
            found=repr(clash[0]),
            do="Rename it, or put the network into a torch.nn.Sequential.",
        )
    return network


def check_layers(network: nn.Module, where: str, *, batch_norm: bool = False) -> None:
    """Raises where a layer is no fixed function of its weights and of each row.

    Args:
        network: the network.
        where: the caller, for the message.
        batch_norm: whether the caller has a policy for the statistics of nn.BatchNorm layers.
    Raises:
        ProgramError: a layer draws random numbers or changes while it runs.
    """
    for name, module in network.named_modules():
        why = "" if batch_norm and is_batch_norm(module) else _refused(module)
        if why:
            raise ProgramError(
                where,
                needed="a fixed function of its weights and of each row of x",
                found=f"{type(module).__name__} {name!r}, which {why}",
                do="Leave the layer out, or use LayerNorm or GroupNorm in place of BatchNorm.",
            )


def _refused(module: nn.Module) -> str:
    batch_norm = isinstance(module, nn.modules.batchnorm._NormBase)
    if batch_norm and (
        isinstance(module, nn.modules.batchnorm._BatchNorm) or module.track_running_stats
    ):
        return "averages over rows and keeps running averages"
    # Recurrent layers and attention have the rate as a plain attribute.
    rate = getattr(module, "p" if "Dropout" in type(module).__name__ else "dropout", 0.0)
    if (isinstance(rate, float | int) and rate > 0) or isinstance(module, nn.RReLU):
        return "draws random numbers"
    return ""


def check_on_rows(
    network: nn.Module,
    x: Tensor,
    outputs: int,
    where: str,
    part: str = "network",
    *,
    statistics: bool = False,
) -> None:
    """Runs a template on a few rows and raises where it is no function of one row of x.

    Args:
        network: the template.
        x: (rows, features).
        outputs: columns that it must return.
        where: the caller, for the message.
        part: what the network is to the caller, for the message.
        statistics: whether its `TaskBatchNorm` layers take their statistics from rows. They are
            those of the same rows of x in every run, so that a row is still a function of itself.
    Raises:
        ProgramError: it fails on x, returns another shape, mixes rows, changes its buffers or draws
            random numbers.
    """
    x = x[:_ROWS].detach()
    if not len(x):
        return
    weights = {name: value.detach().to(x) for name, value in network.named_parameters()}
    buffers = {name: value.clone() for name, value in _buffers(network, x).items()}
    before = {name: value.clone() for name, value in buffers.items()}
    given = dict.fromkeys(row_weights(network) if statistics else (), x.new_ones(len(x)))
    lengths: list[bool] = []

    def run(rows: Tensor) -> Any:
        together = torch.cat([x, rows]) if given else rows

        def note(_: nn.Module, inputs: tuple[Tensor]) -> None:
            lengths.append(len(inputs[0]) == len(together))

        normed = (m for m in network.modules() if given and isinstance(m, TaskBatchNorm))
        hooks = [module.register_forward_pre_hook(note) for module in normed]
        try:
            every = {**weights, **buffers, **given}
            found = torch.func.functional_call(network, every, (together,))
        finally:
            for hook in hooks:
                hook.remove()
        return found[len(x) :] if given and isinstance(found, Tensor) else found

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        state = torch.get_rng_state()
        try:
            whole, first = run(x), run(x[:1])
        except Exception as error:
            said = next(iter(str(error).splitlines()), "")
            raise ProgramError(
                f"{where}, {part}",
                needed=f"a module that runs on x {tuple(x.shape)} of {x.dtype}",
                found=f"{type(error).__name__}: {said}",
                do="Check its number of inputs; convert the data with tasks.to(dtype=...).",
            ) from error
        drew = not torch.equal(state, torch.get_rng_state())
    found = ""
    if not isinstance(whole, Tensor) or tuple(whole.shape) != (len(x), outputs):
        shape = tuple(whole.shape) if isinstance(whole, Tensor) else type(whole).__name__
        found = f"{shape} from x {tuple(x.shape)}"
    elif drew:
        found = "a module that draws random numbers"
    elif any(not torch.equal(before[name], value) for name, value in buffers.items()):
        found = "a module that changes its buffers"
    elif not all(lengths):
        found = "a batch norm whose input has not the rows of x as its first dimension"
    elif not torch.allclose(whole[:1], first, rtol=1e-3, atol=1e-5):
        found = "another value for a row alone than for the row among others"
    if found:
        raise ProgramError(
            f"{where}, {part}",
            needed=f"a fixed function of each row of x with {outputs} "
            f"{'output' if outputs == 1 else 'outputs'}: (points, features) to (points, {outputs})",
            found=found,
            do=f"Correct the {part}; rows must not depend on each other given its weights.",
        )


def apply_network(
    network: nn.Module, weights: Mapping[str, Tensor], x: Tensor, context: Context | None = None
) -> Tensor:
    """(tasks, points, outputs) of all tasks, each with its own weights.

    Args:
        network: the template.
        weights: (tasks, *shape) by name of the parameter.
        x: (tasks, points, features).
        context: x and weight of the rows that `TaskBatchNorm` layers take their statistics from;
            without it they use the stored ones.
    """
    if type(network) is Perceptron:
        return network.batched(weights, x)
    buffers = _buffers(network, x)
    names = row_weights(network)

    def one(own: dict[str, Tensor], rows: Tensor, weight: Tensor) -> Any:
        given = {**own, **buffers, **dict.fromkeys(names, weight)}
        return torch.func.functional_call(network, given, (rows,))

    seen, weight = (x, x.new_zeros(len(x), 0)) if context is None else context
    # A support is its own context, and need not pass twice.
    rows = x if seen is x else torch.cat([seen, x], 1)
    found: Tensor = torch.vmap(one)(dict(weights), rows, weight)
    return found if seen is x else found[:, seen.shape[1] :]


def _buffers(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The constants of the network, where x is and as precise."""
    return {
        name: value.to(x) if value.is_floating_point() else value.to(x.device)
        for name, value in network.named_buffers()
    }


def fan_in(shape: Sequence[int]) -> int:
    """Inputs of one unit: the product of all dimensions but the first; 1 for biases and scales."""
    size = 1
    for length in shape[1:]:
        size *= length
    return size


def tree(values: Mapping[str, Tensor]) -> nn.Module:
    """Parameters by qualified name, in nested modules that do nothing but hold them."""
    root = nn.Module()
    for name, value in values.items():
        *path, last = name.split(".")
        holder = root
        for step in path:
            if step not in dict(holder.named_children()):
                holder.add_module(step, nn.Module())
            holder = holder.get_submodule(step)
        holder.register_parameter(last, nn.Parameter(value.detach().clone()))
    return root


def entry(root: nn.Module, name: str) -> Tensor:
    """A parameter of `tree`; also while another tensor stands in its place."""
    value: Tensor = functools.reduce(getattr, name.split("."), root)  # type: ignore[assignment]
    return value


def describe(network: nn.Module) -> str:
    """Class and shapes of the parameters of a module of a person's own.

    With batch norm also a checksum of its stored statistics, which are no parameters of a fit.
    """
    parts = [f"{n} {tuple(v.shape)}" for n, v in network.named_parameters()]
    if has_batch_norm(network):
        parts.append(f"stored statistics {stored_digest(network)}")
    return f"{type(network).__name__}({', '.join(parts)})"
