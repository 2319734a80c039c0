"""What training by ADMM gains over decomposing at once, at the same number of epochs.

    python -m bench.admm [--form tt] [--keep 0.4] [--epochs 15] [--tune 15] [--zoo ../shared/zoo.py] [--state folder]
                         [--way admm|direct] [--norms kept|batch]

resnet20_cifar100: (a) trained by ADMM for --epochs, given its form, finetuned for --tune; (b) given the form at once,
finetuned for the sum of both. Both with the same forms and ranks, the same teacher (the network as it was), share of
labels, precision, and flipped and shifted training images. The first convolution, the shortcuts and the last layer are
left as they are, as in the paper. Writes a line each to bench/results/admm.json and .md, and admm-FORM.png with the
residuals. --way takes one of the two. With --state a run that was stopped goes on. --smoke takes 256 images: that it
runs, nothing else.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import featherweight as fw
from bench.allocate import zoo
from bench.augmented import Augmented
from featherweight.artifact import Artifact, fill
from featherweight.counting import dense_macs, macs_of, places, single
from featherweight.data import Batch, batches
from featherweight.metrics import accuracy
from featherweight.picture import save_residuals
from featherweight.recipe import assign, recipe_of
from featherweight.target import baselines

RESULTS = Path(__file__).parent / "results"
NETWORK, CALIBRATION, TRAIN, TEST = "resnet20_cifar100", "cifar100_calibration", "cifar100_train", "cifar100_test"
EXCLUDE = ["conv1.weight", "*shortcut*", "linear.weight"]
FACTORS = ("lowrank", "spatial", "tucker", "tt", "tr", "cp", "factors")


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The recipe, as a file would have it."""
    common = {"method": options.form, "exclude": EXCLUDE}
    if options.form in FACTORS:
        return common | {"keep": options.keep}
    return common | {"sparsity": round(1 - options.keep, 6)}  # a pruner


def top1(net: nn.Module, test: Any) -> float:
    return round(accuracy(net, test)["top1"], 2)


def macs(artifact: Artifact, net: nn.Module, batch: Batch) -> float:
    """Multiply-adds of the dense weights over those of the file's, factors as a chain of layers."""
    units = fw.scan(net).units
    calls = places(net, single(batch), [u.name.rpartition(".")[0] for u in units])
    stored = {u.names[0]: u.weight for u in artifact.units}
    dense = own = 0
    for unit in units:
        there = calls[unit.name.rpartition(".")[0]]
        whole = dense_macs(unit.view, unit.kind, there)
        dense += whole
        own += macs_of(stored[unit.name], unit.view, unit.kind, there) if unit.name in stored else whole
    return round(dense / own, 3)


def numbers(artifact: Artifact, net: nn.Module) -> float:
    """Numbers of the dense network over those that the file holds for it; of a pruned weight those kept."""
    kept = sum(t.numel() for t in artifact.rest.values()) + sum(2 * n.scale.numel() for n in artifact.norms)
    for unit in artifact.units:
        kept += sum(t.numel() for t in unit.weight.tensors().values() if t.is_floating_point())
    return round(sum(p.numel() for p in net.parameters()) / kept, 3)


def finish(
    name: str, start: nn.Module, epochs: int, data: Any, common: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Give the network `start` its form and finetune that towards the network of the zoo."""
    module = zoo(options.zoo)
    dense, test = getattr(module, NETWORK)(), batches(getattr(module, TEST)(), 500)
    test = test[:1] if options.smoke else test
    small = fw.compress(start, getattr(module, CALIBRATION)(), recipe=recipe_of(settings(options)))
    place = None if options.state is None else options.state / f"{name}-tuning"
    tuned = fw.finetune(small.artifact, dense, fw.Finetune(data, epochs, checkpoint=place, **common), told)
    return {
        "numbers": numbers(small.artifact, dense),
        "macs": macs(small.artifact, dense, test[0]),
        "fp32_bytes": baselines(dense, fw.scan(dense).units).fp32,
        "file_bytes": small.report.file_bytes,
        "decomposed": top1(fill(getattr(module, NETWORK)(), small.artifact), test),
        "tuned": top1(fill(getattr(module, NETWORK)(), tuned.artifact), test),
        "losses": tuned.trained.losses,
    }


def told(stage: str, done: int, total: int) -> None:
    if done % 100 == 0:
        print(f"{time.strftime('%H:%M:%S')} {stage} {done} of {total}", flush=True)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The two lines."""
    module = zoo(options.zoo)
    dense, train = getattr(module, NETWORK)(), getattr(module, CALIBRATION if options.smoke else TRAIN)()
    train = TensorDataset(*(t[:256] for t in train.tensors)) if options.smoke else train
    data = Augmented(train) if options.augment else train
    test = batches(getattr(module, TEST)(), 500)[: 1 if options.smoke else None]
    common = {"precision": options.precision, "labels": options.labels, "batch_size": 128}
    common |= {"learning_rate": options.learning_rate, "mix": options.mix, "norms": options.norms}
    pulling = common | {"learning_rate": options.admm_rate}
    known = {"network": NETWORK, "form": options.form, "keep": options.keep, "labels": options.labels}
    known |= {"learning_rate": options.learning_rate, "admm_rate": options.admm_rate, "mix": options.mix}
    known |= {"norms": options.norms}
    known |= {"before": top1(dense, test)}
    start = time.perf_counter()
    recipe = recipe_of(settings(options))
    methods = assign(recipe, fw.scan(dense, exclude=recipe.exclude))
    if options.way == "direct":
        return [direct(dense, data, common, known, options)]
    place = None if options.state is None else options.state / "admm"
    how = fw.AdmmTraining(data, options.epochs, options.rho, step=options.step, checkpoint=place, **pulling)
    net, pulled = fw.admm(dense, methods, how, told)
    if not options.smoke:
        save_residuals(pulled, RESULTS / f"admm-{options.form}.png")
    trained = top1(net, test)
    print(f"dense {known['before']}, trained by ADMM {trained}", flush=True)
    found = finish("admm", net, options.tune, data, common, options)
    spent = {"epochs": [options.epochs, options.tune], "seconds": round(time.perf_counter() - start)}
    detail = {"rho": options.rho, "step": options.step, "primal": pulled.primal, "dual": pulled.dual}
    lines = [known | spent | {"way": "ADMM", "trained": trained} | found | detail]
    print({k: v for k, v in lines[0].items() if k not in ("primal", "dual")}, flush=True)
    return lines if options.way == "admm" else [*lines, direct(dense, data, common, known, options)]


def direct(
    dense: nn.Module, data: Any, common: dict[str, Any], known: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """The control."""
    start, both = time.perf_counter(), options.epochs + options.tune
    found = finish("direct", dense, both, data, common, options)
    line = known | {"epochs": [0, both], "seconds": round(time.perf_counter() - start), "way": "direct"} | found
    print(line, flush=True)
    return line


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = "| form | way | norms | epochs | numbers | multiplications | file bytes "
    rows = [head + "| dense, trained | decomposed | finetuned |"]
    rows.append("|---|---|---|---|--:|--:|--:|--:|--:|--:|")
    for x in lines:
        epochs = " + ".join(str(n) for n in x["epochs"] if n)
        trained = f"{x['trained']:.2f}" if "trained" in x else f"({x['before']:.2f})"
        cells = [
            f"{x['form']} {x['keep']:g}",
            x["way"],
            x["norms"],
            epochs,
            f"{x['numbers']:.2f}x fewer",
            f"{x['macs']:.2f}x fewer",
        ]
        cells += [f"{x['file_bytes']:,}", trained, f"{x['decomposed']:.2f}", f"{x['tuned']:.2f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", default="tt", help="method of a recipe: a form of factors, or a pruner")
    parser.add_argument("--keep", type=float, default=0.4, help="share of the numbers of a weight that is left")
    parser.add_argument("--epochs", type=int, default=15, help="of training by ADMM")
    parser.add_argument("--tune", type=int, default=15, help="of finetuning after it")
    parser.add_argument("--rho", type=float, default=fw.AdmmTraining(None).rho)
    parser.add_argument("--step", type=float, default=fw.AdmmTraining(None).step)
    parser.add_argument("--way", choices=("admm", "direct"), help="this one alone")
    parser.add_argument("--learning-rate", type=float, default=fw.Finetune(None).learning_rate)
    rate = fw.AdmmTraining(None).learning_rate
    parser.add_argument("--admm-rate", type=float, default=rate, help="learning rate of the epochs of ADMM")
    parser.add_argument("--labels", type=float, default=0.3)
    parser.add_argument("--mix", type=float, default=0.0, help="share of the samples that are mixed; without labels")
    parser.add_argument("--norms", default="kept", choices=("kept", "batch"))
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--plain", dest="augment", action="store_false", help="images as they are")
    parser.add_argument("--state", type=Path, help="folder for checkpoints")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--zoo", type=Path, default=Path(__file__).parents[2] / "shared" / "zoo.py")
    options = parser.parse_args()
    if options.state is not None:
        options.state.mkdir(parents=True, exist_ok=True)
    lines = measure(options)
    if options.smoke:
        print(table(lines))
        return
    store = RESULTS / "admm.json"
    kept = json.loads(store.read_text())["lines"] if store.exists() else []
    same = [line_of(x) for x in lines]
    kept = sorted([*(x for x in kept if line_of(x) not in same), *lines], key=line_of)
    content = {"machine": f"{torch.get_num_threads()} threads, torch {torch.__version__}", "lines": kept}
    store.write_text(json.dumps(content, indent=1) + "\n")
    (RESULTS / "admm.md").write_text(table(kept))


def line_of(line: dict[str, Any]) -> tuple[str, float, int, str, str]:
    """What a line is about."""
    return line["form"], line["keep"], sum(line["epochs"]), line["way"], line["norms"]


if __name__ == "__main__":
    main()
