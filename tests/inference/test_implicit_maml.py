"""Implicit gradients held against dense solves, finite differences and the bound on their error."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn
from torch.autograd.functional import hessian, jacobian

from hbmeta import models
from hbmeta.errors import ConvergenceError, CurvatureError, DataError, UnsupportedModelError
from hbmeta.inference import ImplicitMAML
from hbmeta.inference.proximal import Proximal
from hbmeta.loading import load, strategy_from_settings
from hbmeta.problem import Problem
from hbmeta.tasks import Episode, Sinusoids, Tasks
from hbmeta.training import Options, mean_over_queries

# Fits of a few steps end far from the modes of their tasks, which is not what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:.*near the mode of log p")

DOUBLE = torch.float64
HALF_LOG = 0.5 * math.log(2 * math.pi)
EXACT = ImplicitMAML(damping=2.0, tolerance=1e-12, steps=100)


def tensor(values):
    return torch.tensor(values, dtype=DOUBLE)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=DOUBLE)


# T4, and two more tasks of other curvatures: quadratic losses as factors. The first column of x
# tells support (0) from query (1), the second the task.

H_S = tensor([[[3, 1], [1, 2]], [[1, -0.5], [-0.5, 4]], [[0.2, 0.1], [0.1, 0.1]]])
C_S = tensor([[1, 0], [-1, 2], [0.5, 0.5]])
H_Q = tensor([[[1, 0], [0, 4]], [[2, 1], [1, 1]], [[1, 0.3], [0.3, 2]]])
C_Q = tensor([[0.5, 1.5], [0, -1], [3, 1]])
START = (0.2, -0.3)


def bowl(phi, H, c):
    away = phi - c
    return 0.5 * torch.einsum("...i,...ij,...j->...", away, H, away)


class Bowls(PyroModule):
    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(tensor(START))

    def forward(self, x, y=None):
        which = x[..., 1].long()
        with pyro.plate("task", x.shape[0], dim=-2):
            phi = pyro.sample("phi", dist.Normal(self.start, 1.0).to_event(1))
            with pyro.plate("point", x.shape[1], dim=-1):
                support, query = (
                    bowl(phi, H_S[which], C_S[which]),
                    bowl(phi, H_Q[which], C_Q[which]),
                )
                pyro.factor("loss", -torch.where(x[..., 0] > 0.5, query, support))
                return pyro.sample("y", dist.Normal(0.0, 1.0).expand(x.shape[:2]), obs=y)


def bowls() -> Episode:
    def rows(kind):
        x = tensor([[[kind, i]] for i in range(3)])
        return Tasks(x, torch.zeros(3, 1, dtype=DOUBLE))

    return Episode(rows(0.0), rows(1.0))


def set_up(program, episode):
    problem = Problem(program, episode.all)
    support, query = problem.batch(episode.support), problem.batch(episode.query)
    return problem, problem.theta(support), support, query


def by_loss(strategy, problem, theta, support, query):
    """Losses, and the gradient of their mean in θ, by autograd through `loss`."""
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    losses = strategy.loss(problem, leaves, None, support, query, {})
    found = torch.autograd.grad(
        mean_over_queries(losses, query), list(leaves.values()), allow_unused=True
    )
    return losses.detach(), dict(zip(leaves, found, strict=True))


def by_pieces(strategy, problem, theta, support, query, tier="eager"):
    pieces = strategy.meta_gradient(problem, None, Options(steps=3, tier=tier))
    loss, gradient = pieces(theta, {}, support, query, {})
    return loss, {name.removeprefix("theta/"): value for name, value in gradient.items()}, pieces


def test_the_numbers_of_the_reference():
    """T4: H_S = [[3, 1], [1, 2]], c_S = (1, 0), H_Q = diag(1, 4), c_Q = (.5, 1.5), λ = 2."""
    problem, theta, support, query = set_up(Bowls(), bowls())
    at = EXACT.posterior(problem, theta, None, support).loc
    np.testing.assert_allclose(at[0], [0.6947368421, -0.0736842105], atol=5e-11)
    losses, gradient = by_loss(EXACT, problem, theta, support, query)
    np.testing.assert_allclose(losses[0] - HALF_LOG, 4.9719252078, atol=5e-11)
    only = query.where(query.mask & (torch.arange(3) == 0).unsqueeze(1))
    found = by_loss(EXACT, problem, theta, support, only)[1]["start"]
    np.testing.assert_allclose(found, [0.744598338, -3.3335180055], atol=5e-10)
    # All tasks against the dense solve λ (H + λI)⁻¹ ∇L^Q.
    A = H_S + 2 * torch.eye(2, dtype=DOUBLE)
    wanted = torch.linalg.solve(A, (H_S @ C_S.unsqueeze(-1)).squeeze(-1) + 2 * tensor(START))
    torch.testing.assert_close(at, wanted, atol=1e-10, rtol=0)
    slope = (H_Q @ (wanted - C_Q).unsqueeze(-1)).squeeze(-1)
    dense = 2 * torch.linalg.solve(A, slope)
    torch.testing.assert_close(gradient["start"], dense.mean(0), atol=1e-8, rtol=0)
    loss, pieces, _ = by_pieces(EXACT, problem, theta, support, query)
    torch.testing.assert_close(loss, losses.mean())
    torch.testing.assert_close(pieces["start"], dense.mean(0), atol=1e-8, rtol=0)


def test_the_error_of_inexact_solves_is_within_its_bound():
    """s L_Q δ + s² (ρ/λ) G_Q δ + s c with ρ = 0, δ = r/(λ + μ), s = λ/(λ + μ), task by task."""
    problem, theta, support, query = set_up(Bowls(), bowls())
    exact = EXACT.posterior(problem, theta, None, support).loc
    A = H_S + 2 * torch.eye(2, dtype=DOUBLE)
    wanted = 2 * torch.linalg.solve(A, (H_Q @ (exact - C_Q).unsqueeze(-1)).squeeze(-1))
    mu = torch.linalg.eigvalsh(H_S)[:, 0]
    shrink = 2 / (2 + mu)
    errors = []
    for tolerance in (0.5, 0.3, 0.1):
        strategy = replace(EXACT, tolerance=tolerance)
        point = strategy.posterior(problem, theta, None, support).loc
        residual = (H_S @ (point - C_S).unsqueeze(-1)).squeeze(-1) + 2 * (point - tensor(START))
        first = (H_S @ (tensor(START) - C_S).unsqueeze(-1)).squeeze(-1).norm(dim=-1)
        assert (residual.norm(dim=-1) <= tolerance * first.clamp_min(1)).all()
        slope = (H_Q @ (point - C_Q).unsqueeze(-1)).squeeze(-1)
        for task in range(3):
            mine = query.where(query.mask & (torch.arange(3) == task).unsqueeze(1))
            found = by_loss(strategy, problem, theta, support, mine)[1]["start"]
            # λ v is the gradient in the start.
            left = (A[task] @ found / 2 - slope[task]).norm()
            assert left <= tolerance * slope[task].norm()
            bound = shrink[task] * (
                torch.linalg.eigvalsh(H_Q[task])[-1] * residual[task].norm() / (2 + mu[task]) + left
            )
            errors.append(float((found - wanted[task]).norm()))
            assert errors[-1] <= bound + 1e-12
    assert max(errors) > 1e-2  # there is something to bound


# A program that is not quadratic, with θ in the location and in the likelihood, two sites and
# ragged tasks.


class Bent(PyroModule):
    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(tensor([0.3, -0.5]))
        self.level = nn.Parameter(tensor(0.2))
        self.slope = nn.Parameter(tensor(0.7))
        self.bend = nn.Parameter(tensor(-0.1))

    def forward(self, x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            level = pyro.sample("level", dist.Normal(self.level * self.bend, 1.0))
            shape = pyro.sample("shape", dist.Normal(self.start, 1.0).to_event(1))
            with pyro.plate("point", x.shape[1], dim=-1):
                u = x[..., 0]
                inside = torch.tanh(self.slope * u + shape[..., 1])
                mean = level + shape[..., 0] * inside + self.bend * u**2
                return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def curves(counts=(4, 7, 5), queries=(6, 6, 6)) -> Episode:
    def rows(numbers, seed):
        task = torch.repeat_interleave(torch.arange(3), torch.tensor(numbers))
        x = 2 * normal(len(task), 1, seed=seed)
        y = torch.sin(x[:, 0] + task) + 0.1 * normal(len(task), seed=seed + 1)
        return Tasks.from_flat(x, y, task, 3, ids=["a", "b", "c"])

    return Episode(rows(counts, 0), rows(queries, 50))


THETA = ("start", "level", "slope", "bend")
SIZES = (2, 1, 1, 1)


def bent_loss(t, phi, x, y):
    """−log p(y | x, φ, θ) with φ = (level, shape) and θ one vector in the order of THETA."""
    mean = phi[0] + phi[1] * torch.tanh(t[3] * x + phi[2]) + t[4] * x**2
    return ((y - mean) ** 2 / (2 * 0.25)).sum() + len(y) * (HALF_LOG + math.log(0.5))


def bent_start(t):
    return torch.cat([(t[2] * t[4]).reshape(1), t[:2]])


def dense_task(t, support, query, damping, n, moves):
    """L^Q(φ*(θ), θ) of one task and its gradient, by dense Newton and dense linear algebra."""

    def whole(t, part):
        return bent_start(t).index_copy(0, torch.tensor(moves), part)

    def f(t, part):
        pull = 0.5 * damping * ((part - bent_start(t)[moves]) ** 2).sum()
        return bent_loss(t, whole(t, part), *support) / n + pull

    def loss(t, part):
        return bent_loss(t, whole(t, part), *query) / len(query[1])

    def gradient(t, part):
        return jacobian(lambda p: f(t, p), part, create_graph=True)

    def curvature(part):
        return hessian(lambda p: f(t, p), part)

    at = bent_start(t)[moves]
    for _ in range(100):
        H = curvature(at)
        lowest = torch.linalg.eigvalsh(H)[0]
        H = H + torch.eye(len(moves), dtype=DOUBLE) * (-1.5 * lowest).clamp_min(0)
        step, scale = torch.linalg.solve(H, gradient(t, at).detach()), 1.0
        while f(t, at - scale * step) > f(t, at) and scale > 1e-6:
            scale /= 2
        at = at - scale * step
    assert gradient(t, at).norm() < 1e-10
    v = torch.linalg.solve(curvature(at), jacobian(lambda p: loss(t, p), at))
    mixed = jacobian(lambda s: gradient(s, at), t)
    return loss(t, at), jacobian(lambda s: loss(s, at), t) - v @ mixed


def dense_meta_gradient(episode, theta, damping, reduction, moves=(0, 1, 2)):
    """Losses of all tasks, and the gradient of their mean by name; uses nothing of hbmeta."""
    t = torch.cat([theta[name].reshape(-1) for name in THETA])
    found = []
    for i in range(episode.support.n_tasks):
        support, query = (
            (part.flat_x[part.task == i][:, 0], part.flat_y[part.task == i])
            for part in (episode.support, episode.query)
        )
        n = max(len(support[1]), 1) if reduction == "mean" else 1
        found.append(dense_task(t, support, query, damping, n, list(moves)))
    gradient = torch.stack([g for _, g in found]).mean(0).split(SIZES)
    named = {n: g.reshape(theta[n].shape) for n, g in zip(THETA, gradient, strict=True)}
    return torch.stack([loss for loss, _ in found]), named


@pytest.mark.parametrize(
    ("reduction", "sites", "counts"),
    [
        ("mean", None, (4, 7, 5)),
        ("sum", None, (4, 7, 5)),
        ("mean", ("shape",), (4, 7, 5)),
        ("mean", ("level",), (4, 0, 5)),
        ("sum", None, (0, 3, 1)),
    ],
)
def test_equal_to_dense_algebra(reduction, sites, counts):
    """Several tasks, ragged and empty supports; θ in location and likelihood; some sites still."""
    episode = curves(counts)
    problem, theta, support, query = set_up(Bent(), episode)
    strategy = replace(EXACT, reduction=reduction, sites=sites)
    moves = {None: (0, 1, 2), ("shape",): (1, 2), ("level",): (0,)}[sites]
    losses, wanted = dense_meta_gradient(episode, theta, 2.0, reduction, moves)
    found, gradient = by_loss(strategy, problem, theta, support, query)
    torch.testing.assert_close(found, losses, atol=1e-10, rtol=0)
    loss, pieces, _ = by_pieces(strategy, problem, theta, support, query)
    torch.testing.assert_close(loss, losses.mean(), atol=1e-10, rtol=0)
    for name in THETA:
        torch.testing.assert_close(gradient[name], wanted[name], atol=1e-8, rtol=0)
        torch.testing.assert_close(pieces[name], wanted[name], atol=1e-8, rtol=0)
    # Sites that do not move, and tasks without support, are where they start.
    start = problem.location(theta, support)
    at = strategy.posterior(problem, theta, None, support).loc
    still = [j for j in range(3) if j not in moves]
    torch.testing.assert_close(at[:, still], start[:, still])
    for i, n in enumerate(counts):
        assert bool((at[i] == start[i]).all()) == (n == 0)


def test_equal_to_finite_differences_of_the_whole_map():
    """θ ↦ mean L^Q(φ*(θ), θ), by central differences of the loss."""
    problem, theta, support, query = set_up(Bent(), curves())
    _, gradient, _ = by_pieces(EXACT, problem, theta, support, query)
    h = 1e-5
    for name, value in theta.items():
        flat = value.reshape(-1)
        for j in range(flat.numel()):
            ends = []
            for sign in (1, -1):
                moved = flat.clone()
                moved[j] += sign * h
                there = {**theta, name: moved.reshape(value.shape)}
                losses = EXACT.loss(problem, there, None, support, query, {})
                ends.append(float(mean_over_queries(losses, query)))
            by_difference = (ends[0] - ends[1]) / (2 * h)
            assert abs(by_difference - float(gradient[name].reshape(-1)[j])) < 1e-8


def test_staged_pieces_give_what_the_functions_give():
    problem, theta, support, query = set_up(Bent(), curves())
    loss, wanted, _ = by_pieces(EXACT, problem, theta, support, query)
    pieces = EXACT.meta_gradient(problem, None, Options(steps=3, tier="graph"))
    for _ in range(2):
        found, gradient = pieces(theta, {}, support, query, {})
        torch.testing.assert_close(found, loss)
        for name, value in wanted.items():
            torch.testing.assert_close(gradient[f"theta/{name}"], value, atol=1e-9, rtol=1e-9)
    assert pieces.tier == "graph"
    assert pieces.seconds_staging > 0
    assert pieces.finish()["implicit"]["steps"] == 2


def test_tasks_without_a_query_do_not_count():
    episode = curves(queries=(6, 0, 6))
    problem, theta, support, query = set_up(Bent(), episode)
    two = Episode(episode.support.select(["a", "c"]), episode.query.select(["a", "c"]))
    _, wanted = dense_meta_gradient(two, theta, 2.0, "mean")
    _, gradient, pieces = by_pieces(EXACT, problem, theta, support, query)
    torch.testing.assert_close(gradient["slope"], wanted["slope"], atol=1e-8, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pieces.finish()["implicit"]["left_out"] == 0


# Negative curvature: φ² + xφ ~ y from φ_0 = 0. The support, at x = 0, has no slope there and
# curvature −2y; the query, at x = 1, has a slope.


class Squares(PyroModule):
    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(tensor(0.0))

    def forward(self, x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            phi = pyro.sample("phi", dist.Normal(self.start, 1.0))
            with pyro.plate("point", x.shape[1], dim=-1):
                return pyro.sample("y", dist.Normal(phi**2 + x[..., 0] * phi, 1.0), obs=y)


def saddles(*levels) -> Episode:
    x = torch.zeros(len(levels), 1, 1, dtype=DOUBLE)
    ids = ["up", "down", "out"][: len(levels)]
    y = tensor(levels).unsqueeze(1)
    return Episode(Tasks(x, y, ids=ids), Tasks(x + 1, y + 2, ids=ids))


def test_tasks_of_negative_curvature_are_left_out_and_counted():
    strategy = ImplicitMAML(damping=2.0)
    problem, theta, support, query = set_up(Squares(), saddles(3.0, -1.0))
    _, gradient, pieces = by_pieces(strategy, problem, theta, support, query)
    # Task "down" alone, counted among two: ∂L^Q/∂φ = −y_Q x = −1 and λ/(λ − 2y) = 1/2.
    assert float(gradient["start"]) == pytest.approx(-0.25, abs=1e-12)
    with pytest.warns(UserWarning, match=r"1 of 2 \(step, task\) pairs, in 1 of 1 steps.*damping"):
        counts = pieces.finish()["implicit"]
    assert (counts["left_out"], counts["steps_left_out"], counts["tasks"]) == (1, 1, 2)
    losses, by_autograd = by_loss(strategy, problem, theta, support, query)
    torch.testing.assert_close(losses, 0.5 * tensor([25.0, 1.0]) + HALF_LOG)
    assert float(by_autograd["start"]) == pytest.approx(-0.25, abs=1e-12)
    # With more than 2 · 3 of damping it is a minimum: the mean of −5 · 6.5/0.5 and −6.5/8.5.
    _, gradient, pieces = by_pieces(ImplicitMAML(damping=6.5), problem, theta, support, query)
    assert float(gradient["start"]) == pytest.approx(-0.5 * (65 + 6.5 / 8.5), rel=1e-9)
    assert pieces.finish()["implicit"]["left_out"] == 0


def test_negative_curvature_of_all_tasks_raises():
    problem, theta, support, query = set_up(Squares(), saddles(3.0, 2.0))
    for ask in (by_pieces, by_loss):
        with pytest.raises(CurvatureError, match=r"damping above 4,.*Raise damping"):
            ask(ImplicitMAML(damping=2.0), problem, theta, support, query)


def still(strategy, program, data):
    """A fit that leaves θ where it starts."""
    return strategy.fit(program, data, steps=1, learning_rate=0.0, compile=False)


def test_adapting_names_tasks_of_negative_curvature():
    fitted = still(ImplicitMAML(damping=2.0), Squares(), saddles(-1.0, -2.0))
    with pytest.warns(UserWarning, match=r"not positive for 1 of 2 tasks \('up'\)"):
        posterior = fitted.adapt(saddles(3.0, -1.0).support)
    assert posterior.info["met"].all()
    fitted.adapt(saddles(-3.0, -1.0).support)  # without a warning


def test_adapting_names_tasks_whose_tolerance_was_not_met():
    fitted = still(EXACT, Bent(), curves())
    support = curves((4, 0, 5)).support
    with pytest.warns(UserWarning, match=r"2 of 3 tasks \('a', 'c'\) \(gradient norm up to"):
        posterior = fitted.adapt(support, steps=1)
    assert posterior.info["met"].tolist() == [False, True, False]
    assert posterior.info["residual"][1] == 0
    posterior = fitted.adapt(support)
    assert posterior.info["met"].all()
    assert (posterior.info["residual"] < 1e-11).all()
    problem, theta, rows, query = set_up(Bent(), curves())
    pieces = by_pieces(replace(EXACT, steps=1), problem, theta, rows, query)[2]
    with pytest.warns(UserWarning, match=r"3 of 3 \(step, task\) pairs ended above"):
        counts = pieces.finish()["implicit"]
    assert counts["tolerance_missed"] == 3
    assert counts["largest_residual"] > 1e-3


def test_kinks_of_a_relu_network_are_reported():
    """At a minimum in a kink no gradient vanishes; the loss is no higher than where it started."""
    episode = Sinusoids(shots=6, queries=6, dtype=DOUBLE).sample(4, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the one step of training
        fitted = still(ImplicitMAML(), models.NeuralRegression((8, 8)), episode)
    with pytest.warns(UserWarning, match=r"ReLU") as caught:
        posterior = fitted.adapt(episode.support, tolerance=1e-8)
    assert any("inner solver ended above" in str(w.message) for w in caught)
    met, residual = posterior.info["met"], posterior.info["residual"]
    assert not met.all()
    assert torch.isfinite(residual).all()
    assert (residual[~met] > 1e-8).all()
    problem, batch = fitted.problem, fitted.problem.batch(episode.support)
    start = problem.location(fitted.theta, batch)
    before = problem.log_likelihood(fitted.theta, start, batch)
    assert (problem.log_likelihood(fitted.theta, posterior.density.loc, batch) > before).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_a_network(dtype, tmp_path):
    """The loss falls, the counts are recorded, and a file gives the fit back."""
    tasks = Sinusoids(shots=5, queries=5, amplitude=(0.5, 1.0)).sample(4, seed=0)
    tasks = Episode(tasks.support.to(dtype=dtype), tasks.query.to(dtype=dtype))
    strategy = ImplicitMAML(damping=1.0, steps=5, tolerance=0.1, sites=("layer1", "layer2"))
    model = models.NeuralRegression((6,), activation="tanh")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # bfloat16 does not reach the tolerance
        fitted = strategy.fit(model, tasks, steps=12, learning_rate=0.02, compile=False)
        fitted.save(tmp_path / "fit")
        assert load(tmp_path / "fit").strategy == strategy
        posterior = fitted.adapt(tasks.support)
    assert torch.isfinite(posterior.density.loc).all()
    history = fitted.history
    assert np.mean(history[-3:]) < np.mean(history[:3])
    counts = fitted.info["implicit"]
    assert (counts["steps"], counts["tasks"]) == (12, 48)
    assert counts["gradients"] >= 24
    assert counts["hessian_vector_products"] >= 12
    assert counts["adjoint_products"] >= 12
    if dtype == torch.float32:
        assert counts["largest_adjoint_residual"] <= 0.1


def test_sites_that_the_program_does_not_have_are_refused():
    problem, *_ = set_up(Bent(), curves())
    with pytest.raises(UnsupportedModelError, match=r"level, shape; found 'shapes'"):
        ImplicitMAML(sites=("shapes",)).check(problem)


def test_vectors_of_the_sites_that_move():
    problem, theta, support, _ = set_up(
        models.NeuralRegression((4, 4)).bind(curves().all), curves()
    )
    proximal = Proximal(problem, ("layer3.weight", "layer3.bias"), 1.0, "mean")
    centre, rest = proximal.start(theta, support)
    assert centre.shape == (3, 5)
    assert set(rest) == {f"layer{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    parts = proximal.by_site(centre)
    assert {n: tuple(v.shape) for n, v in parts.items()} == {
        "layer3.weight": (3, 1, 4),
        "layer3.bias": (3, 1),
    }
    torch.testing.assert_close(proximal.vector(parts), centre)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"damping": 0.0}, "damping=0.0"),
        ({"damping": math.inf}, "damping=inf"),
        ({"tolerance": -1e-3}, "tolerance=-0.001"),
        ({"tolerance": True}, "tolerance=True"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.0}, r"steps=2\.0"),
        ({"reduction": "max"}, "'max'"),
    ],
)
def test_settings_out_of_their_range_are_refused(settings, named):
    with pytest.raises(DataError, match=named):
        ImplicitMAML(**settings)


def test_settings_survive_a_file():
    strategy = ImplicitMAML(damping=0.5, sites=("shape",))
    again = strategy_from_settings("ImplicitMAML", {**strategy.settings(), "sites": ["shape"]})
    assert again == strategy
    assert hash(again) == hash(strategy)
    assert ImplicitMAML(sites="shape").sites == ("shape",)  # type: ignore[arg-type]


def test_what_is_not_finite_raises():
    problem, theta, support, query = set_up(Bent(), curves())
    broken = {**theta, "slope": tensor(math.nan)}
    with pytest.raises(ConvergenceError, match=r"ImplicitMAML\.fit.*3 of 3 tasks at step 0"):
        by_pieces(EXACT, problem, broken, support, query)
    with pytest.raises(ConvergenceError, match="3 of 3 tasks"):
        by_loss(EXACT, problem, broken, support, query)
    fitted = still(EXACT, Bent(), curves())
    huge = Tasks([tensor([[0.0]])], [tensor([1e200])], ids=["far"])
    with pytest.raises(ConvergenceError, match=r"adapt.*'far'"):
        fitted.adapt(huge)
