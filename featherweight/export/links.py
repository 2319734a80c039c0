"""Weights of factors that run as chains of layers: the weight of each layer from the factors that it is made of."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from featherweight.export.forms import contraction, factor
from featherweight.export.nodes import Nodes
from featherweight.layers import View
from featherweight.stages import Link, _Letters, chain_of, dims_of
from featherweight.weights import Factors


@final
@dataclass(frozen=True, slots=True)
class Turn:
    """How a weight is read. order: by a recurrent operator, with its rows in this order. multiplied: by MatMul."""

    order: Tensor | None
    multiplied: bool


Write: TypeAlias = Callable[[Nodes, Tensor | None, Turn, str], str]


def linked(chain: nn.Module, place: str, weight: Factors, view: View) -> Iterator[tuple[str, tuple[int, ...], Write]]:
    """Of every layer of a chain the name of its weight, its shape, and what writes it."""
    assert isinstance(chain, nn.Sequential)
    layers: list[Any] = list(chain)
    turned = isinstance(layers[0], nn.Embedding)  # looks up the last link
    grouped = not isinstance(layers[-1], nn.Linear)
    found = chain_of(weight, view, grouped and not turned)
    letters = _Letters.of(weight, dims_of(view))
    assert found is not None
    assert letters is not None
    links = tuple(reversed(found.links)) if turned else found.links
    for k, (layer, link) in enumerate(zip(layers, links, strict=True)):
        yield f"{place}.{k}.weight", tuple(layer.weight.shape), _writer(weight, letters, link, layer, turned and k > 0)


def _writer(weight: Factors, letters: _Letters, link: Link, layer: Any, turned: bool) -> Write:
    transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)

    def write(b: Nodes, rows: Tensor | None, turn: Turn, name: str) -> str:
        assert turn.order is None
        value = _product(b, weight, letters, link, name.rpartition(".")[0].rpartition(".")[0])
        own = (link.outputs, link.inputs // link.groups, *link.kernel)
        if transposed:  # inputs of a group before its outputs
            value = b.reshaped(value, (link.groups, link.outputs // link.groups, own[1], prod(link.kernel)))
            value = b.op("Transpose", value, perm=[0, 2, 1, 3])
        elif turned:
            value = b.op("Transpose", b.reshaped(value, own), perm=[1, 0])
        value = b.reshaped(value, layer.weight.shape)
        if rows is None:
            return value
        shape = [-1 if d == int(transposed) else 1 for d in range(layer.weight.ndim)]
        if transposed and link.groups > 1:
            each = rows.reshape(link.groups, 1, -1).expand(-1, own[1], -1).reshape(layer.weight.shape[0], -1)
            return b.op("Mul", value, b.floats(each.reshape(*each.shape, *[1] * len(link.kernel))))
        return b.op("Mul", value, b.floats(rows.reshape(shape)))

    return write


def _product(b: Nodes, weight: Factors, letters: _Letters, link: Link, name: str) -> str:
    """The factors of a link multiplied, as `stages.weights_of` does it."""
    names = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    twins = {n: len(letters.sizes) + i for i, n in enumerate(link.ins)}
    sizes = letters.sizes | {t: letters.sizes[n] for n, t in twins.items()}
    both = set(link.ins[link.through :]) & set(link.outs[link.through :])
    held = {n for k in link.terms for n in letters.terms[k]}

    def term(numbers: Any) -> str:
        return "".join(names[n] for n in numbers)

    operands: list[tuple[str, str]] = []
    for k in link.terms:
        own = letters.terms[k]
        operands.append((term(own), factor(b, weight.parts[k], [sizes[n] for n in own], f"{name}.{k}")))
    for n in link.outs:
        if n not in held:
            operands.append((term([n]), b.op("Expand", b.plain(torch.tensor(1.0)), b.whole(sizes[n]))))
    for n in both:
        operands.append((term([n, twins[n]]), b.floats(torch.eye(sizes[n]))))
    ins = [twins[n] if n in both else n for n in link.ins[link.through :]]
    taps = [n for n in letters.axes if letters.axes[n] > 1 and n in held]
    out = [*link.outs, *ins, *taps]
    return contraction(b, operands, term(out), {names[n]: size for n, size in sizes.items()})
