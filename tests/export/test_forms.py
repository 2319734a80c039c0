"""Every stored form of a weight, written as ONNX operators, decodes in onnxruntime to what `dense()` gives."""

from math import prod

import pytest
import torch
from torch import Tensor

from featherweight.export.forms import Place, permuted, written
from featherweight.export.nodes import Nodes
from featherweight.layers import View
from featherweight.weights import Codebook, Factors, Grid, Sparse
from tests.contract.test_weights import INSTANCES

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
helper = onnx.helper


def decoded(b: Nodes, value: str, dims: int = 2) -> Tensor:
    """What onnxruntime makes of it, the file being of the lowest version that can hold it."""
    outputs = [helper.make_tensor_value_info(value, 1, [None] * dims)]
    graph = helper.make_graph(b.nodes, "g", [], outputs, b.constants)
    version = {18: 8, 20: 9, 21: 10, 25: 13}[b.opset]
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", b.opset)], ir_version=version)
    onnx.checker.check_model(model)
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {})[0])


def agrees(found: Tensor, expected: Tensor, weight: object) -> bool:
    """To the last bit, but for sums of products and for rows that were multiplied with in another order."""
    assert found.shape == expected.shape
    if not isinstance(weight, Factors):
        return torch.equal(found, expected)
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize("name", INSTANCES)
def test_decodes_to_the_same_bits(name):
    weight = INSTANCES[name]
    b = Nodes()
    value = written(b, weight, Place(View(weight.shape)), None, "w")
    assert agrees(decoded(b, value), weight.dense(), weight)


@pytest.mark.parametrize("name", [n for n, w in INSTANCES.items() if w.shape[0] > 1])
def test_rows_are_turned_and_multiplied(name):
    weight = INSTANCES[name]
    rows = torch.linspace(-1, 2, weight.shape[0])
    order = torch.randperm(weight.shape[0], generator=torch.Generator().manual_seed(1))
    moved = permuted(weight, order)
    if moved is None:
        assert isinstance(weight, Factors)
        moved, order = weight, torch.arange(len(rows))
    b = Nodes()
    value = written(b, moved, Place(View(weight.shape), front=True), rows, "w")
    expected = (weight.dense()[order] * rows[:, None])[None]
    torch.testing.assert_close(decoded(b, value, 3), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", [n for n, w in INSTANCES.items() if w.shape[0] % 2 == 0 and w.shape[1] % 3 == 0])
def test_transposed_convolutions(name, groups):
    weight = INSTANCES[name]
    outputs, inputs = weight.shape[0] // groups, weight.shape[1] // 3
    view = View((inputs * groups, outputs, 3), groups)
    rows = torch.linspace(-1, 2, weight.shape[0])
    for own in (None, rows):
        b = Nodes()
        value = written(b, weight, Place(view), own, "w")
        expected = view.tensor(weight.dense() * (1 if own is None else rows[:, None]))
        torch.testing.assert_close(decoded(b, value, 3), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("count", [1, 7, 4096])
def test_codes_of_any_width(bits, count):
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(bits))
    b = Nodes()
    value = b.op("Cast", b.integers(codes, bits), to=1)
    assert torch.equal(decoded(b, value, 1).long(), codes)
    if count > 1000:  # a whole byte for 9 bits would be 2 * count
        assert b.size <= count * bits / 8 + 800


@pytest.mark.parametrize("bits", range(1, 9))
def test_large_grids_take_their_bits(bits):
    shape = (64, 64, 3, 3)
    codes = torch.randint(2**bits, (64, prod(shape[1:])), dtype=torch.uint8)
    zero = torch.randint(2**bits, (64, 1), dtype=torch.uint8)
    for own in (None, zero):
        grid = Grid(codes, torch.rand(64, 1).half(), own, bits, codes.shape[1])
        b = Nodes()
        value = written(b, grid, Place(View(shape)), None, "w")
        assert torch.equal(decoded(b, value, 4), grid.dense().reshape(shape))
        assert b.size <= grid.bits() / 8 + 800


@pytest.mark.parametrize("density", [0.02, 0.3, 0.5, 0.9])
def test_pruned_weights_take_the_smaller_form(density):
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(64, 576, generator=generator) < density
    codes = torch.randint(16, (64, 576), dtype=torch.uint8, generator=generator)
    grid = Grid(codes, torch.rand(64, 1).half(), None, 4, 576)
    weight = Sparse(mask, grid)
    b = Nodes()
    value = written(b, weight, Place(View((64, 576))), None, "w")
    assert torch.equal(decoded(b, value), weight.dense())
    assert b.size <= min(grid.bits() / 8, weight.bits() / 8) + 900


def test_codebooks_are_kept_once():
    own = next(w for w in INSTANCES.values() if isinstance(w, Codebook))
    b = Nodes()
    first = written(b, own, Place(View(own.shape)), None, "w")
    size = b.size
    assert written(b, own, Place(View(own.shape)), None, "w") == first
    assert b.size == size


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_codes_of_different_frequency_take_fewer_bits(bits):
    generator = torch.Generator().manual_seed(bits)
    bell = torch.randn(64 * 576, generator=generator) * 2 ** (bits - 3) + 2 ** (bits - 1)
    codes = bell.round().clamp(0, 2**bits - 1).to(torch.uint8)
    shares = codes.bincount() / len(codes)
    entropy = -(shares * shares.clamp(min=1e-9).log2()).sum()
    grid = Grid(codes.reshape(64, 576), torch.rand(64, 1).half(), None, bits, 576)
    b = Nodes(tight=True)
    value = written(b, grid, Place(View(grid.shape)), None, "w")
    assert torch.equal(decoded(b, value), grid.dense())
    assert b.size <= len(codes) / 8 * min(1.1 * entropy, bits) + 2500


@pytest.mark.parametrize("codes", [[0], [3, 3, 3], [0, 255] * 5000, [1] * 9999 + [7], [*range(256)] * 30])
def test_packed_codes_come_back(codes):
    given = torch.tensor(codes, dtype=torch.uint8)
    b = Nodes()
    value = b.op("Cast", b.packed(given, 8), to=1)
    assert torch.equal(decoded(b, value, 1).to(torch.uint8), given)
