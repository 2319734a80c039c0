"""Bytes at equal accuracy beside the ISO/IEC 15938-17 coder, NNCodec 2.1.3 with its own defaults.

    python -m bench.nncodec [--python /path/to/environment/bin/python] [--only lstm_speech] [--zoo ../shared/zoo.py]

NNCodec needs an environment of its own: `pip install torch==2.14.1 torchvision==0.29.1 nncodec==2.1.3`, and pillow,
safetensors and the packages of the zoo. For every network: NNCodec at six qp, and ours at SHARE of its bytes at three
of them, nothing trained by either. Sizes are whole files, accuracies of what was read back. Each line is kept as it
comes: bench/results/nncodec.json, .md and .png. Without --python the lines that are
there are taken, and what is missing of ours is added.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bench.allocate import zoo
from bench.networks import measure
from featherweight.data import batches
from featherweight.metrics import accuracy

RESULTS = Path(__file__).parent / "results"
QPS = (-30, -26, -24, -22, -20, -18)
SHARE = 0.69  # a little less than the 0.7 that is compared with
DATA = {  # network: calibration, test, the three qp
    "resnet20_cifar10": ("cifar10_calibration", "cifar10_test", (-24, -20, -18)),
    "resnet20_cifar100": ("cifar100_calibration", "cifar100_test", (-26, -22, -18)),
    "lstm_speech": ("speech_calibration", "speech_test", (-26, -22, -18)),
    "efficientnet_lite0": ("imagenet_calibration", "imagenet_val", (-26, -24, -22)),
}


def theirs(python: Path, path: Path, name: str) -> list[dict[str, Any]]:
    """Bytes, seconds and top-1 at every qp."""
    module, (_, test, _) = zoo(path), DATA[name]
    data = batches(getattr(module, test)(), 250)
    with tempfile.TemporaryDirectory() as folder:
        child = Path(__file__).with_name("nncodec_child.py")
        command = [str(python), "-P", str(child), str(path.resolve()), name, folder]
        done = subprocess.run([*command, *map(str, QPS)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        for line in lines:
            net = getattr(module, name)()
            own = net.state_dict()
            tensors = load_file(Path(folder) / f"{line['qp']}.safetensors")
            net.load_state_dict({n: t.reshape(own[n].shape) for n, t in tensors.items()}, strict=False)
            line |= {"network": name, "top1": round(accuracy(net, data)["top1"], 2)}
            print(line, flush=True)
    return lines


def ours(path: Path, name: str, size: int, folder: str) -> dict[str, Any]:
    """A file of at most `size` bytes."""
    calibration, test, _ = DATA[name]
    settings = f"--target {size}B --database {folder}/{name}"
    settings += " --among quantize" * (name == "efficientnet_lite0")  # in a third of the time
    found = measure(path, name, calibration, test, settings, Path(folder) / "small.fw")
    kept = {k: found[k] for k in ("network", "file_bytes", "before", "after", "compress_s", "fp32_bytes")}
    return kept | {"asked": size, "settings": settings.partition(" --database")[0]}


def table(coded: list[dict[str, Any]], small: list[dict[str, Any]]) -> str:
    """Markdown: the three points of every network."""
    rows = ["| network | NNCodec qp | bytes | top-1 | ours | bytes | of NNCodec's | top-1 | dense | time |"]
    rows.append("|---|--:|--:|--:|---|--:|--:|--:|--:|--:|")
    for line in coded:
        for own in small:
            if own["network"] == line["network"] and own["asked"] == int(SHARE * line["bytes"]):
                left = f"{line['network']} | {line['qp']} | {line['bytes']:,} | {line['top1']:.2f}"
                share = own["file_bytes"] / line["bytes"]
                right = f"`{own['settings']}` | {own['file_bytes']:,} | {share:.2f} | {own['after']:.2f}"
                rows.append(f"| {left} | {right} | {own['before']:.2f} | {own['compress_s']:.0f} s |")
    return "\n".join(rows) + "\n"


def picture(coded: list[dict[str, Any]], small: list[dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt

    names = [n for n in DATA if any(x["network"] == n for x in coded)]
    figure, axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.2), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for lines, x, y, label in ((coded, "bytes", "top1", "NNCodec 2.1.3"), (small, "file_bytes", "after", "here")):
            own = sorted((line[x] / 1000, line[y]) for line in lines if line["network"] == name)
            axis.plot(*zip(*own, strict=True), "o-", label=label, markersize=4)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("kB")
        axis.grid(alpha=0.3)
        low = min(line["top1"] for line in coded if line["network"] == name and line["qp"] <= -18)
        axis.set_ylim(bottom=low - 1)
    axes[0][0].set_ylabel("top-1, %")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "nncodec.png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="of the environment that has NNCodec")
    parser.add_argument("--only", choices=DATA, action="append")
    parser.add_argument("--zoo", type=Path, default=Path(__file__).parents[2] / "shared" / "zoo.py")
    options = parser.parse_args()
    store = RESULTS / "nncodec.json"
    kept = json.loads(store.read_text()) if store.exists() else {"theirs": [], "ours": []}

    def save() -> None:
        store.write_text(json.dumps(kept | {"machine": f"torch {torch.__version__}"}, indent=1) + "\n")
        (RESULTS / "nncodec.md").write_text(table(kept["theirs"], kept["ours"]))

    for name in options.only or DATA:
        if options.python is not None:
            found = theirs(options.python, options.zoo, name)
            for key in ("theirs", "ours"):
                kept[key] = [x for x in kept[key] if x["network"] != name]
            kept["theirs"] += found
        coded = [x for x in kept["theirs"] if x["network"] == name]
        there = [x["asked"] for x in kept["ours"] if x["network"] == name]
        save()
        with tempfile.TemporaryDirectory() as folder:
            for line in coded:
                if line["qp"] in DATA[name][2] and int(SHARE * line["bytes"]) not in there:
                    kept["ours"].append(ours(options.zoo, name, int(SHARE * line["bytes"]), folder))
                    print(kept["ours"][-1], flush=True)
                    save()
        picture(kept["theirs"], kept["ours"])


if __name__ == "__main__":
    main()
