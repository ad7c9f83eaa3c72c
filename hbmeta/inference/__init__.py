"""Posterior approximations, one file each; all of them fit any three-level program."""

from hbmeta.inference.abml import ABML
from hbmeta.inference.amortized_guide import AmortizedGuide
from hbmeta.inference.anil import ANIL
from hbmeta.inference.bmaml import BMAML
from hbmeta.inference.exact_gp import ExactGP
from hbmeta.inference.exact_linear import ExactLinear
from hbmeta.inference.fomaml import FOMAML
from hbmeta.inference.gradient_strategy import step_sizes
from hbmeta.inference.implicit_maml import ImplicitMAML
from hbmeta.inference.laplace import Laplace
from hbmeta.inference.latent_np import LatentNP
from hbmeta.inference.maml import MAML
from hbmeta.inference.meta_sgd import MetaSGD
from hbmeta.inference.nested_laplace import NestedLaplace
from hbmeta.inference.nuts import NUTS
from hbmeta.inference.pac_bayes import PACBayes
from hbmeta.inference.pathfinder import Pathfinder
from hbmeta.inference.platipus import PLATIPUS
from hbmeta.inference.pooling import CompletePooling, NoPooling
from hbmeta.inference.proto_net import ProtoNet
from hbmeta.inference.quadrature import Quadrature
from hbmeta.inference.reptile import Reptile
from hbmeta.inference.sghmc import SGHMC
from hbmeta.inference.sgld import SGLD
from hbmeta.inference.strategy import Strategy
from hbmeta.inference.variational import Variational

__all__ = [
    "ABML",
    "ANIL",
    "BMAML",
    "FOMAML",
    "MAML",
    "NUTS",
    "PLATIPUS",
    "SGHMC",
    "SGLD",
    "AmortizedGuide",
    "CompletePooling",
    "ExactGP",
    "ExactLinear",
    "ImplicitMAML",
    "Laplace",
    "LatentNP",
    "MetaSGD",
    "NestedLaplace",
    "NoPooling",
    "PACBayes",
    "Pathfinder",
    "ProtoNet",
    "Quadrature",
    "Reptile",
    "Strategy",
    "Variational",
    "step_sizes",
]
