"""Every stored posterior as a program, and NUTS against what is stored.

The false-alarm rate of a table is computed by benchmarks/agreement.py from Monte Carlo errors; with
4,000 effective draws a mean fails with probability below 1e-7 and an sd below 1e-9.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import agreement, approximations, posteriors
from benchmarks.distance_figure import time_against_distance
from benchmarks.posterior_programs import CASES, Case, Moments, Reference
from benchmarks.posterior_programs.case import moments_of_file
from benchmarks.programs import (
    eight_schools,
    eight_schools_tasks,
    radon_flat,
    radon_nested,
    radon_tasks,
)
from hbmeta.inference import MAML, NUTS, SGLD, ExactLinear, ProtoNet
from hbmeta.models import Priors, VaryingEffects
from hbmeta.problem import Problem
from tests import cases

DATA = Path(__file__).parent / "data" / "radon_hierarchical_intercept_moments.json"
DRAWS = 6000


def agree(rows):
    failed = [row for row in rows if not row.agrees]
    assert not failed, failed


@pytest.mark.slow
def test_radon_in_the_flat_layout_agrees_with_quadrature():
    fitted = NUTS(draws=DRAWS).fit(radon_flat, radon_tasks(), seed=0)
    found = agreement.draws_by_name(fitted)
    rows = agreement.compare(found, moments_of_file(DATA))
    assert len(rows) == 90
    agree(rows)
    assert (
        agreement.effective_draws({row.parameter: found[row.parameter] for row in rows}).min()
        >= 4000
    )
    assert agreement.split_r_hat(found).max() < 1.01
    assert sum(row.false_alarm for row in rows) < 1e-5


def test_a_moment_outside_the_limits_disagrees_and_its_false_alarm_rate_is_that_of_a_normal():
    reference = Moments(1.0, 2.0, error_mean=0.03, error_sd=0.0)
    inside = agreement.Agreement("a", Moments(1.19, 2.19, 0.04, 0.05), reference)
    assert inside.agrees
    assert not agreement.Agreement("a", Moments(1.21, 2.0), reference).agrees
    assert not agreement.Agreement("a", Moments(1.0, 2.21), reference).agrees
    assert not agreement.Agreement("a", Moments(1.0, 1.79), reference).agrees
    # 0.1 · 2 over sqrt(0.03² + 0.04²) is 4, and 0.1 · 2 over 0.05 is 4 too.
    two_sided = 2 * torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(-4.0).double()).item()
    assert inside.false_alarm == pytest.approx(2 * two_sided, rel=1e-9)
    unknown = Moments(1.0, 2.0, math.nan, math.nan)
    assert math.isnan(agreement.Agreement("a", unknown, unknown).false_alarm)


def schools_case(reference):
    return Case(
        "schools", eight_schools, lambda _: eight_schools_tasks(), lambda _: (reference,), ("tau",)
    )


# The first run has too few draws, and says so.
@pytest.mark.filterwarnings("ignore:NUTS:UserWarning")
def test_draws_are_raised_until_every_parameter_has_the_effective_number(tmp_path):
    reference = Reference("here", {"mu": Moments(4.4, 3.3), "log tau": Moments(0.0, 0.1)})
    found = posteriors.sample(schools_case(reference), tmp_path, draws=100, ess=600, processes=1)
    assert 100 < found.draws <= posteriors.MOST_DRAWS
    assert found.ess >= 600
    assert [row.parameter for row in found.rows[0].disagreeing][-1] == "log tau"
    assert {"mu", "tau", "log tau", "theta[8]", "z[1]"} <= set(found.moments)
    assert posteriors.Sampled.from_json(found.to_json()) == found
    line = posteriors.table([found]).splitlines()[-1]
    assert "| here | 2 |" in line


def test_a_kept_result_is_not_run_again(tmp_path, monkeypatch):
    row = posteriors.Row("here", (agreement.Agreement("a", Moments(1, 1), Moments(1, 1)),))
    stored = posteriors.Sampled(
        "schools", 10, 1, 4000.0, 1.0, 0, 0, "as written", 1.0, 1.0, {"a": Moments(1, 1)}, (row,)
    )
    case = schools_case(Reference("none", {}))
    ran = []

    def sample(case, folder, **settings):
        ran.append(settings)
        return stored

    monkeypatch.setattr(posteriors, "sample", sample)
    monkeypatch.setattr(posteriors, "KEPT", tmp_path / "kept")

    def run(mode):
        ran.clear()
        return posteriors.results_for([case], tmp_path, mode=mode, processes=1)

    assert run("kept") == []
    assert run("quick") == [stored]
    assert run("kept") == []
    assert run("resume") == [stored]
    assert len(ran) == 1
    assert run("kept") == [stored]
    assert run("resume") == [stored]
    assert not ran
    assert run("again") == [stored]
    assert len(ran) == 1


def test_a_distance_is_the_gaussian_formula_on_moments():
    reference = {"a": Moments(0.0, 1.0), "b": Moments(1.0, 2.0), "fixed": Moments(1.0, 0.0)}
    found = {"a": Moments(0.3, 0.5), "b": Moments(1.2, 2.0), "fixed": Moments(1.0, 0.0)}
    numbers = approximations.distance(found, reference)
    # W2² between N(m, s²) and N(m', s'²) is (m − m')² + (s − s')².
    expected = math.sqrt(((0.3**2 + 0.5**2) + 0.1**2) / 2)
    assert numbers["wasserstein"] == pytest.approx(expected, rel=1e-12)
    assert numbers["shift_worst"] == pytest.approx(0.3)
    assert numbers["shift_median"] == pytest.approx(0.2)
    assert numbers["ratio_median"] == pytest.approx(0.75)


def test_strategies_run_or_are_refused_with_the_reason(tmp_path):
    linear = cases.case("linear_own_nested")
    case = Case("linear", linear.program, lambda _: linear.tasks)
    names = agreement.labels("coefficients", 2 * linear.tasks.n_tasks)
    mean, sd = (torch.as_tensor(part).flatten().tolist() for part in linear.posterior)
    reference = {k: Moments(m, s) for k, m, s in zip(names, mean, sd, strict=True)}
    exact, fit = approximations.fit("ExactLinear", ExactLinear(), case, reference, tmp_path, 1)
    assert fit is not None
    assert fit.posterior is fit.fitted.posterior
    assert exact.ran
    assert exact.wasserstein < 1e-5
    point, _ = approximations.fit("MAML", MAML(), case, reference, tmp_path, 1)
    # A point has no spread: r = 0, and W2 is at least 1.
    assert point.ratio_median == 0
    assert point.wasserstein >= 1
    hasty = SGLD(draws=8, warmup=1, thin=1)
    unmixed, _ = approximations.fit("SGLD", hasty, case, reference, tmp_path, 1)
    assert any(text.startswith("SGLD: split R̂") for text in unmixed.warned)
    assert exact.warned == ()
    for kept in (exact, unmixed):
        assert approximations.from_json(json.dumps(asdict(kept))) == kept
    schools = schools_case(Reference("none", {}))
    refused, none = approximations.fit("ProtoNet", ProtoNet(), schools, reference, tmp_path, 1)
    assert not refused.ran
    assert none is None
    assert refused.why.startswith("refused: needed ")
    assert refused.why in approximations.left_out([exact, refused])
    assert len(approximations.table([exact, point, refused]).splitlines()) == 4


def test_every_strategy_that_exists_is_tried_by_name():
    found = approximations.strategies()
    assert found["NUTS"] == NUTS()
    assert "Strategy" not in found
    assert found["MAML"] == MAML(steps=5, step_size=0.05)
    assert list(approximations.strategies(["ExactLinear"])) == ["ExactLinear"]


def test_the_figure_has_a_dot_per_strategy_and_program_and_a_disc_per_strategy():
    points = {"MAML": [(3.0, 1.0)], "Mine": [(3.0, 1.0), (4.0, 1e9)], "NUTS": [(30.0, 0.01)]}
    figure = time_against_distance(points, singles=["MAML"])
    axis, names = figure.axes
    assert axis.get_xscale() == axis.get_yscale() == "log"
    dots = dict.fromkeys((".", "^"), 0)
    for line in axis.lines:
        if line.get_marker() in dots:
            dots[line.get_marker()] += len(line.get_xdata())
    assert dots == {".": 3, "^": 1}
    # Numbered by the median distance, named beside it; what is far off stays in the picture.
    assert [text.get_text() for text in axis.texts] == ["1", "2", "3"]
    assert [text.get_text() for text in names.texts[:6]] == ["1", "NUTS", "2", "MAML", "3", "Mine"]
    low, high = axis.get_ylim()
    places = np.array([text.get_position() for text in axis.texts])
    assert (low < places[:, 1]).all()
    assert (places[:, 1] < high).all()
    # MAML's disc and that of Mine, both at three seconds, do not cover each other.
    pixels = axis.transData.transform(places)
    apart = np.hypot(*(pixels[1] - pixels[2])) * 72 / figure.dpi
    assert apart > 9.0


def test_every_stored_definition_has_a_program(data_folder):
    stored = {path.stem for path in (data_folder / "posteriordb" / "posteriors").glob("*.json")}
    assert len(stored) == 28
    assert stored <= set(CASES)
    draws = data_folder / "posteriordb/reference_posteriors/draws/draws"
    with_draws = {path.name.removesuffix(".json.zip") for path in draws.iterdir()}
    folder = data_folder / "reference_hierarchical"
    sources = {name: [r.source for r in CASES[name].references(data_folder)] for name in CASES}
    assert all(any("posteriordb" in s for s in sources[name]) for name in with_draws)
    counted = {
        "quadrature": len(list(folder.glob("*/*moments*.json"))),
        "stat_comp_benchmarks": len(list(folder.glob("stat_comp_benchmarks/*.params"))),
        "BUGS": 2,
        "Inference Gym": 1,
    }
    for source, files in counted.items():
        # The centered and the non-centered program of a posterior share its reference.
        users = {id(CASES[n].references) for n in CASES if any(source in s for s in sources[n])}
        assert len(users) == files, source


@pytest.mark.parametrize("name", list(CASES))
def test_a_program_reads_its_density_is_finite_and_its_references_name_its_sites(name, data_folder):
    case = CASES[name]
    tasks = case.tasks(data_folder)
    problem = Problem(case.program, tasks)
    batch = problem.batch(tasks)
    theta = problem.theta(batch)
    with torch.no_grad():
        phi = problem.location(theta, batch)
        likelihood, local, prior = problem.terms(theta, phi, batch)
        values = problem.run(theta, {}, batch, with_y=False).values
    assert torch.isfinite(likelihood).all()
    assert torch.isfinite(local).all()
    assert torch.isfinite(prior)
    sites = problem.sites
    level1 = {s.name: math.prod(s.shape) for s in (*sites.globals, *sites.deterministic_global)}
    level2 = {
        s.name: tasks.n_tasks * math.prod(s.shape)
        for s in (*sites.locals, *sites.deterministic_local)
    }
    assert set(level1) | set(level2) <= set(values)
    known = {label for k, n in (level1 | level2).items() for label in agreement.labels(k, n)}
    known |= {f"log {name}" for name in case.log}
    for reference in case.references(data_folder):
        assert set(reference.moments) <= known, reference.source
        assert all(m.sd > 0 for m in reference.moments.values())


def test_lynx_and_hare_by_fixed_steps_is_the_solution_of_the_equation():
    from scipy.integrate import solve_ivp

    from benchmarks.posterior_programs.dynamics import log_path

    theta = np.array([0.55, 0.028, 0.8, 0.024])
    start = np.array([34.0, 5.9])
    exact = solve_ivp(
        lambda _, z: [(theta[0] - theta[1] * z[1]) * z[0], (-theta[2] + theta[3] * z[0]) * z[1]],
        (0, 20), start, t_eval=np.arange(21), rtol=1e-10, atol=1e-10,
    ).y.T  # fmt: skip
    found = log_path(torch.tensor(start).log()[None], torch.tensor(theta)[None])[0].numpy()
    # A hundredth of the observations' sd (0.25 on the log scale) moves no posterior visibly.
    assert np.abs(found - np.log(exact)).max() < 2.5e-3


@pytest.mark.slow
def test_radon_in_three_ways_and_eight_schools_agree(data_folder):
    reference = CASES["radon_mn-radon_hierarchical_intercept_centered"].references(data_folder)[0]
    fitted = NUTS(draws=DRAWS).fit(radon_nested, radon_tasks(), seed=0)
    rows = agreement.compare(agreement.draws_by_name(fitted), reference.moments)
    priors = Priors(
        intercept_location=0.0, intercept_scale=10.0, coefficient_scale=10.0,
        effect_scale=1.0, noise_scale=1.0,
    )  # fmt: skip
    model = VaryingEffects(fixed=["log_uranium", "floor"], varying=["intercept"], priors=priors)
    found = agreement.draws_by_name(NUTS(draws=DRAWS).fit(model, radon_tasks(), seed=0))
    renamed = {
        "mean": "mu_alpha", "scale": "sigma_alpha", "noise": "sigma_y",
        "fixed[1]": "beta[1]", "fixed[2]": "beta[2]",
        **{f"coefficients[{i}]": f"alpha[{i}]" for i in range(1, 86)},
    }  # fmt: skip
    found = {renamed.get(name, name): draws for name, draws in found.items()}
    rows += agreement.compare(found, reference.moments)
    assert len(rows) == 2 * 90
    agree(rows)
    result = posteriors.sample(CASES["eight_schools-eight_schools_noncentered"], data_folder)
    assert [len(row.agreements) for row in result.rows] == [10, 10, 18]
    assert not any(row.disagreeing for row in result.rows)
