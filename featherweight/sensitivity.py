"""How much the network's outputs will suffer from a change of one weight, before any changed network is run.

Second order, with the Gauss-Newton matrix of the distance to the dense outputs (repair/distance.py): for a change d
of one unit's weight, that distance becomes about 1/2 mean_n dᵀ J_nᵀ F_n J_n d, with J_n the outputs' derivatives for
sample n and F_n the Hessian of the distance in them. With class scores F_n is the Fisher information of the network's
own predictions, which stand for labels; with a loss of the caller's it is the empirical Fisher,
1/2 mean_n <grad L_n, d>^2, the score of MPQCO (Chen et al., ICCV 2021, 2110.06554) and of the unified two-stage
framework (Pattern Recognition 140, 2023). The direction of the change counts, not only its length.

Where we differ: not one inner product a sample, but one a pass over a few samples, whose gradients are added with
random signs (or directions v with E[v vᵀ] = F_n): the cross terms vanish on average, so the mean of the squared
products is an unbiased estimate, and gradients come from plain automatic differentiation. Any layer that has a
gradient can be scored, whatever it does with its weight, and every candidate costs one inner product. One sample a pass
and a loss give the formula exactly.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from featherweight.calls import eager
from featherweight.data import Batch, cut, device_of
from featherweight.errors import UsageError
from featherweight.layers import Unit
from featherweight.repair.distance import energy, outputs, probe
from featherweight.stats import zeros

PASSES = 128  # backward passes over all samples
ROOM = 2 << 30  # bytes of gradients that are kept in memory; fewer passes beyond, FEWEST at least
FEWEST = 32

Loss: TypeAlias = Callable[[Any, Any], Tensor]
"""(the network's output, the batch's target) -> the loss of every sample, (samples,)."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Sensitivity:
    """gradients: of every unit's weight, (passes, rows * cols) in the order of its matrix,
    float32 (float64 of a float64 network); a unit that no
    gradient reached is missing. whole: the denominator of the distance, over all passes."""

    gradients: Mapping[str, Tensor]
    whole: float

    def rise(self, name: str, change: Tensor) -> float:
        """The predicted distance to the dense outputs for a `change` (rows, cols) of one unit's matrix.

        Raises:
            KeyError: no gradient reached the unit.
        """
        along = self.gradients[name] @ change.detach().reshape(-1).to(self.gradients[name].dtype)
        return float(along.double().square().sum()) / (2 * self.whole)


def sensitivity(
    net: nn.Module,
    data: Sequence[Batch],
    units: Sequence[Unit],
    *,
    loss: Loss | None = None,
    temperature: float = 1.0,
    passes: int | None = None,
    seed: int = 0,
    spill: Path | None = None,
    on_pass: Callable[[int, int], None] = lambda done, total: None,
) -> Sensitivity:
    """Run the network forwards and backwards over the data, which is cut into `passes` pieces (not where a batch cannot
    be cut: then it is used several times; several batches go into one row where there are more than passes). A pass
    whose gradients are not finite is left out.

    Args:
        net: in eval mode; its parameters are as before afterwards.
        loss: of every sample, with labels; without, the distance to the network's own outputs.
        temperature: of that distance, see `DenseOutputs.parts`.
        passes: more of them lower the estimate's spread, about sqrt(2 / passes) of it; by default 128, or as many as
            fit into memory, 32 at least.
        spill: an empty directory for gradients of more than 2 GB, kept as long as the result is used.

    Raises:
        UsageError: the outputs hold no real numbers or are zero, or no finite gradient reaches any unit.
    """
    size = sum(u.params for u in units)
    if passes is None:
        passes = min(PASSES, max(ROOM // (4 * size), FEWEST))
    pieces = _pieces(data, passes)
    rounds = max(passes // len(pieces), 1)
    total, rows = rounds * len(pieces), min(rounds * len(pieces), passes)
    spill = spill if 4 * size * rows > ROOM else None
    random = torch.Generator().manual_seed(seed)
    parameters = [net.get_parameter(u.name) for u in units]
    kept: dict[str, Tensor] = {}
    whole, device = 0.0, device_of(net)
    wanting = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        for k in range(total):
            batch = pieces[k % len(pieces)].to(device)
            # cuDNN has no gradients of recurrent layers in eval mode
            with eager(), torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
                scalar, part = _surrogate(batch.run(net), batch.target, loss, temperature, random)
                found = _gradients(scalar, parameters)
            on_pass(k + 1, total)
            if not all(g is None or bool(torch.isfinite(g).all()) for g in found):
                continue  # a square root at zero has none; the other samples have
            whole += part
            row = k * rows // total  # random signs make a sum of several passes as good as one of them
            for i, (unit, gradient) in enumerate(zip(units, found, strict=True)):
                if gradient is not None:
                    if unit.name not in kept:
                        file = spill / f"{i}.gradients" if spill else None
                        dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
                        kept[unit.name] = zeros((rows, unit.params), file, dtype)
                    kept[unit.name][row] += unit.view.matrix(gradient.detach()).reshape(-1).cpu()
    finally:
        for p, wanted in zip(parameters, wanting, strict=True):
            p.requires_grad_(wanted)
    if whole == 0:
        raise UsageError("the network's outputs are all zero, or no pass had finite gradients: nothing to be sensitive")
    if not kept:
        raise UsageError("no gradient of the network's outputs reaches any weight: it runs without gradients inside")
    return Sensitivity(kept, whole)


def _pieces(data: Sequence[Batch], passes: int) -> list[Batch]:
    """About so many, of nearly equal size."""
    each = max(sum(b.size for b in data) / passes, 1.0)
    return [piece for batch in data for piece in cut(batch, max(math.ceil(batch.size / each), 1))]


def _surrogate(
    out: Any, target: Any, loss: Loss | None, temperature: float, random: torch.Generator
) -> tuple[Tensor, float]:
    """A scalar whose gradient is the random combination, and what the batch adds to `whole`."""

    def signs(like: Tensor) -> Tensor:
        return (torch.randint(0, 2, like.shape, generator=random) * 2 - 1).to(like)

    if loss is not None:
        each = loss(out, target)
        return (each * signs(each)).sum(), float(len(each))
    found = list(outputs(out))
    if not found:
        raise UsageError("the network's output holds no tensor of real numbers: nothing to be sensitive")
    plain = [t.detach() for t in found]
    directions = probe(plain, target, [signs(t) for t in plain], temperature)
    scalar = torch.stack([(v * t).sum() for v, t in zip(directions, found, strict=True)]).sum()
    return scalar, energy(plain, target)


def _gradients(scalar: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if not scalar.requires_grad:
        return [None] * len(parameters)
    found = torch.autograd.grad(scalar, parameters, allow_unused=True)
    return [g.to_dense() if g is not None and g.is_sparse else g for g in found]
