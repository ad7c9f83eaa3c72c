"""Posterior approximations, one file each; all of them fit any three-level program."""

from hbmeta.inference.amortized_guide import AmortizedGuide
from hbmeta.inference.exact_linear import ExactLinear
from hbmeta.inference.maml import MAML
from hbmeta.inference.nuts import NUTS
from hbmeta.inference.pooling import CompletePooling, NoPooling
from hbmeta.inference.strategy import Strategy

__all__ = [
    "MAML",
    "NUTS",
    "AmortizedGuide",
    "CompletePooling",
    "ExactLinear",
    "NoPooling",
    "Strategy",
]
