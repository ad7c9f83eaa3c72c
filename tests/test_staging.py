"""A staged function gives what the function gives, or says why not."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from hbmeta import staging
from hbmeta.errors import DataError, StagingError
from hbmeta.inference import MAML, AmortizedGuide, nuts
from hbmeta.models import VaryingEffects
from hbmeta.problem import Problem
from hbmeta.staging import Staged, compiler_available, tier_of
from hbmeta.tasks import Tasks
from tests.cases import case


def gradient(batch, scale):
    """A value and a gradient, as everything that is staged here."""
    x = batch["x"].detach().requires_grad_()
    value = (torch.sin(x) * batch["y"] * scale).sum()
    (found,) = torch.autograd.grad(value, x)
    return {"value": value.detach(), "gradient": found}


def inputs(n=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, n, 3, generator=generator, dtype=torch.float64).to(dtype)
    return {"x": x, "y": y}, torch.tensor(1.5, dtype=dtype)


def meta_gradient(dtype, strategy, name):
    """The meta-gradient of a real program as `train` stages it, and its inputs."""
    tasks = case(name).tasks.to(dtype=dtype)
    model = case(name).program
    problem = Problem(model.bind(tasks) if isinstance(model, VaryingEffects) else model, tasks)
    batch = problem.batch(tasks)
    own = strategy.parameters(problem, tasks, 0)
    noise = {
        key: torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        for key, shape in strategy.noise(problem, tasks.n_tasks).items()
    }

    def function(theta, support, query, noise):
        theta = {key: value.detach().requires_grad_() for key, value in theta.items()}
        loss = strategy.loss(problem, theta, own, support, query, noise).mean()
        return loss.detach(), list(torch.autograd.grad(loss, list(theta.values())))

    half = torch.arange(batch.mask.numel()).reshape(batch.mask.shape) % 2 == 0
    support, query = batch.where(batch.mask & half), batch.where(batch.mask & ~half)
    return function, (problem.theta(batch), support, query, noise)


def assert_same(one, other, tolerance):
    for left, right in zip(
        torch.utils._pytree.tree_leaves(one), torch.utils._pytree.tree_leaves(other), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


# The tiers agree


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_graph_equals_function(dtype, tolerance):
    batch, scale = inputs(dtype=dtype)
    staged = Staged(gradient, tier="graph")
    found = staged(batch, scale)
    assert staged.tier == "graph"
    assert set(found) == {"value", "gradient"}
    assert_same(found, gradient(batch, scale), tolerance)
    # Other numbers of the same shape go through the same graph.
    batch, scale = inputs(dtype=dtype, seed=1)
    assert_same(staged(batch, scale), gradient(batch, scale), tolerance)
    assert len(staged._plans) == 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("strategy", "name"),
    [(MAML(steps=3), "ragged_one_row"), (AmortizedGuide(hidden=8), "poisson_offset")],
)
def test_graph_of_a_meta_gradient_equals_eager_pyro(strategy, name, dtype, tolerance):
    """In float32 the two round in another order: 1e-5 where the numbers are of order 1 to 10."""
    function, arguments = meta_gradient(dtype, strategy, name)
    assert_same(Staged(function, tier="graph")(*arguments), function(*arguments), tolerance)


def test_compiled_equals_eager_pyro():
    function, arguments = meta_gradient(torch.float64, MAML(steps=2), "varying_intercepts")
    staged = Staged(function, tier="compiled", check_every=1)
    found = staged(*arguments)
    assert staged.tier == "compiled"
    assert staged.seconds_staging > 0
    assert_same(found, function(*arguments), 1e-12)


def test_eager_is_the_function_itself():
    batch, scale = inputs()
    staged = Staged(gradient, tier="eager")
    assert_same(staged(batch, scale), gradient(batch, scale), 0.0)
    assert staged.tier == "eager"
    assert staged.seconds_staging == 0.0


def test_flat_callable():
    batch, scale = inputs()
    for tier in ("eager", "graph"):
        run = Staged(gradient, tier=tier).flat(batch, scale)
        value, found = run(batch["x"], batch["y"], scale)
        assert_same({"value": value, "gradient": found}, gradient(batch, scale), 1e-12)


def test_flat_callable_takes_the_tensors_alone():
    """None and numbers among the inputs keep their place."""
    x = torch.arange(3.0)
    for tier in ("eager", "graph"):
        run = Staged(lambda a, none, k, b: a * k + b, tier=tier).flat(x, None, 2, x)
        assert_same(run(x, 10 * x), [12 * x], 1e-6)


# Traps


def test_the_same_tensor_twice_is_not_merged():
    """Where support is query, later calls with two tensors must not read the first one twice."""
    staged = Staged(lambda a, b: a.sum() - 2 * b.sum(), tier="graph")
    one, two = torch.ones(3), torch.full((3,), 5.0)
    assert float(staged(one, one)) == -3.0
    assert float(staged(one, two)) == 3.0 - 30.0


def test_a_new_shape_is_traced_anew():
    """A batch of one row must not broadcast through a graph for five."""
    staged = Staged(gradient, tier="graph")
    for n in (5, 1, 5, 2):
        batch, scale = inputs(n)
        assert_same(staged(batch, scale), gradient(batch, scale), 1e-12)
    assert len(staged._plans) == 3


def test_other_dtypes_strides_and_settings_are_traced_anew():
    batch, scale = inputs(3)
    staged = Staged(lambda x, s, k: (x * s) ** k, tier="graph")
    for x in (batch["x"], batch["x"].float(), batch["x"].T):
        for power in (2, 3):
            assert_same(
                staged(x, scale.to(x.dtype), power), (x * scale.to(x.dtype)) ** power, 1e-12
            )
    assert len(staged._plans) == 6


def test_numbers_of_another_kind_are_traced_anew():
    """2 and 2.0 are equal, and give other dtypes."""
    counts = torch.tensor([1, 2, 3])
    staged = Staged(lambda x, k: x * k, tier="graph")
    for power in (2, 2.0, True, 2):
        found, expected = staged(counts, power), counts * power
        assert found.dtype == expected.dtype
        assert_same(found, expected, 0.0)


def test_calls_that_alternate():
    """The inputs of one call are recognised in the next; others in between are not mistaken."""
    batch, scale = inputs(4)
    staged = Staged(gradient, tier="graph", check_every=1)
    turned = {key: value.T.contiguous().T for key, value in batch.items()}
    gaps = {key: torch.stack([value, value], 1)[:, 0] for key, value in batch.items()}
    for given in (batch, batch, turned, gaps, gaps, batch, turned, gaps):
        assert_same(staged(given, scale), gradient(batch, scale), 1e-12)
    # Columns in memory are another graph; gaps are filled, so that rows with gaps are rows.
    assert len(staged._plans) == 2


def test_slices_with_gaps_in_memory():
    batch, scale = inputs(6)
    cut = {key: value[::2, 1:] for key, value in batch.items()}
    staged = Staged(gradient, tier="graph")
    assert_same(staged(cut, scale), gradient(cut, scale), 1e-12)


def test_a_draw_inside_is_refused():
    staged = Staged(lambda x: x + torch.randn_like(x), tier="graph")
    with pytest.raises(StagingError, match="Draw the noise outside"):
        staged(torch.zeros(3))


def test_a_branch_on_a_value_is_refused():
    def branching(x):
        return x * 2 if x.sum() > 0 else x

    with pytest.raises(StagingError, match=r"replace the branch by torch\.where") as caught:
        Staged(branching, tier="graph")(torch.ones(3))
    # The person's line, and none of torch's advice on settings of its own.
    line = branching.__code__.co_firstlineno + 1
    assert f"read from a tensor, in line {line}, branching" in str(caught.value)
    assert "tracing_mode" not in str(caught.value)


@pytest.mark.parametrize("how", ["auto", "sampler"])
def test_what_cannot_be_traced_runs_as_it_is_where_nobody_asked_for_more(how, monkeypatch):
    """Whether a fit survives must not depend on how long its first calls took."""

    def branching(x):
        return x * 2 if x.sum() > 0 else x

    x = torch.ones(3)
    if how == "auto":
        # Three calls that would be worth a compilation.
        monkeypatch.setattr(staging.Staged, "_target", lambda self, plan: "graph")
        staged = Staged(branching, tier="auto")
    else:
        staged = Staged(branching, tier="graph", falls_back=True)
    with pytest.warns(UserWarning, match="cannot be traced .* runs as it is") as warned:
        run = staged.flat(x)
    assert "branching" in str(warned[0].message)
    assert staged.tier == "eager"
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sign in (1.0, -1.0):
            assert_same(run(sign * x), [branching(sign * x)], 0.0)
            assert_same(staged(sign * x), branching(sign * x), 0.0)


def test_a_draw_and_a_frozen_number_stay_errors_under_auto(monkeypatch):
    monkeypatch.setattr(staging.Staged, "_target", lambda self, plan: "graph")
    with pytest.raises(StagingError, match="Draw the noise outside"):
        Staged(lambda x: x + torch.randn_like(x), tier="auto")(torch.zeros(3))
    calls = iter(range(100))
    with pytest.raises(StagingError, match="Python number changed"):
        Staged(lambda x: x * float(next(calls)), tier="auto", check_every=10)(torch.ones(3))


def test_errors_of_the_function_pass_through():
    def broken(x):
        raise staging.HbmetaError("broken", needed="a", found="b", do="c")

    with pytest.raises(staging.HbmetaError, match="broken: needed a; found b"):
        Staged(broken, tier="graph")(torch.ones(3))


def test_a_number_that_changes_after_tracing_is_caught():
    setting = {"scale": 2.0}
    staged = Staged(lambda x: x * setting["scale"], tier="graph", check_every=3)
    x = torch.ones(3)
    staged(x)
    setting["scale"] = 3.0
    assert float(staged(x)[0]) == 2.0  # frozen without a word, until the third call
    with pytest.raises(StagingError, match="Python number changed after tracing") as caught:
        staged(x)
    assert "difference of 0.333 at call 3" in str(caught.value)


def test_a_gradient_that_vanishes_is_judged_by_the_rounding_of_the_loss():
    """At an optimum, what is left of a gradient is the rounding of terms as large as the loss."""
    setting = {"left": 1e-17}
    staged = Staged(lambda x: (x, setting["left"] * x), tier="graph", check_every=1)
    staged(torch.ones(3, dtype=torch.float64))
    setting["left"] = 3e-17
    staged(torch.ones(3, dtype=torch.float64))
    setting["left"] = 1e-12
    with pytest.raises(StagingError, match="a difference of"):
        staged(torch.ones(3, dtype=torch.float64))


def test_a_result_that_cancels_is_judged_by_what_rounding_moves_it():
    """No other order of the same operations comes closer; a number that changes does not pass."""
    setting = {"shift": 3000.0, "scale": 1.0}

    def function(x):
        return setting["scale"] * ((x + setting["shift"]) - setting["shift"])

    staged = Staged(function, tier="graph", check_every=1)
    x = torch.linspace(0.1, 0.2, 9)
    staged(x)
    setting["shift"] = 3000.3  # the same function, other roundings
    assert float((function(x) - x).abs().max()) > 1e-4 * float(x.max())
    staged(x)
    setting["scale"] = 1.1
    with pytest.raises(StagingError, match="a difference of"):
        staged(x)


def test_the_first_call_is_checked():
    """A graph that reads a different number while it is traced than afterwards."""
    calls = iter(range(100))
    staged = Staged(lambda x: x * float(next(calls)), tier="graph", check_every=10)
    with pytest.raises(StagingError, match="at call 0"):
        staged(torch.ones(3))


# Climbing


def test_auto_stays_eager_for_few_calls():
    batch, scale = inputs()
    staged = Staged(gradient, tier="auto", expected_calls=20)
    for _ in range(20):
        staged(batch, scale)
    assert staged.tier == "eager"


def test_auto_climbs_for_many_calls(monkeypatch):
    """To the graph where a compilation would not pay, to the compiler where it would."""
    compiled = []
    monkeypatch.setattr(
        staging, "compile_graph", lambda graph, leaves, **_: compiled.append(1) or graph
    )
    batch, scale = inputs()

    def slow(batch, scale):
        for _ in range(200):
            batch["x"].sin()
        return gradient(batch, scale)

    for expected, tier in ((2_000, "graph"), (1_000_000, "compiled")):
        staged = Staged(slow, tier="auto", expected_calls=expected)
        monkeypatch.setattr(staging, "_SECONDS_TO_COMPILE", 30.0)
        for number in range(6):
            assert (staged.tier == "eager") == (number <= 3)
            assert_same(staged(batch, scale), gradient(batch, scale), 1e-12)
        assert staged.tier == tier
    assert compiled == [1]


def test_without_a_compiler_the_graph_runs_and_says_so_once(monkeypatch):
    monkeypatch.setattr(staging.shutil, "which", lambda name: None)
    staged = Staged(gradient, tier="compiled")
    batch, scale = inputs(4)
    with pytest.warns(UserWarning, match=r"No C\+\+ compiler was found"):
        found = staged(batch, scale)
    assert_same(found, gradient(batch, scale), 1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in (4, 5):
            batch, scale = inputs(n)
            assert_same(staged(batch, scale), gradient(batch, scale), 1e-12)
    assert staged.tier == "graph"


def test_a_compiler_is_found_where_there_is_one(monkeypatch):
    monkeypatch.setattr(
        staging.shutil, "which", lambda name: "/usr/bin/clang++" if name == "clang++" else None
    )
    assert compiler_available()


@pytest.mark.parametrize(
    ("argument", "tier"),
    [
        ("auto", "auto"),
        (True, "compiled"),
        (False, "eager"),
        ("graph", "graph"),
        ("eager", "eager"),
    ],
)
def test_tier_of(argument, tier):
    assert tier_of(argument) == tier


@pytest.mark.parametrize("argument", ["fast", None, 2])
def test_unknown_tiers_are_refused(argument):
    with pytest.raises(DataError, match="compile: needed True, False, 'auto'"):
        tier_of(argument)


@pytest.mark.parametrize("tier", ["graph", "compiled"])
def test_numbers_without_a_dtype_keep_that_of_the_data(tier):
    """A tensor that the program makes, and the logarithm of whole numbers, stay in float64."""
    counts = torch.tensor([1, 2, 5])

    def program(x):
        before = torch.get_default_dtype()
        torch.set_default_dtype(x.dtype)
        out = (
            (x @ torch.diag(torch.ones(3))).sum() + counts.log().sum() + torch.lgamma(counts).sum()
        )
        torch.set_default_dtype(before)
        return out

    x = torch.rand(3, dtype=torch.float64)
    assert abs(float(Staged(program, tier=tier)(x) - program(x))) < 1e-14
    assert torch.get_default_dtype() == torch.float32


# Programs that make tensors of their own


def correlated(x, y=None, *, task, n_tasks):
    """Non-centered intercepts and slopes with an LKJ prior, whose map indexes by a mask."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    sd = pyro.sample("sd", dist.HalfNormal(1.0).expand([2]).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(2, 2.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("task", n_tasks, dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    b = mean + z @ (sd.unsqueeze(-1) * factor).T
    with pyro.plate("point", x.shape[0], dim=-1):
        return pyro.sample("y", dist.Normal(b[task, 0] + b[task, 1] * x[:, 0], noise), obs=y)


def constants(family):
    def program(x, y=None, *, task, n_tasks):
        scale = pyro.sample("scale", dist.HalfNormal(torch.ones(2)).to_event(1))
        with pyro.plate("task", n_tasks, dim=-1):
            prior = dist.MultivariateNormal(torch.zeros(2), torch.diag(torch.ones(2)))
            z = pyro.sample("z", prior)
        eta = ((z * scale)[task] * torch.linspace(0.5, 1.0, 2)).sum(-1) + 0.1 * x[:, 0]
        with pyro.plate("point", x.shape[0], dim=-1):
            return pyro.sample("y", family(eta), obs=y)

    return program


FAMILIES = {
    "poisson": lambda eta: dist.Poisson(eta.exp()),
    "bernoulli": lambda eta: dist.Bernoulli(logits=eta),
}


def own_problem(program, y):
    n = len(y)
    x = torch.linspace(-1, 1, n, dtype=torch.float64)[:, None]
    tasks = Tasks.from_flat(x, y, torch.arange(n) % 4, 4)
    return tasks, Problem(program, tasks)


def log_density_of(problem, tasks, tier):
    """The log density that NUTS samples by a tier, and a point in whose place it is taken."""
    batch = problem.batch(tasks)
    theta = problem.theta(batch)
    run, _ = nuts.staged_log_density(problem, batch, theta, tier, 100)
    size = problem.sites.theta_size + tasks.n_tasks * problem.sites.phi_size
    point = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return run(point), nuts.log_density(problem, theta, point, batch)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_graph_of_a_program_that_makes_tensors(family, dtype):
    """Whole numbers as y too; `torch.zeros(2)` takes the dtype of the data in the graph."""
    y = torch.arange(13).remainder(2).to(dtype)
    tasks, problem = own_problem(constants(FAMILIES[family]), y)
    found, expected = log_density_of(problem, tasks, "graph")
    assert_same(list(found), list(expected), 1e-12)
    assert {tensor.dtype for tensor in found} == {torch.float64}


def test_constant_masks_become_positions():
    """Inductor cannot index by a bool mask; that of a lower triangle is the same at every call."""

    def lower(x, keep):
        below = torch.arange(3) < torch.arange(3).view(-1, 1)
        out = torch.zeros_like(x)
        out[..., below] = x[..., below] ** 2
        return out.sum(-1) + x[keep].sum()

    x = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keep = torch.tensor([True, False])
    graph, _ = staging.trace(lower, (x, keep))
    assert_same(graph(x, keep)[0], lower(x, keep), 1e-12)
    masks = [
        index
        for node in graph.graph.nodes
        if "index" in str(node.target)
        for index in node.args[1]
        if index is not None and index.op != "get_attr"
    ]
    # The mask that was given stays one.
    assert [mask.op for mask in masks] == ["placeholder"]


@pytest.mark.slow
def test_correlated_effects_are_compiled():
    y = torch.randn(17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tasks, problem = own_problem(correlated, y)
    found, expected = log_density_of(problem, tasks, "compiled")
    assert_same(list(found), list(expected), 1e-10)
    with warnings.catch_warnings():
        # So few draws are warned of; a compiler that gives up would be too.
        warnings.filterwarnings("ignore", message="NUTS:")
        strategy = nuts.NUTS(draws=20, warmup=30, chains=1, processes=1)
        fitted = strategy.fit(correlated, tasks, compile=True)
    assert fitted.density.phi.shape == (20, 4, 2)
    assert bool(torch.isfinite(fitted.info["log_density"]).all())
