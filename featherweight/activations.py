"""Rounding a layer's inputs to 2 to 8 bits: one static grid a weight, found on calibration data, simulated in float.

The grid is the affine one of Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference",
1806.08342, section 2.1: zero lies on it, so padding stays exact. It is chosen like that of a weight: of many ranges the
one with the smallest mean squared rounding error on calibration data.

What is rounded is the first argument of a linear, convolution or transposed convolution function whose weight is a
unit, wherever it is called (docs/decisions/0001). Biases, outputs, norms, sums, products of attention, and all that
embeddings, recurrent and attention layers compute inside stay in float.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from featherweight.calls import eager
from featherweight.data import Batch, device_of
from featherweight.errors import UsageError, require
from featherweight.layers import Unit

SAMPLE = 1 << 17  # values kept for each unit, 0.5 MB of float32: the range is searched on these
SEED = 0  # of the choice of these values
STEPS = 40  # positions tried for each end of the range: 1, 39/40 ... 1/40 of what occurs
FINER = 10  # then the best one's surroundings, in steps this much finer


@final
@dataclass(frozen=True, slots=True)
class ActivationGrid:
    """The points scale * (code - zero), code from 0 to 2^bits - 1: a tensor has one grid, and 0 lies on it.

    bits: 2 to 8. scale: positive, a float32. zero: a code; 0 where no input is negative.

    >>> ActivationGrid(2, 0.5, 1).simulate(torch.tensor([-9.0, 0.2, 0.3, 9.0])).tolist()
    [-0.5, 0.0, 0.5, 1.0]
    """

    bits: int
    scale: float
    zero: int

    def __post_init__(self) -> None:
        require(type(self.bits) is int and 2 <= self.bits <= 8, "activation bits must be 2 to 8", self.bits)
        require(is_scale(self.scale), "the scale of an activation must be a positive float32", self.scale)
        require(type(self.zero) is int and 0 <= self.zero < 2**self.bits, "zero must be one of the codes", self.zero)

    def simulate(self, x: Tensor) -> Tensor:
        """The nearest points, in the type of x: code = round(x / scale) + zero, halves to even, kept between the first
        and the last code. Computed in float32, or float64 where x is. NaN stays NaN. Gradients are zero."""
        codes = (x if x.dtype == torch.float64 else x.float()) / self.scale
        codes = codes.round_().add_(self.zero).clamp_(0, 2**self.bits - 1)
        return codes.sub_(self.zero).mul_(self.scale).to(x.dtype)


def is_scale(value: Any) -> bool:
    """Whether a number can be a scale: a positive finite float that float32 holds exactly."""
    return (
        isinstance(value, float)
        and isfinite(value)
        and value > 0
        and torch.tensor(value, dtype=torch.float32).item() == value
    )


@final
@dataclass(frozen=True, slots=True)
class FloatInput:
    """A compressed weight whose input is not rounded, and why."""

    name: str
    reason: str


# ---------------------------------------------------------------- in a network
_FUNCTIONS = {
    *(F.linear, F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}


@final
class _Inputs(TorchFunctionMode):
    """While active, `change` gives what takes the place of the input wherever one of the weights is used."""

    def __init__(self, model: nn.Module, names: Iterable[str], change: Callable[[str, Tensor], Tensor]) -> None:
        super().__init__()
        self._names = {_weight(model, name): name for name in names}
        self._change = change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FUNCTIONS:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            name = self._names.get(getattr(weight, DECODED_AS, id(weight)))
            if name is not None and args:
                args = (self._change(name, args[0]), *args[1:])
            elif name is not None:
                kwargs = kwargs | {"input": self._change(name, kwargs["input"])}
        return func(*args, **kwargs)


DECODED_AS = "_featherweight_decoded_as"  # of a decoded tensor, and of the module that decodes it: its name


def _weight(model: nn.Module, name: str) -> int | str:
    """The identity of a weight, or its name where a module decodes it. Looked up at every call: a network may be given
    other tensors for a while (`torch.func.functional_call`)."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
        tried = module._parameters.get(leaf), module._buffers.get(leaf), module._modules.get(f"packed_{leaf}")
        found = next(t for t in tried if t is not None)
        return getattr(found, DECODED_AS, id(found))
    except (AttributeError, StopIteration):
        raise UsageError(f"the inputs of '{name}' are to be rounded, but the network has no such tensor") from None


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Forward:
    """Stands in for a network's `forward`: the same call, with rounded inputs. An object and not a closure, so that a
    copy of the network has its own. `inner` is None for the forward of the network's class."""

    model: nn.Module
    inner: Callable[..., Any] | None
    grids: dict[str, ActivationGrid]

    @property
    def __code__(self) -> Any:
        """That of the forward that is wrapped: `torch.export` reads argument names from it."""
        return inspect.unwrap(self.inner or type(self.model).forward).__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.inner or type(self.model).forward.__get__(self.model)
        with nullcontext() if torch.compiler.is_compiling() else eager():
            with _Inputs(self.model, self.grids, lambda name, x: self.grids[name].simulate(x)):
                return forward(*args, **kwargs)


def simulate(model: nn.Module, grids: Mapping[str, ActivationGrid]) -> None:
    """From now on, whenever the network is called, round the inputs of the weights that `grids` names. Replaces what
    was simulated before; no grids switch it off.

    The network's `forward` is wrapped and nothing else is touched: neither parameters nor state nor hooks. A part of
    the network that is called alone (`model.encoder(x)`) runs as it is, in float.

    Raises:
        UsageError: the network has no tensor of such a name.
    """
    if (plain := _uncompiled(model)) is not model:
        return simulate(plain, {name.removeprefix(_COMPILED): grid for name, grid in grids.items()})
    for name in grids:
        _weight(model, name)
    own = vars(model).pop("forward", None)
    inner = own.inner if isinstance(own, _Forward) else own
    if grids:
        model.forward = _Forward(model, inner, dict(grids))
    elif inner is not None:
        model.forward = inner


def simulated(model: nn.Module) -> dict[str, ActivationGrid]:
    """The grids that a network simulates, by parameter name."""
    plain = _uncompiled(model)
    own, prefix = vars(plain).get("forward"), "" if plain is model else _COMPILED
    return {prefix + name: grid for name, grid in own.grids.items()} if isinstance(own, _Forward) else {}


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode, without gradients, of a network that rounds nothing.

    Raises:
        UsageError: it rounds inputs, or cannot be copied.
    """
    if simulated(model):
        raise UsageError("this network rounds inputs, as its file says; first call featherweight.simulate(model, {})")
    try:
        return copy.deepcopy(model).eval().requires_grad_(False)
    except Exception as error:  # the user's module may raise anything
        raise UsageError(f"the network cannot be copied ({type(error).__name__}: {error})") from error


_COMPILED = "_orig_mod."


def _uncompiled(model: nn.Module) -> nn.Module:
    """What `torch.compile` was given: its wrapper makes a new `forward` for every copy of itself."""
    inner = model._modules.get(_COMPILED[:-1])
    return model if inner is None else inner


# ---------------------------------------------------------------- the ranges
@torch.no_grad()
def calibrate(
    model: nn.Module, data: Sequence[Batch], units: Sequence[Unit], bits: Mapping[str, int]
) -> tuple[dict[str, ActivationGrid], tuple[FloatInput, ...]]:
    """The grid of every unit's input, by unit name, and the units whose input stays float; both empty without bits.

    The network, which must be in eval mode, runs once over the data. A random sample of at most SAMPLE values of each
    input is kept, the same for the same data. bits: by unit name, 0 for inputs that shall stay float.
    """
    if not any(bits.values()):
        return {}, ()
    samples = {u.name: _Sample() for u in units if bits[u.name]}
    random = torch.Generator().manual_seed(SEED)

    def look(name: str, x: Tensor) -> Tensor:
        samples[name].add(x, random)
        return x

    device = device_of(model)
    for batch in data:
        with eager(), _Inputs(model, samples, look):
            batch.to(device).run(model)
    found = {u.name: _grid_or_reason(u, samples.get(u.name), bits[u.name]) for u in units}
    left = tuple(FloatInput(name, reason) for name, reason in found.items() if isinstance(reason, str))
    return {name: grid for name, grid in found.items() if isinstance(grid, ActivationGrid)}, left


def _grid_or_reason(unit: Unit, sample: "_Sample | None", bits: int) -> ActivationGrid | str:
    if sample is None:
        return _SWITCHED_OFF
    if len(sample.kept) == 0:
        return _UNSEEN.get(unit.kind, _NOT_CALLED)
    if not torch.isfinite(sample.kept).all():
        return "it holds NaN or infinite values"
    return best_grid(sample.kept, bits) or "it is zero on all calibration data, or no float32 can be its scale"


_NOT_CALLED = "no sample reached it in a linear or convolution call of its own (attention projects its output inside)"
_SWITCHED_OFF = "switched off by the recipe"
_UNSEEN = {
    "embedding": "an embedding has whole numbers for input",
    "recurrent": "recurrent layers keep inputs and states in float",
    "attention": "attention layers keep their inputs in float",
}


def stays_float(unit: Unit, bits: Mapping[str, int]) -> str | None:
    """Why a unit's input will stay float, told without running the network; None where it is likely to be rounded."""
    return _UNSEEN.get(unit.kind) if bits.get(unit.name) else _SWITCHED_OFF


@final
class _Sample:
    """At most about SAMPLE of all the values that were added, each with the same chance of being kept."""

    def __init__(self) -> None:
        self.kept = torch.empty(0)
        self.rate = 1.0

    def add(self, x: Tensor, random: torch.Generator) -> None:
        values = x.reshape(-1)
        while len(self.kept) + self.rate * len(values) > SAMPLE:
            self.kept = self.kept[torch.randperm(len(self.kept), generator=random)[: len(self.kept) // 2]]
            self.rate /= 2
        if self.rate < 1 and len(values):
            count = max(round(self.rate * len(values)), 1)
            values = values[torch.randint(len(values), (count,), generator=random).to(values.device)]
        values = values.cpu() if values.dtype == torch.float64 else values.cpu().float()
        self.kept = torch.cat([self.kept, values])


def best_grid(values: Tensor, bits: int) -> ActivationGrid | None:
    """The grid with the smallest sum of squared rounding errors of `values` (any shape, finite) among the ranges that
    are tried: both ends shrink, in STEPS, then finer around the best; a single end in fine steps at once. None where no
    float32 can be the scale."""
    x = values.detach().double().flatten().sort().values
    if len(x) == 0 or x[0] == x[-1] == 0:
        return None
    sums = torch.stack([torch.ones_like(x), x, x.square()]).cumsum(1)
    sums = torch.cat([sums.new_zeros(3, 1), sums], dim=1)
    ends = torch.stack([x[0].clamp(max=0), x[-1].clamp(min=0)])
    steps = STEPS if ends.all() else STEPS * FINER
    shares = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
    found = _best(x, sums, bits, _pairs(ends, shares, shares))
    if found is None:
        return None
    nearby = torch.arange(FINER, -FINER - 1, -1, dtype=torch.float64) / (steps * FINER)
    low, high = ((found[1] / ends).nan_to_num(1.0)).tolist()
    around = _pairs(ends, *((s + nearby)[(s + nearby > 0) & (s + nearby <= 1)] for s in (low, high)))
    best = _best(x, sums, bits, torch.cat([found[1][None], around]))
    assert best is not None
    return best[0]


def _pairs(ends: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(ranges, 2): every share of the low end with every share of the high end; an end at 0 stays there."""
    zero = torch.zeros(1, dtype=torch.float64)
    return torch.cartesian_prod(*(s * e if e != 0 else zero for s, e in zip((low, high), ends, strict=True)))


def _best(x: Tensor, sums: Tensor, bits: int, ranges: Tensor) -> tuple[ActivationGrid, Tensor] | None:
    """The grid with the smallest error among (ranges, 2), and its range; the scale is rounded to float32 first.

    sums: (3, 1 + values) the number, sum and sum of squares of the first values of x, which is sorted. Each point of a
    grid takes the values between the middles to its neighbours, so three differences of sums give its error exactly.
    """
    levels = 2**bits - 1
    scale = ((ranges[:, 1] - ranges[:, 0]) / levels).float().double()
    usable = torch.isfinite(scale) & (scale > 0)
    scale, ranges = scale[usable, None], ranges[usable]
    if len(scale) == 0:
        return None
    zero = torch.round(-ranges[:, :1] / scale).clamp(0, levels)
    points = (torch.arange(levels + 1) - zero) * scale  # (ranges, codes)
    middles = (torch.arange(levels) + 0.5 - zero) * scale
    first = torch.searchsorted(x, middles.contiguous())
    first = torch.nn.functional.pad(torch.nn.functional.pad(first, (1, 0)), (0, 1), value=len(x))
    count, total, square = sums[:, first].diff(dim=2)
    errors = (square - 2 * points * total + points.square() * count).sum(1)
    i = int(errors.argmin())
    return ActivationGrid(bits, float(scale[i]), int(zero[i])), ranges[i]
