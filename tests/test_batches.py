"""Programs that ask for the support as their context.

Such a program, which centres x by the mean of its context, must do on x what a program without a
context does on x that was centred before.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn
from torch.utils import _pytree as pytree

from hbmeta.batches import Batch
from hbmeta.densities import Delta, Empirical, Gaussian
from hbmeta.errors import ProgramError
from hbmeta.inference import MAML, ExactLinear, ProtoNet
from hbmeta.models import HierarchicalModel
from hbmeta.posterior import TaskPosterior
from hbmeta.problem import Problem
from hbmeta.program import layouts, takes_context
from hbmeta.tasks import Episode, Tasks

WAYS, DEPTH = 2, 3


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tasks_of(counts, seed, classes=False):
    task = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    x = draw(len(task), DEPTH, seed=seed) + task[:, None]
    y = (torch.arange(len(task)) % WAYS) if classes else x.sum(-1).sin()
    return Tasks.from_flat(x, y, task, len(counts))


def episode(classes=False):
    return Episode(tasks_of((4, 2, 5), 0, classes), tasks_of((3, 4, 2), 1, classes))


def moved(tasks, means):
    return Tasks.from_flat(tasks.flat_x - means[tasks.task], tasks.flat_y, tasks.task, 3)


def means_of(tasks):
    return torch.stack([tasks.flat_x[tasks.task == i].mean(0) for i in range(3)])


def centred(data, whose="support"):
    """The episode with the x of each task centred by the mean of its support, or of the part."""
    support = means_of(data.support)
    query = support if whose == "support" else means_of(data.query)
    return Episode(moved(data.support, support), moved(data.query, query))


def regression(x, y=None):
    with pyro.plate("task", x.shape[0], dim=-2):
        slopes = pyro.sample("slopes", dist.Normal(torch.zeros(DEPTH), 1.0).to_event(1))
        level = pyro.sample("level", dist.Gamma(2.0, 1.0))
        with pyro.plate("point", x.shape[1], dim=-1):
            mean = (x * slopes).sum(-1) + level.log()
            return pyro.sample("y", dist.Normal(mean, 0.3), obs=y)


def classes(x, y=None):
    with pyro.plate("task", x.shape[0], dim=-2):
        means = pyro.sample("means", dist.Normal(torch.zeros(WAYS, DEPTH), 2.0).to_event(2))
        with pyro.plate("point", x.shape[1], dim=-1):
            prior = dist.Categorical(logits=x.new_zeros(*x.shape[:2], WAYS))
            label = pyro.sample("y", prior, obs=y)
            chosen = (label.unsqueeze(-1) == torch.arange(WAYS)).to(x.dtype)
            centre = (chosen.unsqueeze(-2) @ means).squeeze(-2)
            pyro.sample("z", dist.Normal(centre, 0.5).to_event(1), obs=x)
            return label


def centre(x, context):
    seen, weight = context
    total = (weight.unsqueeze(-1) * seen).sum(1, keepdim=True)
    return x - total / weight.sum(-1).clamp_min(1.0)[:, None, None]


def asking(program, whose="support"):
    def asks(x, y=None, *, context):
        return program(centre(x, context), y)

    if whose != "support":
        asks.takes_context = whose
    return asks


PROGRAMS = {False: regression, True: classes}


@pytest.mark.parametrize("whose", ["support", "rows"])
@pytest.mark.parametrize("labels", [False, True])
def test_densities_condition_on_the_context(labels, whose):
    data = episode(labels)
    plain = centred(data, whose)
    problem = Problem(asking(PROGRAMS[labels], whose), data.all)
    other = Problem(PROGRAMS[labels], plain.all, layout="nested")
    assert problem.takes_context == whose
    assert other.takes_context is None
    phi = draw(3, problem.sites.phi_size)
    found, expected = (
        [
            p.log_predictive({}, phi, p.batch(d.support), p.batch(d.query)),
            p.log_likelihood({}, phi, p.batch(d.support)),
            p.particle_cells({}, False, phi[None], p.batch(d.support))[:, d.support.mask],
        ]
        for p, d in ((problem, data), (other, plain))
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("whose", ["support", "rows"])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("kind", [Delta, Gaussian, Empirical])
def test_predictions_condition_on_the_context(labels, whose, kind):
    data = episode(labels)
    plain = centred(data, whose)
    predictives = []
    for program, d in ((asking(PROGRAMS[labels], whose), data), (PROGRAMS[labels], plain)):
        problem = Problem(program, d.all, layout="nested")
        loc = draw(3, problem.sites.phi_size)
        density = {
            Delta: lambda loc=loc: Delta(loc),
            Gaussian: lambda loc=loc: Gaussian(loc, 0.1 + 0 * loc),
            Empirical: lambda loc=loc: Empirical(loc + draw(4, *loc.shape, seed=2)),
        }[kind]()
        predictives.append(TaskPosterior(problem, {}, density, d.support).predict(d.query, draws=6))
    first, second = predictives
    assert first.n_draws == second.n_draws
    torch.testing.assert_close(first.log_prob(data.query.y), second.log_prob(data.query.y))
    if not labels:
        torch.testing.assert_close(first.mean, second.mean)
        joint = [p.log_prob(data.query.y, joint=True) for p in predictives]
        torch.testing.assert_close(*joint)


def linear(x, y=None):
    with pyro.plate("task", x.shape[0], dim=-2):
        slopes = pyro.sample("slopes", dist.Normal(torch.zeros(DEPTH), 1.0).to_event(1))
        with pyro.plate("point", x.shape[1], dim=-1):
            return pyro.sample("y", dist.Normal((x * slopes).sum(-1), 0.3), obs=y)


@pytest.mark.parametrize("whose", ["support", "rows"])
@pytest.mark.parametrize(
    ("strategy", "program"),
    [
        (MAML(steps=3, step_size=0.01), regression),
        (ExactLinear(), linear),
        (ProtoNet(), classes),
        (ProtoNet(plug_in=False), classes),
    ],
)
def test_strategies_condition_on_the_context(strategy, program, whose, untouched):
    labels = program is classes
    data = episode(labels)
    plain = centred(data, whose)
    options = {"steps": 2, "compile": False, "progress": False}
    with untouched():
        fits = [
            strategy.fit(p, d.all, **options)
            for p, d in ((asking(program, whose), data), (program, plain))
        ]
        found, expected = (
            f.adapt(d.support).predict(d.query).log_prob(d.query.y)
            for f, d in zip(fits, (data, plain), strict=True)
        )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("plug_in", [True, False])
def test_the_loss_of_prototypes_conditions_on_the_context(plug_in):
    data = episode(True)
    plain = centred(data)
    losses = []
    for program, d in ((asking(classes), data), (classes, plain)):
        problem = Problem(program, d.all, layout="nested")
        batches = problem.batch(d.support), problem.batch(d.query)
        losses.append(ProtoNet(plug_in=plug_in).loss(problem, {}, None, *batches, {}))
    torch.testing.assert_close(*losses)


def test_an_empty_support_and_an_empty_query_have_a_context():
    data = episode()
    problem = Problem(asking(regression), data.all)
    nothing = torch.zeros(data.support.n_points, dtype=torch.bool)
    empty = data.support.keep(nothing)
    posterior = TaskPosterior(problem, {}, Delta(draw(3, 4)), empty)
    expected = Problem(regression, data.all, layout="nested")
    plain = TaskPosterior(expected, {}, Delta(draw(3, 4)), empty)
    torch.testing.assert_close(posterior.predict(data.query).mean, plain.predict(data.query).mean)
    assert empty.unpad(posterior.predict(empty).mean).numel() == 0


# Who asks, and how


class Module(PyroModule):
    def forward(self, x, y=None, *, context=None):
        return regression(centre(x, context), y)


class Model(HierarchicalModel):
    takes_context = "support"

    def level_one(self):
        return {}

    def task_prior(self, theta):
        return {"level": pyro.sample("level", dist.Normal(0.0, 1.0))}

    def likelihood(self, theta, phi, x, *, context):
        return dist.Normal(phi["level"] + centre(x, context).sum(-1), 0.3)


def test_modules_and_models_ask_too():
    data = episode()
    plain = centred(data)
    phi = draw(3, 4)
    p, other = Problem(Module(), data.all), Problem(regression, plain.all, layout="nested")
    torch.testing.assert_close(
        p.log_predictive({}, phi, p.batch(data.support), p.batch(data.query)),
        other.log_predictive({}, phi, other.batch(plain.support), other.batch(plain.query)),
    )
    model = Model()
    assert layouts(model) == ("nested",)
    problem = Problem(model, data.all)
    predictive = TaskPosterior(problem, {}, Delta(phi[:, :1]), data.support).predict(data.query)
    expected = phi[:, :1] + plain.query.x.sum(-1)
    torch.testing.assert_close(predictive.mean, expected)
    # By hand, x is its own context.
    assert model(data.query.x).shape == (3, 4)


def unasked(x, y=None):
    return regression(x, y)


def flat(x, y=None, *, task, n_tasks, context):
    raise AssertionError("never run")


def either(x, y=None, *, task=None, n_tasks=None, context=None):
    raise AssertionError("never run")


def joint(x, y=None, *, mask=None, context=None):
    raise AssertionError("never run")


def test_the_keyword_or_the_attribute_asks():
    assert takes_context(unasked) is None
    assert takes_context(asking(regression)) == "support"
    assert takes_context(nn.Linear(1, 1)) is None
    assert layouts(either) == ("nested",)
    quiet = asking(regression)
    quiet.takes_context = None
    assert takes_context(quiet) is None


@pytest.mark.parametrize(("program", "layout"), [(flat, "flat"), (joint, "joint")])
def test_other_layouts_have_no_context(program, layout):
    with pytest.raises(ProgramError, match=f"the {layout} layout"):
        Problem(program, episode().all)


def test_another_value_of_the_attribute_is_refused():
    with pytest.raises(ProgramError, match="'query'"):
        layouts(asking(regression, "query"))


def test_a_batch_is_a_tree_with_its_context():
    data = episode()
    problem = Problem(asking(regression), data.all)
    batch = problem.batch(data.query, data.support)
    leaves, structure = pytree.tree_flatten(batch)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    assert len(tensors) == 5
    again = pytree.tree_unflatten(leaves, structure)
    assert isinstance(again, Batch)
    assert again.context[0] is batch.context[0]
    assert torch.equal(again.context[1], problem.batch(data.support).weight)
    plain = pytree.tree_flatten(problem.batch(data.query))[0]
    assert sum(isinstance(leaf, torch.Tensor) for leaf in plain) == 3
