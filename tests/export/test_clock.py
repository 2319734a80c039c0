"""Latencies in int8 in onnxruntime: of layers made smaller, of factors, and of whole networks."""

import builtins
from functools import partial

import pytest
import torch
from torch import nn

from featherweight.activations import ActivationGrid, simulate
from featherweight.allocator import Allocator
from featherweight.data import Batch
from featherweight.errors import UsageError
from featherweight.export import clock as clocks
from featherweight.export import kernels
from featherweight.export.clock import FastClock, Kernel
from featherweight.latency import Clock, Timer
from featherweight.layers import scan

torch.set_num_threads(1)


class Wide(nn.Module):
    def __init__(self, channels: int = 256) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, channels, 3, padding=1), nn.Conv2d(channels, 256, 3, padding=1)
        self.narrow, self.down = nn.Conv2d(256, 64, 1), nn.Conv2d(64, 64, 3, stride=2, padding=1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.fc(torch.relu(self.down(torch.relu(self.narrow(x)))).mean((2, 3)))


class Residual(nn.Module):
    """Both inner layers read what is added to; `b` alone reads what `a` makes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.last(x + self.b(torch.relu(self.a(x))))


def clock_of(net: nn.Module, *shape: int, samples: int = 1) -> FastClock:
    return FastClock(net.eval(), Batch((torch.randn(shape),), {}), scan(net).units, samples=samples)


def scripted(monkeypatch) -> list[Kernel]:
    """Instead of times what a kernel multiplies; returns those that are asked for."""
    asked = []

    def microseconds(kernel: Kernel) -> int:
        asked.append(kernel)
        return kernel.rows * kernel.channels

    monkeypatch.setattr(kernels, "microseconds", microseconds)
    monkeypatch.setattr(clocks, "_run", lambda _proto, _inputs: 1)
    return asked


@pytest.fixture(scope="module")
def wide() -> tuple[Wide, FastClock]:
    torch.manual_seed(0)
    net = Wide()
    return net, clock_of(net, 4, 8, 16, 16)


def test_smaller_layers_are_faster(wide):
    """The lowest of a few times each, in turns: other work on the machine may double any of them."""
    net, clock = wide
    units = {u.name: u for u in scan(net).units}
    sizes = [(256, 256), (256, 128), (128, 128)]
    rounds = []
    for _ in range(4):
        clock._known.clear()
        rounds.append([clock.layer(units["second.weight"], *size) for size in sizes])
    whole, half, quarter = (min(times) for times in zip(*rounds, strict=True))
    assert half < 0.8 * whole
    assert quarter < 0.8 * half
    assert all(clock.layer(u, u.view.shape[0], u.view.shape[1]) >= 1 for u in units.values())


def test_a_network_of_fewer_channels_is_faster_and_stays_as_it_is(wide):
    net, clock = wide
    pruned = Wide()
    pruned.load_state_dict(net.state_dict())
    with torch.no_grad():
        pruned.second.weight[:, :192] = 0
        pruned.narrow.weight[:, :192] = 0
    simulate(pruned, {"fc.weight": ActivationGrid(8, 0.5, 0)})
    before = {n: t.clone() for n, t in pruned.state_dict().items()}
    times = [(clock.network(net), clock.network(pruned)) for _ in range(2)]
    assert 0 < min(t for _, t in times) < 0.7 * min(clock.whole, *(t for t, _ in times))
    assert all(torch.equal(t, pruned.state_dict()[n]) for n, t in before.items())
    assert "forward" in vars(pruned)


def test_equal_layers_are_timed_once(monkeypatch):
    asked = scripted(monkeypatch)
    net = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)])
    clock, units = clock_of(net, 2, 8, 6, 6), scan(net).units
    assert [clock.layer(u, 8, 8) for u in units] == [64] * 4
    assert len(asked) == 1
    assert clock.layer(units[1], 3, 5) == clock.layer(units[2], 4, 8) == 32  # by fours
    assert asked[1:] == [Kernel(1, 4, 8, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1))]
    assert clock.layer(units[0], 4, 4) == clock.layer(units[3], 8, 4) == 32
    assert len(asked) == 3


def test_only_what_a_graph_can_lose_makes_a_layer_faster(monkeypatch):
    scripted(monkeypatch)
    net = Residual()
    clock, units = clock_of(net, 2, 8, 6, 6), {u.name: u for u in scan(net).units}
    sizes = {n: (clock.layer(u, 4, 8), clock.layer(u, 8, 4)) for n, u in units.items()}
    assert sizes["stem.weight"] == (32, 64)  # its input is the network's
    assert sizes["a.weight"] == (32, 64)  # another layer reads its input
    assert sizes["b.weight"] == (32, 32)
    assert sizes["last.weight"] == (64, 64)  # `a` reads a part of what is added


def test_settings_of_layers_are_seen(monkeypatch):
    asked = scripted(monkeypatch)
    net = nn.Sequential(
        nn.Conv2d(3, 8, (3, 5), stride=(2, 1), padding="valid"),
        nn.Conv2d(8, 8, (2, 3), padding="same", dilation=(2, 1)),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 16, 1),
        nn.Flatten(),
        nn.Linear(16 * 5 * 6, 7),
    )
    clock, units = clock_of(net, 8, 3, 11, 10, samples=4), scan(net).units
    for unit in units:
        clock.layer(unit, *unit.view.shape[:2])
    assert asked == [
        Kernel(4, 8, 4, (11, 10), (3, 5), (2, 1), (1, 1), (0, 0, 0, 0)),
        Kernel(4, 8, 8, (5, 6), (2, 3), (1, 1), (2, 1), (1, 1, 1, 1)),
        Kernel(4, 8, 8, (7, 8), (3, 3), (1, 1), (1, 1), (0, 0, 0, 0)),
        Kernel(4, 16, 8, (5, 6), (1, 1), (1, 1), (1, 1), (0, 0, 0, 0)),
        Kernel(4, 7, 480),
    ]


@pytest.mark.parametrize(
    "kernel",
    [
        Kernel(2, 8, 4, (9,), (3,), (2,), (1,), (1, 1)),
        Kernel(2, 8, 8, (6, 5), (3, 1), (1, 1), (1, 1), (1, 0, 1, 0), 4),
        Kernel(1, 8, 4, (4, 5, 6), (2, 2, 2), (1, 1, 1), (1, 1, 1), (0,) * 6),
        Kernel(3, 5, 7),
    ],
)
def test_onnxruntime_runs_every_kind_of_kernel(kernel):
    assert kernels.microseconds(kernel) >= 1


def test_factors_take_the_time_of_all_their_links(monkeypatch):
    asked = scripted(monkeypatch)
    net = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 4, 1, groups=2), nn.Flatten(), nn.Linear(144, 6))
    clock, units = clock_of(net, 2, 8, 6, 6), scan(net).units

    def chain(rank: int, layer: nn.Module) -> nn.Module:
        if isinstance(layer, nn.Linear):
            return nn.Sequential(nn.Linear(144, rank), nn.Linear(rank, 6))
        links = nn.Conv2d(8, rank, 1), nn.Conv2d(rank, rank, 3, padding=1, groups=rank), nn.Conv2d(rank, 16, 1)
        return nn.Sequential(*links)

    assert clock.instead(units[0], partial(chain, 6), 6) == 8 * 6 + 6 * 6 + 6 * 16
    assert [k.groups for k in asked] == [1, 6, 1]
    assert clock.instead(units[0], partial(chain, 5), 6) == 180  # known by `what`
    assert clock.instead(units[2], partial(chain, 3), 3) == 144 * 3 + 3 * 6
    assert clock.instead(units[1], partial(chain, 3), 3) == clock.layer(units[1], 4, 8) == 0  # has groups


def test_data_that_cannot_be_cut_are_refused():
    net, data = nn.Sequential(nn.Linear(4, 4)), Batch((torch.randn(8, 4), torch.zeros(3)), {})
    for kind in (Clock, FastClock):
        with pytest.raises(UsageError, match="one sample, and these data cannot be cut into single ones"):
            kind(net, data, ())
        with pytest.raises(UsageError, match="of 32 samples, and these data cannot be cut"):
            kind(net, data, (), samples=32)


def test_a_call_has_as_many_samples_as_asked():
    net = nn.Sequential(nn.Linear(4, 4))
    for kind in (Clock, FastClock):
        clock: Timer = kind(net, Batch((torch.randn(8, 4),), {}), scan(net).units, samples=20)
        assert clock.batch.size == 20
        assert clock.dense > 0
        assert clock.whole > 0


def test_missing_packages_are_named(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.endswith("export.int8"):
            raise ImportError("No module named 'onnx'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UsageError, match="pip install onnx"):
        clock_of(nn.Sequential(nn.Linear(4, 4)), 2, 4)


def test_overhead_is_what_the_layers_leave_of_the_whole(monkeypatch):
    scripted(monkeypatch)
    net = nn.Sequential(nn.Conv2d(8, 8, 1))
    clock, found = clock_of(net, 2, 8, 4, 4), scan(net)
    clock.dense, clock.whole = 1000, 100
    allocator = Allocator(net, found, {}, (), {}, {}, {}, {}, {}, clock)
    assert allocator.overhead == 100 - 64
