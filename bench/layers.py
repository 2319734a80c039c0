"""Layer errors of the three quantizers on every layer of a real network, with the same grids and statistics.

    python -m bench.layers [--bits 3] [--network resnet20_cifar10 --data cifar10_calibration]

Writes bench/results/layers.md. Fails if OBQ does not beat GPTQ, or GPTQ round-to-nearest, on any layer.
"""

import argparse
import sys
import time
from pathlib import Path

from featherweight.data import batches
from featherweight.layers import scan
from featherweight.methods import Gptq, GridSpec, Obq, Rtn
from featherweight.stats import capture
from featherweight.userland import call, make_model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zoo", type=Path, default=Path(__file__).parents[2] / "shared" / "zoo.py")
    parser.add_argument("--network", default="resnet20_cifar10")
    parser.add_argument("--data", default="cifar10_calibration")
    parser.add_argument("--bits", type=int, default=3)
    options = parser.parse_args()
    model = make_model(f"{options.zoo}:{options.network}")
    units = scan(model).units
    stats = capture(model, batches(call(f"{options.zoo}:{options.data}")), units)
    grid = GridSpec(options.bits)
    methods = Rtn(grid), Gptq(grid), Obq(grid)
    seconds = dict.fromkeys((m.label for m in methods), 0.0)
    lines = [
        f"Share of the layer's output energy lost, {options.network}, {options.bits} bits.",
        "",
        "| layer | rtn | gptq | obq | obq / gptq |",
        "|---|--:|--:|--:|--:|",
    ]
    wins = True
    for unit in units:
        w = unit.view.matrix(model.get_parameter(unit.name).detach())
        errors = []
        for method in methods:
            start = time.perf_counter()
            errors.append(method.solve(w, stats[unit.name]).relative_error)
            seconds[method.label] += time.perf_counter() - start
        rtn, gptq, obq = errors
        wins &= obq < gptq < rtn
        lines.append(f"| {unit.name} | {rtn:.3%} | {gptq:.3%} | {obq:.3%} | {obq / gptq:.2f} |")
    lines += ["", "Seconds for all layers: " + ", ".join(f"{m} {s:.1f}" for m, s in seconds.items()) + "."]
    lines.append("On every layer: obq < gptq < rtn." if wins else "NOT on every layer: obq < gptq < rtn.")
    text = "\n".join(lines) + "\n"
    print(text)
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / "layers.md").write_text(text)
    return 0 if wins else 1


if __name__ == "__main__":
    sys.exit(main())
