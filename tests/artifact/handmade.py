"""Files by hand: take one apart, change it, and put it together with a right checksum."""

import json
import struct
import zlib
from base64 import b85decode
from dataclasses import dataclass
from typing import Any

from featherweight.artifact.write import packed, stamp

BLANK = "0" * 32


@dataclass
class Parts:
    """tensors: the safetensors entries. contents: the parsed metadata entry, its checksum blank."""

    tensors: dict[str, Any]
    contents: dict[str, Any]
    payload: bytes

    def add(self, name: str, values: bytes, **entry: Any) -> None:
        """Append a tensor."""
        offsets = [len(self.payload), len(self.payload) + len(values)]
        self.tensors[name] = {"dtype": name.upper(), "shape": [len(values)], "data_offsets": offsets} | entry
        self.payload += values

    def text(self) -> str:
        """The metadata entry."""
        own = self.contents.get("format")
        content = packed(self.contents) if type(own) is int and own >= 4 else self.contents
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    def file(self, text: str | None = None, **metadata: str) -> bytes:
        """The whole file; `text` takes the place of `text()`."""
        entry = {"featherweight": self.text() if text is None else text} | metadata
        return from_header(json.dumps({"__metadata__": entry} | self.tensors, separators=(",", ":")), self.payload)


def take_apart(data: bytes) -> Parts:
    (size,) = struct.unpack("<Q", data[:8])
    tensors = json.loads(data[8 : 8 + size])
    contents = json.loads(tensors.pop("__metadata__")["featherweight"])
    if "packed" in contents:
        contents |= json.loads(zlib.decompress(b85decode(contents.pop("packed"))))
    return Parts(tensors, contents | {"checksum": BLANK}, data[8 + size :])


def from_header(header: str, payload: bytes) -> bytes:
    """A file, stamped where there is a blank checksum."""
    raw = header.encode() + b" " * (-len(header.encode()) % 8)
    data = struct.pack("<Q", len(raw)) + raw + payload
    return stamp(data) if b'\\"checksum\\":\\"' + BLANK.encode() in data else data
