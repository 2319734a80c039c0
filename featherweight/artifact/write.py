"""Artifact -> file. The same artifact gives the same bytes; the file appears whole or not at all."""

import hashlib
import json
import os
import secrets
import zlib
from base64 import b85encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from featherweight.artifact.read import from_bytes
from featherweight.artifact.schema import BLANK, KEY, MARK, STREAM_OF, VERSIONS, Artifact
from featherweight.coding import encode_floats
from featherweight.errors import FormatError, UsageError
from featherweight.weights import Factors, books_of, shared_factors
from featherweight.weights.coded import coded as codes_of
from featherweight.weights.factors import Factor
from featherweight.weights.masks import BoxMap


def to_bytes(artifact: Artifact) -> bytes:
    """The whole file, with everything entropy-coded that gets shorter by it."""
    contents, streams = _taken_apart(artifact, coded=True)
    with _plain_about():
        return _coded_file(contents | {"format": VERSIONS[5]}, streams)


def plain_bytes(artifact: Artifact) -> bytes:
    """The same without coding: of the first format version that can say what is in it. Larger, quick to read and
    write."""
    contents, streams = _taken_apart(artifact, coded=False)
    with _plain_about():
        text = _json(contents if contents["format"] < VERSIONS[3] else packed(contents))
    return stamp(save({name: torch.cat(parts) for name, parts in streams.items()}, {KEY: text}))


@contextmanager
def _plain_about() -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"'about' must hold plain JSON values: {error}") from error


def _taken_apart(artifact: Artifact, coded: bool) -> tuple[dict[str, Any], dict[str, list[Tensor]]]:
    """The table of contents, of a version without coding, and the pieces of every stream."""
    streams: dict[str, list[Tensor]] = {}

    def put(tensor: Tensor) -> str:
        if tensor.dtype not in STREAM_OF:
            raise UsageError(f"a tensor of type {tensor.dtype} cannot be stored; convert it or remove it first")
        stream = STREAM_OF[tensor.dtype]
        streams.setdefault(stream, []).append(tensor.detach().cpu().reshape(-1))
        return stream

    methods = sorted({u.method for u in artifact.units})
    units, rest, norms = [], [], []
    books: dict[bytes, int] = {}  # contents -> number: equal ones are stored once
    shapes: list[list[int]] = []
    for unit in artifact.units:
        for book in books_of(unit.weight):
            if _contents(book) not in books:
                books[_contents(book)] = len(shapes)
                shapes.append(list(book.shape))
                put(book)
    common: dict[bytes, int] = {}  # factors that weights share, likewise
    factors: list[dict[str, Any]] = []
    for unit in artifact.units:
        for part in shared_factors(unit.weight):
            if _factor(part) not in common:
                common[_factor(part)] = len(factors)
                shorter = codes_of(part) if coded else {}
                said = {"shape": part.shape, "weight": {"kind": part.kind} | part.meta()}
                factors.append(said | ({"coded": {n: len(t) for n, t in shorter.items()}} if shorter else {}))
                for name, tensor in part.tensors().items():
                    put(shorter.get(name, tensor))
    with ThreadPoolExecutor(max(torch.get_num_threads(), 1)) as pool:
        codes = list(pool.map(codes_of, [u.weight for u in artifact.units])) if coded else [{} for _ in artifact.units]
    for unit, own_coded in zip(artifact.units, codes, strict=True):
        for name, tensor in unit.weight.tensors().items():
            put(own_coded.get(name, tensor))
        entry: dict[str, Any] = {"names": unit.names, "shape": unit.view.shape, "method": methods.index(unit.method)}
        if unit.view.transposed_groups:
            entry["transposed_groups"] = unit.view.transposed_groups
        if unit.error is not None:
            entry["error"] = float(f"{unit.error:.3g}")
        if unit.note:
            entry["note"] = unit.note
        if unit.input is not None:
            entry["input"] = asdict(unit.input)
        if own_coded:
            entry["coded"] = {name: len(t) for name, t in own_coded.items()}
        own = [books[_contents(book)] for book in books_of(unit.weight)]
        weight = {"kind": unit.weight.kind} | unit.weight.meta() | ({"books": own} if own else {})
        if own:  # the books say how long vectors and how wide codes are
            weight = {k: v for k, v in weight.items() if k not in ("d", "bits")}
        if isinstance(unit.weight, Factors):
            shared = iter([common[_factor(part)] for part in shared_factors(unit.weight)])
            weight["factors"] = [next(shared) if f is None else f for f in weight["factors"]]
        units.append(entry | {"weight": weight})
    known: dict[bytes, str] = {}
    for name, tensor in artifact.rest.items():
        first = known.setdefault(_tensor(tensor), name)
        rest.append([name, first] if coded and first != name else [name, put(tensor), list(tensor.shape)])
    for norm in artifact.norms:
        norms.append([norm.name, put(norm.scale), len(norm.scale), norm.eps])
        put(norm.shift)
    version = _version(artifact, [u["weight"] for u in units])
    contents = {
        "format": version,
        "checksum": BLANK,
        "methods": methods,
        "units": units,
        "rest": rest,
        "batchnorm": norms,
        "about": artifact.about,
    }
    if shapes:
        contents["books"] = shapes
    if factors:
        contents["factors"] = factors
    return contents, streams


def _coded_file(contents: dict[str, Any], streams: dict[str, list[Tensor]]) -> bytes:
    """A file of version 6: the contents, packed, and the streams that get shorter by it, coded, come first in `u8`."""
    whole = {name: torch.cat(parts) for name, parts in streams.items()}
    shorter = {name: found for name, stream in sorted(whole.items()) if (found := _shortened(stream)) is not None}
    if shorter:
        contents["streams"] = {name: [len(whole.pop(name)), len(found)] for name, found in shorter.items()}
    inner = {k: v for k, v in contents.items() if k not in ("format", "checksum")}
    table = torch.frombuffer(bytearray(zlib.compress(_json(inner).encode(), 9)), dtype=torch.uint8)
    pieces = [table, *shorter.values(), *([whole.pop("u8")] if "u8" in whole else [])]
    said = {"format": contents["format"], "checksum": contents["checksum"], "packed": len(table)}
    return stamp(save({"u8": torch.cat(pieces)} | whole, {KEY: _json(said)}))


def _shortened(stream: Tensor) -> Tensor | None:
    """A stream coded, where that is shorter: floats by their own models, whole numbers of several bytes by zlib."""
    if stream.dtype == torch.uint8:
        return None
    if stream.is_floating_point():
        return encode_floats(stream)
    found = zlib.compress(stream.contiguous().view(torch.uint8).numpy().tobytes(), 9)
    fewer = len(found) < stream.numel() * stream.element_size()
    return torch.frombuffer(bytearray(found), dtype=torch.uint8) if fewer else None


def packed(contents: dict[str, Any]) -> dict[str, Any]:
    """A table of contents as it stands in a file of version 4: what compresses well, compressed."""
    inner = {k: v for k, v in contents.items() if k not in ("format", "checksum")}
    text = b85encode(zlib.compress(_json(inner).encode(), 9)).decode()
    return {"format": contents["format"], "checksum": contents["checksum"], "packed": text}


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def stamp(data: bytes) -> bytes:
    """Put the checksum of a file with a blank checksum in its place."""
    place = data.index(MARK + BLANK.encode()) + len(MARK)
    digest = hashlib.blake2b(data, digest_size=16).hexdigest().encode()
    return data[:place] + digest + data[place + len(digest) :]


def write(artifact: Artifact, path: Path, coded: bool = True) -> int:
    """Write the file under a temporary name beside `path`, then rename it. Returns its size in bytes.

    Args:
        coded: as `to_bytes`, else as `plain_bytes`: for files that come and go.

    Raises:
        UsageError: the folder does not exist or cannot be written, or the file would not be readable.
    """
    data = to_bytes(artifact) if coded else plain_bytes(artifact)
    try:
        from_bytes(data)
    except FormatError as error:
        raise UsageError(f"this network cannot be stored: {error}") from error
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        if path.exists() and not path.is_file():  # the rename would replace even a device
            raise UsageError(f"cannot write {path}: it is not a regular file")
        with open(temporary, "xb") as file:  # with the rights that the umask leaves
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return len(data)


def _tensor(tensor: Tensor) -> bytes:
    """What tells one tensor from others."""
    own = tensor.detach().cpu().contiguous().reshape(-1)
    return f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + own.view(torch.uint8).numpy().tobytes()


def _contents(book: Tensor) -> bytes:
    return repr(tuple(book.shape)).encode() + book.detach().cpu().contiguous().numpy().tobytes()


def _factor(part: Factor) -> bytes:
    """What a factor is, whoever holds it."""
    said = _json([part.shape, part.kind, part.meta()])
    tensors = part.tensors().values()
    return said.encode() + b"".join(t.detach().cpu().contiguous().numpy().tobytes() for t in tensors)


def _version(artifact: Artifact, weights: list[dict[str, Any]]) -> int:
    """The lowest that can say what is in the file."""
    if any(w["kind"] == Factors.kind for w in weights):
        return VERSIONS[4]
    if any("books" in w for w in weights):
        return VERSIONS[3]
    masks = [w["mask"]["kind"] for w in weights if "mask" in w]
    if BoxMap.kind in masks:
        return VERSIONS[2]
    return VERSIONS[1] if masks or artifact.inputs() else VERSIONS[0]
