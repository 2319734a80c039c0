"""Networks in int8 in onnxruntime, beside their own float32, onnxruntime's quantizer and NNCF's.

    python -m bench.speed files FOLDER [--only NETWORK] [--zoo ../shared/zoo.py] [--nncf PYTHON]
    python -m bench.speed scores FOLDER [--only NETWORK] [--zoo ../shared/zoo.py]
    python -m bench.speed times FOLDER [--only NETWORK]

`files` makes everything and then, as `scores` does alone, measures accuracy, the share of images that get the class
that float32 gives, and the mean divergence from float32's distribution over classes, which tells more than accuracy
does where there are few images. Where a network has a target for latency, run `files` with OMP_NUM_THREADS=2 and
nothing else beside it. The files: a .fw by `featherweight compress --for speed`, its int8 graph by `featherweight
export`, the dense network as ONNX, what quantize_static makes of that after its pre-processing with each of its three
ways to set ranges (QDQ, a scale for every channel, uint8 and int8), and what nncf.quantize makes of it. NNCF runs in an
interpreter of its own that has nncf, onnx and onnxruntime. `times` runs them in turns on two threads, for one image and
for 32, and writes bench/results/speed.json and speed.md; nothing else should run meanwhile.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from bench.allocate import zoo as networks_and_data
from featherweight.data import Batch
from featherweight.export.graph import doubled, graph_of, quiet
from featherweight.export.parity import in_onnxruntime
from featherweight.race import in_turns, quantize_static

RESULTS = Path(__file__).parent / "results"
THREADS = 2
CALIBRATION = 256  # samples, for all
NETWORKS: dict[str, dict[str, Any]] = {  # what is asked: times faster than fp32 at a batch size, least top-1
    "efficientnet_lite0": {
        "data": "imagenet_calibration",
        "test": "imagenet_val",
        "settings": "--batch-size 32",
        "faster": {1: 2.1},
        "top1": 66.9,
    },
    "resnet20_cifar10": {
        "data": "cifar10_calibration",
        "test": "cifar10_test",
        "settings": "",
        "faster": {1: 1.0, 32: 1.0},
        "top1": 91.6,
    },
    "resnet20_cifar100": {
        "data": "cifar100_calibration",
        "test": "cifar100_test",
        "settings": "--target-latency 0.43x --latency-batch 32",
        "faster": {32: 2.2},
        "top1": 68.69,
    },
}
WAYS = ("MinMax", "Entropy", "Percentile")
DENSE, OURS = "float32", "featherweight"
SCORES = ("top1", "same", "divergence")
NNCF = """
import sys, numpy as np, onnx, nncf
dense, data, out = sys.argv[1:]
model, images = onnx.load(dense), np.load(data)
name = model.graph.input[0].name
feeds = nncf.Dataset([images[i : i + 1] for i in range(len(images))], lambda x: {name: x})
quantize = lambda fast: nncf.quantize(model, feeds, subset_size=len(images), fast_bias_correction=fast)
try:
    made = quantize(False)
except Exception as error:  # its own graph of part of the network does not load, for some networks
    print("NNCF: exact correction of biases failed, its fast one is taken:", error)
    made = quantize(True)
onnx.save(made, out)
"""


def command(*parts: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "featherweight", *parts, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"featherweight {' '.join(parts)}\n{done.stderr}")
    return json.loads(done.stdout)


def files(name: str, folder: Path, zoo: Path, nncf: str | None) -> None:
    """Make all files of a network, and keep what is measured of them in FOLDER/NETWORK.json."""
    network, place = NETWORKS[name], folder / name
    place.mkdir(parents=True, exist_ok=True)
    shared = networks_and_data(zoo)
    images = getattr(shared, network["data"])().tensors[0][:CALIBRATION]
    inputs = getattr(shared, network["test"])().tensors[0]
    spec, data, test = (f"{zoo}:{n}" for n in (name, network["data"], network["test"]))
    small = place / "small.fw"
    made = command(
        *("compress", spec, "--for", "speed", "--data", data, "--test", test, "-o", str(small)),
        *network["settings"].split(),
    )
    exported = command("export", str(small), str(place / f"{OURS}.onnx"), "--model", spec, "--data", data)
    dense = place / f"{DENSE}.onnx"
    with quiet():
        dense.write_bytes(graph_of(getattr(shared, name)(), doubled(Batch((images[:2],), {}))).SerializeToString())
    for way in WAYS:
        quantize_static(
            dense,
            place / f"quantize_static {way}.onnx",
            [[x.numpy()] for x in images.split(32)],
            way,
        )
    if nncf is not None:
        np.save(place / "images.npy", images.numpy())
        out = str(place / "NNCF.onnx")
        subprocess.run([nncf, "-c", NNCF, str(dense), str(place / "images.npy"), out], check=True, stdout=sys.stderr)
    facts = {
        "torch": {"before": made["before"]["top1"], "after": made["after"]["top1"]},
        "bytes": {f.name: f.stat().st_size for f in (small, *sorted(place.glob("*.onnx")))},
        "exported": exported,
        "shape": list(inputs.shape[1:]),
    }
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    scores(name, folder, zoo)


def scores(name: str, folder: Path, zoo: Path) -> None:
    """What every file's outputs are worth, added to FOLDER/NETWORK.json."""
    inputs, labels = getattr(networks_and_data(zoo), NETWORKS[name]["test"])().tensors
    found: dict[str, Any] = {"top1": {}, "same": {}, "divergence": {}}
    paths = sorted((folder / name).glob("*.onnx"))
    dense = outputs(folder / name / f"{DENSE}.onnx", inputs)
    for file in paths:
        own = outputs(file, inputs)
        found["top1"][file.stem] = 100 * float((own.argmax(1) == labels).double().mean())
        found["same"][file.stem] = 100 * float((own.argmax(1) == dense.argmax(1)).double().mean())
        found["divergence"][file.stem] = float((dense.exp() * (dense - own)).sum(1).mean())
        print(f"{name} {file.stem}: {', '.join(f'{k} {v[file.stem]:.4g}' for k, v in found.items())}", flush=True)
    place = folder / f"{name}.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | found, indent=1) + "\n")


def outputs(file: Path, inputs: torch.Tensor) -> torch.Tensor:
    """Logarithms of the probabilities of the classes, float64 (samples, classes)."""
    run = in_onnxruntime(file)
    return torch.from_numpy(np.concatenate([run([x.numpy()])[0] for x in inputs.split(50)])).double().log_softmax(1)


def operators(path: Path, shape: list[int], folder: Path) -> dict[str, int]:
    """What onnxruntime really runs, counted in its profile of one call."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = THREADS, True
    options.profile_file_prefix, options.log_severity_level = str(folder / "profile"), 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session.run(None, {session.get_inputs()[0].name: np.zeros((1, *shape), np.float32)})
    profile = Path(session.end_profiling())
    events = json.loads(profile.read_text())
    profile.unlink()
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    return dict(Counter(e["args"]["op_name"] for e in kernels).most_common())


def times(name: str, folder: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """One network's files in turns."""
    facts = json.loads((folder / f"{name}.json").read_text())
    paths = {f.stem: f for f in sorted((folder / name).glob("*.onnx"))}
    quantizers = [n for n in paths if n.startswith("quantize_static")]
    best = max(quantizers, key=lambda n: facts["top1"][n])  # they differ in ranges, not in what is computed
    chosen = {DENSE: paths[DENSE], OURS: paths[OURS], best: paths[best]}
    chosen |= {"NNCF": paths["NNCF"]} if "NNCF" in paths else {}
    rows = []
    for batch in (1, 32):
        x = torch.randn(batch, *facts["shape"], generator=torch.Generator().manual_seed(0)).numpy()
        loaded = [in_onnxruntime(path) for path in chosen.values()]
        runs = [lambda run=run, x=x: run([x]) for run in loaded]
        found = dict(zip(chosen, in_turns(runs, rounds, seconds), strict=True))
        for what, own in found.items():
            ratios = sorted(a / b for a, b in zip(found[DENSE], own, strict=True))
            against = sorted(a / b for a, b in zip(own, found[OURS], strict=True))
            rows.append(
                {"batch": batch, "what": what, "ms": statistics.median(own), "lowest": min(own), "highest": max(own)}
                | {"faster": statistics.median(ratios), "faster_lowest": ratios[0], "faster_highest": ratios[-1]}
                | {"ours_faster": statistics.median(against)}
                | {k: facts[k][what] for k in SCORES}
            )
            print(line(name, rows[-1]), flush=True)
    ran = {what: operators(path, facts["shape"], folder) for what, path in chosen.items()}
    return {"rows": rows, "operators": ran} | {k: facts[k] for k in (*SCORES, "torch", "bytes")}


def line(name: str, r: dict[str, Any]) -> str:
    spread = f"{r['faster']:.2f} ({r['faster_lowest']:.2f} to {r['faster_highest']:.2f})"
    known = f"{r['top1']:.2f} | {r['same']:.1f} % | {r['divergence']:.4f}"
    return f"| {name} | {r['batch']} | {r['what']} | {r['ms']:.3f} | {spread} | {r['ours_faster']:.2f} | {known} |"


def table(results: dict[str, Any], facts: dict[str, Any]) -> str:
    head = "network | images | what | ms | times faster than float32 | time of ours | top-1 | same class | divergence"
    lines = [f"| {head} |", "|---|--:|---|--:|--:|--:|--:|--:|--:|"]
    lines += [line(name, r) for name, found in results.items() for r in found["rows"]]
    lines.append("\ntimes faster: median over rounds of the ratio within one, and the lowest and highest of them.")
    lines.append("time of ours: this one's time as a multiple of featherweight's, likewise.\n")
    for name, found in results.items():
        for batch, least in NETWORKS[name]["faster"].items():
            own = {r["what"]: r for r in found["rows"] if r["batch"] == batch}
            ours, others = own[OURS], [r for w, r in own.items() if w not in (DENSE, OURS)]
            met = "met" if ours["faster"] >= least else "NOT met"
            lines.append(f"- {name}, {batch}: {ours['faster']:.2f} times faster, {least} asked: {met}.")
            slowest = min(r["ours_faster"] for r in others)
            lines.append(f"  Against the fastest of the others {slowest:.2f} times their speed.")
        top, least = found["top1"], NETWORKS[name]["top1"]
        met = "met" if round(top[OURS], 2) >= least else "NOT met"
        others = ", ".join(f"{what} {value:.2f}" for what, value in top.items() if what != OURS)
        lines.append(f"- {name}: top-1 {top[OURS]:.2f}, {least} asked: {met}; {others}.")
        ran = ", ".join(f"{count} {op}" for op, count in found["operators"][OURS].items())
        lines.append(f"- {name}: onnxruntime runs {ran}.")
    lines.append("\n" + ", ".join(f"{k} {v}" for k, v in facts.items()) + ".")
    return "\n".join(lines) + "\n"


def facts_of_run() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    known = {"commit": commit, "processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    return known | {"threads": THREADS, "torch": torch.__version__, "onnxruntime": onnxruntime.__version__}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("files", "scores", "times"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=tuple(NETWORKS), default=tuple(NETWORKS))
    parser.add_argument("--zoo", type=Path, default=Path("../shared/zoo.py"))
    parser.add_argument("--nncf", help="an interpreter with nncf, onnx and onnxruntime")
    parser.add_argument("--rounds", type=int, default=75)
    parser.add_argument("--seconds", type=float, default=0.15, help="of each file and round, about")
    given = parser.parse_args()
    if given.what == "files":
        for name in given.only:
            files(name, given.folder, given.zoo.resolve(), given.nncf)
        return 0
    if given.what == "scores":
        for name in given.only:
            scores(name, given.folder, given.zoo.resolve())
        return 0
    torch.set_num_threads(THREADS)
    results = {name: times(name, given.folder, given.rounds, given.seconds) for name in given.only}
    facts = facts_of_run()
    text = table(results, facts)
    print(text)
    (RESULTS / "speed.md").write_text(text)
    (RESULTS / "speed.json").write_text(json.dumps({"facts": facts, "networks": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
