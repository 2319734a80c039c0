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
    """tensors: the safetensors entries. contents: the parsed metadata entry, its checksum blank. table: from version 6
    on, what comes first in `u8`, which tensors and payload here are without; None for the contents, packed."""

    tensors: dict[str, Any]
    contents: dict[str, Any]
    payload: bytes
    table: bytes | None = None

    def add(self, name: str, values: bytes, **entry: Any) -> None:
        """Append a tensor."""
        offsets = [len(self.payload), len(self.payload) + len(values)]
        self.tensors[name] = {"dtype": name.upper(), "shape": [len(values)], "data_offsets": offsets} | entry
        self.payload += values

    def text(self) -> str:
        """The metadata entry."""
        own = self.contents.get("format")
        content = packed(self.contents) if type(own) is int and own >= 4 else self.contents
        if own == 6:
            content["packed"] = len(self.packed_table())
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    def packed_table(self) -> bytes:
        """What comes first in `u8`."""
        inner = {k: v for k, v in self.contents.items() if k not in ("format", "checksum")}
        text = json.dumps(inner, sort_keys=True, separators=(",", ":"))
        return zlib.compress(text.encode(), 9) if self.table is None else self.table

    def file(self, text: str | None = None, **metadata: str) -> bytes:
        """The whole file; `text` takes the place of `text()`."""
        entry = {"featherweight": self.text() if text is None else text} | metadata
        tensors, payload = self.tensors, self.payload
        if self.contents.get("format") == 6:
            tensors, payload = spliced(tensors, payload, 0, self.packed_table())
        return from_header(json.dumps({"__metadata__": entry} | tensors, separators=(",", ":")), payload)


def take_apart(data: bytes) -> Parts:
    (size,) = struct.unpack("<Q", data[:8])
    tensors = json.loads(data[8 : 8 + size])
    contents = json.loads(tensors.pop("__metadata__")["featherweight"])
    payload = data[8 + size :]
    if contents["format"] == 6:
        start, count = tensors["u8"]["data_offsets"][0], contents.pop("packed")
        contents |= json.loads(zlib.decompress(payload[start : start + count]))
        tensors, payload = spliced(tensors, payload, count, b"")
    elif "packed" in contents:
        contents |= json.loads(zlib.decompress(b85decode(contents.pop("packed"))))
    return Parts(tensors, contents | {"checksum": BLANK}, payload)


def spliced(tensors: dict[str, Any], payload: bytes, count: int, values: bytes) -> tuple[dict[str, Any], bytes]:
    """Tensors and payload with other values in place of the first `count` bytes of the stream `u8`."""
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [len(payload)] * 2}
    start = (tensors.get("u8") or entry)["data_offsets"][0]
    more, found = len(values) - count, {}
    for name, own in (tensors if "u8" in tensors else tensors | {"u8": entry}).items():
        first, last = own["data_offsets"]
        moved = [first, last + more] if name == "u8" else [n + more if first >= start else n for n in (first, last)]
        shape = [own["shape"][0] + more] if name == "u8" else own["shape"]
        found[name] = own | {"shape": shape, "data_offsets": moved}
    return found, payload[:start] + values + payload[start + count :]


def from_header(header: str, payload: bytes) -> bytes:
    """A file, stamped where there is a blank checksum."""
    raw = header.encode() + b" " * (-len(header.encode()) % 8)
    data = struct.pack("<Q", len(raw)) + raw + payload
    return stamp(data) if b'\\"checksum\\":\\"' + BLANK.encode() in data else data
