"""Norms and biases with fewer digits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import featherweight as fw
from featherweight.artifact import Artifact
from featherweight.artifact.write import to_bytes
from featherweight.data import batches
from featherweight.packing import DIGITS, FULL, shortened, shortest
from featherweight.repair.distance import DenseOutputs
from tests.nets import images, tiny


@given(st.floats(-60000, 60000, width=16), st.sampled_from(DIGITS))
def test_rounded_to_the_nearest_number_of_so_many_digits(value, digits):
    got = float(shortened(Artifact((), {"x": torch.tensor([value]).half()}, (), {}), digits).rest["x"])
    if value == 0:
        assert got == 0
        return
    step = 2.0 ** (math.frexp(value)[1] - 1 - digits)
    below = math.floor(abs(value) / step) * step
    nearest = min((below, below + step), key=lambda x: abs(x - abs(value)))
    if nearest < 65536:  # beyond, fp16 has no number: it stays
        assert abs(abs(got) - abs(value)) == pytest.approx(abs(nearest - abs(value)), abs=2**-24)


def test_only_vectors_in_fp16_are_rounded():
    third = torch.full((3,), 1 / 3)
    rest = {"a": third.half(), "b": third, "c": third.half().reshape(1, 3), "d": torch.tensor([3, 5, 7])}
    got = shortened(Artifact((), rest, (), {}), 4).rest
    assert float(got["a"][0]) == 21 / 64  # 1.0101 binary, a quarter of it
    assert all(torch.equal(got[n], rest[n]) for n in "bcd")


def test_the_fewest_digits_that_cost_no_distance():
    net = nn.Linear(1, 1).requires_grad_(False).eval()
    artifact = Artifact((), {"weight": torch.ones(1, 1), "bias": torch.tensor([1 + 2**-6 + 2**-9]).half()}, (), {})

    def distance(tried: nn.Linear) -> float:
        return abs(float(tried.bias) - 1 - 2**-6 - 2**-9) + 1.0

    found, digits = shortest(artifact, net, distance)
    assert (digits, float(found.rest["bias"])) == (6, 1 + 2**-6)
    unknown, digits = shortest(artifact, net, lambda tried: math.nan)
    assert (digits, unknown) == (FULL, artifact)


def test_finetuned_files_lose_digits_as_compressed_ones_do():
    torch.manual_seed(0)
    net, data = tiny().eval(), images(256)
    small = fw.compress(net, data, method=fw.Rtn(fw.GridSpec(2)))
    assert small.report.rest["digits"] in DIGITS
    tuned = fw.finetune(small.artifact, net, fw.Finetune(data, epochs=1))
    assert any(to_bytes(shortened(tuned.artifact, d)) == to_bytes(tuned.artifact) for d in DIGITS)
    judge = DenseOutputs.of(net, batches(data))
    before, after = (judge.distance(fw.artifact.fill(tiny(), a)) for a in (small.artifact, tuned.artifact))
    assert after < before
