"""A network in whole numbers of 8 bits as an ONNX file, compared with the network before it takes its place."""

import copy
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import nn

from featherweight.activations import simulate
from featherweight.artifact import Artifact, fill
from featherweight.chains import as_chains, chains_of
from featherweight.data import Batch
from featherweight.errors import FormatError, UsageError
from featherweight.export.graph import INSTALL, bound, doubled, graph_of, quiet
from featherweight.export.parity import in_onnxruntime, tensors_in
from featherweight.proof import replaced
from featherweight.solve import Progress

MADE_FOR = "for"  # the entry of a file's `about` that says what it was made for
SPEED = "speed"
SAMPLES = 256  # that grids are found on, at most
FAR = 0.25  # of the outputs' root mean square: a difference that is more than rounding


@final
@dataclass(frozen=True, slots=True)
class Fast:
    """What was written. bytes: of the ONNX file. operators: how many of each. exact: weights whose codes are the
    file's; weights: all that are int8. difference: of outputs in onnxruntime and in torch, root mean square, relative
    to torch's. same: share of the samples whose largest output is the same one."""

    path: str
    bytes: int
    operators: dict[str, int]
    weights: int
    exact: int
    difference: float
    same: float
    samples: int

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def made_for_speed(artifact: Artifact) -> bool:
    """Whether a file comes from `compress --for speed`."""
    return artifact.about.get(MADE_FOR) == SPEED


def export_int8(
    artifact: Artifact, model: nn.Module, data: Sequence[Batch], path: str | Path, progress: Progress
) -> Fast:
    """Write a compressed network as an int8 ONNX graph. The model, of the network's class, is not changed.

    Args:
        data: calibration data; the first SAMPLES samples are used, and what is written is compared on them, too.

    Raises:
        UsageError: the file does not fit the network, torch cannot export it, nothing in it can be int8, or a package
            is missing.
        FormatError: what was written computes something else; no file is left.
    """
    network = fill(copy.deepcopy(model), artifact)
    used = _first(data, SAMPLES)
    proto, samples, codes = _graph(artifact, network, used, progress)
    with replaced(Path(path)) as place:
        place.write_bytes(proto.SerializeToString(deterministic=True))
        difference, same = _compared(place, network, used, samples)
        if not difference <= FAR:
            what = f"its outputs are {difference:.2f} of their root mean square away, allowed {FAR:g}"
            raise FormatError(f"the int8 network computes something else than the network in torch: {what}")
    operators = dict(sorted(Counter(n.op_type for n in proto.graph.node).items()))
    size, count = os.path.getsize(path), sum(b.size for b in used)
    exact = sum(c.exact for c in codes.values())
    return Fast(str(path), size, operators, len(codes), exact, difference, same, count)


def _graph(
    artifact: Artifact, network: nn.Module, data: Sequence[Batch], progress: Progress
) -> tuple[Any, list[dict[str, np.ndarray]], dict[str, Any]]:
    """The model, its inputs for every batch, and its weights as codes."""
    try:
        from featherweight.export.int8 import int8_graph, weights_of
    except ImportError as error:
        raise UsageError(f"{INSTALL} ({error})") from error
    plain = copy.deepcopy(network)
    simulate(plain, {})
    as_chains(plain, artifact, chains_of(plain, artifact))
    proto = graph_of(plain, doubled(data[0]))
    names = [i.name for i in proto.graph.input]
    samples = [dict(zip(names, arrays_of(plain, b), strict=True)) for b in data]
    return int8_graph(proto, artifact, samples, progress), samples, weights_of(proto, artifact)


def arrays_of(model: nn.Module, batch: Batch) -> list[np.ndarray]:
    """A batch as the inputs of the exported graph, in their order."""
    return [t.detach().cpu().numpy() for t in tensors_in(bound(model, batch)[0])]


def _first(data: Sequence[Batch], most: int) -> list[Batch]:
    """Batches of at most so many samples together, at least one."""
    found, total = [], 0
    for batch in data:
        if found and total + batch.size > most:
            break
        found.append(batch)
        total += batch.size
    return found


def _compared(
    path: Path, network: nn.Module, data: Sequence[Batch], samples: Sequence[Mapping[str, np.ndarray]]
) -> tuple[float, float]:
    """Relative difference of the first outputs, and the share of equal classes."""
    run = in_onnxruntime(path)
    square, off, same, count = 0.0, 0.0, 0, 0
    for batch, inputs in zip(data, samples, strict=True):
        with torch.no_grad(), quiet():
            expected = tensors_in(batch.run(network))[0].double().numpy()
        given = run(list(inputs.values()))[0].astype(np.float64)
        if given.shape != expected.shape:
            raise FormatError(f"the output has shape {given.shape} in onnxruntime and {expected.shape} in torch")
        square, off = square + float((expected**2).sum()), off + float(((given - expected) ** 2).sum())
        classes = [x.reshape(len(x), -1) for x in (given, expected)]
        same, count = same + int((classes[0].argmax(1) == classes[1].argmax(1)).sum()), count + len(given)
    return (off / max(square, 1e-300)) ** 0.5, same / count
