"""Linear regressions whose coefficients come from one Gaussian: the conjugate model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from hbmeta.errors import DataError, ProgramError
from hbmeta.files import JSON
from hbmeta.models.columns import linear_predictor, position
from hbmeta.models.hierarchical import HierarchicalModel
from hbmeta.tasks import Tasks

__all__ = ["LinearRegression"]


class LinearRegression(HierarchicalModel):
    """φ_i ~ N(mean, covariance), y_ij ~ N(x_ijᵀ φ_i, noise²), conjugate given θ.

    The columns of x are the design as they stand: for an intercept, x has a column of ones. What is
    given is fixed. What is None is a global site with a weakly informative prior that knows nothing
    of the scale of the data; `VaryingEffects` has priors that do:

        mean (p,)    N(0, prior_mean_scale²) each
        scale (p,)   HalfNormal(prior_scale) each, covariance = diag(scale²)
        noise ()     HalfNormal(prior_noise)

    A learned covariance is diagonal. The local site is "coefficients" (p,), drawn centred, which
    suits exact and second-order strategies; p is the number of columns, known from the given
    arguments or from `bind`.

    Args:
        mean: (p,) mean of the coefficients.
        covariance: (p, p) their covariance, positive definite, or (p,) their variances.
        noise: standard deviation of y given φ, in the units of y.
        features: names of the columns of x to use, in the order of the coefficients; by default all
            of them.
        prior_mean_scale: standard deviation of the prior of `mean`, units of the coefficients.
        prior_scale: scale of the prior of `scale`, units of the coefficients.
        prior_noise: scale of the prior of `noise`, units of y.
    Raises:
        DataError: a covariance that is not symmetric and positive definite, a noise or scale that
            is not positive, shapes that do not fit, repeated feature names.
    Example:
        >>> model = LinearRegression([0.0, 1.0], [[1.0, 0.5], [0.5, 2.0]], noise=0.3)
        >>> model(torch.ones(3, 4, 2)).shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        mean: Sequence[float] | Tensor | None = None,
        covariance: Sequence[Sequence[float]] | Sequence[float] | Tensor | None = None,
        noise: float | None = None,
        *,
        features: Sequence[str] | None = None,
        prior_mean_scale: float = 10.0,
        prior_scale: float = 5.0,
        prior_noise: float = 5.0,
    ) -> None:
        super().__init__()
        self.features = None if features is None else _names(features)
        self.prior_mean_scale = _positive(prior_mean_scale, "prior_mean_scale")
        self.prior_scale = _positive(prior_scale, "prior_scale")
        self.prior_noise = _positive(prior_noise, "prior_noise")
        self.given_mean = None if mean is None else _vector(mean, "mean").tolist()
        self.given_covariance: list[Any] | None = None
        if covariance is not None:
            matrix = torch.as_tensor(covariance, dtype=torch.float64).detach().cpu()
            _root(matrix)  # checks it
            self.given_covariance = matrix.tolist()
        self.given_noise = None if noise is None else _positive(noise, "noise")
        sizes = {
            "mean": None if self.given_mean is None else len(self.given_mean),
            "covariance": None if self.given_covariance is None else len(self.given_covariance),
            "features": None if self.features is None else len(self.features),
        }
        known = {name: size for name, size in sizes.items() if size is not None}
        if len(set(known.values())) > 1:
            raise DataError(
                "LinearRegression",
                needed="one number of coefficients p in all arguments",
                found=", ".join(f"{name} of {size}" for name, size in known.items()),
                do="Give one mean and one variance (or row) per feature.",
            )
        self.columns: tuple[int, ...] | None = None
        self.bound_features: tuple[str, ...] | None = None
        if known and self.features is None:
            self.columns = tuple(range(next(iter(known.values()))))
        self._set_buffers()

    def _set_buffers(self) -> None:
        # float64 until Module.to moves them, with the model, to the dtype and device of the data.
        covariance = self.given_covariance
        root = None if covariance is None else _root(torch.tensor(covariance, dtype=torch.float64))
        numbers = {
            "fixed_mean": self.given_mean,
            "fixed_root": root,  # (p,) standard deviations or (p, p) lower Cholesky factor
            "fixed_noise": self.given_noise,
            "prior_scales": [self.prior_mean_scale, self.prior_scale, self.prior_noise],
        }
        for name, value in numbers.items():
            tensor = None if value is None else torch.as_tensor(value, dtype=torch.float64)
            self.register_buffer(name, tensor, persistent=False)

    def level_one(self) -> dict[str, Tensor]:
        """θ: "mean" (p,), "root" (p,) standard deviations or (p, p) Cholesky factor, "noise" ()."""
        if self.columns is None:
            raise ProgramError(
                "LinearRegression",
                needed="the number of coefficients, or the positions of the named columns",
                found=f"features={self.features!r} in a model that is not bound to data",
                do="Call model.bind(tasks) first; fit does so.",
            )
        p = len(self.columns)
        mean_scale, scale, noise_scale = self.prior_scales.unbind()
        theta = {"mean": self.fixed_mean, "root": self.fixed_root, "noise": self.fixed_noise}
        if theta["mean"] is None:
            theta["mean"] = pyro.sample(
                "mean",
                dist.Normal(torch.zeros_like(mean_scale), mean_scale).expand([p]).to_event(1),
            )
        if theta["root"] is None:
            theta["root"] = pyro.sample("scale", dist.HalfNormal(scale).expand([p]).to_event(1))
        if theta["noise"] is None:
            theta["noise"] = pyro.sample("noise", dist.HalfNormal(noise_scale))
        return theta

    def task_prior(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """φ: "coefficients" (p,)."""
        mean, root = theta["mean"], theta["root"]
        prior: TorchDistribution
        # θ has no batch dimension in a program (vmap hides it), so dimensions tell the two apart.
        if root.dim() == 1:
            prior = dist.Normal(mean, root).to_event(1)
        else:
            prior = dist.MultivariateNormal(mean, scale_tril=root)
        return {"coefficients": pyro.sample("coefficients", prior)}

    def likelihood(
        self, theta: Mapping[str, Tensor], phi: Mapping[str, Tensor], x: Tensor
    ) -> TorchDistribution:
        """N(xᵀφ, noise²)."""
        assert self.columns is not None  # level_one ran before
        whole = self.features is None and self.bound_features is None
        if whole and x.shape[-1] != len(self.columns):
            raise ProgramError(
                "LinearRegression",
                needed=f"x with {len(self.columns)} columns, one per coefficient",
                found=f"x {tuple(x.shape)}",
                do="Pass features=[...] to use some of the columns.",
            )
        location = linear_predictor(x, self.columns, phi["coefficients"], where="LinearRegression")
        return dist.Normal(location, theta["noise"])

    def bind(self, tasks: Tasks) -> Self:
        """A copy that knows the positions of its columns in x."""
        model = self.restore({"features": list(tasks.features)})
        return model.to(dtype=tasks.dtype, device=tasks.device)

    def bound(self) -> dict[str, JSON] | None:
        """The names of the columns of x, None if not bound."""
        return None if self.bound_features is None else {"features": list(self.bound_features)}

    def restore(self, bound: Mapping[str, Any]) -> Self:
        """A copy bound to columns of x by name."""
        where = "LinearRegression.bind"
        available = tuple(bound["features"])
        names = available if self.features is None else self.features
        if self.given_mean is not None or self.given_covariance is not None:
            p = len(self.given_mean or self.given_covariance or ())
            if len(names) != p:
                raise DataError(
                    where,
                    needed=f"{p} columns of x, as mean and covariance have coefficients",
                    found=f"{len(names)}: {', '.join(map(repr, names))}",
                    do="Name the columns to use in features, or give another mean and covariance.",
                )
        if not names:
            raise DataError(
                where, needed="at least one column of x", found="none", do="Add one of ones."
            )
        model = copy.deepcopy(self)
        model._set_buffers()
        model.columns = tuple(position(name, available, where=where) for name in names)
        model.bound_features = available
        return model

    def coordinates(self) -> dict[str, list[str]]:
        """The columns that the coefficients belong to, once they are known."""
        names = self.bound_features if self.features is None else self.features
        return (
            {}
            if names is None
            else {site: list(names) for site in ("mean", "scale", "coefficients")}
        )

    def settings(self) -> dict[str, JSON]:
        """The arguments of the constructor."""
        return {
            "mean": self.given_mean,
            "covariance": self.given_covariance,
            "noise": self.given_noise,
            "features": None if self.features is None else list(self.features),
            "prior_mean_scale": self.prior_mean_scale,
            "prior_scale": self.prior_scale,
            "prior_noise": self.prior_noise,
        }


def _names(features: Sequence[str]) -> tuple[str, ...]:
    names = tuple(features)
    if isinstance(features, str) or not names or len(set(names)) < len(names):
        raise DataError(
            "LinearRegression",
            needed="features as a list of different column names, at least one",
            found=f"{features!r}",
            do='Pass for example features=["intercept", "dose"].',
        )
    return names


def _positive(value: float, name: str) -> float:
    number = float(value)
    if not 0 < number < float("inf"):
        raise DataError(
            "LinearRegression",
            needed=f"{name} as a positive number (a standard deviation)",
            found=f"{value!r}",
            do=f"Pass for example {name}=0.5"
            + (", or None to learn it." if name == "noise" else "."),
        )
    return number


def _vector(value: Sequence[float] | Tensor, name: str) -> Tensor:
    vector = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    if vector.dim() != 1 or not len(vector) or not bool(torch.isfinite(vector).all()):
        raise DataError(
            "LinearRegression",
            needed=f"{name} as a vector (p,) of finite numbers",
            found=f"{value!r}",
            do="Give one number per coefficient.",
        )
    return vector


def _root(covariance: Tensor) -> Tensor:
    """(p,) standard deviations of (p,) variances, (p, p) lower Cholesky factor of a matrix."""
    where = "LinearRegression"
    needed = "covariance as (p, p) symmetric and positive definite, or (p,) positive variances"
    square = covariance.dim() == 2 and covariance.shape[0] == covariance.shape[1]
    if not (square or covariance.dim() == 1) or not covariance.numel():
        raise DataError(
            where, needed=needed, found=f"shape {tuple(covariance.shape)}", do="Check its shape."
        )
    if not bool(torch.isfinite(covariance).all()):
        raise DataError(
            where, needed=needed, found=f"{covariance.tolist()}", do="Replace NaN and infinity."
        )
    if covariance.dim() == 1:
        if not bool((covariance > 0).all()):
            raise DataError(
                where,
                needed=needed,
                found=f"the variance {float(covariance.min())!r}",
                do="Give squared standard deviations, all above 0.",
            )
        return covariance.sqrt()
    if not torch.allclose(covariance, covariance.T, rtol=1e-12, atol=0.0):
        raise DataError(
            where,
            needed=needed,
            found=f"the asymmetric matrix {covariance.tolist()}",
            do="Build it as A Aᵀ, or average it with its transpose.",
        )
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(covariance)
    if int(failed):
        raise DataError(
            where,
            needed=needed,
            found=f"smallest eigenvalue {float(torch.linalg.eigvalsh(covariance)[0]):.3g}",
            do="Build it as A Aᵀ; where it is singular, add a small number to its diagonal.",
        )
    return root
