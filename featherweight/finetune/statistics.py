"""What BatchNorms normalise with while a network is trained, and in what precision it runs."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.data import Batch, device_of, hooked
from featherweight.finetune.order import epoch_of
from featherweight.finetune.ranks import Ranks
from featherweight.finetune.settings import Settings
from featherweight.norms import foldable, restate

SAMPLES = 8192  # that statistics are taken of, about: those before training, and those that stay


def running(net: nn.Module, how: Settings) -> AbstractContextManager[Any]:
    """The precision that networks are trained in."""
    return torch.autocast(device_of(net).type, torch.bfloat16, enabled=how.precision == "bf16")


@contextmanager
def statistics(net: nn.Module, how: Settings) -> Iterator[None]:
    """Let the BatchNorms of a network that is trained meanwhile normalise with the statistics of each batch, where
    `how.norms` is "batch". At first they are restated for statistics of the training data: what the network computes
    in eval mode stays the same, and with those of a batch nearly so. At last they get the mean of what batches have in
    the trained network, and are a scale and a shift in eval mode again. Every process finds the same. BatchNorms that
    share tensors with other modules stay in eval mode, and where a channel has a single value, all do.
    """
    if how.norms == "kept":
        yield
        return
    found = _inputs(net, how)
    norms = [module for _, module in foldable(net) if module in found]
    for module in norms:
        restate(module, *found[module])
    with hooked([m.register_forward_pre_hook(_by_batch) for m in norms]):
        yield
        _settle(net, norms, how)
    for module in norms:
        restate(
            module.eval(), torch.zeros_like(module.running_mean), torch.full_like(module.running_var, 1 - module.eps)
        )


def _by_batch(module: Any, args: tuple[Tensor, ...]) -> None:
    module.training = args[0].numel() > module.num_features


@torch.no_grad()
def _inputs(net: nn.Module, how: Settings) -> dict[Any, tuple[Tensor, Tensor]]:
    """Mean and variance of every channel that BatchNorms read in eval mode, float64."""
    sums: dict[Any, Tensor] = {}

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].transpose(0, 1).flatten(1).double()
        one = torch.stack([torch.ones_like(x[:, 0]) * x.shape[1], x.sum(1), x.square().sum(1)])
        sums[module] = sums[module] + one if module in sums else one

    with hooked([m.register_forward_pre_hook(see) for _, m in foldable(net)]):
        _run(net, how)
    means = {m: (s[1] / s[0], s[2] / s[0]) for m, s in sums.items()}
    return {m: (mean, (square - mean.square()).clamp(min=0)) for m, (mean, square) in means.items()}


def _settle(net: nn.Module, norms: list[Any], how: Settings) -> None:
    """Running statistics as the mean over batches."""
    momenta = [m.momentum for m in norms]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None
    _run(net, how)
    for module, momentum in zip(norms, momenta, strict=True):
        module.momentum = momentum


@torch.no_grad()
def _run(net: nn.Module, how: Settings) -> None:
    """The first SAMPLES of an epoch that no training has."""
    seen = 0
    for sent in epoch_of(how, how.epochs, Ranks()).batches:
        batch: Batch = sent.to(device_of(net))
        with running(net, how):
            batch.run(net)
        seen += batch.size
        if seen >= SAMPLES:
            return
