"""A file as an ONNX model that is about as small: weights stay as they are stored, and the graph decodes them."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.activations import plain_copy
from featherweight.artifact import Artifact, read
from featherweight.artifact.load import fill
from featherweight.chains.choose import chains_of
from featherweight.chains.load import as_chains
from featherweight.data import Batch, batches
from featherweight.export.graph import float_graph
from featherweight.export.nodes import Nodes, Value
from featherweight.export.parity import Parity, compared
from featherweight.export.stored import decoded
from featherweight.layers import View
from featherweight.proof import replaced
from featherweight.weights import Dense, Factors, Grid

LARGE = 1 << 31  # bytes of a protobuf, at most


@final
@dataclass(frozen=True, slots=True)
class Exported:
    """What was written. bytes: of the file. stored: how, in words, every weight is, by name. floats: what is float32
    in it, by name, with the reason. opset: of ONNX that readers need. parity: how far it is from torch."""

    bytes: int
    stored: dict[str, str]
    floats: dict[str, str]
    opset: int
    parity: Parity


def export_onnx(small: Artifact | str | Path, model: nn.Module, example: Any, path: str | Path) -> Exported:
    """Write a file's network as ONNX, with its weights as small as they are stored, and compare it with torch.

    Grids become integers of 2, 4 or 8 bits with DequantizeLinear, or bits that the graph takes apart; vectors become
    Gathers from their books; factors the chains of layers that they run as, or Einsums; masks stay bits. It runs for
    any number of samples.

    Args:
        small: a file, or what is in one.
        model: a network of the same class; it is not changed.
        example: a batch of inputs, or anything that `compress` takes for data, of which the first batch is taken.

    Raises:
        FormatError: the file is damaged.
        UsageError: a package is missing (the message has the line that installs it), the file does not fit the network,
            torch cannot export it, or the ONNX model computes something else.
    """
    artifact = small if isinstance(small, Artifact) else read(Path(small))
    batch = _example(example)
    net = fill(plain_copy(model), artifact)
    rows = chains_of(net, artifact, example=batch, only_if="fewer") if _factored(artifact) else ()
    rows = tuple(r for r in rows if not _recurrent(net, r.name))  # one op each, whatever the length
    runs = {r.name for r in rows if r.chained}
    expected = copy.deepcopy(net)
    net = as_chains(net, artifact, rows)
    graph = float_graph(net, batch, sorted(_tensors(net)))
    g, stored, floats = _filled(graph, net, artifact, runs)
    proto = _model(graph, g, artifact)
    with replaced(Path(path)) as place:
        data = proto.SerializeToString(deterministic=True)
        place.write_bytes(data)
        parity = compared(place, expected, batch)
    return Exported(len(data), stored, floats, g.opset, parity)


def _example(example: Any) -> Batch:
    """Two samples at least."""
    batch = example if isinstance(example, Batch) else batches(example)[0]
    if batch.size > 1:
        return batch
    twice = [torch.cat([v, v]) if isinstance(v, Tensor) and v.ndim else v for v in batch.args]
    named = {k: torch.cat([v, v]) if isinstance(v, Tensor) and v.ndim else v for k, v in batch.kwargs.items()}
    return Batch(tuple(twice), named)


def _recurrent(net: nn.Module, name: str) -> bool:
    return isinstance(net.get_submodule(name.rpartition(".")[0]), nn.RNNBase | nn.RNNCellBase)


def _factored(artifact: Artifact) -> bool:
    return any(isinstance(u.weight, Factors) for u in artifact.units)


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, floats, by every name."""
    both = [*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)]
    return {n: t.detach() for n, t in both if t.is_floating_point()}


def _filled(
    graph: Any, net: nn.Module, artifact: Artifact, runs: set[str]
) -> tuple[Nodes, dict[str, str], dict[str, str]]:
    """Nodes that give every parameter that the graph has as an input; these inputs are taken out."""
    own = _tensors(net)
    wanted = [i.name for i in graph.graph.input if i.name in own]
    used = {i for node in graph.graph.node for i in node.input}
    units = {n: u for u in artifact.units for n in u.names}
    norms = {f"{n.name}.{part}": t for n in artifact.norms for part, t in (("weight", n.scale), ("bias", n.shift))}
    parts = [p for u in artifact.units if u.names[0] in runs for p in u.weight.parts]  # pyright: ignore - factors
    g, stored, floats = Nodes(), {}, {}
    made: dict[str, Value] = {}
    for name in wanted:
        if name not in used:
            continue
        if name in units:
            first = units[name].names[0]
            if first not in made:
                made[first], stored[first] = decoded(g, units[name].weight, units[name].view, first)
            made[name] = made[first]
        elif (kept := norms.get(name, artifact.rest.get(name))) is not None:
            made[name] = g.floats(kept.reshape(own[name].shape), name)
        else:
            made[name], how = _link(g, own[name], parts, name)
            if how == "float32":
                floats[name] = "no stored tensor: a link of several factors, or the network's own"
            elif how != "constant":
                stored[name] = how
    _renamed(graph.graph, made)
    kept = [i for i in graph.graph.input if i.name not in own]
    del graph.graph.input[:]
    graph.graph.input.extend(kept)
    _constants(graph.graph, g)
    return g, stored, floats


def _link(g: Nodes, tensor: Tensor, parts: list[Dense | Grid], name: str) -> tuple[Value, str]:
    """A tensor that is no stored one: a link of a chain, whose numbers are those of a factor in another order, or such
    as the variances of norms."""
    if bool((tensor == tensor.reshape(-1)[:1]).all()):
        return g.filled(tensor.shape, float(tensor.reshape(-1)[0])), "constant"
    if bool((tensor.half().float() == tensor).all()):
        return g.floats(tensor.half(), name), "float16"
    for part in parts:
        if isinstance(part, Grid) and part.scale.shape[1] == 1 and part.codes.numel() == tensor.numel():
            for axis in range(tensor.ndim):
                matrix = tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)
                if (found := _on_grid(matrix, part)) is not None:
                    moved = [tensor.shape[axis], *(s for k, s in enumerate(tensor.shape) if k != axis)]
                    value, how = decoded(g, found, View(tuple(moved)), name)
                    back = [*range(1, axis + 1), 0, *range(axis + 1, tensor.ndim)]
                    return (g.add("Transpose", value, perm=back) if axis else value), how
    return g.floats(tensor, name), "float32"


def _on_grid(matrix: Tensor, part: Grid) -> Grid | None:
    """The matrix with the scales and zeros of `part`, if it lies exactly on them."""
    scale, zero = part.scale.float(), part.zero
    if len(scale) not in (1, len(matrix)) or bool((scale == 0).any()):
        return None
    middle = 2.0 ** (part.nbits - 1) if zero is None else zero.float()
    codes = (matrix / scale + middle).round()
    if part.nbits == 1 or bool(((codes < 0) | (codes >= 2**part.nbits)).any()):
        return None
    group = 0 if len(scale) == 1 else matrix.shape[1]
    found = Grid(codes.to(torch.uint8), part.scale, zero, part.nbits, group)
    return found if torch.equal(found.dense(), matrix) else None


def _renamed(graph: Any, made: Mapping[str, Value]) -> None:
    for node in graph.node:
        for k, name in enumerate(node.input):
            if name in made:
                node.input[k] = made[name]
    from onnx import helper

    for out in graph.output:  # a parameter that is an output
        if out.name in made:
            graph.node.append(helper.make_node("Identity", [made[out.name]], [out.name]))


def _constants(graph: Any, g: Nodes) -> None:
    """The graph's own constants: each contents once, floats in fp16 where that is exact, biases of zeros left out."""
    from onnx import numpy_helper

    named: dict[str, Value] = {}
    zeros = set()
    for tensor in graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32 and array.size > 16:
            values = torch.from_numpy(array.copy())
            exact = bool((values.half().float() == values).all())
            named[tensor.name] = g.floats(values.half() if exact else values)
        else:
            named[tensor.name] = g.constant(array)
        if array.dtype == np.float32 and not array.any():
            zeros.add(tensor.name)
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose") and len(node.input) == 3 and node.input[2] in zeros:
            del node.input[2]
    del graph.initializer[:]
    _renamed(graph, named)
    used = {i for node in (*graph.node, *g.nodes) for i in node.input}
    g.constants[:] = [c for c in g.constants if c.name in used]


def _model(model: Any, g: Nodes, artifact: Artifact) -> Any:
    """With the new nodes before the others, short names, and what it is."""
    from onnx import helper

    graph = model.graph
    fixed = {i.name for i in (*graph.input, *graph.output)} | {c.name for c in g.constants}
    given: dict[str, str] = {}
    for node in graph.node:
        for k, name in enumerate(node.output):
            if name and name not in fixed:
                node.output[k] = given.setdefault(name, g.name())
    for node in graph.node:
        for k, name in enumerate(node.input):
            node.input[k] = given.get(name, name)
    nodes = [*g.nodes, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(g.constants)
    graph.name = "featherweight"
    opset = max(g.opset, *(o.version for o in model.opset_import if o.domain == ""))
    g.opset = opset
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", opset))
    model.ir_version = 13 if opset >= 25 else 10
    model.producer_name, model.producer_version = "featherweight", _version()
    helper.set_model_props(model, {"featherweight": json.dumps({"digest": artifact.digest()}, sort_keys=True)})
    return model


def _version() -> str:
    import featherweight

    return featherweight.__version__
