"""Calibration and test data: anything that yields batches becomes a list of `Batch`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset, TensorDataset

from featherweight.errors import FeatherweightError, UsageError


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
            shapes = ", ".join(_describe(v) for v in chain(self.args, self.kwargs.values()))
            what = f"{type(error).__name__}: {error}"
            raise UsageError(f"the network does not accept the data ({shapes}): {what}") from error


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


def _describe(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def device_of(model: nn.Module) -> torch.device:
    """Where the network's first parameter lives."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
