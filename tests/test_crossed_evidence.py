"""The evidence with effects of level 1 integrated out, against dense algebra over all unknowns."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from hbmeta.crossed_evidence import CrossedEvidence
from hbmeta.problem import Problem
from hbmeta.tasks import Tasks

ITEMS, PERSONS, ROWS = 4, 6, 120
PSI = {"tau": torch.tensor(-0.3).double(), "spread": torch.tensor(0.2).double()}


def answers(x, y=None, *, task, n_tasks):
    """Item response: persons are tasks with two coefficients, items stand at level 1."""
    zero = x.new_zeros(())
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    item = pyro.sample("item", dist.Normal(zero, tau).expand([ITEMS]).to_event(1))
    with pyro.plate("task", n_tasks):
        person = pyro.sample("person", dist.Normal(zero, spread).expand([2]).to_event(1))
    with pyro.plate("point", x.shape[0]):
        eta = mu + item[x[:, 1].long()] + person[task, 0] + person[task, 1] * x[:, 0]
        pyro.sample("y", dist.Bernoulli(logits=eta), obs=y)


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 1, generator=generator, dtype=torch.float64)
    item = torch.randint(0, ITEMS, (ROWS, 1), generator=generator)
    y = torch.randint(0, 2, (ROWS,), generator=generator).double()
    task = torch.randint(0, PERSONS, (ROWS,), generator=generator)
    return Tasks.from_flat(torch.cat([x, item.double()], 1), y, task, PERSONS)


def energy(psi, m, tasks):
    """−log p(y, φ, u, ψ) with the Jacobians of exp, written out; m = (μ, items, persons)."""
    tau, spread = psi["tau"].exp(), psi["spread"].exp()
    mu, item, person = m[0], m[1 : 1 + ITEMS], m[1 + ITEMS :].reshape(PERSONS, 2)
    normal, half = torch.distributions.Normal, torch.distributions.HalfNormal
    x, task = tasks.flat_x, tasks.task
    eta = mu + item[x[:, 1].long()] + person[task, 0] + person[task, 1] * x[:, 0]
    value = torch.distributions.Bernoulli(logits=eta).log_prob(tasks.flat_y).sum()
    value = value + normal(0.0, 2.0).log_prob(mu) + normal(0.0, tau).log_prob(item).sum()
    value = value + normal(0.0, spread).log_prob(person).sum()
    one = torch.ones((), dtype=m.dtype)
    scales = half(one).log_prob(tau) + half(one).log_prob(spread)
    return -(value + scales + psi["tau"] + psi["spread"])


def dense(psi, tasks):
    """E(ψ), the mode and H, by Newton's method with the whole Hessian."""
    m = torch.zeros(1 + ITEMS + 2 * PERSONS, dtype=torch.float64)
    for _ in range(8):
        gradient = torch.autograd.functional.jacobian(lambda v: energy(psi, v, tasks), m)
        hessian = torch.autograd.functional.hessian(lambda v: energy(psi, v, tasks), m)
        m = m - torch.linalg.solve(hessian, gradient)
    evidence = -energy(psi, m, tasks) + 0.5 * len(m) * math.log(2 * math.pi)
    return evidence - 0.5 * torch.logdet(hessian), m, hessian


def evidence(tier):
    tasks = data()
    problem = Problem(answers, tasks)
    batch = problem.batch(tasks)
    start = {**problem.theta(batch), **PSI}
    return CrossedEvidence(problem, batch, ("mu", "item"), start, tier, "test"), tasks


@pytest.mark.parametrize("tier", ["eager", "graph"])
def test_evidence_and_gradient_are_those_of_the_whole_hessian(tier):
    search, tasks = evidence(tier)
    value, gradient, met = search(PSI, 1e-12)
    assert met
    wanted, mode, _ = dense(PSI, tasks)
    assert float(value) == pytest.approx(float(wanted), abs=1e-6)
    torch.testing.assert_close(search.u, mode[: 1 + ITEMS], atol=1e-6, rtol=0)
    torch.testing.assert_close(search.phi.flatten(), mode[1 + ITEMS :], atol=1e-6, rtol=0)
    step = 1e-3
    for name in PSI:
        up, down = (dense({**PSI, name: PSI[name] + s}, tasks)[0] for s in (step, -step))
        # The quotient's own error is of the order of step².
        assert float(gradient[name]) == pytest.approx(float(up - down) / (2 * step), abs=1e-4)


def test_factor_is_the_inverse_of_the_whole_hessian():
    search, tasks = evidence("eager")
    search(PSI, 1e-12)
    factor = search.factor(PSI)
    inverse = torch.linalg.inv(dense(PSI, tasks)[2])
    effects, size = 1 + ITEMS, len(inverse)
    # Unit noise, one entry after the other, gives the columns of a root of H⁻¹.
    noise = torch.eye(size, dtype=torch.float64)
    u, phi = factor.draw(noise[:, :effects], noise[:, effects:].reshape(size, PERSONS, 2))
    root = torch.cat([u, phi.flatten(1)], 1)
    torch.testing.assert_close(root.T @ root, inverse, atol=1e-7, rtol=0)
    solved = factor.solve(noise[3, :effects], noise[3, effects:].reshape(PERSONS, 2))
    column = torch.cat([solved[0], solved[1].flatten()])
    torch.testing.assert_close(column, inverse[3], atol=1e-7, rtol=0)
    torch.testing.assert_close(factor.log_det, -torch.logdet(inverse), atol=1e-6, rtol=0)
