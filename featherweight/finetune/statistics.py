"""What BatchNorms normalise with while a network is trained, and in what precision it runs."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.data import Batch, device_of
from featherweight.errors import UsageError
from featherweight.finetune.order import epoch_of
from featherweight.finetune.ranks import Ranks
from featherweight.finetune.settings import Settings
from featherweight.norms import foldable, moments, restate, watched

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
    share tensors with other modules stay in eval mode, and so does one in a call that gives it a single value a
    channel.

    Raises:
        UsageError: there is no BatchNorm for this.
    """
    if how.norms == "kept":
        yield
        return
    own = [module for _, module in foldable(net)]
    if device_of(net).type == "cpu" and any(isinstance(m, nn.SyncBatchNorm) for m in own):
        raise UsageError(f"{how.word}: SyncBatchNorm normalises batches on GPUs alone; leave norms as they are kept")
    most: dict[Any, int] = {}

    def count(module: Any, x: Tensor) -> None:
        most[module] = max(most.get(module, 0), x.numel() // module.num_features)

    with watched(own, count):
        found = moments(own, lambda: _run(net, how))
    norms = [m for m in own if most.get(m, 0) > 1]
    if not norms:
        what = "a BatchNorm that runs, with several values a channel in a batch and tensors of its own"
        raise UsageError(f"{how.word}: norms of every batch need {what}; there is none")
    for module in norms:
        restate(module, *found[module])
    with watched(norms, _by_batch):
        yield
        _settle(net, norms, how)
    for module in norms:
        restate(
            module.eval(), torch.zeros_like(module.running_mean), torch.full_like(module.running_var, 1 - module.eps)
        )


def _by_batch(module: Any, x: Tensor) -> None:
    module.training = x.numel() > module.num_features


def _settle(net: nn.Module, norms: list[Any], how: Settings) -> None:
    """Running statistics as the mean over batches; where no batch has any, they stay."""
    before = [(m.momentum, m.running_mean.clone(), m.running_var.clone()) for m in norms]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None
    _run(net, how)
    for module, (momentum, mean, variance) in zip(norms, before, strict=True):
        module.momentum = momentum
        if not module.num_batches_tracked:
            module.running_mean.copy_(mean)
            module.running_var.copy_(variance)


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
