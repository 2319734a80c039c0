"""BatchNorms in eval mode as what they are, a scale and a shift of every channel."""

from typing import Any

import torch
from torch import Tensor, nn

from featherweight.artifact.schema import is_foldable


def foldable(net: nn.Module) -> list[tuple[str, Any]]:
    """BatchNorms whose tensors belong to nobody else, by their only name."""
    names: dict[int, list[str]] = {}
    uses: dict[int, int] = {}
    for name, module in net.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for tensor in net.state_dict(keep_vars=True).values():
        uses[id(tensor)] = uses.get(id(tensor), 0) + 1
    return [
        (name, module)
        for name, module in net.named_modules()
        if is_foldable(module)
        and len(names[id(module)]) == 1
        and all(uses.get(id(t)) == 1 for t in (module.weight, module.bias, module.running_mean, module.running_var))
    ]


def folded(module: Any) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a BatchNorm in eval mode, float64."""
    scale = module.weight.double() / torch.sqrt(module.running_var.double() + module.eps)
    return scale, module.bias.double() - module.running_mean.double() * scale


@torch.no_grad()
def restate(module: Any, mean: Tensor, variance: Tensor) -> None:
    """Give a BatchNorm other statistics, and the weight and bias with which it computes the same in eval mode."""
    scale, shift = folded(module)
    module.running_mean.copy_(mean)
    module.running_var.copy_(variance)
    module.weight.copy_(scale * torch.sqrt(module.running_var.double() + module.eps))
    module.bias.copy_(shift + scale * module.running_mean.double())
