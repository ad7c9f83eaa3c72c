"""Every kind of bad input in one table: what was needed, what was found, what to do.

Each entry calls a public entry point. The error must be of the right class, name the offending
thing, and leave no trace in global state. Details of a kind are tested beside its code.
"""

from unittest import mock

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import hbmeta as hb
from hbmeta import (
    bounds,
    certificate_plots,
    cli,
    diagnosis_plots,
    errors,
    models,
    panels,
    predictive_plots,
    tasks,
    theory,
)
from hbmeta.classification import brier
from hbmeta.costs import ledger
from hbmeta.errors import (
    ConvergenceError,
    CurvatureError,
    DataError,
    FileError,
    HbmetaError,
    ProgramError,
    StagingError,
    UnsupportedModelError,
)
from hbmeta.files import read_tensors, write_tensors
from hbmeta.importance import importance
from hbmeta.inference import (
    ABML,
    ANIL,
    BMAML,
    FOMAML,
    MAML,
    NUTS,
    PLATIPUS,
    SGHMC,
    SGLD,
    AmortizedGuide,
    ExactGP,
    ExactLinear,
    ImplicitMAML,
    Laplace,
    LatentNP,
    MetaSGD,
    NestedLaplace,
    NoPooling,
    Pathfinder,
    ProtoNet,
    Quadrature,
    Reptile,
    Variational,
)
from hbmeta.loading import strategy_from_settings
from hbmeta.oracles import bayes_sinusoid, known_kernel
from hbmeta.standard_errors import standard_errors
from tests import cases, fits

# Data


def arrays(*, dtype=np.float64, entry=None):
    """x (2, 3, 1) and y (2, 3), the last entry of x or y replaced."""
    x, y = np.ones((2, 3, 1), dtype), np.ones((2, 3))
    for name, value in (entry or {}).items():
        {"x": x, "y": y}[name].flat[-1] = value
    return x, y


def some(y=1.0) -> tasks.Tasks:
    """Two tasks of three rows with this y everywhere."""
    x, _ = arrays()
    return tasks.Tasks(x, np.full((2, 3), y), ids=["a", "b"])


def from_frame(column=None, values=None, **changes):
    """The table of schools as tasks; a column with other values, other arguments."""
    frame = fits.table()
    if column is not None:
        frame[column] = values
    return tasks.from_frame(frame, **({"group": "school", "x": ["hours"], "y": "score"} | changes))


def one_missing(name):
    values = fits.table()[name].astype(object)
    values[3] = None
    return values if name == "school" else values.astype(float)


# Programs


def task(x):
    return pyro.plate("task", x.shape[0], dim=-2)


def point(x):
    return pyro.plate("point", x.shape[1], dim=-1)


def without_point(x, y=None):
    with task(x):
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(phi + x[..., 0], 1.0), obs=y)


def with_plates_named_alike(x, y=None):
    with pyro.plate("columns", 2):
        pyro.sample("first", dist.Normal(0.0, 1.0))
    with pyro.plate("columns", 3):
        pyro.sample("second", dist.Normal(0.0, 1.0))


def with_a_latent_inside_point(x, y=None):
    with task(x):
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with point(x):
            error = pyro.sample("error", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(phi + error, 1.0), obs=y)


def with_a_discrete_local(x, y=None):
    with task(x):
        kind = pyro.sample("kind", dist.Bernoulli(0.5))
        with point(x):
            pyro.sample("y", dist.Normal(kind, 1.0), obs=y)


def with_deterministic_data(x, y=None):
    with task(x):
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with point(x):
            pyro.deterministic("score", phi + x[..., 0])


def with_a_covariance(x, y=None):
    """Positive definite for |φ| < 1 alone; small y pull φ to 1."""
    mean = pyro.sample("mean", dist.Normal(0.5, 1.0))
    with task(x):
        phi = pyro.sample("phi", dist.Normal(mean, 0.1))
        rows = [torch.stack([torch.ones_like(phi), phi], -1)]
        rows.append(rows[0].flip(-1))
        factor = torch.linalg.cholesky(torch.stack(rows, -2))
        with point(x):
            pyro.sample("y", dist.Normal(0.0, factor[..., 1, 1]), obs=y)


def with_a_branch(x, y=None):
    with task(x):
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        scale = 2.0 if phi.sum() > 0 else 1.0
        with point(x):
            pyro.sample("y", dist.Normal(phi, scale), obs=y)


def with_a_number_for_a_tensor(x, y=None):
    scale = pyro.sample("log_scale", dist.Normal(0.0, 1.0)).exp().detach()
    with task(x):
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with point(x):
            pyro.sample("y", dist.Normal(phi, scale), obs=y)


def with_a_param(x, y=None):
    shift = pyro.param("shift", torch.tensor(0.0))
    with task(x):
        phi = pyro.sample("phi", dist.Normal(shift, 1.0))
        with point(x):
            pyro.sample("y", dist.Normal(phi, 1.0), obs=y)


def with_an_improper_prior(x, y=None):
    """log p(φ) grows as 9.5 φ²: no probability density, and no mode either."""
    with task(x):
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        pyro.factor("bonus", 10.0 * phi**2)
        with point(x):
            pyro.sample("y", dist.Normal(phi, 1.0), obs=y)


def with_a_hill(x, y=None):
    """The loss falls as −9.5 φ² on both sides of the start."""
    start = pyro.sample("start", dist.Normal(0.0, 1.0))
    with task(x):
        phi = pyro.sample("phi", dist.Normal(start, 1.0))
        with point(x):
            pyro.factor("bonus", 10.0 * phi**2 + 0.0 * x[..., 0])
            pyro.sample("y", dist.Normal(phi, 1.0), obs=y)


def normed() -> nn.Module:
    """A network whose batch norm keeps no running statistics."""
    return nn.Sequential(nn.BatchNorm1d(1, track_running_stats=False))


def fit(program=None, data=None, **settings):
    """A fit of one step, of varying intercepts unless another program is given."""
    program = models.VaryingEffects() if program is None else program
    data = some() if data is None else data
    return MAML().fit(program, data, **({"steps": 1, "compile": False} | settings))


# Files


def saved(path, *, keep=1.0, flip=None, version=1, **header):
    """A saved fit: cut short, with a flipped bit, of another version, or with another header."""
    with mock.patch("hbmeta.files.VERSION", version):
        fits.fitted("MAML").save(path)
    if header:
        write_tensors(path, read_tensors(path)[0], read_tensors(path)[1] | header)
    content = bytearray(path.read_bytes())
    if flip is not None:
        content[flip] ^= 1
    path.write_bytes(content[: int(keep * len(content))])
    return path


def saved_own_program(path):
    fits.fit(MAML(), cases.case("linear_own_flat").tasks, cases.linear_flat).save(path)
    return path


def resumed_with_another_seed(path):
    with mock.patch("hbmeta.training._CHECKPOINT_EVERY", 2):
        fits.fit(MAML(), checkpoint=path)
    fits.fit(MAML(), checkpoint=path, seed=1)


def no_query():
    known = fits.task_set().tasks
    nothing = known.keep(torch.zeros(known.n_points, dtype=torch.bool))
    return hb.compare({"maml": fits.fitted("MAML")}, hb.Episode(known, nothing))


def with_a_mask_ignored(x, y=None, *, mask=None):
    with pyro.plate("task", x.shape[0], dim=-1):
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        law = dist.Normal(phi[:, None] + x[..., 0], 1.0)
        law = dist.MultivariateNormal(law.loc, torch.eye(x.shape[1]))
        pyro.sample("y", law, obs=y)


def classes() -> models.ClassConditional:
    return models.ClassConditional(None, 3)


def labelled() -> tasks.Tasks:
    """Two tasks with each of three classes once, in the plane."""
    x = np.stack([np.eye(3, 2)] * 2)
    return tasks.Tasks(x, torch.tensor([[0, 1, 2]] * 2), ids=["a", "b"])


def one_class() -> tasks.Tasks:
    """A task with one point of the first class."""
    return tasks.Tasks(np.eye(3, 2)[None, :1], torch.tensor([[0]]), ids=["a"])


def kind(id, found, call, names="", error=DataError):
    """A kind of bad input.

    Args:
        found: what the error's "found" has to show.
        call: what goes wrong, given the path of a file that does not exist.
        names: what the message has to name beside it: the site, the column, the file.
        error: the class of the error, exactly.
    """
    return pytest.param(error, found, names, call, id=id)


FILE = "fit.hbmeta"
BOUNDED = "0 and 1"
WAVES, PROCESSES = tasks.Sinusoids(noise=0.1, shots=2), tasks.GaussianProcessTasks()

DATA = [
    kind(
        "NaN in x",
        "nan in column 'dose' of x, task 'b', row 2",
        lambda _: tasks.Tasks(*arrays(entry={"x": np.nan}), ids=["a", "b"], features=["dose"]),
    ),
    kind(
        "infinity in y",
        "inf in y, task 'b', row 2",
        lambda _: tasks.Tasks(*arrays(entry={"y": np.inf}), ids=["a", "b"]),
    ),
    kind(
        "x and y of unequal lengths",
        "shape (2, 4)",
        lambda _: tasks.Tasks(arrays()[0], np.zeros((2, 4))),
        "(2, 3)",
    ),
    kind(
        "flat x and y of unequal lengths",
        "x (3, 1), y (4,), task (3,)",
        lambda _: tasks.Tasks.from_flat(np.zeros((3, 1)), np.zeros(4), [0, 0, 1], 2),
    ),
    kind(
        "tasks of unequal lengths as lists",
        "inhomogeneous",
        lambda _: tasks.Tasks([[[1.0], [2.0]], [[3.0]]]),
        "pass a mask",
    ),
    kind(
        "a mask of unequal lengths",
        "a list that makes no array of bools",
        lambda _: tasks.Tasks(*arrays(), mask=[[True] * 3, [True]]),
        "(2, 3)",
    ),
    kind("wrong rank", "shape (2, 3)", lambda _: tasks.Tasks(np.zeros((2, 3)))),
    kind(
        "integers where floats belong",
        "int64",
        lambda _: tasks.Tasks(*arrays(dtype=np.int64)),
        "x.double()",
    ),
    kind(
        "class labels of a wrong dtype",
        "int32",
        lambda _: tasks.Tasks(arrays()[0], np.zeros((2, 3), np.int32)),
        "y.long() for class labels",
    ),
    kind(
        "a negative class label",
        "the label -1",
        lambda _: tasks.Tasks(arrays()[0], np.full((2, 3), -1)),
    ),
    kind(
        "a task id twice",
        "the id 'a' more than once",
        lambda _: tasks.Tasks(*arrays(), ids=["a", "a"]),
    ),
    kind("an unknown task id", "'z'", lambda _: some().select(["a", "z"]), "'a', 'b'"),
    kind("no task", "none", lambda _: tasks.Tasks(np.zeros((0, 3, 1)))),
    kind(
        "parts of other tasks in an episode",
        "'b'",
        lambda _: hb.Episode(some(), some()[[0]]),
        "tasks.select(ids)",
    ),
    kind("tensors in an episode", "Tensor", lambda _: hb.Episode(*torch.ones(2, 3))),
    kind("a seed below 0", "-1", lambda _: some().split(2, seed=-1)),
    kind(
        "a covariance of tasks that is not positive definite",
        "smallest eigenvalue -1",
        lambda _: tasks.LinearTasks([0.0, 0.0], [[1.0, 2.0], [2.0, 1.0]], noise=1.0),
        "covariance",
    ),
    kind(
        "a range of a family whose ends are the wrong way round",
        "(5.0, 0.1)",
        lambda _: tasks.Sinusoids(amplitude=(5.0, 0.1)),
        "amplitude",
    ),
    kind(
        "an unknown kernel",
        "'matern'",
        lambda _: tasks.GaussianProcessTasks(kernel="matern"),
        "'matern52'",
    ),
    kind("a single class", "1", lambda _: tasks.Clusters(ways=1), "at least 2"),
    kind(
        "an oracle for waves without noise",
        "noise=0.0",
        lambda _: bayes_sinusoid(tasks.Sinusoids(), tasks.Sinusoids().sample(2, seed=0)),
        "noise above 0",
    ),
    kind(
        "an oracle with too few nodes",
        "for task",
        lambda _: bayes_sinusoid(WAVES, WAVES.sample(2, seed=0), nodes=(4, 4)),
        "4 × 4 nodes",
        error=ConvergenceError,
    ),
    kind(
        "a truth of other tasks",
        "shape (3,)",
        lambda _: known_kernel(
            PROCESSES, PROCESSES.sample(2, seed=0), PROCESSES.sample_with_truth(3, seed=0)[1]
        ),
        "'lengthscale'",
    ),
    kind(
        "a covariance in a model that is not positive definite",
        "smallest eigenvalue -1",
        lambda _: models.LinearRegression(covariance=[[1.0, 2.0], [2.0, 1.0]]),
        "covariance",
    ),
    kind(
        "a network without widths",
        "(40, 0)",
        lambda _: models.NeuralRegression(hidden=(40, 0)),
        "hidden=(40, 40)",
    ),
    kind(
        "a policy of batch norm without batch norm",
        "no network",
        lambda _: models.NeuralRegression(batch_norm="query"),
        "nn.BatchNorm layer",
    ),
    kind(
        "an unknown policy of batch norm",
        "'batch'",
        lambda _: models.NeuralRegression(network=normed(), batch_norm="batch"),
        "'support' is inductive",
    ),
    kind(
        "stored statistics that a batch norm does not store",
        "BatchNorm1d '0' with track_running_stats=False",
        lambda _: models.NeuralRegression(network=normed(), batch_norm="stored"),
        "batch_norm='support'",
    ),
    kind(
        "labels beyond the classes",
        "0.0 to 5.0",
        lambda _: models.NeuralClassifier(3).bind(
            tasks.Tasks(np.ones((1, 2, 1)), np.array([[0, 5]]))
        ),
        "raise ways",
    ),
]

FRAMES = [
    kind("an unknown column", "'hours'", lambda _: from_frame(x=["hour"]), "Was 'hours' meant?"),
    kind("a number as a column", "0 of type int", lambda _: from_frame(group=0)),
    kind("no list of inputs", "None", lambda _: from_frame(x=None), "x=[]"),
    kind(
        "a missing value",
        "1 of 35 missing, first in the rows [3]",
        lambda _: from_frame("hours", one_missing("hours")),
        "'hours'",
    ),
    kind(
        "a column of missing values",
        "35 of 35 missing",
        lambda _: from_frame("hours", np.nan, missing="drop"),
        "'hours'",
    ),
    kind(
        "a missing value in the group column",
        "1 of 35 missing, first in the rows [3]",
        lambda _: from_frame("school", one_missing("school")),
        "'school'",
    ),
    kind(
        "fractions in the group column",
        "0.5 of type float",
        lambda _: from_frame("school", np.arange(35) + 0.5),
        "'school'",
    ),
    kind(
        "an infinite value",
        "35 infinite, first in the rows [0, 1",
        lambda _: from_frame("hours", np.inf),
        "'hours'",
    ),
    kind(
        "a constant column to standardise",
        "1.0 in all of its 35 rows",
        lambda _: from_frame("hours", 1.0, standardise=["hours"]),
        "'hours'",
    ),
    kind(
        "an unseen category",
        "the unseen 'male'",
        lambda _: from_frame("sex", ["m", "f"] * 17 + ["m"], x=["sex"]).schema.encode(
            fits.table().assign(sex="male")
        ),
        "'sex': 'f', 'm'",
    ),
    kind("an unknown policy", "'skip'", lambda _: from_frame(missing="skip"), "'raise', 'drop'"),
    kind(
        "a set that is split twice",
        "TaskSet(6 groups",
        lambda _: fits.task_set().split(seed=0).split(seed=0),
    ),
    kind(
        "a share of groups that leaves no new one",
        "groups=1.0 of 6",
        lambda _: fits.task_set().split(groups=1.0, seed=0),
    ),
]

PROGRAMS = [
    kind(
        "a missing plate",
        "plates ['task'], batch shape (2, 3)",
        lambda _: fit(without_point),
        "without_point, site 'y'",
        error=ProgramError,
    ),
    kind(
        "two plates named alike",
        "two (sizes 2 and 3",
        lambda _: fit(with_plates_named_alike),
        "site 'second': needed one plate named 'columns'",
        error=ProgramError,
    ),
    kind(
        "a latent inside the plate of points",
        "a latent inside plate 'point'",
        lambda _: fit(with_a_latent_inside_point),
        "site 'error'",
        error=ProgramError,
    ),
    kind(
        "a discrete local latent",
        "a discrete local latent (Bernoulli)",
        lambda _: fit(with_a_discrete_local),
        "site 'kind'",
        error=ProgramError,
    ),
    kind(
        "a deterministic site taken for data",
        "deterministic site 'score', which is no data",
        lambda _: fit(with_deterministic_data),
        error=ProgramError,
    ),
    kind(
        "a parameter in Pyro's store",
        "a pyro.param statement",
        lambda _: fit(with_a_param),
        "'shift'",
        error=ProgramError,
    ),
    kind(
        "a program that fails",
        "TypeError: ",
        lambda _: fit(lambda x: None),
        "x (2, 3, 1), y (2, 3)",
        error=ProgramError,
    ),
    kind(
        "negative counts",
        "-2.0 in task 'a' (6 of 6 rows)",
        lambda _: fit(models.VaryingEffects(family="poisson"), some(-2.0)),
        "poisson",
    ),
    kind(
        "negative counts in a program of one's own",
        "-2.0 in 6 of 6 rows",
        lambda _: fit(cases.gamma_poisson, some(-2.0)),
        "site 'y': needed data in the support of Poisson",
    ),
    kind(
        "a coefficient of an unknown column",
        "'x0'",
        lambda _: fit(models.VaryingEffects(fixed=["x_0"])),
        "'x_0'",
    ),
    kind(
        "an unknown family", "'gamma'", lambda _: models.VaryingEffects(family="gamma"), "gaussian"
    ),
]

FUNCTIONS = [
    kind(
        "an unknown kernel of a Gaussian process",
        "'gauss'",
        lambda _: models.GaussianProcess("gauss"),
        "'rbf'",
    ),
    kind(
        "a range of lengthscales the wrong way round",
        "(1.0, 0.2)",
        lambda _: models.GaussianProcess(lengthscale=(1.0, 0.2)),
        "lengthscale",
    ),
    kind(
        "a mask that a program ignores",
        "beside a masked point",
        lambda _: ExactGP().fit(with_a_mask_ignored, some()),
        "mask False",
        error=ProgramError,
    ),
    kind(
        "independent points for an exact Gaussian process",
        "whose points are independent given φ",
        lambda _: ExactGP().fit(fits.model(), fits.task_set()),
        "Quadrature",
        error=UnsupportedModelError,
    ),
    kind(
        "a grid over many parameters",
        "6",
        lambda _: Quadrature().fit(classes(), labelled()),
        "at most 3",
        error=UnsupportedModelError,
    ),
    kind(
        "a label beyond the classes of a model",
        "from 0 to 2",
        lambda _: ProtoNet().fit(models.ClassConditional(None, 2), labelled()),
        "labels 0..1",
    ),
    kind(
        "a class without points under a flat prior",
        "'a'",
        lambda _: ProtoNet().fit(classes(), labelled(), steps=1, compile=False).adapt(one_class()),
        "prior_scale",
    ),
    kind(
        "a flat task prior under a bound of the evidence",
        "a flat one of 'means'",
        lambda _: AmortizedGuide().fit(classes(), labelled()),
        "prior_scale",
        error=UnsupportedModelError,
    ),
    kind(
        "class means without a prior, variational",
        "a flat one of 'means'",
        lambda _: Variational().fit(classes(), labelled()),
        "prior_scale",
        error=UnsupportedModelError,
    ),
    kind(
        "a full covariance of a network",
        "121",
        lambda _: Variational(family="full").fit(
            models.NeuralRegression(hidden=(40,)), fits.task_set()
        ),
        "family='low_rank'",
        error=UnsupportedModelError,
    ),
    kind(
        "a rank that is no lower",
        "rank 1 with 1",
        lambda _: Variational(family="low_rank", rank=1).fit(fits.model(), fits.task_set()),
        "family='full'",
        error=UnsupportedModelError,
    ),
    kind(
        "a distribution of no theta",
        "none in",
        lambda _: Variational(theta="distribution").fit(
            cases.case("linear_own_nested").program, cases.case("linear_own_nested").tasks
        ),
        "theta='point'",
        error=UnsupportedModelError,
    ),
    kind(
        "more tasks in a step than there are",
        "99",
        lambda _: Variational().fit(fits.model(), fits.task_set(), tasks_per_step=99),
        "tasks_per_step between 1 and 6",
    ),
    kind(
        "to refine what no network amortizes",
        "one of MAML",
        lambda _: Variational().refine(fits.fitted("MAML")),
        "AmortizedGuide",
        error=UnsupportedModelError,
    ),
    kind(
        "an embedding that a likelihood would shrink",
        "'embedding'",
        lambda _: NoPooling().fit(models.ClassConditional((2,), 3, prior_scale=1.0), labelled()),
        "ProtoNet",
        error=UnsupportedModelError,
    ),
]

STRATEGIES = [
    kind(
        "one group and a variance between groups, exactly",
        "one group",
        lambda _: ExactLinear().fit(fits.model(), fits.task_set().tasks[[0]]),
        "ExactLinear.fit",
    ),
    kind(
        "one group and a variance between groups, amortized",
        "one group",
        lambda _: AmortizedGuide().fit(fits.model(), fits.task_set().tasks[[0]]),
        "AmortizedGuide.fit",
    ),
    kind(
        "tasks and model swapped",
        "TaskSet",
        lambda _: MAML().fit(fits.task_set(), fits.model()),
        "the model first",
        error=UnsupportedModelError,
    ),
    kind(
        "a data frame as tasks", "DataFrame", lambda _: fit(data=fits.table()), "tasks.from_frame"
    ),
    kind(
        "a source of something else",
        "Mock, whose sample returns int",
        lambda _: fit(data=mock.Mock(sample=lambda n_tasks, *, seed: 3)),
    ),
    kind(
        "a source of fewer tasks than asked for",
        "64 tasks",
        lambda _: MAML().fit(
            models.NeuralRegression((4,)),
            mock.Mock(sample=lambda n, *, seed: tasks.Sinusoids().sample(min(n, 64), seed=seed)),
        ),
        "Draw n_tasks",
    ),
    kind(
        "no tasks in a step of a source",
        "tasks_per_step=0",
        lambda _: MAML().fit(models.NeuralRegression((4,)), tasks.Sinusoids(), tasks_per_step=0),
        "25 tasks",
    ),
    kind(
        "yes/no answers for an exact linear strategy",
        "Bernoulli",
        lambda _: ExactLinear().fit(cases.case("bernoulli").program, cases.case("bernoulli").tasks),
        "NUTS",
        error=UnsupportedModelError,
    ),
    kind(
        "module parameters without a prior under NUTS",
        "module parameter 'weight' without one",
        lambda _: NUTS().fit(fits.Heads(), fits.task_set()),
        error=UnsupportedModelError,
    ),
    kind(
        "a curvature that is not positive definite",
        "task 'a' with smallest eigenvalue -16",
        lambda _: ExactLinear().fit(with_an_improper_prior, some(), compile=False),
        error=CurvatureError,
    ),
    kind(
        "a fit that diverges",
        "at step 0",
        lambda _: MAML(steps=60, step_size=1e3).fit(
            fits.Heads(), fits.task_set(), steps=1, compile=False
        ),
        "MAML.fit",
        error=ConvergenceError,
    ),
    kind("no step", "steps=0", lambda _: fit(steps=0)),
    kind("a part of a step", "steps=2.5", lambda _: fit(steps=2.5)),
    kind("a negative learning rate", "learning_rate=-1", lambda _: fit(learning_rate=-1)),
    kind(
        "more tasks per step than there are",
        "100",
        lambda _: fit(cases.linear_nested, some(), tasks_per_step=100),
        "between 1 and 2",
    ),
    kind(
        "a branch on the value of a tensor",
        "read from a tensor, in line",
        lambda _: NUTS(draws=5, chains=1).fit(with_a_branch, some(), compile="graph"),
        error=StagingError,
    ),
    kind(
        "a gradient that is cut",
        "a slope of",
        lambda _: NUTS(draws=5, chains=1).fit(with_a_number_for_a_tensor, some(), compile=False),
        error=ProgramError,
    ),
    kind("an unknown tier", "'fast'", lambda _: fit(compile="fast"), "'auto'"),
    kind("an unknown device", "'nowhere'", lambda _: fit(device="nowhere")),
    kind("a seed that is text", "'one'", lambda _: fit(seed="one")),
    kind("a negative step size", "step_size=-1", lambda _: MAML(step_size=-1)),
    kind("no draws", "'draws': 0", lambda _: NUTS(draws=0)),
    kind("a number as text", "'target_accept': '0.9'", lambda _: NUTS(target_accept="0.9")),
    kind(
        "a parametrisation by another name",
        "'centred'",
        lambda _: NUTS(parametrisation="centred"),
        "'non-centered'",
    ),
    kind(
        "starts by another name",
        "'adapt_diag'",
        lambda _: NUTS(initial="adapt_diag"),
        "'spread' or 'pathfinder'",
    ),
    kind(
        "no draws of φ for each θ",
        "proposals=0",
        lambda _: NestedLaplace(proposals=0),
        "1 or more",
    ),
    kind("no paths", "paths=0", lambda _: Pathfinder(paths=0), "1 or more"),
    kind("too few draws for a tail", "draws=50", lambda _: Pathfinder(draws=50), "100 or more"),
    kind(
        "module parameters without a prior under Pathfinder",
        "module parameter",
        lambda _: Pathfinder().fit(fits.Heads(), fits.task_set()),
        "AmortizedGuide",
        error=UnsupportedModelError,
    ),
    kind(
        "centering what has its noise as a site",
        "z ~ Normal",
        lambda _: NUTS(parametrisation="centered").fit(
            cases.eight_schools, cases.case("eight_schools").tasks
        ),
        '"as written"',
        error=UnsupportedModelError,
    ),
    kind("a step of no size", "'step_size': 0", lambda _: SGLD(step_size=0), "above 0"),
    kind("mini-batches of no rows", "'rows': 0", lambda _: SGLD(rows=0), "1 or more"),
    kind("friction that stops", "friction=9.0", lambda _: SGHMC(friction=9.0), "at most 1"),
    kind(
        "chains of tasks that do not stay",
        "tasks_per_step",
        lambda _: SGLD().fit(fits.model(), fits.task_set(), tasks_per_step=2),
        "the same tasks at every step",
    ),
    kind(
        "importance sampling from a point",
        "a point (Delta)",
        lambda _: importance(fits.adapted("MAML")),
        "Laplace.soften",
        error=UnsupportedModelError,
    ),
    kind(
        "importance sampling with few draws",
        "10",
        lambda _: importance(fits.adapted("AmortizedGuide"), draws=10),
        "100 or more",
    ),
    kind(
        "a number of draws as text",
        "draws='1000'",
        lambda _: fits.adapted("ExactLinear").predict(fits.new_tasks(), draws="1000"),
    ),
    kind(
        "a number of draws as text in a comparison",
        "draws='1000'",
        lambda _: hb.compare({"exact": fits.fitted("ExactLinear")}, fits.task_set(), draws="1000"),
    ),
    kind("an encoder of no width", "hidden=0", lambda _: AmortizedGuide(hidden=0)),
    kind("a family of no densities", "family='normal'", lambda _: Variational(family="normal")),
    kind("an order below zero", "alpha=-1.0", lambda _: Variational(alpha=-1.0)),
    kind("no draws of a bound", "draws=0", lambda _: Variational(draws=0)),
    kind(
        "a joint flow",
        "family='flow'",
        lambda _: Variational(family="flow", theta="distribution"),
        "NUTS",
    ),
    kind("an objective by another name", "'elbo'", lambda _: LatentNP(objective="elbo")),
    kind("a decoder without layers", "()", lambda _: models.LatentProcess(hidden=())),
]

LENS = [
    kind("a step size as text", "step_size='0.1'", lambda _: MAML(step_size="0.1"), "finite"),
    kind("steps that are true", "steps=True", lambda _: FOMAML(steps=True), "whole steps"),
    kind("a momentum of 1", "momentum=1.0", lambda _: FOMAML(momentum=1.0), "0.9"),
    kind("no minibatch", "batches=0", lambda _: Reptile(batches=0), "whole number of batches"),
    kind("an unknown inner optimizer", "'sgd'", lambda _: ANIL(optimizer="sgd"), "'descent'"),
    kind("an unknown reduction", "'total'", lambda _: MAML(reduction="total"), "'sum'"),
    kind("recomputing as text", "'yes'", lambda _: MAML(recompute="yes"), "recompute among"),
    kind(
        "a search in half precision",
        "bfloat16",
        lambda _: NoPooling().fit(fits.model(), fits.new_tasks().to(dtype=torch.bfloat16)),
        "float32",
    ),
    kind("step sizes of an unknown kind", "'layer'", lambda _: MetaSGD(learned_step="layer")),
    kind("step sizes per step, none learned", "learned_step=None", lambda _: MAML(per_step=True)),
    kind(
        "a direction of travel that learns step sizes",
        "learned_step='site'",
        lambda _: Reptile(learned_step="site"),
        "MetaSGD",
    ),
    kind("a direction without travel", "steps=0", lambda _: Reptile(steps=0)),
    kind("no damping", "damping=0", lambda _: ImplicitMAML(damping=0), "above 0"),
    kind("a negative tolerance", "tolerance=-1", lambda _: ImplicitMAML(tolerance=-1)),
    kind("no inner step", "steps=0", lambda _: ImplicitMAML(steps=0), "1 or more"),
    kind("sites that are no names", "3", lambda _: ImplicitMAML(sites=3), "a tuple of names"),
    kind(
        "an unknown site that moves",
        "'layer9'",
        lambda _: ANIL(sites="layer9").fit(models.NeuralRegression((4,)), WAVES, steps=1),
        "layer2.bias",
        error=UnsupportedModelError,
    ),
    kind(
        "no site that moves",
        "sites=()",
        lambda _: ImplicitMAML(sites=()).fit(fits.model(), fits.task_set(), steps=1),
        error=UnsupportedModelError,
    ),
    kind(
        "other step sizes than were learned",
        "learned_step='site'",
        lambda _: fits.fitted("MAML").adapt(fits.new_tasks(), learned_step="site"),
        "fit anew",
    ),
    kind(
        "a minimum where the curvature is negative",
        "curvature",
        lambda _: ImplicitMAML(damping=1.0).fit(with_a_hill, some(), steps=1, compile=False),
        "damping",
        error=CurvatureError,
    ),
    kind(
        "a first-order bias without an inner loop",
        "ExactLinear",
        lambda _: FOMAML.bias(fits.fitted("ExactLinear"), fits.task_set().split(seed=0)),
        "an inner loop",
        error=UnsupportedModelError,
    ),
    kind(
        "a first-order bias of tasks without a query",
        "Tasks",
        lambda _: FOMAML.bias(fits.fitted("MAML"), fits.new_tasks()),
        "an Episode",
    ),
    kind(
        "a first-order bias of other features",
        "['x0']",
        lambda _: FOMAML.bias(fits.fitted("MAML"), some().split(2, seed=0)),
        "['hours']",
    ),
    kind("a residual of too few steps", "[0.1]", lambda _: theory.residual(1.0, [0.1], 2), "or 2"),
    kind(
        "a residual with too much momentum",
        "1.0",
        lambda _: theory.residual(1.0, 0.1, 2, momentum=1.0),
        "[0, 1)",
    ),
    kind(
        "the prior of iterates that diverge",
        "inf",
        lambda _: theory.implied_precision(1.0, float("inf")),
        "Lower the step size",
    ),
    kind(
        "the prior of a flat loss",
        "0.0",
        lambda _: theory.implied_precision(0.0, 0.5),
        "a positive, finite curvature",
    ),
    kind(
        "an unknown baseline of a ledger",
        "'maml2'",
        lambda _: ledger({"maml": MAML()}, fits.model(), fits.task_set(), baseline="maml2"),
        "The nearest name is 'maml'",
    ),
]

USE = [
    kind(
        "a setting of the fit alone",
        "hidden=4",
        lambda _: fits.fitted("AmortizedGuide").adapt(fits.new_tasks(), hidden=4),
        "of which there are none",
    ),
    kind(
        "a curvature for adapting that the program does not have",
        "VaryingEffects",
        lambda _: fits.fit(Laplace()).adapt(fits.new_tasks(), curvature="kronecker"),
        "dense layers",
        error=UnsupportedModelError,
    ),
    kind(
        "a rank for adapting as large as φ",
        "rank 2 with 1",
        lambda _: fits.fit(Variational()).adapt(fits.new_tasks(), family="low_rank"),
        "below the number of parameters",
        error=UnsupportedModelError,
    ),
    kind(
        "an unknown setting",
        "'step'",
        lambda _: fits.fitted("MAML").adapt(fits.new_tasks(), step=3),
        "'steps'",
    ),
    kind(
        "tasks with other features",
        "['x0']",
        lambda _: fits.fitted("MAML").adapt(some()),
        "['hours']",
    ),
    kind(
        "an episode as the support",
        "Episode",
        lambda _: fits.fitted("MAML").adapt(fits.new_tasks().split(1, seed=0)),
    ),
    kind(
        "a support without y",
        "no y",
        lambda _: fits.fitted("MAML").adapt(tasks.Tasks(arrays()[0], features=["hours"])),
    ),
    kind(
        "an unknown task in a posterior",
        "'z'",
        lambda _: fits.fitted("MAML").posterior.select(["z"]),
    ),
    kind(
        "inputs of other tasks",
        "6 tasks",
        lambda _: fits.adapted("MAML").predict(fits.task_set().tasks),
        "these 2 tasks",
    ),
    kind(
        "an array for fewer tasks",
        "1 tasks",
        lambda _: fits.adapted("MAML").predict(fits.new_tasks().x[:1]),
    ),
    kind(
        "an interval in percent",
        "90",
        lambda _: fits.adapted("MAML").predict(fits.new_tasks()).interval(90),
        BOUNDED,
    ),
    kind(
        "a level above 1",
        "1.5",
        lambda _: fits.adapted("MAML").predict(fits.new_tasks()).quantile(1.5),
        BOUNDED,
    ),
    kind(
        "an interval in percent for a frame",
        "90",
        lambda _: fits.fitted("MAML").predict(fits.table(), interval=90),
        BOUNDED,
    ),
    kind(
        "y of another shape",
        "shape (5,)",
        lambda _: fits.adapted("MAML").predict(fits.new_tasks()).log_prob(torch.zeros(5)),
    ),
    kind(
        "a frame for a fit without one",
        "a fit on tasks that came without a data frame",
        lambda _: fits.fit(MAML(), fits.task_set().tasks).predict(fits.table()),
    ),
    kind(
        "a known group among the support rows",
        "rows of 'f', which was fitted on",
        lambda _: fits.fitted("MAML").predict(fits.table(), support=fits.table()),
    ),
    kind("an empty query", "no query row in any of 6 tasks", lambda _: no_query()),
    kind(
        "a comparison of data that were not split",
        "a set that was not split",
        lambda _: hb.compare({"maml": fits.fitted("MAML")}, fits.task_set()),
    ),
    kind(
        "an unknown reference",
        "'nuts'",
        lambda _: hb.compare(
            {"nut": fits.fitted("MAML")}, fits.task_set().split(seed=0), reference="nuts"
        ),
        "The nearest name is 'nut'",
    ),
    kind("nothing to compare", "none", lambda _: hb.compare({}, fits.task_set())),
    kind("nothing to account for", "none", lambda _: ledger({}, fits.Heads(), fits.task_set())),
    kind(
        "a ledger of a strategy that is not trained",
        "NUTS under 'nuts'",
        lambda _: ledger({"nuts": NUTS()}, fits.Heads(), fits.task_set()),
        "gradient steps on θ",
        error=UnsupportedModelError,
    ),
    kind(
        "an oracle of other tasks",
        "oracle 'truth' of 6 rows of 2 tasks",
        lambda _: hb.compare(
            {"maml": fits.fitted("MAML")},
            fits.task_set().split(seed=0),
            oracles={"truth": fits.adapted("MAML").predict(fits.new_tasks())},
        ),
        "these 6 tasks",
    ),
    kind(
        "an unknown baseline",
        "'exakt'",
        lambda _: hb.compare(
            {"exact": fits.fitted("MAML")}, fits.task_set().split(seed=0), baseline="exakt"
        ),
        "The nearest name is 'exact'",
    ),
    kind(
        "a label without a probability",
        "2",
        lambda _: brier(torch.full((1, 2), 0.5), torch.tensor([2])),
        "from 0 to 1",
    ),
    kind(
        "a figure of no grid",
        "4 rows of 1 features in 'maml'",
        lambda _: panels.regions(
            {"maml": fits.adapted("MAML").predict(fits.new_tasks())}, fits.new_tasks()
        ),
        "a grid of 2 features",
    ),
]

FILES = [
    kind("a missing file", "no such file", lambda path: hb.load(path), FILE, error=FileError),
    kind(
        "a corrupt file",
        "checksum",
        lambda path: hb.load(saved(path, flip=-5)),
        FILE,
        error=FileError,
    ),
    kind(
        "a truncated file",
        "damaged",
        lambda path: hb.load(saved(path, keep=0.7)),
        FILE,
        error=FileError,
    ),
    kind(
        "a newer file",
        "version 2 of the layout, newer than 1",
        lambda path: hb.load(saved(path, version=2)),
        FILE,
        error=FileError,
    ),
    kind(
        "a checkpoint in place of a fit",
        "'checkpoint'",
        lambda path: hb.load(saved(path, kind="checkpoint")),
        FILE,
        error=FileError,
    ),
    kind(
        "an unknown strategy in a file",
        "'MAMMAL'",
        lambda path: hb.load(saved(path, strategy="MAMMAL")),
        FILE,
        error=UnsupportedModelError,
    ),
    kind(
        "an unknown strategy",
        "'MAMMAL'",
        lambda _: strategy_from_settings("MAMMAL", {}),
        "MAML",
        error=UnsupportedModelError,
    ),
    kind(
        "a program that was not given",
        "no model=",
        lambda path: hb.load(saved_own_program(path)),
        "'linear_flat'",
        error=UnsupportedModelError,
    ),
    kind(
        "another program",
        "model=linear_nested",
        lambda path: hb.load(saved_own_program(path), model=cases.linear_nested),
        "'linear_flat'",
        error=UnsupportedModelError,
    ),
    kind(
        "the checkpoint of another fit",
        "another seed",
        resumed_with_another_seed,
        FILE,
        error=FileError,
    ),
    kind(
        "a folder in place of a file",
        "a folder",
        lambda path: fits.fitted("MAML").save(path.parent),
        error=FileError,
    ),
]


def item_effects(x, y=None):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    item = pyro.sample("item", dist.Normal(x.new_zeros(()), scale).expand([2]).to_event(1))
    with pyro.plate("task", x.shape[0], dim=-2):
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with pyro.plate("point", x.shape[1], dim=-1):
            return pyro.sample("y", dist.Normal(phi + item.sum() * x[..., 0], 1.0), obs=y)


LAPLACE = [
    kind(
        "numbers for every task of an endless source",
        "LinearTasks, which draws new ones",
        lambda _: Variational().fit(
            models.LinearRegression(),
            tasks.LinearTasks([0.0, 1.0], [[1.0, 0.0], [0.0, 1.0]], noise=0.3, shots=4, queries=4),
        ),
        "AmortizedGuide",
    ),
    kind("a curvature by another name", "'hessian'", lambda _: Laplace("hessian"), "'ggn'"),
    kind("damping below zero", "-1.0", lambda _: Laplace(damping=-1.0), "None"),
    kind(
        "a dense curvature of a network",
        "97",
        lambda _: Laplace().fit(cases.case("neural_regression").program, fits.new_tasks()),
        '"kronecker"',
        error=UnsupportedModelError,
    ),
    kind(
        "effects of level 1 held at a point",
        "'item', whose scale",
        lambda _: Laplace("ggn").fit(item_effects, fits.new_tasks()),
        "integrated=('item',)",
        error=UnsupportedModelError,
    ),
    kind(
        "an integrated site that is none",
        "'student'",
        lambda _: Laplace(integrated=("student",)).fit(item_effects, fits.new_tasks()),
        "φ is integrated out",
    ),
    kind(
        "effects integrated out without a prior",
        "prior=False",
        lambda _: Laplace(integrated=("item",), prior=False),
        "Leave them out",
    ),
    *(
        kind(
            f"steps of {name} out of a covariance",
            f"one that is not, {when}",
            lambda _, strategy=strategy: fits.fit(
                strategy, some(0.01), with_a_covariance, theta_learning_rate=1.0
            ),
            f"{name}.fit",
            error=ConvergenceError,
        )
        for name, when, strategy in (
            ("MAML", "in the fit: linalg.cholesky", MAML(step_size=1.0)),
            ("BMAML", "in the fit: linalg.cholesky", BMAML(step_size=1.0)),
            ("MetaSGD", "at training step 1: linalg.cholesky", MetaSGD(step_size=1e-4)),
        )
    ),
    kind(
        "softening what has a spread",
        "Gaussian",
        lambda _: Laplace.soften(fits.fitted("AmortizedGuide")),
        "one point per task",
        error=UnsupportedModelError,
    ),
    kind(
        "standard errors of a θ that maximises no evidence",
        "MAML",
        lambda _: standard_errors(fits.fitted("MAML")),
        "ExactLinear",
        error=UnsupportedModelError,
    ),
]


def formula(text, family="gaussian", **arguments):
    """A formula on the table of schools."""
    return models.from_formula(text, fits.table(), family, **arguments)


FORMULAS = [
    kind("no group term", "'score ~ hours'", lambda _: formula("score ~ hours"), "(1 | group)"),
    kind(
        "a bar that is no summand",
        "hours * (1 | school)",
        lambda _: formula("score ~ hours * (1 | school)"),
        "a summand of its own",
    ),
    kind(
        "an unknown column in a formula",
        "'hours'",
        lambda _: formula("score ~ hour + (1 | school)"),
        "Was 'hours' meant?",
    ),
    kind(
        "a function that computes no column",
        "the function 'open'",
        lambda _: formula("score ~ open(hours) + (1 | school)"),
        "Compute this column in the table first",
    ),
    kind(
        "a log of what is negative",
        "nan in ",
        lambda _: formula("score ~ log(hours - 5) + (1 | school)"),
        "finite values of 'log(hours - 5)'",
    ),
    kind(
        "a prior by another name",
        "'nois'",
        lambda _: formula("score ~ (1 | school)", priors={"nois": "HalfNormal(1)"}),
        "Was 'noise' meant?",
    ),
    kind(
        "a prior that is no distribution",
        "no distribution 'Norm'",
        lambda _: formula("score ~ (1 | school)", priors={"noise": "Norm(1)"}),
        "the prior of 'noise'",
    ),
    kind(
        "an unknown family of a formula",
        "'gamma'",
        lambda _: formula("score ~ (1 | school)", "gamma"),
        "negative_binomial",
    ),
]

BAYESIAN_MAML = [
    kind("inner steps as text", "steps='5'", lambda _: ABML(steps="5"), "whole number"),
    kind("an infinite inner step", "step_size=inf", lambda _: BMAML(step_size=float("inf"))),
    kind("an inner momentum of 1", "momentum=1", lambda _: PLATIPUS(momentum=1), "below 1"),
    kind("no draws of q", "draws=0", lambda _: ABML(draws=0), "1 or more"),
    kind("a bound by another name", "'ELBO'", lambda _: ABML(objective="ELBO"), "'elbo'"),
    kind("no particles", "particles=0", lambda _: BMAML(particles=0), "1 or more"),
    kind("a leader that stays", "leader_steps=0", lambda _: BMAML(leader_steps=0)),
    kind("a start of no spread", "spread=0.0", lambda _: PLATIPUS(spread=0.0), "above 0"),
    kind("a shift uphill", "prior_step=-0.1", lambda _: PLATIPUS(prior_step=-0.1), "at least 0"),
    kind(
        "a flat prior of a variational start",
        "is flat",
        lambda _: ABML().fit(
            models.ClassConditional(None, 3), cases.case("class_conditional").tasks
        ),
        "curves downwards",
        error=UnsupportedModelError,
    ),
]

OVER_TASKS = {"risk": 0.1, "hyper_kl": 1.0, "task_kls": 2.0, "n_samples": 50, "n_tasks": 9}

BOUNDS = [
    kind(
        "a risk that is no mean of losses in [0, 1]",
        "1.7",
        lambda _: bounds.meta_test(risk=1.7, n_tasks=100, delta=0.05),
        "clipped or truncated",
    ),
    kind(
        "delta of 0",
        "0",
        lambda _: bounds.amit_meir(**OVER_TASKS, delta=0.0),
        "delta strictly in (0, 1)",
    ),
    kind(
        "one task for a bound that needs two",
        "1",
        lambda _: bounds.separate_roots(**{**OVER_TASKS, "n_tasks": 1}, delta=0.05),
        "n_tasks as whole numbers of at least 2",
    ),
    kind(
        "risks that are not one per task",
        "(2,)",
        lambda _: bounds.joint_kl(**{**OVER_TASKS, "risk": [0.1, 0.2]}, delta=0.05),
        "risk[..., None]",
    ),
    kind(
        "a covariance without spread in some direction",
        "not positive definite",
        lambda _: bounds.gaussian_kl([0.0], [[0.0]], [0.0], [[1.0]]),
        "KL = ∞",
    ),
    kind(
        "a certificate of a squared error without a scale",
        "None",
        lambda _: hb.certify(
            fits.fitted("ExactLinear"),
            fits.task_set().split(support=2, seed=0),
            loss="truncated-squared",
        ),
        "scale between 0 and inf",
    ),
    kind(
        "a certificate of tasks that were fitted on",
        "6 of 6",
        lambda _: hb.certify(
            fits.fitted("ExactLinear"),
            fits.task_set().split(support=2, seed=0),
            loss="truncated-squared",
            scale=20.0,
        ),
        "GaussianHyperprior",
    ),
    kind(
        "a figure of an unknown bound",
        "vapnik",
        lambda _: certificate_plots.bounds_by_tasks(names=["vapnik"]),
        "joint_kl",
    ),
]

TRUST = [
    kind(
        "calibration of a point estimate",
        "a point estimate",
        lambda _: hb.sbc(cases.linear_nested, NoPooling(), some(), compile=False),
        "Laplace or NUTS",
        error=UnsupportedModelError,
    ),
    kind(
        "calibration with its arguments turned round",
        "function",
        lambda _: hb.sbc(Laplace(), cases.linear_nested, some()),  # type: ignore[arg-type]
        "sbc(program, Laplace(), tasks)",
    ),
    kind(
        "calibration without a simulation",
        "0",
        lambda _: hb.sbc(cases.linear_nested, Laplace(), some(), simulations=0),
        "simulations",
    ),
    kind(
        "calibration of a fit by no draw",
        "0",
        lambda _: hb.sbc_adapted(fits.fitted("ExactLinear"), draws=0),
        "draws",
    ),
    kind(
        "a diagnosis of a strategy that was not fitted",
        "Laplace",
        lambda _: hb.diagnose(Laplace(), some()),  # type: ignore[arg-type]
        "strategy.fit",
    ),
    kind(
        "a diagnosis by an unknown reference",
        "stan",
        lambda _: hb.diagnose(fits.fitted("ExactLinear"), reference="stan"),  # type: ignore[arg-type]
        "nuts",
    ),
    kind(
        "a figure of no diagnosis",
        "none",
        lambda _: diagnosis_plots.verdicts({}),
        "hbmeta.diagnose",
    ),
    kind(
        "a predictive check of a posterior",
        "list",
        lambda _: predictive_plots.predictive_checks([], [1.0]),  # type: ignore[arg-type]
        "posterior.predict",
    ),
]

KINDS = [
    *DATA,
    *FRAMES,
    *PROGRAMS,
    *FUNCTIONS,
    *STRATEGIES,
    *LENS,
    *USE,
    *FILES,
    *LAPLACE,
    *BAYESIAN_MAML,
    *BOUNDS,
    *FORMULAS,
    *TRUST,
]


@pytest.mark.parametrize(("error", "found", "names", "call"), KINDS)
def test_bad_input(error, found, names, call, tmp_path, untouched):
    with untouched(), pytest.raises(HbmetaError) as caught:
        call(tmp_path / FILE)
    raised = caught.value
    assert type(raised) is error
    assert found in raised.found
    assert names in str(raised)
    assert raised.where
    assert raised.needed
    assert raised.do.endswith((".", "?"))
    assert (
        str(raised) == f"{raised.where}: needed {raised.needed}; found {raised.found}. {raised.do}"
    )
    assert "\n" not in str(raised)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["radon", "--strategies", "nuts,mammal"], "found 'mammal'"),
        (["radon", "--varying", "floor"], "found --varying"),
        (["nothing.csv", "--group", "a", "--y", "b"], "nothing.csv"),
    ],
)
def test_bad_input_on_the_command_line(arguments, found, capsys):
    """The same message, on one line of standard error, and no traceback."""
    assert cli.main(["compare", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("hbmeta: ")
    assert printed.err.count("\n") == 1
    assert "needed" in printed.err
    assert found in printed.err


def test_every_class_of_errors_is_in_the_table():
    shown = {parameters.values[0] for parameters in KINDS}
    assert {getattr(errors, name) for name in errors.__all__} - {HbmetaError} <= shown
    assert len({parameters.id for parameters in KINDS}) == len(KINDS) >= 25
