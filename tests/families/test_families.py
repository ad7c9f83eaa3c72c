"""Every family against its density written out, in float64."""

import math

import pytest
import torch

from hbmeta.densities import Gaussian
from hbmeta.families import Diagonal, FlowFamily, Frame, FullRank, LowRankFamily
from hbmeta.families.gaussian import lower_triangular

TASKS = 3
FAMILIES = {
    "diagonal": Diagonal(4),
    "full": FullRank(4),
    "low_rank": LowRankFamily(4, 2),
    "flow": FlowFamily(4, width=5),
    "flow of one entry": FlowFamily(1),
    "full of one entry": FullRank(1),
}
each_family = pytest.mark.parametrize("name", FAMILIES)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def frame_of(family) -> Frame:
    scale = normal(TASKS, family.size, seed=1).exp()
    if family.full_frame:
        scale = torch.diag_embed(scale) + normal(TASKS, family.size, family.size, seed=2).tril(-1)
    return Frame(normal(TASKS, family.size, seed=3), scale)


def some(name):
    """A family, a frame and a λ away from its start."""
    family = FAMILIES[name]
    frame = frame_of(family)
    start = family.start(frame, seed=0)
    return family, frame, start + 0.3 * normal(*start.shape, seed=4)


@each_family
def test_q_starts_at_its_frame(name):
    family = FAMILIES[name]
    frame = frame_of(family)
    start = family.start(frame, seed=0)
    assert start.shape == (TASKS, family.parameters)
    phi = normal(5, TASKS, family.size, seed=5)
    density = family.density(start, frame)
    torch.testing.assert_close(density.centre, frame.loc)
    if name == "low_rank":  # its marginals: W is small, not zero
        torch.testing.assert_close(density.sd, frame.sd)
    else:
        torch.testing.assert_close(density.log_prob(phi), frame.log_prob(phi))


@each_family
def test_a_draw_comes_with_its_density(name):
    family, frame, values = some(name)
    noise = normal(6, TASKS, family.noise_size, seed=6)
    density = family.density(values, frame)
    for stick in (False, True):
        phi, log_q = family.draw(values, frame, noise, stick=stick)
        torch.testing.assert_close(phi, density.draw(noise))
        torch.testing.assert_close(log_q, density.log_prob(phi), rtol=1e-9, atol=1e-9)


@each_family
def test_sticking_leaves_the_score_out(name):
    """With the path alone, dlog q/dλ is that of the draw: q's own numbers are constants."""
    family, frame, values = some(name)
    values.requires_grad_()
    noise = normal(6, TASKS, family.noise_size, seed=6)
    phi, log_q = family.draw(values, frame, noise, stick=True)
    (found,) = torch.autograd.grad(log_q.sum(), values)
    phi, _ = family.draw(values, frame, noise, stick=False)
    held = family.density(values, frame).detach()
    if family.sticks:
        (wanted,) = torch.autograd.grad(held.log_prob(phi).sum(), values)
    else:
        (wanted,) = torch.autograd.grad(family.density(values, frame).log_prob(phi).sum(), values)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["diagonal", "full", "low_rank", "full of one entry"])
def test_gaussians_against_their_covariance(name):
    family, frame, values = some(name)
    density = family.density(values, frame)
    phi = normal(7, TASKS, family.size, seed=8)
    # The covariance of draws, from the map of unit vectors: columns of the root.
    basis = torch.eye(family.noise_size).double().unsqueeze(1).expand(-1, TASKS, -1)
    root = (density.draw(basis) - density.centre).movedim(0, -1)
    covariance = root @ root.mT
    dense = torch.distributions.MultivariateNormal(density.centre, covariance)
    torch.testing.assert_close(density.log_prob(phi), dense.log_prob(phi))
    torch.testing.assert_close(density.covariance, covariance)
    torch.testing.assert_close(density.sd, covariance.diagonal(dim1=-2, dim2=-1).sqrt())


@each_family
def test_a_new_frame_changes_nothing_but_units(name):
    family, frame, values = some(name)
    again, moved = family.reframed(values, frame)
    phi = normal(5, TASKS, family.size, seed=9)
    torch.testing.assert_close(
        family.density(again, moved).log_prob(phi), family.density(values, frame).log_prob(phi)
    )


@each_family
def test_some_tasks_and_no_history(name):
    family, frame, values = some(name)
    values.requires_grad_()
    density = family.density(values, frame)
    phi = normal(5, TASKS, family.size, seed=9)
    positions = torch.tensor([2, 0])
    torch.testing.assert_close(
        density.select(positions).log_prob(phi[:, positions]), density.log_prob(phi)[:, positions]
    )
    assert density.log_prob(phi).requires_grad
    assert not density.detach().log_prob(phi).requires_grad


def test_low_rank_reaches_every_covariance():
    """Σ = λ_min I + (Σ − λ_min I), whose second part has rank size − 1."""
    factor = normal(4, 4, seed=1).double()
    covariance = factor @ factor.mT + 0.1 * torch.eye(4)
    values, vectors = torch.linalg.eigh(covariance)
    family = LowRankFamily(4, 3)
    spread = vectors[:, 1:] * (values[1:] - values[0]).sqrt()
    row = torch.cat([torch.zeros(4), 0.5 * values[0].log().expand(4), spread.flatten()])
    frame = Frame(torch.zeros(1, 4).double(), torch.ones(1, 4).double())
    found = family.density(row.double().unsqueeze(0), frame)
    torch.testing.assert_close(found.covariance[0], covariance)


def test_triangles_are_filled_by_rows():
    found = lower_triangular(torch.zeros(3).double(), torch.tensor([1.0, 2.0, 3.0]).double())
    wanted = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [2.0, 3.0, 1.0]]).double()
    torch.testing.assert_close(found, wanted)


def test_a_flow_has_the_density_of_its_jacobian():
    family, frame, values = some("flow")
    density = family.density(values, frame)
    noise = normal(1, TASKS, family.size, seed=6)
    phi, log_q = density.push(noise)
    for task in range(TASKS):
        one = density.select(torch.tensor([task]))
        jacobian = torch.autograd.functional.jacobian(
            lambda e, one=one: one.draw(e.reshape(1, 1, -1)).flatten(), noise[0, task]
        )
        log_normal = -0.5 * noise[0, task].square().sum() - 2 * math.log(2 * math.pi)
        wanted = log_normal - torch.linalg.slogdet(jacobian)[1]
        torch.testing.assert_close(log_q[0, task], wanted)
    torch.testing.assert_close(density.log_prob(phi), log_q)


def test_a_flow_of_one_entry_integrates_to_one():
    family, frame, values = some("flow of one entry")
    density = family.density(values, Gaussian(frame.loc, torch.ones(TASKS, 1).double()))
    grid = torch.linspace(-30, 30, 20_001).double()
    total = torch.trapezoid(
        density.log_prob(grid[:, None, None].expand(-1, TASKS, 1)).exp().T, grid
    )
    torch.testing.assert_close(total, torch.ones(TASKS).double(), rtol=1e-4, atol=0)
