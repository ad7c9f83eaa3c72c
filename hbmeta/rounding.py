"""How far rounding moves the results of a function: Monte Carlo arithmetic.

Each floating-point result z of an operation becomes z (1 ± ε), the sign drawn, ε that of its dtype;
whole numbers (counts, labels, weights of 0 and 1) stay, because they are exact. What that changes
in the end is about what another order of the same operations may change (Parker, Pierce, Eggert
2000, Computing in Science and Engineering 2(4)): no two ways to compute the function agree better,
and a function that cancels (a gradient through statistics of nearly equal numbers) moves far.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["moved_by_rounding"]


class _Rounded(TorchDispatchMode):
    """Rounds every result of an operation once more."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        # A view has been rounded before; of what changes in place the caller holds the tensor.
        if func.is_view or func._schema.is_mutable:
            return out
        return pytree.tree_map(self.rounded, out)

    def rounded(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        eps = torch.finfo(value.dtype).eps
        coin = torch.randint(0, 2, value.shape, generator=self.generator).to(value)
        whole = (value == value.round()) & (value.abs() < 0.5 / eps)
        return torch.where(whole, value, value * (1.0 + eps * (2.0 * coin - 1.0)))


def moved_by_rounding(
    function: Callable[..., Any], args: tuple[Any, ...], *, seed: int = 0
) -> list[float]:
    """The largest change of each floating-point tensor of `function(*args)`, in their order.

    0 for a result that changes between two plain calls: what moved it is not rounding.

    Args:
        function: of tensors, to a tree of tensors; run three times, without a graph.
        args: its arguments.
        seed: of the signs.
    """
    before = _numbers(function(*args))
    with _Rounded(seed):
        moved = _numbers(function(*args))
    after = _numbers(function(*args))
    return [
        float((a - b).abs().max()) if a.numel() and torch.equal(a, c) else 0.0
        for a, b, c in zip(before, moved, after, strict=True)
    ]


def _numbers(results: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(results)
    tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
    return [tensor for tensor in tensors if tensor.is_floating_point()]
