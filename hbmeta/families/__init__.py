"""Families of densities that variational inference searches, one file each.

Model: q(φ_i) is a frame N(c_i, A_i A_iᵀ) pushed on by the family's own map,
φ = c + A T_λ(ε), ε ~ N(0, I), with λ = 0 (up to what a family cannot start at) the frame itself, so
that λ has no units. A family says how many numbers λ has, and which density they are.
"""

from hbmeta.families.family import Family, Frame
from hbmeta.families.flow import Flow, FlowFamily
from hbmeta.families.gaussian import Diagonal, FullRank
from hbmeta.families.low_rank import LowRank, LowRankFamily

__all__ = [
    "Diagonal",
    "Family",
    "Flow",
    "FlowFamily",
    "Frame",
    "FullRank",
    "LowRank",
    "LowRankFamily",
]
