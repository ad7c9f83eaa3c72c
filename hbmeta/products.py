"""Rewrites of a traced graph around matrix products of many tasks: views, transposes, numbers.

Reverse mode through a network of every task leaves long chains of views, half of its products
transposed, and numbers multiplied into whole matrices:

    view(view(a))                ->  a                     where the shape is the first again
    transpose(f(A, B))           ->  f(Aᵀ, Bᵀ)             for pointwise f that nothing else uses
    transpose(A B)               ->  Bᵀ Aᵀ
    A B with few columns         ->  transpose(Bᵀ Aᵀ)
    A (c B)                      ->  c (A B)               where A B is smaller than B
    A_i B for all tasks i        ->  one product           where all share B
    Σ_i A_iᵀ B_i                 ->  one product

A batched product takes its operands transposed at no cost, while a result that is wanted transposed
costs a pass over memory, and (25, 40, 40) by (25, 40, 10) takes four times as long as its
transpose (MKL, float32). The last three sum and round in another order; the others are exact.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

aten = torch.ops.aten

# Views that leave the elements in their order.
_VIEWS = {
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.detach.default,
    aten.alias.default,
}
# Read a tensor by its place in memory, which the rewrites change.
_BY_PLACE = {aten.as_strided.default, aten.view.dtype, aten.view_as_complex.default}
# A batched product with fewer columns than this is slow.
_FEW = 16
# How far up a transpose may look for a product.
_FAR = 16

__all__ = ["rearrange"]


def rearrange(graph: GraphModule) -> None:
    """Applies the rewrites, in place."""
    if any(_writes(node) or node.target in _BY_PLACE for node in graph.graph.nodes):
        # A program that fills a tensor in place sees its views change.
        return
    for node in graph.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            # What it views may come to lie in another order.
            node.target = aten.reshape.default
    _drop_views(graph)
    for node in reversed(list(graph.graph.nodes)):
        if node.users and _is_transpose(node):
            _move_up(graph, node)
    _drop_views(graph)
    _each(graph, aten.bmm.default, _numbers_last)
    _each(graph, aten.bmm.default, _orient)
    _drop_views(graph)
    _each(graph, aten.sum.dim_IntList, _sum_of_products)
    _each(graph, aten.bmm.default, _share)


def _tensor(node: Node) -> torch.Tensor:
    """A tensor without data, of the shape and dtype that a node had in the trace."""
    value = _value(node)
    return torch.empty(tuple(value.shape), dtype=value.dtype, device="meta")


def _call(graph: GraphModule, target: Any, *args: Any) -> Node:
    """A new node that knows its shape and dtype."""
    node = graph.graph.call_function(target, args)
    node.meta = {"val": target(*map_arg(args, _tensor))}
    return node


def _value(node: Node) -> torch.Tensor:
    # A node's meta is an untyped dict; `make_fx` puts a tensor there, or what is known of one.
    return cast(torch.Tensor, node.meta.get("val", node.meta.get("tensor_meta")))


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(_value(node).shape)


def _input(node: Node) -> Node:
    return cast(Node, node.args[0])


def _writes(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _each(graph: GraphModule, target: Any, rewrite: Callable[[GraphModule, Node], None]) -> None:
    """`rewrite` on every node of one kind, the last first; then dead code is dropped."""
    for node in reversed(list(graph.graph.nodes)):
        if node.target is target and node.users:
            with graph.graph.inserting_before(node):
                rewrite(graph, node)
    graph.graph.eliminate_dead_code()


def _drop_views(graph: GraphModule) -> None:
    for node in list(graph.graph.nodes):
        if node.target is aten.expand.default and _shape(node) == _shape(_input(node)):
            node.replace_all_uses_with(_input(node))
        elif _is_transpose(node) and _is_transpose(_input(node)):
            node.replace_all_uses_with(_input(_input(node)))
        elif node.target in _VIEWS:
            root = _input(node)
            while _shape(root) != _shape(node) and root.target in _VIEWS:
                root = _input(root)
            if _shape(root) == _shape(node):
                node.replace_all_uses_with(root)
    graph.graph.eliminate_dead_code()


# -- transposes ---------------------------------------------------------------------------------


def _is_transpose(node: Any) -> bool:
    """Whether a node transposes each matrix of a batch."""
    if not isinstance(node, Node) or node.target is not aten.transpose.int:
        return False
    return len(_shape(node)) == 3 and {cast(int, dim) % 3 for dim in node.args[1:]} == {1, 2}


def _transposed(graph: GraphModule, node: Node) -> Node:
    return _input(node) if _is_transpose(node) else _call(graph, aten.transpose.int, node, 1, 2)


def _move_up(graph: GraphModule, node: Node) -> None:
    """transpose(f(A, B)) -> f(Aᵀ, Bᵀ) where that ends at a product or at another transpose."""
    source = _input(node)
    if not _leads_to_product(source):
        return
    with graph.graph.inserting_before(source):
        parts = [
            _transposed(graph, part) if isinstance(part, Node) and len(_shape(part)) == 3 else part
            for part in source.args
        ]
        node.replace_all_uses_with(_call(graph, source.target, *parts))
    graph.graph.erase_node(node)
    graph.graph.erase_node(source)
    for part in parts:
        if _is_transpose(part):
            _move_up(graph, cast(Node, part))


def _leads_to_product(node: Node, far: int = _FAR) -> bool:
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    parts = node.all_input_nodes
    if not far or not pointwise or node.kwargs or len(node.users) > 1:
        return False
    return all(len(_shape(part)) in (0, 3) for part in parts) and any(
        part.target is aten.bmm.default or _is_transpose(part) or _leads_to_product(part, far - 1)
        for part in parts
    )


def _orient(graph: GraphModule, node: Node) -> None:
    """A B as (Bᵀ Aᵀ)ᵀ where it has few columns, or where only its transpose is used."""
    _, rows, columns = _shape(node)
    slow = columns < min(_FEW, rows)
    if slow or (rows >= min(_FEW, columns) and all(_is_transpose(user) for user in node.users)):
        left, right = cast("tuple[Node, Node]", node.args)
        product = _call(
            graph, aten.bmm.default, _transposed(graph, right), _transposed(graph, left)
        )
        node.replace_all_uses_with(_call(graph, aten.transpose.int, product, 1, 2))


# -- products -----------------------------------------------------------------------------------


def _numbers_last(graph: GraphModule, node: Node) -> None:
    number, operands = 1.0, []
    if not _value(node).is_floating_point():
        return
    for operand in cast("tuple[Node, Node]", node.args):
        plain, turned = operand, False
        if math.prod(_shape(node)) < math.prod(_shape(operand)):
            # A whole matrix times 0.5 is no longer whole.
            while (factor := _factor(plain)) is not None and _same_dtype(_input(plain), node):
                number *= factor
                turned ^= _is_transpose(plain)
                plain = _input(plain)
        operands.append(_transposed(graph, plain) if turned else plain)
    if number != 1.0:
        product = _call(graph, aten.bmm.default, *operands)
        node.replace_all_uses_with(_call(graph, aten.mul.Tensor, product, number))


def _factor(node: Node) -> float | None:
    """The number that a node multiplies its input by, which it may transpose; None if neither."""
    if node.target is aten.neg.default:
        return -1.0
    if _is_transpose(node):
        return 1.0
    if node.target in (aten.mul.Tensor, aten.mul.Scalar) and isinstance(node.args[1], int | float):
        return float(node.args[1])
    return None


def _same_dtype(one: Node, other: Node) -> bool:
    return _value(one).dtype == _value(other).dtype


def _laid_out(node: Node) -> torch.Tensor:
    """A tensor without data, with the strides that views give to what lies in memory in order."""
    if node.target in _VIEWS or node.target in (aten.expand.default, aten.transpose.int):
        view = cast("Callable[..., torch.Tensor]", node.target)
        return view(_laid_out(_input(node)), *node.args[1:])
    return _tensor(node)


def _one_matrix(graph: GraphModule, node: Node) -> Node | None:
    """(tasks, rows, columns) as (tasks · rows, columns); None where that would be a copy."""
    tasks, rows, columns = _shape(node)
    outer, inner, _ = _laid_out(node).stride()
    if outer != rows * inner:
        return None
    return _call(graph, aten.reshape.default, node, [tasks * rows, columns])


def _share(graph: GraphModule, node: Node) -> None:
    """A_i B with the same B for all tasks i."""
    left, right = cast("tuple[Node, Node]", node.args)
    if min(*_shape(node), *_shape(right)) > 1 and _laid_out(right).stride()[0] == 0:
        rows = _one_matrix(graph, left)
        if rows is not None:
            one = _call(graph, aten.select.int, right, 0, 0)
            product = _call(graph, aten.mm.default, rows, one)
            shaped = _call(graph, aten.reshape.default, product, list(_shape(node)))
            node.replace_all_uses_with(shaped)


def _sum_of_products(graph: GraphModule, node: Node) -> None:
    """Σ_i A_iᵀ B_i over the tasks, also as one of several terms."""
    source, dims, *_ = cast("Any", node.args)
    summed = {dim % len(_shape(source)) for dim in dims}
    tasks = _shape(source)[0]
    # Besides the tasks only lengths of 1 may be summed, which a view dropped or will drop.
    if 0 not in summed or math.prod(_shape(source)[dim] for dim in summed) != tasks:
        return
    while source.target in _VIEWS and len(source.users) == 1:
        source = _input(source)
    if len(_shape(source)) != 3 or _shape(source)[0] != tasks:
        return
    products, others = [], []
    for term in _terms(source):
        found = _summed_product(graph, term)
        if found is None:
            others.append(term)
        else:
            products.append(found)
    if products:
        if others:
            whole = functools.reduce(functools.partial(_call, graph, aten.add.Tensor), others)
            products.append(_call(graph, aten.sum.dim_IntList, whole, [0]))
        total = functools.reduce(functools.partial(_call, graph, aten.add.Tensor), products)
        node.replace_all_uses_with(_call(graph, aten.reshape.default, total, list(_shape(node))))


def _terms(node: Node) -> list[Node]:
    """The terms of a sum that nothing else uses."""
    found, left = [], [node]
    while left:
        term = left.pop()
        parts = term.args
        if (
            term.target is aten.add.Tensor
            and not term.kwargs
            and len(term.users) == 1
            and all(isinstance(p, Node) and _shape(p) == _shape(node) for p in parts)
        ):
            left += cast("list[Node]", list(parts))
        else:
            found.append(term)
    return found


def _summed_product(graph: GraphModule, node: Node) -> Node | None:
    """Σ_i A_iᵀ B_i as one product; None where a node is no such product, or is used elsewhere."""
    if node.target is not aten.bmm.default or len(node.users) > 1 or min(_shape(node)) < 2:
        return None
    left, right = cast("tuple[Node, Node]", node.args)
    if not _is_transpose(left):
        return None
    rows, others = _one_matrix(graph, _input(left)), _one_matrix(graph, right)
    if rows is None or others is None:
        return None
    return _call(graph, aten.mm.default, _call(graph, aten.t.default, rows), others)
