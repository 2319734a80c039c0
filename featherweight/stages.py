"""Which chain of layers computes what a weight of factors computes, and what it costs.

A convolution or a linear layer sums over input channels and taps. Where its weight is a sum of products, it can sum
over one factor after the other, as a chain of layers: a link takes the channels that the link before it gives, sums
over the letters that no later link has, and hands on the others. A letter that goes through a link makes it a grouped
one; taps make it a convolution along their sides; a link without taps is a convolution of one tap. Low rank (one link
has the taps), a kernel along each side, Tucker, tensor train, tensor ring (the ring's rank goes through the core), CP
(the rank goes through both sides: depthwise) and blocks of columns are all cases of that. They are found by which
factors hold letters of outputs, of inputs and of sides: neither the letters' names nor the order of the factors matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod
from typing import final

import torch
from torch import Tensor

from featherweight.layers import View
from featherweight.weights import Dense, Factors
from featherweight.weights.factors import LARGEST

TRIES = 256  # ways to place factors that hold nothing but ranks; beyond, all go to the outputs


@final
@dataclass(frozen=True, slots=True)
class Link:
    """One layer of a chain. terms: positions of its factors. outs, ins: the letters of its output and input channels,
    as numbers, the first `through` of both the same: these are its groups. kernel: one size a side, 1 for sides that
    are not its own. sides: those whose stride, padding and dilation are its own."""

    terms: tuple[int, ...]
    outs: tuple[int, ...]
    ins: tuple[int, ...]
    through: int
    outputs: int
    inputs: int
    groups: int
    kernel: tuple[int, ...]
    sides: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """Of its weight: what one position costs."""
        return self.outputs * self.inputs // self.groups * prod(self.kernel)


@final
@dataclass(frozen=True, slots=True)
class Chain:
    """name: of the decomposition. ranks: sizes of what the factors are summed over, in the order of the factors. links:
    from the inputs to the outputs."""

    name: str
    ranks: tuple[int, ...]
    links: tuple[Link, ...]

    @property
    def numbers(self) -> int:
        return _numbers(self.links)

    @property
    def label(self) -> str:
        return f"{self.name} r={','.join(map(str, self.ranks))}" if self.ranks else self.name


def chain_of(weight: Factors, view: View, grouped: bool = True) -> Chain | None:
    """The chain that multiplies least, None where there is none: a factor that holds whole outputs and whole inputs, or
    letters that lie across channels. grouped: whether links may have groups, as convolutions have; else the zeros
    between the groups are multiplied with. Groups that the layer has itself are for the caller to refuse."""
    dims = dims_of(view)
    if prod(dims) != weight.shape[0] * weight.shape[1] or view.transposed_groups > 1:
        return None
    letters = _Letters.of(weight, dims)
    ways = _placed(letters) if letters else None
    if letters is None or ways is None:
        return None
    found = [links for parts in ways if (links := _links(letters, parts, dims, view, grouped))]
    links = min(found, key=_numbers, default=())
    if not links or _numbers(links) > LARGEST * max(prod(dims), 2**16):
        return None
    ranks = dict.fromkeys(n for t in letters.terms for n in t if n not in letters.axes)
    return Chain(_name(letters, links), tuple(letters.sizes[n] for n in ranks) or (1,), links)


def weights_of(weight: Factors, view: View, chain: Chain) -> tuple[Tensor, ...]:
    """The weights of all links, (outputs, inputs / groups, kernel...) each, float64. Of embeddings and others with one
    tap the kernel has no sides."""
    letters = _Letters.of(weight, dims_of(view))
    assert letters is not None
    return tuple(_summed(weight, letters, link) for link in chain.links)


def dims_of(view: View) -> tuple[int, ...]:
    """(outputs, inputs, taps of each side...) of a weight as its matrix has them."""
    if not view.transposed_groups:
        return view.shape
    inputs, outputs, *taps = view.shape
    return outputs * view.transposed_groups, inputs, *taps


def stored_as(weight: Factors, view: View) -> str:
    """For people: the form, its ranks and the numbers of its factors."""
    chain = chain_of(weight, view)
    label = f"factors {','.join(weight.terms)}" if chain is None else chain.label
    types = dict.fromkeys(
        f"fp{8 * p.values.element_size()}" if isinstance(p, Dense) else f"{p.nbits} bit" for p in weight.parts
    )
    return f"{label} {'+'.join(types)}"


# ---------------------------------------------------------------- letters
@final
@dataclass(frozen=True, slots=True)
class _Letters:
    """A contraction with numbers for letters: an axis that lies across channels and taps is cut into the parts of
    each, and letters of size 1 are left out. cut: the numbers of each letter, in order."""

    terms: tuple[tuple[int, ...], ...]
    axes: dict[int, int]
    """Of every number that the matrix runs over, the dimension: 0 outputs, 1 inputs, 2 and on the sides; in order."""
    sizes: dict[int, int]
    cut: dict[str, tuple[int, ...]]

    def of_dim(self, dim: int) -> tuple[int, ...]:
        return tuple(n for n, d in self.axes.items() if d == dim)

    @classmethod
    def of(cls, weight: Factors, dims: Sequence[int]) -> "_Letters | None":
        ends = [prod(dims[d:]) for d in range(len(dims) + 1)]  # entries of the matrix that dimension d - 1 steps over
        cut: dict[str, tuple[int, ...]] = {}
        axes: dict[int, int] = {}
        sizes: dict[int, int] = {}
        step = prod(dims)
        for letter in weight.axes:
            end, own = step, []
            step //= weight.sizes[letter]
            marks = sorted({e for e in ends if step < e < end} | {step, end}, reverse=True)
            for high, low in pairwise(marks):
                if high % low:
                    return None
                own.append(len(sizes))
                axes[len(sizes)] = max(d for d in range(len(dims)) if ends[d] >= high)
                sizes[len(sizes)] = high // low
            cut[letter] = tuple(own)
        for letter in sorted(set("".join(weight.terms)) - set(weight.axes)):
            cut[letter] = (len(sizes),) if weight.sizes[letter] > 1 else ()
            if cut[letter]:
                sizes[len(sizes)] = weight.sizes[letter]
        return cls(tuple(tuple(n for x in t for n in cut[x]) for t in weight.terms), axes, sizes, cut)


# ---------------------------------------------------------------- links
def _placed(letters: _Letters) -> list[list[list[int]]] | None:
    """Ways to put the factors into links, from the inputs to the outputs; None where one must hold everything."""
    uses: dict[int, int] = {}
    for t in letters.terms:
        for n in t:
            uses[n] = uses.get(n, 0) + 1
    parts: list[tuple[set[int], list[int]]] = []  # (what they hold: 0 outputs, 1 inputs, sides; factors)
    free: list[int] = []
    for k, t in enumerate(letters.terms):
        holds = {d for n in t if (d := letters.axes.get(n)) is not None and (d > 1 or uses[n] == 1)}
        if not holds:
            free.append(k)
            continue
        together = [p for p in parts if p[0] & holds]
        parts = [p for p in parts if not p[0] & holds]
        parts.append((holds.union(*(h for h, _ in together)), [*(i for _, ks in together for i in ks), k]))
    if any({0, 1} <= holds for holds, _ in parts):
        return None
    last, first = ([k for holds, ks in parts for k in ks if d in holds] for d in (0, 1))
    chain = [first, *(ks for _, ks in sorted((min(holds), ks) for holds, ks in parts if min(holds) > 1)), last]
    ways = product(range(len(chain)), repeat=len(free))
    if len(chain) ** len(free) > TRIES:
        ways = [(len(chain) - 1,) * len(free)]
    found = []
    for way in ways:
        parts_of = [sorted([*p, *(k for k, w in zip(free, way, strict=True) if w == i)]) for i, p in enumerate(chain)]
        found.append([p for p in parts_of if p])
    return found


def _links(
    letters: _Letters, parts: list[list[int]], dims: Sequence[int], view: View, grouped: bool
) -> tuple[Link, ...]:
    """The chain of these parts; empty where it is one link, which is the whole weight."""
    if len(parts) < 2:
        return ()
    held = [{n for k in p for n in letters.terms[k]} for p in parts]
    inputs, outputs = letters.of_dim(1), letters.of_dim(0)
    taps = {n for n, d in letters.axes.items() if d > 1}
    inner = [
        (set(inputs).union(*held[:k]) & set(outputs).union(*held[k:])) - taps for k in range(1, len(parts))
    ]  # what a channel between two links is told apart by
    alive = [set(inputs), *inner, set(outputs)]
    cuts = [inputs]
    for k in range(1, len(parts)):  # groups are of the letters in front: those that go on, in the order they came
        rank = {n: (-((n in alive[k - 1]) + (n in alive[k + 1])), n not in cuts[-1]) for n in alive[k]}
        came = {n: i for i, n in enumerate((*(n for n in cuts[-1]), *outputs))}
        cuts.append(tuple(sorted(alive[k], key=lambda n: (rank[n], came.get(n, n)))))
    cuts.append(outputs)
    sides = [{letters.axes[n] - 2 for n in h & taps} for h in held]
    lonely = set(range(len(dims) - 2)).difference(*sides)  # of size 1: taken where most is left out after
    sides[-1 if view.transposed_groups else 0] |= lonely
    links = []
    for k, terms in enumerate(parts):
        ins, outs, through = cuts[k], cuts[k + 1], 0
        while grouped and through < min(len(ins), len(outs)) and ins[through] == outs[through]:
            through += 1
        n_out, n_in, groups = (prod(letters.sizes[n] for n in ns) for ns in (outs, ins, ins[:through]))
        kernel = tuple(dims[s + 2] if s in sides[k] else 1 for s in range(len(dims) - 2))
        links.append(Link(tuple(terms), outs, ins, through, n_out, n_in, groups, kernel, tuple(sorted(sides[k]))))
    return tuple(links)


def _numbers(links: Sequence[Link]) -> int:
    return sum(link.numbers for link in links)


def _summed(weight: Factors, letters: _Letters, link: Link) -> Tensor:
    """Its factors multiplied, with ones where a letter goes through without a factor that holds it, and zeros beside
    the diagonal where it goes through outside the groups."""
    twins = {n: len(letters.sizes) + i for i, n in enumerate(link.ins)}
    both = set(link.ins[link.through :]) & set(link.outs[link.through :])
    operands: list[Tensor | list[int]] = []
    held = {n for k in link.terms for n in letters.terms[k]}
    for k in link.terms:
        own = letters.terms[k]
        operands += [weight.tensor_of(k).double().reshape([letters.sizes[n] for n in own]), list(own)]
    for n in link.outs:
        if n not in held:
            operands += [torch.ones(letters.sizes[n], dtype=torch.float64), [n]]
    for n in both:
        operands += [torch.eye(letters.sizes[n], dtype=torch.float64), [n, twins[n]]]
    ins = [twins[n] if n in both else n for n in link.ins[link.through :]]
    taps = [n for n in letters.axes if letters.axes[n] > 1 and n in held]
    result = torch.einsum(*operands, [*link.outs, *ins, *taps])
    return result.reshape(link.outputs, link.inputs // link.groups, *link.kernel)


def _name(letters: _Letters, links: Sequence[Link]) -> str:
    """What people call it."""
    first, *middle, last = links
    if any(n in letters.axes for x in links[1:] for n in x.ins):
        return "blocks"
    around = set(first.outs) & set(last.ins)
    inner = {n for x in middle for k in x.terms for n in letters.terms[k]}
    if middle and around - inner:
        return "tensor ring"
    if middle and all(set(x.ins) == set(x.outs) for x in middle):
        return "cp"
    if not middle:
        with_taps = [prod(x.kernel) > 1 for x in links]
        if len(letters.terms) > 2:
            return "tensor ring" if len(around) > 1 else "tensor train"
        if all(with_taps):
            return "spatial"
        return "low rank" if not any(with_taps) else "rows" if with_taps[0] else "cols"
    return "tucker" if len(letters.terms) <= 3 else "tensor train"
