"""Checkpoints of compressed-tensors: read by a decoder that was written from the format alone, and by the package
where it is installed."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import featherweight as fw
from featherweight.artifact import fill
from featherweight.errors import FormatError, UsageError
from featherweight.export import packed
from featherweight.export.packed import packed_words, unpacked_words
from featherweight.recipe import recipe_of
from tests.export.nets import convs, words
from tests.export.test_doors import SETTINGS


def bits_of(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The integers in a row of int32 words, one bit at a time: bit i of a value is worth 2^i, without gaps."""
    stream = [(int(w) & 0xFFFFFFFF) >> k & 1 for w in words for k in range(32)]
    return np.array([sum(stream[i * bits + k] << k for k in range(bits)) for i in range(count)]) - 2 ** (bits - 1)


def decoded(tensors: dict, layer: str, args: dict) -> np.ndarray:
    """A weight, by what compressed-tensors documents: (value - zero point) * scale, in the type of the scale."""
    of = {n.removeprefix(f"{layer}.weight_"): t for n, t in tensors.items() if n.startswith(f"{layer}.weight_")}
    rows, cols = of["shape"].tolist()
    bits, scale = args["num_bits"], of["scale"].numpy()
    values = np.stack([bits_of(row, bits, cols) for row in of["packed"].numpy()])
    zero = np.zeros_like(scale)
    if not args["symmetric"] and args["strategy"] == "tensor":
        zero = of["zero_point"].numpy().astype(scale.dtype)
    elif not args["symmetric"]:
        zero = np.stack([bits_of(column, bits, rows) for column in of["zero_point"].numpy().T], axis=1)
    if args["strategy"] == "group":
        scale, zero = (np.repeat(t, args["group_size"], axis=1) for t in (scale, zero))
    return (values.astype(scale.dtype) - zero.astype(scale.dtype)) * scale


def written(net, data, settings, folder):
    artifact = fw.compress(net, data, recipe=recipe_of(settings)).artifact
    done = fw.export_compressed_tensors(artifact, net, folder)
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    args = {name: g["weights"] for g in said["config_groups"].values() for name in g["targets"]}
    return done, said, args, load_file(folder / "model.safetensors"), fill(type(net)(), artifact).state_dict()


@given(st.data(), st.integers(1, 8), st.integers(1, 5), st.integers(1, 70))
def test_words_hold_every_code_side_by_side(data, bits, rows, cols):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=rows * cols, max_size=rows * cols))
    matrix = torch.tensor(codes, dtype=torch.uint8).reshape(rows, cols)
    words = packed_words(matrix, bits)
    assert words.shape == (rows, -(-cols * bits // 32))
    assert words.dtype == torch.int32
    for row, own in zip(words.numpy(), matrix.numpy(), strict=True):
        assert np.array_equal(bits_of(row, bits, cols) + 2 ** (bits - 1), own)
    assert torch.equal(unpacked_words(words, bits, cols), matrix)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_layers_decode_to_the_networks_weights(settings, tmp_path):
    net, data = words()
    _, said, args, tensors, state = written(net, data, settings, tmp_path / "out")
    for layer, own in args.items():
        assert np.array_equal(decoded(tensors, layer, own), state[f"{layer}.weight"].numpy())
        assert f"{layer}.weight" not in tensors
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        ties = file.metadata()
    for name, tensor in state.items():
        if name.removesuffix(".weight") not in args:
            assert torch.equal(tensors[ties.get(name, name)], tensor)
    assert set(args) | set(said["ignore"]) == {"embedding", "out", "attention.out_proj"}


@pytest.mark.parametrize(
    ("settings", "scheme"),
    [
        ("grid", {"num_bits": 4, "strategy": "channel", "symmetric": False, "group_size": None}),
        ("groups", {"num_bits": 3, "strategy": "group", "symmetric": False, "group_size": 4}),
        ("one scale", {"num_bits": 6, "strategy": "tensor", "symmetric": True, "group_size": None}),
        ("8 bits", {"num_bits": 8, "strategy": "channel", "symmetric": False, "group_size": None}),
    ],
)
def test_grids_stay_packed(settings, scheme, tmp_path):
    net, data = words()
    done, said, args, _, _ = written(net, data, SETTINGS[settings], tmp_path / "out")
    assert set(args) == {"embedding", "out", "attention.out_proj"}
    assert all(own == scheme | {"type": "int", "dynamic": False} for own in args.values())
    assert said["format"] == "pack-quantized"
    assert said["ignore"] == []
    rows = {w.name: w for w in done.weights}
    assert rows["out.weight"].note == "embedding.weight again: the format ties no packed weights"
    assert rows["lstm.weight_ih_l0"].note.startswith("recurrent layers are no part of the format")
    assert rows["attention.in_proj_weight"].note.startswith("the joined projections of nn.MultiheadAttention are no")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("additive", "no books"),
        ("sparse grid", "no masks"),
        ("low rank", "no factors"),
        ("1 bit", "at 1 bit without zero points"),
        ("uneven groups", "7 does not divide 8 columns"),
    ],
)
def test_what_does_not_fit_is_dense_and_named(settings, reason, tmp_path):
    net, data = words()
    done, _, args, tensors, _ = written(net, data, SETTINGS[settings], tmp_path / "out")
    assert args == {}
    assert reason in next(w.note for w in done.weights if w.name == "embedding.weight")
    assert "no layer fits" in " ".join(done.notes)
    assert "embedding.weight" in tensors


@pytest.mark.parametrize(
    ("net", "shape", "reason"),
    [
        (nn.Sequential(nn.Conv1d(4, 4, 3)), (4, 9), "convolutions are no part of the format"),
        (nn.Linear(4, 4), (4,), "this layer is the whole network"),
    ],
)
def test_layers_that_the_format_has_not_are_named(net, shape, reason, tmp_path):
    artifact = fw.compress(net.eval(), torch.randn(8, *shape), recipe=recipe_of(SETTINGS["grid"])).artifact
    done = fw.export_compressed_tensors(artifact, net, tmp_path / "out")
    assert reason in done.weights[0].note


def test_it_is_small(tmp_path):
    net = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    artifact = fw.compress(net, recipe=recipe_of({"method": "rtn", "bits": 3})).artifact
    done = fw.export_compressed_tensors(artifact, net, tmp_path / "out")
    packed = 320 * 256 * 3 / 8
    assert packed < done.bytes < packed + 320 * 12 + 3_000  # scales, zero points, biases; headers


def test_types_of_scales_are_the_networks_where_that_is_exact(tmp_path):
    net = nn.Sequential(nn.Linear(16, 8)).eval()
    artifact = fw.compress(net, recipe=recipe_of({"method": "rtn", "bits": 4})).artifact
    for dtype, expected in ((torch.float16, torch.float16), (torch.bfloat16, torch.float32)):
        fw.export_compressed_tensors(artifact, nn.Sequential(nn.Linear(16, 8)).to(dtype), tmp_path / str(dtype))
        assert load_file(tmp_path / str(dtype) / "model.safetensors")["0.weight_scale"].dtype == expected


def test_the_networks_own_config_is_kept(tmp_path):
    class Config:
        def to_dict(self):
            return {"model_type": "mine", "layers": 1}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.fc = Config(), nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(x)

    artifact = fw.compress(Net().eval(), recipe=recipe_of({"method": "rtn", "bits": 4})).artifact
    fw.export_compressed_tensors(artifact, Net(), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert config == {"model_type": "mine", "layers": 1}


def test_a_folder_with_something_in_it_is_not_replaced(tmp_path):
    net, data = convs()
    artifact = fw.compress(net, data, recipe=recipe_of({"method": "rtn", "bits": 4})).artifact
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists already and is not replaced"):
        fw.export_compressed_tensors(artifact, net, tmp_path / "out")
    with pytest.raises(UsageError, match="does not exist"):
        fw.export_compressed_tensors(artifact, net, tmp_path / "no" / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "notes.txt"]


def test_what_reads_back_otherwise_is_not_written(tmp_path, monkeypatch):
    net, data = words()
    artifact = fw.compress(net, data, recipe=recipe_of({"method": "rtn", "bits": 4})).artifact
    monkeypatch.setattr(packed, "unpacked_words", lambda words, bits, cols: unpacked_words(words, bits, cols) ^ 1)
    with pytest.raises(FormatError, match="would read back otherwise"):
        fw.export_compressed_tensors(artifact, net, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the package itself
installed = importlib.util.find_spec("compressed_tensors") is not None


@pytest.mark.skipif(not installed, reason="needs pip install compressed-tensors")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", ["grid", "groups", "one scale", "8 bits", "rate"])
def test_compressed_tensors_decodes_the_same(settings, tmp_path):
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    net, data = words()
    _, said, args, tensors, state = written(net, data, SETTINGS[settings], tmp_path / "out")
    config = QuantizationConfig.model_validate(said)
    schemes = {name: s for s in config.config_groups.values() for name in s.targets}
    assert set(schemes) == set(args) != set()
    for layer, scheme in schemes.items():
        own = {n.removeprefix(f"{layer}."): t for n, t in tensors.items() if n.startswith(f"{layer}.")}
        assert set(PackedQuantizationCompressor.compression_param_names(scheme)) <= set(own)
        found = PackedQuantizationCompressor.decompress(own, scheme)
        assert torch.equal(found["weight"], state[f"{layer}.weight"])
