"""A matrix as the contraction of small tensors: low rank, Tucker, tensor train, tensor ring, CP, pairs of dictionaries.

Every form is one sum of products, written as in `einsum`: a term for each factor names its indices with letters, `axes`
names those that the matrix runs over (output channels, input channels, taps, or parts of them), all others are summed
(ranks). `or,rc->oc` is low rank, `or,rst,si->oit` a Tucker decomposition of a convolution over its channels, or a
tensor train; `oxr,riy->oiyx` one kernel along each side; `yr,xr,ir,or->oiyx` CP; `zoa,apb,biz->oip` a tensor ring;
`obr,rbc->obc` blocks of columns with a pair of factors each.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import prod
from typing import ClassVar, Self, TypeAlias, final

import torch
from torch import Tensor

from featherweight.errors import FormatError, UsageError, require
from featherweight.weights.base import Layout, Meta, only, payload_bits
from featherweight.weights.base import field as checked
from featherweight.weights.dense import Dense
from featherweight.weights.grid import Grid

Factor: TypeAlias = Dense | Grid

MOST = 16  # factors
LARGEST = 8  # times the matrix, or 2 ** 16 entries: the largest tensor on the way to it
_FACTORS: dict[str, type[Dense] | type[Grid]] = {k.kind: k for k in (Dense, Grid)}
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@final
@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """shape: (rows, cols). axes: letters whose sizes multiply to rows * cols, in the order of the matrix's entries.
    terms: the letters of every factor; sizes: of every letter. parts: the factors, each a matrix of (size of its term's
    first letter, the others together). Decoding contracts two at a time, in the order of `plan`. shared: positions of
    factors that other weights hold as well, as the same object."""

    kind: ClassVar[str] = "factors"
    shape: tuple[int, int]
    axes: str
    terms: tuple[str, ...]
    sizes: Mapping[str, int]
    parts: tuple[Factor, ...]
    shared: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        try:
            _check(self.shape, self.axes, self.terms, self.sizes)
        except FormatError as error:
            raise UsageError(str(error)) from None
        expected = [matrix_of(t, self.sizes) for t in self.terms]
        found = [p.shape for p in self.parts]
        require(found == expected, f"factors must have shapes {expected}", found)
        inside = all(0 <= k < len(self.parts) for k in self.shared) and len(set(self.shared)) == len(self.shared)
        require(inside, f"shared factors must be among the {len(self.parts)}", self.shared)

    def tensor_of(self, k: int) -> Tensor:
        """Factor k, decoded, with one dimension for each letter of its term."""
        return self.parts[k].dense().reshape([self.sizes[x] for x in self.terms[k]])

    def dense(self) -> Tensor:
        """Contracted in float64 and rounded once, so that the order of sums does not matter but in rare last bits."""
        operands = [(term, self.tensor_of(k).double()) for k, term in enumerate(self.terms)]
        return contracted(operands, self.axes).reshape(self.shape).float()

    def bits(self) -> int:
        return payload_bits(self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        """Those of the factors that are its own."""
        own = [k for k in range(len(self.parts)) if k not in self.shared]
        return {f"{k}.{name}": t for k in own for name, t in self.parts[k].tensors().items()}

    def meta(self) -> Meta:
        factors = [{"kind": p.kind} | p.meta() for p in self.parts]
        said = {"axes": self.axes, "terms": list(self.terms), "sizes": dict(sorted(self.sizes.items()))}
        return said | {"factors": [None if k in self.shared else f for k, f in enumerate(factors)]}

    def trainable(self) -> tuple[str, ...]:
        return tuple(f"{k}.{name}" for k, p in enumerate(self.parts) for name in p.trainable())

    @classmethod
    def layout(cls, shape: tuple[int, int], meta: Meta) -> Layout:
        """Of the factors that are its own; a shared one is None among the metadata's factors."""
        only(meta, "axes", "terms", "sizes", "factors")
        _, terms, sizes = _said(shape, meta)
        fields: Layout = {}
        for k, own in enumerate(meta["factors"]):
            if own is not None:
                kind = _FACTORS[checked(own, "kind", tuple(_FACTORS))]
                inner = {n: v for n, v in own.items() if n != "kind"}
                try:
                    layout = kind.layout(matrix_of(terms[k], sizes), inner)
                except FormatError as error:
                    raise FormatError(f"field 'factors', number {k}: {error}") from None
                fields |= {f"{k}.{name}": entry for name, entry in layout.items()}
        return fields

    @classmethod
    def load(
        cls, shape: tuple[int, int], meta: Meta, tensors: dict[str, Tensor], shared: Mapping[int, Factor] | None = None
    ) -> Self:
        """shared: the factors that the metadata leave out, by position."""
        axes, terms, sizes = _said(shape, meta)
        parts: list[Factor] = []
        for k, own in enumerate(meta["factors"]):
            expected = matrix_of(terms[k], sizes)
            if own is None:
                part = (shared or {}).get(k)
                if part is None or part.shape != expected:
                    got = "none" if part is None else str(part.shape)
                    raise FormatError(f"factor {k} is shared and must have shape {expected}, got {got}")
                parts.append(part)
            else:
                inner = {n: v for n, v in own.items() if n != "kind"}
                mine = {n.partition(".")[2]: t for n, t in tensors.items() if n.partition(".")[0] == str(k)}
                parts.append(_FACTORS[own["kind"]].load(expected, inner, mine))
        held = tuple(k for k, own in enumerate(meta["factors"]) if own is None)
        return cls(shape, axes, terms, sizes, tuple(parts), held)


def matrix_of(term: str, sizes: Mapping[str, int]) -> tuple[int, int]:
    """The shape of the matrix that a factor is stored as."""
    return sizes[term[0]], prod(sizes[x] for x in term[1:])


def largest(axes: str, terms: Sequence[str], sizes: Mapping[str, int]) -> int:
    """Entries of the largest tensor that decoding makes."""
    made = [step.partition("->")[2] for _, _, step in plan(tuple(terms), tuple(sorted(sizes.items())), axes)]
    return max(prod(sizes[x] for x in letters) for letters in [*made, axes])


def contracted(operands: Sequence[tuple[str, Tensor]], out: str) -> Tensor:
    """The einsum of tensors, each with its letters, two at a time in the order of `plan`."""
    work = [t for _, t in operands]
    sizes = {x: n for letters, t in operands for x, n in zip(letters, t.shape, strict=True)}
    for a, b, equation in plan(tuple(letters for letters, _ in operands), tuple(sorted(sizes.items())), out):
        made = torch.einsum(equation, work[a], work[b])
        work = [t for n, t in enumerate(work) if n not in (a, b)] + [made]
    return work[0].contiguous() if len(operands) > 1 else torch.einsum(f"{operands[0][0]}->{out}", work[0])


@functools.lru_cache(maxsize=4096)
def plan(terms: tuple[str, ...], sizes: tuple[tuple[str, int], ...], out: str) -> list[tuple[int, int, str]]:
    """Positions of what is contracted next, and how; what is made goes to the end. Next are the two whose product has
    the fewest entries beside their own, and of equal ones the first."""
    size, work, found = dict(sizes), list(terms), []

    def entries(letters: str) -> int:
        return prod(size[x] for x in letters)

    while len(work) > 1:
        tried = []
        for a, b in combinations(range(len(work)), 2):
            later = set(out).union(*(letters for n, letters in enumerate(work) if n not in (a, b)))
            made = "".join(dict.fromkeys(x for x in work[a] + work[b] if x in later)) if len(work) > 2 else out
            tried.append((entries(made) - entries(work[a]) - entries(work[b]), a, b, made))
        _, a, b, made = min(tried)
        found.append((a, b, f"{work[a]},{work[b]}->{made}"))
        work = [x for n, x in enumerate(work) if n not in (a, b)] + [made]
    return found


def heavy(axes: str, terms: Sequence[str], sizes: Mapping[str, int]) -> bool:
    """Whether the contraction needs far more memory than what it makes."""
    return largest(axes, terms, sizes) > LARGEST * max(prod(sizes[x] for x in axes), 2**16)


def _said(shape: tuple[int, int], meta: Meta) -> tuple[str, tuple[str, ...], dict[str, int]]:
    """Axes, terms and sizes of the metadata, checked."""
    axes, terms, sizes, factors = (meta.get(x) for x in ("axes", "terms", "sizes", "factors"))
    if not isinstance(axes, str):
        raise FormatError(f"field 'axes' must be letters, got {axes!r}")
    if not isinstance(terms, list) or not all(isinstance(t, str) for t in terms):
        raise FormatError(f"field 'terms' must be a list of letters, got {terms!r}")
    if not isinstance(sizes, dict) or not all(type(n) is int and 0 < n < 2**40 for n in sizes.values()):
        raise FormatError(f"field 'sizes' must be a whole number above 0 for each letter, got {sizes!r}")
    _check(shape, axes, terms, sizes)
    fits = isinstance(factors, list) and len(factors) == len(terms)
    if not fits or not all(isinstance(f, dict | None) for f in factors or []):
        raise FormatError(f"field 'factors' must have an entry for each of {len(terms)} terms, got {factors!r}")
    return axes, tuple(terms), sizes


def _check(shape: tuple[int, int], axes: str, terms: Sequence[str], sizes: Mapping[str, int]) -> None:
    """Refuse what is no contraction to a matrix of this shape, or one that needs far more memory than the matrix."""
    if not 1 <= len(terms) <= MOST:
        raise FormatError(f"field 'terms' must have 1 to {MOST} factors, got {len(terms)}")
    for name, text in [("axes", axes), *(("terms", t) for t in terms)]:
        if not text or len(set(text)) != len(text) or not set(text) <= set(_LETTERS):
            raise FormatError(f"field '{name}' must be different letters a to z, got {text!r}")
    used = "".join(terms)
    if set(sizes) != set(used) or not set(axes) <= set(used):
        raise FormatError(
            f"field 'sizes' must be of the letters of the terms, {sorted(set(used))}, got {sorted(sizes)}"
        )
    if lonely := sorted(x for x in set(used) - set(axes) if used.count(x) < 2):
        raise FormatError(f"field 'terms' has the letter {lonely[0]!r} once only, and 'axes' has not")
    entries = shape[0] * shape[1]
    if prod(sizes[x] for x in axes) != entries:
        raise FormatError(f"field 'sizes': the axes {axes!r} do not multiply to {entries} entries")
    if heavy(axes, terms, sizes):
        raise FormatError("field 'terms': the contraction needs far more memory than the matrix")
