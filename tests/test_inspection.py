import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from hbmeta.errors import DataError, HbmetaError, ProgramError
from hbmeta.inspection import inspect_program
from hbmeta.problem import Problem
from hbmeta.program import Batch, layouts, program_name
from hbmeta.tasks import Tasks

N_TASKS, N_POINTS = 4, 5


def data(y: torch.Tensor | None = None) -> Tasks:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(N_TASKS, N_POINTS, 2, generator=draw, dtype=torch.float64)
    return Tasks(x, x.sum(-1) if y is None else y)


def sites(program, tasks: Tasks | None = None, layout: str = "nested"):
    return inspect_program(program, Batch.of(data() if tasks is None else tasks, layout))


def refused(program, needed: str, found: str, do: str, *, layout="nested", tasks=None):
    """Assert that the program is refused with these words in the parts of the error."""
    with pytest.raises(HbmetaError) as caught:
        sites(program, tasks, layout)
    error = caught.value
    assert needed in error.needed, str(error)
    assert found in error.found, str(error)
    assert do in error.do, str(error)
    return error


def task_plate(x):
    return pyro.plate("task", x.shape[0], dim=-2)


def point_plate(x):
    return pyro.plate("point", x.shape[1], dim=-1)


# What is read


def test_sorts_sites_into_levels():
    def program(x, y=None):
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        pyro.deterministic("largest", weights.max())
        with task_plate(x):
            phi = pyro.sample("phi", dist.Normal(torch.zeros(2), spread).to_event(1))
            pyro.deterministic("norm", phi.norm(dim=-1))
            pyro.factor("bonus", phi.sum(-1))
            with point_plate(x):
                location = pyro.deterministic("location", (phi * x).sum(-1))
                pyro.sample("y", dist.Normal(location, 1.0), obs=y)

    found = sites(program)
    assert [(s.name, s.family, s.shape, s.unconstrained_shape) for s in found.globals] == [
        ("spread", "HalfNormal", (), ()),
        ("weights", "Dirichlet", (3,), (2,)),
    ]
    assert [(s.name, s.family, s.shape) for s in found.locals] == [("phi", "Normal", (2,))]
    assert [(s.name, s.shape) for s in found.deterministic_global] == [("largest", ())]
    assert [s.name for s in found.deterministic_local] == ["norm"]
    assert [(s.name, s.family, s.shape) for s in found.observed] == [("y", "Normal", ())]
    assert found.response == "y"


@pytest.mark.parametrize("layout", ["nested", "flat"])
def test_vectors_as_response(layout):
    def program(x, y=None, *, task=None, n_tasks=None):
        if task is None:
            with task_plate(x):
                phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
                with point_plate(x):
                    pyro.sample("y", dist.Normal(phi[..., None] + x, 1.0).to_event(1), obs=y)
            return
        with pyro.plate("task", n_tasks):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with pyro.plate("point", x.shape[0]):
            pyro.sample("y", dist.Normal(phi[task][:, None] + x, 1.0).to_event(1), obs=y)

    tasks = data(torch.zeros(N_TASKS, N_POINTS, 2, dtype=torch.float64))
    assert sites(program, tasks, layout).observed[0].shape == (2,)


def test_reading_leaves_no_trace(untouched):
    def program(x, y=None):
        pyro.sample("unusual", dist.VonMises(0.0, 1.0))  # no known location: it is drawn
        with task_plate(x):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with point_plate(x):
                pyro.sample("y", dist.Normal(phi, 1.0), obs=y)

    with untouched():
        sites(program)


def test_one_task_and_one_point_are_enough():
    def program(x, y=None):
        spread = pyro.sample("spread", dist.HalfNormal(1.0).expand([1]).to_event(1))
        with task_plate(x):
            phi = pyro.sample("phi", dist.Normal(0.0, spread[0]))
            with point_plate(x):
                pyro.sample("y", dist.Normal(phi, 1.0), obs=y)

    found = sites(program, Tasks([[[1.0]]], [[2.0]]))
    assert [(s.name, s.shape) for s in found.locals] == [("phi", ())]


# Layouts


def test_layouts_are_read_from_the_signature():
    def nested(x, y=None): ...

    def flat(x, y=None, *, task, n_tasks): ...

    def both(x, y=None, *, task=None, n_tasks=None): ...

    class Module(PyroModule):
        def forward(self, x, y=None, *, task=None, n_tasks=None): ...

    assert layouts(nested) == ("nested",)
    assert layouts(flat) == ("flat",)
    assert layouts(both) == layouts(Module()) == ("nested", "flat")
    assert program_name(nested) == "nested"
    assert program_name(Module()) == "Module"


def test_the_flat_layout_needs_the_number_of_tasks():
    def program(x, y=None, *, task=None): ...

    with pytest.raises(ProgramError) as caught:
        Problem(program, data())
    assert "`n_tasks`" in caught.value.needed
    assert "`task` alone" in caught.value.found
    assert "n_tasks" in caught.value.do


def test_a_layout_that_is_not_offered():
    def program(x, y=None): ...

    with pytest.raises(ProgramError) as caught:
        Problem(program, data(), layout="flat")
    assert "flat" in caught.value.needed
    assert "nested" in caught.value.found


# Plates


def test_missing_task_plate():
    def program(x, y=None):
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with point_plate(x):
            pyro.sample("y", dist.Normal(phi + x[..., 0], 1.0), obs=y)

    error = refused(program, "plate 'task' around it", "['point']", "Nest the plates")
    assert error.where == "program, site 'y'"


def test_missing_task_plate_in_the_flat_layout():
    def program(x, y=None, *, task, n_tasks):
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with pyro.plate("point", x.shape[0]):
            pyro.sample("y", dist.Normal(phi, 1.0), obs=y)

    refused(program, "a plate named 'task'", "['point']", "pyro.plate('task'", layout="flat")


def test_parameters_of_tasks_outside_their_plate():
    def program(x, y=None):
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0).expand([x.shape[0], 1]))
        with task_plate(x), point_plate(x):
            pyro.sample("y", dist.Normal(phi, 1.0), obs=y)

    refused(program, "plate 'task' around", "(4, 1) outside every plate", ".to_event(1)")


def test_missing_point_plate():
    def program(x, y=None):
        with task_plate(x):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(phi + x[..., 0], 1.0), obs=y)

    refused(program, "plate 'point' around the observations", "(4, 5)", "pyro.plate('point'")


def test_missing_plates():
    def program(x, y=None):
        pyro.sample("phi", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x[..., 0], 1.0), obs=y)

    refused(program, "inside plates 'task' and 'point'", "outside both", "pyro.plate('task'")


def test_two_plates_of_one_name():
    def program(x, y=None):
        with pyro.plate("columns", 2, dim=-1):
            pyro.sample("first", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", 3, dim=-1):
            pyro.sample("second", dist.Normal(0.0, 1.0))

    error = refused(program, "one plate named 'columns'", "sizes 2 and 3", "name of its own")
    assert error.where == "program, site 'second'"


@pytest.mark.parametrize("size", [1, 3])
def test_task_plate_of_another_size(size):
    def program(x, y=None):
        with pyro.plate("task", size, dim=-2):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with point_plate(x):
                pyro.sample("y", dist.Normal(phi + x[..., 0], 1.0), obs=y)

    refused(program, "plate 'task' of size 4", f"size {size}", "shape of x")


def test_point_plate_of_another_size():
    def program(x, y=None):
        with task_plate(x):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with pyro.plate("point", 3, dim=-1):
                pyro.sample("y", dist.Normal(phi, 1.0), obs=y[:, :3])

    refused(program, "plate 'point' of size 5", "size 3", "shape of x")


def test_subsampled_plate():
    def program(x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2, subsample_size=2) as index:
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with point_plate(x):
                pyro.sample("y", dist.Normal(phi, 1.0), obs=y[index])

    refused(program, "without subsampling", "size 2", "tasks_per_step")


def test_task_plate_at_another_dim():
    def program(x, y=None):
        # Without dim= Pyro allots -1 to the first plate.
        with pyro.plate("task", x.shape[0]):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with pyro.plate("point", x.shape[1]):
                pyro.sample("y", dist.Normal(phi + x[..., 0].T, 1.0), obs=y.T)

    refused(program, "plate 'task' at dim -2", "dim -1", "pyro.plate('task', ..., dim=-2)")


def test_task_plate_as_a_loop():
    def program(x, y=None):
        for i in pyro.plate("task", x.shape[0]):
            phi = pyro.sample(f"phi_{i}", dist.Normal(0.0, 1.0))
            with point_plate(x):
                pyro.sample(f"y_{i}", dist.Normal(phi, 1.0), obs=y[i])

    refused(program, "plate 'task' at dim -2", "dim None", "dim=-2")


def test_nested_plates_in_the_flat_layout():
    def program(x, y=None, *, task, n_tasks):
        with pyro.plate("task", n_tasks, dim=-2):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with pyro.plate("point", x.shape[0], dim=-1):
                pyro.sample("y", dist.Normal(phi, 1.0), obs=y)

    refused(program, "plate 'task' at dim -1", "dim -2", "dim=-1", layout="flat")

    def inside(x, y=None, *, task, n_tasks):
        with pyro.plate("task", n_tasks, dim=-1), pyro.plate("point", x.shape[0], dim=-2):
            pyro.sample("y", dist.Normal(torch.zeros(x.shape[0], n_tasks), 1.0), obs=y[:, None])

    refused(inside, "side by side", "`point` nested", "before `point`", layout="flat")


def test_a_further_plate_around_a_local_site():
    def program(x, y=None):
        with pyro.plate("columns", 2, dim=-3), task_plate(x):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with task_plate(x), point_plate(x):
            pyro.sample("y", dist.Normal(phi.sum(0), 1.0), obs=y)

    refused(program, "in plate 'task' alone", "'columns'", ".to_event(1)")


# Latents


def test_latent_inside_point():
    def program(x, y=None):
        with task_plate(x):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with point_plate(x):
                error = pyro.sample("error", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(phi + error, 1.0), obs=y)

    error = refused(program, "outside plate 'point'", "latent inside", "integrate it out")
    assert error.where == "program, site 'error'"


def test_a_forgotten_obs_looks_like_a_latent():
    def program(x, y=None):
        with task_plate(x):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with point_plate(x):
                pyro.sample("y", dist.Normal(phi, 1.0))

    refused(program, "outside plate 'point'", "latent inside", "obs=y")


@pytest.mark.parametrize("level", ["local", "global"])
def test_discrete_latent(level):
    def program(x, y=None):
        kind = pyro.sample("kind", dist.Bernoulli(0.5)) if level == "global" else 0.0
        with task_plate(x):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            if level == "local":
                kind = pyro.sample("kind", dist.Bernoulli(0.5))
            with point_plate(x):
                pyro.sample("y", dist.Normal(phi + kind, 1.0), obs=y)

    refused(program, "continuous", f"a discrete {level} latent (Bernoulli)", "MixtureSameFamily")


@pytest.mark.parametrize("size", [2, N_POINTS])
def test_forgotten_to_event_in_a_local_site(size):
    def program(x, y=None):
        with task_plate(x):
            phi = pyro.sample("phi", dist.Normal(torch.zeros(size), 1.0))
            with point_plate(x):
                pyro.sample("y", dist.Normal(phi.sum(-1, keepdim=True), 1.0), obs=y)

    error = refused(program, "batch shape (4, 1)", f"(4, {size})", ".to_event(1)")
    assert error.where == "program, site 'phi'"


def test_a_site_that_is_wrong_is_named_before_the_crash_that_it_causes():
    def program(x, y=None):
        with task_plate(x):
            phi = pyro.sample("phi", dist.Normal(torch.zeros(2), 1.0))
            with point_plate(x):
                pyro.sample("y", dist.Normal(phi + x[..., 0], 1.0), obs=y)

    error = refused(program, "batch shape (4, 1)", "(4, 2)", ".to_event(1)")
    assert error.where == "program, site 'phi'"


def test_forgotten_to_event_in_the_flat_layout():
    def program(x, y=None, *, task, n_tasks):
        with pyro.plate("task", n_tasks):
            pyro.sample("phi", dist.Normal(torch.zeros(2), 1.0))

    refused(program, "a program that runs", "site phi", ".to_event(1)", layout="flat")


def test_no_local_latent():
    def program(x, y=None):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with task_plate(x), point_plate(x):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    refused(program, "latent site inside plate 'task'", "['theta'], all outside", "inside plate")


def test_two_sites_of_one_name():
    def program(x, y=None):
        with task_plate(x):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            again = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with point_plate(x):
                pyro.sample("y", dist.Normal(phi + again, 1.0), obs=y)

    refused(program, "a name of its own", "two sites", "Rename")


def test_a_parameter_and_a_site_of_one_name():
    class Module(PyroModule):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.tensor(0.0))

        def forward(self, x, y=None):
            theta = pyro.sample("theta", dist.Normal(self.theta, 1.0))
            with task_plate(x):
                phi = pyro.sample("phi", dist.Normal(theta, 1.0))
                with point_plate(x):
                    pyro.sample("y", dist.Normal(phi, 1.0), obs=y)

    with pytest.raises(ProgramError) as caught:
        Problem(Module(), data())
    assert "'theta' twice" in caught.value.found


# Parameters


@pytest.mark.parametrize("kind", ["param", "module"])
def test_parameters_in_the_store_are_refused(kind, untouched):
    net = nn.Linear(2, 1).double()

    def program(x, y=None):
        if kind == "param":
            shift = pyro.param("shift", torch.tensor(0.0))
        else:
            shift = pyro.module("net", net)(x)[..., 0]
        with task_plate(x):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with point_plate(x):
                pyro.sample("y", dist.Normal(phi + shift, 1.0), obs=y)

    with untouched():
        error = refused(program, "nn.Parameter of a PyroModule", "pyro.param", "pyro.sample")
    assert ("'shift'" if kind == "param" else "'net$$$weight'") in error.where


def test_parameters_in_the_store_beside_those_of_the_module_are_refused():
    class Module(PyroModule):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.0))

        def forward(self, x, y=None):
            shift = self.weight + pyro.param("shift", torch.tensor(0.0))
            with task_plate(x):
                phi = pyro.sample("phi", dist.Normal(shift, 1.0))
                with point_plate(x):
                    pyro.sample("y", dist.Normal(phi, 1.0), obs=y)

    error = refused(Module(), "nn.Parameter of a PyroModule", "pyro.param", "PyroModule that owns")
    assert "'shift'" in error.where


# Observations


def test_deterministic_is_no_data():
    def program(x, y=None):
        with task_plate(x):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with point_plate(x):
                pyro.deterministic("fitted", phi + x[..., 0])

    refused(program, "an observed site", "'fitted', which is no data", "adds nothing")


def test_observed_delta_is_no_data():
    def program(x, y=None):
        with task_plate(x):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with point_plate(x):
                pyro.sample("y", dist.Delta(phi + x[..., 0]), obs=y)

    refused(program, "an observed site", "'y', which is no data", "obs of a distribution")


def test_no_observed_site():
    def program(x, y=None):
        with task_plate(x):
            pyro.sample("phi", dist.Normal(0.0, 1.0))

    refused(program, "an observed site", "none", "obs")


def test_batch_shape_of_the_response():
    def program(x, y=None, *, task, n_tasks):
        with pyro.plate("task", n_tasks):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with pyro.plate("point", x.shape[0]):
            pyro.sample("y", dist.Normal(phi[task][:, None] + x[:, :1], 1.0), obs=y[:, None])

    # Pyro broadcasts (20, 1) to a square without a word.
    refused(program, "batch shape (20,)", "(20, 20)", ".to_event(1)", layout="flat")

    def outer(x, y=None, *, task, n_tasks):
        with pyro.plate("task", n_tasks):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with pyro.plate("point", x.shape[0]):
            pyro.sample("y", dist.Normal((phi[task] + x[:, 0]).expand(2, -1), 1.0), obs=y)

    refused(outer, "batch shape (20,)", "(2, 20)", ".to_event(1)", layout="flat")


@pytest.mark.parametrize(
    ("family", "value"),
    [
        (lambda phi: dist.Poisson(phi.exp()), -2.0),
        (lambda phi: dist.Bernoulli(logits=phi), 0.5),
        (lambda phi: dist.Gamma(1.0, phi.exp()), -1.0),
    ],
)
def test_data_outside_the_support(family, value):
    def program(x, y=None):
        with task_plate(x):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with point_plate(x):
                pyro.sample("y", family(phi), obs=y)

    y = torch.ones(N_TASKS, N_POINTS, dtype=torch.float64)
    sites(program, data(y))
    y[2, 3] = value
    error = refused(
        program, "in the support of", f"{value} in 1 of 20 rows", "Correct", tasks=data(y)
    )
    assert isinstance(error, DataError)
    assert "site 'y'" in error.where
    assert family(torch.zeros(())).__class__.__name__ in error.needed


def test_what_stands_in_masked_out_cells_does_not_matter():
    def program(x, y=None):
        with task_plate(x):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with point_plate(x):
                pyro.sample("y", dist.Poisson(phi.exp()), obs=y)

    y = torch.ones(N_TASKS, N_POINTS, dtype=torch.float64)
    y[2, 3] = -1.0
    batch = Batch.of(data(y), "nested")
    with pytest.raises(DataError):
        inspect_program(program, batch)
    assert inspect_program(program, batch.where(batch.y >= 0)).response == "y"


@pytest.mark.parametrize("as_it_is", [True, False])
def test_which_of_two_observed_sites_is_the_response(as_it_is):
    def program(x, y=None):
        with task_plate(x):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with point_plate(x):
                pyro.sample("first", dist.Normal(phi, 1.0), obs=x[..., 0])
                second = y if as_it_is or y is None else 2 * y
                pyro.sample("second", dist.Normal(phi, 1.0), obs=second)

    if as_it_is:
        assert sites(program).response == "second"
    else:
        refused(program, "obs=y", "['first', 'second']", "Pass y itself")


# Programs that fail


def test_a_crash_inside_the_program_names_the_shapes():
    def program(x, y=None):
        with task_plate(x):
            phi = pyro.sample("phi", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with point_plate(x):
                pyro.sample("y", dist.Normal((phi * x).sum(-1), 1.0), obs=y)

    error = refused(
        program, "x (4, 5, 2), y (4, 5) in the nested layout", "RuntimeError", "by hand"
    )
    assert isinstance(error.__cause__, RuntimeError)


def test_a_program_in_another_dtype():
    weight = torch.ones(2, 1)

    def program(x, y=None):
        with task_plate(x):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with point_plate(x):
                pyro.sample("y", dist.Normal(phi + (x @ weight)[..., 0], 1.0), obs=y)

    refused(program, "a program that runs", "dtype", "dtype of x")


def test_impossible_parameters_of_a_distribution():
    def program(x, y=None):
        with task_plate(x):
            phi = pyro.sample("phi", dist.Normal(0.0, -1.0))
            with point_plate(x):
                pyro.sample("y", dist.Normal(phi, 1.0), obs=y)

    refused(program, "a program that runs", "ValueError", "by hand")


@pytest.mark.parametrize("rows", [0, 3])
def test_data_to_read_the_program_from(rows):
    def program(x, y=None): ...

    x = torch.zeros(rows, 1)
    tasks = Tasks.from_flat(x, x[:, 0] if rows == 0 else None, [0] * rows, 2)
    with pytest.raises(ProgramError) as caught:
        Problem(program, tasks)
    assert "at least one row with x and y" in caught.value.needed
    assert ("no y" if rows else "0 rows") in caught.value.found


def test_y_transformed_inside_the_program_is_refused():
    """Predictions and scores would be of another quantity than the y of the tasks."""

    def in_tens(x, y=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
            with pyro.plate("point", x.shape[1], dim=-1):
                pyro.sample("z", dist.Normal(level, 1.0), obs=None if y is None else y / 10)

    tasks = Tasks([[[0.0], [1.0]]], [[1.0, 2.0]])
    with pytest.raises(ProgramError, match="none of which holds y itself"):
        inspect_program(in_tens, Batch.of(tasks, "nested"))


# The joint layout: points of a task depend on each other given φ


def joint_law(x, phi):
    """A MultivariateNormal over the points of a task."""
    distance = x.unsqueeze(-2) - x.unsqueeze(-3)
    k = torch.exp(-distance.square().sum(-1)) * phi.exp()[:, None, None]
    return dist.MultivariateNormal(torch.zeros(x.shape[1]), k + torch.eye(x.shape[1]))


def masked(law, mask):
    """The same with the points outside of the mask decoupled, adding nothing."""
    m = torch.ones_like(law.loc) if mask is None else mask.to(law.loc.dtype)
    m = m.expand(law.batch_shape + law.event_shape)
    k = law.covariance_matrix * m.unsqueeze(-1) * m.unsqueeze(-2)
    return dist.MultivariateNormal(law.loc, k + torch.diag_embed((1 - m) / (2 * torch.pi)))


def joint_program(x, y=None, *, mask=None):
    with pyro.plate("task", x.shape[0], dim=-1):
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        if y is not None and mask is not None:
            y = torch.where(mask, y, torch.zeros_like(y))
        pyro.sample("y", masked(joint_law(x, phi), mask), obs=y)


def ragged():
    """Tasks of 5, 2, 4 and 3 rows: padded cells repeat rows, and the mask leaves them out."""
    counts = torch.tensor([5, 2, 4, 3])
    keep = torch.arange(N_POINTS)[None] < counts[:, None]
    return Tasks(data().x, data().y, keep)


def test_reads_a_program_of_the_joint_layout():
    assert layouts(joint_program) == ("joint",)
    for tasks in (data(), ragged()):
        problem = Problem(joint_program, tasks)
        assert problem.layout == "joint"
        found = problem.sites
        assert [(s.name, s.shape) for s in found.locals] == [("phi", ())]
        assert [(s.name, s.family, s.shape) for s in found.observed] == [
            ("y", "MultivariateNormal", (N_POINTS,))
        ]
        # What the program puts in the place of masked points is still y.
        assert found.response == "y"


def test_joint_layout_takes_a_program_without_local_sites():
    def program(x, y=None, *, mask=None):
        with pyro.plate("task", x.shape[0], dim=-1):
            law = joint_law(x, torch.zeros(x.shape[0]))
            y = None if y is None or mask is None else torch.where(mask, y, torch.zeros_like(y))
            pyro.sample("y", masked(law, mask), obs=y)

    assert Problem(program, ragged()).sites.phi_size == 0


def test_joint_layout_refuses_a_plate_over_points():
    def program(x, y=None, *, mask=None):
        with pyro.plate("task", x.shape[0], dim=-2):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with pyro.plate("point", x.shape[1], dim=-1):
                pyro.sample("y", dist.Normal(phi, 1.0), obs=y)

    # The first site of the run is told of: its plate stands where nested programs have it.
    refused(
        program, "plate 'task' at dim -1 in the joint layout", "dim -2", "dim=-1", layout="joint"
    )

    def inside(x, y=None, *, mask=None):
        with pyro.plate("task", x.shape[0], dim=-1):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with pyro.plate("point", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(phi.mean() + x[..., 0], 1.0).to_event(0), obs=y)

    refused(
        inside, "no plate `point` in a program with the keyword `mask`", "one",
        "points that are independent given φ need none", layout="joint",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("law", "shown"),
    [
        (lambda x, phi: dist.Normal(phi, 1.0), "event shape ()"),
        (lambda x, phi: dist.Normal(phi[:, None] + x[..., 0], 1.0), ""),
        (
            lambda x, phi: dist.MultivariateNormal(torch.zeros(x.shape[1]), torch.eye(x.shape[1])),
            "",
        ),
    ],
    ids=["no event", "points as batch", "one law for all tasks"],
)
def test_joint_layout_wants_one_vector_per_task(law, shown):
    def program(x, y=None, *, mask=None):
        with pyro.plate("task", x.shape[0], dim=-1):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            value = None if y is None else (y[:, 0] if shown else y)
            pyro.sample("y", law(x, phi), obs=value)

    if law(data().x, torch.zeros(N_TASKS)).event_shape:
        # Pyro expands one law to the plate, which is the right shape.
        assert [s.shape for s in sites(program, layout="joint").observed] == [(N_POINTS,)]
        return
    with pytest.raises(ProgramError) as caught:
        sites(program, layout="joint")
    assert shown in caught.value.found


def test_joint_layout_refuses_a_program_that_minds_masked_points():
    def program(x, y=None, *, mask=None):
        with pyro.plate("task", x.shape[0], dim=-1):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            pyro.sample("y", joint_law(x, phi), obs=y)

    with pytest.raises(ProgramError, match="does not depend on points with mask False"):
        Problem(program, data())


def test_joint_layout_refuses_a_y_that_is_transformed_where_it_counts():
    def program(x, y=None, *, mask=None):
        with pyro.plate("task", x.shape[0], dim=-1):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            pyro.sample("y", joint_law(x, phi), obs=None if y is None else 2 * y)

    refused(program, "one observed site that takes y as it is", "none of which holds y itself",
            "transform y in the tasks", layout="joint")  # fmt: skip


def test_a_singular_covariance_says_what_to_do():
    def program(x, y=None, *, mask=None):
        with pyro.plate("task", x.shape[0], dim=-1):
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            k = phi.exp()[:, None, None] * torch.ones(x.shape[1], x.shape[1])
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(x.shape[1]), k), obs=y)

    with pytest.raises(ProgramError) as caught:
        sites(program, layout="joint")
    assert "add noise, or drop points with equal x" in caught.value.do
