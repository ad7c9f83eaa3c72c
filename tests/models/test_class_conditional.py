"""ClassConditional against the closed forms of Gaussian classes with known means."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import hbmeta as hb
from hbmeta import models
from hbmeta.densities import Delta, Gaussian
from hbmeta.errors import DataError, ProgramError, UnsupportedModelError
from hbmeta.inference import ProtoNet
from hbmeta.posterior import TaskPosterior
from hbmeta.problem import Problem
from hbmeta.tasks import Tasks

# T9 of the reference: a point, and prototypes of three classes.
Z = (0.5, 0.2)
PROTOTYPES = ((0.0, 0.0), (1.0, 0.0), (0.0, 2.0))
PRIORS = (0.5, 0.3, 0.2)
SQUARED = (0.4900129952, 0.4900129952, 0.0199740097)
HALF = (0.4541539495, 0.4541539495, 0.0916921010)
WITH_PRIORS = (0.6186951555, 0.3712170933, 0.0100877513)
SHARED = (0.4453047041, 0.4205720965, 0.1341231994)
QUADRATIC = (0.4904439494, 0.5090939293, 0.0004621313)
FIVE_SHOTS = (0.4832123685, 0.4832123685, 0.0335752630)

FULL = torch.tensor([[1.0, 0.5], [0.5, 2.0]], dtype=torch.float64)
PER_CLASS = torch.stack([torch.eye(2), 0.5 * torch.eye(2), torch.diag(torch.tensor([2.0, 0.25]))])


def data(y_dtype=torch.int64, n_tasks=2):
    """Every class once in a task, at its prototype: plug-in means are the prototypes."""
    x = torch.tensor(PROTOTYPES, dtype=torch.float64).expand(n_tasks, 3, 2)
    y = torch.tensor([0, 1, 2]).expand(n_tasks, 3).to(y_dtype)
    return Tasks(x, y, features=["a", "b"])


def at_z(n_tasks=2):
    x = torch.tensor([Z], dtype=torch.float64).expand(n_tasks, 1, 2)
    return Tasks(x, torch.zeros(n_tasks, 1, dtype=torch.int64), features=["a", "b"])


def probabilities(program, density, *, tasks=None, layout=None):
    """p(y | z, S) of the first task, where q(φ | S) is this density."""
    tasks = data() if tasks is None else tasks
    problem = Problem(program, tasks, layout=layout)
    posterior = TaskPosterior(problem, problem.theta(problem.batch(tasks)), density, tasks)
    return posterior.predict(at_z()).probabilities[0, 0]


def means(n_tasks=2):
    return torch.tensor(PROTOTYPES, dtype=torch.float64).reshape(1, 6).expand(n_tasks, 6)


@pytest.mark.parametrize("layout", ["nested", "flat"])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, SQUARED),
        ({"noise": 1.0}, HALF),
        ({"probabilities": PRIORS}, WITH_PRIORS),
    ],
)
def test_softmax_of_squared_distances(settings, expected, layout):
    model = models.ClassConditional(None, 3, **settings)
    found = probabilities(model.bind(data()), Delta(means()), layout=layout)
    np.testing.assert_allclose(found, expected, atol=6e-11)


def test_prototypes_of_one_shot_are_the_support_itself():
    fitted = ProtoNet().fit(models.ClassConditional(None, 3), data(), steps=1, compile=False)
    posterior = fitted.adapt(data())
    torch.testing.assert_close(posterior.density.loc, means())
    found = posterior.predict(at_z()).probabilities[0, 0]
    np.testing.assert_allclose(found, SQUARED, atol=6e-11)


def test_five_shots_spread_the_prototypes():
    """Variance σ²(1 + 1/N), a factor that all classes share."""
    scale = torch.full((2, 6), math.sqrt(0.5 / 5), dtype=torch.float64)
    model = models.ClassConditional(None, 3).bind(data())
    found = probabilities(model, Gaussian(means(), scale))
    np.testing.assert_allclose(found, FIVE_SHOTS, atol=6e-11)
    # The same from a support of five equal points of every class.
    x = data().x.repeat(1, 5, 1)
    many = Tasks(x, data().y.repeat(1, 5), features=["a", "b"])
    fitted = ProtoNet(plug_in=False).fit(
        models.ClassConditional(None, 3), many, steps=1, compile=False
    )
    found = fitted.adapt(many).predict(at_z()).probabilities[0, 0]
    np.testing.assert_allclose(found, FIVE_SHOTS, atol=6e-11)


def gaussian_classes(covariances, priors):
    """A program of one's own: means of the classes in φ, covariances known; both layouts."""

    def draw(x, y, means, tril):
        label = pyro.sample("label", dist.Categorical(torch.tensor(priors)), obs=y)
        chosen = nn.functional.one_hot(label.long(), 3).to(x.dtype)
        mean = (chosen.unsqueeze(-2) @ means).squeeze(-2)
        law = dist.MultivariateNormal(mean, scale_tril=tril[label.long()])
        pyro.sample("embedding", law, obs=x)

    def program(x, y=None, *, task=None, n_tasks=None):
        tril = torch.linalg.cholesky(covariances.to(x.dtype))
        prior = dist.Normal(0.0, 3.0).expand([3, 2]).to_event(2)
        if task is None:
            with pyro.plate("task", x.shape[0], dim=-2):
                means = pyro.sample("means", prior)
                with pyro.plate("point", x.shape[1], dim=-1):
                    draw(x, y, means, tril)
            return
        with pyro.plate("task", n_tasks, dim=-1):
            means = pyro.sample("means", prior)
        with pyro.plate("point", x.shape[0], dim=-1):
            draw(x, y, means[task], tril)

    return program


@pytest.mark.parametrize("y_dtype", [torch.int64, torch.float64])
@pytest.mark.parametrize("layout", ["nested", "flat"])
@pytest.mark.parametrize(
    ("covariances", "priors", "expected"),
    [
        (FULL.expand(3, 2, 2), (1 / 3, 1 / 3, 1 / 3), SHARED),
        (PER_CLASS, PRIORS, QUADRATIC),
        (0.5 * torch.eye(2).expand(3, 2, 2), PRIORS, WITH_PRIORS),
    ],
    ids=["shared", "per class", "isotropic"],
)
def test_gaussian_classes_of_a_program_of_one_s_own(covariances, priors, expected, layout, y_dtype):
    program = gaussian_classes(covariances, priors)
    found = probabilities(program, Delta(means()), tasks=data(y_dtype), layout=layout)
    # Priors that are written in single precision by the test itself have seven digits.
    np.testing.assert_allclose(found, expected, atol=2e-8)


# The program


def test_sites_and_layouts():
    problem = Problem(models.ClassConditional((5, 4), 3, prior_scale=2.0).bind(data()), data())
    assert [(s.name, s.shape) for s in problem.sites.locals] == [("means", (3, 4))]
    assert {(s.name, s.family) for s in problem.sites.observed} == {
        ("y", "Categorical"),
        ("embedding", "Normal"),
    }
    assert problem.sites.response == "y"
    assert problem.classes == 3
    assert problem.moving_observation == "embedding"
    assert Problem(models.ClassConditional(None, 3).bind(data()), data()).moving_observation is None


@pytest.mark.parametrize("prior_scale", [None, 1.5])
def test_both_layouts_have_the_same_densities(prior_scale):
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(3), (2, 5, 3))
    tasks = Tasks.from_flat(rng.standard_normal((10, 2)), rng.integers(0, 3, 10), task, 3)
    model = models.ClassConditional((4,), 3, prior_scale=prior_scale).bind(tasks)
    found = []
    for layout in ("nested", "flat"):
        problem = Problem(model, tasks, layout=layout)
        batch = problem.batch(tasks)
        phi = torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(3, 12)
        theta = problem.theta(batch)
        likelihood, local, _ = problem.terms(theta, phi, batch)
        predictive = problem.log_predictive(theta, phi, batch, batch)
        found.append((likelihood, local, predictive))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    # By hand: log π + log N(f(x); c_y, σ² I), σ² = ½.
    likelihood, _, predictive = found[0]
    z = model.embed(tasks.flat_x).detach()
    centres = torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(3, 3, 4)[tasks.task]
    distances = (z[:, None] - centres).square().sum(-1)
    each = -distances - math.log(3) - 2 * math.log(math.pi)
    chosen = each[torch.arange(10), tasks.flat_y]
    by_task = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(by_task.index_add(0, tasks.task, chosen), likelihood.detach())
    chosen = (-distances).log_softmax(-1)[torch.arange(10), tasks.flat_y]
    torch.testing.assert_close(by_task.index_add(0, tasks.task, chosen), predictive.detach())


def test_forward_draws_labels_with_their_probabilities():
    """30,000 labels: frequencies within 5 standard errors, a false alarm in 1e-6 each."""
    model = models.ClassConditional(None, 3, prior_scale=1.0, probabilities=PRIORS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = model(torch.zeros(1, 30_000, 2, dtype=torch.float64))
    found = torch.bincount(y.flatten().long(), minlength=3) / 30_000
    expected = torch.tensor(PRIORS)
    error = (expected * (1 - expected) / 30_000).sqrt()
    assert bool(((found - expected).abs() < 5 * error).all())


def test_the_embedding_is_the_same_for_the_same_seed_and_dtype_of_the_data():
    one, other, third = (
        models.ClassConditional((4, 3), 3, seed=seed).bind(data()) for seed in (0, 0, 1)
    )
    x = data().x
    assert torch.equal(one.embed(x), other.embed(x))
    assert not torch.equal(one.embed(x), third.embed(x))
    assert one.embed(x).dtype == torch.float64
    assert one.embed(x).shape == (2, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        ({"ways": 1}, "ways of 2 or more"),
        ({"ways": 2.0}, "ways of 2 or more"),
        ({"noise": 0.0}, "noise as a positive number"),
        ({"noise": float("nan")}, "noise as a positive number"),
        ({"prior_scale": -1.0}, "prior_scale as a positive number"),
        ({"embedding": ()}, "widths of an embedding"),
        ({"embedding": (4, 0)}, ""),
        ({"probabilities": (0.5, 0.5)}, "positive probabilities of sum 1"),
        ({"probabilities": (0.5, 0.6, 0.2)}, "positive probabilities of sum 1"),
        ({"probabilities": (0.5, 0.5, 0.0)}, "positive probabilities of sum 1"),
        ({"probabilities": (0.5, 0.5, float("nan"))}, "positive probabilities of sum 1"),
        ({"noise": "a"}, "noise as a positive number"),
        ({"noise": None}, "noise as a positive number"),
        ({"seed": "a"}, "seed as a whole number"),
    ],
)
def test_impossible_settings_are_refused(arguments, needed):
    with pytest.raises(DataError) as caught:
        models.ClassConditional(**{"ways": 3} | arguments)
    assert needed in caught.value.needed
    assert caught.value.do


@pytest.mark.parametrize("y", [[[0, 1, 3]], [[-1.0, 0.0, 1.0]], [[0.0, 0.5, 1.0]]])
def test_labels_outside_the_classes_are_refused(y):
    y = torch.tensor(y)
    tasks = Tasks(data().x[:1], y.double() if y.is_floating_point() else y)
    with pytest.raises(DataError, match=r"labels 0\.\.2"):
        models.ClassConditional(None, 3).bind(tasks)


def test_an_embedding_that_does_not_run_on_x_is_refused():
    with pytest.raises(ProgramError, match="a module that runs on x of 2 columns"):
        models.ClassConditional(nn.Linear(5, 2), 3).bind(data())


class Mixing(nn.Linear):
    def forward(self, x):
        return super().forward(x) - x.mean(0, keepdim=True)


class Random(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.randn(1)


class Counting(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize(
    ("embedding", "found"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), "Dropout '1'"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "BatchNorm1d '1'"),
        (Mixing(2, 2), "another value for a row alone"),
        (Random(2, 2), "draws random numbers"),
        (Counting(), "changes its buffers"),
        (nn.Flatten(0), r"\(4,\) from x \(2, 2\)"),
    ],
)
def test_an_embedding_that_is_no_function_of_a_row_is_refused(embedding, found, untouched):
    model = models.ClassConditional(embedding, 3)
    with untouched(), pytest.raises(ProgramError, match=f"ClassConditional, embedding.*{found}"):
        model.bind(data())


def test_an_embedding_may_be_frozen():
    embedding = nn.Linear(2, 4).requires_grad_(False)
    model = models.ClassConditional(embedding, 3).bind(data())
    assert model.dimension == 4
    assert not any(p.requires_grad for p in model.parameters())


# Files


def fit(model):
    return ProtoNet().fit(model, data(), steps=3, compile=False, progress=False)


@pytest.mark.parametrize("embedding", [None, (5, 4)])
def test_a_fit_is_read_back_from_its_file(embedding, tmp_path):
    settings = {"noise": 0.8, "prior_scale": 2.0, "probabilities": PRIORS, "seed": 3}
    fitted = fit(models.ClassConditional(embedding, 3, **settings))
    fitted.save(tmp_path / "fit.safetensors")
    back = hb.load(tmp_path / "fit.safetensors")
    assert back.model.settings() == fitted.model.settings()
    one, other = (f.adapt(data()).predict(at_z()).probabilities for f in (fitted, back))
    assert torch.equal(one, other)


def test_a_module_of_one_s_own_is_passed_to_load(tmp_path):
    def model(width=4):
        own = nn.Sequential(nn.Linear(2, width), nn.Tanh())
        return models.ClassConditional(own, 3, prior_scale=1.0)

    path = tmp_path / "fit.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fitted = fit(model())
        fitted.save(path)
        with pytest.raises(UnsupportedModelError, match="embedding=Sequential"):
            hb.load(path)
        with pytest.raises(UnsupportedModelError, match="a model with embedding="):
            hb.load(path, model=model(5))
        # Other weights at the start are no other model: those of the fit are in the file.
        back = hb.load(path, model=model())
    one, other = (f.adapt(data()).predict(at_z()).probabilities for f in (fitted, back))
    assert torch.equal(one, other)
