"""Small networks and data for tests of the whole line."""

import torch
from torch import nn
from torch.utils.data import TensorDataset


class Tiny(nn.Module):
    """A CNN with BatchNorm, a grouped convolution and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, groups=4, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


def tiny() -> nn.Module:
    """Tiny with fixed weights and lived-in BatchNorm statistics."""
    torch.manual_seed(0)
    model = Tiny()
    for _ in range(20):
        model(torch.randn(32, 3, 8, 8) + 0.5)
    with torch.no_grad():
        for norm in (model.bn1, model.bn2):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
    return model.eval()


def images(count: int = 96, seed: int = 1) -> TensorDataset:
    """Images with correlated pixels, labelled by the network itself."""
    torch.manual_seed(seed)
    x = torch.nn.functional.avg_pool2d(torch.randn(count, 3, 10, 10), 3, 1) * 3 + 0.5
    with torch.no_grad():
        return TensorDataset(x, tiny()(x).argmax(1))


def test_images() -> TensorDataset:
    return images(64, 2)


test_images.__test__ = False  # pytest: data, not a test


def words() -> nn.Module:
    """An LSTM with a tied embedding and a LayerNorm, no BatchNorm anywhere."""
    torch.manual_seed(3)

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 12)
            self.lstm = nn.LSTM(12, 12, batch_first=True)
            self.norm = nn.LayerNorm(12)
            self.out = nn.Linear(12, 20)
            self.out.weight = self.embed.weight

        def forward(self, ids):
            return self.out(self.norm(self.lstm(self.embed(ids))[0]))

    return Words().eval()


def sentences() -> torch.Tensor:
    torch.manual_seed(4)
    return torch.randint(0, 20, (64, 9))


def empty() -> list:
    return []


def broken() -> nn.Module:
    raise RuntimeError("no weights here")


def not_a_model() -> int:
    return 3


def mean_output(model: nn.Module, data: TensorDataset) -> dict[str, float]:
    with torch.no_grad():
        return {"mean": float(model(data.tensors[0]).mean())}


def failing_metric(model: nn.Module, data: TensorDataset) -> float:
    raise KeyError("x")


def unlabelled() -> torch.Tensor:
    return images().tensors[0]


def quitting() -> nn.Module:
    raise SystemExit("dataset missing")


def chatty(model: nn.Module, data: TensorDataset) -> float:
    print("accuracy is 91")
    model.train()
    return 1.0
