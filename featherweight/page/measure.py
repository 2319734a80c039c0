"""What a page measures: the file in a fresh process, the dense network, the same network stored in plain ways, and how
often both multiply."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, final

import torch
from torch import nn

from featherweight.artifact import Artifact, fill
from featherweight.candidates import operations
from featherweight.counting import LAYERS, counted, dense_macs, places, single
from featherweight.data import batches
from featherweight.errors import UsageError
from featherweight.layers import EXCLUDED, View, scan
from featherweight.methods import GridSpec
from featherweight.methods.grids import choose
from featherweight.proof import meter, prove
from featherweight.target import Baselines
from featherweight.userland import call, make_model

Progress: TypeAlias = Callable[[str, int, int], None]


@final
@dataclass(frozen=True, slots=True)
class Plain:
    """Bytes of the network as people would store it without this tool. int4: as int8 of `Baselines`, weights in half
    a byte."""

    baselines: Baselines
    int4: int


@final
@dataclass(frozen=True, slots=True)
class Measured:
    """before, after: metrics of the dense network and of the file. plain: of `half`, `int8` and `int4`. macs: of one
    sample by weight, dense and as stored; total: of the whole network, None where nothing was counted; macs_note: what
    is not in them, or why there are none."""

    before: dict[str, float]
    after: dict[str, float]
    plain: dict[str, dict[str, float]]
    macs: dict[str, tuple[int, int]] = field(default_factory=dict)
    total: tuple[int, int] | None = None
    macs_note: str = ""


def matrices(artifact: Artifact) -> dict[str, View]:
    """Every weight that could be compressed, by its first name: those of the file, and those that it says were
    excluded. The latter are seen as if their outputs came first."""
    said = artifact.about.get("left_alone")
    excluded = said.get(EXCLUDED) if isinstance(said, dict) else None
    names = [n for n in excluded if isinstance(n, str)] if isinstance(excluded, list) else []
    found = {u.names[0]: u.view for u in artifact.units}
    return found | {
        n: View(tuple(artifact.rest[n].shape)) for n in names if n in artifact.rest and artifact.rest[n].ndim > 1
    }


def plain_sizes(artifact: Artifact) -> Plain:
    """Counted from what the file restores, which is all that the dense network had."""
    real = sum(t.numel() for t in artifact.rest.values() if t.is_floating_point())
    real += sum(4 * len(x.scale) for x in artifact.norms)  # weight, bias, mean and variance
    real += sum(u.weight.shape[0] * u.weight.shape[1] for u in artifact.units)
    shapes = [view.matrix_shape for view in matrices(artifact).values()]
    weights, scales = sum(rows * cols for rows, cols in shapes), sum(rows for rows, _ in shapes)
    other = 4 * (real - weights + scales)
    return Plain(Baselines(4 * real, 2 * real, other + weights), other + -(-weights // 2))


def measure(
    file: Path,
    artifact: Artifact,
    model: str,
    weights: Path | None,
    test: str,
    metric: str | None,
    batch_size: int,
    progress: Progress,
    *,
    ignore_structure: bool = False,
) -> Measured:
    """Measure the dense network that `model` makes, the file, and the plain ways.

    Raises:
        UsageError: the file does not fit the network, or a measurement fails.
    """
    steps = 6
    progress("measure", 0, steps)
    dense = make_model(model, weights)
    fill(copy.deepcopy(dense), artifact, ignore_structure=ignore_structure)  # refuses what does not fit
    measured = meter(test, metric, batch_size)
    before = measured(dense)
    progress("measure", 1, steps)
    own = file, artifact.digest(), model, weights, test, metric, batch_size
    after = prove(*own, ignore_structure=ignore_structure)["metrics"]
    progress("measure", 2, steps)
    plain = {}
    for i, (name, store) in enumerate((("half", _half), ("int8", stored_in(8)), ("int4", stored_in(4)))):
        plain[name] = measured(store(copy.deepcopy(dense), artifact))
        progress("measure", 3 + i, steps)
    counts = count(dense, artifact, test, batch_size)
    progress("measure", steps, steps)
    return Measured(before, after, plain, *counts)


@torch.no_grad()
def _half(net: nn.Module, artifact: Artifact) -> nn.Module:
    """Every number as fp16 has it, computed in the network's own type: what `.half()` costs, on any processor."""
    for tensor in net.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.half())
    return net


def stored_in(bits: int) -> Callable[[nn.Module, Artifact], nn.Module]:
    """Every weight of `matrices`, rounded to the nearest of so many bits, one scale a row."""

    @torch.no_grad()
    def store(net: nn.Module, artifact: Artifact) -> nn.Module:
        for name, view in matrices(artifact).items():
            parameter = net.get_parameter(name)
            w = view.matrix(parameter.detach().cpu()).double()
            points = choose(w, GridSpec(bits, symmetric=True))
            parameter.copy_(view.tensor(points.grid(points.round(w)).dense()))
        return net

    return store


def count(
    dense: nn.Module, artifact: Artifact, test: str, batch_size: int
) -> tuple[dict[str, tuple[int, int]], tuple[int, int] | None, str]:
    """Multiply-adds of one sample, dense and as the file stores it, by weight and of all layers; and what was left out.
    Factors count as the layers that they can run as, removed rows and channels as gone, single zeros not."""
    try:
        sample = single(batches(call(test), batch_size)[0])
    except UsageError as error:
        return {}, None, f"the test data are no batches of inputs ({error})"
    if sample.size != 1:
        return {}, None, "the test data cannot be cut into single samples"
    units = {u.names[0]: u for u in scan(dense).units}
    stored = {u.names[0]: u.weight for u in artifact.units if u.names[0] in units}
    owners = {n: n.rpartition(".")[0] for n in stored if units[n].kind != "attention"}
    owners = {n: place for n, place in owners.items() if isinstance(dense.get_submodule(place), LAYERS)}
    calls = places(dense, sample, sorted(set(owners.values())))
    found = {}
    for name, place in owners.items():
        unit, seen = units[name], calls[place]
        before = dense_macs(unit.view, unit.kind, seen)
        after = operations(stored[name], unit, before / unit.params, 0, None, seen)["macs"]
        found[name] = before, after
    whole = sum(counted(dense, sample).values())
    left = len(artifact.units) - len(found)
    note = f"{left} weights of attention or layers of your own are not counted" if left else ""
    return found, (whole, whole - sum(b - a for b, a in found.values())), note
