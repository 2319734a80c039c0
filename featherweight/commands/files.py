"""`evaluate`, `inspect` and `demo`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from featherweight import options as opt
from featherweight.artifact import fill, read
from featherweight.commands.app import app
from featherweight.console import bars, out, print_json
from featherweight.proof import meter
from featherweight.report import (
    rows_of,
    weights_table,
)
from featherweight.userland import make_model


@app.command("evaluate")
def evaluate_command(
    file: Annotated[Path, typer.Argument(help="a .fw file")],
    model: Annotated[str, typer.Option("--model", help="file.py:function that makes the network")],
    data: Annotated[str, typer.Option("--data", help="test data: a callable, named like --model")],
    metric: opt.MetricSpec = None,
    batch_size: opt.BatchSize = 128,
    ignore_structure: opt.IgnoreStructure = False,
    as_json: opt.Json = False,
) -> None:
    """Read a file into a network and measure it."""
    artifact = read(file)
    network = fill(make_model(model), artifact, ignore_structure=ignore_structure)
    measured = meter(data, metric, batch_size)(network)
    result = {"file": str(file), "bytes": file.stat().st_size, "digest": artifact.digest()}
    if as_json:
        print_json(measured | result | {"metrics": measured})
        return
    for name, value in measured.items():
        out.print(f"{escape(name)} {value:.2f}")
    out.print(f"{result['bytes']:,} bytes", style="dim")


@app.command("inspect")
def inspect_command(
    file: Annotated[Path, typer.Argument(help="a .fw file")],
    as_json: opt.Json = False,
) -> None:
    """What is in a file: every weight, how it is stored, its bits, bytes and error. Needs no network."""
    artifact = read(file)
    rows, size = rows_of(artifact), file.stat().st_size
    if as_json:
        facts = {"file": str(file), "bytes": size, "about": artifact.about, "digest": artifact.digest()}
        print_json(facts | {"weights": [asdict(r) for r in rows]})
        return
    out.print(weights_table(rows, size))
    fp32 = artifact.about.get("fp32_bytes")
    if isinstance(fp32, int) and fp32 > 0:
        out.print(f"{fp32 / size:.1f}x smaller than fp32 ({fp32:,} bytes)")


@app.command("demo")
def demo_command(as_json: opt.Json = False) -> None:
    """Compress a small network for handwritten digits at several sizes. Needs no network and no files."""
    from featherweight.demo.run import demo, demo_table

    with bars() as progress:
        rows = demo(progress)
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    out.print(demo_table(rows))
