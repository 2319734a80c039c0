"""Whether an int8 graph computes about what the network does: all its outputs, in onnxruntime and in torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import nn

from featherweight.data import Batch
from featherweight.errors import FormatError
from featherweight.export.graph import quiet
from featherweight.export.parity import FAR, Runner, arrays_of, outputs_of, paired, squares, tensors_in

_NOTHING = np.array([1e-300, 1e-300, 0.0])  # by which one can divide


@final
@dataclass(frozen=True, slots=True)
class Alike:
    """difference: of the worst output. same: share of the samples whose largest entry is the same one, in the first
    output of floats with two or more dimensions; None where there is none. sizes: every output's root mean square."""

    difference: float
    same: float | None
    sizes: tuple[float, ...]


def alike(run: Runner, network: nn.Module, data: Sequence[Batch]) -> Alike:
    """Compare all outputs on all batches.

    Raises:
        FormatError: some output is more than rounding away, or there are other outputs.
    """
    totals: dict[int, Any] = {}  # of every output: entries, squares, what is off
    whole: set[int] = set()  # outputs that are no floats
    same, rows, scored = 0, 0, None
    for batch in data:
        for k, (expected, given) in enumerate(_outputs(run, network, batch)):
            totals[k] = totals.get(k, _NOTHING) + np.array([expected.size, *_sums(expected, given)])
            whole |= set() if expected.dtype.kind == "f" else {k}
            if scored in (None, k) and expected.dtype.kind == "f" and expected.ndim >= 2 and expected.size:
                scored = k
                a, b = (x.reshape(len(x), -1).argmax(1) for x in (expected, given))
                same, rows = same + int((a == b).sum()), rows + len(a)
    found = [off / squares if k in whole else np.sqrt(off / squares) for k, (_, squares, off) in totals.items()]
    for k, far in enumerate(found):
        _check(k, float(far), k in whole)
    sizes = tuple(float(np.sqrt(squares / count)) for count, squares, _ in totals.values())
    return Alike(float(max(found, default=0.0)), same / rows if rows else None, sizes)


def alike_alone(run: Runner, network: nn.Module, sample: Batch, sizes: Sequence[float]) -> None:
    """Compare the outputs for a batch of one. sizes: of the outputs, by which the difference is judged where this
    sample's are smaller; a whole number of one sample may differ.

    Raises:
        FormatError: some output is more than rounding away, or has another shape.
    """
    for k, (expected, given) in enumerate(_outputs(run, network, sample)):
        squares, off = _sums(expected, given)
        if expected.dtype.kind == "f":
            _check(k, float(np.sqrt(off / max(squares, expected.size * sizes[k] ** 2, 1e-300))))


def _outputs(run: Runner, network: nn.Module, batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    """Every output in torch and in onnxruntime, float64 where it is of floats."""
    with torch.no_grad(), quiet():
        tensors = [t.detach().cpu() for t in tensors_in(batch.run(network))]
    expected = [(t.double() if t.is_floating_point() else t).numpy() for t in tensors]
    return paired("onnxruntime", expected, outputs_of("onnxruntime", run, arrays_of(network, batch)))


def _sums(expected: np.ndarray, given: np.ndarray) -> tuple[float, float]:
    """Squares of an output, and of how far it is off; of whole numbers 1 for each, and for each that is another one."""
    if expected.dtype.kind != "f":
        return float(expected.size), float((expected != given).sum())
    return squares(expected, given)


def _check(k: int, far: float, whole: bool = False) -> None:
    if not np.isfinite(far):
        what = f"entries of output {k} are not finite in one of them"
        raise FormatError(f"the int8 network computes something else than the network in torch: {what}")
    if far > FAR:
        what = f"{far:.0%} of output {k} differ" if whole else f"output {k} is {far:.2f} of its root mean square away"
        what = f"{what}, allowed {FAR:.0%}" if whole else f"{what}, allowed {FAR:g}"
        raise FormatError(f"the int8 network computes something else than the network in torch: {what}")
