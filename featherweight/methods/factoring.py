"""A matrix as a product of small tensors (see `forms`), found without data or for the inputs that the layer sees.

Without inputs, `decompose` has the answer. With them, rows is still exact: the SVD of W L, where L Lᵀ is the damped
second moment of the inputs. All other forms start from the better of two decompositions, of the matrix and of the
matrix seen through the moments of its input channels, and are refined by alternating least squares in the metric of the
inputs (`refine`); what they end with is never worse than what they had without data.

Factors are balanced: neighbours have the same norm at every rank, so fp16 holds them well. On a grid the factor whose
rows the rank is takes it all, as its scales are by row, and the others have slices of one size. Then one factor
after another is rounded and those that are not rounded yet refitted; in a second round each is refitted beside the
rounded others and rounded again, and stays as it was where that does not help.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from featherweight._linalg import damped_cholesky
from featherweight.errors import require
from featherweight.methods import forms, vbmf
from featherweight.methods.base import Solution, output_energy, status_of, usable
from featherweight.methods.decompose import CANCELLING, PENALTIES, cancelling, decomposed, truncated
from featherweight.methods.forms import FORMS, Form, form_at, form_of
from featherweight.methods.grids import SEARCH, GridSpec, choose
from featherweight.methods.refine import COLS, INNER, Problem, marginal, refined, step
from featherweight.stats import LayerStats
from featherweight.weights import Dense, Factors, Grid
from featherweight.weights.base import float_type
from featherweight.weights.factors import heavy, matrix_of

CHOICES = {"lowrank": ("rows", "cols"), "best": ("rows", "cols", "spatial", "tucker")}
SWEEPS = 10  # of alternating least squares on data, at most
SETTLED = 1e-3  # of the loss: a sweep that gains less is the last
UNUSED = 1e-3  # of the mean: what a row that was never used counts


@final
@dataclass(frozen=True, slots=True)
class Plain:
    """Store the matrix as it is, in fp16 where that is exact enough. why: the reason, in words."""

    name: ClassVar[str] = "plain"
    why: str = ""

    @property
    def label(self) -> str:
        return "fp16"

    def solve(self, w: Tensor, stats: LayerStats) -> Solution:
        values = w.detach().float().contiguous()
        return Solution.of(Dense(values.to(float_type(values))), w, stats, remark=self.why)

    def storage(self, shape: tuple[int, int], taps: int = 1, groups: int = 1) -> int:
        return 2 * shape[0] * shape[1]

    def work(self, shape: tuple[int, int], blocks: int) -> float:
        return shape[0] * shape[1]


@final
@dataclass(frozen=True, slots=True)
class Factorize:
    """form: one of `forms.FORMS`, "lowrank" (the better of rows and cols) or "best" (of rows, cols, spatial, tucker).
    keep: share of the dense numbers that the factors have at most (ranks are 1 at least), 1 for full ranks. ranks: in
    its place, as in `forms.form_of`, or "vbmf" for those that stand out from noise. kernel: sides of the layer's
    kernel; empty takes all taps as one side. sweeps: of alternating least squares, at most. whiten: whether the
    layer's inputs count, where there are any. grid: of the factors, None for fp16. damp: relative damping of the
    inputs' moments.

    What has groups, cannot have the form, or would have no fewer numbers than before is stored as it is, with a remark.
    """

    name: ClassVar[str] = "factors"
    form: str
    keep: float | None = None
    kernel: tuple[int, ...] = ()
    whiten: bool = True
    grid: GridSpec | None = None
    ranks: tuple[int, ...] | str | None = None
    damp: float = 0.001
    sweeps: int = SWEEPS

    def __post_init__(self) -> None:
        known = (*FORMS, *CHOICES)
        require(self.form in known, f"the form must be one of {', '.join(known)}", self.form)
        require((self.keep is None) != (self.ranks is None), "give keep or ranks, one of them", (self.keep, self.ranks))
        if self.keep is not None:
            require(0 < self.keep <= 1, "keep must be above 0 and at most 1", self.keep)
        if isinstance(self.ranks, str):
            require(self.ranks == "vbmf", "ranks must be 'vbmf' or numbers", self.ranks)
            has = self.form in (*vbmf.FORMS, *CHOICES)
            require(has, "ranks 'vbmf' are not for rings and CP, whose ranks belong to no cut; give keep", self.form)
        elif self.ranks is not None:
            require(self.form in FORMS, f"ranks go with one form ({', '.join(FORMS)}); give keep", self.form)
        require(0 <= self.damp < math.inf, "damp must be at least 0", self.damp)

    @property
    def label(self) -> str:
        share = f"{self.keep:.3g}" if self.keep is not None else self.ranks
        share = share if isinstance(share, str) else "x".join(map(str, share or ()))
        free = "" if self.whiten else ", no data"
        return f"{self.form} {share}{free}{'' if self.grid is None else f', {self.grid.label}'}"

    def for_layer(self, shape: tuple[int, int], kernel: tuple[int, ...], groups: int) -> "Factorize | Plain":
        """With the kernel of the layer, or what is done with it where it cannot be factored."""
        method = replace(self, kernel=kernel)
        why = method.refusal(shape, math.prod(kernel), groups)
        return Plain(f"kept as it is: {why}") if why else method

    def as_in(self, weight: Factors) -> "Factorize":
        """With the form that a weight solved by this method has, where several were tried."""
        taps = math.prod(self.kernel)
        tried = [f for f in self._forms(weight.shape, taps) if (f.terms, dict(f.sizes)) == (weight.terms, weight.sizes)]
        return replace(self, form=tried[0].name) if tried else self

    def refusal(self, shape: tuple[int, int], taps: int, groups: int) -> str:
        """Why a (rows, cols) matrix is not factored, in words; empty where it is, or where only solving tells."""
        if why := forms.refusal("rows", (), groups):
            return why
        kernel, names = self._kernel(taps), CHOICES.get(self.form, (self.form,))
        whys = [forms.refusal(name, kernel) for name in names]
        if all(whys):
            return whys[0]
        smaller = [f for f in self._forms(shape, taps) if f.numbers < shape[0] * shape[1]]
        if not smaller:
            return "" if self.ranks == "vbmf" else "its factors would have no fewer numbers"
        possible = any(not heavy(f.axes, f.terms, f.sizes) for f in smaller)
        return "" if possible else "multiplying its factors out would need far more memory than the matrix; keep less"

    def solve(self, w: Tensor, stats: LayerStats) -> Solution:
        shape, seen, taps = (w.shape[0], w.shape[1]), usable(stats), stats.taps
        if why := self.refusal(shape, taps, stats.blocks):
            return Plain(f"kept as it is: {why}").solve(w, stats)
        exact = w.detach().double().contiguous()
        tried = [f for f in self._forms(shape, taps) if f.numbers < w.numel() and not heavy(f.axes, f.terms, f.sizes)]
        if self.ranks == "vbmf":
            kernel = self._kernel(taps)
            every = {n: vbmf.ranks_of(n, exact, kernel) for n in self._names(kernel)}
            made = [form_of(n, shape, kernel, ranks) for n, ranks in every.items() if 0 not in ranks]
            tried = sorted(made, key=lambda f: f.numbers)[:1]  # all hold what stands out
            if not tried or tried[0].numbers >= w.numel():
                why = "no rank stands out from noise" if not tried else "its factors would have no fewer numbers"
                return Plain(f"kept as it is: {why}").solve(w, stats)
        metric, damp = _metric(seen, self.damp) if self.whiten else ((None, None), 0.0)
        judge = seen if self.whiten else LayerStats.white(shape[1], taps=taps)
        scale = float(exact.abs().amax()) or 1.0
        problems = [Problem(form, exact / scale, *metric) for form in tried]
        found = [(p, tensors) for p in problems for tensors in factors(p, self.sweeps)]
        problem, tensors = min(found, key=lambda x: output_energy(x[0].w - x[0].matrix(x[1]), judge))
        if self.grid is None:
            parts = fp16(problem.form, tensors, scale)
        else:
            parts = on_grids(problem, tensors, self.grid, scale)
        form = problem.form
        weight = Factors(shape, form.axes, form.terms, dict(form.sizes), tuple(parts))
        status = status_of(stats, damp > self.damp)
        return Solution.of(weight, w, stats, status, {"damp": damp} if metric != (None, None) else {})

    def storage(self, shape: tuple[int, int], taps: int = 1, groups: int = 1) -> int:
        """The most that one of the forms takes; of vbmf, whose ranks only solving tells, what the dense matrix does."""
        if self.ranks == "vbmf" or self.refusal(shape, taps, groups):
            return Plain().storage(shape)
        found = []
        for form in self._forms(shape, taps):
            sizes = [matrix_of(term, form.sizes) for term in form.terms]
            found.append(sum(2 * r * c if self.grid is None else self.grid.storage((r, c)) for r, c in sizes))
        return max(found)

    def work(self, shape: tuple[int, int], blocks: int) -> float:
        rows, cols = shape
        tries = len(CHOICES.get(self.form, (self.form,)))
        refining = 3 * self.sweeps * INNER * cols if self.whiten else 0
        return tries * rows * cols * (10 * min(rows, cols) + refining) + (SEARCH * rows * cols if self.grid else 0)

    def _kernel(self, taps: int) -> tuple[int, ...]:
        if self.kernel:
            require(math.prod(self.kernel) == taps, f"the kernel must have {taps} taps", self.kernel)
        return self.kernel or ((taps,) if taps > 1 else ())

    def _names(self, kernel: tuple[int, ...]) -> list[str]:
        """The forms that a layer can have; of several that are the same, the first."""
        if math.prod(kernel) == 1 and self.form in CHOICES:
            return ["rows"]
        return [n for n in CHOICES.get(self.form, (self.form,)) if not forms.refusal(n, kernel)]

    def _forms(self, shape: tuple[int, int], taps: int) -> list[Form]:
        """What is tried, once where several are the same. Of vbmf, nothing yet."""
        kernel = self._kernel(taps)
        names = self._names(kernel)
        if isinstance(self.ranks, str):
            return []
        if self.ranks is not None:
            return [form_of(n, shape, kernel, self.ranks) for n in names]
        return [form_at(n, shape, kernel, self.keep or 1.0) for n in names]


def factors(problem: Problem, sweeps: int = SWEEPS) -> list[list[Tensor]]:
    """Factors found without data and, where the metric is not that of all alike, for it; not yet balanced."""
    form, w, hessian = problem.form, problem.w, problem.hessian
    plain = decomposed(form, w)
    if (hessian is None and problem.share is None) or not w.any():
        return [plain]
    if form.name == "rows":
        return [plain, _whitened_rows(problem)]
    starts = [plain]
    if hessian is not None and "i" in form.axes:
        starts.append(_seen_through_channels(form, w, hessian))
    start = min(starts, key=problem.loss)
    if form.name == "cp" and len(form.terms) > 2:
        return [plain, _penalised(problem, start, sweeps)]
    return [plain, refined(problem, start, sweeps, SETTLED)[0]]


def _penalised(problem: Problem, start: list[Tensor], sweeps: int) -> list[Tensor]:
    """CP refined under the smallest penalty under which its terms do not cancel; where they always do, the start."""
    zeros = [torch.zeros_like(t) for t in start]
    scale = problem.loss(zeros) ** 0.5
    if scale == 0:
        return start
    most = CANCELLING * float(problem.w.square().sum()) / scale**2
    for penalty in PENALTIES:
        scaled = replace(problem, w=problem.w / scale, penalty=penalty)
        even = balanced(problem.form, _scaled(start, 1 / scale))
        found, _ = refined(scaled, even, sweeps, SETTLED)
        if cancelling(found) <= most:
            return _scaled(found, scale)
    return start


def balanced(form: Form, tensors: Sequence[Tensor], by_row: bool = False) -> list[Tensor]:
    """The same product with slices of proportional norm in all factors that share a rank. by_row: all of it goes to the
    factor whose rows the rank is, where there is one, and slices of the others have entries of one size. Entries of
    different factors are of one size, as far as that goes."""
    found = list(tensors)
    for x in [a for a in form.sizes if a not in form.axes] * 2:  # a rank disturbs the balance of its neighbours
        users = [k for k, term in enumerate(form.terms) if x in term]
        norms = [_slices(found[k], form.terms[k], x) for k in users]
        alive = torch.stack(norms).amin(dim=0) > 0
        wanted = [torch.stack(norms).log().mean(dim=0).exp()] * len(users)
        rows = [n for n, k in enumerate(users) if form.terms[k][0] == x]
        if by_row and rows:
            wanted = [torch.full_like(v, (found[k].numel() / len(v)) ** 0.5) for v, k in zip(norms, users, strict=True)]
            rest = torch.stack([v for n, v in enumerate(wanted) if n != rows[0]]).prod(dim=0)
            wanted[rows[0]] = torch.stack(norms).prod(dim=0) / rest
        for k, had, gets in zip(users, norms, wanted, strict=True):
            ratio = torch.where(alive, gets / had, 1.0)
            found[k] = torch.einsum(f"{form.terms[k]},{x}->{form.terms[k]}", found[k], ratio)
    sizes = torch.stack([t.square().mean().sqrt() for t in found])
    if not sizes.all():
        return found
    return [t * ratio for t, ratio in zip(found, sizes.log().mean().exp() / sizes, strict=True)]


def fp16(form: Form, tensors: Sequence[Tensor], scale: float = 1.0) -> list[Dense | Grid]:
    """Balanced factors of `scale` times the product, as matrices, fp16 where that is exact enough."""
    found: list[Dense | Grid] = []
    for k, tensor in enumerate(balanced(form, _scaled(tensors, scale))):
        values = tensor.reshape(form.sizes[form.terms[k][0]], -1).float()
        found.append(Dense(values.to(float_type(values)).contiguous()))
    return found


def on_grids(problem: Problem, tensors: Sequence[Tensor], spec: GridSpec, scale: float = 1.0) -> list[Dense | Grid]:
    """Factors of `scale` times the product on grids, refitted to each other while they are rounded."""
    form = problem.form
    problem = replace(problem, w=problem.w * scale)
    now, grids = balanced(form, _scaled(tensors, scale), by_row=True), dict[int, Grid]()

    def rounded(k: int, tensor: Tensor) -> tuple[Grid, Tensor]:
        matrix = tensor.reshape(form.sizes[form.terms[k][0]], -1)
        points = choose(matrix, spec)
        grid = points.grid(points.round(matrix))
        return grid, grid.dense().double().reshape(tensor.shape)

    for k in range(len(now)):
        grids[k], now[k] = rounded(k, now[k])
        for other in range(k + 1, len(now)):
            now[other] = step(problem, now, other)
    loss = problem.loss(now)
    for k in range(len(now)):
        grid, tensor = rounded(k, step(problem, now, k))
        moved = [*now[:k], tensor, *now[k + 1 :]]
        if (after := problem.loss(moved)) < loss:
            now, grids[k], loss = moved, grid, after
    return [grids[k] for k in range(len(now))]


def _metric(stats: LayerStats, damp: float) -> tuple[tuple[Tensor | None, Tensor | None], float]:
    """(Hessian of unit power and with damping, what rows count), None for what is all alike; the damping it took."""
    hessian, share, gram = None, None, stats.gram[0]
    used = damp
    if not torch.equal(gram, torch.eye(len(gram), dtype=gram.dtype)):
        damped, _, used = damped_cholesky(stats.gram, damp)
        hessian = damped[0] / damped[0].diagonal().mean()
    if stats.row_share is not None:
        share = stats.row_share.double()
        share = share / share.mean().clamp(min=1e-300) + UNUSED
    return (hessian, share), used


def _whitened_rows(problem: Problem) -> list[Tensor]:
    """The optimum of low rank: the SVD of the matrix in the root of the metric."""
    w, root = problem.w, None
    if problem.hessian is not None:
        root = torch.linalg.cholesky(problem.hessian)
        w = w @ root
    weights = torch.ones(len(w), dtype=w.dtype) if problem.share is None else problem.share.sqrt()
    u, s, v = truncated(w * weights[:, None], problem.form.sizes["r"])
    right = s.sqrt()[:, None] * v
    if root is not None:
        right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    return [u * s.sqrt() / weights[:, None], right]


def _seen_through_channels(form: Form, w: Tensor, hessian: Tensor) -> list[Tensor]:
    """The decomposition of the matrix times the root of its input channels' moments, which is then taken out again."""
    letters = "".join(x for x in form.axes if x in COLS)
    moments = marginal(hessian, letters, [form.sizes[x] for x in letters], "i")
    root = torch.linalg.cholesky(moments)
    seen = torch.einsum(f"{form.axes},iz->{form.axes.replace('i', 'z')}", w.reshape(form.modes), root)
    found = decomposed(form, seen.reshape(w.shape).contiguous())
    k = next(n for n, term in enumerate(form.terms) if "i" in term)
    term = form.terms[k]
    inverse = torch.linalg.inv(root)
    found[k] = torch.einsum(f"{term},iz->{term.replace('i', 'z')}", found[k], inverse)
    return found


def _slices(tensor: Tensor, term: str, letter: str) -> Tensor:
    return tensor.square().sum(dim=[n for n, x in enumerate(term) if x != letter]).sqrt()


def _scaled(tensors: Sequence[Tensor], scale: float) -> list[Tensor]:
    return [t * scale ** (1 / len(tensors)) for t in tensors]
