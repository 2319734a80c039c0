"""Layers solved one after another: what each is asked to approximate, on which inputs, and what may go wrong."""

import copy
import threading

import pytest
import torch
from torch import nn

import featherweight as fw
from featherweight import sequential
from featherweight.artifact.write import to_bytes
from featherweight.data import Batch
from featherweight.errors import UsageError
from featherweight.layers import scan
from featherweight.methods import Gptq, GridSpec, Magnitude, Obq, Rtn, Unstructured
from featherweight.recipe import Recipe, recipe_of
from featherweight.sequential import DAMP, STRENGTH, single_use, solve_in_order
from tests.nets import images, tiny


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval().requires_grad_(False)


def in_order(model, data, method, **more):
    return fw.compress(model, data, recipe=Recipe(method, sequential=True), **more)


def rounded(w):
    return (w * 4).round() / 4


def test_each_layer_sees_what_the_compressed_ones_before_it_give():
    """The formula of the module's header, written out for two layers."""
    dense, x = two_layers(), torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    small, asked = copy.deepcopy(dense), {}

    def solve(unit, w, stats):
        asked[unit.name] = w, stats
        return rounded(w.float())

    units = scan(dense).units
    solve_in_order(dense, small, Batch((x,), {}), units, solve)
    first, moments = asked["0.weight"]
    assert torch.equal(first, dense[0].weight.double())  # nothing before it was changed
    assert torch.allclose(moments.gram[0], (x.T @ x / 40).double(), rtol=1e-5)
    ideal = torch.relu(dense[0](x)).double()
    y = torch.relu(x @ rounded(dense[0].weight).T + dense[0].bias).double()
    w, moments = asked["2.weight"]
    gram = y.T @ y / 40
    assert torch.allclose(moments.gram[0], gram, rtol=1e-5)
    assert torch.allclose(moments.mean[0], y.mean(dim=0), rtol=1e-5)
    assert moments.samples.tolist() == [40]
    own = dense[2].weight.double()
    ridge = gram + DAMP * gram.diagonal().mean() * torch.eye(5)
    expected = own + STRENGTH * own @ ((ideal - y).T @ y / 40) @ torch.linalg.inv(ridge)
    assert torch.allclose(w, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(small[2].weight, rounded(w.float()))
    assert torch.equal(dense[0].weight, two_layers()[0].weight)


def test_all_of_the_correction_is_least_squares(monkeypatch):
    """At full strength, without damping, the target reproduces the dense outputs as well as any matrix can."""
    monkeypatch.setattr(sequential, "STRENGTH", 1.0)
    monkeypatch.setattr(sequential, "DAMP", 0.0)
    dense, x = two_layers(), torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    targets = {}

    def solve(unit, w, _stats):
        targets[unit.name] = w
        return rounded(w.float())

    solve_in_order(dense, copy.deepcopy(dense), Batch((x,), {}), scan(dense).units, solve)
    y = torch.relu(x @ rounded(dense[0].weight).T + dense[0].bias).double()
    outputs = torch.relu(dense[0](x)).double() @ dense[2].weight.double().T
    best = torch.linalg.lstsq(y, outputs).solution.T
    assert torch.allclose(targets["2.weight"], best, rtol=1e-3, atol=1e-5)


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.twice, self.once, self.never = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        return self.once(self.twice(self.twice(self.table(x)).relu()))


def test_only_what_multiplies_once_in_a_pass_is_solved_in_order():
    net = Reused().eval()
    units = scan(net).units
    assert [u.name for u in single_use(net, Batch((torch.tensor([[1, 2]]),), {}), units)] == ["once.weight"]
    tokens = torch.randint(7, (64, 3), generator=torch.Generator().manual_seed(0))
    small = in_order(net, tokens, Gptq(GridSpec(4)))
    assert small.report.in_order == 1
    assert len(small.report.rows) == 4


def test_the_layers_of_recurrent_and_attention_networks_follow_too():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(5, 4, num_layers=2, bidirectional=True, batch_first=True)
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            hidden, _ = self.rnn(x)
            return self.head(self.attend(hidden, hidden, hidden)[0])

    torch.manual_seed(0)
    net, x = Both().eval(), torch.randn(48, 6, 5)
    small = in_order(net, x, Obq(GridSpec(3)), evaluate=lambda m: float((m(x) - net(x)).square().mean()))
    assert small.report.in_order == len(small.report.rows) == 11
    alone = fw.compress(
        net,
        x,
        recipe=Recipe(Obq(GridSpec(3)), sequential=False),
        evaluate=lambda m: float((m(x) - net(x)).square().mean()),
    )
    assert alone.report.in_order == 0
    assert small.report.after["metric"] < alone.report.after["metric"]


def test_the_same_run_gives_the_same_bytes_and_leaves_no_thread():
    before = threading.active_count()
    files = [to_bytes(in_order(tiny(), images(), Obq(GridSpec(3))).artifact) for _ in "ab"]
    assert files[0] == files[1]
    assert threading.active_count() == before


class Fickle(nn.Module):
    """Takes another path when its first weight changes."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("sum", self.first.weight.detach().sum())

    def forward(self, x):
        x = self.first(x)
        same = torch.equal(self.first.weight.detach().sum(), self.sum)
        return self.left(self.right(x)) if same else self.right(self.left(x))


def test_a_network_that_takes_another_path_is_told_so():
    torch.manual_seed(0)
    before = threading.active_count()
    with pytest.raises(UsageError, match=r"left.weight where the dense one went on with right.weight"):
        in_order(Fickle().eval(), torch.randn(32, 4), Obq(GridSpec(2)))
    assert threading.active_count() == before
    assert fw.compress(
        Fickle().eval(), torch.randn(32, 4), recipe=Recipe(Obq(GridSpec(2)), sequential=False, repair=False)
    )


def test_a_solver_that_fails_stops_both_networks():
    def solve(unit, w, stats):
        raise ArithmeticError(unit.name)

    before = threading.active_count()
    dense = two_layers()
    with pytest.raises(Exception, match=r"0\.weight"):
        solve_in_order(dense, copy.deepcopy(dense), Batch((torch.randn(8, 6),), {}), scan(dense).units, solve)
    assert threading.active_count() == before


def test_methods_that_do_not_look_at_inputs_are_not_solved_in_order():
    for method in (Rtn(GridSpec(4)), Magnitude(Unstructured(0.5))):
        assert in_order(tiny(), images(), method).report.in_order == 0
    assert in_order(tiny(), None, Rtn(GridSpec(4))).report.in_order == 0


def test_a_recipe_says_which_inputs(tmp_path):
    assert not recipe_of({"bits": 4}).sequential
    assert recipe_of({"bits": 4, "sequential": True}).sequential
    assert not recipe_of({"bits": 4, "sequential": False}).sequential
    with pytest.raises(UsageError, match="sequential must be true or false"):
        recipe_of({"bits": 4, "sequential": 1})


class OneSize(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.second(self.first(x.reshape(16, 4)))


def test_a_network_of_a_fixed_batch_size_is_solved_independently_and_that_is_said():
    small = in_order(OneSize().eval(), torch.randn(64, 4), Obq(GridSpec(4)), batch_size=16)
    assert small.report.in_order == 0
    assert "joined batches" in small.report.order_note


def test_where_not_all_samples_fit_that_is_said(monkeypatch):
    monkeypatch.setattr("featherweight.data.SAMPLES", 40)
    small = in_order(tiny(), images(), Obq(GridSpec(3)), batch_size=16)
    assert small.report.in_order == 3
    assert "used 32 of 96 samples" in small.report.order_note


class Short(nn.Module):
    """Skips its last layer when its first weight changes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("sum", self.first.weight.detach().sum())

    def forward(self, x):
        x = self.first(x)
        return self.second(x) if torch.equal(self.first.weight.detach().sum(), self.sum) else x


def test_a_network_that_ends_early_is_told_so():
    torch.manual_seed(0)
    with pytest.raises(UsageError, match=r"ended before second\.weight"):
        in_order(Short().eval(), torch.randn(32, 4), Obq(GridSpec(2)))


def test_half_precision_networks_have_exact_moments():
    net = two_layers().half()
    asked = {}

    def solve(unit, w, stats):
        asked[unit.name] = stats
        return w.float()

    x = torch.full((70_000, 6), 1.0, dtype=torch.float16)  # the sum of squares is beyond the range of fp16
    solve_in_order(net, copy.deepcopy(net), Batch((x,), {}), scan(net).units, solve)
    assert asked["0.weight"].gram[0].flatten().tolist() == pytest.approx([1.0] * 36)
