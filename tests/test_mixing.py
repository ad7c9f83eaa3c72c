"""R̂ and effective sample sizes are those of ArviZ, one coordinate at a time."""

import arviz
import numpy as np
import pytest
import torch

from hbmeta import mixing as module
from hbmeta.mixing import mixing


def autoregressive(chains, draws, coefficients, *, seed, shifts=0.0):
    """Chains x_t = c x_{t−1} + ε_t, one coordinate per c; `shifts` moves the last chain."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((chains, draws, len(coefficients)))
    x = noise.copy()
    for t in range(1, draws):
        x[:, t] = np.array(coefficients) * x[:, t - 1] + noise[:, t]
    x[-1] += shifts
    return x


COEFFICIENTS = (0.0, 0.5, 0.9, 0.99, -0.5, -0.9, -0.99)


@pytest.mark.parametrize(
    ("chains", "draws", "shift"),
    [(4, 1000, 0.0), (2, 101, 0.0), (3, 50, 2.0), (1, 200, 0.0), (4, 4, 0.0), (2, 7, 0.0)],
)
def test_equal_to_arviz(chains, draws, shift, monkeypatch):
    monkeypatch.setattr(module, "_AT_A_TIME", 3)
    x = autoregressive(chains, draws, COEFFICIENTS, seed=draws, shifts=shift)
    # Repeated draws, as after a divergence, share a rank.
    x[:, 1, 0] = x[:, 0, 0]
    found = mixing(torch.from_numpy(x))
    for k in range(len(COEFFICIENTS)):
        one = x[..., k]
        assert float(found.ess_bulk[k]) == pytest.approx(arviz.ess(one, method="bulk"), rel=1e-9)
        assert float(found.ess_tail[k]) == pytest.approx(arviz.ess(one, method="tail"), rel=1e-9)
        if chains > 1:
            assert float(found.r_hat[k]) == pytest.approx(arviz.rhat(one), rel=1e-12)
        else:
            assert found.r_hat[k].isnan()
    if draws == 1000:
        assert float(found.ess_bulk[3]) < 200 < 3000 < float(found.ess_bulk[0])


def test_chains_that_stand_still_and_draws_that_are_no_numbers():
    x = autoregressive(2, 40, (0.0, 0.0, 0.0), seed=0)
    x[..., 0] = 1.5
    x[1, 3, 1] = np.nan
    found = mixing(torch.from_numpy(x))
    # Of a constant nothing is known but its number of draws: R̂ is 0 / 0, as in ArviZ.
    assert float(found.ess_bulk[0]) == arviz.ess(x[..., 0], method="bulk") == 80
    assert found.r_hat[0].isnan()
    with np.errstate(invalid="ignore"):
        assert np.isnan(arviz.rhat(x[..., 0]))
    for value in (found.r_hat, found.ess_bulk, found.ess_tail):
        assert value[1:].isnan().tolist() == [True, False]
