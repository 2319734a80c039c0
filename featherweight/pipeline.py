"""The straight line: scan, capture, solve, assemble, repair, pack. `compress` is that line, written out."""

import copy
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from featherweight.activations import ActivationGrid, FloatInput, calibrate, simulate, simulated, stays_float
from featherweight.artifact import Artifact, FoldedNorm, StoredUnit, fill, write
from featherweight.artifact.read import from_bytes
from featherweight.artifact.schema import is_foldable
from featherweight.artifact.write import to_bytes
from featherweight.data import Batch, batches, check
from featherweight.database import Database
from featherweight.errors import FeatherweightError, InfeasibleError, UsageError
from featherweight.layers import LeftAlone, Scan, Unit, scan
from featherweight.methods import GridSpec, Magnitude, Method, Obq, Rtn, Solution
from featherweight.recipe import Recipe, assign, input_bits
from featherweight.repair import Repair, repair
from featherweight.report import Report, rows_of
from featherweight.solve import Order, Progress, Work, assembled, order, solved
from featherweight.stats import LayerStats, capture
from featherweight.target import Baselines, baselines, target_bytes
from featherweight.weights.base import float_type

SPILL = 2 << 30  # statistics over this many bytes are kept in files instead of memory
RATE = 4e9  # multiply-adds a second that the time estimate assumes


def _quiet(stage: str, done: int, total: int) -> None:
    pass


@final
@dataclass(frozen=True, slots=True)
class PlanRow:
    """What would be done with one weight. bytes: its payload, exact unless its scales need fp32 or
    its pattern has short blocks. seconds: a guess.
    input_bits: what its inputs would be rounded to, None for float."""

    name: str
    shape: tuple[int, ...]
    kind: str
    method: str
    params: int
    bytes: int
    seconds: float
    input_bits: int | None = None


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """A dry run. file_bytes and seconds are predictions; capture_seconds is 0 where no data were given. float_inputs:
    where inputs would be rounded, those that would not, told from the kind of layer alone."""

    rows: tuple[PlanRow, ...]
    left_alone: tuple[LeftAlone, ...]
    baselines: Baselines
    file_bytes: int
    capture_seconds: float
    seconds: float
    float_inputs: tuple[FloatInput, ...] = ()


@final
@dataclass(frozen=True, slots=True, eq=False)
class Compressed:
    """A compressed network in memory."""

    artifact: Artifact
    report: Report

    def save(self, path: str | Path) -> int:
        """Write the file, whole or not at all. Returns its size in bytes."""
        return write(self.artifact, Path(path))


def compress(
    model: nn.Module,
    data: Any = None,
    *,
    method: Method | None = None,
    recipe: Recipe | None = None,
    target: str | int | None = None,
    evaluate: Callable[[nn.Module], float | dict[str, float]] | None = None,
    batch_size: int = 128,
    about: dict[str, Any] | None = None,
    database: str | Path | None = None,
    progress: Progress = _quiet,
) -> Compressed:
    """Compress a trained network. The network itself is not changed.

    Args:
        data: calibration inputs (see `featherweight.data.batches`); about 1,000 samples work well. Labels are not used.
            None is possible for methods that need no data.
        method: for every weight; OBQ at 4 bits where nothing is said.
        recipe: methods by pattern, what to leave out, and whether to correct statistics.
        target: size of the file (`"100kB"`, `"10x"`, `"12%"`), met with the most bits, the same for every weight, that
            fit; takes the place of the recipe's method.
        evaluate: measures the dense network and the network read back; a number, or several by name.
        about: extra JSON for people, kept in the file.
        database: a folder where solved layers are kept and found again (docs/database.md); nothing is kept without.

    Raises:
        UsageError: something does not fit together; nothing expensive was done yet.
        InfeasibleError: the target is below the smallest reachable size, which the message names.
    """
    if method is not None and (recipe is not None or target is not None):
        raise UsageError("a recipe or a target chooses the methods itself; give no method beside it")
    store = None if database is None else Database.at(database)
    net = _copy(model)
    found, recipe, methods = settle(net, recipe or Recipe(method or Obq(GridSpec(4))), target)
    base = baselines(net, found.units)
    wanted = input_bits(recipe, found)
    predicted = predicted_bytes(net, found, methods, wanted)
    original = _tensors(net)
    samples = _samples(net, data, methods, batch_size, wanted)
    before = _metrics(evaluate, copy.deepcopy(net))
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
        with _timed(seconds, "capture"):
            then = order(net, samples, found.units, methods) if recipe.sequential else Order()
            stats = _captured(
                net, samples, tuple(u for u in found.units if u not in then.units), Path(folder), progress
            )
            grids, float_inputs = calibrate(net, samples, found.units, wanted)
            net.load_state_dict(original, strict=False)  # a network may count its calls in a buffer
        while True:
            with _timed(seconds, "solve"):
                work = Work(methods, store, progress, len(found.units))
                solutions = solved(work, net, found.units, stats, then, grids)
                net.load_state_dict(original, strict=False)
            with _timed(seconds, "repair"):
                judged = samples if recipe.repair else []
                small, outcome = _repaired(net, found, solutions, grids, judged, progress)
                net.load_state_dict(original, strict=False)
            facts = {"fp32_bytes": base.fp32, "half_bytes": base.half, "int8_bytes": base.int8}
            artifact, rest = packed(small, found, methods, solutions, (about or {}) | facts, grids)
            data_read_back = to_bytes(artifact)
            size = len(data_read_back)
            if target is None or size <= target_bytes(target, base.fp32):
                break  # else: notes or fp32 scales came on top of the prediction; once more, with fewer bits
            _, recipe, methods = settle(net, recipe, target_bytes(target, base.fp32) - (size - predicted))
            predicted = predicted_bytes(net, found, methods, wanted)
    after = _metrics(evaluate, fill(small, from_bytes(data_read_back)))
    damping = {name: s.info["damp"] for name, s in solutions.items() if "damp" in s.info}
    report = Report(
        rows_of(artifact),
        found.left_alone,
        base,
        size,
        outcome,
        rest,
        damping,
        seconds,
        before,
        after,
        reused=None if store is None else work.reused,
        in_order=len(then.units),
        order_note=then.note,
        float_inputs=float_inputs,
    )
    return Compressed(artifact, report)


def plan(
    model: nn.Module,
    data: Any = None,
    *,
    recipe: Recipe | None = None,
    target: str | int | None = None,
    batch_size: int = 128,
) -> Plan:
    """What `compress` would do: method, bytes and time of every weight, and what it would leave alone, with reasons.

    At most one batch of the data is run. Raises what `compress` raises before its first expensive step.
    """
    net = _copy(model)
    found, recipe, methods = settle(net, recipe or Recipe(Obq(GridSpec(4))), target)
    wanted = input_bits(recipe, found)
    size = predicted_bytes(net, found, methods, wanted)
    samples = _samples(net, data, methods, batch_size, wanted)
    capturing = 0.0
    if samples:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
            _captured(net, samples[:1], found.units, Path(folder), _quiet)
        capturing = (time.perf_counter() - start) * sum(b.size for b in samples) / max(samples[0].size, 1)
    rows = []
    for unit in found.units:
        shape, method = unit.view.matrix_shape, methods[unit.name]
        seconds = method.work(shape, unit.groups) / RATE
        stored = method.storage(shape, unit.taps, unit.groups)
        bits = None if stays_float(unit, wanted) else wanted[unit.name]
        rows.append(PlanRow(unit.name, unit.view.shape, unit.kind, method.label, unit.params, stored, seconds, bits))
    total = capturing + sum(r.seconds for r in rows)
    left = tuple(FloatInput(u.name, reason) for u in found.units if wanted and (reason := stays_float(u, wanted)))
    return Plan(tuple(rows), found.left_alone, baselines(net, found.units), size, capturing, total, left)


def settle(net: nn.Module, recipe: Recipe, target: str | int | None) -> tuple[Scan, Recipe, dict[str, Method]]:
    """What is compressed and how. With a target, the recipe's method is the most bits, the same for every weight, whose
    predicted file fits.

    Raises:
        UsageError: a pattern matches nothing, or the target is no size.
        InfeasibleError: one bit is too much.
    """
    found = scan(net, recipe.include, recipe.exclude)
    if target is None:
        return found, recipe, assign(recipe, found)
    limit, size = target_bytes(target, baselines(net, found.units).fp32), 0
    for bits in range(8, 0, -1):
        chosen = replace(recipe, method=Obq(GridSpec(bits, symmetric=bits == 8)))
        methods = assign(chosen, found)
        size = predicted_bytes(net, found, methods, input_bits(chosen, found))
        if size <= limit:
            return found, chosen, methods
    raise InfeasibleError(f"the target {target} is {limit:,} bytes; the smallest reachable file has {size:,} bytes")


def _copy(model: nn.Module) -> nn.Module:
    if simulated(model):
        raise UsageError("this network rounds inputs, as its file says; first call featherweight.simulate(model, {})")
    try:
        return copy.deepcopy(model).eval().requires_grad_(False)
    except Exception as error:  # the user's module may raise anything
        raise UsageError(f"the network cannot be copied ({type(error).__name__}: {error})") from error


def _samples(
    net: nn.Module, data: Any, methods: dict[str, Method], batch_size: int, wanted: dict[str, int]
) -> list[Batch]:
    if data is None:
        if wanted:
            raise UsageError("rounding activations needs calibration data, to find their ranges")
        needing = sorted({m.label for m in methods.values() if not isinstance(m, Rtn | Magnitude)})
        if needing:
            raise UsageError(f"{needing[0]} needs calibration data; give some, or use rtn or magnitude")
        return []
    samples = batches(data, batch_size)
    check(net, samples[0])
    return samples


def _captured(
    net: nn.Module, samples: list[Batch], units: tuple[Unit, ...], folder: Path, progress: Progress
) -> dict[str, LayerStats]:
    if not samples:
        return {u.name: LayerStats.white(u.view.matrix_shape[1], u.groups, u.taps) for u in units}
    size = sum(8 * u.groups * u.view.matrix_shape[1] ** 2 for u in units)
    done = 0
    progress("capture", 0, len(samples))

    def on_batch() -> None:
        nonlocal done
        done += 1
        progress("capture", done, len(samples))

    return capture(net, samples, units, spill=folder if size > SPILL else None, on_batch=on_batch)


def _repaired(
    net: nn.Module,
    found: Scan,
    solutions: dict[str, Solution],
    grids: dict[str, ActivationGrid],
    samples: list[Batch],
    progress: Progress,
) -> tuple[nn.Module, Repair]:
    """The assembled network with its inputs rounded, corrected where there are samples, its other buffers as they
    were."""
    small = assembled(net, found.units, solutions)
    simulate(small, grids)
    if not samples:
        return small, Repair("none", False, None, None, 0, 0, "switched off or no data")
    norms = {n for n, m in small.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    before = {n: t for n, t in _tensors(small).items() if n.rpartition(".")[0] not in norms}
    buffers = {n: before[n] for n, _ in small.named_buffers() if n in before}
    progress("repair", 0, 1)
    outcome = repair(net, small, samples, found.units)
    small.load_state_dict(buffers, strict=False)
    progress("repair", 1, 1)
    return small, outcome


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and persistent buffer."""
    return {n: t.clone() for n, t in net.state_dict().items() if isinstance(t, Tensor)}


@torch.no_grad()
def packed(
    small: nn.Module,
    found: Scan,
    methods: dict[str, Method],
    solutions: dict[str, Solution],
    about: dict[str, Any],
    grids: dict[str, ActivationGrid],
) -> tuple[Artifact, dict[str, float]]:
    """The artifact of an assembled network, and how its other tensors are stored: numbers in fp16, fp32 and other
    types, and the largest relative error that fp16 made."""
    units = tuple(
        StoredUnit(
            u.names,
            u.view,
            solutions[u.name].weight,
            methods[u.name].label,
            solutions[u.name].relative_error,
            solutions[u.name].note,
            grids.get(u.name),
        )
        for u in found.units
    )
    rest, norms = {}, []
    taken: set[str] = {n for u in found.units for n in u.names}
    facts = {"fp16": 0, "fp32": 0, "other": 0, "fp16_error": 0.0}

    def stored(*tensors: Tensor) -> list[Tensor]:
        dtype = torch.float16 if all(float_type(t) == torch.float16 for t in tensors) else torch.float32
        if any((torch.isfinite(t) & ~torch.isfinite(t.float())).any() for t in tensors):
            dtype = torch.float64  # beyond the range of fp32
        facts[{torch.float16: "fp16", torch.float32: "fp32"}.get(dtype, "other")] += sum(t.numel() for t in tensors)
        for t in tensors:
            if dtype == torch.float16 and t.numel() and (top := float(t.double().abs().max())) > 0:
                facts["fp16_error"] = max(
                    facts["fp16_error"], float((t.half().double() - t.double()).abs().max()) / top
                )
        return [t.detach().cpu().to(dtype) for t in tensors]

    for name, module in _foldable(small):
        scale, shift = stored(*_folded(module))
        norms.append(FoldedNorm(name, scale, shift, float(module.eps)))
        taken |= {f"{name}.{t}" for t in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    seen: set[int] = set()
    for name, tensor in small.state_dict(keep_vars=True).items():
        if name in taken or name.endswith(".num_batches_tracked") or id(tensor) in seen:
            continue
        if not isinstance(tensor, Tensor):
            raise UsageError(
                f"the network's state has '{name}' of type {type(tensor).__name__}; only tensors can be kept"
            )
        seen.add(id(tensor))
        if tensor.is_floating_point():
            rest[name] = stored(tensor)[0]
        else:
            rest[name] = tensor.detach().cpu().contiguous()
            facts["other"] += tensor.numel()
    return Artifact(units, rest, tuple(norms), about), facts


def _foldable(small: nn.Module) -> list[tuple[str, Any]]:
    """BatchNorms whose tensors belong to nobody else, by their only name."""
    names: dict[int, list[str]] = {}
    uses: dict[int, int] = {}
    for name, module in small.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for tensor in small.state_dict(keep_vars=True).values():
        uses[id(tensor)] = uses.get(id(tensor), 0) + 1
    return [
        (name, module)
        for name, module in small.named_modules()
        if is_foldable(module)
        and len(names[id(module)]) == 1
        and all(uses.get(id(t)) == 1 for t in (module.weight, module.bias, module.running_mean, module.running_var))
    ]


def _folded(module: Any) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a BatchNorm in eval mode, float64."""
    scale = module.weight.double() / torch.sqrt(module.running_var.double() + module.eps)
    return scale, module.bias.double() - module.running_mean.double() * scale


def predicted_bytes(net: nn.Module, found: Scan, methods: dict[str, Method], wanted: dict[str, int]) -> int:
    """Size of the whole file before anything is solved: the payload exactly where scales and other tensors fit fp16,
    the header within a few bytes a weight."""
    artifact, _ = packed(net, replace(found, units=()), {}, {}, {}, {})
    names = {n for u in found.units for n in u.names}
    rest = {n: t for n, t in artifact.rest.items() if n not in names}
    other = len(to_bytes(replace(artifact, rest=rest)))
    payload = sum(methods[u.name].storage(u.view.matrix_shape, u.taps, u.groups) for u in found.units)
    header = sum(150 + sum(len(n) + 4 for n in u.names) + 5 * len(u.view.shape) for u in found.units)
    labels = sum(len(label) + 5 for label in {m.label for m in methods.values()})
    header += 75 * sum(bits > 0 for bits in wanted.values())
    return other + payload + header + labels + 200


def _metrics(evaluate: Callable[[nn.Module], float | dict[str, float]] | None, model: nn.Module) -> dict[str, float]:
    if evaluate is None:
        return {}
    try:
        with torch.no_grad():
            value = evaluate(model)
    except FeatherweightError:
        raise
    except Exception as error:  # the user's metric may raise anything
        raise UsageError(f"the metric failed: {type(error).__name__}: {error}") from error
    named = value if isinstance(value, dict) else {"metric": value}
    return {str(name): float(number) for name, number in named.items()}


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Any:
    start = time.perf_counter()
    yield
    seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - start, 2)
