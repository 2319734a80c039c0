"""How long a network and its layers take here, as they are and made smaller."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from featherweight.data import Batch, cut, device_of, hooked
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


@final
class Clock:
    """Times layers and whole networks for one sample, on the device of the network and with torch's number of threads.
    Layers of equal settings and sizes are timed once, so that they count alike.

    Raises:
        UsageError: the batch cannot be cut into single samples.
    """

    def __init__(self, net: nn.Module, batch: Batch, units: Sequence[Unit]) -> None:
        self.batch = cut(batch, batch.size)[0]
        if self.batch.size != 1:
            raise UsageError("a target for latency is of one sample, and these data cannot be cut into single ones")
        self._layers = _layers(net, self.batch, units)
        self._known: dict[tuple[Any, ...], int] = {}
        self.dense = latency(net, self.batch)

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

    def network(self, net: nn.Module) -> int:
        """Microseconds of a network, its layers made as small as they can be. The network stays as it is."""
        return latency(slim(copy.deepcopy(net)), self.batch)


def _layers(net: nn.Module, batch: Batch, units: Sequence[Unit]) -> dict[str, tuple[nn.Module, Tensor]]:
    """The layers that can be made smaller and run just once in a pass, by their unit's name, with their inputs."""
    modules = dict(net.named_modules())
    owners = {u.name: modules[u.name.rpartition(".")[0]] for u in units if len(u.names) == 1 and fits(net, u.name)}
    seen: dict[str, list[Tensor]] = {name: [] for name in owners}

    def see(name: str) -> Callable[..., None]:
        return lambda _module, args, kwargs: seen[name].append(args[0] if args else kwargs["input"])

    with torch.no_grad(), hooked([m.register_forward_pre_hook(see(n), with_kwargs=True) for n, m in owners.items()]):
        batch.to(device_of(net)).run(net)
    return {n: (owners[n], inputs[0].clone()) for n, inputs in seen.items() if len(inputs) == 1}


def timed(run: Callable[[], Any], device: torch.device) -> int:
    """Microseconds of a call, at least 1: the median of some, after three to warm up."""

    def once() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    first = [once() for _ in range(3)]
    runs = int(min(max(SECONDS / max(min(first), 1e-6), FEWEST), MOST))
    return max(round(1e6 * statistics.median(once() for _ in range(runs))), 1)
