import copy
import json
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import hbmeta as hb
from hbmeta.densities import Delta, Empirical, Gaussian
from hbmeta.errors import DataError, ProgramError, UnsupportedModelError
from hbmeta.inference import MAML, NUTS, AmortizedGuide, CompletePooling, LatentNP, NoPooling
from hbmeta.models import ClassConditional, NeuralClassifier, NeuralRegression
from hbmeta.models.batch_norm import TaskBatchNorm, row_weights, with_rows
from hbmeta.posterior import TaskPosterior
from hbmeta.problem import Problem
from hbmeta.program import layouts
from hbmeta.tasks import Episode, Tasks

COUNTS = (6, 4, 3, 2, 1, 0)
"""Support rows; the last two tasks have too few for a variance."""


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def stored(norm, seed=5):
    """The layer with running statistics and parameters of its own."""
    n = norm.num_features
    with torch.no_grad():
        if norm.running_mean is not None:
            norm.running_mean.copy_(draw(n, seed=seed))
            norm.running_var.copy_(draw(n, seed=seed + 1).exp())
        if norm.affine:
            norm.weight.copy_(draw(n, seed=seed + 2))
            norm.bias.copy_(draw(n, seed=seed + 3))
    return norm


def network(inputs=1, outputs=1, **options):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Linear(inputs, 4), stored(nn.BatchNorm1d(4, **options)), nn.Tanh(),
            nn.Linear(4, outputs),
        )  # fmt: skip


def image_network():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 2, 2), stored(nn.BatchNorm2d(2)), nn.ReLU(),
            nn.Flatten(), nn.Linear(8, 3),
        )  # fmt: skip


def ragged(counts, seed, features=1, classes=0):
    task = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    x = draw(len(task), features, seed=seed)
    y = torch.sin(2 * x.sum(-1))
    return Tasks.from_flat(x, (y * classes).long().clamp_min(0) if classes else y, task, 6)


def episode(**options):
    return Episode(ragged(COUNTS, 0, **options), ragged((3, 2, 4, 3, 3, 2), 1, **options))


def normal(h, rows, norm, weight=None, bias=None):
    """h with the statistics of some rows, or the stored ones; by torch's own function where it can.

    In training mode that knows only rows that are their own statistics, and no gradient of others.
    """
    f = torch.nn.functional.batch_norm
    others = [0, *range(2, h.dim())]
    if rows is h and rows.shape[0] * rows.shape[2:].numel() >= 2:
        return f(h, None, None, weight, bias, training=True, eps=norm.eps)
    if rows is None or rows.shape[0] * rows.shape[2:].numel() < 2:
        empty = norm.running_mean is None
        mean = torch.zeros(h.shape[1]) if empty else norm.running_mean
        variance = torch.ones(h.shape[1]) if empty else norm.running_var
    else:
        mean, variance = rows.mean(others), rows.var(others, unbiased=False)
        if rows.requires_grad:
            shape = (-1, *(1,) * (h.dim() - 2))
            mean, scale = mean.reshape(shape), (variance + norm.eps).rsqrt().reshape(shape)
            gamma, beta = (v.reshape(shape) for v in (weight, bias))
            return (h - mean) * scale * gamma + beta
    return f(h, mean.to(h), variance.to(h), weight, bias, training=False, eps=norm.eps)


def by_hand(net, weights, rows, seen):
    """One task's outputs, layer by layer in plain torch; `seen` (rows of x) or None: stored."""
    for number, layer in enumerate(net):
        own = {n: weights[f"{number}.{n}"] for n, _ in layer.named_parameters()}
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            both = [
                None if h is None else normal(h, seen, layer, own.get("weight"), own.get("bias"))
                for h in (rows, seen)
            ]
            rows, seen = both[1] if rows is seen else both[0], both[1]
            continue
        both = [
            None if h is None else torch.func.functional_call(layer, own, (h,))
            for h in (rows, seen)
        ]
        rows, seen = both[1] if rows is seen else both[0], both[1]
    return rows


def rows_of(tasks, i):
    return tasks.flat_x[tasks.task == i]


# The layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("kind", "positions"),
    [
        (nn.BatchNorm1d, ()),
        (nn.BatchNorm1d, (4,)),
        (nn.BatchNorm2d, (3, 2)),
        (nn.BatchNorm3d, (2, 1, 2)),
    ],
)
def test_statistics_of_rows_are_those_of_torch_in_training(kind, positions, affine, dtype):
    """Rows with weight 0 and further rows leave no trace; bfloat16 keeps 8 bits."""
    norm = stored(kind(3, affine=affine, eps=1e-3)).to(dtype)
    h = 1.0 + 3.0 * draw(7, 3, *positions, seed=1).to(dtype)
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0]).to(dtype)
    kept = [0, 2, 3]
    layer = with_rows(norm)
    assert isinstance(layer, TaskBatchNorm)
    found = torch.func.functional_call(layer, {"rows": weight}, (h,))
    assert found.dtype == dtype
    same = {"rtol": 1e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found[kept], copy.deepcopy(norm).train()(h[kept]), **same)
    others = normal(h[5:].double(), h[kept].double(), norm, *_parameters(norm))
    torch.testing.assert_close(found[5:], others.to(dtype), **same)


def _parameters(norm):
    return (norm.weight.double(), norm.bias.double()) if norm.affine else (None, None)


@pytest.mark.parametrize("track", [True, False])
def test_without_rows_the_stored_statistics_stand(track):
    norm = stored(nn.BatchNorm1d(3, track_running_stats=track, dtype=torch.float64))
    layer, h = with_rows(norm), draw(5, 3)
    expected = (
        copy.deepcopy(norm).eval()(h) if track else normal(h, None, norm, norm.weight, norm.bias)
    )
    torch.testing.assert_close(layer(h), expected)
    # One row has no variance: not a division by zero, nor by the root of eps.
    for weight in ([0.0, 0.0], [0.0, 1.0]):
        one = torch.func.functional_call(layer, {"rows": torch.tensor(weight)}, (h,))
        torch.testing.assert_close(one, layer(h))


def test_positions_of_one_row_are_enough():
    norm, h = stored(nn.BatchNorm2d(3)).double(), draw(2, 3, 2, 2)
    given = {"rows": torch.ones(1)}
    found = torch.func.functional_call(with_rows(norm), given, (h,))
    torch.testing.assert_close(found[:1], norm.train()(h[:1]))


def test_two_derivatives():
    layer = with_rows(stored(nn.BatchNorm1d(2)).double())
    for weight in ([1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]):

        def output(h, gamma, beta, weight=weight):
            given = {"rows": torch.tensor(weight), "weight": gamma, "bias": beta}
            return torch.func.functional_call(layer, given, (h,))

        leaves = [v.requires_grad_() for v in (draw(5, 2), draw(2, seed=1), draw(2, seed=2))]
        assert torch.autograd.gradcheck(output, leaves)
        assert torch.autograd.gradgradcheck(output, leaves)


def test_equal_rows_have_finite_gradients():
    h = torch.ones(4, 2, dtype=torch.float64, requires_grad=True)
    layer = with_rows(nn.BatchNorm1d(2)).double()
    found = torch.func.functional_call(layer, {"rows": torch.ones(3)}, (h,))
    (gradient,) = torch.autograd.grad(found.square().sum(), h)
    assert bool(torch.isfinite(gradient).all())


def test_every_place_of_a_layer_is_found_and_the_network_is_copied():
    norm = nn.BatchNorm1d(2)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.again = norm, nn.Sequential(nn.ReLU(), norm), norm

        def forward(self, x):
            return self.again(self.inner(self.first(x)))

    given = Twice()
    found = with_rows(given)
    assert found.first is found.again is found.inner[1]
    assert given.first is norm
    assert [n for n, _ in found.named_parameters()] == [n for n, _ in given.named_parameters()]
    (name,) = row_weights(found)
    h = draw(5, 2, dtype=torch.float32)
    seen = torch.func.functional_call(found, {name: torch.ones(5)}, (h,))
    torch.testing.assert_close(seen, given.train()(h))


def test_inputs_of_another_shape_are_refused_as_by_torch():
    with pytest.raises(ValueError, match="4 dimensions with 3 channels"):
        with_rows(nn.BatchNorm2d(3))(torch.zeros(2, 3, 4))


# The model


@pytest.mark.parametrize("policy", ["support", "stored", "query"])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}])
def test_densities_are_those_of_a_loop_in_plain_torch(policy, options):
    if policy == "stored" and options == {"track_running_stats": False}:
        return
    net, data = network(**options).double(), episode()
    model = NeuralRegression(network=net, noise=0.4, batch_norm=policy)
    problem = Problem(model.bind(data.all), data.all)
    support, query = problem.batch(data.support), problem.batch(data.query)
    theta = problem.theta(support)
    phi = draw(6, problem.sites.phi_size)
    by_site = problem.sites.from_vector(phi)
    found = problem.log_likelihood(theta, phi, support)
    predicted = problem.log_predictive(theta, phi, support, query)
    for i in range(6):
        weights = {name: value[i] for name, value in by_site.items()}
        x_s, x_q = rows_of(data.support, i), rows_of(data.query, i)
        seen = {"support": (x_s, x_s), "stored": (None, None), "query": (x_s, x_q)}[policy]
        for rows, whose, tasks, total in zip(
            (x_s, x_q), seen, (data.support, data.query), (found, predicted), strict=True
        ):
            mean = by_hand(net, weights, rows, whose)[:, 0].detach()
            y = tasks.flat_y[tasks.task == i]
            expected = stats.norm.logpdf(y, mean, 0.4).sum()
            assert float(total[i]) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_images():
    data, net = episode(features=9, classes=3), image_network().double()
    model = NeuralClassifier(3, network=net)
    problem = Problem(model.bind(data.all), data.all)
    phi = draw(6, problem.sites.phi_size)
    by_site = problem.sites.from_vector(phi)
    found = TaskPosterior(problem, problem.theta(problem.one_row()), Delta(phi), data.support)
    probabilities = found.predict(data.query).probabilities
    for i in range(6):
        weights = {name: value[i] for name, value in by_site.items()}
        logits = by_hand(net, weights, rows_of(data.query, i), rows_of(data.support, i))
        count = len(logits)
        torch.testing.assert_close(probabilities[i, :count], logits.softmax(-1).detach())


def densities(size):
    draws = draw(5, 6, size, seed=4)
    return [Delta(draws[0]), Gaussian(draws[0], draws[1].exp()), Empirical(draws)]


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("policy", ["support", "stored", "query"])
def test_rows_of_the_query_are_strangers_unless_asked_for(policy, deep, kind):
    """One row of the query moves: bit by bit the others stay, and the support always does.

    Without a hidden layer the Gaussian's predictive is exact, which is a path of its own.
    """
    data = episode()
    net = (
        network()
        if deep
        else nn.Sequential(stored(nn.BatchNorm1d(1, affine=False)), nn.Linear(1, 1))
    )
    model = NeuralRegression(network=net.double(), noise=0.4, batch_norm=policy)
    problem = Problem(model.bind(data.all), data.all)
    density = densities(problem.sites.phi_size)[kind]
    theta = problem.theta(problem.one_row())
    posterior = TaskPosterior(problem, theta, density, data.support)
    x = data.query.flat_x.clone()
    moved = [0, 5]  # the first row of the first and of the third task
    x[moved] += 1.0
    other = Tasks.from_flat(x, data.query.flat_y, data.query.task, 6)
    first, second = (posterior.predict(q, draws=7) for q in (data.query, other))
    if kind == 1 and not deep:
        assert first.n_draws == 1
    stay = torch.ones(len(x), dtype=torch.bool)
    stay[moved] = False
    same = [
        torch.equal(data.query.unpad(a)[stay], data.query.unpad(b)[stay])
        for a, b in (
            (first.mean, second.mean),
            (first.log_prob(data.query.y), second.log_prob(data.query.y)),
        )
    ]
    assert same == [policy != "query"] * 2
    assert not torch.equal(first.mean, second.mean)
    untouched_tasks = [1, 3, 4, 5]
    joint = [p.log_prob(data.query.y, joint=True)[untouched_tasks] for p in (first, second)]
    assert torch.equal(*joint)


def test_padding_does_not_count():
    """The same tasks beside a longer one, and rows in another order."""
    data = episode()
    problem = Problem(NeuralRegression(network=network()).bind(data.all), data.all)
    phi, theta = draw(6, problem.sites.phi_size), problem.theta(problem.one_row())
    alone = []
    for i in range(6):
        s, q = (problem.batch(part[[i]]) for part in (data.support, data.query))
        alone.append(problem.log_predictive(theta, phi[[i]], s, q))
    s, q = problem.batch(data.support), problem.batch(data.query)
    together = problem.log_predictive(theta, phi, s, q)
    torch.testing.assert_close(together, torch.cat(alone))


def test_a_batch_by_hand_is_its_own_context():
    data = ragged((3, 3, 3, 3, 3, 3), 0)
    model = NeuralRegression(network=network(), noise=0.4).bind(data)
    assert model(data.x).shape == (6, 3)
    assert layouts(model) == ("nested",)


# Strategies


def maml_by_hand(net, theta, data, steps, rate):
    """Losses of the tasks after gradient steps, one task after the other."""
    losses = []
    for i in range(6):
        weights = {name.removeprefix("mean."): value for name, value in theta.items()}
        x_s, x_q = rows_of(data.support, i), rows_of(data.query, i)
        y_s, y_q = (t.flat_y[t.task == i] for t in (data.support, data.query))
        for _ in range(steps if len(x_s) else 0):
            error = (by_hand(net, weights, x_s, x_s)[:, 0] - y_s).square().mean()
            gradients = torch.autograd.grad(error, list(weights.values()), create_graph=True)
            weights = {
                name: value - rate * gradient
                for (name, value), gradient in zip(weights.items(), gradients, strict=True)
            }
        losses.append((by_hand(net, weights, x_q, x_s)[:, 0] - y_q).square().mean())
    return torch.stack(losses) + 0.5 * np.log(np.pi)


def test_maml_is_the_algorithm_of_the_paper():
    net, data = network().double(), episode()
    problem = Problem(NeuralRegression(network=net).bind(data.all), data.all)
    theta = {k: v.requires_grad_() for k, v in problem.theta(problem.one_row()).items()}
    batches = problem.batch(data.support), problem.batch(data.query)
    found = MAML(steps=3, step_size=0.1).loss(problem, theta, None, *batches, {})
    expected = maml_by_hand(net, theta, data, 3, 0.1)
    torch.testing.assert_close(found, expected)
    values = list(theta.values())
    ours, by_loop = (torch.autograd.grad(v.sum(), values) for v in (found, expected))
    for one, other in zip(ours, by_loop, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("policy", ["support", "stored", "query"])
def test_maml_trains_on_ragged_tasks_with_and_without_a_graph(policy, untouched):
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    data = Episode(ragged((6, 5, 4, 3, 7, 4), 2), ragged((3, 2, 4, 3, 3, 2), 1))
    with untouched():
        eager, graph = (
            MAML(steps=1, step_size=0.02).fit(
                NeuralRegression(network=net, batch_norm=policy), data,
                steps=25, learning_rate=2e-2, compile=how, progress=False,
            )
            for how in (False, "graph")
        )  # fmt: skip
    assert graph.info["tier"] == "graph"
    np.testing.assert_allclose(eager.history, graph.history, rtol=1e-6)
    assert np.mean(eager.history[-5:]) < np.mean(eager.history[:5])
    # Nothing of the network that was given has moved, nor the statistics that were stored in it.
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    layer = eager.problem.program.template[0][1]
    assert torch.equal(layer.stored_mean.float(), net[1].running_mean)


def test_maml_trains_on_supports_of_any_size():
    """Supports drawn anew at each step, some of them of one row or none."""
    first, second = (
        MAML(steps=1, step_size=0.02).fit(
            NeuralRegression(network=network()), ragged((9, 5, 3, 2, 7, 4), 2),
            steps=5, compile=how, progress=False,
        )
        for how in (False, "graph")
    )  # fmt: skip
    np.testing.assert_allclose(first.history, second.history, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maml_trains_in_lower_precision(dtype):
    data = ragged((9, 5, 3, 2, 7, 4), 2).to(dtype=dtype)
    fitted = MAML(steps=1, step_size=0.02).fit(
        NeuralRegression(network=network()), data, steps=3, compile=False, progress=False
    )
    assert np.isfinite(fitted.history).all()


@pytest.mark.parametrize(
    "strategy",
    [
        NUTS(draws=3, warmup=3, chains=1, max_tree_depth=2, processes=1),
        AmortizedGuide(hidden=8),
        LatentNP(hidden=8),
        CompletePooling(),
        NoPooling(iterations=5),
    ],
)
@pytest.mark.parametrize("policy", ["support", "query"])
def test_other_strategies_take_batch_norm(strategy, policy):
    data = episode()
    model = NeuralRegression(
        network=nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Linear(2, 1)),
        mean="zero", noise=0.5, batch_norm=policy,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of runs that are much too short
        fitted = strategy.fit(model, data.all, steps=3, compile=False, progress=False)
        predictive = fitted.adapt(data.support).predict(data.query, draws=5)
    assert bool(torch.isfinite(predictive.log_prob(data.query.y)).all())


# Results


def fit(policy="support", net=None, **options):
    model = NeuralRegression(network=network() if net is None else net, batch_norm=policy)
    return MAML(steps=1).fit(
        model, episode().support, steps=2, compile=False, progress=False, **options
    )


def test_a_comparison_says_which_rows_were_looked_at():
    fits = {policy: fit(policy) for policy in ("support", "stored", "query")}
    fits["none"] = MAML(steps=1).fit(
        NeuralRegression((3,)), episode().support, steps=2, compile=False, progress=False
    )
    found = hb.compare(fits, episode(), draws=5)
    notes = [note for note in found.notes if "batch norm" in note]
    assert len(notes) == 1
    assert notes[0].startswith("query: batch norm: query statistics (transductive)")
    assert notes[0] in str(found).replace("\n  ", " ")
    again = type(found).from_json(found.to_json())
    assert [row.batch_norm for row in again.rows] == ["support", "stored", "query", None]
    assert [row["batch_norm"] for row in json.loads(found.to_json())["rows"]] == [
        row.batch_norm for row in found.rows
    ]
    assert found.to_frame()["batch_norm"].tolist()[:3] == ["support", "stored", "query"]


def test_saved_fits_keep_the_policy(tmp_path):
    fitted = fit("query")
    fitted.save(tmp_path / "fit")

    def load(policy, net):
        model = NeuralRegression(network=net, batch_norm=policy)
        return hb.load(tmp_path / "fit", model=model)

    again = load("query", network())
    data = episode()
    first, second = (f.adapt(data.support).predict(data.query).mean for f in (fitted, again))
    assert torch.equal(first, second)
    assert again.model.settings()["batch_norm"] == "query"
    with pytest.raises(UnsupportedModelError, match="batch_norm"):
        load("support", network())
    other = network()
    other[1].running_mean += 1.0
    with pytest.raises(UnsupportedModelError, match="stored statistics"):
        load("query", other)


def test_the_policy_is_no_setting_without_batch_norm():
    assert "batch_norm" not in NeuralRegression().settings()
    assert NeuralRegression(network=network()).settings()["batch_norm"] == "support"


# What is refused


class Folding(nn.Module):
    """Batch norm over rows and positions in one dimension."""

    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(1), nn.Linear(2, 1)

    def forward(self, x):
        return self.last(self.norm(x.reshape(-1, 1)).reshape(-1, 2))


class Own(nn.BatchNorm1d):
    pass


def sequence(layer):
    return nn.Sequential(nn.Linear(1, 2), layer, nn.Linear(2, 1))


@pytest.mark.parametrize(
    ("net", "policy", "words"),
    [
        (network(), "batch", ["'support', 'stored' or 'query'", "'batch'"]),
        (sequence(nn.LayerNorm(2)), "query", ["'query'", "a network without"]),
        (None, "stored", ["'stored'", "no network"]),
        (network(track_running_stats=False), "stored", ["'1'", "track_running_stats=False"]),
        (sequence(nn.SyncBatchNorm(2)), "support", ["SyncBatchNorm", "'1'"]),
        (sequence(Own(2)), "support", ["Own", "'1'"]),
        (sequence(nn.InstanceNorm1d(2, track_running_stats=True)), "support", ["InstanceNorm1d"]),
    ],
)
def test_impossible_arguments(net, policy, words):
    with pytest.raises((DataError, ProgramError)) as caught:
        NeuralRegression(network=net, batch_norm=policy)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_batch_norm_of_folded_rows_is_refused_where_rows_are_counted():
    data = ragged((3, 3, 3, 3, 3, 3), 0, features=2)
    with pytest.raises(ProgramError, match="rows of x as its first dimension"):
        NeuralRegression(network=Folding()).bind(data)
    stored_statistics = NeuralRegression(network=Folding(), batch_norm="stored").bind(data)
    assert stored_statistics(data.x).shape == (6, 3)


@pytest.mark.parametrize("policy", ["support", "stored", "query"])
def test_networks_that_mix_rows_besides_are_refused(policy):
    class Mixing(nn.Linear):
        def forward(self, x):
            return super().forward(x) - x.mean(0, keepdim=True)

    net = nn.Sequential(nn.BatchNorm1d(1), Mixing(1, 1))
    with pytest.raises(ProgramError, match="another value for a row alone"):
        NeuralRegression(network=net, batch_norm=policy).bind(ragged((3,) * 6, 0))


def test_an_embedding_with_batch_norm_is_refused():
    model = ClassConditional(sequence(nn.BatchNorm1d(2)), ways=2)
    with pytest.raises(ProgramError, match="LayerNorm or GroupNorm"):
        model.bind(ragged((3,) * 6, 0, classes=2))
