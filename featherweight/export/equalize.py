"""Channels between a convolution and a depthwise one made equally large, so that one grid suits them all.

A tensor has one grid, and its steps are as wide for a channel that never gets beyond 1 as for one that goes to 6. Where
the next layer takes every channel by itself, a channel can be multiplied by any positive number in the first layer and
divided by it in the second, as in Nagel et al., "Data-free quantization through weight equalization and bias
correction", 1906.04721, section 4.1. Weights have a scale for every output, so no code of theirs changes. Difference:
only what costs nothing is done, the scales come from what channels really reach on samples, and a channel that an upper
Clip cuts off stays as it is. Needs onnx and onnxruntime.
"""

from collections.abc import Mapping, Sequence
from math import inf

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from featherweight.activations import ActivationGrid
from featherweight.export.ranges import Scaled, session_of
from featherweight.export.structure import Structure, attribute, computable, structure

ROOM = 1.1  # times what a channel reached on the samples
SPREADS = 6.0
MOST = 16.0  # that a channel is multiplied by
OPSET = 18  # from which on axes are an input


def equalized(model: ModelProto, samples: Sequence[Mapping[str, np.ndarray]]) -> tuple[ModelProto, dict[str, Scaled]]:
    """A copy of a tidied float model that computes the same on the samples, and the tensors in it that were scaled.
    Their grids go from end to end, as an error counts less the more a channel was multiplied by."""
    model = ModelProto.FromString(model.SerializeToString())
    graph = structure(model)
    pairs = _pairs(graph)
    if not pairs or next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")) < OPSET:
        return model, {}
    reached = _reached(model, pairs, samples)
    constants = {t.name: t for t in model.graph.initializer}

    def times(name: str, factor: np.ndarray) -> None:
        value = numpy_helper.to_array(constants[name])
        made = value * factor.reshape(-1, *[1] * (value.ndim - 1))
        constants[name].CopyFrom(numpy_helper.from_array(made.astype(np.float32), name))

    scaled = {}
    for name, (first, second, cap) in pairs.items():
        largest = np.minimum(reached[name], cap)
        top = largest.max()
        if not 0 < top < inf:
            continue  # nothing reached it, or what is not finite, which is refused later
        step = float(np.float32(top / 255 if name in graph.cut else top / 127))
        factor = np.clip(top / np.maximum(largest, top * 1e-6), 1.0, MOST)
        scaled[name] = Scaled(ActivationGrid(8, step, 0 if name in graph.cut else 128), factor)
        times(first.input[1], factor)
        if len(first.input) > 2:
            times(first.input[2], factor)
        each = numpy_helper.to_array(constants[second.input[1]]).shape[0] // len(factor)
        times(second.input[1], 1 / np.repeat(factor, each))
    return model, scaled


def _pairs(graph: Structure) -> dict[str, tuple[NodeProto, NodeProto, float]]:
    """Tensor -> the convolution that makes it, the depthwise one that alone reads it, and where a Clip cuts it off."""
    made = {graph.result(n): n for n in graph.nodes if n.op_type == "Conv" and computable(n, graph.constants)}
    clips = {n.output[0]: n for n in graph.nodes if n.op_type == "Clip"}
    used = [n for node in graph.nodes for n in node.input]
    found = {}
    for node in graph.nodes:
        first = made.get(node.input[0]) if node.input else None
        if node.op_type != "Conv" or first is None or not computable(node, graph.constants):
            continue
        weight, name = graph.constants[node.input[1]], node.input[0]
        groups = attribute(node, "group", 1)
        alone = used.count(name) == 1 and name not in graph.outputs
        own = all(used.count(n) == 1 for n in (*first.input[1:], node.input[1]))
        channels = graph.constants[first.input[1]].shape[0]
        if alone and own and groups == channels > 1 and weight.shape[1] == 1:
            upper = clips[name].input[2] if name in clips and len(clips[name].input) > 2 else ""
            found[name] = first, node, float(graph.constants[upper].reshape(-1)[0]) if upper else inf
    return found


def _reached(
    model: ModelProto,
    pairs: Mapping[str, tuple[NodeProto, NodeProto, float]],
    samples: Sequence[Mapping[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """What every channel may reach, (channels,) float64, by tensor: the largest magnitude on the samples with some
    room, or SPREADS standard deviations from the mean of what the first layer computes, whichever is more. Channels of
    late layers wait for what few samples show."""
    looked = ModelProto.FromString(model.SerializeToString())
    del looked.graph.output[:]
    axes = numpy_helper.from_array(np.array([0, 2, 3]), "every_axis_but_channels")
    looked.graph.initializer.append(axes)
    for name, (first, _, _) in pairs.items():
        before = first.output[0]
        made = [
            helper.make_node("Abs", [name], [f"{name}_absolute"]),
            helper.make_node("ReduceMax", [f"{name}_absolute", axes.name], [f"{name}_largest"], keepdims=0),
            helper.make_node("ReduceMean", [before, axes.name], [f"{name}_mean"], keepdims=0),
            helper.make_node("Mul", [before, before], [f"{name}_squares"]),
            helper.make_node("ReduceMean", [f"{name}_squares", axes.name], [f"{name}_square"], keepdims=0),
        ]
        looked.graph.node.extend(made)
        for what in ("largest", "mean", "square"):
            looked.graph.output.append(helper.make_tensor_value_info(f"{name}_{what}", TensorProto.FLOAT, None))
    session = session_of(looked.SerializeToString())
    found = [[np.asarray(x, np.float64) for x in session.run(None, dict(s))] for s in samples]
    reached = {}
    for k, name in enumerate(pairs):
        largest = np.max([batch[3 * k] for batch in found], axis=0)
        mean, square = (np.mean([batch[3 * k + i] for batch in found], axis=0) for i in (1, 2))
        spread = np.sqrt(np.maximum(square - mean**2, 0))
        both = np.abs(mean) if pairs[name][0].output[0] == name else mean  # without Relu, below zero counts as well
        reached[name] = np.maximum(ROOM * largest, both + SPREADS * spread)
    return reached
