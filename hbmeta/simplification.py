"""Rewrites of a traced graph that a compiler does not make by itself.

A log density repeats work that a person would do once: the log of a noise scale, expanded to every
cell before the logarithm is taken, and a division by its square at each cell. Two rewrites, in one
pass over the graph:

    f(expand(a))        ->  expand(f(a))             for pointwise f of one tensor
    b / expand(a)       ->  b * expand(1 / a)        a division costs eight multiplications

The second rounds once more, a relative 1e-16 in float64. Numbers that a program wrote
(`Normal(0.0, 10.0)`) become literals: the compiler folds them, and its cache on disk knows the
graph again. A bool mask that no input enters (the lower triangle of a Cholesky factor) becomes the
positions where it is True: the compiler cannot index by a mask. What reverse mode starts from or
multiplies by for nothing goes (ones_like(loss), x¹, x⁰, 0 + x), and with it the inner losses,
whose values nobody reads. Then matrix products are put in order (`hbmeta.products`), common
subexpressions are merged and dead code is dropped (unused priors, handlers' bookkeeping).
"""

from __future__ import annotations

from typing import cast

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import Argument, map_arg

from hbmeta.products import rearrange

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

_FILLED = {aten.ones_like.default: 1, aten.zeros_like.default: 0}
_NEUTRAL = {aten.add.Tensor: 0, aten.mul.Tensor: 1}
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}

__all__ = ["simplify"]


def simplify(graph: GraphModule) -> GraphModule:
    """Moves expansions behind pointwise work, merges and drops dead code; in place."""
    from torch._functorch.compile_utils import fx_graph_cse

    graph.graph.eliminate_dead_code()
    _index_by_position(graph)
    _drop_idle(graph)
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
    rearrange(graph)
    graph.graph = fx_graph_cse(graph.graph)
    # Numbers that became literals would be passed to the compiled code at every call.
    used = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    held = [name for name, value in vars(graph).items() if isinstance(value, torch.Tensor)]
    for name in {*held, *graph._buffers} - used:
        delattr(graph, name)
    graph.recompile()
    return graph


def _drop_idle(graph: GraphModule) -> None:
    """Operations that give back their input, and fillings that only ask for its shape."""
    for node in list(graph.graph.nodes):
        if node.op == "get_attr" and "val" not in node.meta:
            node.meta["val"] = getattr(graph, str(node.target))
        power = node.args[1] if node.target is aten.pow.Tensor_Scalar else None
        if node.target in _FILLED or power == 0:
            value = _value(node)
            options: dict[str, Argument] = {"dtype": value.dtype, "device": value.device}
            filling = 1 if power == 0 else _FILLED[node.target]
            with graph.graph.inserting_before(node):
                full = graph.graph.call_function(
                    aten.full.default, (list(value.shape), filling), options
                )
            full.meta = dict(node.meta)
            node.replace_all_uses_with(full)
        elif (same := _unchanged(node)) is not None:
            node.replace_all_uses_with(same)
    graph.graph.eliminate_dead_code()


def _unchanged(node: Node) -> Node | None:
    """The input of x¹, 1 x or x + 0, where that has the shape and the dtype of the node."""
    same: Argument = None
    if node.target in (aten.pow.Tensor_Scalar, aten.mul.Scalar) and node.args[1] == 1:
        same = node.args[0]
    elif node.target in _NEUTRAL and not node.kwargs:
        neutral = _NEUTRAL[node.target]
        one, other = node.args
        same = other if _is_full(one, neutral) else one if _is_full(other, neutral) else None
    if not isinstance(same, Node):
        return None
    held, wanted = _value(same), _value(node)
    return same if held.shape == wanted.shape and held.dtype == wanted.dtype else None


def _is_full(node: Argument, number: int) -> bool:
    if not isinstance(node, Node) or node.target is not aten.full.default:
        return False
    return bool(node.args[1] == number)


def _index_by_position(graph: GraphModule) -> None:
    """x[..., mask] by whole numbers, where the mask is the same at every call."""
    known: dict[Node, torch.Tensor | None] = {}
    for node in list(graph.graph.nodes):
        if node.target not in _INDEXED:
            continue
        indices: list[Argument] = []
        for index in cast("list[Node | None]", node.args[1]):
            mask = None if index is None else _constant(graph, index, known)
            if mask is None or mask.dtype != torch.bool:
                indices.append(index)
                continue
            for axis in mask.nonzero(as_tuple=True):
                name = f"_position_{len(graph._buffers)}"
                graph.register_buffer(name, axis)
                with graph.graph.inserting_before(node):
                    place = graph.graph.get_attr(name)
                place.meta = {"val": axis}
                indices.append(place)
        node.args = (node.args[0], indices, *node.args[2:])
    graph.graph.eliminate_dead_code()


def _constant(
    graph: GraphModule, node: Node, known: dict[Node, torch.Tensor | None]
) -> torch.Tensor | None:
    """The tensor that a node always is; None where an input enters."""
    if node in known:
        return known[node]
    value: torch.Tensor | None = None
    if node.op == "get_attr":
        value = getattr(graph, str(node.target))
    elif isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable:
        parts = {part: _constant(graph, part, known) for part in node.all_input_nodes}
        if all(part is not None for part in parts.values()):
            args, kwargs = map_arg((node.args, node.kwargs), lambda part: parts[part])
            value = node.target(*args, **kwargs)
    known[node] = value if isinstance(value, torch.Tensor) else None
    return known[node]


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


def _meta(result: torch.Tensor, expanded: Node) -> dict[str, torch.Tensor]:
    """What is known of a node that is computed before its input is expanded."""
    before = expanded.args[0]
    assert isinstance(before, Node)
    return {"val": torch.empty(tuple(_value(before).shape), dtype=result.dtype, device="meta")}


def _move_behind(graph: GraphModule, node: Node) -> None:
    expanded = node.args[0]
    assert isinstance(expanded, Node)
    assert callable(node.target)  # only "call_function" nodes come here, whose target is no name
    with graph.graph.inserting_before(node):
        inner = graph.graph.call_function(
            node.target, (expanded.args[0], *node.args[1:]), node.kwargs
        )
        inner.meta = _meta(_value(node), expanded)
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
        inverse.meta = _meta(_value(expanded), expanded)
        outer = graph.graph.call_function(aten.expand.default, (inverse, *expanded.args[1:]))
        outer.meta = dict(expanded.meta)
        product = graph.graph.call_function(aten.mul.Tensor, (numerator, outer))
    product.meta = dict(node.meta)
    node.replace_all_uses_with(product)
    graph.graph.erase_node(node)
