"""Whether an exported file computes what the network does: ONNX is run in onnxruntime, and in OpenVINO where it is
installed."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight.data import Batch
from featherweight.errors import FormatError, UsageError
from featherweight.export.graph import INSTALL, bound, quiet

TOLERANCE = 1e-4  # of the largest output: float32 sums are taken in other orders
FAR = 0.25  # of an output's root mean square, where inputs are rounded: a last bit decides between two points, and more
MORE_BITS = "; where inputs have few bits, sums that differ in the last place can grow to this: give --activations more"

_EXACT: dict[str, Any] = {
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}  # no bf16, no int8 inputs

Runner: TypeAlias = Callable[[Sequence[Any]], list[Any]]


@final
@dataclass(frozen=True, slots=True)
class Parity:
    """One comparison. samples: of the batch. difference: the largest, relative to the largest output."""

    runtime: str
    samples: int
    difference: float


def check_installed() -> None:
    """Refuse work that ends in ONNX, before it begins, where a package for it is missing.

    Raises:
        UsageError: one is; the install line.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{INSTALL} (missing: {', '.join(missing)})")


def compared(
    path: Path, network: nn.Module, examples: Sequence[Batch], rounded: bool, openvino: bool
) -> tuple[Parity, ...]:
    """Run a file and the network on the examples. rounded: whether the network rounds inputs of layers, for which
    root mean squares are compared.

    Raises:
        UsageError: onnxruntime is missing.
        FormatError: a runtime does not run the file, or an output differs by more than TOLERANCE, or FAR.
    """
    runners = {"onnxruntime": in_onnxruntime(path)}
    if openvino and importlib.util.find_spec("openvino") is not None:
        runners["openvino"] = in_openvino(path)
    found = []
    for example in examples:
        with torch.no_grad(), quiet():
            expected = [t.detach().cpu().double().numpy() for t in tensors_in(example.run(network))]
        for runtime, run in runners.items():
            given = outputs_of(runtime, run, arrays_of(network, example))
            difference = _difference(runtime, expected, given, rounded)
            found.append(Parity(runtime, example.size, difference))
    return tuple(found)


def arrays_of(model: nn.Module, batch: Batch) -> list[Any]:
    """A batch as the inputs of the exported graph, in their order."""
    return [t.detach().cpu().numpy() for t in tensors_in(bound(model, batch)[0])]


def outputs_of(runtime: str, run: Runner, arrays: Sequence[Any]) -> list[Any]:
    """What a runtime computes.

    Raises:
        FormatError: it does not run.
    """
    try:
        with quiet():
            return run(arrays)
    except Exception as error:  # whatever a runtime raises
        what = " ".join(str(error).split())[:300]
        raise FormatError(f"{runtime} does not run the exported network: {what}") from error


def paired(runtime: str, expected: Sequence[Any], given: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Outputs of torch and of a runtime, each beside its own.

    Raises:
        FormatError: there are more or fewer, or their shapes differ.
    """
    if len(expected) != len(given):
        raise FormatError(f"in {runtime} the exported network has {len(given)} outputs, in torch {len(expected)}")
    for k, (a, b) in enumerate(zip(expected, given, strict=True)):
        if a.shape != b.shape:
            raise FormatError(f"output {k} has shape {b.shape} in {runtime} and {a.shape} in torch")
    return list(zip(expected, given, strict=True))


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a nested value, in order."""
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def away(expected: Any, found: Any) -> Any:
    """How far every entry of an array of outputs is from the expected one, relative to the largest finite of these: 0
    where both are NaN or the same infinity, infinite where only one is or they are two.

    >>> away(np.array([2.0, np.nan, -np.inf, 0.0]), np.array([1.0, np.nan, -np.inf, np.inf]))
    array([0.5, 0. , 0. , inf])
    """
    a, b = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    far = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.inf)
    with np.errstate(over="ignore"):
        far[finite] = np.abs(a[finite] - b[finite]) / max(np.abs(a[np.isfinite(a)]).max(initial=0.0), 1e-30)
    return far


def _difference(runtime: str, expected: Sequence[Any], given: Sequence[Any], rounded: bool) -> float:
    largest = 0.0
    for k, (a, b) in enumerate(paired(runtime, expected, given)):
        if a.size == 0:
            continue
        far = away(a, b)
        worst = float(far.max())
        mean = rounded and worst < np.inf
        judged, allowed = (_off(a, b), FAR) if mean else (worst, TOLERANCE)
        if judged > allowed:
            first = tuple(int(i) for i in np.argwhere(far == worst)[0])
            values = f"{float(b[first]):.7g}, in torch {float(a[first]):.7g}"
            size = "of the root mean square" if mean else "of the largest output"
            raise FormatError(
                f"the exported network computes something else in {runtime}: output {k} at {first} is {values}; "
                f"difference {judged:.2g} {size}, allowed {allowed:g}{MORE_BITS * mean}"
            )
        largest = max(largest, worst)
    return largest


def _off(expected: Any, found: Any) -> float:
    """Root mean square of the difference, relative to that of what is expected."""
    whole, off = squares(expected, found)
    return float(np.sqrt(off / max(whole, 1e-300)))


def squares(expected: Any, found: Any) -> tuple[float, float]:
    """The sum of the squares of what is expected, and of the difference, over finite entries. Entries that are NaN or
    infinite in one, and not the same in the other, make the second infinite."""
    a, b = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    same = finite | (a == b) | (np.isnan(a) & np.isnan(b))
    off = float(np.square(a[finite] - b[finite]).sum()) if same.all() else np.inf
    return float(np.square(a[finite]).sum()), off


def in_onnxruntime(path: Path) -> Runner:
    """Runs a file with onnxruntime and its own settings, on as many threads as torch has."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(f"{INSTALL} ({error})") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # whatever onnxruntime raises
        raise FormatError(
            f"onnxruntime does not load the exported network: {' '.join(str(error).split())[:300]}"
        ) from error
    names = [i.name for i in session.get_inputs()]
    return lambda arrays: list(session.run(None, dict(zip(names, arrays, strict=True))))


def in_openvino(path: Path) -> Runner:
    """Runs a file with OpenVINO as its operators say, on as many threads as torch has: by default it computes in bf16
    where the processor can, and rounds inputs of layers whose weights have few bits."""
    import openvino  # pyright: ignore[reportMissingImports] - optional

    try:
        core = openvino.Core()
        threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = core.compile_model(core.read_model(str(path)), "CPU", _EXACT | threads)
    except Exception as error:  # whatever OpenVINO raises
        raise FormatError(
            f"OpenVINO does not load the exported network: {' '.join(str(error).split())[:300]}"
        ) from error
    return lambda arrays: list(compiled(list(arrays)).values())
