"""Damaged and malicious files give a FormatError of one line, and nothing else."""

import importlib
import io
import json
import pickle
import re
import struct
import sys
import tracemalloc
import zipfile
import zlib
from base64 import b85encode
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from featherweight.activations import ActivationGrid
from featherweight.artifact import Artifact, FoldedNorm, StoredUnit, load, read
from featherweight.artifact.read import from_bytes
from featherweight.artifact.schema import MARK
from featherweight.artifact.write import plain_bytes
from featherweight.errors import FormatError
from featherweight.layers import View
from featherweight.report import rows_of
from featherweight.weights import Codebook, Dense, Grid, Sparse
from tests.artifact.handmade import BLANK, from_header, take_apart


def small() -> Artifact:
    """A bit of everything in about 1.3 kB."""
    codes = (torch.arange(15, dtype=torch.uint8) * 3 % 8).reshape(3, 5)
    asymmetric = Grid(codes, torch.full((3, 2), 0.5), torch.ones(3, 2, dtype=torch.uint8), 3, 3)
    binary = Grid(codes % 2, torch.ones(1, 1, dtype=torch.float16), None, 1, 0)
    units = (
        StoredUnit(("grid.weight", "tied.weight"), View((3, 5)), asymmetric, "obq", 0.012, "a note"),
        StoredUnit(
            ("sparse.weight",), View((3, 5)), Sparse(codes > 3, binary), "obs", input=ActivationGrid(4, 0.25, 3)
        ),
        StoredUnit(("up.weight",), View((2, 3, 2), 2), Dense(torch.ones(6, 2, dtype=torch.float16)), "rtn"),
    )
    norm = FoldedNorm("bn", torch.ones(3, dtype=torch.float16), torch.zeros(3, dtype=torch.float16), 1e-5)
    rest = {"bias": torch.arange(3.0), "mask": torch.tensor([True, False])}
    return Artifact(units, rest, (norm,), {"model": "net.py:make", "fp32_bytes": 100})


def booked() -> Artifact:
    """Weights of one and two books, with taps and with a mask, beside a grid."""
    first, second = torch.arange(8).reshape(4, 2).half(), torch.arange(4).reshape(2, 2).half() / 8
    codes = (torch.arange(9) % 4).reshape(3, 3, 1).short()
    both = torch.cat([codes, codes % 2], dim=2)
    keep = torch.arange(5) < torch.tensor([5, 0, 2])[:, None]
    half = torch.ones(3, 1, dtype=torch.float16)
    weights = {
        "vectors.weight": Codebook(both, (first, second), torch.full((3, 1), 0.5), 5),
        "taps.weight": Codebook(codes[:2], (first,), half[:2], 6, 3),
        "pruned.weight": Sparse(keep, Codebook(both.flip(2) % 2, (second, first), half, 5, 1, keep)),
        "grid.weight": Grid(torch.ones(2, 2, dtype=torch.uint8), half[:1], None, 2, 0),
    }
    return Artifact(tuple(StoredUnit((n,), View(w.shape), w, "additive") for n, w in weights.items()), {}, ())


SMALL = plain_bytes(small())
BOOKED = plain_bytes(booked())


@contextmanager
def frugal(limit: int = 1 << 20):
    """Memory stays within a MB for Python and numpy, and within 64 MB for the process, torch included."""
    resource = pytest.importorskip("resource")
    pages = Path("/proc/self/statm")
    before = resource.getrlimit(resource.RLIMIT_AS)
    if pages.exists():
        used = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), before[1]))
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()
        resource.setrlimit(resource.RLIMIT_AS, before)


def one_line(message: str) -> bool:
    return 15 < len(message) <= 300 and message.isprintable()


def refused(data: bytes, told: str = ".") -> None:
    with pytest.raises(FormatError, match=told) as raised:
        from_bytes(data)
    assert one_line(str(raised.value))


def tried(data: bytes) -> Artifact | None:
    """The artifact, or None for a file that is refused with one line."""
    try:
        return from_bytes(data)
    except FormatError as error:
        message = str(error)
    assert one_line(message)
    return None


@pytest.mark.parametrize(("data", "artifact"), [(SMALL, small()), (BOOKED, booked())], ids=["small", "books"])
def test_the_small_files_are_fine_and_small(data, artifact):
    assert from_bytes(data).digest() == artifact.digest()
    assert len(data) < 3000
    assert take_apart(data).file() == data  # so that an attack differs from it by the attack alone


# ---------------------------------------------------------------- damage
def test_truncation_anywhere():
    for length in range(len(SMALL)):
        refused(SMALL[:length], "truncated" if length < 8 else "truncated|damaged|not copied whole")


def test_a_flipped_bit_in_any_byte():
    for place in range(len(SMALL)):
        data = bytearray(SMALL)
        data[place] ^= 1 << (place % 8)
        refused(bytes(data))


places = st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 7))


@settings(deadline=None, max_examples=150)
@given(st.sets(places, min_size=1, max_size=6))
def test_any_flipped_bits(flips):
    data = bytearray(SMALL)
    for place, bit in flips:
        data[place] ^= 1 << bit
    refused(bytes(data))


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=200), st.integers(0, len(SMALL)))
def test_any_bytes_put_in_or_in_place_of_the_file(insertion, place):
    refused(insertion)
    refused(SMALL + insertion + b"\0")
    if insertion:
        refused(SMALL[:place] + insertion + SMALL[place:])


# ---------------------------------------------------------------- no featherweight file at all
class Runs:
    """Unpickling it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "hello")
    return buffer.getvalue()


def torch_saved() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\0" * 7, id="seven-bytes"),
        pytest.param(b"\0" * 8, id="no-header"),
        pytest.param(b"\0" * 100, id="zeros"),
        pytest.param(struct.pack("<Q", 2**63) + b"{}", id="header-of-2**63"),
        pytest.param(b"\xff" * 100, id="header-of-2**64-1"),
        pytest.param(struct.pack("<Q", 2) + b"{}", id="empty-object"),
        pytest.param(struct.pack("<Q", 4) + b"\xff\xfe{}", id="not-utf8"),
        pytest.param(struct.pack("<Q", 4) + "{}".encode("utf-16-le"), id="utf16"),
        pytest.param(struct.pack("<Q", 2) + b"[]", id="list"),
        pytest.param(struct.pack("<Q", 4) + b'"ab"', id="text"),
        pytest.param(struct.pack("<Q", 4) + b"null", id="null"),
        pytest.param(save({"a": torch.ones(2)}), id="plain-safetensors"),
        pytest.param(save({"a": torch.ones(2)}, {"format": "pt"}), id="safetensors-of-another-kind"),
        pytest.param(save({}, {"featherweight": "hello"}), id="entry-is-not-json"),
        pytest.param(save({}, {"featherweight": "[1]"}), id="entry-is-a-list"),
        pytest.param(save({}, {"featherweight": "{}"}), id="entry-is-empty"),
        pytest.param(zipped(), id="zip"),
        pytest.param(torch_saved(), id="torch.save"),
        pytest.param(b"#!/bin/sh\necho hello\n" * 9, id="script"),
    ],
)
def test_other_files_are_told_apart(data, tmp_path):
    refused(data, "not a featherweight file")
    path = tmp_path / "other.fw"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=f"^{re.escape(str(path))}: not a featherweight file"):
        load(path)


def test_a_pickle_is_not_run(tmp_path):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "evil.fw").write_bytes(pickle.dumps(Runs(tmp_path / "ran"), protocol))
        with pytest.raises(FormatError, match="not a featherweight file"):
            load(tmp_path / "evil.fw")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Runs(tmp_path / "ran"))).close()
    assert (tmp_path / "ran").exists()  # it would have run


@pytest.mark.parametrize(
    ("name", "told"),
    [("missing.fw", "No such file or directory"), ("", "Is a directory"), ("a.fw/b.fw", "Not a directory")],
)
def test_what_cannot_be_opened_is_told(tmp_path, name, told):
    (tmp_path / "a.fw").write_bytes(SMALL)
    with pytest.raises(FormatError) as raised:
        read(tmp_path / name)
    assert str(raised.value) == f"cannot read {tmp_path / name}: {told}"


# ---------------------------------------------------------------- attacks with a right checksum
WRONG = [
    None,
    True,
    False,
    -1,
    2**62,
    10**30,
    1.5,
    "",
    "x",
    "a\nb",
    "\ud800",
    [],
    {},
    [[]],
    [None],
    ["x", "x"],
    {"x": 1},
]
FREE = re.compile(  # what may be anything of its own type
    r"about(\..*)?|methods\.\d|units\.\d\.(note|error|input\.scale|names\.\d)|rest\.\d\.0|batchnorm\.\d\.0"
)


def nodes(value, path=()):
    """Every place in a JSON value."""
    yield path
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from nodes(child, (*path, key))


def owner(contents, path):
    for key in path[:-1]:
        contents = contents[key]
    return contents


PATHS = [path for path in nodes(take_apart(SMALL).contents) if path]
BOOK_PATHS = [path for path in nodes(take_apart(BOOKED).contents) if path and path[0] in ("books", "units")]


def test_any_field_of_any_wrong_type():
    accepted = set()
    for path in PATHS:
        for value in WRONG:
            parts = take_apart(SMALL)
            owner(parts.contents, path)[path[-1]] = value
            if tried(parts.file()) is not None:
                accepted.add((".".join(map(str, path)), type(value)))
    assert {path for path, _ in accepted if not FREE.fullmatch(path)} == set()
    types = {kind for path, kind in accepted if not path.startswith("about") and not path.endswith(("error", "scale"))}
    assert types == {str}
    assert {kind for path, kind in accepted if path.endswith("error")} == {float, type(None)}
    assert {kind for path, kind in accepted if path.endswith("scale")} == {float}


def test_any_field_about_books_of_any_wrong_type():
    for path in BOOK_PATHS:
        for value in WRONG:
            parts = take_apart(BOOKED)
            owner(parts.contents, path)[path[-1]] = value
            if tried(parts.file()) is not None:
                assert FREE.fullmatch(".".join(map(str, path))), (path, value)


def test_any_missing_field_about_books():
    for path in BOOK_PATHS:
        parts = take_apart(BOOKED)
        del owner(parts.contents, path)[path[-1]]
        if path[-1] == "taps":  # the same vectors, of other entries
            assert from_bytes(parts.file()).digest() != booked().digest()
        else:
            refused(parts.file())


def test_any_missing_field():
    optional = {
        "units.0.note",
        "units.0.error",
        "units.1.input",
        "units.2.transposed_groups",
        "about.model",
        "about.fp32_bytes",
    }
    optional |= {"units.0.names.0", "units.0.names.1"}  # one of two
    for path in PATHS:
        parts = take_apart(SMALL)
        del owner(parts.contents, path)[path[-1]]
        if ".".join(map(str, path)) in optional:
            from_bytes(parts.file())
        else:
            refused(parts.file())


@pytest.mark.parametrize(("data", "paths"), [(SMALL, PATHS), (BOOKED, BOOK_PATHS)], ids=["small", "books"])
def test_any_unknown_field(data, paths):
    for path in [(), *paths]:
        parts = take_apart(data)
        where = owner(parts.contents, (*path, ""))
        if isinstance(where, dict) and path != ("about",):
            where["from_the_future"] = 1
            refused(parts.file(), "fields")


def edit(path, value):
    """An attack that sets one field, `path` as in the messages."""
    keys = [int(key) if key.isdigit() else key for key in path.split(".")]
    return lambda parts: owner(parts.contents, keys).__setitem__(keys[-1], value)


def tensor(name, **entry):
    """An attack that changes the safetensors entry of a stream."""
    return lambda parts: parts.tensors[name].update(entry)


def added(name, values, **entry):
    return lambda parts: parts.add(name, values, **entry)


def swapped(parts):
    """Two streams that lie over each other."""
    parts.tensors["u8"]["data_offsets"] = [0, parts.tensors["u8"]["shape"][0]]


def shifted(parts):
    """A byte that belongs to no stream."""
    parts.payload = b"\0" + parts.payload
    for entry in parts.tensors.values():
        entry["data_offsets"] = [n + 1 for n in entry["data_offsets"]]


def poked(stream, place, values):
    """An attack that overwrites payload."""

    def attack(parts):
        start = parts.tensors[stream]["data_offsets"][0] + place
        parts.payload = parts.payload[:start] + values + parts.payload[start + len(values) :]

    return attack


def shorter(stream, size):
    """An attack that removes the last element of a stream."""

    def attack(parts):
        end = parts.tensors[stream]["data_offsets"][1]
        parts.payload = parts.payload[: end - size] + parts.payload[end:]
        for entry in parts.tensors.values():
            entry["data_offsets"] = [n - size if n >= end else n for n in entry["data_offsets"]]
        parts.tensors[stream]["shape"][0] -= 1

    return attack


HUGE = 2**39
ATTACKS = {
    # versions
    "version-7": (edit("format", 7), "version 7; .* reads versions 1, 2, 3, 4, 5, 6. Try a newer release"),
    "version-1-with-inputs": (edit("format", 1), r"units\[1\] must have the fields"),
    "version-0": (edit("format", 0), "format version 0"),
    "version-true": (edit("format", True), "no format version"),
    "version-float": (edit("format", 1.0), "no format version"),
    "version-huge": (edit("format", 10**4000), "no format version"),
    # checksum
    "checksum-text": (edit("checksum", "x" * 32), "no checksum"),
    "checksum-short": (edit("checksum", "0" * 31), "no checksum"),
    "checksum-capitals": (edit("checksum", "A" * 32), "no checksum"),
    "checksum-half-characters": (edit("checksum", "\ud800" * 32), "no checksum"),
    "checksum-twice": (edit("about", {"checksum": BLANK}), "checksum"),
    # names
    "name-twice-in-unit": (edit("units.0.names", ["a", "a"]), "appears twice"),
    "name-in-two-units": (edit("units.1.names", ["grid.weight"]), "appears twice"),
    "name-in-unit-and-rest": (edit("rest.0.0", "grid.weight"), "appears twice"),
    "name-twice-in-rest": (edit("rest.0.0", "mask"), "appears twice"),
    "name-in-rest-and-norm": (edit("rest.0.0", "bn.running_var"), "appears twice"),
    "name-escape": (edit("units.0.names", ["\x1b[2J"]), "control characters"),
    "name-separator": (edit("rest.0.0", "a\u2028b"), "control characters"),
    "note-escape": (edit("units.0.note", "\x9b2J"), "control characters"),
    "method-line-break": (edit("methods.0", "a\r\nb"), "control characters"),
    "no-name": (edit("units.0.names", []), "names"),
    "name-long": (edit("units.0.names", ["x" * 10000, 1]), "must be text"),
    # shapes
    "shape-negative": (edit("units.0.shape", [-3, 5]), "not a shape"),
    "shape-zero": (edit("units.0.shape", [3, 0]), "not a shape"),
    "shape-empty": (edit("units.0.shape", []), "not a shape"),
    "shape-true": (edit("units.0.shape", [True, 15]), "not a shape"),
    "shape-float": (edit("units.0.shape", [3.0, 5]), "not a shape"),
    "shape-64-bit": (edit("units.0.shape", [2**62, 5]), "not a shape"),
    "shape-overflow": (edit("units.0.shape", [2**32, 2**32]), "not a shape"),
    "shape-long": (edit("units.0.shape", [1] * 17), "not a shape"),
    "shape-very-long": (edit("units.0.shape", [1] * 10000), "not a shape"),
    "shape-large": (edit("units.0.shape", [HUGE, 3]), "not a shape that a tensor here can have"),
    "shape-large-row": (edit("units.0.shape", [1, HUGE]), "needs 206158430208 elements of 'u8', 12 are left"),
    "shape-large-sparse": (edit("units.1.shape", [HUGE, 1]), "elements of 'u8'"),
    "shape-large-dense": (edit("units.2.shape", [2, HUGE // 4, 1]), "elements of 'f16'"),
    "shape-sparse-other": (edit("units.1.shape", [3, 6]), "padding|elements|mask keeps"),
    "rest-large": (edit("rest.0.2", [HUGE]), "elements of 'f32'"),
    "rest-zero-times-large": (edit("rest.0.2", [HUGE, HUGE, 0]), "not a shape"),
    "rest-16-large": (edit("rest.0.2", [HUGE] * 15 + [0]), "not a shape"),
    "rest-negative": (edit("rest.0.2", [-1, -3]), "not a shape"),
    "norm-large": (edit("batchnorm.0.2", HUGE), "elements of 'f16'"),
    "norm-negative": (edit("batchnorm.0.2", -3), "batchnorm"),
    "groups-do-not-divide": (edit("units.2.transposed_groups", 3), "transposed_groups"),
    "groups-of-a-vector": (edit("units.0", {"names": ["a"], "shape": [3], "method": 0, "transposed_groups": 1,
                                            "weight": {"kind": "dense", "type": "f16"}}), "transposed_groups"),
    "groups-negative": (edit("units.2.transposed_groups", -2), "transposed_groups"),
    # kinds
    "kind-unknown": (edit("units.0.weight.kind", "lattice"), r"unknown kind of weight; expected one of \['codebook'"),
    "kind-list": (edit("units.0.weight.kind", ["grid"]), "unknown kind"),
    "kind-other": (edit("units.0.weight.kind", "dense"), "grid.weight: .*fields"),
    "bits-9": (edit("units.0.weight.bits", 9), "grid.weight: field 'bits' must be 1 to 8, got 9"),
    "bits-true": (edit("units.1.weight.bits", True), "'bits'"),
    "bits-huge": (edit("units.0.weight.bits", 10**4000), "header"),
    "group-huge": (edit("units.0.weight.group", 2**62), "'group' must be 0 to 5"),
    "group-6": (edit("units.0.weight.group", 6), "'group' must be 0 to 5"),
    "group-negative": (edit("units.0.weight.group", -1), "'group'"),
    "sym-true": (edit("units.0.weight.sym", True), "'sym'"),
    "type-f64": (edit("units.0.weight.type", "f64"), "'type'"),
    "type-long": (edit("units.0.weight.type", "f" * 10000), "'type'"),
    "kept-over-size": (edit("units.1.weight.kept", 16), "'kept' must be 0 to 15"),
    "kept-huge": (edit("units.1.weight.kept", 2**62), "'kept'"),
    "kept-other": (edit("units.1.weight.kept", 5), "the mask keeps 7 entries, the header says 5"),
    "sparse-in-sparse": (edit("units.1.weight.values", "sparse"), "'values'"),
    "method-beyond": (edit("units.0.method", 3), "method"),
    "method-true": (edit("units.0.method", True), "method"),
    "error-true": (edit("units.0.error", True), "error"),
    "error-integer": (edit("units.0.error", 1), "error"),
    "error-nan": (edit("units.0.error", float("nan")), "header"),
    "error-infinite": (edit("units.0.error", float("inf")), "header"),
    "about-nan": (edit("about", {"a": {"b": [float("nan")]}}), "header"),
    "about-huge": (edit("about", {"fp32_bytes": 10**400}), "header"),
    "about-65-bit": (edit("about", {"fp32_bytes": 2**63}), "header"),
    "about-half-character": (edit("about", {"a": "\udfff"}), "header"),
    "about-half-character-key": (edit("about", {"\udfff": 1}), "header"),
    "eps-integer": (edit("batchnorm.0.3", 0), "eps"),
    "eps-1": (edit("batchnorm.0.3", 1.0), "eps"),
    "eps-negative": (edit("batchnorm.0.3", -1e-5), "eps"),
    "norm-type": (edit("batchnorm.0.1", "f64"), "batchnorm"),
    "rest-type": (edit("rest.0.1", "f8"), "rest"),
    "rest-type-list": (edit("rest.0.1", []), "rest"),
    "rest-type-object": (edit("rest.0.1", {}), "rest"),
    "input-list": (edit("units.1.input", [4, 0.25, 3]), r"units\[1\].input must have the fields"),
    "input-null": (edit("units.1.input", None), "must have the fields"),
    "input-bits-1": (edit("units.1.input.bits", 1), "bits must be 2 to 8, got 1"),
    "input-bits-9": (edit("units.1.input.bits", 9), "bits must be 2 to 8"),
    "input-bits-float": (edit("units.1.input.bits", 4.0), "bits must be 2 to 8"),
    "input-bits-huge": (edit("units.1.input.bits", 2**62), "bits must be 2 to 8"),
    "input-scale-0": (edit("units.1.input.scale", 0.0), "scale must be a positive number"),
    "input-scale-negative": (edit("units.1.input.scale", -0.25), "scale must be a positive number"),
    "input-scale-integer": (edit("units.1.input.scale", 1), "scale must be a positive number"),
    "input-scale-not-float32": (edit("units.1.input.scale", 0.1), "that float32 holds exactly, got 0.1"),
    "input-scale-too-large": (edit("units.1.input.scale", 1e39), "that float32 holds exactly"),
    "input-scale-too-small": (edit("units.1.input.scale", 1e-46), "that float32 holds exactly"),
    "input-scale-nan": (edit("units.1.input.scale", float("nan")), "header"),
    "input-scale-infinite": (edit("units.1.input.scale", float("inf")), "header"),
    "input-zero-16": (edit("units.1.input.zero", 16), "zero must be a code of 4 bits, got 16"),
    "input-zero-negative": (edit("units.1.input.zero", -1), "zero must be a code"),
    "input-zero-true": (edit("units.1.input.zero", True), "zero must be a code"),
    "input-zero-float": (edit("units.1.input.zero", 3.0), "zero must be a code"),
    # payload
    "scale-nan": (poked("f32", 0, struct.pack("<f", float("nan"))), "grid.weight: field 'scale' holds NaN"),
    "scale-infinite": (poked("f16", 0, b"\x00\x7c"), "sparse.weight: field 'scale' holds NaN or inf"),
    "padding-codes": (poked("u8", 5, b"\xff"), "padding"),
    "padding-zeros": (poked("u8", 8, b"\xff"), "padding"),
    "padding-mask": (poked("u8", 10, b"\xff"), "padding"),
    "mask-other": (poked("u8", 9, b"\x00"), "mask keeps"),
    "bool-2": (poked("bool", 0, b"\2"), "'bool' holds bytes other than 0 and 1"),
    "unused-u8": (lambda parts: (parts.contents["units"].pop(1), None)[1], "elements that nothing uses"),
    "unused-stream": (added("i64", b"\0" * 8, shape=[1]), "'i64' has 1 elements that nothing uses"),
    "short-u8": (shorter("u8", 1), "elements of 'u8', 0 are left"),
    "short-f16": (shorter("f16", 2), "elements of 'f16'"),
    "short-f32": (shorter("f32", 4), "elements of 'f32'"),
    "short-bool": (shorter("bool", 1), "elements of 'bool'"),
    "no-stream": (lambda parts: (parts.tensors.pop("bool"), setattr(parts, "payload", parts.payload[:-2])),
                  "damaged|elements of 'bool'"),
    # streams
    "stream-unknown": (added("f8", b"\0" * 4, dtype="U8"), "tensor 'f8' must be a vector"),
    "stream-nasty-name": (added("\x1b\n", b"\0" * 4, dtype="U8"), r"tensor '\\x1b\\n'"),
    "stream-other-type": (added("i8", b"\0" * 4, dtype="U8"), "tensor 'i8'"),
    "stream-exotic-type": (added("i8", b"\0" * 4, dtype="F8_E5M2"), "tensor 'i8'"),
    "stream-no-type": (added("i8", b"\0" * 4, dtype="F5"), "tensor 'i8'"),
    "stream-type-list": (added("i8", b"\0" * 4, dtype=["I8"]), "tensor 'i8'"),
    "stream-2d": (added("i8", b"\0" * 4, shape=[2, 2]), "tensor 'i8'"),
    "stream-0d": (added("i8", b"\0", shape=[]), "tensor 'i8'"),
    "stream-zero-times-2**63": (added("i8", b"", shape=[0, 2**63]), "tensor 'i8'"),
    "stream-2**63": (added("i8", b"", shape=[2**63]), "damaged"),
    "stream-2**64": (added("i8", b"", shape=[2**64]), "damaged"),
    "stream-negative": (added("i8", b"", shape=[-1]), "damaged"),
    "stream-shape-text": (added("i8", b"", shape=["a\nb\x1b"]), "damaged"),
    "stream-too-short": (tensor("u8", shape=[3]), "damaged"),
    "stream-too-long": (tensor("u8", shape=[300]), "damaged"),
    "stream-extra-field": (tensor("u8", compression="zip"), "tensor 'u8' must have the fields"),
    "stream-is-a-list": (lambda parts: parts.tensors.update(i8=[1]), "tensor 'i8'"),
    "offsets-overlap": (swapped, "damaged"),
    "offsets-hole": (shifted, "damaged"),
    "offsets-backwards": (tensor("u8", data_offsets=[9, 2]), "damaged"),
    "offsets-beyond": (tensor("u8", data_offsets=[0, 2**62]), "damaged"),
    "offsets-negative": (tensor("u8", data_offsets=[-1, 12]), "damaged"),
    "offsets-three": (tensor("u8", data_offsets=[0, 1, 2]), "damaged"),
    "trailing-bytes": (lambda parts: setattr(parts, "payload", parts.payload + b"PK\3\4"), "damaged"),
}  # fmt: skip


def emptied(parts):
    """No weights, but a book."""
    parts.contents |= {"units": [], "methods": [], "books": [[2, 1]]}
    parts.tensors, parts.payload = {}, b""
    parts.add("f16", b"\0" * 4, shape=[2])


def old(version):
    """A file of an earlier version without the field `books`, but with weights made of some."""
    return lambda parts: (parts.contents.pop("books"), parts.contents.update(format=version))


BOOK_ATTACKS = {
    # versions and kinds
    "version-3-with-books": (edit("format", 3), r"the header must have the fields .* got .*'books'"),
    "version-3-with-weights-of-books": (old(3), r"units\[0\]: version 3 has no weights made of books"),
    "version-1-with-weights-of-books": (old(1), r"units\[0\]: version 1 has no weights made of books"),
    "version-4-without-books": (lambda parts: parts.contents.pop("books"), "numbers of the file's 0 books"),
    "grid-with-books": (edit("units.3.weight.books", [0]), r"units\[3\]: this weight of kind 'grid' has no books"),
    "grid-with-no-books": (edit("units.3.weight.books", []), "this weight of kind 'grid' has no books"),
    "grid-of-a-codebook": (edit("units.3.weight.values", "codebook"), r"grid.weight: unknown metadata fields \['val"),
    "sparse-dense-with-books": (edit("units.2.weight.values", "dense"), "this weight of kind 'sparse' has no books"),
    "codebook-in-codebook": (edit("units.0.weight.values", "codebook"), r"unknown metadata fields \['values'\]"),
    # the list of books
    "books-null": (edit("books", None), "'books' must be a list"),
    "books-object": (edit("books", {"0": [4, 2]}), "'books' must be a list"),
    "books-empty": (edit("books", []), r"units\[0\]: books must be numbers of the file's 0 books, got \[0, 1\]"),
    "book-of-one-number": (edit("books.0", [4]), r"books\[0\] must be \[words, d\], got \[4\]"),
    "book-of-three-numbers": (edit("books.0", [4, 2, 1]), r"books\[0\] must be \[words, d\]"),
    "book-true": (edit("books.1", [2, True]), r"books\[1\] must be \[words, d\], got \[2, True\]"),
    "book-float": (edit("books.0", [4.0, 2]), r"books\[0\] must be \[words, d\]"),
    "book-negative": (edit("books.0", [-4, -2]), r"books\[0\] must be \[words, d\]"),
    "book-text": (edit("books.0", "42"), r"books\[0\] must be \[words, d\]"),
    "book-long": (edit("books.0", [4, "x" * 10000]), r"books\[0\] must be \[words, d\]"),
    "words-3": (edit("books.0", [3, 2]), r"books\[0\] must have a power of two from 2 to 4096 .*, got \[3, 2\]"),
    "words-0": (edit("books.0", [0, 2]), "a power of two from 2"),
    "words-1": (edit("books.0", [1, 2]), "a power of two from 2"),
    "words-8192": (edit("books.0", [8192, 2]), "a power of two from 2 to 4096"),
    "words-huge": (edit("books.0", [HUGE, 2]), "a power of two from 2 to 4096"),
    "d-0": (edit("books.0", [4, 0]), "words of 1 to 64 entries"),
    "d-65": (edit("books.0", [4, 65]), "words of 1 to 64 entries"),
    "d-huge": (edit("books.0", [2, HUGE]), "words of 1 to 64 entries"),
    "book-beyond-the-stream": (edit("books.0", [4096, 64]), r"books\[0\] needs 262144 elements of 'f16', 18 are left"),
    "many-books": (edit("books", [[2, 1]] * 2000), "elements of 'f16', 0 are left"),
    "book-unused": (emptied, "a book is used by no weight"),
    "books-unused": (edit("units", []), "a book is used by no weight"),
    # the numbers of a weight
    "numbers-missing": (lambda parts: parts.contents["units"][0]["weight"].pop("books"), "books' must be a list"),
    "numbers-text": (edit("units.0.weight.books", "01"), r"'units\[0\].books' must be a list"),
    "numbers-count": (edit("units.0.weight.books", 1), r"'units\[0\].books' must be a list"),
    "numbers-none": (edit("units.0.weight.books", []), "a weight is made of 1 to 8 books, got 0"),
    "numbers-nine": (edit("units.0.weight.books", [0] * 9), "a weight is made of 1 to 8 books, got 9"),
    "numbers-many": (edit("units.0.weight.books", [0] * 10000), "a weight is made of 1 to 8 books, got 10000"),
    "number-beyond": (edit("units.0.weight.books", [0, 2]), r"numbers of the file's 2 books, got \[0, 2\]"),
    "number-negative": (edit("units.0.weight.books", [0, -1]), "numbers of the file's 2 books"),
    "number-true": (edit("units.0.weight.books", [0, True]), "numbers of the file's 2 books"),
    "number-float": (edit("units.0.weight.books", [0, 1.0]), "numbers of the file's 2 books"),
    "number-list": (edit("units.0.weight.books", [[0], 1]), "numbers of the file's 2 books"),
    "number-huge": (edit("units.0.weight.books", [0, 2**62]), "numbers of the file's 2 books"),
    "number-in-sparse": (edit("units.2.weight.books", [1, 2]), r"units\[2\]: books must be numbers of the file's 2"),
    "other-book": (edit("units.1.weight.books", [1]), "elements|padding|nothing uses"),
    "books-of-different-d": (edit("books.1", [4, 1]), "its books have words of different lengths, 2 and 1"),
    # fields
    "field-d": (edit("units.0.weight.d", 2), r"units\[0\]: unknown metadata fields \['d'\]"),
    "field-bits": (edit("units.2.weight.bits", [1, 2]), r"units\[2\]: unknown metadata fields \['bits'\]"),
    "taps-do-not-divide": (edit("units.1.weight.taps", 4), "taps.weight: field 'taps' must divide the 6 columns"),
    "taps-0": (edit("units.1.weight.taps", 0), "field 'taps' must be 1 to 6, got 0"),
    "taps-true": (edit("units.1.weight.taps", True), "field 'taps' must be 1 to 6, got True"),
    "taps-huge": (edit("units.1.weight.taps", 2**62), "field 'taps' must be 1 to 6"),
    "vectors-too-few": (edit("units.2.weight.vectors", 3), "field 'vectors' must be 4 to 7, got 3"),
    "vectors-other": (edit("units.2.weight.vectors", 7), "elements|the mask needs 4 vectors, the header says 7"),
    "vectors-huge": (edit("units.2.weight.vectors", 2**62), "field 'vectors' must be 4 to 7"),
    "vectors-true": (edit("units.2.weight.vectors", True), "field 'vectors'"),
    "vectors-without-mask": (edit("units.0.weight.vectors", 9), r"unknown metadata fields \['vectors'\]"),
    "mask-of-other-vectors": (poked("u8", 7, b"\x3f\x04"), "the mask needs 5 vectors, the header says 4"),
    "type-f64": (edit("units.0.weight.type", "f64"), "field 'type'"),
    "shape-large": (edit("units.0.shape", [1, HUGE]), "elements of 'u8'"),
    "shape-large-rows": (edit("units.0.shape", [HUGE, 1]), "elements of 'u8'"),
    # payload
    "word-nan": (poked("f16", 2, b"\x00\x7e"), r"books\[0\] holds NaN or infinite values"),
    "word-infinite": (poked("f16", 22, b"\x00\xfc"), r"books\[1\] holds NaN or infinite values"),
    "scale-nan": (poked("f32", 0, struct.pack("<f", float("nan"))), "vectors.weight: field 'scale' holds NaN"),
    "scale-infinite": (poked("f16", 24, b"\x00\x7c"), "taps.weight: field 'scale' holds NaN or inf"),
    "padding-codes": (poked("u8", 2, b"\xff"), "vectors.weight: the padding bits"),
    "padding-second-codes": (poked("u8", 4, b"\xff"), "vectors.weight: the padding bits"),
    "padding-of-taps": (poked("u8", 6, b"\xff"), "taps.weight: the padding bits"),
    "padding-mask": (poked("u8", 8, b"\xff"), "pruned.weight: the padding bits"),
    "padding-kept-codes": (poked("u8", 9, b"\xff"), "pruned.weight: the padding bits"),
    "short-books": (shorter("f16", 2), "elements of 'f16'"),
    "short-codes": (shorter("u8", 1), "elements of 'u8'"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("data", "attack", "told"),
    [pytest.param(SMALL, *a, id=name) for name, a in ATTACKS.items()]
    + [pytest.param(BOOKED, *a, id=f"books-{name}") for name, a in BOOK_ATTACKS.items()],
)
def test_an_attack_with_a_right_checksum(data, attack, told):
    parts = take_apart(data)
    attack(parts)
    with frugal():
        refused(parts.file(), told)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param('"about":{', '"about":{},"about":{', id="key-twice"),
        pytest.param('"bits":3', '"bits":2,"bits":3', id="field-twice"),
        pytest.param('"fp32_bytes":100', '"fp32_bytes":NaN', id="NaN"),
        pytest.param('"fp32_bytes":100', '"fp32_bytes":-Infinity', id="Infinity"),
        pytest.param('"fp32_bytes":100', '"fp32_bytes":1e999', id="1e999"),
        pytest.param('"fp32_bytes":100', '"fp32_bytes":' + "9" * 5000, id="5000-digits"),
        pytest.param('"error":0.012', '"error":1e999', id="error-1e999"),
        pytest.param('"kept":7', '"kept":7.0', id="float-count"),
        pytest.param('"format":2', '"format":02', id="not-json"),
        pytest.param("1e-05", "1e-400000000000000000000", id="eps-underflow-is-0"),
    ],
)
def test_json_that_is_not_plain(old, new):
    parts = take_apart(SMALL)
    assert parts.text().count(old) == 1
    data = parts.file(parts.text().replace(old, new))
    if new.startswith("1e-4"):
        assert from_bytes(data).norms[0].eps == 0
    else:
        refused(data)


@pytest.mark.parametrize("field", ['"shape":[3,5]', '"bits":3', '"fp32_bytes":100', '"kept":7', '"checksum":"' + BLANK])
@pytest.mark.parametrize(("left", "right"), ["[]", ('{"a":', "}")], ids=["lists", "objects"])
def test_deep_nesting(field, left, right):
    parts = take_apart(SMALL)
    key = field.split(":")[0]
    for depth in [*range(33, 200, 40), *range(900, 1010, 7), 100_000]:
        nested = key + ":" + left * depth + ("" if left == "[" else "1") + right * depth
        text = parts.text().replace(field, nested + (',"x":"' if "checksum" in key else ""), 1)
        assert nested in text
        refused(parts.file(text))


def test_nesting_that_is_allowed():
    parts = take_apart(SMALL)
    parts.contents["about"] = json.loads("[" * 30 + "]" * 30) and {"a": json.loads("[" * 30 + "]" * 30)}
    assert from_bytes(parts.file()).about == parts.contents["about"]


def test_a_payload_may_look_like_a_blank_checksum():
    looks = torch.tensor(list(MARK + BLANK.encode()), dtype=torch.uint8)
    data = plain_bytes(Artifact((), {"text": looks}, ()))
    assert torch.equal(from_bytes(data).rest["text"], looks)


@pytest.mark.parametrize("extra", [{"format": "pt"}, {"checksum": BLANK}])
def test_a_second_metadata_entry_is_refused(extra):
    refused(take_apart(SMALL).file(**extra), "metadata|checksum")


def test_two_headers_in_one():
    """A key that one JSON reader takes from its first, another from its last occurrence."""
    parts = take_apart(SMALL)
    good = json.dumps({"__metadata__": {"featherweight": parts.text()}} | parts.tensors, separators=(",", ":"))
    other = json.dumps({"featherweight": parts.text().replace(BLANK, "1" * 32)}, separators=(",", ":"))
    stream = json.dumps(parts.tensors["u8"], separators=(",", ":"))
    for old, new in [
        ('{"__metadata__":', '{"__metadata__":{},"__metadata__":'),
        ('{"__metadata__":', f'{{"__metadata__":{other},"__metadata__":'),
        ('"u8":', f'"u8":{stream},"u8":'),
    ]:
        assert good.count(old) == 1
        refused(from_header(good.replace(old, new), parts.payload), "its header is damaged")


def test_two_checksums():
    """Both blank while the checksum is computed, then both set."""
    parts = take_apart(SMALL)
    parts.contents["about"] = {"checksum": BLANK}
    data = parts.file()
    assert data.count(MARK) == 2
    (first,) = re.findall(re.escape(MARK) + b"([0-9a-f]{32})", data.replace(MARK + BLANK.encode(), b""))
    refused(data.replace(MARK + BLANK.encode(), MARK + first), "no checksum where it belongs")


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_bytes_for_the_payload(data):
    """Whatever the payload holds is read as it is, or refused."""
    parts = take_apart(data.draw(st.sampled_from([SMALL, BOOKED])))
    place = data.draw(st.integers(0, len(parts.payload) - 1))
    values = data.draw(st.binary(min_size=1, max_size=8))
    parts.payload = (parts.payload[:place] + values + parts.payload[place + len(values) :])[: len(parts.payload)]
    made = parts.file()
    if (artifact := tried(made)) is not None:
        assert plain_bytes(artifact) == made
        artifact.digest()
        rows_of(artifact)


# ---------------------------------------------------------------- what a file cannot make us do
def test_a_small_file_cannot_claim_much_memory():
    """A mask of zeros is the densest claim: 1 bit for a decoded float32."""
    count = 8 * 4096
    weight = {"kind": "sparse", "values": "dense", "type": "f16", "kept": 0}
    parts = take_apart(plain_bytes(Artifact((), {}, ())))
    parts.contents |= {
        "methods": ["x"],
        "units": [{"names": ["w"], "shape": [count], "method": 0, "weight": weight}],
    }
    parts.add("u8", bytes(count // 8))
    made = parts.file()
    with frugal(limit=64 * len(made)):
        assert from_bytes(made).units[0].tensor().numel() == count


@pytest.mark.parametrize(
    ("mask", "payload"),
    [
        ({"kind": "rows"}, 1),
        ({"kind": "n:m", "n": 1, "m": 1, "taps": 1}, 0),
        ({"kind": "channels", "taps": 2**36, "groups": 1}, 1),
        ({"kind": "box", "taps": 2**36}, 1),
    ],
)
def test_a_mask_of_a_pattern_cannot_claim_much_memory(mask, payload):
    weight = {"kind": "sparse", "values": "dense", "type": "f16", "kept": 0, "mask": mask}
    parts = take_apart(plain_bytes(Artifact((), {}, ())))
    unit = {"names": ["w"], "shape": [1, 2**36], "method": 0, "weight": weight}
    parts.contents |= {"format": 3, "methods": ["x"], "units": [unit]}
    parts.add("u8", bytes(payload))
    made = parts.file()
    with frugal(limit=1 << 20), pytest.raises(FormatError, match="more entries than a file of this size may claim"):
        from_bytes(made)


def claiming(rows: int, cols: int, books: int) -> bytes:
    """Rows of which the first alone is kept, in vectors of one entry; a code is a bit."""
    weight = {"kind": "sparse", "values": "codebook", "type": "f16", "kept": cols, "vectors": cols}
    weight |= {"mask": {"kind": "rows"}, "books": [0] * books}
    parts = take_apart(plain_bytes(Artifact((), {}, ())))
    unit = {"names": ["w"], "shape": [rows, cols], "method": 0, "weight": weight}
    parts.contents |= {"format": 4, "methods": ["x"], "units": [unit], "books": [[2, 1]]}
    parts.add("u8", b"\1" + bytes(rows // 8 - 1 + books * cols // 8))
    parts.add("f16", bytes(4 + 2 * rows), shape=[2 + rows])
    return parts.file()


def test_a_mask_of_one_row_and_eight_books_cannot_claim_much_memory():
    """Every row has room for as many codes as the longest, of each book."""
    with frugal(limit=1 << 22):
        assert from_bytes(claiming(1024, 2048, books=8)).units[0].weight.shape == (1024, 2048)
    with frugal(limit=1 << 22), pytest.raises(FormatError, match="more entries than a file of this size may claim"):
        from_bytes(claiming(2048, 2048, books=8))


def packed_as(packed: object, **outer: object) -> bytes:
    """A file of version 4 whose table of contents is packed like that."""
    text = json.dumps({"format": 4, "checksum": BLANK, "packed": packed} | outer, sort_keys=True, separators=(",", ":"))
    return take_apart(plain_bytes(Artifact((), {}, ()))).file(text)


def squeezed(text: bytes) -> str:
    return b85encode(zlib.compress(text, 9)).decode()


EMPTY = b'{"about":{},"batchnorm":[],"methods":[],"rest":[],"units":[]}'


def test_a_packed_table_of_contents_is_unpacked_with_care():
    assert from_bytes(packed_as(squeezed(EMPTY))) is not None
    twice = EMPTY.replace(b'"rest":[]', b'"rest":[],"rest":[]')
    bad = [None, 3, [], {}, "", "\u00e9", "~~~", "no base 85 {", b85encode(b"no zlib").decode()]
    bad += [squeezed(EMPTY[:-1]), squeezed(b"[]"), squeezed(b"\xff"), squeezed(twice), squeezed(b"[" * 10**5)]
    bad += [b85encode(zlib.compress(EMPTY)[:-3]).decode(), b85encode(zlib.compress(EMPTY) + b"more").decode()]
    bad += [squeezed(EMPTY[:-1] + b',"format":4}'), squeezed(EMPTY[:-1] + b',"packed":""}')]
    for value in bad:
        refused(packed_as(value), "unpacked")
    refused(packed_as(squeezed(EMPTY), units=[]), "the header must have the fields")


def test_a_table_of_contents_that_unpacks_to_gigabytes_is_refused():
    bomb = zlib.compressobj(9)
    data = b"".join(bomb.compress(b" " * (1 << 20)) for _ in range(256)) + bomb.flush()
    with frugal(limit=1 << 26):
        refused(packed_as(b85encode(data).decode()), "too large")


def box_file(version: int, bits: int) -> bytes:
    """One weight of 2 rows and 3 columns, of which the bits of a mask keep nothing or something."""
    weight = {"kind": "sparse", "values": "dense", "type": "f16", "kept": 0, "mask": {"kind": "box", "taps": 1}}
    parts = take_apart(plain_bytes(Artifact((), {}, ())))
    unit = {"names": ["w"], "shape": [2, 3], "method": 0, "weight": weight}
    parts.contents |= {"format": version, "methods": ["x"], "units": [unit]}
    parts.add("u8", bytes([bits]))
    return parts.file()


def test_a_mask_of_rows_and_channels_has_both_or_none_and_its_version():
    assert not from_bytes(box_file(3, 0)).units[0].tensor().any()
    for bits in (0b00001, 0b00100):
        with pytest.raises(FormatError, match="none of the one and some of the other"):
            from_bytes(box_file(3, bits))
    with pytest.raises(FormatError, match="version 2 has no masks of rows and channels"):
        from_bytes(box_file(2, 0))


def test_no_name_in_a_file_is_imported_or_run(tmp_path, monkeypatch):
    (tmp_path / "evil_factory.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef make(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    name = "evil_factory:make"
    parts = take_apart(plain_bytes(Artifact((), {"weight": torch.ones(2, 2), "bias": torch.ones(2)}, ())))
    parts.contents["about"] = dict.fromkeys(("model", "data", "arch", "class", "__reduce__", "test", "loader"), name)
    parts.contents["methods"] = [name, "evil_factory.make", "os.system"]
    (tmp_path / "evil.fw").write_bytes(parts.file())
    load(tmp_path / "evil.fw", into=nn.Linear(2, 2))  # whatever is imported on first use is imported now

    def forbidden(*args, **kwargs):
        raise AssertionError(f"a file made us call this with {args}")

    for module, call in [(importlib, "import_module"), (pickle, "load"), (pickle, "loads"), (torch, "load")]:
        monkeypatch.setattr(module, call, forbidden)
    before = set(sys.modules)
    artifact = read(tmp_path / "evil.fw")
    assert artifact.about["model"] == name
    load(tmp_path / "evil.fw", into=nn.Linear(2, 2))
    artifact.digest()
    rows_of(artifact)
    assert set(sys.modules) == before
    assert "evil_factory" not in sys.modules
    assert not (tmp_path / "ran").exists()
