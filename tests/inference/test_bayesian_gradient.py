"""What ABML, BMAML and PLATIPUS share: seeds, staging, files, precision."""

import pytest
import torch

from hbmeta import load
from hbmeta.inference import ABML, BMAML, PLATIPUS
from tests import fits
from tests.cases import case

STRATEGIES = {
    "ABML": ABML(steps=2, learned_scale=True),
    "BMAML": BMAML(steps=2, particles=3),
    "BMAML, query": BMAML(steps=2, particles=3, objective="query", optimizer="adam"),
    "PLATIPUS": PLATIPUS(steps=2, particles=7),
}
each = pytest.mark.parametrize("name", STRATEGIES)


def fit(name, program, **settings):
    return fits.fit(STRATEGIES[name], case(program).tasks, case(program).program, **settings)


def numbers(posterior):
    return [v for v in vars(posterior.density).values() if isinstance(v, torch.Tensor)]


@each
@pytest.mark.parametrize(
    "program",
    [
        "lognormal_poisson",
        pytest.param("two_coefficients", marks=pytest.mark.slow),
        pytest.param("gaussian_process", marks=pytest.mark.slow),
        pytest.param("neural_regression", marks=pytest.mark.slow),
    ],
)
def test_staged_steps_are_the_eager_ones(name, program):
    """A traced graph holds no random numbers: they are inputs. To 1e-9 over four steps."""
    eager, staged = (fit(name, program, compile=how) for how in (False, "graph"))
    torch.testing.assert_close(eager.history, staged.history, rtol=1e-9, atol=1e-12)
    assert staged.info["tier"] == "graph"


@each
def test_seeds_files_and_the_callers_state(name, tmp_path, untouched):
    tasks = case("varying_intercepts").tasks
    with untouched():
        fitted = fit(name, "varying_intercepts", seed=5)
        again = fit(name, "varying_intercepts", seed=5)
        posterior = fitted.adapt(tasks, seed=2)
    assert fitted.history == again.history
    fitted.save(tmp_path / "fit")
    loaded = load(tmp_path / "fit")
    for other in (again.adapt(tasks, seed=2), loaded.adapt(tasks, seed=2)):
        pairs = zip(numbers(posterior), numbers(other), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    if name != "BMAML" and name != "BMAML, query":  # whose particles are no draws
        other = numbers(fitted.adapt(tasks, seed=3))
        assert not all(torch.equal(a, b) for a, b in zip(numbers(posterior), other, strict=True))


@each
def test_an_empty_task_changes_nothing_for_the_others(name):
    tasks = case("varying_intercepts").tasks
    fitted = fit(name, "varying_intercepts")
    full, without = (fitted.adapt(part) for part in (tasks, tasks.keep(tasks.task != 0)))
    others = torch.arange(1, tasks.n_tasks)
    for a, b in zip(*(numbers(p.select(tasks.ids[1:])) for p in (full, without)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert len(others) == len(without.select(tasks.ids[1:]).ids)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_works(name, dtype):
    """Trained as MAML is, with θ kept in float32; what comes out is finite."""
    tasks = case("varying_intercepts").tasks.to(dtype=dtype)
    fitted = fits.fit(STRATEGIES[name], tasks, case("varying_intercepts").program)
    assert bool(torch.isfinite(torch.tensor(fitted.history)).all())
    for value in numbers(fitted.adapt(tasks)):
        assert value.dtype == dtype
        assert bool(torch.isfinite(value).all())
