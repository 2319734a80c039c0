import copy

import pytest
import torch
from torch import nn

from featherweight.data import Batch, batches
from featherweight.errors import UsageError
from featherweight.layers import scan
from featherweight.moments import captured
from featherweight.stats import LayerStats, capture, merge, shrink_
from tests.reference.moments import relative

SUMMED_ELSEWHERE = 1e-12  # the same float64 terms, added in another order
SINGLE = 1e-5  # products in float32


class Mixed(nn.Module):
    """One layer of each kind, and one that is never called."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.lstm = nn.LSTM(4, 3, bidirectional=True, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(6)
        self.conv = nn.Conv1d(6, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose1d(4, 6, 2, stride=2)
        self.fc = nn.Linear(6, 2)
        self.spare = nn.Linear(6, 2)

    def forward(self, indices):
        h, _ = self.lstm(self.embedding(indices))
        h, _ = self.attention(h, h, h)
        h = self.up(self.conv(self.norm(h.mT)).relu())
        return self.fc(h.mT)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Mixed().eval()


@pytest.fixture
def data():
    return batches(torch.randint(9, (24, 5), generator=torch.Generator().manual_seed(1)), batch_size=5)


def run(model, data, **options):
    return capture(model, data, scan(model).units, **options)


def assert_same(a, b, tolerance):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].samples, b[name].samples), name
        assert relative(a[name].gram, b[name].gram) < tolerance, name
        assert relative(a[name].mean + 1, b[name].mean + 1) < tolerance, name  # + 1: some means are zero
        assert (a[name].row_share is None) == (b[name].row_share is None), name
        if a[name].row_share is not None:
            assert relative(a[name].row_share, b[name].row_share) < tolerance, name


def test_every_called_layer_is_reached_and_no_other(model, data):
    stats = run(model, data)
    assert list(stats) == [u.name for u in scan(model).units]
    assert [name for name, s in stats.items() if not s.reached] == ["spare.weight"]
    spare = stats["spare.weight"]
    assert spare.samples.tolist() == [0]
    assert torch.equal(spare.gram, torch.eye(6, dtype=torch.float64)[None])
    assert not spare.mean.any()
    for name, s in stats.items():
        rows, cols = next(u.view.matrix_shape for u in scan(model).units if u.name == name)
        assert (s.gram.dtype, s.mean.dtype, s.samples.dtype) == (torch.float64, torch.float64, torch.int64)
        assert (s.gram.shape, s.mean.shape, s.samples.shape) == ((s.blocks, cols, cols), (s.blocks, cols), (s.blocks,))
        assert s.row_share is None or s.row_share.shape == (rows,)


def test_capture_leaves_the_network_as_it_was(model, data):
    before, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    run(model, data)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p is parameters[name] and p.grad is None for name, p in model.named_parameters())
    for module in model.modules():
        assert not any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks))
        assert not module.training
    assert torch.overrides._len_torch_function_stack() == 0


def test_a_network_that_fails_leaves_no_mode_behind():
    with pytest.raises(UsageError):
        run(nn.Linear(4, 3), [Batch((torch.zeros(2, 5),), {})])
    assert torch.overrides._len_torch_function_stack() == 0


def test_the_cut_into_batches_does_not_matter(model, data):
    whole = [Batch((torch.cat([b.args[0] for b in data]),), {})]
    assert_same(run(model.double(), data), run(model, whole), SUMMED_ELSEWHERE)


def test_single_precision_is_close_to_double(model, data):
    assert_same(run(model, data), run(copy.deepcopy(model).double(), data), SINGLE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_inputs_are_multiplied_in_single(dtype):
    x = torch.randn(500, 4).to(dtype)
    found = run(nn.Linear(4, 2, dtype=dtype), [Batch((x,), {})])["weight"]
    assert relative(found.gram[0], x.double().T @ x.double() / 500) < SINGLE


def test_spilled_sums_are_the_same_and_lie_in_files(model, data, tmp_path):
    in_memory, spilled = run(model, data), run(model, data, spill=tmp_path)
    for name, stats in in_memory.items():
        assert torch.equal(spilled[name].gram, stats.gram)
        assert torch.equal(spilled[name].mean, stats.mean)
    multiplied = [s for name, s in spilled.items() if name not in ("embedding.weight", "spare.weight")]
    assert sorted(f.stat().st_size for f in tmp_path.iterdir()) == sorted(8 * s.gram.numel() for s in multiplied)


def test_a_call_back_for_each_batch(model, data):
    seen = []
    run(model, data, on_batch=lambda: seen.append(1))
    assert len(seen) == len(data) == 5


# ---------------------------------------------------------------- merge
def merged(a, b):
    return {name: merge(a[name], b[name]) for name in a}


def test_merged_shards_are_the_whole(model, data):
    model.double()
    assert_same(merged(run(model, data[:1]), run(model, data[1:])), run(model, data), SUMMED_ELSEWHERE)


def test_merge_is_associative(model, data):
    a, b, c = (run(model, part) for part in (data[:1], data[1:2], data[2:]))
    assert_same(merged(merged(a, b), c), merged(a, merged(b, c)), SUMMED_ELSEWHERE)


@pytest.mark.parametrize("empty_first", [True, False])
def test_a_shard_without_samples_adds_nothing(model, data, empty_first):
    full, empty = run(model, data), run(model, [])
    both = merged(empty, full) if empty_first else merged(full, empty)
    assert_same(both, full, SUMMED_ELSEWHERE)


def test_blocks_of_different_sizes_are_weighed_one_by_one():
    """Cross-attention: the keys' block may have more samples than the queries'."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(4, 2, batch_first=True).double().eval()
    short, long = torch.randn(2, 3, 4).double(), torch.randn(2, 7, 4).double()
    data = [Batch((short, long, long), {}), Batch((long, short, short), {})]
    assert_same(merged(run(layer, data[:1]), run(layer, data[1:])), run(layer, data), SUMMED_ELSEWHERE)


# ---------------------------------------------------------------- what the numbers say of themselves
def test_white_is_unit_power_without_samples():
    white = LayerStats.white(3, blocks=2)
    assert torch.equal(white.gram, torch.eye(3, dtype=torch.float64).repeat(2, 1, 1))
    assert white.samples.tolist() == [0, 0]
    assert (white.blocks, white.finite, white.reached) == (2, True, False)


@pytest.mark.parametrize(
    ("x", "finite", "reached"),
    [
        pytest.param(torch.ones(2, 4), True, True, id="plain"),
        pytest.param(torch.tensor([[0.0, 0, 1, 0]]), True, True, id="dead-columns"),
        pytest.param(torch.zeros(2, 4), True, False, id="all-zero"),
        pytest.param(torch.tensor([[1.0, torch.nan, 1, 1]]), False, False, id="nan"),
        pytest.param(torch.tensor([[1.0, torch.inf, 1, 1]]), False, False, id="inf"),
    ],
)
def test_reached_means_finite_and_not_all_zero(x, finite, reached):
    stats = run(nn.Linear(4, 2), [Batch((x,), {})])["weight"]
    assert (stats.finite, stats.reached) == (finite, reached)


# ---------------------------------------------------------------- what so few samples leave uncertain
def correlated(cols: int, count: int, seed: int, mean: float = 1.0) -> torch.Tensor:
    """(count, cols) samples around `mean` whose neighbours are alike."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, cols + 2, generator=random, dtype=torch.float64)
    return mean + x[:, :-2] + x[:, 1:-1] + x[:, 2:]


def outside(c: torch.Tensor) -> float:
    return float(c.square().sum() - c.diagonal().square().sum())


def layer_stats(x: torch.Tensor, batch_size: int) -> LayerStats:
    layer = nn.Linear(x.shape[1], 1, dtype=torch.float64)
    return capture(layer, batches(x, batch_size=batch_size), scan(layer).units)["weight"]


@pytest.mark.parametrize("batch_size", [8, 10])  # the last batch is smaller
def test_scatter_is_the_variance_of_the_mean_over_batches(batch_size):
    x = correlated(12, 48, 0)
    parts = x.split(batch_size)
    covariances = [torch.cov(p.T, correction=0) for p in parts]
    n = torch.tensor([float(len(p)) for p in parts], dtype=torch.float64)
    mean = sum(a * c for a, c in zip(n, covariances, strict=True)) / n.sum()
    share = float(n.square().sum() / n.sum() ** 2)
    of_one = sum(float(a) ** 2 * outside(c) for a, c in zip(n, covariances, strict=True)) / float(n.sum()) ** 2
    expected = (of_one - share * outside(mean)) / (1 - share)
    assert float(layer_stats(x, batch_size).scatter) == pytest.approx(expected, rel=1e-10)


def test_scatter_of_many_columns_is_about_right():
    """Only a sketch of these is kept."""
    x = correlated(150, 400, 1)
    exact = [outside(torch.cov(p.T, correction=0)) for p in x.split(50)]
    mean = sum(torch.cov(p.T, correction=0) for p in x.split(50)) / 8
    expected = (sum(exact) / 8 - outside(mean)) / 7
    assert float(layer_stats(x, 50).scatter) == pytest.approx(expected, rel=0.15)


def test_fewer_than_four_batches_tell_nothing():
    x = correlated(6, 30, 2)
    assert layer_stats(x, 10).scatter is None
    before = layer_stats(x, 10).gram
    assert torch.equal(shrink_(layer_stats(x, 10)).gram, before)
    assert layer_stats(x, 7).scatter is not None


@pytest.mark.parametrize(("cols", "count"), [(40, 32), (100, 64)])
def test_a_shrunk_gram_is_nearer_to_the_true_one(cols, count):
    true = torch.full((cols, cols), 9.0, dtype=torch.float64)  # the mean, 3
    for distance, covariance in enumerate((3.0, 2.0, 1.0)):
        near = torch.diag(torch.full((cols - distance,), covariance, dtype=torch.float64), distance)
        true += near if distance == 0 else near + near.T
    plain = layer_stats(correlated(cols, count, 3, 3.0), count // 8)
    found = shrink_(layer_stats(correlated(cols, count, 3, 3.0), count // 8))
    off = ~torch.eye(cols, dtype=torch.bool)

    def far(stats: LayerStats) -> float:
        covariance = stats.gram[0] - stats.mean[0, :, None] * stats.mean[0] + 9
        return float((covariance - true)[off].square().sum())

    assert far(found) < 0.7 * far(plain)
    assert torch.equal(found.gram.diagonal(dim1=1, dim2=2), plain.gram.diagonal(dim1=1, dim2=2))
    assert (torch.linalg.eigvalsh(found.gram[0]) > 0).all()


def test_many_samples_are_believed():
    x = correlated(20, 20_000, 4)
    plain, found = layer_stats(x, 1000).gram, shrink_(layer_stats(x, 1000)).gram
    assert 0 < relative(found, plain) < 1e-3


def test_what_solvers_get_is_shrunk(tmp_path):
    layer, x = nn.Linear(20, 1, dtype=torch.float64), correlated(20, 64, 5)
    units = scan(layer).units
    found = captured(layer, batches(x, 64), units, tmp_path, lambda *_: None)["weight"].gram
    assert torch.equal(found, shrink_(layer_stats(x, 8)).gram)  # one batch is cut into 8
    plain = layer_stats(x, 64).gram
    assert relative(found, plain) > 0.01

    class Fixed(nn.Module):
        """Takes batches of 64 only: they are not cut, and nothing is shrunk."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.reshape(64, 20))

    net = Fixed()
    stats = captured(net, batches(x, 64), scan(net).units, tmp_path, lambda *_: None)
    assert torch.equal(stats["fc.weight"].gram, plain)
