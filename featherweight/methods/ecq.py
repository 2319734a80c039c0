"""Entropy-constrained quantization with error feedback: one step for the whole matrix, codes that cost few bits.

A grid whose codes are entropy-coded needs no narrow range: its codes take as many bits as they carry information. Every
code is chosen to minimise layer error + lambda * bits, with the bits that the coder of the file would take for it in
its context (`featherweight.coding`), and its error moves on to the columns behind through the Cholesky factor of the
inverse Hessian; then coordinate descent on all codes of a row lowers the same sum. Contexts and bits are those of the
codes found before, ROUNDS times.

Rate and distortion together: Chou, Lookabaugh, Gray, "Entropy-Constrained Vector Quantization", 1989; for a layer's
output error: "Reducing Storage of Pretrained Neural Networks by Rate-Constrained Quantization and Entropy Coding"
(CERWU), 2505.18758. Differences: (1) not a quadratic estimate of the rate but the bits of the adaptive models
themselves, from a round before; (2) GPTQ's order and feedback, then coordinate descent; (3) lambda is tied to the step,
RATE step² times the geometric mean of the pivots 1 / U_ii²: for a fine uniform quantizer of distortion step²/12 the
slope of distortion over bits is (2 ln 2 / 12) step² = 0.116 step²; of 0.05, 0.08 and 0.11, 0.08 needed the fewest bits
for an error (bench/results/coding-rate.md).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from featherweight.coding import contexts, costs
from featherweight.errors import SolveError, require
from featherweight.methods import _ecq
from featherweight.methods.base import Solution, status_of, usable
from featherweight.methods.gptq import BLOCK, factored
from featherweight.stats import LayerStats
from featherweight.weights import Grid
from featherweight.weights.base import float_type
from featherweight.weights.coded import stored_bytes

RATE = 0.08
ROUNDS = 2
SWEEPS = 10  # of coordinate descent, at most
LARGEST = 127  # magnitude of a code
FINEST, COARSEST = 0.01, 100.0  # step
LEAST, MOST = 0.05, 7.0  # bits a weight
TRIES = 8  # steps tried for a number of bits
NEAR = 0.005  # bits a weight


@final
@dataclass(frozen=True, slots=True)
class EcqStep:
    """step: of the grid, in root mean squares of the weights. damp: relative damping of the Hessian."""

    name: ClassVar[str] = "ecq"
    step: float
    damp: float = 0.01

    def __post_init__(self) -> None:
        allowed = f"the step must be {FINEST} to {COARSEST} root mean squares of the weights"
        require(FINEST <= self.step <= COARSEST, allowed, self.step)
        require(0 <= self.damp < math.inf, "damp must be at least 0", self.damp)

    @property
    def label(self) -> str:
        return f"ecq step {self.step:.3g}"

    def solve(self, w: Tensor, stats: LayerStats) -> Solution:
        seen = usable(stats)
        weight, damp = quantize(w.double(), seen, self.step, self.damp)
        return Solution.of(weight, w, stats, status_of(stats, damp > self.damp), {"damp": damp})

    def storage(self, shape: tuple[int, int], taps: int = 1, groups: int = 1) -> int:
        """About."""
        return 2 + math.ceil(shape[0] * shape[1] * bits_of(self.step) / 8)

    def work(self, shape: tuple[int, int], blocks: int) -> float:
        rows, cols = shape
        return ROUNDS * (2 * rows * cols**2 + 200 * rows * cols) + 2 * blocks * cols**3


@final
@dataclass(frozen=True, slots=True)
class Ecq:
    """EcqStep with the step at which the codes take `bits` bits a weight, LEAST to MOST, or a little less."""

    name: ClassVar[str] = "ecq"
    bits: float
    damp: float = 0.01

    def __post_init__(self) -> None:
        require(LEAST <= self.bits <= MOST, f"bits must be {LEAST} to {MOST}", self.bits)
        require(0 <= self.damp < math.inf, "damp must be at least 0", self.damp)

    @property
    def label(self) -> str:
        return f"ecq {self.bits:g} bit"

    def solve(self, w: Tensor, stats: LayerStats) -> Solution:
        seen, exact = usable(stats), w.double()
        step, found, size = step_of(self.bits), None, 0.0
        known: list[tuple[float, float]] = []  # (log2 of the step, bits)
        for _ in range(TRIES):
            step = min(max(step, FINEST), COARSEST)
            weight, damp = quantize(exact, seen, step, self.damp)
            bits = 8 * stored_bytes(weight) / w.numel()
            if found is None or (size < bits <= self.bits) or (bits < size and size > self.bits):
                found, size = (weight, damp), bits
            if self.bits - NEAR <= bits <= self.bits:
                break
            known.append((math.log2(step), bits))
            step = 2 ** _next(known, self.bits - NEAR / 2)
        assert found is not None
        weight, damp = found
        return Solution.of(weight, w, stats, status_of(stats, damp > self.damp), {"damp": damp})

    def storage(self, shape: tuple[int, int], taps: int = 1, groups: int = 1) -> int:
        """About."""
        return math.ceil(shape[0] * shape[1] * self.bits / 8)

    def work(self, shape: tuple[int, int], blocks: int) -> float:
        return 4 * EcqStep(1.0).work(shape, blocks)


def _next(known: list[tuple[float, float]], wanted: float) -> float:
    """The log2 of the step to try: between those that gave too many bits and too few, or beyond, along the slope of a
    rounded Gaussian."""
    over = max((k for k in known if k[1] > wanted), default=None)
    under = min((k for k in known if k[1] <= wanted), default=None)
    if over and under and over[0] < under[0]:
        share = (over[1] - wanted) / (over[1] - under[1])
        return over[0] + min(max(share, 0.1), 0.9) * (under[0] - over[0])
    last, bits = known[-1]
    slope = 1 - 4 ** -bits_of(2**last)
    return last + (bits - wanted) / max(slope, 0.2)


def quantize(w: Tensor, stats: LayerStats, step: float, damp: float) -> tuple[Grid, float]:
    """The grid of step `step`, in root mean squares of w (rows, cols) float64, and the damping that was used."""
    rows, cols = w.shape
    blocks = stats.blocks
    if not torch.isfinite(w).all():
        raise SolveError("the weights hold NaN or infinity")
    size = float(w.square().mean().sqrt()) or 1.0
    scale = torch.tensor(
        [[max(step * size, float(w.abs().max()) / LARGEST)]], dtype=torch.float64
    )  # nothing is cut off
    scale = scale.to(float_type(scale)) if float(scale) > 1e-7 else scale.float()
    exact = float(scale) or step * size
    order, upper, used = factored(stats.gram, damp, True)
    share = torch.ones(rows, dtype=torch.float64) if stats.row_share is None else rows * stats.row_share
    pivots = upper.diagonal(dim1=1, dim2=2)
    rate = RATE * exact**2 * torch.exp(-2 * pivots.log().mean(dim=1))
    power = share.reshape(blocks, -1) / rate[:, None]
    codes = torch.round(w / exact).clamp(-LARGEST, LARGEST).to(torch.int16)
    error = torch.zeros_like(w)
    for _ in range(ROUNDS):
        where = contexts(codes)
        bits = costs(codes, where, LARGEST)
        codes = _feedback(w, upper, order, exact, power, bits, where)
        where = contexts(codes)
        bits = costs(codes, where, LARGEST)
        error = (exact * codes.double() - w).reshape(blocks, -1, cols)
        parts = [t.numpy() for t in ((error @ stats.gram).contiguous(), stats.gram.contiguous())]
        own = codes.reshape(blocks, -1, cols).contiguous().numpy()
        known = power.contiguous().numpy(), bits.numpy(), where.reshape(own.shape).numpy()
        _ecq.polish(*parts, exact, *known, own, LARGEST, SWEEPS)
        codes = torch.from_numpy(own).reshape(rows, cols)
    return _grid(codes, scale), used


def _feedback(
    w: Tensor, upper: Tensor, order: Tensor, step: float, power: Tensor, bits: Tensor, where: Tensor
) -> Tensor:
    """Codes (rows, cols), column after column in `order` (blocks, cols)."""
    blocks, cols = order.shape
    places = order[:, None, :].expand(-1, w.shape[0] // blocks, -1)
    left = w.reshape(blocks, -1, cols).gather(2, places)
    seen = where.reshape(left.shape).gather(2, places)
    found = []
    for first in range(0, cols, BLOCK):
        here, behind = slice(first, first + BLOCK), slice(first + BLOCK, None)
        part, factor, own = (t.contiguous().numpy() for t in (left[:, :, here], upper[:, here, here], seen[:, :, here]))
        codes, errors = _ecq.feedback(part, factor, step, power.contiguous().numpy(), bits.numpy(), own, LARGEST)
        found.append(torch.from_numpy(codes))
        left[:, :, behind] -= torch.from_numpy(errors) @ upper[:, here, behind]
    return torch.cat(found, dim=2).gather(2, places.argsort(dim=2)).reshape(w.shape)


def _grid(codes: Tensor, scale: Tensor) -> Grid:
    """On the narrowest symmetric grid that has all codes."""
    low, high = int(codes.min()), int(codes.max())
    nbits = max(2, (max(-low, high + 1) - 1).bit_length() + 1)
    return Grid((codes + 2 ** (nbits - 1)).to(torch.uint8), scale, None, nbits, 0)


def bits_of(step: float) -> float:
    """About how many bits a weight takes at a step: those of a rounded Gaussian."""
    return 0.5 * math.log2(1 + 2 * math.pi * math.e / step**2)


def step_of(bits: float) -> float:
    return math.sqrt(2 * math.pi * math.e / (4**bits - 1))
