import copy
import json

import pytest
import torch
from torch import nn

import featherweight as fw
from featherweight import synthesis
from featherweight.demo import digits
from featherweight.errors import UsageError
from featherweight.synthesis import mismatch, noise, shape_of, synthesize
from tests.nets import images, sentences, tiny, words

DIGITS = "featherweight.demo.digits:make"
DIGITS_TEST = "featherweight.demo.digits:test"
NETS = "tests/nets.py"


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Few inputs and steps are enough for tests of the whole line."""
    monkeypatch.setattr(synthesis, "COUNT", 48)
    monkeypatch.setattr(synthesis, "LEAST", 48)
    monkeypatch.setattr(synthesis, "STEPS", 12)


def mean(found: dict[str, float]) -> float:
    return sum(found.values()) / len(found)


def slow_mismatch(net: nn.Module, x: torch.Tensor) -> dict[str, float]:
    """The definition: let every norm in training mode say what it sees of all the inputs at once."""
    other = copy.deepcopy(net).double().eval()
    seen: dict[str, torch.Tensor] = {}
    for name, module in other.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, args[0]))
    with torch.no_grad():
        other(x.double())
    found = {}
    for name, inputs in seen.items():
        norm = other.get_submodule(name)
        lost = []
        for c in range(inputs.shape[1]):
            own = inputs[:, c].reshape(-1)
            deviation = float((norm.running_var[c] + norm.eps).sqrt())
            here = float((own.var(unbiased=False) + norm.eps).sqrt())
            lost += [abs(float(own.mean() - norm.running_mean[c])) / deviation, abs(here / deviation - 1)]
        found[name] = sum(lost) / len(lost)
    return found


def test_mismatch_is_what_it_says_to_be():
    net, x = tiny(), images(50).tensors[0]
    assert mismatch(net, [x[:20], x[20:]]) == pytest.approx(slow_mismatch(net, x), rel=1e-4)


def test_statistics_come_closer_to_those_the_network_keeps():
    net = tiny()
    made = synthesize(net, (3, 8, 8), count=64, steps=40)
    assert made.inputs.shape == (64, 3, 8, 8)
    assert set(made.mismatch) == {"bn1", "bn2"}
    assert made.mismatch == mismatch(net, [made.inputs])
    assert mean(made.mismatch) < 0.2 * mean(made.noise)
    plain = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert mean(made.mismatch) < 0.2 * mean(mismatch(net, [plain]))


def test_the_same_seed_gives_the_same_inputs_and_the_network_stays_as_it_is():
    net = tiny().train()
    before = copy.deepcopy(net.state_dict())
    first = synthesize(net, (3, 8, 8), count=8, steps=3)
    assert torch.equal(first.inputs, synthesize(net, (3, 8, 8), count=8, steps=3).inputs)
    assert not torch.equal(first.inputs, synthesize(net, (3, 8, 8), count=8, steps=3, seed=1).inputs)
    assert net.training
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert not any(m._forward_pre_hooks for m in net.modules())
    with torch.no_grad():
        assert torch.equal(first.inputs, synthesize(net, (3, 8, 8), count=8, steps=3).inputs)


def test_the_noise_is_smooth_and_of_unit_variance():
    x = noise(200, (3, 16, 16), torch.Generator().manual_seed(0))
    assert float(x.std()) == pytest.approx(1, rel=1e-5)
    near, far = (float((x[..., d:] * x[..., : 16 - d]).mean()) for d in (1, 8))
    assert near > 0.5 > far
    assert float((x[:, 0] * x[:, 1]).mean()) > 0.5
    assert noise(7, (12,), torch.Generator().manual_seed(0)).shape == (7, 12)


def net_of(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).eval()


def conv(channels: int = 3, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, 4, 3, stride, 1), nn.BatchNorm2d(4), nn.ReLU()]


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (net_of(*conv(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)), (3, 32, 32)),
        (net_of(*conv(1), nn.Flatten(), nn.Linear(4 * 28 * 28, 2)), (1, 28, 28)),
        (net_of(*conv(3, 4), *conv(4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)), (3, 64, 64)),
        (net_of(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)), (7,)),
        (net_of(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4)), (2, 128)),
    ],
    ids=["convolutions", "fixed size", "not too small inside", "linear", "one dimension"],
)
def test_the_shape_of_an_input_is_found_by_trying(net, shape):
    assert synthesize(net, count=4, steps=1).inputs.shape[1:] == shape


def test_what_no_inputs_can_be_made_for():
    for net, said in (
        (words(), "no BatchNorm"),
        (net_of(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), "no BatchNorm"),
        (net_of(nn.Embedding(9, 4), nn.Flatten(), nn.BatchNorm1d(8)), "shape of an input is unknown"),
        (net_of(*conv(), nn.Flatten(), nn.Linear(4 * 9 * 9, 2)), "tried 3x32x32"),
    ):
        with pytest.raises(UsageError, match=said):
            synthesize(net)
    with pytest.raises(UsageError, match="does not run on inputs of shape 1,8,8"):
        synthesize(tiny(), (1, 8, 8))
    broken = tiny()
    broken.bn2.running_var[0] = float("nan")
    with pytest.raises(UsageError, match="NaN"):
        synthesize(broken)
    for wrong in ({"count": 1}, {"count": 2.5}, {"steps": 0}):
        with pytest.raises(UsageError, match="whole number above"):
            synthesize(tiny(), **wrong)


@pytest.mark.parametrize("given", ["", "3,a", "3,,32", "0,8", (3, 0), (3.5, 2), 7, ()])
def test_a_shape_that_is_none(given):
    with pytest.raises(UsageError, match="an input shape is"):
        shape_of(given)


def test_compress_without_data():
    shape = 1, 8, 8
    net = digits.make()
    report = fw.compress(net, input_shape=shape, target=fw.Goal("6x", among="quantize", measurements=2)).report
    assert report.ratio >= 6
    found = report.assumed
    assert (found.kind, found.given, found.samples) == ("synthetic", True, 48)
    assert found.shape == shape
    assert found.mismatch < 0.5 * found.noise
    assert {r.method.split()[0] for r in report.rows} <= {"obq", "ecq"}
    assert report.allocation.measured is not None
    assert "real data would be better" in report.to_dict()["notes"][0]


def test_inputs_of_no_data_serve_all_that_looks_at_inputs():
    every = fw.Recipe(fw.Obq(fw.GridSpec(8, symmetric=True)), activations=8, sequential=True)
    small = fw.compress(tiny(), input_shape=(3, 8, 8), recipe=every)
    assert small.report.in_order == 3
    assert small.report.repair.kind == "batchnorm"
    assert {r.input_bits for r in small.report.rows} == {8}
    again = fw.compress(tiny(), input_shape=(3, 8, 8), recipe=every)
    assert again.artifact.digest() == small.artifact.digest()


def test_the_weights_alone_decide_where_no_inputs_can_be_made():
    for how in ({"method": fw.Gptq(fw.GridSpec(4))}, {"target": "50%"}):
        report = fw.compress(words(), **how).report
        assert report.assumed.kind == "weights"
        assert "no BatchNorm" in report.assumed.text
        assert "uncorrelated" in report.to_dict()["notes"][0]
        assert not any(r.note for r in report.rows), "once is enough"
    with pytest.raises(UsageError, match="no BatchNorm"):
        fw.compress(words(), recipe=fw.Recipe(fw.Rtn(fw.GridSpec(8)), activations=8))


def test_a_network_whose_statistics_are_nan_is_compressed_by_its_weights():
    broken = tiny()
    broken.bn2.running_var[0] = float("nan")
    report = fw.compress(broken, method=fw.Gptq(fw.GridSpec(4))).report
    assert report.assumed.kind == "weights"
    assert "NaN" in report.assumed.note


def test_methods_that_need_no_data_run_as_before(monkeypatch):
    monkeypatch.setattr(synthesis, "_site", lambda *_: pytest.fail("inputs were looked for"))
    assert fw.compress(tiny(), method=fw.Rtn(fw.GridSpec(8))).report.assumed is None
    assert fw.compress(tiny(), images(), method=fw.Gptq(fw.GridSpec(8))).report.assumed is None


def test_a_shape_beside_data_or_one_that_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="for runs without data"):
        fw.compress(words(), sentences(), input_shape=(9,))
    for function in (fw.compress, fw.plan):
        with pytest.raises(UsageError, match="does not run on inputs of shape 4,8,8"):
            function(tiny(), input_shape=(4, 8, 8))


def test_plan_says_what_would_be_assumed():
    found = fw.plan(tiny()).assumed
    assert (found.kind, found.shape, found.mismatch) == ("synthetic", (3, 32, 32), None)
    planned = fw.plan(tiny(), input_shape=(3, 8, 8), target=fw.Goal("60%", among="quantize", measurements=1))
    assert planned.assumed.mismatch < planned.assumed.noise


@pytest.mark.slow
def test_the_command_line_without_data(run, tmp_path):
    file = tmp_path / "small.fw"
    shape = "--input-shape", "1,8,8"
    code, out, _ = run("compress", DIGITS, "-o", file, "--bits", "4", *shape, "--test", DIGITS_TEST, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["assumed"]["shape"] == [1, 8, 8]
    assert found["after"]["top1"] > 97
    assert "as given" in found["notes"][0]
    code, out, _ = run("plan", f"{NETS}:words", "--target", "50%")
    assert code == 0
    assert "no BatchNorm" in out
    for wrong, said in (("3,x", "an input shape is"), ("3,8,8", "does not run on inputs")):
        code, _, err = run("compress", DIGITS, "-o", file, "--input-shape", wrong)
        assert code == 2
        assert said in " ".join(err.split())
