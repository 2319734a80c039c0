import copy

import pytest
import torch
from torch import nn

import featherweight as fw
from featherweight.artifact import read
from featherweight.demo import digits
from featherweight.errors import InfeasibleError, UsageError
from featherweight.methods import Gptq, GridSpec, Magnitude, Obq, Obs, PruneQuantize, Rtn, Unstructured
from featherweight.recipe import Override, Recipe
from tests.nets import images, sentences, tiny, words

METHODS = [
    Rtn(GridSpec(4)),
    Gptq(GridSpec(3)),
    Obq(GridSpec(2)),
    Magnitude(Unstructured(0.5)),
    Obs(Unstructured(0.5)),
    PruneQuantize(Obs(Unstructured(0.5)), Obq(GridSpec(4))),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.label)
def test_what_is_read_back_is_what_was_in_memory(method, tmp_path):
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    small = fw.compress(model, images(), method=method)
    path = tmp_path / "small.fw"
    assert small.save(path) == path.stat().st_size == small.report.file_bytes
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), "the model was changed"
    stored = read(path)
    assert stored.digest() == small.artifact.digest()
    loaded = fw.load(path, into=tiny())
    for unit in small.artifact.units:
        assert torch.equal(loaded.get_parameter(unit.names[0]), unit.tensor())
    assert {r.name for r in small.report.rows} == {"conv1.weight", "conv2.weight", "fc.weight"}
    assert sum(r.bytes for r in small.report.rows) == sum(u.weight.bits() for u in small.artifact.units) // 8


def test_the_same_call_gives_the_same_bytes(tmp_path):
    sizes = [fw.compress(tiny(), images(), method=Obq(GridSpec(3))).save(tmp_path / name) for name in ("a", "b")]
    assert sizes[0] == sizes[1]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_eight_bits_change_next_to_nothing():
    model, data = tiny(), images()
    small = fw.compress(model, data, method=Gptq(GridSpec(8)), evaluate=lambda m: float(m(data.tensors[0]).mean()))
    assert small.report.after["metric"] == pytest.approx(small.report.before["metric"], rel=0.01)


def test_batchnorm_is_folded_to_two_vectors_and_still_the_same_function(tmp_path):
    model, data = tiny(), images()
    small = fw.compress(model, data, recipe=Recipe(Gptq(GridSpec(8)), include=("fc.*",), repair=False))
    small.save(tmp_path / "small.fw")
    assert {n.name for n in small.artifact.norms} == {"bn1", "bn2"}
    assert not any("bn" in name for name in small.artifact.rest)
    loaded = fw.load(tmp_path / "small.fw", into=tiny())
    with torch.no_grad():
        torch.testing.assert_close(loaded(data.tensors[0]), model(data.tensors[0]), rtol=0.01, atol=0.02)


def test_excluded_weights_are_reported_and_kept_in_half_precision():
    small = fw.compress(tiny(), images(), recipe=Recipe(Gptq(GridSpec(4)), exclude=("fc.*",)))
    assert [x.reason for x in small.report.left_alone if x.name == "fc.weight"] == ["excluded by the recipe"]
    assert small.artifact.rest["fc.weight"].dtype == torch.float16


def test_overrides_decide_weight_by_weight():
    recipe = Recipe(
        Gptq(GridSpec(4)), (Override("fc.*", Obs(Unstructured(0.5))), Override("conv1.*", Rtn(GridSpec(8))))
    )
    rows = fw.compress(tiny(), images(), recipe=recipe).report.rows
    assert {r.name: r.method for r in rows} == {
        "conv1.weight": "rtn 8 bit",
        "conv2.weight": "gptq 4 bit",
        "fc.weight": "obs 50%",
    }


def test_tied_and_recurrent_weights(tmp_path):
    model = words()
    small = fw.compress(model, sentences(), method=Obq(GridSpec(8)))
    assert small.artifact.units[0].names == ("embed.weight", "out.weight")
    assert {u.names[0] for u in small.artifact.units} >= {"lstm.weight_ih_l0", "lstm.weight_hh_l0"}
    small.save(tmp_path / "w.fw")
    loaded = fw.load(tmp_path / "w.fw", into=words())
    assert loaded.out.weight is loaded.embed.weight
    with torch.no_grad():
        want, got = model(sentences()), loaded(sentences())
        assert (got - want).norm() < 0.05 * want.norm()


def test_data_free_methods_need_no_data():
    small = fw.compress(tiny(), method=Rtn(GridSpec(8)))
    assert small.report.repair.kind == "none"
    assert not any(r.note for r in small.report.rows)


def test_a_target_is_met_and_predicted(tmp_path):
    target = "9%"
    goal = fw.Goal(target, measurements=1)
    predicted = fw.plan(digits.make(), digits.calibration(), target=goal, database=tmp_path / "solved")
    small = fw.compress(digits.make(), digits.calibration(), target=goal, database=tmp_path / "solved")
    assert small.report.file_bytes <= fw.target_bytes(target, small.report.baselines.fp32)
    assert predicted.file_bytes == pytest.approx(small.report.file_bytes, rel=0.03)
    assert small.report.file_bytes <= predicted.file_bytes


def test_a_target_below_the_floor_names_the_floor():
    with pytest.raises(InfeasibleError, match=r"smallest reachable file has [\d,]+ bytes"):
        fw.plan(tiny(), images(), target="100x")


def test_plan_knows_the_payload_exactly():
    for method in METHODS:
        recipe = Recipe(method)
        planned = {r.name: r.bytes for r in fw.plan(tiny(), images(), recipe=recipe).rows}
        assert planned == {r.name: r.bytes for r in fw.compress(tiny(), images(), recipe=recipe).report.rows}


def test_a_weight_that_no_sample_reaches_is_solved_and_said():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.used(x)

    report = fw.compress(Spare(), torch.rand(40, 6), method=Gptq(GridSpec(4))).report
    notes = {r.name: r.note for r in report.rows}
    assert notes["used.weight"] == ""
    assert "no calibration sample" in notes["spare.weight"]


def test_nan_activations_and_weights_are_reported():
    model = tiny()
    with torch.no_grad():
        model.fc.weight[0, 0] = float("nan")
    small = fw.compress(model, images(), method=Gptq(GridSpec(4)))
    assert any(x.name == "fc.weight" and "NaN" in x.reason for x in small.report.left_alone)
    assert small.artifact.rest["fc.weight"].dtype == torch.float32
    data = images().tensors[0].clone()
    data[0] = float("nan")
    report = fw.compress(tiny(), data, method=Gptq(GridSpec(4))).report
    assert all("NaN" in r.note for r in report.rows)
    assert not report.repair.applied


def test_wrong_requests_fail_before_the_work():
    with pytest.raises(UsageError, match="no sample"):
        fw.compress(tiny(), [])
    with pytest.raises(UsageError, match="does not accept the data"):
        fw.compress(tiny(), torch.rand(8, 5))
    with pytest.raises(UsageError, match="matches none"):
        fw.compress(tiny(), images(), recipe=Recipe(Obq(GridSpec(4)), exclude=("nothing*",)))
    with pytest.raises(UsageError, match="no method beside"):
        fw.compress(tiny(), images(), method=Obq(GridSpec(4)), target="2x")
    with pytest.raises(UsageError, match="no weight"):
        fw.compress(nn.ReLU(), images())
    with pytest.raises(UsageError, match="the metric failed"):
        fw.compress(tiny(), images(), evaluate=lambda m: 1 / 0)


def test_half_precision_networks():
    model = tiny().to(torch.bfloat16)
    data = images().tensors[0].to(torch.bfloat16)
    small = fw.compress(model, data, method=Obq(GridSpec(8)))
    assert small.report.baselines.fp32 == 2 * small.report.baselines.half
    assert all(r.error < 1e-3 for r in small.report.rows)


def test_the_public_names_are_few_and_real():
    assert sorted(fw.__all__) == list(fw.__all__)
    assert len(fw.__all__) <= 55
    assert all(hasattr(fw, name) for name in fw.__all__)


def test_a_metric_that_leaves_the_network_in_training_mode_changes_nothing():
    plain = fw.compress(tiny(), images(), method=Gptq(GridSpec(4)))
    careless = fw.compress(tiny(), images(), method=Gptq(GridSpec(4)), evaluate=lambda m: float(m.train().training))
    assert careless.artifact.digest() == plain.artifact.digest()


def test_a_buffer_that_counts_calls_is_stored_as_it_was(tmp_path):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 4)
            self.register_buffer("calls", torch.tensor(5))

        def forward(self, x):
            self.calls += 1
            return self.fc(x)

    small = fw.compress(Counting(), torch.rand(40, 6), method=Gptq(GridSpec(4)))
    assert int(small.artifact.rest["calls"]) == 5


def test_a_weight_shared_by_layers_that_use_it_differently_is_left_alone():
    class Auto(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 3)
            self.up.weight = self.down.weight
            self.head = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.head(self.up(self.down(x)))

    report = fw.compress(Auto(), images().tensors[0], method=Gptq(GridSpec(4))).report
    assert [r.name for r in report.rows] == ["head.weight"]
    assert any("different ways" in x.reason for x in report.left_alone)


def test_batchnorm_without_bias_and_outputs_without_numbers():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.bn = nn.Linear(6, 4), nn.BatchNorm1d(4)
            self.bn.bias = None

        def forward(self, x):
            return self.bn(self.fc(x)).argmax(1)

    small = fw.compress(Odd(), torch.rand(40, 6), method=Gptq(GridSpec(4)))
    assert small.artifact.norms == ()
    assert not small.report.repair.applied
    assert "nothing to judge by" in small.report.repair.note


def test_networks_that_cannot_be_stored_are_refused_before_the_work(monkeypatch):
    model = tiny()
    model.register_buffer("phase", torch.ones(2, dtype=torch.complex64))
    monkeypatch.setattr("featherweight.moments.capture", lambda *a, **k: pytest.fail("the work had begun"))
    with pytest.raises(UsageError, match="complex64"):
        fw.compress(model, images(), method=Gptq(GridSpec(4)))


@pytest.mark.slow
def test_a_target_holds_even_where_the_prediction_was_low():
    class Unreached(nn.Module):  # every weight that no sample reaches has a note in the file
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(32, 32)
            self.spare = nn.ModuleList(nn.Linear(32, 32) for _ in range(8))

        def forward(self, x):
            return self.used(x)

    torch.manual_seed(0)
    model = Unreached()
    limit = fw.plan(model, torch.rand(64, 32), target="4x").file_bytes
    small = fw.compress(model, torch.rand(64, 32), target=limit)
    assert small.report.file_bytes <= limit
