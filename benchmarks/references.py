"""NUTS against stored reference posteriors: radon in three ways, and eight schools.

    python -m benchmarks.references            (needs $HBMETA_DATA or ../shared/data)

A parameter agrees where its mean lies within 0.1 reference sd and its sd within 10 %. With a bulk
effective sample size of 4,000 the standard error of a mean is at most 0.016 sd (0.019 where the
reference itself is 10,000 draws), so a correct sampler fails a mean with probability below 1e-7,
and an sd (standard error about 1.1 %) below 1e-9: below 1e-5 for the whole table. τ of eight
schools has a heavy tail and is judged on the log scale.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import arviz
import numpy as np
import torch

from benchmarks.machine import describe
from benchmarks.programs import (
    data_folder,
    eight_schools,
    eight_schools_tasks,
    radon_flat,
    radon_nested,
    radon_tasks,
    read_zip,
)
from hbmeta.fitted import Fitted
from hbmeta.inference import NUTS
from hbmeta.models import Priors, VaryingEffects

SEED = 0
DRAWS = 6000


@dataclass(frozen=True)
class Agreement:
    """One parameter of one program against its reference."""

    program: str
    parameter: str
    mean: float
    sd: float
    reference_mean: float
    reference_sd: float
    ess_bulk: float
    r_hat: float

    @property
    def shift(self) -> float:
        """Difference of the means in reference sds."""
        return abs(self.mean - self.reference_mean) / self.reference_sd

    @property
    def ratio(self) -> float:
        """sd over reference sd."""
        return self.sd / self.reference_sd

    @property
    def agrees(self) -> bool:
        """Within 0.1 sd of the mean and 10 % of the sd."""
        return self.shift <= 0.1 and abs(self.ratio - 1) <= 0.1


def draws_by_name(fitted: Fitted) -> dict[str, np.ndarray]:
    """(chains, draws) of every scalar, named as posteriordb names them."""
    shape = (fitted.chains, -1)
    out = {name: value.numpy() for name, value in fitted.globals().items()}
    local, _ = fitted.posterior.values(draws=10**9)
    out |= {name: value.numpy() for name, value in local.items()}
    flat = {}
    for name, value in out.items():
        columns = value.reshape(value.shape[0], -1)
        if columns.shape[1] == 1:
            flat[name] = columns.reshape(*shape)
        else:
            for i in range(columns.shape[1]):
                flat[f"{name}[{i + 1}]"] = columns[:, i].reshape(*shape)
    return flat


def compare(
    program: str, found: dict[str, np.ndarray], reference: dict[str, tuple[float, float]]
) -> list[Agreement]:
    """One row per parameter of the reference."""
    rows = []
    for name, (mean, sd) in reference.items():
        draws = found[name]
        ess = float(arviz.ess(draws, method="bulk"))
        rows.append(
            Agreement(
                program,
                name,
                float(draws.mean()),
                float(draws.std()),
                mean,
                sd,
                ess,
                float(arviz.rhat(draws)),
            )
        )
    return rows


def moments(path: Path) -> dict[str, tuple[float, float]]:
    """Stored mean and sd of every parameter."""
    stored = json.loads(path.read_text())
    sd_key = next(key for key in stored if "sd" in key or "std" in key)
    pairs = zip(stored["mean_value"], stored[sd_key], strict=True)
    return dict(zip(stored["names"], pairs, strict=True))


def radon(folder: Path, draws: int = DRAWS, chains: int = 4) -> list[Agreement]:
    """Hierarchical intercepts: a person's own program in both layouts, and VaryingEffects."""
    name = "radon_mn-radon_hierarchical_intercept.moments.json"
    reference = moments(folder / "reference_hierarchical" / "computed" / name)
    rows = []
    for label, program in (
        ("own program, nested", radon_nested),
        ("own program, flat", radon_flat),
    ):
        fitted = NUTS(draws=draws, chains=chains).fit(program, radon_tasks(), seed=SEED)
        rows += compare(f"radon, {label}", draws_by_name(fitted), reference)
    priors = Priors(
        intercept_location=0.0,
        intercept_scale=10.0,
        coefficient_scale=10.0,
        effect_scale=1.0,
        noise_scale=1.0,
    )
    model = VaryingEffects(fixed=["log_uranium", "floor"], varying=["intercept"], priors=priors)
    found = draws_by_name(NUTS(draws=draws, chains=chains).fit(model, radon_tasks(), seed=SEED))
    renamed = {
        "mean": "mu_alpha", "scale": "sigma_alpha", "noise": "sigma_y",
        "fixed[1]": "beta[1]", "fixed[2]": "beta[2]",
        **{f"coefficients[{i}]": f"alpha[{i}]" for i in range(1, 86)},
    }  # fmt: skip
    rows += compare(
        "radon, VaryingEffects", {renamed.get(k, k): v for k, v in found.items()}, reference
    )
    return rows


def schools(folder: Path, draws: int = DRAWS, chains: int = 4) -> list[Agreement]:
    """Eight schools, non-centered, against posteriordb's draws; τ on the log scale."""
    draws_folder = folder / "posteriordb/reference_posteriors/draws/draws"
    stored = read_zip(draws_folder / "eight_schools-eight_schools_noncentered.json.zip")
    reference = {}
    for name in stored[0]:
        values = np.concatenate([np.asarray(chain[name]) for chain in stored])
        values = np.log(values) if name == "tau" else values
        reference["log tau" if name == "tau" else name] = (
            float(values.mean()),
            float(values.std()),
        )
    # At 0.8 a few transitions in the neck of the funnel diverge (8 of 24,000).
    strategy = NUTS(draws=draws, chains=chains, target_accept=0.95)
    fitted = strategy.fit(eight_schools, eight_schools_tasks(), seed=SEED)
    found = draws_by_name(fitted)
    found["log tau"] = np.log(found["tau"])
    return compare("eight schools", found, reference)


def table(rows: list[Agreement]) -> str:
    """One line per program."""
    lines = [
        "| program | parameters | agree | smallest ESS | largest R̂ "
        "| largest shift of a mean (sd) | sd ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for program in dict.fromkeys(row.program for row in rows):
        own = [row for row in rows if row.program == program]
        lines.append(
            f"| {program} | {len(own)} | {sum(r.agrees for r in own)} "
            f"| {min(r.ess_bulk for r in own):,.0f} "
            f"| {max(r.r_hat for r in own):.4f} | {max(r.shift for r in own):.3f} "
            f"| {min(r.ratio for r in own):.3f} to {max(r.ratio for r in own):.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = data_folder()
    rows = radon(folder) + schools(folder)
    print(f"# NUTS against reference posteriors\n\n{describe(SEED)}; 4 chains of {DRAWS} draws\n")
    print(table(rows))
    for row in rows:
        if not row.agrees:
            print(f"\nDISAGREES: {row}")


if __name__ == "__main__":
    main()
