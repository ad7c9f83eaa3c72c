"""Gradients, Hessian-vector products and Jacobians of every task at once.

A loss per task f: φ (tasks, ...) ↦ (tasks,) whose tasks do not see each other has a block diagonal
Hessian, so one backward pass of Σ_i f_i gives every task's own gradient ∇f_i(φ_i), and one more
backward pass every task's own product ∇²f_i(φ_i) v_i: no loop over tasks, no `vmap` around Pyro.

    ∇²f(φ) v = ∂/∂φ [∇f(φ)ᵀ v],   v held constant       (Pearlmutter 1994)

φ and v are one tensor (tasks, ...) or a dict of them by site. All functions can be traced by
`make_fx`, and so be part of a `hbmeta.staging.Staged` function. Pitfalls:

- Tasks must not see each other. Where they do (batch statistics over tasks, a loss divided by
  something of another task), the gradient of the sum is not the tasks' own: it holds
  ∂f_j/∂φ_i as well, without a word.
- v must not be differentiated. Writing ∂/∂φ [∇f(φ) · v] by hand with a v that is itself a function
  of φ (CG's direction, ∇L^Q(φ)) adds (∂v/∂φ)ᵀ ∇f(φ). Here v is the cotangent of a backward pass,
  which autograd never differentiates.
- A Jacobian of composed maps is a product from the last to the first, J = J_N ⋯ J_1; a backward
  pass multiplies its transposes in the other order, Jᵀ v = J_1ᵀ ⋯ J_Nᵀ v. With symmetric factors
  that do not commute, as in MAML's ∏ (I − α∇²L), the wrong order is a wrong number, not an error.
- autograd gives None where a function does not depend on a site, and raises where a gradient is
  constant (f linear). Both are zeros here.
- Without `create_graph` the results have no history: a θ behind them gets no gradient.
- ReLU networks have a gradient almost everywhere, and a Hessian that knows nothing of the kinks:
  products are those of the piece on which φ lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["hessian_vector", "jacobian", "jacobian_of", "task_gradient"]

Tree = TypeVar("Tree", Tensor, dict[str, Tensor])


def task_gradient(
    function: Callable[[Tree], Tensor], phi: Tree, *, create_graph: bool = False
) -> tuple[Tensor, Tree]:
    """f_i(φ_i) of every task and its gradient ∇f_i(φ_i), by one backward pass.

    Args:
        function: φ to (..., tasks), tasks independent of each other (first pitfall above).
        phi: the point; one tensor (..., tasks, *shape), or one per site.
        create_graph: keep the history, to differentiate the results in φ, or in a θ behind φ or
            `function`.
    Returns:
        (..., tasks) values, and gradients like φ.
    """
    leaves, structure = _leaves(phi)
    with torch.enable_grad():
        values = function(pytree.tree_unflatten(leaves, structure))
        gradients = _backward([values.sum()], None, leaves, create_graph)
    found: Tree = pytree.tree_unflatten(gradients, structure)
    return values if create_graph else values.detach(), found


def hessian_vector(
    function: Callable[[Tree], Tensor], phi: Tree, vector: Tree, *, create_graph: bool = False
) -> Tree:
    """∇²f_i(φ_i) v_i of every task, by reverse over reverse, v held constant.

    Exact; about two to three times the cost of a gradient.

    Args:
        function: φ to (..., tasks), tasks independent of each other.
        phi: the point.
        vector: v, like φ.
        create_graph: keep the history.
    Example:
        >>> f = lambda phi: phi[:, 0] ** 2 * phi[:, 1] + phi[:, 1] ** 3
        >>> v = torch.tensor([[1.0, 2.0]])
        >>> hessian_vector(f, torch.tensor([[1.0, 2.0]]), v)
        tensor([[ 8., 26.]])
    """
    leaves, structure = _leaves(phi)
    with torch.enable_grad():
        values = function(pytree.tree_unflatten(leaves, structure))
        gradients = _backward([values.sum()], None, leaves, True)
        products = _backward(gradients, pytree.tree_leaves(vector), leaves, create_graph)
    found: Tree = pytree.tree_unflatten(products, structure)
    return found


def jacobian(
    function: Callable[[Tensor], Tensor], phi: Tensor, *, create_graph: bool = False
) -> Tensor:
    """∂F_i/∂φ_i of a map of every task, dense, by one backward pass per output.

    For small maps, and as the slow way that fast ones are tested against; see the module's
    docstring for the order in which Jacobians of composed maps multiply.

    Args:
        function: φ (..., tasks, inputs) to (..., tasks, outputs), tasks independent of each other.
        phi: the point.
        create_graph: keep the history.
    Returns:
        (..., tasks, outputs, inputs).
    """
    (leaf,), _ = _leaves(phi)
    with torch.enable_grad():
        return jacobian_of(function(leaf), leaf, create_graph=create_graph)


def jacobian_of(outputs: Tensor, phi: Tensor, *, create_graph: bool = False) -> Tensor:
    """`jacobian` of outputs that have been computed from φ already; keeps their graph."""
    # Under `no_grad` a slice of outputs would have no history, and every row be zero.
    with torch.enable_grad():
        rows = [
            _backward([outputs[..., j].sum()], None, [phi], create_graph, retain_graph=True)[0]
            for j in range(outputs.shape[-1])
        ]
        return torch.stack(rows, -2)


def _leaves(phi: Tensor | dict[str, Tensor]) -> tuple[list[Tensor], pytree.TreeSpec]:
    """φ as tensors to differentiate in: itself where it has a history, which the results keep."""
    leaves, structure = pytree.tree_flatten(phi)
    return [v if v.requires_grad else v.detach().requires_grad_() for v in leaves], structure


def _backward(
    outputs: Sequence[Tensor],
    cotangents: Iterable[Tensor] | None,
    inputs: Sequence[Tensor],
    create_graph: bool,
    *,
    retain_graph: bool | None = None,
) -> list[Tensor]:
    """Vector-Jacobian products, zero where outputs do not depend on an input."""
    along = [None] * len(outputs) if cotangents is None else list(cotangents)
    pairs = [(o, v) for o, v in zip(outputs, along, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(value) for value in inputs]
    found = torch.autograd.grad(
        [output for output, _ in pairs],
        inputs,
        [vector for _, vector in pairs] if cotangents is not None else None,
        create_graph=create_graph,
        retain_graph=retain_graph,
        allow_unused=True,
    )
    return [
        torch.zeros_like(value) if gradient is None else gradient
        for gradient, value in zip(found, inputs, strict=True)
    ]
