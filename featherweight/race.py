"""A network as it is, compressed, and as plain tools would have it, timed in turns in one run."""

import copy
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, final

import torch
from torch import nn

from featherweight.activations import simulate
from featherweight.artifact import Artifact, fill
from featherweight.chains import as_chains, chains_of
from featherweight.data import Batch, cut, stacked
from featherweight.errors import FeatherweightError, UsageError
from featherweight.export.fast import export_int8, made_for_speed
from featherweight.export.graph import doubled, graph_of, quiet
from featherweight.export.onnx import export_onnx
from featherweight.export.parity import arrays_of, in_onnxruntime, in_openvino
from featherweight.slim import slim
from featherweight.solve import Progress

ROUNDS, SECONDS = 11, 0.2  # turns of all, and what one takes of each of them
MOST = 100  # calls of one in a turn
FASTER = 1.05  # times: less is said to be no faster
DENSE, OURS = "dense fp32", "ours"

Call: TypeAlias = Callable[[], Any]
Rounds: TypeAlias = dict[tuple[str, str], list[float]]
"""Milliseconds in every round, by runtime and network."""


@final
@dataclass(frozen=True, slots=True)
class Time:
    """Milliseconds of one call with `batch` samples: the median of all rounds' medians, and the lowest and highest of
    them. faster: how many times faster than the dense network in the same runtime, the median over rounds of the ratio
    within one, and the lowest and highest of these; None where the dense network was not timed there."""

    runtime: str
    what: str
    batch: int
    ms: float
    lowest: float
    highest: float
    faster: float | None
    faster_lowest: float | None
    faster_highest: float | None


@final
@dataclass(frozen=True, slots=True)
class Race:
    """left: what could not run, and why. verdict: for people, one sentence a batch size."""

    times: tuple[Time, ...]
    left: dict[str, str]
    verdict: tuple[str, ...]


@torch.no_grad()
def race(
    artifact: Artifact,
    model: nn.Module,
    data: Sequence[Batch],
    sizes: Sequence[int],
    file_bytes: int,
    progress: Progress,
) -> Race:
    """Time a file's network beside the dense one, in torch, onnxruntime and, where it is installed, OpenVINO, on
    torch's number of threads.

    Args:
        model: the dense network; it is not changed. data: inputs that onnxruntime's quantizer and int8 graphs are
            calibrated on, and that are run. sizes: samples of a call.

    Raises:
        UsageError: the file does not fit the network, or there are too few samples.
    """
    inputs = {size: _exactly(data, model, size) for size in sizes}
    smaller = artifact.about.get("fp32_bytes", 0) / file_bytes if file_bytes else 0.0
    times: list[Time] = []
    verdict: list[str] = []
    with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
        files, left = _files(artifact, model, data, Path(folder), progress)
        networks, more = _networks(artifact, model)
        left |= more
        for size, batch in inputs.items():
            runs: dict[tuple[str, str], Call] = {}
            for what, network in networks.items():
                try:
                    batch.run(network)
                except Exception as error:  # what a network of ours cannot do is one line of the result
                    if what == DENSE:
                        raise
                    left[f"{what} in torch"] = _first_line(error)
                    continue
                runs["torch", what] = lambda network=network, batch=batch: batch.run(network)
            arrays = arrays_of(model, batch)
            for runtime, start in _runtimes().items():
                for what, file in files.items():
                    try:
                        run = start(file)
                        run(arrays)
                    except Exception as error:  # a runtime that does not take a file is one line of the result
                        left[f"{what} in {runtime}"] = _first_line(error)
                        continue
                    runs[runtime, what] = lambda run=run, arrays=arrays: run(arrays)
            found = in_turns(
                list(runs.values()), ROUNDS, SECONDS, lambda done, size=size: progress(f"batch {size}", done, ROUNDS)
            )
            rounds = dict(zip(runs, found, strict=True))
            times += _table(rounds, size)
            verdict.append(_verdict(rounds, size, smaller, left))
    return Race(tuple(times), left, tuple(verdict))


def in_turns(
    runs: Sequence[Call], rounds: int, seconds: float, progress: Callable[[int], None] = lambda _done: None
) -> list[list[float]]:
    """Milliseconds of each in every round: the median of as many calls as fit in the seconds, at least one. Another one
    is first in every round."""
    calls = []
    for run in runs:
        run()
        start = time.perf_counter()
        run()
        calls.append(max(1, min(int(seconds / max(time.perf_counter() - start, 1e-9)), MOST)))
    found: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds):
        progress(turn)
        for k in (*range(turn % len(runs), len(runs)), *range(turn % len(runs))):
            runs[k]()  # the caches are another's
            own = []
            for _ in range(calls[k]):
                start = time.perf_counter()
                runs[k]()
                own.append(1e3 * (time.perf_counter() - start))
            found[k].append(statistics.median(own))
    progress(rounds)
    return found


def _table(rounds: Rounds, size: int) -> list[Time]:
    rows = []
    for (runtime, what), own in rounds.items():
        dense = rounds.get((runtime, DENSE))
        faster = (None, None, None) if dense is None else _ratio(dense, own)
        rows.append(Time(runtime, what, size, statistics.median(own), min(own), max(own), *faster))
    return rows


def _ratio(dense: Sequence[float], own: Sequence[float]) -> tuple[float, float, float]:
    """How many times as fast one is as the dense one: the median over rounds, the lowest and the highest."""
    ratios = [a / b for a, b in zip(dense, own, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def _verdict(rounds: Rounds, size: int, smaller: float, left: dict[str, str]) -> str:
    """Of our network against the dense one, each in the runtime where it is fastest. Ours counts only in runtimes that
    ran both: the dense network may be as fast in another, if it only ran there."""
    dense = {runtime: own for (runtime, what), own in rounds.items() if what == DENSE}
    ours = {runtime: own for (runtime, what), own in rounds.items() if what == OURS and runtime in dense}
    if not ours:
        why = "; ".join(f"{what}: {reason}" for what, reason in left.items() if what.startswith((OURS, DENSE)))
        return (
            f"at batch {size} no runtime ran both the dense network and the file's, so nothing is said of speed: {why}"
        )
    fastest, other = (min(many, key=lambda r, many=many: statistics.median(many[r])) for many in (ours, dense))
    median, lowest, highest = _ratio(dense[other], ours[fastest])
    said = f"{median:.2f} times ({lowest:.2f} to {highest:.2f}) the dense one's speed"
    if other == fastest:
        said += f", both in {fastest}"
    else:
        same = "{:.2f} times ({:.2f} to {:.2f})".format(*_ratio(dense[fastest], ours[fastest]))
        said += f", ours in {fastest}, the dense one in {other}; {same} where both run in {fastest}"
    if median >= FASTER and lowest > 1:
        return f"at batch {size} the file's network has {said}"
    return f"at batch {size} the file is {smaller:.1f} times smaller, but its network is not faster: {said}"


def _networks(artifact: Artifact, model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """What torch runs: the dense network, and ours where something in it is made smaller."""
    own = fill(copy.deepcopy(model), artifact)
    simulate(own, {})
    before = [type(m) for m in own.modules()]
    dense = copy.deepcopy(model).eval()
    try:
        slim(as_chains(own, artifact, chains_of(own, artifact)))
    except Exception as error:  # a network that cannot be made is one line of the result
        return {DENSE: dense}, {f"{OURS} in torch": _first_line(error)}
    if [type(m) for m in own.modules()] == before:
        return {DENSE: dense}, {f"{OURS} in torch": "it runs the dense network's layers there, in as much time"}
    return {DENSE: dense, OURS: own.eval()}, {}


def _files(
    artifact: Artifact, model: nn.Module, data: Sequence[Batch], folder: Path, progress: Progress
) -> tuple[dict[str, Path], dict[str, str]]:
    """ONNX files of the dense network, ours, and the dense one by onnxruntime's own quantizer."""
    files: dict[str, Path] = {}
    left: dict[str, str] = {}

    def dense(path: Path) -> None:
        with quiet():
            path.write_bytes(graph_of(copy.deepcopy(model).eval(), doubled(data[0])).SerializeToString())

    def quantized(path: Path) -> None:
        if DENSE not in files:
            raise UsageError("it begins with the dense network as ONNX, which could not be made")
        quantize_static(files[DENSE], path, [arrays_of(model, b) for b in data])

    def ours(path: Path) -> None:
        if made_for_speed(artifact):
            export_int8(artifact, model, data, path, progress)
        else:
            export_onnx(artifact, model, data[0], path, progress)

    makers: dict[str, Callable[[Path], None]] = {DENSE: dense, OURS: ours, "quantize_static": quantized}
    for what, make in makers.items():
        path = folder / f"{what.replace(' ', '-')}.onnx"
        try:
            make(path)
        except Exception as error:  # a file that cannot be made is one line of the result
            left[f"{what} as ONNX"] = _first_line(error)
            continue
        files[what] = path
    return files, left


def _first_line(error: Exception) -> str:
    """What went wrong, and of which type it is where nothing of ours said so."""
    text = next(iter(str(error).strip().splitlines()), "")[:200]
    return text if isinstance(error, FeatherweightError) else f"{type(error).__name__}: {text}".removesuffix(": ")


def quantize_static(dense: Path, path: Path, batches: Sequence[Sequence[Any]], ranges: str = "MinMax") -> None:
    """onnxruntime's own quantizer: QDQ, a scale for every channel, uint8 activations, after its pre-processing.

    Args:
        batches: the arrays of every input, batch after batch. ranges: MinMax, Entropy or Percentile.

    Raises:
        UsageError: it fails.
    """
    from onnxruntime import quantization as own
    from onnxruntime.quantization.shape_inference import quant_pre_process

    names = [i.name for i in graph_inputs(dense)]
    feeds = iter([dict(zip(names, arrays, strict=True)) for arrays in batches])

    class Reader(own.CalibrationDataReader):
        def get_next(self) -> Any:
            return next(feeds, None)

    ready = path.with_suffix(".ready.onnx")
    try:
        with quiet():
            quant_pre_process(str(dense), str(ready))
            own.quantize_static(
                str(ready),
                str(path),
                Reader(),
                quant_format=own.QuantFormat.QDQ,
                per_channel=True,
                activation_type=own.QuantType.QUInt8,
                weight_type=own.QuantType.QInt8,
                calibrate_method=own.CalibrationMethod[ranges],
            )
    except Exception as error:  # whatever the quantizer raises
        raise UsageError(f"onnxruntime's quantizer failed: {' '.join(str(error).split())[:200]}") from error
    finally:
        ready.unlink(missing_ok=True)


def graph_inputs(path: Path) -> list[Any]:
    """The inputs of an ONNX file, without its constants."""
    import onnx

    graph = onnx.load(str(path)).graph
    constants = {t.name for t in graph.initializer}
    return [i for i in graph.input if i.name not in constants]


def _runtimes() -> dict[str, Callable[[Path], Callable[[Sequence[Any]], list[Any]]]]:
    known: dict[str, Callable[[Path], Callable[[Sequence[Any]], list[Any]]]] = {"onnxruntime": in_onnxruntime}
    return known | ({"OpenVINO": in_openvino} if importlib.util.find_spec("openvino") else {})


def _exactly(data: Sequence[Batch], model: nn.Module, size: int) -> Batch:
    """A batch of exactly so many samples."""
    joined, _ = stacked(data, model, most=max(size, max(b.size for b in data)))
    if joined.size < size:
        raise UsageError(f"the data have {joined.size} samples of one shape, a batch of {size} needs more")
    found = cut(joined, joined.size)
    if len(found) != joined.size:
        raise UsageError("these data cannot be cut into single samples")
    return stacked(found[:size], model, most=size)[0]
