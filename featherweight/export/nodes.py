"""Building a piece of an ONNX graph: constants in the fewest bytes, and operators on them.

All that is built here has constant inputs only, so a runtime may compute it once, when it loads the file; onnxruntime
does that for everything but DequantizeLinear.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from featherweight._pack import pack

FLOAT, UINT8, INT32, INT64, BOOL, FLOAT16 = 1, 2, 6, 7, 9, 10  # numbers of types in the file, onnx.TensorProto.DataType
_PLAIN = {
    torch.float32: FLOAT,
    torch.float16: FLOAT16,
    torch.float64: 11,
    torch.bfloat16: 16,
    torch.uint8: UINT8,
    torch.int8: 3,
    torch.int16: 5,
    torch.int32: INT32,
    torch.int64: INT64,
    torch.bool: BOOL,
}
_UINT16 = 4
_SIGNED, _UNSIGNED = {8: 3, 4: 22, 2: 26}, {8: UINT8, 4: 21, 2: 25}
_OPSETS = {8: 13, 4: 21, 2: 25}  # that know integers of so many bits, for DequantizeLinear along one axis
BLOCKED = 21  # the first opset with a scale per block
LEVEL = 400  # bytes that the operators of a level of codes with an escape take, about
WORTH = 32  # bytes that an operator takes in the file, about: less is not worth one


@final
@dataclass(slots=True)
class Nodes:
    """What was built: operators and constants, `onnx.NodeProto` and `onnx.TensorProto`. opset: the lowest that knows
    them; latest: the last that may be used. Equal constants are one. tight: whether codes of 2, 4 and 8 bits may be
    packed into fewer, too, which no runtime reads as integers of these types."""

    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)
    opset: int = 18
    latest: int = max(_OPSETS.values())
    tight: bool = False
    known: dict[tuple[Any, ...], str] = field(default_factory=dict)
    count: int = 0

    @property
    def size(self) -> int:
        """Bytes that it adds to a file."""
        return sum(x.ByteSize() + 3 for x in (*self.nodes, *self.constants))

    def copied(self) -> "Nodes":
        return replace(self, nodes=[*self.nodes], constants=[*self.constants], known={**self.known})

    def name(self) -> str:
        """A new name, of a kind that no other part of the graph has."""
        self.count += 1
        return f"_{self.count}"

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """The output of a new operator; of an equal one that is there already, that one's."""
        from onnx import helper

        key = (kind, inputs, tuple(sorted((k, str(v)) for k, v in attributes.items())))
        if key not in self.known:
            self.known[key] = self.name()
            self.nodes.append(helper.make_node(kind, list(inputs), [self.known[key]], **attributes))
        return self.known[key]

    def raw(self, kind: int, dims: Sequence[int], data: bytes, name: str = "") -> str:
        """A constant of these bytes. name: where others look for it; else a new one."""
        from onnx import helper

        key = (kind, tuple(dims), data)
        if key not in self.known:
            self.known[key] = name or self.name()
            self.constants.append(helper.make_tensor(self.known[key], kind, list(dims), data, raw=True))
        return self.known[key]

    def plain(self, tensor: Tensor, name: str = "") -> str:
        """A constant in the type that it has."""
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy().tobytes()
        return self.raw(_PLAIN[tensor.dtype], tensor.shape, data, name)

    def whole(self, *values: int) -> str:
        """A vector of whole numbers, as operators take shapes and axes."""
        return self.plain(torch.tensor(values, dtype=torch.int64))

    def floats(self, tensor: Tensor, name: str = "") -> str:
        """A float32 value: a constant of float16 and a cast, where no bit is lost and bytes are saved by it."""
        exact = tensor.detach().float()
        half = exact.half()
        if 2 * exact.numel() > WORTH and torch.equal(half.float(), exact):
            return self.op("Cast", self.plain(half, name), to=FLOAT)
        return self.plain(exact, name)

    def reshaped(self, value: str, shape: Sequence[int]) -> str:
        return self.op("Reshape", value, self.whole(*shape))

    def unsigned(self, codes: Tensor, bits: int, name: str = "", least: int = 2) -> str:
        """Codes from 0 to 2**bits - 1 as a constant of 2, 4 or 8 bits each, whichever fits, not under `least`."""
        width = self._width(max(bits, least))
        self.opset = max(self.opset, _OPSETS[width])
        return self.raw(_UNSIGNED[width], codes.shape, pack(codes, width).numpy().tobytes(), name)

    def signed(self, codes: Tensor, bits: int, name: str = "") -> str:
        """The same as signed numbers: code - 2**(bits - 1)."""
        width = self._width(bits)
        self.opset = max(self.opset, _OPSETS[width])
        turned = (codes.int() - 2 ** (bits - 1)) & (2**width - 1)
        return self.raw(_SIGNED[width], codes.shape, pack(turned, width).numpy().tobytes(), name)

    def _width(self, bits: int) -> int:
        return next(w for w in (2, 4, 8) if w >= bits and _OPSETS[w] <= self.latest)

    def planes(self, codes: Tensor, bits: int, name: str = "") -> str:
        """Codes as a uint8 value of their shape, from constants of exactly as many bits: bytes of 8, 4, 2 or 1 codes
        for each power of two that the bits are a sum of, masked and divided apart."""
        total, low = "", 0
        for width in (w for w in (1, 2, 4, 8) if bits & w):
            part = (codes.int() >> low) & (2**width - 1)
            value = self._apart(part.reshape(-1), width, name if low == 0 else "")
            if low:
                value = self.op("Mul", value, self.plain(torch.tensor(2**low, dtype=torch.uint8)))
            total = self.op("Add", total, value) if total else value
            low += width
        return self.reshaped(total, codes.shape)

    def packed(self, codes: Tensor, bits: int, name: str = "") -> str:
        """Like `planes`, or in fewer bits where codes are of different frequency: each level has the commonest that are
        left, and an escape for the others, which follow in the next level."""
        flat = codes.reshape(-1)
        levels = _levels(flat, bits)
        if len(levels) < 2:
            return self.planes(codes, bits, name)

        def plain(b: "Nodes") -> str:
            return b.planes(codes, bits, name)

        def escaped(b: "Nodes") -> str:
            return b.reshaped(b._level(flat, levels, name), codes.shape)

        return self.smallest(plain, escaped)

    def _level(self, codes: Tensor, levels: "list[_Level]", name: str) -> str:
        """A flat uint8 value of the codes that are left."""
        (first, *others), last = levels, len(levels) == 1
        numbers = torch.full((256,), 2**first.width - 1, dtype=torch.uint8)
        numbers[first.codes.long()] = torch.arange(len(first.codes), dtype=torch.uint8)
        base = numbers[codes.long()]
        value = self.op("Cast", self.planes(base, first.width, name), to=INT32)
        table = self.plain(first.codes)
        if last:
            return self.op("Gather", table, value, axis=0)
        escape = 2**first.width - 1
        left = self.op("Equal", value, self.plain(torch.tensor(escape, dtype=torch.int32)))
        number = self.op("CumSum", self.op("Cast", left, to=INT32), self.plain(torch.tensor(0)))
        place = self.op("Add", number, self.plain(torch.tensor(escape - 1, dtype=torch.int32)))
        rest = self._level(codes[base == escape], others, f"{name}.{len(others)}" if name else "")
        known = self.op("Concat", table, rest, axis=0)
        return self.op("Gather", known, self.op("Where", left, place, value), axis=0)

    def _apart(self, codes: Tensor, width: int, name: str) -> str:
        """A flat uint8 value of codes, from bytes that hold several each."""
        data, each = pack(codes, width), 8 // width
        if each == 1:
            return self.plain(data, name)
        shifts = torch.arange(0, 8, width)
        masks = self.plain(((2**width - 1) << shifts).to(torch.uint8))
        held = self.op("BitwiseAnd", self.plain(data[:, None], name), masks)
        value = self.reshaped(self.op("Div", held, self.plain((1 << shifts).to(torch.uint8))), (-1,))
        if len(codes) % each:
            value = self.op("Slice", value, self.whole(0), self.whole(len(codes)))
        return value

    def integers(self, codes: Tensor, bits: int, name: str = "") -> str:
        """An int32 value of codes from 0 to 2**bits - 1, bits up to 16."""
        if bits > 8:
            high, low = codes.int() >> 8, codes.int() & 255

            def split(b: "Nodes") -> str:
                above = b.op("Mul", b.integers(high, bits - 8), b.plain(torch.tensor(256, dtype=torch.int32)))
                return b.op("Add", above, b.integers(low, 8, name))

            def wide(b: "Nodes") -> str:
                return b.op("Cast", b.raw(_UINT16, codes.shape, _words(codes), name), to=INT32)

            return self.smallest(wide, split)

        def native(b: "Nodes") -> str:
            return b.op("Cast", b.unsigned(codes, bits, name, least=4), to=INT32)

        def packed(b: "Nodes") -> str:
            return b.op("Cast", b.packed(codes, bits, name), to=INT32)

        return self.smallest(native, packed)

    def smallest(self, *ways: Callable[["Nodes"], str]) -> str:
        """Of several ways to build a value the one that takes the fewest bytes, the first of equal ones."""
        tried = [(built := self.copied(), way(built)) for way in ways]
        best, value = min(tried, key=lambda t: t[0].size)
        self.nodes, self.constants, self.known = best.nodes, best.constants, best.known
        self.opset, self.count = best.opset, best.count
        return value


@final
@dataclass(frozen=True, slots=True)
class _Level:
    """codes: uint8, the commonest of those that are left: all, or 2**width - 1 of them, the last number being that of
    the escape."""

    width: int
    codes: Tensor


def _levels(codes: Tensor, bits: int) -> list[_Level]:
    """The levels that take the fewest bytes, for codes (n,) of at most 8 bits."""
    counts = torch.bincount(codes.long(), minlength=2**bits)
    order = counts.argsort(descending=True, stable=True)
    order = order[counts[order] > 0]
    left = counts[order].flip(0).cumsum(0).flip(0).tolist()  # how many codes are at this rank or beyond
    best: list[tuple[float, int]] = [(0.0, 0)] * (len(order) + 1)  # bytes from this rank on, and the width
    for rank in range(len(order) - 1, -1, -1):
        tried = []
        for width in range(1, 9):
            done = len(order) - rank <= 2**width
            after = 0.0 if done else best[rank + 2**width - 1][0]
            tried.append((left[rank] * width / 8 + LEVEL + after, width))
        best[rank] = min(tried)
    found, rank = [], 0
    while rank < len(order):
        width = best[rank][1]
        whole = len(order) - rank <= 2**width
        size = len(order) - rank if whole else 2**width - 1
        found.append(_Level(width, order[rank : rank + size].to(torch.uint8)))
        rank += size
    return found


def _words(codes: Tensor) -> bytes:
    return codes.to(torch.int32).contiguous().numpy().astype("<u2").tobytes()
