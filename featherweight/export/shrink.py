"""Everything but weights, in few bytes: other constants in the smallest type that holds them, short names, no notes."""

from collections.abc import Collection, Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor

from featherweight.export.graph import name_batch
from featherweight.export.nodes import BOOL, INT64, WORTH, Nodes
from featherweight.export.passes import Graph, inner_graphs, replace_reads

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def pack_constants(proto: Any, b: Nodes, held: Collection[str]) -> None:
    """Give the constants that are not held fewer bytes, where they are worth an operator and keep every bit."""
    graph = Graph(proto.graph)
    for name in [n for n in graph.constants if n not in held]:
        array = graph.array(name)
        if array.nbytes <= 2 * WORTH or array.dtype.name not in _KNOWN or name in graph.outputs:
            continue
        tensor = torch.from_numpy(array.copy())

        def packed(b: Nodes, tensor: Tensor = tensor, name: str = name) -> str:
            return _packed(b, tensor, name)

        def plain(b: Nodes, tensor: Tensor = tensor, name: str = name) -> str:
            return b.plain(tensor, name)

        replace_reads(proto.graph, {name: b.smallest(plain, packed)})
        proto.graph.initializer.remove(graph.constants[name])


_KNOWN = ("float32", "int64", "int32", "bool")


def _packed(b: Nodes, tensor: Tensor, name: str) -> str:
    first = tensor.reshape(-1)[:1]
    if bool((tensor == first).all()):
        return b.op("Expand", b.plain(first.reshape(())), b.whole(*tensor.shape))
    if tensor.dtype == torch.float32:
        return b.floats(tensor, name)
    if tensor.dtype == torch.bool:
        return b.op("Cast", b.planes(tensor.to(torch.uint8), 1, name), to=BOOL)
    low, high = int(tensor.min()), int(tensor.max())
    if low >= 0 and high < 2**16:
        value = b.integers(tensor, max(high.bit_length(), 1), name)
        return b.op("Cast", value, to=INT64) if tensor.dtype == torch.int64 else value
    return b.plain(tensor, name)


def shrink(proto: Any, about: Mapping[str, str]) -> None:
    """Names of values become short, but for inputs, outputs and constants that are named like the network's tensors."""
    graph = proto.graph
    kept = {v.name for v in (*graph.input, *graph.output)}
    named = {t.name for t in graph.initializer if "." in t.name}
    short: dict[str, str] = {n: n for n in kept | named} | {"": ""}
    numbers = count()

    def name(old: str) -> str:
        if old not in short:
            short[old] = next(n for n in (_word(i) for i in numbers) if n not in short.values())
        return short[old]

    for inner in inner_graphs(graph):
        for node in inner.node:
            for field in ("name", "doc_string", "metadata_props"):
                node.ClearField(field)
            node.input[:] = [name(i) for i in node.input]
            node.output[:] = [name(o) for o in node.output]
            for attribute in node.attribute:
                attribute.ClearField("doc_string")
        for value in (*inner.initializer, *inner.input, *inner.output):
            value.name = name(value.name)
            value.ClearField("doc_string")
            value.ClearField("metadata_props")
        del inner.value_info[:]
    name_batch(graph)
    for field in ("doc_string", "metadata_props"):
        graph.ClearField(field)
        proto.ClearField(field)
    proto.ClearField("functions")
    graph.name = "featherweight"
    proto.producer_name = "featherweight"
    for key, value in about.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value


def _word(number: int) -> str:
    """a, b ... z, ba, bb ..."""
    found = ""
    while True:
        number, digit = divmod(number, len(_LETTERS))
        found = _LETTERS[digit] + found
        if number == 0:
            return found
