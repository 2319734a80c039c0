"""Outputs of an exported network are compared where they are numbers, and must be the same where they are none."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from featherweight.errors import FormatError
from featherweight.export import parity, program

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("expected", "found", "worst"),
    [
        ([2.0, -INF, NAN, INF], [2.0, -INF, NAN, INF], 0.0),
        ([2.0, -INF, NAN], [1.0, -INF, NAN], 0.5),
        ([2.0, 1.0], [2.0, NAN], INF),
        ([2.0, NAN], [2.0, 0.0], INF),
        ([2.0, NAN], [2.0, INF], INF),
        ([2.0, INF], [2.0, -INF], INF),
        ([-INF, -INF], [-INF, -INF], 0.0),
        ([], [], 0.0),
    ],
)
def test_what_is_no_number_must_be_the_same_in_the_same_place(expected, found, worst, tmp_path):
    far = parity.away(np.array(expected, np.float32), np.array(found, np.float32))
    assert far.max(initial=0.0) == worst
    sides = [np.array(expected)], [np.array(found)]
    tensors = [torch.tensor(found)], [torch.tensor(expected)]
    if worst == 0:
        assert parity._difference("onnxruntime", *sides, 1e-4) == 0
        assert program._difference(*tensors, tmp_path / "small.pt2") == 0
        return
    with pytest.raises(FormatError, match="computes something else in onnxruntime: output 0 at"):
        parity._difference("onnxruntime", *sides, 1e-4)
    with pytest.raises(FormatError, match="not finite in other places" if worst == INF else "differ from the network"):
        program._difference(*tensors, tmp_path / "small.pt2")


def test_an_infinite_output_hides_no_difference():
    with pytest.raises(FormatError, match="output 0 at \\(1,\\) is 2, in torch 1"):
        parity._difference("onnxruntime", [np.array([INF, 1.0])], [np.array([INF, 2.0])], 1e-4)


def test_openvino_gets_the_threads_of_torch(monkeypatch, tmp_path):
    """With a stand-in: it is not among the packages that tests need."""
    asked = {}

    class Core:
        def read_model(self, path):
            return path

        def compile_model(self, _model, device, settings):
            asked.update(settings, device=device)

    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=Core))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    parity.in_openvino(tmp_path / "net.onnx")
    assert asked["INFERENCE_NUM_THREADS"] == 3
    assert asked["device"] == "CPU"
