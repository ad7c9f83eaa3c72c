"""MNIST with labels permuted or pixels swapped: Amit & Meir's two environments, made small.

    labels   every task permutes the ten labels; 5 training tasks
    pixels   every task swaps 50 random pairs of its 196 pixels (they: 200 of 784); 10 training
             tasks

As there, 20 new tasks come with 2,000 images each, δ = 0.1, κ_P = 100, κ_Q = 0.001, and a posterior
predicts by its mean weights. Smaller than there, so that two cores do it: images averaged to
14 × 14, a network 196-32-10 for both environments (they: a convolutional one for the labels), 3,000
images per training task (they: 60,000), 2,000 full-batch steps per task (they: 150 epochs). Images
of new tasks are not those of training tasks; errors are on 1,000 test images per task.

    from scratch   Adam on the cross-entropy of the 2,000 images, from the network's initialisation
    warm start     the same, from weights that were so trained on the first training task
    MAML           5 inner steps, then adapted by 200
    PACBayes       prior and posteriors by the joint-kl bound; adapted by the bound of one task

Beside it three certificates at δ = 0.1 of what PACBayes does: what its own objective amounts to on
the training tasks, the meta-test bound from the 20 new tasks, and the mean over these of the bound
of one task with the learned prior, which pays for its own posterior alone.

    python -m benchmarks.meta_mnist [--quick]
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.certificates import Images, read_digits
from benchmarks.machine import describe
from benchmarks.programs import data_folder
from hbmeta import models
from hbmeta.certification import certify, certify_task
from hbmeta.fitted import Fitted
from hbmeta.inference import MAML, PACBayes
from hbmeta.posterior import TaskPosterior
from hbmeta.tasks import Episode, Tasks

SEED, DELTA, NEW, TESTED = 0, 0.1, 20, 1000
HIDDEN, SWAPS = 32, 50
# The cross-entropy of training is at most log(1/P_MIN): with 1e-4, the default, it weighs less, and
# the posteriors stay closer to the prior.
P_MIN = 0.02
Environment = Literal["labels", "pixels"]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """How much is done."""

    known: int = 3000
    new: int = 2000
    steps: int = 2000
    meta_steps: int = 600


QUICK = Sizes(known=300, new=200, steps=50, meta_steps=20)


def environment(
    kind: Environment,
    images: Images,
    labels: npt.NDArray[np.int64],
    rows: list[list[int]],
    seed: int,
) -> Tasks:
    """One task per list of rows, each with a permutation of its own."""
    rng = np.random.default_rng(seed)
    x, y = images[np.array(rows)], labels[np.array(rows)]
    for task in range(len(rows)):
        if kind == "labels":
            y[task] = rng.permutation(10)[y[task]]
        else:
            order = np.arange(x.shape[-1])
            for _ in range(SWAPS):
                i, j = rng.choice(len(order), 2, replace=False)
                order[[i, j]] = order[[j, i]]
            x[task] = x[task][:, order]
    return Tasks(torch.from_numpy(2.0 * x - 1.0), torch.from_numpy(y))


def split(kind: Environment, sizes: Sizes) -> tuple[Tasks, Episode]:
    """Training tasks, and new ones with their test images."""
    images, labels = read_digits(data_folder(), "train")
    tests, truths = read_digits(data_folder(), "t10k")
    n_known = 5 if kind == "labels" else 10
    order = np.random.default_rng(SEED).permutation(len(images)).tolist()
    cut = n_known * sizes.known
    known = [order[i * sizes.known : (i + 1) * sizes.known] for i in range(n_known)]
    # 20 tasks of 2,000 need more images than are left: new tasks share images, not with training.
    rng = np.random.default_rng(SEED + 1)
    new = [rng.choice(order[cut:], sizes.new, replace=False).tolist() for _ in range(NEW)]
    tested = [
        (len(images) + rng.choice(len(tests), TESTED, replace=False)).tolist() for _ in range(NEW)
    ]
    everything = np.concatenate([images, tests]), np.concatenate([labels, truths])
    training = environment(kind, *everything, known, SEED + 2)
    # The same permutations for the two parts of a new task.
    support, query = (environment(kind, *everything, part, SEED + 3) for part in (new, tested))
    return training, Episode(support, query)


def network(weights: Weights, x: Tensor) -> Tensor:
    """(tasks, rows, 10) for weights (tasks, ...)."""
    h = x @ weights["layer1.weight"].mT + weights["layer1.bias"].unsqueeze(-2)
    return h.relu() @ weights["layer2.weight"].mT + weights["layer2.bias"].unsqueeze(-2)


def trained(start: Weights, tasks: Tasks, steps: int) -> Weights:
    """Each task's weights after Adam on the cross-entropy of batches of 128 of its rows."""
    n = tasks.n_tasks
    weights = {k: v.detach().expand(n, *v.shape).clone().requires_grad_() for k, v in start.items()}
    adam = torch.optim.Adam(weights.values(), 1e-3)
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(steps):
        rows = torch.randint(tasks.max_points, (128,), generator=generator)
        adam.zero_grad()
        logits = network(weights, tasks.x[:, rows])
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tasks.y[:, rows].flatten().long(), reduction="sum"
        ).div(128).backward()
        adam.step()
    return {name: value.detach() for name, value in weights.items()}


def errors(weights: Weights, query: Tasks) -> Tensor:
    """(tasks,) share of the test images that the network gets wrong."""
    return (network(weights, query.x).argmax(-1) != query.y).double().mean(1)


def centre(posterior: TaskPosterior) -> Weights:
    """The mean weights of every task."""
    return {
        name.removeprefix("network."): mean
        for name, (mean, _) in posterior.moments(draws=2).items()
    }


def certificates(fitted: Fitted, episode: Episode) -> list[str]:
    """What PACBayes may be certified by, and why it is what it is."""
    info = fitted.info
    value, nats = info["bound"], f"K_H = {info['hyper_kl']:,.0f} nats"
    why = (
        "vacuous: a hyperposterior over every weight of the prior costs these nats, and there is "
        "but a handful of tasks to divide them by"
        if value >= 1.0
        else "small enough to say something"
    )
    lines = [
        f"- joint kl on the training tasks: {value:.3f} ({nats} for {info['dimension']:,} "
        f"hyperparameters), {why}. And its Q_i were made jointly: no theorem about new tasks "
        "covers them."
    ]
    tested = certify(fitted, episode, bound="meta_test", delta=DELTA, draws=20, shots=None)
    lines.append(
        f"- meta-test on the {NEW} new tasks: {tested.statement.raw:.3f} against "
        f"{tested.statement.measured:.3f} measured: about the average task, and what {NEW} tasks "
        "allow."
    )
    each = [
        certify_task(fitted, episode.support[[i]], delta=DELTA, evaluations=200)
        for i in range(0, NEW, 4)
    ]
    values = [one.statement.raw for one in each]
    lines.append(
        f"- one new task with the learned prior, {len(each)} of them: {np.mean(values):.3f} on "
        f"average ({min(values):.3f} to {max(values):.3f}): pays KL(Q‖P) of its own posterior, "
        f"over {int(episode.support.counts[0]):,} images."
    )
    return lines


def run(kind: Environment, sizes: Sizes) -> list[str]:
    """The table of one environment."""
    training, new = split(kind, sizes)
    model = models.NeuralClassifier(10, hidden=(HIDDEN,), prior_scale="learned", seed=SEED)
    bound = model.bind(training)
    start = {
        name.removeprefix("mean."): value.detach()
        for name, value in bound.named_parameters()
        if name.startswith("mean.")
    }
    found: dict[str, tuple[Tensor, float]] = {}
    clock = time.perf_counter()

    def record(name: str, wrong: Tensor) -> None:
        nonlocal clock
        found[name] = wrong, time.perf_counter() - clock
        clock = time.perf_counter()

    record("from scratch", errors(trained(start, new.support, sizes.steps), new.query))
    first = trained(start, training[[0]], sizes.steps)
    warm = {name: value[0] for name, value in first.items()}
    record("warm start", errors(trained(warm, new.support, sizes.steps), new.query))
    maml = MAML(steps=5, step_size=0.1).fit(
        model, training.split(support=0.5, seed=SEED), steps=sizes.meta_steps, tasks_per_step=5,
        learning_rate=1e-3, compile="graph", progress=False, seed=SEED,
    )  # fmt: skip
    record("MAML", errors(centre(maml.adapt(new.support, steps=200)), new.query))
    pac = PACBayes(
        "joint_kl", p_min=P_MIN, delta=DELTA, hyperprior_scale=100.0,
        hyperposterior_scale=0.001, draws=2, steps=300,
    ).fit(
        model, training, steps=sizes.meta_steps, tasks_per_step=5, learning_rate=3e-3,
        compile="graph", progress=False, seed=SEED,
    )  # fmt: skip
    record("PACBayes", errors(centre(pac.adapt(new.support)), new.query))
    lines = [
        f"## {kind}: {training.n_tasks} training tasks of {sizes.known:,} images, {NEW} new ones "
        f"of {sizes.new:,}",
        "",
        "| | error on new tasks (%) | ± (standard error) | seconds |",
        "|---|---|---|---|",
    ]
    for name, (wrong, seconds) in found.items():
        spread = float(wrong.std() / len(wrong) ** 0.5)
        lines.append(
            f"| {name} | {100 * float(wrong.mean()):.2f} | {100 * spread:.2f} | {seconds:.0f} |"
        )
    return [*lines, "", *certificates(pac, new), ""]


def main() -> None:
    """Runs both environments and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few images, few steps")
    parser.add_argument("--only", choices=("labels", "pixels"), nargs="+")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"# Permuted MNIST\n\n{describe(SEED)}, one thread\n")
    kinds: tuple[Environment, ...] = ("labels", "pixels")
    for kind in kinds:
        if chosen.only is None or kind in chosen.only:
            print("\n".join(run(kind, QUICK if chosen.quick else Sizes())), flush=True)


if __name__ == "__main__":
    main()
