"""Every kind of stored weight as ONNX nodes that decode it: small in the file, exact to the last bits of a float."""

from typing import Any

import torch
from torch import Tensor

from featherweight.export.nodes import Nodes, Value
from featherweight.layers import View
from featherweight.weights import Codebook, Dense, Factors, Grid, Sparse, Weight
from featherweight.weights.codebook import entry_order
from featherweight.weights.grid import symmetric_zero

NATIVE = (2, 4, 8)  # widths that ONNX has integers of


def decoded(g: Nodes, weight: Weight, view: View, name: str) -> tuple[Value, str]:
    """The parameter `name` as float32, and in words how it is stored, for people."""
    match weight:
        case Grid():
            return _grid(g, weight, view, name)
        case Sparse(values=Grid(nbits=bits) as values) if bits > 1:
            found, how = _grid(g, _zeroed(values, weight.mask), view, name)
            return found, f"{how}, zeros as codes"
        case Sparse(values=Codebook() as values):
            return _viewed(g, _words_kept(g, values, weight.mask, name), view), f"{_books(values)}, bit mask"
        case Sparse():
            return _sparse(g, weight, view, name)
        case Codebook():
            return _viewed(g, _words(g, weight, name), view), _books(weight)
        case Factors():
            return _viewed(g, _factors(g, weight, name), view), f"{len(weight.parts)} factors, Einsum"
        case Dense():
            tensor = view.tensor(weight.values)
            return g.floats(tensor, name), str(tensor.dtype).removeprefix("torch.")
    raise AssertionError(weight.kind)


def _viewed(g: Nodes, matrix: Value, view: View) -> Value:
    """The parameter of a matrix (rows, cols), see View.tensor."""
    if view.transposed_groups:
        inputs, outputs = view.shape[:2]
        matrix = g.add("Reshape", matrix, g.ints(view.transposed_groups, outputs, inputs // view.transposed_groups, -1))
        matrix = g.add("Transpose", matrix, perm=[0, 2, 1, 3])
    elif len(view.shape) == 2:
        return matrix
    return g.add("Reshape", matrix, g.ints(*view.shape))


# ---------------------------------------------------------------- grids
def _grid(g: Nodes, weight: Grid, view: View, name: str) -> tuple[Value, str]:
    rows, cols = weight.shape
    blocked = weight.scale.shape[1] > 1
    if weight.nbits in NATIVE or blocked:
        width = next(n for n in NATIVE if n >= weight.nbits)
        # Never a matrix: onnxruntime makes MatMulNBits of a matrix that is multiplied, which rounds its inputs, too
        plain = not blocked and not view.transposed_groups and len(view.shape) > 2
        shape = view.shape if plain else (rows, cols, 1)
        scale = weight.scale[:, :, None] if blocked else weight.scale.reshape(-1)
        if weight.zero is None:
            shift = 2 ** (width - 1) - 2 ** (weight.nbits - 1)
            inputs = [g.codes(weight.codes.reshape(shape) + shift, width, True, name)]
            inputs.append(_scale(g, scale))
        else:
            inputs = [g.codes(weight.codes.reshape(shape), width, False, name), _scale(g, scale)]
            inputs.append(g.codes(_like_scale(weight.zero, scale), width, False))
        axis: dict[str, Any] = (
            {"axis": 1, "block_size": weight.group} if blocked else {"axis": 0} if len(scale) > 1 else {}
        )
        g.opset = max(g.opset, 21) if blocked else g.opset
        found = g.add("DequantizeLinear", *inputs, **axis)
        how = f"int{width}" + f", blocks of {weight.group}" * blocked
        if not plain:
            found = _viewed(g, g.add("Reshape", found, g.ints(rows, cols)), view)
        return found, how
    codes = g.unpacked(weight.codes, weight.nbits, name)
    zero = torch.tensor(symmetric_zero(weight.nbits)) if weight.zero is None else weight.zero.float()
    found = g.add("Mul", g.add("Sub", codes, g.floats(zero)), _scale(g, weight.scale))
    return _viewed(g, found, view), f"{weight.nbits} bits packed"


def _scale(g: Nodes, scale: Tensor) -> Value:
    """One number as a scalar."""
    return g.floats(scale.reshape(()) if scale.numel() == 1 and scale.ndim == 1 else scale)


def _like_scale(zero: Tensor, scale: Tensor) -> Tensor:
    return zero.reshape(()) if scale.numel() == 1 and scale.ndim == 1 else zero.reshape(scale.shape)


def _zeroed(values: Grid, mask: Tensor) -> Grid:
    """With the code of zero wherever nothing is kept."""
    from featherweight.weights.grid import per_entry

    zero = torch.tensor(symmetric_zero(values.nbits)) if values.zero is None else values.zero
    zero = zero.expand(values.shape) if zero.ndim == 0 else per_entry(zero, values.shape, values.group)
    codes = torch.where(mask, values.codes, zero.to(torch.uint8))
    return Grid(codes, values.scale, values.zero, values.nbits, values.group)


# ---------------------------------------------------------------- kept entries
def _sparse(g: Nodes, weight: Sparse, view: View, name: str) -> tuple[Value, str]:
    """Kept values alone beside a mask, or a matrix with zeros in it, whichever takes fewer bytes."""
    dense = weight.dense()
    values = weight.values
    exact = dense.half() if isinstance(values, Dense) and values.values.dtype == torch.float16 else dense
    rows, cols = weight.shape
    kept, half = int(weight.mask.sum()), exact.element_size()
    if isinstance(values, Grid):  # of one bit, where no code means 0
        codes = g.unpacked(values.codes, values.nbits, name)
        points = g.add("Mul", g.add("Sub", codes, g.floats(torch.tensor(0.5))), _scale(g, values.scale))
        return _viewed(g, g.add("Mul", points, _mask(g, weight.mask)), view), "1 bit packed, bit mask"
    if kept * half + rows * cols / 8 > rows * cols * half:
        return g.floats(view.tensor(exact), name), f"{str(exact.dtype).removeprefix('torch.')} with zeros"
    where = g.add("Transpose", g.add("NonZero", _mask(g, weight.mask)), perm=[1, 0])
    found = g.add("ScatterND", g.filled((rows, cols), 0.0), where, g.floats(exact[weight.mask], name))
    return _viewed(g, found, view), f"{str(exact.dtype).removeprefix('torch.')} kept values, bit mask"


def _mask(g: Nodes, mask: Tensor) -> Value:
    """(rows, cols) float32 zeros and ones: of rows times columns where it is that."""
    rows, cols = mask.any(dim=1), mask.any(dim=0)
    if torch.equal(mask, rows[:, None] & cols):
        return g.add("Mul", g.unpacked(rows[:, None], 1), g.unpacked(cols[None], 1))
    return g.unpacked(mask, 1)


# ---------------------------------------------------------------- vectors
def _books(weight: Codebook) -> str:
    return " + ".join(str(len(b)) for b in weight.books) + f" words of {weight.d}, Gather"


def _entries(g: Nodes, weight: Codebook, name: str) -> Value:
    """(rows, vectors * d): scales times the sums of the words."""
    rows, vectors, _ = weight.codes.shape
    total = None
    for m, book in enumerate(weight.books):
        bits, codes, own = (len(book) - 1).bit_length(), weight.codes[:, :, m], f"{name}.{m}" if m else name
        if bits in NATIVE:
            index = g.add("Cast", g.codes(codes, bits, False, own), to=6)
        else:
            index = g.add("Cast", g.unpacked(codes, bits, own), to=6)
        words = g.add("Gather", g.floats(book), index, axis=0)
        total = words if total is None else g.add("Add", total, words)
    assert total is not None
    flat = g.add("Reshape", total, g.ints(rows, vectors * weight.d))
    return g.add("Mul", flat, g.floats(weight.scale))


def _in_order(g: Nodes, entries: Value, rows: int, cols: int, taps: int) -> Value:
    """Columns as the matrix has them, of entries as vectors take them: see entry_order."""
    if taps == 1:
        return entries
    turned = g.add("Transpose", g.add("Reshape", entries, g.ints(rows, taps, cols // taps)), perm=[0, 2, 1])
    return g.add("Reshape", turned, g.ints(rows, cols))


def _words(g: Nodes, weight: Codebook, name: str) -> Value:
    rows, cols = weight.shape
    entries = _entries(g, weight, name)
    if weight.codes.shape[1] * weight.d > cols:
        entries = g.add("Slice", entries, g.ints(0), g.ints(cols), g.ints(1))
    return _in_order(g, entries, rows, cols, weight.taps)


def _words_kept(g: Nodes, weight: Codebook, mask: Tensor, name: str) -> Value:
    """The entries of a row go to the kept columns, in their order."""
    rows, cols = weight.shape
    entries = _entries(g, weight, name)
    kept = _mask(g, mask[:, entry_order(cols, weight.taps)])
    counts = g.add("ReduceSum", kept, g.ints(1), keepdims=1)
    places = torch.arange(weight.codes.shape[1] * weight.d)[None].float()
    meant = g.add("Less", g.floats(places), counts)
    values = g.add("GatherND", entries, _indices(g, meant))
    found = g.add("ScatterND", g.filled((rows, cols), 0.0), _indices(g, kept), values)
    return _in_order(g, found, rows, cols, weight.taps)


def _indices(g: Nodes, mask: Value) -> Value:
    return g.add("Transpose", g.add("NonZero", mask), perm=[1, 0])


# ---------------------------------------------------------------- factors
def _factors(g: Nodes, weight: Factors, name: str) -> Value:
    parts = []
    for k, (term, part) in enumerate(zip(weight.terms, weight.parts, strict=True)):
        found, _ = decoded(g, part, View(part.shape), f"{name}.{k}")
        parts.append(g.add("Reshape", found, g.ints(*(weight.sizes[x] for x in term))))
    whole = g.add("Einsum", *parts, equation=f"{','.join(weight.terms)}->{weight.axes}")
    return g.add("Reshape", whole, g.ints(*weight.shape))
