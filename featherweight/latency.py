"""How long a network and its layers take here, as they are and made smaller."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from featherweight.data import Batch, device_of, hooked, resized
from featherweight.errors import UsageError
from featherweight.layers import Unit
from featherweight.slim import fits, narrowed, slim

SECONDS = 0.03  # that one measurement takes, about
SERIES = 5  # for a whole network
FEWEST, MOST = 7, 200  # runs of it


@torch.no_grad()
def latency(model: nn.Module, batch: Batch) -> int:
    """Microseconds of one call, at least 1: of several series, each with some calls to warm up, the lowest median.
    Whatever else the machine does only adds to it."""
    here = batch.to(device_of(model))
    return min(timed(lambda: here.run(model), device_of(model)) for _ in range(SERIES))


class Timer(Protocol):
    """Times layers and whole networks in one runtime. Layers of equal settings and sizes are timed once, so that they
    count alike. batch: one call, which all times are of. dense: microseconds of the dense network, which ratios are of;
    whole: of the same as `network` runs it, which its layers take part of."""

    batch: Batch
    dense: int
    whole: int

    def layer(self, unit: Unit, rows: int, channels: int) -> int:
        """Microseconds of a layer of which so much is left; 0 for one that cannot be made smaller."""
        ...

    def instead(self, unit: Unit, make: Callable[[nn.Module], nn.Module], what: Any) -> int:
        """Microseconds of what a layer is replaced by; 0 for one that cannot be. what: tells replacements apart."""
        ...

    def network(self, net: nn.Module) -> int:
        """Microseconds of a network, its layers made as small as they can be. The network stays as it is."""
        ...


@final
class Clock:
    """A `Timer` of torch, on the device of the network and with torch's number of threads.

    Args:
        samples: of one call.

    Raises:
        UsageError: the batch cannot be cut into such calls.
    """

    def __init__(self, net: nn.Module, batch: Batch, units: Sequence[Unit], *, samples: int = 1) -> None:
        self.batch = one_call(batch, samples)
        self._layers = shrinkable(net, self.batch, units)
        self._known: dict[tuple[Any, ...], int] = {}
        self.dense = self.whole = latency(net, self.batch)

    def layer(self, unit: Unit, rows: int, channels: int) -> int:
        """Microseconds of a layer of which so much is left; 0 for one that cannot be made smaller."""
        if unit.name not in self._layers:
            return 0
        layer, inputs = self._layers[unit.name]
        key = repr(layer), tuple(inputs.shape), rows, channels
        if key not in self._known:
            sizes = max(rows, 1), max(channels, 1)
            smaller = narrowed(copy.deepcopy(layer), *(torch.arange(n) for n in sizes))
            with torch.no_grad():
                self._known[key] = timed(lambda: smaller(inputs), inputs.device)
        return self._known[key]

    def instead(self, unit: Unit, make: Callable[[nn.Module], nn.Module], what: Any) -> int:
        """Microseconds of what a layer is replaced by; 0 for one that cannot be. what: tells replacements apart."""
        if unit.name not in self._layers:
            return 0
        layer, inputs = self._layers[unit.name]
        key = repr(layer), tuple(inputs.shape), what
        if key not in self._known:
            other = make(copy.deepcopy(layer))
            with torch.no_grad():
                self._known[key] = timed(lambda: other(inputs), inputs.device)
        return self._known[key]

    def network(self, net: nn.Module) -> int:
        """Microseconds of a network, its layers made as small as they can be. The network stays as it is."""
        return latency(slim(copy.deepcopy(net)), self.batch)


def one_call(batch: Batch, samples: int) -> Batch:
    """So many of the batch's samples, repeated where it has fewer.

    Raises:
        UsageError: it cannot be cut.
    """
    found = resized(batch, samples)
    if found is None:
        what = "one sample" if samples == 1 else f"{samples} samples"
        into = "single ones" if samples == 1 else "as many"
        raise UsageError(f"a target for latency is of {what}, and these data cannot be cut into {into}")
    return found


def shrinkable(net: nn.Module, batch: Batch, units: Sequence[Unit]) -> dict[str, tuple[nn.Module, Tensor]]:
    """The layers that can be made smaller and run just once in a pass, by their unit's name, with their inputs."""
    modules = dict(net.named_modules())
    owners = {u.name: modules[u.name.rpartition(".")[0]] for u in units if len(u.names) == 1 and fits(net, u.name)}
    seen: dict[str, list[Tensor]] = {name: [] for name in owners}

    def see(name: str) -> Callable[..., None]:
        return lambda _module, args, kwargs: seen[name].append(args[0] if args else kwargs["input"])

    with torch.no_grad(), hooked([m.register_forward_pre_hook(see(n), with_kwargs=True) for n, m in owners.items()]):
        batch.to(device_of(net)).run(net)
    return {n: (owners[n], inputs[0].clone()) for n, inputs in seen.items() if len(inputs) == 1}


def timed(run: Callable[[], Any], device: torch.device, seconds: float = SECONDS) -> int:
    """Microseconds of a call, at least 1: the median of some that take `seconds`, about, after three to warm up."""

    def once() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    first = [once() for _ in range(3)]
    runs = int(min(max(seconds / max(min(first), 1e-6), FEWEST), MOST))
    return max(round(1e6 * statistics.median(once() for _ in range(runs))), 1)
