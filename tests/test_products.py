"""Rewritten graphs give what the function gives, in the form that the rewrite promises."""

from collections import Counter

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from hbmeta.products import rearrange

aten = torch.ops.aten


def rewritten(function, *inputs):
    """The rewritten graph, after a check that it gives what the function gives."""
    graph = make_fx(function)(*inputs)
    rearrange(graph)
    graph.recompile()
    torch.testing.assert_close(graph(*inputs), function(*inputs), rtol=1e-12, atol=1e-12)
    # Nor does it depend on the values that it was traced with.
    others = [torch.randn_like(value) for value in inputs]
    torch.testing.assert_close(graph(*others), function(*others), rtol=1e-12, atol=1e-12)
    return graph


def operations(graph):
    return Counter(
        str(node.target).removeprefix("aten.").split(".")[0]
        for node in graph.graph.nodes
        if node.op == "call_function"
    )


def numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_views_that_come_back_to_the_first_shape():
    def function(x):
        return x.unsqueeze(1).squeeze(1).reshape(2, 12).view(2, 3, 4).expand(2, 3, 4) + 1

    assert operations(rewritten(function, numbers(2, 3, 4))) == {"add": 1}


def test_views_that_change_the_order_stay():
    def function(x):
        return x.mT.reshape(3, 4) + 1

    assert operations(rewritten(function, numbers(3, 4)))["transpose"] == 1


def test_views_of_what_comes_to_lie_in_another_order():
    """A product with few columns is made transposed; its rows are no longer in memory order."""

    def function(a, b):
        return (a @ b).view(3, -1), (a @ b + 1.0).mT.reshape(3, 2, -1)

    rewritten(function, numbers(3, 40, 20), numbers(3, 20, 10))


def test_a_tensor_that_is_read_by_its_place_is_left_alone():
    def function(a, b):
        return torch.as_strided(a @ b, (3, 5), (400, 1))

    rewritten(function, numbers(3, 40, 20), numbers(3, 20, 10))


def test_a_tensor_that_is_written_to_is_left_alone():
    def function(a, b):
        whole = torch.cat([a, b]).unsqueeze(0).squeeze(0)
        whole[:2].add_(1.0)
        return whole[:2] * a

    graph = make_fx(function)(numbers(2), numbers(3))
    before = operations(graph)
    rearrange(graph)
    assert operations(graph) == before
    rewritten(function, numbers(2), numbers(3))


def products(graph):
    """Shapes of the operands of each batched product."""
    return [
        tuple(tuple(operand.meta["val"].shape) for operand in node.args)
        for node in graph.graph.nodes
        if node.target is aten.bmm.default
    ]


def test_a_transposed_product_is_the_other_product():
    def function(a, b):
        return (a @ b).mT * 0.5 + 1.0

    graph = rewritten(function, numbers(3, 20, 7), numbers(3, 7, 30))
    assert products(graph) == [((3, 30, 7), (3, 7, 20))]


def test_transposes_move_up_to_the_product():
    """A gradient of W in h Wᵀ comes out as W lies in memory, its step included."""

    def function(weight, x, y):
        weight = weight.detach().requires_grad_()
        loss = ((torch.relu(x @ weight.mT) - y) ** 2).sum()
        (gradient,) = torch.autograd.grad(loss, weight)
        return weight - 0.01 * gradient

    graph = rewritten(function, numbers(3, 20, 18), numbers(3, 10, 18), numbers(3, 10, 20))
    (step,) = [node for node in graph.graph.nodes if node.target is aten.sub.Tensor][-1:]
    assert step.args[1].args[0].target is aten.bmm.default


def test_a_sum_of_a_product_and_a_transposed_one():
    def function(a, b, c, d):
        return (a @ b + (c @ d).mT).mT

    shapes = (3, 20, 5), (3, 5, 30), (3, 30, 5), (3, 5, 20)
    graph = rewritten(function, *(numbers(*shape) for shape in shapes))
    assert operations(graph) == {"transpose": 2, "bmm": 2, "add": 1}
    assert products(graph) == [((3, 30, 5), (3, 5, 20))] * 2


def test_a_product_that_is_used_both_ways_is_made_once():
    def function(a, b):
        product = a @ b
        return product + 1.0, product.mT * 2.0

    graph = rewritten(function, numbers(3, 20, 7), numbers(3, 7, 20))
    assert operations(graph)["bmm"] == 1


@pytest.mark.parametrize(
    ("rows", "columns", "turned"), [(40, 10, True), (10, 40, False), (12, 12, False)]
)
def test_products_with_few_columns_are_turned(rows, columns, turned):
    graph = rewritten(lambda a, b: a @ b, numbers(3, rows, 20), numbers(3, 20, columns))
    wanted = ((3, columns, 20), (3, 20, rows)) if turned else ((3, rows, 20), (3, 20, columns))
    assert products(graph) == [wanted]


def test_numbers_wait_until_after_the_product():
    """Where the product is the smaller one; a factor of a small matrix stays."""

    def function(x, weight):
        return x @ (-(0.1 * weight)).mT, (3.0 * x) @ weight

    graph = rewritten(function, numbers(3, 10, 40), numbers(3, 40, 40))
    scaled = [node for node in graph.graph.nodes if node.target is aten.mul.Tensor]
    assert [tuple(node.meta["val"].shape) for node in scaled] == [(3, 10, 40), (3, 10, 40)]
    assert operations(graph)["neg"] == 0
    assert {node.args[1] for node in scaled} == {-0.1, 3.0}


def test_tensors_are_not_taken_for_numbers():
    def function(x, weight, scale):
        return x @ (weight * scale), x @ (weight * scale[0, 0, 0])

    rewritten(function, numbers(3, 10, 40), numbers(3, 40, 40), numbers(3, 40, 40))


def test_whole_matrices_keep_their_dtype():
    def function(a, b):
        return a @ (0.5 * b), a @ (2 * b.round().long()).double()

    rewritten(function, numbers(3, 10, 40), numbers(3, 40, 40))

    def whole(a, b):
        return a @ -b, (a @ (3 * b)).mT

    inputs = torch.arange(3 * 10 * 20).view(3, 10, 20), torch.arange(3 * 400).view(3, 20, 20)
    graph = make_fx(whole)(*inputs)
    rearrange(graph)
    graph.recompile()
    for one, other in zip(graph(*inputs), whole(*inputs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_long_chains():
    """Deeper than Python's stack."""

    def function(a, b):
        total = product = a.mT @ b
        for number in range(1_200):
            product = product * 1.001
            total = total + (a.mT @ b) if number % 200 == 0 else total + a.mT[:, :, :1]
        return product.mT, total.sum(0)

    graph = rewritten(function, numbers(3, 10, 18) / 100, numbers(3, 10, 18))
    assert operations(graph)["mul"] == 1_200


def test_weights_that_all_tasks_share_need_one_product():
    def function(x, weight):
        return x @ weight.expand(3, 20, 18), x @ weight.T.unsqueeze(0).expand(3, 18, 20).mT

    graph = rewritten(function, numbers(3, 10, 20), numbers(20, 18))
    assert operations(graph)["mm"] == 2
    assert not products(graph)


def test_weights_repeated_along_another_axis_are_not_shared():
    """(20, 1, 20) expanded to (20, 20, 20): the shape of a shared matrix, with another meaning."""

    def function(x, weight):
        return x @ weight.unsqueeze(1).expand(20, 20, 20)

    graph = rewritten(function, numbers(20, 17, 20), numbers(20, 20))
    assert len(products(graph)) == 1


def test_transposed_rows_are_not_copied_for_one_product():
    """Those of the tasks do not lie one below the other in memory."""

    def function(x, weight):
        return x.mT @ weight.expand(3, 10, 18)

    graph = rewritten(function, numbers(3, 10, 20), numbers(10, 18))
    assert len(products(graph)) == 1


@pytest.mark.parametrize("keepdim", [True, False])
def test_sums_over_tasks_are_one_product(keepdim):
    def function(a, b, c, d, e):
        total = a.mT @ b + (c.mT @ d + e)
        return total.sum(0, keepdim=keepdim), (a.mT @ d).unsqueeze(1).sum((0, 1), keepdim=keepdim)

    shapes = (3, 10, 20), (3, 10, 18), (3, 10, 20), (3, 10, 18), (3, 20, 18)
    graph = rewritten(function, *(numbers(*shape) for shape in shapes))
    assert operations(graph)["mm"] == 3
    assert not products(graph)


def test_other_sums_stay():
    """Over rows, over tasks and rows, of a product that is used elsewhere, of rows not in order."""

    def function(a, b):
        product = a.mT @ b
        return (
            product.sum(0),
            product * 2.0,
            (a.mT @ (b + 1.0)).sum(1),
            (a.mT @ (b + 2.0)).sum((0, 1)),
            (a.mT @ (b + 3.0)).sum(-1, keepdim=True),
            (torch.relu(a).contiguous() @ b.mT).sum(0),
        )

    graph = rewritten(function, numbers(3, 10, 18), numbers(3, 10, 18))
    assert operations(graph)["mm"] == 0


def test_a_meta_gradient():
    """Second-order steps on a network of every task, against autograd."""

    def function(w1, w2, x, y):
        start = [value.detach().requires_grad_() for value in (w1, w2)]

        def loss(weights):
            hidden = torch.relu(x @ weights[0].mT)
            return ((hidden @ weights[1].mT - y) ** 2).mean((1, 2)).sum()

        weights = [value.expand(4, *value.shape) for value in start]
        for _ in range(2):
            gradients = torch.autograd.grad(loss(weights), weights, create_graph=True)
            weights = [w - 0.01 * g for w, g in zip(weights, gradients, strict=True)]
        return torch.autograd.grad(loss(weights), start)

    inputs = numbers(24, 20), numbers(18, 24), numbers(4, 10, 20), numbers(4, 10, 18)
    graph = rewritten(function, *inputs)
    for (_, rows, _), (_, _, columns) in products(graph):
        assert columns >= min(16, rows)
    assert operations(graph)["mm"] >= 4
