"""What of a file can run as chains of layers, what it costs and what is better left dense."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, final

import torch
from torch import nn

from featherweight.artifact import Artifact, StoredUnit
from featherweight.chains.layers import sequence
from featherweight.chains.recurrent import Chained, recurrent
from featherweight.counting import Place, chain_macs, dense_macs, nominal, places, single
from featherweight.data import Batch, batches, device_of, hooked
from featherweight.errors import require
from featherweight.latency import timed
from featherweight.layers import Kind, Unit, scan
from featherweight.stages import Chain, Link, chain_of, stored_as
from featherweight.standin import known_as, settings_of
from featherweight.weights import Factors

OnlyIf: TypeAlias = Literal["faster", "fewer", "always"]

OTHER = "not stored as factors"
ROUNDS = 3  # of turns that a layer and its chain take while they are timed
_CONVS = nn.Conv1d, nn.Conv2d, nn.Conv3d
_TRANSPOSED = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
_RECURRENT = nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell
_KNOWN = (*_CONVS, *_TRANSPOSED, nn.Linear, nn.Embedding, *_RECURRENT)
_READERS = nn.MultiheadAttention, nn.TransformerEncoderLayer  # take weights out of layers


@final
@dataclass(frozen=True, slots=True)
class Cost:
    """Of one weight. macs: multiply-adds of one sample, or of one position of the output where no example was given.
    params: numbers that it multiplies with; bytes: what these take in memory. micros: time of the whole layer on the
    example, None where none was taken."""

    macs: int
    params: int
    bytes: int
    micros: int | None = None


@final
@dataclass(frozen=True, slots=True)
class ChainRow:
    """One weight of a file. stored: its kind, or form, ranks and numbers. runs: the chain's links as `kernel inputs ->
    outputs`, or 'dense'. reason: why dense; empty for a chain. chain: the cost as one, None where there is none."""

    name: str
    stored: str
    runs: str
    reason: str
    dense: Cost
    chain: Cost | None = None

    @property
    def chained(self) -> bool:
        return not self.reason


def chains_of(
    model: nn.Module, artifact: Artifact, *, example: Any = None, only_if: OnlyIf = "faster"
) -> tuple[ChainRow, ...]:
    """What each weight of a file would run as in this network, which is not changed: `chained` does as these rows say.

    A weight of factors runs as a chain of plain layers where they compute the same. An embedding's chain is taken where
    it has fewer numbers, as a lookup multiplies nothing.

    Args:
        example: a batch, or anything that `compress` takes for data, of which the first batch is run: multiply-adds are
            then of one sample of it, and chains are timed on it.
        only_if: "faster" takes a chain that has fewer multiply-adds and, with an example, took less time than the dense
            layer here; "fewer" does not measure; "always" takes every chain that there is.

    Raises:
        UsageError: the network does not accept the example, or `only_if` is something else.
    """
    require(only_if in ("faster", "fewer", "always"), "only_if must be 'faster', 'fewer' or 'always'", only_if)
    known = {name: u for u in scan(model).units for name in u.names} if artifact.units else {}
    batch = example if example is None or isinstance(example, Batch) else batches(example)[0]
    modules = dict(model.named_modules())
    places_of: dict[str, tuple[Place, ...]] = {}
    net = model
    if batch is not None:
        net = copy.deepcopy(model).eval()
        owners = {n.rpartition(".")[0] for n in known}
        places_of = places(net, single(batch), sorted(o for o in owners if isinstance(modules[o], _KNOWN)))
    rows = {}
    for stored in artifact.units:
        unit = known.get(stored.names[0])
        rows[stored.names[0]] = _row(model, modules, stored, unit, places_of if batch else None, only_if)
    if batch is not None and only_if == "faster":
        rows = _timed(net, batch, artifact, rows)
    return tuple(rows.values())


def replacement(model: nn.Module, place: str, units: Sequence[StoredUnit]) -> nn.Module:
    """The module at this place, with these weights as chains."""
    layer: Any = model.get_submodule(place)
    if isinstance(layer, _RECURRENT):
        chained: Chained = {u.names[0].rpartition(".")[2]: _chain(u, "recurrent") for u in units}
        return known_as(recurrent(layer, chained), settings_of(layer))
    ((weight, view, chain),) = (_chain(u, _kind(layer)) for u in units)
    return known_as(sequence(layer, weight, view, chain), settings_of(layer))


def by_place(artifact: Artifact, rows: Sequence[ChainRow]) -> dict[str, list[StoredUnit]]:
    """The weights that run as chains, by the name of their module."""
    wanted = {r.name for r in rows if r.chained}
    found: dict[str, list[StoredUnit]] = {}
    for unit in artifact.units:
        if unit.names[0] in wanted:
            found.setdefault(unit.names[0].rpartition(".")[0], []).append(unit)
    return found


def _kind(layer: nn.Module) -> Kind:
    return "conv" if isinstance(layer, _CONVS) else "conv_transpose" if isinstance(layer, _TRANSPOSED) else "linear"


def _chain(unit: StoredUnit, kind: Kind) -> tuple[Factors, Any, Chain]:
    assert isinstance(unit.weight, Factors)
    chain = chain_of(unit.weight, unit.view, kind in ("conv", "conv_transpose"))
    assert chain is not None
    return unit.weight, unit.view, chain


# ---------------------------------------------------------------- one weight
def _row(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    stored: StoredUnit,
    unit: Unit | None,
    places_of: Mapping[str, tuple[Place, ...]] | None,
    only_if: OnlyIf,
) -> ChainRow:
    name, weight = stored.names[0], stored.weight
    owner, _, own = name.rpartition(".")
    layer: Any = modules.get(owner)
    label = stored_as(weight, stored.view) if isinstance(weight, Factors) else weight.kind
    like = model.get_parameter(name) if unit is not None else torch.empty(0)
    params = weight.shape[0] * weight.shape[1]
    calls = None if places_of is None else places_of.get(owner)
    kind: Kind = unit.kind if unit is not None else "linear"
    if calls is None:
        calls = (nominal(stored.view, layer.stride if kind in ("conv", "conv_transpose") else ()),)
    dense = Cost(dense_macs(stored.view, kind, calls), params, params * like.element_size())
    if not isinstance(weight, Factors):
        return ChainRow(name, label, "dense", OTHER, dense)
    if reason := _unfit(model, layer, owner, stored, unit, own):
        return ChainRow(name, label, "dense", reason, dense)
    chain = chain_of(weight, stored.view, kind in ("conv", "conv_transpose"))
    if chain is None:
        return ChainRow(name, label, "dense", "no chain of layers computes this contraction", dense)
    links = chain.links
    cost = Cost(chain_macs(chain, stored.view, kind, calls), chain.numbers, chain.numbers * like.element_size())
    turned = kind == "embedding"  # looks up its last link and multiplies with the others
    runs = ", ".join(_described(link, turned) for link in (reversed(links) if turned else links))
    if not calls:
        reason = "the example does not call its layer: something else may read its weight"
    elif only_if != "always" and kind == "embedding":
        reason = "" if cost.params < params else f"its chain has {cost.params:,} numbers, the embedding {params:,}"
    elif only_if != "always" and cost.macs >= dense.macs:
        reason = f"its chain multiplies {cost.macs / max(dense.macs, 1):.2f} times as often"
    return ChainRow(name, label, "dense" if reason else runs, reason, dense, cost)


def _described(link: Link, turned: bool) -> str:
    """For people: '3x1 64 -> 24 in 8 groups'."""
    kernel = "x".join(map(str, link.kernel))
    groups = f" in {link.groups} groups" if link.groups > 1 else ""
    ends = (link.outputs, link.inputs) if turned else (link.inputs, link.outputs)
    return f"{kernel} {ends[0]} -> {ends[1]}{groups}".strip()


def _unfit(model: nn.Module, layer: Any, owner: str, stored: StoredUnit, unit: Unit | None, own: str) -> str:
    """Why a weight of factors must be decoded; empty where it need not."""
    if unit is None or not isinstance(layer, _KNOWN):
        return f"a chain cannot stand for {'this tensor' if layer is None else type(layer).__name__}"
    if not owner:
        return "its layer is the whole network"
    weight = layer.get_parameter(own)
    if len(stored.names) > 1 or sum(p is weight for _, p in model.named_parameters(remove_duplicate=False)) > 1:
        return "its weight has several names"
    if isinstance(model.get_submodule(owner.rpartition(".")[0]), _READERS):
        return "attention and encoder layers of torch read the weight themselves"
    if stored.input is not None:
        return "its inputs are rounded, by the name of the weight"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "its layer has hooks"
    base: Any = next(k for k in _KNOWN if isinstance(layer, k))
    same = all(
        getattr(type(layer), f, None) is getattr(base, f, None) for f in ("forward", "__call__", "_conv_forward")
    )
    if not same or "forward" in vars(layer):
        return f"{type(layer).__name__} has a forward of its own"
    if unit.groups > 1:
        return "its convolution has groups of its own"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "its embedding cuts norms"
    return "a projection of an LSTM's states stays dense" if own.startswith("weight_hr") else ""


# ---------------------------------------------------------------- measured
@torch.no_grad()
def _timed(net: nn.Module, batch: Batch, artifact: Artifact, rows: Mapping[str, ChainRow]) -> dict[str, ChainRow]:
    """The rows with times, those that took longer as chains turned to dense; embeddings, which save memory, are not."""
    found = by_place(artifact, tuple(rows.values()))
    inputs = _first_inputs(net, batch, [p for p in found if not isinstance(net.get_submodule(p), nn.Embedding)])
    rows = dict(rows)
    for place, (args, kwargs) in inputs.items():
        layer, names = net.get_submodule(place), [u.names[0] for u in found[place]]
        tries = [found[place]]
        first = [u for u in found[place] if u.names[0].endswith(".weight_ih_l0")]
        if len(found[place]) > 1 and first and not getattr(layer, "bidirectional", False):
            tries.append(first)  # with torch's own loop over the steps
        whole, *times = _interleaved([layer, *(replacement(net, place, units).eval() for units in tries)], args, kwargs)
        best = min(range(len(tries)), key=times.__getitem__)
        kept = {u.names[0] for u in tries[best]} if times[best] < whole else set()
        for name in names:
            row = rows[name]
            assert row.chain is not None
            costs = replace(row.dense, micros=whole), replace(row.chain, micros=times[best])
            reason = "" if name in kept else f"measured: {times[best]:,} µs as a chain, {whole:,} µs dense"
            if reason and kept:
                reason = "measured: its layer is faster with this weight dense"
            rows[name] = replace(
                row, dense=costs[0], chain=costs[1], reason=reason, runs="dense" if reason else row.runs
            )
    return rows


def _first_inputs(net: nn.Module, batch: Batch, names: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """What the modules of these names are first called with."""
    seen: dict[str, tuple[Any, Any]] = {}

    def look(name: str) -> Callable[..., None]:
        return lambda _layer, args, kwargs: seen.setdefault(name, (args, kwargs)) and None

    hooks = [net.get_submodule(n).register_forward_pre_hook(look(n), with_kwargs=True) for n in names]
    with hooked(hooks):
        batch.to(device_of(net)).run(net)
    return seen


def _interleaved(layers: Sequence[nn.Module], args: Any, kwargs: Any) -> list[int]:
    """Microseconds of each on the same inputs, by turns: the least of some medians."""
    device = device_of(layers[0])
    times = [[timed(lambda m=m: m(*args, **kwargs), device) for m in layers] for _ in range(ROUNDS)]
    return [min(own) for own in zip(*times, strict=True)]
