"""Solve layer after layer, each on the inputs that the compressed layers before it give.

A layer of the dense network has the inputs x and gives W x. Behind compressed layers its inputs are y, and the best it
can do is the least-squares answer to the same outputs,

    W* = W + W E[(x - y) yᵀ] (E[y yᵀ] + damp I)^-1,

which is then compressed with the second moment of y: any method can, it need not know. After GPTAQ (Li et al.,
2504.02692), which puts the same correction into the rounding loop. Difference: it is taken by STRENGTH only. All of it
follows the calibration samples too closely (docs/decisions/0008).

Both networks run once, over all samples together, in step: the dense one waits in a thread of its own wherever the
compressed one is being solved.
"""

import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, final

import torch
from torch import Tensor, nn

from featherweight._linalg import damped_cholesky
from featherweight.calls import Calls, Inputs, eager
from featherweight.data import Batch
from featherweight.errors import UsageError
from featherweight.layers import Unit
from featherweight.stats import LayerStats

STRENGTH = 0.5
DAMP = 0.01  # relative to the mean diagonal
ADVICE = "its path depends on its inputs. Solve its layers independently"

Solve = Callable[[Unit, Tensor, LayerStats], Tensor]
"""(unit, the matrix to approximate, the moments of its inputs) -> the matrix that is stored, float32."""


def single_use(model: nn.Module, batch: Batch, units: Sequence[Unit]) -> tuple[Unit, ...]:
    """The units that can be solved in order, in the order of their use: those that multiply something just once in a
    pass. Embeddings choose rows and multiply nothing."""
    used: Counter[str] = Counter()

    def on_call(unit: Unit, inputs: Inputs | Tensor) -> None:
        used[unit.name] += 1 if not isinstance(inputs, Tensor) else 2

    with torch.no_grad(), eager(), Calls(model, units, on_call):
        batch.run(model)
    by_name = {u.name: u for u in units}
    return tuple(by_name[name] for name, times in used.items() if times == 1)


@torch.no_grad()
def solve_in_order(dense: nn.Module, small: nn.Module, batch: Batch, units: Sequence[Unit], solve: Solve) -> None:
    """Replace the units' weights in `small` by what `solve` makes of them, in the order of their use.

    Raises:
        UsageError: the compressed network took another path through its layers than the dense one.
    """
    original = dict(dense.named_parameters())

    def on_call(unit: Unit, inputs: Inputs | Tensor) -> None:
        assert not isinstance(inputs, Tensor)
        first = ahead.next()
        if first is None or first[0] != unit:
            there = "ended" if first is None else f"went on with {first[0].name}"
            raise UsageError(f"the compressed network used {unit.name} where the dense one {there}: {ADVICE}")
        w = unit.view.matrix(original[unit.name].detach().cpu()).double()
        target, stats = _moments(unit, w, first[1], inputs)
        ahead.resume()
        stored = unit.view.tensor(solve(unit, target, stats))
        small.get_parameter(unit.name).copy_(stored)

    with eager():  # for both threads: it is a setting of the process
        ahead = _Ahead(dense, batch, units)
        try:
            with Calls(small, units, on_call):
                batch.run(small)
            if (left := ahead.next()) is not None:
                raise UsageError(f"the compressed network ended before {left[0].name}: {ADVICE}")
        finally:
            ahead.stop()


def _moments(unit: Unit, w: Tensor, dense: Inputs, here: Inputs) -> tuple[Tensor, LayerStats]:
    """(W*, moments of the inputs here). w: (rows, cols) float64."""
    cols = unit.view.matrix_shape[1]
    parts = w.reshape(unit.groups, -1, cols)
    gram, total = torch.zeros(unit.groups, cols, cols, dtype=torch.float64), torch.zeros(unit.groups, cols).double()
    missing, samples = torch.zeros_like(parts), torch.zeros(unit.groups, dtype=torch.int64)
    for first, second in zip_longest(dense, here):
        if first is None or second is None or first[1].shape != second[1].shape:
            raise UsageError(f"{unit.name} has inputs of another shape in the compressed network: {ADVICE}")
        (block, x), (_, y) = first, second
        x, y = (t if t.dtype == torch.float64 else t.float() for t in (x, y))
        blocks = slice(block, block + y.shape[0])
        own = parts[blocks].to(y)
        gram[blocks] += (y @ y.mT).cpu().double()
        missing[blocks] += ((own @ x - own @ y) @ y.mT).cpu().double()  # x - y itself would be cols numbers a sample
        total[blocks] += y.sum(dim=2).cpu().double()
        samples[blocks] += y.shape[2]
    count = samples.clamp(min=1).double()[:, None]
    gram, missing = gram / count[:, :, None], missing / count[:, :, None]
    stats = LayerStats(gram, total / count, samples, taps=unit.taps)
    if stats.finite and stats.reached and torch.isfinite(missing).all():
        _, factor, _ = damped_cholesky(gram, DAMP)
        parts = parts + STRENGTH * torch.cholesky_solve(missing.mT, factor).mT
    return parts.reshape(w.shape), stats


class _Stopped(BaseException):
    """Ends the dense network's run early; no network's own handlers catch it."""


@final
class _Ahead:
    """The dense network in a thread, which stops at every use of a unit until it is told to go on."""

    def __init__(self, dense: nn.Module, batch: Batch, units: Sequence[Unit]) -> None:
        self._calls: queue.Queue[Any] = queue.Queue()
        self._go: queue.Queue[bool] = queue.Queue()
        self._over = self._stopped = False
        self._thread = threading.Thread(target=self._run, args=(dense, batch, units), daemon=True)
        self._thread.start()

    def _run(self, dense: nn.Module, batch: Batch, units: Sequence[Unit]) -> None:
        def on_call(unit: Unit, inputs: Inputs | Tensor) -> None:
            if not self._stopped:
                self._calls.put((unit, inputs))
            if self._stopped or not self._go.get():
                raise _Stopped

        try:
            with torch.no_grad(), Calls(dense, units, on_call):
                batch.run(dense)
            self._calls.put(None)
        except BaseException as error:  # handed to the thread that waits
            self._calls.put(error)

    def next(self) -> tuple[Unit, Inputs] | None:
        """The dense network's next use of a unit; None at its end."""
        if self._over:
            return None
        found = self._calls.get()
        self._over = not isinstance(found, tuple)
        if isinstance(found, BaseException):
            raise found
        return found

    def resume(self) -> None:
        self._go.put(True)

    def stop(self) -> None:
        self._stopped = True
        self._go.put(False)
        self._thread.join()
