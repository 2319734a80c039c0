"""Books of words for the vectors of several layers together.

They start as residual k-means of the rows' vectors, divided by the rows' scales. Then, in turns: codes by error
feedback and descent; and the books as the least-squares answer to all codes of all layers, each layer's error relative
to its output's energy. That problem is linear in the words, and conjugate gradients solve it without forming its
matrix.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import final

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from featherweight.errors import UsageError
from featherweight.methods.vectors import Layer, descend, first_codes, fitted, power
from featherweight.weights.codebook import MOST_BITS, nearest_words

LENGTH = 8  # of a vector, at most
SHARE = 0.04  # of the weights' bytes that a book may take
WHOLE = 0.005  # by which a rate may be off: 2.33 is 7/3
ROUNDS = 4  # of codes and books
STEPS = 10  # of conjugate gradients
EXACT = 1e-10  # they end when the squared residual fell to this share
RIDGE = 1e-6  # relative to the mean use of a word: holds what hardly any vector uses
SAMPLE = 64  # vectors a word that k-means sees, at most
MOST = 1 << 17  # vectors that books are fitted on, at most


@final
@dataclass(frozen=True, slots=True)
class Vectors:
    """How rows are cut and stored. d: entries of a vector. bits: of the code of every book. channels: a vector's
    entries are neighbouring input channels at one tap, not neighbouring columns."""

    d: int
    bits: tuple[int, ...]
    channels: bool = False

    @property
    def rate(self) -> float:
        """Bits a weight."""
        return sum(self.bits) / self.d

    @property
    def storage(self) -> int:
        """Bytes of the books."""
        return 2 * self.d * sum(2**b for b in self.bits)


def vectors_of(rate: float, weights: int) -> Vectors:
    """The longest vectors of one word each whose book takes no more than a small share of what `weights` weights take,
    at a rate of 1 to 8 bits a weight; the shortest where every book takes more.

    Raises:
        UsageError: no vector of up to 8 weights has a whole number of bits, 12 at most, at this rate.
    """
    found = [
        Vectors(d, (round(rate * d),)) for d in range(LENGTH, 0, -1) if abs(rate * d - round(rate * d)) < WHOLE * d
    ]
    found = [v for v in found if 1 <= v.bits[0] <= MOST_BITS]
    if not found:
        raise UsageError(f"vectors of 1 to {LENGTH} weights cannot have {rate:g} bits a weight; try 1.5, 2, 2.33 or 3")
    return next((v for v in found if v.storage <= SHARE * weights * rate / 8), found[-1])


@final
@dataclass(frozen=True, slots=True, eq=False)
class Books:
    """words: (words, d) float16 for every book."""

    words: tuple[Tensor, ...]


def fit(layers: Sequence[Layer], vectors: Vectors, seed: int = 0) -> Books:
    """Books for all layers together. Their words have a mean square of 1 where all are used alike."""
    random = np.random.default_rng(seed)
    some = [x for x in layers if float(x.energy(x.w).sum()) > 0]  # a layer of zeros says nothing
    layers = _sampled(some or layers, vectors.d, random)
    weights = [1 / (float(x.energy(x.w).sum()) or 1.0) for x in layers]
    scales = [power(x) for x in layers]
    words = _start(layers, scales, vectors, random)
    codes = [first_codes(x, s, words, 1) for x, s in zip(layers, scales, strict=True)]
    for _ in range(ROUNDS):
        for i, layer in enumerate(layers):
            codes[i] = descend(layer, scales[i], words, codes[i])
            scales[i] = fitted(layer, scales[i], words, codes[i])
            codes[i] = descend(layer, scales[i], words, codes[i])
        words = least_squares(layers, weights, scales, codes, words)
    return Books(tuple(b.half() for b in words))


def _sampled(layers: Sequence[Layer], d: int, random: np.random.Generator) -> list[Layer]:
    """Whole rows (whole blocks of rows where a layer has several), the same share of every layer."""
    total = sum(len(x.w) * (x.place.shape[1] // d) for x in layers)
    if total <= MOST:
        return list(layers)
    found = []
    for layer in layers:
        blocks, rows = layer.blocks, len(layer.w)
        parts = blocks if blocks > 1 else rows
        chosen = np.sort(random.permutation(parts)[: max(round(parts * MOST / total), 1)])
        of = torch.from_numpy(chosen) if blocks == 1 else _rows_of(torch.from_numpy(chosen), rows // blocks)
        hessian = layer.hessian if blocks == 1 else layer.hessian[torch.from_numpy(chosen)]
        place = layer.place if len(layer.place) == 1 else layer.place[of]
        found.append(replace(layer, w=layer.w[of], start=layer.start[of], hessian=hessian, place=place))
    return found


def _rows_of(blocks: Tensor, each: int) -> Tensor:
    return (blocks[:, None] * each + torch.arange(each)).reshape(-1)


def _start(
    layers: Sequence[Layer], scales: Sequence[Tensor], vectors: Vectors, random: np.random.Generator
) -> list[Tensor]:
    """Residual k-means: each book of what the books before it left."""
    found = []
    for layer, scale in zip(layers, scales, strict=True):
        entries = layer.entries(layer.start / torch.where(scale > 0, scale, 1.0)[:, None]).reshape(-1, vectors.d)
        whole = (layer.place >= 0).expand(len(scale), -1).reshape(-1, vectors.d).all(dim=1)
        found.append(entries[whole] if whole.any() else entries)
    x = torch.cat(found)
    x = x[torch.from_numpy(random.permutation(len(x))[: SAMPLE * 2 ** max(vectors.bits)])]
    words = []
    for bits in vectors.bits:
        many = x if len(x) >= 2**bits else x.repeat(-(-(2**bits) // len(x)), 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of words that no vector is nearest to: they stay where they are
            mean, _ = kmeans2(many.numpy(), 2**bits, iter=15, minit="points", rng=random)
        words.append(torch.from_numpy(mean))
        x = x - words[-1][nearest_words(x, words[-1])]
    return words


def least_squares(
    layers: Sequence[Layer],
    weights: Sequence[float],
    scales: Sequence[Tensor],
    codes: Sequence[Tensor],
    words: Sequence[Tensor],
) -> list[Tensor]:
    """The words of the smallest sum of weight * error over the layers for these scales and codes, from `words` on, by
    conjugate gradients."""
    starts = np.cumsum([0, *(len(b) for b in words)])
    first = torch.from_numpy(starts[:-1])
    x = torch.cat([b.double() for b in words])
    d = x.shape[1]
    known = [(a, w, s, c.long() + first) for a, w, s, c in zip(layers, weights, scales, codes, strict=True)]

    def back(layer: Layer, scale: Tensor, numbers: Tensor, change: Tensor) -> Tensor:
        each = (layer.entries(change) * scale[:, None]).reshape(len(scale), -1, 1, d)
        every = each.expand(-1, -1, numbers.shape[2], -1).reshape(-1, d)
        return torch.zeros_like(x).index_add_(0, numbers.reshape(-1), every)

    def decoded(layer: Layer, scale: Tensor, numbers: Tensor, v: Tensor) -> Tensor:
        return layer.matrix(scale[:, None] * v[numbers].sum(dim=2).flatten(1))

    used, residual = torch.zeros(len(x), 1, dtype=torch.float64), torch.zeros_like(x)
    for layer, weight, scale, numbers in known:
        level = weight * layer.hessian.diagonal(dim1=1, dim2=2).mean()
        often = (scale.square() * level)[:, None, None].expand(numbers.shape)
        used.index_add_(0, numbers.reshape(-1), often.reshape(-1, 1))
        left = layer.w - decoded(layer, scale, numbers, x)
        residual += weight * back(layer, scale, numbers, layer.bent(left))
    ridge = RIDGE * used.mean() + torch.finfo(torch.float64).tiny
    scaled = residual / (used + ridge)
    direction, size = scaled.clone(), (residual * scaled).sum()
    begun = size.clone()
    for _ in range(STEPS):
        if size <= EXACT * begun:
            break
        product = ridge * direction
        for layer, weight, scale, numbers in known:
            bent = layer.bent(decoded(layer, scale, numbers, direction))
            product += weight * back(layer, scale, numbers, bent)
        step = size / (direction * product).sum()
        x, residual = x + step * direction, residual - step * product
        scaled = residual / (used + ridge)
        before, size = size, (residual * scaled).sum()
        direction = scaled + (size / before) * direction
    return [x[a:b] for a, b in pairwise(starts)]
