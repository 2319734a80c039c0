"""What every weight may become: candidates of several kinds, each solved, with what it costs and is predicted to lose.

Candidates are solved by the fast forms of the methods (GPTQ, ExactOBS): their differences decide, and what is chosen is
solved again by the best ones, see `refined`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.chains.layers import sequence
from featherweight.counting import Place, chain_macs, dense_macs
from featherweight.database import Database, Shared
from featherweight.errors import SolveError, UsageError
from featherweight.knapsack import Menu, useful
from featherweight.latency import Timer
from featherweight.layers import Unit, matching
from featherweight.methods import (
    Additive,
    Channels,
    Ecq,
    EcqStep,
    Factorize,
    Gptq,
    GridSpec,
    Magnitude,
    Method,
    Obq,
    Obs,
    Plain,
    PruneQuantize,
    Rtn,
    Solution,
    Unstructured,
)
from featherweight.methods.additive import NARROW, WIDTH
from featherweight.methods.books import vectors_of
from featherweight.methods.ecq import LEAST, MOST
from featherweight.methods.factoring import SWEEPS
from featherweight.stages import Chain, chain_of
from featherweight.stats import LayerStats
from featherweight.target import Among, Goal
from featherweight.weights import Codebook, Factors, Grid, Sparse, Weight
from featherweight.weights.coded import stored_bytes
from featherweight.weights.masks import BoxMap, ChannelMap, RowMap

BITS = (1, 2, 3, 4, 5, 6, 7, 8)
SPARSITIES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
JOINT = {0.3: (3, 4, 5), 0.5: (3, 4, 5), 0.7: (3, 4, 5), 0.85: (3, 4)}
STRUCTURE = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)  # shares of the input channels
CHANNEL_BITS = (3, 4, 5, 8)
SHARED = 64  # columns of a group, and the widest matrix for which a single scale is tried
STEPS = tuple(
    2 ** (k / 4) for k in range(-14, 12)
)  # of entropy-coded grids, in root mean squares: about 5.6 to 0.2 bits
RATES = (1.5, 2.0, 3.0)  # bits a weight of additive quantization
KEEP = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8)  # shares of the numbers that factors have
FACTOR_BITS = (4, 8)  # of their grids, where bytes or BOPs are limited
FLOAT = 32  # bits that a multiplication counts where a factor is not on a grid


@final
@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A solved form of one weight. final: the method it is solved with again if it is chosen. bytes: its payload. macs,
    bops: of the layer for one sample, rows and input channels without any weight left out; bops are multiplied by the
    bits of both factors, 32 for floats. latency: microseconds of the layer, 0 where nobody asks. params: numbers that
    are stored of it, see `numbers`. rise: the predicted distance to the dense outputs, if no other weight were
    changed."""

    method: Method
    final: Method
    solution: Solution
    bytes: int
    macs: int
    bops: int
    latency: int
    params: int
    rise: float


def forms(unit: Unit, goal: Goal, with_data: bool = True, weights: int = 0) -> list[Method]:
    """The methods that are tried for a unit; without data those that need none. weights: of all units, which decide how
    large books may be."""
    if goal.among == "factors":
        return _plain(goal) + _factored(unit, goal, with_data)
    if goal.structured:
        return _structured(unit, goal)
    coded = goal.target is not None and goal.bops is None and goal.among in ("quantize", "both", "all")
    found: list[Method] = [EcqStep(step) for step in STEPS] if coded else []
    found += _unstructured(unit, goal.among, with_data) + (_additive(unit, goal, weights) if with_data else [])
    return found + (_factored(unit, goal, with_data) if goal.params is not None and goal.among == "all" else [])


def tried(
    units: Sequence[Unit], fixed: Mapping[str, Method], goal: Goal, with_data: bool = True
) -> tuple[dict[str, list[Method]], frozenset[str]]:
    """`forms` by unit name, `fixed` ones as they are; of tied units those that all of them have, or the one that is
    fixed for some of them. And the names of the units whose methods are fixed.

    Raises:
        UsageError: tied units have none in common, or as `ties` does.
    """
    known = dict(fixed)
    groups = [[units[i].name for i in group] for group in ties(units, goal.tied)]
    for names in groups:
        own = [fixed[n] for n in names if n in fixed]
        known |= {n: fixed.get(n, own[0]) for n in names if own}
    weights = sum(u.params for u in units)
    found = {u.name: [known[u.name]] if u.name in known else forms(u, goal, with_data, weights) for u in units}
    for names in groups:
        common = [m for m in found[names[0]] if all(m in found[n] for n in names)]
        if not common:
            raise UsageError(f"no method can be tried for each of these, which are tied: {', '.join(names)}")
        found |= dict.fromkeys(names, common)
    return found, frozenset(known)


def ties(units: Sequence[Unit], patterns: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Numbers of the units that share one choice, every unit in one group, by the first of each.

    Raises:
        UsageError: a pattern matches nothing, or two patterns the same unit.
    """
    number = {u.name: i for i, u in enumerate(units)}
    groups = [tuple(number[u.name] for u in matching(p, tuple(units))) for p in patterns]
    taken = [i for group in groups for i in group]
    twice = {units[i].name for i in taken if taken.count(i) > 1}
    if twice:
        raise UsageError(f"a weight can be tied by one pattern only: {', '.join(sorted(twice))}")
    return tuple(sorted([*groups, *((i,) for i in range(len(units)) if i not in taken)]))


def _structured(unit: Unit, goal: Goal) -> list[Method]:
    """Whole input channels, on grids where bytes or BOPs are limited, too."""
    levels = STRUCTURE if unit.view.matrix_shape[1] // unit.taps >= 4 else STRUCTURE[:1]
    limited = goal.among in ("both", "all") and not (goal.target is None and goal.bops is None)
    widths = (8,) if goal.runtime == "int8" else CHANNEL_BITS if limited else ()
    found: list[Method] = []
    for s in levels:
        pruner = Obs(Channels(s))
        found += [] if goal.runtime == "int8" else [pruner]
        found += [PruneQuantize(pruner, Gptq(GridSpec(b, b == 8))) for b in widths]
    return found


def _unstructured(unit: Unit, among: Among, with_data: bool) -> list[Method]:
    cols = unit.view.matrix_shape[1]
    groups = [None, 0] if cols <= SHARED else [None, SHARED] if cols >= 2 * SHARED else [None]
    grids = [GridSpec(b, b == 8, g) for b in BITS for g in groups]
    quantized: list[Method] = [Gptq(g) if with_data else Rtn(g) for g in grids]
    pruned: list[Method] = []
    for s in SPARSITIES:  # what prunes alike stands together, and shares the pruned weights
        pruner = Obs(Unstructured(s))
        pruned.append(pruner if with_data else Magnitude(pruner.pattern))
        if among in ("both", "all") and with_data:
            pruned += [PruneQuantize(pruner, Gptq(GridSpec(b))) for b in JOINT.get(s, ())]
    return (quantized if among != "prune" else []) + (pruned if among not in ("quantize", "additive") else [])


def _additive(unit: Unit, goal: Goal, weights: int) -> list[Method]:
    """Vectors from shared books, where a row is some vectors long."""
    specs = [vectors_of(rate, weights) for rate in RATES]
    fits = unit.kind != "embedding" and all(unit.view.matrix_shape[1] >= NARROW * v.d for v in specs)
    return [Additive(v, width=1) for v in specs] if fits and goal.among in ("additive", "all") else []


def _plain(goal: Goal) -> list[Method]:
    """The weight as it is, also on grids where bytes or BOPs are limited."""
    return _floats([Plain()], goal) + [Gptq(GridSpec(b, b == 8)) for b in _factor_bits(goal)]


def _factored(unit: Unit, goal: Goal, with_data: bool) -> list[Method]:
    """Products of factors, of the form with the least error, where the layer can have one. Tensor rings, too, where
    nothing counts but numbers: they need the fewest, and multiply more often than the dense layer."""
    grids = _floats([None], goal) + [GridSpec(b, b == 8) for b in _factor_bits(goal)]
    kernel = tuple(unit.view.shape[2:]) if unit.taps > 1 else ()
    names = ("best",) if goal.structured or goal.bops is not None or goal.params is None else ("best", "tr")
    every = [Factorize(n, keep, whiten=with_data, grid=g, sweeps=1) for n in names for keep in KEEP for g in grids]
    own = [m.for_layer(unit.view.matrix_shape, kernel, unit.groups) for m in every]
    return [m for m in own if isinstance(m, Factorize)]


def _floats(forms: list[Any], goal: Goal) -> list[Any]:
    """What is stored as floats, which nothing is where int8 computes."""
    return [] if goal.runtime == "int8" else forms


def _factor_bits(goal: Goal) -> tuple[int, ...]:
    return (8,) if goal.runtime == "int8" else () if goal.target is None and goal.bops is None else FACTOR_BITS


def refined(method: Method, bits: float | None) -> Method:
    """The better form of a candidate's method, which takes longer and stores as much, `bits` a weight, or whatever it
    takes where that is None; books are fitted anew, as fewer weights use them."""
    match method:
        case EcqStep() if bits is not None:
            return Ecq(min(max(round(bits, 4), LEAST), MOST), method.damp)
        case Additive():
            return replace(method, width=WIDTH, books=None)
        case Gptq():
            return Obq(method.grid)
        case Factorize():
            return replace(method, sweeps=SWEEPS)
        case PruneQuantize(quantize=Gptq() as quantize):
            return replace(method, quantize=Obq(quantize.grid))
    return method


def solve_candidates(
    net: nn.Module,
    units: Sequence[Unit],
    stats: Mapping[str, LayerStats],
    rise: Callable[[Unit, Solution], float],
    methods: Mapping[str, Sequence[Method]],
    fixed: Collection[str],
    input_bits: Mapping[str, int],
    samples: int,
    store: Database,
    progress: Callable[[str, int, int], None],
    groups: Sequence[Sequence[int]] | None = None,
    clock: Timer | None = None,
    calls: Mapping[str, tuple[Place, ...]] | None = None,
) -> dict[str, tuple[Candidate, ...]]:
    """Candidates by unit name, those left out that another one beats in bytes, MACs, BOPs, parameters and rise.

    Args:
        methods: what is tried, by unit name, see `forms`. fixed: units whose methods are taken as they are, not
            `refined`.
        rise: the predicted distance, see `Candidate`, of a unit's solution.
        input_bits: of the units' inputs, missing or 0 for floats. samples: how many the statistics are of.
        clock: for latencies. groups: see `ties`; tied units keep the candidates that together are not beaten, in the
            same order. calls: of the units' layers, for multiply-adds of factors, see `operations`.
    """
    total, done = sum(map(len, methods.values())), 0
    found: dict[str, list[Candidate]] = {}
    tied = {units[i].name for group in groups or () if len(group) > 1 for i in group}
    progress("candidates", 0, total)
    for unit in units:
        w = unit.view.matrix(net.get_parameter(unit.name).detach().cpu())
        seen = stats[unit.name]
        positions = uses(seen, samples)
        rows: list[Candidate] = []
        shared = Shared()
        for method in methods[unit.name]:
            try:
                solution, _ = store.solve(method, w, seen, shared)
            except SolveError as error:
                raise SolveError(f"{unit.name}: {error}") from error
            size, lost = stored_bytes(solution.weight), rise(unit, solution)
            apart = unit.name not in tied  # tied weights have one step, not each the step for its bits
            final = method if unit.name in fixed else refined(method, 8 * size / w.numel() if apart else None)
            if isinstance(final, Factorize) and isinstance(solution.weight, Factors):  # whose numbers were counted
                final = final.as_in(solution.weight)
            own = positions, input_bits.get(unit.name, 0), clock, (calls or {}).get(unit.name, ())
            counted = operations(solution.weight, unit, *own)
            rows.append(Candidate(method, final, solution, bytes=size, rise=lost, **counted))
            done += 1
            progress("candidates", done, total)
        found[unit.name] = rows
    kept: dict[str, tuple[Candidate, ...]] = {}
    for group in [(i,) for i in range(len(units))] if groups is None else groups:
        together = [found[units[i].name] for i in group]
        best = useful(menu_of(together, ("bytes", "macs", "bops", "latency", "params")))
        kept |= {units[i].name: tuple(found[units[i].name][k] for k in best) for i in group}
    return kept


def menu_of(together: Sequence[Sequence[Candidate]], budgets: Sequence[str]) -> Menu:
    """The menu of units that share one choice, (units, candidates), with a cost for each budget."""
    costs = np.array([[[getattr(c, b) for b in budgets] for c in rows] for rows in together], np.int64)
    return Menu(costs.sum(axis=0), np.array([[c.rise for c in rows] for rows in together], np.float64).sum(axis=0))


def operations(
    weight: Weight,
    unit: Unit,
    positions: float,
    input_bits: int,
    clock: Timer | None,
    calls: Sequence[Place] = (),
) -> dict[str, int]:
    """MACs, BOPs, latency and parameters of one weight, see `Candidate`. positions: see `uses`. calls: of its layer for
    one sample; a weight of factors is counted as the chain of layers that it can run as, which multiplies as often for
    each multiplication of the dense layer as it does there."""
    chain = _chain(weight, unit, calls)
    each = live(weight, unit)
    if chain is not None:
        each *= chain_macs(chain, unit.view, unit.kind, calls) / dense_macs(unit.view, unit.kind, calls)
    macs = round(positions * each)
    bops = macs * weight_bits(weight) * (input_bits or FLOAT)
    latency = 0
    if clock is not None:
        latency = clock.layer(unit, *extent(weight, unit))
        if chain is not None and isinstance(weight, Factors):
            made = partial(sequence, weight=weight, view=unit.view, chain=chain)
            latency = min(latency, clock.instead(unit, made, chain.links))
    return {"macs": macs, "bops": bops, "latency": latency, "params": numbers(weight)}


def _chain(weight: Weight, unit: Unit, calls: Sequence[Place]) -> Chain | None:
    """What a weight of factors runs as; None where that is the dense layer, as a chain would multiply no less."""
    if not isinstance(weight, Factors) or not calls or len(unit.names) > 1 or unit.kind in ("attention", "embedding"):
        return None
    chain = chain_of(weight, unit.view, unit.kind in ("conv", "conv_transpose"))
    if chain is None or unit.groups > 1:
        return None
    fewer = chain_macs(chain, unit.view, unit.kind, calls) < dense_macs(unit.view, unit.kind, calls)
    return chain if fewer else None


def numbers(weight: Weight) -> int:
    """Numbers that make a weight: those that are kept of a sparse one, all of the factors; each entry of any other."""
    match weight:
        case Sparse():
            return int(weight.mask.sum())
        case Factors():
            return sum(p.shape[0] * p.shape[1] for p in weight.parts)
    return weight.shape[0] * weight.shape[1]


def live(weight: Weight, unit: Unit) -> int:
    """Multiplications of one use of a matrix: whole rows and input channels that were removed are left out. Single
    zeros are not: no plain hardware skips them. None for an embedding, which multiplies nothing."""
    rows, cols = weight.shape
    if unit.kind == "embedding":
        return 0
    parts = _kept(weight, unit)
    return rows * cols if parts is None else int((parts.any(dim=2).sum(1) * parts.any(dim=1).sum(1)).sum()) * unit.taps


def extent(weight: Weight, unit: Unit) -> tuple[int, int]:
    """Rows and input channels that are left, of a unit without groups; as `live`."""
    parts = _kept(weight, unit)
    if parts is None:
        return weight.shape[0], weight.shape[1] // unit.taps
    return int(parts[0].any(dim=1).sum()), int(parts[0].any(dim=0).sum())


def _kept(weight: Weight, unit: Unit) -> Tensor | None:
    """(groups, rows, channels) bool, which taps together have any weight; None where nothing was removed."""
    rows, cols = weight.shape
    if not (isinstance(weight, Sparse) and isinstance(weight.form, RowMap | ChannelMap | BoxMap)):
        return None
    return weight.mask.reshape(unit.groups, rows // unit.groups, cols // unit.taps, unit.taps).any(dim=3)


def without_rows(weight: Weight, unit: Unit, needed: Tensor) -> Weight:
    """The same weight but for rows that are not `needed`, (rows,) bool, where they can be left out of what is
    stored."""
    if not isinstance(weight, Sparse) or not isinstance(weight.form, ChannelMap | BoxMap) or unit.groups > 1:
        return weight
    if isinstance(weight.values, Codebook):  # its vectors would be cut anew
        return weight
    return replace(weight, mask=weight.mask & needed[:, None], form=BoxMap(unit.taps))


def uses(stats: LayerStats, samples: int) -> float:
    """How often a matrix is used for one sample; of a transposed convolution, the positions of its output."""
    return float(stats.samples.double().mean()) / max(samples, 1)


def channels_read(weight: Weight, unit: Unit) -> Tensor:
    """Which input channels have any weight, (channels,) bool; of a unit without groups."""
    channels = weight.shape[1] // unit.taps
    if not (isinstance(weight, Sparse) and isinstance(weight.form, ChannelMap | BoxMap)):
        return torch.ones(channels, dtype=torch.bool)
    return weight.mask.reshape(-1, channels, unit.taps).any(dim=2).any(dim=0)


def weight_bits(weight: Weight) -> int:
    """Bits of one weight as a factor; of several factors the most."""
    if isinstance(weight, Factors):
        return max(weight_bits(part) for part in weight.parts)
    values = weight.values if isinstance(weight, Sparse) else weight
    return values.nbits if isinstance(values, Grid) else FLOAT
