"""Three lenses, each on its own family of tasks, each beside the best that can be done there.

Gradient (MAML) on sine waves, Bayesian (a neural process) on functions of a Gaussian process,
metric (prototypes) on clusters in the plane. Takes about a minute; more steps bring them closer.
"""

from dataclasses import replace

import torch

import hbmeta as hb
from hbmeta import inference, models, oracles, tasks


def gradient(steps: int) -> hb.Comparison:
    """MAML on waves with a little noise; the oracle knows that they are waves."""
    waves = tasks.Sinusoids(noise=0.3)
    held_out = replace(waves, dtype=torch.float64).sample(50, seed=10**6)
    model = models.NeuralRegression(hidden=(40, 40))
    fits = {
        f"maml, {n} steps": inference.MAML(steps=n).fit(model, waves, steps=steps, seed=0)
        for n in (1, 5)
    }
    best = {"waves known": oracles.bayes_sinusoid(replace(waves, dtype=torch.float64), held_out)}
    return hb.compare(fits, held_out, oracles=best, baseline="waves known")


def bayesian(steps: int) -> hb.Comparison:
    """A neural process on smooth functions, the exact process with ℓ integrated out beside it."""
    functions = tasks.GaussianProcessTasks(dtype=torch.float32)
    held_out = replace(functions, shots=10, dtype=torch.float64).sample(50, seed=10**6)
    process = models.GaussianProcess("rbf", lengthscale=(0.25, 1.0), scale=1.0, noise=0.1)
    exact = inference.ExactGP().fit(process, held_out.support)
    latent = inference.LatentNP().fit(models.LatentProcess(), functions, steps=steps, seed=0)
    return hb.compare({"exact": exact, "latent np": latent}, held_out, baseline="exact")


def metric(steps: int) -> hb.Comparison:
    """Prototypes, plain and Bayesian, on clusters that overlap; the oracle knows the disk."""
    clusters = tasks.Clusters(noise=1.2)
    held_out = clusters.sample(200, seed=10**6)
    gaussian = models.ClassConditional(None, ways=5, noise=1.2, prior_scale=1.25)
    learned = models.ClassConditional((64, 32), ways=5)
    fits = {
        "learned prototypes": inference.ProtoNet().fit(learned, clusters, steps=steps, seed=0),
        "bayesian": inference.ProtoNet(plug_in=False).fit(gaussian, held_out.support),
    }
    best = {"bayes-optimal": oracles.bayes_clusters(clusters, held_out)}
    return hb.compare(fits, held_out, oracles=best, baseline="bayes-optimal")


def main(steps: int = 1000) -> None:
    """Print one table per lens."""
    for lens in (gradient, bayesian, metric):
        print(f"{lens.__name__.upper()} LENS\n{lens(steps)}\n")


if __name__ == "__main__":
    main()
