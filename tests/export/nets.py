"""Two networks with every kind of layer, and inputs for them."""

import torch
from torch import Tensor, nn


class Convs(nn.Module):
    """Plain, grouped, depthwise and transposed convolutions, norms, a linear layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.second = nn.BatchNorm2d(16)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2, groups=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = self.second(self.depthwise(self.grouped(x).relu()))
        return self.fc(self.up(x).relu().mean(dim=(2, 3)))


class Words(nn.Module):
    """Embedding, LSTM, GRU, attention, a tied weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.lstm = nn.LSTM(8, 6, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(12, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, indices):
        x, _ = self.lstm(self.embedding(indices))
        x, _ = self.gru(x)
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.out(self.norm(x + y))


def convs() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = Convs()
    for _ in range(5):
        net(torch.randn(16, 3, 8, 8))
    return net.eval(), torch.randn(16, 3, 8, 8)


def words() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Words().eval(), torch.randint(11, (16, 7))
