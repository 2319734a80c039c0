"""How well a policy's accuracy is predicted, and what one budget for the whole network gains.

    python -m bench.allocate prediction [--only resnet20_cifar10] [--policies 40]
    python -m bench.allocate targets [--only resnet20_cifar10]
    python -m bench.allocate operations

`prediction`: random policies, every layer at a random rate; three predictions of each (the sum of the second-order
scores; the distance to the dense outputs on held-out calibration images, before and after BatchNorm is corrected, as
the search measures it)
against the accuracy over the whole test set after the correction: Spearman correlations and a scatter plot.

`targets`: the files of `compress --target` by what may be chosen from, and the largest uniform setting that is not
larger, each read back in a fresh process. `operations`: fewer multiplications, and twelve times smaller, with and
without finetuning; run it where bench/ is. All write to bench/results/allocate.json and .md.
"""

import argparse
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from bench.networks import measure
from featherweight import reuse_memory
from featherweight.candidates import solve_candidates
from featherweight.data import batches, split
from featherweight.database import Database
from featherweight.layers import Unit, scan
from featherweight.methods import Gptq, GridSpec, Method, Obs, PruneQuantize, Solution, Unstructured
from featherweight.metrics import accuracy
from featherweight.repair.correct import Reference
from featherweight.scores import CORRECTING
from featherweight.search import TEMPERATURE, Judge
from featherweight.sensitivity import sensitivity
from featherweight.stats import capture

RESULTS = Path(__file__).parent / "results"
PREDICTED = {
    "resnet20_cifar10": ("cifar10_calibration", "cifar10_test"),
    "resnet20_cifar100": ("cifar100_calibration", "cifar100_test"),
}
PREDICTIONS = ("second-order sum", "held-out distance", "held-out distance, BatchNorm corrected")
TARGETS: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "resnet20_cifar10": (
        "cifar10_calibration",
        "cifar10_test",
        ("8x", "10x", "12x"),
        (
            "--bits 2",
            "--sparsity 0.5 --bits 3 --method obs",
            "--bits 3 --group 0",
            "--bits 3",
            "--sparsity 0.5 --bits 4 --method obs",
        ),
    ),
    "resnet20_cifar100": (
        "cifar100_calibration",
        "cifar100_test",
        ("8x", "10x"),
        ("--bits 3 --group 0", "--bits 3", "--sparsity 0.5 --bits 4 --method obs"),
    ),
    "lstm_speech": (
        "speech_calibration",
        "speech_test",
        ("8x",),
        ("--bits 3", "--sparsity 0.5 --bits 4 --method obs", "--sparsity 0.5 --bits 5 --method obs"),
    ),
    "efficientnet_lite0": (
        "imagenet_calibration",
        "imagenet_val",
        ("7.5x", "9x", "10x"),
        ("--bits 3 --group 256", "--sparsity 0.5 --bits 4 --method obs --group 256", "--bits 4 --group 256"),
    ),
}
AMONG = ("both", "quantize", "prune")
TUNED = "--finetune 5 --train {zoo}:cifar10_train10k --precision bf16"
OPERATIONS = {
    "resnet20_cifar10": (
        "--target-macs 0.5x --among both",
        f"--target-macs 0.5x --among both {TUNED}",
        "--target 12x",
        f"--target 12x {TUNED}",
    ),
    "resnet20_cifar100": (
        "--target-macs 0.8x --among both",
        "--target-macs 0.7x --among both",
        "--target-macs 0.6x --among both",
        "--target-macs 0.5x --among both",
        "--target-macs 0.435x --among both",
        "--target-macs 0.435x --among factors",
        "--target-macs 0.435x --among both --finetune 10 --train bench/augmented.py:cifar100 --precision bf16",
    ),
}


def zoo(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("zoo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rates() -> list[Method]:
    """From coarse to fine, about 1.5 to 5 bits a weight."""
    grids: list[Method] = [Gptq(GridSpec(b)) for b in (2, 3, 4, 5)]
    half: list[Method] = [PruneQuantize(Obs(Unstructured(0.5)), Gptq(GridSpec(b))) for b in (3, 4)]
    most: list[Method] = [PruneQuantize(Obs(Unstructured(s)), Gptq(GridSpec(3))) for s in (0.85, 0.7)]
    return [*most, grids[0], half[0], grids[1], half[1], *grids[2:]]


@torch.no_grad()
def prediction(net: nn.Module, data: Any, test: Any, policies: int, seed: int = 0) -> list[dict[str, float]]:
    """A line a policy. Each has a rate of its own around which its layers' rates vary."""
    samples, units = batches(data), scan(net).units
    solving, judging = split(samples)
    stats = capture(net, solving, units)
    scores = sensitivity(net, judging, units, temperature=TEMPERATURE)
    methods = rates()
    count = sum(b.size for b in solving)
    with tempfile.TemporaryDirectory() as folder:
        store = Database.at(Path(folder) / "solved")
        candidates = {}
        for unit in units:  # one method at a time, so that none is left out as worse than another
            w = unit.view.matrix(net.get_parameter(unit.name))

            def rise(unit: Unit, solution: Solution, w: torch.Tensor = w) -> float:
                return scores.rise(unit.name, solution.weight.dense() - w)

            tried = [
                solve_candidates(net, [unit], stats, rise, {unit.name: [m]}, (), {}, count, store, lambda *_: None)
                for m in methods
            ]
            candidates[unit.name] = tuple(found[unit.name][0] for found in tried)
    reference = Reference.of(net, samples, units, most=CORRECTING)
    plain = Judge(net, reference, units, candidates, {}, correcting=False)
    corrected = Judge(net, reference, units, candidates, {})
    tested = batches(test, 500)
    random = np.random.default_rng(seed)
    lines = []
    for k in range(policies):
        middle = random.uniform(0, len(methods) - 1)
        drawn = np.clip(np.rint(random.normal(middle, 1.2, len(units))), 0, len(methods) - 1)
        choices = tuple(int(c) for c in drawn)
        taken = [candidates[u.name][c] for u, c in zip(units, choices, strict=True)]
        line = {
            "bytes": float(sum(c.bytes for c in taken)),
            PREDICTIONS[0]: sum(c.rise for c in taken),
            PREDICTIONS[1]: float(plain(choices).mean()),
            PREDICTIONS[2]: float(corrected(choices).mean()),
        }
        line["top1"] = accuracy(corrected.network(choices), tested)["top1"]
        lines.append(line)
        print(k, {name: round(value, 4) for name, value in line.items()}, flush=True)
    return lines


def correlations(lines: list[dict[str, float]]) -> dict[str, float]:
    """Spearman's, between a prediction of the distance and the accuracy lost."""
    lost = [-x["top1"] for x in lines]
    return {p: float(spearmanr([x[p] for x in lines], lost).statistic) for p in PREDICTIONS}  # pyright: ignore


def scatter(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), len(PREDICTIONS), squeeze=False)
    for row, (network, lines) in zip(grid, found.items(), strict=True):
        known = correlations(lines)
        for axes, name in zip(row, PREDICTIONS, strict=True):
            axes.scatter([x[name] for x in lines], [x["top1"] for x in lines], s=16)
            axes.set_xscale("log")
            axes.set_xlabel(name)
            axes.set_title(f"{network}: {known[name]:.3f}", fontsize=10)
            axes.grid(alpha=0.3)
        row[0].set_ylabel("top-1 %, whole test set")
    figure.savefig(path, dpi=110)


def line_of(zoo_file: Path, network: str, settings: str, file: Path, database: Path) -> dict[str, Any]:
    """A line of `bench.networks`, with a database beside the settings."""
    calibration, test, *_ = TARGETS[network]
    found = measure(zoo_file, network, calibration, test, f"{settings} --database {database}", file)
    return found | {"settings": settings}


def operations(zoo_file: Path, network: str, _among: Sequence[str]) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        for settings in OPERATIONS[network]:
            asked = settings.format(zoo=zoo_file)
            found = line_of(zoo_file, network, asked, Path(folder) / "small.fw", Path(folder) / "solved")
            yield found | {"settings": settings.replace("{zoo}:", "")}


def targets(zoo_file: Path, network: str, among: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every target with everything to choose from, with grids alone and with pruning alone; then uniform settings. The
    first run finds an empty database, the later ones what it solved."""
    *_, wanted, uniform = TARGETS[network]
    with tempfile.TemporaryDirectory() as folder:
        file, database = Path(folder) / "small.fw", Path(folder) / "solved"
        for kind in (k for k in AMONG if k in among):
            for target in wanted:
                found = line_of(zoo_file, network, f"--target {target} --among {kind}", file, database)
                yield found | {"target": target, "among": kind}
        for settings in uniform if "uniform" in among else ():
            for order in ("", " --sequential"):
                found = line_of(zoo_file, network, settings + order, file, database)
                yield found | {"target": None, "among": "uniform"}


def distance(line: dict[str, Any]) -> float:
    """To the dense outputs, as the repair measured it."""
    found = line["repair"]
    return found["after"] if found["applied"] else found["before"]


def tables(content: dict[str, Any]) -> str:
    """Markdown."""
    rows = []
    alike: dict[str, list[dict[str, Any]]] = {}  # settings that are the same for all layers, of the table of README.md
    for x in json.loads((RESULTS / "networks.json").read_text())["lines"]:
        alike.setdefault(x["network"], []).append(x)
    if content.get("prediction"):
        rows += ["Spearman correlation between prediction and accuracy lost, over random policies:", ""]
        rows += ["| network | policies | top-1 | " + " | ".join(PREDICTIONS) + " |", "|---|--:|---|--:|--:|--:|"]
        for network, lines in content["prediction"].items():
            known, top1 = correlations(lines), [x["top1"] for x in lines]
            cells = " | ".join(f"{known[p]:.3f}" for p in PREDICTIONS)
            rows.append(f"| {network} | {len(lines)} | {min(top1):.1f} to {max(top1):.1f} | {cells} |")
        rows += ["", "![every policy](prediction.png)", ""]
    if content.get("targets"):
        rows += ["Files of `compress --target`, and of the best uniform setting that is not larger.", ""]
        said = "measured before files were entropy-coded: what fits into a size now is in [coding-files.md]"
        rows += [f"These were {said}(coding-files.md).", ""]
        titles = (
            "network",
            "target",
            "both",
            "grids alone",
            "pruning alone",
            "best uniform",
            "bytes of these",
            "distances",
        )
        rows += [f"| {' | '.join(titles)} | time |"]
        rows += ["|---|--:|--:|--:|--:|--:|---|---|--:|"]
        for network, lines in content["targets"].items():
            for target in dict.fromkeys(x["target"] for x in lines if x["target"]):
                own = {x["among"]: x for x in lines if x["target"] == target}
                limit = lines[0]["fp32_bytes"] / float(target.removesuffix("x"))
                same = [x for x in lines if x["among"] == "uniform"] + alike.get(network, [])
                fitting = [x for x in same if x["file_bytes"] <= limit]
                best = max(fitting, key=lambda x: x["after"], default=None)
                four = [*(own.get(a) for a in AMONG), best]
                cells = [f"{x['after']:.2f}" if x else "-" for x in four]
                note = f" (`{best['settings'].strip()}`)" if best else ""
                sizes = ", ".join(f"{x['file_bytes']:,}" if x else "-" for x in four)
                apart = ", ".join(f"{distance(x):.2g}" if x else "-" for x in four)
                took = f"{own['both']['compress_s']:.0f} s" if "both" in own else "-"
                before = lines[0]["before"]
                own_cells = [f"{network} ({before:.2f})", target, " | ".join(cells) + note, sizes, apart, took]
                rows.append(f"| {' | '.join(own_cells)} |")
        rows += [
            "",
            "Top-1 over the whole test set, after reload. Distances: to the dense outputs on held-out calibration data "
            "(divergence), after correction; uniform settings were solved on these data, too. The first target of a "
            "network starts with an empty database, the others find its solved candidates.",
        ]
    if content.get("operations"):
        rows += ["", "Fewer operations, and finetuning towards the dense network:", ""]
        rows += ["| network | settings | file bytes | multiplications | one sample | top-1 | all |"]
        rows += ["|---|---|--:|--:|--:|--:|--:|"]
        for network, lines in content["operations"].items():
            for x in lines:
                macs = f"{x['macs'] / 1e6:.1f} of {x['dense_macs'] / 1e6:.1f} M"
                took = f"{x['latency'] / 1e3:.2f} of {x['dense_latency'] / 1e3:.2f} ms" if "latency" in x else ""
                rows.append(
                    f"| {network} ({x['before']:.2f}) | `{x['settings']}` | {x['file_bytes']:,} | {macs} | {took} | "
                    f"{x['after']:.2f} | {x['compress_s']:.0f} s |"
                )
    return "\n".join(rows) + "\n"


def write(content: dict[str, Any]) -> None:
    (RESULTS / "allocate.json").write_text(json.dumps(content, indent=1) + "\n")
    (RESULTS / "allocate.md").write_text(tables(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("prediction", "targets", "operations"))
    parser.add_argument("--only", action="append")
    parser.add_argument("--among", action="append", choices=(*AMONG, "uniform"), help="of targets; the rest is kept")
    parser.add_argument("--policies", type=int, default=40)
    parser.add_argument("--zoo", type=Path, default=Path(__file__).parents[2] / "shared" / "zoo.py")
    options = parser.parse_args()
    store = RESULTS / "allocate.json"
    content: dict[str, Any] = json.loads(store.read_text()) if store.exists() else {}
    content["machine"] = f"{os.cpu_count()} cores, torch {torch.__version__}"
    known = content.setdefault(options.part, {})
    every = {"prediction": PREDICTED, "targets": TARGETS, "operations": OPERATIONS}
    for network in options.only or every[options.part]:
        if options.part == "prediction":
            module, (data, test) = zoo(options.zoo), PREDICTED[network]
            net = getattr(module, network)().requires_grad_(False)
            known[network] = prediction(net, getattr(module, data)(), getattr(module, test)(), options.policies)
            write(content)
        else:
            lines = {"targets": targets, "operations": operations}[options.part]
            for line in lines(options.zoo, network, options.among or (*AMONG, "uniform")):
                print(line, flush=True)
                others = [x for x in known.get(network, []) if x["settings"] != line["settings"]]
                known[network] = [*others, line]
                write(content)
    if options.part == "prediction":
        scatter(known, RESULTS / "prediction.png")


if __name__ == "__main__":
    reuse_memory()
    main()
