"""What programs and checkpoints of the networks of ../shared take, and how fast a program is beside the network.

    python -m bench.doors

Writes bench/results/doors.md. Every file is at 4 bits by rounding, so that it takes seconds; sizes are those of
any 4-bit method. Times are medians of runs that take turns, on one thread.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import featherweight as fw
from featherweight.artifact import read
from featherweight.artifact.structure import FIELD
from featherweight.artifact.write import to_bytes
from featherweight.data import batches
from featherweight.methods import GridSpec, Rtn

RESULTS, SHARED = Path(__file__).parent / "results", Path(__file__).parents[2] / "shared"
NETWORKS = {
    "resnet20_cifar10": "cifar10_calibration",
    "resnet20_cifar100": "cifar100_calibration",
    "lstm_speech": "speech_calibration",
    "efficientnet_lite0": "imagenet_calibration",
}
TURNS = 15


@torch.no_grad()
def milliseconds(networks: list[Callable[[torch.Tensor], Any]], x: torch.Tensor) -> list[float]:
    times: list[list[float]] = [[] for _ in networks]
    for turn in range(TURNS + 2):
        for own, network in zip(times, networks, strict=True):
            start = time.perf_counter()
            network(x)
            if turn >= 2:
                own.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(own) for own in times]


def measured(name: str, make: Callable[[], nn.Module], data: Any, folder: Path) -> tuple[str, str]:
    """The row of sizes and the row of times."""
    file = folder / f"{name}.fw"
    fw.compress(make(), method=Rtn(GridSpec(4))).save(file)
    artifact, batch = read(file), batches(data, 32)[0]
    bare = to_bytes(replace(artifact, about={k: v for k, v in artifact.about.items() if k != FIELD}))
    done = [
        fw.export_program(file, make(), batch, folder / f"{name}.pt2").bytes,
        fw.export_checkpoint(file, make(), folder / f"{name}.safetensors").bytes,
        fw.export_compressed_tensors(file, make(), folder / name).bytes,
    ]
    size = file.stat().st_size
    sizes = [size, size - len(bare), *done]
    program = torch.export.load(folder / f"{name}.pt2").module()
    network, x = fw.load(file, into=make()), batch.args[0]
    times = [t for n in (1, 32) for t in milliseconds([network, program], x[:n])]
    return (
        f"| {name} | " + " | ".join(f"{s:,}" for s in sizes) + f" | {done[0] / size:.2f} |",
        f"| {name} | " + " | ".join(f"{t:.2f}" for t in times) + " |",
    )


def main() -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(SHARED))
    import zoo  # pyright: ignore[reportMissingImports]

    sizes = ["| network | .fw | of it structure | .pt2 | .safetensors | compressed-tensors | .pt2 / .fw |"]
    times = ["| network | batch 1: decoded | .pt2 | batch 32: decoded | .pt2 |"]
    sizes.append("|---|" + "--:|" * 6)
    times.append("|---|" + "--:|" * 4)
    with tempfile.TemporaryDirectory() as folder:
        for name, data in NETWORKS.items():
            rows = measured(name, getattr(zoo, name), getattr(zoo, data)(), Path(folder))
            sizes.append(rows[0])
            times.append(rows[1])
            print(*rows, sep="\n", flush=True)
    text = "Bytes, at 4 bits (`--method rtn --bits 4`), written by `python -m bench.doors`:\n\n" + "\n".join(sizes)
    text += (
        f"\n\nMilliseconds of a call, medians of {TURNS} that take turns, one thread, torch {torch.__version__}:\n\n"
    )
    (RESULTS / "doors.md").write_text(text + "\n".join(times) + "\n")


if __name__ == "__main__":
    main()
