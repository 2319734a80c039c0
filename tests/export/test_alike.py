"""Comparing an int8 graph with the network: every output counts, and so does a batch of one."""

import numpy as np
import pytest
import torch
from torch import nn

from featherweight import compress
from featherweight.data import Batch, batches
from featherweight.errors import FormatError
from featherweight.export.alike import alike, alike_alone
from featherweight.export.fast import export_int8
from featherweight.export.parity import squares
from featherweight.methods import Gptq, GridSpec
from featherweight.recipe import Recipe

QUIET = lambda *_: None  # noqa: E731


class Three(nn.Module):
    """Numbers in one dimension, rows of scores, and the class of each row."""

    def forward(self, x):
        return x.mean(1), 10 * x, x.argmax(1)


def ran(change=lambda outputs: outputs):
    """A runtime that computes what the network does, and then something else."""
    return lambda arrays: change([t.numpy() for t in Three()(torch.from_numpy(arrays[0]))])


@pytest.fixture
def data():
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    return [Batch((x[:5],), {}), Batch((x[5:],), {})]


def test_the_worst_output_is_told_and_classes_are_those_of_the_scores(data):
    found = alike(ran(), Three(), data)
    assert (found.difference, found.same) == (0.0, 1.0)
    x = torch.cat([b.args[0] for b in data])
    assert found.sizes[1] == pytest.approx(10 * float(x.square().mean().sqrt()))
    found = alike(ran(lambda o: [1.01 * o[0], 1.1 * o[1], o[2]]), Three(), data)
    assert found.difference == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda o: [o[0], 1.5 * o[1], o[2]], "output 1 is 0.50 of its root mean square away, allowed 0.25"),
        (lambda o: [o[0] + np.nan, *o[1:]], "entries of output 0 are not finite"),
        (lambda o: [*o[:2], o[2] + 1], "100% of output 2 differ, allowed 25%"),
        (lambda o: [o[0], o[1][:, :3], o[2]], r"output 1 has shape \(5, 3\) in onnxruntime and \(5, 4\) in torch"),
        (lambda o: o[:2], "has 2 outputs, in torch 3"),
    ],
)
def test_any_output_that_is_another_one_is_an_error(change, said, data):
    with pytest.raises(FormatError, match=said):
        alike(ran(change), Three(), data)


def test_one_sample_is_judged_by_the_size_of_all(data):
    sizes = alike(ran(), Three(), data).sizes
    one = Batch((data[0].args[0][:1] * 1e-3,), {})
    alike_alone(ran(lambda o: [o[0] + 0.1 * sizes[0], o[1], o[2] + 1]), Three(), one, sizes)
    with pytest.raises(FormatError, match=r"output 0 is 0\.30"):
        alike_alone(ran(lambda o: [o[0] + 0.3 * sizes[0], *o[1:]]), Three(), one, sizes)
    with pytest.raises(FormatError, match="shape"):
        alike_alone(ran(lambda o: [o[0], o[1][0], o[2]]), Three(), one, sizes)


class Counting(nn.Module):
    """Looks at how many samples there are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x) + torch.zeros(len(x), 1)


def test_a_fixed_batch_size_is_told(tmp_path):
    torch.manual_seed(0)
    net, x = Counting().eval(), torch.randn(6, 4)
    recipe = Recipe(Gptq(GridSpec(8, symmetric=True)), activations=8)
    artifact = compress(net, x, recipe=recipe).artifact
    found = export_int8(artifact, net, [*batches(x, 3), Batch((x[:2],), {})], tmp_path / "int8.onnx", QUIET)
    assert found.samples == 6
    assert any("batch size is fixed at 3" in note for note in found.notes)


def test_outputs_that_are_infinite_in_both_are_the_same():
    expected = np.array([[3.0, -np.inf, 4.0, np.nan]])
    assert squares(expected, np.array([[3.0, -np.inf, 3.0, np.nan]])) == (25.0, 1.0)
    assert squares(expected, np.array([[3.0, np.inf, 4.0, np.nan]]))[1] == np.inf
    assert squares(expected, np.array([[3.0, -np.inf, 4.0, 0.0]]))[1] == np.inf
