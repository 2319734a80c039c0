"""Channels that several layers read."""

from itertools import combinations

import pytest
import torch
from torch import nn

import featherweight as fw
from featherweight.artifact import fill
from featherweight.coupling import couplings
from featherweight.data import Batch
from featherweight.errors import UsageError
from featherweight.layers import scan
from featherweight.methods import Channels, Given, Gptq, GridSpec, PruneQuantize
from featherweight.methods.channels import kept_in_common
from featherweight.stats import LayerStats


class Branches(nn.Module):
    """A stem that two convolutions read, with nothing but zeros in common for half of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.wide, self.narrow = nn.Conv2d(12, 6, 3, padding=1), nn.Conv2d(12, 6, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.fc((self.wide(x) + self.narrow(x)).relu().mean((2, 3)))


def network(important):
    torch.manual_seed(0)
    net = Branches().eval()
    with torch.no_grad():
        little = torch.tensor([c not in important for c in range(12)])
        for layer in (net.wide, net.narrow):
            layer.weight[:, little] *= 1e-3
    return net


def images(count=64):
    return torch.utils.data.TensorDataset(
        torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(count, dtype=torch.long)
    )


def test_a_tensor_with_two_readers_is_coupled_to_both():
    found = couplings(network({1}), Batch((images(4).tensors[0],), {}), scan(network({1})).units)
    assert found["stem.weight"] == ("wide.weight", "narrow.weight")


def test_readers_of_different_tensors_are_no_group():
    class Turned(Branches):
        def forward(self, x):
            x = self.stem(x).relu()
            return self.fc((self.wide(x) + self.narrow(x.flip(1))).mean((2, 3)))

    torch.manual_seed(0)
    net = Turned().eval()
    assert "stem.weight" not in couplings(net, Batch((images(4).tensors[0],), {}), scan(net).units)


@pytest.mark.parametrize("seed", range(4))
def test_the_first_channel_to_go_costs_all_readers_least(seed):
    """Against every choice, each with its least-squares weights, errors relative to the outputs of each layer."""
    make = torch.Generator().manual_seed(seed)
    taps, channels = (3, 1), 5
    ws = [torch.randn(n, channels * t, generator=make, dtype=torch.float64) for n, t in zip((4, 7), taps, strict=True)]
    xs = [torch.randn(50, channels * t, generator=make, dtype=torch.float64) for t in taps]
    stats = [
        LayerStats((x.T @ x / 50)[None], x.mean(0)[None], torch.tensor([50]), taps=t)
        for x, t in zip(xs, taps, strict=True)
    ]

    def lost(kept):
        total = 0.0
        for w, x, t in zip(ws, xs, taps, strict=True):
            columns = [c * t + k for c in kept for k in range(t)]
            y = x @ w.T
            best = torch.linalg.lstsq(x[:, columns], y).solution
            total += float((x[:, columns] @ best - y).square().sum() / y.square().sum())
        return total

    given = kept_in_common(ws, stats, [1 / channels], damp=0.0)[0]
    assert given.kept == min(combinations(range(channels), channels - 1), key=lost)
    solution = given.solve(ws[0], stats[0])
    columns = [c * 3 + k for c in given.kept for k in range(3)]
    best = torch.linalg.lstsq(xs[0][:, columns], xs[0] @ ws[0].T).solution.T
    damped = Given(given.kept, channels, damp=0.0).prune(ws[0], stats[0]).weights[:, columns]
    assert torch.allclose(damped, best, atol=1e-10)
    assert torch.allclose(solution.weight.dense()[:, columns], best.float(), atol=1e-2)


def test_given_channels_are_checked():
    with pytest.raises(UsageError, match="rising order"):
        Given((2, 1), 4)
    with pytest.raises(UsageError, match="4 input channels"):
        Given((1, 2), 4).prune(torch.ones(2, 3), LayerStats.white(3))


def test_a_target_for_multiplications_removes_the_stem_that_two_layers_read():
    important = {0, 3, 4, 7, 9, 11}
    net, data = network(important), images()
    small = fw.compress(net, data, target=fw.Goal(macs="0.6x", among="prune"))
    stored = {u.names[0]: u.weight for u in small.artifact.units}
    read = [stored[n].dense().reshape(6, 12, -1).ne(0).any(2).any(0) for n in ("wide.weight", "narrow.weight")]
    assert torch.equal(*read)
    gone = set(torch.nonzero(~read[0])[:, 0].tolist())
    assert gone
    assert not gone & important
    assert not stored["stem.weight"].dense()[sorted(gone)].any()  # rows that nothing reads are no part of the file
    assert small.report.allocation.macs <= small.report.allocation.limits["macs"]
    x = data.tensors[0]
    loaded = fill(network(important), small.artifact)
    assert torch.allclose(loaded(x), net(x), atol=0.05)
    assert torch.allclose(fw.slim(loaded)(x), fill(network(important), small.artifact)(x), atol=1e-5)


def test_a_reader_with_a_method_of_its_own_keeps_the_channels_that_it_reads():
    net, data = network({0, 3, 4}), images()
    recipe = fw.Recipe(Gptq(GridSpec(8)), overrides=(fw.Override("narrow.*", Gptq(GridSpec(8))),))
    small = fw.compress(net, data, target=fw.Goal(macs="0.8x", among="prune"), recipe=recipe)
    stored = {u.names[0]: u.weight for u in small.artifact.units}
    assert stored["narrow.weight"].dense().reshape(6, 12, -1).ne(0).any(2).any(0).any()
    assert stored["stem.weight"].dense().any(dim=1).all()  # nothing of it goes


def test_given_channels_are_stored_on_grids():
    stats = LayerStats.white(12, taps=3)
    w = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    solution = PruneQuantize(Given((0, 3), 4), Gptq(GridSpec(8))).solve(w, stats)
    assert solution.weight.mask.any(0).tolist() == [True] * 3 + [False] * 6 + [True] * 3
    assert Given((0, 3), 4).pattern == Channels(0.5)
