"""Additive codes: layer errors against scalar grids, what each part of the solver gains, and encoding time.

    python -m bench.additive layers ablation speed decoding networks finetuned [--only resnet20_cifar10] [--zoo FILE]

`layers`: every convolution of resnet20_cifar10 at 2 and 3 bits, books shared by the network and their bytes counted.
`ablation`: the same network at 2 bits, one part of the solver after another; the books of the network, a stage or a
layer, at about equal bytes; lengths of vectors and numbers of books. `speed`: seconds a million weights, beside the
residual and local-search quantizers of faiss on the same vectors (needs `pip install faiss-cpu`). `decoding`: a file
as large as a ResNet-50. `networks`: files of the command; `finetuned`: files under a target, then trained towards the
dense network. Each part writes bench/results/additive-PART.md; the last two keep the lines that they do not measure.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.networks import measure
from featherweight import reuse_memory
from featherweight.artifact import read, write
from featherweight.artifact.schema import Artifact, StoredUnit
from featherweight.data import Batch, batches
from featherweight.layers import Unit, View, scan
from featherweight.methods import Additive, Gptq, GridSpec, Obq, Vectors
from featherweight.methods.books import Books, fit, vectors_of
from featherweight.methods.vectors import Layer, descend, encode, first_codes, fitted, nearest, power
from featherweight.metrics import accuracy
from featherweight.repair import repair
from featherweight.stats import LayerStats, capture
from featherweight.userland import call, make_model
from featherweight.weights import Codebook

RESULTS = Path(__file__).parent / "results"
NETWORK, CALIBRATION, TEST = "resnet20_cifar10", "cifar10_calibration", "cifar10_test"
FILES = {
    "resnet20_cifar10": (
        CALIBRATION,
        TEST,
        (
            "--method additive --bits 2 --sequential",
            "--method additive --bits 2.5 --sequential",
            "--method additive --bits 3 --sequential",
            "--sparsity 0.5 --bits 3 --method obs --quantizer additive --sequential",
            "--target 78kB",
            "--target 95kB",
        ),
    ),
    "lstm_speech": (
        "speech_calibration",
        "speech_test",
        ("--method additive --bits 3", "--method additive --bits 3 --sequential"),
    ),
    "efficientnet_lite0": (
        "imagenet_calibration",
        "imagenet_val",
        ("--method additive --bits 3 --sequential",),
    ),
}


TUNED = {  # network: (calibration, test, training data, (target, epochs, other settings of `finetune`) ...)
    "resnet20_cifar10": (CALIBRATION, TEST, "cifar10_train10k", (("71kB", 10, "--learning-rate 3e-3 --move-codes"),)),
    "resnet20_cifar100": (
        "cifar100_calibration",
        "cifar100_test",
        "cifar100_train",
        (
            ("15.3x", 15, "--learning-rate 3e-3 --move-codes"),
            ("7.2x", 0, ""),
            ("7.2x", 10, "--learning-rate 1e-3 --labels 0.1 --move-codes"),
        ),
    ),
}


@dataclass(frozen=True)
class Bed:
    """The network, the weights that vectors are made of, and their statistics."""

    net: nn.Module
    samples: list[Batch]
    test: list[Batch]
    units: list[Unit]
    stats: dict[str, LayerStats]

    @classmethod
    def of(cls, zoo: Path) -> "Bed":
        net = make_model(f"{zoo}:{NETWORK}").requires_grad_(False)
        samples, test = batches(call(f"{zoo}:{CALIBRATION}")), batches(call(f"{zoo}:{TEST}"), 500)
        units = [u for u in scan(net).units if u.name != "conv1.weight"]
        return cls(net, samples, test, units, capture(net, samples, units))

    def matrix(self, unit: Unit) -> Tensor:
        return unit.view.matrix(self.net.get_parameter(unit.name).detach())

    def layers(self, method: Additive, units: Sequence[Unit], white: bool = False) -> list[Layer]:
        found = []
        for u in units:
            w = self.matrix(u)
            stats = LayerStats.white(w.shape[1], u.groups, u.taps) if white else self.stats[u.name]
            found.append(method.layer(w, w, stats)[0])
        return found

    def outcome(self, decoded: dict[str, Tensor]) -> tuple[float, float]:
        """Mean relative error of the layers, and top-1 after correction with the first convolution at 8 bits."""
        small, errors = copy.deepcopy(self.net), []
        for u in self.units:
            w, layer = self.matrix(u), self.layers(Additive(Vectors(1, (1,))), [u])[0]
            errors.append(float(layer.energy(decoded[u.name] - w).sum() / layer.energy(w.double()).sum()))
            small.get_parameter(u.name).copy_(u.view.tensor(decoded[u.name].float()))
        first = self.net.get_parameter("conv1.weight").detach()
        rounded = Gptq(GridSpec(8)).solve(first.flatten(1), LayerStats.white(27)).weight.dense()
        small.get_parameter("conv1.weight").copy_(rounded.reshape(first.shape))
        repair(self.net, small, self.samples, scan(self.net).units)
        return statistics.mean(errors), accuracy(small, self.test)["top1"]


def layers(bed: Bed) -> str:
    """Errors of every convolution."""
    convolutions = [u for u in bed.units if u.kind == "conv"]
    weights = sum(u.params for u in convolutions)
    rows = [f"Share of the layer's output energy lost, {NETWORK}; bits with scales, zeros and books in fp16.", ""]
    rows += ["| layer | bits | gptq | obq | additive | of obq | of gptq |", "|---|--:|--:|--:|--:|--:|--:|"]
    verdict = []
    for bits in (2, 3):
        cut = vectors_of(bits, weights)
        method = Additive(cut)
        method = replace(method, books=fit(bed.layers(method, convolutions), cut))
        over_obq, over_gptq, stored = [], [], {"grid": 0.0, "additive": float(cut.storage)}
        for unit in convolutions:
            w = bed.matrix(unit)
            three = [m.solve(w, bed.stats[unit.name]) for m in (Gptq(GridSpec(bits)), Obq(GridSpec(bits)), method)]
            gptq, obq, own = (s.relative_error for s in three)
            over_obq.append(own / obq)
            over_gptq.append(own / gptq)
            stored["grid"] += three[1].weight.bits() / 8
            stored["additive"] += three[2].weight.bits() / 8
            rows.append(
                f"| {unit.name} | {bits} | {gptq:.3%} | {obq:.3%} | {own:.3%} | "
                f"{over_obq[-1]:.2f} | {over_gptq[-1]:.2f} |"
            )
        spent = ", ".join(f"{k} {8 * v / weights:.3f}" for k, v in stored.items())
        verdict.append(
            f"{bits} bits ({method.label}): median {statistics.median(over_obq):.3f} of OBQ, "
            f"{statistics.median(over_gptq):.3f} of GPTQ; bits a weight in all: {spent}."
        )
    return "\n".join([*rows, "", *verdict]) + "\n"


def parts(bed: Bed) -> list[str]:
    """One part of the solver after another."""
    cut = Vectors(4, (8,))
    method = Additive(cut)
    white, real = bed.layers(method, bed.units, white=True), bed.layers(method, bed.units)
    plain = fit(white, cut)
    rows = ["| what | mean error | top-1 | seconds |", "|---|--:|--:|--:|"]

    def line(what: str, make: Callable[[Layer], Tensor], chosen: Sequence[Layer]) -> None:
        start = time.perf_counter()
        found = {u.name: make(layer) for u, layer in zip(bed.units, chosen, strict=True)}
        took = time.perf_counter() - start
        error, top1 = bed.outcome(found)
        rows.append(f"| {what} | {error:.3%} | {top1:.2f} | {took:.1f} |")
        print(rows[-1], flush=True)

    def weights_alone(layer: Layer) -> Tensor:
        scale, codes = encode(layer, plain.words, 1, torch.float16)
        return layer.decoded(scale, codes, plain.words)

    def nearest_words(layer: Layer) -> Tensor:
        codes = nearest(layer, power(layer), plain.words)
        return layer.decoded(fitted(layer, power(layer), plain.words, codes), codes, plain.words)

    def fed_back(books: Books, width: int) -> Callable[[Layer], Tensor]:
        def make(layer: Layer) -> Tensor:
            codes = first_codes(layer, power(layer), books.words, width)
            return layer.decoded(fitted(layer, power(layer), books.words, codes), codes, books.words)

        return make

    def descended(layer: Layer) -> Tensor:
        scale = power(layer)
        codes = descend(layer, scale, plain.words, first_codes(layer, scale, plain.words, 8))
        return layer.decoded(fitted(layer, scale, plain.words, codes), codes, plain.words)

    def whole(books: Books) -> Callable[[Layer], Tensor]:
        def make(layer: Layer) -> Tensor:
            scale, codes = encode(layer, books.words, 8, torch.float16)
            return layer.decoded(scale, codes, books.words)

        return make

    line("books and words by the weights alone", weights_alone, white)
    line("nearest words, scales by the outputs", nearest_words, real)
    line("+ error feedback", fed_back(plain, 1), real)
    line("+ 8 beginnings kept", fed_back(plain, 8), real)
    line("+ descent", descended, real)
    line("+ scales and words in turns", whole(plain), real)
    line("+ books by the outputs, all layers together", whole(fit(real, cut)), real)
    return rows


def sharing(bed: Bed) -> list[str]:
    """The same method with books for the network, each stage, each layer; and other ways to cut."""
    rows = ["| books | vectors | bytes of the weights | mean error | top-1 |", "|---|---|--:|--:|--:|"]

    def line(what: str, cut: Vectors, groups: list[list[Unit]]) -> None:
        decoded, stored = {}, 0
        for group in groups:
            method = Additive(cut)
            method = replace(method, books=fit(bed.layers(method, group), cut))
            stored += cut.storage
            for u in group:
                solution = method.solve(bed.matrix(u), bed.stats[u.name])
                decoded[u.name] = solution.weight.dense().double()
                stored += solution.weight.bits() // 8
        error, top1 = bed.outcome(decoded)
        name = f"{'+'.join(map(str, cut.bits))} bits in {cut.d}{' channels' if cut.channels else ''}"
        rows.append(f"| {what} | {name} | {stored:,} | {error:.3%} | {top1:.2f} |")
        print(rows[-1], flush=True)

    stages: dict[str, list[Unit]] = {}
    for u in bed.units:
        stages.setdefault(u.name.partition(".")[0], []).append(u)
    alone = [[u] for u in bed.units]
    line("the network's", Vectors(4, (8,)), [bed.units])
    line("a stage's", Vectors(4, (8,)), list(stages.values()))
    line("a stage's", Vectors(3, (6,)), list(stages.values()))
    line("a layer's", Vectors(4, (8,)), alone)
    line("a layer's", Vectors(2, (4,)), alone)
    for cut in (
        Vectors(4, (8,), channels=True),
        Vectors(2, (4,)),
        Vectors(3, (6,)),
        Vectors(6, (6, 6)),
        Vectors(8, (8, 8)),
        Vectors(4, (4, 4)),
    ):
        line("the network's", cut, [bed.units])
    return rows


def speed(bed: Bed) -> str:
    """Beside faiss, which looks at the weights alone."""
    import faiss

    cut = Vectors(8, (8, 8))
    method = Additive(cut, width=1)
    chosen = bed.layers(method, bed.units)
    weights = sum(x.w.numel() for x in chosen)
    rows = ["| quantizer | fit, s | encode, s a million weights | error of the weights | of the outputs |"]
    rows.append("|---|--:|--:|--:|--:|")
    scaled = [x.entries(x.w / power(x)[:, None]).reshape(-1, cut.d) for x in chosen]
    flat = torch.cat(scaled).float().contiguous().numpy()

    def errors(decoded: list[Tensor]) -> tuple[float, float]:
        plain = statistics.mean(
            float((q - x.w).square().sum() / x.w.square().sum()) for q, x in zip(decoded, chosen, strict=True)
        )
        outputs = statistics.mean(
            float(x.energy(q - x.w).sum() / x.energy(x.w).sum()) for q, x in zip(decoded, chosen, strict=True)
        )
        return plain, outputs

    def line(name: str, fit_s: float, encode_s: float, decoded: list[Tensor]) -> None:
        plain, outputs = errors(decoded)
        rows.append(f"| {name} | {fit_s:.1f} | {encode_s / weights * 1e6:.1f} | {plain:.2%} | {outputs:.2%} |")
        print(rows[-1], flush=True)

    def by_faiss(name: str, quantizer: Any) -> None:
        start = time.perf_counter()
        quantizer.train(flat)
        middle = time.perf_counter()
        found = torch.from_numpy(quantizer.decode(quantizer.compute_codes(flat))).double()
        end = time.perf_counter()
        pieces = found.split([len(s) for s in scaled])
        decoded = [x.matrix(p.reshape(len(x.w), -1) * power(x)[:, None]) for x, p in zip(chosen, pieces, strict=True)]
        line(name, middle - start, end - middle, decoded)

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    encode(chosen[0], fit(chosen[:1], Vectors(8, (2, 2))).words, 1, torch.float16)  # compiled
    for width in (1, 8):
        start = time.perf_counter()
        books = fit(chosen, cut)
        middle = time.perf_counter()
        own = [(x, *encode(x, books.words, width, torch.float16)) for x in chosen]
        end = time.perf_counter()
        line(
            f"featherweight, width {width}",
            middle - start,
            end - middle,
            [x.decoded(s, c, books.words) for x, s, c in own],
        )
    by_faiss("faiss ResidualQuantizer", faiss.ResidualQuantizer(cut.d, len(cut.bits), cut.bits[0]))
    by_faiss("faiss LocalSearchQuantizer", faiss.LocalSearchQuantizer(cut.d, len(cut.bits), cut.bits[0]))
    rows += ["", f"{weights:,} weights of {NETWORK}, 2 books of 256 words of 8 weights, one thread, one run."]
    return "\n".join(rows) + "\n"


def resnet50_shapes() -> list[tuple[int, int]]:
    """Rows and columns of every weight of a ResNet-50."""
    shapes, channels = [(64, 147)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(blocks):
            shapes += [(width, channels), (width, 9 * width), (4 * width, width)]
            shapes += [(4 * width, channels)] if i == 0 else []
            channels = 4 * width
    return [*shapes, (1000, 2048)]


def read_timed(artifact: Artifact) -> tuple[int, float, float, float]:
    """Bytes of the file, seconds to write it, to read and check it, and to decode it: medians of 3 for the last two."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.fw"
        start = time.perf_counter()
        size = write(artifact, path)
        writing, times = time.perf_counter() - start, []
        for _ in range(3):
            start = time.perf_counter()
            found = read(path)
            middle = time.perf_counter()
            found.state()
            times.append((middle - start, time.perf_counter() - middle))
    return size, writing, *sorted(times, key=sum)[1]


def decoding() -> str:
    """A file with as many weights as ResNet-50 has, codes and books at random: read, checked and decoded."""
    shapes = resnet50_shapes()
    weights = sum(rows * cols for rows, cols in shapes)
    table = ["| books | file bytes | read and check, s | decode, s | together |", "|---|--:|--:|--:|--:|"]
    rng = torch.Generator().manual_seed(0)
    for d, widths in ((4, (8,)), (4, (9,)), (4, (12,)), (8, (8, 8))):
        books = tuple(torch.randn(2**n, d, generator=rng).half() for n in widths)
        units = []
        for i, (rows, cols) in enumerate(shapes):
            own = [torch.randint(2**n, (rows, -(-cols // d)), generator=rng) for n in widths]
            scale = torch.rand(rows, 1, generator=rng).half()
            weight = Codebook(torch.stack(own, dim=2).to(torch.int16), books, scale, cols)
            units.append(StoredUnit((f"l{i}.weight",), View((rows, cols)), weight, "additive"))
        size, _, reading, decode = read_timed(Artifact(tuple(units), {}, ()))
        what = "+".join(map(str, widths))
        table.append(f"| {what} bits in {d} | {size:,} | {reading:.2f} | {decode:.2f} | {reading + decode:.2f} |")
        print(table[-1], flush=True)
    table += ["", f"{weights:,} weights in {len(shapes)} layers, {torch.get_num_threads()} threads, median of 3."]
    return "\n".join(table) + "\n"


def networks(zoo: Path, only: list[str] | None) -> None:
    head = [
        "| network | settings | file bytes | smaller | top-1 before | after | time |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name in only or FILES:
            calibration, test, every = FILES[name]
            for settings in every:
                x = measure(zoo, name, calibration, test, settings, Path(folder) / "small.fw")
                row = (
                    f"| {name} | `{settings}` | {x['file_bytes']:,} | {x['fp32_bytes'] / x['file_bytes']:.1f}x | "
                    f"{x['before']:.2f} | {x['after']:.2f} | {x['compress_s']:.0f} s |"
                )
                print(row, flush=True)
                keep_row("networks", head, row)


def finetuned(zoo: Path, only: list[str] | None, folder: Path) -> None:
    """A file under a target, then the same file finetuned. What `folder` has of an earlier run is not done again."""
    head = ["| network | target | file bytes | smaller | top-1 before | file | trained | finetuned | bytes | time |"]
    head.append("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name in only or TUNED:
        calibration, test, train, every = TUNED[name]
        for target, epochs, settings in every:
            small, tuned = folder / f"{name}-{target}.fw", folder / f"{name}-{target}-tuned.fw"
            x = once(small, partial(measure, zoo, name, calibration, test, f"--target {target}", small))
            known = f"| {name} | {target} | {x['file_bytes']:,} | {x['fp32_bytes'] / x['file_bytes']:.1f}x "
            known += f"| {x['before']:.2f} | {x['after']:.2f} |"
            if epochs == 0:
                keep_row("finetuned", head, f"{known} not at all | - | - | {x['compress_s']:.0f} s |", (1, 2, 7))
                continue
            command = [sys.executable, "-m", "featherweight", "finetune", str(small), "-o", str(tuned), "--json"]
            command += ["--model", f"{zoo}:{name}", "--train", f"{zoo}:{train}", "--test", f"{zoo}:{test}"]
            command += ["--epochs", str(epochs), "--precision", "bf16", *settings.split()]
            command += ["--checkpoint", str(tuned.with_suffix(".part"))]
            done = once(tuned, partial(answer, command))
            row = (
                f"{known} {epochs} epochs of {train}, `{settings}` | "
                f"{done['top1']:.2f} | {tuned.stat().st_size:,} | {x['compress_s']:.0f} + {done['seconds']:.0f} s |"
            )
            print(row, flush=True)
            keep_row("finetuned", head, row, (1, 2, 7))


def answer(command: list[str]) -> dict[str, Any]:
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def once(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was found when `file` was made, kept beside it."""
    known = file.with_suffix(".json")
    if not (file.exists() and known.exists()):
        known.write_text(json.dumps(make()))
    return json.loads(known.read_text())


def keep_row(part: str, head: list[str], row: str, cells: tuple[int, ...] = (1, 2)) -> None:
    """Put a line into a table, in place of the one with the same `cells`, counted from 1."""
    path = RESULTS / f"additive-{part}.md"
    kept = path.read_text().splitlines()[2:] if path.exists() else []
    write_table(
        part,
        "\n".join([*head, *(r for r in kept if any(r.split("|")[i] != row.split("|")[i] for i in cells)), row]) + "\n",
    )


def write_table(part: str, text: str) -> None:
    (RESULTS / f"additive-{part}.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="+", choices=("layers", "ablation", "speed", "decoding", "networks", "finetuned")
    )
    parser.add_argument("--only", action="append", help="networks of `networks` and `finetuned`")
    parser.add_argument("--folder", type=Path, help="where files of `finetuned` are kept, so that a killed run goes on")
    parser.add_argument("--zoo", type=Path, default=Path(__file__).parents[2] / "shared" / "zoo.py")
    options = parser.parse_args()
    if "networks" in options.parts:
        networks(options.zoo, options.only)
    if "finetuned" in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            finetuned(options.zoo, options.only, options.folder or Path(folder))
    if "decoding" in options.parts:
        write_table("decoding", decoding())
    rest = [p for p in options.parts if p not in ("decoding", "networks", "finetuned")]
    bed = Bed.of(options.zoo) if rest else None
    for part in rest:
        assert bed is not None
        made = {"layers": layers, "speed": speed, "ablation": lambda b: "\n".join([*parts(b), "", *sharing(b)]) + "\n"}
        text = made[part](bed)
        print(text)
        write_table(part, text)


if __name__ == "__main__":
    reuse_memory()
    main()
    sys.exit(0)
