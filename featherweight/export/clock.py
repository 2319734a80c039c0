"""How long a network and its layers take in int8 in onnxruntime, as they are and made smaller."""

import copy
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import nn

from featherweight.activations import simulate
from featherweight.data import Batch, hooked
from featherweight.errors import UsageError
from featherweight.export.graph import INSTALL, doubled, graph_of
from featherweight.export.parity import arrays_of
from featherweight.latency import SERIES, one_call, shrinkable, timed
from featherweight.layers import Unit

_CPU = torch.device("cpu")
_LAYERS = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d


@final
@dataclass(frozen=True, slots=True)
class Kernel:
    """A layer as an int8 network computes it. samples: of a convolution; of a linear layer, all positions that it is
    used at. rows, channels: outputs and inputs. The rest is a convolution's, one for every dimension. sides: of its
    input. pads: before, then after."""

    samples: int
    rows: int
    channels: int
    sides: tuple[int, ...] = ()
    taps: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    groups: int = 1


@final
class FastClock:
    """Times layers and whole networks like `featherweight.latency.Clock`, but in int8 in onnxruntime, on the CPU with
    torch's number of threads, and with as few channels as the exported graph has, see `narrow`. dense, whole: of the
    dense network in float32 and in int8.

    Args:
        samples: of one call. together: weights that are always without the same input channels, see `joint`.

    Raises:
        UsageError: the batch cannot be cut into such calls, the network cannot be exported or has nothing that could
            be int8, or a package is missing.
    """

    def __init__(
        self,
        net: nn.Module,
        batch: Batch,
        units: Sequence[Unit],
        *,
        samples: int = 1,
        together: Collection[tuple[str, ...]] = (),
    ) -> None:
        try:
            from featherweight.export.int8 import int8_graph
            from featherweight.export.narrow import free
        except ImportError as error:
            raise UsageError(f"{INSTALL} ({error})") from error
        self.batch = one_call(batch, samples)
        self._layers = shrinkable(net, self.batch, units)
        self._known: dict[Kernel, int] = {}
        self._replaced: dict[tuple[Any, ...], int] = {}
        proto, inputs = self._exported(net)
        made = int8_graph(proto, None, [inputs])
        self._readers, self._makers = free(made, together)
        self.dense, self.whole = _run(proto, inputs), _run(made, inputs)

    def layer(self, unit: Unit, rows: int, channels: int) -> int:
        """Microseconds of a layer of which so much is left; 0 for one that cannot be made smaller. Rows and channels
        that would stay in the graph all the same, as other layers need them, count."""
        from featherweight.export.narrow import held

        if unit.name not in self._layers:
            return 0
        kernel = _kernel(*self._seen(unit))
        rows = held(rows, kernel.rows) if unit.name in self._makers else kernel.rows
        channels = held(channels, kernel.channels) if unit.name in self._readers else kernel.channels
        return self._time(replace(kernel, rows=rows, channels=channels))

    def instead(self, unit: Unit, make: Callable[[nn.Module], nn.Module], what: Any) -> int:
        """Microseconds of all convolutions and linear layers that a layer is replaced by; 0 for one that cannot be.
        what: tells replacements apart."""
        if unit.name not in self._layers:
            return 0
        layer, inputs = self._layers[unit.name]
        key = repr(layer), tuple(inputs.shape), what
        if key not in self._replaced:
            other, seen = make(copy.deepcopy(layer)), []
            links = [m for m in other.modules() if isinstance(m, _LAYERS)]

            def see(link: nn.Module, args: Any) -> None:
                seen.append(_kernel(link, args[0].shape))

            with torch.no_grad(), hooked([m.register_forward_pre_hook(see) for m in links]):
                other(inputs)
            self._replaced[key] = sum(self._time(kernel) for kernel in seen)
        return self._replaced[key]

    def network(self, net: nn.Module) -> int:
        """Microseconds of a network in int8, without channels that nothing reads. The network stays as it is."""
        from featherweight.export.int8 import int8_graph

        proto, inputs = self._exported(net)
        return _run(int8_graph(proto, None, [inputs]), inputs)

    def _seen(self, unit: Unit) -> tuple[nn.Module, torch.Size]:
        layer, inputs = self._layers[unit.name]
        return layer, inputs.shape

    def _time(self, kernel: Kernel) -> int:
        from featherweight.export.kernels import microseconds
        from featherweight.export.narrow import FOURS

        if kernel.sides and kernel.groups == 1:
            kernel = replace(kernel, channels=max(kernel.channels, FOURS))  # as `int8_graph` pads them
        if kernel not in self._known:
            self._known[kernel] = microseconds(kernel)
        return self._known[kernel]

    def _exported(self, net: nn.Module) -> tuple[Any, dict[str, Any]]:
        """The float32 graph, and its inputs."""
        plain, batch = copy.deepcopy(net).to(_CPU), self.batch.to(_CPU)
        simulate(plain, {})
        proto = graph_of(plain, doubled(batch))
        names = [i.name for i in proto.graph.input]
        return proto, dict(zip(names, arrays_of(plain, batch), strict=True))


def _run(proto: Any, inputs: dict[str, Any]) -> int:
    """Microseconds of a graph: of several series the lowest median."""
    from featherweight.export.ranges import session_of

    session = session_of(proto.SerializeToString())
    return min(timed(lambda: session.run(None, inputs), _CPU) for _ in range(SERIES))


def _kernel(layer: Any, shape: Sequence[int]) -> Kernel:
    """What computes the layer on inputs of this shape."""
    if isinstance(layer, nn.Linear):
        return Kernel(math.prod(shape[:-1]), layer.out_features, layer.in_features)
    rank = len(layer.kernel_size)
    samples, sides = (shape[0] if len(shape) > rank + 1 else 1), tuple(shape[-rank:])
    before, after = tuple(layer.padding), tuple(layer.padding)
    if isinstance(layer.padding, str):
        pairs = zip(layer.dilation, layer.kernel_size, strict=True)
        more = [d * (k - 1) if layer.padding == "same" else 0 for d, k in pairs]
        before, after = tuple(m // 2 for m in more), tuple(m - m // 2 for m in more)
    if layer.padding_mode != "zeros":  # another operator does that
        sides = tuple(sum(x) for x in zip(sides, before, after, strict=True))
        before = after = (0,) * rank
    settings = tuple(layer.kernel_size), tuple(layer.stride), tuple(layer.dilation), before + after, layer.groups
    return Kernel(samples, layer.out_channels, layer.in_channels, sides, *settings)
