import math

import numpy as np
import pytest
import torch

from featherweight._linalg import damped
from featherweight.errors import UsageError
from featherweight.methods import Gptq, GridSpec, Magnitude, Rtn, Status, Unstructured, gptq
from featherweight.methods.grids import choose
from featherweight.stats import LayerStats
from tests.methods.problems import dependent, problem, row_hessians, weights
from tests.reference import gptq as oracle


def expected_codes(w, gram, points, damp, act_order, keep=None):
    """Codes by the oracle, row by row."""
    scale, zero = points.entries()
    rows = []
    for r, h in row_hessians(w, damped(gram, damp)):
        power = gram[r // (w.shape[0] // len(gram))].diagonal().tolist()
        order = sorted(range(w.shape[1]), key=lambda p, power=power: -power[p] if act_order else p)
        kept = None if keep is None else keep[r].numpy()
        row = (w[r].numpy(), h.numpy(), order, scale[r].numpy(), zero[r].numpy(), 2**points.spec.bits - 1, kept)
        rows.append(oracle.quantize_row(*row))
    return np.stack(rows)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    ("rows", "cols", "blocks", "spec"),
    [
        (3, 1, 1, GridSpec(2)),
        (4, 2, 2, GridSpec(3)),
        (5, 9, 5, GridSpec(2)),
        (4, 12, 1, GridSpec(1, True)),
        (4, 12, 2, GridSpec(4, True, group=5)),
        (6, 17, 3, GridSpec(3, group=0)),
        (19, 7, 1, GridSpec(2)),
        (2, 32, 1, GridSpec(2)),
        (2, 33, 1, GridSpec(3)),
        (2, 70, 2, GridSpec(2, group=32)),
    ],
)
def test_codes_are_those_of_solving_the_rest_after_each_column(monkeypatch, rows, cols, blocks, spec, act_order):
    monkeypatch.setattr(gptq, "BLOCK", 16)
    w, stats = problem(rows, cols, seed=cols, blocks=blocks)
    points = choose(w, spec)
    codes, damp = gptq.quantize(w, stats.gram, points, 0.01, act_order, None)
    assert damp == 0.01
    assert codes.tolist() == expected_codes(w, stats.gram, points, 0.01, act_order).tolist()


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("blocks", [1, 2])
def test_removed_entries_are_fixed_to_zero_in_their_turn(blocks, act_order):
    w, stats = problem(4, 20, seed=1, blocks=blocks)
    pruned = Magnitude(Unstructured(0.4)).prune(w, stats)
    start, keep = pruned.weights, pruned.keep
    keep[0], start[0] = False, 0.0  # a row that is gone
    points = choose(start, GridSpec(3), keep=keep)
    codes, _ = gptq.quantize(start, stats.gram, points, 0.01, act_order, keep)
    expected = expected_codes(start, stats.gram, points, 0.01, act_order, keep)
    assert np.array_equal(codes.numpy()[keep], expected[keep])


@pytest.mark.parametrize("block", [1, 7, 64, 10**6])
def test_the_block_size_changes_nothing(monkeypatch, block):
    w, stats = problem(22, 150, seed=2, blocks=2)
    points = choose(w, GridSpec(3))
    expected, _ = gptq.quantize(w, stats.gram, points, 0.01, True, None)
    monkeypatch.setattr(gptq, "BLOCK", block)
    codes, _ = gptq.quantize(w, stats.gram, points, 0.01, True, None)
    assert torch.equal(codes, expected)


def test_the_grid_counts_errors_by_the_power_of_the_input():
    w, stats = problem(4, 12, seed=3, blocks=2)
    solution = Gptq(GridSpec(2)).solve(w, stats)
    power = stats.gram.diagonal(dim1=1, dim2=2).repeat_interleave(2, dim=0)
    expected = choose(w, GridSpec(2), power)
    assert torch.equal(solution.weight.scale, expected.scale)
    assert torch.equal(solution.weight.zero, expected.zero)
    assert not torch.equal(solution.weight.scale, choose(w, GridSpec(2)).scale)


def test_act_order_is_the_default_and_changes_the_codes():
    w, stats = problem(8, 40, seed=4)
    assert torch.equal(
        Gptq(GridSpec(2)).solve(w, stats).weight.codes, Gptq(GridSpec(2), act_order=True).solve(w, stats).weight.codes
    )
    assert not torch.equal(
        Gptq(GridSpec(2)).solve(w, stats).weight.codes, Gptq(GridSpec(2), act_order=False).solve(w, stats).weight.codes
    )


def test_without_correlation_gptq_rounds_to_nearest():
    w = weights(6, 30, seed=0)
    stats = LayerStats.white(30)
    assert torch.equal(Gptq(GridSpec(3)).solve(w, stats).weight.codes, Rtn(GridSpec(3)).solve(w, stats).weight.codes)


@pytest.mark.parametrize("samples", [3, 15, 19])
def test_a_dependent_hessian_is_damped_and_that_is_said(samples):
    for seed in range(12):
        w, stats = weights(3, 20, seed), dependent(20, seed, samples)
        solution = Gptq(GridSpec(4), damp=0.0).solve(w, stats)
        assert solution.status is Status.DAMPED
        assert 1e-8 <= solution.info["damp"] <= 1e-6
        assert solution.relative_error < 0.1


def test_damping_that_was_asked_for_is_not_remarkable():
    solution = Gptq(GridSpec(4), damp=0.01).solve(weights(3, 20, 0), dependent(20, 0, 3))
    assert solution.status is Status.SOLVED
    assert solution.info == {"damp": 0.01}


@pytest.mark.parametrize("damp", [-1e-9, math.inf, math.nan])
def test_impossible_damping_is_refused(damp):
    with pytest.raises(UsageError, match="damp"):
        Gptq(GridSpec(4), damp=damp)
