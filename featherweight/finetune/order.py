"""The batches of an epoch: every rank its share, the same ones in a run that was stopped and goes on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from featherweight.data import Batch, batches
from featherweight.errors import UsageError
from featherweight.finetune.ranks import Ranks
from featherweight.finetune.settings import Settings

S = TypeVar("S", bound=Settings)


@final
@dataclass(frozen=True, slots=True)
class Epoch:
    """The batches of this rank, as an iterator that may be read once, and how many there are; where it is to start
    later, those before are counted but not given."""

    count: int
    batches: Iterator[Batch]


def kept(how: S) -> S:
    """With data that can be read only once in memory."""
    if not isinstance(how.data, Iterator):
        return how
    return replace(how, data=batches(how.data, how.batch_size))  # pyright: ignore - every one is a dataclass


def epoch_of(how: Settings, epoch: int, ranks: Ranks, start: int = 0) -> Epoch:
    """Of a Dataset every rank takes its samples of every batch, of anything else its batches. What cannot be shared out
    evenly at the end, fewer samples or batches than ranks, is left out.

    Raises:
        UsageError: there is no sample, or none for some rank.
    """
    found = _shuffled(how, epoch, ranks, start) if _is_map(how.data) else _as_it_is(how, epoch, ranks, start)
    if found.count == 0:
        what = "the data hold no sample" if ranks.count == 1 else f"the data are too few for {ranks.count} processes"
        what += "; a Dataset is shared by samples, anything else by batches: make those smaller" * (ranks.count > 1)
        raise UsageError(f"{how.word}: {what}")
    return found


def _is_map(data: Any) -> bool:
    return isinstance(data, Dataset) and not isinstance(data, IterableDataset)


def _shuffled(how: Settings, epoch: int, ranks: Ranks, start: int) -> Epoch:
    size = len(how.data)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(_seed(how, epoch))).tolist()
    whole = how.batch_size * ranks.count
    parts = [order[i : i + whole][ranks.own :: ranks.count] for i in range(0, size, whole) if size - i >= ranks.count]
    loader = DataLoader(how.data, batch_sampler=parts[start:])
    numbers = range(start * ranks.count + ranks.own, len(parts) * ranks.count, ranks.count)
    return Epoch(len(parts), (item for _, item in _read(how, epoch, loader, numbers)))


def _as_it_is(how: Settings, epoch: int, ranks: Ranks, start: int) -> Epoch:
    source: Any = how.data
    if not isinstance(source, DataLoader) or isinstance(source.dataset, IterableDataset):
        source = batches(source, how.batch_size)
    count = len(source) // ranks.count
    every = _read(how, epoch, source, range(count * ranks.count))
    own = (item for i, item in every if i % ranks.count == ranks.own and i // ranks.count >= start)
    return Epoch(count, own)


def _read(how: Settings, epoch: int, source: Iterable[Any], numbers: Iterable[int]) -> Iterator[tuple[int, Batch]]:
    """Numbered batches. Each is read with torch's random numbers set to its own, whatever was read before, so that
    augmentation is the same in a run that goes on; the caller's random numbers stay as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_seed(how, epoch))
        items = iter(source)
    for number in numbers:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_seed(how, epoch, number + 1))
            item = next(items, None)
            if item is None:
                raise UsageError(f"{how.word}: the data hold fewer batches than their length says")
            batch = batches([item])[0]
            batch = mixed(batch, how.mix) if how.mix else batch
        yield number, batch


def mixed(batch: Batch, share: float) -> Batch:
    """That share of the samples, each between itself and another of the batch, anywhere on the line (mixup: Zhang et
    al. 2018, 1710.09412). Targets stay as they are, and are of no use any more.

    Raises:
        UsageError: the inputs hold no tensor of real numbers with a sample in every entry of its first dimension.
    """
    count = batch.size
    own = 1 - torch.rand(count) * (torch.rand(count) < share)
    others = torch.randperm(count)

    def fits(value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1 and len(value) == count

    def mix(value: Any) -> Any:
        if not fits(value):
            return value
        part = own.to(value).reshape(-1, *[1] * (value.ndim - 1))
        return part * value + (1 - part) * value[others.to(value.device)]

    if not any(map(fits, [*batch.args, *batch.kwargs.values()])):
        raise UsageError("samples are mixed where inputs are tensors of real numbers, and these are not; leave out mix")
    return Batch(tuple(map(mix, batch.args)), {k: mix(v) for k, v in batch.kwargs.items()}, batch.target)


def _seed(how: Settings, epoch: int, number: int = 0) -> int:
    return ((how.seed * 1_000_003 + epoch) * 1_000_003 + number) % 2**63
