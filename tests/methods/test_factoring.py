import itertools
import math
from dataclasses import replace
from math import prod

import pytest
import torch

from featherweight.errors import UsageError
from featherweight.layers import scan
from featherweight.methods import Factorize, GridSpec, Plain, Status
from featherweight.methods.decompose import CANCELLING, cancelling, cp, decomposed, hosvd, train, truncated, tucker
from featherweight.methods.factoring import balanced, factors
from featherweight.methods.forms import FORMS, factored, form_at, form_of, full, refusal
from featherweight.methods.refine import Problem, contracted, refined, step
from featherweight.methods.vbmf import noise, rank, ranks_of, threshold
from featherweight.recipe import Override, Recipe, assign, method_of
from featherweight.stats import LayerStats
from featherweight.weights import Dense, Factors, Grid
from tests.methods.problems import inputs, problem, stats_of, weights
from tests.nets import tiny
from tests.reference import factoring as oracle

LAYERS = {  # (rows, cols), kernel
    "linear": ((12, 10), ()),
    "conv 3x3": ((8, 6 * 9), (3, 3)),
    "conv 1x1": ((8, 6), (1, 1)),
    "conv 3x1": ((8, 6 * 3), (3, 1)),
    "recurrent": ((4 * 4, 7), ()),
}
SHAPE, KERNEL = (6, 36), (3, 3)


def metric(cols, seed=0):
    h = stats_of(inputs(cols, 3 * cols, seed)).gram[0]
    return h / h.diagonal().mean()


def start(form, seed=0):
    make = torch.Generator().manual_seed(seed)
    return [torch.randn([form.sizes[x] for x in t], generator=make, dtype=torch.float64) for t in form.terms]


def tails(matrix, rank):
    return float((torch.linalg.svdvals(matrix)[rank:] ** 2).sum())


@pytest.mark.parametrize("name", FORMS)
def test_forms_keep_what_was_asked_for_and_waste_little(name):
    for shape, kernel in [((64, 576), (3, 3)), ((100, 300), ()), ((48, 96), (3, 1))]:
        if refusal(name, kernel):
            continue
        shares = []
        for keep in (0.2, 0.35, 0.5, 0.7):
            form = form_at(name, shape, kernel, keep)
            assert form.numbers == sum(prod(t.shape) for t in start(form))
            assert prod(form.modes) == prod(shape)
            shares.append(form.numbers / prod(shape))
            assert 0.9 * keep < shares[-1] <= keep
            assert form_of(name, shape, kernel, form.ranks) == form
        assert shares == sorted(shares)


def test_ranks_are_balanced_as_in_the_field():
    out, into = form_at("tucker", (128, 64 * 9), (3, 3), 0.4).ranks
    assert out / into == pytest.approx(2, rel=0.05)
    assert form_at("tt", (64, 576), (3, 3), 0.36).ranks == (8, 34, 8)  # full outside, as in the published ranks
    assert form_at("tt", (64, 576), (9,), 0.36).ranks == (8, 32, 31, 8)  # one side only: a core of its own
    assert max(r := form_at("tr", (64, 576), (3, 3), 0.5).ranks) - min(r) <= 1
    assert form_of("tucker", (8, 27), (3, 3), (99, 99)).ranks == (8, 3)
    assert [factored(n) for n in (64, 13, 10, 1)] == [(8, 8), (13,), (5, 2), (1,)]


def test_contractions_are_sums_of_products():
    for name in FORMS:
        form = form_at(name, (4, 2 * 9), KERNEL, 0.4)
        tensors = start(form)
        expected = oracle.product(form.axes, form.terms, form.sizes, tensors)
        found = contracted(list(zip(form.terms, tensors, strict=True)), form.axes)
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("layer", LAYERS)
def test_full_rank_is_exact(name, layer):
    shape, kernel = LAYERS[layer]
    if refusal(name, kernel):
        return
    w, form = weights(*shape, 1), full(name, shape, kernel)
    assert (Problem(form, w).matrix(decomposed(form, w)) - w).norm() <= 1e-10 * w.norm()


def test_two_factors_lose_the_tail_of_the_singular_values():
    w = weights(*SHAPE, 2)
    tensor = w.reshape(6, 4, 3, 3)
    unfolded = {
        "rows": w,
        "cols": tensor.permute(0, 2, 3, 1).reshape(-1, 4),
        "spatial": tensor.permute(0, 3, 1, 2).reshape(18, 12),
    }
    for name, matrix in unfolded.items():
        form = form_of(name, SHAPE, KERNEL, (3,))
        lost = Problem(form, w).loss(decomposed(form, w))
        assert lost == pytest.approx(tails(matrix, 3), rel=1e-10), name


@pytest.mark.parametrize("shape", [(4, 60), (60, 4), (7, 9)])
def test_singular_values_through_the_short_side(shape):
    w = weights(*shape, 3)
    u, s, v = truncated(w, 3)
    assert torch.allclose(s, torch.linalg.svdvals(w)[:3], rtol=1e-10)
    assert float((w - u @ torch.diag(s) @ v).square().sum()) == pytest.approx(tails(w, 3), rel=1e-10)


def test_a_train_is_within_its_bound():
    shape, kernel = (12, 6 * 9), (3, 3)
    w = weights(*shape, 4)
    form = form_at("tt", shape, kernel, 0.4)
    moved = torch.einsum(f"{form.axes}->mnxyjk", w.reshape(form.modes))
    sizes, (parts, bound, left) = form.sizes, (["m", "nx", "yj"], 0.0, 1)
    for part, r in zip(parts, form.ranks, strict=True):
        left *= math.prod(sizes[x] for x in part)
        bound += tails(moved.reshape(left, -1), r)
    lost = Problem(form, w).loss(train(form, w))
    assert 0 < lost <= bound * (1 + 1e-12)


def test_hooi_is_never_worse_than_hosvd():
    for seed in range(5):
        w = weights(*SHAPE, seed)
        form = form_of("tucker", SHAPE, KERNEL, (3, 2))
        first, last = (Problem(form, w).loss(make(form, w)) for make in (hosvd, tucker))
        assert last < first


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("seen", [False, True])
def test_a_step_finds_the_least_squares_solution_of_its_factor(name, seen):
    w, form = weights(*SHAPE, 5), form_at(name, SHAPE, KERNEL, 0.25)
    share = torch.linspace(0.5, 2, 6, dtype=torch.float64) if seen else None
    given = Problem(form, w, metric(36) if seen else None, share, penalty=0.01)
    for k, tensor in enumerate(tensors := start(form)):
        a = oracle.design(form.axes, form.terms, tensors, k)
        weight = torch.kron(torch.diag(share), given.hessian) if seen else torch.eye(len(a), dtype=w.dtype)
        normal = a.T @ weight @ a + 0.01 * torch.eye(a.shape[1], dtype=w.dtype)
        expected = torch.linalg.solve(normal, a.T @ weight @ w.reshape(-1)).reshape(tensor.shape)
        found = step(given, tensors, k, iterations=400)
        best, reached = (given.loss([*tensors[:k], x, *tensors[k + 1 :]]) for x in (expected, found))
        assert reached == pytest.approx(best, rel=1e-10), form.terms[k]
        assert (found - expected).norm() <= 1e-4 * expected.norm(), form.terms[k]


@pytest.mark.parametrize("name", FORMS)
def test_no_step_raises_the_loss(name):
    w, form = weights(*SHAPE, 6), form_at(name, SHAPE, KERNEL, 0.4)
    given, tensors = Problem(form, w, metric(36)), start(form, 1)
    losses = [given.loss(tensors)]
    for turn in range(3 * len(tensors)):
        k = turn % len(tensors)
        tensors[k] = step(given, tensors, k, iterations=1 + turn % 3)
        losses.append(given.loss(tensors))
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]
    assert refined(given, tensors, 2, 0.0)[1][-1] <= losses[-1]


def test_whitened_rows_are_the_optimum():
    w, h = weights(4, 6, 7) * 10, metric(6, 7)
    for r in (1, 2):
        form = form_of("rows", (4, 6), (), (r,))
        lost = Problem(form, w, h).loss(factors(Problem(form, w, h))[-1])
        assert lost == pytest.approx(oracle.low_rank(w, h, r), rel=1e-8)


def test_the_inputs_are_worth_looking_at():
    w, stats = problem(6, 36, seed=8)
    stats = replace(stats, taps=9)
    for name in ("rows", "spatial", "tt"):
        blind, seen = (Factorize(name, 0.5, (3, 3), whiten=x).solve(w, stats) for x in (False, True))
        assert seen.error < 0.5 * blind.error, name
        assert seen.weight.bits() == blind.weight.bits()
        assert (seen.info, blind.info) == ({"damp": 0.001}, {})


def test_rows_that_are_used_more_count_more():
    share = torch.tensor([0.6, 0.0, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    stats = replace(LayerStats.white(8), samples=torch.tensor([9]), row_share=share)
    w = weights(6, 8, 9)
    blind, seen = (Factorize("rows", ranks=(2,), whiten=x).solve(w, stats) for x in (False, True))
    assert seen.error < 0.8 * blind.error
    assert seen.status is Status.SOLVED


@pytest.mark.parametrize("layer", LAYERS)
def test_every_form_of_every_layer_comes_back(layer):
    shape, kernel = LAYERS[layer]
    w, stats = problem(*shape, seed=1)
    taps = prod(kernel)
    stats = replace(stats, taps=taps)
    for name in (*FORMS, "lowrank", "best"):
        for grid in (None, GridSpec(8, True), GridSpec(4)):
            if grid and name in ("tr", "cp", "best"):
                continue
            method = Factorize(name, 0.6, kernel, whiten=grid is None and name not in ("tr", "cp"), grid=grid)
            found = method.solve(w, stats)
            if layer == "conv 1x1":
                again = method.solve(w, stats).weight.tensors()
                assert all(torch.equal(t, again[n]) for n, t in found.weight.tensors().items())
            assert found.weight.dense().shape == w.shape
            if refusal(name, kernel):
                assert isinstance(found.weight, Dense)
                assert "spatial form needs" in found.note
                continue
            assert isinstance(found.weight, Factors)
            assert {type(p) for p in found.weight.parts} == {Dense if grid is None else Grid}
            assert method.for_layer(shape, kernel, 1) == method
            announced = 8 * method.storage(shape, taps)
            stored = found.weight.bits()
            assert (stored == announced) if name in FORMS else (stored <= announced), method
            loaded = Factors.load(w.shape, found.weight.meta(), found.weight.tensors())
            assert torch.equal(loaded.dense(), found.weight.dense())


def test_fine_grids_lose_little_and_refitting_helps():
    w, stats = problem(8, 54, seed=8)
    stats = replace(stats, taps=9)
    for name in ("rows", "spatial", "tucker", "tt"):
        method = Factorize(name, 0.6, (3, 3))
        errors = [replace(method, grid=g).solve(w, stats).error for g in (None, GridSpec(8, True), GridSpec(3))]
        assert errors[1] < 1.2 * errors[0]
        assert errors[1] < errors[2] < 0.5 * float((w @ stats.gram[0] * w).sum())


def test_balanced_factors_give_the_same_product():
    for name in FORMS:
        form = form_at(name, SHAPE, KERNEL, 0.4)
        tensors = start(form)
        tensors = [tensors[0] * 1e6, *tensors[1:]]
        for by_row in (False, True):
            even = balanced(form, tensors, by_row)
            a, b = (contracted(list(zip(form.terms, x, strict=True)), form.axes) for x in (tensors, even))
            assert (a - b).norm() <= 1e-12 * a.norm()
        sizes = [float(t.square().mean()) for t in even]
        assert max(sizes) == pytest.approx(min(sizes), rel=1e-9)
        if name in ("rows", "spatial"):
            slices = [
                t.movedim(x.index("r"), 0).flatten(1).norm(dim=1)
                for x, t in zip(form.terms, balanced(form, tensors), strict=True)
            ]
            assert torch.allclose(slices[0] / slices[1], (slices[0] / slices[1])[0], rtol=1e-9)


def test_terms_of_cp_do_not_cancel():
    make = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 6, generator=make, dtype=torch.float64) for _ in range(2))
    tensor = sum(torch.einsum("a,b,c->abc", *v) for v in ((a[0], a[1], b[2]), (a[0], b[1], a[2]), (b[0], a[1], a[2])))
    w = tensor.reshape(6, 36)  # of border rank 2: the best two terms grow without bound
    form = form_of("cp", (6, 36), (6, 1), (2,))
    assert cancelling(cp(form, w)) <= CANCELLING * float(w.square().sum())
    free, _ = refined(Problem(form, w), start(form), 150, 0.0)
    assert cancelling(free) > CANCELLING * float(w.square().sum())


def test_vbmf_finds_planted_ranks():
    make = torch.Generator().manual_seed(1)
    for rows, cols, planted in ((40, 60, 5), (30, 200, 3), (50, 50, 0)):
        u, v = (torch.randn(n, planted, generator=make, dtype=torch.float64) for n in (rows, cols))
        matrix = u @ v.T + 0.5 * torch.randn(rows, cols, generator=make, dtype=torch.float64)
        assert rank(matrix) == rank(matrix.T) == planted
        gamma = torch.linalg.svdvals(matrix)
        assert noise(gamma, rows, cols) == pytest.approx(0.25, rel=0.1)
    assert rank(torch.zeros(4, 5)) == 0


def test_vbmf_has_the_least_free_energy():
    make = torch.Generator().manual_seed(2)
    rows, cols = 4, 7
    low = torch.randn(rows, 1, generator=make, dtype=torch.float64) @ torch.randn(1, cols, generator=make).double() * 2
    gamma = torch.linalg.svdvals(low + 0.3 * torch.randn(rows, cols, generator=make, dtype=torch.float64))
    best = noise(gamma, rows, cols)
    energy, count = oracle.free_energy(gamma.tolist(), rows, cols, best)
    assert count == int((gamma > threshold(rows, cols, best)).sum()) == 1
    for other in (0.6, 0.9, 1.1, 1.7):
        assert oracle.free_energy(gamma.tolist(), rows, cols, best * other)[0] > energy
    edge = threshold(rows, cols, 0.1)
    assert oracle.component(edge * 1.02, rows, cols, 0.1) < 0 <= oracle.component(edge * 0.98, rows, cols, 0.1)


def test_vbmf_ranks_of_layers():
    make = torch.Generator().manual_seed(3)
    form = form_of("tucker", (24, 16 * 9), (3, 3), (3, 2))
    w = Problem(form, torch.zeros(24, 144, dtype=torch.float64)).matrix(start(form))
    w = w + 0.1 * w.std() * torch.randn(w.shape, generator=make, dtype=torch.float64)
    stats = LayerStats.white(144, taps=9)
    assert ranks_of("tucker", w, (3, 3)) == (3, 2)
    assert Factorize("tucker", kernel=(3, 3), ranks="vbmf").solve(w, stats).weight.sizes["r"] == 3
    kept = Factorize("tucker", kernel=(3, 3), ranks="vbmf").solve(torch.randn(w.shape, generator=make), stats)
    assert isinstance(kept.weight, Dense)
    assert "stands out from noise" in kept.note


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Factorize("svd", 0.5), "the form must be one of"),
        (lambda: Factorize("rows"), "keep or ranks"),
        (lambda: Factorize("rows", 0.5, ranks=(2,)), "keep or ranks"),
        (lambda: Factorize("rows", 0.0), "keep must be above 0"),
        (lambda: Factorize("rows", 1.5), "keep must be above 0"),
        (lambda: Factorize("cp", ranks="vbmf"), "'vbmf' are not for rings and CP"),
        (lambda: Factorize("best", ranks=(2,)), "ranks go with one form"),
        (lambda: Factorize("rows", ranks="many"), "'vbmf' or numbers"),
        (lambda: Factorize("tucker", ranks=(2,)).solve(*problem(4, 6)), None),
        (lambda: form_of("tucker", (4, 18), (3, 3), (2,)), "has 2 ranks"),
        (lambda: form_of("rows", (4, 18), (), (0,)), "whole numbers above 0"),
        (lambda: form_of("spatial", (4, 18), (9,), (1,)), "two dimensions, both longer than 1"),
        (lambda: form_at("rows", (4, 18), (5,), 0.5), "must divide 18 columns"),
        (lambda: method_of({"method": "tucker"}), "--keep 0.5, or --ranks vbmf"),
        (lambda: method_of({"method": "tucker", "keep": 0.5, "quantizer": "obq"}), "no setting 'quantizer'"),
        (lambda: method_of({"method": "tucker", "ranks": "5"}), "ranks must be vbmf"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    if said is None:
        make()  # a matrix of one tap has one rank
        return
    with pytest.raises(UsageError, match=said):
        make()


def test_what_cannot_be_factored_is_kept_with_the_reason():
    w, stats = problem(8, 10, blocks=2)
    grouped = Factorize("rows", 0.5).solve(w, stats)
    assert isinstance(grouped.weight, Dense)
    assert grouped.weight.values.dtype == torch.float16
    assert "2 groups" in grouped.note
    assert "no fewer numbers" in Factorize("rows", 1.0).solve(*problem(8, 10)).note
    found = scan(tiny())
    methods = assign(Recipe(method_of({"method": "tucker", "keep": 0.5, "bits": 8})), found)
    assert methods["conv1.weight"] == Factorize("tucker", 0.5, (3, 3), grid=GridSpec(8, True))
    assert methods["conv2.weight"] == Plain(grouped.note.replace("2 groups", "4 groups"))
    assert methods["fc.weight"] == Factorize("tucker", 0.5, grid=GridSpec(8, True))
    own = Override("conv2.weight", Factorize("rows", 0.5))
    with pytest.raises(UsageError, match=r"conv2.weight cannot be factored.*4 groups"):
        assign(Recipe(Plain(), (own,)), found)
    assert isinstance(assign(Recipe(Plain(), (replace(own, pattern="conv*"),)), found)["conv2.weight"], Plain)
    assert method_of({"method": "lowrank", "ranks": "vbmf"} | {"method": "tt"}) == Factorize("tt", ranks="vbmf")


def test_ranks_that_stand_out_are_found_for_whatever_form_needs_the_fewest_numbers():
    make = torch.Generator().manual_seed(5)
    flat = torch.randn(24, 1, generator=make).double() @ torch.randn(1, 12 * 9, generator=make).double()
    w = flat + 1e-3 * torch.randn(24, 12 * 9, generator=make).double()
    stats = LayerStats.white(12 * 9, taps=9)
    own = {
        n: Factorize(n, ranks="vbmf", kernel=(3, 3)).solve(w, stats).weight for n in ("rows", "cols", "lowrank", "best")
    }
    sizes = {n: sum(t.numel() for t in weight.tensors().values()) for n, weight in own.items()}
    assert sizes["lowrank"] == min(sizes["rows"], sizes["cols"])
    assert sizes["best"] <= sizes["lowrank"] < w.numel() / 2


def test_a_ring_too_heavy_to_multiply_out_is_refused_with_the_reason():
    ring = Factorize("tr", 0.5)
    assert "far more memory" in ring.refusal((1280, 320), 1, 1)
    assert replace(ring, keep=0.3).refusal((1280, 320), 1, 1) == ""
    w = weights(1280, 320, 6).float()
    solution = ring.solve(w, LayerStats.white(320))
    assert isinstance(solution.weight, Dense)
    assert solution.remark.startswith("kept as it is: multiplying its factors out")
