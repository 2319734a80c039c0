"""What `reuse_memory` gains: passes of a network with and without it, each in a process of its own, taking turns.

    python -m bench.memory

Writes bench/results/memory.md. The network is made here, of plain layers: what counts is the size of its activations.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

import featherweight as fw

RESULTS = Path(__file__).parent / "results"
SIZES = (8, 32, 128)  # images of 224 x 224 pixels in a batch
TURNS = 2


def network() -> nn.Module:
    """Expand, depthwise, project, as mobile networks do; 96 channels at 112 x 112."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, stride=2, padding=1)]
    for _ in range(2):
        layers += [nn.Conv2d(16, 96, 1), nn.BatchNorm2d(96), nn.ReLU6()]
        layers += [nn.Conv2d(96, 96, 3, padding=1, groups=96), nn.BatchNorm2d(96), nn.ReLU6(), nn.Conv2d(96, 16, 1)]
    return nn.Sequential(*layers).eval()


@torch.no_grad()
def seconds(size: int) -> float:
    """The median of three passes, after one."""
    net, x = network(), torch.randn(size, 3, 224, 224)
    net(x)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        net(x)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measured(size: int, reuse: bool) -> float:
    command = [sys.executable, "-m", "bench.memory", str(size), str(int(reuse))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    if len(sys.argv) > 1:
        if sys.argv[2] == "1":
            fw.reuse_memory()
        print(seconds(int(sys.argv[1])))
        return
    rows = ["| images in a batch | as torch does, s | with `reuse_memory`, s | ratio |", "|--:|--:|--:|--:|"]
    for size in SIZES:
        pairs = [(measured(size, False), measured(size, True)) for _ in range(TURNS)]
        plain, reused = (statistics.median(times) for times in zip(*pairs, strict=True))
        rows.append(f"| {size} | {plain:.2f} | {reused:.2f} | {plain / reused:.1f} |")
        print(rows[-1], flush=True)
    rows += ["", f"{os.cpu_count()} cores, torch {torch.__version__}; medians of {TURNS} processes each, taking turns."]
    (RESULTS / "memory.md").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
