"""Int8 graphs: what they are made of, and that they compute what the network does."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from featherweight import compress
from featherweight.activations import ActivationGrid, best_grid, simulate
from featherweight.artifact import fill
from featherweight.data import Batch, batches
from featherweight.demo import digits
from featherweight.errors import UsageError
from featherweight.export.codes import codes_of
from featherweight.export.fast import export_int8
from featherweight.export.graph import graph_of
from featherweight.export.int8 import int8_graph
from featherweight.export.structure import structure, tidied
from featherweight.methods import Gptq, GridSpec
from featherweight.recipe import Recipe
from tests.nets import images, tiny

QUIET = lambda *_: None  # noqa: E731
FLOAT = {"Conv", "FusedConv", "Gemm", "MatMul", "FusedMatMul", "Add", "Relu", "Clip", "ReduceMean", "GlobalAveragePool"}


def runs(model, inputs, folder, level="ORT_ENABLE_ALL") -> tuple[np.ndarray, set[str]]:
    """The output, and the operators that onnxruntime makes of the graph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "made.onnx"), 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    made = {n.op_type for n in onnx.load(folder / "made.onnx").graph.node}
    return session.run(None, {session.get_inputs()[0].name: inputs})[0], made


def small(make, data, activations=8):
    recipe = Recipe(Gptq(GridSpec(8, symmetric=True)), activations=activations)
    return compress(make(), data, recipe=recipe).artifact


def feeds(model: onnx.ModelProto, inputs: torch.Tensor) -> list[dict[str, np.ndarray]]:
    return [{model.graph.input[0].name: x.numpy()} for x in inputs.split(32)]


@pytest.fixture(scope="module")
def digits_file():
    return small(digits.make, digits.calibration())


def test_digits_keep_their_accuracy_and_compute_in_int8_alone(digits_file, tmp_path):
    found = export_int8(digits_file, digits.make(), batches(digits.calibration()), tmp_path / "int8.onnx", QUIET)
    assert found.exact == found.weights == 9
    assert found.difference < 0.02
    inputs, labels = digits.test().tensors
    scores, made = runs(onnx.load(tmp_path / "int8.onnx"), inputs.numpy(), tmp_path)
    assert not made & FLOAT
    assert {"QLinearConv", "QLinearAdd", "QGemm", "QLinearGlobalAveragePool"} <= made
    with torch.no_grad():
        dense = 100 * float((digits.make()(inputs).argmax(1) == labels).float().mean())
    assert 100 * float((scores.argmax(1) == labels.numpy()).mean()) >= dense - 0.4


def test_codes_and_grids_are_those_of_the_file(digits_file, tmp_path):
    export_int8(digits_file, digits.make(), batches(digits.calibration()), tmp_path / "int8.onnx", QUIET)
    written = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    net, x = fill(digits.make(), digits_file), digits.calibration().tensors[0][:2]
    simulate(net, {})
    folded = structure(tidied(graph_of(net, Batch((x,), {})))).constants
    for unit in digits_file.units:
        codes = written[f"{unit.names[0]}_codes"][:, : unit.view.shape[1]].reshape(len(unit.weight.codes), -1)
        file = unit.weight.codes.numpy().astype(int) - 128
        turned = (folded[unit.names[0]].reshape(file.shape) * file).sum(1, keepdims=True) < 0  # by a BatchNorm
        assert (codes == np.where(turned, -file, file).clip(-128, 127)).all()
        assert unit.view.shape[1] == 1 or any(  # the input of a depthwise layer is scaled
            value.ndim == 0 and value == np.float32(unit.input.scale)
            for name, value in written.items()
            if name.endswith("_scale")
        )


def test_a_network_with_groups_and_a_mean_is_all_int8(tmp_path):
    artifact = small(tiny, images())
    found = export_int8(artifact, tiny(), batches(images(), 32), tmp_path / "int8.onnx", QUIET)
    assert found.same > 0.9
    _, made = runs(onnx.load(tmp_path / "int8.onnx"), images().tensors[0].numpy(), tmp_path)
    assert not made & FLOAT


@pytest.mark.parametrize("activations", [8, None])
def test_int8_is_what_the_written_grids_say(activations, tmp_path):
    """Computed in float between the grids, as the graph reads, and in int8, as onnxruntime fuses it: one step apart."""
    artifact = small(tiny, images(), activations)
    export_int8(artifact, tiny(), batches(images(), 32), tmp_path / "int8.onnx", QUIET)
    model, inputs = onnx.load(tmp_path / "int8.onnx"), images(64, 2).tensors[0].numpy()
    exact, plain = runs(model, inputs, tmp_path, "ORT_DISABLE_ALL")
    fused, _ = runs(model, inputs, tmp_path)
    assert "Conv" in plain
    assert np.sqrt(((exact - fused) ** 2).mean() / (exact**2).mean()) < 0.02


def test_biases_take_up_the_mean_of_what_rounding_changes(tmp_path):
    """With weights and inputs rounded coarsely before the pass, outputs of the last layer have the float mean."""
    net, data = tiny(), images(256)
    artifact = small(tiny, data, None)
    simulate(net, {})
    proto = graph_of(net, Batch((data.tensors[0][:2],), {}))
    made = int8_graph(proto, artifact, feeds(proto, data.tensors[0]))
    scores, _ = runs(made, data.tensors[0].numpy(), tmp_path, "ORT_DISABLE_ALL")
    dense, _ = runs(proto, data.tensors[0].numpy(), tmp_path)
    spread = dense.std()
    assert np.abs((scores - dense).mean(0)).max() < 0.004 * spread
    assert np.abs(scores - dense).max() > 0.004 * spread  # it is rounded, after all


def test_rows_turned_round_by_a_norm_keep_their_codes():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([1.0, -0.5, 2.0, -3.0]))
    x = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    artifact = small(lambda: net, x, None)
    proto = tidied(graph_of(fill(net, artifact), Batch((x[:2],), {})))
    node = next(n for n in proto.graph.node if n.op_type == "Conv")
    weight = structure(proto).constants[node.input[1]]
    unit = artifact.units[0]
    codes = codes_of(node, weight, {node.input[1]: unit})
    signs = np.array([1, -1, 1, -1])
    assert codes.exact
    assert (codes.scale > 0).all()
    file = (unit.weight.codes.numpy().astype(int) - 128) * signs[:, None]
    assert (codes.codes.reshape(4, -1) == file.clip(-128, 127)).all()
    assert codes_of(node, weight + 0.01, {node.input[1]: unit}).exact is False


def test_ranges_are_the_best_of_all_that_a_finer_search_finds():
    random = np.random.default_rng(0)
    values = np.concatenate([random.normal(size=2000), random.normal(size=20) * 6]).clip(0)
    found = best_grid(torch.from_numpy(values), 8)
    assert found is not None

    def error(grid: ActivationGrid) -> float:
        return float((grid.simulate(torch.from_numpy(values)) - torch.from_numpy(values)).square().sum())

    tops = np.linspace(0.02, 1, 500) * values.max()
    best = min(error(ActivationGrid(8, float(np.float32(t / 255)), 0)) for t in tops)
    assert error(found) <= 1.002 * best


def test_moves_work_on_codes(tmp_path):
    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8 * 16, 5)

        def forward(self, x):
            y = torch.relu(self.conv(x))
            y = nn.functional.max_pool2d(y, 2) + nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
            return self.out(y.flatten(1))

    torch.manual_seed(0)
    net, x = Moves().eval(), torch.randn(64, 4, 8, 8)
    proto = graph_of(net, Batch((x[:2],), {}))
    made = int8_graph(proto, None, feeds(proto, x))
    scores, names = runs(made, x.numpy(), tmp_path)
    assert not names & FLOAT
    with torch.no_grad():
        dense = net(x).numpy()
    assert np.abs(scores - dense).max() < 0.05 * np.abs(dense).max()


def test_what_stays_float_is_left_as_it_is(tmp_path):
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x):
            return torch.softmax(self.b(self.norm(torch.tanh(self.a(x)))), 1)

    torch.manual_seed(0)
    net, x = Mixed().eval(), torch.randn(64, 6)
    proto = graph_of(net, Batch((x[:2],), {}))
    scores, names = runs(int8_graph(proto, None, feeds(proto, x)), x.numpy(), tmp_path)
    assert "QGemm" in names
    with torch.no_grad():
        assert np.abs(scores - net(x).numpy()).max() < 0.03


def test_bad_samples_are_refused():
    net, x = tiny(), images().tensors[0]
    proto = graph_of(net, Batch((x[:2],), {}))
    with pytest.raises(UsageError, match="needs calibration samples"):
        int8_graph(proto, None, [])
    with pytest.raises(UsageError, match="NaN or infinite"):
        int8_graph(proto, None, feeds(proto, torch.full_like(x[:4], float("nan"))))
    nothing = graph_of(nn.Sequential(nn.Tanh()), Batch((x[:2],), {}))
    with pytest.raises(UsageError, match="no convolution or linear layer"):
        int8_graph(nothing, None, feeds(nothing, x[:4]))


def test_an_input_that_is_always_zero_is_rounded_all_the_same(tmp_path):
    net = nn.Sequential(nn.Linear(4, 3)).eval()
    proto = graph_of(net, Batch((torch.zeros(2, 4),), {}))
    made = int8_graph(proto, None, feeds(proto, torch.zeros(8, 4)))
    scores, _ = runs(made, np.zeros((2, 4), np.float32), tmp_path)
    assert np.abs(scores - net[0].bias.detach().numpy()).max() < 1e-3


def test_norms_that_torch_leaves_in_the_graph_are_folded():
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 2, 5, 5])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    random = np.random.default_rng(0)
    constants = {"w": random.normal(size=(3, 2, 3, 3)), "s": random.normal(size=3), "b": random.normal(size=3)}
    constants |= {"m": random.normal(size=3), "v": random.uniform(0.5, 2, 3)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["y"]),
    ]
    kept = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], kept), opset_imports=[helper.make_opsetid("", 20)], ir_version=9
    )
    folded = tidied(model)
    assert [n.op_type for n in folded.graph.node] == ["Conv"]
    assert [n.op_type for n in model.graph.node] == ["Conv", "BatchNormalization"]
    feed = random.normal(size=(4, 2, 5, 5)).astype(np.float32)
    one, two = (
        onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": feed})[
            0
        ]
        for m in (model, folded)
    )
    assert np.abs(one - two).max() < 1e-5


class Speech(nn.Module):
    """An embedding, recurrent layers of two directions, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(12, 5)
        self.lstm = nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True)

    def forward(self, ids):
        return self.head(self.lstm(self.embedding(ids))[0].mean(1))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(8, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.gru(x)[0].mean(1))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class Patches(nn.Module):
    """A transformer of image patches, of which the first token goes to the head: a Gather by a number, not a list."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.layer = nn.Conv2d(3, 8, 4, 4), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.first, self.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.layer(x)[:, 0])


INPUTS = {Speech: lambda: torch.randint(11, (32, 7)), Patches: lambda: torch.randn(32, 3, 8, 8)}


@pytest.mark.parametrize("make", [Speech, Gated, Attending, Patches])
def test_shapes_that_a_graph_computes_stay_whole_numbers(make, tmp_path):
    torch.manual_seed(0)
    net, x = make().eval(), INPUTS.get(make, lambda: torch.randn(32, 7, 8))()
    found = export_int8(small(lambda: net, x), net, batches(x), tmp_path / "int8.onnx", QUIET)
    assert found.weights >= 1
    assert found.difference < 0.05


def test_a_node_that_cannot_run_is_an_error_in_one_line():
    net = nn.Sequential(nn.Linear(4, 3), nn.Flatten(), nn.Linear(3, 2)).eval()
    proto = graph_of(net, Batch((torch.zeros(2, 4),), {}))
    with pytest.raises(UsageError, match=r"^onnxruntime does not run Gemm '.*': .*$"):
        int8_graph(proto, None, feeds(proto, torch.zeros(8, 5)))


class Tied(nn.Module):
    """A table that the head reads as well, and a layer that has no int8 form."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.head.weight, self.up = self.table.weight, nn.ConvTranspose1d(8, 8, 2)

    def forward(self, ids):
        return self.head(self.up(self.table(ids).transpose(1, 2)).transpose(1, 2))


def test_tables_and_turned_matrices_keep_the_codes_of_the_file_and_floats_are_named(tmp_path):
    torch.manual_seed(0)
    net, x = Tied().eval(), torch.randint(11, (32, 7))
    artifact = small(lambda: net, x)
    found = export_int8(artifact, net, batches(x), tmp_path / "int8.onnx", QUIET)
    assert found.exact == found.weights == 1
    assert found.left == {"up.weight": "float32 in the int8 graph: ConvTranspose has no int8 form for it"}
    written = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    table = next(v for k, v in written.items() if k.endswith("_table"))
    codes = next(u for u in artifact.units if len(u.names) == 2).weight.codes.numpy().astype(int) - 128
    assert (table == codes.clip(-128, 127)).all()
    assert not any(v.dtype == np.float32 and v.shape == (11, 8) for v in written.values())
