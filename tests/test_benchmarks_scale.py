"""The benchmark of scale on 500 ratings, and its exact side against dense algebra."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch

from benchmarks import scale
from benchmarks.crossed import Crossed
from benchmarks.scale_program import COLUMNS, FIXED, SCALES, Ratings, part_of
from hbmeta.tasks import Tasks

RATINGS, STUDENTS, LECTURERS = 500, 40, 30
SMALL = scale.Size(
    draws=6, warmup=6, steps=10, known=20, groups=200, guide_steps=20, compile="graph"
)


def ratings():
    """Drawn from the program; lecturer k belongs to department k mod 14."""
    rng = np.random.default_rng(0)
    student, lecturer = rng.integers(0, STUDENTS, RATINGS), rng.integers(0, LECTURERS, RATINGS)
    service = rng.integers(0, 2, RATINGS)
    y = 3.2 - 0.1 * service + 0.3 * rng.standard_normal(STUDENTS)[student]
    y = y + 0.5 * rng.standard_normal(LECTURERS)[lecturer] + rng.standard_normal(RATINGS)
    x = np.column_stack([service, lecturer, lecturer % 14]).astype(float)
    return Tasks.from_flat(x, y, student, STUDENTS, features=COLUMNS)


def dense(tasks):
    """X and the three blocks of Z, row by row."""
    x = tasks.flat_x.numpy()
    parts = (
        np.eye(STUDENTS)[tasks.task.numpy()],
        np.eye(LECTURERS)[x[:, 1].astype(int)],
        np.eye(14)[x[:, 2].astype(int)],
    )
    return np.column_stack([np.ones(len(x)), x[:, 0]]), parts


def test_likelihood_is_that_of_one_gaussian_over_all_rows():
    tasks = ratings()
    crossed = Crossed.of_ratings(Ratings(LECTURERS), tasks)
    found = crossed.maximum()
    x, parts = dense(tasks)
    y = tasks.flat_y.numpy()

    def log_likelihood(scales, fixed):
        covariance = scales[3] ** 2 * np.eye(len(y))
        for tau, z in zip(scales[:3], parts, strict=True):
            covariance = covariance + tau**2 * z @ z.T
        return scipy.stats.multivariate_normal(x @ fixed, covariance).logpdf(y), covariance

    value, covariance = log_likelihood(found.scales, found.fixed)
    assert found.log_likelihood == pytest.approx(value, abs=1e-6)
    rng = np.random.default_rng(1)
    for _ in range(20):
        near = found.scales * np.exp(0.02 * rng.standard_normal(4))
        assert log_likelihood(near, found.fixed + 0.01 * rng.standard_normal(2))[0] < value
    # The students given the scales, the fixed effects under a flat prior.
    solved = np.linalg.inv(covariance)
    along = found.scales[0] ** 2 * parts[0].T
    np.testing.assert_allclose(found.students, along @ solved @ (y - x @ found.fixed), atol=1e-8)
    projected = solved - solved @ x @ np.linalg.inv(x.T @ solved @ x) @ x.T @ solved
    variance = found.scales[0] ** 2 - np.diag(along @ projected @ along.T)
    np.testing.assert_allclose(found.students_sd, np.sqrt(variance), atol=1e-8)


@pytest.mark.slow
def test_every_strategy_gives_a_row_of_the_table():
    """Laplace finds the scales of the likelihood; of NUTS and Variational a few steps are run."""
    tasks, program = part_of(ratings(), RATINGS, 0)
    exact = scale.likelihood(program, tasks)
    fits = {"likelihood": exact}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in scale.strategies(SMALL):
            fits[name] = scale.fit_ratings(name, program, tasks, SMALL)
            assert set(fits[name].parameters) == {*FIXED, *SCALES}
    found = fits["Laplace"]
    # Half-normal priors move the scales a little: by less than their own uncertainty.
    for name, limit in (("tau_student", 0.1), ("tau_lecturer", 0.1), ("sigma", 0.05)):
        assert abs(found.parameters[name][0] - exact.parameters[name][0]) < limit
    shift = np.asarray(found.students[0]) - np.asarray(exact.students[0])
    assert np.abs(shift / np.asarray(exact.students[1])).max() < 0.5
    text = scale.table(fits)
    assert all(f"| {name} |" in text for name in ("NUTS", "Variational", "Laplace"))
    assert not scale.outside(fits["NUTS"], fits["NUTS"])
    assert "tau_student" in scale.outside(replace(found, parameters=moved(found)), fits["NUTS"])


def moved(fit):
    """τ of the students far from where it was."""
    return {**fit.parameters, "tau_student": (1e3, 1.0)}


def test_part_keeps_students_whole():
    whole = ratings()
    some, program = part_of(whole, 100, 0)
    assert 100 <= some.n_points < 100 + int(whole.counts.max())
    assert torch.equal(some.counts, whole.select(some.ids).counts)
    assert int(some.flat_x[:, 1].max()) == program.lecturers - 1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_guide_is_judged_by_the_normal_equations():
    found = scale.adapt_many(SMALL, compared=50)
    assert found.groups == 200
    assert set(found.seconds) == {"fit", "from_frame", "adapt", "moments", "predict"}
    # 20 steps of training are few: the means are not there yet, and not far either.
    assert 0.0 < found.shift[0] < 5.0
    assert "200 groups" in scale.report(found)
