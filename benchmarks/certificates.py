"""Certificates on real data: their value, the risk on held-out tasks, and the ratio.

    digits    5-way episodes of 5 shots and 5 queries per class, MNIST averaged to 14 × 14 pixels;
              prototypical networks; 0-1 loss
    pairs     two of the ten digits, either of them called 1: 50 images of each to adapt to, 10 to
              predict; PAC-Bayes posteriors of a logistic regression on the 16 features of a network
              that other images taught; 0-1 loss
    schools   mathematics score against socio-economic status (Hsb82), schools as tasks; exact
              posteriors of a line per school; squared error truncated at 20 points
    students  ratings of lecturers (InstEval), students as tasks; exact posteriors of a level per
              student; squared error truncated at 4 points of 5

The hyperprior is uniform over fits that other tasks taught, one of which the certified tasks
choose: K_H ≤ log k. Episodes are drawn independently from one pool of images, so that they are iid
given the pool: what is certified is the risk on new episodes of these ten classes and of that pool,
not on new classes or new images. Students share lecturers, so that their certificate is flagged.

    python -m benchmarks.certificates [--quick]
"""

from __future__ import annotations

import argparse
import gzip
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from benchmarks.programs import data_folder
from hbmeta import models
from hbmeta.certification import Certificate, FiniteHyperprior, certify
from hbmeta.fitted import Fitted
from hbmeta.inference import ExactLinear, PACBayes, ProtoNet
from hbmeta.tables import aligned
from hbmeta.tasks import Episode, Tasks, from_frame

__all__ = ["digits", "pairs", "ratings", "schools"]

Images = npt.NDArray[np.float32]
WAYS, SHOTS, QUERIES = 5, 5, 5


def read_digits(folder: Path, name: str) -> tuple[Images, npt.NDArray[np.int64]]:
    """Images (n, 196) in [0, 1], means of 2 × 2 pixels, and labels; `name` is "train" or "t10k"."""
    with gzip.open(folder / "mnist" / f"{name}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 14, 2, 14, 2)
    with gzip.open(folder / "mnist" / f"{name}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    return (pixels.mean((2, 4)) / 255.0).reshape(-1, 196).astype(np.float32), labels


def episodes(
    images: Images,
    labels: npt.NDArray[np.int64],
    n: int,
    seed: int,
    *,
    ways: int = WAYS,
    shots: int = SHOTS,
    queries: int = QUERIES,
) -> Episode:
    """Episodes drawn independently: some of the 10 digits in random order, and images of each."""
    rng = np.random.default_rng(seed)
    of_class = [np.flatnonzero(labels == digit) for digit in range(10)]
    each = shots + queries
    rows = np.stack(
        [
            [rng.choice(of_class[d], each, replace=False) for d in rng.permutation(10)[:ways]]
            for _ in range(n)
        ]
    )
    y = torch.arange(ways).repeat_interleave(each).reshape(ways, each).expand(n, ways, each)
    support, query = (
        Tasks(
            torch.from_numpy(images[rows[..., part]]).reshape(n, -1, images.shape[1]),
            y[..., part].reshape(n, -1),
        )
        for part in (slice(shots), slice(shots, each))
    )
    return Episode(support, query)


def digits(folder: Path, n_tasks: int, steps: tuple[int, ...]) -> dict[str, Any]:
    """Prototypical networks of several lengths of training, one chosen on the certified tasks."""
    images, labels = read_digits(folder, "train")
    training = episodes(images[:30_000], labels[:30_000], 200, 0)
    fits: list[Fitted] = []
    for number in steps:
        model = models.ClassConditional(None if number == 0 else (64, 16), WAYS, seed=0)
        fits.append(
            ProtoNet().fit(
                model,
                training,
                steps=max(number, 1),
                tasks_per_step=10,
                compile="graph",
                progress=False,
                seed=0,
            )
        )
    pool = images[30_000:], labels[30_000:]
    new, held_out = episodes(*pool, n_tasks, 1), episodes(*pool, 2 * n_tasks, 2)
    other = episodes(*read_digits(folder, "t10k"), n_tasks, 3)
    found = certify(
        fits[-1], new, bound="query_split", hyperprior=FiniteHyperprior(fits), draws=1,
        shots=WAYS * SHOTS,
    )  # fmt: skip
    weights = found.statement.inputs["weights"]
    return {
        "certificate": found,
        "held out": _risk(fits, weights, held_out, {}),
        "new images": _risk(fits, weights, other, {}),
    }


class Separator(models.HierarchicalModel):
    """y ~ Bernoulli(sigmoid(x · φ)), φ ~ N(0, s² I), s learned: either class may be the one."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.log_scale = torch.nn.Parameter(torch.zeros(()))

    def level_one(self) -> dict[str, Tensor]:
        """No sites: s is a parameter."""
        return {}

    def task_prior(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """φ, "weights"."""
        scale = self.log_scale.exp().expand(self.features)
        return {"weights": pyro.sample("weights", dist.Normal(0.0 * scale, scale).to_event(1))}

    def likelihood(
        self, theta: Mapping[str, Tensor], phi: Mapping[str, Tensor], x: Tensor
    ) -> TorchDistribution:
        """Of y = 1."""
        return dist.Bernoulli(logits=(x * phi["weights"]).sum(-1))


def features_of(fitted: Fitted, images: Images) -> Images:
    """The network of a prototypical fit, and a constant, of length about 1."""
    h = torch.from_numpy(images)
    for layer in (1, 2):
        weight, bias = (
            fitted.theta[f"network.layer{layer}.{name}"].detach().to(h)
            for name in ("weight", "bias")
        )
        h = torch.nn.functional.linear(h if layer == 1 else h.relu(), weight, bias)
    h = (h - h.mean(0)) / h.std(0)
    found: Images = (torch.cat([h, torch.ones(len(h), 1)], 1) / h.shape[1] ** 0.5).numpy()
    return found


def pairs(folder: Path, n_tasks: int, steps: tuple[int, ...]) -> dict[str, Any]:
    """PAC-Bayes posteriors under priors of several lengths of training."""
    images, labels = read_digits(folder, "train")
    network = ProtoNet().fit(
        models.ClassConditional((64, 16), WAYS, seed=0),
        episodes(images[:15_000], labels[:15_000], 200, 0),
        steps=800, tasks_per_step=10, compile="graph", progress=False, seed=0,
    )  # fmt: skip
    x = features_of(network, images)
    sizes = {"ways": 2, "shots": 50, "queries": 10}
    training = episodes(x[15_000:30_000], labels[15_000:30_000], 200, 0, **sizes).support
    fits: list[Fitted] = [
        PACBayes(objective="joint_kl", hyperposterior_scale=0.1, steps=100).fit(
            Separator(x.shape[1]), training,
            steps=number, tasks_per_step=50, learning_rate=0.03, compile="graph", progress=False,
            seed=0,
        )
        for number in steps
    ]  # fmt: skip
    pool = x[30_000:], labels[30_000:]
    new = episodes(*pool, n_tasks, 1, **sizes)
    held_out = episodes(*pool, 2 * n_tasks, 2, **sizes)
    found = {
        bound: certify(fits[-1], new, bound=bound, hyperprior=FiniteHyperprior(fits), draws=1)
        for bound in ("query_split", "joint_kl", "amit_meir")
    }
    weights = found["query_split"].statement.inputs["weights"]
    excess = {name: one.statement.raw - one.statement.measured for name, one in found.items()}
    return {
        "certificate": found["query_split"],
        "held out": _risk(fits, weights, held_out, {}),
        "joint_kl": found["joint_kl"].statement.raw,
        "excess of joint_kl over Amit & Meir's": excess["joint_kl"] / excess["amit_meir"],
    }


def _risk(
    fits: list[Fitted], weights: list[float], held_out: Episode, loss: Mapping[str, Any]
) -> float:
    """Mean query loss of the weighted fits: what meta_test measures."""
    total = 0.0
    for weight, fit in zip(weights, fits, strict=True):
        if weight > 0.0:
            one = certify(fit, held_out, bound="meta_test", draws=1, **loss)
            total += weight * one.statement.measured
    return total


def _lines(
    tasks: Tasks, columns: list[str], *, rows: int, shots: int, parts: tuple[int, int], scale: float
) -> dict[str, Any]:
    """Exact posteriors; priors of several widths around the one that the first tasks taught."""
    generator = torch.Generator().manual_seed(0)
    enough = (tasks.counts >= rows).nonzero()[:, 0]
    tasks = tasks[enough[torch.randperm(len(enough), generator=generator)]]
    # The same number of rows in each task, as new tasks are said to have.
    keys = torch.rand(tasks.n_points, generator=generator, dtype=torch.float64)
    tasks = tasks.keep(tasks.leading(keys, torch.full((tasks.n_tasks,), rows)))
    first, second = parts[0], parts[0] + parts[1]
    known, certified, rest = tasks[:first], tasks[first:second], tasks[second:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learned = ExactLinear().fit(
            models.LinearRegression(features=columns),
            known,
            steps=500,
            compile="graph",
            progress=False,
        )
    at = learned.globals()
    fits = [
        ExactLinear().fit(
            models.LinearRegression(
                at["mean"].tolist(),
                (width * at["scale"]).square().tolist(),
                noise=factor * float(at["noise"]),
                features=columns,
            ),
            known, steps=1, compile=False, progress=False,
        )
        for width in (0.3, 1.0, 3.0)
        for factor in (1.0, 2.0)
    ]  # fmt: skip
    new, held_out = certified.split(shots, seed=0), rest.split(shots, seed=0)
    loss: dict[str, Any] = {"loss": "truncated-squared", "scale": scale}
    hyperprior = FiniteHyperprior(fits)
    found = {
        bound: certify(
            fits[2], new, bound=bound, hyperprior=hyperprior, draws=1, evaluations=1000, **loss
        )
        for bound in ("query_split", "joint_kl", "amit_meir")
    }  # fmt: skip
    weights = found["query_split"].statement.inputs["weights"]
    excess = {name: one.statement.raw - one.statement.measured for name, one in found.items()}
    return {
        "certificate": found["query_split"],
        "held out": _risk(fits, weights, held_out, loss),
        "joint_kl": found["joint_kl"].statement.raw,
        "excess of joint_kl over Amit & Meir's": excess["joint_kl"] / excess["amit_meir"],
    }


def schools(folder: Path) -> dict[str, Any]:
    """Hsb82: 160 schools."""
    frame = pd.read_csv(folder / "mixed_effects" / "mlmRev" / "Hsb82.csv").assign(one=1.0)
    tasks = from_frame(frame, group="school", x=["one", "ses"], y="mAch").support
    return _lines(tasks, ["one", "ses"], rows=20, shots=10, parts=(30, 90), scale=20.0)


def ratings(folder: Path, n_tasks: int) -> dict[str, Any]:
    """InstEval: 2,972 students."""
    frame = pd.read_csv(folder / "mixed_effects" / "lme4" / "InstEval.csv").assign(one=1.0)
    tasks = from_frame(frame, group="s", x=["one", "d"], y="y").support
    return _lines(tasks, ["one"], rows=20, shots=10, parts=(100, n_tasks), scale=4.0)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="certificates on real data")
    parser.add_argument("--quick", action="store_true", help="200 tasks in place of 1,000")
    n_tasks = 200 if parser.parse_args().quick else 1000
    torch.set_num_threads(1)
    folder = data_folder()
    found = {
        "digits": digits(folder, n_tasks, (0, 50, 200, 800)),
        "pairs": pairs(folder, n_tasks, (50, 400)),
        "schools": schools(folder),
        "students": ratings(folder, n_tasks),
    }
    print("# Certificates on real data, δ = 0.05\n\n```")
    body = []
    for name, one in found.items():
        c: Certificate = one["certificate"]
        held_out = one["held out"]
        cells = [f"{c.n_tasks}", f"{c.statement.measured:.4f}", f"{c.value:.4f}"]
        cells += [f"{held_out:.4f}", f"{c.value - held_out:.4f}", f"{c.value / held_out:.2f}"]
        body.append([name, *cells])
    head = ["", "tasks", "measured", "query_split", "held-out risk", "above it", "ratio"]
    print("\n".join(aligned(head, body)), end="\n```\n\n")
    for name, one in found.items():
        extra = {key: value for key, value in one.items() if key not in ("certificate", "held out")}
        numbers = "; ".join(f"{key} {value:.4f}" for key, value in extra.items())
        print(f"{name}: {numbers}.\n\n```\n{one['certificate']}\n```\n")


if __name__ == "__main__":
    main()
