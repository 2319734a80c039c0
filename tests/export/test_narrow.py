"""Int8 graphs without channels that nothing reads: which go, and that outputs stay the same, bit for bit."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from featherweight import compress
from featherweight.data import Batch, batches
from featherweight.export import int8
from featherweight.export.codes import codes_of
from featherweight.export.fast import export_int8
from featherweight.export.graph import graph_of
from featherweight.export.int8 import int8_graph
from featherweight.export.narrow import held, narrow
from featherweight.export.ranges import session_of
from featherweight.export.structure import tidied
from featherweight.methods import Channels, Gptq, GridSpec, Prune, PruneQuantize
from featherweight.recipe import Recipe

QUIET = lambda *_: None  # noqa: E731


class Chain(nn.Module):
    def __init__(self, pool: str = "none") -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.c, self.fc, self.pool = nn.Conv2d(24, 8, 1), nn.Linear(8, 5), pool

    def forward(self, x):
        x = torch.relu(self.a(x))
        x = nn.functional.max_pool2d(x, 2) if self.pool == "max" else x
        x = nn.functional.avg_pool2d(x, 2) if self.pool == "average" else x
        x = nn.functional.pad(x, (1, 0, 0, 1)) if self.pool == "pad" else x
        x = nn.functional.relu6(self.b(x))
        return self.fc(torch.relu(self.c(x)).mean((2, 3)))


class Forked(nn.Module):
    """Two convolutions read what the first one makes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 8, 3), nn.Conv2d(16, 8, 3)

    def forward(self, x):
        x = torch.relu(self.a(x))
        return self.b(x) * self.c(x)


class Residual(nn.Module):
    """A block, and a layer after it; `first` and `inner.1` make what is added. shown: something else reads what
    `inner.1` makes, too."""

    def __init__(self, turned: bool = False, shown: bool = False) -> None:
        super().__init__()
        self.turned, self.shown = turned, shown
        self.first = nn.Conv2d(4, 16, 3, padding=1)
        self.inner = nn.ModuleList([nn.Conv2d(16, 12, 3, padding=1), nn.Conv2d(12, 16, 3, padding=1)])
        self.last = nn.Conv2d(16, 8, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        y = self.inner[1](torch.relu(self.inner[0](x)))
        shown = torch.sigmoid(y)
        z = self.last(torch.relu(y + x if self.turned else x + y))
        return (z, shown) if self.shown else z


class Flat(nn.Module):
    """Linear layers, the first of which reads every channel at four places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.out = nn.Conv2d(4, 16, 3, stride=2, padding=1), nn.Linear(64, 20), nn.Linear(20, 3)
        self.flatten = nn.Flatten()

    def forward(self, x):
        return self.out(torch.relu(self.fc(self.flatten(torch.relu(self.conv(x))))))


class Grouped(nn.Module):
    """A depthwise layer needs all; so does an output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.c, self.d = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.c(self.b(torch.relu(self.a(x))))
        return y, self.d(y)


def without(net: nn.Module, **removed: list[int]) -> nn.Module:
    """The network with input channels of its layers set to zero."""
    with torch.no_grad():
        for name, channels in removed.items():
            net.get_submodule(name.replace("_", ".")).weight[:, channels] = 0
    return net.eval()


def whole(net: nn.Module, x: torch.Tensor, monkeypatch) -> onnx.ModelProto:
    """The int8 graph before it is made narrower."""
    monkeypatch.setattr(int8, "narrow", lambda model: model)
    proto = graph_of(net, Batch((x[:2],), {}))
    return int8_graph(proto, None, [{proto.graph.input[0].name: x.numpy()}])


def widths(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Outputs and inputs of weights."""
    end = ".weight_codes"
    return {t.name.removesuffix(end): tuple(t.dims)[:2] for t in model.graph.initializer if t.name.endswith(end)}


def outputs(model: onnx.ModelProto, x: torch.Tensor) -> list[np.ndarray]:
    return session_of(model.SerializeToString()).run(None, {model.graph.input[0].name: x.numpy()})


def narrowed(net: nn.Module, x: torch.Tensor, monkeypatch) -> dict[str, tuple[int, ...]]:
    """The widths, after a check that outputs are the same and that the graph is sound."""
    before = whole(net, x, monkeypatch)
    kept = before.SerializeToString(deterministic=True)
    after = narrow(before)
    assert before.SerializeToString(deterministic=True) == kept
    onnx.checker.check_model(after, full_check=True)
    for one, two in zip(outputs(before, x), outputs(after, x), strict=True):
        assert np.array_equal(one, two)
    return widths(after)


def some(seed: int = 0, side: int = 8) -> torch.Tensor:
    return torch.randn(8, 4, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pool", ["none", "max", "average", "pad"])
def test_what_nothing_reads_goes(pool, monkeypatch):
    torch.manual_seed(0)
    net = without(Chain(pool), b=[0, 3, 7, 15], c=[*range(8)], fc=[1, 2, 3, 5])
    found = narrowed(net, some(), monkeypatch)
    assert found == {"a": (12, 4), "b": (16, 12), "c": (4, 16), "fc": (5, 4)}


def test_channels_go_by_fours_and_one_stays(monkeypatch):
    torch.manual_seed(0)
    found = narrowed(without(Chain(), b=[0, 1, 2], c=[*range(24)]), some(), monkeypatch)
    assert found == {"a": (4, 4), "b": (4, 4), "c": (8, 4), "fc": (5, 8)}
    assert [held(n, 10) for n in (0, 1, 4, 5, 8, 9, 10)] == [4, 4, 4, 8, 8, 10, 10]
    assert held(1, 3) == 3


def test_a_removed_output_frees_what_only_it_reads(monkeypatch):
    torch.manual_seed(0)
    net = without(Chain(), c=[*range(4, 24)])
    with torch.no_grad():
        net.b.weight[:4, 4:] = 0
    assert narrowed(net, some(), monkeypatch)["a"] == (4, 4)


def test_of_two_readers_both_must_do_without(monkeypatch):
    torch.manual_seed(0)
    found = narrowed(without(Forked(), b=[*range(8)], c=[*range(4, 12)]), some(), monkeypatch)
    assert found == {"a": (12, 4), "b": (8, 12), "c": (8, 12)}


@pytest.mark.parametrize("turned", [False, True])
def test_what_is_added_goes_on_both_sides(turned, monkeypatch):
    torch.manual_seed(0)
    inside = narrowed(without(Residual(turned), inner_1=[*range(4)]), some(), monkeypatch)
    assert inside == {"first": (16, 4), "inner.0": (8, 16), "inner.1": (16, 8), "last": (8, 16)}
    one = narrowed(without(Residual(turned), last=[*range(4)]), some(), monkeypatch)
    assert one == {"first": (16, 4), "inner.0": (12, 16), "inner.1": (16, 12), "last": (8, 16)}
    both = narrowed(without(Residual(turned), last=[*range(4)], inner_0=[*range(6)]), some(), monkeypatch)
    assert both == {"first": (12, 4), "inner.0": (12, 12), "inner.1": (12, 12), "last": (8, 12)}
    shown = narrowed(without(Residual(turned, shown=True), last=[*range(4)], inner_0=[*range(6)]), some(), monkeypatch)
    assert shown == {"first": (16, 4), "inner.0": (12, 16), "inner.1": (16, 12), "last": (8, 16)}


def test_features_of_a_flattened_channel_go_together(monkeypatch):
    torch.manual_seed(0)
    net = without(Flat(), fc=[*range(16), 17, 18], out=[*range(10)])
    found = narrowed(net, some(side=4), monkeypatch)
    assert found == {"conv": (12, 4), "fc": (12, 48), "out": (3, 12)}


def test_where_nothing_can_go_the_graph_stays(monkeypatch):
    torch.manual_seed(0)
    for net in (Chain(), without(Grouped(), d=[*range(4)], b=[0])):
        model = whole(net.eval(), some(), monkeypatch)
        assert narrow(model).SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def test_shared_weights_are_copied_where_only_one_reader_gets_narrower():
    """Two convolutions of one weight, its codes and their DequantizeLinear, of which one's outputs are all needed."""
    random = np.random.default_rng(0)
    codes = random.integers(-100, 100, (8, 8, 1, 1)).astype(np.int8)
    read = random.integers(-100, 100, (4, 8, 1, 1)).astype(np.int8)
    read[:, 4:] = 0
    constants = {"s": np.float32(0.1), "z": np.uint8(100), "w": codes, "ws": np.full(8, 0.01, np.float32), "r": read}
    constants |= {"rs": np.full(4, 0.01, np.float32)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], axis=0),
        helper.make_node("DequantizeLinear", ["r", "rs"], ["rd"], axis=0),
        helper.make_node("Conv", ["xd", "wd"], ["one"]),
        helper.make_node("Conv", ["xd", "wd"], ["y"]),
        helper.make_node("QuantizeLinear", ["one", "s", "z"], ["oneq"]),
        helper.make_node("DequantizeLinear", ["oneq", "s", "z"], ["oned"]),
        helper.make_node("Conv", ["oned", "rd"], ["v"]),
    ]
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in ("y", "v")]
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 8, 5, 5])]
    kept = [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, ends, kept)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    made = narrow(model)
    sizes = {t.name: tuple(t.dims)[:2] for t in made.graph.initializer if len(t.dims) == 4}
    assert sizes == {"w": (8, 8), "one_w": (4, 8), "r": (4, 4)}
    x = torch.randn(2, 8, 5, 5)
    for one, two in zip(outputs(model, x), outputs(made, x), strict=True):
        assert np.array_equal(one, two)


def test_a_file_of_removed_channels_becomes_a_narrower_graph_of_its_own_codes(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    for _ in range(5):
        net(torch.randn(16, 4, 8, 8))
    data = torch.randn(64, 4, 8, 8)
    pruned = PruneQuantize(Prune(Channels(0.5)), Gptq(GridSpec(8, symmetric=True)))
    artifact = compress(net.eval(), data, recipe=Recipe(pruned, activations=8)).artifact
    path = tmp_path / "int8.onnx"
    found = export_int8(artifact, net, batches(data, 32), path, QUIET)
    assert found.exact == found.weights == 3
    assert found.difference < 0.05
    assert widths(onnx.load(path)) == {"0": (8, 4), "3": (8, 8), "7": (4, 8)}
    proto = tidied(graph_of(net, Batch((data[:2],), {})))
    node = [n for n in proto.graph.node if n.op_type == "Conv"][1]
    unit = next(u for u in artifact.units if u.names[0] == node.input[1])
    codes = codes_of(node, unit.tensor().numpy(), {node.input[1]: unit})
    file = unit.weight.values.codes.numpy().astype(int) - 128
    assert codes.exact
    assert (codes.codes.reshape(16, -1) == np.where(unit.weight.mask, file, 0)).all()
