"""Rounded inputs as QuantizeLinear and DequantizeLinear, for the weights whose inputs the file rounds."""

from collections.abc import Mapping
from typing import Any

import torch

from featherweight.activations import ActivationGrid
from featherweight.export.nodes import Nodes
from featherweight.export.passes import Graph, readers_of

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def round_inputs(proto: Any, b: Nodes, grids: Mapping[str, ActivationGrid]) -> dict[str, str]:
    """Round the first input of every layer that reads one of these weights; the weights that none reads, and why."""
    from onnx import helper

    left: dict[str, str] = {}
    for name, grid in grids.items():
        graph = Graph(proto.graph)
        layers = [(n, k) for n, k in readers_of(graph, name) if n.op_type in _LAYERS and k == 1]
        if not layers:
            left[name] = "no layer of the exported graph reads it as its weight: its input stays float"
        made: dict[str, str] = {}
        for layer, _ in layers:
            x = layer.input[0]
            if x not in made:
                base = f"{x}.{name}"
                scale, zero = b.plain(torch.tensor(grid.scale)), b.plain(torch.tensor(grid.zero, dtype=torch.uint8))
                nodes = []
                value = x
                if grid.bits < 8:
                    low, high = (b.plain(torch.tensor(grid.scale * (c - grid.zero))) for c in (0, 2**grid.bits - 1))
                    nodes.append(helper.make_node("Clip", [x, low, high], [f"{base}.c"]))
                    value = f"{base}.c"
                nodes.append(helper.make_node("QuantizeLinear", [value, scale, zero], [f"{base}.q"]))
                nodes.append(helper.make_node("DequantizeLinear", [f"{base}.q", scale, zero], [f"{base}.d"]))
                at = next(i for i, n in enumerate(proto.graph.node) if n == layer)
                for k, node in enumerate(nodes):
                    proto.graph.node.insert(at + k, node)
                made[x] = f"{base}.d"
            for node in proto.graph.node:
                if node.output == layer.output:
                    node.input[0] = made[x]
    return left
