"""Masks of pruned weights as ONNX operators: as few bits as each pattern needs."""

import torch
from torch import Tensor

from featherweight.export.nodes import Nodes
from featherweight.weights import Sparse
from featherweight.weights.masks import BlockMap, BoxMap, ChannelMap, NofM, RowMap, _masks


def bits_of(b: Nodes, mask: Tensor) -> str:
    """A uint8 value of zeros and ones, a bit each."""
    return b.planes(mask.to(torch.uint8), 1)


def mask_of(b: Nodes, w: Sparse) -> str:
    """A uint8 value of rows * cols zeros and ones, in the order of the matrix."""
    rows, cols = w.shape
    taps = getattr(w.form, "taps", 1)
    channels = cols // taps

    def each(b: Nodes) -> str:
        return bits_of(b, w.mask)

    def by_form(b: Nodes) -> str:
        match w.form:
            case RowMap():
                return b.op("Expand", bits_of(b, w.mask.any(dim=1)[:, None]), b.whole(rows, cols))
            case ChannelMap(groups=groups):
                parts = w.mask.reshape(groups, -1, channels, taps).any(dim=3).any(dim=1)
                given = bits_of(b, parts.reshape(groups, 1, channels, 1))
                return b.op("Expand", given, b.whole(groups, rows // groups, channels, taps))
            case BoxMap():
                columns = w.mask.reshape(rows, channels, taps).any(dim=2).any(dim=0)
                product = b.op(
                    "Mul", bits_of(b, w.mask.any(dim=1).reshape(-1, 1, 1)), bits_of(b, columns.reshape(1, -1, 1))
                )
                return b.op("Expand", product, b.whole(rows, channels, taps))
            case BlockMap(block=block):
                tapwise = w.mask.reshape(rows, channels, taps).transpose(1, 2)
                whole = torch.nn.functional.pad(tapwise, (0, -channels % block)).reshape(rows, taps, -1, block)
                given = b.op("Expand", bits_of(b, whole.any(dim=3, keepdim=True)), b.whole(*whole.shape))
                return _by_taps(b, given, rows, taps, channels, -channels % block)
            case NofM(n=n, m=m) if w.form.bits:
                tapwise = w.mask.reshape(rows, channels, taps).transpose(1, 2)
                masks = _masks(n, m)
                whole = torch.nn.functional.pad(tapwise, (0, -channels % m)).reshape(rows, taps, -1, m)
                numbers = _numbers(masks, whole, channels)
                if numbers is None:
                    return each(b)
                table = ((masks[:, None] >> torch.arange(m)) & 1).to(torch.uint8)
                given = b.op("Gather", b.plain(table), b.integers(numbers, w.form.bits), axis=0)
                return _by_taps(b, given, rows, taps, channels, -channels % m)
        return each(b)

    return b.smallest(each, by_form)


def _numbers(masks: Tensor, kept: Tensor, channels: int) -> Tensor | None:
    """The number among `masks` of every group (rows, taps, groups, m) of kept places: one that agrees in those that
    are among the channels. None where some group has none."""
    *_, groups, m = kept.shape
    real = torch.arange(groups * m).reshape(groups, m) < channels
    places = torch.arange(m)
    bits, within = ((x.long() << places).sum(dim=-1) for x in (kept, real))
    agrees = (masks & within[:, None]) == bits[..., None]
    return agrees.int().argmax(dim=-1) if bool(agrees.any(dim=-1).all()) else None


def _by_taps(b: Nodes, value: str, rows: int, taps: int, channels: int, spare: int) -> str:
    """(rows, channels, taps) of a value whose groups lie along the channels, tap after tap."""
    value = b.reshaped(value, (rows, taps, channels + spare))
    if spare:
        value = b.op("Slice", value, b.whole(0), b.whole(channels), b.whole(2))
    return b.op("Transpose", value, perm=[0, 2, 1])
