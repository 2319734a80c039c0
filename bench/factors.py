"""Forms of factors beside each other.

    python -m bench.factors errors networks [--only lstm_speech] [--zoo ../shared/zoo.py]

`errors`: every convolution of resnet20_cifar10 in every form that stores at most 0.35, 0.5 and 0.7 of its numbers: the
share of the layer's output energy that is lost, with factors found without data and with the layer's inputs.
`networks`: files of the command; a run keeps the lines that it does not measure. Each part writes
bench/results/factors-PART.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.halves import half
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
ROWS = "--method lowrank --keep 0.205 --include lstm.weight_hh_l0"
HALF_MACS = "--target-macs 0.5x --among factors"
FEWER = "--target-params 0.4348x --among factors"
FASTER = "--target-macs 0.4348x --among factors"
FILES = {  # network: (calibration, test, training data, (settings, of finetuning) ...)
    "lstm_speech": (
        "speech_calibration",
        "speech_test",
        "speech_calibration",
        (
            ("half", ""),
            ("--method rtn --bits 8", ""),
            ("--method rtn --bits 4", ""),
            (ROWS, "--epochs 48 --batch-size 64 --mix 1"),
            (ROWS, "--epochs 48 --batch-size 64"),
        ),
    ),
    "resnet20_cifar10": (
        "cifar10_calibration",
        "cifar10_test",
        "cifar10_train10k",
        (
            ("half", ""),
            ("--method rtn --bits 8", ""),
            ("--method rtn --bits 4", ""),
            (HALF_MACS, "--epochs 5 --precision bf16"),
        ),
    ),
    "resnet20_cifar100": (
        "cifar100_calibration",
        "cifar100_test",
        "bench/augmented.py:cifar100",
        (
            ("half", ""),
            ("--method rtn --bits 8", ""),
            ("--method rtn --bits 4", ""),
            (FEWER, "--epochs 30 --learning-rate 1e-3 --labels 0.3 --precision bf16"),
            (FEWER, "--epochs 13 --learning-rate 3e-4 --precision bf16"),
            (FEWER, "--epochs 30 --learning-rate 1e-3 --labels 0.3 --norms batch --precision bf16"),
            (FEWER, "--epochs 12 --learning-rate 1e-3 --mix 0.5 --norms batch --precision bf16"),
            (FEWER, "--epochs 4 --learning-rate 1e-3 --labels 0.3 --norms batch --precision bf16"),
            (FASTER, "--epochs 4 --learning-rate 1e-3 --labels 0.3 --norms batch --precision bf16"),
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
    """Sizes, numbers, multiplications and accuracies of files, as they come and finetuned."""
    head = "| network | settings | finetuned | numbers of all | of these layers | MACs | file bytes "
    head += "| top-1 before | after | tuned |"
    path = RESULTS / "factors-networks.md"
    for name in only or FILES:
        calibration, test, train, every = FILES[name]
        for settings, tuning in every:
            with tempfile.TemporaryDirectory() as folder:
                cells = line(zoo, (name, calibration, test, train), settings, tuning, Path(folder))
            row = f"| {' | '.join(cells)} |"
            print(row, flush=True)
            kept = path.read_text().splitlines()[2:] if path.exists() else []
            kept = [r for r in kept if r.split("|")[1:4] != row.split("|")[1:4]]
            path.write_text("\n".join([head, "|---|---|---|--:|--:|--:|--:|--:|--:|--:|", *kept, row]) + "\n")


def line(zoo: Path, names: tuple[str, str, str, str], settings: str, tuning: str, folder: Path) -> list[str]:
    """The cells of one."""
    name, calibration, test, train = names
    small, tuned = folder / "small.fw", folder / "tuned.fw"
    if settings == "half":
        x = half(zoo, name, test, folder / "half.safetensors")
        return [name, "`.half()`", "", "", "", "", f"{x['file_bytes']:,}", "", f"{x['after']:.2f}", ""]
    x = measure(zoo, name, calibration, test, settings, small)
    artifact, net = read(small), make_model(f"{zoo}:{name}")
    counts = {u.names[0]: numbers(u.weight) for u in artifact.units}
    all_, layers = (0, 0), (0, 0)  # numbers: dense, own
    for owner, module in net.named_modules():
        dense = own = 0
        for key, value in module.named_parameters(prefix=owner, recurse=False):
            dense, own = dense + value.numel(), own + counts.get(key, value.numel())
        all_ = all_[0] + dense, all_[1] + own
        layers = (layers[0] + dense, layers[1] + own) if own < dense else layers
    macs = f"{x['macs'] / x['dense_macs']:.1%}" if "macs" in x else ""
    fewer = [f"{dense / own:.2f}x fewer" if dense > own else "" for dense, own in (all_, layers)]
    cells = [*fewer, macs, f"{x['file_bytes']:,}", f"{x['before']:.2f}", f"{x['after']:.2f}"]
    if not tuning:
        return [name, f"`{settings}`", "", *cells, ""]
    command = [sys.executable, "-m", "featherweight", "finetune", str(small), "-o", str(tuned), "--json"]
    images = train if ":" in train else f"{zoo}:{train}"
    command += ["--model", f"{zoo}:{name}", "--train", images, "--test", f"{zoo}:{test}", *tuning.split()]
    done = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return [name, f"`{settings}`", f"`{tuning}`", *cells, f"{done['top1']:.2f}"]


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
