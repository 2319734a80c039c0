"""Pictures for people: accuracy against bytes, and how weights came to have a form."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from featherweight.errors import UsageError
from featherweight.pull import Pulled
from featherweight.report import Report, finite


def front_of(report: Report) -> dict[str, Any]:
    """JSON values: the sizes that a target could have, what was chosen, and the dense network."""
    assert report.allocation is not None
    return {
        "dense": {"bytes": report.baselines.fp32, "metrics": report.before},
        "chosen": {
            "bytes": report.file_bytes,
            "predicted": report.allocation.predicted,
            "measured": report.allocation.measured,
            "metrics": report.after,
        },
        "points": [asdict(p) for p in report.allocation.front],
    }


def check_front(path: Path, output: Path) -> None:
    """Refuse a place that a front cannot be written to, before any work.

    Raises:
        UsageError: the name is that of the picture or of the compressed file, or matplotlib is not installed.
    """
    if path.suffix == ".png" or path.resolve() == output.resolve():
        raise UsageError(f"--front names a JSON file, with a picture .png beside it; {path} cannot be it")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--front draws a picture, which needs matplotlib: pip install matplotlib")


def save_front(report: Report, path: Path) -> None:
    """Write the front as JSON, and a picture of the same name beside it."""
    from matplotlib.figure import Figure

    front = front_of(report)
    path.write_text(json.dumps(finite(front), indent=1, allow_nan=False) + "\n")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    name = next(iter(front["chosen"]["metrics"]), None)

    def height(point: dict[str, Any]) -> float | None:
        return point["measured"] if name is None else (point["metrics"] or {}).get(name)

    kilobytes = [p["bytes"] / 1000 for p in front["points"]]
    heights = [height(p) for p in front["points"]]
    measured = [(x, y) for x, y in zip(kilobytes, heights, strict=True) if y is not None]
    if name is None:
        predicted = [p["predicted"] for p in front["points"]]
        axes.plot(kilobytes, predicted, color="0.7", label="predicted by the score")
        axes.set_yscale("log")
    axes.plot(
        [x for x, _ in measured], [y for _, y in measured], "o-", label="measured, weights as the search solves them"
    )
    chosen = front["chosen"]
    there = height(chosen)
    if there is not None:
        axes.plot([chosen["bytes"] / 1000], [there], "*", color="C3", markersize=14, label="the file")
    if name is not None and name in front["dense"]["metrics"]:
        dense = front["dense"]["metrics"][name]
        axes.axhline(dense, color="0.5", linestyle=":", label=f"dense, {front['dense']['bytes'] / 1000:,.0f} kB")
    axes.set_xscale("log")
    axes.set_xlabel("file, kB")
    axes.set_ylabel(name or "distance to the dense outputs, held-out data")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path.with_suffix(".png"), dpi=150)


def check_residuals(path: Path, output: Path) -> None:
    """Refuse a place that a picture of residuals cannot be written to, before any work.

    Raises:
        UsageError: the name is no picture's, its folder does not exist, or matplotlib is not installed.
    """
    if path.suffix not in (".png", ".svg", ".pdf") or path.resolve() == output.resolve():
        raise UsageError(f"--residuals names a picture, such as residuals.png; {path} cannot be it")
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} does not exist")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--residuals draws a picture, which needs matplotlib: pip install matplotlib")


def save_residuals(pulled: Pulled, path: Path) -> None:
    """Draw the residuals of a training by ADMM: a line a weight, from the first layer (dark) to the last (light)."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)

    def draw(axes: Any, lines: Mapping[str, Sequence[float]], title: str) -> None:
        shades = colormaps["viridis"]
        for i, (name, values) in enumerate(lines.items()):
            few = name if len(lines) <= 8 else None
            axes.plot(values, color=shades(0.9 * i / max(len(lines) - 1, 1)), linewidth=0.9, alpha=0.8, label=few)
        middle = [median(at) for at in zip(*lines.values(), strict=True)]
        axes.plot(middle, color="black", linewidth=2.2, label="median")
        axes.set_yscale("log")
        axes.set_xlabel("epochs")
        axes.set_title(title)
        axes.grid(alpha=0.3, which="both")

    draw(left, pulled.primal, "primal: distance to the form, of the weight")
    draw(right, pulled.dual, "dual: what the nearest point moved by")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=150)
