"""What a traced graph does for nothing is gone, and its values are the same."""

from collections import Counter

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from hbmeta.simplification import simplify


def simplified(function, *inputs):
    graph = simplify(make_fx(function)(*inputs))
    torch.testing.assert_close(graph(*inputs), function(*inputs), rtol=1e-12, atol=1e-12)
    return graph


def operations(graph):
    return Counter(
        str(node.target).removeprefix("aten.").split(".")[0]
        for node in graph.graph.nodes
        if node.op == "call_function"
    )


def numbers(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_a_loss_that_nobody_reads_is_not_computed():
    """Reverse mode starts from ones of the shape of the loss; its logarithm is only in the loss."""

    def function(x, scale):
        x = x.detach().requires_grad_()
        loss = ((x / scale) ** 2).sum() + scale.log().sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        return x - 0.1 * gradient

    left = operations(simplified(function, numbers(3, 4), numbers(4).exp()))
    assert not left.keys() & {"ones_like", "log", "sum"}


def test_second_derivatives_of_squares_carry_no_powers():
    def function(x):
        x = x.detach().requires_grad_()
        (first,) = torch.autograd.grad((x**2).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first * first.detach()).sum(), x)
        return second

    left = operations(simplified(function, numbers(5)))
    assert not left.keys() & {"pow", "zeros_like"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_values_that_numbers_handle_with_care(value):
    """x⁰ is 1 and 1 x is x for these too, and 0 x is not dropped."""

    def function(x):
        return x**0, torch.ones_like(x) * x, torch.zeros_like(x) + x, x * 0.0

    x = torch.tensor([value, 2.0], dtype=torch.float64)
    found = simplify(make_fx(function)(x))(x)
    for one, other in zip(found, function(x), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_fillings_that_widen_or_convert_stay():
    def function(x):
        return (
            torch.zeros(3, 4, dtype=torch.float64) + x,
            torch.ones(4, dtype=torch.float64) * x.float(),
            torch.zeros(4, dtype=torch.float64) + x.float(),
        )

    found = simplified(function, numbers(4))(numbers(4))
    assert [tuple(value.shape) for value in found] == [(3, 4), (4,), (4,)]
    assert {value.dtype for value in found} == {torch.float64}


def test_numbers_that_became_literals_are_no_inputs():
    """Inductor passes what a graph holds at every call."""

    def function(x):
        return x * torch.tensor(2.0, dtype=torch.float64) + torch.tensor([1.0, 2.0])

    graph = simplified(function, numbers(2))
    held = [v for v in vars(graph).values() if isinstance(v, torch.Tensor)]
    held += list(graph.buffers())
    assert [tuple(value.shape) for value in held] == [(2,)]
