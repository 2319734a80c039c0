"""The table of README.md: real networks, compressed by the command a user would type, read back in a fresh process.

    python -m bench.networks [--only resnet20_cifar10] [--zoo ../shared/zoo.py]

Writes bench/results/networks.json (a run of some networks keeps the lines of the others) and networks.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
NETWORKS = {  # network: (calibration data, test data, settings)
    "resnet20_cifar10": (
        "cifar10_calibration",
        "cifar10_test",
        [
            "--method ecq --bits 3",
            "--method ecq --bits 2",
            "--method ecq --bits 1.5",
            "--method obq --bits 4",
            "--method obq --bits 3 --sequential",
            "--method obs --sparsity 0.5",
            "--method obs --sparsity 0.7 --sequential",
            "--method obs --sparsity 0.5 --bits 4",
            "--pattern 2:4",
            "--pattern blocks:4 --sparsity 0.5",
            "--pattern 2:4 --bits 4",
            "--method gptq --bits 8 --activations 8",
            "--method obq --bits 4 --activations 8",
        ],
    ),
    "resnet20_cifar100": (
        "cifar100_calibration",
        "cifar100_test",
        [
            "--target 7.4x",
            "--method ecq --bits 2",
            "--method gptq --bits 4",
            "--method obq --bits 3 --sequential",
        ],
    ),
    "lstm_speech": (
        "speech_calibration",
        "speech_test",
        [
            "--method ecq --bits 3",
            "--method obq --bits 8",
            "--method obq --bits 4",
            "--sparsity 0.7 --sequential",
        ],
    ),
    "efficientnet_lite0": (
        "imagenet_calibration",
        "imagenet_val",
        [
            "--method ecq --bits 3",
            "--method gptq --bits 8",
            "--method gptq --bits 4 --group 256",
        ],
    ),
}


def measure(zoo: Path, network: str, calibration: str | None, test: str, settings: str, file: Path) -> dict[str, Any]:
    """One line of the table: the command's own JSON, and its wall time including start-up. calibration: None
    for a run without data."""
    command = [sys.executable, "-m", "featherweight", "compress", f"{zoo}:{network}", "-o", str(file), "--json"]
    command += [] if calibration is None else ["--data", f"{zoo}:{calibration}"]
    command += ["--test", f"{zoo}:{test}", *settings.split()]
    command += ["--batch-size", "32"] if network == "efficientnet_lite0" else []
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    found = json.loads(done.stdout)
    counted = found.get("allocation") or {}
    return (
        {
            "network": network,
            "settings": settings,
            "fp32_bytes": found["baselines"]["fp32"],
            "half_bytes": found["baselines"]["half"],
            "int8_bytes": found["baselines"]["int8"],
            "file_bytes": found["file_bytes"],
            "before": round(found["before"]["top1"], 2),
            "after": round(found["after"]["top1"], 2),
            "in_order": found["in_order"],
            "repair": found["repair"],
            "stages_s": found["seconds"],
            "compress_s": round(sum(found["seconds"].values()), 1),
            "wall_s": round(wall, 1),
        }
        | {name: counted[name] for name in ("macs", "dense_macs", "latency", "dense_latency") if counted.get(name)}
        | ({"assumed": found["assumed"]} if found["assumed"] else {})
    )


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown."""
    rows = ["| network | settings | file bytes | of fp32 | smaller | top-1 before | after | time |"]
    rows.append("|---|---|--:|--:|--:|--:|--:|--:|")
    for x in lines:
        share, ratio = x["file_bytes"] / x["fp32_bytes"], x["fp32_bytes"] / x["file_bytes"]
        rows.append(
            f"| {x['network']} | `{x['settings']}` | {x['file_bytes']:,} | {share:.1%} | {ratio:.1f}x | "
            f"{x['before']:.2f} | {x['after']:.2f} | {x['compress_s']:.0f} s |"
        )
    return "\n".join(rows) + "\n"


def place(line: dict[str, Any]) -> tuple[int, int]:
    """Where a line of the table belongs."""
    every = NETWORKS[line["network"]][2]
    own = line["settings"]
    return list(NETWORKS).index(line["network"]), every.index(own) if own in every else len(every)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=NETWORKS, action="append")
    parser.add_argument("--settings", action="append", help="only these of its settings; the other lines stay")
    parser.add_argument("--zoo", type=Path, default=Path(__file__).parents[2] / "shared" / "zoo.py")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    store = RESULTS / "networks.json"
    chosen = options.only or list(NETWORKS)
    kept = json.loads(store.read_text())["lines"] if store.exists() else []
    again = {(n, s) for n in chosen for s in NETWORKS[n][2] if options.settings is None or s in options.settings}
    lines = [x for x in kept if (x["network"], x["settings"]) not in again]
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    )
    for network in chosen:
        calibration, test, every = NETWORKS[network]
        with tempfile.TemporaryDirectory() as folder:
            for settings in (s for s in every if (network, s) in again):
                lines.append(measure(options.zoo, network, calibration, test, settings, Path(folder) / "small.fw"))
                print(table(lines[-1:]).splitlines()[-1], flush=True)
                lines.sort(key=place)
                store.write_text(json.dumps({"machine": machine, "lines": lines}, indent=1) + "\n")
                (RESULTS / "networks.md").write_text(table(lines))


if __name__ == "__main__":
    main()
