"""What a certificate says against the same thing by numpy and a plain root finder."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

import hbmeta as hb
from hbmeta import inference, models, tasks
from hbmeta.certification import Certificate, FiniteHyperprior, GaussianHyperprior, risks
from hbmeta.certification.losses import Loss, loss_of
from hbmeta.certification.task_priors import task_kls
from tests.certification import cases
from tests.certification.cases import CENTRES, SQUARED, episodes

COVARIANCE = np.array([[1.0, 0.3], [0.3, 0.5]])


def kl_inverse(q, c):
    def above(p):
        return (
            (q * math.log(q / p) if q else 0.0)
            + ((1 - q) * math.log((1 - q) / (1 - p)) if q < 1 else 0.0)
            - c
        )

    return brentq(above, q, 1 - 1e-15, xtol=1e-15, rtol=1e-14) if c > 0 else q


def rows(part, i):
    chosen = part.task == i
    return part.flat_x[chosen].numpy(), part.flat_y[chosen].numpy()


def posterior(x, y, first):
    """Mean and covariance of the coefficients given rows."""
    prior = np.linalg.inv(COVARIANCE)
    precision = prior + x.T @ x / 0.09
    mean = np.linalg.solve(precision, prior @ np.array([first, -0.5]) + x.T @ y / 0.09)
    return mean, np.linalg.inv(precision)


def losses(first, episode):
    out = []
    for i in range(episode.n_tasks):
        mean, _ = posterior(*rows(episode.support, i), first)
        x, y = rows(episode.query, i)
        out.append(np.minimum(((x @ mean - y) / 2.0) ** 2, 1.0).mean())
    return np.array(out)


def kl(mean, covariance, first):
    shift = mean - np.array([first, -0.5])
    inverse = np.linalg.inv(COVARIANCE)
    logs = np.linalg.slogdet(COVARIANCE)[1] - np.linalg.slogdet(covariance)[1]
    return 0.5 * (np.trace(inverse @ covariance) + shift @ inverse @ shift - 2 + logs)


def test_meta_test_is_chernoff_on_the_mean_query_loss():
    found = cases.meta_test()
    mean = losses(1.0, episodes()).mean()
    assert found.statement.measured == pytest.approx(mean, abs=1e-12)
    assert found.value == pytest.approx(kl_inverse(mean, math.log(20) / 40), abs=1e-9)
    assert (found.bound, found.delta, found.statement.cost) == ("meta_test", 0.05, 0.05)
    assert not found.vacuous
    assert not found.flags


def test_choices_divide_delta():
    found = hb.certify(cases.linear(), episodes(), choices=5, **SQUARED)
    mean = losses(1.0, episodes()).mean()
    assert found.value == pytest.approx(kl_inverse(mean, math.log(100) / 40), abs=1e-9)
    assert found.check() == ()


def test_query_split_over_a_finite_set_pays_for_its_weights():
    hyperprior = FiniteHyperprior(cases.candidates())
    found = hb.certify(
        cases.linear(), episodes(), bound="query_split", hyperprior=hyperprior, **SQUARED
    )
    one = found.statement
    weights = np.array(one.inputs["weights"])
    risks = np.array([losses(first, episodes()).mean() for first in CENTRES])
    used = weights[weights > 0]
    k_h = (used * np.log(4 * used)).sum()

    def bound(w):
        paid = (w[w > 0] * np.log(4 * w[w > 0])).sum()
        return kl_inverse(w @ risks, (paid + math.log(2 * math.sqrt(40) / 0.05)) / 40)

    assert weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert one.hyper_kl == pytest.approx(k_h, abs=1e-9)
    assert found.value == pytest.approx(bound(weights), abs=1e-9)
    # Chosen among weights of which these are two.
    assert found.value <= min(bound(np.full(4, 0.25)), bound(np.eye(4)[risks.argmin()])) + 1e-12
    again = {"fitted": cases.linear(), "tasks": episodes(), "hyperprior": hyperprior}
    assert found.check(**again) == ()
    # The exact risks of deterministic predictors take no draws.
    assert one.evaluation == 0.0


def test_best_of_shares_delta_and_both_hold():
    hyperprior = FiniteHyperprior(cases.candidates())
    found = hb.certify(cases.linear(), episodes(), hyperprior=hyperprior, **SQUARED)
    assert [one.bound for one in found.statements] == ["query_split", "meta_test"]
    assert [one.cost for one in found.statements] == pytest.approx([0.025, 0.025])
    assert found.value == min(one.value for one in found.statements)


@pytest.mark.parametrize("bound", ["joint_kl", "amit_meir", "amit_meir_kl", "separate_roots"])
def test_bounds_within_tasks_are_paid_in_exact_divergences(bound):
    found = hb.certify(
        cases.linear(),
        episodes(),
        bound=bound,
        hyperprior=FiniteHyperprior(cases.candidates()),
        evaluations=400,
        **SQUARED,
    )
    one = found.statement
    weights = np.array(one.inputs["weights"])
    whole = episodes().all
    kls, risks = np.zeros((4, 40)), np.zeros(4)
    rng = np.random.default_rng(0)
    for k, first in enumerate(CENTRES):
        for i in range(40):
            x, y = rows(whole, i)
            mean, covariance = posterior(x, y, first)
            kls[k, i] = kl(mean, covariance, first)
            drawn = rng.multivariate_normal(mean, covariance, 200) @ x.T
            risks[k] += np.minimum(((drawn - y) / 2.0) ** 2, 1.0).mean() / 40
    assert one.inputs["task_kls"] == pytest.approx(weights @ kls, abs=1e-9)
    assert one.inputs["samples"] == [15] * 40
    # Gibbs risks: means over 40 tasks of 200 draws each, with a standard error below 2e-4.
    assert one.measured == pytest.approx(weights @ risks, abs=2e-3)
    limit = kl_inverse(one.measured, math.log(1 / 0.005) / 400)
    assert one.measured + one.evaluation == pytest.approx(limit, abs=1e-9)
    if bound == "joint_kl":
        within = (one.hyper_kl + (weights @ kls).sum() + math.log(4 * math.sqrt(600) / 0.045)) / 600
        across = (one.hyper_kl + math.log(4 * math.sqrt(40) / 0.045)) / 40
        assert one.raw == pytest.approx(kl_inverse(kl_inverse(limit, within), across), abs=1e-9)
    # Beside it, at a δ of its own.
    assert [(s.bound, s.beside) for s in found.statements] == [(bound, False), ("meta_test", True)]
    assert found.check() == ()


def test_a_gaussian_hyperposterior_is_paid_in_every_dimension():
    fit = cases.network()
    start = dict(fit.problem.parameters())
    hyperprior = GaussianHyperprior((0.01, 0.1, 1.0), 1e-9)
    found = hb.certify(
        fit, episodes(), bound="query_split", hyperprior=hyperprior, evaluations=20, **SQUARED
    )
    one = found.statement
    distance = sum(float((fit.theta[n] - p.detach()).square().sum()) for n, p in start.items())
    dimension = sum(p.numel() for p in start.values())
    k_h = min(
        0.5 * (dimension * (1e-18 / p**2 - 1 + 2 * math.log(p / 1e-9)) + distance / p**2)
        for p in (0.01, 0.1, 1.0)
    )
    assert one.hyper_kl == pytest.approx(k_h, rel=1e-9)
    assert one.inputs["delta"] == pytest.approx(0.045 / 3)
    assert one.cost == pytest.approx(0.05)
    assert found.check() == ()
    # At a spread of 1e-9 every draw is the fit itself.
    again = hb.certify(fit, episodes(seed=2), **SQUARED)
    own = hb.certify(
        fit, episodes(seed=2), bound="query_split", hyperprior=hyperprior, evaluations=3, **SQUARED
    )
    assert own.statements[0].inputs["draws"] == pytest.approx([again.statement.measured] * 3)
    assert [s.bound for s in own.statements] == ["query_split", "meta_test"]
    assert found.vacuous
    assert "says nothing" in found.claim()


def test_a_centre_from_other_tasks_makes_the_divergence_small(untouched):
    fit, new = cases.network(), episodes(seed=2)
    arguments = {"bound": "query_split", "hyperprior": GaussianHyperprior(0.05, 0.05, centre=fit)}
    with untouched():
        found = hb.certify(fit, new, evaluations=20, **arguments, **SQUARED)
    assert found.statement.hyper_kl == pytest.approx(0.0, abs=1e-9)
    assert len(set(found.statement.inputs["draws"])) == 20
    assert found.to_json() == hb.certify(fit, new, evaluations=20, **arguments, **SQUARED).to_json()


def test_the_spread_is_chosen_on_draws_of_its_own():
    """A spread of 100 ruins the predictions, one of 1e-9 costs thousands of nats."""
    fit = cases.network()
    hyperprior = GaussianHyperprior(0.05, (1e-9, 0.05, 100.0), centre=fit)
    found = hb.certify(
        fit, episodes(seed=2), bound="query_split", hyperprior=hyperprior, evaluations=5, **SQUARED
    )
    assert found.statement.inputs["hyper"]["sd"] == 0.05


def test_only_what_is_named_is_random():
    fit = cases.network()
    names = [name for name, _ in fit.problem.parameters()]
    moved = dataclasses.replace(
        fit, theta={**fit.theta, names[-1]: fit.theta[names[-1]] + 0.5}, _cache={}
    )
    hyperprior = GaussianHyperprior(0.1, 0.1, centre=fit, parameters=names[-1:])
    found = hb.certify(
        moved,
        episodes(seed=2),
        bound="query_split",
        hyperprior=hyperprior,
        evaluations=2,
        **SQUARED,
    )
    size = moved.theta[names[-1]].numel()
    assert found.statement.inputs["hyper"]["dimension"] == size
    assert found.statement.inputs["hyper"]["distance"] == pytest.approx(0.5 * size**0.5, rel=1e-6)
    other = dataclasses.replace(hyperprior, parameters=names[:1])
    with pytest.raises(hb.errors.DataError, match="not softened"):
        hb.certify(moved, episodes(seed=2), bound="query_split", hyperprior=other, **SQUARED)


def test_classes_take_the_zero_one_loss_by_default():
    fit, new = cases.prototypes()
    found = hb.certify(fit, new, shots=6)
    labels = new.query.unpad(fit.adapt(new.support).predict(new.query).labels)
    errors = (labels != new.query.flat_y).double()
    assert found.loss == ("zero-one", None)
    assert found.statement.measured == pytest.approx(float(errors.mean()), abs=1e-12)
    clipped = hb.certify(fit, new, loss="clipped-nll", p_min=1e-3)
    p = fit.adapt(new.support).predict(new.query).log_prob(new.query.flat_y)
    worst = math.log(1e3)
    plain = (-new.query.unpad(p)).clamp(max=worst) / worst
    assert clipped.statement.measured == pytest.approx(float(plain.mean()), abs=1e-9)


def test_losses_stay_in_their_range():
    y = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    assert Loss("truncated-squared", 2.0).of_means(y + 1.0, y).tolist() == [0.25] * 3
    assert Loss("truncated-squared", 0.5).of_means(y + 1.0, y).tolist() == [1.0] * 3
    log_p = torch.tensor([0.0, -1.0, -torch.inf], dtype=torch.float64)
    found = Loss("clipped-nll", math.exp(-2.0)).of_log_probabilities(log_p)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))


def test_one_task_after_its_data():
    task = episodes().all[[3]]
    found = hb.certify_task(cases.linear(0.0), task, evaluations=400, **SQUARED)
    one = found.statement
    mean, covariance = posterior(*rows(task, 0), 0.0)
    limit = one.measured + one.evaluation
    rate = (kl(mean, covariance, 0.0) + math.log(2 * math.sqrt(15) / 0.045)) / 15
    assert one.bound == "new_task"
    assert one.value == pytest.approx(kl_inverse(limit, rate), abs=1e-9)
    assert "this one task" in found.claim()
    assert found.check(fitted=cases.linear(0.0), tasks=task) == ()


def test_a_point_mass_on_one_task_is_certified_on_what_it_did_not_see():
    new = episodes(seed=2)[[3]]
    found = hb.certify_task(cases.network(), new, **SQUARED)
    assert found.bound == "hold_out"
    mean = found.statement.measured
    assert found.value == pytest.approx(kl_inverse(mean, math.log(20) / 10), abs=1e-9)


def test_a_certificate_survives_its_file(tmp_path):
    found = cases.meta_test()
    text = found.to_json(tmp_path / "certificate.json")
    again = Certificate.from_json((tmp_path / "certificate.json").read_text())
    assert again.to_json() == text
    assert str(again) == str(found)
    assert again.check() == ()


def test_it_prints_its_terms_and_what_is_warranted():
    text = str(cases.meta_test())
    assert "With probability at least 0.95" in text
    assert "You warrant: the tasks are an independent sample" in text
    line = next(line for line in text.splitlines() if "|" in line)
    assert len(line.split("|")[1]) == 60
    filled = 60 - line.split("|")[1].count(" ")
    assert filled == round(60 * cases.meta_test().value)


def test_binary_responses_and_gibbs_draws_agree_with_probabilities():
    """Labels of draws of a Bernoulli program: φ far from 0 makes all of them certain."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(30, 6, 1, generator=generator, dtype=torch.float64) + 0.5
    y = (torch.arange(30).unsqueeze(1) % 2 == 0).double().expand(30, 6).clone()
    data = tasks.Tasks(x, y).split(3, seed=0)
    model = models.VaryingEffects(fixed=["x0"], varying=["intercept"], family="bernoulli")
    fit = cases.fit(inference.Laplace(), model, data[list(range(10))], steps=20)
    found = hb.certify(fit, data[list(range(10, 30))])
    assert found.loss[0] == "zero-one"
    assert found.statement.measured == 0.0
    assert found.value == pytest.approx(1 - 0.05 ** (1 / 20), abs=1e-12)


def test_tasks_taken_some_at_a_time_are_predicted_as_all_at_once(monkeypatch):
    fit, data = cases.prototypes()
    rng = torch.Generator().manual_seed(0)
    order = torch.randperm(data.query.n_points, generator=rng)
    query = tasks.Tasks.from_flat(
        data.query.flat_x[order], data.query.flat_y[order], data.query.task[order],
        data.n_tasks, ids=data.query.ids,
    )  # fmt: skip
    mixed = tasks.Episode(data.support, query)
    loss = loss_of(fit.problem, None, p_min=None, scale=None, where="certify")
    whole = risks.row_losses(fit, mixed, loss, draws=3, seed=0)
    monkeypatch.setattr(risks, "CELLS", 200)
    parts = risks.row_losses(fit, mixed, loss, draws=3, seed=0)
    assert whole.unique().tolist() == [0.0, 1.0]
    torch.testing.assert_close(parts, whole.double())


def test_a_prior_of_independent_coordinates_costs_no_matrix(monkeypatch):
    """The same KL by its diagonal as by matrices, of a posterior with and without correlations."""
    prior = models.LinearRegression([1.0, -0.5], [1.0, 0.5], noise=0.3)
    fit = cases.fit(inference.Laplace(curvature="diagonal"), prior, episodes(20, 0))
    full = cases.fit(inference.ExactLinear(), prior, episodes(20, 0))
    support = episodes().support
    for posterior in (fit.adapt(support), full.adapt(support)):
        assert posterior.problem.diagonal_prior
        found = task_kls(posterior, "certify")
        monkeypatch.setattr(type(posterior.problem), "diagonal_prior", False)
        wanted = task_kls(posterior, "certify")
        monkeypatch.undo()
        np.testing.assert_allclose(found, wanted, rtol=1e-10)
