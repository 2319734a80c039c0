"""A second reader, written from docs/format.md alone: no featherweight, no torch, no safetensors."""

import base64
import hashlib
import json
import struct
import zlib
from itertools import combinations
from math import ceil, prod

import numpy as np

TYPES = {
    "u8": "<u1",
    "i8": "<i1",
    "i16": "<i2",
    "i32": "<i4",
    "i64": "<i8",
    "bool": "<u1",
    "f16": "<f2",
    "f32": "<f4",
    "f64": "<f8",
    "bf16": "<u2",
}


def read(data: bytes) -> dict[str, np.ndarray]:
    """Every tensor by name, float16 and bfloat16 as float32."""
    return parse(data)[0]


def inputs(data: bytes) -> dict[str, tuple[int, np.float32, int]]:
    """(bits, scale, zero) of every input that is rounded, by weight name."""
    return parse(data)[1]


def rounded(x: np.ndarray, bits: int, scale: np.float32, zero: int) -> np.ndarray:
    """float32 inputs as the network multiplies them."""
    with np.errstate(over="ignore"):
        codes = np.clip(np.rint(x / scale) + np.float32(zero), 0, 2**bits - 1)
    return scale * (codes - np.float32(zero))


def parse(data: bytes):
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    contents = json.loads(header["__metadata__"]["featherweight"])
    assert contents["format"] in (1, 2, 3, 4, 5)
    if contents["format"] >= 4:
        assert set(contents) == {"format", "checksum", "packed"}
        contents |= json.loads(zlib.decompress(base64.b85decode(contents["packed"])))
    mark = b'\\"checksum\\":\\"'
    assert data.count(mark + contents["checksum"].encode()) == 1
    blank = data.replace(mark + contents["checksum"].encode(), mark + b"0" * 32)
    assert hashlib.blake2b(blank, digest_size=16).hexdigest() == contents["checksum"]
    streams = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            streams[name] = np.frombuffer(data[8 + size + start : 8 + size + end], TYPES[name])
            assert entry == {"dtype": name.upper(), "shape": [len(streams[name])], "data_offsets": [start, end]}
    places = dict.fromkeys(streams, 0)

    def take(name, count):
        places[name] = (start := places.get(name, 0)) + count
        values = streams.get(name, np.empty(0, TYPES[name]))[start : start + count]
        assert len(values) == count
        return values

    books = [widened("f16", take("f16", words * d)).reshape(words, d) for words, d in contents.get("books", [])]
    common = [matrix(take, *f["shape"], f["weight"], []) for f in contents.get("factors", [])]
    tensors, grids = {}, {}
    for entry in contents["units"]:
        shape, groups = entry["shape"], entry.get("transposed_groups", 0)
        rows, cols = shape[0], prod(shape[1:])
        if groups:
            inputs, outputs, taps = shape[0] // groups, shape[1], prod(shape[2:])
            rows, cols = groups * outputs, inputs * taps
        if entry["weight"]["kind"] == "factors":
            tensor = contracted(take, rows, cols, entry["weight"], common)
        else:
            tensor = matrix(take, rows, cols, entry["weight"], books)
        if groups:
            tensor = tensor.reshape(groups, outputs, inputs, taps).swapaxes(1, 2)
        for name in entry["names"]:
            tensors[name] = tensor.reshape(shape)
        if "input" in entry:
            assert contents["format"] >= 2
            grids |= dict.fromkeys(entry["names"], tuple(entry["input"][k] for k in ("bits", "scale", "zero")))
    for name, dtype, shape in contents["rest"]:
        tensors[name] = widened(dtype, take(dtype, prod(shape))).reshape(shape)
    for name, dtype, channels, eps in contents["batchnorm"]:
        tensors[f"{name}.weight"] = widened(dtype, take(dtype, channels))
        tensors[f"{name}.bias"] = widened(dtype, take(dtype, channels))
        tensors[f"{name}.running_mean"] = np.zeros(channels, np.float32)
        tensors[f"{name}.running_var"] = np.full(channels, 1 - eps, np.float32)
    assert places == {name: len(values) for name, values in streams.items()}
    return tensors, {n: (bits, np.float32(scale), zero) for n, (bits, scale, zero) in grids.items()}


def matrix(take, rows, cols, meta, books):
    mask = np.ones(rows * cols, bool)
    if meta["kind"] == "sparse":
        mask = kept(take, rows, cols, meta.get("mask", {"kind": "entries"})).reshape(-1)
        assert mask.sum() == meta["kept"]
    values = np.zeros(rows * cols, np.float32)
    if meta.get("values", meta["kind"]) == "dense":
        values[mask] = widened(meta["type"], take(meta["type"], mask.sum()))
    elif meta.get("values", meta["kind"]) == "codebook":
        return vectors(take, mask.reshape(rows, cols), meta, [books[i] for i in meta["books"]])
    else:
        bits, group = meta["bits"], meta["group"]
        per_row = ceil(cols / group) if group else 0
        scales = rows * per_row or 1
        codes = integers(take, mask.sum(), bits)
        scale = widened(meta["type"], take(meta["type"], scales))
        middle = np.full(scales, 0.5 if bits == 1 else 2 ** (bits - 1))
        zero = middle if meta["sym"] else integers(take, scales, bits)
        row, col = np.divmod(np.flatnonzero(mask), cols)
        own = row * per_row + col // group if group else row * 0
        with np.errstate(over="ignore"):
            values[mask] = scale[own] * (codes - zero[own]).astype(np.float32)
    return values.reshape(rows, cols)


def contracted(take, rows, cols, meta, common):
    sizes, parts = meta["sizes"], []
    for term, own in zip(meta["terms"], meta["factors"], strict=True):
        first, *others = (sizes[x] for x in term)
        part = common[own] if isinstance(own, int) else matrix(take, first, prod(others), own, [])
        parts.append(part.astype(np.float64).reshape(first, *others))
    letters, total = meta["terms"][0], parts[0]
    for k, term in enumerate(meta["terms"][1:], 1):
        later = set(meta["axes"]).union(*meta["terms"][k + 1 :])
        step = "".join(x for x in dict.fromkeys(letters + term) if x in later)
        total, letters = np.einsum(f"{letters},{term}->{step}", total, parts[k]), step
    with np.errstate(over="ignore"):
        return np.einsum(f"{letters}->{meta['axes']}", total).reshape(rows, cols).astype(np.float32)


def vectors(take, mask, meta, books):
    rows, cols = mask.shape
    d, taps = books[0].shape[1], meta.get("taps", 1)
    needed = [ceil(n / d) for n in mask.sum(axis=1)]
    assert sum(needed) == meta.get("vectors", sum(needed))
    codes = [integers(take, sum(needed), (len(book) - 1).bit_length()) for book in books]
    scale = widened(meta["type"], take(meta["type"], rows))
    total = books[0][codes[0]]
    for book, own in zip(books[1:], codes[1:], strict=True):
        total = total + book[own]
    values, first = np.zeros((rows, cols), np.float32), 0
    order = np.arange(cols).reshape(cols // taps, taps).T.reshape(-1)
    for row in range(rows):
        places = order[mask[row, order]]
        entries = total[first : first + needed[row]].reshape(-1)[: len(places)]
        with np.errstate(over="ignore"):
            values[row, places] = scale[row] * entries
        first += needed[row]
    return values


def kept(take, rows, cols, form):
    if form["kind"] == "entries":
        return integers(take, rows * cols, 1).astype(bool)
    if form["kind"] == "rows":
        return integers(take, rows, 1).astype(bool).repeat(cols)
    taps = form["taps"]
    channels = cols // taps
    if form["kind"] == "box":
        bits = integers(take, rows + channels, 1).astype(bool)
        return np.repeat(bits[:rows, None] & bits[rows:], taps, axis=1)
    mask = np.zeros((rows, channels, taps), bool)
    if form["kind"] == "channels":
        bits = integers(take, form["groups"] * channels, 1).reshape(form["groups"], channels)
        for row in range(rows):
            mask[row] = bits[row // (rows // form["groups"])][:, None]
        return mask
    size = form.get("block", form.get("m"))
    per_tap = ceil(channels / size)
    if form["kind"] == "blocks":
        chosen = [range(size) if bit else () for bit in integers(take, rows * taps * per_tap, 1)]
    else:
        every = list(combinations(range(size), form["n"]))
        chosen = [every[i] for i in integers(take, rows * taps * per_tap, (len(every) - 1).bit_length())]
    for i, places in enumerate(chosen):
        row, tap, group = i // (taps * per_tap), i // per_tap % taps, i % per_tap
        for place in places:
            if group * size + place < channels:
                mask[row, group * size + place, tap] = True
    return mask


def integers(take, count, bits):
    """The whole stream is one little-endian number; value i is its digit i to the base 2**bits."""
    number = int.from_bytes(take("u8", ceil(count * bits / 8)).tobytes(), "little")
    assert number >> (int(count) * bits) == 0
    return np.array([number >> (i * bits) & (2**bits - 1) for i in range(count)], np.int64)


def widened(dtype, values):
    if dtype == "bf16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32) if dtype == "f16" else values.astype(bool) if dtype == "bool" else values
