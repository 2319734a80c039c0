"""Forms of factors beside each other.

    python -m bench.factors errors networks [--only lstm_speech] [--zoo ../shared/zoo.py]

`errors`: every convolution of resnet20_cifar10 in every form that stores at most 0.35, 0.5 and 0.7 of its numbers: the
share of the layer's output energy that is lost, with factors found without data and with the layer's inputs.
`networks`: files of the command; a run keeps the lines that it does not measure. Each part writes
bench/results/factors-PART.md.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.networks import measure
from featherweight import reuse_memory
from featherweight.artifact import read
from featherweight.candidates import numbers
from featherweight.data import batches
from featherweight.layers import scan
from featherweight.methods import Factorize
from featherweight.methods.forms import FORMS, form_at
from featherweight.stats import capture
from featherweight.userland import call, make_model

RESULTS = Path(__file__).parent / "results"
NETWORK, CALIBRATION = "resnet20_cifar10", "cifar10_calibration"
SHARES = (0.35, 0.5, 0.7)
FILES = {  # network: (calibration, test, settings ...); TRAIN stands for the zoo
    "lstm_speech": (
        "speech_calibration",
        "speech_test",
        (
            "--method lowrank --keep 0.2 --include lstm.weight_hh_l0",
            "--method lowrank --keep 0.2 --include lstm.weight_hh_l0 --finetune 30 --train TRAINspeech_calibration",
            "--method tt --keep 0.2 --include lstm.weight_hh_l0 --finetune 30 --train TRAINspeech_calibration",
        ),
    ),
    "resnet20_cifar10": (
        "cifar10_calibration",
        "cifar10_test",
        (
            "--target-macs 0.5x --among factors",
            "--target-macs 0.5x --among factors --finetune 5 --train TRAINcifar10_train10k --precision bf16",
        ),
    ),
}


def errors(zoo: Path) -> str:
    """Medians over the layers, and how often each form is the best."""
    net = make_model(f"{zoo}:{NETWORK}").requires_grad_(False)
    units = [u for u in scan(net).units if u.kind == "conv" and u.taps > 1]
    stats = capture(net, batches(call(f"{zoo}:{CALIBRATION}")), units)
    lost: dict[tuple[float, bool, str], list[float]] = {}
    took: dict[tuple[float, bool, str], float] = {}
    for unit in units:
        w = unit.view.matrix(net.get_parameter(unit.name).detach())
        kernel = tuple(unit.view.shape[2:])
        for keep in SHARES:
            for seen in (False, True):
                for form in FORMS:
                    # the numbers that are kept are at most those of the dense matrix, also for ranks of 1
                    fits = form_at(form, unit.view.matrix_shape, kernel, keep).numbers <= keep * w.numel()
                    start = time.process_time()
                    solution = Factorize(form, keep, kernel, whiten=seen).solve(w, stats[unit.name])
                    key = keep, seen, form
                    took[key] = took.get(key, 0.0) + time.process_time() - start
                    lost.setdefault(key, []).append(solution.relative_error if fits else float("inf"))
        print(unit.name, file=sys.stderr, flush=True)
    lines = [
        f"Share of a layer's output energy lost, {NETWORK}, {len(units)} convolutions of 3x3, fp16 factors: "
        "median of the layers, layers where the form loses least, processor seconds for all layers.",
        "",
        "| numbers kept | form | no data: lost | best | s | inputs: lost | best | s |",
        "|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for keep in SHARES:
        for form in FORMS:
            cells = []
            for seen in (False, True):
                every = [lost[keep, seen, f] for f in FORMS]
                best = sum(
                    min(each) == own for each, own in zip(zip(*every, strict=True), lost[keep, seen, form], strict=True)
                )
                cells += [
                    f"{statistics.median(lost[keep, seen, form]):.2%}",
                    f"{best}",
                    f"{took[keep, seen, form]:.0f}",
                ]
            lines.append(f"| {keep} | {form} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def networks(zoo: Path, only: list[str] | None) -> None:
    """Sizes, numbers, multiplications and accuracies of files."""
    head = "| network | settings | numbers of all | of these weights | MACs | file bytes | top-1 before | after |"
    path = RESULTS / "factors-networks.md"
    for name in only or FILES:
        calibration, test, every = FILES[name]
        for settings in every:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "small.fw"
                x = measure(zoo, name, calibration, test, settings.replace("TRAIN", f"{zoo}:"), file)
                artifact = read(file)
            own = sum(numbers(u.weight) for u in artifact.units)
            dense = sum(u.weight.shape[0] * u.weight.shape[1] for u in artifact.units)
            rest = sum(t.numel() for t in artifact.rest.values()) + sum(2 * n.scale.numel() for n in artifact.norms)
            macs = f"{x['macs'] / x['dense_macs']:.1%}" if "macs" in x else ""
            cells = [name, f"`{settings}`", f"{(dense + rest) / (own + rest):.2f}x fewer", f"{dense / own:.2f}x fewer"]
            cells += [macs, f"{x['file_bytes']:,}", f"{x['before']:.2f}", f"{x['after']:.2f}"]
            row = f"| {' | '.join(cells)} |"
            print(row, flush=True)
            kept = path.read_text().splitlines()[2:] if path.exists() else []
            kept = [r for r in kept if r.split("|")[1:3] != row.split("|")[1:3]]
            path.write_text("\n".join([head, "|---|---|--:|--:|--:|--:|--:|--:|", *kept, row]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["errors", "networks"])
    parser.add_argument("--only", action="append", choices=FILES, help="of `networks`")
    parser.add_argument("--zoo", type=Path, default=Path("../shared/zoo.py"))
    given = parser.parse_args()
    reuse_memory()
    if "networks" in given.parts:
        networks(given.zoo, given.only)
    if "errors" in given.parts:
        torch.set_num_threads(1)
        (RESULTS / "factors-errors.md").write_text(errors(given.zoo))


if __name__ == "__main__":
    main()
