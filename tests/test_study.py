"""Level-1 estimates of a study."""

from dataclasses import replace

import pytest

from hbmeta.study import estimates, level_one
from tests import fits

LABELS = {"mean": ["intercept"], "scale": ["intercept"], "fixed": ["hours"]}


def test_sites_that_the_loss_did_not_touch_are_no_estimates():
    """They stand at the location of their prior."""
    fitted = fits.fitted("MAML")
    whole = estimates(fitted, LABELS)
    untouched = replace(fitted, info={**fitted.info, "untouched": ["scale"]})
    part = estimates(untouched, LABELS)
    assert set(whole) - set(part) == {"scale[intercept]"}
    assert all(part[name] == whole[name] for name in part)
    (line,) = [line for line in level_one({"a": whole, "b": part}) if "scale" in line]
    assert line.split()[-1] == "–"


@pytest.mark.parametrize("name", ["NUTS", "ExactLinear"])
def test_without_them_all_sites_are_there(name):
    found = estimates(fits.fitted(name), LABELS)
    assert set(found) == {"mean[intercept]", "scale[intercept]", "fixed[hours]", "noise"}
    assert all((values["sd"] is None) == (name != "NUTS") for values in found.values())
