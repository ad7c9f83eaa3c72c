"""Compiled graphs give what the graphs give; the settings fit the graph."""

import logging

import pytest
import torch
from torch._inductor import cpu_vec_isa
from torch.fx.experimental.proxy_tensor import make_fx

from hbmeta import compilation
from hbmeta.compilation import compile_graph


def chain(length):
    def function(x):
        for number in range(length):
            x = torch.sin(x) + number
        return [x]

    return function


class _Isa:
    def __init__(self, bits):
        self.bits = bits

    def bit_width(self):
        return self.bits


def test_one_file_from_many_nodes_on(monkeypatch):
    seen = []
    monkeypatch.setattr(
        compilation, "_compile", lambda graph, inputs, settings: seen.append(settings) or graph
    )
    x = torch.zeros(3)
    for length in (5, 200):
        compile_graph(make_fx(chain(length))(x), [x])
    assert ["cpp_wrapper" in settings for settings in seen] == [False, True]
    assert [settings["cpp.threads"] for settings in seen] == [1, 1]


def test_a_graph_that_one_file_cannot_hold_is_compiled_in_pieces(monkeypatch):
    seen = []

    def fails_once(graph, inputs, settings):
        seen.append(settings)
        if "cpp_wrapper" in settings:
            raise RuntimeError("no C++ call for this operation")
        return graph

    monkeypatch.setattr(compilation, "_compile", fails_once)
    x = torch.rand(3)
    run = compile_graph(make_fx(chain(200))(x), [x])
    assert len(seen) == 2
    torch.testing.assert_close(run(x), chain(200)(x))


def test_notes_of_the_compiler_that_nobody_can_mend_are_left_out(monkeypatch):
    """Its other warnings pass, and its logger is left as it was."""
    log, heard = logging.getLogger("torch._inductor.ir"), []

    def compiles(graph, tensors):
        log.warning("%s is missing a c-shim implementation, using proxy executor", "aten.op")
        log.warning("%s is broken", "aten.op")
        return graph

    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    monkeypatch.setattr(torch._inductor, "compile", compiles)
    x, before = torch.rand(3), list(log.filters)
    log.addHandler(handler)
    try:
        compile_graph(make_fx(chain(2))(x), [x])
    finally:
        log.removeHandler(handler)
    assert heard == ["aten.op is broken"]
    assert log.filters == before


def test_a_compiler_that_fails_says_so(monkeypatch):
    def fails(graph, inputs, settings):
        raise RuntimeError("broken")

    monkeypatch.setattr(compilation, "_compile", fails)
    x = torch.rand(3)
    for length in (5, 200):
        with pytest.raises(RuntimeError, match="broken"):
            compile_graph(make_fx(chain(length))(x), [x])


@pytest.mark.parametrize(
    ("bits", "dtype", "length", "half"),
    [
        ((512, 256), torch.float32, 40, True),
        ((512, 256), torch.float32, 48, False),
        ((512, 256), torch.float32, 39, False),
        ((512, 256), torch.float64, 40, False),
        ((512, 256), torch.float64, 20, True),
        ((256,), torch.float32, 40, False),
        ((128,), torch.float32, 40, False),
    ],
)
def test_vectors_that_rows_fill(monkeypatch, bits, dtype, length, half):
    monkeypatch.setattr(compilation, "_vectors", lambda: [_Isa(b) for b in bits])
    x = torch.zeros(10, length, dtype=dtype)
    settings = compilation._settings(make_fx(chain(3))(x), [x])
    assert settings.get("cpp.simdlen") == (256 if half else None)


def test_vectors_are_known_while_it_compiles_alone(monkeypatch):
    """Inductor's own list is as it was after a failure, and is tried where vectors fail."""
    tested = cpu_vec_isa.valid_vec_isa_list
    seen = []

    def fails_with_known(graph, inputs, settings):
        seen.append(cpu_vec_isa.valid_vec_isa_list)
        if len(seen) == 1:
            raise RuntimeError("CppCompileError: unknown option -mavx512f")
        return graph

    monkeypatch.setattr(compilation, "_compile", fails_with_known)
    x = torch.rand(3)
    torch.testing.assert_close(compile_graph(make_fx(chain(3))(x), [x])(x), chain(3)(x))
    assert seen == [compilation._vectors, tested]
    assert cpu_vec_isa.valid_vec_isa_list is tested


@pytest.mark.slow
def test_known_vectors_are_those_that_the_tests_find():
    """The widest that Inductor finds by compiling is as wide as the one that ATen uses."""
    found = [isa.bit_width() for isa in cpu_vec_isa.valid_vec_isa_list()]
    known = [isa.bit_width() for isa in compilation._vectors()]
    assert set(known) == set(found)
    assert known[0] == found[0]


@pytest.mark.slow
def test_one_file_gives_the_same():
    """More than 250 nodes, rows of 40: the settings of MAML's meta-gradient, for real."""

    def function(x, weight):
        x = x.detach().requires_grad_()
        for number in range(60):
            x = torch.tanh(x @ weight) + number / 60
        return torch.autograd.grad(x.sum(), x)[0], x.detach().cumsum(-1).sort(-1).values

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 10, 40, generator=generator)
    weight = torch.randn(3, 40, 40, generator=generator) / 10
    graph = make_fx(function)(x, weight)
    assert compilation._settings(graph, [x, weight])["cpp_wrapper"]
    run = compile_graph(graph, [x, weight])
    for one, other in zip(run(x, weight), function(x, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
