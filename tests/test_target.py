import pytest
from torch import nn

from featherweight.errors import UsageError
from featherweight.layers import scan
from featherweight.target import Goal, baselines, microseconds, target_bytes


@pytest.mark.parametrize(
    ("target", "expected"),
    [("10x", 100_000), ("12%", 120_000), ("90kB", 90_000), ("1.5KiB", 1536), ("2 MB", 2_000_000), (77, 77), ("5B", 5)],
)
def test_target_forms(target, expected):
    assert target_bytes(target, 1_000_000) == expected


@pytest.mark.parametrize("target", ["", "10", "x10", "-3kB", "0x", "0%", "3 bananas", "1e3B", 0])
def test_other_forms_are_refused(target):
    with pytest.raises(UsageError):
        target_bytes(target, 1_000_000)


def test_baselines_count_tied_weights_once_and_no_counters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Embedding(10, 4)
            self.b = nn.Linear(4, 10)
            self.b.weight = self.a.weight
            self.bn = nn.BatchNorm1d(4)

    found = baselines(Tied(), scan(Tied()).units)
    assert found.fp32 == 4 * (40 + 10 + 4 * 4)
    assert found.half == found.fp32 // 2
    assert found.int8 == 40 + 4 * 10 + 4 * (10 + 16)


@pytest.mark.parametrize(
    "given", [{"macs": "0"}, {"macs": "2x"}, {"latency": "2x"}, {"latency": "150%"}, {"params": "0x"}]
)
def test_what_no_network_allows_is_said_without_knowing_it(given):
    with pytest.raises(UsageError, match=r"at most (the dense network's|what the dense network takes), got"):
        Goal(**given)


def test_a_time_above_the_dense_one_is_a_limit_that_holds_already():
    assert microseconds("1ms", 900) == 1000
