import torch
from torch import nn

from featherweight.coupling import couplings
from featherweight.data import Batch
from featherweight.layers import scan


class Residual(nn.Module):
    """stem -> (a -> b) + skip -> expand -> depthwise -> project -> fc"""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.norm, self.b = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 1)
        self.expand, self.depthwise = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.project, self.fc = nn.Conv2d(16, 5, 1), nn.Linear(5, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.b(self.norm(self.a(x)).relu())
        x = self.project(self.depthwise(self.expand(x)))
        return self.fc(x.mean((2, 3)))


def test_rows_that_one_layer_alone_reads_are_coupled_to_it():
    torch.manual_seed(0)
    net = Residual().eval()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    found = couplings(net, Batch((torch.randn(4, 3, 8, 8),), {}), scan(net).units)
    assert found == {
        "a.weight": ("b.weight",),
        "b.weight": ("expand.weight",),  # the stem's rows are also added
        "expand.weight": ("project.weight",),
        "depthwise.weight": ("project.weight",),
        "project.weight": ("fc.weight",),
    }
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())


def test_a_network_without_gradients_has_none():
    class Closed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Residual()

        @torch.no_grad()
        def forward(self, x):
            return self.net(x)

    net = Closed().eval()
    assert couplings(net, Batch((torch.randn(4, 3, 8, 8),), {}), scan(net).units) == {}


def test_what_gradients_do_not_show_is_tried():
    class Hidden(nn.Module):
        """The first layer's rows are also read without gradients; the third's are permuted before they are read."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)
            self.c, self.d, self.e = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            h = self.a(x).tanh()
            x = self.b(h) + h.detach().sum(1, keepdim=True)
            x = self.c(x).tanh()
            x = self.d(x[:, [2, 1, 0, 3, 4, 5, 6, 7]]).tanh()
            return self.e(x)

    torch.manual_seed(0)
    net = Hidden().eval()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    found = couplings(net, Batch((torch.randn(16, 6),), {}), scan(net).units)
    assert found == {"b.weight": ("c.weight",), "d.weight": ("e.weight",)}
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
