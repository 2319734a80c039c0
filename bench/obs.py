"""Optimal Brain Compression: how much faster than the algorithm as published, how it grows, and which masks are better.

    python -m bench.obs [--smoke] [--only speed growth resnet18 masks] [--zoo ../shared/zoo.py]

`speed` compares with bench/plain.py in the same run; its layers have random weights, and inputs correlated like those
behind a ReLU. Writes bench/results/obs.json and obs.md (a run of some parts keeps the others). `--smoke` runs the
smallest comparison, within a minute, and writes nothing.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import plain
from featherweight import Gptq, GridSpec, Obq, Obs, Unstructured, capture, scan
from featherweight._linalg import damped, inverse_factor
from featherweight.data import batches
from featherweight.layers import Unit
from featherweight.methods import NM, Admm, Pattern, Prune
from featherweight.methods import obq as obq_module
from featherweight.methods.base import output_energy
from featherweight.methods.grids import choose
from featherweight.methods.patterns import keep_largest
from featherweight.methods.pruning import refit
from featherweight.methods.traces import trace
from featherweight.recipe import settled
from featherweight.stats import LayerStats
from featherweight.userland import call, make_model

RESULTS = Path(__file__).parent / "results"
LEVELS = [1 - 0.9**i for i in range(44)] + [0.99]  # the paper's: density times 0.9 a level
DAMP = 0.01


def layer(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """(weights (rows, cols) float32, damped Hessian (cols, cols) float64)."""
    make = torch.Generator().manual_seed(rows + cols)
    mixing = torch.randn(cols, cols, generator=make) / cols**0.5
    x = torch.relu(torch.randn(2 * cols, cols, generator=make) @ mixing + 0.3)
    return torch.randn(rows, cols, generator=make), damped((x.T @ x / len(x)).double(), DAMP)


def best_of(times: int, run: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds of the fastest run, what it gave), after one that compiles and fills caches."""
    found, seconds = run(), []
    for _ in range(times):
        start = time.perf_counter()
        found = run()
        seconds.append(time.perf_counter() - start)
    return min(seconds), found


def exact_obs(rows: int, cols: int, part: int) -> dict[str, Any]:
    """A full trace of all rows, against the plain one of `part` rows."""
    w, hessian = layer(rows, cols)
    inverse = torch.linalg.inv(hessian).float()
    ours, found = best_of(5, lambda: trace(w, inverse, cols))
    start = time.perf_counter()
    _, losses = plain.prune_trace(w[:part], inverse)
    theirs = time.perf_counter() - start
    apart = float((found.losses[:part].sum() / losses.double().sum() - 1).abs())
    half = float((found.losses[:part, : cols // 2].sum() / losses[:, : cols // 2].double().sum() - 1).abs())
    return {
        "what": f"ExactOBS {rows}x{cols}",
        "ours_s": ours,
        "plain_s": theirs * rows / part,
        "measured_rows": part,
        "ratio": theirs * rows / part / ours,
        "loss_apart": max(apart, half),
    }


def quantization(rows: int, cols: int, part: int) -> dict[str, Any]:
    """OBQ at 3 bits: the greedy loop against the plain one, losses in the metric of the layer."""
    w, hessian = layer(rows, cols)
    points = choose(w.double(), GridSpec(3))
    scale, zero = points.scale.float(), (torch.zeros(1) if points.zero is None else points.zero).float()
    ours, codes = best_of(5, lambda: obq_module.greedy(w.double(), hessian[None], points, dtype=torch.float32))
    start = time.perf_counter()
    found = plain.quantize(w[:part], torch.linalg.inv(hessian).float(), scale[:part], zero[:part], 7)
    theirs = time.perf_counter() - start
    stats = LayerStats(hessian[None], torch.zeros(1, cols).double(), torch.ones(1, dtype=torch.int64))
    mine = points.grid(codes).dense()[:part]
    losses = [output_energy((v - w[:part]).double(), stats) for v in (mine, found)]
    return {
        "what": f"OBQ 3 bit {rows}x{cols}",
        "ours_s": ours,
        "plain_s": theirs * rows / part,
        "measured_rows": part,
        "ratio": theirs * rows / part / ours,
        "loss_apart": abs(losses[0] / losses[1] - 1),
    }


def grown(rows: int, cols: int, sparsity: float) -> dict[str, Any]:
    """One layer from weights and moments to its pruned form, in a process of its own for its peak memory."""
    w, hessian = layer(rows, cols)
    stats = LayerStats(hessian[None], torch.zeros(1, cols).double(), torch.ones(1, dtype=torch.int64))
    Obs(Unstructured(sparsity), DAMP).solve(w[:1], stats)  # compiles
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    solution = Obs(Unstructured(sparsity), DAMP).solve(w, stats)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = solution.relative_error
    return {"rows": rows, "cols": cols, "seconds": seconds, "peak_gb": peak / 2**20, "had_gb": before / 2**20} | {
        "error": error
    }


def sparsegpt(w: Tensor, hessian: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """(mask, weights) of SparseGPT (2301.00774): in blocks of 128 columns (m for N:M) by w² / U_ii², each block's
    error moved onto the columns behind it, U the upper Cholesky factor of the inverse."""
    _, upper = inverse_factor(torch.linalg.cholesky(hessian))
    diag, w, keep = upper.diagonal(), w.clone(), torch.ones(w.shape, dtype=torch.bool)
    width = pattern.m if isinstance(pattern, NM) else 128
    for first in range(0, w.shape[1], width):
        here = slice(first, min(first + width, w.shape[1]))
        keep[:, here] = keep_largest((w[:, here] / diag[here]) ** 2, pattern, 1, 1)
        for i in range(here.start, here.stop):
            error = torch.where(keep[:, i], 0.0, w[:, i]) / diag[i]
            w[:, i:] -= error[:, None] * upper[i, i:]
    return keep, torch.where(keep, w, 0.0)


def ways(pattern: Pattern) -> list[Obs | Admm]:
    return [Obs(pattern), Admm(pattern, exchange=False), Admm(pattern)]


def masks(zoo: Path) -> list[dict[str, Any]]:
    """Relative errors on every layer of resnet20_cifar100, of masks with their exact weights, and of SparseGPT."""
    model = make_model(f"{zoo}:resnet20_cifar100")
    units = scan(model).units
    stats = capture(model, batches(call(f"{zoo}:cifar100_calibration")), units)
    lines = []
    for unit in units:
        w, own = unit.view.matrix(model.get_parameter(unit.name).detach()).double(), stats[unit.name]
        whole = output_energy(w, own)
        for pattern in (Unstructured(0.5), Unstructured(0.7), NM(2, 4)):
            hessian = damped(own.gram, 0.001)
            taps = torch.arange(w.shape[1]).reshape(-1, unit.taps).T.reshape(-1)  # channels side by side
            back = taps.argsort()
            ours = {m.label.split(f" {pattern.label}")[0]: m.prune(w, own).weights for m in ways(pattern)}
            keep, own_weights = (t[:, back] for t in sparsegpt(w[:, taps], hessian[0][taps][:, taps], pattern))
            ours |= {"sparsegpt": own_weights, "sparsegpt mask": refit(w, hessian, keep)}
            errors = {name: output_energy(v - w, own) / whole for name, v in ours.items()}
            lines.append({"layer": unit.name, "pattern": pattern.label} | errors)
    return lines


def small_network(zoo: Path) -> dict[str, Any]:
    """All traces of resnet20_cifar10, then its 45 levels."""
    model = make_model(f"{zoo}:resnet20_cifar10")
    units = scan(model).units
    stats = capture(model, batches(call(f"{zoo}:cifar10_calibration")), units)
    layers = [(unit.view.matrix(model.get_parameter(unit.name).detach()), stats[unit.name]) for unit in units]
    top = [Obs(Unstructured(LEVELS[-1]))]

    def traces() -> None:
        for w, own in layers:
            top[0].trace(w, own)

    seconds, _ = best_of(3, traces)
    start = time.perf_counter()
    for w, own in layers:
        top[0].levels(w, own, [Unstructured(s) for s in LEVELS])
    return {"layers": len(layers), "traces_s": seconds, "levels_s": time.perf_counter() - start, "levels": len(LEVELS)}


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + self.short(x))


def resnet18() -> nn.Module:
    """The geometry of ResNet-18 for small images, random weights."""
    torch.manual_seed(0)
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [_Block(a, b, 2 if b > a else 1) for a, b in pairwise(widths)]
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)).eval()


def large_network() -> dict[str, Any]:
    """4-bit GPTQ, 50 % pruning as the program does it, and 3-bit OBQ on a ResNet-18-shaped network, 1,024 images. Of
    layers of one shape one is solved, and counted as often as there are."""
    model = resnet18()
    units = scan(model).units
    images = torch.randn(1024, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = {"layers": len(units), "weights": sum(u.params for u in units)}
    start = time.perf_counter()
    stats = capture(model, batches(images), units)
    found["capture_s"] = time.perf_counter() - start
    shapes: dict[tuple[int, int], list[Unit]] = {}
    for unit in units:
        shapes.setdefault(unit.view.matrix_shape, []).append(unit)
    for method in (Gptq(GridSpec(4)), Prune(Unstructured(0.5)), Obq(GridSpec(3))):
        found[f"{method.label}_s"] = 0.0
        for unit, *others in shapes.values():
            start = time.perf_counter()
            settled(method, unit).solve(unit.view.matrix(model.get_parameter(unit.name).detach()), stats[unit.name])
            found[f"{method.label}_s"] += (time.perf_counter() - start) * (1 + len(others))
        print(f"{method.label}: {found[f'{method.label}_s']:.0f} s", flush=True)
    return found | {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def alone(expression: str) -> Any:
    """The value of an expression of this module, in a process of its own."""
    code = f"import json; from bench import obs; print('RESULT' + json.dumps(obs.{expression}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.split("RESULT")[1])


def tables(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [f"Measured on {found['machine']}.", ""]
    if "speed" in found:
        lines += ["| | ours | plain | rows of it measured | faster | losses apart |", "|---|--:|--:|--:|--:|--:|"]
        lines += [
            f"| {x['what']} | {x['ours_s']:.3f} s | {x['plain_s']:.0f} s | {x['measured_rows']} | {x['ratio']:.0f} x | "
            f"{x['loss_apart']:.1e} |"
            for x in found["speed"]
        ]
        lines.append("")
    if "growth" in found:
        lines += ["| ExactOBS to 70 %, with its refit | time | peak memory | error |", "|---|--:|--:|--:|"]
        lines += [
            f"| {x['rows']} x {x['cols']} | {x['seconds']:.1f} s | {x['peak_gb']:.2f} GB | {x['error']:.3%} |"
            for x in found["growth"]
        ]
        lines.append("")
    if "resnet20" in found:
        x = found["resnet20"]
        lines += [
            f"All {x['layers']} layers of resnet20_cifar10: the traces take {x['traces_s']:.2f} s, "
            f"{x['levels']} levels of all of them with their exact weights {x['levels_s']:.1f} s.",
            "",
        ]
    if "resnet18" in found:
        x = found["resnet18"]
        lines += [f"ResNet-18-shaped, {x['weights']:,} weights in {x['layers']} layers, 1,024 images of 32 x 32:", ""]
        lines += ["| step | minutes |", "|---|--:|"]
        lines += [f"| {k[:-2]} | {v / 60:.1f} |" for k, v in x.items() if k.endswith("_s")]
        lines += [
            "",
            "Of layers of one shape one was solved, and counted as often as there are. Those of 4,608 columns",
        ]
        lines += ["are pruned by ADMM alone, without exchanges, as `plan` shows."]
        lines += ["", f"Peak memory {x['peak_gb']:.1f} GB.", ""]
    if "masks" in found:
        kinds = [k for k in found["masks"][0] if k not in ("layer", "pattern")]
        lines += [
            "Share of the output energy lost on resnet20_cifar100, all masks with their exact weights; `sparsegpt` is "
            "that method with its own:",
            "",
        ]
        lines += [f"| layer | pattern | {' | '.join(kinds)} | admm, exchange / obs |"]
        lines += ["|---|---|" + "--:|" * (len(kinds) + 1)]
        lines += [
            f"| {x['layer']} | {x['pattern']} | {' | '.join(f'{x[k]:.4%}' for k in kinds)} | "
            f"{x['admm, exchange'] / x['obs']:.3f} |"
            for x in found["masks"]
        ]
        worst = max(x["admm, exchange"] / x["obs"] for x in found["masks"])
        lines += ["", f"admm, exchange / obs is at most {worst:.3f}.", ""]
        for ours in kinds[:3]:
            for theirs in kinds[3:]:
                below = sum(x[ours] < x[theirs] for x in found["masks"])
                lines.append(f"- {ours} is below {theirs} on {below} of {len(found['masks'])}")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ("speed", "growth", "resnet20", "resnet18", "masks")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", choices=parts, nargs="+", default=parts)
    parser.add_argument("--zoo", type=Path, default=Path(__file__).parents[2] / "shared" / "zoo.py")
    options = parser.parse_args()
    if options.smoke:
        line = exact_obs(64, 576, part=64)
        print(f"{line['what']}: {line['ratio']:.0f} x ({line['plain_s']:.1f} s -> {line['ours_s']:.3f} s)")
        return
    RESULTS.mkdir(exist_ok=True)
    store = RESULTS / "obs.json"
    found = json.loads(store.read_text()) if store.exists() else {}
    found["machine"] = (
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    )
    runs: dict[str, Callable[[], Any]] = {
        "speed": lambda: [exact_obs(64, 576, 64), exact_obs(128, 1152, 32), quantization(64, 576, 64)],
        "growth": lambda: [
            alone(f"grown({rows}, {cols}, 0.7)") for rows, cols in ((64, 576), (128, 1152), (256, 2304), (512, 4608))
        ],
        "resnet20": lambda: small_network(options.zoo),
        "resnet18": lambda: alone("large_network()"),
        "masks": lambda: masks(options.zoo),
    }
    for part in options.only:
        found[part] = runs[part]()
        store.write_text(json.dumps(found, indent=1) + "\n")
        (RESULTS / "obs.md").write_text(tables(found))
        print(part, "done", flush=True)
    print(tables(found))


if __name__ == "__main__":
    main()
