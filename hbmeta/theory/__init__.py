"""What approximations imply, in closed form: pure functions in float64."""

from hbmeta.theory.early_stopping import (
    Reduction,
    SignedPrecision,
    implied_prior_precision,
    implied_prior_variance,
    matching_step_size,
    scaled_step_size,
)
from hbmeta.theory.residuals import implied_precision, residual
from hbmeta.theory.type_two import TypeTwoEstimate, type_two_maximum_likelihood

__all__ = [
    "Reduction",
    "SignedPrecision",
    "TypeTwoEstimate",
    "implied_precision",
    "implied_prior_precision",
    "implied_prior_variance",
    "matching_step_size",
    "residual",
    "scaled_step_size",
    "type_two_maximum_likelihood",
]
