"""What is done to the graph that torch exports before weights take their stored form: BatchNorms go into the weights
before them, and the weights of recurrent operators lie as these read them."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from featherweight.artifact import FoldedNorm

_LAYERS = ("Conv", "ConvTranspose")
_RECURRENT = ("LSTM", "GRU", "RNN")
_MOVES = ("Slice", "Concat", "Unsqueeze", "Squeeze", "Transpose", "Reshape", "Split", "Identity")


@final
class Graph:
    """An `onnx.GraphProto` with what reads and what makes each of its values."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.constants: dict[str, Any] = {t.name: t for t in graph.initializer}
        self.makers: dict[str, Any] = {}
        self.readers: dict[str, list[Any]] = {}
        for node in graph.node:
            self.makers |= {o: node for o in node.output if o}
            for value in dict.fromkeys(i for n in nested(node) for i in n.input):
                self.readers.setdefault(value, []).append(node)
        self.outputs = {o.name for o in graph.output}

    def array(self, name: str) -> Any:
        from onnx import numpy_helper

        return numpy_helper.to_array(self.constants[name])

    def alone(self, value: str, reader: Any) -> bool:
        """Whether nothing but one operator reads a value."""
        return self.readers.get(value, []) == [reader] and value not in self.outputs

    def put(self, name: str, array: Any) -> None:
        """A new constant, or another value of one."""
        from onnx import numpy_helper

        tensor = numpy_helper.from_array(np.asarray(array, order="C"), name)
        if name in self.constants:
            self.constants[name].CopyFrom(tensor)
            return
        self.graph.initializer.append(tensor)
        self.constants[name] = self.graph.initializer[-1]


def _graphs(attribute: Any) -> list[Any]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def nested(node: Any) -> Iterator[Any]:
    """An operator and those of the graphs in its attributes, which read values of the graph around them."""
    yield node
    for attribute in node.attribute:
        for graph in _graphs(attribute):
            for inner in graph.node:
                yield from nested(inner)


def inner_graphs(graph: Any) -> Iterator[Any]:
    """A graph and those in the attributes of its operators."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in _graphs(attribute):
                yield from inner_graphs(inner)


def read_by(graph: Any) -> set[str]:
    """The values that something reads."""
    graphs = list(inner_graphs(graph))
    return {i for g in graphs for n in g.node for i in n.input} | {o.name for g in graphs for o in g.output}


def replace_reads(graph: Any, values: Mapping[str, str]) -> None:
    """Let whatever reads one value read another."""
    for inner in inner_graphs(graph):
        for node in inner.node:
            for k, name in enumerate(node.input):
                if name in values:
                    node.input[k] = values[name]


def readers_of(graph: Graph, value: str) -> list[tuple[Any, int]]:
    """The operators that read a value, transposed or not, and in which place."""
    found = []
    for node in graph.readers.get(value, []):
        if node.op_type == "Transpose":
            found += readers_of(graph, node.output[0])
        else:
            found += [(node, k) for k, i in enumerate(node.input) if i == value]
    return found


def cleaned(graph: Any) -> None:
    """Without operators and constants that nothing reads."""
    while True:
        read = read_by(graph)
        unused = [n for n in graph.node if not any(o in read for o in n.output)]
        if not unused:
            break
        for node in unused:
            graph.node.remove(node)
    for tensor in [t for t in graph.initializer if t.name not in read]:
        graph.initializer.remove(tensor)


# ---------------------------------------------------------------- norms
def fold_norms(proto: Any, held: Collection[str], norms: Mapping[str, FoldedNorm]) -> dict[str, Tensor]:
    """Take BatchNorms that follow a convolution with a held weight out of the graph: what they add becomes the bias,
    and what they multiply the rows of the weight with is returned, (rows,) float32 by the weight's name. norms: by the
    name of their weight, as the file has them."""
    graph = Graph(proto.graph)
    found: dict[str, Tensor] = {}
    for norm in [n for n in proto.graph.node if n.op_type == "BatchNormalization"]:
        layer = graph.makers.get(norm.input[0])
        if layer is None or layer.op_type not in _LAYERS or not graph.alone(norm.input[0], norm):
            continue
        weight, bias = layer.input[1], layer.input[2] if len(layer.input) > 2 else ""
        constants = all(i in graph.constants for i in norm.input[1:])
        free = weight in held and weight not in found and graph.alone(weight, layer) and len(norm.output) >= 1
        if not constants or not free or (bias and bias not in graph.constants):
            continue
        scale, shift = _affine(graph, norm, norms)
        if bias:
            shift = shift + scale * graph.array(bias).astype(np.float64)
        found[weight] = torch.from_numpy(scale.astype(np.float32))
        name = norm.input[2] if graph.alone(norm.input[2], norm) else f"{norm.input[2]}.{len(found)}"
        graph.put(name, shift.astype(np.float32))
        del layer.input[2:]
        layer.input.append(name)
        layer.output[0] = norm.output[0]
        proto.graph.node.remove(norm)
    cleaned(proto.graph)
    return found


def _affine(graph: Graph, norm: Any, norms: Mapping[str, FoldedNorm]) -> tuple[Any, Any]:
    """Scale and shift of a BatchNorm, float64: those of the file where it has them."""
    own = norms.get(norm.input[1])
    if own is not None:
        return own.scale.double().numpy(), own.shift.double().numpy()
    epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
    scale, shift, mean, variance = (graph.array(i).astype(np.float64) for i in norm.input[1:5])
    scale = scale / np.sqrt(variance + epsilon)
    return scale, shift - scale * mean


# ---------------------------------------------------------------- recurrent weights
@final
@dataclass(frozen=True, slots=True)
class Turned:
    """A weight that a recurrent operator reads as `value`, (1, rows, cols), its rows in this order."""

    value: str
    order: Tensor


def turn_gates(proto: Any, held: Collection[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Turned]:
    """Which held weights reach a recurrent operator with nothing but their rows in another order and a dimension in
    front. What put them so stays in the graph, until `cleaned` finds it unread."""
    graph = Graph(proto.graph)
    found: dict[str, Turned] = {}
    for node in [n for n in proto.graph.node if n.op_type in _RECURRENT]:
        for value in node.input[1:3]:
            maker = graph.makers.get(value)
            several = len(_sources(graph, value, held)) > 1  # directions
            for part in maker.input if maker is not None and maker.op_type == "Concat" and several else [value]:
                names = _sources(graph, part, held)
                if len(names) != 1 or names[0] in found or len(shapes[names[0]]) != 2:
                    continue
                order = _order(graph, part, names[0], shapes[names[0]])
                if order is not None and all(_reaches(graph, r, part) for r in graph.readers[names[0]]):
                    found[names[0]] = Turned(part, order)
    return found


def _sources(graph: Graph, value: str, held: Collection[str]) -> list[str]:
    """The held weights that a value is made of by moving alone; empty where it is made of anything else."""
    if value in held:
        return [value]
    if value in graph.constants:
        return []
    maker = graph.makers.get(value)
    if maker is None or maker.op_type not in _MOVES:
        return []
    data = maker.input if maker.op_type == "Concat" else maker.input[:1]
    parts = [_sources(graph, i, held) for i in data]
    return list(dict.fromkeys(n for p in parts for n in p)) if all(parts) else []


def _reaches(graph: Graph, node: Any, value: str) -> bool:
    """Whether all that an operator makes goes into one value."""
    return all(
        o == value or (o not in graph.outputs and all(_reaches(graph, r, value) for r in graph.readers.get(o, [])))
        for o in node.output
    )


def _order(graph: Graph, value: str, name: str, shape: tuple[int, ...]) -> Tensor | None:
    """Of which row of the weight each row of a value is, found by moving the numbers of the entries."""
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    needed: list[Any] = []

    def collect(out: str) -> None:
        maker = graph.makers.get(out)
        if maker is not None and maker not in needed:
            for i in maker.input:
                collect(i)
            needed.append(maker)

    collect(value)
    inputs = {i for n in needed for i in n.input}
    constants = [graph.constants[i] for i in inputs if i in graph.constants and i != name]
    given = helper.make_tensor_value_info(name, TensorProto.INT64, list(shape))
    made = helper.make_tensor_value_info(value, TensorProto.INT64, None)
    part = helper.make_graph(needed, "rows", [given], [made], constants)
    numbers = np.arange(shape[0] * shape[1]).reshape(shape)
    model = helper.make_model(part, opset_imports=[helper.make_opsetid("", 20)])
    result: Any = ReferenceEvaluator(model).run(None, {name: numbers})
    moved = result[0]
    if moved.shape != (1, *shape):
        return None
    order = moved[0, :, 0] // shape[1]
    return torch.from_numpy(order) if np.array_equal(numbers[order], moved[0]) else None
