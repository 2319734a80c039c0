import math

import numpy as np
import pytest
import torch

from featherweight._linalg import damped
from featherweight.errors import UsageError
from featherweight.methods import Gptq, GridSpec, Magnitude, Obq, Obs, Rtn, Status, Unstructured, obq, traces
from featherweight.methods.grids import Points, choose
from featherweight.stats import LayerStats
from tests.methods.problems import dependent, inputs, problem, row_hessians, stats_of, weights
from tests.reference import grids, obs

SAME = 1e-10  # least squares in float64 by another route

SPECS = [GridSpec(2), GridSpec(3, True), GridSpec(1, True), GridSpec(4, group=4), GridSpec(2, group=0)]


def rows_of(w, hessian, points):
    """Everything the oracles need, row by row."""
    scale, zero = (t.numpy() for t in points.entries())
    for r, h in row_hessians(w, hessian):
        yield r, w[r].numpy(), h.numpy(), scale[r], zero[r], 2**points.spec.bits - 1


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("rows", "cols", "blocks"), [(3, 1, 1), (4, 2, 1), (4, 6, 2), (5, 9, 5), (6, 18, 1)])
def test_greedy_is_that_of_explicit_inverses(rows, cols, blocks, spec):
    w, stats = problem(rows, cols, seed=cols, blocks=blocks)
    points = choose(w, spec)
    codes = obq.greedy(w, stats.gram, points)
    for r, *row in rows_of(w, stats.gram, points):
        assert codes[r].tolist() == obs.quantize_row(*row).tolist()


def test_greedy_rounds_weights_outside_the_grid_first():
    """With a grid much smaller than the weights nearly every choice is the outlier rule's."""
    w, stats = problem(6, 12, seed=1)
    points = Points(GridSpec(2), (6, 12), torch.full((6, 1), 0.02), torch.ones(6, 1, dtype=torch.uint8))
    codes = obq.greedy(w, stats.gram, points)
    for r, *row in rows_of(w, stats.gram, points):
        assert codes[r].tolist() == obs.quantize_row(*row).tolist()


@pytest.mark.parametrize("tile", [1, 8 * 24 * 30 * 2, 1 << 25])  # one row at a time, two, all
@pytest.mark.parametrize("spec", SPECS)
def test_wide_layers_are_rounded_alike(spec, tile, monkeypatch):
    w, stats = problem(5, 24, seed=4)
    points = choose(w, spec)
    narrow = obq.greedy(w, stats.gram, points)
    for name, value in (("WIDE", 4), ("CHUNK", 6), ("PANEL", 5), ("TILE", tile)):
        monkeypatch.setattr(traces, name, value)
    codes = obq.greedy(w, stats.gram, points)
    assert torch.equal(codes, narrow)
    for r, *row in rows_of(w, stats.gram, points):
        assert codes[r].tolist() == obs.quantize_row(*row).tolist()


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("spec", SPECS)
def test_greedy_on_a_support_is_greedy_without_the_other_columns(spec, blocks):
    w, stats = problem(6, 12, seed=2, blocks=blocks)
    keep = torch.rand(6, 12, generator=torch.Generator().manual_seed(0)) < 0.6
    keep[0], keep[1] = False, True
    points = choose(w, spec, keep=keep)
    codes = obq.greedy(w, stats.gram, points, keep)
    for r, row, h, scale, zero, top in rows_of(w, stats.gram, points):
        k = keep[r].numpy()
        expected = obs.quantize_row(row[k], h[np.ix_(k, k)], scale[k], zero[k], top)
        assert codes[r].numpy()[k].tolist() == expected.tolist()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("sparse", [False, True])
def test_polish_is_coordinate_descent_and_never_harms(spec, sparse):
    w, stats = problem(6, 10, seed=3, blocks=2)
    keep = torch.rand(6, 10, generator=torch.Generator().manual_seed(1)) < 0.7 if sparse else None
    points = choose(w, spec, keep=keep)
    rounded = points.round(w)
    codes = obq.polish(w, stats.gram, points, rounded, keep)
    before = obq.row_errors(w, stats.gram, points, rounded, keep)
    after = obq.row_errors(w, stats.gram, points, codes, keep)
    assert (after <= before * (1 + 1e-12)).all()
    assert after.sum() < before.sum()
    mask = np.ones((6, 10), bool) if keep is None else keep.numpy()
    for r, row, h, scale, zero, top in rows_of(w, stats.gram, points):
        expected = grids.descend(row, h, scale, zero, top, rounded[r].numpy().astype(int), mask[r], obq.SWEEPS)
        assert codes[r].numpy()[mask[r]].tolist() == expected[mask[r]].tolist()
        decoded = np.where(mask[r], grids.decode(codes[r].numpy().astype(int), scale, zero), 0.0)
        assert float(after[r]) == pytest.approx(obs.loss(row, h, decoded), rel=SAME)


def test_polish_leaves_its_arguments_alone():
    w, stats = problem(4, 10, seed=4)
    points = choose(w, GridSpec(2))
    rounded = points.round(w)
    before = rounded.clone()
    assert not torch.equal(obq.polish(w, stats.gram, points, rounded), before)
    assert torch.equal(rounded, before)


def test_no_codes_beat_brute_force_and_obq_comes_close():
    found, best, best_on_the_first_grid = [], [], []
    for seed in range(5):
        w, stats = problem(3, 5, seed=seed)
        solution = Obq(GridSpec(2), damp=0.0).solve(w, stats)
        final = Points(GridSpec(2), (3, 5), solution.weight.scale, solution.weight.zero)
        first = choose(w, GridSpec(2), stats.gram.diagonal(dim1=1, dim2=2))
        least, least_first = (
            sum(grids.best_codes_loss(*row) for _, *row in rows_of(w, stats.gram, points)) for points in (final, first)
        )
        rounded = first.round(w)
        for codes in (rounded, obq.greedy(w, stats.gram, first), obq.polish(w, stats.gram, first, rounded)):
            assert float(obq.row_errors(w, stats.gram, first, codes).sum()) >= least_first * (1 - SAME)
        assert solution.error >= least * (1 - SAME)
        found.append(solution.error)
        best.append(least)
        best_on_the_first_grid.append(least_first)
    assert sum(found) <= 1.2 * sum(best)
    assert sum(found) <= sum(best_on_the_first_grid)  # better scales make up for codes that are not the best


def test_without_correlation_the_nearest_codes_are_the_best():
    w = weights(4, 5, seed=0)
    points = choose(w, GridSpec(2))
    eye = torch.eye(5, dtype=torch.float64)[None]
    for codes in (obq.greedy(w, eye, points), obq.polish(w, eye, points, torch.zeros(4, 5, dtype=torch.uint8))):
        assert torch.equal(codes, points.round(w))
    best = sum(grids.best_codes_loss(*row) for _, *row in rows_of(w, eye, points))
    assert float(obq.row_errors(w, eye, points, points.round(w)).sum()) == pytest.approx(best, rel=SAME)


# ---------------------------------------------------------------- scales
def float64_points(w, spec, by=1.0):
    points = choose(w, spec)
    return Points(spec, points.shape, points.scale.double() * by, points.zero)


@pytest.mark.parametrize("spec", [GridSpec(2), GridSpec(4), GridSpec(3, True), GridSpec(1, True)])
def test_a_refitted_scale_is_the_least_squares_optimum(spec):
    for seed in range(3):
        w, stats = problem(1, 8, seed=seed)
        points = float64_points(w, spec, by=1.07)
        codes = points.round(w)
        fresh, _ = obq._refitted(w, stats.gram, points, codes, None)
        steps = (codes.double() - points.entries()[1]).numpy()
        expected = grids.best_scale(w.numpy(), stats.gram[0].numpy(), steps)
        assert float(fresh.scale) == pytest.approx(expected, rel=SAME)
        assert fresh.zero is points.zero


def test_a_refitted_scale_of_a_pruned_row_looks_at_the_kept_entries():
    w, stats = problem(1, 8, seed=0)
    keep = torch.tensor([[True, False, True, True, False, True, True, True]])
    points = float64_points(w, GridSpec(3), by=1.07)
    codes = points.round(w)
    fresh, _ = obq._refitted(w, stats.gram, points, codes, keep)
    steps = torch.where(keep, codes.double() - points.entries()[1], 0.0).numpy()
    expected = grids.best_scale(w.numpy(), stats.gram[0].numpy(), steps)
    assert float(fresh.scale) == pytest.approx(expected, rel=SAME)


def test_a_scale_that_should_be_negative_stays():
    """Weights of the other sign than their codes: the optimum would turn the grid around."""
    points = Points(GridSpec(2, True), (1, 2), torch.tensor([[0.5]], dtype=torch.float64), None)
    codes = torch.tensor([[3, 3]], dtype=torch.uint8)
    w, eye = torch.tensor([[-1.0, -1.0]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)[None]
    fresh, _ = obq._refitted(w, eye, points, codes, None)
    assert float(fresh.scale) == 0.5


def test_a_refitted_scale_of_a_whole_matrix_sums_over_rows_and_blocks():
    w, stats = problem(4, 8, seed=2, blocks=2)
    points = float64_points(w, GridSpec(3, group=0), by=1.07)
    codes = points.round(w)
    fresh, _ = obq._refitted(w, stats.gram, points, codes, None)
    steps = codes.double() - points.entries()[1]
    roots = [torch.linalg.cholesky(h).mT for h in stats.gram]
    column = torch.cat([(s @ roots[r // 2].mT) for r, s in enumerate(steps)])
    wanted = torch.cat([(s @ roots[r // 2].mT) for r, s in enumerate(w)])
    assert float(fresh.scale) == pytest.approx(float(column @ wanted / (column @ column)), rel=SAME)


def test_refitted_scales_of_groups_are_each_the_optimum_given_those_before():
    w, stats = problem(2, 10, seed=3)
    points = float64_points(w, GridSpec(2, group=4), by=1.07)
    codes = points.round(w)
    fresh, _ = obq._refitted(w, stats.gram, points, codes, None)
    c = (codes.double() - points.entries()[1]).numpy()
    scale = points.scale.numpy().copy()
    for r, h in row_hessians(w, stats.gram):
        for g in range(3):
            own = np.where(np.arange(10) // 4 == g, c[r], 0.0)
            others = np.repeat(scale[r], 4)[:10] * (c[r] - own)
            scale[r, g] = grids.best_scale((w[r].numpy() - others)[None], h.numpy(), own[None])
    np.testing.assert_allclose(fresh.scale, scale, rtol=SAME)


@pytest.mark.parametrize("spec", [*SPECS, GridSpec(2, group=2)])
def test_refitting_never_harms_a_row(spec):
    """Neither where half precision rounds a scale the wrong way, nor where there is nothing more to gain."""
    for seed in range(15):
        w, stats = problem(2, 6, seed=seed)
        points, codes = choose(w, spec), choose(w, spec).round(w)
        for _ in range(5):
            before = obq.row_errors(w, stats.gram, points, codes)
            points, codes = obq._refitted(w, stats.gram, points, codes, None)
            after = obq.row_errors(w, stats.gram, points, codes)
            assert after.sum() <= before.sum() * (1 + 1e-12)
            assert spec.group == 0 or (after <= before * (1 + 1e-12)).all()
            assert points.scale.dtype == torch.float16
            assert (points.scale > 0).all()


# ---------------------------------------------------------------- the method
@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [None, 0, 10])
def test_obq_beats_gptq_beats_rounding(group, symmetric, bits, blocks):
    w, stats = problem(8, 32, seed=5, blocks=blocks)
    spec = GridSpec(bits, symmetric, group)
    ours, theirs, nearest = (m.solve(w, stats) for m in (Obq(spec, 0.001), Gptq(spec, 0.001), Rtn(spec)))
    assert ours.error < theirs.error < nearest.error
    assert ours.weight.bits() == theirs.weight.bits() == nearest.weight.bits()


def test_obq_is_at_least_as_good_as_each_of_its_starts():
    for seed in range(4):
        w, stats = problem(6, 16, seed=seed)
        hessian = damped(stats.gram, 0.001)
        points = choose(w, GridSpec(2), stats.gram.diagonal(dim1=1, dim2=2))
        solution = Obq(GridSpec(2), damp=0.001).solve(w, stats)
        final = Points(GridSpec(2), (6, 16), solution.weight.scale, solution.weight.zero)
        found = obq.row_errors(w, hessian, final, solution.weight.codes)
        for codes in (obq.greedy(w, hessian, points), obq.gptq.quantize(w, stats.gram, points, 0.001, True, None)[0]):
            assert (found <= obq.row_errors(w, hessian, points, codes) * (1 + 1e-12)).all()


@pytest.mark.parametrize("samples", [3, 15, 19])
def test_a_dependent_hessian_is_damped_and_that_is_said(samples):
    for seed in range(4):
        w, stats = weights(3, 20, seed), dependent(20, seed, samples)
        solution = Obq(GridSpec(4), damp=0.0).solve(w, stats)
        assert solution.status is Status.DAMPED
        assert 1e-8 <= solution.info["damp"] <= 1e-6
        assert solution.relative_error < 0.1


def test_blocks_are_solved_as_if_alone():
    """A grouped convolution is so many small layers."""
    w, stats = problem(8, 12, seed=6, blocks=4)
    for method in (Gptq(GridSpec(3)), Obq(GridSpec(2, True, group=5))):
        whole = method.solve(w, stats).weight.dense()
        for b in range(4):
            part = LayerStats(stats.gram[b : b + 1], stats.mean[b : b + 1], stats.samples[b : b + 1])
            assert torch.equal(whole[2 * b : 2 * b + 2], method.solve(w[2 * b : 2 * b + 2], part).weight.dense())


@pytest.mark.parametrize(
    "method",
    [Rtn(GridSpec(3)), Gptq(GridSpec(3)), Obq(GridSpec(3)), Obs(Unstructured(0.5)), Magnitude(Unstructured(0.5))],
)
def test_solutions_follow_scaling_and_reordering(method):
    w, stats = problem(6, 14, seed=7)
    plain = method.solve(w, stats)
    for power in (2.0**6, 2.0**-40):  # damping and the like are relative
        louder = LayerStats(stats.gram * power, stats.mean * power**0.5, stats.samples)
        assert torch.equal(method.solve(w, louder).weight.dense(), plain.weight.dense())
    assert torch.equal(method.solve(w * 4, stats).weight.dense(), plain.weight.dense() * 4)
    rows = torch.tensor([3, 0, 5, 1, 2, 4])
    assert torch.allclose(method.solve(w[rows], stats).weight.dense(), plain.weight.dense()[rows], rtol=1e-3)
    if not isinstance(method, Obq):  # coordinate descent goes from left to right
        cols = torch.arange(14).roll(5).flip(0)
        moved = LayerStats(stats.gram[:, cols][:, :, cols], stats.mean[:, cols], stats.samples)
        assert torch.allclose(method.solve(w[:, cols], moved).weight.dense(), plain.weight.dense()[:, cols], rtol=1e-3)


@pytest.mark.parametrize("method", [Gptq(GridSpec(3, group=0)), Obq(GridSpec(3, group=0)), Obq(GridSpec(2, True, 0))])
def test_a_row_that_is_used_more_often_counts_as_so_many_rows(method):
    times = torch.tensor([1, 2, 9])
    w = weights(3, 10, seed=9) * torch.tensor([[1.0], [3.0], [1.0]])
    eye, mean = torch.eye(10, dtype=torch.float64)[None], torch.zeros(1, 10, dtype=torch.float64)
    shared = LayerStats(eye, mean, torch.tensor([12]), times / times.sum().double())
    alike = LayerStats(eye, mean, torch.tensor([12]))
    expected = method.solve(w.repeat_interleave(times, dim=0), alike).weight.dense()
    found = method.solve(w, shared).weight.dense()
    assert torch.equal(found.repeat_interleave(times, dim=0), expected)
    assert not torch.equal(found, method.solve(w, alike).weight.dense())


def test_one_strong_input_among_weak_ones():
    """Where the greedy order is poor, rows are as good as in the order of power."""
    x = inputs(24, 200, seed=8)
    x[:, :, 0] += 50
    w, stats = weights(8, 24, seed=8), stats_of(x)
    assert Obq(GridSpec(3)).solve(w, stats).error < Gptq(GridSpec(3)).solve(w, stats).error


@pytest.mark.parametrize("damp", [-1e-9, math.inf, math.nan])
def test_impossible_damping_is_refused(damp):
    with pytest.raises(UsageError, match="damp"):
        Obq(GridSpec(4), damp=damp)
    with pytest.raises(UsageError, match="damp"):
        Obs(Unstructured(0.5), damp=damp)
