"""Which layers' outputs serve nothing but one other layer's input channels.

Where that layer no longer reads a channel, the row that makes it need not be computed either. Found by trying, not by
tracing: some channels of a layer are set to zero, and the rows whose weights then no longer have any gradient, though
they had one before, are those that only these channels read. A layer counts as coupled where that are just the rows of
the same numbers, and where leaving out other rows with the channels that read them changes no output.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.calls import eager
from featherweight.data import Batch, device_of
from featherweight.layers import Unit
from featherweight.repair.distance import outputs


def couplings(net: nn.Module, batch: Batch, units: Sequence[Unit]) -> dict[str, str]:
    """For each unit whose rows are read by one other unit alone, row i as channel i: the name of that other unit.

    Args:
        net: in eval mode; it is as before afterwards. batch: a few samples are enough.
    """
    parameters = {u.name: net.get_parameter(u.name) for u in units}
    wanting = [p.requires_grad for p in parameters.values()]
    found: dict[str, str] = {}
    by_name = {u.name: u for u in units}
    try:
        for p in parameters.values():
            p.requires_grad_(True)
        before = _alive(net, batch, units, parameters)
        for reader in units:
            channels = reader.view.matrix_shape[1] // reader.taps
            if reader.groups > 1 or channels < 2 or reader.kind == "embedding":
                continue
            odd = torch.arange(channels) % 2 == 1
            saved = parameters[reader.name].detach().clone()
            matrix = reader.view.matrix(saved).clone()
            matrix[:, odd.repeat_interleave(reader.taps)] = 0
            try:
                with torch.no_grad():
                    parameters[reader.name].copy_(reader.view.tensor(matrix))
                after = _alive(net, batch, units, parameters)
            finally:
                with torch.no_grad():
                    parameters[reader.name].copy_(saved)
            for unit in units:
                gone = before[unit.name] & ~after[unit.name]
                same = len(gone) == channels and gone.any() and torch.equal(gone, odd & before[unit.name])
                if same and unit.name not in found and unit.name != reader.name:
                    found[unit.name] = reader.name
        found = {n: r for n, r in found.items() if _holds(net, batch, by_name[n], by_name[r])}
    finally:
        for p, wanted in zip(parameters.values(), wanting, strict=True):
            p.requires_grad_(wanted)
    return found


@torch.no_grad()
def _holds(net: nn.Module, batch: Batch, unit: Unit, reader: Unit) -> bool:
    """Whether rows that the reader does not read can be left out and the outputs stay as they are: gradients do not
    tell of what is read without one, nor of another order. Tried with the rows in whose number a bit is set, or is not,
    for every bit: any two rows differ in one."""
    numbers = torch.arange(unit.view.matrix_shape[0])
    halves = [(numbers >> k) % 2 == 1 for k in range(max(len(numbers) - 1, 1).bit_length())]
    here = batch.to(device_of(net))
    own, reads = net.get_parameter(unit.name), net.get_parameter(reader.name)
    saved = own.detach().clone(), reads.detach().clone()
    try:
        for gone in (h ^ other for h in halves for other in (False, True)):
            without = reader.view.matrix(saved[1]).clone()
            without[:, gone.repeat_interleave(reader.taps)] = 0
            reads.copy_(reader.view.tensor(without))
            own.copy_(saved[0])
            want = list(outputs(here.run(net)))
            less = unit.view.matrix(saved[0]).clone()
            less[gone] = 0
            own.copy_(unit.view.tensor(less))
            got = list(outputs(here.run(net)))
            if [t.shape for t in want] != [t.shape for t in got]:
                return False
            if not all(
                torch.allclose(g, w, rtol=1e-4, atol=1e-6, equal_nan=True) for g, w in zip(got, want, strict=True)
            ):
                return False
    finally:
        own.copy_(saved[0])
        reads.copy_(saved[1])
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
