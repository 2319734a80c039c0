import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featherweight.data import Batch, batches
from featherweight.errors import UsageError
from featherweight.layers import scan
from featherweight.repair.distance import output_distance, probe
from featherweight.sensitivity import sensitivity
from tests.nets import images, tiny
from tests.reference.sensitivity import empirical_fisher, gauss_newton


def each(out, target):
    return F.cross_entropy(out, target, reduction="none")


def changes(net: nn.Module, size: float = 0.01) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {u.name: size * torch.randn(u.view.matrix_shape) for u in scan(net).units}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(self.lstm(x)[0][:, -1])


def recurrent() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    return Recurrent().eval(), (torch.randn(12, 7, 5), torch.arange(12) % 4)


@pytest.mark.parametrize("make", [lambda: (tiny(), images(24)), recurrent])
def test_one_sample_a_pass_is_the_empirical_fisher(make):
    net, data = make()
    net, data = net.double(), [doubled(b) for b in batches(data, 8)]
    units = scan(net).units
    found = sensitivity(net, data, units, loss=each, passes=sum(b.size for b in data))
    moved = changes(net)
    for unit in units:
        d = moved[unit.name].double()
        want = empirical_fisher(net, data, unit, d)
        assert found.rise(unit.name, d) == pytest.approx(want, rel=1e-10)
        assert found.gradients[unit.name].shape == (sum(b.size for b in data), unit.params)


def doubled(batch: Batch) -> Batch:
    args = tuple(a.double() if a.is_floating_point() else a for a in batch.args)
    return Batch(args, batch.kwargs, batch.target)


def test_all_sign_patterns_together_are_the_hessian_of_the_distance():
    torch.manual_seed(0)
    z = torch.randn(2, 4, dtype=torch.float64)
    signs = [torch.tensor(s, dtype=torch.float64).reshape(2, 4) for s in itertools.product((-1, 1), repeat=8)]
    for target in (torch.tensor([1, 3]), None):
        v = torch.stack([probe([z], target, [s])[0].reshape(-1) for s in signs])
        mean = v.T @ v / len(v)

        def lost(x, target=target):
            if target is None:
                return (x - z).square().sum()
            return F.kl_div(x.log_softmax(1), z.log_softmax(1), reduction="sum", log_target=True)

        want = torch.autograd.functional.hessian(lost, z.clone()).reshape(8, 8)
        torch.testing.assert_close(mean, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("labelled", [True, False])
def test_many_passes_agree_with_the_explicit_matrix_and_with_finite_differences(labelled):
    net = tiny()
    data = batches(images(16) if labelled else images(16).tensors[0], 16)
    units = scan(net).units
    found = sensitivity(net, data, units, passes=1500)
    moved = changes(net)
    for unit in units:
        d = moved[unit.name]
        want = gauss_newton(net, data, unit, d)
        assert found.rise(unit.name, d) == pytest.approx(want, rel=0.15)
        small = tiny()
        with torch.no_grad():
            small.get_parameter(unit.name).add_(unit.view.tensor(d * 0.1))
        assert want == pytest.approx(100 * output_distance(net, small, data), rel=0.15)


def test_the_same_seed_gives_the_same_numbers_and_the_network_stays_as_it_was():
    net, data = tiny().requires_grad_(False), batches(images(32), 16)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    units = scan(net).units
    a, b, c = (sensitivity(net, data, units, passes=8, seed=s) for s in (1, 1, 2))
    assert all(torch.equal(a.gradients[u.name], b.gradients[u.name]) for u in units)
    assert not torch.equal(a.gradients[units[0].name], c.gradients[units[0].name])
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert not any(p.requires_grad for p in net.parameters())


def test_batches_that_cannot_be_cut_are_used_several_times():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 4)

        def forward(self, x, scale):
            return self.fc(x) * scale

    torch.manual_seed(0)
    data = [Batch((torch.randn(6, 5), torch.tensor([1.0, 2, 3, 4])), {}) for _ in range(2)]
    found = sensitivity(Scaled(), data, scan(Scaled()).units, passes=10)
    assert found.gradients["fc.weight"].shape == (10, 20)


def test_gradients_in_files_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("featherweight.sensitivity.ROOM", 1000)
    net, data = tiny(), batches(images(16), 8)
    units = scan(net).units
    a, b = (sensitivity(net, data, units, passes=4, spill=place) for place in (None, tmp_path))
    assert all(torch.equal(a.gradients[u.name], b.gradients[u.name]) for u in units)
    assert len(list(tmp_path.iterdir())) == len(units)


def test_a_unit_without_gradient_is_missing_and_a_network_without_any_is_refused():
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 4)

        def forward(self, x):
            return self.b(self.a(x).detach())

    class Closed(Cut):
        @torch.no_grad()
        def forward(self, x):
            return self.b(self.a(x))

    data = batches(torch.randn(8, 5), 4)
    found = sensitivity(Cut(), data, scan(Cut()).units, passes=4)
    assert list(found.gradients) == ["b.weight"]
    with pytest.raises(UsageError, match="no gradient"):
        sensitivity(Closed(), data, scan(Closed()).units, passes=4)
