"""A float ONNX graph -> the same network in whole numbers of 8 bits, as runtimes run it fast.

Every tensor that a convolution, matrix product, sum, product or average reads or makes lies on a grid of uint8; weights
are int8 with a scale for every output, biases int32. This is written in the form that runtimes look for, QuantizeLinear
and DequantizeLinear around every computation, of which onnxruntime makes QLinearConv and the like. uint8 and int8 are
what the instructions of x86 multiply (VNNI, AMX); for int8 activations onnxruntime has no such kernels there.

Relu, and Clip from zero, are no nodes any more: a grid that begins at zero cuts off below, one that ends where the
values do above. What only moves values (reshape, slice, pad, maximum) works on the codes. Needs onnx and onnxruntime.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from featherweight.activations import ActivationGrid
from featherweight.artifact import Artifact
from featherweight.artifact.schema import StoredUnit
from featherweight.errors import UsageError
from featherweight.export.codes import Codes, codes_of, table_of
from featherweight.export.graph import check_graph, check_size
from featherweight.export.narrow import FOURS, narrow
from featherweight.export.ranges import Fitted, fitted
from featherweight.export.structure import WEIGHTED, Structure, attribute, structure, tidied

LARGEST = 2.0**30  # of a bias in steps: int32 leaves as much again for the sum


def int8_graph(
    float_model: ModelProto,
    artifact: Artifact | None,
    samples: Sequence[Mapping[str, np.ndarray]],
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> ModelProto:
    """The network in int8, without channels that nothing reads, see `narrow`.

    Args:
        float_model: opset 13 or later, weights as float32 initializers under the names of the parameters.
        artifact: of the file that the model comes from: its codes and its grids for inputs are kept. None: all are
            found here.
        samples: batches of calibration inputs, by name of the model's input; they set the grids that the file lacks
            and what biases take up. All layers of all samples are in memory for a while.

    Raises:
        UsageError: no sample, nothing in the graph that could be int8, values that are not finite, or a graph that is
            larger than an ONNX file can be.
    """
    if not samples:
        raise UsageError("int8 needs calibration samples: give --data")
    check_size(float_model)
    plain = tidied(float_model)
    if not weights_of(plain, artifact):
        raise UsageError("the network has no convolution or linear layer that could be int8")
    graph = structure(plain)
    weighted, codes, units = _codes(graph, artifact)
    tables = _tables(graph, units)
    known: dict[str, ActivationGrid] = {}
    for node in weighted:
        unit = units.get(node.input[1])
        if unit is not None and unit.input is not None and unit.input.bits == 8:
            known.setdefault(graph.rounded[node.input[0]], unit.input)
    found = fitted(graph, codes, known, samples, progress)
    return narrow(_Writer(graph, codes, tables, found).model())


def weights_of(float_model: ModelProto, artifact: Artifact | None) -> dict[str, Codes]:
    """The weights that `int8_graph` writes as int8, by name."""
    return _codes(structure(tidied(float_model)), artifact)[1]


def left_of(float_model: ModelProto, artifact: Artifact) -> dict[str, str]:
    """The file's weights that `int8_graph` writes as float32, by name, and why."""
    graph = structure(tidied(float_model))
    weighted, _, units = _codes(graph, artifact)
    done = {n for node in weighted for n in (node.input[1], *_names(units.get(node.input[1])))}
    done |= {n for name in _tables(graph, units) for n in (name, *_names(units[name]))}
    found: dict[str, str] = {}
    for unit in artifact.units:
        if not done & set(unit.names):
            readers = {n.op_type for n in graph.nodes if set(unit.names) & set(n.input)}
            who = " and ".join(sorted(readers)) or "what reads it"
            found[unit.names[0]] = f"float32 in the int8 graph: {who} has no int8 form for it"
    return found


def _names(unit: StoredUnit | None) -> tuple[str, ...]:
    return () if unit is None else unit.names


def _tables(graph: Structure, units: Mapping[str, StoredUnit]) -> dict[str, Codes]:
    """Tables of the file that nothing but Gather reads the rows of, by name, as int8 codes."""
    found = {}
    for name in {n.input[0] for n in graph.nodes if n.op_type == "Gather"} & set(graph.constants) & set(units):
        lookups = [n for n in graph.nodes if name in n.input and n.op_type == "Gather" and not attribute(n, "axis", 0)]
        codes = table_of(graph.constants[name], units[name]) if lookups else None
        if codes is not None:
            found[name] = codes
    return found


def _turned(graph: Structure, weighted: Sequence[NodeProto], artifact: Artifact) -> dict[str, StoredUnit]:
    """Units of matrices that the exporter wrote turned round, under another name."""
    matrices = [u for u in artifact.units if len(u.view.shape) == 2]
    known = {name for u in artifact.units for name in u.names}
    renamed = [n.input[1] for n in weighted if n.op_type == "MatMul" and n.input[1] not in known]
    values = {u.tensor().float().numpy().tobytes(): u for u in matrices} if renamed else {}
    rows = {name: np.ascontiguousarray(graph.constants[name].T).tobytes() for name in renamed}
    return {name: values[own] for name, own in rows.items() if own in values}


def _codes(
    graph: Structure, artifact: Artifact | None
) -> tuple[list[NodeProto], dict[str, Codes], dict[str, StoredUnit]]:
    """The nodes with weights in int8, these weights, and the file's units; both by name."""
    units = {} if artifact is None else {name: u for u in artifact.units for name in u.names}
    weighted = [n for n in graph.nodes if n.op_type in WEIGHTED and graph.computes(n)]
    units |= {} if artifact is None else _turned(graph, weighted, artifact)
    return weighted, {n.input[1]: codes_of(n, graph.constants[n.input[1]], units) for n in weighted}, units


class _Writer:
    """Collects the nodes and initializers of the new graph."""

    def __init__(
        self, graph: Structure, codes: Mapping[str, Codes], tables: Mapping[str, Codes], found: Fitted
    ) -> None:
        self.graph, self.codes, self.tables, self.found = graph, codes, tables, found
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self.reads = 0

    def model(self) -> ModelProto:
        graph = self.graph
        for name in graph.inputs:
            if name in graph.rounded:
                self._round(name, name)
        for node in graph.nodes:
            if node.output[0] in graph.cut:
                continue
            if graph.computes(node):
                self._computed(node)
            elif node.output[0] in graph.rounded and graph.rounded[node.output[0]] != node.output[0]:
                self._moved(node)
            else:
                self._plain(node)
        for name in graph.outputs:
            if name in graph.rounded:
                self.nodes.append(
                    helper.make_node(
                        "DequantizeLinear", [f"{name}_codes", *self._grid(self.graph.rounded[name])], [name]
                    )
                )
        return self._whole()

    # ------------------------------------------------------------ nodes
    def _computed(self, node: NodeProto) -> None:
        weighted = node.op_type in WEIGHTED
        more, rank = self._missing(node), self.graph.constants[node.input[1]].ndim if weighted else 0
        inputs = [self._read(n, more, rank) for n in (node.input[:1] if weighted else node.input)]
        if weighted:
            inputs += self._weight(node, more)
        after = self.graph.result(node)
        made = NodeProto.FromString(node.SerializeToString())
        made.input[:] = inputs
        made.output[0] = f"{after}_float" if after in self.graph.rounded else after
        self.nodes.append(made)
        if after in self.graph.rounded:
            self._round(made.output[0], after)

    def _moved(self, node: NodeProto) -> None:
        made = NodeProto.FromString(node.SerializeToString())
        made.input[0], made.output[0] = f"{node.input[0]}_codes", f"{node.output[0]}_codes"
        if node.op_type == "Pad":
            zero = self._grid(self.graph.rounded[node.output[0]])[1]
            made.input[2:3] = [zero] if len(made.input) > 2 else []
            made.input.extend([zero] * (3 - len(made.input)))
        for name in made.input[1:]:
            self._keep(name)
        self.nodes.append(made)

    def _plain(self, node: NodeProto) -> None:
        made = NodeProto.FromString(node.SerializeToString())
        made.input[:] = [self._read(n) for n in node.input]
        for name in node.input[int(self._looks_up(node)) :]:
            self._keep(name)
        rounded = [n for n in node.output if n in self.graph.rounded]
        made.output[:] = [f"{n}_float" if n in rounded else n for n in node.output]
        if self._looks_up(node):
            self._lookup(made, node.input[0])
        else:
            self.nodes.append(made)
        for name in rounded:
            self._round(f"{name}_float", name)

    def _looks_up(self, node: NodeProto) -> bool:
        return node.op_type == "Gather" and node.input[0] in self.tables and not attribute(node, "axis", 0)

    def _lookup(self, gather: NodeProto, name: str) -> None:
        """Rows of codes, each times its own scale: no more of the table is decoded than is read."""
        table, own = self.tables[name], gather.output[0]
        self._put(f"{name}_table", table.codes)
        self._put(f"{name}_steps", table.scale[:, None])
        rows = [gather.input[1], f"{own}_rows", f"{own}_steps", f"{own}_whole"]
        self.nodes += [
            helper.make_node("Gather", [f"{name}_table", rows[0]], [rows[1]]),
            helper.make_node("Gather", [f"{name}_steps", rows[0]], [rows[2]]),
            helper.make_node("Cast", [rows[1]], [rows[3]], to=TensorProto.FLOAT),
            helper.make_node("Mul", [rows[3], rows[2]], [own]),
        ]

    def _round(self, source: str, name: str) -> None:
        self.nodes.append(helper.make_node("QuantizeLinear", [source, *self._grid(name)], [f"{name}_codes"]))

    def _missing(self, node: NodeProto) -> int:
        """Channels of zeros that a convolution of few channels gets, so that runtimes take their fast kernel for it."""
        if node.op_type != "Conv" or attribute(node, "group", 1) != 1:
            return 0
        channels = self.codes[node.input[1]].codes.shape[1]
        return FOURS - channels if channels < FOURS else 0

    def _read(self, name: str, more: int = 0, rank: int = 4) -> str:
        """The float that a node reads: of a rounded tensor a DequantizeLinear of its own, as fusing needs it. more:
        channels of zeros that it shall have beside its own."""
        if name not in self.graph.rounded:
            return name
        self.reads += 1
        codes, grid = f"{name}_codes", self._grid(self.graph.rounded[name])
        if more:
            self._put(f"{name}_more{self.reads}", np.array([0] * (rank + 1) + [more] + [0] * (rank - 2)))
            codes = f"{name}_wider{self.reads}"
            self.nodes.append(helper.make_node("Pad", [f"{name}_codes", f"{name}_more{self.reads}", grid[1]], [codes]))
        self.nodes.append(helper.make_node("DequantizeLinear", [codes, *grid], [f"{name}_read{self.reads}"]))
        return self.nodes[-1].output[0]

    def _weight(self, node: NodeProto, more: int) -> list[str]:
        name, codes = node.input[1], self.codes[node.input[1]]
        step = self.found.grids[self.graph.rounded[node.input[0]]].scale
        bias, scale = self.found.biases.get(node.output[0]), codes.scale
        if bias is not None:
            empty = ~codes.codes.any(axis=tuple(a for a in range(codes.codes.ndim) if a != codes.axis))
            scale = np.where(empty, np.maximum(scale, np.abs(bias) / (step * LARGEST)), scale).astype(np.float32)
        wider = [(0, more if axis == 1 else 0) for axis in range(codes.codes.ndim)]
        self._put(f"{name}_codes", np.pad(codes.codes, wider))
        self._put(f"{name}_scale", scale)
        self._put(f"{name}_zero", np.zeros(len(scale), np.int8))
        self.reads += 1
        inputs = [f"{name}_codes", f"{name}_scale", f"{name}_zero"]
        known = f"{name}_read{self.reads}"
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [known], axis=codes.axis))
        if bias is None:
            return [known]
        steps = np.float32(step) * scale
        whole = np.round(bias / steps.astype(np.float64)).clip(-(2**31), 2**31 - 1).astype(np.int32)
        own = f"{node.output[0]}_bias"
        self._put(f"{own}_codes", whole)
        self._put(f"{own}_scale", steps)
        self.nodes.append(helper.make_node("DequantizeLinear", [f"{own}_codes", f"{own}_scale"], [own], axis=0))
        return [known, own]

    # ------------------------------------------------------------ constants
    def _grid(self, origin: str) -> tuple[str, str]:
        grid = self.found.grids[origin]
        self._put(f"{origin}_scale", np.float32(grid.scale))
        self._put(f"{origin}_zero", np.uint8(grid.zero))
        return f"{origin}_scale", f"{origin}_zero"

    def _put(self, name: str, value: np.ndarray | np.generic) -> None:
        self.constants.setdefault(name, numpy_helper.from_array(np.asarray(value), name))

    def _keep(self, name: str) -> None:
        if name in self.graph.constants and name not in self.constants:
            self._put(name, self.graph.constants[name])

    def _whole(self) -> ModelProto:
        old = self.graph.model
        made = helper.make_graph(
            self.nodes, old.graph.name, list(old.graph.input), list(old.graph.output), list(self.constants.values())
        )
        model = helper.make_model(made, opset_imports=old.opset_import, ir_version=old.ir_version)
        check_graph(model)
        return model
