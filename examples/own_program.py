"""Eight schools as a person's own Pyro program: three approximations of its posterior, one table.

python examples/own_program.py
"""

import pyro
import pyro.distributions as dist
import torch

import hbmeta as hb
from hbmeta import inference


def eight_schools(x, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("task", x.shape[0], dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        effect = pyro.deterministic("effect", mu + tau * z)
        with pyro.plate("point", x.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(effect, x[..., 0]), obs=y)


def main(draws=1000, steps=2000):
    effects = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]).double()
    errors = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]).double()
    schools = hb.Tasks(errors[:, None, None], effects[:, None], ids="ABCDEFGH")
    # A second coaching course at each school, equally precise: what does the first say about it?
    again = hb.Episode(schools, hb.Tasks(schools.x, schools.y, ids="ABCDEFGH"))
    fits = {
        "nuts": inference.NUTS(draws=draws, target_accept=0.95).fit(eight_schools, schools),
        "amortized": inference.AmortizedGuide().fit(eight_schools, schools, steps=steps),
        "exact": inference.ExactLinear(prior=True).fit(eight_schools, schools),
    }
    print(hb.compare(fits, again, reference="nuts"))
    print("tau:", {name: fit.globals()["tau"].mean().item() for name, fit in fits.items()})
    return fits


if __name__ == "__main__":
    main()
