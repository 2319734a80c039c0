"""How each stored form of a weight is written in an ONNX graph: its codes as they are, and operators that decode them.

What is decoded is what `Weight.dense()` gives, to the last bit but for sums of products.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from featherweight.export.masks import bits_of, mask_of
from featherweight.export.nodes import BLOCKED, BOOL, FLOAT, INT32, UINT8, Nodes
from featherweight.layers import View
from featherweight.weights import Codebook, Dense, Factors, Grid, Sparse, Weight
from featherweight.weights.factors import plan
from featherweight.weights.grid import symmetric_zero


@final
@dataclass(frozen=True, slots=True)
class Place:
    """Where a (rows, cols) matrix goes: a tensor of `shape`, which is the view's.

    front: with a 1 in front, for the weights of recurrent operators. folded: computed at loading, for MatMul:
    onnxruntime makes an operator of its own of DequantizeLinear and MatMul, which rounds the inputs to 8 bits, and
    with 2-bit weights computes something else (1.32)."""

    view: View
    front: bool = False
    folded: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, *self.view.shape) if self.front else self.view.shape

    @property
    def axis(self) -> int | None:
        """The dimension of the rows, None where they are not one."""
        return None if self.view.transposed_groups > 1 else int(self.front or self.view.transposed_groups == 1)

    def tensor(self, matrix: Tensor) -> Tensor:
        return self.view.tensor(matrix).reshape(self.shape)

    def column(self, values: Tensor) -> Tensor:
        """(rows,) values, to be multiplied with the tensor."""
        assert self.axis is not None
        return values.reshape([-1 if d == self.axis else 1 for d in range(len(self.shape))])

    def placed(self, b: Nodes, matrix: str) -> str:
        """The value of a matrix as a tensor."""
        groups = self.view.transposed_groups
        if not groups:
            return b.reshaped(matrix, self.shape) if self.shape != self.view.matrix_shape else matrix
        inputs, outputs = self.view.shape[:2]
        turned = b.op("Transpose", b.reshaped(matrix, (groups, outputs, inputs // groups, -1)), perm=[0, 2, 1, 3])
        return b.reshaped(turned, self.shape)


def written(b: Nodes, weight: Weight, place: Place, rows: Tensor | None, name: str) -> str:
    """The value of a weight as a tensor. rows: (rows,), what each row is multiplied with beside. name: of the constant
    that holds its codes."""
    match weight:
        case Grid():
            return _grid(b, weight, place, rows, name)
        case Sparse():
            return _sparse(b, weight, place, rows, name)
        case Codebook():
            scale = weight.scale.float() if rows is None else weight.scale.float() * rows[:, None]
            entries = b.op("Mul", _sums(b, weight, name), b.floats(scale[:, :, None]))
            return place.placed(b, _ordered(b, entries, weight))
        case Dense():
            return _times(b, b.floats(place.tensor(weight.values), name), rows, place)
        case Factors():
            operands = [(t, _factor(b, weight, k, name)) for k, t in enumerate(weight.terms)]
            matrix = contraction(b, operands, weight.axes, dict(weight.sizes))
            return _times(b, place.placed(b, b.reshaped(matrix, weight.shape)), rows, place)
    raise AssertionError(weight.kind)


def permuted(weight: Weight, order: Tensor) -> Weight | None:
    """The same weight with its rows in another order, None where that is another form."""
    match weight:
        case Dense():
            return Dense(weight.values[order])
        case Grid() if weight.group == 0:
            return replace(weight, codes=weight.codes[order])
        case Grid():
            zero = None if weight.zero is None else weight.zero[order]
            return replace(weight, codes=weight.codes[order], scale=weight.scale[order], zero=zero)
        case Codebook():
            keep = None if weight.keep is None else weight.keep[order]
            return replace(weight, codes=weight.codes[order], scale=weight.scale[order], keep=keep)
        case Sparse():
            values = permuted(weight.values, order)
            assert isinstance(values, Dense | Grid | Codebook)
            return replace(weight, mask=weight.mask[order], values=values)
    return None


def _times(b: Nodes, tensor: str, rows: Tensor | None, place: Place) -> str:
    """Times a number for each row."""
    if rows is None:
        return tensor
    if place.axis is not None:
        return b.op("Mul", tensor, b.floats(place.column(rows)))
    return b.op("Mul", tensor, b.floats(_per_output(place.view, rows)))


def _per_output(view: View, rows: Tensor) -> Tensor:
    """A number for each row of a transposed convolution with groups, as a tensor that its weight is multiplied with."""
    inputs, outputs, *taps = view.shape
    each = rows.reshape(view.transposed_groups, 1, outputs).expand(-1, inputs // view.transposed_groups, -1)
    return each.reshape(inputs, outputs, *(1 for _ in taps))


# ---------------------------------------------------------------- grids
def _grid(b: Nodes, g: Grid, place: Place, rows: Tensor | None, name: str) -> str:
    if _uneven(g) or (place.folded and (g.nbits < 8 or g.zero is not None)):
        return _times(b, place.placed(b, factor(b, g, g.shape, name)), rows, place)
    if place.axis is not None and g.scale.shape[1] == 1:
        scale, zero = g.scale.float(), g.zero
        if rows is not None:
            scale = scale * rows[:, None]
            zero = None if zero is None else zero.expand(len(rows), 1)
        return _levels(b, g, place.tensor(g.codes), scale, zero, place.axis, name)
    matrix = _levels(b, g, g.codes, g.scale.float(), g.zero, 0 if g.scale.shape[1] == 1 else 1, name)
    return _times(b, place.placed(b, matrix), rows, place)


def _levels(
    b: Nodes, g: Grid, codes: Tensor, scale: Tensor, zero: Tensor | None, axis: int, name: str, flat: str = ""
) -> str:
    """DequantizeLinear of codes: one scale, one for each of the axis, or (rows, groups) of them. flat: codes that are
    there already, as uint8."""
    given = {"axis": axis}
    if scale.shape[1] > 1:
        given["block_size"] = g.group
        b.opset = max(b.opset, BLOCKED)
    elif scale.numel() == 1:
        given = {}
    bits, middle = g.nbits, symmetric_zero(g.nbits)
    if zero is None and bits == 1:  # half a step to each side: two steps of half the size
        bits, codes, scale, middle = 2, codes * 2, scale / 2, 1.0

    def of(values: Tensor) -> Tensor:
        """Scales and zeros in the shape that the operator takes."""
        return values if values.shape[1] > 1 else values[:, 0] if values.numel() > 1 else values.reshape(())

    def native(b: Nodes) -> str:
        scales = b.floats(of(scale))
        if zero is None and g.nbits == 1:
            return b.op("DequantizeLinear", b.signed(codes + 1, 2, name), scales, **given)
        if zero is None:
            return b.op("DequantizeLinear", b.signed(codes, bits, name), scales, **given)
        return b.op("DequantizeLinear", b.unsigned(codes, bits, name), scales, b.unsigned(of(zero), bits), **given)

    def packed(b: Nodes) -> str:
        value = flat
        if not flat and zero is None and g.nbits == 1:
            half = b.packed(codes // 2, 1, name)
            value = b.op("Add", half, half)
        elif not flat:
            value = b.packed(codes, bits, name)
        zeros = torch.full_like(scale, middle, dtype=torch.uint8) if zero is None else zero
        return b.op("DequantizeLinear", value, b.floats(of(scale)), b.plain(of(zeros)), **given)

    if flat:
        return packed(b)
    return native(b) if g.nbits in (2, 4, 8) and not b.tight else b.smallest(native, packed)


# ---------------------------------------------------------------- vectors from books
def _sums(b: Nodes, w: Codebook, name: str) -> str:
    """(rows, vectors, d), the sums of the words."""
    total = ""
    for m, book in enumerate(w.books):
        codes = b.integers(w.codes[:, :, m], (len(book) - 1).bit_length(), name if m == 0 else f"{name}.{m}")
        words = b.op("Gather", b.floats(book), codes, axis=0)
        total = b.op("Add", total, words) if total else words
    return total


def _ordered(b: Nodes, entries: str, w: Codebook) -> str:
    """The matrix, of the entries of every row in the order of the vectors."""
    rows, cols = w.shape
    channels = cols // w.taps
    if w.keep is not None:
        order = torch.arange(cols).reshape(channels, w.taps).T.reshape(-1)
        entries = b.reshaped(entries, (rows, -1))
        keep = bits_of(b, w.keep[:, order])
        number = b.op("CumSum", b.op("Cast", keep, to=INT32), b.plain(torch.tensor(1)))
        one = b.plain(torch.tensor(1, dtype=torch.int32))
        index = b.op("Mul", b.op("Sub", number, one), b.op("Cast", keep, to=INT32))
        found = b.op("GatherElements", entries, index, axis=1)
        entries = b.op("Where", b.op("Cast", keep, to=BOOL), found, _zero(b))
    elif w.codes.shape[1] * w.d != cols:
        entries = b.reshaped(entries, (rows, -1))
        entries = b.op("Slice", entries, b.whole(0), b.whole(cols), b.whole(1))
    if w.taps > 1:
        entries = b.op("Transpose", b.reshaped(entries, (rows, w.taps, channels)), perm=[0, 2, 1])
    return b.reshaped(entries, (rows, cols))


def _zero(b: Nodes) -> str:
    return b.plain(torch.tensor(0.0))


# ---------------------------------------------------------------- zeros
def _sparse(b: Nodes, w: Sparse, place: Place, rows: Tensor | None, name: str) -> str:
    if isinstance(w.values, Codebook):
        return written(b, w.values, place, rows, name)
    if not bool(w.mask.any()):
        return b.op("Expand", _zero(b), b.whole(*place.shape))
    whole = _with_zeros(w)

    def dense(b: Nodes) -> str:
        assert whole is not None
        return written(b, whole, place, rows, name)

    def kept(b: Nodes) -> str:
        return _kept(b, w, place, rows, name)

    return b.smallest(dense, kept) if whole is not None else kept(b)


def _with_zeros(w: Sparse) -> Dense | Grid | None:
    """The values with zeros where nothing is kept; None where zero is not on their grid."""
    if isinstance(w.values, Dense):
        return Dense(torch.where(w.mask, w.values.values, 0.0))
    assert isinstance(w.values, Grid)
    g = w.values
    if g.zero is None and g.nbits == 1:
        return None
    if g.zero is None:
        return replace(g, codes=torch.where(w.mask, g.codes, int(symmetric_zero(g.nbits))))
    zeros = g.zero.expand(w.shape) if g.scale.shape[1] == 1 else g.zero.repeat_interleave(g.group, 1)[:, : w.shape[1]]
    return replace(g, codes=torch.where(w.mask, g.codes, zeros))


def _kept(b: Nodes, w: Sparse, place: Place, rows: Tensor | None, name: str) -> str:
    """The kept values only, put where the mask has ones."""
    mask = b.reshaped(mask_of(b, w), w.shape)
    number = b.op("CumSum", b.reshaped(b.op("Cast", mask, to=INT32), (-1,)), b.plain(torch.tensor(0)))
    index = b.reshaped(b.op("Sub", number, b.plain(torch.tensor(1, dtype=torch.int32))), w.shape)
    if isinstance(w.values, Dense):
        matrix = b.op("Gather", b.floats(w.values.values[w.mask], name), index, axis=0)
    else:
        g = w.values
        assert isinstance(g, Grid)
        codes = g.codes[w.mask]

        def native(b: Nodes) -> str:
            return b.op("Cast", b.unsigned(codes, g.nbits, name, least=4), to=UINT8)

        def packed(b: Nodes) -> str:
            return b.packed(codes, g.nbits, name)

        values = b.smallest(native, packed)
        if g.zero is None and g.nbits == 1 and not _uneven(g):
            values = b.op("Add", values, values)
        placed = b.op("Gather", values, index, axis=0)
        if _uneven(g):
            matrix = _stepped(b, g, b.op("Cast", placed, to=FLOAT))
        else:
            axis = 0 if g.scale.shape[1] == 1 else 1
            matrix = _levels(b, g, g.codes, g.scale.float(), g.zero, axis, name, flat=placed)
    found = b.op("Where", b.op("Cast", mask, to=BOOL), matrix, _zero(b))
    return _times(b, place.placed(b, found), rows, place)


# ---------------------------------------------------------------- sums of products
def _factor(b: Nodes, w: Factors, k: int, name: str) -> str:
    """Factor k as a float value with one dimension for each letter of its term."""
    return factor(b, w.parts[k], [w.sizes[x] for x in w.terms[k]], f"{name}.{k}")


def factor(b: Nodes, part: Dense | Grid, shape: Sequence[int], name: str) -> str:
    """A factor as a float value of this shape; without DequantizeLinear, so that it is computed at loading."""
    if isinstance(part, Dense):
        return b.floats(part.values.reshape(tuple(shape)), name)
    value = _stepped(b, part, b.op("Cast", b.integers(part.codes, part.nbits, name), to=FLOAT))
    return value if tuple(shape) == part.shape else b.reshaped(value, shape)


def _uneven(g: Grid) -> bool:
    """Whether the last group of columns is shorter than the others, which OpenVINO refuses in DequantizeLinear."""
    return g.scale.shape[1] > 1 and g.shape[1] % g.group != 0


def _stepped(b: Nodes, g: Grid, codes: str) -> str:
    """scale * (codes - zero) of a matrix of float codes."""

    def each(values: Tensor) -> str:
        """For each entry that has a scale of its own."""
        if values.shape[1] == 1:
            return b.floats(values)
        groups = torch.arange(g.shape[1]) // g.group
        index = b.integers(groups, max((values.shape[1] - 1).bit_length(), 1))
        return b.op("Gather", b.floats(values), index, axis=1)

    zero = b.plain(torch.tensor(symmetric_zero(g.nbits))) if g.zero is None else each(g.zero.float())
    return b.op("Mul", b.op("Sub", codes, zero), each(g.scale))


def contraction(b: Nodes, operands: Sequence[tuple[str, str]], out: str, sizes: dict[str, int]) -> str:
    """The einsum of values, each with its letters, two at a time as `contracted` does it."""
    work = [value for _, value in operands]
    if len(work) == 1:
        return b.op("Einsum", work[0], equation=f"{operands[0][0]}->{out}")
    for i, j, equation in plan(tuple(letters for letters, _ in operands), tuple(sorted(sizes.items())), out):
        made = b.op("Einsum", work[i], work[j], equation=equation)
        work = [x for n, x in enumerate(work) if n not in (i, j)] + [made]
    return work[0]
