import pytest
import torch

from featherweight.methods import Solution, Status
from featherweight.methods.base import output_energy, status_of, usable
from featherweight.stats import LayerStats
from featherweight.weights import Dense
from tests.methods.problems import inputs, problem, stats_of, weights

SAME = 1e-12  # the same float64 terms in another order


def broken(stats, value):
    gram = stats.gram.clone()
    gram[0, 1, 1] = value
    return LayerStats(gram, stats.mean, stats.samples, stats.row_share)


def test_the_energy_is_the_mean_square_of_the_outputs():
    x = inputs(6, 20, seed=0, blocks=3)
    d = weights(9, 6, seed=0)
    outputs = [d[r] @ x[r // 3].T for r in range(9)]
    assert output_energy(d, stats_of(x)) == pytest.approx(sum(float(o.square().mean()) for o in outputs), rel=SAME)
    share = torch.arange(9, dtype=torch.float64) / 36
    expected = sum(float(s * o.square().mean()) for s, o in zip(share, outputs, strict=True))
    assert output_energy(d, stats_of(x, share)) == pytest.approx(expected, rel=SAME)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_statistics_that_are_not_finite_are_not_used(value):
    _, stats = problem(2, 4)
    assert status_of(broken(stats, value)) is Status.NONFINITE
    assert torch.equal(usable(broken(stats, value)).gram, torch.eye(4, dtype=torch.float64)[None])


@pytest.mark.parametrize(
    "stats",
    [
        LayerStats.white(4, 2),
        LayerStats(torch.zeros(2, 4, 4, dtype=torch.float64), torch.zeros(2, 4), torch.tensor([50, 50])),
    ],
)
def test_without_input_everything_counts_alike(stats):
    assert status_of(stats) is Status.UNREACHED
    assert torch.equal(usable(stats).gram, torch.eye(4, dtype=torch.float64).expand(2, 4, 4))


def test_statistics_with_input_are_used_as_they_are():
    _, stats = problem(2, 4)
    assert usable(stats) is stats
    assert status_of(stats) is Status.SOLVED


def test_a_solution_measures_what_is_stored():
    w, stats = problem(3, 5, seed=1)
    rounded = Dense(w.half())
    solution = Solution.of(rounded, w, stats, Status.SOLVED)
    lost = output_energy(w - w.half().double(), stats)
    assert solution.error == pytest.approx(lost, rel=SAME)
    assert solution.relative_error == pytest.approx(lost / output_energy(w, stats), rel=SAME)
    assert Solution.of(Dense(torch.zeros(3, 5)), w, stats, Status.SOLVED).relative_error == pytest.approx(1, rel=SAME)
    assert Solution.of(rounded, torch.zeros(3, 5), stats, Status.SOLVED).relative_error == 0
