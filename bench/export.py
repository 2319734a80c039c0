"""ONNX files: their size beside the .fw file, whether they compute the same, and which methods they can hold.

    python -m bench.export [figures] [matrix] [--networks lstm_speech ...] [--zoo ../shared]

`figures`: networks of ../shared compressed as a user would, their ONNX files in onnxruntime on the whole test set.
`matrix`: every network with every method at quick settings (few samples, plain rounding where there is a choice); what
counts is whether the file is written, its bytes and how near its outputs are. Lines are kept as they come: a network
that is done is replaced when it is run again. Writes bench/results/export.json and export.md.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

import featherweight as fw
from featherweight.artifact import fill, write
from featherweight.data import Batch
from featherweight.errors import FeatherweightError
from featherweight.export.parity import in_onnxruntime
from featherweight.recipe import recipe_of

RESULTS = Path(__file__).parent / "results"
DATA = {
    "resnet20_cifar10": ("cifar10_calibration", "cifar10_test"),
    "resnet20_cifar100": ("cifar100_calibration", "cifar100_test"),
    "lstm_speech": ("speech_calibration", "speech_test"),
    "efficientnet_lite0": ("imagenet_calibration", "imagenet_val"),
}
FIGURES: list[tuple[str, dict[str, Any]]] = [
    ("resnet20_cifar10", {"method": "obq", "bits": 4}),
    ("resnet20_cifar10", {"method": "ecq", "bits": 1.8}),
    ("resnet20_cifar10", {"method": "additive", "bits": 2}),
    ("lstm_speech", {"method": "obq", "bits": 4}),
]
PRUNED = {"method": "magnitude", "sparsity": 0.5}
MATRIX: list[dict[str, Any]] = [
    *({"method": "rtn", "bits": b} for b in range(1, 9)),
    {"method": "rtn", "bits": 4, "symmetric": True},
    {"method": "rtn", "bits": 4, "group": 0},
    {"method": "rtn", "bits": 3, "group": 16},
    {"method": "gptq", "bits": 2},
    {"method": "obq", "bits": 4},
    {"method": "ecq", "bits": 1.8},
    {"method": "additive", "bits": 2},
    {"method": "additive", "bits": 3, "vector": 4, "books": 2},
    PRUNED,
    PRUNED | {"sparsity": 0.9},
    PRUNED | {"bits": 4, "quantizer": "gptq"},
    PRUNED | {"bits": 2, "quantizer": "additive"},
    *({"method": "magnitude", "pattern": p} for p in ("2:4", "4:8")),
    *(PRUNED | {"pattern": p} for p in ("blocks:4", "rows", "channels")),
    {"method": "magnitude", "pattern": "2:4", "bits": 4, "quantizer": "gptq"},
    *({"method": f, "keep": 0.5} for f in ("lowrank", "spatial", "tucker", "tt", "tr", "cp", "factors", "dictionary")),
    {"method": "lowrank", "keep": 0.5, "bits": 4},
    {"method": "rtn", "bits": 8, "activations": 8},
    {"method": "rtn", "bits": 4, "activations": 4},
]
SAMPLES = {"efficientnet_lite0": 16}  # of the matrix; else 64


@final
@dataclass(frozen=True, slots=True)
class Row:
    """coded, plain: bytes of the .fw file with and without entropy coding. onnx, tight: of the ONNX file, its codes as
    integers, or packed by frequency. refused: why there is none."""

    network: str
    settings: str
    coded: int = 0
    plain: int = 0
    onnx: int = 0
    tight: int = 0
    opset: int = 0
    difference: float | None = None
    here: float | None = None
    there: float | None = None
    stored: str = ""
    refused: str = ""


def label(settings: Mapping[str, Any]) -> str:
    return " ".join(f"--{k} {v}" if v is not True else f"--{k}" for k, v in settings.items())


def measured(zoo: Any, network: str, settings: dict[str, Any], whole: bool, folder: Path) -> Row:
    """One line. whole: all calibration data, and top-1 of the test set in torch and in onnxruntime."""
    model = getattr(zoo, network)()
    calibration, test = (getattr(zoo, d)() for d in DATA[network])
    count = SAMPLES.get(network, 64)
    inputs = calibration.tensors[0] if whole else calibration.tensors[0][:count]
    said, path, file = label(settings), folder / "net.onnx", folder / "net.fw"
    try:
        artifact = fw.compress(model, inputs, recipe=recipe_of(settings)).artifact
        example = Batch((calibration.tensors[0][:8],), {})
        packed = fw.export_onnx(artifact, model, example, path, tight=True) if whole else None
        found = fw.export_onnx(artifact, model, example, path)
    except FeatherweightError as error:
        return Row(network, said, refused=str(error))
    write(artifact, file)
    networks = [fill(model, artifact), in_onnxruntime(path)] if whole else []
    accuracy = [top1(run, test.tensors) for run in networks] or [None, None]
    forms = sorted({r.exported for r in found.rows})
    return Row(
        network,
        said,
        coded=file.stat().st_size,
        plain=found.file_bytes,
        onnx=found.bytes,
        tight=packed.bytes if packed else 0,
        opset=found.opset,
        difference=max(p.difference for p in found.parity),
        here=accuracy[0],
        there=accuracy[1],
        stored=", ".join(forms),
        refused="; ".join(f"{n}: {why}" for n, why in found.left.items()),
    )


@torch.no_grad()
def top1(run: Any, data: tuple[torch.Tensor, ...]) -> float:
    """Of a network, or of what runs a file: percent."""
    hits = 0
    for x, y in zip(data[0].split(250), data[1].split(250), strict=True):
        outputs = run(x) if isinstance(run, torch.nn.Module) else torch.from_numpy(run([x.numpy()])[0])
        hits += int((outputs.argmax(1) == y).sum())
    return 100 * hits / len(data[1])


def text(results: Mapping[str, Any]) -> str:
    """Both tables."""
    lines = [
        "Written by `python -m bench.export figures matrix`.",
        "",
        "ONNX beside our file, on the whole test set in onnxruntime with its own settings. Packed: codes of 2, 4 and 8",
        "bits in fewer where some are rarer (`--smallest`).",
        "",
        "| network | settings | .fw | not coded | ONNX | of that | packed | of .fw | opset | top-1 | there | off |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in results.get("figures", []):
        share = f"{r['onnx'] / r['plain']:.3f} | {r['tight']:,} | {r['tight'] / r['coded']:.3f}"
        top = f"{r['opset']} | {r['here']:.2f} | {r['there']:.2f} | {r['difference']:.1e}"
        sizes = f"{r['coded']:,} | {r['plain']:,} | {r['onnx']:,}"
        lines.append(f"| {r['network']} | `{r['settings']}` | {sizes} | {share} | {top} |")
    if not results.get("matrix"):
        return "\n".join(lines) + "\n"
    lines += [
        "",
        "Every network with every method, quick settings; the difference is the largest of an output, of the largest",
        "output, in onnxruntime.",
        "",
        "| network | settings | .fw, not coded | ONNX | ratio | opset | difference | kept as |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for r in (row for rows in results.get("matrix", {}).values() for row in rows):
        if not r["onnx"]:
            lines.append(f"| {r['network']} | `{r['settings']}` | | | | | | refused: {r['refused']} |")
            continue
        said = r["stored"] + (f"; {r['refused']}" if r["refused"] else "")
        sizes = f"{r['plain']:,} | {r['onnx']:,} | {r['onnx'] / r['plain']:.3f} | {r['opset']}"
        lines.append(f"| {r['network']} | `{r['settings']}` | {sizes} | {r['difference']:.1e} | {said} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="*", default=["figures", "matrix"], choices=["figures", "matrix"])
    parser.add_argument("--networks", nargs="*", default=list(DATA), choices=list(DATA))
    parser.add_argument("--zoo", type=Path, default=Path(__file__).parents[2] / "shared")
    asked = parser.parse_args()
    sys.path.insert(0, str(asked.zoo))
    import zoo  # pyright: ignore[reportMissingImports]

    fw.reuse_memory()
    path = RESULTS / "export.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:

        def run(network: str, settings: dict[str, Any], whole: bool) -> dict[str, Any]:
            start = time.perf_counter()
            row = measured(zoo, network, settings, whole, Path(folder))
            print(f"{time.perf_counter() - start:6.1f} s  {row}", flush=True)
            return {f: getattr(row, f) for f in Row.__slots__}

        def keep() -> None:
            path.write_text(json.dumps(results, indent=1) + "\n")
            (RESULTS / "export.md").write_text(text(results))

        if "figures" in asked.what:
            old = [r for r in results.get("figures", []) if r["network"] not in asked.networks]
            results["figures"] = old + [run(n, s, True) for n, s in FIGURES if n in asked.networks]
            keep()
        for network in asked.networks if "matrix" in asked.what else []:
            results.setdefault("matrix", {})[network] = [run(network, s, False) for s in MATRIX]
            keep()


if __name__ == "__main__":
    main()
