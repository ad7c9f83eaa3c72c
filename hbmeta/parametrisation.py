"""Centered or non-centered: the coordinates in which a sampler moves φ.

Model: φ = m + s ε at a local site of a location-scale family, with m and s functions of θ (and of
the sites before it) and ε of a fixed law.
Coordinates: φ itself ("centered"), or ε ("non-centered"). With t the coordinates and
log |∂φ/∂ε| = log s,

    log p(θ, t, y) = log p(θ, φ(t), y) + Σ_{non-centered} log s,

which holds for every p: the choice moves no posterior, only the work of drawing from it. Where the
data say much about φ, ε and (m, s) depend on each other, and φ is the better coordinate; where they
say little, φ and s do (the funnel), and ε is.

The measure of that is how much of the prior's variance the data remove. With H the curvature of
−log p(φ | y, θ) in ε (H = I + what the data add, for a Gaussian prior) the share left is

    λ = tr(H⁻¹) / d,

and in a Gaussian hierarchy a Gibbs sampler of θ and φ converges at rate 1 − λ centered and λ
non-centered: the coordinate is φ where λ < ½. Here λ is averaged over draws (θ, φ) of a short
pilot, and a site is centered where that holds in every task: a single task that is centered with
few points keeps the funnel of the scale for all. Above 64 parameters per task, where a dense H is
too much, the coordinate is ε: with much data it is slow, but φ with little has the funnel, and with
it draws that are wrong. (Choosing task by task gained a factor of 1.5 on
radon with one seed, and gave hundreds of divergences on other programs whose scale can reach 0.)

References:
    Papaspiliopoulos, Roberts, Sköld (2007), Statistical Science 22(1). Betancourt, Girolami (2015),
    Hamiltonian Monte Carlo for hierarchical models. Yu, Meng (2011), JCGS 20(3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to, transforms

from hbmeta.curvature import gradient_and_hessian
from hbmeta.errors import UnsupportedModelError
from hbmeta.problem import Problem
from hbmeta.program import Batch, Phi, Theta

Choice = Literal["auto", "centered", "non-centered", "as written"]
CHOICES: tuple[Choice, ...] = ("auto", "centered", "non-centered", "as written")

_FAMILIES = (
    torch.distributions.Normal,
    torch.distributions.StudentT,
    torch.distributions.Cauchy,
    torch.distributions.Laplace,
    torch.distributions.Gumbel,
    dist.Logistic,
    dist.SoftLaplace,
    dist.AsymmetricLaplace,
)
# The share of the prior's variance that is left above which ε is the coordinate.
_EVEN = 0.5
# The curvature is dense, and taken at so many draws of the pilot.
_DENSE_LIMIT = 64
_DRAWS = 16
# Curvature in ε below this is flat; the prior's own is 1.
_LEAST = 1e-2

__all__ = ["CHOICES", "Choice", "Coordinates", "centered_effects", "choosable_sites"]


class _Affine(NamedTuple):
    """u = loc + scale ε in unconstrained space; scale a factor where `dense`."""

    loc: Tensor
    scale: Tensor
    dense: bool

    def forward(self, noise: Tensor) -> Tensor:
        if self.dense:
            return self.loc + (self.scale @ noise.unsqueeze(-1)).squeeze(-1)
        return self.loc + self.scale * noise

    def log_det(self, like: Tensor) -> Tensor:
        """log |∂u/∂ε|, one number per entry of u or, where dense, per vector."""
        if self.dense:
            logs: Tensor = self.scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            return logs.expand(like.shape[:-1])
        return self.scale.log().expand(like.shape)


def _affine(fn: Any) -> _Affine | None:
    """The map of a prior as it stands in a program (expanded, independent, masked), or None."""
    while isinstance(
        fn, dist.ExpandedDistribution | dist.MaskedDistribution | torch.distributions.Independent
    ):
        fn = fn.base_dist
    if isinstance(fn, torch.distributions.TransformedDistribution):
        # LogNormal and its kin: location and scale are those of log φ, which is where φ stands.
        same = _parts(fn.transforms) == _parts([biject_to(fn.support)])
        return _affine(fn.base_dist) if same else None
    if isinstance(fn, torch.distributions.MultivariateNormal):
        return _Affine(fn.loc, fn.scale_tril, True)
    if isinstance(fn, _FAMILIES):
        return _Affine(fn.loc, fn.scale, False)
    return None


def _parts(found: list[Any]) -> list[Any]:
    """Transforms in their order, compositions taken apart and u ↦ 0 + 1 u left out."""
    out: list[Any] = []
    for part in found:
        if isinstance(part, transforms.ComposeTransform):
            out += _parts(part.parts)
        elif not (
            isinstance(part, transforms.AffineTransform)
            and isinstance(part.loc, int | float)
            and isinstance(part.scale, int | float)
            and (part.loc, part.scale) == (0, 1)
        ):
            out.append(part)
    return out


class _Place(Messenger):
    """Puts φ(t) in the place of t at the sites of a choice, outside of what runs the program."""

    def __init__(self, given: Phi, centered: Mapping[str, Tensor], nested: bool) -> None:
        super().__init__()
        self.given, self.centered, self.nested = given, centered, nested
        self.phi: Phi = {}
        self.log_det: Tensor | None = None

    def _pyro_sample(self, message: Any) -> None:
        name = message["name"]
        if name not in self.centered:
            return
        affine = _affine(message["fn"])
        assert affine is not None
        given = self.given[name]
        given = given.unsqueeze(1) if self.nested else given
        keep = self.centered[name].reshape(-1, *(1,) * (given.ndim - 1)) > 0.5
        value = torch.where(keep, given, affine.forward(given))
        log_det = affine.log_det(given)
        log_det = torch.where(keep.reshape(-1, *(1,) * (log_det.ndim - 1)), 0.0, log_det).sum()
        self.log_det = log_det if self.log_det is None else self.log_det + log_det
        self.phi[name] = value.squeeze(1) if self.nested else value
        message["value"] = biject_to(message["fn"].support)(value)


class _Probe(Messenger):
    """Records the sites whose location or scale, or scale alone, depends on another latent."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.scaled: list[str] = []

    def _pyro_sample(self, message: Any) -> None:
        affine = None if message["is_observed"] else _affine(message["fn"])
        if affine is not None and (affine.loc.requires_grad or affine.scale.requires_grad):
            self.found.append(message["name"])
        if affine is not None and affine.scale.requires_grad:
            self.scaled.append(message["name"])


def choosable_sites(problem: Problem, batch: Batch) -> tuple[str, ...]:
    """Local sites that can be centered or not: those whose m or s depends on another latent."""
    names = {site.name for site in problem.sites.globals}
    theta = {k: v.requires_grad_(k in names) for k, v in problem.theta(batch).items()}
    with torch.no_grad():
        phi = problem.location(theta, batch)
    probe = _Probe()
    with torch.enable_grad(), probe:
        problem.run(theta, problem.sites.from_vector(phi.requires_grad_()), batch, with_y=False)
    return tuple(site.name for site in problem.sites.locals if site.name in probe.found)


def centered_effects(problem: Problem) -> tuple[str, ...]:
    """Level-1 sites whose scale is a function of other level-1 sites, as of crossed effects."""
    batch = problem.one_row()
    theta = {name: value.requires_grad_() for name, value in problem.theta(batch).items()}
    probe = _Probe()
    with torch.enable_grad(), probe:
        problem.run(theta, {}, batch, with_y=False)
    return tuple(site.name for site in problem.sites.globals if site.name in probe.scaled)


class Coordinates:
    """The map from the coordinates of a sampler to φ.

    Args:
        problem: the program.
        sites: local sites that can be centered or not, of `choosable_sites`.
        centered: (tasks, sites), 1 where φ itself is the coordinate and 0 where ε is.
    """

    def __init__(self, problem: Problem, sites: tuple[str, ...], centered: Tensor) -> None:
        self.problem, self.sites, self.centered = problem, sites, centered

    @staticmethod
    def of(problem: Problem, batch: Batch, choice: Choice, where: str) -> Coordinates | None:
        """Those of a choice, or None for φ as the program has it; "auto" begins non-centered.

        Raises:
            UnsupportedModelError: "centered" or "non-centered" where there is nothing to choose.
        """
        if choice == "as written":
            return None
        sites = choosable_sites(problem, batch)
        if not sites and choice != "auto":
            families = ", ".join(f"{s.name} ~ {s.family}" for s in problem.sites.locals)
            raise UnsupportedModelError(
                where,
                needed="a task parameter of a location-scale family, such as Normal, whose "
                f"location or scale depends on θ, to make it {choice}",
                found=families or "no task parameters",
                do='Leave parametrisation out, or pass "as written".',
            )
        if not sites:
            return None
        shape = (batch.n_tasks, len(sites))
        full = torch.full(shape, float(choice == "centered"), dtype=problem.dtype)
        return Coordinates(problem, sites, full.to(problem.device))

    def start(self, theta: Theta, batch: Batch) -> Tensor:
        """(tasks, phi_size) the coordinates of the task prior's location, where ε is 0."""
        phi = self.problem.location_by_site(theta, batch)
        for name, keep in zip(self.sites, self.centered.unbind(1), strict=True):
            phi[name] = phi[name] * keep.reshape(-1, *(1,) * (phi[name].ndim - 1))
        return self.problem.sites.to_vector(phi)

    def describe(self) -> dict[str, str]:
        """The choice in words, by site."""
        words = {}
        for name, keep in zip(self.sites, self.centered.unbind(1), strict=True):
            count, tasks = int(keep.sum()), len(keep)
            words[name] = (
                "non-centered"
                if not count
                else "centered"
                if count == tasks
                else f"centered in {count} of {tasks} tasks"
            )
        return words

    def phi(
        self, theta: Theta, coordinates: Tensor, batch: Batch, centered: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """φ (tasks, phi_size) and log |∂φ/∂t| () at coordinates t (tasks, phi_size)."""
        chosen = self.centered if centered is None else centered
        given = self.problem.sites.from_vector(coordinates)
        place = _Place(given, dict(zip(self.sites, chosen.unbind(1), strict=True)), self._nested)
        with place:
            self.problem.run(theta, given, batch, with_y=False)
        assert place.log_det is not None
        return self.problem.sites.to_vector({**given, **place.phi}), place.log_det

    def many(
        self, theta: Theta, drawn: bool, coordinates: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """`phi` for draws: (draws, tasks, phi_size) and (draws,)."""
        found: tuple[Tensor, Tensor] = self.problem.over(
            lambda t, c: self.phi(t, c, batch), theta, drawn, coordinates, batch
        )
        return found

    def from_noise(self, theta: Theta, drawn: bool, noise: Tensor, batch: Batch) -> Tensor:
        """(draws, tasks, phi_size) the coordinates of this choice, given those of none centered."""
        apart = Coordinates(self.problem, self.sites, torch.zeros_like(self.centered))
        phi = self.problem.sites.from_vector(apart.many(theta, drawn, noise, batch)[0])
        found = self.problem.sites.from_vector(noise)
        for name, keep in zip(self.sites, self.centered.unbind(1), strict=True):
            centered = keep.reshape(-1, *(1,) * (phi[name].ndim - 2)) > 0.5
            found[name] = torch.where(centered, phi[name], found[name])
        return self.problem.sites.to_vector(found)

    @property
    def _nested(self) -> bool:
        return self.problem.layout == "nested"

    @property
    def measurable(self) -> bool:
        """Whether φ is small enough for `choose`."""
        return self.problem.sites.phi_size <= _DENSE_LIMIT

    def choose(self, theta: Theta, drawn: bool, coordinates: Tensor, batch: Batch) -> None:
        """Takes the better choice per site, from draws with all sites non-centered.

        Args:
            theta: global sites, with a first axis of draws if `drawn`.
            drawn: whether there are any.
            coordinates: (draws, tasks, phi_size).
            batch: the data.
        """
        share = self.share_left(theta, drawn, coordinates, batch)
        informed = (share < _EVEN).all(0)
        self.centered = informed.to(self.centered).expand_as(self.centered).clone()

    def share_left(self, theta: Theta, drawn: bool, coordinates: Tensor, batch: Batch) -> Tensor:
        """(tasks, sites) λ, the mean share of the prior's variance that the data leave."""
        kept = torch.linspace(0, coordinates.shape[0] - 1, _DRAWS).round().long().unique()
        names = {site.name for site in self.problem.sites.globals} if drawn else set()
        total = torch.zeros_like(self.centered)
        for draw in kept.tolist():
            at = {k: v[draw] if k in names else v for k, v in theta.items()}
            total += self._share(at, coordinates[draw], batch)
        return total / len(kept)

    def _share(self, theta: Theta, noise: Tensor, batch: Batch) -> Tensor:
        """(tasks, sites) tr(H⁻¹) / d at one draw."""

        def log_joint(given: Tensor) -> Tensor:
            likelihood, local, _ = self.problem.terms(
                theta, self.phi(theta, given, batch)[0], batch
            )
            return likelihood + local

        _, _, hessian = gradient_and_hessian(log_joint, noise)
        values, vectors = torch.linalg.eigh(-hessian)
        # A direction in which the density is flat or curves upwards is not informed.
        left = (vectors.square() / values.clamp_min(_LEAST).unsqueeze(-2)).sum(-1)
        by_site = self.problem.sites.from_vector(left.clamp_max(1.0))
        rows = [by_site[name].reshape(left.shape[0], -1).mean(-1) for name in self.sites]
        return torch.stack(rows, 1)
