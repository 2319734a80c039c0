"""What shrunk covariances gain on samples that no solve saw, over the number of those that one saw.

    python -m bench.shrinkage [--only resnet20_cifar10] [--zoo ../shared/zoo.py]

All layers of a network at one rate (or one layer alone), with covariances as they are and shrunk, nothing corrected
afterwards: the share of output energy that the layers lose on the samples that were given and on held-out ones (median
over layers), and the divergence of the network's outputs from the dense ones on the latter. Writes
bench/results/shrinkage.json and .md.
"""

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.allocate import zoo
from featherweight import reuse_memory
from featherweight.data import batches
from featherweight.layers import Unit, scan
from featherweight.methods import Ecq, Gptq, GridSpec, Obq
from featherweight.methods.base import Method
from featherweight.repair.distance import DenseOutputs
from featherweight.stats import LayerStats, capture, shrink_

RESULTS = Path(__file__).parent / "results"
PIECES = 8
RUNS: tuple[tuple[str, str, str, Method, tuple[int, ...]], ...] = (  # network, data, of these layers, method, samples
    ("resnet20_cifar10", "cifar10_calibration", "", Ecq(2.0), (32, 128, 768)),
    ("resnet20_cifar10", "cifar10_calibration", "", Gptq(GridSpec(3)), (32, 128, 768)),
    ("lstm_speech", "speech_calibration", "", Obq(GridSpec(3)), (32, 128, 1024)),
    ("efficientnet_lite0", "imagenet_calibration", "_fc", Ecq(2.0), (64, 192)),
    ("efficientnet_lite0", "imagenet_calibration", "", Ecq(3.0), (192,)),
)
HELD = {"resnet20_cifar10": 256, "lstm_speech": 1024, "efficientnet_lite0": 64}


def lost(unit: Unit, w: Tensor, q: Tensor, stats: LayerStats) -> float:
    """Share of the output energy."""
    blocks = stats.blocks, -1, w.shape[1]
    error, whole = (q - w).double().reshape(blocks), w.double().reshape(blocks)
    return float(((error @ stats.gram) * error).sum() / ((whole @ stats.gram) * whole).sum())


def measure(name: str, data: str, only: str, method: Method, count: int, path: Path) -> list[dict[str, Any]]:
    net = getattr(zoo(path), name)()
    samples = torch.utils.data.TensorDataset(*getattr(zoo(path), data)().tensors)
    units = [u for u in scan(net).units if only in u.name]
    held = batches(torch.utils.data.Subset(samples, range(len(samples) - HELD[name], len(samples))), 64)
    given = batches(torch.utils.data.Subset(samples, range(count)), count // PIECES)
    dense, unseen = DenseOutputs.of(net, held), capture(net, held, units)
    lines = []
    for shrink in (False, True):
        stats, small = capture(net, given, units), copy.deepcopy(net)
        if shrink:
            stats = {n: shrink_(s) for n, s in stats.items()}
        own, other = [], []
        for unit in units:
            w = unit.view.matrix(net.get_parameter(unit.name).detach())
            solution = method.solve(w, stats[unit.name])
            q = solution.weight.dense()
            own.append(solution.relative_error)
            other.append(lost(unit, w, q, unseen[unit.name]))
            small.get_parameter(unit.name).data.copy_(unit.view.tensor(q))
        line = {"network": name, "layers": only or "all", "method": method.label, "samples": count, "shrunk": shrink}
        line |= {"seen": statistics.median(own), "unseen": statistics.median(other), "distance": dense.distance(small)}
        print(line, flush=True)
        lines.append(line)
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    rows = ["| network | layers | method | samples | lost of these, plain | shrunk | of others, plain | shrunk | "]
    rows[0] += "divergence, plain | shrunk |"
    rows.append("|---|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for a, b in zip(lines[::2], lines[1::2], strict=True):
        losses = " | ".join(f"{x[k]:.2%}" for k in ("seen", "unseen") for x in (a, b))
        left = f"{a['network']} | {a['layers']} | {a['method']} | {a['samples']}"
        rows.append(f"| {left} | {losses} | {a['distance']:.4f} | {b['distance']:.4f} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(HELD), action="append")
    parser.add_argument("--zoo", type=Path, default=Path(__file__).parents[2] / "shared" / "zoo.py")
    options = parser.parse_args()
    reuse_memory()
    store = RESULTS / "shrinkage.json"
    kept = json.loads(store.read_text()) if store.exists() else []
    for name, data, only, method, counts in RUNS:
        if options.only is None or name in options.only:
            for count in counts:
                found = measure(name, data, only, method, count, options.zoo)
                same = {k: found[0][k] for k in ("network", "layers", "method", "samples")}
                kept = [x for x in kept if {k: x[k] for k in same} != same] + found
                store.write_text(json.dumps(kept, indent=1) + "\n")
                (RESULTS / "shrinkage.md").write_text(table(kept))


if __name__ == "__main__":
    main()
