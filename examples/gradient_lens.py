"""The gradient lens: one idea, six gradients, each a change of one line.

All of them adapt by a few steps from a learned start; they differ in how θ learns from what came of
that. Sine waves, a small network, little training: python examples/gradient_lens.py
"""

import torch

import hbmeta as hb
from hbmeta import inference, models, oracles, tasks

STRATEGIES = {
    "maml": inference.MAML(steps=3, step_size=0.05),
    "fomaml": inference.FOMAML(steps=3, step_size=0.05),
    "reptile": inference.Reptile(steps=3, step_size=0.05),
    "meta-sgd": inference.MetaSGD(steps=3, step_size=0.05, learned_step="site"),
    "anil": inference.ANIL(steps=3, step_size=0.05),
    "implicit": inference.ImplicitMAML(damping=5.0, tolerance=0.1),
}


def main(steps: int = 60) -> hb.Comparison:
    """Print a table of all six, the step sizes that were learned, and what FOMAML leaves out."""
    waves = tasks.Sinusoids(noise=0.3, dtype=torch.float64)
    held_out = waves.sample(50, seed=10**6)
    model = models.NeuralRegression(hidden=(20,), activation="tanh")
    fits = {
        name: strategy.fit(
            model, waves, steps=steps, tasks_per_step=10, learning_rate=0.01, compile=False
        )
        for name, strategy in STRATEGIES.items()
    }
    best = {"waves known": oracles.bayes_sinusoid(waves, held_out)}
    comparison = hb.compare(fits, held_out, oracles=best, baseline="waves known")
    print(comparison)

    print("\nStep sizes that Meta-SGD learned, all 0.05 before:")
    for site, size in inference.step_sizes(fits["meta-sgd"]).items():
        print(f"  {site:<15}{size:.4f}")

    bias = inference.FOMAML.bias(fits["maml"], held_out)
    print("\nWhat the first-order gradient leaves out at MAML's θ, medians over tasks:")
    print(f"  ‖bias‖ / ‖gradient‖      {bias.relative.median():.3f}")
    print(f"  cosine of the two        {bias.cosine.median():.3f}")
    return comparison


if __name__ == "__main__":
    main()
