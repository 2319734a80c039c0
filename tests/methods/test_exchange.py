"""Exchanging kept weights for removed ones, against every exchange there is."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from featherweight.methods import NM, Admm, Blocks, Obs, Prune, Unstructured
from featherweight.methods import exchange as exchange_module
from featherweight.methods.base import output_energy
from featherweight.methods.exchange import TABLES, exchange, exchange_rows, trades
from featherweight.methods.patterns import keep_largest
from featherweight.methods.pruning import refit
from tests.methods.problems import problem, row_hessians
from tests.reference import obs as oracle


@pytest.mark.parametrize("tables", [TABLES, 1])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize(
    ("pattern", "group"), [(Unstructured(0.5), None), (Unstructured(0.3), None), (NM(2, 4), [0, 0, 0, 0, 1, 1])]
)
def test_no_exchange_improves_the_mask(pattern, group, blocks, tables, monkeypatch):
    monkeypatch.setattr("featherweight.methods.exchange.TABLES", tables)
    monkeypatch.setattr("featherweight.methods.exchange.PASSES", 100)
    better = 0
    for seed in range(6):
        w, stats = problem(4, 6, seed=seed, blocks=blocks)
        start = keep_largest(w**2, pattern, 1, blocks)
        keep = exchange(w, stats.gram, start, pattern, stats)
        assert int(keep.sum()) == int(start.sum())
        if group is not None:
            assert torch.equal(keep[:, :4].sum(dim=1), torch.full((4,), 2))
        h = [hessian.numpy() for _, hessian in row_hessians(w, stats.gram)]
        lost = [
            sum(oracle.loss(w[r].numpy(), h[r], oracle.refit_row(w[r].numpy(), h[r], k[r].numpy())) for r in range(4))
            for k in (start, keep)
        ]
        around = oracle.neighbours(w.numpy(), h, keep.numpy(), group)
        assert lost[1] <= min(around) * (1 + 1e-9)
        assert lost[1] <= lost[0] * (1 + 1e-9)
        better += lost[1] < 0.99 * lost[0]
    assert better >= 3


def test_the_rows_are_gone_over_a_few_times_at_most(monkeypatch):
    swept = []
    whole = exchange_module._swept
    monkeypatch.setattr(
        exchange_module, "_swept", lambda u, p, k, some: swept.append(len(some)) or whole(u, p, k, some)
    )
    w, stats = problem(40, 12, seed=1)
    w *= torch.logspace(-1, 1, 40).double()[:, None]
    start = torch.arange(12).expand(40, 12) % 2 == 0  # much too even: every row trades
    losses = []
    for passes in (1, 2, 4, 100):
        monkeypatch.setattr(exchange_module, "PASSES", passes)
        swept.clear()
        keep = exchange(w, stats.gram, start, Unstructured(0.5), stats)
        assert 40 <= sum(swept) <= passes * 40
        assert int(keep.sum()) == 240
        losses.append(output_energy(refit(w, stats.gram, keep) - w, stats))
    assert losses == sorted(losses, reverse=True)
    assert losses[2] < losses[0]


def test_what_an_entry_gains_and_costs():
    w, stats = problem(1, 7, seed=3)
    h, row = stats.gram[0].numpy(), w[0].numpy()
    energy = float(row @ h @ row)
    keep = torch.ones(1, 7, dtype=torch.bool)
    keep[0, [1, 4, 5]] = False
    norm = np.sqrt(h.diagonal())

    def lost(kept: np.ndarray) -> float:
        return oracle.loss(row, h, oracle.refit_row(row, h, kept)) / energy

    def changed(column: int) -> np.ndarray:
        kept = keep[0].numpy().copy()
        kept[column] ^= True
        return kept

    table, x = _table(torch.from_numpy(h / norm / norm[:, None]), torch.from_numpy(row * norm / energy**0.5), keep)
    gain, entry, cost, leaves = exchange_rows(table, x, keep.numpy().copy(), np.zeros(7, np.int64), 1e9)
    now = lost(keep[0].numpy())
    gains, costs = {j: now - lost(changed(j)) for j in (1, 4, 5)}, {i: lost(changed(i)) - now for i in (0, 2, 3, 6)}
    assert entry[0] == max(gains, key=gains.__getitem__)
    assert leaves[0] == min(costs, key=costs.__getitem__)
    assert gain[0] == pytest.approx(gains[entry[0]], rel=1e-10)
    assert cost[0] == pytest.approx(costs[leaves[0]], rel=1e-10)


def _table(h: torch.Tensor, w: torch.Tensor, keep: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    return exchange_module._swept(h[None], (w @ h)[None], keep, torch.tensor([0]))


def test_rows_trade_once_and_never_with_themselves():
    gain, cost = np.array([5.0, 4.0, 0.5, 3.0]), np.array([0.1, 0.2, 0.3, 9.0])
    assert trades(gain, cost) == [(0, 1), (3, 2)]  # row 1 gave already; row 2 as well
    assert trades(np.array([2.0]), np.array([1.0])) == []
    assert trades(np.array([1.0, 1.0]), np.array([1.0, 2.0])) == []
    assert trades(np.array([5.0, 4.0]), np.array([1.0, 6.0])) == [(1, 0)]
    assert trades(np.zeros(3), np.full(3, np.inf)) == []


def test_rows_that_are_used_more_often_count_more():
    w, stats = problem(4, 8, seed=5)
    often = replace(stats, row_share=torch.tensor([1.0, 1.0, 1e-6, 1.0]).double())
    start = keep_largest(w**2, Unstructured(0.5), 1, 1)
    keep = exchange(w, stats.gram, start, Unstructured(0.5), often)
    assert int(keep[2].sum()) < int(exchange(w, stats.gram, start, Unstructured(0.5), stats)[2].sum())


@pytest.mark.parametrize("method", [Admm, Prune])
@pytest.mark.parametrize("pattern", [Unstructured(0.6), NM(2, 4)], ids=lambda p: p.label)
def test_pruners_exchange_unless_they_are_told_not_to(method, pattern):
    with_, without = 0.0, 0.0
    for seed in range(4):
        w, stats = problem(12, 24, seed=seed)
        found, plain = (method(pattern, 0.001, on).prune(w, stats) for on in (True, False))
        losses = [output_energy(refit(w, stats.gram, p.keep) - w, stats) for p in (found, plain)]
        assert losses[0] <= losses[1] * (1 + 1e-9)
        with_, without = with_ + losses[0], without + losses[1]
    assert with_ < 0.99 * without


def test_the_label_says_what_is_done():
    assert Admm(NM(2, 4)).label == "admm, exchange 2:4"
    assert Admm(NM(2, 4), exchange=False).label == "admm 2:4"
    assert Prune(Unstructured(0.5)).label == "obs, admm, exchange 50%"
    assert Prune(Blocks(0.5, 4)).label == "obs, admm 50% blocks of 4"
    wide = Prune(Unstructured(0.5))
    assert [wide.for_layer((128, n), 1).label for n in (576, 2304, 9216)] == [
        "obs, admm, exchange 50%",
        "obs, admm 50%",
        "admm 50%",
    ]
    assert isinstance(Prune(Unstructured(0.5)).for_layer((64, 9216), 1), Admm)
    assert Obs(Unstructured(0.5)).label == "obs 50%"
