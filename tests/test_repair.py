import copy

import pytest
import torch
from torch import nn

from featherweight.data import Batch, batches, split, stacked
from featherweight.layers import scan
from featherweight.repair import repair
from featherweight.repair.distance import output_distance
from tests.nets import images, sentences, tiny, words


def shaken(model: nn.Module, amount: float) -> nn.Module:
    """A copy whose weights are off by a systematic error, as low-bit rounding makes."""
    torch.manual_seed(5)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for unit in scan(model).units:
            w = other.get_parameter(unit.name)
            w.mul_(1 - amount).add_(amount * w.abs().mean() * torch.randn(w.shape[0], *[1] * (w.ndim - 1)))
    return other


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_batchnorm_statistics_move_back_in_order():
    dense, data = tiny(), batches(images(), 32)
    small = shaken(dense, 0.3)
    result = repair(dense, small, data, scan(dense).units)
    assert result.kind == "batchnorm"
    assert result.applied
    assert result.sites == 2
    assert result.after < 0.9 * result.before
    correcting, judging = split(data)
    assert result.after == pytest.approx(output_distance(dense, small, judging))
    x = torch.cat([b.args[0] for b in correcting])
    with torch.no_grad():  # oracle: the formula, site after site
        a, b = dense.conv1(x), small.conv1(x)
        mean = dense.bn1.running_mean + b.mean((0, 2, 3)) - a.mean((0, 2, 3))
        ratio = (b.var((0, 2, 3), correction=0) / a.var((0, 2, 3), correction=0)).clamp(0.25, 4)
        torch.testing.assert_close(small.bn1.running_mean, mean)
        torch.testing.assert_close(small.bn1.running_var, dense.bn1.running_var * ratio)
        a = dense.conv2(torch.relu(dense.bn1(a)))
        b = small.conv2(torch.relu(small.bn1(b)))  # sees the corrected bn1
        mean = dense.bn2.running_mean + b.mean((0, 2, 3)) - a.mean((0, 2, 3))
        torch.testing.assert_close(small.bn2.running_mean, mean)


def test_an_unchanged_network_stays_as_it_is():
    dense = tiny()
    same = copy.deepcopy(dense)
    result = repair(dense, same, batches(images(), 32), scan(dense).units)
    for a, b in zip(dense.state_dict().values(), same.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
    assert result.after == pytest.approx(0, abs=1e-10)


def test_a_correction_that_does_not_help_is_taken_back():
    dense, data = tiny(), batches(images(), 24)
    small = shaken(dense, 0.3)
    correcting, judging = split(data)
    far = [Batch((b.args[0] * 30 - 40,), {}, b.target) for b in correcting]  # other images than those judged on
    before = copy.deepcopy(small)
    result = repair(dense, small, [*far, *judging], scan(dense).units)
    assert not result.applied
    assert result.after > result.before
    assert equal(small, before)


@pytest.mark.parametrize("make", ["words", "mlp", "groupnorm", "attention"])
def test_means_without_batchnorm(make):
    torch.manual_seed(6)
    nets = {
        "words": lambda: (words(), batches(sentences(), 16)),
        "mlp": lambda: (nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)), batches(torch.rand(64, 6), 16)),
        "groupnorm": lambda: (
            nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 3)),
            batches(images().tensors[0], 32),
        ),
        "attention": lambda: (
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            batches(torch.rand(64, 5, 8), 16),
        ),
    }
    dense, data = nets[make]()
    dense = dense.eval().requires_grad_(False)
    small = shaken(dense, 0.2)
    result = repair(dense, small, data, scan(dense).units)
    assert result.kind == "mean"
    assert result.applied
    assert result.after < (0.99 if make == "words" else 0.9) * result.before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())


def test_output_means_are_the_dense_ones_after_a_mean_correction():
    torch.manual_seed(7)
    dense = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).eval().requires_grad_(False)
    data = batches(torch.rand(64, 6), 16)
    small = shaken(dense, 0.2)
    repair(dense, small, data, scan(dense).units)
    x = torch.cat([b.args[0] for b in split(data)[0]])
    torch.testing.assert_close(small[0](x).mean(0), dense[0](x).mean(0))
    torch.testing.assert_close(small(x).mean(0), dense(x).mean(0))


def test_a_module_used_twice_is_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(4)
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.bn(self.fc(self.bn(x)))

    dense = Twice().eval()
    small = shaken(dense, 0.3)
    result = repair(dense, small, batches(torch.rand(32, 4), 8), scan(dense).units)
    assert result.sites == 0
    assert not result.applied


def test_one_sample_cannot_be_split():
    dense = tiny()
    result = repair(dense, shaken(dense, 0.3), batches(images(1)), scan(dense).units)
    assert result.kind == "none"
    assert "cannot be cut" in result.note


@pytest.mark.parametrize(("count", "size"), [(2, 2), (10, 10), (64, 16), (65, 64), (30, 3)])
def test_split_keeps_every_sample_once(count, size):
    x = torch.arange(count).float()[:, None]
    a, b = split(batches(x, size))
    assert torch.equal(torch.cat([p.args[0] for p in [*a, *b]]), x)
    assert a
    assert b


def test_unequal_shapes_use_the_commonest_and_say_so():
    data = [
        Batch((torch.rand(4, 3, 8, 8),), {}),
        Batch((torch.rand(4, 3, 8, 8),), {}),
        Batch((torch.rand(4, 3, 9, 9),), {}),
    ]
    batch, note = stacked(data, tiny())
    assert batch.args[0].shape == (8, 3, 8, 8)
    assert note == "used 8 of 12 samples"


def test_distance_is_divergence_with_labels_and_relative_error_without():
    dense, small = tiny(), shaken(tiny(), 0.2)
    data = images()
    with torch.no_grad():
        p, q = (m(data.tensors[0]).softmax(1) for m in (dense, small))
        divergence = (p * (p / q).log()).sum(1).mean()
        a, b = dense(data.tensors[0]), small(data.tensors[0])
    assert output_distance(dense, small, batches(data, 20)) == pytest.approx(float(divergence), rel=1e-4)
    relative = (a - b).square().sum() / a.square().sum()
    assert output_distance(dense, small, batches(data.tensors[0], 20)) == pytest.approx(float(relative), rel=1e-4)


def test_outputs_that_cannot_be_compared_are_left_alone():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 1)

        def forward(self, images):
            return [{"boxes": image[self.fc(image)[:, 0] > 0]} for image in images]

    torch.manual_seed(8)
    dense = Detector().eval()
    data = [([torch.randn(9, 4) for _ in range(4)], None) for _ in range(8)]
    result = repair(dense, shaken(dense, 0.9), batches(data), scan(dense).units)
    assert result.kind == "none"
    assert "vary in shape" in result.note
