"""The C function gives what Python gives, and the sampler draws the same from either."""

import ctypes

import pytest
import torch

from hbmeta import joint_density, native
from hbmeta.compilation import Compiled
from hbmeta.inference import NUTS
from hbmeta.models import HierarchicalModel
from hbmeta.native import record
from hbmeta.parametrisation import Coordinates
from hbmeta.problem import Problem
from tests.cases import case

# Cases without a Cholesky factor; those of the last line have matrix products.
NATIVE = (
    *("varying_intercepts", "ragged_one_row", "eight_schools_centered", "bernoulli"),
    *("poisson_offset", "student_t", "gamma_poisson", "lognormal_poisson", "class_conditional"),
    *("module_parameters", "neural_zero", "neural_classifier", "latent_process"),
)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def potential_of(name, parametrisation="auto"):
    """The staged density of a case, its coordinates, and a vector."""
    known = case(name)
    tasks = known.tasks.to(dtype=torch.float64)
    program = known.program
    bound = program.bind(tasks) if isinstance(program, HierarchicalModel) else program
    problem = Problem(bound, tasks)
    batch = problem.batch(tasks)
    theta = problem.theta(batch)
    coordinates = Coordinates.of(problem, batch, parametrisation, "test")
    potential, _ = joint_density.staged_log_density(
        problem, batch, theta, "compiled", 10**6, coordinates
    )
    vector = joint_density.pack(problem, theta, problem.location(theta, batch)).double()

    def plain(v):
        return joint_density.log_density(problem, theta, v, batch, coordinates)

    return potential, plain, coordinates, vector


def somewhere(vector, seed):
    generator = torch.Generator().manual_seed(seed)
    return vector + torch.randn(vector.shape, generator=generator, dtype=torch.float64)


def test_the_c_function_is_the_density_in_every_coordinates():
    potential, plain, coordinates, vector = potential_of("two_coefficients")
    first = potential.native()
    for seed in range(5):
        at = somewhere(vector, seed)
        torch.testing.assert_close(first(at), plain(at), **EXACT)
        torch.testing.assert_close(first(at), potential(at), **EXACT)
    assert (first.evaluations, first.kept, first.size) == (10, 0, len(vector))
    non_centered = plain(at)
    coordinates.centered = torch.ones_like(coordinates.centered)
    second = potential.native()
    torch.testing.assert_close(second(at), plain(at), **EXACT)
    # The first keeps the choice that it was recorded with, and memory of its own.
    torch.testing.assert_close(first(at), non_centered, **EXACT)
    assert abs(float(second(at)[0] - non_centered[0])) > 0.1
    # Not finite: a positive code, by which the sampler ends the trajectory as divergent.
    address, code = ctypes.c_void_p, ctypes.c_int64
    call = ctypes.CFUNCTYPE(code, ctypes.c_uint64, *[address] * 4)(first.evaluate)
    for number, expected in ((0.0, 0), (torch.nan, 1)):
        at, room = torch.full_like(vector, number), torch.empty(len(vector) + 1).double()
        pointers = (at.data_ptr(), room.data_ptr(), room[-1:].data_ptr(), first.block.ctypes.data)
        assert call(first.size, *pointers) == expected


def test_the_sampler_draws_the_same_through_c_and_through_python(monkeypatch):
    """And however many chains run at a time; a compiler that fails leaves it to Python."""

    def fit(**settings):
        known = case("eight_schools")
        strategy = NUTS(draws=50, warmup=50, chains=3, max_tree_depth=5, **settings)
        return strategy.fit(
            known.program, known.tasks.to(dtype=torch.float64), seed=3, compile=True
        )

    with pytest.warns(UserWarning, match="NUTS: "):
        found = [fit(processes=count) for count in (1, 2)]
    assert [fitted.info["potential"] for fitted in found] == ["native", "native"]

    def broken(code):
        raise OSError("no room")

    monkeypatch.setattr(native, "compile_source", broken)
    with pytest.warns(UserWarning, match="NUTS: |gave up") as warned:
        found.append(fit(processes=1))
    assert any("gave up on the way into C (OSError)" in str(w.message) for w in warned)
    assert found[2].info["potential"] == "compiled"
    gradients = [fitted.info["gradients"] for fitted in found]
    assert gradients[0] == gradients[1] == gradients[2] > 1000
    for fitted in found[1:]:
        torch.testing.assert_close(fitted.density.phi, found[0].density.phi, rtol=0, atol=0)
        for name in ("mu", "tau"):
            torch.testing.assert_close(fitted.theta[name], found[0].theta[name], rtol=0, atol=0)


class _Wrapper:
    """Stands for what Inductor makes of a graph that it leaves to ATen."""

    def call(self, args):
        (x,) = args
        return [-x.square().sum(), -2 * x]


def test_other_operations_are_left_to_python():
    x = torch.ones(3, dtype=torch.float64)

    def wrapper(*tensors):
        return _Wrapper().call(list(tensors))

    assert record(Compiled(wrapper), [x]) is None
    wrapper.current_callable = _Wrapper().call
    assert record(Compiled(wrapper), [x]) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", NATIVE)
def test_c_and_python_agree_on_every_program(name):
    potential, plain, _, vector = potential_of(name)
    found = potential.native()
    for seed in range(3):
        at = somewhere(vector, seed)
        torch.testing.assert_close(found(at), plain(at), **EXACT)
