"""The factors of a form that come nearest to a matrix, all entries counting alike. No data; float64.

Of two factors (rows, cols, spatial): the truncated singular value decomposition, which is the optimum (Eckart and Young
1936). tucker: HOSVD, then HOOI (De Lathauwer, De Moor, Vandewalle 2000). tt: TT-SVD with prescribed ranks (Oseledets
2011, alg. 1), whose error is at most the root of the summed squared tails of its cuts. tr: that train as a ring, what
closes it filled with small numbers, then alternating least squares; a TR-SVD (Zhao et al. 2016, alg. 1) is no start
where the ranks beside the first cut have a product larger than its side. cp: alternating least squares with a penalty
on the factors (Acar et al. 2011), raised until the rank-one terms do not cancel (see `cancelling`; Phan et al. 2020,
2008.05441, bound the same sum).
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from featherweight.methods.forms import Form
from featherweight.methods.refine import Problem, refined

LONG = 8  # times as long as wide: such a matrix is decomposed through the Gram matrix of its short side
TURNS = 50  # of HOOI, at most
SETTLED = 1e-8  # of the energy: a turn that gains less is the last
SWEEPS = {"tr": 25, "cp": 80}  # of alternating least squares
NOISE = 0.1  # of a train's entries, where the ring is closed
CANCELLING = 4.0  # energy of all rank-one terms over that of the matrix, above which they are refused
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)  # of a matrix of unit norm


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U, s, V): the largest `rank` singular values and their vectors, matrix = U diag(s) V where none is left out."""
    rows, cols = matrix.shape
    if cols > LONG * rows:
        _, vectors = torch.linalg.eigh(matrix @ matrix.T)
        left = vectors.flip(1)[:, :rank]
        inner, s, right = torch.linalg.svd(left.T @ matrix, full_matrices=False)
        return left @ inner, s, right
    if rows > LONG * cols:
        right, s, left = truncated(matrix.T.contiguous(), rank)
        return left.T, s, right.T
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], v[:rank]


def decomposed(form: Form, w: Tensor) -> list[Tensor]:
    """The factors, each with a dimension for every letter of its term. w: (rows, cols) float64."""
    if not w.any():
        return [torch.zeros([form.sizes[x] for x in term], dtype=w.dtype) for term in form.terms]
    if len(form.terms) <= 2 and form.name != "tr":
        return train(form, w)
    if form.name == "tucker":
        return tucker(form, w)
    if form.name == "tr":
        return ring(form, w)
    return cp(form, w) if form.name == "cp" else train(form, w)


def train(form: Form, w: Tensor) -> list[Tensor]:
    """TT-SVD from left to right: a factor keeps the leading left singular vectors, the rest goes on to the next."""
    own = ["".join(x for x in term if x in form.axes) for term in form.terms]
    rest = torch.einsum(f"{form.axes}->{''.join(own)}", w.reshape(form.modes)).reshape(1, -1)
    found, before = [], ""
    for k, letters in enumerate(own[:-1]):
        bond = next(x for x in form.terms[k] if x in form.terms[k + 1] and x not in before + "z" + letters)
        u, s, v = truncated(rest.reshape(rest.shape[0] * _size(form, letters), -1), form.sizes[bond])
        if len(s) < form.sizes[bond]:  # a rank that a train has no use for, but a ring may
            u, s, v = _wider(u, s, v, form.sizes[bond])
        found.append(_shaped(form, u, before + letters + bond, form.terms[k]))
        rest, before = s[:, None] * v, bond
    found.append(_shaped(form, rest, before + own[-1], form.terms[-1]))
    return found


def tucker(form: Form, w: Tensor) -> list[Tensor]:
    """HOOI: each side's best basis for the other side's, in turns, from those of the whole tensor (HOSVD)."""
    return _tucker(form, w, TURNS)


def hosvd(form: Form, w: Tensor) -> list[Tensor]:
    """The start of `tucker`."""
    return _tucker(form, w, 0)


def _tucker(form: Form, w: Tensor, turns: int) -> list[Tensor]:
    tensor = w.reshape(form.modes)
    outer, inner = form.sizes["r"], form.sizes["s"]

    def outputs(t: Tensor) -> Tensor:
        return truncated(t.reshape(len(t), -1), outer)[0]

    def inputs(t: Tensor) -> Tensor:
        return truncated(t.transpose(0, 1).reshape(t.shape[1], -1), inner)[0]

    left, right = outputs(tensor), inputs(tensor)
    core, whole = torch.einsum("oit,or,is->rst", tensor, left, right), float(tensor.square().sum())
    for _ in range(turns):
        right = inputs(torch.einsum("oit,or->rit", tensor, left))
        left = outputs(torch.einsum("oit,is->ost", tensor, right))
        energy, core = float(core.square().sum()), torch.einsum("oit,or,is->rst", tensor, left, right)
        if float(core.square().sum()) - energy < SETTLED * whole:
            break
    return [left, core, right.T]


def ring(form: Form, w: Tensor) -> list[Tensor]:
    """A tensor train in the first place of the closing rank, small numbers in the others, then least squares."""
    scale = w.norm()
    make = torch.Generator().manual_seed(0)
    found = []
    for term, core in zip(form.terms, train(form, w / scale), strict=True):
        shape = [form.sizes[x] for x in term]
        noise = torch.randn(shape, generator=make, dtype=w.dtype) * core.square().mean().sqrt() * NOISE
        if "z" in term:
            noise.select(term.index("z"), 0).copy_(core)
        else:
            noise = core + noise * (form.sizes["z"] > 1)
        found.append(noise)
    found, _ = refined(Problem(form, w / scale), found, SWEEPS["tr"], SETTLED)
    return [found[0] * scale, *found[1:]]


def cp(form: Form, w: Tensor) -> list[Tensor]:
    """The first penalty whose terms do not cancel, the largest at last; random starts, the same every time. With full
    ranks, exact."""
    if form.ranks[0] == w.numel() // max(form.modes):
        return _fibers(form, w)
    scale = w.norm()
    found: list[Tensor] = []
    for penalty in PENALTIES:
        make = torch.Generator().manual_seed(0)
        shapes = [[form.sizes[x] for x in term] for term in form.terms]
        start = [torch.randn(s, generator=make, dtype=w.dtype) / s[0] ** 0.5 for s in shapes]
        size = (1 / start[0].shape[1]) ** (0.5 / len(start))
        found, _ = refined(Problem(form, w / scale, penalty=penalty), [s * size for s in start], SWEEPS["cp"], SETTLED)
        if cancelling(found) * float(scale) ** 2 <= CANCELLING * float(w.square().sum()):
            break
    return [found[0] * scale, *found[1:]]


def _fibers(form: Form, w: Tensor) -> list[Tensor]:
    """A term for every fiber of w along its longest mode: unit vectors along the others."""
    tensor, longest = w.reshape(form.modes), max(range(len(form.modes)), key=form.modes.__getitem__)
    others = [k for k in range(tensor.ndim) if k != longest]
    rank = w.numel() // form.modes[longest]
    places = torch.unravel_index(torch.arange(rank), [form.modes[k] for k in others])
    found = {form.axes[longest]: tensor.permute(longest, *others).reshape(-1, rank)}
    for k, place in zip(others, places, strict=True):
        found[form.axes[k]] = torch.nn.functional.one_hot(place, form.modes[k]).T.to(w)
    return [found[term[0]].contiguous() for term in form.terms]


def cancelling(tensors: Sequence[Tensor]) -> float:
    """The sum of the squared norms of CP's rank-one terms. Where it is much larger than that of the matrix, terms grow
    against each other, and nothing can be rounded or trained any more."""
    return float(torch.stack([t.square().sum(dim=0) for t in tensors]).prod(dim=0).sum())


def _size(form: Form, letters: str) -> int:
    return prod(form.sizes[x] for x in letters)


def _shaped(form: Form, matrix: Tensor, letters: str, term: str) -> Tensor:
    """A matrix as a tensor of these letters, in the order of the term (without what closes a ring)."""
    wanted = "".join(x for x in term if x in letters)
    return torch.einsum(f"{letters}->{wanted}", matrix.reshape([form.sizes[x] for x in letters])).contiguous()


def _wider(u: Tensor, s: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    more = rank - len(s)
    pad = torch.nn.functional.pad
    return pad(u, (0, more)), pad(s, (0, more)), pad(v, (0, 0, 0, more))
