"""q(φ_i | S_i) for a batch of tasks: what every inference strategy returns for them.

A posterior holds θ (a point, or draws that go with its draws of φ), a density over φ in
unconstrained space, and the support that it saw. What it gives out is constrained, by site.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hbmeta.components import Mixture, Particles, linear_columns, linear_gaussian, probes
from hbmeta.densities import Delta, Density, Empirical, Gaussian, Transported, equal_draws
from hbmeta.enumeration import Classes, integrated, no_joint
from hbmeta.errors import DataError, UnsupportedModelError
from hbmeta.functions import Functions
from hbmeta.predictive import Predictive
from hbmeta.problem import Problem
from hbmeta.program import Theta
from hbmeta.sites import Site
from hbmeta.tasks import Tasks
from hbmeta.tasks.checks import check_count

if TYPE_CHECKING:
    import arviz

__all__ = ["Particles", "TaskPosterior", "Units"]


class Units(NamedTuple):
    """y of the person's data = location + scale · y of the model."""

    location: float = 0.0
    scale: float = 1.0


class TaskPosterior:
    """The approximation q(φ_i | S_i) of a strategy, one per task.

    Args:
        problem: the program.
        theta: θ, a point or draws.
        density: q over φ in unconstrained space, one per task.
        support: the tasks S_i that it saw.
        drawn: whether θ holds draws, aligned with those of an `Empirical` density.
        chains: number of chains that the draws fall into, for R̂ and ArviZ.
        info: what the strategy measured on the way (evidence, effective draws, …).
        units: undoes a standardised y in predictions.
    """

    def __init__(
        self,
        problem: Problem,
        theta: Theta,
        density: Density,
        support: Tasks,
        *,
        drawn: bool = False,
        chains: int = 1,
        info: Mapping[str, Any] | None = None,
        units: Units | None = None,
    ) -> None:
        self.problem, self.theta, self.density, self.support = problem, theta, density, support
        self.drawn, self.chains = drawn, chains
        self.info: dict[str, Any] = dict(info or {})
        self.units = units or Units()

    @property
    def ids(self) -> tuple[Any, ...]:
        """Labels of the tasks."""
        return self.support.ids

    def __repr__(self) -> str:
        kind = type(self.density).__name__
        return (
            f"TaskPosterior({kind}, tasks={len(self.ids)}, phi_size={self.problem.sites.phi_size})"
        )

    def select(self, ids: Iterable[Any]) -> TaskPosterior:
        """The posterior of some of the tasks, by id."""
        ids = tuple(ids)
        positions = torch.tensor([self.support.position(i) for i in ids], dtype=torch.int64)
        return TaskPosterior(
            self.problem,
            self.theta,
            self.density.select(positions),
            self.support.select(ids),
            drawn=self.drawn,
            chains=self.chains,
            info={k: v for k, v in self.info.items() if not isinstance(v, Tensor)},
            units=self.units,
        )

    def particles(self, draws: int = 1000, seed: int = 0) -> Particles:
        """At most `draws` stored draws of (θ, φ), evenly thinned, or fresh ones of a density.

        Nodes of a grid come whole.
        """
        draws = check_count(draws, "draws", where="posterior")
        density = self.density
        if isinstance(density, Delta):
            return Particles(self.theta, False, density.loc.unsqueeze(0), None)
        if isinstance(density, Transported):
            generator = torch.Generator().manual_seed(seed)
            shape = (draws, len(self.ids), density.noise_size)
            # On the processor, so that draws are the same on every device.
            noise = torch.randn(shape, generator=generator, dtype=density.centre.dtype)
            with torch.no_grad():
                phi = density.draw(noise.to(density.centre.device))
            return Particles(self.theta, False, phi, None)
        stored = density.phi.shape[0]
        kept = _thin(stored, stored if density.nodes else draws)
        weights = None if density.log_weights is None else density.log_weights[kept]
        return Particles(self._theta_at(kept), self.drawn, density.phi[kept], weights)

    def _theta_at(self, kept: Tensor) -> Theta:
        if not self.drawn:
            return self.theta
        names = {site.name for site in self.problem.sites.globals}
        return {k: v[kept] if k in names else v for k, v in self.theta.items()}

    def values(self, draws: int = 1000, seed: int = 0) -> tuple[dict[str, Tensor], Tensor | None]:
        """Constrained local and deterministic sites (draws, tasks, *shape), and their weights."""
        particles = self.particles(draws, seed)
        batch = self.problem.batch(self.support)
        found = self.problem.particle_values(particles.theta, particles.drawn, particles.phi, batch)
        sites = self._local_sites
        shape = (particles.phi.shape[0], len(self.ids))
        out = {s.name: found[s.name].expand(*shape, *s.shape) for s in sites}
        return out, particles.log_weights

    def log_likelihood(self, draws: int = 1000, seed: int = 0) -> tuple[Tensor, Tensor | None]:
        """log p(y_r | φ_s, θ_s) (draws, rows) at the draws of `values`, and the weights of these.

        Rows of the support in the order of `support.flat_x`, y in the units of the model.

        Raises:
            DataError: the support has no y.
        """
        if self.support.flat_y is None:
            raise DataError(
                "TaskPosterior.log_likelihood",
                needed="a support with y",
                found="tasks with inputs only",
                do="Adapt to tasks that have y.",
            )
        particles = self.particles(draws, seed)
        if not self.support.n_points:
            return particles.phi.new_zeros(particles.phi.shape[0], 0), particles.log_weights
        batch = self.problem.batch(self.support)
        found = self.problem.particle_cells(particles.theta, particles.drawn, particles.phi, batch)
        rows = found if batch.task is not None else self.support.unpad(found, dim=1)
        return rows, particles.log_weights

    def sample(self, n: int, seed: int = 0) -> dict[str, Tensor]:
        """n draws of every local site, constrained, (n, tasks, *shape), with equal weights.

        Stored draws are taken with replacement where there are fewer of them or they are weighted.
        """
        if not isinstance(n, int) or n < 1:
            raise DataError(
                "TaskPosterior.sample", needed="n of 1 or more", found=repr(n), do="Pass n=1000."
            )
        density, wanted = self.density, n
        if isinstance(density, Empirical) and density.log_weights is not None:
            # All weighted draws take part: of n thinned ones few may carry any weight.
            wanted = density.phi.shape[0]
        values, weights = self.values(wanted, seed)
        if not values:  # an empty φ: a Gaussian process whose hyperparameters are all known
            return values
        stored = next(iter(values.values())).shape[0]
        if stored == n and weights is None:
            return values
        tasks = len(self.ids)
        index = equal_draws(torch.zeros(stored, tasks) if weights is None else weights, n, seed + 1)
        out = {}
        for name, value in values.items():
            full = index.reshape(n, tasks, *(1,) * (value.ndim - 2)).to(value.device)
            out[name] = value.gather(0, full.expand(n, tasks, *value.shape[2:]))
        return out

    def moments(self, draws: int = 4000, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
        """Posterior mean and sd (tasks, *shape) of every local site, constrained.

        Exact for sites that are linear in the φ of a Gaussian; otherwise from `draws` draws.
        """
        out = self._linear_moments()
        values: dict[str, Tensor] = {}
        weights = None
        if len(out) < len(self._local_sites):
            values, weights = self.values(draws, seed)
        for name, value in values.items():
            if name in out:
                continue
            if weights is None:
                mean = value.mean(0)
                spread = (value - mean).square().mean(0)
            else:
                w = weights.softmax(0).reshape(*weights.shape, *(1,) * (value.ndim - 2))
                mean = (w * value).sum(0)
                spread = (w * (value - mean).square()).sum(0)
            out[name] = (mean, spread.sqrt())
        return out

    @property
    def _local_sites(self) -> tuple[Site, ...]:
        return (*self.problem.sites.locals, *self.problem.sites.deterministic_local)

    def _linear_moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        if not isinstance(self.density, Gaussian) or self.density.loc.shape[-1] > 64:
            return {}
        phi, steps = probes(self.density)
        batch = self.problem.batch(self.support)
        found = self.problem.particle_values(self.theta, False, phi, batch)
        out = {}
        for site in self._local_sites:
            value = found[site.name].expand(phi.shape[0], len(self.ids), *site.shape)
            columns = linear_columns(value, steps)
            if columns is not None:
                out[site.name] = (value[0], columns.square().sum(0).sqrt())
        return out

    def log_prob(self, phi: Mapping[str, Tensor]) -> Tensor:
        """log q(φ) (..., tasks) at constrained local sites (..., tasks, *shape), as of `sample`.

        Raises:
            UnsupportedModelError: q is a point or a set of draws and has no density.
        """
        missing = [s.name for s in self.problem.sites.locals if s.name not in phi]
        if missing:
            raise DataError(
                "TaskPosterior.log_prob",
                needed=f"all local sites {[s.name for s in self.problem.sites.locals]}",
                found=f"no {missing[0]!r}",
                do="Pass the dict that sample() returns.",
            )
        if not isinstance(self.density, Transported):
            return self.density.log_prob(next(iter(phi.values())))  # which refuses
        batch = self.problem.batch(self.support)
        with torch.no_grad():
            at_location = self.problem.run(self.theta, {}, batch, with_y=False)
        unconstrained, jacobian = {}, torch.zeros(())
        nested = batch.layout == "nested"
        for site in self.problem.sites.locals:
            transform = at_location.transforms[site.name]
            value = phi[site.name].to(self.problem.dtype)
            lead = value.ndim - len(site.shape)
            value = value.unsqueeze(lead) if nested else value
            u = transform.inv(value)
            log_det = transform.log_abs_det_jacobian(u, value)
            log_det = log_det.expand(u.shape) if site.real else log_det
            jacobian = jacobian + log_det.reshape(*value.shape[:lead], -1).sum(-1)
            unconstrained[site.name] = u.squeeze(lead) if nested else u
        return self.density.log_prob(self.problem.sites.to_vector(unconstrained)) - jacobian

    def kl(self, other: TaskPosterior) -> Tensor:
        """(tasks,) KL(self ‖ other) in nats, in closed form between Gaussians.

        The map to the supports is the same for both, so the divergence is that of the sites too.

        Raises:
            DataError: the two are of other tasks.
            UnsupportedModelError: they are not Gaussian, or of other sites.
        """
        if self.ids != other.ids:
            raise DataError(
                "TaskPosterior.kl",
                needed=f"the same {len(self.ids)} tasks in the same order",
                found=f"{len(other.ids)} tasks, or others",
                do="Bring them into one order with posterior.select(ids).",
            )
        if self.problem.sites.locals != other.problem.sites.locals:
            raise UnsupportedModelError(
                "TaskPosterior.kl",
                needed=f"the same local sites {[s.name for s in self.problem.sites.locals]}",
                found=f"{[s.name for s in other.problem.sites.locals]}, or other shapes",
                do="Compare posteriors of one program.",
            )
        a, b = self.density, other.density
        if not (isinstance(a, Gaussian) and isinstance(b, Gaussian)):
            raise UnsupportedModelError(
                "TaskPosterior.kl",
                needed="two Gaussian posteriors",
                found=f"{type(a).__name__} and {type(b).__name__}",
                do="Compare means and standard deviations instead (hbmeta.compare).",
            )
        self._require_same_supports(other)
        left = a.scale if not a.diagonal else torch.diag_embed(a.scale)
        right = b.scale if not b.diagonal else torch.diag_embed(b.scale)
        return torch.distributions.kl_divergence(
            torch.distributions.MultivariateNormal(a.loc, scale_tril=left),
            torch.distributions.MultivariateNormal(b.loc, scale_tril=right),
        )

    def _require_same_supports(self, other: TaskPosterior) -> None:
        """Supports that depend on θ map the same u to different φ."""
        mine, others = (
            p.problem.run(p.theta, {}, p.problem.batch(p.support), with_y=False).transforms
            for p in (self, other)
        )
        for site in self.problem.sites.locals:
            u = torch.full((1, 1, *site.unconstrained_shape), 0.3, dtype=self.problem.dtype)
            u = u.to(self.problem.device)
            if not site.real and not torch.equal(mine[site.name](u), others[site.name](u)):
                raise UnsupportedModelError(
                    "TaskPosterior.kl",
                    needed="sites whose supports are the same in both fits",
                    found=f"site {site.name!r} with a support that depends on θ",
                    do="Compare means and standard deviations instead (hbmeta.compare).",
                )

    def predict(self, x: Tasks | Tensor, *, draws: int = 1000, seed: int = 0) -> Predictive:
        """The predictive of new points of these tasks.

        Args:
            x: inputs (tasks, points, features), or `Tasks` with the same ids.
            draws: draws of the posterior that enter the mixture.
            seed: for draws of a Gaussian and of the predictive.
        Returns:
            a Predictive shaped as y, in the units of the data.
        """
        draws = check_count(draws, "draws", where="posterior")
        if isinstance(x, Tasks):
            tasks = x
        else:
            # Another number of tasks is refused below, in words that speak of tasks.
            n_tasks = (*x.shape, 0)[0] if hasattr(x, "shape") else len(x)
            ids = self.ids if n_tasks == len(self.ids) else None
            tasks = Tasks(x, ids=ids, features=self.support.features)
        if tasks.ids != self.ids or tasks.features != self.support.features:
            raise DataError(
                "predict",
                needed=f"inputs of these {len(self.ids)} tasks, features {self.support.features}",
                found=f"{len(tasks.ids)} tasks, features {tasks.features}",
                do="Use posterior.select(ids), and the columns of the fit in their order.",
            )
        tasks = tasks.to(device=self.problem.device, dtype=self.problem.dtype)
        units = {"location": self.units.location, "scale": self.units.scale, "seed": seed}
        plain = self.problem.layout != "joint" and self.problem.classes is None
        if plain:
            check_count(draws, "draws", where="posterior")
            # Before any draw: 1,000 of 100,000 tasks take half a minute.
            exact = linear_gaussian(self.problem, self.theta, self.density, tasks, self.support)
            if exact is not None:
                joint = {"joint": exact.joint, "joint_sample": exact.sample}
                return Predictive(exact, tasks, **joint, **units)  # type: ignore[arg-type]
        particles = self.particles(draws, seed)
        if tasks.n_points and self.problem.layout == "joint":
            functions = Functions(self.problem, particles, self.support, tasks)
            return Predictive(
                functions,
                tasks,
                log_weights=particles.log_weights,
                joint=functions.joint,
                joint_sample=functions.sample,
                **units,  # type: ignore[arg-type]
            )
        if tasks.n_points and self.problem.classes is not None:
            return self._predict_classes(particles, tasks, seed)
        mixture = Mixture(self.problem, particles, tasks, self.support)
        return Predictive(mixture, tasks, log_weights=particles.log_weights, **units)  # type: ignore[arg-type]

    def _predict_classes(self, particles: Particles, tasks: Tasks, seed: int) -> Predictive:
        if isinstance(self.density, Gaussian):
            closed = integrated(self.problem, self.theta, self.density, tasks, self.support)
            if closed is not None:
                return Predictive(closed, tasks, joint=no_joint, seed=seed)
        classes = Classes(self.problem, particles, tasks, self.support)
        return Predictive(
            classes,
            tasks,
            log_weights=particles.log_weights,
            row_log_weights=classes.log_evidence,
            joint=None if isinstance(self.density, Delta) else no_joint,
            seed=seed,
        )

    def to_inference_data(
        self, draws: int = 1000, seed: int = 0, *, query: Tasks | None = None
    ) -> arviz.InferenceData:
        """ArviZ groups of these tasks, dims by plate; see `hbmeta.inference_data`."""
        from hbmeta.inference_data import posterior_to_inference_data

        return posterior_to_inference_data(self, draws=draws, seed=seed, query=query)


def _thin(available: int, wanted: int) -> Tensor:
    if available <= wanted:
        return torch.arange(available)
    return torch.linspace(0, available - 1, wanted).round().long()
