"""What is known of a network and its inputs before anything is solved."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn

from featherweight.activations import ActivationGrid, FloatInput, calibrate
from featherweight.data import Batch, batches, check, split
from featherweight.database import Database
from featherweight.errors import UsageError
from featherweight.layers import Scan
from featherweight.methods import Method
from featherweight.methods.additive import additive_of
from featherweight.moments import basis_of, captured
from featherweight.recipe import Recipe
from featherweight.solve import Order, Progress, needs_inputs, order
from featherweight.stats import LayerStats
from featherweight.target import Goal


@final
@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """What is known of a network's inputs before anything is solved. then: what is solved in order, without a goal.
    basis: see Setting."""

    then: Order
    stats: dict[str, LayerStats]
    grids: dict[str, ActivationGrid]
    float_inputs: tuple[FloatInput, ...]
    basis: str | None


def look_at(
    net: nn.Module,
    found: Scan,
    methods: Mapping[str, Method],
    recipe: Recipe,
    goal: Goal | None,
    samples: list[Batch],
    wanted: dict[str, int],
    store: Database | None,
    folder: Path,
    progress: Progress,
) -> Look:
    """folder: for what is large; statistics that are there already stay."""
    original = tensors_of(net)
    seen = samples if goal is None else split(samples)[0] or samples  # the others judge policies
    then = order(net, seen, found.units, methods) if goal is None and recipe.sequential else Order()
    left = tuple(u for u in found.units if u not in then.units or additive_of(methods[u.name]))
    basis = None if goal is None else basis_of(net, samples, store)
    stats = captured(net, seen, left, Path(tempfile.mkdtemp(dir=folder)), progress, store, basis)
    grids, float_inputs = calibrate(net, samples, found.units, wanted)
    net.load_state_dict(original, strict=False)  # a network may count its calls in a buffer
    return Look(then, stats, grids, float_inputs, basis)


def samples_of(
    net: nn.Module, data: Any, methods: dict[str, Method], batch_size: int, wanted: dict[str, int]
) -> list[Batch]:
    if data is None:
        if wanted:
            raise UsageError("rounding activations needs calibration data, to find their ranges")
        needing = sorted({m.label for m in methods.values() if needs_inputs(m)})
        if needing:
            raise UsageError(f"{needing[0]} needs calibration data; give some, or use rtn or magnitude")
        return []
    samples = batches(data, batch_size)
    check(net, samples[0])
    return samples


def tensors_of(net: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and persistent buffer."""
    return {n: t.clone() for n, t in net.state_dict().items() if isinstance(t, Tensor)}
