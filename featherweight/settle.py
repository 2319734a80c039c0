"""What a run begins with: its goal, what is compressed and how, what the file will say of it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featherweight.activations import ActivationGrid
from featherweight.allocate import Setting
from featherweight.artifact.structure import FIELD as STRUCTURE
from featherweight.artifact.structure import structure_of
from featherweight.candidates import tried
from featherweight.data import Batch
from featherweight.database import Database
from featherweight.errors import InfeasibleError, UsageError
from featherweight.export.clock import FastClock
from featherweight.latency import Clock, Timer
from featherweight.layers import VECTOR, Scan, Unit, scan
from featherweight.methods import Method
from featherweight.packing import predicted_bytes
from featherweight.recipe import Recipe, assign, input_bits, overridden, without_data
from featherweight.sharing import arranged
from featherweight.stats import LayerStats
from featherweight.target import Baselines, Goal, baselines, target_bytes


def goal_of(target: str | int | Goal | None) -> Goal | None:
    """A size is a goal."""
    return target if target is None or isinstance(target, Goal) else Goal(target)


def settle(net: nn.Module, recipe: Recipe, goal: Goal | None, with_data: bool = True) -> tuple[Scan, dict[str, Method]]:
    """What is compressed and how: with a goal, the smallest forms, as nothing else is settled yet.

    Raises:
        UsageError: a pattern matches nothing, or the network holds what no file can.
        InfeasibleError: even these are too large.
    """
    found = scan(net, recipe.include, recipe.exclude)
    if goal is None:
        methods = arranged(net, found.units, assign(recipe, found))
        methods = methods if with_data else {name: without_data(m) for name, m in methods.items()}
        predicted_bytes(net, found, methods, input_bits(recipe, found))  # refuses what no file can hold
        return found, methods
    if not found.units:
        raise UsageError("a target needs at least one weight to choose for; every one is excluded")
    if goal.latency is not None and goal.runtime == "torch" and input_bits(recipe, found):
        what = "rounded inputs are simulated in torch, which takes time"
        raise UsageError(f"{what}: give --target-latency or --activations, not both; --for speed measures in int8")
    tries, methods = tried(found.units, overridden(recipe, found), goal, with_data)[0], {}
    for unit in found.units:
        stored = [m.storage(unit.view.matrix_shape, unit.taps, unit.groups) for m in tries[unit.name]]
        methods[unit.name] = tries[unit.name][stored.index(min(stored))]
    size = predicted_bytes(net, found, methods, input_bits(recipe, found))
    if goal.target is not None and not goal.structured:  # of which rows that nothing reads are no part
        limit = target_bytes(goal.target, baselines(net, found.units).fp32)
        if size > limit:
            what = f"the target {goal.target} is {limit:,} bytes"
            raise InfeasibleError(f"{what}; the smallest reachable file has {size:,} bytes")
    return found, methods


def remembered(net: nn.Module, found: Scan, base: Baselines, goal: Goal | None) -> dict[str, Any]:
    """What every file says of how it came to be (docs/decisions/0018-report.md): sizes, the version of torch, the
    target, what the network's modules are set to, and why a tensor that is no vector was left alone."""
    reasons: dict[str, list[str]] = {}
    for tensor in found.left_alone:
        if tensor.reason != VECTOR:
            reasons.setdefault(tensor.reason, []).append(tensor.name)
    asked = {} if goal is None else {"settings": goal.words()}
    sizes = {"fp32_bytes": base.fp32, "half_bytes": base.half, "int8_bytes": base.int8}
    sizes |= {"torch": torch.__version__.partition("+")[0], STRUCTURE: structure_of(net)}
    return sizes | asked | ({"left_alone": reasons} if reasons else {})


def setting_of(
    net: nn.Module,
    found: Scan,
    recipe: Recipe,
    samples: list[Batch],
    stats: Mapping[str, LayerStats],
    grids: dict[str, ActivationGrid],
    base: Baselines,
    about: dict[str, Any],
    folder: Path,
    store: Database | None,
    basis: str | None,
    meter: Callable[[nn.Module], dict[str, float]] | None = None,
) -> Setting:
    """What `allocate` works with; `folder` is for what does not outlive the run."""
    space = folder / "gradients"
    space.mkdir()
    bits = {name: grid.bits for name, grid in grids.items()}
    kept, fixed = store or Database.at(folder / "solved"), overridden(recipe, found)
    own = stats, fixed, grids, bits, base, about, kept, space, _clock, recipe.repair, basis, meter
    return Setting(net, found, samples, *own)


def _clock(
    goal: Goal, net: nn.Module, batch: Batch, units: Sequence[Unit], coupled: Mapping[str, tuple[str, ...]]
) -> Timer:
    """Of the runtime that a limit of latency is about."""
    if goal.runtime == "int8":
        return FastClock(net, batch, units, samples=goal.samples, together=frozenset(coupled.values()))
    return Clock(net, batch, units, samples=goal.samples)
