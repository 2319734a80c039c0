"""The statistics of all layers' inputs: collected, or found in the database."""

from pathlib import Path

import torch
from torch import Tensor, nn

from featherweight.data import Batch, cut, device_of
from featherweight.database import Database, fingerprint
from featherweight.errors import UsageError
from featherweight.layers import Unit
from featherweight.repair.distance import outputs
from featherweight.solve import Progress
from featherweight.stats import LayerStats, capture, shrink_

SPILL = 2 << 30  # statistics over this many bytes are held in files instead of memory, and not kept
PIECES = 8  # of the samples, at least: how they differ tells what so few samples leave uncertain
FIELDS = ("gram", "mean", "samples", "row_share")  # of LayerStats


@torch.no_grad()
def basis_of(net: nn.Module, samples: list[Batch], store: Database | None) -> str | None:
    """A fingerprint of all that statistics and gradients follow from: tensors, samples, and, as the network's code
    cannot be told, what it makes of them. None without a database, or for samples that have no fingerprint."""
    if store is None or not samples:
        return None
    state = {n: t.clone() for n, t in net.state_dict().items() if isinstance(t, Tensor)}
    try:
        device = device_of(net)
        given = [list(outputs(batch.to(device).run(net))) for batch in samples]
        return fingerprint("basis", str(net), state, samples, given)
    except UsageError:
        return None
    finally:
        net.load_state_dict(state, strict=False)  # a network may count its calls in a buffer


def captured(
    net: nn.Module,
    samples: list[Batch],
    units: tuple[Unit, ...],
    folder: Path,
    progress: Progress,
    store: Database | None = None,
    basis: str | None = None,
) -> dict[str, LayerStats]:
    """The statistics by unit name, shrunk; uncorrelated inputs where there are no samples. folder: for those that are
    large. store, basis: where they are kept, and under what."""
    if not samples:
        return {u.name: LayerStats.white(u.view.matrix_shape[1], u.groups, u.taps) for u in units}
    large = sum(8 * u.groups * u.view.matrix_shape[1] ** 2 for u in units) > SPILL
    key = None
    if store is not None and basis is not None and not large:
        key = fingerprint("shrunk moments", basis, [u.name for u in units], sum(b.size for b in samples))
        kept = store.tensors(key)
        if kept is not None:
            return {u.name: _stats(u, i, kept) for i, u in enumerate(units)}
    done = 0
    pieces = _pieces(net, samples)
    progress("capture", 0, len(pieces))

    def on_batch() -> None:
        nonlocal done
        done += 1
        progress("capture", done, len(pieces))

    stats = capture(net, pieces, units, spill=folder if large else None, on_batch=on_batch)
    stats = {name: shrink_(s) for name, s in stats.items()}
    if store is not None and key is not None:
        fields = {f"{i}.{f}": getattr(stats[u.name], f) for i, u in enumerate(units) for f in FIELDS}
        store.keep(key, {k: t for k, t in fields.items() if t is not None}, {"moments": len(units)})
    return stats


def _pieces(net: nn.Module, samples: list[Batch]) -> list[Batch]:
    """PIECES at least; the batches as they are where the network takes none of another size, or they cannot be cut."""
    found = [p for batch in samples for p in cut(batch, -(-PIECES // len(samples)))]
    state = {n: t.clone() for n, t in net.state_dict().items() if isinstance(t, Tensor)}
    try:
        for piece in {p.size: p for p in found}.values():
            piece.to(device_of(net)).run(net)
    except UsageError:
        return samples
    finally:
        net.load_state_dict(state, strict=False)  # a network may count its calls in a buffer
    return found


def _stats(unit: Unit, i: int, kept: dict[str, Tensor]) -> LayerStats:
    gram, mean, samples = (kept[f"{i}.{f}"] for f in FIELDS[:3])
    return LayerStats(gram, mean, samples, kept.get(f"{i}.row_share"), unit.taps)
