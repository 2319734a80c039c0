"""The greedy removal for GPUs: the same as that for the CPU, here on the CPU, and on a GPU where there is one."""

import pytest
import torch

from featherweight.methods import NM, Obs, Unstructured
from featherweight.methods.batched import removals
from featherweight.methods.patterns import quota
from featherweight.methods.traces import trace
from tests.methods.problems import problem

SAME = {"rtol": 1e-9, "atol": 0.0}


@pytest.mark.parametrize("memory", [1 << 20, 1, 8 * 20 * 20 * 2])
@pytest.mark.parametrize("pattern", [None, NM(2, 4), NM(1, 4), NM(3, 5)])
def test_all_rows_go_as_one_by_one(pattern, memory):
    w, stats = problem(5, 20, seed=3)
    inverse = torch.linalg.inv(stats.gram[0])
    bucket, room = (torch.zeros(20).long(), torch.tensor([20])) if pattern is None else quota(pattern, 20, 2)
    steps = int(room.sum())
    order, losses = removals(w, inverse, steps, bucket, room, memory)
    expected = trace(w, inverse, steps, bucket, room)
    assert torch.equal(order, expected.order)
    torch.testing.assert_close(losses, expected.losses, **SAME)


def test_a_part_of_the_removals():
    w, stats = problem(3, 12, seed=1)
    inverse = torch.linalg.inv(stats.gram[0])
    whole, part = (removals(w, inverse, n, torch.zeros(12).long(), torch.tensor([n])) for n in (12, 5))
    assert torch.equal(whole[0][:, :5], part[0])
    torch.testing.assert_close(whole[1][:, :5], part[1], **SAME)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=lambda p: p.label)
def test_a_gpu_prunes_like_the_cpu(pattern, monkeypatch):
    w, stats = problem(32, 96, seed=2)
    fast = Obs(pattern).solve(w, stats)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    slow = Obs(pattern).solve(w, stats)
    assert fast.error == pytest.approx(slow.error, rel=1e-4)
