"""Scores of predicted class probabilities, as pure functions.

    accuracy     1[argmax_k p_k = y]
    Brier        Σ_k (p_k − 1[y = k])²            multi-class: from 0 to 2
    ECE          Σ_b w_b |accuracy_b − confidence_b|

The expected calibration error sorts points by their confidence c = max_k p_k into B bins of equal
width, ((b − 1)/B, b/B]. w_b is the weight of the points in bin b, accuracy_b and confidence_b their
weighted means of 1[correct] and of c, so that

    ECE = Σ_b |g_b|,     g_b = Σ_{j in b} w_j (1[correct_j] − c_j),     Σ_j w_j = 1

Pooled over tasks that weigh the same, each point of task i has w_j = 1 / (T n_i), and g is the mean
over tasks of the g of each task alone.

Its bias: |·| turns noise into error, so that ECE is biased upwards, by about Σ_b √(2 w_b v_b / πn)
for a calibrated classifier (n points, v_b the variance of 1[correct] in the bin): 0.01 at n = 1,000
for points of accuracy 0.8 in one bin, √B times that over B equally filled ones. Within a bin,
errors of opposite sign cancel, so that with many points it is a lower bound on the calibration
error of the confidence (Kumar, Liang, Ma 2019). It judges the confidence alone, not the other
probabilities.

References:
    Brier (1950), Monthly Weather Review 78(1), 1–3.
    Guo, Pleiss, Sun, Weinberger (2017), On calibration of modern neural networks, ICML.
    Kumar, Liang, Ma (2019), Verified uncertainty calibration, NeurIPS.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hbmeta.errors import DataError

__all__ = ["BINS", "accuracy", "brier", "calibration_gaps", "expected_calibration_error"]

BINS = 15
"""Bins of the expected calibration error, as in Guo et al. (2017)."""


def accuracy(probabilities: Tensor, labels: Tensor) -> Tensor:
    """1 where the most probable class is the label, else 0; the lowest of equal classes is taken.

    Args:
        probabilities: (..., k), summing to 1.
        labels: (...), whole numbers from 0 to k − 1.
    Returns:
        (...), float64; more is better.
    Raises:
        DataError: shapes that do not fit, labels or probabilities outside their range.
    """
    p, y = _checked(probabilities, labels, "accuracy")
    return (p.argmax(-1) == y).double()


def brier(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Multi-class Brier score Σ_k (p_k − 1[y = k])²: 0 is perfect, 2 is sure and wrong.

    For two classes it is twice the (p − y)² that some call by this name.

    Args:
        probabilities: (..., k), summing to 1.
        labels: (...), whole numbers from 0 to k − 1.
    Returns:
        (...), float64; less is better.
    Raises:
        DataError: as for `accuracy`.
    """
    p, y = _checked(probabilities, labels, "brier")
    # Σ_k p_k² − 2 p_y + 1 would lose digits where p_y is near 1.
    hit = torch.arange(p.shape[-1], device=p.device) == y.unsqueeze(-1)
    return (p - hit.double()).square().sum(-1)


def expected_calibration_error(
    probabilities: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    bins: int = BINS,
) -> float:
    """Expected calibration error, from 0 to 1; see the module for its definition and its bias.

    Args:
        probabilities: (n, k), summing to 1.
        labels: (n,), whole numbers from 0 to k − 1.
        weights: (n,) of the points, not negative, up to a factor; None weighs all alike.
        bins: bins of equal width of the confidence.
    Raises:
        DataError: as for `accuracy`; no points, no bins, or weights of no use.
    Example:
        >>> p = torch.tensor([[0.8, 0.2]] * 10)
        >>> round(expected_calibration_error(p, torch.tensor([0] * 6 + [1] * 4)), 6)
        0.2
    """
    p, y = _checked(probabilities, labels, "expected_calibration_error")
    w = torch.ones(len(y), dtype=torch.float64) if weights is None else weights.double()
    w = w.to(p.device)
    usable = w.shape == y.shape and bool((w >= 0).all()) and math.isfinite(float(w.sum()))
    if not usable or float(w.sum()) <= 0:
        raise DataError(
            "expected_calibration_error",
            needed=f"weights of shape ({len(y)},), not negative, of a positive sum",
            found=f"shape {tuple(w.shape)}, sum {float(w.sum()):g}",
            do="Pass one weight per point, or None; and at least one point.",
        )
    one_task = torch.zeros(len(y), dtype=torch.int64, device=p.device)
    return float(_gaps(p, y, w / w.sum(), one_task, 1, bins).abs().sum())


def calibration_gaps(
    probabilities: Tensor, labels: Tensor, task: Tensor, n_tasks: int, *, bins: int = BINS
) -> Tensor:
    """(tasks, bins) g_ib = (1 / n_i) Σ_{j in b} (1[correct_j] − c_j) of each task's points.

    The expected calibration error with each task weighing the same is Σ_b |mean over i of g_ib|.

    Args:
        probabilities: (n, k), summing to 1.
        labels: (n,), whole numbers from 0 to k − 1.
        task: (n,) int64, the task of each point.
        n_tasks: number of tasks; one without points has zeros.
        bins: bins of equal width of the confidence.
    Raises:
        DataError: as for `accuracy`; no bins.
    """
    p, y = _checked(probabilities, labels, "calibration_gaps")
    counts = torch.bincount(task, minlength=n_tasks).double()
    return _gaps(p, y, 1.0 / counts[task], task, n_tasks, bins)


def _gaps(p: Tensor, y: Tensor, w: Tensor, task: Tensor, n_tasks: int, bins: int) -> Tensor:
    if bins < 1:
        raise DataError("calibration", needed="1 bin or more", found=f"{bins}", do="Pass bins=15.")
    confidence, label = p.max(-1)
    # ((b − 1)/B, b/B]; a confidence of 0.6 in single precision stays in the bin that ends there.
    place = (torch.ceil(confidence * bins * (1.0 - 1e-7)).long() - 1).clamp(0, bins - 1)
    gap = w * ((label == y).double() - confidence)
    flat = torch.zeros(n_tasks * bins, dtype=torch.float64, device=p.device)
    return flat.index_add(0, task * bins + place, gap).reshape(n_tasks, bins)


def _checked(probabilities: Tensor, labels: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Probabilities in float64 and labels in int64, one for each other."""
    p, y = torch.as_tensor(probabilities).double(), torch.as_tensor(labels)
    if p.dim() < 1 or p.shape[:-1] != y.shape or not p.shape[-1]:
        raise DataError(
            where,
            needed="probabilities (..., k) and labels (...)",
            found=f"shapes {tuple(p.shape)} and {tuple(y.shape)}",
            do="Give each point a probability for each class.",
        )
    whole = y.round() if y.is_floating_point() else y
    if not bool(((whole == y) & (y >= 0) & (y < p.shape[-1])).all()):
        bad = y[~((whole == y) & (y >= 0) & (y < p.shape[-1]))]
        raise DataError(
            where,
            needed=f"labels that are whole numbers from 0 to {p.shape[-1] - 1}",
            found=f"{bad[0].item()!r}",
            do="Number the classes from 0, and predict a probability for each of them.",
        )
    # Single precision sums to 1 within 1e-6 for a thousand classes.
    if not bool(((p >= -1e-6).all(-1) & ((p.sum(-1) - 1.0).abs() <= 1e-3)).all()):
        raise DataError(
            where,
            needed="probabilities of at least 0 that sum to 1",
            found=f"a least of {float(p.min()):.3g}, a largest sum of {float(p.sum(-1).max()):.6g}",
            do="Normalise them; logits go through softmax first.",
        )
    return p, y.to(device=p.device, dtype=torch.int64)
