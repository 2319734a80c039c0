"""Train the demo network (featherweight/demo/digits.py) from scratch and write its weights.

python bench/train_digits.py                     # the weights in the package: 35 s on one core
python bench/train_digits.py --seed 1 --out x    # another run, elsewhere
"""

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.utils.data import TensorDataset

from featherweight.demo import digits

EPOCHS, BATCH = 60, 64
RATE, DECAY, SMOOTHING = 0.05, 5e-3, 0.1


def shifted(images: Tensor, rng: Generator) -> Tensor:
    """Each image moved by -1, 0 or 1 pixels in both directions, background moving in."""
    n, _, height, width = images.shape
    padded = nn.functional.pad(images, (1, 1, 1, 1))[:, 0]
    y, x = torch.randint(0, 3, (2, n, 1, 1), generator=rng)
    rows, cols = y + torch.arange(height)[None, :, None], x + torch.arange(width)[None, None, :]
    return padded[torch.arange(n)[:, None, None], rows, cols].unsqueeze(1)


def fit(data: TensorDataset, seed: int) -> nn.Module:
    """A trained network, in eval mode; the same seed gives the same network."""
    torch.manual_seed(seed)  # the weights
    rng = Generator().manual_seed(seed)  # order and shifts
    model = digits.network()
    images, labels = data.tensors
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, nesterov=True, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    lost = nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images), generator=rng).split(BATCH)[: len(images) // BATCH]:
            optimizer.zero_grad()
            lost(model(shifted(images[chosen], rng)), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Share of images whose highest score is the right digit."""
    images, labels = data.tensors
    return float((model(images).argmax(1) == labels).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=digits.WEIGHTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the same sums on every machine size
    start = time.perf_counter()
    model = fit(digits.train(), arguments.seed)
    seconds = time.perf_counter() - start
    save_file(dict(sorted(model.state_dict().items())), arguments.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {arguments.out.stat().st_size:,} bytes")
    print(f"train {accuracy(model, digits.train()):.2%}, test {accuracy(model, digits.test()):.2%}, {seconds:.0f} s")


if __name__ == "__main__":
    main()
