"""File -> Artifact. Everything is checked before anything is built from it; nothing is unpickled or imported."""

import hashlib
import json
import re
import zlib
from base64 import b85decode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from featherweight.activations import ActivationGrid, is_scale
from featherweight.artifact.checks import DENSEST, FREE, is_count, keys, listed, shape_of, text
from featherweight.artifact.schema import BLANK, KEY, LARGEST, MARK, STREAMS, VERSIONS, Artifact, FoldedNorm, StoredUnit
from featherweight.artifact.streams import Stream, decode_streams, streams_of
from featherweight.errors import FormatError
from featherweight.layers import View
from featherweight.weights import KINDS, Codebook, Dense, Factor, Factors, Grid, Sparse, books_of, shared_factors
from featherweight.weights.base import Layout
from featherweight.weights.codebook import LONGEST, MOST_BITS, MOST_BOOKS
from featherweight.weights.coded import uncoded
from featherweight.weights.factors import largest
from featherweight.weights.masks import BoxMap

_KINDS = {kind.kind: kind for kind in KINDS}
_MAX_DEPTH = 32


def read(path: Path) -> Artifact:
    """Read and check a file.

    Raises:
        FormatError: the file is missing, truncated, altered, of a newer version, or no featherweight file. The message
            names the file and the place.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error
    try:
        return from_bytes(data)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


def from_bytes(data: bytes) -> Artifact:
    """Like `read`, of the file's bytes."""
    try:
        return _artifact(data)
    except FormatError as error:
        message = str(error)  # it may quote the file
        raise FormatError(message if len(message) <= 300 else f"{message[:297]}...") from None


def _artifact(data: bytes) -> Artifact:
    header = _header(data)
    streams = streams_of(data)
    contents = _contents(header, streams["u8"])
    decode_streams(contents.get("streams", {}), streams)
    methods = [text(m, "methods") for m in listed(contents["methods"], "methods")]
    version = contents["format"]
    books = [_book(shape, i, streams) for i, shape in enumerate(listed(contents.get("books", []), "books"))]
    entries = enumerate(listed(contents["units"], "units"))
    claims = _Claims(max(FREE, DENSEST * len(data)))
    common = [
        _factor(entry, i, streams, claims, version)
        for i, entry in enumerate(listed(contents.get("factors", []), "factors"))
    ]
    waiting = [_unit(entry, i, methods, streams, version, claims, books, common) for i, entry in entries]
    with ThreadPoolExecutor(max(torch.get_num_threads(), 1)) as pool:  # coded fields take time, and let others work
        units = [task.result() for task in [pool.submit(load) for load in waiting]]
    if len({id(b) for u in units for b in books_of(u.weight)}) != len(books):
        raise FormatError("a book is used by no weight")
    if len({id(f) for u in units for f in shared_factors(u.weight)}) != len(common):
        raise FormatError("a shared factor is used by no weight")
    rest: dict[str, Tensor] = {}
    for i, entry in enumerate(listed(contents["rest"], "rest")):
        name, tensor = _rest(entry, i, streams, rest if version >= 6 else {}, claims)
        rest[name] = tensor
    norms = [_norm(entry, i, streams) for i, entry in enumerate(listed(contents["batchnorm"], "batchnorm"))]
    for stream in streams.values():
        stream.finish()
    names = [n for u in units for n in u.names] + [n for x in norms for n in x.tensors()] + list(rest)
    if len(set(names)) != len(names) or len(rest) != len(contents["rest"]):
        raise FormatError("a tensor name appears twice")
    if not isinstance(contents["about"], dict):
        raise FormatError("'about' must be an object")
    return Artifact(tuple(units), rest, tuple(norms), contents["about"])


def _header(data: bytes) -> dict[str, Any]:
    """The metadata of a file whose checksum is right, and whose tensors are named as they should be."""
    if len(data) < 8 or not 2 <= (size := int.from_bytes(data[:8], "little")) <= len(data) - 8:
        raise FormatError("not a featherweight file, or truncated: it ends before its header does")
    try:
        header = json.loads(data[8 : 8 + size], object_pairs_hook=_unique)
        contents = json.loads(header["__metadata__"][KEY], object_pairs_hook=_unique)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FormatError("not a featherweight file, or its header is damaged") from None
    if not isinstance(contents, dict) or not is_count(contents.get("format")):
        raise FormatError("not a featherweight file: its header names no format version")
    if contents["format"] not in VERSIONS:
        known = ", ".join(map(str, VERSIONS))
        raise FormatError(
            f"format version {contents['format']}; this featherweight reads versions {known}. Try a newer release"
        )
    digest = contents.get("checksum")
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{32}", digest):
        raise FormatError("damaged: the header has no checksum")
    stamped = MARK + digest.encode()
    if data.count(stamped) != 1:
        raise FormatError("damaged: the header has no checksum where it belongs")
    blank = data.replace(stamped, MARK + BLANK.encode())
    if hashlib.blake2b(blank, digest_size=16).hexdigest() != digest:
        raise FormatError("damaged: the checksum does not fit; the file was altered or not copied whole")
    keys(header.pop("__metadata__"), "the safetensors metadata", (KEY,))
    for name, entry in header.items():
        keys(entry, f"tensor {name!r}", ("dtype", "shape", "data_offsets"))
        flat = isinstance(entry["shape"], list) and len(entry["shape"]) == 1
        if name not in STREAMS or entry["dtype"] != name.upper() or not flat:
            raise FormatError(f"tensor {name!r} must be a vector, named after its type, one of {list(STREAMS)}")
    return contents


def _contents(contents: dict[str, Any], u8: Stream) -> dict[str, Any]:
    """The whole table of contents, its fields being those of its version."""
    if contents["format"] >= 4:
        contents = _unpacked(contents, u8)
    if not _is_plain(contents):
        raise FormatError("the header holds a number, a text or a nesting that not every JSON reader accepts")
    needed = ("format", "checksum", "methods", "units", "rest", "batchnorm", "about")
    optional = {4: ("books",), 5: ("books", "factors"), 6: ("books", "factors", "streams")}.get(contents["format"], ())
    keys(contents, "the header", needed, optional)
    return contents


def _unpacked(contents: dict[str, Any], u8: Stream) -> dict[str, Any]:
    """The whole table of contents of version 4, or 6, where it is at the beginning of the bytes. Nothing larger than
    LARGEST is ever made."""
    keys(contents, "the header", ("format", "checksum", "packed"))
    place = contents["packed"]
    try:
        if contents["format"] >= 6 and not is_count(place):
            raise ValueError
        given = b85decode(place) if contents["format"] < 6 else u8.take(place, "the contents").numpy().tobytes()
        stream = zlib.decompressobj()
        text = stream.decompress(given, LARGEST)
        if not stream.eof or stream.unused_data:
            raise ValueError
        inner = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, TypeError, AttributeError, RecursionError, zlib.error):
        raise FormatError("damaged: the table of contents cannot be unpacked, or is too large") from None
    if not isinstance(inner, dict) or {"format", "checksum", "packed"} & set(inner):
        raise FormatError("damaged: what was unpacked is no table of contents")
    return inner | {"format": contents["format"], "checksum": contents["checksum"]}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether every language can hold a JSON value: finite numbers, integers of 64 bits, no half surrogate pairs."""
    match value:
        case dict():
            return depth < _MAX_DEPTH and all(_is_plain(k) and _is_plain(v, depth + 1) for k, v in value.items())
        case list():
            return depth < _MAX_DEPTH and all(_is_plain(v, depth + 1) for v in value)
        case str():
            return not any("\ud800" <= c <= "\udfff" for c in value)
        case float():
            return isfinite(value)
        case int():
            return -(2**63) <= value < 2**63
        case _:
            return True


@final
@dataclass(slots=True)
class _Claims:
    """Entries that all weights, and tensors that are others again, may still have together: masks of whole rows say
    much in few bits."""

    left: int

    def take(self, count: int, where: str) -> None:
        self.left -= count
        if self.left < 0:
            raise FormatError(f"{where}: the weights have more entries than a file of this size may claim")


def _unit(
    entry: Any,
    i: int,
    methods: list[str],
    streams: dict[str, Stream],
    version: int,
    claims: _Claims,
    books: list[Tensor],
    common: list[Factor],
) -> Callable[[], StoredUnit]:
    """Takes what belongs to a weight from the streams; the function that decodes it."""
    where = f"units[{i}]"
    optional = ("transposed_groups", "error", "note", "input", "coded")[
        : 3 if version == 1 else 4 if version < 6 else 5
    ]
    keys(entry, where, ("names", "shape", "method", "weight"), optional)
    mask = entry["weight"].get("mask") if isinstance(entry["weight"], dict) else None
    if version == 1 and mask is not None:
        raise FormatError(f"{where}: version 1 has no masks of patterns")
    if version == 2 and isinstance(mask, dict) and mask.get("kind") == BoxMap.kind:
        raise FormatError(f"{where}: version 2 has no masks of rows and channels together")
    names = tuple(text(n, f"{where}.names") for n in listed(entry["names"], f"{where}.names"))
    shape = shape_of(entry["shape"], f"{where}.shape")
    groups = entry.get("transposed_groups", 0)
    if not is_count(groups) or (groups and (len(shape) < 2 or shape[0] % groups)):
        raise FormatError(f"{where}: transposed_groups {groups!r} does not fit shape {list(shape)}")
    method, error = entry["method"], entry.get("error")
    if not names or not is_count(method) or method >= len(methods) or not isinstance(error, float | None):
        raise FormatError(f"{where}: names, method or error are not valid")
    view = View(shape, groups)
    meta = entry["weight"]
    if not isinstance(meta, dict) or not isinstance(meta.get("kind"), str) or meta["kind"] not in _KINDS:
        raise FormatError(f"{where}: unknown kind of weight; expected one of {sorted(_KINDS)}")
    kind = _KINDS[meta["kind"]]
    own = [books[n] for n in _numbers(meta, len(books), version, where)]
    fields = {k: v for k, v in meta.items() if k not in ("kind", "books")}
    fields |= _cut(own, fields, where)
    shared: dict[str, dict[int, Factor]] = {}
    if kind is Factors:
        if version < 5:
            raise FormatError(f"{where}: version {version} has no weights made of factors")
        shared["shared"] = _shared(fields, common, where)
    try:
        layout = kind.layout(view.matrix_shape, fields)
        coded = _coded(entry.get("coded", {}), layout, f"{where}.coded")
        sizes = {f: (dtype, coded.get(f, n)) for f, (dtype, n) in layout.items()}
        pieces = {f: _piece(streams, dtype, n, f"{where}.{f}") for f, (dtype, n) in sizes.items()}
        entries = view.matrix_shape[0] * view.matrix_shape[1] * max(len(own), 1)
        most = largest(fields["axes"], fields["terms"], fields["sizes"]) if kind is Factors else 0
        claims.take(max(entries, most), where)
        pieces |= {f"book{m}": book for m, book in enumerate(own)}
    except FormatError as wrong:
        raise FormatError(f"{names[0]}: {wrong}") from None
    note = text(entry.get("note", ""), f"{where}.note")
    rounded = _input(entry["input"], f"{where}.input") if "input" in entry else None

    def load() -> StoredUnit:
        try:
            plain = uncoded(kind, view.matrix_shape, fields, pieces, frozenset(coded)) if coded else pieces
            weight = kind.load(view.matrix_shape, fields, plain, **shared)
        except FormatError as wrong:
            raise FormatError(f"{names[0]}: {wrong}") from None
        return StoredUnit(names, view, weight, methods[method], error, note, rounded)

    return load


def _coded(said: Any, layout: Layout, where: str) -> dict[str, int]:
    """Bytes of the fields that are coded."""
    if not isinstance(said, dict) or not all(name in layout and layout[name][0] == torch.uint8 for name in said):
        raise FormatError(f"{where} must be an object of fields of whole numbers, got {said!r}")
    for name, size in said.items():
        if not is_count(size) or size >= layout[name][1]:
            raise FormatError(f"{where}.{name} must be fewer bytes than {layout[name][1]}, got {size!r}")
    return said


def _factor(entry: Any, i: int, streams: dict[str, Stream], claims: _Claims, version: int) -> Factor:
    """A factor that weights share."""
    where = f"factors[{i}]"
    keys(entry, where, ("shape", "weight"), ("coded",) if version >= 6 else ())
    shape = shape_of(entry["shape"], f"{where}.shape")
    meta = entry["weight"]
    if len(shape) != 2 or not isinstance(meta, dict) or meta.get("kind") not in ("dense", "grid"):
        raise FormatError(f"{where} must be a matrix of kind 'dense' or 'grid'")
    kind: type[Factor] = Dense if meta["kind"] == "dense" else Grid
    fields = {k: v for k, v in meta.items() if k != "kind"}
    size = shape[0], shape[1]
    try:
        layout = kind.layout(size, fields)
        coded = _coded(entry.get("coded", {}), layout, f"{where}.coded")
        pieces = {f: _piece(streams, t, coded.get(f, n), f"{where}.{f}") for f, (t, n) in layout.items()}
        claims.take(shape[0] * shape[1], where)
        return kind.load(size, fields, uncoded(kind, size, fields, pieces, frozenset(coded)) if coded else pieces)
    except FormatError as wrong:
        raise FormatError(f"{where}: {wrong}") from None


def _shared(fields: dict[str, Any], common: list[Factor], where: str) -> dict[int, Factor]:
    """The factors that a weight has by number, by their position; in `fields` None takes the place of the number."""
    found: dict[int, Factor] = {}
    if isinstance(fields.get("factors"), list):
        for k, entry in enumerate(fields["factors"]):
            if entry is None or (not isinstance(entry, dict) and not (is_count(entry) and entry < len(common))):
                raise FormatError(
                    f"{where}: a factor must be an object or the number of one of {len(common)} shared ones"
                )
            if not isinstance(entry, dict):
                found[k] = common[entry]
        fields["factors"] = [None if k in found else f for k, f in enumerate(fields["factors"])]
    return found


def _numbers(meta: dict[str, Any], count: int, version: int, where: str) -> list[int]:
    """Which of the `count` books a weight is made of; none where its kind has no books."""
    if Codebook.kind not in (meta["kind"], meta.get("values") if meta["kind"] == Sparse.kind else None):
        if "books" in meta:
            raise FormatError(f"{where}: this weight of kind '{meta['kind']}' has no books")
        return []
    if version < 4:
        raise FormatError(f"{where}: version {version} has no weights made of books")
    numbers = listed(meta.get("books"), f"{where}.books")
    if not 1 <= len(numbers) <= MOST_BOOKS:
        raise FormatError(f"{where}: a weight is made of 1 to {MOST_BOOKS} books, got {len(numbers)}")
    if not all(is_count(n) and n < count for n in numbers):
        raise FormatError(f"{where}: books must be numbers of the file's {count} books, got {numbers!r}")
    return numbers


def _cut(books: list[Tensor], fields: dict[str, Any], where: str) -> dict[str, Any]:
    """How long vectors and how wide codes are, as the books say."""
    if not books:
        return {}
    cut = {"d": books[0].shape[1], "bits": [len(b).bit_length() - 1 for b in books]}
    if said := sorted(cut.keys() & fields):
        raise FormatError(f"{where}: unknown metadata fields {said}; the books say what they would")
    if lengths := sorted({b.shape[1] for b in books} - {cut["d"]}):
        raise FormatError(f"{where}: its books have words of different lengths, {cut['d']} and {lengths[0]}")
    return cut


def _book(shape: Any, i: int, streams: dict[str, Stream]) -> Tensor:
    where = f"books[{i}]"
    if not isinstance(shape, list) or len(shape) != 2 or not all(map(is_count, shape)):
        raise FormatError(f"{where} must be [words, d], got {shape!r}")
    words, d = shape
    if words not in [2**n for n in range(1, MOST_BITS + 1)] or not 1 <= d <= LONGEST:
        most = f"a power of two from 2 to {2**MOST_BITS} and words of 1 to {LONGEST} entries"
        raise FormatError(f"{where} must have {most}, got {shape}")
    book = streams["f16"].take(words * d, where).reshape(words, d)
    if not torch.isfinite(book).all():
        raise FormatError(f"{where} holds NaN or infinite values")
    return book


def _input(entry: Any, where: str) -> ActivationGrid:
    keys(entry, where, ("bits", "scale", "zero"))
    bits, scale, zero = entry["bits"], entry["scale"], entry["zero"]
    if not is_count(bits) or not 2 <= bits <= 8:
        raise FormatError(f"{where}: bits must be 2 to 8, got {bits!r}")
    if not is_scale(scale):
        raise FormatError(f"{where}: scale must be a positive number that float32 holds exactly, got {scale!r}")
    if not is_count(zero) or zero >= 2**bits:
        raise FormatError(f"{where}: zero must be a code of {bits} bits, got {zero!r}")
    return ActivationGrid(bits, scale, zero)


def _piece(streams: dict[str, Stream], dtype: torch.dtype, count: int, where: str) -> Tensor:
    return next(s for name, s in streams.items() if STREAMS[name] == dtype).take(count, where)


def _rest(
    entry: Any, i: int, streams: dict[str, Stream], known: dict[str, Tensor], claims: _Claims
) -> tuple[str, Tensor]:
    """A tensor and its name. known: those before it, one of which it may be again."""
    where = f"rest[{i}]"
    if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str) and entry[1] in known:
        claims.take(known[entry[1]].numel(), where)
        return text(entry[0], where), known[entry[1]].clone()  # who changes one must not change both
    if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[1], str) or entry[1] not in STREAMS:
        raise FormatError(f"{where} must be [name, type, shape]")
    shape = shape_of(entry[2], where, least=0)
    return text(entry[0], where), streams[entry[1]].take(prod(shape), where).reshape(shape)


def _norm(entry: Any, i: int, streams: dict[str, Stream]) -> FoldedNorm:
    where = f"batchnorm[{i}]"
    if not isinstance(entry, list) or len(entry) != 4 or entry[1] not in ("f16", "f32") or not is_count(entry[2]):
        raise FormatError(f"{where} must be [name, type, channels, eps]")
    if not isinstance(entry[3], float) or not 0 <= entry[3] < 1:
        raise FormatError(f"{where}: eps must be a number from 0 to 1, got {entry[3]!r}")
    scale, shift = (streams[entry[1]].take(entry[2], where) for _ in range(2))
    return FoldedNorm(text(entry[0], where), scale, shift, entry[3])
