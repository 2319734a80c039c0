"""The state of a training on disk: a file without weights in the package's own format, written whole or not at all."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from featherweight.artifact import Artifact, read, write
from featherweight.artifact.read import from_bytes
from featherweight.errors import FormatError, UsageError
from featherweight.finetune.settings import Settings

KEPT = "kept"  # what the tensors beside variables and optimizer are named


@final
@dataclass(frozen=True, slots=True)
class Place:
    """How far a training is. epoch, batch: the next one. steps: taken in all. lost, seen: sum of the losses and the
    samples of this epoch so far. losses: of the epochs that are done. each: steps of an epoch, 0 before the first."""

    epoch: int = 0
    batch: int = 0
    steps: int = 0
    lost: float = 0.0
    seen: int = 0
    losses: tuple[float, ...] = ()
    each: int = 0


def mark_of(how: Settings, processes: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What a training follows from, as JSON: its settings, but for functions; of the data only how many samples there
    are, where that is known."""
    settings = {k: v for k, v in _fields(how).items() if k not in ("data", "checkpoint") and not callable(v)}
    try:
        samples = len(how.data)
    except TypeError:
        samples = None
    start = Artifact((), tensors, ()).digest()
    return settings | {"samples": samples, "processes": processes, "start": start}


def save(
    path: Path,
    kind: str,
    mark: dict[str, Any],
    place: Place,
    steps: Sequence[Tensor],
    optimizer: torch.optim.Adam,
    kept: Mapping[str, Tensor],
) -> None:
    """Replace the file. kind: of training. kept: tensors beside the variables and the optimizer's.

    Raises:
        UsageError: it cannot be written.
    """
    tensors = {f"variable.{i}": s.detach() for i, s in enumerate(steps)}
    for i, step in enumerate(steps):
        tensors |= {f"{name}.{i}": t for name, t in optimizer.state.get(step, {}).items()}
    tensors |= {f"{KEPT}.{name}": t for name, t in kept.items()}
    write(Artifact((), tensors, (), {"kind": kind, "of": mark, "place": asdict(place)}), path, coded=False)


def content(path: Path, kind: str) -> bytes:
    """The file, checked; nothing where there is none.

    Raises:
        UsageError: it is no checkpoint of this kind of training.
    """
    if not path.exists():
        if not path.parent.is_dir():
            raise UsageError(f"the folder {path.parent} of the checkpoint does not exist")
        return b""
    try:
        found = read(path)
    except FormatError as error:
        raise UsageError(f"the checkpoint cannot be used: {error}") from error
    if found.about.get("kind") != kind:
        raise UsageError(f"{path} is no checkpoint of a {kind}; name another file")
    return path.read_bytes()


def resume(
    data: bytes, where: Path, mark: dict[str, Any], steps: Sequence[Tensor], optimizer: torch.optim.Adam
) -> tuple[Place, dict[str, Tensor]]:
    """Put a checkpoint's state into the variables and the optimizer; returns what was `kept` beside them.

    Raises:
        UsageError: it is of something else.
    """
    found = from_bytes(data)
    theirs, tensors = found.about["of"], found.rest
    for name, value in mark.items():
        if theirs.get(name) != value:
            what = f"of {name} {theirs.get(name)}, not {value}"
            what = {"start": "of another network, file or data", "methods": "of other methods"}.get(name, what)
            raise UsageError(f"the checkpoint {where} is {what}; name another file, or delete it")
    with torch.no_grad():
        for i, step in enumerate(steps):
            step.copy_(tensors[f"variable.{i}"])
    names = sorted({n.partition(".")[0] for n in tensors} - {"variable", KEPT})
    state = {i: {n: tensors[k] for n in names if (k := f"{n}.{i}") in tensors} for i in range(len(steps))}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {i: s for i, s in state.items() if s}, "param_groups": groups})
    place = found.about["place"]
    kept = {n.removeprefix(f"{KEPT}."): t for n, t in tensors.items() if n.startswith(f"{KEPT}.")}
    return Place(**place | {"losses": tuple(place["losses"])}), kept


def _fields(how: Any) -> dict[str, Any]:
    return {name: getattr(how, name) for name in how.__dataclass_fields__}
