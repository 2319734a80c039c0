"""Entropy-constrained quantization against its definitions, and what it promises."""

from itertools import pairwise, product

import numpy as np
import pytest
import torch

from featherweight._linalg import inverse_factor
from featherweight.coding import contexts, costs
from featherweight.errors import SolveError, UsageError
from featherweight.methods import Ecq, EcqStep, Gptq, GridSpec, Obq, _ecq, ecq
from featherweight.stats import LayerStats
from featherweight.weights.coded import stored_bytes
from tests.methods.problems import problem
from tests.reference import ecq as reference

MOST = 7


def tiny(seed, rows=3, cols=5):
    """Everything that the kernels take, with some context and its costs for every entry."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((cols, 3 * cols))
    hessian = x @ x.T / (3 * cols) + 0.1 * np.eye(cols)
    w = rng.standard_normal((rows, cols))
    table = np.cumsum(rng.uniform(0.2, 2, (4, MOST + 1)), axis=1)
    return w, hessian, 0.7, rng.uniform(0.5, 8, rows), table, rng.integers(0, 4, (rows, cols))


@pytest.mark.parametrize("seed", range(20))
def test_feedback_chooses_what_solving_for_the_columns_behind_would(seed):
    w, hessian, step, power, table, where = tiny(seed)
    factor = torch.linalg.cholesky(torch.from_numpy(hessian)[None])
    _, upper = inverse_factor(factor)
    known = power[None], table, where[None].astype(np.int64), MOST
    codes, _ = _ecq.feedback(w[None].copy(), upper.numpy(), step, *known)
    assert np.array_equal(codes[0], reference.feedback(w, hessian, step, power, table, where, MOST))


@pytest.mark.parametrize("seed", range(20))
def test_polishing_ends_where_no_single_code_can_do_better(seed):
    w, hessian, step, power, table, where = tiny(seed)
    codes = np.rint(w / step).astype(np.int16)
    start = reference.objective(codes, w, hessian, step, power, table, where)
    gradient = ((step * codes - w) @ hessian)[None]
    known = power[None], table, where[None].astype(np.int64)
    own = codes[None].copy()
    _ecq.polish(gradient, hessian[None], step, *known, own, MOST, 100)
    found = reference.objective(own[0], w, hessian, step, power, table, where)
    assert (found <= start + 1e-10).all()
    for r, i, moved in product(range(3), range(5), (-1, 1)):
        other = own[0].copy()
        other[r, i] += moved
        if abs(other[r, i]) <= MOST:
            changed = reference.objective(other, w, hessian, step, power, table, where)
            assert changed[r] >= found[r] - 1e-8, (r, i, moved)


def test_a_row_of_few_weights_comes_near_the_best_of_all_codes():
    w, hessian, step, power, table, where = tiny(3, rows=4, cols=4)
    gram = torch.from_numpy(hessian)[None]
    upper = inverse_factor(torch.linalg.cholesky(gram))[1].numpy()
    known = power[None], table, where[None].astype(np.int64)
    codes, _ = _ecq.feedback(w[None].copy(), upper, step, *known, MOST)
    gradient = np.ascontiguousarray(((step * codes[0] - w) @ hessian)[None])
    _ecq.polish(gradient, hessian[None], step, *known, codes, MOST, 100)
    found = reference.objective(codes[0], w, hessian, step, power, table, where)
    every = np.array(list(product(range(-3, 4), repeat=4)))
    for r in range(4):
        rows = [np.repeat(x[r : r + 1], len(every), 0) for x in (w, where)]
        best = reference.objective(every, rows[0], hessian, step, power[r], table, rows[1]).min()
        assert best - 1e-10 <= found[r] <= 1.15 * best


@pytest.mark.parametrize("bits", [0.4, 1.1, 2.0, 3.5])
def test_the_codes_take_the_bits_that_were_asked_for(bits):
    w, stats = problem(32, 96, seed=1)
    solution = Ecq(bits).solve(w, stats)
    assert bits - 0.03 <= 8 * stored_bytes(solution.weight) / w.numel() <= bits


def test_finer_steps_lose_less_and_store_more():
    w, stats = problem(16, 72, seed=2)
    found = [EcqStep(step).solve(w, stats) for step in (0.2, 0.5, 1.0, 2.0)]
    assert [s.error for s in found] == sorted(s.error for s in found)
    sizes = [stored_bytes(s.weight) for s in found]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("outlier", [0.0, 40.0])
def test_more_bits_never_lose_more_even_with_one_weight_far_out(outlier):
    w, stats = problem(32, 64, seed=8)
    w[3, 5] += outlier * float(w.std())
    errors = [Ecq(bits).solve(w, stats).error for bits in (2, 3, 4, 5, 7)]
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(errors))
    assert errors[-1] < 0.1 * errors[0]


@pytest.mark.parametrize("bits", [2, 3])
def test_it_loses_less_than_grids_of_as_many_bits(bits):
    w, stats = problem(64, 144, seed=3)
    for other in (Gptq(GridSpec(bits)), Obq(GridSpec(bits))):
        solved = other.solve(w, stats)
        size = 8 * stored_bytes(solved.weight) / w.numel()
        assert Ecq(size).solve(w, stats).error < 0.9 * solved.error


def test_counting_bits_pays(monkeypatch):
    """At the same error lambda saves bits: 6.02 dB of error are one bit."""
    w, stats = problem(64, 144, seed=4)

    def spent(rate):
        monkeypatch.setattr(ecq, "RATE", rate)
        solution = EcqStep(1.6).solve(w, stats)
        return 8 * stored_bytes(solution.weight) / w.numel() + np.log2(solution.relative_error) / 2

    assert spent(0.08) < spent(1e-9) - 0.005


def test_costs_are_about_what_the_coder_takes():
    w, stats = problem(64, 144, seed=5)
    weight = EcqStep(0.8).solve(w, stats).weight
    codes = weight.codes.to(torch.int16) - 2 ** (weight.nbits - 1)
    where = contexts(codes)
    told = costs(codes, where, 127)[where, codes.abs().long()].sum()
    assert abs(8 * (stored_bytes(weight) - 2) - float(told)) < 0.02 * float(told)


def test_rows_that_are_used_more_are_rounded_less():
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    share = torch.tensor([0.9] + [0.1 / 7] * 7, dtype=torch.float64)
    white = LayerStats.white(64)
    stats = LayerStats(white.gram, white.mean, torch.tensor([100]), share)
    lost = (EcqStep(1.5).solve(w, stats).weight.dense() - w).square().mean(dim=1)
    assert lost[0] < lost[1:].mean()


def test_zeros_and_single_numbers():
    w, stats = problem(4, 8, seed=6)
    assert torch.equal(EcqStep(1.0).solve(torch.zeros_like(w), stats).weight.dense(), torch.zeros_like(w))
    one = torch.tensor([[0.3]])
    assert abs(float(EcqStep(0.1).solve(one, LayerStats.white(1)).weight.dense()) - 0.3) < 0.03


def test_what_cannot_be_is_refused():
    w, stats = problem(4, 8, seed=7)
    w[1, 2] = float("nan")
    with pytest.raises(SolveError, match="NaN"):
        EcqStep(1.0).solve(w, stats)
    for make in (lambda: EcqStep(0), lambda: EcqStep(1.0, -1), lambda: Ecq(0), lambda: Ecq(9), lambda: Ecq(2, -1)):
        with pytest.raises(UsageError):
            make()
