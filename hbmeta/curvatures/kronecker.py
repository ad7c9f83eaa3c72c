"""Kronecker-factored curvature of a network's dense layers (K-FAC), for all tasks at once.

A dense layer computes z = W a + b. With ā = (a, 1), g = R ∂η/∂z the whitened gradient of the
observation's parameters and n points, its block of the Gauss–Newton curvature in (W, b) is replaced
by

    Σ_c (g_c ⊗ ā_c)(g_c ⊗ ā_c)ᵀ ≈ (Σ_c g_c g_cᵀ) ⊗ (1/n Σ_c ā_c ā_cᵀ) = G ⊗ A,

and blocks between layers are left out. Exact for one point, and for one layer whose G does not
depend on the point (linear regression). g is read off the program itself, ∂η/∂b = ∂η/∂z; a is what
the layer of the network is given. With a prior precision that is the same for every output of a
layer, Λ = G ⊗ A + I ⊗ D is diagonal in the eigenvectors of G and of D^−½ A D^−½: a task takes as
many numbers as its factors have, and no matrix of φ's size is formed.

References:
    Martens, Grosse (2015), ICML. Ritter, Botev, Barber (2018), ICLR, for the posterior. Grant et
    al. (2018), ICLR, for tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hbmeta.curvatures.last_layer import entries_of
from hbmeta.curvatures.precision import KroneckerFactored, LayerFactors
from hbmeta.curvatures.prior import prior_diagonal
from hbmeta.curvatures.response import response_rows
from hbmeta.errors import UnsupportedModelError
from hbmeta.models.neural_model import NeuralModel
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta

__all__ = ["check_kronecker", "kronecker"]


class _Dense(NamedTuple):
    """A dense layer of a template: its name, and where its weights and bias stand in φ.

    Weights by output, so that `weight[i][j]` is the position of W_ij.
    """

    name: str
    weight: list[list[int]]
    bias: list[int]


def check_kronecker(problem: Problem, where: str) -> None:
    """Raises where the program is no network of dense layers with a bias, each used once per point.

    Raises:
        UnsupportedModelError: says what stands in the way.
    """
    found = _obstacle(problem)
    if found is None:
        batch = problem.one_row()
        theta = {name: value.detach() for name, value in problem.theta(batch).items()}
        with torch.no_grad():
            start = problem.location(theta, batch)
            layers = _layers(problem)
            inputs = _inputs(problem, start, batch)
        shapes = {name: [tuple(a.shape) for a in seen] for name, seen in inputs.items()}
        prior = prior_diagonal(problem, theta, start, batch)
        for layer in layers:
            if len(shapes[layer.name]) != 1 or len(shapes[layer.name][0]) != 3:
                found = f"layer {layer.name!r}, which runs {len(shapes[layer.name])} times a point"
            weights = prior[:, layer.weight]
            same = weights.amax(1) - weights.amin(1) <= 1e-9 * weights.abs().amax(1)
            bias = prior[:, layer.bias]
            same_bias = bias.amax(1) - bias.amin(1) <= 1e-9 * bias.abs().amax(1)
            if not bool(same.all() and same_bias.all()):
                found = f"a prior of layer {layer.name!r} that differs between its outputs"
    if found is not None:
        raise UnsupportedModelError(
            where,
            needed="a network of dense layers with a bias (models.NeuralRegression), for "
            'curvature="kronecker"',
            found=found,
            do='Use curvature="ggn", "diagonal" or "last_layer".',
        )


def kronecker(
    problem: Problem, theta: Theta, phi: Tensor, batch: Batch, *, create_graph: bool = False
) -> KroneckerFactored:
    """G, A and the prior's precision of every dense layer."""
    layers = _layers(problem)
    columns = [entry for layer in layers for entry in layer.bias]
    phi = phi if phi.requires_grad else phi.detach().requires_grad_()
    g = response_rows(problem, theta, phi, batch, columns=columns, create_graph=create_graph).split(
        [len(layer.bias) for layer in layers], -1
    )
    prior = prior_diagonal(problem, theta, phi, batch, create_graph=create_graph)
    inputs = _inputs(problem, phi if create_graph else phi.detach(), batch)
    counted = batch.weight.unsqueeze(-1)
    found = []
    for layer, of_outputs in zip(layers, g, strict=True):
        a = inputs[layer.name][0]
        a = torch.cat([a, torch.ones_like(a[..., :1])], -1) * counted
        moment = a.mT @ a / batch.counts.clamp_min(1.0)[:, None, None]
        table = [[*row, bias] for row, bias in zip(layer.weight, layer.bias, strict=True)]
        by_input = prior[:, table[0]]
        entries = torch.tensor(table, device=phi.device)
        found.append(LayerFactors(entries, of_outputs.mT @ of_outputs, moment, by_input))
    return KroneckerFactored(tuple(found))


def _obstacle(problem: Problem) -> str | None:
    """What keeps the program from having Kronecker factors, as far as its modules say."""
    program = problem.program
    if not isinstance(program, NeuralModel):
        return problem.name
    if problem.takes_context is not None:
        return "batch norm, by which points depend on each other"
    modules = dict(program.template[0].named_modules())
    for name, module in modules.items():
        own = [key for key, _ in module.named_parameters(recurse=False)]
        if own and not isinstance(module, nn.Linear):
            return f"{type(module).__name__} {name!r}"
        if isinstance(module, nn.Linear) and module.bias is None:
            return f"layer {name!r} without a bias"
    return None


def _template(problem: Problem) -> nn.Module:
    program = problem.program
    assert isinstance(program, NeuralModel)
    return program.template[0]


def _layers(problem: Problem) -> list[_Dense]:
    found = []
    for name, module in _template(problem).named_modules():
        if isinstance(module, nn.Linear):
            prefix = f"{name}." if name else ""
            flat = entries_of(problem, (f"{prefix}weight",))
            width = module.in_features
            weight = [flat[at : at + width] for at in range(0, len(flat), width)]
            found.append(_Dense(name, weight, entries_of(problem, (f"{prefix}bias",))))
    return found


def _inputs(problem: Problem, phi: Tensor, batch: Batch) -> dict[str, list[Tensor]]:
    """What each dense layer is given, (tasks, points, inputs), once for each time that it runs."""
    template = copy.deepcopy(_template(problem))
    seen: dict[str, list[Tensor]] = {}

    def noting(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _, given: seen[name].append(given[0])

    names = []
    for name, module in template.named_modules():
        if isinstance(module, nn.Linear):
            names.append(name)
            module.register_forward_pre_hook(noting(name))

    def one(weights: dict[str, Tensor], x: Tensor) -> dict[str, list[Tensor]]:
        seen.update({name: [] for name in names})
        torch.func.functional_call(template, weights, (x,))
        return dict(seen)

    weights = {
        name: value
        for name, value in problem.sites.from_vector(phi).items()
        if name in dict(template.named_parameters())
    }
    found: dict[str, list[Tensor]] = torch.vmap(one)(weights, batch.x)
    return found
