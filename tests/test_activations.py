"""Inputs on a grid: the grid, its search, and networks that round their inputs whatever way they use their weights."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from featherweight import activations
from featherweight.activations import ActivationGrid, best_grid, calibrate, simulate, simulated
from featherweight.data import Batch
from featherweight.errors import UsageError
from featherweight.layers import scan
from tests.nets import sentences, tiny, words


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def by_hand(x: float, bits: int, scale: float, zero: int) -> float:
    """docs/format.md in plain Python."""
    code = round(x / scale) + zero  # Python rounds halves to even
    return scale * (min(max(code, 0), 2**bits - 1) - zero)


# ---------------------------------------------------------------- the grid
@pytest.mark.parametrize(("bits", "scale", "zero"), [(8, 0.125, 100), (4, 0.5, 0), (2, 0.25, 3), (3, 1.0, 5)])
def test_simulation_is_what_the_format_says(bits, scale, zero):
    values = torch.cat([torch.randn(200, dtype=torch.float64) * 4, torch.arange(-40, 40) * scale / 2])  # with halves
    grid = ActivationGrid(bits, scale, zero)
    before = values.clone()
    assert grid.simulate(values).tolist() == [by_hand(x, bits, scale, zero) for x in values.tolist()]
    assert torch.equal(values, before)
    assert torch.equal(grid.simulate(grid.simulate(values)), grid.simulate(values))
    assert len(grid.simulate(values * 100).unique()) <= 2**bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_type_of_the_input_is_kept(dtype):
    grid, x = ActivationGrid(8, float(torch.tensor(0.0321)), 31), (torch.randn(50, 3) * 2).to(dtype).T
    y = grid.simulate(x)
    assert y.dtype == dtype
    assert y.shape == x.shape
    inside = (x > -0.9) & (x < 7)
    allowed = grid.scale / 2 + x.abs().double() * torch.finfo(dtype).eps
    assert ((y.double() - x.double()).abs() <= allowed)[inside].all()
    assert torch.equal(grid.simulate(y), y)
    assert grid.simulate(x.new_zeros(3)).tolist() == [0, 0, 0]


def test_not_a_number_stays_and_infinities_are_kept_on_the_grid():
    y = ActivationGrid(2, 1.0, 1).simulate(torch.tensor([math.nan, math.inf, -math.inf]))
    assert y.isnan().tolist() == [True, False, False]
    assert y[1:].tolist() == [2, -1]


@pytest.mark.parametrize(
    "wrong",
    [(1, 1.0, 0), (9, 1.0, 0), (True, 1.0, 0), (8.0, 1.0, 0), (8, 0.0, 0), (8, -1.0, 0), (8, math.nan, 0), (8, 0.1, 0),
     (8, math.inf, 0), (8, 1, 0), (8, 1e300, 0), (4, 1.0, 16), (4, 1.0, -1), (4, 1.0, 1.0)],
)  # fmt: skip
def test_no_other_grids_are_made(wrong):
    with pytest.raises(UsageError, match=r"bits|scale|zero"):
        ActivationGrid(*wrong)


# ---------------------------------------------------------------- its search
def error(values: torch.Tensor, grid: ActivationGrid) -> float:
    return sum((by_hand(x, grid.bits, grid.scale, grid.zero) - x) ** 2 for x in values.tolist())


PROBLEMS = {
    "both-signs": lambda: torch.randn(40, dtype=torch.float64),
    "skewed": lambda: torch.randn(40, dtype=torch.float64).exp() - 0.5,
    "positive": lambda: torch.randn(40, dtype=torch.float64).relu(),
    "negative": lambda: -torch.rand(40, dtype=torch.float64),
    "far-from-zero": lambda: torch.rand(40, dtype=torch.float64) + 5,
    "outlier": lambda: torch.cat([torch.randn(39, dtype=torch.float64), torch.tensor([30.0])]),
    "few-values": lambda: torch.tensor([0.0, 0.0, 1.0, 1.0, -3.0], dtype=torch.float64),
}


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_range_is_as_good_as_that_of_an_exhaustive_search(problem, bits):
    """Every zero with 400 scales, as far as the range stays in that of the values; errors summed value by value."""
    values = PROBLEMS[problem]()
    found = best_grid(values, bits)
    low, high = min(float(values.min()), 0), max(float(values.max()), 0)
    scales = [float(torch.tensor((high - low) * i / 400)) for i in range(1, 401)]
    x, codes = values[:, None], 2**bits - 1
    least = math.inf
    for zero in range(2**bits):
        s = torch.tensor(scales, dtype=torch.float64)
        s = s[(-zero * s >= low - s / 2) & ((codes - zero) * s <= high + s / 2)]
        if len(s) == 0:
            continue
        rounded = s * ((x / s).round().add(zero).clamp(0, codes) - zero)
        least = min(least, float((rounded - x).square().sum(0).min()))
    assert error(values, found) <= 1.1 * least + 1e-12


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_error_of_every_range_is_exact_and_the_least_is_chosen(problem, bits, monkeypatch):
    values = PROBLEMS[problem]()
    tried = []
    best = activations._best

    def spy(x, sums, bits, ranges):
        found = best(x, sums, bits, ranges)
        for pair in ranges.tolist():
            one = best(x, sums, bits, torch.tensor([pair], dtype=torch.float64))
            tried.append(one[0])
        return found

    monkeypatch.setattr(activations, "_best", spy)
    monkeypatch.setattr(activations, "STEPS", 5)
    monkeypatch.setattr(activations, "FINER", 3)
    found = best_grid(values, bits)
    assert found in tried
    assert error(values, found) <= min(error(values, grid) for grid in tried) * (1 + 1e-9) + 1e-12


def test_at_few_bits_the_range_is_far_from_the_extremes():
    values = torch.randn(activations.SAMPLE)
    found, span = best_grid(values, 4), float(values.max() - values.min())
    scale = float(torch.tensor(span / 15))
    widest = ActivationGrid(4, scale, round(-float(values.min()) / scale))
    lost = [float((g.simulate(values) - values).square().mean()) for g in (found, widest)]
    assert 2 * lost[0] < lost[1]


def test_inputs_that_are_never_negative_are_unsigned():
    assert best_grid(torch.rand(1000), 8).zero == 0
    assert best_grid(-torch.rand(1000), 8).zero == 255
    assert best_grid(torch.randn(100_000), 8).zero in range(118, 139)


def test_the_search_does_not_depend_on_order_or_shape():
    x = torch.randn(30, 20)
    assert best_grid(x, 4) == best_grid(x.flatten().flip(0), 4)


@pytest.mark.parametrize("values", [[], [0.0, -0.0], [1e-46, -1e-46], [1e300]])
def test_values_without_a_grid(values):
    assert best_grid(torch.tensor(values, dtype=torch.float64), 8) is None


def test_a_sample_is_bounded_fair_and_repeatable(monkeypatch):
    monkeypatch.setattr(activations, "SAMPLE", 1000)
    random = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    samples = [activations._Sample() for _ in range(2)]
    for sample in samples:
        generator = random()
        for start, size in [(0, 300), (300, 0), (300, 20_000), (20_300, 1), (20_301, 9_699), (30_000, 5_000)]:
            sample.add(torch.arange(start, start + size, dtype=torch.float32), generator)
            assert len(sample.kept) <= 1001
    first, second = samples
    assert torch.equal(first.kept, second.kept)
    assert len(first.kept) > 400
    assert abs(first.kept.mean() - 17_500) < 1500  # five standard errors
    small = activations._Sample()
    small.add(torch.arange(900.0).reshape(3, 300), random())
    assert torch.equal(small.kept, torch.arange(900.0))


# ---------------------------------------------------------------- networks
class Calling(nn.Module):
    """A network that does with one layer whatever a test says."""

    def __init__(self, layer, forward):
        super().__init__()
        self.layer = layer
        self.run = forward

    def forward(self, *inputs):
        return self.run(self.layer, *inputs)


GRID = ActivationGrid(3, 0.5, 3)
IMAGE = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(0))
LINE = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(1))
USES = {  # r marks what is rounded
    "linear": (nn.Linear(7, 3), lambda m, x, r: m(r(x)), LINE),
    "functional": (nn.Linear(7, 3), lambda m, x, r: F.linear(r(x), m.weight), LINE),
    "by-name": (nn.Linear(7, 3), lambda m, x, r: F.linear(weight=m.weight, input=r(x), bias=m.bias), LINE),
    "weight-by-name": (nn.Conv1d(4, 3, 2), lambda m, x, r: F.conv1d(r(x), weight=m.weight, bias=m.bias), LINE),
    "torch.conv1d": (nn.Conv1d(4, 3, 2), lambda m, x, r: torch.conv1d(r(x), m.weight), LINE),
    "conv1d-padded": (nn.Conv1d(4, 3, 3, padding=1), lambda m, x, r: m(r(x)), LINE),
    "conv2d-grouped": (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), lambda m, x, r: m(r(x)), IMAGE),
    "conv2d-reflects": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), lambda m, x, r: m(r(x)), IMAGE),
    "conv2d-pads-itself": (
        nn.Conv2d(4, 6, 3, stride=2),
        lambda m, x, r: F.conv2d(F.pad(r(x), (0, 1, 0, 1)), m.weight, m.bias, m.stride),
        IMAGE,
    ),
    "conv3d": (nn.Conv3d(2, 3, 2), lambda m, x, r: m(r(x)), IMAGE.reshape(2, 2, 2, 7, 7)),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 3, 3, stride=2), lambda m, x, r: m(r(x)), LINE),
    "conv_transpose2d": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2),
        lambda m, x, r: m(r(x), output_size=(14, 14)),
        IMAGE,
    ),
    "conv_transpose3d": (nn.ConvTranspose3d(2, 3, 2), lambda m, x, r: m(r(x)), IMAGE.reshape(2, 2, 2, 7, 7)),
    "reused": (nn.Linear(7, 7), lambda m, x, r: m(r(m(r(x)))), LINE),
    "changed-weight": (nn.Linear(7, 3), lambda m, x, r: F.linear(x, m.weight * 2), LINE),
}


@pytest.mark.parametrize("use", USES)
def test_inputs_are_rounded_wherever_the_weight_is_used(use):
    layer, forward, x = USES[use]
    net = Calling(layer, lambda m, x: forward(m, x, lambda x: x)).eval()
    dense, rounded = net(x), forward(layer, x, GRID.simulate)
    assert torch.equal(dense, rounded) == (use == "changed-weight")
    simulate(net, {"layer.weight": GRID})
    assert torch.equal(net(x), rounded)
    simulate(net, {})
    assert torch.equal(net(x), dense)


def pair() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


GRIDS = {"0.weight": ActivationGrid(2, 0.5, 1), "2.weight": ActivationGrid(2, 0.25, 0)}
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def net():
    """A network that simulates, and has its answer on X as an attribute."""
    net = pair()
    simulate(net, GRIDS)
    a, relu, b = pair()
    net.want = b(GRIDS["2.weight"].simulate(relu(a(GRIDS["0.weight"].simulate(X))))).detach()
    return net


def idle() -> bool:
    return _get_current_function_mode_stack() == []


def test_a_network_simulates_whenever_it_is_called(net):
    assert torch.equal(net(X), net.want)
    assert torch.equal(net.forward(X), net.want)
    assert torch.equal(net(input=X), net.want)
    assert not torch.equal(pair()(X), net.want)
    assert simulated(net) == GRIDS
    assert simulated(pair()) == {}
    with torch.inference_mode():
        assert torch.equal(net(X), net.want)
    assert idle()


def test_the_network_is_the_same_but_for_its_forward(net):
    plain = pair()
    assert type(net) is type(plain)
    assert list(net.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in net.named_modules()] == [n for n, _ in plain.named_modules()]
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert not net._forward_hooks
    assert not net._forward_pre_hooks
    simulate(net, {})
    assert "forward" not in vars(net)


def test_other_grids_take_the_place_of_the_first(net):
    simulate(net, {"0.weight": GRIDS["0.weight"]})
    assert simulated(net) == {"0.weight": GRIDS["0.weight"]}
    assert torch.equal(net(X), pair()(GRIDS["0.weight"].simulate(X)))


@pytest.mark.parametrize("name", ["1.weight", "0.wait", "weight", "7.weight", ""])
def test_a_name_that_the_network_lacks_changes_nothing(net, name):
    with pytest.raises(UsageError, match="no such tensor"):
        simulate(net, {name: GRIDS["0.weight"]})
    assert torch.equal(net(X), net.want)
    net[0] = nn.ReLU()
    with pytest.raises(UsageError, match=r"'0\.weight' are to be rounded"):
        net(X)
    assert idle()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_simulates_for_itself(net, how):
    if how == "deepcopy":
        other = copy.deepcopy(net)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(net))
    else:
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert torch.equal(other(X), net.want)
    with torch.no_grad():
        net[0].weight.zero_()
    assert torch.equal(other(X), net.want)
    simulate(other, {})
    assert torch.equal(other(X), pair()(X))
    assert simulated(net) == GRIDS


class Fails(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.fc, self.error, self.fails = nn.Linear(4, 3), error, True

    def forward(self, x):
        y = self.fc(x)
        if self.fails:
            raise self.error
        return y


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_nothing_stays_on_after_a_failure(error):
    net = Fails(error)
    simulate(net, {"fc.weight": GRIDS["0.weight"]})
    for _ in range(2):
        with pytest.raises(type(error)):
            net(X)
        assert idle()
        assert not torch.equal(net.fc(X), net.fc(GRIDS["0.weight"].simulate(X)))  # a part alone runs as it is
    net.fails = False
    assert torch.equal(net(X), net.fc(GRIDS["0.weight"].simulate(X)))


def test_hooks_that_fail_or_change_things_work_as_before(net):
    handle = net.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net(X)
    assert idle()
    handle.remove()
    net.register_forward_hook(lambda module, args, out: out + 1)
    assert torch.equal(net(X), net.want + 1)


def test_networks_inside_networks(net):
    """Each rounds its own weights; one that calls itself rounds twice, which changes nothing."""
    outer = nn.Sequential(net, nn.Linear(3, 2))
    plain = outer(X)
    simulate(outer, {"1.weight": GRIDS["0.weight"], "0.0.weight": GRIDS["0.weight"]})
    assert torch.equal(outer(X), outer[1](GRIDS["0.weight"].simulate(net.want)))
    assert not torch.equal(outer(X), plain)

    class Twice(nn.Linear):
        def forward(self, x, again=True):
            return self(x, again=False) if again else F.linear(x, self.weight, self.bias)

    twice = Twice(4, 3)
    simulate(twice, {"weight": GRIDS["0.weight"]})
    assert torch.equal(twice(X), F.linear(GRIDS["0.weight"].simulate(X), twice.weight, twice.bias))


def test_training_runs_and_gives_no_gradient_through_the_grid(net):
    net.train()
    net(X).sum().backward()
    assert net[2].weight.grad.abs().sum() > 0
    assert net[0].weight.grad.abs().sum() == 0


def test_other_tensors_for_one_call(net):
    zeros = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    zeros["2.bias"] = torch.ones(3)
    assert torch.equal(torch.func.functional_call(net, zeros, X), torch.ones(5, 3))
    doubled = {"2.weight": 2 * net[2].weight.detach()}
    assert torch.allclose(torch.func.functional_call(net, doubled, X), 2 * net.want - net[2].bias)


def test_a_forward_of_its_own_is_kept():
    net = pair()
    net.forward = lambda x: net[0](x)
    simulate(net, {"0.weight": GRIDS["0.weight"]})
    assert torch.equal(net(X), net[0](GRIDS["0.weight"].simulate(X)))
    simulate(net, {})
    assert torch.equal(net(X), net[0](X))


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_networks_simulate(net):
    assert torch.equal(torch.compile(net, backend="eager")(X), net.want)
    compiled = torch.compile(pair(), backend="eager")
    dense = compiled(X)
    grids = {f"_orig_mod.{n}": g for n, g in GRIDS.items()}
    simulate(compiled, grids)
    assert simulated(compiled) == grids
    assert torch.equal(compiled(X), net.want)
    assert torch.equal(copy.deepcopy(compiled)(X), net.want)
    simulate(compiled, {})
    assert torch.equal(compiled(X), dense)
    part = pair()
    part[0] = torch.compile(part[0], backend="eager")
    assert torch.equal(part(X), dense)
    simulate(part, {"0._orig_mod.weight": GRIDS["0.weight"], "2.weight": GRIDS["2.weight"]})
    assert torch.equal(part(X), net.want)
    assert idle()


# ---------------------------------------------------------------- calibration
def calibrated(model, *batches, bits=8):
    units = scan(model).units
    bits = bits if isinstance(bits, dict) else {u.name: bits for u in units}
    grids, left = calibrate(model, [Batch((b,), {}) for b in batches], units, bits)
    return grids, {x.name: x.reason for x in left}


def test_the_grid_of_an_input_is_the_best_for_all_its_calls():
    net = pair()
    other = torch.randn(3, 4) * 5
    grids, left = calibrated(net, X, other)
    assert left == {}
    assert grids["0.weight"] == best_grid(torch.cat([X, other]), 8)
    assert grids["2.weight"] == best_grid(net[1](net[0](torch.cat([X, other]))), 8)
    assert grids["2.weight"].zero == 0


def test_calibration_is_repeatable_and_leaves_the_network_alone():
    model, x = tiny(), torch.randn(64, 3, 16, 16)
    before = copy.deepcopy(model.state_dict())
    assert calibrated(model, x) == calibrated(tiny(), x)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert simulated(model) == {}
    assert idle()


def test_without_bits_the_network_does_not_run():
    assert calibrated(Fails(ValueError()), X, bits=0) == ({}, {})


def test_inputs_that_stay_float_are_told():
    grids, left = calibrated(words(), sentences())
    assert list(grids) == ["embed.weight"]  # tied to the last layer, whose inputs are rounded
    assert left == dict.fromkeys(("lstm.weight_ih_l0", "lstm.weight_hh_l0"), activations._UNSEEN["recurrent"])

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 4)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.cell = nn.GRUCell(4, 4)
            self.spare, self.dead, self.off, self.last = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, ids):
            x = self.table(ids)
            x = self.attention(x, x, x)[0]
            x = self.cell(x[:, 0]) + self.dead(torch.zeros(4)) + self.off(x[:, 1])
            return self.last(x)

    bits = {u.name: 8 for u in scan(Mixed()).units} | {"off.weight": 0, "last.weight": 3}
    grids, left = calibrated(Mixed().eval(), torch.randint(0, 5, (6, 3)), bits=bits)
    assert {n: g.bits for n, g in grids.items()} == {"last.weight": 3}
    assert "whole numbers" in left["table.weight"]
    assert "attention" in left["attention.in_proj_weight"]
    assert "attention" in left["attention.out_proj.weight"]
    assert "recurrent" in left["cell.weight_hh"]
    assert "no sample reached it" in left["spare.weight"]
    assert "zero on all" in left["dead.weight"]
    assert "switched off" in left["off.weight"]
    assert set(grids) | set(left) == set(bits)


def test_fused_transformer_layers_round_what_is_linear():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    grids, left = calibrated(layer, x)
    assert set(grids) == {"linear1.weight", "linear2.weight"}
    assert set(left) == {"self_attn.in_proj_weight", "self_attn.out_proj.weight"}
    with torch.no_grad():
        dense = layer(x)
        simulate(layer, {n: ActivationGrid(2, 0.5, 1) for n in grids})
        assert not torch.allclose(layer(x), dense, atol=0.05)


def test_inputs_with_nan_stay_float():
    x = X.clone()
    x[0, 0] = math.nan
    grids, left = calibrated(pair(), x)
    assert grids == {}
    assert all("NaN" in reason for reason in left.values())
