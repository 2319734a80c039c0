"""The nearest weight of a form: what a method stores, where all inputs count alike.

`solve` under uncorrelated inputs of unit power minimises the squared difference of the matrices, as far as the method
minimises anything. Truly nearest (up to the rounding of stored numbers to fp16): every pruner with any pattern, and one
factor pair by truncated SVD, whatever the matrix is unfolded to (low rank, one kernel along each side, blocks). Nearest
among the grids that the search for a range tries: rtn, gptq, obq. Near, by alternating or successive steps: tensor
trains of a higher order (at most sqrt(d - 1) times as far as the nearest, d cores: Oseledets 2011), Tucker, tensor
rings, CP, additive codes, and pruning with a quantizer.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from featherweight.layers import Unit
from featherweight.methods import Admm, Factorize, Magnitude, Method, Obs, Prune, PruneQuantize
from featherweight.methods.additive import additive_of
from featherweight.sharing import fitted
from featherweight.stats import LayerStats


def projector(method: Method) -> Method:
    """The cheapest method with the same answer where all inputs count alike: pruners keep the largest weights, factors
    need no refinement."""
    match method:
        case Factorize():
            return replace(method, whiten=False)
        case Obs() | Admm() | Prune():
            return Magnitude(method.pattern)
        case PruneQuantize(prune=Obs() | Admm() | Prune() as prune):
            return replace(method, prune=Magnitude(prune.pattern))
    return method


@torch.no_grad()
def nearest(unit: Unit, method: Method, w: Tensor, stats: LayerStats | None = None) -> Tensor:
    """The point nearest to w, a tensor of the unit's own shape, in its type and on its device. stats: of its inputs;
    without, all count alike.

    Raises:
        SolveError: there is none.
    """
    matrix = unit.view.matrix(w.detach().cpu())
    moments = white(unit) if stats is None else stats
    found = (projector(method) if stats is None else method).solve(matrix, moments).weight.dense()
    return unit.view.tensor(found.to(w.device, w.dtype)).contiguous()


def white(unit: Unit) -> LayerStats:
    """Inputs that all count alike."""
    return LayerStats.white(unit.view.matrix_shape[1], unit.groups, unit.taps)


@torch.no_grad()
def with_books(
    model: nn.Module, units: Sequence[Unit], methods: Mapping[str, Method], wanted: Mapping[str, Tensor]
) -> Mapping[str, Method]:
    """The methods with books in place, fitted to `wanted` by name, where weights are to share books."""
    left = [u for u in units if (spec := additive_of(methods[u.name])) is not None and spec.books is None]
    if not left:
        return methods
    net = copy.deepcopy(model)
    for unit in left:
        net.get_parameter(unit.name).copy_(wanted[unit.name])
    moments = {u.name: white(u) for u in left}
    found = fitted(net, left, moments, {u.name: [projector(methods[u.name])] for u in left}, None, lambda *_: None)
    return {**methods, **{name: own[0] for name, own in found.items()}}
