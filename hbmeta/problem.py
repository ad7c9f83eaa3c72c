"""The functional view of a program on data: what every inference strategy is written against.

θ is a dict of tensors: module parameters by qualified name and global sites, unconstrained, by
name. φ is the vector (tasks, phi_size) of all local sites, unconstrained, or a dict of them
(tasks, *shape). Densities are those of unconstrained space, Jacobian kept. No method changes
anything.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from pyro.nn.module import PyroModule, to_pyro_module_
from torch import Tensor, nn

from hbmeta.enumeration import class_cells, count_classes
from hbmeta.errors import ProgramError
from hbmeta.functions import check_mask, leave_one_out
from hbmeta.inspection import inspect_program
from hbmeta.program import (
    Batch,
    Evaluation,
    Layout,
    Phi,
    Program,
    Theta,
    evaluate,
    layouts,
    program_name,
    takes_context,
)
from hbmeta.rebuilding import rebuild, tensors_of
from hbmeta.sites import Sites
from hbmeta.staging import Staged, Tier
from hbmeta.tasks import Tasks

# Padding costs nothing where groups are of equal size and up to 11 times the rows where they are
# not (radon: 9,860 cells for 919 rows); the flat layout's scatter costs about a quarter more per
# row.
_PADDING_WORTH = 1.25
# Draws are mapped over the program so many cells at a time: 4,000 draws of 73,421 rows would be
# 2.3 GB for every intermediate.
_CELLS = 4_000_000

__all__ = ["Problem"]


class Problem:
    """A program, its sites, and its log densities as functions of θ and φ.

    Args:
        program: a `HierarchicalModel` or any Pyro program of the convention.
        tasks: data to read the sites from; one row is kept, to stand in where no task has any.
        layout: "nested", "flat" or "joint"; by default the cheapest that the program offers.
    Raises:
        ProgramError, DataError: the program breaks the convention, or y is outside its support.
    """

    def __init__(self, program: Program, tasks: Tasks, *, layout: Layout | None = None) -> None:
        self.program = program
        offered = layouts(program)
        if layout is not None and layout not in offered:
            raise ProgramError(
                program_name(program),
                needed=f"the {layout} layout",
                found=f"a signature that offers {' and '.join(offered)}",
                do="Leave layout out, or give the program the keywords task and n_tasks.",
            )
        self.takes_context = takes_context(program)
        self.layout: Layout = layout or self._cheaper(offered, tasks)
        self.dtype, self.device = tasks.dtype, tasks.device
        # How searches for φ run after the fit.
        self.tier: Tier | Literal["auto"] = "auto"
        self._staged: dict[Hashable, Staged] = {}
        if isinstance(program, nn.Module):
            self.program = copy.deepcopy(program).to(dtype=self.dtype, device=self.device)
        if isinstance(self.program, PyroModule):
            # Pyro registers each plain submodule at every access, and warns of tensors in the place
            # of its parameters; of a PyroModule it reads them one by one.
            to_pyro_module_(self.program)
        self.name = program_name(program)
        example = tasks
        if example.n_points == 0 or example.flat_y is None:
            raise ProgramError(
                self.name,
                needed="at least one row with x and y to read the program from",
                found=f"{example.n_points} rows" + ("" if example.flat_y is not None else ", no y"),
                do="Fit on tasks with data; empty supports are for adapt.",
            )
        whole = self._with_context(Batch.of(example, self.layout))
        self.sites: Sites = inspect_program(self.program, whole)
        self._row = (example.flat_x[:1].clone(), example.flat_y[:1].clone())
        self.y_dtype = example.flat_y.dtype
        self._check_names()
        self.classes = count_classes(self, self.one_row())
        if self.layout == "joint":
            check_mask(self, example)
        # A response that cannot be taken apart could not be predicted; better said before a fit.
        first = self.one_row()
        with torch.no_grad():
            tensors_of(self.response(self.theta(first), {}, first))

    @staticmethod
    def _cheaper(offered: tuple[Layout, ...], tasks: Tasks) -> Layout:
        if len(offered) == 1:
            return offered[0]
        padded = tasks.n_tasks * tasks.max_points
        return "nested" if padded <= _PADDING_WORTH * max(tasks.n_points, 1) else "flat"

    def _check_names(self) -> None:
        parameters = {name for name, _ in self.parameters()}
        clash = parameters & {site.name for site in self.sites.globals}
        if clash:
            raise ProgramError(
                self.name,
                needed="different names for parameters and global sites",
                found=f"{sorted(clash)[0]!r} twice",
                do="Rename the site.",
            )

    def staged(
        self, key: Hashable, function: Callable[..., Any], tier: Tier | Literal["auto"], calls: int
    ) -> Staged:
        """The function, staged once for its key and tier; so many more calls are expected."""
        found = self._staged.setdefault((key, tier), Staged(function, tier=tier))
        found.expected_calls = found.calls + calls
        return found

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters of the module, by qualified name; none for a plain function."""
        if not isinstance(self.program, nn.Module):
            return []
        return [(n, p) for n, p in self.program.named_parameters() if p.requires_grad]

    def batch(self, tasks: Tasks, support: Tasks | None = None) -> Batch:
        """The tasks as this problem's layout wants them, predicted from a support; see `given`.

        Pyro refuses plates of size 0, so where no task has a row, one row of the data that the
        program was read from stands in, masked out.
        """
        if support is not None and self.takes_context is not None:
            return self.given(self.batch(tasks), self.batch(support))
        if tasks.n_points:
            return Batch.of(tasks, self.layout)
        x, y = self._row
        y_row = None if tasks.flat_y is None else y
        nothing = torch.zeros(1, dtype=self.dtype, device=self.device)
        if self.layout == "flat":
            first = torch.zeros(1, dtype=torch.int64, device=self.device)
            return Batch(x, y_row, nothing, first, tasks.n_tasks)

        def each(row: Tensor) -> Tensor:
            return row.unsqueeze(0).expand(tasks.n_tasks, *row.shape)

        y_cells = None if y_row is None else each(y_row)
        return Batch(each(x), y_cells, each(nothing), None, tasks.n_tasks, self.layout == "joint")

    def given(self, query: Batch, support: Batch) -> Batch:
        """The query with the support as its context, where the program asks for one.

        Whoever evaluates a query other than by `log_predictive` calls this first: a batch without a
        context is its own.
        """
        if self.takes_context is None:
            return query
        rows = support if self.takes_context == "support" else query
        return replace(query, context=(rows.x, rows.weight))

    def _with_context(self, batch: Batch) -> Batch:
        if self.takes_context is None or batch.context is not None:
            return batch
        return replace(batch, context=(batch.x, batch.weight))

    def one_row(self) -> Batch:
        """A batch of one task with the one row that is kept of the data."""
        x, y = self._row
        return self.batch(Tasks.from_flat(x, y, torch.zeros(1, dtype=torch.int64), 1))

    def run(
        self,
        theta: Mapping[str, Tensor],
        phi: Mapping[str, Tensor],
        batch: Batch,
        *,
        with_y: bool,
        densities: bool = True,
    ) -> Evaluation:
        """One run of the program; see `hbmeta.program.evaluate`."""
        batch = self._with_context(batch)
        names = {"response": self.sites.response}
        return evaluate(
            self.program, theta, phi, batch, **names, with_y=with_y, densities=densities
        )

    def theta(self, batch: Batch) -> Theta:
        """Where θ starts: the module's parameters and the location of p(θ), unconstrained."""
        start = {name: parameter.detach().clone() for name, parameter in self.parameters()}
        with torch.no_grad():
            found = self.run(start, {}, batch, with_y=False).unconstrained
        for site in self.sites.globals:
            start[site.name] = found[site.name].to(self.dtype).clone()
        return start

    def location(self, theta: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """(tasks, phi_size): the location of the task prior, differentiable in θ."""
        if not self.sites.locals:
            return torch.zeros(batch.n_tasks, 0, dtype=self.dtype, device=self.device)
        return self.sites.to_vector(self.location_by_site(theta, batch))

    def location_by_site(self, theta: Mapping[str, Tensor], batch: Batch) -> Phi:
        """The location of the task prior by site, (tasks, *shape), differentiable in θ."""
        found = self.run(theta, {}, batch, with_y=False).unconstrained
        full = {}
        for site in self.sites.locals:
            shape = (batch.n_tasks, *site.unconstrained_shape)
            full[site.name] = found[site.name].expand(shape).to(self.dtype)
        return full

    def _sites_of(self, phi: Tensor | Phi) -> Phi:
        return self.sites.from_vector(phi) if isinstance(phi, Tensor) else phi

    def terms(
        self, theta: Mapping[str, Tensor], phi: Tensor | Phi, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """log p(y | φ, θ) (tasks,), log p(φ | θ) (tasks,), log p(θ) () at φ (tasks, phi_size)."""
        out = self.run(theta, self._sites_of(phi), batch, with_y=True)
        return self._likelihood(out, batch), self._local(out, batch), self._global(out)

    def log_likelihood(
        self, theta: Mapping[str, Tensor], phi: Tensor | Phi, batch: Batch
    ) -> Tensor:
        """(tasks,) log p(y | φ, θ) over the masked-in rows of each task."""
        return self._likelihood(self.run(theta, self._sites_of(phi), batch, with_y=True), batch)

    def log_task_prior(
        self, theta: Mapping[str, Tensor], phi: Tensor | Phi, batch: Batch
    ) -> Tensor:
        """(tasks,) log p(φ | θ), in unconstrained space."""
        return self._local(self.run(theta, self._sites_of(phi), batch, with_y=False), batch)

    def log_prior(self, theta: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """() log p(θ) over the global sites, in unconstrained space."""
        return self._global(self.run(theta, {}, batch, with_y=False))

    def log_predictive(
        self, theta: Mapping[str, Tensor], phi: Tensor | Phi, support: Batch, query: Batch
    ) -> Tensor:
        """(tasks,) log p(y_Q | x_Q, S, φ, θ).

        S enters where points depend on each other given φ, log p(S ∪ Q | φ) − log p(S | φ), and by
        its x as the context of a program that asks for one. Where a program observes more than y
        at a point, p(y | the rest, φ) by enumeration of y.
        """
        if self.layout == "joint":
            both = self.log_likelihood(theta, phi, support.beside(query))
            return both - self.log_likelihood(theta, phi, support)
        query = self.given(query, support)
        if self.classes is None:
            return self.log_likelihood(theta, phi, query)
        cells = self.log_cells(theta, phi, query)
        return query.per_task(torch.where(query.mask, cells, torch.zeros_like(cells)))

    def log_cells(self, theta: Mapping[str, Tensor], phi: Tensor | Phi, batch: Batch) -> Tensor:
        """(*cells) log p(y | the rest, φ, θ), by enumeration of y where more is observed."""
        if self.classes is None:
            found = self.run(theta, self._sites_of(phi), batch, with_y=True).log_likelihood
            assert found is not None
            return found
        assert batch.y is not None
        # Normalised cell by cell: the difference of two sums over cells would lose digits.
        cells = class_cells(self, theta, self._sites_of(phi), batch).log_softmax(-1)
        chosen = batch.y.unsqueeze(-1) == torch.arange(self.classes, device=cells.device)
        return torch.where(chosen, cells, torch.zeros_like(cells)).sum(-1)

    @functools.cached_property
    def moving_observation(self) -> str | None:
        """An observed site other than y whose value is a function of θ, if there is one."""
        batch = self.one_row()
        theta = {name: value.requires_grad_() for name, value in self.theta(batch).items()}
        with torch.enable_grad():
            found = self.run(theta, {}, batch, with_y=True).observed
        return next((name for name, (_, value) in found.items() if value.requires_grad), None)

    @functools.cached_property
    def diagonal_prior(self) -> bool:
        """Whether the coordinates of φ are independent given θ, found from one Hessian."""
        batch = self.one_row()
        generator = torch.Generator().manual_seed(0)

        def moved(value: Tensor) -> Tensor:
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            return value + 0.1 * noise.to(value)

        theta = {name: moved(value) for name, value in self.theta(batch).items()}
        with torch.no_grad():
            phi = moved(self.location(theta, batch))
        with torch.enable_grad():
            hessian = torch.autograd.functional.hessian(
                lambda p: self.log_task_prior(theta, p, batch).sum(), phi
            )[0, :, 0, :]
        off = hessian - torch.diag(hessian.diagonal())
        return bool((off.abs() <= 1e-9 * hessian.abs().max().clamp_min(1e-12)).all())

    def values(
        self, theta: Mapping[str, Tensor], phi: Tensor | Phi, batch: Batch
    ) -> dict[str, Tensor]:
        """Constrained values of all latent and deterministic sites."""
        return self.run(theta, self._sites_of(phi), batch, with_y=False, densities=False).values

    def response(self, theta: Mapping[str, Tensor], phi: Tensor | Phi, batch: Batch) -> Any:
        """The distribution of the response at each cell given θ and φ."""
        return self.run(theta, self._sites_of(phi), batch, with_y=False, densities=False).response

    def _likelihood(self, out: Evaluation, batch: Batch) -> Tensor:
        cells = out.log_likelihood
        if cells is None:
            assert out.log_factor is not None
            return out.log_factor
        total = batch.per_task(torch.where(batch.mask, cells, torch.zeros_like(cells)))
        return total if out.log_factor is None else total + out.log_factor

    def _local(self, out: Evaluation, batch: Batch) -> Tensor:
        if out.log_local is None:
            return torch.zeros(batch.n_tasks, dtype=self.dtype, device=self.device)
        return out.log_local

    def _global(self, out: Evaluation) -> Tensor:
        if out.log_global is None:
            return torch.zeros((), dtype=self.dtype, device=self.device)
        return out.log_global

    # -- many draws at once ---------------------------------------------------------------------

    def particle_values(
        self, theta: Theta, drawn: bool, phi: Tensor, batch: Batch
    ) -> dict[str, Tensor]:
        """`values` for particles: phi (draws, tasks, phi_size); θ too has a first axis if drawn."""
        found: dict[str, Tensor] = self.over(
            lambda t, p: self.values(t, p, batch), theta, drawn, phi, batch
        )
        return found

    def particle_log_likelihood(
        self, theta: Theta, drawn: bool, phi: Tensor, batch: Batch
    ) -> Tensor:
        """(draws, tasks) log p(y | φ, θ)."""
        found: Tensor = self.over(
            lambda t, p: self.log_likelihood(t, p, batch), theta, drawn, phi, batch
        )
        return found

    def particle_cells(self, theta: Theta, drawn: bool, phi: Tensor, batch: Batch) -> Tensor:
        """(draws, *cells) log p(y | φ, θ) of every cell; those of masked cells mean nothing.

        Where points depend on each other given φ, log p(y_j | the other points of the task, φ, θ),
        which is what leave-one-out by importance sampling needs (Bürkner et al. 2021). Where a
        program observes more than y at a point, log p(y | the rest, φ, θ) by enumeration of y: what
        predictions are judged by, so that programs of y alone compare.
        """
        if self.layout == "joint":
            return leave_one_out(self.particle_response(theta, drawn, phi, batch), batch)

        found: Tensor = self.over(lambda t, p: self.log_cells(t, p, batch), theta, drawn, phi)
        return found

    def particle_response(self, theta: Theta, drawn: bool, phi: Tensor, batch: Batch) -> Any:
        """The distribution of the response, batch shape (draws, *cells)."""
        kept: dict[str, Any] = {}

        def apart(t: Theta, p: Tensor) -> dict[str, Tensor]:
            tensors, kept["spec"] = tensors_of(self.response(t, p, batch))
            return tensors

        tensors = self.over(apart, theta, drawn, phi)
        return rebuild(kept["spec"], tensors)

    def over(
        self, function: Any, theta: Theta, drawn: bool, phi: Tensor, batch: Batch | None = None
    ) -> Any:
        """`function(theta, phi)` for every draw, mapped over the program, without gradients.

        Args:
            function: of θ and φ (tasks, phi_size) to a tree of tensors.
            theta: global sites with a first axis of draws if `drawn`.
            drawn: whether they have.
            phi: (draws, tasks, phi_size).
            batch: what the program runs on, for a function whose results are smaller than that:
                draws are then taken a part at a time.
        """
        size = None if batch is None else max(1, _CELLS // max(batch.weight.numel(), 1))
        drawn_names = {site.name for site in self.sites.globals} if drawn else set()
        axes = {name: 0 if name in drawn_names else None for name in theta}
        with torch.no_grad():
            mapped = torch.vmap(function, in_dims=(axes, 0), randomness="error", chunk_size=size)
            return mapped(dict(theta), phi)
