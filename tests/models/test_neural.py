import copy
import json
import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import hbmeta as hb
from hbmeta.errors import DataError, ProgramError, UnsupportedModelError
from hbmeta.inference import MAML, NUTS, AmortizedGuide, CompletePooling, ExactLinear, NoPooling
from hbmeta.models import LinearRegression, NeuralClassifier, NeuralRegression, model_from_state
from hbmeta.posterior import TaskPosterior
from hbmeta.problem import Problem
from hbmeta.program import layouts
from hbmeta.tasks import Tasks


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def waves(tasks=4, points=6, features=1, seed=0, outputs=None):
    x = draw(tasks, points, features, seed=seed)
    y = torch.sin(2 * x.sum(-1)) + 0.1 * draw(tasks, points, seed=seed + 1)
    return Tasks(x, y if outputs is None else torch.stack([y, -y], -1))


def classes(tasks=4, points=6, ways=3):
    x = draw(tasks, points, 2)
    return Tasks(x, (x.sum(-1) > 0).long() + (x[..., 0] > 0.5).long() * (ways - 2))


def problem_of(model, tasks):
    return Problem(model.bind(tasks), tasks)


def by_hand(network, phi, x):
    """(tasks, points, outputs) by a loop over tasks and copies of a module."""
    found = []
    for i in range(len(x)):
        own = copy.deepcopy(network)
        for name, parameter in own.named_parameters():
            parameter.data = phi[name][i].to(x.dtype)
        found.append(own(x[i]).detach())
    return torch.stack(found)


def own_network(width=5, inputs=1, outputs=1):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Linear(inputs, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, outputs)
        )


# The program


@pytest.mark.parametrize(
    "model",
    [
        NeuralRegression((5, 3), noise=0.4),
        NeuralRegression((4,), noise=0.4, activation="tanh", mean="zero"),
        NeuralRegression((), noise=0.4),
        NeuralRegression(noise=0.4, network=own_network().double()),
    ],
)
def test_densities_are_those_of_a_loop_over_networks(model):
    tasks = waves()
    problem = problem_of(model, tasks)
    batch = problem.batch(tasks)
    theta = problem.theta(batch)
    phi = {s.name: draw(4, *s.shape, seed=i) for i, s in enumerate(problem.sites.locals)}
    network = problem.program.template[0]
    assert [s.name for s in problem.sites.locals] == [n for n, _ in network.named_parameters()]
    likelihood, local, _ = problem.terms(theta, phi, batch)
    expected = by_hand(network, phi, tasks.x)[..., 0]
    cells = stats.norm.logpdf(tasks.y, expected, 0.4)
    np.testing.assert_allclose(likelihood, cells.sum(1), rtol=1e-10)
    prior = np.zeros(4)
    for name, value in phi.items():
        if model.given_mean == "zero":
            inputs = value.shape[2] if value.dim() == 3 else 1
            loc, scale = 0.0, 1.0 / math.sqrt(inputs)
        else:
            loc, scale = theta[f"mean.{name}"], 0.1
        prior += stats.norm.logpdf(value, loc, scale).reshape(4, -1).sum(1)
    np.testing.assert_allclose(local, prior, rtol=1e-10)


def test_the_fast_perceptron_is_the_general_path():
    tasks = waves(features=2)
    fast = problem_of(NeuralRegression((4, 3)), tasks)
    plain = nn.Sequential(*copy.deepcopy(list(fast.program.template[0].children())))
    general = problem_of(NeuralRegression(network=plain), tasks)
    batch = fast.batch(tasks)
    phi = draw(4, fast.sites.phi_size).requires_grad_()
    values, gradients = [], []
    for problem in (fast, general):
        value = problem.terms(problem.theta(batch), phi, batch)[0]
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value.sum(), phi)[0])
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)


def test_the_start_is_torchs_own_and_no_state_is_touched(untouched):
    tasks = waves()
    with untouched():
        first = problem_of(NeuralRegression((5,), seed=7), tasks)
        other = problem_of(NeuralRegression((5,), seed=8), tasks)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        weight = nn.Linear(1, 5, dtype=torch.float64).weight
    theta = first.theta(first.batch(tasks))
    assert torch.equal(theta["mean.layer1.weight"], weight)
    assert not torch.equal(
        theta["mean.layer1.weight"], other.theta(first.batch(tasks))["mean.layer1.weight"]
    )
    assert set(theta) == {f"mean.layer{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    location = first.location_by_site(theta, first.batch(tasks))
    torch.testing.assert_close(location["layer1.weight"], weight.expand(4, 5, 1), rtol=0, atol=0)


def test_a_given_network_is_copied():
    network = own_network()
    before = network[0].weight.detach().clone()
    fitted = MAML(steps=1).fit(
        NeuralRegression(network=network), waves(), steps=3, compile=False, progress=False
    )
    assert torch.equal(network[0].weight, before)
    assert not torch.equal(fitted.theta["mean.0.weight"].float(), before)
    assert isinstance(network[0].weight, nn.Parameter)


def test_scales_are_learned_one_per_tensor():
    problem = problem_of(NeuralRegression((5,), prior_scale="learned"), waves())
    theta = problem.theta(problem.batch(waves()))
    scales = {name: value for name, value in theta.items() if name.startswith("log_scale")}
    assert len(scales) == 4
    assert all(float(value) == pytest.approx(math.log(0.1)) for value in scales.values())
    theta = {n: v + 0.3 if n in scales else v for n, v in theta.items()}
    phi = draw(4, problem.sites.phi_size)
    mean = problem.location(theta, problem.batch(waves()))
    expected = stats.norm.logpdf(phi, mean, 0.1 * math.exp(0.3)).sum(1)
    found = problem.log_task_prior(theta, phi, problem.batch(waves()))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_the_default_noise_makes_squared_error_of_the_loss():
    tasks = waves()
    problem = problem_of(NeuralRegression((5,)), tasks)
    batch = problem.batch(tasks)
    phi = draw(4, problem.sites.phi_size)
    minus = -problem.log_likelihood(problem.theta(batch), phi, batch) / 6
    network = problem.program.template[0]
    error = by_hand(network, problem.sites.from_vector(phi), tasks.x)[..., 0] - tasks.y
    torch.testing.assert_close(minus, error.square().mean(1) + 0.5 * math.log(math.pi))


def test_vectors_and_classes():
    tasks = waves(outputs=2)
    problem = problem_of(NeuralRegression((4,), noise=0.5), tasks)
    phi = {s.name: draw(4, *s.shape) for s in problem.sites.locals}
    batch = problem.batch(tasks)
    expected = by_hand(problem.program.template[0], phi, tasks.x)
    found = problem.log_likelihood(problem.theta(batch), phi, batch)
    np.testing.assert_allclose(found, stats.norm.logpdf(tasks.y, expected, 0.5).sum((1, 2)))
    tasks = classes()
    problem = problem_of(NeuralClassifier(3, (4,)), tasks)
    phi = {s.name: draw(4, *s.shape) for s in problem.sites.locals}
    batch = problem.batch(tasks)
    logits = by_hand(problem.program.template[0], phi, tasks.x).log_softmax(-1)
    expected = logits.gather(-1, tasks.y.unsqueeze(-1)).sum((1, 2))
    found = problem.log_likelihood(problem.theta(batch), phi, batch)
    torch.testing.assert_close(found, expected)


def test_only_the_nested_layout_is_offered():
    assert layouts(NeuralRegression()) == ("nested",)


# Strategies


def test_maml_is_the_algorithm_of_the_paper():
    """Inner steps and meta-gradient against a loop over tasks in plain torch."""
    tasks = waves(tasks=3)
    problem = problem_of(NeuralRegression((5,), activation="tanh"), tasks)
    support, query = tasks.keep(torch.arange(18) % 6 < 3), tasks.keep(torch.arange(18) % 6 >= 3)
    theta = {k: v.requires_grad_() for k, v in problem.theta(problem.batch(tasks)).items()}
    strategy = MAML(steps=3, step_size=0.1)
    batches = problem.batch(support), problem.batch(query)
    losses = strategy.loss(problem, theta, None, *batches, {})
    network = problem.program.template[0]
    expected = []
    for i in range(3):
        weights = {name.removeprefix("mean."): value for name, value in theta.items()}

        def error(weights, part, i=i):
            out = torch.func.functional_call(network, weights, (part.x[i],))
            return (out[:, 0] - part.y[i]).square().mean()

        for _ in range(3):
            gradients = torch.autograd.grad(
                error(weights, support), list(weights.values()), create_graph=True
            )
            weights = {
                name: value - 0.1 * gradient
                for (name, value), gradient in zip(weights.items(), gradients, strict=True)
            }
        expected.append(error(weights, query) + 0.5 * math.log(math.pi))
    expected = torch.stack(expected)
    torch.testing.assert_close(losses, expected)
    values = list(theta.values())
    found = torch.autograd.grad(losses.sum(), values)
    for one, other in zip(found, torch.autograd.grad(expected.sum(), values), strict=True):
        torch.testing.assert_close(one, other)


def test_maml_traces_to_a_graph_and_learns():
    """20 waves: the mean of the last 20 losses is far below that of the first 5."""
    fitted = MAML(steps=1, step_size=0.1).fit(
        NeuralRegression((16,)), waves(tasks=20, points=12),
        steps=80, learning_rate=2e-2, compile="graph", progress=False,
    )  # fmt: skip
    assert fitted.info["tier"] == "graph"
    assert np.mean(fitted.history[-20:]) < np.mean(fitted.history[:5]) - 0.2


def test_maml_learns_the_noise_when_asked():
    fitted = MAML(steps=1, step_size=0.01).fit(
        NeuralRegression((4,), noise=None), waves(), steps=5, compile=False, progress=False
    )
    assert 0 < float(fitted.globals()["noise"]) != pytest.approx(1.0)


def test_no_learning_fits_from_scratch():
    tasks = waves()
    fitted = MAML(steps=20, step_size=0.05).fit(
        NeuralRegression((6,)), tasks, steps=1, learning_rate=0, compile=False, progress=False
    )
    start = fitted.problem.theta(fitted.problem.batch(tasks))
    assert all(torch.equal(value, start[name]) for name, value in fitted.theta.items())
    batch = fitted.problem.batch(tasks)
    before = fitted.problem.log_likelihood(start, fitted.adapt(tasks, steps=0).density.loc, batch)
    after = fitted.problem.log_likelihood(start, fitted.adapt(tasks).density.loc, batch)
    assert bool((after > before).all())


def test_the_guide_covers_more_weights_than_fit_a_dense_matrix():
    tasks = waves(tasks=6)
    model = NeuralRegression((8, 8), noise=None, prior_scale="learned")
    fitted = AmortizedGuide(hidden=8).fit(model, tasks, steps=5, compile=False, progress=False)
    posterior = fitted.adapt(tasks)
    assert posterior.density.diagonal
    predictive = posterior.predict(tasks, draws=20)
    assert bool(torch.isfinite(predictive.log_prob(tasks.y)).all())
    nothing = fitted.adapt(tasks.keep(torch.zeros(36, dtype=torch.bool)))
    batch = fitted.problem.batch(tasks)
    location = fitted.problem.location(fitted.theta, batch)
    torch.testing.assert_close(nothing.density.loc, location.detach())


def test_predictions_of_many_linear_coefficients_stay_exact():
    """Beyond 64 parameters linearity is looked at along a line before the dense probes."""
    x = draw(2, 3, 70)
    tasks = Tasks(x, x.sum(-1))
    problem = Problem(LinearRegression([0.0] * 70, [1.0] * 70, 0.3).bind(tasks), tasks)
    density = hb.densities.Gaussian(draw(2, 70), draw(2, 70, seed=1).exp())
    found = TaskPosterior(problem, {}, density, tasks).predict(tasks)
    torch.testing.assert_close(found.mean, (x * density.loc.unsqueeze(1)).sum(-1))
    variance = (x * density.scale.unsqueeze(1)).square().sum(-1) + 0.09
    torch.testing.assert_close(found.variance, variance)


def test_nuts_takes_a_prior_around_zero():
    tasks = waves(tasks=2, points=4)
    model = NeuralRegression((3,), mean="zero", activation="tanh", noise=None)
    problem = problem_of(model, tasks)
    assert not problem.parameters()
    assert [site.name for site in problem.sites.globals] == ["noise"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = NUTS(draws=5, warmup=5, chains=1, max_tree_depth=3, processes=1).fit(
            model, tasks, compile=False, progress=False
        )
    assert fitted.posterior.sample(3)["layer1.weight"].shape == (3, 2, 3, 1)


def test_complete_pooling_is_one_network():
    x = draw(3, 8, 1)
    tasks = Tasks(x, 0.5 * x[..., 0] - 1.0)
    model = NeuralRegression((), noise=0.5)
    fitted = CompletePooling().fit(model, tasks, compile=False, progress=False)
    found = fitted.adapt(tasks[:1]).predict(tasks[:1]).mean
    torch.testing.assert_close(found, tasks.y[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (NoPooling(), ["at most 64", "1761", "learning_rate=0"]),
        (ExactLinear(), ["1761", "MAML"]),
        (NUTS(), ["prior for every level-1 parameter", "mean.layer1.weight"]),
    ],
)
def test_strategies_without_sense_refuse_at_once(strategy, words):
    with pytest.raises(UnsupportedModelError) as caught:
        strategy.fit(NeuralRegression(), waves())
    assert all(word in str(caught.value) for word in words), str(caught.value)


# Files


@pytest.mark.parametrize(
    ("model", "tasks"),
    [
        (NeuralRegression((4,), noise=None, prior_scale="learned", seed=3), waves()),
        (NeuralRegression((4,), activation="tanh"), waves(outputs=2)),
        (NeuralClassifier(3, (4,)), classes()),
    ],
)
def test_saved_fits_come_back(model, tasks, tmp_path):
    assert model_from_state(json.loads(json.dumps(model.state()))).state() == model.state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MAML says that scales get no gradient
        fitted = MAML(steps=2).fit(model, tasks, steps=3, compile=False, progress=False)
    fitted.save(tmp_path / "fit")
    again = hb.load(tmp_path / "fit")
    assert torch.equal(again.adapt(tasks).density.loc, fitted.adapt(tasks).density.loc)


def test_a_network_of_ones_own_must_be_given_to_load(tmp_path):
    model = NeuralRegression(network=own_network(), noise=0.3)
    tasks = waves()
    fitted = MAML(steps=2).fit(model, tasks, steps=3, compile=False, progress=False)
    fitted.save(tmp_path / "fit")
    with pytest.raises(UnsupportedModelError, match="network=Sequential") as caught:
        hb.load(tmp_path / "fit")
    assert "model=" in caught.value.do
    again = hb.load(tmp_path / "fit", model=model)
    assert torch.equal(again.adapt(tasks).density.loc, fitted.adapt(tasks).density.loc)
    with pytest.raises(UnsupportedModelError, match=r"noise=0\.3"):
        hb.load(tmp_path / "fit", model=NeuralRegression(network=own_network()))
    with pytest.raises(UnsupportedModelError, match="network"):
        hb.load(tmp_path / "fit", model=NeuralRegression(network=own_network(7), noise=0.3))
    with pytest.raises(UnsupportedModelError, match="network=Sequential"):
        model_from_state(model.state())


# What is refused


class Mixing(nn.Linear):
    def forward(self, x):
        return super().forward(x) - x.mean(0, keepdim=True)


class Counting(nn.Linear):
    def __init__(self):
        super().__init__(1, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Random(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.randn(1)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.noise = nn.Parameter(torch.ones(1, 1))

    def forward(self, x):
        return x @ self.noise


def frozen():
    network = own_network()
    network[0].weight.requires_grad_(False)
    return network


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"hidden": (0,)}, ["widths", "(0,)"]),
        ({"hidden": "40"}, ["widths"]),
        ({"hidden": (2.5,)}, ["2.5"]),
        ({"activation": "gelu"}, ["relu", "'gelu'"]),
        ({"mean": "none"}, ["'zero'", "'none'"]),
        ({"noise": 0.0}, ["noise", "0.0"]),
        ({"noise": True}, ["noise", "True"]),
        ({"noise": float("nan")}, ["noise", "nan"]),
        ({"prior_scale": -1.0}, ["prior_scale", "'learned'"]),
        ({"prior_scale": "free"}, ["prior_scale", "'free'"]),
        ({"prior_noise": 0.0}, ["prior_noise"]),
        ({"seed": -1}, ["seed"]),
        ({"network": "relu"}, ["torch.nn.Module", "str"]),
        ({"network": nn.ReLU()}, ["none"]),
        ({"network": frozen()}, ["'0.weight'", "frozen"]),
        ({"network": nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.1))}, ["Dropout", "random"]),
        ({"network": nn.RNN(1, 1, 2, dropout=0.5)}, ["RNN", "random"]),
        ({"network": Named()}, ["'noise'"]),
    ],
)
def test_impossible_arguments(arguments, words):
    with pytest.raises((DataError, ProgramError)) as caught:
        NeuralRegression(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Mixing(1, 1), ["another value for a row alone"]),
        (Counting(), ["changes its buffers"]),
        (Random(1, 1), ["draws random numbers"]),
        (nn.Linear(1, 2), ["(6, 2)", "1 output"]),
        (nn.Linear(3, 1), ["RuntimeError"]),
    ],
)
def test_networks_that_are_no_function_of_a_row(network, words, untouched):
    with untouched(), pytest.raises(ProgramError) as caught:
        NeuralRegression(network=network).bind(waves(tasks=1))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_unbound_model_says_so():
    with pytest.raises(ProgramError, match="bind"):
        NeuralRegression()(torch.zeros(2, 3, 1))


@pytest.mark.parametrize("ways", [1, 2.0, True])
def test_impossible_ways(ways):
    with pytest.raises(DataError, match="ways"):
        NeuralClassifier(ways)


@pytest.mark.parametrize("y", [[[0, 3]], [[0.5, 1.0]], [[[0.0, 1.0], [1.0, 0.0]]]])
def test_labels_outside_the_classes(y):
    with pytest.raises(DataError, match="labels from 0 to 2"):
        NeuralClassifier(3).bind(Tasks(torch.zeros(1, 2, 1), torch.tensor(y)))


def test_vectors_of_one_entry_are_numbers():
    with pytest.raises(DataError, match="last dimension"):
        NeuralRegression().bind(Tasks(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1)))
