"""What an int8 pass needs to know of a float ONNX graph: who makes a tensor, who reads it, which nodes can be whole
numbers. Needs onnx."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

WEIGHTED = ("Conv", "Gemm", "MatMul")
COMPUTED = (*WEIGHTED, "Add", "Mul", "Concat", "GlobalAveragePool", "AveragePool")
MOVED = ("Reshape", "Flatten", "Transpose", "Slice", "Pad", "Squeeze", "Unsqueeze", "MaxPool")
CUT_OFF = ("Relu", "Clip")


@final
@dataclass(frozen=True, slots=True, eq=False)
class Structure:
    """nodes: in an order in which they can run. constants: values of initializers, by name. rounded: tensors that lie
    on a grid, each with the name of the tensor whose grid it is (itself, unless its values only moved). cut: outputs of
    Relu and Clip -> the tensor before, where the end of a grid does what they do. computed: outputs of the nodes that
    compute on whole numbers. model: where all this comes from."""

    model: ModelProto
    nodes: tuple[NodeProto, ...]
    constants: dict[str, np.ndarray]
    rounded: dict[str, str]
    cut: dict[str, str]
    computed: frozenset[str]

    @property
    def inputs(self) -> list[str]:
        return [i.name for i in self.model.graph.input if i.name not in self.constants]

    @property
    def outputs(self) -> list[str]:
        return [o.name for o in self.model.graph.output]

    def result(self, node: NodeProto) -> str:
        """The output of a node, after what cuts it off."""
        own = node.output[0]
        return next((after for after, before in self.cut.items() if before == own), own)

    def computes(self, node: NodeProto) -> bool:
        """Whether a node computes on whole numbers."""
        return node.output[0] in self.computed


def attribute(node: NodeProto, name: str, otherwise: Any = None) -> Any:
    """An attribute's value, or what holds where it is not given."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), otherwise)


def tidied(model: ModelProto) -> ModelProto:
    """A copy with BatchNorms folded into the convolutions before them, means over positions as average pools, Flatten
    where a Reshape does that, and no Identity."""
    model = ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    constants = {t.name: t for t in graph.initializer}
    for node in [n for n in graph.node if n.op_type == "Constant" and attribute(n, "value") is not None]:
        constants[node.output[0]] = TensorProto.FromString(attribute(node, "value").SerializeToString())
        constants[node.output[0]].name = node.output[0]
        graph.node.remove(node)
    _fold_norms(graph, constants)
    same: dict[str, str] = {}
    results = {o.name for o in graph.output}
    for node in list(graph.node):
        node.input[:] = [same.get(n, n) for n in node.input]
        if node.op_type == "Identity" and node.output[0] not in results:
            same[node.output[0]] = node.input[0]
            graph.node.remove(node)
    shapes = _shapes(model)
    for node in [n for n in graph.node if n.op_type == "ReduceMean" and len(shapes.get(n.input[0], ())) == 4]:
        if _over_positions(node, constants):
            _as_pool(graph, node)
    for node in [n for n in graph.node if n.op_type == "Reshape" and n.input[1] in constants]:
        if _flattens(shapes.get(node.input[0], ()), numpy_helper.to_array(constants[node.input[1]]).tolist()):
            node.CopyFrom(helper.make_node("Flatten", node.input[:1], node.output, name=node.name, axis=1))
    used = {n for node in graph.node for n in node.input}
    del graph.initializer[:]
    graph.initializer.extend(t for t in constants.values() if t.name in used)
    return model


def structure(model: ModelProto) -> Structure:
    """Decides which tensors of a tidied graph are to lie on grids: all that computations in whole numbers read and
    make, but for the last layer's output."""
    graph = model.graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    nodes = tuple(graph.node)
    readers = Counter(n for node in nodes for n in node.input)
    maker = {n: node for node in nodes for n in node.output}
    ends = {o.name for o in graph.output}
    floats = _floats(model)
    computed = [n for n in nodes if _computable(n, constants, floats)]
    names = frozenset(n.output[0] for n in computed)
    cut: dict[str, str] = {}
    for node in nodes:
        before = maker.get(node.input[0]) if node.input else None
        alone = readers[node.input[0]] == 1 and node.input[0] not in ends if node.input else False
        if before is not None and alone and before in computed and _cuts_at_zero(node, constants):
            cut[node.output[0]] = node.input[0]
    after = {before: name for name, before in cut.items()}
    rounded: dict[str, str] = {}

    def put(name: str) -> None:
        origin = name
        while origin in maker and _moves(maker[origin], constants):
            origin = maker[origin].input[0]
        for moved in _moved_from(origin, nodes, constants):
            rounded[moved] = origin

    for node in computed:
        for name in node.input[: 1 if node.op_type in WEIGHTED else None]:
            put(name)
        own = after.get(node.output[0], node.output[0])
        if not (node.op_type in ("Gemm", "MatMul") and (own in ends or _leaves(own, nodes, names, constants))):
            put(own)
    return Structure(model, nodes, constants, rounded, cut, names)


def _computable(node: NodeProto, constants: Mapping[str, np.ndarray], floats: Collection[str]) -> bool:
    """Whether a node can compute on whole numbers: all its activations are activations, its weight is a constant.
    floats: tensors that are known to be float32; shapes are added and joined as well, and no grid holds them."""
    if node.op_type not in COMPUTED:
        return False
    if node.op_type not in WEIGHTED:
        return node.output[0] in floats and all(n and n not in constants for n in node.input)
    weight = constants.get(node.input[1])
    if weight is None or node.input[0] in constants or weight.dtype != np.float32:
        return False
    if node.op_type == "Gemm":
        plain = attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0 and not attribute(
            node, "transA", 0
        )
        return plain and (len(node.input) < 3 or (node.input[2] in constants and constants[node.input[2]].ndim == 1))
    return weight.ndim == 2 if node.op_type == "MatMul" else len(node.input) < 3 or node.input[2] in constants


def channel_axis(node: NodeProto) -> int:
    """The axis of a weight that its outputs are counted along."""
    return 0 if node.op_type == "Conv" or attribute(node, "transB", 0) else 1


def _moves(node: NodeProto, constants: Mapping[str, np.ndarray]) -> bool:
    if node.op_type == "Pad":
        filling = constants.get(node.input[2], np.ones(1)) if len(node.input) > 2 and node.input[2] else np.zeros(1)
        return attribute(node, "mode", b"constant") in (b"constant", "constant") and not filling.any()
    return node.op_type in MOVED and len(node.output) == 1 and node.input[0] not in constants


def _moved_from(origin: str, nodes: Sequence[NodeProto], constants: Mapping[str, np.ndarray]) -> list[str]:
    """A tensor, and all whose values are its values."""
    found = [origin]
    for node in nodes:
        if node.input and node.input[0] in found and _moves(node, constants):
            found.append(node.output[0])
    return found


def _leaves(
    name: str, nodes: Sequence[NodeProto], computed: Collection[str], constants: Mapping[str, np.ndarray]
) -> bool:
    """Whether nothing but nodes that stay in float reads a tensor."""
    moved = _moved_from(name, nodes, constants)
    readers = [n for n in nodes if any(m in n.input for m in moved) and not _moves(n, constants)]
    return not any(n.output[0] in computed for n in readers)


def _cuts_at_zero(node: NodeProto, constants: Mapping[str, np.ndarray]) -> bool:
    if node.op_type == "Relu":
        return True
    if node.op_type != "Clip" or len(node.input) < 2 or node.input[1] not in constants:
        return False
    upper = constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else np.ones(1)
    return float(constants[node.input[1]]) == 0 and upper is not None and float(np.asarray(upper).reshape(-1)[0]) > 0


def _over_positions(node: NodeProto, constants: Mapping[str, TensorProto]) -> bool:
    axes = attribute(node, "axes")
    if axes is None and len(node.input) > 1 and node.input[1] in constants:
        axes = numpy_helper.to_array(constants[node.input[1]]).tolist()
    return axes is not None and sorted(a % 4 for a in axes) == [2, 3]


def _as_pool(graph: Any, mean: NodeProto) -> None:
    """In the place of a mean over positions an average pool; dimensions of 1 are dropped where the mean's were."""
    source, result = mean.input[0], mean.output[0]
    place = list(graph.node).index(mean)
    graph.node.remove(mean)
    if attribute(mean, "keepdims", 1):
        graph.node.insert(place, helper.make_node("GlobalAveragePool", [source], [result]))
        return
    graph.node.insert(place, helper.make_node("GlobalAveragePool", [source], [f"{result}_pooled"]))
    graph.node.insert(place + 1, helper.make_node("Flatten", [f"{result}_pooled"], [result], axis=1))


def _flattens(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether a tensor of this shape, 0 where it is not known, keeps its first dimension and gets one other."""
    inner = int(np.prod(shape[1:])) if len(shape) > 1 else 0
    return inner > 0 and list(wanted) == [-1, inner]


def _shapes(model: ModelProto) -> dict[str, tuple[int, ...]]:
    """Of tensors; 0 for a dimension that is not known."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    known = [v for v in (*graph.input, *graph.value_info, *graph.output) if v.type.tensor_type.HasField("shape")]
    return {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in known}


def _floats(model: ModelProto) -> frozenset[str]:
    """Tensors that are known to be float32."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    known = (*graph.input, *graph.value_info, *graph.output)
    return frozenset(v.name for v in known if v.type.tensor_type.elem_type == TensorProto.FLOAT)


def _fold_norms(graph: Any, constants: dict[str, TensorProto]) -> None:
    readers = Counter(n for node in graph.node for n in node.input) + Counter(o.name for o in graph.output)
    maker = {n: node for node in graph.node for n in node.output}
    weights = Counter(n.input[1] for n in graph.node if n.op_type == "Conv")
    for norm in [n for n in graph.node if n.op_type == "BatchNormalization"]:
        conv = maker.get(norm.input[0])
        own = conv is not None and conv.op_type == "Conv" and readers[norm.input[0]] == 1
        if (
            conv is None
            or not own
            or weights[conv.input[1]] > 1
            or not {*conv.input[1:], *norm.input[1:]} <= set(constants)
        ):
            continue
        scale, shift, mean, variance = (numpy_helper.to_array(constants[n]).astype(np.float64) for n in norm.input[1:])
        factor = scale / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
        weight = numpy_helper.to_array(constants[conv.input[1]])
        bias = numpy_helper.to_array(constants[conv.input[2]]) if len(conv.input) > 2 else np.zeros(len(factor))
        name = f"{conv.input[1]}_bias" if len(conv.input) < 3 else conv.input[2]
        folded = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
        constants[conv.input[1]] = numpy_helper.from_array(folded.astype(np.float32), conv.input[1])
        constants[name] = numpy_helper.from_array(((bias - mean) * factor + shift).astype(np.float32), name)
        conv.input[2:] = [name]
        conv.output[0] = norm.output[0]
        graph.node.remove(norm)
