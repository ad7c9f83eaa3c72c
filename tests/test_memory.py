"""Peak bytes of calls whose allocations are known."""

import os

import pytest
import torch

from hbmeta.memory import peak_bytes


def numbers(count):
    return torch.empty(count, dtype=torch.float32)


def test_the_peak_lies_in_the_middle():
    def call():
        first = numbers(1000)
        second = numbers(500)
        del first
        third = numbers(250)
        return second, third

    assert peak_bytes(call) == 4 * 1500
    assert peak_bytes(lambda: numbers(0)) == 0
    assert peak_bytes(lambda: None) == 0


def test_the_result_counts_and_what_was_there_does_not():
    given = numbers(1000)
    assert peak_bytes(lambda: given) == 0
    assert peak_bytes(lambda: given.clone()) == 4000


@pytest.mark.parametrize("steps", [1, 4, 16])
def test_a_graph_is_held_until_its_backward_pass(steps):
    """exp keeps its result: `steps` of them beside the gradient's two."""
    start = torch.zeros(1000, requires_grad=True)

    def call():
        value = start
        for _ in range(steps):
            value = value.exp()
        return torch.autograd.grad(value.sum(), start)

    call()
    found = peak_bytes(call) / 4000
    assert steps + 1 <= found <= steps + 2.1


def test_errors_of_the_call_pass_and_leave_no_profiler_behind(capfd):
    def call():
        raise ValueError("of the call")

    with pytest.raises(ValueError, match="of the call"):
        peak_bytes(call)
    assert peak_bytes(lambda: numbers(10)) == 40
    assert capfd.readouterr() == ("", "")
    os.write(2, b"still there")
    assert capfd.readouterr().err == "still there"


def test_a_gpu_keeps_its_own_maximum(monkeypatch):
    """On numbers in the place of an allocator: 100 bytes before, 350 at the most."""
    done = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda _, name=name: done.append(name))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 350)
    assert peak_bytes(lambda: done.append("call"), "cuda:0") == 250
    assert done == ["synchronize", "reset_peak_memory_stats", "call", "synchronize"]
