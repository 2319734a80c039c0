"""Train what is continuous in a compressed network towards the dense one.

Codes, masks and indices stay as they are; the stored numbers behind them (scales, kept fp16 values), and the biases,
norm weights and other parameters that were not compressed are trained through the weights' own decoding. The loss is
the distance to the dense network's outputs (distillation: Hinton et al., 1503.02531, at temperature 1), with labels the
cross-entropy beside it. The network stays in eval mode: BatchNorm keeps its corrected statistics, so a few epochs on a
little data cannot spoil them.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset

from featherweight.calls import eager
from featherweight.data import Batch, batches, device_of
from featherweight.errors import UsageError, require
from featherweight.layers import Unit
from featherweight.repair.distance import energy, is_classification, outputs
from featherweight.weights import Sparse, Weight

SMALLEST = 0.01  # of a tensor: its root mean square counts as at least this, so that zeros can move


@final
@dataclass(frozen=True, slots=True)
class Finetune:
    """data: training inputs, as `compress` takes them; a Dataset is shuffled every epoch, anything else read again.
    learning_rate: of Adam, relative to the root mean square of every tensor, falling to zero as a cosine. labels: share
    of the loss that is cross-entropy with the data's labels."""

    data: Any
    epochs: int = 5
    learning_rate: float = 1e-3
    batch_size: int = 128
    labels: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(type(self.epochs) is int and self.epochs > 0, "epochs must be a whole number above 0", self.epochs)
        require(0 < self.learning_rate < math.inf, "the learning rate must be above 0", self.learning_rate)
        require(0 <= self.labels <= 1, "labels must be a share, 0 to 1", self.labels)


@final
@dataclass(frozen=True, slots=True)
class Trained:
    """Mean loss of every epoch, first to last."""

    losses: tuple[float, ...]


def finetune(
    dense: nn.Module,
    small: nn.Module,
    units: Sequence[Unit],
    weights: Mapping[str, Weight],
    how: Finetune,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> tuple[dict[str, Weight], Trained]:
    """Train `small`, a copy of `dense` with `weights` (by unit name) in place, in place; returns its new weights, of
    the same size as the old ones.

    Raises:
        UsageError: the data have no sample or no labels that are asked for, or the loss is no number.
    """
    device = device_of(small)
    continuous = {u.name: _continuous(weights[u.name]) for u in units}
    compressed = {n for u in units for n in u.names}
    others = {n: p for n, p in small.named_parameters() if n not in compressed and p.is_floating_point()}
    start = {(u.name, f): t.float() for u in units for f, t in continuous[u.name].items()}
    start |= {("", n): p.detach().clone().to(_exact(p)) for n, p in others.items()}
    size = {k: _size(t) for k, t in start.items()}
    steps = {k: torch.zeros_like(t).requires_grad_() for k, t in start.items()}

    def current(key: tuple[str, str]) -> Tensor:
        return start[key] + size[key] * steps[key]

    def decoded() -> dict[str, Tensor]:
        state = {n: current(("", n)).to(p.dtype) for n, p in others.items()}
        for u in units:
            weight = _replaced(weights[u.name], {f: current((u.name, f)) for f in continuous[u.name]})
            state[u.name] = u.view.tensor(weight.dense()).to(small.get_parameter(u.name))
        return state

    optimizer = torch.optim.Adam(list(steps.values()), lr=how.learning_rate)
    losses: list[float] = []
    done, each = 0, 0
    for epoch in range(how.epochs):
        here = list(_epoch(how, epoch))
        each, lost = each or len(here), 0.0
        for sent in here:
            for group in optimizer.param_groups:
                group["lr"] = how.learning_rate * (1 + math.cos(math.pi * min(done / (how.epochs * each), 1.0))) / 2
            batch = sent.to(device)
            with torch.no_grad():
                want = list(outputs(batch.run(dense)))
            # cuDNN has no gradients of recurrent layers in eval mode
            with eager(), torch.backends.cudnn.flags(enabled=False):
                out = functional_call(small, decoded(), batch.args, batch.kwargs)
                loss = _loss(want, list(outputs(out)), batch.target, how.labels)
                if not torch.isfinite(loss):
                    cause = f"the loss is {loss.item()} in epoch {epoch + 1}; lower the learning rate"
                    raise UsageError(f"finetuning: {cause}")
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            done, lost = done + 1, lost + float(loss.detach()) * batch.size
            progress("finetune", done, how.epochs * each)
        losses.append(lost / max(sum(b.size for b in here), 1))
    with torch.no_grad():
        for n, p in others.items():
            p.copy_(current(("", n)))
        found = {
            u.name: _replaced(
                weights[u.name],
                {f: current((u.name, f)).to(t.dtype).cpu() for f, t in continuous[u.name].items()},
            )
            for u in units
        }
        for u in units:
            small.get_parameter(u.name).copy_(u.view.tensor(found[u.name].dense()))
    return found, Trained(tuple(losses))


@torch.no_grad()
def rehearse(net: nn.Module, how: Finetune) -> None:
    """One batch through the network and the loss, so that data that do not fit are refused before the first expensive
    step.

    Raises:
        UsageError: they do not.
    """
    batch = next(_epoch(how, 0)).to(device_of(net))
    want = list(outputs(batch.run(net)))
    if not want:
        raise UsageError("the network's output holds no tensor of real numbers: nothing to finetune towards")
    _loss(want, want, batch.target, how.labels)


def _exact(parameter: Tensor) -> torch.dtype:
    """What half precision is trained in."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _size(tensor: Tensor) -> float:
    """The root mean square, what a step of 1 moves a value by."""
    return max(math.sqrt(float(tensor.double().square().sum()) / max(tensor.numel(), 1)), SMALLEST)


def _continuous(weight: Weight) -> dict[str, Tensor]:
    """What `weight.trainable` names, by field."""
    inner = weight.values if isinstance(weight, Sparse) else weight
    return {field: getattr(inner, field) for field in weight.trainable()}


def _replaced(weight: Weight, tensors: dict[str, Tensor]) -> Weight:
    """The same weight with other continuous tensors."""
    if isinstance(weight, Sparse):
        return replace(weight, values=replace(weight.values, **tensors))
    return replace(weight, **tensors)  # pyright: ignore[reportArgumentType] - every kind is a dataclass


def _epoch(how: Finetune, epoch: int) -> Iterator[Batch]:
    if isinstance(how.data, Dataset):
        random = torch.Generator().manual_seed(how.seed * 1_000_003 + epoch)
        loader = DataLoader(how.data, batch_size=how.batch_size, shuffle=True, generator=random)
        yield from (b for item in loader for b in batches([item], how.batch_size))
    else:
        yield from batches(how.data, how.batch_size)


def _loss(want: list[Tensor], got: list[Tensor], target: Any, labels: float) -> Tensor:
    if is_classification(want, target):
        distance = F.kl_div(got[0].log_softmax(1), want[0].log_softmax(1), reduction="batchmean", log_target=True)
        return distance if labels == 0 else (1 - labels) * distance + labels * F.cross_entropy(got[0], target)
    if labels > 0:
        raise UsageError("finetuning with labels needs one class label a sample and one score a class")
    lost = torch.stack([(g - w).square().sum() for g, w in zip(got, want, strict=True)]).sum()
    return lost / max(energy(want, target), 1e-30)
