"""What a solver needs to know of a layer's inputs, and how it is collected."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from featherweight.calls import Calls, Inputs, eager
from featherweight.data import Batch, device_of
from featherweight.layers import Unit

SKETCH = 64
FEWEST = 4  # batches that tell how much they differ


@lru_cache(maxsize=8)
def _identity(cols: int) -> Tensor:
    """Shared by all layers of a width: it is never written to."""
    return torch.eye(cols, dtype=torch.float64)


@final
@dataclass(frozen=True, slots=True, eq=False)
class LayerStats:
    """Moments of a layer's inputs x; one set per row block (Unit.groups).

    gram: (blocks, cols, cols) float64, the mean of x xᵀ. mean: (blocks, cols) float64, the mean of x.
    samples: (blocks,) int64, how many x were seen. row_share: (rows,) float64 for embeddings, how often each row was
    used (sums to 1); None elsewhere, where every row sees every x. taps: columns that belong to one input channel, side
    by side: the positions of a convolution's kernel, 1 elsewhere. scatter: (blocks,) float64, an estimate of the sum of
    squared errors that so few samples leave in the covariances of different columns; None where it is not known.
    """

    gram: Tensor
    mean: Tensor
    samples: Tensor
    row_share: Tensor | None = None
    taps: int = 1
    scatter: Tensor | None = None

    @property
    def blocks(self) -> int:
        return self.gram.shape[0]

    @property
    def reached(self) -> bool:
        """Whether at least one sample with finite, non-zero inputs was seen."""
        return bool((self.samples > 0).any()) and self.finite and bool((self.gram.diagonal(dim1=1, dim2=2) > 0).any())

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.gram).all())

    @classmethod
    def white(cls, cols: int, blocks: int = 1, taps: int = 1) -> "LayerStats":
        """Uncorrelated inputs of unit power: what is assumed where there are no data."""
        eye = _identity(cols).expand(blocks, cols, cols)
        mean, samples = torch.zeros(blocks, cols, dtype=torch.float64), torch.zeros(blocks, dtype=torch.int64)
        return cls(eye, mean, samples, taps=taps)


def shrink_(stats: LayerStats) -> LayerStats:
    """The gram, in place, with the covariances of different columns multiplied by 1 - alpha; means and variances stay.

    alpha = scatter / sum of their squares (1 at most) leaves the least expected squared error: Ledoit and Wolf, "A
    well-conditioned estimator for large-dimensional covariance matrices", 2004, with the diagonal as target (Schäfer
    and Strimmer, 2005). Error feedback follows covariances, also those that only these samples have
    (docs/decisions/0020-shrunk-covariances.md).
    """
    if stats.scatter is None or not stats.finite:
        return stats
    diagonal = stats.gram.diagonal(dim1=1, dim2=2).clone()
    power = stats.mean.unsqueeze(2) * stats.mean.unsqueeze(1)
    rest = (stats.gram - power).square_().sum(dim=(1, 2)) - (diagonal - stats.mean.square()).square().sum(dim=1)
    alpha = torch.where(rest > 0, stats.scatter / rest.clamp(min=1e-300), 0.0).clamp(0, 1)
    stats.gram.lerp_(power, alpha[:, None, None]).diagonal(dim1=1, dim2=2).copy_(diagonal)
    return replace(stats, scatter=None)


def merge(a: LayerStats, b: LayerStats) -> LayerStats:
    """Statistics of the union of two disjoint sets of samples. Associative."""
    samples = a.samples + b.samples
    share = b.samples.double() / samples.clamp(min=1)
    row_share = b.row_share if a.row_share is None else a.row_share  # a shard that reached nothing has none
    if a.row_share is not None and b.row_share is not None:
        row_share = torch.lerp(a.row_share, b.row_share, share[0])
    return LayerStats(
        torch.lerp(a.gram, b.gram, share[:, None, None].expand_as(a.gram)),
        torch.lerp(a.mean, b.mean, share[:, None].expand_as(a.mean)),
        samples,
        row_share,
        a.taps,
        None if a.scatter is None or b.scatter is None else a.scatter * (1 - share) ** 2 + b.scatter * share**2,
    )


@final
class _Spread:
    """How much the covariance C_b of a batch differs from one batch to another, in squared Frobenius norms without
    diagonals. Batches are independent samples, also where the positions within an image are not. Of a C_b wider than
    SKETCH only its product with SKETCH vectors of random signs is kept: what their squared lengths tell of the norm is
    right on average."""

    def __init__(self, blocks: int, cols: int) -> None:
        if cols <= SKETCH:
            self.signs = torch.eye(cols)
        else:
            signs = torch.randint(0, 2, (cols, SKETCH), generator=torch.Generator().manual_seed(0))
            self.signs = (signs * 2 - 1) / SKETCH**0.5
        self.shape = blocks, cols
        self.sum = self.sum_diagonal = torch.zeros(())
        self.squares = torch.zeros(blocks, dtype=torch.float64)
        self.weight, self.weights = torch.zeros(blocks, dtype=torch.float64), torch.zeros(blocks, dtype=torch.float64)
        self._open()

    def _open(self) -> None:
        blocks, cols = self.shape
        self.product = torch.zeros(blocks, cols, self.signs.shape[1], dtype=torch.float64)
        self.diagonal, self.total = (torch.zeros(blocks, cols, dtype=torch.float64) for _ in range(2))
        self.count = torch.zeros(blocks, 1, dtype=torch.float64)

    def add(self, blocks: slice, second: Tensor, total: Tensor, count: int) -> None:
        """Sums over `count` samples x of a batch, of x xᵀ and of x."""
        self.product[blocks] += (second @ self.signs.to(second)).cpu()
        self.diagonal[blocks] += second.diagonal(dim1=1, dim2=2).cpu()
        self.total[blocks] += total.cpu()
        self.count[blocks] += count

    def close(self) -> None:
        """The batch is over."""
        if not bool(self.count.any()):
            return
        n = self.count.clamp(min=1)
        mean = self.total / n
        product = self.product / n[:, :, None] - mean[:, :, None] * (mean @ self.signs.double())[:, None, :]
        diagonal = self.diagonal / n - mean.square()
        n = self.count[:, 0]
        self.sum = self.sum + n[:, None, None] * product
        self.sum_diagonal = self.sum_diagonal + n[:, None] * diagonal
        self.squares += n.square() * _outside(product, diagonal)
        self.weight += n
        self.weights += n.square()
        self._open()

    def scatter(self) -> Tensor | None:
        """Of the mean over all batches; None where there were fewer than FEWEST."""
        share = self.weights / self.weight.clamp(min=1).square()  # 1 / batches, where they are of one size
        if not bool((share * FEWEST < 1 + 1e-9).all()) or self.sum.ndim == 0:
            return None
        n = self.weight.clamp(min=1)
        mean = _outside(self.sum / n[:, None, None], self.sum_diagonal / n[:, None])
        return ((self.squares / n.square() - share * mean) / (1 - share)).clamp(min=0)


def _outside(product: Tensor, diagonal: Tensor) -> Tensor:
    """(blocks,) squared norms without the diagonals."""
    return product.square().sum(dim=(1, 2)) - diagonal.square().sum(dim=1)


@final
class _Sums:
    """Running sums of one unit."""

    def __init__(self, unit: Unit, spill: Path | None) -> None:
        rows, cols = unit.view.matrix_shape
        self.gram: Tensor | None = None
        self.spread = _Spread(unit.groups, cols)
        self.file = spill
        self.shape = (unit.groups, cols, cols)
        self.taps = unit.taps
        self.total = torch.zeros(unit.groups, cols, dtype=torch.float64)
        self.samples = torch.zeros(unit.groups, dtype=torch.int64)
        self.rows = torch.zeros(rows, dtype=torch.float64)

    def add(self, block: int, x: Tensor) -> None:
        if self.gram is None:
            self.gram = zeros(self.shape, self.file)
        blocks = slice(block, block + x.shape[0])
        x = x if x.dtype == torch.float64 else x.float()
        second = (x[0] @ x[0].T).unsqueeze(0) if x.shape[0] == 1 else x @ x.mT
        self.spread.add(blocks, second, x.sum(dim=2), x.shape[2])
        self.gram[blocks] += second.cpu()
        self.total[blocks] += x.sum(dim=2).cpu().double()
        self.samples[blocks] += x.shape[2]

    def add_rows(self, indices: Tensor) -> None:
        self.rows += torch.bincount(indices.reshape(-1).cpu(), minlength=len(self.rows))

    def stats(self) -> LayerStats:
        blocks, cols, _ = self.shape
        if self.gram is None:  # never multiplied: an embedding, or no sample reached it
            white, used = LayerStats.white(cols, blocks, self.taps), self.rows.sum()
            share = self.rows / used if used > 0 else None
            return LayerStats(white.gram, white.mean, white.samples + int(used), share, self.taps)
        count = self.samples.clamp(min=1).double()
        self.gram /= count[:, None, None]
        mean = self.total / count[:, None]
        return LayerStats(self.gram, mean, self.samples, taps=self.taps, scatter=self.spread.scatter())


def zeros(shape: tuple[int, ...], file: Path | None, dtype: torch.dtype = torch.float64) -> Tensor:
    """Zeros in memory, or in a file that the operating system pages in and out."""
    if file is None:
        return torch.zeros(shape, dtype=dtype)
    size = torch.Size(shape).numel()
    return torch.from_file(str(file), shared=True, size=size, dtype=dtype).reshape(shape)


@torch.no_grad()
def capture(
    model: nn.Module,
    data: Sequence[Batch],
    units: Sequence[Unit],
    *,
    spill: Path | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, LayerStats]:
    """Run the network over the data and collect each unit's input moments, by unit name.

    Products are formed in the network's own precision for a piece of a batch and summed in float64. Two numbers a
    column pair are held for each unit; with `spill`, an existing empty directory, they live in files there instead of
    memory (keep the directory as long as the result is used). The network must be in eval mode.
    """
    sums = {u.name: _Sums(u, spill / f"{i}.gram" if spill else None) for i, u in enumerate(units)}

    def on_call(unit: Unit, inputs: Inputs | Tensor) -> None:
        if isinstance(inputs, Tensor):
            sums[unit.name].add_rows(inputs)
        else:
            for block, x in inputs:
                sums[unit.name].add(block, x)

    device = device_of(model)
    for batch in data:
        with eager(), Calls(model, units, on_call):
            batch.to(device).run(model)
        for s in sums.values():
            s.spread.close()
        on_batch()
    return {name: s.stats() for name, s in sums.items()}
