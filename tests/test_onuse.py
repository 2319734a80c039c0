"""Networks whose weights stay packed."""

import copy

import pytest
import torch
from torch import nn

import featherweight as fw
from featherweight.demo import digits
from featherweight.methods import Additive, Gptq, GridSpec, Obs, PruneQuantize, Rtn, Unstructured, Vectors
from tests.nets import images, sentences, tiny, words

METHODS = [
    Gptq(GridSpec(3)),
    Additive(Vectors(2, (4,))),
    PruneQuantize(Obs(Unstructured(0.5)), Gptq(GridSpec(4))),
    PruneQuantize(Obs(Unstructured(0.5)), Additive(Vectors(2, (3,)))),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.label)
def test_outputs_are_those_of_the_decoded_network(method, tmp_path):
    fw.compress(tiny(), images(), method=method).save(tmp_path / "small.fw")
    x = images().tensors[0]
    decoded, packed = fw.load(tmp_path / "small.fw", into=tiny()), fw.load_packed(tmp_path / "small.fw", into=tiny())
    with torch.no_grad():
        assert torch.equal(decoded(x), packed(x))
        assert torch.equal(decoded.double()(x.double()), packed.double()(x.double()))
    assert packed.conv1.weight.dtype == torch.float64
    assert not {n for n, _ in packed.named_parameters()} & {"conv1.weight", "conv2.weight", "fc.weight"}


def test_tied_and_recurrent_weights(tmp_path):
    fw.compress(words(), sentences(), method=Gptq(GridSpec(4))).save(tmp_path / "small.fw")
    decoded, packed = fw.load(tmp_path / "small.fw", into=words()), fw.load_packed(tmp_path / "small.fw", into=words())
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(decoded(sentences()), packed(sentences()))
    assert packed.lstm._flat_weights == []
    assert packed.out.packed_weight is packed.embed.packed_weight
    assert type(packed.lstm).__name__ == "LSTM"
    assert isinstance(packed.lstm, nn.LSTM)


def test_attention_and_transformers(tmp_path):
    torch.manual_seed(0)
    make = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(4, 5, 16)
    fw.compress(make, x, method=Rtn(GridSpec(6))).save(tmp_path / "small.fw")
    pair = [load(tmp_path / "small.fw", into=copy.deepcopy(make)) for load in (fw.load, fw.load_packed)]
    with torch.no_grad():
        assert torch.allclose(pair[0](x), pair[1](x), atol=1e-6)


def test_two_networks_of_a_class_do_not_touch_each_other(tmp_path):
    fw.compress(digits.make(), digits.calibration(), method=Rtn(GridSpec(4))).save(tmp_path / "small.fw")
    packed, other = fw.load_packed(tmp_path / "small.fw", into=digits.make()), digits.make()
    assert isinstance(other.head.weight, nn.Parameter)
    assert isinstance(nn.Conv2d(1, 1, 1).weight, nn.Parameter)
    assert not isinstance(packed.head.weight, nn.Parameter)


def test_what_is_held_is_what_is_stored(tmp_path):
    made = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)).eval()
    fw.compress(made, torch.randn(64, 512), method=Rtn(GridSpec(2))).save(tmp_path / "small.fw")
    packed = fw.load_packed(tmp_path / "small.fw", into=copy.deepcopy(made))
    payload = [t for module in (packed[0], packed[2]) for t in module.packed_weight.payload.values()]
    held = sum(t.numel() * t.element_size() for t in payload)
    left = sum(p.numel() * 4 for p in packed.parameters())
    assert held + left < 1.05 * (tmp_path / "small.fw").stat().st_size


def test_a_module_under_two_names(tmp_path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.a = self.b = nn.Linear(8, 8)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    x = torch.randn(32, 8)
    fw.compress(Twice().eval(), x, method=Gptq(GridSpec(4))).save(tmp_path / "small.fw")
    decoded, packed = (load(tmp_path / "small.fw", into=Twice()) for load in (fw.load, fw.load_packed))
    with torch.no_grad():
        assert torch.equal(decoded(x), packed(x))
