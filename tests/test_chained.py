"""Networks with chains of layers in them: recurrent layers, embeddings, what stays dense and why."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import featherweight as fw
from featherweight.artifact import Artifact, StoredUnit, write
from featherweight.chains import choose
from featherweight.chains.recurrent import FactoredCell, FactoredRecurrent, Projected
from featherweight.counting import counted, within
from featherweight.data import Batch
from featherweight.errors import UsageError
from featherweight.layers import scan
from featherweight.recipe import recipe_of
from featherweight.report import rows_of
from featherweight.stages import chain_of
from featherweight.weights import Dense, Factors, Grid
from tests.test_chains import close, exact, factors


def low_rank(rows: int, cols: int, rank: int) -> Factors:
    return factors((rows, cols), "oi", "or,ri", {"o": rows, "i": cols, "r": rank})


def filed(net: nn.Module, given: dict[str, Factors], methods: str = "by hand") -> Artifact:
    """A file with these weights, and the others as they are."""
    units = {u.name: u for u in scan(net).units}
    stored = tuple(StoredUnit(units[n].names, units[n].view, w, methods) for n, w in given.items())
    names = {n for u in stored for n in u.names}
    return Artifact(stored, {n: t.float() for n, t in net.state_dict().items() if n not in names}, ())


def both(net: nn.Module, artifact: Artifact, **how: Any) -> tuple[nn.Module, nn.Module]:
    """With the exact weights, and with chains; in float64."""
    net = net.double().eval().requires_grad_(False)
    small = fw.chained(copy.deepcopy(net), artifact, **({"only_if": "always"} | how))
    dense = fw.chained(net, artifact, [])
    for unit in artifact.units:
        dense.get_parameter(unit.names[0]).copy_(exact(unit.weight, unit.view))  # pyright: ignore
    return dense, small


def flat(value: Any) -> list[Tensor]:
    """Every tensor of a layer's output."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value if v is not None and not isinstance(v, int) for t in flat(v)]


def same(a: Any, b: Any) -> bool:
    return len(flat(a)) == len(flat(b)) and all(
        close(x.double(), y.double()) for x, y in zip(flat(a), flat(b), strict=True)
    )


class Wrapped(nn.Module):
    """A layer that is not the whole network, with all of its arguments."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.rnn = layer

    def forward(self, x, hx=None):
        return self.rnn(x, hx)


def weights(layer: nn.Module, *starts: str) -> dict[str, Factors]:
    """Low rank for the weights of the layer whose names start so."""
    return {
        f"rnn.{n}": low_rank(*p.shape, 2) for n, p in layer.named_parameters() if p.ndim == 2 and n.startswith(starts)
    }


LAYERS = [
    (lambda **k: nn.LSTM(5, 6, **k), {}),
    (lambda **k: nn.LSTM(5, 6, **k), {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    (lambda **k: nn.LSTM(5, 6, **k), {"num_layers": 2, "proj_size": 3, "bias": False}),
    (lambda **k: nn.LSTM(5, 6, **k), {"proj_size": 3, "bidirectional": True}),
    (lambda **k: nn.GRU(5, 6, **k), {"num_layers": 2, "batch_first": True, "dropout": 0.5}),
    (lambda **k: nn.GRU(5, 6, **k), {"bidirectional": True, "bias": False}),
    (lambda **k: nn.RNN(5, 6, **k), {"num_layers": 2, "nonlinearity": "relu"}),
    (lambda **k: nn.RNN(5, 6, **k), {"bidirectional": True}),
]


@pytest.mark.parametrize(("make", "how"), LAYERS)
def test_recurrent_layers(make, how):
    torch.manual_seed(0)
    layer = make(**how)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    lengths = [torch.randn(n, 5, dtype=torch.float64) for n in (2, 4, 1)]
    batch = 4 if layer.batch_first else 3
    first, cells = layer.num_layers * (1 + layer.bidirectional), isinstance(layer, nn.LSTM)

    def states(*middle: int) -> Any:
        hidden = torch.randn(first, *middle, getattr(layer, "proj_size", 0) or 6, dtype=torch.float64)
        return (hidden, torch.randn(first, *middle, 6, dtype=torch.float64)) if cells else hidden

    packed = pack_sequence(lengths, enforce_sorted=False)
    calls = [(x,), (x, states(batch)), (x[0],), (x[0], states()), (packed,), (packed, states(3))]
    for starts in (("weight_ih_l0",), ("weight_hh",), ("weight_ih", "weight_hh")):
        net = Wrapped(copy.deepcopy(layer))
        dense, small = both(net, filed(net, weights(layer, *starts)))
        simple = starts == ("weight_ih_l0",) and not layer.bidirectional
        assert type(small.rnn) is (Projected if simple else FactoredRecurrent)
        for args in calls:
            assert same(small(*args), dense(*args)), (starts, args)


@pytest.mark.parametrize("make", [nn.LSTMCell, nn.GRUCell, nn.RNNCell, lambda a, b: nn.RNNCell(a, b, False, "relu")])
def test_recurrent_cells(make):
    torch.manual_seed(0)
    layer, x, h = make(5, 6), torch.randn(3, 5).double(), torch.randn(3, 6).double()
    hx = (h, h + 1) if isinstance(layer, nn.LSTMCell) else h
    for starts in (("weight_ih",), ("weight_hh",), ("weight_ih", "weight_hh")):
        net = Wrapped(copy.deepcopy(layer))
        dense, small = both(net, filed(net, weights(layer, *starts)))
        assert type(small.rnn) is (Projected if starts == ("weight_ih",) else FactoredCell)
        for args in ((x,), (x, hx), (x[0],)):
            assert same(small(*args), dense(*args))


class Net(nn.Module):
    """Embedding, recurrent layer, convolutions, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 12, padding_idx=0)
        self.rnn = nn.LSTM(12, 16, num_layers=2, batch_first=True)
        self.conv = nn.Conv1d(16, 12, 3, stride=2, padding=1)
        self.wide = nn.Conv1d(12, 12, 3, groups=2)
        self.fc = nn.Linear(12, 10)
        self.out = nn.Linear(10, 4, bias=False)

    def forward(self, ids):
        x = self.rnn(self.embed(ids))[0].transpose(1, 2)
        return self.out(self.fc(self.wide(self.conv(x)).mean(2)).relu())


def whole() -> tuple[nn.Module, Artifact]:
    net = Net().eval().requires_grad_(False)
    given = {
        "embed.weight": low_rank(40, 12, 3),
        "rnn.weight_ih_l0": low_rank(64, 12, 4),
        "rnn.weight_hh_l1": low_rank(64, 16, 3),
        "conv.weight": factors((12, 48), "oit", "or,rst,si", {"o": 12, "i": 16, "t": 3, "r": 4, "s": 5}),
        "wide.weight": low_rank(12, 18, 2),
        "fc.weight": factors((10, 12), "obc", "obr,rbc", {"o": 10, "b": 2, "c": 6, "r": 2}),
        "out.weight": low_rank(4, 10, 8),
    }
    return net, filed(net, given)


IDS = torch.randint(0, 40, (6, 11), generator=torch.Generator().manual_seed(0))


def test_a_file_becomes_a_network_of_chains(tmp_path):
    _, artifact = whole()
    write(artifact, tmp_path / "small.fw")
    small = fw.load_chained(tmp_path / "small.fw", into=Net())
    with torch.no_grad():
        assert torch.allclose(small(IDS), fw.load(tmp_path / "small.fw", into=Net())(IDS), atol=1e-5)
    assert [type(m) for m in small.embed] == [nn.Embedding, nn.Linear]
    assert [type(m) for m in small.conv] == [nn.Conv1d] * 3
    assert type(small.rnn) is FactoredRecurrent
    assert [type(m) for m in (small.wide, small.out, *small.fc)] == [nn.Conv1d, nn.Linear, nn.Linear, nn.Linear]
    assert not small.training


def test_what_runs_as_what_and_why():
    net, artifact = whole()
    rows = {r.name: r for r in fw.chains_of(net, artifact, example=IDS, only_if="fewer")}
    assert {n: r.stored for n, r in rows.items()} == {
        "embed.weight": "low rank r=3 fp32",
        "rnn.weight_ih_l0": "low rank r=4 fp32",
        "rnn.weight_hh_l1": "low rank r=3 fp32",
        "conv.weight": "tucker r=4,5 fp32",
        "wide.weight": "rows r=2 fp32",
        "fc.weight": "blocks r=2 fp32",
        "out.weight": "low rank r=8 fp32",
    }
    assert rows["conv.weight"].runs == "1 16 -> 5, 3 5 -> 4, 1 4 -> 12"
    assert rows["embed.weight"].runs == "40 -> 3, 3 -> 12"
    assert {n: r.reason for n, r in rows.items() if not r.chained} == {
        "wide.weight": "its convolution has groups of its own",
        "out.weight": "its chain multiplies 2.80 times as often",
    }
    conv = rows["conv.weight"]
    assert conv.chain is not None
    assert (conv.dense.macs, conv.chain.macs) == (12 * 48 * 6, 16 * 5 * 11 + (60 + 48) * 6)
    assert (conv.dense.params, conv.chain.params, conv.chain.bytes) == (576, 188, 752)
    bare = {r.name: r for r in fw.chains_of(net, artifact)}["conv.weight"]
    assert bare.chain is not None
    assert (bare.dense.macs, bare.chain.macs) == (576, 80 * 2 + 108)


def test_counts_are_those_of_the_running_network():
    net, artifact = whole()
    rows = fw.chains_of(net, artifact, example=IDS, only_if="always")
    one = Batch((IDS[:1],), {})
    before, small = counted(net, one), fw.chained(copy.deepcopy(net), artifact, rows)
    after = counted(small, one)
    chained = {r.name.rpartition(".")[0] for r in rows if r.chained}
    for place in chained:
        own = [r for r in rows if r.name.startswith(f"{place}.")]
        saved = sum(r.dense.macs - r.chain.macs for r in own if r.chained and r.chain is not None)
        assert within(before, place) - within(after, place) == saved, place
    assert {"embed", "rnn", "conv", "fc", "out"} == chained
    assert before["wide"] == after["wide"] > 0


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Named(nn.Linear):
    """Another name for the same."""


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.doubled, self.named, self.hooked, self.read = (k(8, 8) for k in (Doubled, Named, nn.Linear, nn.Linear))
        self.tied, self.twin = nn.Linear(8, 8), nn.Linear(8, 8)
        self.twin.weight = self.tied.weight
        self.norms = nn.Embedding(8, 8, max_norm=1.0)
        self.attention = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.mixed, self.plain = nn.Linear(8, 8), nn.Linear(8, 8)
        self.hooked.register_forward_hook(lambda _m, _x, y: y + 1)

    def forward(self, ids):
        x = self.attention(self.norms(ids))
        x = self.twin(self.tied(self.hooked(self.named(self.doubled(x)))))
        return self.plain(self.mixed(nn.functional.linear(x, self.read.weight)))


def test_layers_that_do_something_else_stay_dense():
    torch.manual_seed(0)
    net = Odd().eval().requires_grad_(False)
    names = "doubled named hooked read tied norms attention.linear1 attention.self_attn.in_proj mixed plain"
    given = {f"{n}.weight": low_rank(8, 8, 2) for n in names.split() if "in_proj" not in n}
    given["attention.self_attn.in_proj_weight"] = low_rank(24, 8, 2)
    given["mixed.weight"] = factors((8, 8), "oi", "oir,r", {"o": 8, "i": 8, "r": 3})
    artifact = filed(net, given)
    plain = Grid(torch.zeros(8, 8, dtype=torch.uint8), torch.ones(1, 1), None, 2, 0)
    units = [u if u.names[0] != "plain.weight" else StoredUnit(u.names, u.view, plain, "") for u in artifact.units]
    artifact = Artifact(tuple(units), artifact.rest, ())
    ids = torch.arange(8)[None]
    rows = fw.chains_of(net, artifact, example=ids, only_if="fewer")
    assert {r.name.removesuffix("weight").strip("._"): r.reason for r in rows} == {
        "doubled": "Doubled has a forward of its own",
        "named": "",
        "hooked": "its layer has hooks",
        "read": "the example does not call its layer: something else may read its weight",
        "tied": "its weight has several names",
        "norms": "its embedding cuts norms",
        "attention.linear1": "attention and encoder layers of torch read the weight themselves",
        "attention.self_attn.in_proj": "a chain cannot stand for MultiheadAttention",
        "mixed": "no chain of layers computes this contraction",
        "plain": "not stored as factors",
    }
    small, dense = fw.chained(copy.deepcopy(net), artifact, rows), fw.chained(net, artifact, [])
    assert torch.allclose(small(ids), dense(ids), rtol=1e-4, atol=1e-4)
    assert isinstance(small.named, nn.Sequential)


def test_times_decide_where_there_is_an_example(monkeypatch):
    net, artifact = whole()
    slow: set[type] = {FactoredRecurrent}

    def timed(run: Any, _device: Any) -> int:
        run()
        layer = run.__defaults__[0]
        return 30 if type(layer) in slow else 20 if isinstance(layer, nn.Sequential | Projected) else 25

    monkeypatch.setattr(choose, "timed", timed)
    rows = {r.name: r for r in fw.chains_of(net, artifact, example=IDS)}
    assert rows["conv.weight"].chained
    assert (rows["conv.weight"].dense.micros, rows["conv.weight"].chain.micros) == (25, 20)  # pyright: ignore
    assert rows["rnn.weight_ih_l0"].chained
    assert rows["rnn.weight_hh_l1"].reason == "measured: its layer is faster with this weight dense"
    assert type(fw.chained(copy.deepcopy(net), artifact, list(rows.values())).rnn) is Projected
    slow |= {nn.Sequential, Projected}
    rows = {r.name: r for r in fw.chains_of(net, artifact, example=IDS)}
    assert {n for n, r in rows.items() if r.chained} == {"embed.weight"}
    assert rows["conv.weight"].reason == "measured: 30 µs as a chain, 25 µs dense"


def test_wrong_requests_are_refused():
    net, artifact = whole()
    with pytest.raises(UsageError, match="only_if must be"):
        fw.chains_of(net, artifact, only_if="smaller")  # pyright: ignore
    with pytest.raises(UsageError, match="does not accept the data"):
        fw.chains_of(net, artifact, example=torch.randn(2, 3))
    alone = nn.Linear(8, 8).eval()
    (row,) = fw.chains_of(alone, filed(alone, {"weight": low_rank(8, 8, 2)}))
    assert row.reason == "its layer is the whole network"


def test_letters_that_lie_across_channels_are_no_chain():
    conv = scan(nn.Sequential(nn.Conv2d(4, 6, 3))).units[0].view
    across = factors((6, 36), "obc", "obr,rbc", {"o": 6, "b": 6, "c": 6, "r": 2})  # 6 columns: two thirds of a channel
    assert chain_of(across, conv) is None
    alone = Factors((6, 36), "oc", ("oc",), {"o": 6, "c": 36}, (Dense(torch.zeros(6, 36)),))
    assert chain_of(alone, conv) is None


def test_ends_of_size_one():
    torch.manual_seed(0)
    for axes, terms, sizes, shape in (
        ("oit", "or,rst,si", {"o": 6, "i": 1, "t": 9, "r": 3, "s": 2}, (6, 1, 3, 3)),
        ("oit", "or,rst,si", {"o": 1, "i": 4, "t": 9, "r": 3, "s": 2}, (1, 4, 3, 3)),
        ("oc", "or,rc", {"o": 6, "c": 36, "r": 1}, (6, 4, 3, 3)),
        ("oiyx", "oxr,riy", {"o": 6, "i": 1, "y": 3, "x": 3, "r": 2}, (6, 1, 3, 3)),
    ):
        weight = factors((shape[0], shape[1] * 9), axes, terms, sizes)
        net = nn.Sequential(nn.Conv2d(shape[1], shape[0], 3, padding=1))
        dense, small = both(net, filed(net, {"0.weight": weight}))
        assert isinstance(small[0], nn.Sequential)
        assert same(small(x := torch.randn(2, shape[1], 6, 5).double()), dense(x))


def test_a_report_says_what_is_stored():
    _, artifact = whole()
    assert [r.kind for r in rows_of(artifact)][:4] == [
        "low rank r=3 fp32",
        "low rank r=4 fp32",
        "low rank r=3 fp32",
        "tucker r=4,5 fp32",
    ]


def test_exporters_see_plain_layers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(6, 6, 3, stride=2, padding=1), nn.ReLU(), Wrapped(nn.GRU(5, 4, batch_first=True)))
    given = {"0.weight": low_rank(6, 18, 2), "2.rnn.weight_hh_l0": low_rank(12, 4, 1)}
    small = fw.chained(net.eval().requires_grad_(False), filed(net, given))
    assert (type(small[0]), type(small[2].rnn)) == (nn.Sequential, FactoredRecurrent)
    program, x = torch.export.export(small, (torch.randn(2, 6, 9),)), torch.randn(2, 6, 9)
    assert same(program.module()(x), small(x))


class Curious(nn.Module):
    """Reads what its layers say of themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rnn = nn.Conv2d(3, 8, 3, padding=1), nn.GRU(8, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.flatten_parameters()
        assert (self.conv.out_channels, self.conv.kernel_size, self.rnn.num_layers) == (8, (3, 3), 1)
        hidden = torch.zeros(self.rnn.num_layers, len(x), self.rnn.hidden_size)
        return self.rnn(self.conv(x).flatten(2).transpose(1, 2), hidden)[0]


@pytest.mark.parametrize("weight", ["rnn.weight_ih_l0", "rnn.weight_hh_l0"])
def test_what_stands_for_a_layer_answers_as_it_did(weight):
    net, x = Curious().eval(), torch.randn(2, 3, 4, 4)
    rows, cols = net.get_parameter(weight).shape
    small = fw.chained(
        net, filed(net, {"conv.weight": low_rank(8, 27, 2), weight: low_rank(rows, cols, 2)}), only_if="always"
    )
    assert not isinstance(small.conv, nn.Conv2d)
    assert not isinstance(small.rnn, nn.GRU)
    assert small(x).shape == (2, 16, 6)


def test_a_slim_layer_answers_as_it_did():
    net, x = Curious().eval(), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        net.conv.weight[::2] = 0
    before = net(x)
    small = fw.slim(net)
    assert not isinstance(small.conv, nn.Conv2d)
    torch.testing.assert_close(small(x), before)


def test_the_report_says_what_runs_decoded():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)), torch.randn(16, 8, 6, 6)
    ring = fw.compress(net, x, recipe=recipe_of({"method": "tr", "keep": 0.4})).report.rows
    assert all("runs decoded: its chain multiplies" in row.note for row in ring)
    spatial = fw.compress(net, x, recipe=recipe_of({"method": "spatial", "keep": 0.4})).report.rows
    assert [row.note for row in spatial] == ["", ""]
