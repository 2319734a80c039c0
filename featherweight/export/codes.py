"""Weights as int8 codes with a scale for every output: those of the file where they fit, else the nearest ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from onnx import NodeProto

from featherweight.artifact.schema import StoredUnit
from featherweight.export.structure import channel_axis
from featherweight.methods.grids import GridSpec, choose
from featherweight.weights import Grid, Sparse
from featherweight.weights.grid import symmetric_zero

NEAR = 1e-4  # of a row's largest weight: how far a folded row may be from the file's, scaled


@final
@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """codes: int8, in the shape of the weight. scale: (outputs,) float32, positive. axis: of the outputs. exact:
    whether every code is the file's."""

    codes: np.ndarray
    scale: np.ndarray
    axis: int
    exact: bool

    def dense(self) -> np.ndarray:
        """float64, in the shape of the weight."""
        shape = [1] * self.codes.ndim
        shape[self.axis] = -1
        return self.codes * self.scale.astype(np.float64).reshape(shape)


def codes_of(node: NodeProto, weight: np.ndarray, units: Mapping[str, StoredUnit]) -> Codes:
    """Of a weighted node. weight: float32, as the graph has it, BatchNorm folded. units: of the file, by every name."""
    axis = channel_axis(node)
    rows = np.moveaxis(weight, axis, 0).astype(np.float64)
    matrix = rows.reshape(len(rows), -1)
    unit = units.get(node.input[1])
    found = None if unit is None else _of_the_file(matrix, unit)
    codes, scale = found or _nearest(matrix)
    shaped = np.moveaxis(codes.reshape(rows.shape), 0, axis)
    return Codes(np.ascontiguousarray(shaped), scale, axis, found is not None)


def table_of(values: np.ndarray, unit: StoredUnit) -> Codes | None:
    """Of a table of rows that are looked up; None where they are not the file's codes times one scale a row."""
    found = _of_the_file(values.astype(np.float64), unit) if values.ndim == 2 else None
    return None if found is None else Codes(*found, 0, True)


def _of_the_file(matrix: np.ndarray, unit: StoredUnit) -> tuple[np.ndarray, np.ndarray] | None:
    """The file's codes, 0 where it keeps no weight, and its scales times what BatchNorm multiplies a row by; None where
    the file has no grid with one scale a row, codes beyond int8, or rows that are no multiples of the graph's."""
    sparse = unit.weight if isinstance(unit.weight, Sparse) else None
    grid = unit.weight if sparse is None else sparse.values
    if not isinstance(grid, Grid) or grid.scale.shape[1] != 1:
        return None
    zero = symmetric_zero(grid.nbits) if grid.zero is None else grid.zero.double()
    whole = (grid.codes.double() - zero).numpy()
    whole = whole if sparse is None else np.where(sparse.mask.numpy(), whole, 0)
    file = unit.tensor().double().flatten(1).numpy()
    if file.shape != matrix.shape or (whole != np.round(whole)).any() or len(whole) != len(matrix):
        return None
    lengths = (file * file).sum(1)
    factor = (file * matrix).sum(1) / np.where(lengths > 0, lengths, 1)
    off = np.abs(file * factor[:, None] - matrix).max(1)
    if (off > NEAR * np.abs(matrix).max(1)).any():
        return None
    signed = whole * np.where(factor < 0, -1, 1)[:, None]
    if signed.min() < -128 or signed.max() > 128:
        return None
    scale = np.abs(factor) * grid.scale.double().numpy().reshape(-1)
    codes = signed.reshape(matrix.shape).clip(-128, 127)  # -128, turned round by a negative BatchNorm, becomes 127
    return codes.astype(np.int8), _positive(scale)


def _nearest(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    w = torch.from_numpy(np.ascontiguousarray(matrix))
    points = choose(w, GridSpec(8, symmetric=True))
    codes = points.round(w).numpy().astype(np.int16) - 128
    return codes.astype(np.int8), _positive(points.scale.double().numpy().reshape(-1))


def _positive(scale: np.ndarray) -> np.ndarray:
    return np.maximum(scale, np.finfo(np.float32).tiny).astype(np.float32)
