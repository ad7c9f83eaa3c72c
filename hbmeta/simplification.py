"""Rewrites of a traced graph that a compiler does not make by itself.

A log density repeats work that a person would do once: the log of a noise scale, expanded to every
cell before the logarithm is taken, and a division by its square at each cell. Two rewrites, in one
pass over the graph:

    f(expand(a))        ->  expand(f(a))             for pointwise f of one tensor
    b / expand(a)       ->  b * expand(1 / a)        a division costs eight multiplications

The second rounds once more, a relative 1e-16 in float64. Numbers that a program wrote
(`Normal(0.0, 10.0)`) become literals: the compiler folds them, and its cache on disk knows the
graph again. Then common subexpressions are merged and dead code is dropped (unused priors,
handlers' bookkeeping).
"""

from __future__ import annotations

from typing import cast

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

aten = torch.ops.aten

# Pointwise functions of one tensor and, perhaps, numbers.
_POINTWISE = {
    aten.pow.Tensor_Scalar,
    aten.log.default,
    aten.log1p.default,
    aten.exp.default,
    aten.expm1.default,
    aten.neg.default,
    aten.sqrt.default,
    aten.rsqrt.default,
    aten.reciprocal.default,
    aten.lgamma.default,
    aten.digamma.default,
    aten.sigmoid.default,
    aten.abs.default,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.add.Tensor,
    aten.sub.Tensor,
}

__all__ = ["simplify"]


def simplify(graph: GraphModule) -> GraphModule:
    """Moves expansions behind pointwise work, merges and drops dead code; in place."""
    from torch._functorch.compile_utils import fx_graph_cse

    graph.graph.eliminate_dead_code()
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            _write_literal(graph, node)
        if node.op != "call_function":
            continue
        if _is_expand(node) and _is_expand(node.args[0]):
            node.args = (node.args[0].args[0], *node.args[1:])
        elif node.target in _POINTWISE:
            tensors = [a for a in node.args if isinstance(a, Node)]
            if (
                len(tensors) == 1
                and tensors[0] is node.args[0]
                and _is_expand(tensors[0])
                and _same_shape(node)
            ):
                _move_behind(graph, node)
            elif node.target is aten.div.Tensor and len(tensors) == 2 and _is_expand(tensors[1]):
                _multiply_instead(graph, node)
    graph.graph.eliminate_dead_code()
    graph.graph = fx_graph_cse(graph.graph)
    graph.recompile()
    return graph


def _write_literal(graph: GraphModule, node: Node) -> None:
    constant = getattr(graph, str(node.target))
    if not isinstance(constant, torch.Tensor) or constant.ndim:
        return
    options: dict[str, Argument] = {"dtype": constant.dtype, "device": constant.device}
    with graph.graph.inserting_before(node):
        literal = graph.graph.call_function(aten.full.default, ([], constant.item()), options)
    literal.meta = {**node.meta, "val": constant}
    for user in list(node.users):
        if user.target in (aten.lift_fresh_copy.default, aten.detach.default):
            user.replace_all_uses_with(literal)
    node.replace_all_uses_with(literal)


def _is_expand(node: object) -> bool:
    return isinstance(node, Node) and node.target is aten.expand.default


def _same_shape(node: Node) -> bool:
    """Whether a node has the shape that its input was expanded to."""
    expanded = node.args[0]
    assert isinstance(expanded, Node)
    shape = _value(node).shape
    return tuple(shape) == tuple(_value(expanded).shape) and _value(expanded).is_floating_point()


def _value(node: Node) -> torch.Tensor:
    # A node's meta is an untyped dict; `make_fx` puts a tensor there for every pointwise node.
    return cast(torch.Tensor, node.meta.get("val", node.meta.get("tensor_meta")))


def _move_behind(graph: GraphModule, node: Node) -> None:
    expanded = node.args[0]
    assert isinstance(expanded, Node)
    assert callable(node.target)  # only "call_function" nodes come here, whose target is no name
    with graph.graph.inserting_before(node):
        inner = graph.graph.call_function(
            node.target, (expanded.args[0], *node.args[1:]), node.kwargs
        )
        outer = graph.graph.call_function(aten.expand.default, (inner, *expanded.args[1:]))
    outer.meta = dict(node.meta)
    node.replace_all_uses_with(outer)
    graph.graph.erase_node(node)


def _multiply_instead(graph: GraphModule, node: Node) -> None:
    numerator, expanded = node.args[0], node.args[1]
    assert isinstance(expanded, Node)
    if not _value(expanded).is_floating_point():
        return
    with graph.graph.inserting_before(node):
        inverse = graph.graph.call_function(aten.reciprocal.default, (expanded.args[0],))
        outer = graph.graph.call_function(aten.expand.default, (inverse, *expanded.args[1:]))
        outer.meta = dict(expanded.meta)
        product = graph.graph.call_function(aten.mul.Tensor, (numerator, outer))
    product.meta = dict(node.meta)
    node.replace_all_uses_with(product)
    graph.graph.erase_node(node)
