import pyro
import pyro.distributions as dist
import pytest
import torch

from hbmeta.errors import ProgramError
from hbmeta.models import READY_MADE, HierarchicalModel
from hbmeta.problem import Problem
from hbmeta.tasks import Tasks


class Means(HierarchicalModel):
    def level_one(self):
        return {"scale": pyro.sample("scale", dist.HalfNormal(1.0))}

    def task_prior(self, theta):
        return {"mean": pyro.sample("mean", dist.Normal(0.0, theta["scale"]))}

    def likelihood(self, theta, phi, x):
        return dist.Normal(phi["mean"] + x[..., 0], 1.0)


def data() -> Tasks:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(7, 1, generator=draw, dtype=torch.float64)
    return Tasks.from_flat(x, x[:, 0] + 1, [0, 0, 1, 3, 3, 3, 3], 4)


def test_both_layouts_are_the_same_program():
    tasks, model = data(), Means()
    phi = torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None]
    theta = {"scale": torch.tensor(0.3, dtype=torch.float64)}
    found = []
    for layout in ("nested", "flat"):
        problem = Problem(model, tasks, layout=layout)
        found.append(problem.terms(theta, phi, problem.batch(tasks)))
    for nested, flat in zip(*found, strict=True):
        torch.testing.assert_close(nested, flat, rtol=1e-12, atol=1e-12)
    expected = dist.Normal(phi[tasks.task, 0] + tasks.flat_x[:, 0], 1.0).log_prob(tasks.flat_y)
    torch.testing.assert_close(
        found[0][0], torch.zeros(4).double().index_add(0, tasks.task, expected)
    )


def test_group_index_and_number_of_tasks_belong_together():
    x, task = torch.zeros(3, 1), torch.tensor([0, 1, 1])
    with pytest.raises(ProgramError, match="`task` alone"):
        Means()(x, task=task)
    with pytest.raises(ProgramError, match="`n_tasks` alone"):
        Means()(x, n_tasks=2)


def test_draws_and_returns_y():
    torch.manual_seed(0)
    model, y = Means(), torch.ones(2, 3)
    assert model(torch.zeros(2, 3, 1)).shape == (2, 3)
    assert torch.equal(model(torch.zeros(2, 3, 1), y), y)


def test_a_model_without_state_of_its_own():
    model = Means()
    assert model.bind(data()) is model
    assert model.state() == {"class": "Means", "settings": {}, "bound": None}


def test_running_leaves_no_trace(untouched):
    tasks = data()
    with untouched():
        problem = Problem(Means(), tasks)
        batch = problem.batch(tasks)
        problem.terms(problem.theta(batch), torch.zeros(4, 1, dtype=torch.float64), batch)


def test_ready_made_models_are_found_by_their_own_name():
    assert all(name == model.__name__ for name, model in READY_MADE.items())
