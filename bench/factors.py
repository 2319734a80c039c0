"""Forms of factors beside each other.

    python -m bench.factors errors [--zoo ../shared/zoo.py]

`errors`: every convolution of resnet20_cifar10 in every form that stores at most 0.35, 0.5 and 0.7 of its numbers: the
share of the layer's output energy that is lost, with factors found without data and with the layer's inputs. Written to
bench/results/factors-errors.md.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

from featherweight import reuse_memory
from featherweight.data import batches
from featherweight.layers import scan
from featherweight.methods import Factorize
from featherweight.methods.forms import FORMS, form_at
from featherweight.stats import capture
from featherweight.userland import call, make_model

RESULTS = Path(__file__).parent / "results"
NETWORK, CALIBRATION = "resnet20_cifar10", "cifar10_calibration"
SHARES = (0.35, 0.5, 0.7)


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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="+", choices=["errors"])
    parser.add_argument("--zoo", type=Path, default=Path("../shared/zoo.py"))
    given = parser.parse_args()
    reuse_memory()
    torch.set_num_threads(1)
    for part in given.parts:
        (RESULTS / f"factors-{part}.md").write_text({"errors": errors}[part](given.zoo))


if __name__ == "__main__":
    main()
