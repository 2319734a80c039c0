"""What can be had without any data: `compress` with no `--data`, beside plain baselines and the same with data.

    python -m bench.datafree [--only none] [--zoo ../shared/zoo.py]

Every line is the real bytes of a file and the accuracy over the whole test set after it was read back in a fresh
process. Writes bench/results/datafree.json (a run of some lines keeps the others) and datafree.md.
"""

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.halves import half
from bench.networks import measure

RESULTS = Path(__file__).parent / "results"
NETWORK, CALIBRATION, TEST = "resnet20_cifar10", "cifar10_calibration", "cifar10_test"
TARGETS = ("--target 4x", "--target 8x", "--target 10x")
LINES = {  # kind: settings
    "none": (*TARGETS, "--bits 3 --sequential", "--bits 3 --sequential --no-repair"),
    "weights": ("--method rtn --bits 8", "--method rtn --bits 4", "half"),
    "data": (*TARGETS, "--bits 3 --sequential"),
}
SAID = {"none": "no data: synthetic inputs", "weights": "no data: weights alone", "data": "1,024 training images"}


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown."""
    rows = [
        "| settings | calibration | file bytes | smaller | top-1 (dense 91.73) | time |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for x in lines:
        name, seconds = (
            ("`.half()`", "") if x["settings"] == "half" else (f"`{x['settings']}`", f"{x['compress_s']:.0f} s")
        )
        size = f"{x['file_bytes']:,} | {x['fp32_bytes'] / x['file_bytes']:.1f}x"
        rows.append(f"| {name} | {SAID[x['kind']]} | {size} | {x['after']:.2f} | {seconds} |")
    known = next((x["assumed"] for x in lines if x.get("assumed")), None)
    note = "\nresnet20_cifar10, top-1 over the 10,000 test images, after reload in a fresh process.\n"
    if known:
        note += (
            f"Synthetic inputs: {known['samples']}, of shape {'x'.join(map(str, known['shape']))}, found by trying; "
        )
        note += f"their statistics are {known['mismatch']:.1%} off those that the BatchNorms keep "
        note += f"(noise: {known['noise']:.0%}).\n"
    return "\n".join(rows) + "\n" + note


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=LINES, action="append")
    parser.add_argument("--settings", action="append", help="only these; the other lines stay")
    parser.add_argument("--zoo", type=Path, default=Path(__file__).parents[2] / "shared" / "zoo.py")
    options = parser.parse_args()
    every = [(kind, settings) for kind, own in LINES.items() for settings in own]
    again = [(k, s) for k, s in every if k in (options.only or LINES) and s in (options.settings or [s])]
    store = RESULTS / "datafree.json"
    lines = json.loads(store.read_text())["lines"] if store.exists() else []
    lines = [x for x in lines if (x["kind"], x["settings"]) not in again]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "small.fw"
        for kind, settings in again:
            data = CALIBRATION if kind == "data" else None
            asked = f"{settings} --database {folder}/{kind}" if settings in TARGETS else settings
            found = (
                half(options.zoo, NETWORK, TEST, file)
                if settings == "half"
                else measure(options.zoo, NETWORK, data, TEST, asked, file)
            )
            lines.append(found | {"kind": kind, "settings": settings})
            lines.sort(key=lambda x: every.index((x["kind"], x["settings"])))
            print(lines[-1]["settings"], found["file_bytes"], found["after"], flush=True)
            store.write_text(json.dumps({"machine": machine, "lines": lines}, indent=1) + "\n")
            (RESULTS / "datafree.md").write_text(table(lines))


if __name__ == "__main__":
    main()
