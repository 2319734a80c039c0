"""What a network's modules are set to is in its file, and another setting is named."""

import copy
import json
import sys
import zlib
from subprocess import CompletedProcess

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import featherweight as fw
from featherweight.artifact import Artifact, fill
from featherweight.artifact.structure import structural_differences, structure_of
from featherweight.errors import FormatError, UsageError
from featherweight.methods import GridSpec, Rtn
from featherweight.proof import prove
from featherweight.race import Race


class Net(nn.Module):
    def __init__(self, act=nn.ReLU, stride=2, padding=1, eps=1e-5, heads=2, groups=1, **layer):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=stride, padding=padding, **layer)
        self.bn = nn.BatchNorm2d(8, eps=eps)
        self.act = act()
        self.norm = nn.GroupNorm(groups, 8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.attention = nn.MultiheadAttention(8, heads, batch_first=True)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = self.pool(self.norm(self.act(self.bn(self.conv(x))))).flatten(1)[:, None]
        return self.fc(self.drop(self.attention(x, x, x)[0][:, 0]))


def made(**settings) -> nn.Module:
    torch.manual_seed(0)
    return Net(**settings).eval()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "net.fw"
    fw.compress(made(), method=Rtn(GridSpec(4))).save(path)
    return path


def refusal(file, net) -> str:
    with pytest.raises(UsageError) as told:
        fw.load(file, into=net)
    assert "\n" not in str(told.value)
    return str(told.value)


CHANGES = [
    ({"stride": 1}, "conv.stride is 1 in the network and 2 in the file"),
    ({"stride": (2, 1)}, "conv.stride is (2, 1) in the network and 2 in the file"),
    ({"padding": 0}, "conv.padding is 0 in the network and 1 in the file"),
    ({"padding": "same", "stride": 1}, "conv.padding is same in the network and 1 in the file"),
    ({"padding_mode": "reflect"}, "conv.padding_mode is reflect in the network and zeros in the file"),
    ({"dilation": 2}, "conv.dilation is 2 in the network and 1 in the file"),
    ({"act": nn.GELU}, "act is GELU in the network and ReLU in the file"),
    ({"act": lambda: nn.GELU("tanh")}, "act is GELU approximate=tanh in the network and ReLU in the file"),
    ({"act": nn.Identity}, "the file's network has ReLU"),
    ({"heads": 4}, "attention.num_heads is 4 in the network and 2 in the file"),
    ({"groups": 4}, "norm.num_groups is 4 in the network and 1 in the file"),
]


@pytest.mark.parametrize(("changed", "named"), CHANGES, ids=lambda c: c if isinstance(c, str) else "-".join(c))
def test_a_change_that_no_shape_shows_is_named(file, changed, named):
    told = refusal(file, made(**changed))
    assert named in told
    assert "--ignore-structure" in told
    fw.load(file, into=made(**changed), ignore_structure=True)


def test_an_eps_of_a_folded_norm_is_named_once_and_never_ignored(file):
    for ignored in (False, True):
        with pytest.raises(UsageError) as told:
            fw.load(file, into=made(eps=1e-3), ignore_structure=ignored)
        assert str(told.value).count("bn.eps is 0.001 in the network and 1e-05 in the file") == 1
        assert "--ignore-structure" not in str(told.value)


def test_an_eps_of_another_norm_is_named(file):
    net = made()
    net.norm.eps = 1e-3
    assert "norm.eps is 0.001 in the network and 1e-05 in the file" in refusal(file, net)


def test_a_refused_network_is_as_it_was(file):
    net = made(stride=1).train()
    before = copy.deepcopy(net.state_dict())
    refusal(file, net)
    assert net.training
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


class Renamed(Net):
    """Defined elsewhere, with attributes and a base class of its own."""

    def __init__(self):
        super().__init__()
        self.stride, self.note = 7, "mine"


class MyConv(nn.Conv2d):
    """Counts as what it derives from."""

    stretch = 3


def test_what_computes_the_same_passes(file):
    other = made()
    other.conv.__class__ = MyConv
    in_place = made(act=lambda: nn.ReLU(inplace=True))
    in_place.bn.momentum, in_place.drop.p = 0.5, 0.9
    in_place.drop = nn.Identity()
    doubles = made().double()
    for net in (made(), Renamed(), other, in_place, doubles, made(stride=(2, 2), padding=(1, 1))):
        fw.load(file, into=net)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(made())
    assert isinstance(synced.bn, nn.SyncBatchNorm)
    fw.load(file, into=synced)


def test_many_differences_are_counted(file):
    told = refusal(file, made(stride=1, padding=0, act=nn.GELU, heads=4, groups=4))
    assert told.count(";") == 3
    assert "; and 2 more" in told


def test_functions_are_known_by_name():
    kinds = [
        structure_of(nn.TransformerEncoderLayer(8, 2, 16, activation=f))["kinds"] for f in (F.relu, F.gelu, "gelu")
    ]
    assert kinds[0] != kinds[1] == kinds[2]


def test_recurrent_layers():
    told = structural_differences(
        nn.RNN(3, 4, nonlinearity="relu", batch_first=True), {"structure": structure_of(nn.RNN(3, 4))}
    )
    assert told == [
        "batch_first is True in the network and False in the file",
        "mode is RNN_RELU in the network and RNN_TANH in the file",
    ]


def test_a_file_without_it_loads_anything_that_fits(file):
    artifact = fw.compress(made(), method=Rtn(GridSpec(4))).artifact
    old = Artifact(artifact.units, artifact.rest, artifact.norms, {})
    fill(made(stride=1, act=nn.GELU), old)


@pytest.mark.parametrize(
    "said",
    [
        *(None, 1, [], {}, {"kinds": []}, {"kinds": [["A", {}]], "modules": [1]}),
        *({"kinds": [["A", {}]], "modules": [-1]}, {"kinds": [["A", {}]], "modules": [True]}),
        *(
            {"kinds": [["A"]], "modules": []},
            {"kinds": [[1, {}]], "modules": [0]},
            {"kinds": [["A", 1]], "modules": []},
        ),
        *({"kinds": "ab", "modules": 3}, {"kinds": 3, "modules": "x"}),
    ],
)
def test_a_structure_that_is_none_is_refused(said):
    artifact = fw.compress(made(), method=Rtn(GridSpec(4))).artifact
    with pytest.raises(FormatError, match="'structure'"):
        fill(made(), Artifact(artifact.units, artifact.rest, artifact.norms, {"structure": said}))


def test_it_takes_few_bytes_and_depends_on_the_network_alone():
    net = nn.Sequential(*(m for _ in range(20) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))))
    said = structure_of(net)
    assert said == structure_of(copy.deepcopy(net)) == json.loads(json.dumps(said))
    assert len(zlib.compress(json.dumps(said, separators=(",", ":")).encode(), 9)) < 100


@pytest.fixture
def other(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom tests.artifact.test_structure import made\n"
        "def make(): return made(stride=1)\n"
        "def test(): return torch.randn(4, 4, 8, 8), torch.zeros(4, dtype=torch.long)\n"
    )
    return f"{tmp_path}/net.py:make", f"{tmp_path}/net.py:test"


def test_the_command_names_it_and_goes_round_it(file, other, run):
    words = "evaluate", file, "--model", other[0], "--data", other[1]
    code, _, err = run(*words)
    assert code == 2
    assert "conv.stride is 1 in the network and 2 in the file" in " ".join(err.split())
    assert run(*words, "--ignore-structure")[0] == 0


def test_bench_goes_round_it(file, other, run, monkeypatch):
    def race(artifact, model, *_given):
        fill(model, artifact)
        return Race((), {}, ())

    monkeypatch.setattr("featherweight.race.race", race)
    words = "bench", file, "--model", other[0], "--data", other[1], "--batch", 1, "--json"
    assert run(*words)[0] == 2
    assert run(*words, "--ignore-structure")[0] == 0


def test_report_goes_round_it(file, other, run, monkeypatch, tmp_path):
    def prove(*_given, ignore_structure):
        assert ignore_structure
        return {"metrics": {"top1": 0.0}}

    monkeypatch.setattr(sys.modules["featherweight.page.measure"], "prove", prove)  # page.measure is the function
    words = "report", file, "-o", tmp_path / "page.html", "--model", other[0], "--test", other[1]
    assert run(*words)[0] == 2
    assert run(*words, "--ignore-structure")[0] == 0
    assert run("report", file, "-o", tmp_path / "page.html", "--ignore-structure")[0] == 2


def test_the_fresh_process_is_told(file, monkeypatch):
    asked = []

    def start(command, **_more):
        asked.extend(command)
        return CompletedProcess(command, 0, json.dumps({"digest": "d", "metrics": {}}), "")

    monkeypatch.setattr("featherweight.proof.subprocess.run", start)
    prove(file, "d", "net.py:make", None, "net.py:test", None, 8, ignore_structure=True)
    assert "--ignore-structure" in asked
