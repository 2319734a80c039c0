"""Pictures for people: accuracy against bytes."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from featherweight.errors import UsageError
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
