"""How the zeros of a matrix are written down: which entries of a (rows, cols) matrix are kept.

Columns are input channels times `taps` (the positions of a convolution's kernel), a channel's taps side by side. Groups
of a pattern run along the channels at a fixed tap, as the hardware for N:M sparsity reads them; the last group of a row
of channels may be short, and counts as filled up with zeros.

Every form here has `size(shape)`, in bytes; `encode(keep)`, a uint8 vector of that size for a mask that fits it; and
`decode`, its inverse, which raises FormatError where no mask is stored like that. All but Bitmap have a `kind`,
`meta()` and `load(meta, shape)`, like a Weight.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import ceil, comb
from typing import ClassVar, Self, TypeAlias, final

import torch
from torch import Tensor

from featherweight._pack import pack, packed_size, unpack
from featherweight.errors import FormatError, require
from featherweight.weights.base import Meta, field

LARGEST = 16  # M of an N:M pattern: its combinations must be numbered in at most 16 bits
LONGEST = 64  # channels of a block


def channel_groups(cols: int, taps: int, size: int) -> Tensor:
    """(groups, size) int64, the columns of every group, tap after tap; -1 where the last group of a tap is short.

    >>> channel_groups(6, 2, 2)
    tensor([[ 0,  2],
            [ 4, -1],
            [ 1,  3],
            [ 5, -1]])
    """
    channels = cols // taps
    columns = torch.arange(cols).reshape(channels, taps).T
    filled = torch.nn.functional.pad(columns, (0, -channels % size), value=-1)
    return filled.reshape(-1, size)


def grouped(entries: Tensor, groups: Tensor) -> Tensor:
    """(rows, groups, size) of (rows, cols), with zeros in the places that no column fills."""
    return torch.where(groups >= 0, entries[:, groups.clamp(min=0)], torch.zeros((), dtype=entries.dtype))


def ungrouped(entries: Tensor, groups: Tensor, cols: int) -> Tensor:
    """The inverse of `grouped`."""
    out = entries.new_zeros(entries.shape[0], cols)
    filled = groups >= 0
    out[:, groups[filled]] = entries[:, filled]
    return out


@final
@dataclass(frozen=True, slots=True)
class Bitmap:
    """A bit an entry: for any mask."""

    def size(self, shape: tuple[int, int]) -> int:
        return packed_size(shape[0] * shape[1], 1)

    def encode(self, keep: Tensor) -> Tensor:
        return pack(keep, 1)

    def decode(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        return _bits(packed, shape[0] * shape[1]).reshape(shape)


@final
@dataclass(frozen=True, slots=True)
class BlockMap:
    """A bit for every `size` weights along the input channels, kept or removed together."""

    kind: ClassVar[str] = "blocks"
    block: int
    taps: int = 1

    def __post_init__(self) -> None:
        require(1 <= self.block <= LONGEST, f"a block must have 1 to {LONGEST} channels", self.block)
        require(self.taps >= 1, "taps must be at least 1", self.taps)

    def size(self, shape: tuple[int, int]) -> int:
        return packed_size(shape[0] * self.taps * ceil(shape[1] // self.taps / self.block), 1)

    def encode(self, keep: Tensor) -> Tensor:
        groups = channel_groups(keep.shape[1], self.taps, self.block)
        whole = grouped(keep, groups).any(dim=2)
        fits = torch.equal(ungrouped(whole[:, :, None].expand(-1, -1, self.block), groups, keep.shape[1]), keep)
        require(fits, f"the mask must keep or remove whole blocks of {self.block} channels", "others")
        return pack(whole, 1)

    def decode(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        groups = channel_groups(shape[1], self.taps, self.block)
        whole = _bits(packed, shape[0] * len(groups)).reshape(shape[0], -1, 1)
        return ungrouped(whole.expand(-1, -1, self.block), groups, shape[1])

    def meta(self) -> Meta:
        return {"block": self.block, "taps": self.taps}

    @classmethod
    def load(cls, meta: Meta, shape: tuple[int, int]) -> Self:
        return cls(field(meta, "block", range(1, LONGEST + 1)), _taps(meta, shape))


@final
@dataclass(frozen=True, slots=True)
class NofM:
    """Of every m weights along the input channels n are kept: the number of the combination, in as few bits as number
    all of them (2 of 4: 3 bits, 0.75 a weight)."""

    kind: ClassVar[str] = "n:m"
    n: int
    m: int
    taps: int = 1

    def __post_init__(self) -> None:
        require(1 <= self.n <= self.m <= LARGEST, f"an N:M pattern needs 1 <= N <= M <= {LARGEST}", (self.n, self.m))
        require(self.taps >= 1, "taps must be at least 1", self.taps)

    @property
    def bits(self) -> int:
        """For one group."""
        return (comb(self.m, self.n) - 1).bit_length()

    def size(self, shape: tuple[int, int]) -> int:
        return packed_size(shape[0] * self.taps * ceil(shape[1] // self.taps / self.m), self.bits)

    def encode(self, keep: Tensor) -> Tensor:
        groups = channel_groups(keep.shape[1], self.taps, self.m)
        kept = grouped(keep, groups)
        places = torch.arange(self.m)
        spare = (groups < 0)[None] & (self.n - kept.sum(dim=2, keepdim=True) > 0)  # a short group: count zeros as kept
        first = places[None, None] - (groups >= 0).sum(dim=1)[None, :, None]  # the how-manieth filler
        kept = kept | (spare & (first < self.n - kept.sum(dim=2, keepdim=True)))
        require(bool((kept.sum(dim=2) == self.n).all()), f"the mask must keep {self.n} of every {self.m}", "others")
        if self.bits == 0:
            return torch.empty(0, dtype=torch.uint8)
        return pack(_numbers(self.n, self.m)[(kept.long() << places).sum(dim=2)], self.bits)

    def decode(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        groups = channel_groups(shape[1], self.taps, self.m)
        count = shape[0] * len(groups)
        masks = _masks(self.n, self.m)
        number = torch.zeros(count, dtype=torch.int64)
        if self.bits:
            number = _unpacked(packed, self.bits, count).long()
        if number.numel() and int(number.max()) >= len(masks):
            raise FormatError(f"a group's number is {int(number.max())}, but {self.n} of {self.m} has {len(masks)}")
        kept = (masks[number][:, None] >> torch.arange(self.m) & 1).bool().reshape(shape[0], -1, self.m)
        keep = ungrouped(kept, groups, shape[1])
        if not torch.equal(self.encode(keep), packed):
            raise FormatError("the last group of a row of channels is not stored as the format says")
        return keep

    def meta(self) -> Meta:
        return {"n": self.n, "m": self.m, "taps": self.taps}

    @classmethod
    def load(cls, meta: Meta, shape: tuple[int, int]) -> Self:
        m = field(meta, "m", range(1, LARGEST + 1))
        return cls(field(meta, "n", range(1, m + 1)), m, _taps(meta, shape))


@final
@dataclass(frozen=True, slots=True)
class RowMap:
    """A bit a row: whole outputs are removed."""

    kind: ClassVar[str] = "rows"

    def size(self, shape: tuple[int, int]) -> int:
        return packed_size(shape[0], 1)

    def encode(self, keep: Tensor) -> Tensor:
        whole = keep.any(dim=1)
        require(torch.equal(whole[:, None].expand_as(keep), keep), "the mask must keep or remove whole rows", "others")
        return pack(whole, 1)

    def decode(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        return _bits(packed, shape[0])[:, None].expand(shape).contiguous()

    def meta(self) -> Meta:
        return {}

    @classmethod
    def load(cls, meta: Meta, shape: tuple[int, int]) -> Self:
        return cls()


@final
@dataclass(frozen=True, slots=True)
class ChannelMap:
    """A bit an input channel, for every block of rows with inputs of its own: whole channels are removed."""

    kind: ClassVar[str] = "channels"
    taps: int = 1
    groups: int = 1

    def __post_init__(self) -> None:
        require(self.taps >= 1 and self.groups >= 1, "taps and groups must be at least 1", (self.taps, self.groups))

    def size(self, shape: tuple[int, int]) -> int:
        return packed_size(self.groups * (shape[1] // self.taps), 1)

    def encode(self, keep: Tensor) -> Tensor:
        parts = keep.reshape(self.groups, -1, keep.shape[1] // self.taps, self.taps)
        whole = parts.any(dim=3).any(dim=1)
        require(
            torch.equal(whole[:, None, :, None].expand_as(parts), parts), "the mask must fit whole channels", "others"
        )
        return pack(whole, 1)

    def decode(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        channels = shape[1] // self.taps
        whole = _bits(packed, self.groups * channels).reshape(self.groups, 1, channels, 1)
        rows = shape[0] // self.groups
        return whole.expand(self.groups, rows, channels, self.taps).reshape(shape)

    def meta(self) -> Meta:
        return {"taps": self.taps, "groups": self.groups}

    @classmethod
    def load(cls, meta: Meta, shape: tuple[int, int]) -> Self:
        groups = field(meta, "groups", range(1, max(shape[0], 1) + 1))
        if shape[0] % groups:
            raise FormatError(f"{shape[0]} rows are not {groups} equal blocks")
        return cls(_taps(meta, shape), groups)


@final
@dataclass(frozen=True, slots=True)
class BoxMap:
    """A bit a row and a bit an input channel: what is left is a smaller matrix."""

    kind: ClassVar[str] = "box"
    taps: int = 1

    def __post_init__(self) -> None:
        require(self.taps >= 1, "taps must be at least 1", self.taps)

    def size(self, shape: tuple[int, int]) -> int:
        return packed_size(shape[0] + shape[1] // self.taps, 1)

    def encode(self, keep: Tensor) -> Tensor:
        rows = keep.any(dim=1)
        channels = keep.reshape(len(keep), -1, self.taps).any(dim=2).any(dim=0)
        whole = rows[:, None] & channels.repeat_interleave(self.taps)
        require(torch.equal(whole, keep), "the mask must be whole channels of whole rows", "others")
        return pack(torch.cat([rows, channels]), 1)

    def decode(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        bits = _bits(packed, shape[0] + shape[1] // self.taps)
        rows, channels = bits[: shape[0]], bits[shape[0] :]
        if bool(rows.any()) != bool(channels.any()):
            raise FormatError("a mask of rows and channels keeps none of the one and some of the other")
        return rows[:, None] & channels.repeat_interleave(self.taps)

    def meta(self) -> Meta:
        return {"taps": self.taps}

    @classmethod
    def load(cls, meta: Meta, shape: tuple[int, int]) -> Self:
        return cls(_taps(meta, shape))


AnyMask: TypeAlias = Bitmap | BlockMap | NofM | RowMap | ChannelMap | BoxMap
MASKS: dict[str, type[BlockMap] | type[NofM] | type[RowMap] | type[ChannelMap] | type[BoxMap]] = {
    m.kind: m for m in (BlockMap, NofM, RowMap, ChannelMap, BoxMap)
}  # what a file names; a Bitmap has no name there


def _taps(meta: Meta, shape: tuple[int, int]) -> int:
    taps = field(meta, "taps", range(1, max(shape[1], 1) + 1))
    if shape[1] % taps:
        raise FormatError(f"{shape[1]} columns are not whole channels of {taps} taps")
    return taps


def _unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    try:
        return unpack(packed, bits, count)
    except ValueError as error:
        raise FormatError(str(error)) from None


def _bits(packed: Tensor, count: int) -> Tensor:
    return _unpacked(packed, 1, count).bool()


@lru_cache(maxsize=64)
def _masks(n: int, m: int) -> Tensor:
    """(combinations,) int64, the bits of every choice of n of m places, in lexicographic order of the places."""
    return torch.tensor([sum(1 << i for i in chosen) for chosen in combinations(range(m), n)])


@lru_cache(maxsize=64)
def _numbers(n: int, m: int) -> Tensor:
    """(2**m,) int32, the number of each mask among `_masks`; 0 for the others."""
    masks = _masks(n, m)
    table = torch.zeros(2**m, dtype=torch.int32)
    table[masks] = torch.arange(len(masks), dtype=torch.int32)
    return table
