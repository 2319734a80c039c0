"""BatchNorms in eval mode as what they are, a scale and a shift of every channel, and what they read."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.artifact.schema import is_foldable
from featherweight.data import hooked


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


def watched(norms: Iterable[Any], see: Callable[[Any, Tensor], None]) -> ExitStack:
    """Calls `see` with a norm and its input, just before it runs; until the end of the context."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(module, args[0] if args else kwargs["input"])

    return hooked([m.register_forward_pre_hook(hook, with_kwargs=True) for m in norms])


@torch.no_grad()
def moments(norms: Iterable[Any], run: Callable[[], None]) -> dict[Any, tuple[Tensor, Tensor]]:
    """Mean and variance of every channel that norms read in `run`, float64; by norm, of those that ran."""
    sums: dict[Any, tuple[Tensor, Tensor, int]] = {}

    def add(module: Any, x: Tensor) -> None:
        flat = x.transpose(0, 1).flatten(1).double()
        first, second, n = sums.get(module, (0, 0, 0))
        sums[module] = first + flat.sum(1), second + flat.square().sum(1), n + flat.shape[1]

    with watched(norms, add):
        run()
    return {m: (a / n, (b / n - (a / n).square()).clamp(min=0)) for m, (a, b, n) in sums.items()}
