"""Posterior approximations, one file each; all of them fit any three-level program."""

from hbmeta.inference.amortized_guide import AmortizedGuide
from hbmeta.inference.anil import ANIL
from hbmeta.inference.exact_gp import ExactGP
from hbmeta.inference.exact_linear import ExactLinear
from hbmeta.inference.fomaml import FOMAML
from hbmeta.inference.gradient_strategy import step_sizes
from hbmeta.inference.implicit_maml import ImplicitMAML
from hbmeta.inference.latent_np import LatentNP
from hbmeta.inference.maml import MAML
from hbmeta.inference.meta_sgd import MetaSGD
from hbmeta.inference.nuts import NUTS
from hbmeta.inference.pooling import CompletePooling, NoPooling
from hbmeta.inference.proto_net import ProtoNet
from hbmeta.inference.quadrature import Quadrature
from hbmeta.inference.reptile import Reptile
from hbmeta.inference.strategy import Strategy

__all__ = [
    "ANIL",
    "FOMAML",
    "MAML",
    "NUTS",
    "AmortizedGuide",
    "CompletePooling",
    "ExactGP",
    "ExactLinear",
    "ImplicitMAML",
    "LatentNP",
    "MetaSGD",
    "NoPooling",
    "ProtoNet",
    "Quadrature",
    "Reptile",
    "Strategy",
    "step_sizes",
]
