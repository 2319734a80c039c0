"""Whole networks as ONNX files: what onnxruntime computes is what torch computes, in about as many bytes as ours."""

import json
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

import featherweight as fw
from featherweight.artifact import fill
from featherweight.data import Batch
from featherweight.errors import FormatError, UsageError
from featherweight.export import graph as graphs
from featherweight.export import onnx as exporting
from featherweight.export import parity
from featherweight.export.graph import check_graph, fix_batch, name_batch
from featherweight.export.int8 import int8_graph
from featherweight.export.parity import in_onnxruntime
from featherweight.export.passes import Graph
from featherweight.recipe import recipe_of
from tests import nets

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Many(nn.Module):
    """Transposed and grouped convolutions, recurrent layers of two directions, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv1d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.up = nn.ConvTranspose1d(8, 6, 4, stride=2, padding=1, groups=2)
        self.norm2 = nn.BatchNorm1d(6)
        self.turned = nn.ConvTranspose1d(6, 8, 3, bias=False)
        self.norm3 = nn.BatchNorm1d(8)
        self.gru = nn.GRU(8, 6, batch_first=True, bidirectional=True, num_layers=2)
        self.rnn = nn.RNN(12, 6, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.wide(x)))
        x = torch.relu(self.norm2(self.up(x)))
        x = self.norm3(self.turned(x))
        x, _ = self.gru(x.transpose(1, 2))
        x, _ = self.rnn(x)
        x, _ = self.attention(x, x, x)
        return self.head(self.depthwise(x.transpose(1, 2)).mean(2))


class Solid(nn.Module):
    """Convolutions in three and two dimensions, a BatchNorm that no layer takes in, a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 3)
        self.turned = nn.ConvTranspose2d(8, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.layer_norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)
        self.register_buffer("positions", torch.arange(8 * 16.0).reshape(1, 8, 4, 4))

    def forward(self, x):
        x = torch.relu(self.conv(x)).flatten(1, 2)[:, :8] + self.positions
        x = self.norm(torch.relu(self.turned(x)))
        return self.head(self.layer_norm(x.mean((2, 3))))


def lived_in(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.data.uniform_(-1.0, 1.5)  # some negative
            module.bias.data.uniform_(-0.5, 0.5)
    return net.eval()


def many() -> nn.Module:
    torch.manual_seed(0)
    return lived_in(Many())


def solid() -> nn.Module:
    torch.manual_seed(0)
    return lived_in(Solid())


def example(name: str) -> torch.Tensor:
    torch.manual_seed(1)
    return {
        "tiny": lambda: torch.randn(3, 3, 8, 8),
        "words": lambda: nets.sentences()[:3],
        "many": lambda: torch.randn(3, 4, 10),
        "solid": lambda: torch.randn(3, 2, 6, 6, 6),
    }[name]()


NETS = {"tiny": nets.tiny, "words": nets.words, "many": many, "solid": solid}
PRUNED = {"method": "magnitude", "sparsity": 0.5}
CASES = [
    ("tiny", {"method": "rtn", "bits": 3}),
    ("tiny", {"method": "rtn", "bits": 8}),
    ("tiny", {"method": "rtn", "bits": 4, "group": 5}),
    ("tiny", {"method": "rtn", "bits": 3, "group": 0, "symmetric": True}),
    ("tiny", PRUNED),
    ("tiny", PRUNED | {"bits": 4, "quantizer": "gptq"}),
    ("tiny", {"method": "tucker", "keep": 0.6}),
    pytest.param("tiny", {"method": "spatial", "keep": 0.6}, marks=pytest.mark.slow),
    ("tiny", {"method": "dictionary", "keep": 0.5}),
    ("words", {"method": "rtn", "bits": 4}),
    ("words", {"method": "lowrank", "keep": 0.5, "bits": 4}),
    pytest.param("many", {"method": "rtn", "bits": 2}, marks=pytest.mark.slow),
    ("solid", {"method": "rtn", "bits": 5}),
    ("solid", {"method": "magnitude", "pattern": "channels", "sparsity": 0.5}),
]


def exported(net, settings, x, path, **more):
    artifact = fw.compress(net, x.repeat(4, *[1] * (x.ndim - 1)), recipe=recipe_of(settings)).artifact
    return artifact, fw.export_onnx(artifact, net, Batch((x,), {}), path, **more)


@pytest.mark.parametrize(
    ("name", "settings"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)
def test_computes_what_torch_computes(name, settings, tmp_path):
    net, x, path = NETS[name](), example(name), tmp_path / "net.onnx"
    before = {n: t.clone() for n, t in net.state_dict().items()}
    artifact, found = exported(net, settings, x, path)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert path.stat().st_size == found.bytes
    assert found.left == {}
    assert {p.samples for p in found.parity} == {1, 3}
    with torch.no_grad():
        expected = fill(net, artifact)(torch.cat([x, x]))
    got = torch.from_numpy(in_onnxruntime(path)([torch.cat([x, x]).numpy()])[0])  # a batch that nobody tried
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_no_weight_becomes_float32_again(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64))
    x, path = torch.randn(2, 8, 6, 6), tmp_path / "net.onnx"
    for bits, ratio in [(2, 1.1), (3, 1.15), (8, 1.1)]:
        _, found = exported(lived_in(net), {"method": "rtn", "bits": bits}, x, path)
        assert found.bytes <= ratio * found.file_bytes, bits
        proto = onnx.load(path)
        floats = [t for t in proto.graph.initializer if t.data_type == 1]
        assert max((len(t.raw_data) for t in floats), default=0) <= 4 * 64  # a scale for each row
        assert "BatchNormalization" not in found.operators
        assert found.opset == {2: 25}.get(bits, 20)
        assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_packed_by_frequency(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(128, 128, 3), nn.ReLU())
    net[0].weight.data.normal_()
    x = torch.randn(2, 128, 4, 4)
    _, plain = exported(net, {"method": "rtn", "bits": 4, "group": 0}, x, tmp_path / "a.onnx")
    _, tight = exported(net, {"method": "rtn", "bits": 4, "group": 0}, x, tmp_path / "b.onnx", tight=True)
    assert tight.bytes < 0.96 * plain.bytes


def test_recurrent_operators_read_the_stored_weights(tmp_path):
    path = tmp_path / "net.onnx"
    _, found = exported(nets.words(), {"method": "rtn", "bits": 4}, example("words"), path)
    graph = onnx.load(path).graph
    makers = {o: n.op_type for n in graph.node for o in n.output}
    (lstm,) = (n for n in graph.node if n.op_type == "LSTM")
    assert [makers[i] for i in lstm.input[1:3]] == ["DequantizeLinear"] * 2
    stored = Counter(t.data_type for t in graph.initializer)
    assert stored[21] >= 3  # uint4: both weights of the LSTM, the embedding that the head is tied to
    assert len(found.rows) == 3


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_inputs(bits, tmp_path):
    net, x = nets.tiny(), example("tiny")
    _, found = exported(net, {"method": "rtn", "bits": 8, "activations": bits}, x, tmp_path / "net.onnx")
    assert found.operators["QuantizeLinear"] == 3
    assert found.operators.get("Clip", 0) == (3 if bits < 8 else 0)
    assert found.left == {}


def test_factors_run_as_chains(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16))
    _, found = exported(lived_in(net), {"method": "tucker", "keep": 0.4}, torch.randn(2, 8, 6, 6), tmp_path / "n.onnx")
    assert found.operators["Conv"] == 3
    assert "BatchNormalization" not in found.operators


def test_a_mismatch_is_an_error_and_leaves_no_file(tmp_path, monkeypatch):
    right = exporting.fold_norms
    monkeypatch.setattr(exporting, "fold_norms", lambda *given: {n: 1.01 * scale for n, scale in right(*given).items()})
    with pytest.raises(
        FormatError, match=r"computes something else in onnxruntime: output 0 at \(\d+, \d+\) is .* in torch"
    ):
        exported(nets.tiny(), {"method": "rtn", "bits": 8}, example("tiny"), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


class Fixed(nn.Module):
    """Loops over its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return torch.stack([self.layer(row) * k for k, row in enumerate(x)])


class Ordered(nn.Module):
    """Has whole numbers that would fit into four bits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(256, 3)
        self.register_buffer("order", torch.randperm(16).repeat(16))

    def forward(self, x):
        return self.last(self.first(x)[:, self.order])


def test_constants_take_no_type_that_the_set_of_operators_lacks(tmp_path):
    artifact = fw.compress(Ordered(), torch.randn(32, 6), recipe=recipe_of({"method": "rtn", "bits": 8})).artifact
    found = fw.export_onnx(artifact, Ordered(), torch.randn(4, 6), tmp_path / "net.onnx")
    assert found.opset == 20


def test_a_fixed_batch_size_is_told(tmp_path):
    _, found = exported(Fixed().eval(), {"method": "rtn", "bits": 8}, torch.randn(3, 4), tmp_path / "net.onnx")
    assert any("batch size is fixed at 3" in note for note in found.notes)
    assert {p.samples for p in found.parity} == {3}


def test_only_the_batch_is_called_so():
    dims = {"x": ["s1", 4], "z": ["s2"], "y": ["5*s1", 4], "same": ["s1"]}
    known = {k: onnx.helper.make_tensor_value_info(k, 1, v) for k, v in dims.items()}

    def graph():
        own = onnx.helper.make_graph([], "g", [known["x"], known["z"]], [known["y"], known["same"]])
        return onnx.helper.make_model(own)

    def found(model):
        sides = {v.name: v.type.tensor_type.shape.dim for v in (*model.graph.input, *model.graph.output)}
        return {k: [d.dim_param or d.dim_value for d in own] for k, own in sides.items()}

    named, fixed = graph(), graph()
    name_batch(named.graph)
    fix_batch(fixed, 3)
    assert found(named) == {"x": ["batch", 4], "z": ["batch_2"], "y": [0, 4], "same": ["batch"]}
    assert found(fixed) == {"x": [3, 4], "z": [3], "y": [0, 4], "same": [3]}


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


def test_what_torch_cannot_export_is_refused_in_one_line(tmp_path):
    with pytest.raises(UsageError, match="torch cannot export Branching to ONNX: "):
        exported(Branching().eval(), {"method": "rtn", "bits": 8}, torch.randn(3, 4), tmp_path / "net.onnx")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_than_float32_are_refused_and_float_helps(dtype, tmp_path):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 3)).to(dtype).eval(), torch.randn(3, 4)
    artifact = fw.compress(net, x.to(dtype), recipe=recipe_of({"method": "rtn", "bits": 8})).artifact
    for export in (fw.export_onnx, fw.export_int8):
        with pytest.raises(UsageError, match=r"'0.weight' is float(16|64): export model.float\(\)"):
            export(artifact, net, [Batch((x.to(dtype),), {})], tmp_path / "net.onnx")
    assert fw.export_onnx(artifact, net.float(), Batch((x,), {}), tmp_path / "net.onnx").left == {}


def test_an_lstm_with_projections_is_refused_by_name(tmp_path):
    net = nn.ModuleDict({"speech": nn.LSTM(4, 6, proj_size=3)})
    for export in (fw.export_onnx, fw.export_int8):
        with pytest.raises(UsageError, match=r"^'speech' is an LSTM with projections \(proj_size=3\), for which"):
            export(fw.compress(nn.Linear(4, 3)).artifact, net, [torch.zeros(2, 4)], tmp_path / "net.onnx")


def test_a_graph_that_is_none_or_too_large_is_an_error_in_one_line(monkeypatch):
    constant = onnx.numpy_helper.from_array(np.zeros(1000, np.float32), "c")
    y = onnx.helper.make_tensor_value_info("y", 1, [1000])
    node = onnx.helper.make_node("Neg", ["c"], ["y"])
    right, wrong = (
        onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [y], [constant]))
        for nodes in ([node], [node] * 2)
    )
    check_graph(right)
    with pytest.raises(FormatError, match=r"^the exported graph is no valid ONNX: ValidationError: .*$"):
        check_graph(wrong)
    monkeypatch.setattr(graphs, "LARGEST", 3000)
    with pytest.raises(UsageError, match=r"takes 0.00 GB in ONNX, .* at most: export a .pt2 file$"):
        check_graph(right)
    with pytest.raises(UsageError, match=r"at most: export a .pt2 file$"):
        int8_graph(right, None, [{}])


def test_a_file_made_for_speed_is_told_of_export_int8(tmp_path):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(8, 4)
    recipe = recipe_of({"method": "rtn", "bits": 8, "activations": 8})
    fw.compress(net, x, recipe=recipe, about={"for": "speed"}).save(tmp_path / "small.fw")
    found = fw.export_onnx(tmp_path / "small.fw", net, x, tmp_path / "net.onnx")
    assert any("export_int8" in note for note in found.notes)
    assert fw.export_int8(tmp_path / "small.fw", net, x, tmp_path / "int8.onnx").exact == 1


def test_missing_packages_print_the_install_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UsageError, match=r"pip install onnx onnxscript onnxruntime"):
        exported(nets.tiny(), {"method": "rtn", "bits": 8}, example("tiny"), tmp_path / "net.onnx")


def test_a_constant_that_is_a_number_stays_one():
    graph = Graph(onnx.GraphProto())
    graph.put("one", np.array(3.0, np.float32))
    graph.put("turned", np.arange(6.0).reshape(2, 3).T)
    assert graph.array("one").shape == ()
    assert graph.array("turned").tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.fixture
def small(run, tmp_path):
    file = tmp_path / "small.fw"
    code, *_ = run("compress", "tests/nets.py:tiny", "--method", "rtn", "--bits", 4, "-o", file)
    assert code == 0
    return file


def test_the_command(run, small, tmp_path):
    path = tmp_path / "small.onnx"
    model = "--model", "tests/nets.py:tiny"
    code, text, _ = run("export", small, path, *model, "--input-shape", "3,8,8", "--json")
    assert code == 0
    found = json.loads(text)
    assert found["bytes"] == path.stat().st_size
    assert found["source_bytes"] == small.stat().st_size
    assert found["parity"][0]["runtime"] == "onnxruntime"
    proto = onnx.load(path)
    assert {p.key: p.value for p in proto.metadata_props}["featherweight.digest"] == fw.artifact.read(small).digest()
    code, text, _ = run("export", small, path, *model, "--data", "tests/nets.py:images", "--smallest")
    assert code == 0
    assert "the same outputs as torch" in text


def test_bad_requests(run, small, tmp_path):
    model = "--model", "tests/nets.py:tiny"
    for args, said in [
        ((tmp_path / "a.xyz", *model), "must end in"),
        ((tmp_path / "a.onnx", *model), "--input-shape 3,32,32"),
        ((tmp_path / "a.onnx", *model, "--input-shape", "3,x"), "whole numbers"),
        (
            (tmp_path / "a.onnx", *model, "--input-shape", "4,8,8"),
            "does not accept the data (torch.float32 (2, 4, 8, 8))",
        ),
        ((tmp_path / "a.onnx", "--model", "tests/nets.py:words", "--input-shape", "3,8,8"), "does not fit"),
        ((small, *model, "--input-shape", "3,8,8"), "must end in"),
        ((tmp_path / "no" / "a.onnx", *model, "--input-shape", "3,8,8"), "does not exist"),
    ]:
        code, _, err = run("export", small, *args)
        assert code == 2, args
        assert said in " ".join(err.split()), args
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.fw"]


@pytest.mark.real
def test_a_real_lstm_takes_what_our_file_takes(zoo, tmp_path):
    model, data = zoo.lstm_speech(), zoo.speech_calibration()
    artifact = fw.compress(model, data.tensors[0][:64], recipe=recipe_of({"method": "rtn", "bits": 4})).artifact
    found = fw.export_onnx(artifact, model, Batch((data.tensors[0][:8],), {}), tmp_path / "net.onnx")
    assert found.operators["LSTM"] == 1
    assert found.bytes <= 1.02 * found.file_bytes


def test_rounded_inputs_are_compared_by_root_mean_square():
    expected = torch.tensor([[3.0, -4.0, 0.0, 0.0]])
    near, far = expected + torch.tensor([0.0, 0.0, 0.9, 0.0]), expected + torch.tensor([0.0, 0.0, 1.4, 0.0])
    example = [expected.numpy()]
    assert parity._difference("it", example, [near.numpy()], True) == pytest.approx(0.9 / 4)
    with pytest.raises(FormatError, match=r"0\.28 of the root mean square, allowed 0\.25"):
        parity._difference("it", example, [far.numpy()], True)
    with pytest.raises(FormatError, match=r"of the largest output, allowed 0\.0001"):
        parity._difference("it", example, [near.numpy()], False)
