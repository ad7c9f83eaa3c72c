"""Plans of studies: which warnings of a fit are shown."""

import warnings

import pytest

from hbmeta.studies.common import Plan, fit_plans, silent

UNCLEAR = (
    "NUTS: split R̂ up to 1.040 (above 1.01). Raise warmup and draws.",
    "NUTS: an effective sample size of 90 (below 400). Raise draws.",
)
SERIOUS = ("NUTS: 3 divergent transitions.", "NUTS.adapt: task 'a' leaves 3", "MAML: other")


class Warns:
    """A strategy whose fit says everything."""

    def fit(self, model, data, **arguments):
        for text in (*UNCLEAR, *SERIOUS):
            warnings.warn(text, stacklevel=1)


@pytest.mark.parametrize("network", [False, True])
def test_only_convergence_of_single_weights_is_not_warned_of(network):
    plan = Plan(Warns(), None, None, network=network)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit_plans({"nuts": plan}, seed=0, compile=False, say=silent)
    texts = tuple(str(warning.message) for warning in caught)
    assert texts == (SERIOUS if network else (*UNCLEAR, *SERIOUS))
