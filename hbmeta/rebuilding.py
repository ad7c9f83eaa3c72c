"""A distribution taken apart into tensors, and put together again from others of their kind.

`torch.vmap` hands on tensors, not distributions: the response of a program at many draws of (θ, φ)
is taken apart inside it and put together outside. A family is read through its constructor

    Normal(loc, scale)      Weibull(scale, concentration)      Independent(base, n)
    MixtureSameFamily(mixture, component)                      ZeroInflatedPoisson(rate, *, gate)

whose arguments a distribution keeps as attributes: tensors are taken out, numbers stay, and
distributions are taken apart in the same way. Every tensor is expanded to

    batch_shape + (dimensions of its own)

so that a function of the leading dimensions (a new axis of draws, a choice of cells) applied to
all of them gives the tensors of the distribution with that batch shape. Expansion is carried out;
a mask, which says what to learn from and not what to predict, is dropped.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import transforms

from hbmeta.errors import UnsupportedModelError

__all__ = ["Spec", "rebuild", "tensors_of"]

# Arguments that say the same: the one that the distribution was given, or else the first.
_ALTERNATIVES = (("logits", "probs"), ("gate_logits", "gate"))
# A factor is at hand whatever was given, and needs no decomposition.
_DECOMPOSED = {"covariance_matrix", "precision_matrix"}
_ATTRIBUTES = {"base_distribution": "base_dist"}
_ELEMENTWISE = (transforms.AffineTransform, transforms.PowerTransform)
_MISSING = object()


@dataclass(frozen=True)
class Spec:
    """What of a distribution is not tensors.

    Attributes:
        family: the class of the distribution, or of a transform.
        names: arguments that are tensors.
        fixed: arguments that are not, with their values.
        parts: arguments that are distributions, with their specs.
        transforms: specs of the transforms, for a TransformedDistribution.
    """

    family: type[Any]
    names: tuple[str, ...] = ()
    fixed: tuple[tuple[str, Any], ...] = ()
    parts: tuple[tuple[str, Spec], ...] = ()
    transforms: tuple[Spec | transforms.Transform, ...] = ()


def tensors_of(distribution: Any) -> tuple[dict[str, Tensor], Spec]:
    """The tensors of a distribution, each of shape batch_shape + its own, and the rest.

    Works inside `torch.vmap`: return the tensors, and hand the spec out beside them.

    Args:
        distribution: a torch or Pyro distribution; expanded, masked, independent ones too.
    Returns:
        tensors by dotted name ("component_distribution.loc"), and the spec that `rebuild` takes.
    Raises:
        UnsupportedModelError: a family that does not keep the arguments of its constructor, or a
            transform with tensors that are not elementwise.
    """
    return _read(distribution, torch.Size(distribution.batch_shape))


def rebuild(spec: Spec, tensors: dict[str, Tensor]) -> Any:
    """The distribution of `tensors_of`, from its tensors or from others of their kind.

    Args:
        spec: from `tensors_of`.
        tensors: as from `tensors_of`; the leading dimensions of all of them may be others.
    """
    arguments: dict[str, Any] = dict(spec.fixed)
    arguments |= {name: tensors[name] for name in spec.names}
    for name, part in spec.parts:
        arguments[name] = rebuild(part, _below(tensors, name))
    if "transforms" in _arguments(spec.family):
        arguments["transforms"] = [
            rebuild(part, _below(tensors, f"transforms.{i}")) if isinstance(part, Spec) else part
            for i, part in enumerate(spec.transforms)
        ]
    if "validate_args" in _arguments(spec.family):
        arguments["validate_args"] = False
    return spec.family(**arguments)


def _below(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    start = f"{name}."
    return {key[len(start) :]: value for key, value in tensors.items() if key.startswith(start)}


def _read(distribution: Any, batch: torch.Size) -> tuple[dict[str, Tensor], Spec]:
    """`tensors_of` as if the distribution were expanded to the batch shape."""
    if isinstance(distribution, dist.ExpandedDistribution | dist.MaskedDistribution):
        return _read(distribution.base_dist, batch)
    family, own = type(distribution), len(distribution.batch_shape)
    tensors: dict[str, Tensor] = {}
    names, fixed, parts, maps = [], [], [], []
    for name, value in _values(distribution, family).items():
        if isinstance(value, Tensor):
            tail = _own_dimensions(distribution, name, value)
            tensors[name] = value.expand(batch + value.shape[value.dim() - tail :])
            names.append(name)
        elif isinstance(value, torch.distributions.Distribution):
            # Behind its owner's batch stand dimensions that the owner made its own: those of an
            # event, or the components of a mixture. A mixture's weights may have fewer.
            found, part = _read(value, batch + value.batch_shape[own:])
            tensors |= {f"{name}.{key}": tensor for key, tensor in found.items()}
            parts.append((name, part))
        elif name == "transforms":
            for i, transform in enumerate(_flat(value)):
                found, spec = _read_transform(transform, batch + distribution.event_shape, family)
                tensors |= {f"transforms.{i}.{key}": tensor for key, tensor in found.items()}
                maps.append(spec)
        else:
            fixed.append((name, value))
    return tensors, Spec(family, tuple(names), tuple(fixed), tuple(parts), tuple(maps))


def _own_dimensions(distribution: Any, name: str, value: Tensor) -> int:
    """How many trailing dimensions of a parameter are its own and not of the batch."""
    constraint = distribution.arg_constraints.get(name)
    declared = 0 if constraint is None else int(constraint.event_dim)
    # Some families declare too few; then the parameter has the whole batch shape before them.
    return max(declared, value.dim() - len(distribution.batch_shape))


def _arguments(family: type[Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(family.__init__).parameters)


def _values(holder: Any, family: type[Any]) -> dict[str, Any]:
    """The arguments of the constructor that made this distribution or transform."""
    parameters = list(_arguments(family).values())[1:]
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise _refused(family, "a constructor whose arguments have no names")
    wanted = {p.name for p in parameters} - {"validate_args"}
    if "scale_tril" in wanted:
        wanted -= _DECOMPOSED
    for same in _ALTERNATIVES:
        offered = [name for name in same if name in wanted]
        held = [name for name in offered if name in vars(holder)] or offered
        wanted -= set(offered) - set(held[:1])
    found = {}
    for name in sorted(wanted):
        attribute = _ATTRIBUTES.get(name, name)
        value = getattr(holder, attribute, getattr(holder, f"_{attribute}", _MISSING))
        if value is _MISSING:
            raise _refused(family, f"no attribute {attribute!r} for this argument")
        found[name] = value
    return found


def _flat(found: list[Any]) -> list[Any]:
    """Transforms in their order, compositions taken apart."""
    out: list[Any] = []
    for transform in found:
        composed = isinstance(transform, transforms.ComposeTransform)
        out += _flat(transform.parts) if composed else [transform]
    return out


def _read_transform(
    transform: Any, shape: torch.Size, family: type[Any]
) -> tuple[dict[str, Tensor], Spec | transforms.Transform]:
    """A transform's tensors, expanded to the shape of y, and its spec; itself where it has none."""
    if not _holds_tensors(transform):
        return {}, transform
    if not isinstance(transform, _ELEMENTWISE):
        raise _refused(family, f"a {type(transform).__name__} that holds tensors")
    values = _values(transform, type(transform))
    tensors = {n: v.expand(shape) for n, v in values.items() if isinstance(v, Tensor)}
    fixed = tuple((n, v) for n, v in values.items() if n not in tensors)
    return tensors, Spec(type(transform), tuple(tensors), fixed)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_holds_tensors(part) for part in value)
    if isinstance(value, transforms._InverseTransform):
        return _holds_tensors(value.inv)
    if isinstance(value, transforms.Transform):
        # A transform and its inverse hold each other.
        return _holds_tensors([part for name, part in vars(value).items() if name != "_inv"])
    return isinstance(value, Tensor | torch.nn.Module | torch.distributions.Distribution)


def _refused(family: type[Any], found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"predictions of {family.__name__}",
        needed="a response that keeps the arguments of its constructor as attributes",
        found=found,
        do="Write the response with a family of torch or Pyro such as LogNormal, or transform y "
        "in the tasks.",
    )
