"""A small trained network for scikit-learn's 8 x 8 handwritten digits, and its images.

The weights beside this file were written by bench/train_digits.py. The images are the UCI set "Optical Recognition of
Handwritten Digits" (Alpaydin, Kaynak, 1998, CC BY 4.0).
"""

from collections import OrderedDict
from pathlib import Path
from typing import final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

WEIGHTS = Path(__file__).with_name("digits.safetensors")
CALIBRATION = 512  # images


@final
class Residual(nn.Module):
    """relu(x + body(x))."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def make() -> nn.Module:
    """The trained network, in eval mode: (n, 1, 8, 8) images in, (n, 10) scores out. Draws no random numbers."""
    with torch.device("meta"):
        model = network()
    model.to_empty(device="cpu").load_state_dict(load_file(WEIGHTS))
    return model.eval()


def network() -> nn.Module:
    """The same network with fresh random weights, in training mode."""
    parts = {
        "stem": nn.Sequential(*_conv(1, 24), nn.ReLU()),
        "block1": Residual(nn.Sequential(*_conv(24, 24), nn.ReLU(), *_conv(24, 24))),
        "down": nn.Sequential(*_conv(24, 40, stride=2), nn.ReLU()),
        "separable": nn.Sequential(*_conv(40, 40, groups=40), nn.ReLU(), *_conv(40, 40, size=1), nn.ReLU()),
        "block2": Residual(nn.Sequential(*_conv(40, 40), nn.ReLU(), *_conv(40, 40))),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "head": nn.Linear(40, 10),
    }
    return nn.Sequential(OrderedDict(parts))


def train() -> TensorDataset:
    """The training images, about 70 % of every digit."""
    return _subset(held_out=False)


def calibration() -> TensorDataset:
    """512 training images, spread evenly over the training set."""
    images, labels = train().tensors
    chosen = torch.arange(CALIBRATION) * len(images) // CALIBRATION
    return TensorDataset(images[chosen], labels[chosen])


def test() -> TensorDataset:
    """The test images, about 30 % of every digit; the network was never trained on them."""
    return _subset(held_out=True)


def _subset(held_out: bool) -> TensorDataset:
    """Images (n, 1, 8, 8) float32 in 0..1 and labels int64, on one side of the split. Of every ten images of a digit,
    in the order of the set, the first, fifth and eighth are held out: the same for ever, no random numbers."""
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    pixels, targets = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().div(16).reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(targets).long()
    rank = torch.nn.functional.one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0] - 1  # among its own digit
    chosen = (rank * 3 % 10 < 3) == held_out
    return TensorDataset(images[chosen], labels[chosen])


def _conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]
