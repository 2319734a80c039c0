"""Layers to solve: random weights, and inputs that are correlated like those of a trained network."""

import torch
from torch import Tensor

from featherweight.stats import LayerStats


def inputs(cols: int, samples: int, seed: int, blocks: int = 1) -> Tensor:
    """(blocks, samples, cols) float64: a few strong directions, column powers that differ, a mean that is not zero."""
    make = torch.Generator().manual_seed(seed)
    noise = torch.randn(blocks, samples, cols, generator=make, dtype=torch.float64)
    shared = torch.randn(blocks, samples, cols, generator=make, dtype=torch.float64)
    mixing = torch.randn(blocks, cols, cols, generator=make, dtype=torch.float64)
    strength = 2.0 ** -torch.arange(cols, dtype=torch.float64) * 4
    power = 0.3 + 2 * torch.rand(blocks, 1, cols, generator=make, dtype=torch.float64)
    return ((shared * strength) @ mixing + 0.5 * noise + 0.2) * power


def stats_of(x: Tensor, row_share: Tensor | None = None) -> LayerStats:
    """Moments of inputs (blocks, samples, cols)."""
    return LayerStats(x.mT @ x / x.shape[1], x.mean(dim=1), torch.full((x.shape[0],), x.shape[1]), row_share)


def weights(rows: int, cols: int, seed: int) -> Tensor:
    make = torch.Generator().manual_seed(seed + 10_000)
    return torch.randn(rows, cols, generator=make, dtype=torch.float64) * 0.1


def problem(rows: int, cols: int, seed: int = 0, blocks: int = 1, samples: int = 0) -> tuple[Tensor, LayerStats]:
    """(w float64, stats) of a layer with enough samples for a positive definite Hessian."""
    return weights(rows, cols, seed), stats_of(inputs(cols, samples or 4 * cols + 8, seed, blocks))


def dependent(cols: int, seed: int, samples: int) -> LayerStats:
    """Fewer samples than columns: a Hessian without an inverse."""
    make = torch.Generator().manual_seed(seed)
    return stats_of(torch.randn(1, samples, cols, generator=make, dtype=torch.float64))


def row_hessians(w: Tensor, hessian: Tensor) -> list[tuple[int, Tensor]]:
    """(row, Hessian of its block) for every row."""
    rows = w.shape[0] // hessian.shape[0]
    return [(r, hessian[r // rows]) for r in range(w.shape[0])]
