"""Inputs made up from what the network itself remembers of its training data, for those who have none.

After Cai et al., "ZeroQ", 2001.00281, section 3.1 (distilled data): inputs are moved by gradient descent until the
mean and variance of what every BatchNorm sees, over a batch, are the running ones that it keeps. Differences from the
paper: both are measured in the norm's own standard deviation, as that is what the norm divides by, and count alike for
every channel of every norm; the start is noise of which neighbouring points are alike, as they are in images and sound.

A network without BatchNorm keeps no such record: then the weights alone decide, as if the inputs of every layer were
uncorrelated and of unit power.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from featherweight.activations import plain_copy
from featherweight.data import Batch, batches, check, device_of, hooked
from featherweight.errors import UsageError
from featherweight.norms import moments, watched
from featherweight.recipe import Recipe
from featherweight.solve import Progress, needs_inputs

COUNT = 256  # inputs
LEAST = 64  # of a large network
STEPS = 40
RATE = 0.1  # of Adam, where inputs have unit variance
BATCH = 128  # inputs whose statistics are matched together
WORK = 2e12  # multiply-adds that may be spent: about a minute of two cores
SHARED = 0.9  # of the variance of the first noise is the same in all channels
SIDES = {1: (128, 1024, 16000), 2: (32, 64, 128, 224, 28, 16, 8), 3: (16, 32, 64)}  # by dimensions, the first is best
POSITIONS = 16  # that the last norm should see of one input


def _quiet(stage: str, done: int, total: int) -> None:
    pass


@final
@dataclass(frozen=True, slots=True)
class Assumed:
    """What was assumed where no data were given.

    kind: `synthetic` inputs, or the `weights` alone. shape: of one input, without the batch; given: by the user.
    samples: how many inputs. mismatch: how far their statistics are from those that the BatchNorms keep, see
    `Synthetic`; noise: the same of the noise that they were made from; worst: the norm that is farthest, and how far.
    note: why there are no inputs.
    """

    kind: Literal["synthetic", "weights"]
    shape: tuple[int, ...] | None = None
    given: bool = False
    samples: int = 0
    mismatch: float | None = None
    noise: float | None = None
    worst: tuple[str, float] | None = None
    note: str = ""

    @property
    def text(self) -> str:
        """For people."""
        if self.kind == "weights":
            taken = "the inputs of every layer were taken as uncorrelated and of unit power"
            return f"no data were given, and none could be made up: {self.note}. So {taken}; real data would be better"
        shape = "x".join(map(str, self.shape or ()))
        how = "as given" if self.given else "a guess: give the input shape where it is another"
        line = f"no data were given: {self.samples} synthetic inputs of shape {shape} ({how}) took their place"
        if self.mismatch is not None and self.noise is not None and self.worst is not None:
            line += f". Their statistics are {self.mismatch:.1%} off those that the network's BatchNorms keep "
            line += f"(noise: {self.noise:.0%}; worst: {self.worst[0]}, {self.worst[1]:.1%})"
        return f"{line}. Errors and distances are measured on them; real data would be better"


@final
@dataclass(frozen=True, slots=True, eq=False)
class Synthetic:
    """Made-up inputs. inputs: (count, *shape) float32. mismatch: by BatchNorm, over all the inputs, the mean over its
    channels of |mean - running mean| and |deviation - running deviation|, in running deviations, and of these two.
    noise: the same of the noise that they were made from. batches: how many inputs were matched together."""

    inputs: Tensor
    mismatch: dict[str, float]
    noise: dict[str, float]
    batch: int

    def batches(self) -> list[Batch]:
        """As calibration data, without labels."""
        return [Batch((part,), {}) for part in self.inputs.split(self.batch)]


def synthesize(
    model: nn.Module,
    shape: Sequence[int] | None = None,
    *,
    count: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: Progress = _quiet,
) -> Synthetic:
    """Make up inputs that a trained network with BatchNorm finds ordinary. The network is not changed.

    Args:
        shape: of one input, such as (3, 32, 32); found by trying where it is not given.
        count: how many; COUNT, fewer for a large network.
        steps: of gradient descent, STEPS where nothing is said.
        seed: the same gives the same inputs, on the same machine.

    Raises:
        UsageError: no BatchNorm runs, the network does not accept the shape, or gives no gradient or NaN.
    """
    net = plain_copy(model)
    found = _site(net, shape)
    if isinstance(found, str):
        raise UsageError(f"no inputs can be made up: {found}")
    return _synthetic(net, found, count, steps, seed, progress)


def _synthetic(
    net: nn.Module, found: tuple[int, ...], count: int | None, steps: int | None, seed: int, progress: Progress
) -> Synthetic:
    if count is not None and not (type(count) is int and count > 1):
        raise UsageError(f"count must be a whole number above 1, got {count!r}")
    steps = STEPS if steps is None else steps
    if not (type(steps) is int and steps > 0):
        raise UsageError(f"steps must be a whole number above 0, got {steps!r}")
    count = count or _count(net, found, steps)
    random = torch.Generator().manual_seed(seed)
    parts = math.ceil(count / BATCH)
    sizes = [count * (i + 1) // parts - count * i // parts for i in range(parts)]
    starts = [noise(n, found, random) for n in sizes]
    progress("synthesize", 0, steps * parts)
    made = []
    for i, start in enumerate(starts):
        made.append(_matched(net, start, steps, lambda s, i=i: progress("synthesize", i * steps + s, steps * parts)))
    return Synthetic(torch.cat(made), mismatch(net, made), mismatch(net, starts), max(sizes))


# ---------------------------------------------------------------- in place of data
def assume(net: nn.Module, data: Any, recipe: Recipe, target: bool, given: Sequence[int] | None) -> Assumed | None:
    """What will stand in for data, before anything expensive; None where there are data, or nothing looks at inputs and
    no shape was given.

    Raises:
        UsageError: a shape beside data, or one that the network does not accept; inputs are to be rounded and none can
            be made up.
    """
    if data is not None:
        if given is not None:
            raise UsageError("an input shape is for runs without data; the data have one")
        return None
    rounding = any([recipe.activations, *(o.activations for o in recipe.overrides)])
    looking = any(needs_inputs(m) for m in (recipe.method, *(o.method for o in recipe.overrides)))
    if not (target or looking or rounding or given is not None):
        return None
    found = _site(net, given)
    if not isinstance(found, str):
        return Assumed("synthetic", found, given is not None, _count(net, found, STEPS))
    if rounding:
        raise UsageError(
            f"rounding activations needs calibration data, to find their ranges; made up they cannot be: {found}"
        )
    return Assumed("weights", note=found)


def samples_of(
    net: nn.Module, data: Any, batch_size: int, assumed: Assumed | None, progress: Progress, making: bool = True
) -> tuple[list[Batch], Assumed | None]:
    """The data in memory, or what stands in for them, and what was assumed. making: without it no inputs are made up,
    only announced.

    Raises:
        UsageError: data that cannot be read, or that the network does not accept.
    """
    if data is not None:
        samples = batches(data, batch_size)
        check(net, samples[0])
        return samples, None
    if assumed is None or assumed.shape is None or not making:
        return [], assumed
    try:
        made = _synthetic(net, assumed.shape, None, None, 0, progress)
    except UsageError as error:
        return [], Assumed("weights", note=str(error))
    worst = max(made.mismatch.items(), key=lambda item: item[1])
    whole = [sum(x.values()) / len(x) for x in (made.mismatch, made.noise)]
    return made.batches(), replace(assumed, samples=len(made.inputs), mismatch=whole[0], noise=whole[1], worst=worst)


# ---------------------------------------------------------------- the inputs
def noise(count: int, shape: Sequence[int], random: torch.Generator) -> Tensor:
    """(count, *shape) Gaussian of mean 0 and variance 1: where there are channels and space, with a spectrum of
    amplitude 1 / frequency, as natural images have, most of it the same in all channels."""
    x = torch.randn(count, *shape, generator=random)
    if len(shape) < 2:
        return x
    common = torch.randn(count, 1, *shape[1:], generator=random)
    x = math.sqrt(SHARED) * common + math.sqrt(1 - SHARED) * x
    space = tuple(range(2, x.ndim))
    axes = [torch.fft.fftfreq(n) for n in shape[1:-1]] + [torch.fft.rfftfreq(shape[-1])]
    squares = sum(f.square() for f in torch.meshgrid(*axes, indexing="ij"))
    amplitude = torch.as_tensor(squares).sqrt().clamp(min=1 / max(shape[1:])).reciprocal()
    smooth = torch.fft.irfftn(torch.fft.rfftn(x, dim=space) * amplitude, s=shape[1:], dim=space)
    return smooth / smooth.std()


@torch.no_grad()
def mismatch(net: nn.Module, batches: Sequence[Tensor]) -> dict[str, float]:
    """By BatchNorm that runs, see `Synthetic`; of the inputs of all batches together."""
    norms = tracked(net)

    def run() -> None:
        for x in batches:
            net(x.to(device_of(net), _dtype(net)))

    seen, found = moments(norms.values(), run), {}
    for name, norm in norms.items():
        if norm in seen:
            shift, scale = _differences(norm, *seen[norm])
            found[name] = float((shift.abs().mean() + scale.abs().mean()) / 2)
    return found


def tracked(net: nn.Module) -> dict[str, Any]:
    """The BatchNorms with running statistics, by name."""
    kinds = nn.modules.batchnorm._BatchNorm
    return {n: m for n, m in net.named_modules() if isinstance(m, kinds) and m.running_mean is not None}


def _differences(norm: Any, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Of mean and deviation, from the running ones and in the running deviation."""
    whole = norm.running_var.to(variance.dtype) + norm.eps
    shift = (mean - norm.running_mean.to(mean.dtype)) / whole.sqrt()
    return shift, ((variance + norm.eps) / whole).sqrt() - 1


def _matched(net: nn.Module, start: Tensor, steps: int, on_step: Callable[[int], None]) -> Tensor:
    """`start`, moved so that the statistics over the batch match."""
    norms, dtype = tracked(net).values(), _dtype(net)
    lost: list[Tensor] = []

    def see(norm: Any, x: Tensor) -> None:
        dims = tuple(d for d in range(x.ndim) if d != 1)
        mean = x.float().mean(dim=dims)
        variance = (x.float() - mean.view(-1, *[1] * (x.ndim - 2))).square().mean(dim=dims)
        shift, scale = _differences(norm, mean, variance)
        lost.append(shift.square().mean() + scale.square().mean())

    x = start.clone().to(device_of(net)).requires_grad_(True)
    adam = torch.optim.Adam([x], lr=RATE)
    with watched(norms, see), torch.enable_grad():
        for step in range(steps):
            adam.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
            lost.clear()
            try:
                net(x.to(dtype))
                total = torch.stack(lost).mean()
                (x.grad,) = torch.autograd.grad(total, [x])
            except RuntimeError as error:
                raise UsageError(f"no inputs can be made up: the network gives no gradient: {error}"[:300]) from error
            if not torch.isfinite(x.grad).all():
                raise UsageError("no inputs can be made up: the statistics of noise are NaN or infinite in the network")
            adam.step()
            on_step(step + 1)
    return x.detach().cpu()


def _dtype(net: nn.Module) -> torch.dtype:
    return next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)


# ---------------------------------------------------------------- the shape of an input
def shape_of(given: Any) -> tuple[int, ...]:
    """A shape from numbers, or from text such as `3,32,32`.

    >>> shape_of("3,32,32"), shape_of([10])
    ((3, 32, 32), (10,))

    Raises:
        UsageError: it is something else.
    """
    try:
        found = tuple(int(n) for n in (given.split(",") if isinstance(given, str) else given))
        exact = isinstance(given, str) or all(type(n) is int for n in given)
    except (TypeError, ValueError):
        found, exact = (), False
    if not exact or not found or min(found) < 1:
        raise UsageError(f"an input shape is whole numbers without the batch, such as 3,32,32, got {given!r}")
    return found


def _site(net: nn.Module, given: Sequence[int] | None) -> tuple[int, ...] | str:
    """The shape of an input, or why none can be made up.

    Raises:
        UsageError: the network does not accept the shape that was given.
    """
    if given is not None:
        shape = shape_of(given)
        seen = _positions(net, shape)
        if isinstance(seen, str):
            raise UsageError(f"the network does not run on inputs of shape {','.join(map(str, shape))}: {seen}"[:300])
        return shape if seen else "no BatchNorm with running statistics runs, which would tell what inputs are like"
    if not tracked(net):
        return "the network has no BatchNorm with running statistics, which would tell what inputs are like"
    shapes = _guesses(net)
    runs = {shape: seen for shape in shapes if not isinstance(seen := _positions(net, shape), str)}
    if not runs:
        tried = f" (tried {', '.join('x'.join(map(str, s)) for s in shapes)})" if shapes else ""
        return f"the shape of an input is unknown{tried}; give the input shape"
    runs = {shape: seen for shape, seen in runs.items() if seen}
    if not runs:
        return "no BatchNorm with running statistics runs, which would tell what inputs are like"
    largest = max(runs, key=math.prod)
    last = max(i for i, n in enumerate(runs[largest]) if n > 1 or i == 0)  # those after pooling always see one
    return next((shape for shape, seen in runs.items() if seen[last] >= POSITIONS), largest)


def _guesses(net: nn.Module) -> list[tuple[int, ...]]:
    """What the first layer could accept."""
    for module in net.modules():
        match module:
            case nn.Embedding() | nn.EmbeddingBag() | nn.RNNBase() | nn.MultiheadAttention():
                return []
            case nn.Linear():
                return [(module.in_features,)]
            case nn.modules.conv._ConvNd():
                dims = len(module.kernel_size)
                return [(module.in_channels, *[side] * dims) for side in SIDES[dims]]
    return []


@torch.no_grad()
def _positions(net: nn.Module, shape: tuple[int, ...]) -> list[int] | str:
    """How many positions of one input every BatchNorm sees, in order of their calls; or why the network fails."""
    seen: list[int] = []
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device_of(net), _dtype(net))
    with watched(tracked(net).values(), lambda _norm, x: seen.append(math.prod(x.shape[2:]) * len(x) // 2)):
        try:
            Batch((x,), {}).run(net)
        except UsageError as error:
            return str(error)
    return seen


def _count(net: nn.Module, shape: tuple[int, ...], steps: int) -> int:
    """How many inputs can be made up in about a minute."""
    return int(min(max(WORK / max(3 * _macs(net, shape) * steps, 1), LEAST), COUNT))


@torch.no_grad()
def _macs(net: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiplications of one input in convolutions and linear layers, about."""
    total = 0

    def see(module: Any, _args: Any, out: Any) -> None:
        nonlocal total
        total += out.numel() // module.weight.shape[0] * module.weight.numel() // 2

    layers = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    with hooked([m.register_forward_hook(see) for m in layers]):
        net(torch.zeros(2, *shape).to(device_of(net), _dtype(net)))
    return total
