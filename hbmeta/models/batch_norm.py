"""Batch normalisation of one task, given which rows its statistics are taken from.

For a channel c of the hidden values h (rows, channels, positions …), with weights w of the rows,

    n = Σ_r w_r · positions,   m_c = Σ_r,p w_r h_rcp / n,   v_c = Σ_r,p w_r (h_rcp − m_c)² / n,
    h ↦ γ_c (h − m_c) / √(v_c + ε) + β_c,

which is torch's nn.BatchNorm in training mode (v with n, not n − 1), padding left out. Where n < 2
there is no variance: m and v are then the module's stored ones (running_mean and running_var; 0 and
1 for a module without). Nothing is written: stored statistics stay as the module came with them.

Whose rows those are is a policy, because it changes what a prediction conditions on:

    "support"  the task's support S, for rows of S and of the query: p(y_q | x_q, S, φ), inductive
    "stored"   none: the stored statistics, the same for all tasks and steps
    "query"    the rows that are predicted: transductive, predictions depend on the other queries

References:
    Ioffe, Szegedy (2015), ICML. Bronskill et al. (2020), ICML, for the policies in meta-learning:
    the published code of MAML uses "query".
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from hbmeta.errors import DataError

Policy = Literal["support", "stored", "query"]

__all__ = [
    "Policy",
    "TaskBatchNorm",
    "check_policy",
    "has_batch_norm",
    "is_batch_norm",
    "row_weights",
    "stored_digest",
    "with_rows",
]

_DIMENSIONS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
}
_FEWEST = 2
"""Values of a channel that have a variance."""


class TaskBatchNorm(nn.Module):
    """An nn.BatchNorm whose statistics come from the first rows, as weighted by a buffer `rows`.

    Put other weights in its place with `torch.func.functional_call`: those of the first
    `len(rows)` rows of the input. None, as it is made, means the stored statistics.

    Args:
        module: an nn.BatchNorm1d, 2d or 3d, whose parameters are taken over by name.
    """

    rows: Tensor
    stored_mean: Tensor
    stored_variance: Tensor

    def __init__(self, module: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.channels, self.eps = module.num_features, module.eps
        self.dimensions = _DIMENSIONS[type(module)]
        self.weight, self.bias = module.weight, module.bias
        zero = torch.zeros(self.channels)
        mean, variance = module.running_mean, module.running_var
        stored_mean = zero if mean is None else mean.detach().clone()
        self.register_buffer("stored_mean", stored_mean)
        stored = zero + 1.0 if variance is None else variance.detach().clone()
        self.register_buffer("stored_variance", stored)
        self.register_buffer("rows", torch.zeros(0))

    def forward(self, h: Tensor) -> Tensor:
        """(rows, channels, positions …), normalised."""
        if h.dim() not in self.dimensions or h.shape[1] != self.channels:
            shape = " or ".join(f"{d} dimensions" for d in self.dimensions)
            raise ValueError(
                f"expected {shape} with {self.channels} channels, got {tuple(h.shape)}"
            )
        # Sums in half precision would lose the rows, as torch's own batch norm knows.
        half = h.dtype in (torch.float16, torch.bfloat16)
        wide = h.float() if half else h
        ones = (1,) * (h.dim() - 2)
        mean, variance = (v.to(wide) for v in (self.stored_mean, self.stored_variance))
        if len(self.rows):
            seen, weight = wide[: len(self.rows)], self.rows.to(wide)
            count = weight.sum() * h.shape[2:].numel()
            others = [0, *range(2, h.dim())]
            weight = weight.reshape(-1, 1, *ones) / count.clamp_min(1.0)
            own_mean = (weight * seen).sum(others)
            deviation = seen - own_mean.reshape(-1, *ones)
            own_variance = (weight * deviation.square()).sum(others)
            enough = count >= _FEWEST
            mean = torch.where(enough, own_mean, mean)
            variance = torch.where(enough, own_variance, variance)
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        found = (wide - mean.reshape(-1, *ones)) * scale.reshape(-1, *ones)
        if self.bias is not None:
            found = found + self.bias.reshape(-1, *ones)
        return found.to(h)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a policy knows how to normalise in its place; subclasses may do otherwise."""
    return type(module) in _DIMENSIONS


def has_batch_norm(network: nn.Module) -> bool:
    """Whether some layer is an nn.BatchNorm1d, 2d or 3d."""
    return any(is_batch_norm(module) for module in network.modules())


def with_rows(network: nn.Module) -> nn.Module:
    """A copy with a `TaskBatchNorm` in the place of every batch norm, parameters of equal names."""
    network = copy.deepcopy(network)
    made: dict[nn.Module, nn.Module] = {
        module: TaskBatchNorm(module)  # type: ignore[arg-type]
        for module in network.modules()
        if is_batch_norm(module)
    }
    for module in list(network.modules()):
        for name, child in module._modules.items():
            if child in made:
                module._modules[name] = made[child]
    return made.get(network, network)


def row_weights(network: nn.Module) -> tuple[str, ...]:
    """Names of the buffers that weigh the rows of statistics; none without batch norm."""
    return tuple(
        f"{name}.rows" if name else "rows"
        for name, module in network.named_modules()
        if isinstance(module, TaskBatchNorm)
    )


def stored_digest(network: nn.Module) -> str:
    """A checksum of the stored statistics, to tell a network of a fit from another."""
    digest = hashlib.sha256()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for value in (module.running_mean, module.running_var):
                digest.update(b"" if value is None else repr(value.double().tolist()).encode())
    return digest.hexdigest()[:12]


def check_policy(policy: Any, network: nn.Module | None, where: str) -> Policy:
    """The policy of a network's batch norm.

    Raises:
        DataError: it is none, or it can have no effect because there is no batch norm; or "stored"
            where a layer has no stored statistics.
    """
    if policy not in get_args(Policy):
        raise DataError(
            where,
            needed="batch_norm 'support', 'stored' or 'query'",
            found=repr(policy),
            do="'support' is inductive; 'query' looks at all rows that are predicted.",
        )
    normed = network is not None and has_batch_norm(network)
    if policy != "support" and not normed:
        raise DataError(
            where,
            needed=f"a network with batch norm, for batch_norm={policy!r}",
            found="a network without" if network is not None else "no network",
            do="Leave batch_norm out, or pass network= with an nn.BatchNorm layer.",
        )
    if policy == "stored" and network is not None:
        for name, module in network.named_modules():
            if is_batch_norm(module) and module.running_mean is None:
                raise DataError(
                    where,
                    needed="stored statistics in every batch norm, for batch_norm='stored'",
                    found=f"{type(module).__name__} {name!r} with track_running_stats=False",
                    do="Use batch_norm='support', or layers that keep running statistics.",
                )
    checked: Policy = policy
    return checked
