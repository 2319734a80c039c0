"""Which entries of a matrix may be removed together, and how many: what a pruner is asked for.

Blocks and N:M groups run along the input channels at a fixed tap, see weights/masks.py. Where the channels do not fill
the last group, it counts as filled up with zeros: of a short N:M group up to N weights stay, and a short block is one.
"""

import math
from dataclasses import dataclass, replace
from typing import TypeAlias, final

import torch
from torch import Tensor

from featherweight.errors import require
from featherweight.weights.masks import (
    LARGEST,
    LONGEST,
    AnyMask,
    Bitmap,
    BlockMap,
    ChannelMap,
    NofM,
    RowMap,
    channel_groups,
    grouped,
    ungrouped,
)


def _share(value: float) -> None:
    require(isinstance(value, int | float) and 0 <= value < 1, "sparsity must be at least 0 and below 1", value)


@final
@dataclass(frozen=True, slots=True)
class Unstructured:
    """Any weights. sparsity: share of them to remove."""

    sparsity: float

    def __post_init__(self) -> None:
        _share(self.sparsity)

    @property
    def label(self) -> str:
        return f"{self.sparsity:.0%}"


@final
@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of `size` weights along the input channels. sparsity: share of the blocks to remove."""

    sparsity: float
    size: int = 4

    def __post_init__(self) -> None:
        _share(self.sparsity)
        fine = type(self.size) is int and 1 <= self.size <= LONGEST
        require(fine, f"a block must have 1 to {LONGEST} channels", self.size)

    @property
    def label(self) -> str:
        return f"{self.sparsity:.0%} blocks of {self.size}"


@final
@dataclass(frozen=True, slots=True)
class NM:
    """At most n of every m weights along the input channels are kept."""

    n: int
    m: int

    def __post_init__(self) -> None:
        fine = type(self.n) is int and type(self.m) is int and 1 <= self.n <= self.m <= LARGEST
        require(fine, f"an N:M pattern needs 1 <= N <= M <= {LARGEST}", (self.n, self.m))

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    @property
    def label(self) -> str:
        return f"{self.n}:{self.m}"


@final
@dataclass(frozen=True, slots=True)
class Rows:
    """Whole rows: output channels. sparsity: share of them to remove."""

    sparsity: float

    def __post_init__(self) -> None:
        _share(self.sparsity)

    @property
    def label(self) -> str:
        return f"{self.sparsity:.0%} rows"


@final
@dataclass(frozen=True, slots=True)
class Channels:
    """Whole input channels, with all their taps, in all rows that read them. sparsity: share of them to remove."""

    sparsity: float

    def __post_init__(self) -> None:
        _share(self.sparsity)

    @property
    def label(self) -> str:
        return f"{self.sparsity:.0%} channels"


Pattern: TypeAlias = Unstructured | Blocks | NM | Rows | Channels


def check(pattern: object) -> None:
    """Refuse anything but a pattern."""
    require(isinstance(pattern, Pattern), "a pruner needs a pattern such as Unstructured(0.5) or NM(2, 4)", pattern)


def mask_of(pattern: Pattern, taps: int, groups: int) -> AnyMask:
    """How the masks of a pattern are stored, in a matrix of `groups` row blocks with inputs of their own."""
    match pattern:
        case Unstructured():
            return Bitmap()
        case Blocks():
            return BlockMap(pattern.size, taps)
        case NM():
            return NofM(pattern.n, pattern.m, taps)
        case Rows():
            return RowMap()
        case Channels():
            return ChannelMap(taps, groups)


def parts(pattern: Pattern, shape: tuple[int, int], taps: int, groups: int) -> int:
    """How many pieces of a (rows, cols) matrix the pattern keeps or removes."""
    rows, cols = shape
    match pattern:
        case Unstructured() | NM():
            return rows * cols
        case Blocks():
            return rows * taps * math.ceil(cols // taps / pattern.size)
        case Rows():
            return rows
        case Channels():
            return groups * (cols // taps)


def removals(pattern: Pattern, shape: tuple[int, int], taps: int, groups: int) -> int:
    """How many of the `parts` are removed. At least one row or channel stays, however few there are."""
    if isinstance(pattern, NM):
        return shape[0] * int(quota(pattern, shape[1], taps)[1].sum())
    total = parts(pattern, shape, taps, groups)
    count = round(total * pattern.sparsity)
    return min(count, total - 1) if isinstance(pattern, Rows | Channels) else count


def whole(pattern: Pattern) -> Pattern:
    """The pattern at no sparsity in particular: what all patterns that share a trace have in common."""
    return pattern if isinstance(pattern, NM) else replace(pattern, sparsity=0.0)


def quota(pattern: NM, cols: int, taps: int) -> tuple[Tensor, Tensor]:
    """(group of every column (cols,), removals in every group (groups,))."""
    columns = channel_groups(cols, taps, pattern.m)
    filled = columns >= 0
    group = torch.empty(cols, dtype=torch.int64)
    group[columns[filled]] = torch.arange(len(columns))[:, None].expand_as(columns)[filled]
    return group, (filled.sum(dim=1) - pattern.n).clamp(min=0)


def is_padded(pattern: Pattern, cols: int, taps: int) -> bool:
    """Whether the channels do not fill the last group."""
    size = pattern.m if isinstance(pattern, NM) else pattern.size if isinstance(pattern, Blocks) else 1
    return cols // taps % size > 0


def keep_largest(score: Tensor, pattern: Pattern, taps: int, groups: int) -> Tensor:
    """The mask, (rows, cols) bool, of the pattern with the largest sum of scores (rows, cols) of what is kept; of equal
    scores the first are removed."""
    rows, cols = score.shape
    count = removals(pattern, (rows, cols), taps, groups)
    match pattern:
        case Unstructured():
            return _without_smallest(score.reshape(-1), count).reshape(rows, cols)
        case Blocks():
            columns = channel_groups(cols, taps, pattern.size)
            kept = _without_smallest(grouped(score, columns).sum(dim=2).reshape(-1), count).reshape(rows, -1, 1)
            return ungrouped(kept.expand(-1, -1, pattern.size), columns, cols)
        case NM():
            columns = channel_groups(cols, taps, pattern.m)
            scores = torch.where(columns >= 0, grouped(score, columns), -math.inf)
            places = torch.arange(pattern.m)
            ahead = (scores[..., None, :] > scores[..., None]) | (  # of each place, which are kept rather than it
                (scores[..., None, :] == scores[..., None]) & (places > places[:, None])
            )
            return ungrouped(ahead.sum(dim=3) < pattern.n, columns, cols)
        case Rows():
            return _without_smallest(score.sum(dim=1), count)[:, None].expand(rows, cols).contiguous()
        case Channels():
            by_channel = score.reshape(groups, rows // groups, cols // taps, taps).sum(dim=(1, 3))
            kept = _without_smallest(by_channel.reshape(-1), count).reshape(groups, 1, -1, 1)
            return kept.expand(groups, rows // groups, -1, taps).reshape(rows, cols)


def _without_smallest(score: Tensor, count: int) -> Tensor:
    if count == 0:
        return torch.ones(len(score), dtype=torch.bool)
    edge = score.kthvalue(count).values  # several times faster than sorting
    keep = score > edge
    ties = (score == edge).nonzero()[:, 0]
    keep[ties[count - int((score < edge).sum()) :]] = True
    return keep
