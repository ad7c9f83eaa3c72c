"""The same three posteriors as other samplers' own documentation has one write and run them.

Each function takes the data, warm-up and draws per chain, and gives the seconds to the first draw
(compiling and warm-up included, in a process that has compiled nothing yet), the seconds of
warm-up and draws without compiling, and the draws (chains, draws) by name. Chains run one after
another. A peer that is not installed is left out.
"""

from __future__ import annotations

import importlib.util
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hbmeta.tasks import Tasks

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Work:
    """A posterior by name, its program and tasks, and how long to run."""

    name: str
    program: Callable[..., None]
    tasks: Tasks
    chains: int
    warmup: int
    draws: int

    @property
    def rows(self) -> tuple[Array, Array, Array]:
        """x (n, features), y (n,) and the task of each row."""
        assert self.tasks.flat_y is not None
        return self.tasks.flat_x.numpy(), self.tasks.flat_y.numpy(), self.tasks.task.numpy()


@dataclass(frozen=True)
class Run:
    """What a sampler gave."""

    first: float
    seconds: float
    draws: dict[str, Array]


def hbmeta_nuts(work: Work) -> Run:
    """This library, chains in one process."""
    from benchmarks.agreement import draws_by_name
    from hbmeta.inference import NUTS

    def run(draws: int) -> Any:
        strategy = NUTS(draws=draws, chains=work.chains, warmup=work.warmup, processes=1)
        return strategy.fit(work.program, work.tasks, seed=0, progress=False, compile=True)

    start = time.perf_counter()
    run(1)
    first = time.perf_counter() - start
    start = time.perf_counter()
    fitted = run(work.draws)
    seconds = time.perf_counter() - start - fitted.seconds.staging
    return Run(first, seconds, draws_by_name(fitted))


def pyro_nuts(work: Work) -> Run:
    """`pyro.infer.NUTS` on the very same program, eager; `jit` is slower to start, see pyro_jit."""
    return _pyro(work, jit=False)


def pyro_jit(work: Work) -> Run:
    """`pyro.infer.NUTS` with jit_compile=True."""
    return _pyro(work, jit=True)


def _pyro(work: Work, *, jit: bool) -> Run:
    import pyro
    from pyro.infer import MCMC, NUTS

    from hbmeta.problem import Problem

    batch = Problem(work.program, work.tasks).batch(work.tasks)
    keywords = {} if batch.task is None else {"task": batch.task, "n_tasks": batch.n_tasks}
    torch.set_default_dtype(torch.float64)

    # One run gives both times: it calls this after each transition, warm-up first.
    ticks: list[float] = []
    pyro.set_rng_seed(0)
    kernel = NUTS(work.program, jit_compile=jit, ignore_jit_warnings=True)
    sampler = MCMC(
        kernel, num_samples=work.draws, warmup_steps=work.warmup, num_chains=1,
        disable_progbar=True, hook_fn=lambda *_: ticks.append(time.perf_counter()),
    )  # fmt: skip
    start = time.perf_counter()
    sampler.run(batch.x, batch.y, **keywords)
    seconds = ticks[-1] - ticks[0]
    found = sampler.get_samples()
    return Run(ticks[work.warmup] - start, seconds, {k: v.numpy()[None] for k, v in found.items()})


def numpyro_nuts(work: Work) -> Run:
    """NumPyro in double precision, chains one after another."""
    os.environ["NPROC"] = "1"
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import MCMC, NUTS

    numpyro.enable_x64()
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    x, y, task = work.rows
    n_tasks = work.tasks.n_tasks

    def radon() -> None:
        mu = numpyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
        beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
        tau = numpyro.sample("sigma_alpha", dist.HalfNormal(1.0))
        sigma = numpyro.sample("sigma_y", dist.HalfNormal(1.0))
        with numpyro.plate("task", n_tasks):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        mean = (mu + tau * z)[task] + jnp.asarray(x) @ beta
        numpyro.sample("y", dist.Normal(mean, sigma), obs=y)

    def schools() -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        with numpyro.plate("task", n_tasks):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(mu + tau * z, x[:, 0]), obs=y)

    def responses() -> None:
        item = x[:, 0].astype(int)
        items = int(item.max()) + 1
        a = numpyro.sample("slope", dist.LogNormal(0.0, 0.5).expand([items]).to_event(1))
        b = numpyro.sample("difficulty", dist.Normal(0.0, 2.0).expand([items]).to_event(1))
        with numpyro.plate("task", n_tasks):
            ability = numpyro.sample("ability", dist.Normal(0.0, 1.0))
        logit = a[item] * (ability[task] - b[item])
        numpyro.sample("y", dist.Bernoulli(logits=logit), obs=y)

    model = {"radon": radon, "eight schools": schools, "item response": responses}[work.name]

    def sampler(draws: int) -> MCMC:
        return MCMC(
            NUTS(model), num_warmup=work.warmup, num_samples=draws, num_chains=work.chains,
            chain_method="sequential", progress_bar=False,
        )  # fmt: skip

    start = time.perf_counter()
    sampler(1).run(jax.random.PRNGKey(0))
    first = time.perf_counter() - start
    again = sampler(work.draws)
    again.run(jax.random.PRNGKey(0))
    start = time.perf_counter()
    again.run(jax.random.PRNGKey(1))
    found = again.get_samples(group_by_chain=True)
    seconds = time.perf_counter() - start
    return Run(first, seconds, {k: np.asarray(v) for k, v in found.items()})


def pymc_nutpie(work: Work) -> Run:
    """PyMC's model compiled by nutpie (Numba), one core."""
    import nutpie
    import pymc as pm

    x, y, task = work.rows
    n_tasks = work.tasks.n_tasks
    with pm.Model() as model:
        if work.name == "radon":
            mu = pm.Normal("mu_alpha", 0.0, 10.0)
            beta = pm.Normal("beta", 0.0, 10.0, shape=2)
            tau = pm.HalfNormal("sigma_alpha", 1.0)
            sigma = pm.HalfNormal("sigma_y", 1.0)
            z = pm.Normal("z", 0.0, 1.0, shape=n_tasks)
            pm.Normal("y", (mu + tau * z)[task] + x @ beta, sigma, observed=y)
        elif work.name == "eight schools":
            mu = pm.Normal("mu", 0.0, 5.0)
            tau = pm.HalfCauchy("tau", 5.0)
            z = pm.Normal("z", 0.0, 1.0, shape=n_tasks)
            pm.Normal("y", mu + tau * z, x[:, 0], observed=y)
        else:
            item = x[:, 0].astype(int)
            items = int(item.max()) + 1
            a = pm.LogNormal("slope", 0.0, 0.5, shape=items)
            b = pm.Normal("difficulty", 0.0, 2.0, shape=items)
            ability = pm.Normal("ability", 0.0, 1.0, shape=n_tasks)
            pm.Bernoulli("y", logit_p=a[item] * (ability[task] - b[item]), observed=y)
    start = time.perf_counter()
    compiled = nutpie.compile_pymc_model(model)

    def run(draws: int) -> Any:
        return nutpie.sample(
            compiled, draws=draws, tune=work.warmup, chains=work.chains, cores=1,
            seed=0, progress_bar=False,
        )  # fmt: skip

    run(1)
    first = time.perf_counter() - start
    start = time.perf_counter()
    found = run(work.draws).posterior
    seconds = time.perf_counter() - start
    names = [name for name in found.data_vars if not str(name).endswith("__")]
    return Run(first, seconds, {str(name): found[name].values for name in names})


PEERS: dict[str, tuple[str, Callable[[Work], Run]]] = {
    "hbmeta": ("hbmeta", hbmeta_nuts),
    "Pyro": ("pyro", pyro_nuts),
    "Pyro, jit_compile": ("pyro", pyro_jit),
    "NumPyro": ("numpyro", numpyro_nuts),
    "PyMC + nutpie": ("pymc", pymc_nutpie),
}


def installed() -> dict[str, Callable[[Work], Run]]:
    """The samplers that can be imported."""
    return {name: run for name, (module, run) in PEERS.items() if importlib.util.find_spec(module)}


def missing() -> list[str]:
    """Those that cannot."""
    return [name for name, (module, _) in PEERS.items() if not importlib.util.find_spec(module)]


def entries(value: Array) -> Array:
    """(chains, draws, scalars)."""
    return value.reshape(*value.shape[:2], math.prod(value.shape[2:]))
