"""The straight line: scan, capture, allocate, solve, assemble, repair, pack. `compress` is that line, written out."""

import copy
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn

from featherweight.activations import ActivationGrid, plain_copy, simulate
from featherweight.allocate import Stage, allocate
from featherweight.allocator import NAMES
from featherweight.artifact import Artifact, fill, write
from featherweight.artifact.read import from_bytes
from featherweight.artifact.write import to_bytes
from featherweight.chains import chains_of
from featherweight.data import Batch, split
from featherweight.database import Database
from featherweight.errors import InfeasibleError, UsageError
from featherweight.finetune import Finetune, rehearse, train
from featherweight.inputs import look_at, tensors_of
from featherweight.layers import Scan
from featherweight.methods import GridSpec, Method, Obq, Solution
from featherweight.methods.base import usable
from featherweight.metrics import measured
from featherweight.packing import packed, shortest
from featherweight.pull import AdmmTraining, Pulled
from featherweight.pull import admm as train_in
from featherweight.recipe import Recipe, input_bits, settled
from featherweight.repair import Repair, repair
from featherweight.repair.distance import DenseOutputs
from featherweight.report import Report, rows_of, with_runs
from featherweight.settle import goal_of, remembered, setting_of, settle
from featherweight.sharing import fitted
from featherweight.solve import Order, Progress, Work, assembled, order, solved
from featherweight.stats import LayerStats
from featherweight.synthesis import assume, samples_of
from featherweight.target import Goal, baselines
from featherweight.weights import Weight, united

TURNS = 6  # times that chosen methods are solved, where the result misses its target


def _quiet(stage: str, done: int, total: int) -> None:
    pass


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
    input_shape: Sequence[int] | None = None,
    method: Method | None = None,
    recipe: Recipe | None = None,
    target: str | int | Goal | None = None,
    evaluate: Callable[[nn.Module], float | dict[str, float]] | None = None,
    batch_size: int = 128,
    about: dict[str, Any] | None = None,
    database: str | Path | None = None,
    admm: AdmmTraining | None = None,
    finetune: Finetune | None = None,
    progress: Progress = _quiet,
) -> Compressed:
    """Compress a trained network. The network itself is not changed.

    Args:
        data: calibration inputs (see `featherweight.data.batches`); about 1,000 samples work well. Labels are not used,
            unless a goal's score asks for them. None: what looks at inputs gets made-up ones where the network has
            BatchNorm, and elsewhere the weights alone decide; the report says what was assumed.
        input_shape: of one input, without data, such as (3, 32, 32); found by trying where it is not given.
        method: for every weight; OBQ at 4 bits where nothing is said.
        recipe: methods by pattern, what to leave out, and whether to correct statistics.
        target: size of the file (`"100kB"`, `"10x"`, `"12%"`), or a `Goal`: every weight gets the method and the ratio
            with which the whole network comes closest to the dense one. Takes the place of the recipe's method; its
            overrides hold.
        evaluate: measures the dense network and the network read back; a number, or several by name.
        about: extra JSON for people, kept in the file.
        database: a folder where solved layers are kept and found again (docs/database.md); nothing is kept without.
        admm: train the dense network until its weights nearly have the forms that they will be given; what follows is
            done with the network that comes of it.
        finetune: train scales, norms, biases and the like at the end, towards the network given; codes and masks stay.

    Raises:
        UsageError: something does not fit together; nothing expensive was done yet.
        InfeasibleError: the target is below the smallest reachable size, which the message names.
    """
    if method is not None and (recipe is not None or target is not None):
        raise UsageError("a recipe or a target chooses the methods itself; give no method beside it")
    store = None if database is None else Database.at(database)
    net, goal = plain_copy(model), goal_of(target)
    recipe = recipe or Recipe(method or Obq(GridSpec(4)))
    assumed = assume(net, data, recipe, goal is not None, input_shape)
    found, methods = settle(net, recipe, goal, assumed is None or assumed.kind == "synthetic")
    base, wanted = baselines(net, found.units), input_bits(recipe, found)
    if finetune is not None and wanted:
        raise UsageError("finetuning through rounded inputs does not work yet; leave out one of the two")
    original = tensors_of(net)
    seconds: dict[str, float] = {}
    with _timed(seconds, "synthesize") if assumed else nullcontext():
        samples, assumed = samples_of(net, data, batch_size, assumed, progress)
    if admm is not None:
        given, admm = admm.data, rehearse(net, replace(admm, data=samples) if admm.data is data else admm)
        finetune = finetune and (replace(finetune, data=admm.data) if finetune.data is given else finetune)
    if finetune is not None:
        finetune = rehearse(net, replace(finetune, data=samples) if finetune.data is data else finetune)
    net.load_state_dict(original, strict=False)
    before, dense = measured(evaluate, copy.deepcopy(net)), net
    about = remembered(net, found, base, goal) | (about or {})
    trained, stage, pulled = None, None, None
    with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
        if goal is None:
            net, pulled = _trained_in(net, methods, admm, seconds, progress)
        known = found, methods, recipe, goal, samples, wanted, store
        with _timed(seconds, "capture"):
            look = look_at(net, *known, Path(folder), progress)
        if goal is not None:
            with _timed(seconds, "allocate"):
                meter = None if evaluate is None else lambda network: measured(evaluate, network)
                own = look.stats, look.grids, base, about, Path(folder), store, look.basis, meter
                stage = allocate(setting_of(net, found, recipe, samples, *own), goal, progress)
                net.load_state_dict(original, strict=False)
            chosen = {u.name: settled(stage.methods[u.name], u) for u in found.units}
            net, pulled = _trained_in(net, chosen, admm, seconds, progress)
            if admm is not None:
                with _timed(seconds, "capture"):
                    look = look_at(net, *known, Path(folder), progress)
        original, stats, grids, then = tensors_of(net), look.stats, look.grids, look.then
        turns = 0
        while True:
            turns += 1
            if stage is not None:
                methods = {u.name: settled(stage.methods[u.name], u) for u in found.units}
                then = order(net, samples, found.units, methods) if recipe.sequential is not False else Order()
            with _timed(seconds, "books"):
                methods = {n: m[0] for n, m in fitted(net, found.units, stats, _each(methods), store, progress).items()}
            with _timed(seconds, "solve"):
                work = Work(methods, store, progress, len(found.units), blind=not samples)
                apart = {u.name: stats[u.name] for u in found.units if u not in then.units}
                solutions = solved(work, net, found.units, apart, then, grids)
                solutions = solutions if stage is None else stage.allocator.trimmed(solutions)
                net.load_state_dict(original, strict=False)
            with _timed(seconds, "repair"):
                judged = samples if recipe.repair else []
                small, outcome = _repaired(net, found, solutions, grids, judged, progress)
                net.load_state_dict(original, strict=False)
            stage = None if stage is None else stage.recounted(solutions, small)
            if stage is not None and (over := stage.over()):
                stage = _again(stage, over, turns)  # time varied, or channels are read that were not to be
                continue
            if finetune is not None:
                with _timed(seconds, "finetune"):
                    weights = united({name: s.weight for name, s in solutions.items()})
                    weights, trained = train(dense, small, found.units, weights, finetune, progress)
                    finetune = replace(finetune, checkpoint=None)  # it is of the first turn
                    for u in found.units:
                        w = u.view.matrix(net.get_parameter(u.name).detach().cpu())
                        solutions[u.name] = _finetuned(solutions[u.name], weights[u.name], w, stats.get(u.name))
            artifact, rest = packed(small, found, methods, solutions, about, grids)
            if judged and (judging := split(judged)[1]):
                artifact, rest["digits"] = shortest(artifact, small, DenseOutputs.of(dense, judging).distance)
            data_read_back = to_bytes(artifact)
            size = len(data_read_back)
            if stage is None:
                break
            if not (over := stage.over(size)):
                break
            stage = _again(stage, over, turns)  # scales came out as fp32, or such
    after = measured(evaluate, fill(small, from_bytes(data_read_back)))
    damping = {name: s.info["damp"] for name, s in solutions.items() if "damp" in s.info}
    report = Report(
        with_runs(rows_of(artifact), chains_of(small, artifact, only_if="fewer")),
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
        float_inputs=look.float_inputs,
        pulled=pulled,
        allocation=None if stage is None else stage.outcome,
        finetuned=trained,
        assumed=assumed,
    )
    return Compressed(artifact, report)


def _each(methods: Mapping[str, Method]) -> dict[str, list[Method]]:
    return {name: [method] for name, method in methods.items()}


def _trained_in(
    net: nn.Module,
    methods: Mapping[str, Method],
    how: AdmmTraining | None,
    seconds: dict[str, float],
    progress: Progress,
) -> tuple[nn.Module, Pulled | None]:
    if how is None:
        return net, None
    with _timed(seconds, "admm"):
        return train_in(net, methods, how, progress)


def _again(stage: Stage, over: dict[str, int], turns: int) -> Stage:
    """Under a tighter limit, where a network misses it."""
    if turns == TURNS:
        missed = ", ".join(f"{n:,} {NAMES[b]}" for b, n in over.items())
        raise InfeasibleError(f"after {TURNS} tries the network still misses its target by {missed}")
    return stage.tighter(over)


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
    before = {n: t for n, t in tensors_of(small).items() if n.rpartition(".")[0] not in norms}
    buffers = {n: before[n] for n, _ in small.named_buffers() if n in before}
    progress("repair", 0, 1)
    outcome = repair(net, small, samples, found.units)
    small.load_state_dict(buffers, strict=False)
    progress("repair", 1, 1)
    return small, outcome


def _finetuned(solution: Solution, weight: Weight, w: Tensor, stats: LayerStats | None) -> Solution:
    """The same solution with a finetuned weight; its error is unknown where the moments of its inputs were not kept."""
    if stats is None:
        return replace(solution, weight=weight, error=math.nan, relative_error=math.nan)
    return Solution.of(weight, w, usable(stats), solution.status, solution.info, solution.padded, solution.remark)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Any:
    start = time.perf_counter()
    yield
    seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - start, 2)
