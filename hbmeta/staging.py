"""Traces a function of tensors once through Pyro's handlers and compiles it, to make it fast.

`make_fx` runs the function once in Python (program, handlers, `torch.autograd.grad` and all) and
leaves plain ATen operations; Inductor compiles that graph. Three tiers (docs/design.md, "Staging"):

    "eager"     the function itself
    "graph"     the traced graph, not compiled: no handlers, no C++ compiler needed
    "compiled"  the graph through Inductor

A graph freezes every Python number that it met, so a staged function is keyed on the structure,
shape, dtype, stride and device of its inputs, and is traced anew for another key. Random draws must
be inputs: a graph that draws is refused. Every `check_every` calls the graph is compared with the
function itself. A function that cannot be traced (a branch on a value, a size read from the data)
runs as it is where the tier was left to "auto", with a warning; where it was asked for, it raises.
"""

from __future__ import annotations

import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from hbmeta.compilation import HALVES, compile_graph, default_dtype_of
from hbmeta.errors import DataError, HbmetaError, StagingError
from hbmeta.rounding import moved_by_rounding
from hbmeta.simplification import simplify

Tier = Literal["eager", "graph", "compiled"]
TIERS: tuple[Tier, ...] = ("eager", "graph", "compiled")

# A compiled graph pays its compilation back after this many seconds of eager work; the constant is
# of the order of a compilation (1 s for small graphs, about 8 ms a node for large ones).
_SECONDS_PER_NODE = 0.008
_SECONDS_TO_COMPILE = 2.0
# A graph may differ by so many times what the function's own rounding moves it.
_OWN_ROUNDING = 10.0
# Results that agree to this many roundings of the largest of them are equal.
_ROUNDINGS = 64
# In half precision 64 roundings are half of a number: there the graph is compared that rounds where
# the program does, so that fewer do. (Compiled code keeps float32 between its kernels; gradients of
# the two were up to 240 roundings of bfloat16 apart, those of graph and program 4.)
_ROUNDINGS_OF_HALVES = 8
_RTOL_OF_HALVES = 32
# Frames of these are not the person's program.
_LIBRARIES = {"torch", "pyro", "hbmeta", "zuko", *sys.stdlib_module_names}

__all__ = ["TIERS", "Staged", "Tier", "compiler_available", "tier_of"]


def tier_of(compile: bool | str) -> Tier | Literal["auto"]:
    """The tier that a `compile=` argument asks for.

    Args:
        compile: "auto", True ("compiled"), False ("eager"), or the name of a tier.
    """
    if compile is True:
        return "compiled"
    if compile is False:
        return "eager"
    if compile == "auto" or compile in TIERS:
        return compile  # type: ignore[return-value]
    raise DataError(
        "compile",
        needed=f"True, False, 'auto' or one of {', '.join(TIERS)}",
        found=repr(compile),
        do="Use 'auto' to let the length of the fit decide.",
    )


def compiler_available() -> bool:
    """Whether Inductor can build CPU code here; says so once where it cannot."""
    from torch._inductor import config

    candidates = config.cpp.cxx if isinstance(config.cpp.cxx, (list, tuple)) else (config.cpp.cxx,)
    if (
        any(shutil.which(c) for c in candidates if c)
        or shutil.which("g++")
        or shutil.which("clang++")
    ):
        return True
    warnings.warn(
        "No C++ compiler was found, so programs run as traced graphs (3 to 10 times slower than "
        "compiled ones). Install g++ or clang to compile them.",
        stacklevel=2,
    )
    return False


class Staged:
    """A function of nested tensors that runs traced, and compiled once that pays.

    Args:
        function: takes and returns trees of tensors; calls `torch.autograd.grad` itself if it
            differentiates. It must not draw random numbers.
        tier: a tier, or "auto" to climb from eager to compiled as the work proves long.
        expected_calls: how often it will be called, for "auto".
        check_every: compare with the function itself at the first call and then every so many;
            0 for never.
        rtol: largest relative difference that the comparison accepts in each result, beside the
            rounding of the largest of them; by default 1e-4 in float32, 1e-9 in float64, and 32
            roundings where an input is of half precision (0.25 in bfloat16, 0.03 in float16), where
            the traced graph is compared in the place of the compiled one.
        one_file: of `compile_graph`.
        falls_back: run the function as it is where it cannot be traced, with a warning; by default
            where the tier is "auto".
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        tier: Tier | Literal["auto"] = "compiled",
        expected_calls: int = 10_000,
        check_every: int = 0,
        rtol: float | None = None,
        one_file: bool = True,
        falls_back: bool | None = None,
    ) -> None:
        self.function, self.wanted, self.expected_calls = function, tier, expected_calls
        self.check_every, self.rtol, self.one_file = check_every, rtol, one_file
        self.falls_back = tier == "auto" if falls_back is None else falls_back
        self.calls = 0
        self.seconds_staging = 0.0
        self._plans: dict[Any, _Plan] = {}
        self._latest: tuple[Any, _Plan, bool] | None = None

    @property
    def tier(self) -> Tier:
        """The highest tier that is in use."""
        reached = [plan.tier for plan in self._plans.values()]
        return max(reached, key=TIERS.index) if reached else "eager"

    def __call__(self, *args: Any) -> Any:
        """The function's result, by the highest tier that pays."""
        plan, leaves, tensors = self._find(args)
        self._climb(plan, args, leaves)
        self.calls += 1
        if plan.run is None:
            start = time.perf_counter()
            result = self.function(*args)
            plan.eager_calls += 1
            plan.eager_seconds += time.perf_counter() - start
            return result
        flat = plan.run(*tensors)
        result = pytree.tree_unflatten(flat, plan.structure)
        if self.check_every and self.calls % self.check_every == 0:
            self._check(args, flat, plan)
        return result

    def prepare(self, *args: Any) -> None:
        """Stages for inputs like these, without counting a call."""
        plan, leaves, _ = self._find(args)
        self._climb(plan, args, leaves)

    def flat(self, *args: Any) -> Callable[..., Any]:
        """The bare staged callable for inputs like these: tensors in, list of tensors out.

        For inner loops in other languages (a sampler): no tree and no key at each call.
        """
        leaves, structure = pytree.tree_flatten(args)
        self.prepare(*args)
        run = self._find(args)[0].run
        if run is None:
            return lambda *tensors: pytree.tree_leaves(
                self.function(*pytree.tree_unflatten(_filled(leaves, tensors), structure))
            )
        return run

    def _find(self, args: Any) -> tuple[_Plan, list[Any], list[Tensor]]:
        """The plan for inputs like these, their leaves, and those of them that are tensors."""
        leaves, structure = pytree.tree_flatten(args)
        # Most calls are like the one before: then neither a key nor a search is needed.
        seen = (structure, [_layout(leaf) for leaf in leaves])
        if self._latest is None or seen != self._latest[0]:
            key = (structure, tuple(_leaf_key(leaf) for leaf in leaves))
            gaps = any(isinstance(leaf, Tensor) and _dense(leaf) is not leaf for leaf in leaves)
            self._latest = (seen, self._plans.setdefault(key, _Plan()), gaps)
        _, plan, gaps = self._latest
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return plan, leaves, [_dense(tensor) for tensor in tensors] if gaps else tensors

    def _climb(self, plan: _Plan, args: Any, leaves: list[Any]) -> None:
        target = self._target(plan)
        if TIERS.index(target) <= TIERS.index(plan.tier):
            return
        start = time.perf_counter()
        if plan.graph is None:
            try:
                plan.graph, plan.structure = trace(self.function, args)
            except StagingError as error:
                if not self.falls_back:
                    raise
                self.wanted = "eager"
                warnings.warn(
                    f"This program cannot be traced (found {error.found}), so it runs as it is, "
                    "which is slower. compile=False asks for that.",
                    stacklevel=2,
                )
                return
            _refuse_draws(plan.graph)
            plan.run, plan.tier = _interpret(plan.graph, _tensors(leaves)), "graph"
            target = self._target(plan)
        if target == "compiled" and compiler_available():
            try:
                plan.run = compile_graph(plan.graph, _tensors(leaves), one_file=self.one_file)
                plan.tier = "compiled"
            except Exception as error:
                # The compiler's failures are its own (it stumbles over some indexing); the graph
                # is right, and slower.
                self.wanted = "graph"
                warnings.warn(
                    f"The compiler gave up ({type(error).__name__}), so this program runs as a "
                    "traced graph, which is slower. compile='graph' asks for that.",
                    stacklevel=2,
                )
        elif target == "compiled":
            self.wanted = "graph"
        self.seconds_staging += time.perf_counter() - start
        if self.check_every:
            assert plan.run is not None
            self._check(args, plan.run(*_tensors(leaves)), plan)

    def _target(self, plan: _Plan) -> Tier:
        if self.wanted != "auto":
            return self.wanted
        if plan.eager_calls < 3:
            return "eager"
        # What is left, at eager speed, against what staging costs. Tracing runs the function about
        # as often as a few dozen eager calls; compiling grows with the number of nodes.
        each = plan.eager_seconds / plan.eager_calls
        left = each * max(self.expected_calls - self.calls, 0)
        if left < 60 * each + 0.5:
            return "eager"
        nodes = 300 if plan.graph is None else len(plan.graph.graph.nodes)
        return (
            "compiled"
            if left > 1.2 * (_SECONDS_TO_COMPILE + _SECONDS_PER_NODE * nodes)
            else "graph"
        )

    def _check(self, args: Any, staged: list[Any], plan: _Plan) -> None:
        inputs = _tensors(pytree.tree_leaves(args))
        half = next((tensor.dtype for tensor in inputs if tensor.dtype in HALVES), None)
        if half is not None and plan.tier == "compiled" and plan.graph is not None:
            staged = _interpret(plan.graph, inputs)(*inputs)
        results = zip(pytree.tree_leaves(self.function(*args)), staged, strict=True)
        pairs = [(w, f) for w, f in results if isinstance(w, Tensor) and w.is_floating_point()]
        largest = max((float(wanted.detach().abs().max()) for wanted, _ in pairs), default=0.0)
        moved: list[float] | None = None
        for number, (wanted, found) in enumerate(pairs):
            eps = torch.finfo(half or wanted.dtype).eps
            usual = 1e-9 if wanted.dtype == torch.float64 else 1e-4
            rtol = self.rtol or (usual if half is None else _RTOL_OF_HALVES * eps)
            # A gradient that vanishes at an optimum is the rounding of terms as large as the loss,
            # and of terms as large as that gradient was when it did not vanish.
            plan.largest[number] = max(plan.largest.get(number, 0.0), float(wanted.abs().max()))
            rounding = (_ROUNDINGS if half is None else _ROUNDINGS_OF_HALVES) * eps
            rounding *= max(largest, plan.largest[number])
            scale = wanted.detach().abs().max().clamp_min(max(rounding / rtol, 1e-12))
            difference = ((wanted - found).abs().max() / scale).item()
            if not difference <= rtol and bool(torch.isfinite(wanted).all()):
                # An ill-conditioned result (a gradient through batch statistics in single
                # precision) is no more exact in any order of its operations.
                moved = moved_by_rounding(self.function, args) if moved is None else moved
                if difference * float(scale) <= _OWN_ROUNDING * moved[number]:
                    continue
                raise StagingError(
                    getattr(self.function, "__qualname__", "function"),
                    needed=f"a graph equal to the program to a relative {rtol:g}",
                    found=f"a difference of {difference:.3g} at call {self.calls}",
                    do="A Python number changed after tracing (a setting, float(tensor), a "
                    "global). Pass it as an input, or use compile=False.",
                )


class _Plan:
    """How one key of inputs is run."""

    def __init__(self) -> None:
        self.tier: Tier = "eager"
        self.graph: GraphModule | None = None
        self.run: Callable[..., Any] | None = None
        self.structure: Any = None
        self.eager_calls, self.eager_seconds = 0, 0.0
        self.largest: dict[int, float] = {}


def _layout(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.stride()
    return type(leaf), leaf


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return _layout(_dense(leaf))
    # A 2 and a 2.0 are equal, and give other dtypes.
    return type(leaf), leaf


def _tensors(leaves: list[Any]) -> list[Tensor]:
    return [_dense(leaf) for leaf in leaves if isinstance(leaf, Tensor)]


def _filled(leaves: list[Any], tensors: Iterable[Tensor]) -> list[Any]:
    """The leaves with other tensors in the place of theirs; None and numbers are leaves too."""
    supply = iter(tensors)
    return [next(supply) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _dense(tensor: Tensor) -> Tensor:
    """The tensor without gaps in memory: a clone of it keeps its strides, so a graph fits it."""
    if tensor.is_contiguous() or is_non_overlapping_and_dense_or_false(tensor):
        return tensor
    return tensor.contiguous()


def trace(function: Callable[..., Any], args: Any) -> tuple[GraphModule, Any]:
    """The graph of `function` at inputs like `args`, and the structure of its result.

    The graph takes the tensors of `args` in order and returns the flat list of result tensors.
    """
    leaves, structure = pytree.tree_flatten(args)
    out: dict[str, Any] = {}

    def flat(*tensors: Tensor) -> list[Any]:
        result = function(*pytree.tree_unflatten(_filled(leaves, tensors), structure))
        values, out["structure"] = pytree.tree_flatten(result)
        return values

    # The same tensor given twice would be merged into one input: support and query often share
    # memory.
    tensors = [tensor.detach().clone() for tensor in _tensors(leaves)]
    try:
        graph = make_fx(flat, tracing_mode="real")(*tensors)
    except HbmetaError:
        raise
    except Exception as error:
        raise StagingError(
            "compile",
            needed="a program of tensor operations, without branches on values of tensors",
            found=_what_stopped(error),
            do="Use compile=False, or replace the branch by torch.where.",
        ) from error
    with default_dtype_of(tensors):
        return simplify(graph), out["structure"]


def _refuse_draws(graph: GraphModule) -> None:
    for node in graph.graph.nodes:
        if node.op == "call_function" and torch.Tag.nondeterministic_seeded in getattr(
            node.target, "tags", ()
        ):
            raise StagingError(
                "compile",
                needed="random numbers as inputs",
                found=f"a draw inside the graph ({node.target})",
                do="Draw the noise outside and pass it in.",
            )


def _what_stopped(error: Exception) -> str:
    """What could not be traced, and where in the person's program."""
    message = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {message[0] if message else ''}"
    if "_local_scalar_dense" in what:
        # torch's words for it end in advice on settings of its own.
        what = "a number or a truth value that is read from a tensor"
    own = [
        (frame.f_code.co_name, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _LIBRARIES
    ]
    return f"{what}, in line {own[-1][1]}, {own[-1][0]}" if own else what


def _interpret(graph: GraphModule, tensors: list[Tensor]) -> Callable[..., Any]:
    """The graph without a compiler."""

    def run(*inputs: Tensor) -> Any:
        with default_dtype_of(tensors):
            return graph(*inputs)

    return run
