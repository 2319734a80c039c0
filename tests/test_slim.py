import copy
import platform

import pytest
import torch
from torch import nn

import featherweight as fw
from featherweight import _memory
from featherweight.activations import ActivationGrid
from featherweight.data import Batch
from featherweight.errors import UsageError
from featherweight.latency import Clock, latency
from featherweight.layers import scan
from featherweight.slim import Slim, extent, fits


class Padded(nn.Conv2d):
    """Pads by itself, as some published networks do."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Padded(3, 8, 2)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.inner = nn.Conv2d(8, 6, 3, bias=False, stride=2, padding=1)
        self.fc = nn.Linear(6, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        x = self.inner(self.grouped(x) + 1).relu().mean((2, 3))
        return self.head(self.fc(x).relu())


def pruned() -> nn.Module:
    torch.manual_seed(0)
    net = Net().double().eval().requires_grad_(False)
    net.norm.running_mean.normal_()
    net.conv.weight[torch.tensor([1, 5])] = 0
    net.conv.weight[:, 2] = 0
    net.grouped.weight[0] = 0
    net.inner.weight[2] = 0
    net.inner.weight[:, [0, 3, 4]] = 0
    net.fc.weight[:] = 0
    net.head.weight[:, 1] = 0
    return net


def test_the_same_numbers_from_smaller_layers():
    net, x = pruned(), torch.randn(4, 3, 9, 9, dtype=torch.float64)
    small = fw.slim(copy.deepcopy(net))
    assert torch.allclose(small(x), net(x), rtol=0, atol=1e-13)
    assert tuple(small.conv.layer.weight.shape) == (6, 2, 2, 2)
    assert (small.conv.layer.out_channels, small.conv.layer.in_channels) == (6, 2)
    assert small.conv.layer.bias.shape == (6,)
    assert tuple(small.inner.layer.weight.shape) == (5, 5, 3, 3)
    assert small.inner.layer.bias is None
    assert (small.fc.layer.in_features, small.fc.layer.out_features) == (1, 1)
    assert isinstance(small.grouped, nn.Conv2d)
    assert fw.slim(small) is small
    assert not isinstance(small.conv.layer, Slim)
    assert torch.allclose(small(x), net(x), rtol=0, atol=1e-13)


def test_shapes_of_every_rank():
    cases = (nn.Conv1d(4, 6, 3), (4, 9)), (nn.Conv3d(4, 6, 2), (2, 4, 5, 5, 5)), (nn.Linear(4, 6), (7, 2, 4))
    for layer, shape in cases:
        net = nn.Sequential(layer).requires_grad_(False)
        layer.weight[::2] = 0
        layer.weight[:, 1] = 0
        small, x = fw.slim(copy.deepcopy(net)), torch.randn(shape)
        assert isinstance(small[0], Slim)
        assert torch.allclose(small(x), net(x), atol=1e-6)


def test_what_is_left_as_it_is():
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    attention = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1)
    for net, x in ((Tied(), torch.randn(2, 4)), (attention, torch.randn(2, 3, 8))):
        net = net.eval().requires_grad_(False)
        for p in net.parameters():
            if p.ndim == 2:
                p[:, 0] = 0
        before = net(x)
        assert not any(isinstance(m, Slim) for m in fw.slim(net).modules())
        assert torch.equal(net(x), before)


class Standardized(nn.Conv2d):
    """Its weight is not what it multiplies with."""

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, w, self.bias, padding=1)


class Branched(nn.Linear):
    """Reads its whole input in another way, too."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(a, b)
        self.low = nn.Linear(a, b, bias=False)

    def forward(self, x):
        return super().forward(x) + self.low(x)


class Reader(nn.Module):
    """Takes the weight out of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return nn.functional.linear(x, self.fc.weight, self.fc.bias)


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (nn.Sequential(Standardized(4, 6, 3)), (2, 4, 5, 5)),
        (nn.Sequential(Branched(6, 5)), (2, 6)),
        (Reader(), (3, 6)),
    ],
)
def test_layers_of_other_classes_give_what_they_gave(net, shape):
    torch.manual_seed(0)
    net = net.eval().requires_grad_(False)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.normal_()
            layer.weight[:, 1], layer.weight[2] = 0, 0
    x = torch.randn(shape)
    want = net(x)
    assert torch.allclose(fw.slim(net)(x), want, atol=1e-6)


def test_rounded_inputs_are_refused():
    net = pruned()
    fw.simulate(net, {"head.weight": ActivationGrid(8, 0.5, 0)})
    with pytest.raises(UsageError, match="rounds inputs"):
        fw.slim(net)


def test_extent_counts_what_is_not_zero():
    rows, channels = extent(pruned().conv.weight)
    assert rows.tolist() == [0, 2, 3, 4, 6, 7]
    assert channels.tolist() == [0, 1]


def test_a_clock_times_layers_and_networks():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(32, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 32, 3, padding=1, groups=2)).eval()
    units = scan(net).units
    data = Batch((torch.randn(8, 32, 40, 40),), {})
    clock = Clock(net, data, units)
    assert clock.batch.size == 1
    whole, part = clock.layer(units[0], 128, 32), clock.layer(units[0], 16, 8)
    assert 1 <= part < whole
    assert clock.layer(units[0], 16, 8) == part
    assert clock.layer(units[1], 32, 64) == 0
    assert clock.dense > 1
    before = {n: t.clone() for n, t in net.state_dict().items()}
    assert clock.network(net) > 0
    assert all(torch.equal(t, net.state_dict()[n]) for n, t in before.items())
    assert latency(nn.Identity(), data) >= 1


def test_layers_that_stay_as_they_are_take_no_part_in_a_table():
    net = nn.Sequential(Branched(6, 5), Standardized(4, 6, 3), Padded(4, 6, 3), nn.Linear(6, 4))
    assert [fits(net, f"{i}.weight") for i in range(4)] == [False, False, True, True]
    assert Clock(nn.Sequential(net[0]), Batch((torch.randn(3, 6),), {}), scan(nn.Sequential(net[0])).units).dense > 0


def test_wide_dilations_do_not_matter():
    net = nn.Sequential(nn.Conv1d(4, 6, 3, dilation=16)).requires_grad_(False)
    net[0].weight[:, 1] = 0
    assert isinstance(fw.slim(net)[0], Slim)


def test_latency_is_of_single_samples():
    data = Batch((torch.randn(8, 4), torch.zeros(3)), {})
    with pytest.raises(UsageError, match="single ones"):
        Clock(nn.Linear(4, 4), data, ())


def test_memory_is_reused_where_the_library_can(monkeypatch):
    assert fw.reuse_memory() == (platform.libc_ver()[0] == "glibc")
    monkeypatch.setattr(_memory.sys, "platform", "darwin")
    assert not fw.reuse_memory()
