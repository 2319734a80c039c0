"""An int8 ONNX graph without the channels that nothing reads.

Where all weights for an input channel are zero, whatever makes this channel need not. Sums, pools and whatever else
keeps channels apart lie between; what they join loses a channel only if no reader needs it. Outputs stay the same, bit
for bit. Needs onnx.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from featherweight.export.structure import WEIGHTED, attribute, channel_axis

CODES = "_codes"  # that names of weights end in
FOURS = 4  # onnxruntime's direct convolutions take channels by fours: 13 are slower than 16
_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool")

Constants = dict[str, np.ndarray]


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """A convolution without groups, or a matrix product, of constant codes. rank, axis: of its weight, and of the
    outputs in it. used: (outputs, inputs) bool, where any tap is not zero."""

    node: NodeProto
    rank: int
    axis: int
    used: np.ndarray


@final
@dataclass(slots=True, eq=False)
class _Space:
    """Channels that tensors of equal layout share. rank: of the weight that makes them; 2 where they come last.
    readers: layers. whole: whether something needs all of them. need: (channels,) bool."""

    rank: int
    need: np.ndarray
    readers: list[_Layer] = field(default_factory=list)
    whole: bool = False


def narrow(model: ModelProto) -> ModelProto:
    """A copy of a graph of QuantizeLinear and DequantizeLinear, as `int8_graph` makes it, its convolutions, Gemm and
    MatMul without outputs that nothing reads, and without the weights that would read them. `held` says how many stay.
    """
    made = ModelProto.FromString(model.SerializeToString())
    graph = made.graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    if _hides(model):
        return made
    layers = _layers(graph.node, constants)
    spaces = _spaces(graph, constants, layers)
    _settle(spaces)
    kept = {id(s): _kept(s.need) for s in spaces.values()}
    if all(k.all() for k in kept.values()):
        return made
    writer = _Writer(graph, constants)
    for layer in layers.values():
        rows = kept[id(spaces[layer.node.output[0]])]
        read = spaces.get(layer.node.input[0])
        inputs = layer.used.shape[1]
        own = read is not None and not read.whole
        columns = _repeated(kept[id(read)], inputs) if own else np.ones(inputs, bool)
        if not (rows.all() and columns.all()):
            writer.take(layer, rows, columns)
    writer.finish()
    return made


def free(model: ModelProto, together: Collection[tuple[str, ...]] = ()) -> tuple[frozenset[str], frozenset[str]]:
    """Names of weights of such a graph: those whose unused input channels go without another layer's doing, and those
    whose outputs go where no reader uses them. together: weights that are always without the same input channels."""
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    layers = _layers(model.graph.node, constants)
    spaces = {} if _hides(model) else _spaces(model.graph, constants, layers)
    maker = {n: node for node in model.graph.node for n in node.output}
    names = {o: maker[x.node.input[1]].input[0].removesuffix(CODES) for o, x in layers.items()}
    readers: set[str] = set()
    for space in spaces.values():
        own = {names[x.node.output[0]] for x in space.readers}
        if not space.whole and (len(own) == 1 or any(own <= set(group) for group in together)):
            readers |= own
    return frozenset(readers), frozenset(names[o] for o in layers if o in spaces and not spaces[o].whole)


def held(needed: int, total: int) -> int:
    """How many of `total` channels stay in a graph where `needed` are read: a multiple of FOURS, as fewer would not be
    faster."""
    return min(-(-max(needed, 1) // FOURS) * FOURS, total)


def _hides(model: ModelProto) -> bool:
    """Whether graphs within nodes may read tensors unseen."""
    return any(a.HasField("g") or a.graphs for node in model.graph.node for a in node.attribute)


def _kept(need: np.ndarray) -> np.ndarray:
    """The needed channels, (channels,) bool, and of the others the first, as many as `held` says."""
    kept = need.copy()
    kept[np.flatnonzero(~need)[: held(int(need.sum()), len(need)) - int(need.sum())]] = True
    return kept


def _repeated(channels: np.ndarray, inputs: int) -> np.ndarray:
    """For each input of a layer; it has several for a channel after a Flatten."""
    return np.repeat(channels, inputs // len(channels))


# ---------------------------------------------------------------- who makes and reads channels
def _layers(nodes: Iterable[NodeProto], constants: Constants) -> dict[str, _Layer]:
    """By output."""
    maker = {n: node for node in nodes for n in node.output}
    found = {}
    for node in nodes:
        layer = _layer(node, maker, constants) if node.op_type in WEIGHTED else None
        if layer is not None:
            found[node.output[0]] = layer
    return found


def _layer(node: NodeProto, maker: Mapping[str, NodeProto], constants: Constants) -> _Layer | None:
    """None where its weight or bias is stored otherwise, or channels are in groups."""
    values = _codes(maker.get(node.input[1]), constants)
    if values is None or attribute(node, "group", 1) != 1 or attribute(node, "transA", 0):
        return None
    axis, (codes, scale, *zero) = channel_axis(node), values
    if node.op_type == "MatMul" and codes.ndim != 2:
        return None
    rows = np.moveaxis(codes, axis, 0)
    if scale.shape != (len(rows),) or attribute(maker[node.input[1]], "axis", 1) % codes.ndim != axis:
        return None
    if len(node.input) > 2 and node.input[2]:
        bias = _codes(maker.get(node.input[2]), constants)
        if bias is None or bias[0].shape != (len(rows),):
            return None
    middle = np.broadcast_to(zero[0], scale.shape).reshape(-1, *[1] * (codes.ndim - 1)) if zero else 0
    return _Layer(node, codes.ndim, axis, (rows != middle).reshape(*rows.shape[:2], -1).any(axis=2))


def _codes(node: NodeProto | None, constants: Constants) -> list[np.ndarray] | None:
    """Codes, scale and zero of a DequantizeLinear of constants."""
    if node is None or node.op_type != "DequantizeLinear" or not set(node.input) <= set(constants):
        return None
    return [constants[n] for n in node.input]


def _spaces(graph: Any, constants: Constants, layers: Mapping[str, _Layer]) -> dict[str, _Space]:
    """By tensor, of those whose channels layers make."""
    found: dict[str, _Space] = {}
    flat: set[str] = set()
    for node in graph.node:
        own = [n for n in node.input if n in found]
        layer = layers.get(node.output[0])
        if layer is not None:
            for name in own:
                _read(found[name], layer, name in flat)
            rows = layer.used.shape[0]
            found[node.output[0]] = _Space(layer.rank, np.ones(rows, bool))
        elif own == node.input[:1] and own and _passes(node, constants, found[own[0]].rank, own[0] in flat):
            found[node.output[0]] = found[own[0]]
            flat |= {node.output[0]} if node.op_type == "Flatten" or own[0] in flat else set()
        elif node.op_type == "Add" and len(own) == 2 and _alike(own[0], own[1], found, flat):
            first, second = (found[n] for n in own)
            first.readers += second.readers if second is not first else []
            first.whole |= second.whole
            found = {n: first if s is second else s for n, s in found.items()} | {node.output[0]: first}
            flat |= {node.output[0]} if own[0] in flat else set()
        else:
            for name in own:
                found[name].whole = True
    for output in graph.output:
        if output.name in found:
            found[output.name].whole = True
    return found


def _read(space: _Space, layer: _Layer, flat: bool) -> None:
    """Put the layer among the readers; where it reads another axis than that of the channels, it needs all."""
    inputs, channels = layer.used.shape[1], len(space.need)
    fits = inputs % channels == 0 if flat else inputs == channels
    if fits and layer.rank == (2 if flat else space.rank):
        space.readers.append(layer)
    else:
        space.whole = True


def _alike(one: str, other: str, found: Mapping[str, _Space], flat: set[str]) -> bool:
    a, b = found[one], found[other]
    return (a.rank, len(a.need), one in flat) == (b.rank, len(b.need), other in flat)


def _passes(node: NodeProto, constants: Constants, rank: int, flat: bool) -> bool:
    """Whether every channel of the output comes from the same one of the first input alone."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return all(n in constants and constants[n].ndim == 0 for n in node.input[1:])
    if node.op_type in ("Relu", "Clip"):
        return True
    if rank == 2 or flat:
        return False
    if node.op_type == "Pad":
        pads = constants.get(node.input[1])
        return len(node.input) < 4 and pads is not None and not pads.reshape(2, -1)[:, :2].any()
    return len(node.output) == 1 and (
        node.op_type in _POOLS or (node.op_type == "Flatten" and attribute(node, "axis", 1) == 1)
    )


def _settle(spaces: Mapping[str, _Space]) -> None:
    """Find what is needed. What only reads for outputs that are not needed needs nothing, so that one removed channel
    may free others, until none does."""
    changed = True
    while changed:
        changed = False
        for space in {id(s): s for s in spaces.values() if not s.whole}.values():
            need = np.zeros_like(space.need)
            for layer in space.readers:
                used = layer.used[spaces[layer.node.output[0]].need].any(axis=0)
                need |= used.reshape(len(need), -1).any(axis=1)
            changed = changed or bool((need != space.need).any())
            space.need = need


# ---------------------------------------------------------------- what is written
class _Writer:
    """Makes layers of a graph narrower. Constants and nodes that others read, too, are copied."""

    def __init__(self, graph: Any, constants: Constants) -> None:
        self.graph, self.constants = graph, constants
        self.initializers = {t.name: t for t in graph.initializer}
        self.maker = {n: node for node in graph.node for n in node.output}
        self.uses = Counter(n for node in graph.node for n in node.input)
        self.before: dict[str, list[NodeProto]] = {}

    def take(self, layer: _Layer, rows: np.ndarray, columns: np.ndarray) -> None:
        """Leave a layer these outputs and inputs, bool each."""
        order = (rows, columns) if layer.axis == 0 else (columns, rows)

        def own(values: np.ndarray) -> np.ndarray:
            return values[rows] if values.ndim == 1 else values[order[0]][:, order[1]]

        for k in range(1, len(layer.node.input)):
            if layer.node.input[k]:
                self._replace(layer.node, k, own)

    def finish(self) -> None:
        nodes = [n for node in self.graph.node for n in (*self.before.get(node.output[0], ()), node)]
        used = {n for node in nodes for n in node.input}
        kept = [t for name, t in self.initializers.items() if name in used]
        for old, new in ((self.graph.node, nodes), (self.graph.initializer, kept)):
            copies = [type(x).FromString(x.SerializeToString()) for x in new]
            del old[:]
            old.extend(copies)
        del self.graph.value_info[:]

    def _replace(self, node: NodeProto, k: int, own: Callable[[np.ndarray], np.ndarray]) -> None:
        source = self.maker[node.input[k]]
        alone = self.uses[source.output[0]] == 1
        if not alone:
            source = NodeProto.FromString(source.SerializeToString())
            source.output[0] = node.input[k] = f"{node.output[0]}_{source.output[0]}"
            source.name = ""
            self.before.setdefault(node.output[0], []).append(source)
        for j, name in enumerate(source.input):
            values = self.constants[name]
            if values.ndim:
                name = name if alone and self.uses[name] == 1 else f"{node.output[0]}_{name}"
                self.initializers[name] = numpy_helper.from_array(own(values), name)
                source.input[j] = name
