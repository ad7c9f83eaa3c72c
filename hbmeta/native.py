"""A compiled graph as a C function: the calls of one run of its kernels, made again without Python.

Inductor turns a graph into kernels, C functions of addresses, and a Python function that allocates
buffers and calls them. Shapes are fixed, so every run makes the same calls. One run is recorded,
its buffers are kept, and a C function makes the calls again with the same addresses: what CUDA
graphs are to a GPU. A sampler in another language then needs neither the interpreter nor its lock,
and each thread has a recording (buffers) of its own. One call of the log density, in float64 on one
thread, against some 50 µs more through the interpreter:

    eight schools 0.3 µs, radon (919 rows, 90 latents) 5.3 µs, item response (6,000 rows, 340) 61 µs

Matrix products, which Inductor leaves to ATen, have C functions in libtorch and are recorded too. A
graph that calls any other operation of ATen (a Cholesky factor) is left to Python.
"""

from __future__ import annotations

import ctypes
import functools
import types
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hbmeta.compilation import Compiled, compile_source

__all__ = ["NativeDensity", "record"]

# The block that the C functions get: counters, a number, addresses, and the calls from here on.
_EVALUATIONS, _KEPT, _THREADS, _INPUT, _VALUE, _GRADIENT, _CALLS = range(7)

# Matrix products by the C functions of libtorch that write into a tensor.
_PRODUCTS = {
    "mm": "aoti_torch_cpu_mm_out",
    "bmm": "aoti_torch_cpu_bmm_out",
    "addmm": "aoti_torch_cpu_addmm_out",
    "baddbmm": "aoti_torch_cpu_baddbmm_out",
}


@dataclass(frozen=True)
class NativeDensity:
    """A log density with its gradient as a C function, and the memory that it works in.

    Two threads must not call the same one at a time.

    Attributes:
        size: of the vector.
        evaluate: address of `int64_t f(uint64_t size, const double* x, double* gradient, double*
            value, void* block)`, which returns 0 where all is finite.
        keep: address of `int64_t f(uint64_t size, uint64_t size, const double* x, double* out,
            void* block)`, which copies a draw and counts it.
        block: counters and addresses.
        held: what must outlive the addresses.
    """

    size: int
    evaluate: int
    keep: int
    block: npt.NDArray[np.int64]
    held: tuple[Any, ...]

    @property
    def evaluations(self) -> int:
        """How often the density was evaluated."""
        return int(self.block[_EVALUATIONS])

    @property
    def kept(self) -> int:
        """How many draws were copied."""
        return int(self.block[_KEPT])

    def __call__(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Log density () and gradient (size,), from Python."""
        value, gradient = torch.empty((), dtype=torch.float64), torch.empty_like(vector)
        address = ctypes.c_void_p
        call = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_uint64, *[address] * 4)(self.evaluate)
        call(
            self.size,
            vector.contiguous().data_ptr(),
            gradient.data_ptr(),
            value.data_ptr(),
            self.block.ctypes.data,
        )
        return value, gradient


def record(compiled: Compiled, inputs: Sequence[Tensor]) -> NativeDensity | None:
    """The compiled graph of a log density as a C function; None where it has to stay in Python.

    Args:
        compiled: a graph from `inputs` to [value (), gradient (size,)].
        inputs: the vector (size,), float64 on the CPU, and the data, which are read at each call
            where they are now.
    """
    wrapper = getattr(compiled.wrapper, "current_callable", None)
    if not isinstance(wrapper, types.MethodType):
        return None
    function = wrapper.__func__
    given = [inputs[0].clone(), *inputs[1:]]
    recorder = _Recorder()
    # The same code with other names: Inductor's module is shared, and stays as it is.
    replay = types.FunctionType(
        function.__code__, {**function.__globals__, **recorder.names(function.__globals__)}
    )
    expected = compiled(*given)
    with torch.no_grad(), recorder:
        found = replay(wrapper.__self__, [*compiled.held, *given])
    calls = recorder.calls
    if recorder.others or not calls or not _same(found, expected, given[0]):
        return None
    block = [0, 0, torch.get_num_threads(), *(t.data_ptr() for t in (given[0], *found))]
    for call in calls:
        block += [call.function, *call.addresses]
    library = compile_source(_source(calls))
    evaluate, keep = (_address(getattr(library, name)) for name in ("evaluate", "keep"))
    held = (compiled, library, given, found, calls)
    return NativeDensity(len(given[0]), evaluate, keep, np.array(block, dtype=np.int64), held)


@dataclass(frozen=True)
class _Call:
    """A call of a C function with addresses.

    Attributes:
        function: its address.
        addresses: of numbers, or of tensors for a function of libtorch.
        of_libtorch: whether it returns an error code.
        numbers: what follows the addresses, in C.
        held: tensors that must stay where they are.
    """

    function: int
    addresses: tuple[int, ...]
    of_libtorch: bool
    numbers: tuple[str, ...]
    held: Any

    @property
    def source(self) -> tuple[str, str]:
        """Its type in C, and what follows its addresses."""
        returned = "int32_t" if self.of_libtorch else "void"
        types_of = ", ".join(["void*"] * len(self.addresses) + ["double"] * len(self.numbers))
        return f"({returned} (*)({types_of}))", "".join(f", {n}" for n in self.numbers)


class _Recorder(TorchDispatchMode):
    """Notes the calls of kernels and of matrix products, and whether anything else runs.

    Buffers are allocated without an operation of ATen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []
        self.others = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.others = True
        return func(*args, **(kwargs or {}))

    def names(self, known: dict[str, Any]) -> dict[str, Any]:
        """Functions that record, by the names of those that they stand for."""
        kernels: dict[str, Any] = {
            name: functools.partial(self._kernel, kernel)
            for name, kernel in known.items()
            if isinstance(kernel, types.BuiltinFunctionType) and kernel.__name__ == "kernel"
        }
        products = {name: functools.partial(self._product, name) for name in _PRODUCTS}
        return {**kernels, "extern_kernels": _Stand(known.get("extern_kernels"), products)}

    def _kernel(self, kernel: Any, *arguments: Any) -> None:
        kernel(*arguments)
        if not all(isinstance(argument, Tensor) for argument in arguments):
            self.others = True
            return
        function = _address(ctypes.CDLL(kernel.__self__.__file__).kernel)
        addresses = tuple(tensor.data_ptr() for tensor in arguments)
        self.calls.append(_Call(function, addresses, False, (), arguments))

    def _product(
        self, name: str, *inputs: Tensor, out: Tensor, alpha: float = 1, beta: float = 1
    ) -> None:
        before = self.others
        numbers = {"beta": beta, "alpha": alpha} if "add" in name else {}
        getattr(torch, name)(*inputs, out=out, **numbers)
        self.others = before
        function = _address(getattr(ctypes.CDLL(torch._C.__file__), _PRODUCTS[name]))
        handles = _Handles([out, *inputs])
        written = tuple(repr(float(number)) for number in numbers.values())
        self.calls.append(_Call(function, handles.addresses, True, written, handles))


class _Stand:
    """Some functions of a namespace replaced."""

    def __init__(self, namespace: Any, functions: dict[str, Any]) -> None:
        self._namespace, self._functions = namespace, functions

    def __getattr__(self, name: str) -> Any:
        return self._functions.get(name) or getattr(self._namespace, name)


class _Handles:
    """Tensors as the C functions of libtorch take them, let go of with this object."""

    def __init__(self, tensors: list[Tensor]) -> None:
        known = torch._C._aoti
        capsules = known.unsafe_alloc_void_ptrs_from_tensors(tensors)
        weakref.finalize(self, known.alloc_tensors_by_stealing_from_void_ptrs, capsules)
        pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
            ("PyCapsule_GetPointer", ctypes.pythonapi)
        )
        self.addresses: tuple[int, ...] = tuple(pointer(capsule, None) for capsule in capsules)


def _address(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


def _same(found: Sequence[Any], expected: Sequence[Any], vector: Tensor) -> bool:
    """Whether the wrapper alone gives the density and the gradient, in the layout of C."""
    if len(found) != 2 or not all(isinstance(f, Tensor) and f.is_contiguous() for f in found):
        return False
    value, gradient = found
    return (
        value.dtype == gradient.dtype == vector.dtype == torch.float64
        and value.numel() == 1
        and gradient.shape == vector.shape
        and all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    )


def _source(calls: Sequence[_Call]) -> str:
    """C++ that makes the calls."""
    lines, at = [], _CALLS
    for call in calls:
        kind, numbers = call.source
        arguments = ", ".join(f"at[{at + 1 + k}]" for k in range(len(call.addresses)))
        made = f"({kind}at[{at}])({arguments}{numbers})"
        lines.append(f"        if ({made}) return -1;" if call.of_libtorch else f"        {made};")
        at += 1 + len(call.addresses)
    made = "\n".join(lines)
    # OpenMP counts by thread: in the sampler's a product would start one worker per core.
    threads = f"""
    static thread_local bool told = false;
    if (!told) omp_set_num_threads((int)((int64_t*)block)[{_THREADS}]);
    told = true;"""
    threads = threads if any(call.of_libtorch for call in calls) else ""
    return f"""
#include <cmath>
#include <cstdint>
#include <cstring>
{"#include <omp.h>" if threads else ""}

extern "C" int64_t evaluate(
    uint64_t size, const double* x, double* gradient, double* value, void* block) {{
    void** at = (void**)block;
    ++((int64_t*)block)[{_EVALUATIONS}];{threads}
    std::memcpy(at[{_INPUT}], x, size * sizeof(double));
    try {{
{made}
    }} catch (...) {{
        return -1;
    }}
    *value = *(double*)at[{_VALUE}];
    std::memcpy(gradient, at[{_GRADIENT}], size * sizeof(double));
    if (!std::isfinite(*value)) return 1;
    for (uint64_t i = 0; i < size; ++i)
        if (!std::isfinite(gradient[i])) return 1;
    return 0;
}}

extern "C" int64_t keep(
    uint64_t size, uint64_t, const double* x, double* out, void* block) {{
    ++((int64_t*)block)[{_KEPT}];
    std::memcpy(out, x, size * sizeof(double));
    return 0;
}}
"""
