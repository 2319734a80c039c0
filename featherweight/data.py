"""Calibration and test data: anything that yields batches becomes a list of `Batch`."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset, TensorDataset

from featherweight.errors import FeatherweightError, UsageError

SAMPLES = 1024  # at most, in one pass
MEMORY = 4 << 30  # bytes that such a pass may take, estimated


@final
@dataclass(frozen=True, slots=True)
class Batch:
    """One call of the network: `model(*args, **kwargs)`. target is None where the data have no labels."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any = None

    @property
    def size(self) -> int:
        """Samples in the batch: the first dimension of the first tensor, or the length of the first list."""
        for value in chain(self.args, self.kwargs.values()):
            if isinstance(value, PackedSequence):
                return int(value.batch_sizes[0])
            if isinstance(value, tuple | list) or (isinstance(value, Tensor) and value.ndim):
                return len(value)
        return 1 if self.args or self.kwargs else 0

    def to(self, device: torch.device) -> "Batch":
        return Batch(_move(self.args, device), _move(self.kwargs, device), _move(self.target, device))

    def run(self, model: nn.Module) -> Any:
        """The network's output.

        Raises:
            UsageError: the network fails on the batch, whatever it raises.
        """
        try:
            return model(*self.args, **self.kwargs)
        except FeatherweightError:
            raise
        except Exception as error:  # the user's network may raise anything
            shapes = ", ".join(describe(v) for v in chain(self.args, self.kwargs.values()))
            what = f"{type(error).__name__}: {error}"
            raise UsageError(f"the network does not accept the data ({shapes}){self._hint(model)}: {what}") from error

    def _hint(self, model: nn.Module) -> str:
        """What to do where a network failed on inputs that look like random numbers."""
        tensors = [v for v in chain(self.args, self.kwargs.values()) if isinstance(v, Tensor)]
        whole = any(isinstance(m, nn.Embedding | nn.EmbeddingBag) for m in model.modules())
        if not whole or any(not t.is_floating_point() for t in tensors):
            return ""
        return ", as its embeddings take whole numbers; give --data, not an input shape"


def batches(data: Any, batch_size: int = 128) -> list[Batch]:
    """Read data into memory as batches.

    `data` is a tensor of inputs, a tuple of tensors (inputs..., target), a Dataset (both batched here, in order), or an
    iterable of batches such as a DataLoader.
    A batch is a tensor; a tuple whose last item is the target; a dict of keyword arguments, `labels` being the target;
    or a `Batch`.

    Raises:
        UsageError: there is no sample, or an item is of another kind.
    """
    if isinstance(data, Tensor):
        found = [Batch((part,), {}) for part in data.split(batch_size)] if data.ndim and data.numel() else []
    elif isinstance(data, tuple) and len(data) > 1 and all(isinstance(t, Tensor) for t in data):
        if len({len(t) for t in data}) > 1:
            raise UsageError(f"tensors of one data set must be equally long, got {[len(t) for t in data]}")
        found = [_batch(item) for item in DataLoader(TensorDataset(*data), batch_size=batch_size)]
    elif isinstance(data, Dataset):
        found = _all(DataLoader(data, batch_size=batch_size))
    elif isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping):
        found = _all(data)
    else:
        raise UsageError(f"data must be a tensor, a Dataset or an iterable of batches, got {type(data).__name__}")
    if not found or sum(b.size for b in found) == 0:
        raise UsageError("the data hold no sample; give at least one batch (about 1,000 samples work well)")
    return found


def _all(source: Iterable[Any]) -> list[Batch]:
    try:
        return [_batch(item) for item in source]
    except FeatherweightError:
        raise
    except Exception as error:  # the user's data may raise anything
        hint = "; samples of different shapes need a DataLoader with a collate_fn" * isinstance(source, DataLoader)
        raise UsageError(f"reading the data failed: {type(error).__name__}: {error}{hint}") from error


def _batch(item: Any) -> Batch:
    match item:
        case Batch():
            return item
        case Tensor() | PackedSequence():
            return Batch((item,), {})
        case tuple() | list() if len(item) == 1:
            return Batch((item[0],), {})
        case tuple() | list() if len(item) > 1:
            return Batch(tuple(item[:-1]), {}, item[-1])
        case Mapping() if set(item) - {"labels"}:
            inputs = {k: v for k, v in item.items() if k != "labels"}
            return Batch((), inputs, item.get("labels"))
    raise UsageError(f"a batch must be a tensor, a tuple (inputs..., target) or a dict, got {type(item).__name__}")


# ---------------------------------------------------------------- cutting and joining
def split(data: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """The first three quarters and the last quarter of the samples; batches are cut where there are fewer than four."""
    parts = list(data)
    if len(parts) < 4:
        parts = [piece for batch in parts for piece in cut(batch, 4)]
    judged = -(-len(parts) // 4) if len(parts) > 1 else 0
    return parts[: len(parts) - judged], parts[len(parts) - judged :]


def cut(batch: Batch, pieces: int) -> list[Batch]:
    """Up to so many pieces of nearly equal size; one where some value is not per sample."""
    size = batch.size
    if not all(_sliceable(v, size) for v in (*batch.args, *batch.kwargs.values())):
        return [batch]
    edges = sorted({round(i * size / pieces) for i in range(pieces + 1)})
    return [
        Batch(
            tuple(v[a:b] for v in batch.args),
            {k: v[a:b] for k, v in batch.kwargs.items()},
            batch.target[a:b] if _sliceable(batch.target, size) else batch.target,
        )
        for a, b in pairwise(edges)
    ]


def resized(batch: Batch, samples: int) -> Batch | None:
    """A call of so many samples: the first ones, repeated where there are fewer. None where some value is not per
    sample."""
    size = batch.size
    if size == samples:
        return batch
    if not size or not all(_sliceable(v, size) for v in (*batch.args, *batch.kwargs.values())):
        return None
    order = [i % size for i in range(samples)]

    def own(value: Any) -> Any:
        return value[order] if isinstance(value, Tensor) else [value[i] for i in order]

    return Batch(tuple(own(v) for v in batch.args), {k: own(v) for k, v in batch.kwargs.items()})


def _sliceable(value: Any, size: int) -> bool:
    return (isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)) and len(value) == size


@torch.no_grad()
def stacked(data: Sequence[Batch], model: nn.Module, most: int | None = None) -> tuple[Batch, str]:
    """As many samples as fit in one batch, and what was left out: those whose shapes differ from the commonest, and
    those over `most` (SAMPLES) or MEMORY."""
    groups: dict[Any, list[Batch]] = {}
    for batch in data:
        groups.setdefault(_form(batch), []).append(batch)
    same = max(groups.values(), key=lambda g: sum(b.size for b in g))
    limit = min(SAMPLES if most is None else most, max(int(MEMORY / _bytes_a_sample(model, same[0])), 1))
    chosen, total = [], 0
    for batch in same:
        if chosen and total + batch.size > limit:
            break
        chosen.append(batch)
        total += batch.size
    whole = sum(b.size for b in data)
    note = f"used {total} of {whole} samples" if total < whole else ""
    joined = [_join(list(values), chosen) for values in zip(*(b.args for b in chosen), strict=True)]
    named = {k: _join([b.kwargs[k] for b in chosen], chosen) for k in same[0].kwargs}
    return Batch(tuple(joined), named).to(device_of(model)), note


def _form(batch: Batch) -> tuple:
    """What batches that can be joined have in common."""

    def one(value: Any) -> Any:
        if not _sliceable(value, batch.size):
            return id(value)  # shared by all batches of a group, or stands alone
        return (value.dtype, value.shape[1:]) if isinstance(value, Tensor) else "list"

    return tuple(one(v) for v in batch.args), tuple((k, one(v)) for k, v in batch.kwargs.items())


def _join(values: list[Any], batches: list[Batch]) -> Any:
    """One value for all the batches; what is not per sample is the same in all of them."""
    if len(values) == 1 or not all(_sliceable(v, b.size) for v, b in zip(values, batches, strict=True)):
        return values[0]
    return torch.cat(values) if isinstance(values[0], Tensor) else [item for value in values for item in value]


def _bytes_a_sample(model: nn.Module, batch: Batch) -> float:
    """Memory of a forward pass: about four times its largest output of one module."""
    largest = 1

    def look(_module: nn.Module, _args: Any, out: Any) -> None:
        nonlocal largest
        if isinstance(out, Tensor):
            largest = max(largest, out.numel() * out.element_size())

    with hooked([m.register_forward_hook(look) for m in model.modules()]):
        batch.to(device_of(model)).run(model)
    return 4 * largest / max(batch.size, 1)


def _move(value: Any, device: torch.device) -> Any:
    match value:
        case Tensor():
            return value.to(device)
        case PackedSequence():
            return value.to(device)  # pyright: ignore[reportArgumentType] - it takes what Tensor.to takes
        case tuple() if hasattr(value, "_fields"):
            return type(value)(*(_move(v, device) for v in value))
        case tuple() | list():
            return type(value)(_move(v, device) for v in value)
        case dict():
            return {k: _move(v, device) for k, v in value.items()}
    return value


@torch.no_grad()
def check(model: nn.Module, batch: Batch) -> None:
    """Run one batch, so that data that do not fit are refused before the first expensive step.

    Raises:
        UsageError: the network fails on the batch.
    """
    batch.to(device_of(model)).run(model)


def describe(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def hooked(handles: Sequence[Any]) -> ExitStack:
    """Removes the hooks at the end, whatever happens."""
    stack = ExitStack()
    for handle in handles:
        stack.callback(handle.remove)
    return stack


def device_of(model: nn.Module) -> torch.device:
    """Where the network's first parameter lives."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
