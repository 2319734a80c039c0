"""Single layers as onnxruntime computes them in an int8 network: channels last, uint8 in and out, int8 weights.

A graph has several of the same layer, each with weights of its own, where one alone would take little more than a call
does. Needs onnx and onnxruntime.
"""

from typing import Any

import numpy as np
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from featherweight.export.clock import Kernel
from featherweight.export.ranges import session_of
from featherweight.latency import timed

DOMAIN = "com.microsoft"
SHORT, COPIES = 400, 8  # microseconds from which on one layer is timed alone; else so many together
SERIES, SECONDS = 5, 0.01  # of a layer, and how long each takes, about


def microseconds(kernel: Kernel) -> int:
    """Of one use, at least 1, on torch's number of threads: of several series the lowest median."""
    alone = _series(kernel, 1)
    return alone if alone >= SHORT else max(round(_series(kernel, COPIES) / COPIES), 1)


def _series(kernel: Kernel, copies: int) -> int:
    session = session_of(model_of(kernel, copies).SerializeToString(), optimized=False)  # which would drop the copies
    shape = kernel.samples, *kernel.sides, kernel.channels
    inputs = {"x": np.random.default_rng(0).integers(0, 256, shape, np.uint8)}
    here = torch.device("cpu")
    return min(timed(lambda: session.run(None, inputs), here, SECONDS) for _ in range(SERIES))


def model_of(kernel: Kernel, copies: int) -> ModelProto:
    """A graph of `copies` equal layers that read `x`; the last one's output is the graph's."""
    random = np.random.default_rng(0)
    scale = np.full(kernel.rows, 2.0**-10, np.float32)
    shared = {"x_scale": np.float32(0.02), "x_zero": np.uint8(128), "y_scale": np.float32(0.1), "y_zero": np.uint8(0)}
    shared |= {"w_scale": scale, "w_zero": np.zeros(kernel.rows, np.int8), "bias": np.zeros(kernel.rows, np.int32)}
    shape, nodes = (kernel.rows, kernel.channels // kernel.groups, *kernel.taps), []
    for k in range(copies):
        shared[f"w{k}"] = random.integers(-127, 128, shape, np.int8)
        activations, weights = ("x", "x_scale", "x_zero"), (f"w{k}", "w_scale", "w_zero")
        if kernel.sides:
            names = [*activations, *weights, "y_scale", "y_zero", "bias"]
            settings: dict[str, Any] = {"strides": kernel.strides, "dilations": kernel.dilations, "pads": kernel.pads}
            settings |= {"kernel_shape": kernel.taps, "group": kernel.groups, "channels_last": 1}
            nodes.append(helper.make_node("QLinearConv", names, [f"y{k}"], domain=DOMAIN, **settings))
        else:
            names = [*activations, *weights, "bias", "y_scale", "y_zero"]
            nodes.append(helper.make_node("QGemm", names, [f"y{k}"], domain=DOMAIN, transB=1))
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [kernel.samples, *kernel.sides, kernel.channels])
    y = helper.make_tensor_value_info(f"y{copies - 1}", TensorProto.UINT8, None)
    constants = [numpy_helper.from_array(np.asarray(v), n) for n, v in shared.items()]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(helper.make_graph(nodes, "layer", [x], [y], constants), opset_imports=opsets, ir_version=9)
