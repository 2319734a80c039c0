"""The streams of a file: all payload of one element type each, taken piece by piece."""

import zlib
from dataclasses import dataclass
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from featherweight.artifact.checks import is_count
from featherweight.artifact.schema import STREAMS
from featherweight.coding import decode_floats
from featherweight.errors import FormatError

DENSEST_CODE = 2048  # bytes that a coded byte can stand for: 1,032 by zlib, fewer as floats


@final
@dataclass(slots=True)
class Stream:
    """All payload of one element type, taken piece by piece."""

    name: str
    values: Tensor
    taken: int = 0

    def take(self, count: int, where: str) -> Tensor:
        if count > len(self.values) - self.taken:
            left = len(self.values) - self.taken
            raise FormatError(f"{where} needs {count} elements of '{self.name}', {left} are left")
        self.taken += count
        return self.values[self.taken - count : self.taken]

    def finish(self) -> None:
        if self.taken != len(self.values):
            raise FormatError(f"'{self.name}' has {len(self.values) - self.taken} elements that nothing uses")


def streams_of(data: bytes) -> dict[str, Stream]:
    try:
        tensors = load_safetensors(data)
    except SafetensorError as error:
        raise FormatError(f"damaged: {error}") from None
    if "bool" in tensors and (tensors["bool"].view(torch.uint8) > 1).any():
        raise FormatError("'bool' holds bytes other than 0 and 1")
    empty = {name: torch.empty(0, dtype=dtype) for name, dtype in STREAMS.items()}
    return {name: Stream(name, values) for name, values in (empty | tensors).items()}


def decode_streams(said: Any, streams: dict[str, Stream]) -> None:
    """Put the streams that are coded, which come next in the bytes, in their place."""
    if not isinstance(said, dict) or not set(said) <= set(STREAMS) - {"u8"}:
        raise FormatError(f"'streams' must be an object of streams that are coded, got {said!r}")
    for name in sorted(said):
        own = said[name]
        if not isinstance(own, list) or len(own) != 2 or not all(map(is_count, own)) or len(streams[name].values):
            raise FormatError(f"streams.{name} must be [elements, bytes] of a stream that is nowhere else, got {own!r}")
        count, dtype = own[0], STREAMS[name]
        coded = streams["u8"].take(own[1], f"streams.{name}")
        if not own[1] < count * dtype.itemsize <= DENSEST_CODE * (own[1] + 4):
            raise FormatError(f"streams.{name}: {own[1]} bytes for {count} elements are too many or too few")
        if dtype.is_floating_point:
            streams[name].values = decode_floats(coded, count, dtype)
        else:
            streams[name].values = _inflated(coded, count, dtype, f"streams.{name}")
    if "bool" in said and (streams["bool"].values.view(torch.uint8) > 1).any():
        raise FormatError("'bool' holds bytes other than 0 and 1")


def _inflated(coded: Tensor, count: int, dtype: torch.dtype, where: str) -> Tensor:
    stream, size = zlib.decompressobj(), count * dtype.itemsize
    try:
        data = stream.decompress(coded.numpy().tobytes(), size + 1)
    except zlib.error:
        raise FormatError(f"{where} cannot be unpacked") from None
    if len(data) != size or not stream.eof or stream.unused_data:
        raise FormatError(f"{where} is not {count} elements long")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype)
