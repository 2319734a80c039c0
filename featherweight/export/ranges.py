"""The grids and biases of an int8 graph, found by running it node by node over calibration samples.

Two streams of numbers run side by side: one in float, where only the inputs that a file has grids for are rounded, and
one where everything that will be a whole number is. A convolution's bias takes up the difference of the two streams'
means by channel (as in Nagel et al., "Data-free quantization through weight equalization and bias correction",
1906.04721, section 4.2, measured here on samples), and then its output gets the grid with the least squared error on
what comes out. So every layer is fitted to what the layers before it really give. Needs onnx and onnxruntime.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np
import onnxruntime
import torch
from onnx import NodeProto, helper, numpy_helper

from featherweight.activations import SAMPLE, SEED, ActivationGrid, best_grid
from featherweight.errors import UsageError
from featherweight.export.codes import Codes
from featherweight.export.structure import WEIGHTED, Structure, channel_axis

ZERO = ActivationGrid(8, 2.0**-8, 0)  # of a tensor that is zero on all samples

Stream = dict[str, list[np.ndarray]]  # tensor -> its values for every batch


@final
@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """grids: of every rounded tensor that is the origin of its values. biases: of weighted nodes, by their output,
    float64 (outputs,)."""

    grids: dict[str, ActivationGrid] = field(default_factory=dict)
    biases: dict[str, np.ndarray] = field(default_factory=dict)


def fitted(
    graph: Structure,
    codes: Mapping[str, Codes],
    known: Mapping[str, ActivationGrid],
    samples: Sequence[Mapping[str, np.ndarray]],
    progress: Callable[[str, int, int], None],
) -> Fitted:
    """Run every node once. codes: of the weights, by name. known: the grids that a file has, by tensor.

    Raises:
        UsageError: a tensor that must be rounded is not finite, or a node cannot run.
    """
    found = Fitted(dict(known))
    float_stream: Stream = {n: [s[n] for s in samples] for n in graph.inputs}
    stream: Stream = dict(float_stream)
    for name in graph.inputs:
        _settle(graph, name, float_stream, stream, found)
    left = Counter(n for node in graph.nodes for n in set(node.input))
    for i, node in enumerate(graph.nodes):
        progress("ranges", i, len(graph.nodes))
        own, weighted = node.output[0], node.op_type in WEIGHTED and node.input[1] in codes
        bias = _bias(graph, node) if weighted else None
        float_stream |= _run(graph, node, _as_the_file_says(graph, node, float_stream, known), {}, bias)
        rounded = {node.input[1]: codes[node.input[1]].dense().astype(np.float32)} if weighted else {}
        stream |= _run(graph, node, stream, rounded, bias)
        if bias is not None:
            shift = _mean(float_stream[own], node) - _mean(stream[own], node)
            found.biases[own] = bias + shift
            stream[own] = [x + _across(shift, node, x.ndim).astype(np.float32) for x in stream[own]]
        if own not in graph.cut.values():
            _settle(graph, own, float_stream, stream, found)
        for name in set(node.input):
            left[name] -= 1
            if left[name] == 0:
                float_stream.pop(name, None)
                stream.pop(name, None)
    progress("ranges", len(graph.nodes), len(graph.nodes))
    return found


def _settle(graph: Structure, name: str, float_stream: Stream, stream: Stream, found: Fitted) -> None:
    """Round a tensor of the second stream, on a new grid where it has none yet."""
    origin = graph.rounded.get(name)
    if origin is None:
        return
    if origin not in found.grids:
        values = _sampled(stream[name])
        if not np.isfinite(values).all():
            raise UsageError(f"'{name}' holds NaN or infinite values on the calibration data; it cannot be int8")
        found.grids[origin] = best_grid(torch.from_numpy(values), 8) or ZERO
    if origin == name:
        grid = found.grids[origin]
        stream[name] = [grid.simulate(torch.from_numpy(x)).numpy() for x in stream[name]]


def _as_the_file_says(
    graph: Structure,
    node: NodeProto,
    stream: Stream,
    known: Mapping[str, ActivationGrid],
) -> Stream:
    name = node.input[0]
    grid = known.get(graph.rounded.get(name, "")) if node.op_type in WEIGHTED else None
    if grid is None:
        return stream
    return stream | {name: [grid.simulate(torch.from_numpy(x)).numpy() for x in stream[name]]}


def _bias(graph: Structure, node: NodeProto) -> np.ndarray | None:
    """Of a node that has or can have one; MatMul cannot."""
    if node.op_type == "MatMul":
        return None
    if len(node.input) > 2 and node.input[2]:
        return graph.constants[node.input[2]].astype(np.float64)
    return np.zeros(graph.constants[node.input[1]].shape[channel_axis(node)])


def _mean(values: Sequence[np.ndarray], node: NodeProto) -> np.ndarray:
    """(channels,) float64 of all samples."""
    axes = tuple(a for a in range(values[0].ndim) if a != (1 if node.op_type == "Conv" else values[0].ndim - 1))
    total = np.sum([x.sum(axis=axes, dtype=np.float64) for x in values], axis=0)
    return total / (sum(x.size for x in values) / len(total))


def _across(shift: np.ndarray, node: NodeProto, rank: int) -> np.ndarray:
    return shift.reshape(1, -1, *[1] * (rank - 2)) if node.op_type == "Conv" else shift


def _sampled(values: Sequence[np.ndarray]) -> np.ndarray:
    """At most SAMPLE of all values, the same for the same data, float64."""
    flat = np.concatenate([x.reshape(-1) for x in values])
    if len(flat) > SAMPLE:
        flat = flat[np.random.default_rng(SEED).integers(0, len(flat), SAMPLE)]
    return flat.astype(np.float64)


def _run(
    graph: Structure, node: NodeProto, stream: Stream, instead: Mapping[str, np.ndarray], bias: np.ndarray | None
) -> Stream:
    """The outputs of one node for every batch, with other constants where they are given.

    Raises:
        UsageError: onnxruntime does not run it.
    """
    fixed = {n: instead.get(n, graph.constants[n]) for n in node.input if n in graph.constants}
    fed = [n for n in dict.fromkeys(node.input) if n and n not in fixed]
    inputs = [helper.make_tensor_value_info(n, _type(stream[n][0]), None) for n in fed]
    outputs = [helper.make_empty_tensor_value_info(n) for n in node.output]
    kept = [numpy_helper.from_array(np.asarray(v, order="C"), n) for n, v in fixed.items()]
    one = helper.make_graph([node], "one", inputs, outputs, kept)
    model = helper.make_model(one, opset_imports=graph.model.opset_import, ir_version=graph.model.ir_version)
    session = session_of(model.SerializeToString())
    batches = [{n: stream[n][i] for n in fed} for i in range(len(next(iter(stream.values()))))]
    try:
        found = [session.run(None, batch) for batch in batches]
    except Exception as error:  # its exceptions have no common class of their own
        raise UsageError(f"onnxruntime does not run {node.op_type} '{node.name}': {_line(error)}") from error
    return {name: [np.asarray(batch[k]) for batch in found] for k, name in enumerate(node.output)}


def _type(values: np.ndarray) -> int:
    return int(helper.np_dtype_to_tensor_dtype(values.dtype))


def session_of(model: bytes, optimized: bool = True) -> onnxruntime.InferenceSession:
    """On the CPU, on torch's number of threads, without warnings. optimized: whether onnxruntime may
    change the graph.

    Raises:
        UsageError: onnxruntime does not take the graph.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are raised
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class of their own
        raise UsageError(f"onnxruntime does not take the graph: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
