"""The demo: the digits network at several sizes, each file written, read back and measured."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from rich.table import Table

from featherweight.artifact import load
from featherweight.data import batches
from featherweight.demo import digits
from featherweight.layers import scan
from featherweight.methods import GridSpec, Obq, Obs, PruneQuantize, Unstructured
from featherweight.metrics import accuracy
from featherweight.pipeline import compress
from featherweight.target import Goal, baselines

TARGETS = ("3.7x", "5x", "6x", "8x", "12x")
MEASUREMENTS = 10


@final
@dataclass(frozen=True, slots=True)
class DemoRow:
    """One line of the table. top1: percent of the test images."""

    what: str
    bytes: int
    ratio: float
    top1: float


def demo(progress: Callable[[str, int, int], None]) -> list[DemoRow]:
    """Compress the digits network to several targets, and once with pruning."""
    model, calibration, test = digits.make(), digits.calibration(), batches(digits.test())
    base = baselines(model, scan(model).units)
    rows = [DemoRow("fp32", base.fp32, 1.0, accuracy(model, test)["top1"])]
    asked: list[tuple[str, dict[str, Any]]] = [
        (f"--target {t}", {"target": Goal(t, measurements=MEASUREMENTS)}) for t in TARGETS
    ]
    joint = PruneQuantize(Obs(Unstructured(0.5)), Obq(GridSpec(4)))
    asked.append((joint.label, {"method": joint}))
    with tempfile.TemporaryDirectory() as folder:
        for i, (what, how) in enumerate(asked):
            progress("compress", i, len(asked))
            path = Path(folder) / "digits.fw"
            size = compress(model, calibration, database=Path(folder) / "solved", **how).save(path)
            read_back = load(path, into=digits.make())
            rows.append(DemoRow(what, size, base.fp32 / size, accuracy(read_back, test)["top1"]))
        progress("compress", len(asked), len(asked))
    return rows


def demo_table(rows: list[DemoRow]) -> Table:
    """For people."""
    table = Table(
        box=None, pad_edge=False, header_style="bold", title="Handwritten digits, images the network never saw"
    )
    table.add_column("")
    for title in ("file bytes", "smaller", "top-1 %"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(row.what, f"{row.bytes:,}", f"{row.ratio:.1f}x", f"{row.top1:.2f}")
    return table
