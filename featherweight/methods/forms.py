"""The forms that a matrix is factored into: pure arithmetic on letters and sizes.

A form is an einsum of small tensors (see `weights.factors`), with the same letters everywhere: `o` output channels, `i`
input channels, `t` all taps of a kernel, `y`, `x` its two sides, `c` all columns; `m`, `n`, `p` parts of the output
channels and `j`, `k`, `l` of the input channels, where these are factored; other letters are ranks. Sides of size 1 are
left out. The matrix of a convolution of shape (O, I, kh, kw) is (O, I * kh * kw).

    rows      or,rc->oc                    low rank: the whole kernel to r channels, then 1x1
    cols      otr,ri->oit                  low rank: 1x1 to r channels, then the whole kernel
    spatial   oxr,riy->oiyx                one side of the kernel, then the other
    tucker    or,rst,si->oit               1x1, the whole kernel, 1x1 (a tensor train of three modes is the same)
    tt        mr,rnxs,syju,uk->mnjkyx      tensor train over parts of the channels, a side of the kernel at each end
    tr        zmr,rnxs,syju,ukz->mnjkyx    tensor ring: a train whose ends are joined
    cp        yr,xr,ir,or->oiyx            sum of outer products

A rank of a train is the first letter of one of its two factors, so that a grid with a scale per row has one per rank
there. Of a matrix of one tap, rows, cols, tucker and cp are all low rank.

Papers: Jaderberg et al. 2014, 1405.3866 (spatial); Kim et al. 2016, 1511.06530 (tucker); Oseledets 2011, Garipov et al.
2016, 1611.03214 and Yin et al. 2021, 2107.12422 (tt, the taps in the middle); Zhao et al. 2016, 1606.05535 and Wang et
al. 2018, 1802.09052 (tr); Lebedev et al. 2015, 1412.6553 (cp).

Where we differ: the published trains and rings have a core of their own for the taps, t, between outputs and inputs.
Here each side of a kernel with two lies with the channels beside it. At equal numbers that loses less on every layer
that was measured (docs/decisions/0015), and full ranks outside cost next to nothing. A kernel with one side longer
than 1 has the core of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt, prod
from typing import final

from featherweight.errors import require

FORMS = ("rows", "cols", "spatial", "tucker", "tt", "tr", "cp")
LONG = 1024  # channels: more than this are factored into three parts, not two
_BONDS = "rsuvwghabdef"  # the ranks of a train, from left to right


@final
@dataclass(frozen=True, slots=True)
class Form:
    """An einsum that gives a matrix. axes: its letters in the order of the matrix's entries. terms: of the factors.
    sizes: of every letter, ranks included."""

    name: str
    axes: str
    terms: tuple[str, ...]
    sizes: Mapping[str, int]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Sizes of the letters that are summed over, in the order in which `form_of` takes them."""
        return tuple(self.sizes[x] for x in _bonds(self.axes, self.terms))

    @property
    def numbers(self) -> int:
        """How many numbers the factors have together."""
        return sum(prod(self.sizes[x] for x in term) for term in self.terms)

    @property
    def modes(self) -> tuple[int, ...]:
        """The shape of the matrix's entries as a tensor with a dimension for each axis."""
        return tuple(self.sizes[x] for x in self.axes)

    @property
    def label(self) -> str:
        """Name and ranks: 'tucker 12x8'."""
        return f"{self.name} {'x'.join(map(str, self.ranks))}"


def refusal(name: str, kernel: Sequence[int] = (), groups: int = 1) -> str:
    """Why a layer cannot have a form, in words; empty where it can.

    >>> refusal("spatial", (1, 1))
    'the spatial form needs a kernel of two dimensions, both longer than 1, and this layer has 1x1'
    """
    if groups > 1:
        return f"its {groups} groups of rows see different inputs, and a factored form has one set of inputs"
    if name == "spatial" and (len(kernel) != 2 or min(kernel) < 2):
        sides = "x".join(map(str, kernel)) if kernel else "no kernel"
        return f"the spatial form needs a kernel of two dimensions, both longer than 1, and this layer has {sides}"
    return ""


def factored(count: int) -> tuple[int, ...]:
    """Channels as a product of two near-equal factors (three above LONG), the larger first; a prime stays alone.

    >>> factored(64), factored(32), factored(3), factored(2048)
    ((8, 8), (8, 4), (3,), (16, 16, 8))
    """
    if count > LONG:
        root = round(count ** (1 / 3))
        third = next((d for d in range(root, 1, -1) if count % d == 0), 1)
        parts = (*_pair(count // third), third)
    else:
        parts = _pair(count)
    return tuple(sorted((p for p in parts if p > 1), reverse=True)) or (1,)


def form_of(name: str, shape: tuple[int, int], kernel: Sequence[int], ranks: Sequence[int]) -> Form:
    """The form with the given ranks, which are cut to the most that makes a difference.

    Args:
        shape: (rows, cols) of the matrix. kernel: sides of the kernel, empty for a layer that has none.
        ranks: one for each letter that is summed over: r (rows, cols, spatial, cp); r of the outputs, s of the inputs
            (tucker); from left to right (tt), and z at last (tr).

    Raises:
        UsageError: the layer cannot have the form, or another number of ranks was given.
    """
    axes, terms, sizes = _skeleton(name, shape, kernel)
    bonds = _bonds(axes, terms)
    require(len(ranks) == len(bonds), f"the form {name} of this layer has {len(bonds)} ranks", tuple(ranks))
    require(all(type(r) is int and r > 0 for r in ranks), "ranks must be whole numbers above 0", tuple(ranks))
    return Form(name, axes, terms, sizes | _cut(name, axes, terms, sizes, dict(zip(bonds, ranks, strict=True))))


def full(name: str, shape: tuple[int, int], kernel: Sequence[int] = ()) -> Form:
    """The form with ranks at which it holds every matrix. A ring is an open train then."""
    axes, terms, sizes = _skeleton(name, shape, kernel)
    most = {x: prod(sizes[a] for a in axes) for x in _bonds(axes, terms)} | ({"z": 1} if name == "tr" else {})
    return Form(name, axes, terms, sizes | _cut(name, axes, terms, sizes, most))


def form_at(name: str, shape: tuple[int, int], kernel: Sequence[int], keep: float) -> Form:
    """The form with the largest ranks that store at most `keep` of the dense numbers, and at least ranks of 1.

    Ranks on the side of the outputs to those on the side of the inputs are as the channels (so for tucker, Gusak et al.
    2019, 1903.09973); those of a ring are equal (Wang et al. 2018). keep of 1: `full`, however many numbers that takes.
    """
    require(0 < keep <= 1, "keep must be above 0 and at most 1", keep)
    whole = full(name, shape, kernel)
    if keep == 1:
        return whole
    axes, terms, sizes = _skeleton(name, shape, kernel)
    bonds, budget = _bonds(axes, terms), keep * shape[0] * shape[1]
    weights = _weights(name, axes, terms, sizes)

    def at(ranks: dict[str, int]) -> Form:
        return Form(name, axes, terms, sizes | _cut(name, axes, terms, sizes, ranks))

    low, high = 0.0, float(prod(sizes[a] for a in axes))
    for _ in range(80):  # down to the last bit: ranks are whole numbers
        middle = (low + high) / 2
        fits = at({x: max(1, int(middle * weights[x])) for x in bonds}).numbers <= budget
        low, high = (middle, high) if fits else (low, middle)
    best = at({x: max(1, int(low * weights[x])) for x in bonds})
    open_ = list(bonds)
    while open_:  # what rounding down left over
        x = min(open_, key=lambda b: best.sizes[b] / weights[b])
        more = at({b: best.sizes[b] + (b == x) for b in bonds})
        if more.numbers <= budget and more.sizes[x] > best.sizes[x]:
            best = more
        else:
            open_.remove(x)
    return best


def _pair(count: int) -> tuple[int, int]:
    small = next(d for d in range(isqrt(count), 0, -1) if count % d == 0)
    return count // small, small


def _bonds(axes: str, terms: Sequence[str]) -> str:
    """The letters that are summed over: those of a train from left to right, what closes a ring last."""
    found = dict.fromkeys(x for term in terms for x in term if x not in axes)
    return "".join(sorted(found, key=lambda x: x == "z"))


def _skeleton(name: str, shape: tuple[int, int], kernel: Sequence[int]) -> tuple[str, tuple[str, ...], dict[str, int]]:
    """Axes, terms, and sizes of the axes."""
    require(name in FORMS, f"the form must be one of {', '.join(FORMS)}", name)
    rows, cols = shape
    taps = prod(kernel)
    require(taps > 0 and cols % taps == 0, f"a kernel of {tuple(kernel)} must divide {cols} columns", taps)
    if reason := refusal(name, kernel):
        require(False, reason, name)
    sizes = {"o": rows, "i": cols // taps, "t": taps}
    if name == "rows":
        return "oc", ("or", "rc"), {"o": rows, "c": cols}
    if name == "spatial":
        return "oiyx", ("oxr", "riy"), {"o": rows, "i": cols // taps, "y": kernel[0], "x": kernel[1]}
    if name == "cp":
        sides = dict(zip("yx", kernel, strict=True)) if len(kernel) == 2 else {"t": taps}
        found = {"o": rows, "i": cols // taps} | {x: n for x, n in sides.items() if n > 1}
        return "".join(found), tuple(f"{x}r" for x in "tyxio" if x in found), found
    if name in ("tt", "tr"):
        return _train(name, rows, cols // taps, kernel)
    if taps == 1:
        return "oi", ("or", "ri"), {"o": rows, "i": cols}
    return "oit", (("otr", "ri") if name == "cols" else ("or", "rst", "si")), sizes


def _train(name: str, outputs: int, inputs: int, kernel: Sequence[int]) -> tuple[str, tuple[str, ...], dict[str, int]]:
    left = dict(zip("mnp", factored(outputs), strict=False))
    right = dict(zip("jkl", reversed(factored(inputs)), strict=False))
    if len(sides := [n for n in kernel if n > 1]) == 2:
        taps = dict(zip("yx", sides, strict=True))
        (*outer, last), (first, *inner) = left, right
        order = [*outer, last + "x", "y" + first, *inner]
    else:
        taps = {"t": prod(sides)} if sides else {}
        order = [*left, *taps, *right]
    ends = [("z" if name == "tr" else ""), *_BONDS[: len(order) - 1], ("z" if name == "tr" else "")]
    terms = tuple(f"{a}{x}{b}" for a, x, b in zip(ends, order, ends[1:], strict=False))
    found = left | right | taps
    return "".join(found), terms, found


def _weights(name: str, axes: str, terms: Sequence[str], sizes: Mapping[str, int]) -> dict[str, float]:
    """What the ranks are proportional to."""
    bonds = _bonds(axes, terms)
    if name not in ("tucker", "tt"):
        return dict.fromkeys(bonds, 1.0)
    outputs = prod(n for x, n in sizes.items() if x in "omnp")
    inputs = prod(n for x, n in sizes.items() if x in "ijkl")
    largest = max(outputs, inputs)
    found = {}
    for x, left, right in zip(bonds, terms, terms[1:], strict=False):
        outer = all(a in "omnpx" for a in left if a in axes)
        inner = all(a in "ijkly" for a in right if a in axes)
        both = min(outputs, inputs) if outer and inner else outputs if outer else inputs
        found[x] = both / largest
    return found


def _cut(
    name: str, axes: str, terms: Sequence[str], sizes: Mapping[str, int], ranks: Mapping[str, int]
) -> dict[str, int]:
    """Ranks above which nothing more can be held: no rank is larger than what is on one side of it."""
    found = dict(ranks)
    if name == "cp":
        modes = [sizes[x] for x in axes]
        return {"r": min(found["r"], prod(modes) // max(modes))}
    changed = True
    while changed:
        changed = False
        for term in terms:
            for x in term:
                others = prod(found.get(y) or sizes[y] for y in term if y != x)
                if x in found and found[x] > others:
                    found[x], changed = others, True
    return found
