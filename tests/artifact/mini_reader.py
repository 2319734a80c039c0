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
    assert contents["format"] in (1, 2, 3, 4, 5, 6)
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

    if contents["format"] >= 4:
        assert set(contents) == {"format", "checksum", "packed"}
        own = contents["packed"]
        table = base64.b85decode(own) if contents["format"] < 6 else take("u8", own).tobytes()
        contents |= json.loads(zlib.decompress(table))
    for name, (count, size) in sorted(contents.get("streams", {}).items()):
        coded = take("u8", size).tobytes()
        assert len(streams.get(name, ())) == 0
        streams[name] = (
            floats(coded, count, name) if name in FLOATS else np.frombuffer(zlib.decompress(coded), TYPES[name])
        )
        assert len(streams[name]) == count
        places.setdefault(name, 0)
    books = [widened("f16", take("f16", words * d)).reshape(words, d) for words, d in contents.get("books", [])]
    common = [matrix(take, *f["shape"], f["weight"], [], f.get("coded", {})) for f in contents.get("factors", [])]
    tensors, grids = {}, {}
    for entry in contents["units"]:
        shape, groups = entry["shape"], entry.get("transposed_groups", 0)
        rows, cols = shape[0], prod(shape[1:])
        if groups:
            inputs, outputs, taps = shape[0] // groups, shape[1], prod(shape[2:])
            rows, cols = groups * outputs, inputs * taps
        if entry["weight"]["kind"] == "factors":
            tensor = contracted(take, rows, cols, entry["weight"], common, entry.get("coded", {}))
        else:
            tensor = matrix(take, rows, cols, entry["weight"], books, entry.get("coded", {}))
        if groups:
            tensor = tensor.reshape(groups, outputs, inputs, taps).swapaxes(1, 2)
        for name in entry["names"]:
            tensors[name] = tensor.reshape(shape)
        if "input" in entry:
            assert contents["format"] >= 2
            grids |= dict.fromkeys(entry["names"], tuple(entry["input"][k] for k in ("bits", "scale", "zero")))
    for name, *said in contents["rest"]:
        if len(said) == 1:
            tensors[name] = tensors[said[0]]
        else:
            dtype, shape = said
            tensors[name] = widened(dtype, take(dtype, prod(shape))).reshape(shape)
    for name, dtype, channels, eps in contents["batchnorm"]:
        tensors[f"{name}.weight"] = widened(dtype, take(dtype, channels))
        tensors[f"{name}.bias"] = widened(dtype, take(dtype, channels))
        tensors[f"{name}.running_mean"] = np.zeros(channels, np.float32)
        tensors[f"{name}.running_var"] = np.full(channels, 1 - eps, np.float32)
    assert places == {name: len(values) for name, values in streams.items()}
    return tensors, {n: (bits, np.float32(scale), zero) for n, (bits, scale, zero) in grids.items()}


def matrix(take, rows, cols, meta, books, coded):
    mask = np.ones(rows * cols, bool)
    if meta["kind"] == "sparse":
        if "mask" in coded:
            mask = signed(take("u8", coded["mask"]), mask.reshape(rows, cols), 1, signs=False).astype(bool).reshape(-1)
        else:
            mask = kept(take, rows, cols, meta.get("mask", {"kind": "entries"})).reshape(-1)
        assert mask.sum() == meta["kept"]
    values = np.zeros(rows * cols, np.float32)
    if meta.get("values", meta["kind"]) == "dense":
        values[mask] = widened(meta["type"], take(meta["type"], mask.sum()))
    elif meta.get("values", meta["kind"]) == "codebook":
        return vectors(take, mask.reshape(rows, cols), meta, [books[i] for i in meta["books"]], coded)
    else:
        bits, group = meta["bits"], meta["group"]
        per_row = ceil(cols / group) if group else 0
        scales = rows * per_row or 1
        codes = take("u8", coded["codes"]) if "codes" in coded else integers(take, mask.sum(), bits)
        scale = widened(meta["type"], take(meta["type"], scales))
        middle = np.full(scales, 0.5 if bits == 1 else 2 ** (bits - 1))
        zero = middle if meta["sym"] else integers(take, scales, bits)
        row, col = np.divmod(np.flatnonzero(mask), cols)
        own = row * per_row + col // group if group else row * 0
        if "codes" in coded:
            most = 2 ** (bits - 1) if meta["sym"] else 2**bits - 1
            codes = zero[own] + signed(codes, mask.reshape(rows, cols), most).reshape(-1)[mask]
            assert set(codes.tolist()) <= set(range(2**bits))
        with np.errstate(over="ignore"):
            values[mask] = scale[own] * (codes - zero[own]).astype(np.float32)
    return values.reshape(rows, cols)


def contracted(take, rows, cols, meta, common, coded):
    sizes, parts = meta["sizes"], []
    for k, (term, own) in enumerate(zip(meta["terms"], meta["factors"], strict=True)):
        first, *others = (sizes[x] for x in term)
        mine = {name.partition(".")[2]: n for name, n in coded.items() if name.partition(".")[0] == str(k)}
        part = common[own] if isinstance(own, int) else matrix(take, first, prod(others), own, [], mine)
        parts.append(part.astype(np.float64).reshape(first, *others))
    letters, total = meta["terms"][0], parts[0]
    for k, term in enumerate(meta["terms"][1:], 1):
        later = set(meta["axes"]).union(*meta["terms"][k + 1 :])
        step = "".join(x for x in dict.fromkeys(letters + term) if x in later)
        total, letters = np.einsum(f"{letters},{term}->{step}", total, parts[k]), step
    with np.errstate(over="ignore"):
        return np.einsum(f"{letters}->{meta['axes']}", total).reshape(rows, cols).astype(np.float32)


def vectors(take, mask, meta, books, coded):
    rows, cols = mask.shape
    d, taps = books[0].shape[1], meta.get("taps", 1)
    needed = [ceil(n / d) for n in mask.sum(axis=1)]
    assert sum(needed) == meta.get("vectors", sum(needed))
    codes = []
    for m, book in enumerate(books):
        bits, size = (len(book) - 1).bit_length(), coded.get(f"codes{m}")
        codes.append(
            integers(take, sum(needed), bits) if size is None else symbols(take("u8", size), sum(needed), bits)
        )
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


# ---------------------------------------------------------------- coded fields
FLOATS = {"f16": (5, 10), "bf16": (8, 7), "f32": (8, 23), "f64": (11, 52)}
THRESHOLDS = """13 27 44 64 89 118 152 192 241 299 367 448 545 661 798 960 1154 1385 1659 1984 2372 2833
    3381 4032 4807 5729 6825 8128 9678 11522 13714 16320 19420 23107 27491"""
THRESHOLDS = [int(word) for word in THRESHOLDS.split()]


class Bits:
    """Finds bits in a string of bytes. Models are [p, n], by any key; those that are not there are even."""

    def __init__(self, data, models=()):
        self.data, self.read, self.models = bytes(data), 4, dict(models)
        self.low, self.high, self.code = 0, 2**32 - 1, int.from_bytes(self.data[:4].ljust(4, b"\0"), "big")

    def even(self, p=32768):
        mid = self.low + ((self.high - self.low) * p >> 16)
        bit = int(self.code <= mid)
        if bit:
            self.high = mid
        else:
            self.low = mid + 1
        while self.low >> 24 == self.high >> 24:
            self.low, self.high = self.low % 2**24 * 256, self.high % 2**24 * 256 + 255
            self.code = self.code % 2**24 * 256 + (self.data[self.read] if self.read < len(self.data) else 0)
            self.read += 1
        return bit

    def bit(self, key):
        model = self.models.setdefault(key, [32768, 2])
        p, n = model
        bit, rate = self.even(p), 131072 // (2 * n + 3)
        model[0] = min(p + ((65536 - p) * rate >> 16), 65504) if bit else max(p - (p * rate >> 16), 32)
        model[1] = min(n + 1, 255)
        return bit

    def symbol(self, bits, *key):
        node = 1
        for _ in range(bits):
            node = 2 * node + self.bit((*key, node))
        return node - 2**bits

    def finish(self):
        assert len(self.data) <= self.read <= len(self.data) + 4


def symbols(data, count, bits):
    coder = Bits(data)
    found = [coder.symbol(bits) for _ in range(count)]
    coder.finish()
    return np.array(found, np.int64)


def signed(data, mask, most, signs=True):
    """Integers where the mask is true, 0 elsewhere."""
    coder, top = Bits(data, geometric()), most.bit_length()
    values = np.zeros(mask.shape, np.int64)
    sizes = values.copy()
    for r, c in zip(*(x.tolist() for x in np.nonzero(mask)), strict=True):
        x, k = context(sizes, r, c), 0
        while k < top and coder.bit(("more", x, k)):
            k += 1
        size = int(k > 0)
        for place in range(k - 1):
            bit = coder.bit([("second", x, k), ("third", k, size % 2)][place]) if place < 2 else coder.even()
            size = 2 * size + bit
        assert size <= most
        sizes[r, c] = size
        values[r, c] = -size if size and signs and coder.bit("sign") else size
    coder.finish()
    return values


def context(sizes, r, c):
    total, weight = 0, 0
    if c >= 1:
        total += 320 * int(sizes[r, c - 1]) + 32 * min(c, 16) * int(sizes[r, :c].sum()) // c
        weight += 20 + 2 * min(c, 16)
    if c >= 2:
        total, weight = total + 160 * int(sizes[r, c - 2]), weight + 10
    if r >= 1:
        total, weight = total + 80 * min(r, 8) * int(sizes[:r, c].sum()) // r, weight + 5 * min(r, 8)
    mean = 16 * total // weight if weight else 64
    return sum(mean >= t for t in THRESHOLDS)


def geometric():
    models, ends = {}, [0, *THRESHOLDS, 54982]
    for x in range(36):
        mean = (ends[x] + ends[x + 1]) // 2
        chance = 65536 * mean // (256 + mean)
        for k in range(8):
            models["more", x, k] = [min(max(chance, 32), 65504), 4]
            if k <= 6:
                models["second", x, k + 2] = [min(max(chance * 65536 // (65536 + chance), 32), 65504), 4]
            chance = chance * chance >> 16 if k else chance
    return models


def floats(data, count, stream):
    exponents, mantissa = FLOATS[stream]
    noise = data[0]
    assert 8 * noise <= mantissa - 3
    end = len(data) - count * noise
    coder, found = Bits(data[1:end]), []
    for i in range(count):
        value = coder.bit("sign")
        exponent = coder.symbol(exponents, "exponent")
        value = (value << exponents | exponent) << 3 | coder.symbol(3, exponent)
        for place in range(mantissa - 4, 8 * noise - 1, -1):
            value = value << 1 | coder.bit(place)
        beside = data[end + i * noise : end + (i + 1) * noise]
        found.append(value << 8 * noise | int.from_bytes(beside, "little"))
    coder.finish()
    return np.array(found, f"<u{(1 + exponents + mantissa) // 8}").view(TYPES[stream])
