"""A dry run of the line: `plan`."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import nn

from featherweight.activations import FloatInput, calibrate, plain_copy, stays_float
from featherweight.allocate import SECONDS, allocate
from featherweight.allocator import Allocation
from featherweight.data import split
from featherweight.database import Database
from featherweight.layers import LeftAlone
from featherweight.methods import GridSpec, Obq, Plain
from featherweight.moments import basis_of, captured
from featherweight.packing import predicted_bytes
from featherweight.recipe import Recipe, input_bits, settled
from featherweight.settle import goal_of, remembered, setting_of, settle
from featherweight.solve import Progress
from featherweight.synthesis import Assumed, assume, samples_of
from featherweight.target import Baselines, Goal, baselines

RATE = 4e9  # multiply-adds a second that the time estimate assumes


def _quiet(stage: str, done: int, total: int) -> None:
    pass


@final
@dataclass(frozen=True, slots=True)
class PlanRow:
    """What would be done with one weight. bytes: its payload, exact unless its scales need fp32 or
    its pattern has short blocks. seconds: a guess. input_bits: what its inputs would be rounded to, None for float.
    rise: what a target's score predicts that it adds to the distance to the dense outputs, None without a target.
    note: why it is not done as asked."""

    name: str
    shape: tuple[int, ...]
    kind: str
    method: str
    params: int
    bytes: int
    seconds: float
    input_bits: int | None = None
    rise: float | None = None
    note: str = ""


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """A dry run. file_bytes and seconds are predictions; capture_seconds is 0 where no data were given. float_inputs:
    where inputs would be rounded, those that would not, told from the kind of layer alone. search_seconds, allocation:
    of a target. assumed: as in `Report`."""

    rows: tuple[PlanRow, ...]
    left_alone: tuple[LeftAlone, ...]
    baselines: Baselines
    file_bytes: int
    capture_seconds: float
    seconds: float
    float_inputs: tuple[FloatInput, ...] = ()
    search_seconds: float = 0.0
    allocation: Allocation | None = None
    assumed: Assumed | None = None


def plan(
    model: nn.Module,
    data: Any = None,
    *,
    input_shape: Sequence[int] | None = None,
    recipe: Recipe | None = None,
    target: str | int | Goal | None = None,
    batch_size: int = 128,
    database: str | Path | None = None,
    progress: Progress = _quiet,
) -> Plan:
    """What `compress` would do: method, bytes and time of every weight, and what it would leave alone, with reasons.

    At most one batch of the data is run, unless there is a target: then candidates are solved and scored for every
    weight, and no policy is measured. Raises what `compress` raises before its first expensive step.
    """
    net, goal = plain_copy(model), goal_of(target)
    recipe = recipe or Recipe(Obq(GridSpec(4)))
    assumed = assume(net, data, recipe, goal is not None, input_shape)
    found, methods = settle(net, recipe, goal, assumed is None or assumed.kind == "synthetic")
    base, wanted = baselines(net, found.units), input_bits(recipe, found)
    size = predicted_bytes(net, found, methods, wanted)
    samples, assumed = samples_of(net, data, batch_size, assumed, progress, making=goal is not None)
    capturing, searching, allocation = 0.0, 0.0, None
    with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
        seen = samples[:1] if goal is None else split(samples)[0] or samples
        start = time.perf_counter()
        store = None if database is None else Database.at(database)
        basis = None if goal is None else basis_of(net, samples, store)
        stats = captured(net, seen, found.units, Path(folder), progress, store, basis)
        each = (time.perf_counter() - start) / max(sum(b.size for b in seen), 1)
        capturing = each * sum(b.size for b in samples)
        if goal is not None:
            about = remembered(net, found, base, goal)
            grids, _ = calibrate(net, samples, found.units, wanted)
            setting = setting_of(net, found, recipe, samples, stats, grids, base, about, Path(folder), store, basis)
            stage = allocate(setting, goal, progress, measuring=False)
            searching = time.perf_counter() - start - capturing + SECONDS * bool(samples)
            methods = {u.name: settled(stage.methods[u.name], u) for u in found.units}
            allocation, size = stage.outcome, stage.bytes
    rises = {c.name: c.rise for c in allocation.chosen} if allocation else {}
    rows = []
    for unit in found.units:
        shape, method = unit.view.matrix_shape, methods[unit.name]
        seconds = method.work(shape, unit.groups) / RATE
        stored = method.storage(shape, unit.taps, unit.groups)
        bits = None if stays_float(unit, wanted) else wanted[unit.name]
        known = unit.name, unit.view.shape, unit.kind, method.label, unit.params, stored, seconds, bits
        rows.append(PlanRow(*known, rises.get(unit.name), method.why if isinstance(method, Plain) else ""))
    total = capturing + searching + sum(r.seconds for r in rows)
    left = tuple(FloatInput(u.name, reason) for u in found.units if wanted and (reason := stays_float(u, wanted)))
    return Plan(tuple(rows), found.left_alone, base, size, capturing, total, left, searching, allocation, assumed)
