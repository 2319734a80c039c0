"""`bench`."""

import sys
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from featherweight import options as opt
from featherweight.artifact import read
from featherweight.artifact.structure import without_structure
from featherweight.commands.app import app
from featherweight.console import bars, out, plain_warnings, print_json
from featherweight.data import Batch, batches
from featherweight.errors import UsageError
from featherweight.export.parity import check_installed
from featherweight.synthesis import shape_of
from featherweight.userland import call, make_model

SAMPLES = 256  # of the data, that int8 graphs are calibrated on
BATCH = 32


@app.command("bench")
def bench_command(
    file: Annotated[Path, typer.Argument(help="a .fw file")],
    model: Annotated[str, typer.Option("--model", help="file.py:function that makes the dense network")],
    weights: opt.Weights = None,
    data: opt.DataSpec = None,
    input_shape: opt.InputShape = None,
    ignore_structure: opt.IgnoreStructure = False,
    batch: Annotated[list[int] | None, typer.Option("--batch", min=1, help="samples of a call (repeatable)")] = None,
    threads: Annotated[int, typer.Option(min=1, help="that every runtime computes on")] = 2,
    as_json: opt.Json = False,
) -> None:
    """Time the dense network, the file's, and what plain tools make of the dense one, in turns, in one run."""
    from featherweight.race import race

    check_installed()
    if data is not None and input_shape is not None:
        raise UsageError("give --data or --input-shape, not both")
    sizes = list(dict.fromkeys(batch or [1, 32]))
    shape = None if input_shape is None else shape_of(input_shape)
    artifact, before = read(file), torch.get_num_threads()
    if ignore_structure:
        artifact = replace(artifact, about=without_structure(artifact.about))
    torch.set_num_threads(threads)
    try:
        with bars() as progress, plain_warnings(), redirect_stdout(sys.stderr):
            samples = _samples(data, shape, max(sizes))
            found = race(artifact, make_model(model, weights), samples, sizes, file.stat().st_size, progress)
    finally:
        torch.set_num_threads(before)
    made_up = data is None
    if as_json:
        facts = {"file": str(file), "bytes": file.stat().st_size, "digest": artifact.digest()}
        facts |= {"threads": threads, "random_inputs": made_up}
        print_json(facts | asdict(found))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("runtime", "network"):
        table.add_column(title)
    for title in ("batch", "ms", "lowest to highest", "times faster", "lowest to highest"):
        table.add_column(title, justify="right", no_wrap=True)
    for t in found.times:
        known = t.faster is not None
        ratios = (f"{t.faster:.2f}", f"{t.faster_lowest:.2f} to {t.faster_highest:.2f}") if known else ("", "")
        table.add_row(t.runtime, t.what, str(t.batch), f"{t.ms:.3f}", f"{t.lowest:.3f} to {t.highest:.3f}", *ratios)
    out.print(table, "")
    out.print(*(f"not timed: {what}: {why}" for what, why in found.left.items()), sep="\n", markup=False)
    out.print(*(f"{v[0].upper()}{v[1:]}." for v in found.verdict), sep="\n", markup=False)
    out.print(
        f"{threads} threads; times faster than the dense network in the same runtime, round by round", style="dim"
    )
    if made_up:
        out.print(
            "inputs are random numbers: times are right, but an int8 graph calibrated on them is not", style="dim"
        )


def _samples(data: str | None, shape: tuple[int, ...] | None, most: int) -> list[Batch]:
    """What is run and calibrated on."""
    if data is None:
        if shape is None:
            raise UsageError("give --data file.py:function, or --input-shape 3,32,32 for random inputs")
        random = torch.Generator().manual_seed(0)
        return batches(torch.randn(max(BATCH, most), *shape, generator=random), BATCH)
    found, total = [], 0
    for batch in batches(call(data), BATCH):
        if total >= max(SAMPLES, most):
            break
        found.append(batch)
        total += batch.size
    return found
