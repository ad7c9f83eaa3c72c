"""Whether a strategy's posteriors are calibrated, by data that the program itself makes.

    joint      (θ, φ, y) ~ p: `sbc`. Every simulation is fitted anew; θ and φ are ranked.
    adapted    new tasks of a fit: `sbc_adapted`. The fit stays as it is and is adapted to each.

Ranks of the truth among draws are uniform where q is exact (Talts et al. 2018); so are those of any
quantity of parameters and data (Modrák et al. 2023), and of distances to random points (TARP, Lemos
et al. 2023). Uniform ranks do not prove that q is exact.
"""

from hbmeta.calibration.record import Calibration, Ranks
from hbmeta.calibration.simulations import sbc, sbc_adapted
from hbmeta.calibration.uniformity import chi_squared, envelope, envelope_p

__all__ = [
    "Calibration",
    "Ranks",
    "chi_squared",
    "envelope",
    "envelope_p",
    "sbc",
    "sbc_adapted",
]
