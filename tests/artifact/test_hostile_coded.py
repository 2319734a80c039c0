"""Files of version 6 that were made to break the reader; test_hostile.py has the others."""

import json
import zlib

import pytest
import torch

from featherweight.artifact.read import from_bytes
from featherweight.artifact.schema import Artifact, StoredUnit
from featherweight.artifact.write import plain_bytes, to_bytes
from featherweight.coding import encode_integers
from featherweight.errors import FormatError
from featherweight.layers import View
from featherweight.weights import Codebook, Dense, Factors, Grid, Sparse
from featherweight.weights.masks import RowMap
from tests.artifact.handmade import Parts, spliced
from tests.artifact.test_hostile import WRONG, edit, frugal, nodes, owner, refused, take_apart, tried


def codes(rows: int, cols: int, most: int, step: int) -> torch.Tensor:
    """Codes of which most are the middle one of 0 to `most`."""
    i = torch.arange(rows * cols) * step % 31
    return torch.where(i < 22, (most + 1) // 2, i * step % (most + 1)).reshape(rows, cols).to(torch.uint8)


def coded() -> Artifact:
    """A weight of every kind with coded fields, each beside others, in about 2 kB."""
    scale, zero = torch.ones(12, 1).half(), torch.full((12, 1), 4, dtype=torch.uint8)
    keep, rows = codes(12, 20, 1, 3) == 0, (torch.arange(12) < 9)[:, None].expand(12, 20).contiguous()
    book = torch.arange(32).reshape(16, 2).half()
    words = Codebook(codes(12, 10, 15, 5).short()[:, :, None], (book,), torch.ones(12, 1), 20)
    factor = Grid(codes(12, 12, 15, 7), scale, None, 4, 12)
    sizes = {"o": 12, "r": 12, "c": 20}
    weights = {
        "grid.weight": Grid(codes(12, 20, 7, 3), scale, zero, 3, 20),
        "binary.weight": Grid(codes(12, 20, 1, 7), scale, None, 1, 20),
        "sparse.weight": Sparse(keep, Dense(torch.ones(12, 20).half())),
        "rows.weight": Sparse(rows, Grid(codes(12, 20, 15, 9), scale, None, 4, 20), RowMap()),
        "books.weight": words,
        "factors.weight": Factors((12, 20), "oc", ("or", "rc"), sizes, (factor, Dense(torch.ones(12, 20).half()))),
    }
    units = tuple(StoredUnit((n,), View(w.shape), w, "ecq") for n, w in weights.items())
    rest = {
        "index": torch.arange(60),
        "again": torch.arange(60),
        "double": torch.arange(60, dtype=torch.float64),
        "flags": torch.arange(100) % 3 == 0,
        "short": torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32),
    }
    return Artifact(units, rest, ())


CODED = to_bytes(coded())
PARTS = take_apart(CODED)
STREAMS = PARTS.contents["streams"]
GRID, BINARY, SPARSE, ROWS, BOOKS, FACTORS = range(6)


def place_of(parts: Parts, unit: int, field: str) -> int:
    """Where in `u8` a coded field begins."""
    place = sum(size for _, size in parts.contents["streams"].values())
    artifact = coded()
    for i, entry in enumerate(parts.contents["units"]):
        for name, tensor in artifact.units[i].weight.tensors().items():
            if (i, name) == (unit, field):
                return place
            if tensor.dtype == torch.uint8:
                place += entry.get("coded", {}).get(name, len(tensor))
    raise KeyError(field)


def replaced(unit: int, field: str, values: torch.Tensor):
    """An attack that puts other coded bytes in the place of a field's."""

    def attack(parts):
        start, size = place_of(parts, unit, field), parts.contents["units"][unit]["coded"][field]
        own = parts.payload
        at = parts.tensors["u8"]["data_offsets"][0] + start
        data = own[:at] + values.numpy().tobytes() + own[at + size :]
        parts.contents["units"][unit]["coded"][field] = len(values)
        moved, _ = spliced(parts.tensors, own, 0, b"")
        moved["u8"]["shape"][0] += len(values) - size
        moved["u8"]["data_offsets"][1] += len(values) - size
        parts.tensors, parts.payload = moved, data

    return attack


def stream_of(name: str, elements: int, data: bytes, old: bool = True):
    """An attack that puts another coded stream in the place of one, or in front where there is none."""

    def attack(parts):
        said = parts.contents["streams"]
        before = sum(size for n, (_, size) in said.items() if n < name)
        size = said[name][1] if old else 0
        at = parts.tensors["u8"]["data_offsets"][0] + before
        rest = {n: e for n, e in parts.tensors.items() if n != "u8"}
        values = parts.payload[at - before : at] + data + parts.payload[at + size :]
        parts.payload = parts.payload[: at - before]
        parts.tensors = rest
        parts.add("u8", values)
        said[name] = [elements, len(data)]

    return attack


def table(data: bytes):
    return lambda parts: setattr(parts, "table", data)


def said(unit: int, **fields: object):
    return lambda parts: parts.contents["units"][unit].setdefault("coded", {}).update(fields)


TABLE = zlib.compress(json.dumps({k: v for k, v in PARTS.contents.items() if k not in ("format", "checksum")}).encode())
NARROW = encode_integers(torch.full((12, 20), 7), 7)  # 7 above the zero 4
BOMB = zlib.compress(bytes(1 << 26), 9)  # 65 kB
UNPACKED = "cannot be unpacked, or is too large"
NEITHER = "too many or too few"

ATTACKS = {
    # packed
    "table-empty": (table(b""), UNPACKED),
    "table-no-zlib": (table(b"no zlib"), UNPACKED),
    "table-cut": (table(TABLE[:-3]), UNPACKED),
    "table-longer": (table(TABLE + b"more"), UNPACKED),
    "table-bomb": (table(BOMB), UNPACKED),
    "table-list": (table(zlib.compress(b"[]")), "no table of contents"),
    "table-not-json": (table(zlib.compress(b"{")), UNPACKED),
    "table-with-format": (table(zlib.compress(b'{"format":6}')), "no table of contents"),
    "table-without-fields": (table(zlib.compress(b"{}")), "the header must have the fields"),
    # streams
    "streams-null": (edit("streams", None), "'streams' must be an object"),
    "streams-list": (edit("streams", []), "'streams' must be an object"),
    "streams-absent": (lambda parts: parts.contents.pop("streams"), "elements of|padding"),
    "stream-unknown": (edit("streams.f8", [60, 10]), "'streams' must be an object of streams that are coded"),
    "stream-nasty": (edit("streams.\x1b\n", [60, 10]), "'streams' must be an object of streams that are coded"),
    "stream-u8": (edit("streams.u8", [60, 10]), "'streams' must be an object of streams that are coded"),
    "stream-twice": (stream_of("i32", 60, zlib.compress(bytes(240)), old=False), "a stream that is nowhere else"),
    "stream-empty": (stream_of("f32", 0, b"", old=False), NEITHER),
    "stream-of-none": (edit("streams.f64", [0, 0]), NEITHER),
    "stream-true": (edit("streams.f64", [60, True]), r"streams.f64 must be \[elements, bytes\]"),
    "stream-negative": (edit("streams.f64", [60, -1]), r"streams.f64 must be \[elements, bytes\]"),
    "stream-float": (edit("streams.f64", [60.0, 9]), r"streams.f64 must be \[elements, bytes\]"),
    "stream-long": (edit("streams.f64", [60, 9, 9]), r"streams.f64 must be \[elements, bytes\]"),
    "stream-number": (edit("streams.f64", 60), r"streams.f64 must be \[elements, bytes\]"),
    "stream-more-bytes": (edit("streams.f64.1", STREAMS["f64"][1] + 9), "coded floats end before or behind"),
    "stream-fewer-bytes": (edit("streams.f64.1", STREAMS["f64"][1] - 9), "coded floats end|cannot be unpacked"),
    "stream-bytes-beyond": (edit("streams.f64.1", 2**39), "elements of 'u8'"),
    "stream-no-shorter": (edit("streams.f64.0", STREAMS["f64"][1] // 8), NEITHER),
    "stream-fewer-elements": (edit("streams.f64.0", 50), "coded floats end before or behind|needs 60 elements"),
    "stream-more-elements": (edit("streams.f64.0", 300), "coded floats end|elements that nothing uses"),
    "stream-many-elements": (edit("streams.f64.0", 2000), "coded floats end before or behind"),
    "stream-bomb": (edit("streams.f64.0", 2**39), NEITHER),
    "stream-zlib-bomb": (edit("streams.i64.0", 2**39), NEITHER),
    "stream-zlib-long": (stream_of("i64", 60, BOMB), NEITHER),
    "stream-zlib-longer": (stream_of("i64", 2**15, BOMB), "streams.i64 is not 32768 elements long"),
    "stream-zlib-61": (stream_of("i64", 60, zlib.compress(bytes(8 * 61))), "streams.i64 is not 60 elements long"),
    "stream-zlib-59": (stream_of("i64", 60, zlib.compress(bytes(8 * 59))), "streams.i64 is not 60 elements long"),
    "stream-zlib-more": (stream_of("i64", 60, zlib.compress(bytes(480)) + b"x"), "streams.i64 is not 60 elements long"),
    "stream-zlib-cut": (stream_of("i64", 60, zlib.compress(bytes(480))[:-2]), "streams.i64 is not 60 elements long"),
    "stream-no-zlib": (stream_of("i64", 60, b"no zlib"), "streams.i64 cannot be unpacked"),
    "stream-bool-2": (stream_of("bool", 100, zlib.compress(b"\2" * 100)), "'bool' holds bytes other than 0 and 1"),
    "stream-beside-255": (stream_of("f64", 60, b"\xff" * 200), "coded floats are too short"),
    "stream-of-zeros": (stream_of("f64", 1000, bytes(4)), "coded floats end before or behind"),
    # coded
    "coded-null": (edit("units.0.coded", None), r"units\[0\].coded must be an object of fields of whole numbers"),
    "coded-list": (edit("units.0.coded", ["codes"]), r"units\[0\].coded must be an object"),
    "coded-float": (said(GRID, scale=5), "an object of fields of whole numbers"),
    "coded-unknown": (said(GRID, values=5), "an object of fields of whole numbers"),
    "coded-nasty": (said(GRID, **{"\x1b\n": 5}), "an object of fields of whole numbers"),
    "coded-book": (said(BOOKS, book0=5), "an object of fields of whole numbers"),
    "coded-book-1": (said(BOOKS, codes1=5), "an object of fields of whole numbers"),
    "coded-mask-of-a-grid": (said(GRID, mask=5), "an object of fields of whole numbers"),
    "coded-values": (said(SPARSE, values=5), "an object of fields of whole numbers"),
    "coded-zero": (said(GRID, zero=3), "field 'zero' cannot be coded|elements that nothing uses|padding|take"),
    "coded-pattern": (said(ROWS, mask=1), "a mask of a pattern cannot be"),
    "coded-one-bit": (said(BINARY, codes=29), "codes of one bit cannot be"),
    "coded-factor-of-floats": (said(FACTORS, **{"1.values": 5}), "an object of fields of whole numbers"),
    "coded-factor-beyond": (said(FACTORS, **{"2.codes": 5}), "an object of fields of whole numbers"),
    "coded-no-shorter": (said(GRID, codes=90), "must be fewer bytes than 90, got 90"),
    "coded-longer": (said(GRID, codes=2**39), "must be fewer bytes than 90"),
    "coded-true": (said(GRID, codes=True), "must be fewer bytes than 90, got True"),
    "coded-negative": (said(GRID, codes=-1), "must be fewer bytes than 90, got -1"),
    "coded-text": (said(GRID, codes="9"), "must be fewer bytes than 90, got '9'"),
    "coded-none": (said(GRID, codes=0), "end before or behind|padding"),
    "codes-out-of-range": (replaced(GRID, "codes", NARROW), "grid.weight: damaged: coded integers are no codes"),
    "codes-of-ones": (replaced(GRID, "codes", torch.zeros(80, dtype=torch.uint8)), "grid.weight: damaged: coded integ"),
    "codes-of-noise": (replaced(GRID, "codes", torch.arange(80).mul(37).to(torch.uint8)), "grid.weight: damaged"),
    "codes-short": (replaced(ROWS, "codes", torch.zeros(0, dtype=torch.uint8)), "rows.weight: damaged"),
    "mask-other": (replaced(SPARSE, "mask", torch.zeros(2, dtype=torch.uint8)), "sparse.weight: "),
    "words-short": (replaced(BOOKS, "codes0", torch.ones(2, dtype=torch.uint8)), "books.weight: damaged: coded"),
    "factor-short": (replaced(FACTORS, "0.codes", torch.ones(2, dtype=torch.uint8)), "factors.weight: damaged"),
    "huge": (edit("units.0.shape", [2**12, 2**13]), "more entries|must be fewer|elements of"),
    # rest
    "rest-later": (edit("rest.0", ["index", "again"]), r"rest\[0\] must be \[name, type, shape\]"),
    "rest-itself": (edit("rest.1", ["again", "again"]), r"rest\[1\] must be \[name, type, shape\]"),
    "rest-unknown": (edit("rest.1", ["again", "indexes"]), r"rest\[1\] must be \[name, type, shape\]"),
    "rest-unit": (edit("rest.1", ["again", "grid.weight"]), r"rest\[1\] must be \[name, type, shape\]"),
    "rest-list": (edit("rest.1", ["again", ["index"]]), r"rest\[1\] must be \[name, type, shape\]"),
    "rest-null": (edit("rest.1", ["again", None]), r"rest\[1\] must be \[name, type, shape\]"),
    "rest-same-name": (edit("rest.1", ["index", "index"]), "appears twice"),
    "rest-number": (edit("rest.1", [1, "index"]), "must be text"),
}  # fmt: skip


def test_the_file_is_fine_and_has_every_kind_of_coded_field():
    with frugal():
        again = from_bytes(CODED)
    assert again.digest() == coded().digest()
    assert len(CODED) < 3000
    assert take_apart(CODED).file() == CODED
    named = [set(u.get("coded", ())) for u in PARTS.contents["units"]]
    assert named == [{"codes"}, set(), {"mask"}, {"codes"}, {"codes0"}, {"0.codes"}]
    assert sorted(STREAMS) == ["bool", "f16", "f32", "f64", "i64"]
    assert PARTS.contents["rest"][1] == ["again", "index"]


@pytest.mark.parametrize(("attack", "told"), ATTACKS.values(), ids=ATTACKS)
def test_an_attack_with_a_right_checksum(attack, told):
    parts = take_apart(CODED)
    attack(parts)
    made = parts.file()
    with frugal(limit=1 << 26):
        refused(made, told)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("streams", {}, "the header must have the fields .* got .*'streams'"),
        ("units.0.coded", {}, r"units\[0\] must have the fields .* got .*'coded'"),
        ("rest.1", ["again", "index"], r"rest\[1\] must be \[name, type, shape\]"),
    ],
)
def test_earlier_versions_have_none_of_it(path, value, told):
    parts = take_apart(plain_bytes(coded()))
    assert parts.contents["format"] == 5
    edit(path, value)(parts)
    refused(parts.file(), told)


def test_in_version_6_nothing_has_to_be_coded():
    parts = take_apart(plain_bytes(coded()))
    parts.contents["format"] = 6
    assert from_bytes(parts.file()).digest() == coded().digest()


@pytest.mark.parametrize("value", [None, True, -1, 1.5, 2**39, 2**62, 10**30, "", "x", [], {}, [1], 0, 1])
def test_packed_is_the_number_of_bytes_of_the_contents(value):
    parts = take_apart(CODED)
    text = json.dumps({"format": 6, "checksum": "0" * 32, "packed": value}, sort_keys=True, separators=(",", ":"))
    with frugal():
        refused(parts.file(text))


def test_any_field_of_any_wrong_type():
    """Nothing but a FormatError, and no change of what is coded goes unseen."""
    for path in nodes(PARTS.contents):
        if path and (path[0] == "streams" or path[0] == "rest" or "coded" in path):
            for value in WRONG:
                parts = take_apart(CODED)
                owner(parts.contents, path)[path[-1]] = value
                found = tried(parts.file())
                assert found is None or (path[0] == "rest" and path[2:] == (0,)), (path, value)


def test_any_missing_field():
    for path in nodes(PARTS.contents):
        if path and (path[0] in ("streams", "rest") or "coded" in path):
            parts = take_apart(CODED)
            del owner(parts.contents, path)[path[-1]]
            if path == ("rest", 1):
                assert "again" not in from_bytes(parts.file()).rest
            else:
                refused(parts.file())


# ---------------------------------------------------------------- damage
def test_truncation_anywhere():
    for length in range(len(CODED)):
        refused(CODED[:length], "truncated|damaged|not copied whole")


def test_a_flipped_bit_in_any_byte():
    for place in range(len(CODED)):
        data = bytearray(CODED)
        data[place] ^= 1 << (place % 8)
        refused(bytes(data))


def test_a_flipped_bit_in_any_byte_of_the_payload_with_a_right_checksum():
    """It is refused, or gives a network that can be decoded and written."""
    read = 0
    for place in range(len(PARTS.payload)):
        parts = take_apart(CODED)
        flipped = parts.payload[place] ^ 1 << (place % 8)
        parts.payload = parts.payload[:place] + bytes([flipped]) + parts.payload[place + 1 :]
        if (artifact := tried(parts.file())) is not None:
            read += 1
            assert from_bytes(to_bytes(artifact)).digest() == artifact.digest()
    assert read > 50


# ---------------------------------------------------------------- what few bytes may claim
def test_a_tensor_that_is_another_again_counts_like_a_weight():
    """Else a name of a few bytes would be decoded to any size."""
    parts = take_apart(to_bytes(Artifact((), {"a": torch.zeros(2**16, dtype=torch.float16)}, ())))
    for count in (256, 257):
        parts.contents["rest"] = [["a", "f16", [2**16]], *([f"a{i}", "a"] for i in range(count))]
        assert len(parts.file()) < 4096
        if count == 256:
            assert len(from_bytes(parts.file()).rest) == 257
        else:
            refused(parts.file(), r"rest\[257\]: the weights have more entries than a file of this size may claim")


def test_a_coded_matrix_of_few_bytes_takes_no_time():
    """2^23 entries of 5 bytes: the codes end at once, and so does the reader."""
    grid = {"kind": "grid", "bits": 4, "group": 0, "sym": 1, "type": "f16"}
    parts = take_apart(to_bytes(Artifact((), {}, ())))
    unit = {"names": ["w"], "shape": [2**11, 2**12], "method": 0, "weight": grid, "coded": {"codes": 5}}
    parts.contents |= {"methods": ["x"], "units": [unit]}
    parts.add("u8", bytes(5))
    parts.add("f16", bytes(2), shape=[1])
    with frugal(limit=1 << 25), pytest.raises(FormatError, match="coded integers end before or behind"):
        from_bytes(parts.file())
