"""Solved layers kept on disk, each under a fingerprint of everything that it was computed from. See docs/database.md.

An entry is a `.fw` file like any other (docs/format.md), so it is checked whole before anything is built from it, it
appears whole or not at all, and `featherweight inspect` shows it. What cannot be read, or is something else, counts as
missing.
"""

import hashlib
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, final

import llvmlite.binding
import numba
import numpy as np
import torch
from torch import Tensor

from featherweight.artifact import Artifact, StoredUnit, read, write
from featherweight.artifact.schema import VERSIONS
from featherweight.errors import FormatError, UsageError
from featherweight.layers import View
from featherweight.methods import Method, Obs, Prune, PruneQuantize, Rows, Solution, Status
from featherweight.methods.patterns import whole
from featherweight.methods.pruning import Pruned, stored
from featherweight.methods.traces import Trace
from featherweight.stats import LayerStats

VERSION = 1  # of what an entry means
PACKAGE = Path(__file__).parent
SOURCES = (  # all that a solver is made of (a test follows the imports), and the file with the package's version
    "__init__.py",
    "_linalg.py",
    "_pack.py",
    "calls.py",
    "coding/**/*.py",
    "data.py",
    "errors.py",
    "layers.py",
    "repair/distance.py",
    "sensitivity.py",
    "stats.py",
    "methods/**/*.py",
    "weights/**/*.py",
)

T = TypeVar("T")


@final
@dataclass(slots=True)
class Shared:
    """What several methods of one layer have in common: the layer as the last pruner left it."""

    pruner: Obs | Prune | None = None
    pruned: Pruned | None = None


class DatabaseWarning(UserWarning):
    """An entry was not usable, or could not be kept. The result is right all the same; it only took longer."""


@final
@dataclass(frozen=True, slots=True)
class Database:
    """A folder of entries, made by the first write. Several processes may use one at a time; any file in it may be
    deleted at any time."""

    folder: Path

    @classmethod
    def at(cls, folder: str | Path) -> "Database":
        """The database in a folder, which may not exist yet.

        Raises:
            UsageError: it is no folder, or cannot be written, or cannot be made.
        """
        path = Path(folder)
        if path.exists() and not path.is_dir():
            raise UsageError(f"the database {path} is not a folder")
        place = path if path.exists() else path.parent
        if not place.is_dir():
            raise UsageError(f"the folder {place} does not exist; the database cannot be made in it")
        if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
            raise UsageError(f"the folder {place} cannot be read and written; choose another --database")
        return cls(path)

    def solve(
        self, method: Method, w: Tensor, stats: LayerStats, shared: "Shared | None" = None
    ) -> tuple[Solution, bool]:
        """`method.solve(w, stats)`, and whether it came from here. What did not is kept as soon as it is solved.

        Args:
            shared: give the same one for several methods of one layer: those that prune alike prune once.

        Raises:
            SolveError: as the method does; a failure is not kept.
        """
        try:
            key = fingerprint("solution", method, w, stats)
        except UsageError as error:
            _warn(f"not kept in the database: {error}")
            return method.solve(w, stats), False
        found = self._entry(key, lambda entry: _solution(entry, (w.shape[0], w.shape[1])))
        if found is not None:
            return found, True
        solution = self._solve(method, w, stats, shared or Shared())
        shown = solution.relative_error if math.isfinite(solution.relative_error) else None
        unit = StoredUnit(("weight",), View((w.shape[0], w.shape[1])), solution.weight, method.label, shown)
        facts = {
            "error": float(solution.error).hex(),
            "relative_error": float(solution.relative_error).hex(),
            "status": solution.status.name,
            "padded": solution.padded,
            "remark": solution.remark,
            "info": {name: float(value).hex() for name, value in solution.info.items()},
        }
        self._keep(key, Artifact((unit,), {}, (), facts))
        return solution, False

    def _solve(self, method: Method, w: Tensor, stats: LayerStats, shared: "Shared") -> Solution:
        """With the trace of the layer where the method makes one: it serves every sparsity."""
        pruner = method.prune if isinstance(method, PruneQuantize) else method
        if not isinstance(pruner, Obs | Prune):
            return method.solve(w, stats)
        if shared.pruner != pruner or shared.pruned is None:
            trace = None if isinstance(pruner.pattern, Rows) else self._trace(pruner, w, stats)
            shared.pruner, shared.pruned = pruner, pruner.prune(w, stats, trace)
        if isinstance(method, PruneQuantize):
            return method.stored(shared.pruned, w, stats)
        return stored(pruner, shared.pruned, w, stats)

    def _trace(self, pruner: Obs | Prune, w: Tensor, stats: LayerStats) -> Trace:
        exact = Obs(whole(pruner.pattern), pruner.damp)
        key = fingerprint("trace", exact, w, stats)
        kept = self.tensors(key)
        if kept is not None:
            return Trace(kept["order"], kept["losses"])
        found = exact.trace(w, stats)
        self.keep(key, {"order": found.order, "losses": found.losses}, {"trace": exact.label})
        return found

    def tensors(self, key: str) -> dict[str, Tensor] | None:
        """What `keep` was given under this key, bit for bit; None where there is nothing usable."""
        return self._entry(key, lambda entry: entry.rest)

    def keep(self, key: str, tensors: dict[str, Tensor], meta: dict[str, Any] | None = None) -> None:
        """Keep tensors of any shape (a number is a tensor without dimensions).

        Args:
            key: a `fingerprint` of all that the tensors follow from.
            meta: plain JSON for people who inspect the entry.
        """
        self._keep(key, Artifact((), tensors, (), {"meta": meta or {}}))

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.fw"

    def _entry(self, key: str, decoded: Callable[[Artifact], T]) -> T | None:
        path = self.path(key)
        if not os.path.lexists(path):
            return None
        try:
            if not os.path.isfile(path):  # opening a pipe would wait for ever
                raise FormatError(f"{path} is not a regular file")
            entry = read(path)
            if entry.about.get("fingerprint") != key:
                raise FormatError(f"{path} belongs to something else: its fingerprint is not its name")
            return decoded(entry)
        except FormatError as error:
            _warn(f"database entry not usable, so computed again: {error}")
            return None

    def _keep(self, key: str, entry: Artifact) -> None:
        """A result is worth more than its copy: whatever goes wrong here is a warning."""
        marked = Artifact(entry.units, entry.rest, entry.norms, entry.about | {"fingerprint": key})
        try:
            self.folder.mkdir(exist_ok=True)
            write(marked, self.path(key), coded=False)
        except (OSError, UsageError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            why = cause.strerror if isinstance(cause, OSError) else error
            _warn(f"the database {self.folder} could not keep a result, which is used all the same: {why}")


def fingerprint(kind: str, *inputs: Any) -> str:
    """The key of what follows from `inputs`: the kind and 32 hexadecimal digits.

    It covers every bit of every tensor, every field of every dataclass of this package with its class, and what
    computes: the solvers' sources, the versions of the libraries, the processor, the number of threads.

    Raises:
        UsageError: an input holds something else, such as a class from outside the package, whose code we do not know.
    """
    seen = hashlib.blake2b(digest_size=16)
    _feed(seen, (kind, *_environment(), *inputs))
    return f"{kind}-{seen.hexdigest()}"


def _environment() -> tuple[Any, ...]:
    """Whatever may change the last bit of a result, besides the inputs."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    libraries = np.__version__, numba.__version__, torch.__version__, torch.__config__.show(), gpu
    return VERSION, VERSIONS, CODE, *libraries, llvmlite.binding.get_host_cpu_name(), torch.get_num_threads()


def _source_digest(package: Path) -> str:
    """Fingerprint of the solvers' sources: names and bytes."""
    seen = hashlib.blake2b(digest_size=16)
    paths = {path for pattern in SOURCES for path in package.glob(pattern)}
    _feed(seen, tuple((path.relative_to(package).as_posix(), path.read_text()) for path in sorted(paths)))
    return seen.hexdigest()


def _feed(seen: Any, value: Any) -> None:
    """Add a value to a hash, each part behind its type and length, so that different values never read alike."""
    match value:
        case Tensor():
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            seen.update(b"tensor ")  # with its memory order: libraries sum a transposed matrix in another order
            _feed(seen, (str(value.dtype), tuple(value.shape), value.stride()))
            seen.update(data.data)
        case Enum():
            seen.update(b"enum ")
            _feed(seen, (_class(value), value.name))
        case None | bool() | int() | float() | str():
            text = (value.hex() if isinstance(value, float) else str(value)).encode()
            seen.update(f"{type(value).__name__} {len(text)} ".encode() + text)
        case tuple() | list():
            seen.update(f"sequence {len(value)} ".encode())
            for item in value:
                _feed(seen, item)
        case dict():
            seen.update(b"dict ")
            _feed(seen, sorted(value.items()))
        case _ if is_dataclass(value) and not isinstance(value, type):
            seen.update(b"dataclass ")
            _feed(seen, (_class(value), *((f.name, getattr(value, f.name)) for f in fields(value))))
        case _:
            raise UsageError(f"a value of type {type(value).__name__} has no fingerprint")


def _class(value: Any) -> str:
    kind = type(value)
    if not kind.__module__.startswith("featherweight."):
        raise UsageError(f"{kind.__qualname__} is not part of featherweight, so changes of its code would not be seen")
    return f"{kind.__module__}.{kind.__qualname__}"


def _solution(entry: Artifact, shape: tuple[int, int]) -> Solution:
    """The solution in an entry.

    Raises:
        FormatError: it holds none, or one for another shape.
    """
    about = entry.about
    try:
        (unit,) = entry.units
        numbers = float.fromhex(about["error"]), float.fromhex(about["relative_error"])
        info = {name: float.fromhex(value) for name, value in about["info"].items()}
        solution = Solution(
            unit.weight, *numbers, Status[about["status"]], info, bool(about["padded"]), str(about["remark"])
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise FormatError("the entry holds no solution of a layer") from None
    if solution.weight.shape != shape:
        raise FormatError(f"the entry holds a matrix of {solution.weight.shape}, expected {shape}")
    return solution


def _warn(message: str) -> None:
    warnings.warn(message, DatabaseWarning, stacklevel=4)


CODE = _source_digest(PACKAGE)  # read on import: of the code that runs, not of what an editor makes of the files later
