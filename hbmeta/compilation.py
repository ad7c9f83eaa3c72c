"""A traced graph through Inductor, with the settings that small graphs of many tasks want.

Without Dynamo: its guards cost more than a small graph, and the key of the caller is the guard.
Measured on the meta-gradient of MAML (five second-order steps, docs/design.md, "Staging"):

    one C++ file in place of a kernel a piece   0.89 of the time, half the time to compile
    vectors of 256 bits where rows fill them    0.95 of the time (rows of 40 leave a rest in 512)

Inductor finds the widest vectors by compiling a test for each instruction set, several seconds in
which nothing else happens. ATen has code for AVX2 and AVX-512 and picks among it by the processor,
so what it picked is known to run here with this libtorch; what is left in doubt is the compiler,
and a graph that it refuses is compiled again with Inductor's own list.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

HALVES = (torch.bfloat16, torch.float16)
# Below this many elements a second thread costs more than it brings.
_ELEMENTS_FOR_THREADS = 100_000
# From about this many nodes on, one C++ file with its own calls compiles faster than its kernels do
# one by one, and spares the calls from Python.
_NODES_FOR_ONE_FILE = 250

__all__ = ["HALVES", "Compiled", "compile_graph", "compile_source", "default_dtype_of"]


@contextlib.contextmanager
def default_dtype_of(tensors: Sequence[Any]) -> Iterator[None]:
    """The default dtype of the data, as when the program was traced.

    A graph remembers `ones([2])` without a dtype, and the logarithm of whole numbers takes the
    default one: run or compiled under another, float64 work would fall to float32.
    """
    before = torch.get_default_dtype()
    floating = [t.dtype for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
    try:
        # Where data are of half precision, parameters are not, and the program runs in theirs.
        half = next((dtype for dtype in floating if dtype in HALVES), None)
        torch.set_default_dtype(half or (floating[0] if floating else before))
        yield
    finally:
        torch.set_default_dtype(before)


def compile_graph(
    graph: GraphModule, inputs: Sequence[Tensor], *, one_file: bool = True
) -> Compiled:
    """The graph as compiled code: tensors in, list of tensors out.

    Args:
        graph: plain ATen operations.
        inputs: tensors of the shapes, dtypes and strides that it will be called with.
        one_file: a large graph may be one C++ file with its own calls. Otherwise it has kernels
            by themselves, few, and is compiled for its own sake (`hbmeta.native`).
    """
    settings = _settings(graph, inputs, one_file)
    held = (*graph.parameters(), *graph.buffers())
    try:
        with _vectors_known():
            return Compiled(_compile(graph, inputs, settings), held)
    except Exception as error:
        # Some operations have no C++ call of their own; some compilers lack the widest vectors.
        if "cpp_wrapper" not in settings and "CppCompileError" not in str(error):
            raise
        plain = {"cpp.threads": settings["cpp.threads"]}
        return Compiled(_compile(graph, inputs, plain), held)


@dataclass(frozen=True)
class Compiled:
    """A graph as compiled code: tensors in, list of tensors out.

    Attributes:
        wrapper: what Inductor gave.
        held: tensors of the graph, which Inductor's own function takes before the inputs.
    """

    wrapper: Callable[..., Any]
    held: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor) -> Any:
        """The results of the graph."""
        with torch.no_grad():
            return self.wrapper(*inputs)


def compile_source(code: str) -> ctypes.CDLL:
    """A library of C functions by Inductor's compiler and its cache on disk."""
    from torch._inductor.codecache import CppCodeCache

    with _vectors_known():
        library: ctypes.CDLL = CppCodeCache.load(code)
    return library


def _compile(
    graph: GraphModule, inputs: Sequence[Tensor], settings: dict[str, Any]
) -> Callable[..., Any]:
    import torch._inductor as inductor
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # Inductor asks for this list, which mypy does not take a list of tensors for.
    tensors: list[Tensor | int | torch.SymInt | None] = [t.detach().clone() for t in inputs]
    # Without a shape environment Inductor does not look into its cache on disk.
    context = TracingContext(FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True))
    # Inductor's own use of functions that torch deprecated is nothing that a person can mend.
    with (
        torch.no_grad(),
        tracing(context),
        default_dtype_of(tensors),
        warnings.catch_warnings(),
        _without_its_notes(),
        config.patch(settings),
    ):
        warnings.simplefilter("ignore", FutureWarning)
        compiled: Callable[..., Any] = inductor.compile(graph, tensors)
    return compiled


def _settings(
    graph: GraphModule, inputs: Sequence[Tensor], one_file: bool = True
) -> dict[str, Any]:
    values = [node.meta.get("val") for node in graph.graph.nodes]
    made = [value for value in values if isinstance(value, Tensor)]
    largest = max((value.numel() for value in made), default=0)
    threads = 1 if largest < _ELEMENTS_FOR_THREADS else torch.get_num_threads()
    settings: dict[str, Any] = {"cpp.threads": threads}
    if any(tensor.device.type != "cpu" for tensor in inputs):
        return settings
    large = len(graph.graph.nodes) >= _NODES_FOR_ONE_FILE
    if one_file and large:
        settings["cpp_wrapper"] = True
    if large or not one_file:
        # Precompiled headers serve many files; for one they cost more than they spare.
        settings["cpp_cache_precompile_headers"] = False
    if _half_vectors(made):
        settings["cpp.simdlen"] = 256
    return settings


@contextlib.contextmanager
def _without_its_notes() -> Iterator[None]:
    """Leaves out a line for every operation that the one file calls without a C function."""
    log = logging.getLogger("torch._inductor.ir")

    def kept(record: logging.LogRecord) -> bool:
        return "missing a c-shim" not in str(record.msg)

    log.addFilter(kept)
    try:
        yield
    finally:
        log.removeFilter(kept)


@contextlib.contextmanager
def _vectors_known() -> Iterator[None]:
    """Inductor's list of instruction sets without its tests, while this process compiles."""
    from torch._inductor import cpu_vec_isa

    tested = cpu_vec_isa.valid_vec_isa_list
    cpu_vec_isa.valid_vec_isa_list = _vectors
    try:
        yield
    finally:
        cpu_vec_isa.valid_vec_isa_list = tested


@functools.cache
def _vectors() -> list[Any]:
    """Instruction sets, widest first: those of ATen's own code on x86, else Inductor's list."""
    from torch._inductor import cpu_vec_isa

    by_capability = {
        "AVX512": (cpu_vec_isa.VecAVX512, cpu_vec_isa.VecAVX2),
        "AVX2": (cpu_vec_isa.VecAVX2,),
    }
    known = by_capability.get(torch.backends.cpu.get_cpu_capability())
    if known is None:
        return list(cpu_vec_isa.valid_vec_isa_list())
    # `bool(isa)` runs the test, and its result is kept by class: these are classes of their own.
    return [type(isa.__name__, (isa,), {"__bool__": lambda _: True})() for isa in known]


def _half_vectors(values: Sequence[Tensor]) -> bool:
    """Whether most rows fill vectors of 256 bits and leave a rest in vectors of 512."""
    if not {256, 512} <= {isa.bit_width() for isa in _vectors()}:
        return False
    fit = {256: 0, 512: 0}
    for value in values:
        bits = 8 * value.element_size() * (value.shape[-1] if value.ndim else 1)
        wide = math.gcd(bits, 512)
        if wide >= 256:
            fit[wide] += value.numel()
    return fit[256] > fit[512]
