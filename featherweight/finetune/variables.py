"""What is trained: a variable for every continuous tensor of the weights, and for every parameter beside them.

A tensor object that several weights hold (a shared codebook) is one variable, and one object again afterwards.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn

from featherweight.artifact import StoredUnit
from featherweight.data import device_of
from featherweight.errors import UsageError
from featherweight.layers import Unit
from featherweight.weights import Factors, Weight, coded_of

T = TypeVar("T")

SMALLEST = 0.01  # of a tensor: its root mean square counts as at least this, so that zeros can move
FEW = 4  # entries of a matrix, at most, that share a number of which there are many
MANY = 10.0  # times the learning rate: their pace. At 1 kept weights hardly move; 30 is no better (docs/finetune.md)
# A factor of k moves at MANY / (k - 1), as a product moves with each of them: at MANY, cores of rings lost in an epoch
# more than there was to gain.


@final
@dataclass(frozen=True, slots=True, eq=False)
class Variable:
    """The tensor start + size * step, of which `step` is trained. pace: its learning rate, relative. dtype: what it is
    stored in at the end."""

    name: str
    start: Tensor
    size: float
    step: Tensor
    pace: float
    dtype: torch.dtype

    @classmethod
    def of(cls, name: str, tensor: Tensor, pace: float, device: torch.device) -> "Variable":
        exact = torch.float64 if tensor.dtype == torch.float64 else torch.float32  # what half precision is trained in
        start = tensor.detach().to(device, exact, copy=True)
        step = torch.zeros_like(start).requires_grad_()
        return cls(name, start, _size(start), step, pace, tensor.dtype)

    def now(self) -> Tensor:
        return self.start + self.size * self.step

    @torch.no_grad()
    def result(self) -> Tensor:
        """The trained tensor as it is stored.

        Raises:
            UsageError: it has left the range of its type.
        """
        found = self.now().to(self.dtype)
        if not torch.isfinite(found).all():
            kind = str(self.dtype).removeprefix("torch.")
            raise UsageError(f"{self.name} has left the range of {kind}; lower the learning rate")
        return found


@final
@dataclass(frozen=True, slots=True, eq=False)
class Variables:
    """inner: those in weights, by the identity of the tensor they start from; outer: of parameters, by name. fixed: all
    other tensors of the weights on the network's device, by the identity of the original. A weight is trained by
    putting new tensors for old ones.

    latent: for weights whose codes may change, by unit name, a matrix that starts as the decoded one. Codes are those
    of the words, or points of the grid, nearest to it, and it gets the gradient of the decoded matrix (a
    straight-through estimator: Bengio et al., 1308.3432), so a code changes where the loss pulls its weights far enough
    for long enough.
    """

    units: Sequence[Unit | StoredUnit]
    weights: Mapping[str, Weight]
    inner: dict[int, Variable]
    outer: dict[str, Variable]
    fixed: dict[int, Tensor]
    latent: dict[str, Variable]

    @classmethod
    def of(
        cls, small: nn.Module, units: Sequence[Unit | StoredUnit], weights: Mapping[str, Weight], moves: bool = False
    ) -> "Variables":
        """Of a network with `weights` (by their units' first name) in place."""
        device = device_of(small)
        held: dict[int, Tensor] = {}
        entries: dict[int, int] = {}  # of all matrices, or factors, that a tensor is part of
        beside: dict[int, int] = {}  # how many others it is multiplied with, 1 at least
        first: dict[int, str] = {}
        fixed: dict[int, Tensor] = {}
        for unit in units:
            weight = weights[unit.names[0]]
            parts = weight.parts if isinstance(weight, Factors) else (weight,)
            for part in parts:
                for tensor in continuous(part):
                    held[id(tensor)] = tensor
                    first.setdefault(id(tensor), unit.names[0])
                    beside[id(tensor)] = max(beside.get(id(tensor), 1), len(parts) - 1)
                    entries[id(tensor)] = entries.get(id(tensor), 0) + part.shape[0] * part.shape[1]
            mapped(weight, lambda t: fixed.setdefault(id(t), t.to(device)))
        inner = {}
        for key, tensor in held.items():
            pace = MANY / beside[key] if entries[key] <= FEW * tensor.numel() else 1.0
            inner[key] = Variable.of(first[key], tensor, pace, device)
            del fixed[key]
        compressed = {n for u in units for n in u.names}
        outer = {
            n: Variable.of(n, p, 1.0, device)
            for n, p in small.named_parameters()
            if n not in compressed and p.is_floating_point() and bool(torch.isfinite(p).all())
        }
        made = {n: w for n, w in weights.items() if moves and coded_of(w) is not None}
        latent = {n: Variable.of(n, w.dense(), 1.0, device) for n, w in made.items()}
        return cls(units, weights, inner, outer, fixed, latent)

    def all(self) -> list[Variable]:
        return [*self.inner.values(), *self.outer.values(), *self.latent.values()]

    def state(self, small: nn.Module) -> dict[str, Tensor]:
        """The network's parameters as they are now, by name, differentiable in the steps."""
        table = self.fixed | {key: v.now() for key, v in self.inner.items()}
        state = {n: v.now().to(v.dtype) for n, v in self.outer.items()}
        for unit in self.units:
            name = unit.names[0]
            matrix = self._moved(name, mapped(self.weights[name], lambda t: table[id(t)])).dense()
            if name in self.latent:
                free = self.latent[name].now()
                matrix = matrix + (free - free.detach())
            state[name] = unit.view.tensor(matrix).to(small.get_parameter(name))
        return state

    @torch.no_grad()
    def _moved(self, name: str, weight: Weight) -> Weight:
        """With the codes nearest to the latent matrix, where there is one."""
        if name not in self.latent:
            return weight
        own = coded_of(weight)
        assert own is not None
        codes = own.nearest(self.latent[name].now())
        return mapped(weight, lambda t: codes if t is own.codes else t)

    @torch.no_grad()
    def finish(self, small: nn.Module) -> dict[str, Weight]:
        """The new weights, put into the network with the other parameters."""
        table = {key: v.result().cpu() for key, v in self.inner.items()}
        found = {name: mapped(w, lambda t: table.get(id(t), t)) for name, w in self.weights.items()}
        for name in self.latent:
            own = coded_of(found[name])
            assert own is not None
            codes = own.nearest(self.latent[name].now().cpu())
            found[name] = mapped(found[name], lambda t, old=own.codes, new=codes: new if t is old else t)
        for name, variable in self.outer.items():
            small.get_parameter(name).copy_(variable.result())
        for unit in self.units:
            name = unit.names[0]
            small.get_parameter(name).copy_(unit.view.tensor(found[name].dense()))
        return found


def continuous(weight: Weight) -> list[Tensor]:
    """The tensors that `weight.trainable` names: of its own fields, or of those of weights that it holds."""
    if isinstance(weight, Factors):
        return [t for part in weight.parts for t in continuous(part)]
    names, found = weight.trainable(), []

    def look(holder: Any) -> None:
        for part in fields(holder):
            value = getattr(holder, part.name)
            if is_dataclass(value):
                look(value)
            elif part.name in names:
                found.extend(t for t in (value if isinstance(value, tuple) else (value,)) if isinstance(t, Tensor))

    look(weight)
    return found


def mapped(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """The same dataclass, with `change` of every tensor in it, also inside of tuples and other dataclasses."""
    new: Any = value
    if isinstance(value, Tensor):
        new = change(value)
    elif isinstance(value, tuple) and any(isinstance(item, Tensor) or is_dataclass(item) for item in value):
        new = tuple(mapped(item, change) for item in value)
    elif is_dataclass(value) and not isinstance(value, type):
        parts = {part.name: getattr(value, part.name) for part in fields(value)}
        changed = {name: mapped(part, change) for name, part in parts.items()}
        if any(changed[name] is not parts[name] for name in parts):
            new = replace(value, **{n: changed[n] for n in parts if changed[n] is not parts[n]})
    return new


def _size(tensor: Tensor) -> float:
    """What a step of 1 moves a value by: the root mean square of what is not 0, which may be what is not kept."""
    count = max(int(torch.count_nonzero(tensor)), 1)
    return max(math.sqrt(float(tensor.double().square().sum()) / count), SMALLEST)
