"""Patterns: the greedy loops against explicit inverses, and every mask of tiny layers."""

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
import torch

from featherweight.errors import UsageError
from featherweight.methods import NM, Admm, Blocks, Channels, Magnitude, Obs, Prune, Rows, Unstructured
from featherweight.methods import traces as traces_module
from featherweight.methods.base import output_energy
from featherweight.methods.patterns import keep_largest, quota
from featherweight.methods.pruning import refit
from featherweight.methods.traces import block_trace, channel_trace, trace
from featherweight.weights.masks import channel_groups
from tests.methods.problems import problem, weights
from tests.reference import obs as oracle

SAME = 1e-10


def real(groups):
    return [[int(c) for c in g if c >= 0] for g in groups]


@pytest.fixture
def narrow_is_wide(monkeypatch):
    """The way of wide layers, on small ones."""
    monkeypatch.setattr(traces_module, "WIDE", 4)
    monkeypatch.setattr(traces_module, "CHUNK", 6)
    monkeypatch.setattr(traces_module, "PANEL", 5)


@pytest.mark.parametrize(("taps", "n", "m"), [(1, 2, 4), (3, 2, 4), (2, 1, 4), (3, 1, 2), (1, 3, 5)])
def test_n_of_m_goes_as_with_explicit_inverses(taps, n, m):
    w, stats = problem(3, 12, seed=n)
    group, room = quota(NM(n, m), 12, taps)
    found = trace(w, torch.linalg.inv(stats.gram[0]), int(room.sum()), group, room)
    for r in range(3):
        order, losses = oracle.prune_nm(w[r].numpy(), stats.gram[0].numpy(), real(channel_groups(12, taps, m)), n)
        assert found.order[r].tolist() == order
        np.testing.assert_allclose(found.losses[r], losses, rtol=SAME)


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_blocks_go_as_with_explicit_inverses(size):
    w, stats = problem(3, 12, seed=size)
    found = block_trace(w, torch.linalg.inv(stats.gram[0]), size, 12 // size)
    groups = [list(range(i, i + size)) for i in range(0, 12, size)]
    for r in range(3):
        order, losses, _ = oracle.prune_groups(w[r : r + 1].numpy(), stats.gram[0].numpy(), groups)
        assert found.order[r].tolist() == order
        np.testing.assert_allclose(found.losses[r], losses, rtol=SAME)


@pytest.mark.parametrize("taps", [1, 2, 3])
def test_channels_go_as_with_explicit_inverses(taps):
    w, stats = problem(4, 12, seed=taps)
    found = channel_trace(w, torch.linalg.inv(stats.gram[0]), taps)
    groups = [list(range(i, i + taps)) for i in range(0, 12, taps)]
    order, losses, _ = oracle.prune_groups(w.numpy(), stats.gram[0].numpy(), groups)
    assert found.order[0].tolist() == order
    np.testing.assert_allclose(found.losses[0], losses, rtol=SAME)


@pytest.mark.parametrize("tile", [1, 8 * 41 * 47 * 2, 1 << 25])
@pytest.mark.parametrize("cols", [7, 12, 13, 24, 41])
def test_wide_layers_are_traced_alike(cols, tile, narrow_is_wide, monkeypatch):
    monkeypatch.setattr(traces_module, "TILE", tile)  # one row at a time, two or more, all
    w, stats = problem(3, cols, seed=cols)
    inverse = torch.linalg.inv(stats.gram[0])
    found = trace(w, inverse, cols)
    for r in range(3):
        order, losses, _ = oracle.prune_row(w[r].numpy(), stats.gram[0].numpy(), cols)
        assert found.order[r].tolist() == order
        np.testing.assert_allclose(found.losses[r], losses, rtol=1e-9)
    if cols % 4 == 0:
        blocks = block_trace(w, inverse, 4, cols // 4)
        for r in range(3):
            groups = [list(range(i, i + 4)) for i in range(0, cols, 4)]
            order, losses, _ = oracle.prune_groups(w[r : r + 1].numpy(), stats.gram[0].numpy(), groups)
            assert blocks.order[r].tolist() == order
            np.testing.assert_allclose(blocks.losses[r], losses, rtol=1e-9)
        group, room = quota(NM(2, 4), cols, 1)
        chosen = trace(w, inverse, int(room.sum()), group, room)
        order, _ = oracle.prune_nm(w[1].numpy(), stats.gram[0].numpy(), real(channel_groups(cols, 1, 4)), 2)
        assert chosen.order[1].tolist() == order


def test_float32_traces_choose_alike_where_the_hessian_is_damped():
    w, stats = problem(8, 48, seed=3)
    hessian = stats.gram[0] + 0.001 * stats.gram[0].diagonal().mean() * torch.eye(48, dtype=torch.float64)
    exact = trace(w, torch.linalg.inv(hessian), 48)
    fast = trace(w.float(), torch.linalg.inv(hessian).float(), 48)
    np.testing.assert_allclose(
        fast.losses.sum(dim=1), exact.losses.sum(dim=1), rtol=1e-3
    )  # two near ties fall the other way


def masks_of(pattern, rows, cols, taps):
    """Every mask (rows, cols) that the pattern allows, from its definition."""
    columns = real(channel_groups(cols, taps, getattr(pattern, "m", getattr(pattern, "size", 1))))
    if isinstance(pattern, NM):
        per_row = []
        for kept in product(*(combinations(g, min(pattern.n, len(g))) for g in columns)):
            row = np.zeros(cols, bool)
            row[[c for group in kept for c in group]] = True
            per_row.append(row)
        return [np.stack(m) for m in product(per_row, repeat=rows)]
    if isinstance(pattern, Channels):
        columns, rows_of = [list(range(i, i + taps)) for i in range(0, cols, taps)], [slice(None)]
    else:
        rows_of = [slice(r, r + 1) for r in range(rows)]
        columns = [list(range(cols))] if isinstance(pattern, Rows) else columns
    pieces = list(product(rows_of, columns))
    masks = []
    for gone in combinations(range(len(pieces)), round(len(pieces) * pattern.sparsity)):
        mask = np.ones((rows, cols), bool)
        for i in gone:
            r, c = pieces[i]
            mask[r, c] = False
        masks.append(mask)
    return masks


@pytest.mark.parametrize(("method", "close"), [(Obs, 1.35), (Admm, 2.0), (Prune, 1.3)])
@pytest.mark.parametrize(
    ("pattern", "taps"),
    [
        (Unstructured(0.5), 1),
        (NM(1, 2), 1),
        (NM(2, 3), 2),
        (NM(2, 4), 1),
        (Blocks(0.5, 2), 1),
        (Blocks(0.5, 2), 2),
        (Rows(0.34), 1),
        (Channels(0.5), 1),
        (Channels(0.34), 2),
    ],
)
def test_no_mask_is_better_by_much_than_the_one_found(pattern, taps, method, close):
    """Greedy and ADMM are no exhaustive searches: on average over six layers they come close."""
    found, best = 0.0, 0.0
    masks = masks_of(pattern, 3, 6, taps)
    for seed in range(6):
        w, stats = problem(3, 6, seed=seed)
        stats = replace(stats, taps=taps)
        chosen = Obs if isinstance(pattern, Rows) else method
        pruned = chosen(pattern, damp=0.0).prune(w, stats)
        assert any((pruned.keep.numpy() == m).all() for m in masks)
        least = oracle.best_of_masks(w.numpy(), stats.gram[0].numpy(), masks)
        lost = output_energy(pruned.weights - w, stats)
        assert lost >= least * (1 - 1e-9)
        found, best = found + lost, best + least
    assert found <= close * best


@pytest.mark.parametrize(
    "pattern", [Unstructured(0.6), NM(2, 4), Blocks(0.5, 2), Rows(0.25), Channels(0.5)], ids=lambda p: p.label
)
def test_masks_chosen_with_the_hessian_lose_less(pattern):
    ours = admm = simple = refitted = 0.0
    for seed in range(5):
        w, stats = problem(16, 32, seed=seed)
        stats = replace(stats, taps=2)
        ours += Obs(pattern).solve(w, stats).error
        admm += Prune(pattern).for_layer((16, 32), 1).solve(w, stats).error
        plain = Magnitude(pattern).prune(w, stats)
        simple += output_energy(plain.weights - w, stats)
        refitted += output_energy(refit(w, stats.gram, plain.keep) - w, stats)
    assert ours < (simple if isinstance(pattern, Rows) else refitted)  # a kept row needs no refit
    assert refitted <= simple
    assert admm <= ours


def test_several_levels_from_one_trace_are_what_each_would_be():
    w, stats = problem(6, 20, seed=2, blocks=2)
    for kind in (Unstructured, lambda s: Blocks(s, 3), Rows, Channels):
        wanted = [kind(s) for s in (0.0, 0.3, 0.5, 0.9)]
        together = Obs(wanted[0], damp=0.01).levels(w, stats, wanted)
        for pattern, level in zip(wanted, together, strict=True):
            alone = Obs(pattern, damp=0.01).prune(w, stats)
            assert torch.equal(level.keep, alone.keep)
            assert torch.equal(level.weights, alone.weights)
        whole = Obs(wanted[0], damp=0.01).trace(w, stats)
        again = Obs(wanted[0], damp=0.01).levels(w, stats, wanted, whole)
        assert all(torch.equal(a.weights, b.weights) for a, b in zip(again, together, strict=True))
    with pytest.raises(UsageError, match="all levels"):
        Obs(Blocks(0.5, 2)).levels(w, stats, [Blocks(0.5, 4)])


def test_a_row_that_must_go_whole_is_traced_to_its_end():
    w, stats = problem(8, 20, seed=4)
    w[3] *= 1e-6  # all of it is cheaper than anything else
    pruned = Obs(Unstructured(0.2), damp=0.01).prune(w, stats)
    assert not pruned.keep[3].any()
    assert int((~pruned.keep).sum()) == 32


def test_short_groups_keep_what_fits_and_that_is_said():
    w, stats = problem(4, 6, seed=1)  # six channels: a group of four, then one of two
    solution = Obs(NM(1, 4)).solve(w, stats)
    assert solution.weight.mask[:, :4].sum(dim=1).tolist() == [1] * 4
    assert solution.weight.mask[:, 4:].sum(dim=1).tolist() == [1] * 4
    assert solution.padded
    depthwise = Obs(NM(2, 4)).solve(weights(5, 9, 0), replace(problem(5, 9, blocks=5)[1], taps=9))
    assert depthwise.weight.mask.all()  # one channel: nothing to choose from
    assert depthwise.padded


def test_dead_inputs_are_removed_first():
    w, stats = problem(4, 8, seed=6)
    gram = stats.gram.clone()
    gram[:, [1, 5]] = gram[:, :, [1, 5]] = 0
    for pattern in (Unstructured(0.25), NM(3, 4), Channels(0.25)):
        for method in (Obs(pattern), Admm(pattern)):
            pruned = method.prune(w, replace(stats, gram=gram))
            assert not pruned.keep[:, [1, 5]].any(), method


def test_the_largest_are_kept_and_ties_lose_the_first():
    score = torch.tensor([[1.0, 1.0, 2.0, 0.0], [3.0, 1.0, 1.0, 5.0]])
    kept = {p.label: keep_largest(score, p, 1, 1).int().tolist() for p in (Unstructured(0.5), NM(2, 4), Rows(0.5))}
    assert kept == {
        "50%": [[0, 0, 1, 0], [1, 0, 1, 1]],
        "2:4": [[0, 1, 1, 0], [1, 0, 0, 1]],
        "50% rows": [[0] * 4, [1] * 4],
    }
    assert keep_largest(score, Blocks(0.5, 2), 1, 1).int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert keep_largest(score, Channels(0.25), 1, 1).int().tolist() == [[1, 0, 1, 1]] * 2


def test_one_row_and_one_channel_always_stay():
    w, stats = problem(3, 9, seed=8)
    for method in (Obs(Rows(0.9)), Obs(Channels(0.9)), Admm(Channels(0.9)), Magnitude(Rows(0.9)), Prune(Rows(0.9))):
        kept = method.prune(w, replace(stats, taps=3)).keep
        assert int(kept.sum()) == 9, method  # one row of nine, or three taps in three rows
        assert kept.any(dim=0).sum() * kept.any(dim=1).sum() == 9, method


@pytest.mark.parametrize("method", [Obs, Admm, Prune, Magnitude])
def test_what_is_no_pattern_is_refused(method):
    with pytest.raises(UsageError, match="needs a pattern"):
        method(0.5)
