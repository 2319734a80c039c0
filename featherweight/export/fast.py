"""A network in whole numbers of 8 bits as an ONNX file, compared with the network before it takes its place."""

import copy
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from torch import nn

from featherweight.activations import simulate
from featherweight.artifact import Artifact, fill, read
from featherweight.chains import as_chains, chains_of
from featherweight.data import Batch, batches
from featherweight.errors import FormatError, UsageError
from featherweight.export.alike import alike, alike_alone
from featherweight.export.graph import (
    CONSTANT,
    INSTALL,
    check_model,
    check_size,
    doubled,
    dynamic,
    first,
    fix_batch,
    fixed_note,
    graph_of,
    name_batch,
)
from featherweight.export.parity import arrays_of, compared, in_onnxruntime
from featherweight.proof import replaced
from featherweight.solve import Progress

MADE_FOR = "for"  # the entry of a file's `about` that says what it was made for
SPEED = "speed"
BATCH = 32  # samples that run at once
SAMPLES = 256  # that grids are found on, at most


@final
@dataclass(frozen=True, slots=True)
class Int8Export:
    """What was written. bytes: of the ONNX file. operators: how many of each. exact: weights whose codes are the
    file's; weights: all that are int8. difference: of outputs in onnxruntime and in torch, root mean square, relative
    to torch's, that of the worst output. same: share of the samples whose largest entry is the same one, in the first
    output of floats with two or more dimensions; None where there is none. left: the file's weights that are float32,
    and why. notes: what the user should know."""

    path: str
    bytes: int
    operators: dict[str, int]
    weights: int
    exact: int
    difference: float
    same: float | None
    samples: int
    left: dict[str, str]
    notes: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def made_for_speed(artifact: Artifact) -> bool:
    """Whether a file comes from `compress --for speed`."""
    return artifact.about.get(MADE_FOR) == SPEED


def export_int8(
    artifact: Artifact | str | Path,
    model: nn.Module,
    data: Any,
    path: str | Path,
    progress: Progress = lambda _stage, _done, _total: None,
) -> Int8Export:
    """Write a compressed network as an int8 ONNX graph. The model, of the network's class, is not changed.

    Args:
        artifact: a .fw file, or its contents.
        data: calibration data, as `compress` takes them; the first SAMPLES samples are used, and what is written is
            compared on them, too.

    Raises:
        UsageError: the file does not fit the network, the network is not in float32, torch cannot export it, nothing
            in it can be int8, or a package is missing.
        FormatError: what was written computes something else; no file is left.
    """
    check_model(model)
    artifact = artifact if isinstance(artifact, Artifact) else read(Path(artifact))
    network = fill(copy.deepcopy(model), artifact)
    used = _first(batches(data, BATCH), SAMPLES)
    proto, used, (codes, left), reason = _graph(artifact, network, used, progress)
    notes = [] if reason is None else [fixed_note(used[0].size, reason)]
    with replaced(Path(path)) as place:
        place.write_bytes(proto.SerializeToString(deterministic=True))
        run = in_onnxruntime(place)
        found = alike(run, network, used)
        if reason is None:
            alike_alone(run, network, first(used[0]), found.sizes)
    operators = dict(sorted(Counter(n.op_type for n in proto.graph.node).items()))
    size, count = os.path.getsize(path), sum(b.size for b in used)
    exact = sum(c.exact for c in codes.values())
    return Int8Export(
        str(path), size, operators, len(codes), exact, found.difference, found.same, count, left, tuple(notes)
    )


def _graph(
    artifact: Artifact, network: nn.Module, data: Sequence[Batch], progress: Progress
) -> tuple[Any, list[Batch], tuple[dict[str, Any], dict[str, str]], str | None]:
    """The model, the batches that it takes, its weights as codes and those that are none, and why all batches are of
    one size, if they are."""
    try:
        from featherweight.export.int8 import int8_graph, left_of, weights_of
    except ImportError as error:
        raise UsageError(f"{INSTALL} ({error})") from error
    plain = copy.deepcopy(network)
    simulate(plain, {})
    as_chains(plain, artifact, chains_of(plain, artifact))
    proto = graph_of(plain, doubled(data[0]))
    check_size(proto)
    used, reason = list(data), _fixed(proto, plain, first(data[0]))
    if reason is not None:
        used = [doubled(b) for b in data if b.size == data[0].size]
        fix_batch(proto, used[0].size)
    names = [i.name for i in proto.graph.input]
    samples = [dict(zip(names, arrays_of(plain, b), strict=True)) for b in used]
    made = int8_graph(proto, artifact, samples, progress)
    name_batch(made.graph)
    return made, used, (weights_of(proto, artifact), left_of(proto, artifact)), reason


def _fixed(proto: Any, network: nn.Module, sample: Batch) -> str | None:
    """Why a float graph takes batches of one size only, None where it runs one sample as well."""
    if not dynamic(proto):
        return CONSTANT
    with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
        path = Path(folder) / "float.onnx"
        path.write_bytes(proto.SerializeToString())
        try:
            compared(path, network, [sample], True, False)
        except FormatError as error:
            return str(error)
    return None


def _first(data: Sequence[Batch], most: int) -> list[Batch]:
    """Batches of at most so many samples together, at least one."""
    found, total = [], 0
    for batch in data:
        if found and total + batch.size > most:
            break
        found.append(batch)
        total += batch.size
    return found
