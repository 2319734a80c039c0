"""Which parameters of a network can be compressed, and how each becomes a matrix (rows = outputs, cols = inputs).

This is the only file that knows about module classes' parameter shapes. A unit is a parameter of a module, found by
walking the modules; the graph of the network is never traced, so detectors, recurrent nets, reused modules and tied
weights need nothing special.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from featherweight.errors import UsageError

Kind: TypeAlias = Literal["linear", "conv", "conv_transpose", "embedding", "recurrent", "attention"]


@final
@dataclass(frozen=True, slots=True)
class View:
    """How a tensor of `shape` is seen as a matrix. Transposed convolutions store (inputs, outputs / groups, taps...);
    all other layers store outputs first."""

    shape: tuple[int, ...]
    transposed_groups: int = 0  # 0: outputs first; otherwise the groups of a transposed convolution

    @property
    def matrix_shape(self) -> tuple[int, int]:
        if not self.transposed_groups:
            return self.shape[0], prod(self.shape[1:])
        inputs, outputs, *taps = self.shape
        return outputs * self.transposed_groups, inputs // self.transposed_groups * prod(taps)

    def matrix(self, tensor: Tensor) -> Tensor:
        """(rows, cols) of a tensor of this shape; a copy only where the memory order demands it."""
        if not self.transposed_groups:
            return tensor.reshape(self.matrix_shape)
        inputs, outputs = self.shape[:2]
        grouped = tensor.reshape(self.transposed_groups, inputs // self.transposed_groups, outputs, -1)
        return grouped.transpose(1, 2).reshape(self.matrix_shape)

    def tensor(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        if not self.transposed_groups:
            return matrix.reshape(self.shape)
        inputs, outputs = self.shape[:2]
        grouped = matrix.reshape(self.transposed_groups, outputs, inputs // self.transposed_groups, -1)
        return grouped.transpose(1, 2).reshape(self.shape)


@final
@dataclass(frozen=True, slots=True)
class Unit:
    """A parameter that can be compressed. names: every name under which the network holds it, the first is used in
    tables. groups: row blocks of equal size, each with its own inputs (grouped convolutions, attention q/k/v)."""

    names: tuple[str, ...]
    kind: Kind
    view: View
    groups: int = 1

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def params(self) -> int:
        return prod(self.view.shape)

    @property
    def taps(self) -> int:
        """Columns that belong to one input channel, side by side: the positions of a convolution's kernel."""
        return prod(self.view.shape[2:]) if self.kind in ("conv", "conv_transpose") else 1


@final
@dataclass(frozen=True, slots=True)
class LeftAlone:
    """A tensor that is stored as it is, and why."""

    name: str
    params: int
    reason: str


@final
@dataclass(frozen=True, slots=True)
class Scan:
    """What `scan` found: units to compress and tensors left alone, both in the network's own order."""

    units: tuple[Unit, ...]
    left_alone: tuple[LeftAlone, ...]


def scan(model: nn.Module, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> Scan:
    """Find every parameter that can be compressed.

    Args:
        include: shell patterns over parameter names (`layer3.*`); when given, only matching units are kept.
        exclude: shell patterns; matching units are left alone.

    Raises:
        UsageError: a pattern matches no unit, or the network has nothing to compress or is a compiled script.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise UsageError("a scripted or traced network hides its layers: give the nn.Module that it was made from")
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    found: dict[int, Unit] = {}
    torn: set[int] = set()
    for _, module in model.named_modules():
        for parameter, kind, groups in _weights_of(module):
            if id(parameter) in names_of and _refusal(parameter) is None:
                transposed = groups if kind == "conv_transpose" else 0
                unit = Unit(tuple(names_of[id(parameter)]), kind, View(tuple(parameter.shape), transposed), groups)
                known = found.setdefault(id(parameter), unit)
                if known.kind == "embedding" and kind == "linear":  # tied: the projection's inputs decide the metric
                    found[id(parameter)] = unit
                elif (known.view, known.groups) != (unit.view, unit.groups):
                    torn.add(id(parameter))
    for key in torn:
        del found[key]
    units = [found[key] for key in names_of if key in found]
    if not units:
        raise UsageError(f"{type(model).__name__} has no weight that featherweight can compress")
    for pattern in include + exclude:
        matching(pattern, units)
    chosen = [u for u in units if (not include or _any_match(u, include)) and not _any_match(u, exclude)]
    left = [
        LeftAlone(names[0], parameter.numel() if _refusal(parameter) != _LAZY else 0, reason)
        for names, parameter, reason in _others(model, names_of, found, chosen)
    ]
    return Scan(tuple(chosen), tuple(left))


def matching(pattern: str, units: list[Unit] | tuple[Unit, ...]) -> list[Unit]:
    """The units that a shell pattern names.

    Raises:
        UsageError: there are none.
    """
    hits = [u for u in units if _any_match(u, (pattern,))]
    if not hits:
        some = ", ".join(u.name for u in units[:3])
        raise UsageError(f"pattern '{pattern}' matches none of the {len(units)} compressible weights ({some}, ...)")
    return hits


def _any_match(unit: Unit, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for name in unit.names for pattern in patterns)


_RECURRENT = re.compile(r"weight_(ih|hh|hr)(_l\d+(_reverse)?)?")  # not what weight_norm or prune put beside it
_REPLACED = re.compile(r"(.*\.)?\w*weight\w*_(g|v|orig)")


def _weights_of(module: nn.Module) -> Iterator[tuple[nn.Parameter, Kind, int]]:
    """(parameter, kind, groups) for each weight of this module alone. A weight made by a parametrization is no
    parameter of the module and does not appear."""
    own = module._parameters
    weight = own.get("weight")
    match module:
        case nn.modules.conv._ConvTransposeNd() if weight is not None:
            yield weight, "conv_transpose", module.groups
        case nn.modules.conv._ConvNd() if weight is not None:
            yield weight, "conv", module.groups
        case nn.Linear() if weight is not None:
            yield weight, "linear", 1
        case nn.Embedding() | nn.EmbeddingBag() if weight is not None:
            yield weight, "embedding", 1
        case nn.RNNBase() | nn.RNNCellBase():
            for name, parameter in own.items():
                if parameter is not None and _RECURRENT.fullmatch(name):
                    yield parameter, "recurrent", 1
        case nn.MultiheadAttention():
            for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                if (parameter := own.get(name)) is not None:
                    yield parameter, "attention", 3 if name == "in_proj_weight" else 1


EXCLUDED = "excluded by the recipe"
VECTOR = "a vector: bias, norm or scale"
_LAZY = "not initialised yet: run the network once on an example before compressing"


def _refusal(parameter: Tensor) -> str | None:
    """Why a weight of a known layer cannot be compressed, or None."""
    if isinstance(parameter, UninitializedParameter):
        return _LAZY
    if not parameter.is_floating_point():
        return f"its type {parameter.dtype} is not a real floating-point type"
    if parameter.numel() == 0:
        return "it is empty"
    if not torch.isfinite(parameter).all():
        return "it contains NaN or infinite values"
    return None


def _others(
    model: nn.Module, names_of: dict[int, list[str]], found: dict[int, Unit], chosen: list[Unit]
) -> Iterator[tuple[list[str], Tensor, str]]:
    """Every parameter that is no chosen unit, with the reason."""
    by_id = {id(p): p for p in model.parameters()}
    kept = {u.names for u in chosen}
    owner = {id(p): m for m in model.modules() for p in m._parameters.values() if p is not None}
    known = {id(p) for m in model.modules() for p, _, _ in _weights_of(m)}
    for key, names in names_of.items():
        parameter = by_id[key]
        if key in found:
            if found[key].names not in kept:
                yield names, parameter, EXCLUDED
        elif key in known or isinstance(parameter, UninitializedParameter):
            yield names, parameter, _refusal(parameter) or "shared by layers that use it in different ways"
        elif ".parametrizations." in f".{names[0]}" or _REPLACED.fullmatch(names[0]):
            yield names, parameter, "parametrized weight: make it plain first (remove_parametrizations)"
        elif parameter.ndim < 2:
            yield names, parameter, VECTOR
        else:
            yield names, parameter, f"no known layer kind: parameter of {type(owner[key]).__name__}"
