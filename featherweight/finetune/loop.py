"""Train what is continuous in a compressed network towards the dense one. `descend` is the loop of any training.

Codes, masks and indices stay as they are, unless codes are asked to move; the stored numbers behind them
(scales, books, kept fp16 values), and the biases, norm weights and other parameters that were not compressed are
trained through the weights' own decoding. The loss is
the distance to the dense network's outputs (distillation: Hinton et al., 1503.02531, at temperature 1), with labels the
cross-entropy beside it. The network stays in eval mode: BatchNorm keeps its corrected statistics, so a few epochs on a
little data cannot spoil them, unless it is asked to take those of every batch.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from featherweight.artifact import StoredUnit
from featherweight.calls import eager
from featherweight.data import Batch, describe, device_of
from featherweight.errors import UsageError
from featherweight.finetune import checkpoint
from featherweight.finetune.checkpoint import Place
from featherweight.finetune.order import S, epoch_of, kept
from featherweight.finetune.ranks import Ranks
from featherweight.finetune.settings import Finetune, Settings, Trained
from featherweight.finetune.statistics import running, statistics
from featherweight.finetune.variables import Variable, Variables
from featherweight.layers import Unit
from featherweight.repair.distance import energy, is_classification, outputs
from featherweight.weights import Weight

WARM = 0.05  # of all steps: the rate rises, as Adam's first steps are of full size whatever the gradient
OFTEN = 30.0  # seconds between checkpoints within an epoch, at least

Progress: TypeAlias = Callable[[str, int, int], None]


def quiet(stage: str, done: int, total: int) -> None:
    pass


@final
@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What one training trains.

    dense: the teacher, on the device to train on. small: the student, whose parameters are those of `state` in every
    step. variables: what is trained. start: all that is given, by name; facts: likewise, as JSON; both only to tell one
    training from another. loss: of the student's output and the batch's target, in place of the distance to the
    teacher. penalty: what the loss gets beside it, from the state; it is no part of the losses that are reported.
    begin: called before the first batch of every epoch, also in a run that goes on there, but not in one that goes on
    within the epoch. kept, restore: what a run that goes on needs beside the variables.
    """

    dense: nn.Module
    small: nn.Module
    variables: Sequence[Variable]
    state: Callable[[], dict[str, Tensor]]
    start: Callable[[], dict[str, Tensor]]
    facts: Mapping[str, Any]
    loss: Callable[[Any, Any], Tensor] | None = None
    penalty: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    begin: Callable[[], None] = lambda: None
    kept: Callable[[], dict[str, Tensor]] = dict
    restore: Callable[[dict[str, Tensor]], None] = lambda kept: None


def train(
    dense: nn.Module,
    small: nn.Module,
    units: Sequence[Unit | StoredUnit],
    weights: Mapping[str, Weight],
    how: Finetune,
    progress: Progress = quiet,
) -> tuple[dict[str, Weight], Trained]:
    """Train `small`, a copy of `dense` with `weights` (by their unit's first name) in place, in place; returns its new
    weights, of the same size as the old ones. Where `torch.distributed` is initialised, every process must call this.

    Raises:
        UsageError: the data have no sample or no labels that are asked for, the loss is no number, or the checkpoint is
            of something else.
    """
    with statistics(small, how):
        variables = Variables.of(small, units, weights, how.moves)

        def start() -> dict[str, Tensor]:
            fields = {f"weight.{n}.{field}": t for n, w in weights.items() for field, t in w.tensors().items()}
            return started(dense, variables.all()) | fields

        task = Task(dense, small, variables.all(), lambda: variables.state(small), start, {})
        losses = descend(task, how, progress)
        found = variables.finish(small)
    return found, Trained(losses)


def descend(task: Task, how: Settings, progress: Progress = quiet) -> tuple[float, ...]:
    """The loop: Adam on the task's variables. Returns the mean loss of every epoch.

    Raises:
        UsageError: see `train`.
    """
    ranks, device = Ranks.now(), device_of(task.small)
    steps = [v.step for v in task.variables]
    optimizer = torch.optim.Adam([{"params": [v.step], "pace": v.pace} for v in task.variables], lr=how.learning_rate)
    path = None if how.checkpoint is None else Path(how.checkpoint)
    mark: dict[str, Any] = {}
    place, saved, last = Place(), time.monotonic(), None
    if path is not None:
        mark = checkpoint.mark_of(how, ranks.count, task.start()) | dict(task.facts)
        if data := ranks.from_first(checkpoint.content(path, how.word) if ranks.first else b"", device):
            place, found = checkpoint.resume(data, path, mark, steps, optimizer)
            task.restore(found)

    def save() -> None:
        nonlocal saved
        if path is not None and ranks.first:
            checkpoint.save(path, how.word, mark, place, steps, optimizer, task.kept())
            saved = time.monotonic()

    for epoch in range(place.epoch, how.epochs):
        if place.batch == 0:
            task.begin()
        found = epoch_of(how, epoch, ranks, place.batch)
        place = replace(place, each=place.each or found.count)
        total = how.epochs * place.each
        for sent in found.batches:
            for group in optimizer.param_groups:
                group["lr"] = how.learning_rate * group["pace"] * _rate(place.steps, total)
            batch = sent.to(device)
            last = _takes_channels_last(task.dense, batch, how) if last is None else last
            batch = _channels_last(batch) if last else batch
            optimizer.zero_grad()
            # cuDNN has no gradients of recurrent layers in eval mode
            with eager(), torch.backends.cudnn.flags(enabled=False):
                state = task.state()
                loss = _lost(task, state, batch, how)
                (loss if task.penalty is None else loss + task.penalty(state)).backward()
            mean, samples = ranks.weighted(loss.detach(), batch.size, steps)
            if not torch.isfinite(mean):
                cause = f"the loss is {mean.item()} in epoch {epoch + 1}; lower the learning rate"
                raise UsageError(f"{how.word}: {cause}")
            optimizer.step()
            lost, seen = place.lost + float(mean) * samples, place.seen + samples
            place = replace(place, batch=place.batch + 1, steps=place.steps + 1, lost=lost, seen=seen)
            progress(how.stage, place.steps, total)
            if time.monotonic() > saved + OFTEN:
                save()
        losses = (*place.losses, place.lost / max(place.seen, 1))
        place = replace(place, epoch=epoch + 1, batch=0, lost=0.0, seen=0, losses=losses)
        save()
    return place.losses


@torch.no_grad()
def rehearse(net: nn.Module, how: S) -> S:
    """One batch through the network and the loss, so that data that do not fit are refused before the first expensive
    step. Returns the settings, with data that can be read only once in memory.

    Raises:
        UsageError: they do not fit, or the checkpoint is no checkpoint.
    """
    how = kept(how)
    if how.checkpoint is not None:
        checkpoint.content(Path(how.checkpoint), how.word)
    batch = next(epoch_of(how, 0, Ranks.now()).batches).to(device_of(net))
    with running(net, how):
        want = _floats(batch.run(net))
    if not want:
        raise UsageError("the network's output holds no tensor of real numbers: nothing to train towards")
    _loss(want, want, batch.target, how)
    return how


def _lost(task: Task, state: dict[str, Tensor], batch: Batch, how: Settings) -> Tensor:
    """The loss of the small network as it is now."""
    if task.loss is not None:
        with running(task.small, how):
            found = task.loss(functional_call(task.small, state, batch.args, batch.kwargs), batch.target)
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise UsageError(f"{how.word}: a loss must be one number, a tensor, and yours is {describe(found)}")
        return found.reshape(())
    with torch.no_grad(), running(task.dense, how):
        want = _floats(batch.run(task.dense))
    with running(task.small, how):
        got = _floats(functional_call(task.small, state, batch.args, batch.kwargs))
    return _loss(want, got, batch.target, how)


def _floats(value: Any) -> list[Tensor]:
    """A network's outputs, at least float32."""
    return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in outputs(value)]


@torch.no_grad()
def _takes_channels_last(net: nn.Module, batch: Batch, how: Settings) -> bool:
    """Whether the network runs on images in that memory order; a `view` in it may refuse."""
    try:
        with running(net, how):
            _channels_last(batch).run(net)
    except UsageError:
        return False
    return True


def _channels_last(batch: Batch) -> Batch:
    """With the channels of images last in memory, as convolutions like them."""

    def last(value: Any) -> Any:
        image = isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()
        return value.contiguous(memory_format=torch.channels_last) if image else value

    return Batch(tuple(map(last, batch.args)), {k: last(v) for k, v in batch.kwargs.items()}, batch.target)


def _rate(step: int, total: int) -> float:
    """Share of the learning rate: up in a line, down as a cosine; the first step is never 0."""
    rise = min((step + 1) / max(WARM * total, 1.0), 1.0)
    return rise * (1 + math.cos(math.pi * min(step / total, 1.0))) / 2


def started(dense: nn.Module, variables: Sequence[Variable]) -> dict[str, Tensor]:
    """The teacher and what the variables start from, by name."""
    found = {f"dense.{n}": t for n, t in dense.state_dict().items() if isinstance(t, Tensor)}
    return found | {f"variable.{i}": v.start for i, v in enumerate(variables)}


def _loss(want: list[Tensor], got: list[Tensor], target: Any, how: Settings) -> Tensor:
    labels = how.labels
    if is_classification(want, target):
        distance = F.kl_div(got[0].log_softmax(1), want[0].log_softmax(1), reduction="batchmean", log_target=True)
        return distance if labels == 0 else (1 - labels) * distance + labels * F.cross_entropy(got[0], target)
    if labels > 0:
        raise UsageError(f"{how.word} with labels needs one class label a sample and one score a class")
    lost = torch.stack([(g - w).square().sum() for g, w in zip(got, want, strict=True)]).sum()
    return lost / max(energy(want, target), 1e-30)
