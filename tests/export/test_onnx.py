"""ONNX models of every kind of stored weight compute what torch does, and are about as small as the file."""

from importlib import import_module

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import featherweight as fw
from featherweight.artifact.write import plain_bytes
from featherweight.data import batches
from featherweight.errors import FormatError, UsageError
from featherweight.recipe import recipe_of

onnx = pytest.importorskip("onnx", reason="needs pip install 'featherweight[onnx]'")
ort = pytest.importorskip("onnxruntime", reason="needs pip install 'featherweight[onnx]'")
pytest.importorskip("onnxscript", reason="needs pip install 'featherweight[onnx]'")


class Convs(nn.Module):
    """Plain, grouped, depthwise and transposed convolutions, norms, a linear layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.second = nn.BatchNorm2d(16)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2, groups=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = self.second(self.depthwise(self.grouped(x).relu()))
        return self.fc(self.up(x).relu().mean(dim=(2, 3)))


class Words(nn.Module):
    """Embedding, LSTM, GRU, attention, a tied weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.lstm = nn.LSTM(8, 6, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(12, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, indices):
        x, _ = self.lstm(self.embedding(indices))
        x, _ = self.gru(x)
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.out(self.norm(x + y))


@pytest.fixture(scope="module")
def convs():
    torch.manual_seed(0)
    net = Convs()
    for _ in range(5):
        net(torch.randn(16, 3, 8, 8))
    return net.eval().requires_grad_(False), TensorDataset(torch.randn(32, 3, 8, 8), torch.randint(5, (32,)))


@pytest.fixture(scope="module")
def words():
    torch.manual_seed(0)
    net = Words().eval().requires_grad_(False)
    return net, torch.randint(11, (32, 7), generator=torch.Generator().manual_seed(1))


GRIDS = [{"method": "rtn", "bits": bits, "symmetric": s} for bits in (2, 3, 4, 7, 8) for s in (True, False)]
GRIDS += [{"method": "rtn", "bits": 1, "symmetric": True}]
GRIDS += [{"method": "rtn", "bits": bits, "group": group} for bits in (2, 3, 4, 8) for group in (0, 9)]
OTHERS = [
    {"method": "ecq", "bits": 2.5},
    {"method": "additive", "bits": 2},
    {"method": "additive", "bits": 3},
    {"method": "magnitude", "sparsity": 0.5},
    {"method": "magnitude", "sparsity": 0.5, "bits": 3},
    {"method": "magnitude", "sparsity": 0.6, "bits": 1, "symmetric": True},
    {"method": "magnitude", "pattern": "2:4", "bits": 4},
    {"method": "magnitude", "pattern": "rows", "sparsity": 0.5},
    {"method": "magnitude", "sparsity": 0.5, "quantizer": "additive", "bits": 2},
]
FACTORS = [{"method": m, "keep": 0.6} for m in ("lowrank", "spatial", "tucker", "tt", "tr", "cp", "dictionary")]
FACTORS += [{"method": "lowrank", "keep": 0.6, "bits": 4}, {"method": "tucker", "keep": 0.6, "bits": 8}]


def named(settings):
    return " ".join(str(v) for v in settings.values())


def exported(net, data, settings, path):
    artifact = fw.compress(net, data, recipe=recipe_of(settings)).artifact
    return artifact, fw.export_onnx(artifact, net, batches(data, 8)[0], path)


@pytest.mark.parametrize("settings", GRIDS + OTHERS + FACTORS, ids=named)
def test_convolutions(convs, settings, tmp_path):
    net, data = convs
    artifact, done = exported(net, data, settings, tmp_path / "small.onnx")
    assert all(p.difference < 1e-4 for p in done.parity)
    assert done.bytes == (tmp_path / "small.onnx").stat().st_size
    model = onnx.load(tmp_path / "small.onnx")
    large = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.raw_data) > 256]
    assert not large, [t.name for t in large]
    session = ort.InferenceSession(tmp_path / "small.onnx")
    x = data.tensors[0][:3]
    want = fw.artifact.fill(Convs(), artifact)(x)
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings", [GRIDS[2], GRIDS[4], GRIDS[8], GRIDS[-1], *OTHERS[:2], OTHERS[4], FACTORS[0]], ids=named
)
def test_recurrent_attention_and_tied(words, settings, tmp_path):
    net, data = words
    _, done = exported(net, data, settings, tmp_path / "small.onnx")
    model = onnx.load(tmp_path / "small.onnx")
    kinds = [n.op_type for n in model.graph.node]
    assert kinds.count("LSTM") == 1
    assert kinds.count("GRU") == 1
    assert all(p.difference < 1e-4 for p in done.parity)


def test_size_is_about_that_of_the_file(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).eval()
    for settings, most in (({"method": "rtn", "bits": 3}, 1.1), ({"method": "rtn", "bits": 4}, 1.05)):
        artifact, done = exported(net, torch.randn(16, 256), settings, tmp_path / "small.onnx")
        assert done.bytes < most * len(plain_bytes(artifact))


def test_a_wrong_model_is_not_written(convs, tmp_path, monkeypatch):
    onnx_module = import_module("featherweight.export.onnx")
    net, data = convs
    monkeypatch.setattr(onnx_module, "TOLERANCE", -1.0)
    with pytest.raises(FormatError):
        exported(net, data, {"method": "rtn", "bits": 4}, tmp_path / "small.onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_same_file_gives_the_same_bytes(convs, tmp_path):
    net, data = convs
    for name in ("a", "b"):
        exported(net, data, {"method": "additive", "bits": 2}, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_networks_that_cannot_be_exported_say_why(tmp_path):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            x = self.fc(x)
            return x * 2 if float(x.sum()) > 0 else x

    with pytest.raises(UsageError, match=r"torch cannot export Branches to ONNX: .+"):
        exported(Branches().eval(), torch.randn(8, 4), {"method": "rtn", "bits": 4}, tmp_path / "small.onnx")
