"""The second-order rise of the loss, sample by sample and with explicit Jacobians."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.data import Batch
from featherweight.layers import Unit


def empirical_fisher(net: nn.Module, data: Sequence[Batch], unit: Unit, change: Tensor) -> float:
    """1/2 mean_n <grad L_n, d>^2 for cross-entropy, a backward pass a sample."""
    squares = []
    weight = net.get_parameter(unit.name)
    for batch in data:
        for i in range(batch.size):
            loss = F.cross_entropy(net(*(a[i : i + 1] for a in batch.args)), batch.target[i : i + 1])
            (gradient,) = torch.autograd.grad(loss, weight)
            squares.append(float((unit.view.matrix(gradient) * change).sum()) ** 2)
    return sum(squares) / len(squares) / 2


def gauss_newton(net: nn.Module, data: Sequence[Batch], unit: Unit, change: Tensor) -> float:
    """1/2 dᵀ Jᵀ F J d over the denominator of the distance: J d by forward differentiation."""
    from torch.func import functional_call, jvp

    lost, whole = 0.0, 0.0
    weight = net.get_parameter(unit.name).detach()
    for batch in data:

        def run(w: Tensor, batch: Batch = batch) -> Tensor:
            return functional_call(net, {unit.name: w}, batch.args)

        z, dz = (t.detach() for t in jvp(run, (weight,), (unit.view.tensor(change).to(weight),)))
        if batch.target is None:
            lost += float(dz.square().sum())
            whole += float(z.square().sum())
        else:
            p = z.softmax(1)
            lost += float(((p * dz**2).sum(1) - (p * dz).sum(1) ** 2).sum()) / 2
            whole += len(z)
    return lost / whole
