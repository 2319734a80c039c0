"""How much of fewer multiplications arrives as time: chains of layers beside the dense layers that they stand for.

    python -m bench.chains [--smoke] [--only conv vgg] [--rounds 9] [--seconds 0.3]

A 3x3 convolution of 256 to 256 channels on 28x28 positions, and a network shaped like VGG-16 (13 convolutions of 64 to
512 channels, 224x224 inputs, a mean and one linear layer at the end), with random weights, in forms of about two, three
and four times fewer multiply-adds, for one image and for 16. In torch, as it is and with channels last, and in
onnxruntime where that is installed (`pip install onnx onnxscript onnxruntime`). In every round all networks run one
after the other; a ratio is of two times of the same round. Writes bench/results/chains.json and chains.md.
"""

import argparse
import copy
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featherweight import chained, reuse_memory, scan
from featherweight.artifact import Artifact, StoredUnit
from featherweight.counting import counted
from featherweight.data import Batch
from featherweight.errors import UsageError
from featherweight.layers import Unit
from featherweight.stages import chain_of
from featherweight.weights import Dense, Factors
from featherweight.weights.factors import matrix_of

RESULTS = Path(__file__).parent / "results"
THREADS = 2
TIMES = (2, 3, 4)  # fewer multiply-adds
FORMS = {
    "spatial": ("oiyx", ("oxr", "riy")),
    "rows": ("oit", ("or", "rit")),
    "tucker": ("oit", ("or", "rst", "si")),
    "tensor ring": ("oit", ("zor", "rts", "siz")),
    "cp": ("oiyx", ("yr", "xr", "ir", "or")),
}
OF_NETWORKS = FORMS.keys() - {"tensor ring", "cp"}  # whose groups and depthwise links are slow, as the layer shows
ASKED = 0.7  # latency ratio / MAC ratio
WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: a maximum over 2x2


def convolution(side: int, channels: int) -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1)), (channels, side, side)


def vgg(side: int, share: int) -> tuple[nn.Module, tuple[int, ...]]:
    layers, channels = [], 3
    for width in WIDTHS:
        if width:
            layers += [nn.Conv2d(channels, width // share, 3, padding=1), nn.ReLU()]
            channels = width // share
        else:
            layers.append(nn.MaxPool2d(2))
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)
    return nn.Sequential(*layers, *head), (3, side, side)


def factors(unit: Unit, form: str, rank: int) -> Factors:
    """Random, as large as they must be for the outputs to be neither tiny nor huge."""
    outputs, inputs, kh, kw = unit.view.shape
    axes, terms = FORMS[form]
    sizes = {"o": outputs, "i": inputs, "t": kh * kw, "y": kh, "x": kw, "r": rank, "s": rank, "z": 2}
    parts = tuple(Dense(torch.randn(matrix_of(t, sizes)) / matrix_of(t, sizes)[1] ** 0.5) for t in terms)
    used = {k: n for k, n in sizes.items() if any(k in t for t in terms)}
    return Factors((outputs, inputs * kh * kw), axes, terms, used, parts)


def fitting(unit: Unit, form: str, times: float) -> Factors | None:
    """Of the largest rank whose chain multiplies so many times less; None where not even rank 1 does."""
    low, high = 0, 16 * unit.view.shape[0]
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if numbers(unit, form, middle) * times <= unit.params else (low, middle - 1)
    return factors(unit, form, low) if low else None


def numbers(unit: Unit, form: str, rank: int) -> float:
    """What one position of the chain costs; infinite where factors or chain are far larger than the layer."""
    try:
        chain = chain_of(factors(unit, form, rank), unit.view)
    except UsageError:
        return math.inf
    return math.inf if chain is None else chain.numbers


def decomposed(make: Callable[[], nn.Module], form: str, times: float) -> nn.Module:
    """The network with every convolution of at least 16 input channels in this form."""
    net = make()
    stored = []
    for unit in scan(net).units:
        if unit.kind == "conv" and unit.view.shape[1] >= 16 and (weight := fitting(unit, form, times)):
            stored.append(StoredUnit(unit.names, unit.view, weight, "random"))
    names = {n for u in stored for n in u.names}
    rest = {n: t for n, t in net.state_dict().items() if n not in names}
    return chained(net, Artifact(tuple(stored), rest, ()), only_if="always")


def multiplied(net: nn.Module, shape: Sequence[int]) -> int:
    return sum(counted(net, Batch((torch.randn(1, *shape),), {})).values())


# ---------------------------------------------------------------- runtimes
def in_torch(net: nn.Module, x: Tensor) -> Callable[[], Any]:
    return lambda: net(x)


def channels_last(net: nn.Module, x: Tensor) -> Callable[[], Any]:
    own, there = copy.deepcopy(net).to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)  # pyright: ignore
    return lambda: own(there)


def in_onnx(net: nn.Module, x: Tensor) -> Callable[[], Any]:
    import onnxruntime  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        torch.onnx.export(net, (x,), str(path), dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = THREADS, 1
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name, values = session.get_inputs()[0].name, x.numpy()
    with torch.no_grad():
        apart = (torch.from_numpy(session.run(None, {name: values})[0]) - net(x)).abs().max() / net(x).abs().max()
    assert apart < 1e-3, f"onnxruntime is {float(apart):.2g} off"
    return lambda: session.run(None, {name: values})


def runtimes() -> dict[str, Callable[[nn.Module, Tensor], Callable[[], Any]]]:
    found = {"torch": in_torch, "torch, channels last": channels_last}
    if all(find_spec(m) for m in ("onnx", "onnxscript", "onnxruntime")):
        found["onnxruntime"] = in_onnx
    return found


# ---------------------------------------------------------------- times
@torch.no_grad()
def timed(runs: Sequence[Callable[[], Any]], rounds: int, seconds: float) -> list[list[float]]:
    """Milliseconds of each in every round: the median of as many calls as fit in the seconds, at least one."""
    calls = []
    for run in runs:
        run()
        start = time.perf_counter()
        run()
        calls.append(max(1, min(int(seconds / (time.perf_counter() - start)), 50)))
    found: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds):
        for k in (*range(turn % len(runs), len(runs)), *range(turn % len(runs))):  # another one is first
            own = []
            for _ in range(calls[k]):
                start = time.perf_counter()
                runs[k]()
                own.append(1e3 * (time.perf_counter() - start))
            found[k].append(statistics.median(own))
    return found


def compared(
    what: str, forms: Sequence[str], make: Callable[[], nn.Module], shape: tuple[int, ...], batch: int, how: Any
) -> list[dict[str, Any]]:
    """A row for every form, ratio and runtime. how: rounds and seconds."""
    said = [(form, times) for form in forms for times in TIMES]
    torch.manual_seed(0)
    nets = [make().eval().requires_grad_(False), *(decomposed(make, *s).requires_grad_(False) for s in said)]
    macs = [multiplied(net, shape) for net in nets]
    x, rows = torch.randn(batch, *shape), []
    for runtime, prepared in runtimes().items():
        dense, *others = timed([prepared(net, x) for net in nets], *how)
        for (form, times), own, count in zip(said, others, macs[1:], strict=True):
            ratios = sorted(a / b for a, b in zip(dense, own, strict=True))
            fewer, ratio = macs[0] / count, statistics.median(ratios)
            rows.append(
                {"what": what, "batch": batch, "runtime": runtime, "form": form, "times": times, "macs": count}
                | {"dense_ms": statistics.median(dense), "ms": statistics.median(own), "fewer_macs": fewer}
                | {"faster": ratio, "lowest": ratios[0], "highest": ratios[-1], "arrives": ratio / fewer}
            )
            print(line(rows[-1]), flush=True)
    return rows


def line(r: dict[str, Any]) -> str:
    sizes = f"| {r['what']} | {r['batch']} | {r['runtime']} | {r['form']} | {r['fewer_macs']:.2f} |"
    times = f" {r['dense_ms']:.1f} | {r['ms']:.1f} | {r['faster']:.2f} ({r['lowest']:.2f} to {r['highest']:.2f}) |"
    return f"{sizes}{times} {r['arrives']:.2f} |"


def table(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    titles = (
        "| what | images | runtime | form | MACs, times fewer | dense, ms | chain, ms | times faster | of the MACs |"
    )
    lines = [titles, "|---|--:|---|---|--:|--:|--:|--:|--:|", *(line(r) for r in rows), ""]
    lines.append("times faster: median over rounds of the ratio within one, and the lowest and highest of them.")
    groups = dict.fromkeys((r["what"], r["batch"], r["runtime"]) for r in rows)
    for group in groups:
        own = [r for r in rows if (r["what"], r["batch"], r["runtime"]) == group]
        best = [max((r for r in own if r["times"] == t), key=lambda r: r["arrives"]) for t in TIMES]
        said = ", ".join(f"{b['arrives']:.2f} at {b['times']}x ({b['form']})" for b in best)
        met = "met" if min(b["arrives"] for b in best) >= ASKED else "NOT met"
        lines.append(f"\n{group[0]}, {group[1]} images, {group[2]}: the best form has {said}; {ASKED} asked: {met}.")
    lines.append("\n" + ", ".join(f"{k} {v}" for k, v in facts.items()) + ".")
    return "\n".join(lines) + "\n"


def facts() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    known = {"commit": commit, "processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    missing = [] if "onnxruntime" in runtimes() else ["onnxruntime was not installed"]
    return known | {"threads": THREADS, "torch": torch.__version__, "seed": 0} | dict.fromkeys(missing, "")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true", help="tiny networks, one round, nothing is written")
    parser.add_argument("--only", nargs="+", choices=("conv", "vgg"), default=("conv", "vgg"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each network, runtime and round, about")
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    reuse_memory()
    rounds, seconds = (1, 0.0) if given.smoke else (given.rounds, given.seconds)
    whats = {
        "conv": ("256 to 256, 3x3, on 28x28", tuple(FORMS), convolution, (8, 32) if given.smoke else (28, 256)),
        "vgg": ("VGG-16", tuple(f for f in FORMS if f in OF_NETWORKS), vgg, (32, 4) if given.smoke else (224, 1)),
    }
    rows = []
    for name in given.only:
        what, forms, build, sizes = whats[name]
        for batch in (1, 16) if not given.smoke else (1, 2):
            known = what, forms, lambda b=build, s=sizes: b(*s)[0], build(*sizes)[1]
            rows += compared(*known, batch, (rounds, seconds))
    if given.smoke:
        return 0
    text = table(rows, facts())
    print(text)
    (RESULTS / "chains.md").write_text(text)
    (RESULTS / "chains.json").write_text(json.dumps({"facts": facts(), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
