"""Whether an ONNX model computes what torch does."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.data import Batch, cut
from featherweight.errors import UsageError
from featherweight.repair.distance import outputs

NEAR = 1e-3  # of the largest output: sums of float32 in another order
SAMPLES = 8


@final
@dataclass(frozen=True, slots=True)
class Parity:
    """onnxruntime, openvino: the largest difference of an output from torch's, relative to the largest output; None
    where that runtime did not run it, and then why."""

    onnxruntime: float
    openvino: float | None = None
    openvino_note: str = "not installed"


@torch.no_grad()
def compared(path: Path, net: nn.Module, example: Batch) -> Parity:
    """Run the model at `path` and the network on a few samples, all at once and one alone.

    Raises:
        UsageError: the runtime refuses the model, or an output differs by more than NEAR.
    """
    pieces = cut(example, max(-(-example.size // SAMPLES), 1))
    tried = [pieces[0]]
    if (single := cut(pieces[0], pieces[0].size)) and len(single) > 1:
        tried.append(single[0])
    worst, _ = _in_onnxruntime(path, net, tried)
    if importlib.util.find_spec("openvino") is None:
        return Parity(worst)
    return Parity(worst, *_in_openvino(path, net, tried))


def _in_onnxruntime(path: Path, net: nn.Module, tried: list[Batch]) -> tuple[float, str]:
    session = session_of(path)
    names = [i.name for i in session.get_inputs()]

    def run(values: list[np.ndarray]) -> list[np.ndarray]:
        return list(session.run(None, dict(zip(names, values, strict=False))))  # pyright: ignore

    return max(_difference(net, batch, run, "onnxruntime") for batch in tried), ""


def session_of(path: Path, threads: int | None = None) -> Any:
    """An onnxruntime session on the CPU.

    Raises:
        UsageError: it refuses the model.
    """
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    if threads is not None:
        settings.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class
        raise UsageError(f"onnxruntime {ort.__version__} refuses the model: {str(error)[:300]}") from error


def _in_openvino(path: Path, net: nn.Module, tried: list[Batch]) -> tuple[float | None, str]:
    import openvino  # pyright: ignore[reportMissingImports]

    try:
        config = {"INFERENCE_PRECISION_HINT": "f32"}  # without, some processors compute in bf16
        compiled = openvino.Core().compile_model(str(path), "CPU", config)
    except Exception as error:  # it reads no integers of 2 bits, for one
        line = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        return None, f"does not read it: {line[:160]}"
    return max(_difference(net, b, lambda v: list(compiled(v).values()), "OpenVINO") for b in tried), ""


def _difference(net: nn.Module, batch: Batch, run: Any, runtime: str) -> float:
    want = list(outputs(batch.run(net)))
    got = run([_array(v) for v in _leaves((*batch.args, *batch.kwargs.values()))])
    if len(got) < len(want):
        raise UsageError(f"{runtime} gives {len(got)} outputs, torch {len(want)}")
    worst = 0.0
    for k, (a, b) in enumerate(zip(want, got, strict=False)):
        expected = a.detach().cpu().numpy()
        if expected.shape != b.shape:
            raise UsageError(f"output {k} has shape {b.shape} in {runtime}, {expected.shape} in torch")
        scale = float(np.abs(expected).max(initial=1e-30))
        apart = float(np.abs(expected - b).max(initial=0)) / scale
        if not apart <= NEAR:
            at = np.unravel_index(int(np.abs(expected - b).argmax()), expected.shape)
            place = tuple(int(i) for i in at)
            message = f"{runtime} computes {b[at]:.6g} where torch computes {expected[at]:.6g} (output {k}, {place})"
            raise UsageError(f"{message}: the model would not be the same network; nothing was written")
        worst = max(worst, apart)
    return worst


def _leaves(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found.extend(_leaves(value))
        elif isinstance(value, dict):
            found.extend(_leaves(value.values()))
    return found


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()
