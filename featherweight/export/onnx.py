"""A compressed network as an ONNX file about as small as ours: weights keep their stored form."""

import copy
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from featherweight.activations import simulate
from featherweight.artifact import Artifact, fill, read
from featherweight.artifact.write import plain_bytes
from featherweight.chains import ChainRow, as_chains, chains_of
from featherweight.data import Batch, batches
from featherweight.errors import FormatError, UsageError
from featherweight.export.fast import made_for_speed
from featherweight.export.forms import Place, permuted, written
from featherweight.export.graph import (
    CONSTANT,
    FIRST_OPSET,
    INSTALL,
    check_graph,
    check_model,
    converted,
    doubled,
    dynamic,
    few,
    first,
    fix_batch,
    fixed_note,
    graph_of,
)
from featherweight.export.links import Turn, linked
from featherweight.export.nodes import Nodes
from featherweight.export.parity import Parity, compared
from featherweight.export.passes import Graph, cleaned, fold_norms, readers_of, replace_reads, turn_gates
from featherweight.export.rounding import round_inputs
from featherweight.export.shrink import pack_constants, shrink
from featherweight.layers import View
from featherweight.proof import replaced
from featherweight.solve import Progress
from featherweight.weights import Dense, Factors, Grid, Sparse, Weight

MOST = 8  # samples of a comparison
TWO_BITS = 25  # the first set of operators with integers of two bits
_IR = {20: 9, 21: 10, 22: 10, 23: 11, 24: 12, 25: 13}  # version of the file format for each set of operators


@final
@dataclass(frozen=True, slots=True)
class Row:
    """One weight: how the .fw file stores it and how the ONNX file does. bytes: of the latter, operators included."""

    name: str
    stored: str
    exported: str
    bytes: int


@final
@dataclass(frozen=True, slots=True)
class OnnxExport:
    """What was written. bytes: of the ONNX file; file_bytes: of the .fw file without entropy coding, which ONNX has
    not. left: what is not in its stored form, and why. notes: what the user should know."""

    path: str
    bytes: int
    file_bytes: int
    opset: int
    ir: int
    operators: dict[str, int]
    rows: tuple[Row, ...]
    parity: tuple[Parity, ...]
    left: dict[str, str]
    notes: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def export_onnx(
    artifact: Artifact | str | Path,
    model: nn.Module,
    example: Any,
    path: str | Path,
    progress: Progress = lambda _stage, _done, _total: None,
    *,
    tight: bool = False,
) -> OnnxExport:
    """Write a compressed network as an ONNX file, after comparing it with the network.

    Args:
        artifact: a .fw file, or its contents.
        model: an instance of the network's class; it is not changed.
        example: a batch, or anything that `compress` takes for data, of which the first batch is run. Its first
            dimension becomes dynamic where the network allows that.
        tight: pack codes of 2, 4 and 8 bits into fewer, too, by how often each occurs. The file is smaller; runtimes
            unpack it on loading, and have no integers of these types then.

    Raises:
        UsageError: the file does not fit the network, the network is not in float32, torch cannot export it, it is
            larger than an ONNX file can be, or a package is missing.
        FormatError: the .fw file is damaged, or what was written computes something else; no file is left.
    """
    try:
        import onnx  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise UsageError(f"{INSTALL} ({error})") from error
    found = artifact if isinstance(artifact, Artifact) else read(Path(artifact))
    check_model(model)
    network = fill(copy.deepcopy(model), found)
    progress("export", 0, 3)
    batch = example if isinstance(example, Batch) else batches(example, MOST)[0]
    example = doubled(few(batch, MOST))
    with torch.no_grad():
        example.run(network)
    proto, rows, left, notes = _built(found, model, example, tight)
    if made_for_speed(found):
        notes.append("the file was made for speed: export_int8 writes the graph that computes in int8")
    progress("export", 1, 3)
    check_graph(proto)
    opset = proto.opset_import[0].version
    if opset >= TWO_BITS:
        notes.append("OpenVINO does not read 2-bit integers, and was not tried")
    with replaced(Path(path)) as place:

        def checked(batch: Batch) -> tuple[Parity, ...]:
            place.write_bytes(proto.SerializeToString(deterministic=True))
            return compared(place, network, [batch], bool(found.inputs()), opset < TWO_BITS)

        progress("export", 2, 3)
        parity = checked(example)
        reason = CONSTANT
        if dynamic(proto):
            try:
                parity += checked(first(example))
            except FormatError as error:
                reason = str(error)
                fix_batch(proto, example.size)
                parity = checked(example)
        if not dynamic(proto):
            notes.append(fixed_note(example.size, reason))
        progress("export", 3, 3)
    kinds = dict(sorted(Counter(n.op_type for n in proto.graph.node).items()))
    size = os.path.getsize(path)
    before = len(plain_bytes(found))
    return OnnxExport(str(path), size, before, opset, proto.ir_version, kinds, tuple(rows), parity, left, tuple(notes))


@final
@dataclass(frozen=True, slots=True)
class _Held:
    """A tensor of the network that is written as nodes. write: its value, given what its rows are multiplied with and
    how it is read. turns: whether a recurrent operator may read it with its rows in another order."""

    shape: tuple[int, ...]
    stored: str
    write: Callable[[Nodes, Tensor | None, Turn, str], str]
    turns: bool


def _built(
    found: Artifact, model: nn.Module, example: Batch, tight: bool
) -> tuple[Any, list[Row], dict[str, str], list[str]]:
    """The whole `onnx.ModelProto`."""
    network = fill(copy.deepcopy(model), found)
    simulate(network, {})
    chains = _chains(network, found)
    as_chains(network, found, chains)
    held = _held(found, network, chains)
    notes: list[str] = []
    proto = graph_of(network, example, held)
    present = {t.name for t in proto.graph.initializer if t.name in held}
    factors = fold_norms(proto, present, {f"{n.name}.weight": n for n in found.norms})
    turned = turn_gates(proto, present, {n: held[n].shape for n in present if held[n].turns})
    b = Nodes(tight=tight)
    rows, values, graph = [], {}, Graph(proto.graph)
    for name in [t.name for t in proto.graph.initializer if t.name in held]:
        before, own = b.size, held[name]
        turn = turned.get(name)
        multiplied = any(n.op_type == "MatMul" for n, _ in readers_of(graph, name))
        read_as = Turn(None if turn is None else turn.order, multiplied)
        value = own.write(b, factors.get(name), read_as, name)
        values[name if turn is None else turn.value] = value
        rows.append(Row(name, own.stored, _form(b, value), b.size - before))
    opset = b.latest = max(b.opset, FIRST_OPSET)
    if opset > FIRST_OPSET:
        proto = converted(proto, opset)
    missing = [n for n in found.inputs() if n not in present]
    left = dict.fromkeys(missing, "its input is rounded in torch, but the exported graph has no such weight")
    grids = {n: g for n, g in found.inputs().items() if n in present}
    left |= round_inputs(proto, b, grids)
    pack_constants(proto, b, set(held))
    _put(proto, b, values, set(held))
    proto.ir_version = _IR[opset]
    shrink(proto, _about(found))
    return proto, rows, left, notes


def _chains(network: nn.Module, found: Artifact) -> tuple[ChainRow, ...]:
    """What runs as a chain of layers; recurrent operators have none."""
    recurrent = (nn.RNNBase, nn.RNNCellBase)
    rows = chains_of(network, found)
    return tuple(r for r in rows if not isinstance(network.get_submodule(r.name.rpartition(".")[0]), recurrent))


def _held(found: Artifact, network: nn.Module, chains: tuple[ChainRow, ...]) -> dict[str, _Held]:
    """All tensors of the network that are written in their stored form, by name."""
    held: dict[str, _Held] = {}
    chained = {r.name for r in chains if r.chained}
    for unit in found.units:
        if unit.names[0] in chained:
            assert isinstance(unit.weight, Factors)
            place = unit.names[0].rpartition(".")[0]
            for name, shape, write in linked(network.get_submodule(place), place, unit.weight, unit.view):
                held[name] = _Held(shape, "factors", write, False)
            continue
        held |= dict.fromkeys(unit.names, _plain(unit.weight, unit.view))
    for name, tensor in found.rest.items():
        if tensor.ndim >= 2 and tensor.dtype in (torch.float16, torch.float32):
            view = View(tuple(tensor.shape))
            held[name] = _plain(Dense(view.matrix(tensor)), view)
    return held


def _plain(weight: Weight, view: View) -> _Held:
    """A weight of a layer as torch has it."""

    def write(b: Nodes, rows: Tensor | None, turn: Turn, name: str) -> str:
        order = turn.order
        if order is None:
            return written(b, weight, Place(view, folded=turn.multiplied), rows, name)
        moved = permuted(weight, order)
        if moved is not None:
            return written(b, moved, Place(view, front=True), rows, name)
        value = written(b, weight, Place(view), rows, name)
        value = b.op("Gather", value, b.integers(order, 16), axis=0)
        return b.op("Unsqueeze", value, b.whole(0))

    return _Held(view.shape, _stored(weight), write, True)


def _stored(weight: Weight) -> str:
    match weight:
        case Grid():
            return f"{weight.nbits} bit"
        case Sparse():
            return f"sparse {_stored(weight.values)}"
        case Dense():
            return "fp16" if weight.values.dtype == torch.float16 else "fp32"
    return weight.kind


_TYPES = {1: "fp32", 10: "fp16", 2: "uint8", 3: "int8", 4: "uint16", 21: "uint4", 22: "int4", 25: "uint2", 26: "int2"}


def _form(b: Nodes, value: str) -> str:
    """What the codes of a value are kept as: the type of the largest constant behind it."""
    makers = {o: n for n in b.nodes for o in n.output}
    constants = {t.name: t for t in b.constants}
    waiting, seen, behind = [value], set(), []
    while waiting:
        name = waiting.pop()
        if name in constants:
            behind.append(constants[name])
        elif name in makers and name not in seen:
            waiting.extend(makers[name].input)
        seen.add(name)
    largest = max(behind, key=lambda t: t.ByteSize())
    packed = any(n.op_type == "BitwiseAnd" and largest.name in n.input for n in b.nodes)
    return "packed bits" if packed else _TYPES.get(largest.data_type, "other")


def _put(proto: Any, b: Nodes, values: Mapping[str, str], held: set[str]) -> None:
    """The nodes into the graph, in the place of the constants and values that they stand for."""
    graph = proto.graph
    for tensor in [t for t in graph.initializer if t.name in held or t.name in values]:
        graph.initializer.remove(tensor)
    replace_reads(graph, values)
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*b.nodes, *rest])
    graph.initializer.extend(b.constants)
    cleaned(graph)


def _about(found: Artifact) -> dict[str, str]:
    """Metadata of the file."""
    units = {u.names[0]: {"method": u.method, "stored": _stored(u.weight)} for u in found.units}
    scheme = {"units": len(units), "methods": dict(Counter(f"{u['method']}" for u in units.values()))}
    return {
        "producer": "featherweight",
        "featherweight.digest": found.digest(),
        "featherweight.scheme": json.dumps(scheme, separators=(",", ":"), sort_keys=True),
    }
