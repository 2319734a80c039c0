"""Training images of the zoo, flipped and shifted, as `--train bench/augmented.py:cifar100`."""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from bench.allocate import zoo

SHIFT = 4  # pixels, at most


class Augmented(Dataset):
    """Images of a data set, each flipped half of the time and shifted by up to SHIFT pixels, zeros coming in."""

    def __init__(self, data: TensorDataset) -> None:
        self.images, self.labels = data.tensors

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        down, right, flip = torch.randint(0, 2 * SHIFT + 1, (3,)).tolist()
        image = self.images[i]
        height, width = image.shape[-2:]
        image = torch.nn.functional.pad(image, (SHIFT, SHIFT, SHIFT, SHIFT))[:, down:, right:][:, :height, :width]
        return (image.flip(-1) if flip % 2 else image), self.labels[i]


def cifar100() -> Augmented:
    return Augmented(zoo(Path(__file__).parents[2] / "shared" / "zoo.py").cifar100_train())
