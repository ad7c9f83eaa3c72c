"""A Gaussian process per task: φ its kernel's hyperparameters, the function integrated out.

Model: y_i | φ_i ~ N(m, s_i² k_{φ_i}(X_i, X_i) + σ_i² I) over all points of task i.
"""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Mapping
from typing import Any, Self

import gpytorch
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from hbmeta.errors import DataError, ProgramError
from hbmeta.files import JSON
from hbmeta.models.hierarchical import HierarchicalModel
from hbmeta.tasks import Tasks
from hbmeta.tasks.kernels import noise_variance
from hbmeta.triangular import cholesky

__all__ = ["GaussianProcess"]

Hyperparameter = float | tuple[float, float] | str
"""Known, uniform between two numbers, or "learned"."""

_NAMED = {
    "rbf": lambda: gpytorch.kernels.RBFKernel(),
    "matern12": lambda: gpytorch.kernels.MaternKernel(nu=0.5),
    "matern32": lambda: gpytorch.kernels.MaternKernel(nu=1.5),
    "matern52": lambda: gpytorch.kernels.MaternKernel(nu=2.5),
    "periodic": lambda: gpytorch.kernels.PeriodicKernel(),
}
_WHERE = "GaussianProcess"


class GaussianProcess(HierarchicalModel):
    """Gaussian-process regression with hyperparameters of its own in every task.

    A hyperparameter is a number (known), a pair (low, high) (φ, uniform between them in every task)
    or "learned": φ with log φ_i ~ N(location, spread²), location ~ N(0, 1) and spread ~
    HalfNormal(1) at level 1, which suits inputs and outputs of unit scale. With all of them known
    φ is empty, and `ExactGP` alone applies. x is used with all its columns.

    Points of a task depend on each other given φ, so the program is of the joint layout: it takes
    the mask of the points and decouples those outside, K ∘ m mᵀ + diag((1 − m) / 2π).

    Args:
        kernel: "rbf", "matern12", "matern32", "matern52", "periodic", or any kernel of gpytorch or
            sum, product or scaling of such ones, without its priors and bounds. (gpytorch's
            periodic kernel is exp(−2 sin²(π d / p) / ℓ), with ℓ where others write ℓ².)
        lengthscale: ℓ, in units of x.
        scale: s, standard deviation of the function, in units of y.
        noise: σ, standard deviation of y around it, in units of y; its square counts as 1e-8 s² or
            more, so that equal inputs are no singular covariance.
        period: p, in units of x; for the periodic kernel.
        mean: m, in units of y.
        hyperparameters: those of a gpytorch kernel by their names without "raw_" (such as
            "base_kernel.lengthscale"); "learned" where not named.
    Raises:
        DataError: an unknown kernel or name, numbers that are not positive.
    References:
        Rasmussen, Williams (2006), Gaussian Processes for Machine Learning, §2.2.
    Example:
        >>> import torch
        >>> model = GaussianProcess("rbf", lengthscale=(0.2, 1.0), scale=1.0, noise=0.1)
        >>> model(torch.zeros(3, 5, 1)).shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        kernel: str | gpytorch.kernels.Kernel = "rbf",
        *,
        lengthscale: Hyperparameter | None = None,
        scale: Hyperparameter = "learned",
        noise: Hyperparameter = "learned",
        period: Hyperparameter | None = None,
        mean: float = 0.0,
        hyperparameters: Mapping[str, Hyperparameter] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(kernel, str) and kernel not in _NAMED:
            raise DataError(
                _WHERE,
                needed=f"kernel among {', '.join(map(repr, _NAMED))}, or one of gpytorch",
                found=repr(kernel),
                do="Correct the name.",
            )
        number = isinstance(mean, float | int) and not isinstance(mean, bool)
        if not number or not math.isfinite(mean):
            raise DataError(_WHERE, needed="a finite mean", found=repr(mean), do="Pass mean=0.0.")
        self.kernel_name = kernel if isinstance(kernel, str) else None
        self.mean = float(mean)
        self._kernel = _Dense(_NAMED[kernel]() if isinstance(kernel, str) else kernel)
        given = dict(hyperparameters or {})
        named = {"lengthscale": lengthscale, "period_length": period}
        given |= {name: value for name, value in named.items() if value is not None}
        unknown = [name for name in given if name not in self._kernel.shapes]
        if unknown:
            raise DataError(
                _WHERE,
                needed=f"hyperparameters among {', '.join(map(repr, self._kernel.shapes))}",
                found=repr(unknown[0]),
                do=_remedy(unknown[0]),
            )
        self.hyperparameters = {
            name: _read(given.get(name, "learned"), name) for name in self._kernel.shapes
        }
        self.hyperparameters |= {"scale": _read(scale, "scale"), "noise": _read(noise, "noise")}

    def level_one(self) -> dict[str, Tensor]:
        """θ: "<name>_location" and "<name>_spread" of every learned hyperparameter."""
        theta = {}
        for name, value in self.hyperparameters.items():
            if value == "learned":
                for site, prior in (
                    (f"{name}_location", dist.Normal(0.0, 1.0)),
                    (f"{name}_spread", dist.HalfNormal(1.0)),
                ):
                    theta[site] = pyro.sample(site, prior)
        return theta

    def task_prior(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """φ: the hyperparameters that are not known, one number or one vector each."""
        phi = {}
        for name, value in self.hyperparameters.items():
            if isinstance(value, float):
                continue
            if isinstance(value, tuple):
                prior = dist.Uniform(*value)
            else:
                prior = dist.LogNormal(theta[f"{name}_location"], theta[f"{name}_spread"])
            size = math.prod(self._kernel.shapes.get(name, ()))
            phi[name] = pyro.sample(name, prior.expand([size]).to_event(1) if size > 1 else prior)
        return phi

    def likelihood(
        self,
        theta: Mapping[str, Tensor],
        phi: Mapping[str, Tensor],
        x: Tensor,
        mask: Tensor | None = None,
    ) -> TorchDistribution:
        """N(m, s² k + σ² I) of the points of each task, batch shape (tasks,), event (points,)."""
        value = {
            name: phi[name] if name in phi else x.new_full((), known)  # type: ignore[arg-type]
            for name, known in self.hyperparameters.items()
        }
        # In float64 whatever the data are: the Cholesky factor of a smooth kernel is at the limit
        # of float32.
        x, dtype = x.double(), x.dtype
        value = {name: number.double() for name, number in value.items()}
        own = {name: value[name] for name in self._kernel.shapes}
        scale, noise = (value[name].reshape(-1, 1, 1) for name in ("scale", "noise"))
        identity = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
        covariance = scale.square() * self._kernel.matrix(own, x)
        covariance = covariance + noise_variance(noise, scale) * identity
        if mask is not None:
            m = mask.to(x.dtype)
            inside = m.unsqueeze(-1) * m.unsqueeze(-2)
            # A masked point has variance 1/2π and no residual: its log density is 0.
            covariance = covariance * inside + torch.diag_embed((1.0 - m) / (2.0 * math.pi))
        loc = torch.full_like(x[..., 0], self.mean)
        tril = cholesky(covariance).to(dtype)
        return dist.MultivariateNormal(loc.to(dtype), scale_tril=tril)

    def forward(  # type: ignore[override]  # points of a task as one observation
        self, x: Tensor, y: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """Run the generative program; site "y" is observed where y is given.

        Args:
            x: (tasks, points, features).
            y: (tasks, points); None draws it.
            mask: (tasks, points) bool, True where a point counts; None where all do.
        Returns:
            y as given or drawn; the mean where the mask is False.
        """
        theta = self.level_one()
        with pyro.plate("task", x.shape[0], dim=-1):
            phi = self.task_prior(theta)
            response = self.likelihood(theta, phi, x, mask)
            observed = None if y is None else y.to(x.dtype)
            if observed is not None and mask is not None:
                observed = torch.where(mask, observed, torch.full_like(observed, self.mean))
            drawn: Tensor = pyro.sample("y", response, obs=observed)
            return drawn

    def bind(self, tasks: Tasks) -> Self:
        """The model itself; raises where y is not one number per point."""
        if tasks.flat_y is not None and (
            tasks.flat_y.dim() != 1 or not tasks.flat_y.is_floating_point()
        ):
            raise ProgramError(
                _WHERE,
                needed="y with one real number per point",
                found=f"y of shape {tuple(tasks.flat_y.shape)}, {tasks.flat_y.dtype}",
                do="Use VaryingEffects or NeuralClassifier for counts and labels.",
            )
        return self

    def settings(self) -> dict[str, JSON]:
        """The arguments of the constructor; of a kernel object of gpytorch, its description."""
        given = {n: list(v) if isinstance(v, tuple) else v for n, v in self.hyperparameters.items()}
        return {
            "kernel": self.kernel_name or _description(self._kernel.kernel),
            "scale": given.pop("scale"),
            "noise": given.pop("noise"),
            "mean": self.mean,
            "hyperparameters": given,
        }

    def state(self) -> dict[str, JSON]:
        """As for every model; with a kernel object of gpytorch, no file can build it again."""
        state = super().state()
        if self.kernel_name is None:
            state["class"] = f"{type(self).__name__}(kernel={type(self._kernel.kernel).__name__})"
        return state


def _description(kernel: Any) -> str:
    """The kinds and settings of a kernel and of its parts."""
    said = []
    for name, part in kernel.named_modules():
        if isinstance(part, gpytorch.kernels.Kernel):
            settings = {k: getattr(part, k, None) for k in ("nu", "power", "ard_num_dims")}
            columns = None if part.active_dims is None else part.active_dims.tolist()
            shown = {k: v for k, v in (settings | {"columns": columns}).items() if v is not None}
            said.append(f"{name or 'kernel'}: {type(part).__name__} {shown}")
    return "; ".join(said)


class _Dense(nn.Module):
    """A gpytorch kernel as a dense function of x and of its hyperparameters, one set per task."""

    def __init__(self, kernel: Any) -> None:
        super().__init__()
        if not isinstance(kernel, gpytorch.kernels.Kernel):
            raise DataError(
                _WHERE,
                needed="a kernel: a name or a gpytorch.kernels.Kernel",
                found=type(kernel).__name__,
                do="Pass for example kernel='rbf'.",
            )
        kernel = copy.deepcopy(kernel).requires_grad_(False)
        for module in kernel.modules():
            if isinstance(module, gpytorch.kernels.Kernel):
                # gpytorch asks whether two inputs are equal, which cannot be traced.
                module.covar_dist = types.MethodType(_distance, module)
                for name, constraint in list(module._constraints.items()):
                    plain = gpytorch.constraints.Positive(transform=None, inv_transform=None)
                    del constraint
                    module.register_constraint(name.removesuffix("_constraint"), plain)
        # Not a submodule: its parameters are places for φ, not parameters of the model.
        self.__dict__["kernel"] = kernel
        self.raw = {_plain(name): name for name, _ in kernel.named_parameters()}
        self.shapes = {_plain(name): tuple(p.shape) for name, p in kernel.named_parameters()}

    def matrix(self, values: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """k(x, x) (tasks, points, points) with hyperparameters () or (tasks, *event)."""
        raw = {
            self.raw[n]: (v if v.ndim else v.expand(1, *self.shapes[n])).reshape(
                -1, *self.shapes[n]
            )
            for n, v in values.items()
        }
        with gpytorch.settings.trace_mode(True):
            found: Tensor = torch.func.functional_call(_Call(self.kernel), _prefixed(raw), (x,))
        return found


class _Call(nn.Module):
    def __init__(self, kernel: gpytorch.kernels.Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        return _evaluate(self.kernel, x)


def _prefixed(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"kernel.{name}": value for name, value in values.items()}


def _evaluate(kernel: Any, x: Tensor) -> Tensor:
    """The kernel matrix without gpytorch's lazy operators."""
    if kernel.active_dims is not None:
        x = x.index_select(-1, kernel.active_dims.to(x.device))
    if isinstance(kernel, gpytorch.kernels.ScaleKernel):
        scale: Tensor = kernel.outputscale
        return scale.reshape(-1, 1, 1) * _evaluate(kernel.base_kernel, x)
    parts: Any = getattr(kernel, "kernels", ())
    if isinstance(kernel, gpytorch.kernels.AdditiveKernel):
        return torch.stack([_evaluate(k, x) for k in parts]).sum(0)
    if isinstance(kernel, gpytorch.kernels.ProductKernel):
        return torch.stack([_evaluate(k, x) for k in parts]).prod(0)
    # These two ask for equal inputs, or for one set of hyperparameters.
    if isinstance(kernel, gpytorch.kernels.LinearKernel):
        linear: Tensor = (x * kernel.variance) @ x.mT
        return linear
    if isinstance(kernel, gpytorch.kernels.PolynomialKernel):
        power: Tensor = (x @ x.mT + kernel.offset.reshape(-1, 1, 1)).pow(kernel.power)
        return power
    value = kernel.forward(x, x)
    dense: Tensor = value if isinstance(value, Tensor) else value.to_dense()
    return dense


def _distance(
    self: Any,
    x1: Tensor,
    x2: Tensor,
    diag: bool = False,
    last_dim_is_batch: bool = False,
    square_dist: bool = False,
    **_: Any,
) -> Tensor:
    """Distances with zero gradient where two points are equal."""
    if last_dim_is_batch:
        x1, x2 = x1.mT.unsqueeze(-1), x2.mT.unsqueeze(-1)
    squared = (x1.unsqueeze(-2) - x2.unsqueeze(-3)).square().sum(-1)
    if square_dist:
        return squared
    apart = squared > 0
    return torch.where(apart, torch.where(apart, squared, torch.ones_like(squared)).sqrt(), 0.0)


def _plain(name: str) -> str:
    *path, last = name.split(".")
    return ".".join([*path, last.removeprefix("raw_")])


def _remedy(name: str) -> str:
    """What to do about a name that the kernel does not have."""
    if name in ("scale", "noise", "mean"):
        return f"Pass it as an argument of its own: GaussianProcess(..., {name}=1.0)."
    if name in ("period", "period_length"):
        return "A period is for the periodic kernel: GaussianProcess('periodic', period=1.0)."
    return "Use the kernel's own names; scale= and noise= are arguments of their own."


def _read(value: Any, name: str) -> float | tuple[float, float] | str:
    """A hyperparameter as it is kept, checked."""
    if value == "learned":
        return "learned"
    pair = value if isinstance(value, tuple | list) else (value,)
    try:
        numbers = tuple(math.nan if isinstance(v, bool | str) else float(v) for v in pair)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        numbers = ()
    good = len(numbers) in (1, 2) and all(0 < v < math.inf for v in numbers)
    if not good or (len(numbers) == 2 and not numbers[0] < numbers[1]):
        raise DataError(
            _WHERE,
            needed=f"{name} as a positive number, a range (low, high) of such, or 'learned'",
            found=repr(value),
            do=f"Pass for example {name}=0.5 or {name}=(0.2, 1.0).",
        )
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])
