"""Generalised linear models whose coefficients vary between tasks (mixed-effects models)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from hbmeta.errors import DataError, ProgramError
from hbmeta.files import JSON
from hbmeta.models.columns import INTERCEPT, expanded, linear_predictor, position, positions
from hbmeta.models.effect_priors import FAMILIES, Family, Priors, Scales, scales_of
from hbmeta.models.hierarchical import HierarchicalModel
from hbmeta.models.responses import check_response
from hbmeta.tasks import Tasks

__all__ = ["Priors", "VaryingEffects"]

_WHERE = "VaryingEffects"


class VaryingEffects(HierarchicalModel):
    """Regression with fixed coefficients β and coefficients φ_i that vary between tasks.

        coefficients_i = mean + scale ∘ z_i,   z_i ~ N(0, I)                 (k,)
        η_ij = Σ_v coefficients_iv x_ijv + Σ_f β_f x_ijf (+ offset_ij)

    drawn non-centred: the local site is "z" (k,), and "coefficients" (k,) is deterministic. Global
    sites: "mean" (k,), "scale" (k,), "fixed" (f,) if there are any, "noise" () for "gaussian" and
    "student_t", "degrees_of_freedom" () for "student_t" unless given. Effects are independent
    between columns a priori (no correlations).

    | family | y given η | link |
    |---|---|---|
    | gaussian | N(η, noise²) | identity |
    | student_t | StudentT(degrees_of_freedom, η, noise), noise being the scale | identity |
    | bernoulli | Bernoulli(1 / (1 + e^−η)), y 0 or 1 | logit |
    | poisson | Poisson(e^η), offset: a column added to η, the log of the exposure | log |
    | binomial | Binomial(totals, 1 / (1 + e^−η)), totals: the column of the trials | logit |

    The priors stand in `Priors`. The model learns the columns and the scale of the data by
    `bind`; a model that is bound already keeps its priors when it is bound again and looks only
    its columns up anew, so that fits on parts of the data share one prior.

    Args:
        fixed: columns of x whose coefficients all tasks share, and perhaps "intercept". Where it is
            left out, columns of x that have no part are warned of.
        varying: columns whose coefficients vary between tasks. "intercept" is the constant and
            needs no column. Their means are the population's coefficients, so that no column stands
            in both lists. In both lists a categorical column of a data frame ("arm") stands for all
            the columns that it was coded as ("arm[b]", "arm[c]").
        family: one of the table.
        offset: name of a column of log exposure, for "poisson".
        totals: name of the column of numbers of trials, for "binomial".
        degrees_of_freedom: fixes those of "student_t", whose prior otherwise is Gamma(2, 0.1).
        priors: numbers in place of the priors scaled from the data.
    Raises:
        DataError: an unknown family, columns that are repeated or in both lists, an argument that
            the family does not have.
    References:
        Gelman and Hill (2007), chapters 12-15. Betancourt and Girolami (2015), Hamiltonian Monte
        Carlo for hierarchical models (non-centred).
    Example:
        >>> from hbmeta.tasks import Tasks
        >>> tasks = Tasks([[[0.0], [1.0]]], [[1.0, 2.0]], features=["floor"])
        >>> model = VaryingEffects(fixed=["floor"]).bind(tasks)
        >>> model(tasks.x).shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        fixed: Sequence[str] | None = None,
        varying: Sequence[str] = (INTERCEPT,),
        family: Family = "gaussian",
        *,
        offset: str | None = None,
        totals: str | None = None,
        degrees_of_freedom: float | None = None,
        priors: Priors | Mapping[str, float | None] | None = None,
    ) -> None:
        super().__init__()
        # Who left it out may have forgotten columns; who wrote fixed=[] has decided.
        self._chosen = fixed is not None
        self.fixed, self.varying = _names(fixed or (), "fixed"), _names(varying, "varying")
        _check_lists(self.fixed, self.varying)
        self.family, self.offset, self.totals = family, offset, totals
        self.degrees_of_freedom = None if degrees_of_freedom is None else float(degrees_of_freedom)
        self.priors = priors if isinstance(priors, Priors) else Priors(**(priors or {}))
        self._check_family()
        self.bound_features: tuple[str, ...] | None = None
        self.bound_scales: Scales | None = None

    def _check_family(self) -> None:
        if self.family not in FAMILIES:
            raise DataError(
                _WHERE,
                needed=f"a family among {', '.join(FAMILIES)}",
                found=f"{self.family!r}",
                do="Write another response as a HierarchicalModel, or as a Pyro program.",
            )
        owners = {"offset": "poisson", "totals": "binomial", "degrees_of_freedom": "student_t"}
        for name, owner in owners.items():
            if getattr(self, name) is not None and self.family != owner:
                raise DataError(
                    _WHERE,
                    needed=f"{name} with family {owner!r} only",
                    found=f"{name}={getattr(self, name)!r} with family {self.family!r}",
                    do=f"Leave {name} out, or choose that family.",
                )
        if self.family == "binomial" and self.totals is None:
            raise DataError(
                _WHERE,
                needed="the column of the numbers of trials, for family 'binomial'",
                found="totals=None",
                do='Pass totals="name of the column", or family="bernoulli" for single trials.',
            )
        if self.degrees_of_freedom is not None and not 0 < self.degrees_of_freedom < float("inf"):
            raise DataError(
                _WHERE,
                needed="positive degrees_of_freedom",
                found=f"{self.degrees_of_freedom!r}",
                do="Pass for example 4.0, or None to learn them.",
            )

    # -- the three levels ---------------------------------------------------------------------

    def level_one(self) -> dict[str, Tensor]:
        """θ: "mean" (k,), "scale" (k,), "fixed" (f,), "noise" (), "degrees_of_freedom" ()."""
        if self.bound_scales is None:
            raise ProgramError(
                _WHERE,
                needed="a model bound to the columns and the scale of the data",
                found="a model that is not bound",
                do="Call model.bind(tasks) first; fit does so.",
            )
        theta = {
            "mean": pyro.sample(
                "mean", dist.Normal(self.mean_location, self.mean_scale).to_event(1)
            ),
            "scale": pyro.sample("scale", dist.HalfNormal(self.effect_scale).to_event(1)),
        }
        if self.fixed:
            prior = dist.Normal(self.fixed_location, self.fixed_scale).to_event(1)
            theta["fixed"] = pyro.sample("fixed", prior)
        if self.family in ("gaussian", "student_t"):
            theta["noise"] = pyro.sample("noise", dist.HalfNormal(self.noise_scale))
        if self.family == "student_t":
            if self.degrees_of_freedom is None:
                shape, rate = self.gamma.unbind()
                freedom = pyro.sample("degrees_of_freedom", dist.Gamma(shape, rate))
            else:
                freedom = self.given_degrees_of_freedom
            theta["degrees_of_freedom"] = freedom
        return theta

    def task_prior(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """φ: "coefficients" (k,), from z (k,)."""
        zero = torch.zeros_like(self.effect_scale)
        z = pyro.sample("z", dist.Normal(zero, torch.ones_like(zero)).to_event(1))
        coefficients = theta["mean"] + theta["scale"] * z
        return {"coefficients": pyro.deterministic("coefficients", coefficients, event_dim=1)}

    def likelihood(
        self, theta: Mapping[str, Tensor], phi: Mapping[str, Tensor], x: Tensor
    ) -> TorchDistribution:
        """The family's distribution at the linear predictor."""
        features = self.bound_features
        assert features is not None  # level_one ran before
        if x.shape[-1] != len(features):
            raise ProgramError(
                _WHERE,
                needed=f"x with the {len(features)} columns that the model was bound to: "
                + ", ".join(map(repr, features)),
                found=f"x {tuple(x.shape)}",
                do="Give x these columns in this order.",
            )
        columns = positions(self.varying, features, where=_WHERE)
        eta = linear_predictor(x, columns, phi["coefficients"], where=_WHERE)
        if self.fixed:
            columns = positions(self.fixed, features, where=_WHERE)
            eta = eta + linear_predictor(x, columns, theta["fixed"], where=_WHERE)
        if self.offset is not None:
            eta = eta + x[..., position(self.offset, features, where=_WHERE)]
        response: TorchDistribution
        if self.family == "gaussian":
            response = dist.Normal(eta, theta["noise"])
        elif self.family == "student_t":
            response = dist.StudentT(theta["degrees_of_freedom"], eta, theta["noise"])
        elif self.family == "bernoulli":
            response = dist.Bernoulli(logits=eta)
        elif self.family == "poisson":
            response = dist.Poisson(eta.exp())
        else:
            assert self.totals is not None
            trials = x[..., position(self.totals, features, where=_WHERE)]
            response = dist.Binomial(trials, logits=eta)
        return response

    # -- binding and saving -------------------------------------------------------------------

    def bind(self, tasks: Tasks) -> Self:
        """A copy that knows the columns of x and the scale of its priors.

        Args:
            tasks: the data that will be fitted, with y.
        Raises:
            DataError: a column that x lacks, a column without spread whose prior needs one, a y
                that the family cannot have; names the column, or the task and the value.
        """
        features = tasks.features
        fixed, varying = expanded(self.fixed, features), expanded(self.varying, features)
        if (fixed, varying) != (self.fixed, self.varying):
            _check_lists(fixed, varying)
            model = copy.deepcopy(self)
            model.fixed, model.varying = fixed, varying
            return model.bind(tasks)
        for name in (*self.fixed, *self.varying, self.offset, self.totals):
            if name not in (INTERCEPT, None):
                position(name, features, where=f"{_WHERE}.bind")
        if INTERCEPT in features and INTERCEPT in self.fixed + self.varying:
            column = tasks.flat_x[:, features.index(INTERCEPT)]
            if not bool((column == 1).all()):
                raise DataError(
                    f"{_WHERE}.bind",
                    needed="'intercept' as the constant 1",
                    found="a column 'intercept' of x with other values",
                    do="Rename that column.",
                )
        check_response(tasks, self.family, self.totals, where=f"{_WHERE}.bind")
        scales = self.bound_scales
        if scales is None:
            self._warn_of_unused(features)
            scales = scales_of(
                self.priors, tasks, self.family, self.fixed, self.varying, offset=self.offset
            )
        return self._with(features, scales).to(dtype=tasks.dtype, device=tasks.device)

    def _warn_of_unused(self, features: tuple[str, ...]) -> None:
        """Names columns of x that were probably forgotten.

        All unused ones where `fixed` was left out (but not those that have no name of their own);
        otherwise levels of a categorical column of which other levels are used, since their rows
        would count as the reference.
        """
        used = {*self.fixed, *self.varying, self.offset, self.totals, INTERCEPT}
        unused = [f for i, f in enumerate(features) if f not in used and f != f"x{i}"]
        if self._chosen:
            coded = {f.partition("[")[0] for f in used if f is not None and f.endswith("]")}
            unused = [f for f in unused if f.endswith("]") and f.partition("[")[0] in coded]
        if unused:
            warnings.warn(
                f"{_WHERE}: the model does not use the columns {', '.join(map(repr, unused))} of "
                "x. Add them to fixed or varying; fixed=[] says that columns are left out on "
                "purpose.",
                stacklevel=4,
            )

    def bound(self) -> dict[str, JSON] | None:
        """The names of the columns of x and the numbers of all priors, None if not bound."""
        if self.bound_features is None or self.bound_scales is None:
            return None
        return {"features": list(self.bound_features), "scales": asdict(self.bound_scales)}

    def restore(self, bound: Mapping[str, Any]) -> Self:
        """A copy bound as `bound()` says."""
        return self._with(tuple(bound["features"]), Scales(**bound["scales"]))

    def _with(self, features: tuple[str, ...], scales: Scales) -> Self:
        model = copy.deepcopy(self)
        model.bound_features, model.bound_scales = features, scales
        numbers = {
            "mean_location": scales.mean_location,
            "mean_scale": scales.mean_scale,
            "effect_scale": scales.effect_scale,
            "fixed_location": scales.fixed_location,
            "fixed_scale": scales.fixed_scale,
            "noise_scale": scales.noise_scale,
            "gamma": [2.0, 0.1],
            "given_degrees_of_freedom": self.degrees_of_freedom,
        }
        for name, value in numbers.items():
            # float64 until Module.to moves them to the dtype and device of the data.
            tensor = None if value is None else torch.tensor(value, dtype=torch.float64)
            model.register_buffer(name, tensor, persistent=False)
        return model

    def coordinates(self) -> dict[str, list[str]]:
        """The columns that the coefficients belong to."""
        named = {name: list(self.varying) for name in ("mean", "scale", "z", "coefficients")}
        return {**named, "fixed": list(self.fixed)}

    def settings(self) -> dict[str, JSON]:
        """The arguments of the constructor."""
        return {
            "fixed": list(self.fixed),
            "varying": list(self.varying),
            "family": self.family,
            "offset": self.offset,
            "totals": self.totals,
            "degrees_of_freedom": self.degrees_of_freedom,
            "priors": asdict(self.priors),
        }


def _names(names: Sequence[str], argument: str) -> tuple[str, ...]:
    if isinstance(names, str):
        raise DataError(
            _WHERE,
            needed=f"{argument} as a list of column names",
            found=f"{names!r}",
            do=f"Write {argument}=[{names!r}].",
        )
    return tuple(names)


def _check_lists(fixed: tuple[str, ...], varying: tuple[str, ...]) -> None:
    if not varying:
        raise DataError(
            _WHERE,
            needed="at least one coefficient that varies between tasks",
            found="varying=[]",
            do='Pass varying=["intercept"], or use inference.CompletePooling for one model of all.',
        )
    both = [name for name in varying if name in fixed]
    if both:
        raise DataError(
            _WHERE,
            needed="each column in `fixed` or in `varying`",
            found=f"{both[0]!r} in both",
            do=f"Take {both[0]!r} out of fixed: site 'mean' holds the coefficient that all tasks "
            "share (both together are not identified).",
        )
    repeated = [n for names in (fixed, varying) for n in names if names.count(n) > 1]
    if repeated:
        raise DataError(
            _WHERE,
            needed="each column once",
            found=f"{repeated[0]!r} more than once",
            do="Take the repetition out.",
        )
