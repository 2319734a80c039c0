"""Which layers' outputs serve nothing but the input channels of one other layer, or of several that read one tensor.

Where these no longer read a channel, the row that makes it need not be computed either. Found by trying, not by
tracing: some channels of the readers are set to zero, and the rows whose weights then no longer have any gradient,
though they had one before, are those that only these channels read. A layer counts as coupled where that are just the
rows of the same numbers, and where leaving out other rows with the channels that read them changes no output.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.calls import eager
from featherweight.data import Batch, device_of, hooked
from featherweight.layers import Unit
from featherweight.repair.distance import outputs


def couplings(net: nn.Module, batch: Batch, units: Sequence[Unit]) -> dict[str, tuple[str, ...]]:
    """For each unit whose rows are read by other units alone, row i as channel i: the names of these other units, all
    of which read the same tensor.

    Args:
        net: in eval mode; it is as before afterwards. batch: a few samples are enough.
    """
    parameters = {u.name: net.get_parameter(u.name) for u in units}
    wanting = [p.requires_grad for p in parameters.values()]
    found: dict[str, tuple[str, ...]] = {}
    by_name = {u.name: u for u in units}
    try:
        for p in parameters.values():
            p.requires_grad_(True)
        before = _alive(net, batch, units, parameters)
        for readers in _reading_alike(net, batch, units):
            channels = _channels(readers[0])
            if any(u.groups > 1 or _channels(u) != channels or u.kind == "embedding" for u in readers) or channels < 2:
                continue
            odd = torch.arange(channels) % 2 == 1
            with _without(net, readers, odd):
                after = _alive(net, batch, units, parameters)
            for unit in units:
                gone = before[unit.name] & ~after[unit.name]
                same = len(gone) == channels and gone.any() and torch.equal(gone, odd & before[unit.name])
                if same and unit.name not in found and unit not in readers:
                    found[unit.name] = tuple(r.name for r in readers)
        found = {n: r for n, r in found.items() if _holds(net, batch, by_name[n], [by_name[x] for x in r])}
    finally:
        for p, wanted in zip(parameters.values(), wanting, strict=True):
            p.requires_grad_(wanted)
    return found


def _channels(unit: Unit) -> int:
    return unit.view.matrix_shape[1] // unit.taps


def _reading_alike(net: nn.Module, batch: Batch, units: Sequence[Unit]) -> list[list[Unit]]:
    """All units, those together whose layers were given the very same tensor and have no other weights."""
    owners = [u.name.rpartition(".")[0] for u in units]
    own = {u.name: place for u, place in zip(units, owners, strict=True) if place and owners.count(place) == 1}
    seen: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in own}

    def see(name: str) -> Callable[..., None]:
        def kept(_module: nn.Module, args: Any, kwargs: Any) -> None:
            given = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(given, Tensor):
                seen[name].append((given, given._version))  # kept, so that no other tensor gets its id

        return kept

    hooks = [net.get_submodule(place).register_forward_pre_hook(see(n), with_kwargs=True) for n, place in own.items()]
    with torch.no_grad(), eager(), hooked(hooks):
        batch.to(device_of(net)).run(net)
    groups: dict[Any, list[Unit]] = {}
    for unit in units:
        calls = seen.get(unit.name, [])
        key = (id(calls[0][0]), calls[0][1]) if len(calls) == 1 else unit.name
        groups.setdefault(key, []).append(unit)
    return list(groups.values())


@contextmanager
def _without(net: nn.Module, readers: Sequence[Unit], gone: Tensor) -> Iterator[None]:
    """The network while its `readers` have zeros at the channels that are `gone`, (channels,) bool."""
    weights = [net.get_parameter(u.name) for u in readers]
    saved = [w.detach().clone() for w in weights]
    try:
        with torch.no_grad():
            for unit, weight in zip(readers, weights, strict=True):
                matrix = unit.view.matrix(weight).clone()
                matrix[:, gone.repeat_interleave(unit.taps)] = 0
                weight.copy_(unit.view.tensor(matrix))
        yield
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, saved, strict=True):
                weight.copy_(before)


@torch.no_grad()
def _holds(net: nn.Module, batch: Batch, unit: Unit, readers: Sequence[Unit]) -> bool:
    """Whether rows that the readers do not read can be left out and the outputs stay as they are: gradients do not
    tell of what is read without one, nor of another order. Tried with the rows in whose number a bit is set, or is not,
    for every bit: any two rows differ in one."""
    numbers = torch.arange(unit.view.matrix_shape[0])
    halves = [(numbers >> k) % 2 == 1 for k in range(max(len(numbers) - 1, 1).bit_length())]
    here = batch.to(device_of(net))
    own = net.get_parameter(unit.name)
    saved = own.detach().clone()
    for gone in (h ^ other for h in halves for other in (False, True)):
        with _without(net, readers, gone):
            want = list(outputs(here.run(net)))
            less = unit.view.matrix(saved).clone()
            less[gone] = 0
            own.copy_(unit.view.tensor(less))
            try:
                got = list(outputs(here.run(net)))
            finally:
                own.copy_(saved)
        if [t.shape for t in want] != [t.shape for t in got]:
            return False
        if not all(torch.allclose(g, w, rtol=1e-4, atol=1e-6, equal_nan=True) for g, w in zip(got, want, strict=True)):
            return False
    return True


def _alive(net: nn.Module, batch: Batch, units: Sequence[Unit], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows with a gradient, (rows,) bool, by unit name."""
    with eager(), torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        out: Any = batch.to(device_of(net)).run(net)
        random = torch.Generator().manual_seed(0)
        weighted = [(t * torch.randn(t.shape, generator=random).to(t)).sum() for t in outputs(out)]
        wanted = list(parameters.values())
        total = torch.stack(weighted).sum()
        gradients = (
            torch.autograd.grad(total, wanted, allow_unused=True) if total.requires_grad else [None] * len(wanted)
        )
    alive = {}
    for unit, g in zip(units, gradients, strict=True):
        rows = unit.view.matrix_shape[0]
        dense = None if g is None else g.to_dense() if g.is_sparse else g
        none = torch.zeros(rows, dtype=torch.bool)
        alive[unit.name] = none if dense is None else (unit.view.matrix(dense) != 0).any(dim=1).cpu()
    return alive
