"""Entropy coding: what it saves, beside other coders; how fast it is; what counting its bits gains.

    python -m bench.coding rate coders speed lossless files [--only lstm_speech] [--zoo ../shared/zoo.py]

`rate`: every convolution of resnet20_cifar10: layer errors of OBQ, GPTQ, additive codes and entropy-constrained
quantization at equal coded bits, and what lambda does. `coders`: the same codes by other coders. `speed`: a file as
large as a ResNet-50. `lossless`: checkpoints beside zstd -19. `files`: what `--target` gives. The second and the fourth
need `pip install constriction zstandard`. Each part writes bench/results/coding-PART.md.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from bench.additive import Bed, read_timed, resnet50_shapes
from bench.networks import measure
from featherweight._pack import pack
from featherweight.artifact import Artifact, StoredUnit, read, write
from featherweight.artifact.write import to_bytes
from featherweight.coding import encode_integers
from featherweight.layers import View
from featherweight.lossless import pack as pack_checkpoint
from featherweight.methods import Additive, Ecq, Gptq, GridSpec, Obq, Vectors, ecq
from featherweight.methods.ecq import EcqStep
from featherweight.weights import Grid, books_of
from featherweight.weights.coded import stored_bytes

RESULTS = Path(__file__).parent / "results"
FILES = {  # network: calibration, test, targets
    "resnet20_cifar10": ("cifar10_calibration", "cifar10_test", ("95kB", "78kB", "71kB", "58kB", "45kB")),
    "resnet20_cifar100": ("cifar100_calibration", "cifar100_test", ("7.2x", "10x", "15.3x", "20x")),
    "lstm_speech": ("speech_calibration", "speech_test", ("8x", "12x", "16x")),
    "efficientnet_lite0": ("imagenet_calibration", "imagenet_val", ("10x", "13x")),
}
LEVELS = (2, 3)  # bits of the grids
RATES = (0.0, 0.05, 0.08, 0.11, 0.15)  # lambda over step²


def rate(zoo: Path) -> str:
    """At the bits that OBQ's codes take when they are coded, row scales included."""
    bed = Bed.of(zoo)
    units = [u for u in bed.units if u.kind == "conv"]
    lines = ["Share of the layer's output energy lost at equal bytes of the file, resnet20_cifar10.", ""]
    lines += ["| layer | bits a weight | gptq | obq | additive | ecq | of obq | of gptq | of additive |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    summary = []
    for level in LEVELS:
        vectors = Additive(Vectors(4, (8,)) if level == 2 else Vectors(3, (9,)))
        ratios: list[tuple[float, float, float]] = []
        for u in units:
            w, stats = bed.matrix(u), bed.stats[u.name]
            others = [m.solve(w, stats) for m in (Gptq(GridSpec(level)), Obq(GridSpec(level)), vectors)]
            shown = []
            for i, other in enumerate(others):
                size = 8 * stored_bytes(other.weight) / w.numel()
                if i == 2:  # books of the network, shared out over all its weights
                    books = 16 * sum(b.numel() for b in books_of(other.weight))
                    size += books / sum(x.params for x in units)
                ours = Ecq(round(size, 4)).solve(w, stats)
                shown.append((other.relative_error, ours.relative_error, size))
            ratios.append(tuple(ours / other for other, ours, _ in shown))  # pyright: ignore
            errors = " | ".join(f"{e:.3%}" for e, _, _ in shown)
            last = f"{ratios[-1][1]:.2f} | {ratios[-1][0]:.2f} | {ratios[-1][2]:.2f}"
            lines.append(f"| {u.name} | {shown[1][2]:.2f} | {errors} | {shown[1][1]:.3%} | {last} |")
        middle = [statistics.median(r[i] for r in ratios) for i in range(3)]
        said = f"median {middle[1]:.2f} of OBQ, {middle[0]:.2f} of GPTQ, {middle[2]:.2f} of additive codes"
        summary.append(f"{level} bits: {said}, each at the bytes of the other, its codes coded as well.")
    lines += ["", *summary, "", "Bits at equal error, all convolutions, against the lambda of this package:", ""]
    return "\n".join([*lines, *_lambdas(bed, units)]) + "\n"


def _lambdas(bed: Bed, units: list) -> list[str]:
    """Bits a weight more (+) or fewer that the same error takes: 6.02 dB are one bit."""
    table = ["| lambda / step² | step 0.5 | step 1.2 | step 2 |", "|--:|--:|--:|--:|"]
    found: dict[float, list[float]] = {}
    kept = ecq.RATE
    try:
        for value in RATES:
            ecq.RATE = value or 1e-9
            for step in (0.5, 1.2, 2.0):
                total, lost, count = 0, 0.0, 0
                for u in units:
                    w = bed.matrix(u)
                    solution = EcqStep(step).solve(w, bed.stats[u.name])
                    total, count = total + 8 * stored_bytes(solution.weight), count + w.numel()
                    lost += math.log2(solution.relative_error) / 2 / len(units)
                found.setdefault(value, []).append(total / count + lost)
    finally:
        ecq.RATE = kept
    for value, rows in found.items():
        cells = " | ".join(f"{x - y:+.3f}" for x, y in zip(rows, found[kept], strict=True))
        table.append(f"| {value:g} | {cells} |")
    return table


def coders(zoo: Path) -> str:
    """Codes of every weight of resnet20_cifar10, at four steps."""
    import constriction
    import zstandard  # pyright: ignore - no requirement of the package

    stream: Any = constriction.stream  # pyright: ignore - made by its extension
    bed = Bed.of(zoo)
    lines = ["Bits a weight, codes alone, all convolutions and the last layer of resnet20_cifar10.", ""]
    lines += ["| step | packed | zlib -9 | zstd -19 | constriction, a static model a layer, its table free | here |"]
    lines += ["|--:|--:|--:|--:|--:|--:|"]
    for step in (0.25, 0.7, 1.2, 2.0):
        sums = [0] * 5
        for u in bed.units:
            weight = EcqStep(step).solve(bed.matrix(u), bed.stats[u.name]).weight
            assert isinstance(weight, Grid)
            packed, codes = pack(weight.codes, weight.nbits), weight.codes.to(torch.int16) - 2 ** (weight.nbits - 1)
            raw = packed.numpy().tobytes()
            counts = np.bincount(weight.codes.numpy().ravel(), minlength=2**weight.nbits) + 1e-3
            model = stream.model.Categorical(counts / counts.sum(), perfect=False)
            coder = stream.queue.RangeEncoder()
            coder.encode(weight.codes.numpy().ravel().astype(np.int32), model)
            own = encode_integers(codes, 2 ** (weight.nbits - 1))
            assert own is not None
            best = min(len(zlib.compress(weight.codes.numpy().tobytes(), 9)), len(zlib.compress(raw, 9)))
            squeezed = zstandard.ZstdCompressor(level=19)
            zstd = min(len(squeezed.compress(x)) for x in (raw, weight.codes.numpy().tobytes()))
            for i, size in enumerate((len(raw), best, zstd, coder.num_bits() // 8, len(own))):
                sums[i] += size
        weights = sum(u.params for u in bed.units)
        lines.append(f"| {step:g} | {' | '.join(f'{8 * x / weights:.3f}' for x in sums)} |")
    return "\n".join(lines) + "\n"


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def speed(_zoo: Path) -> str:
    """Codes drawn from a rounded Gaussian, at three steps."""
    shapes, rng = resnet50_shapes(), torch.Generator().manual_seed(0)
    weights = sum(rows * cols for rows, cols in shapes)
    table = [
        "| step | bits a weight | file bytes | write, s | read and check, s | decode to float32, s | read + decode |"
    ]
    table += ["|--:|--:|--:|--:|--:|--:|--:|"]
    for step in (0.5, 1.2, 2.0):
        units = []
        for i, (rows, cols) in enumerate(shapes):
            codes = torch.round(torch.randn(rows, cols, generator=rng) / step).clamp(-16, 15)
            weight = Grid((codes + 16).to(torch.uint8), torch.full((1, 1), 0.01).half(), None, 5, 0)
            units.append(StoredUnit((f"l{i}.weight",), View((rows, cols)), weight, "ecq"))
        size, writing, reading, decode = read_timed(Artifact(tuple(units), {}, ()))
        cells = f"{step:g} | {8 * size / weights:.2f} | {size:,} | {writing:.1f}"
        table.append(f"| {cells} | {reading:.2f} | {decode:.2f} | {reading + decode:.2f} |")
        print(table[-1], flush=True)
    said = f"{weights:,} weights in {len(shapes)} layers, {torch.get_num_threads()} threads, median of 3 for reading."
    return "\n".join([*table, "", f"{said} Writing reads the file once to check it."]) + "\n"


def lossless(zoo: Path) -> str:
    """Every tensor of a checkpoint, in three types."""
    import zstandard  # pyright: ignore - no requirement of the package

    table = ["| checkpoint | type | bytes | zstd -19 | here | of zstd | pack, s | unpack, s |"]
    table += ["|---|---|--:|--:|--:|--:|--:|--:|"]
    for file in sorted((zoo.parent / "models").glob("*.safetensors")):
        tensors = {n: t for n, t in load_file(file).items() if t.is_floating_point()}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            own = {n: t.to(dtype) for n, t in tensors.items()}
            raw = b"".join(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in own.values())
            zstd = len(zstandard.ZstdCompressor(level=19).compress(raw))
            artifact = pack_checkpoint(own)
            packing = timed(lambda a=artifact: to_bytes(a))
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "packed.fw"
                size = write(artifact, path)
                unpacking = timed(lambda p=path: read(p))
            kind = str(dtype).removeprefix("torch.")
            cells = f"{file.stem} | {kind} | {len(raw):,} | {zstd:,} | {size:,} | {size / zstd:.2f}"
            table.append(f"| {cells} | {packing:.2f} | {unpacking:.2f} |")
    return (
        "\n".join([*table, "", "The files hold names and shapes, too; zstd's bytes are those of the numbers alone."])
        + "\n"
    )


def files(zoo: Path, only: list[str] | None) -> None:
    """Files of `compress --target`, each read back in a fresh process; a network's lines replace its old ones."""
    store = RESULTS / "coding-files.json"
    kept = json.loads(store.read_text()) if store.exists() else []
    for name in only or FILES:
        calibration, test, targets = FILES[name]
        kept = [x for x in kept if x["network"] != name]
        with tempfile.TemporaryDirectory() as folder:
            for target in targets:
                settings = f"--target {target} --database {folder}/solved"
                line = measure(zoo, name, calibration, test, settings, Path(folder) / "small.fw")
                keys = ("network", "fp32_bytes", "half_bytes", "int8_bytes", "file_bytes", "before", "after")
                kept.append({k: line[k] for k in (*keys, "compress_s")} | {"target": target})
                print(kept[-1], flush=True)
                kept.sort(key=lambda x: (list(FILES).index(x["network"]), -x["file_bytes"]))
                store.write_text(json.dumps(kept, indent=1) + "\n")
                (RESULTS / "coding-files.md").write_text(table_of(kept))


def table_of(lines: list[dict[str, Any]]) -> str:
    """Markdown."""
    rows = [
        "| network | settings | file bytes | of fp32 | top-1 before | after | time |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for x in lines:
        size = f"{x['file_bytes']:,} | {x['file_bytes'] / x['fp32_bytes']:.1%}"
        shown = f"{x['network']} | `--target {x['target']}` | {size} | {x['before']:.2f} | {x['after']:.2f}"
        rows.append(f"| {shown} | {x['compress_s']:.0f} s |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parts = {"rate": rate, "coders": coders, "speed": speed, "lossless": lossless}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=(*parts, "files"))
    parser.add_argument("--only", choices=FILES, action="append", help="of files")
    parser.add_argument("--zoo", type=Path, default=Path(__file__).parents[2] / "shared" / "zoo.py")
    options = parser.parse_args()
    for part in options.parts:
        if part == "files":
            files(options.zoo, options.only)
            continue
        found = parts[part](options.zoo)
        (RESULTS / f"coding-{part}.md").write_text(found)
        print(found, flush=True)


if __name__ == "__main__":
    main()
