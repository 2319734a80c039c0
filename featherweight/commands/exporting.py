"""`export`: files for other programs, by the suffix of the output."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
import typer
from rich.markup import escape
from torch import nn

from featherweight import options as opt
from featherweight.artifact import Artifact, read
from featherweight.commands.app import app
from featherweight.console import bars, out, print_json
from featherweight.data import Batch, batches
from featherweight.errors import UsageError
from featherweight.proof import check_output
from featherweight.solve import Progress
from featherweight.synthesis import shape_of
from featherweight.userland import call, make_model

SAMPLES = 8  # of the data: what is written is compared on these

Example: TypeAlias = Callable[[], Batch]
Writer: TypeAlias = Callable[[Artifact, nn.Module, Example, Path, Progress], tuple[dict[str, Any], list[Any]]]
"""Writes a file; what there is to say of it, for machines and for people, whom the sizes are told anyhow."""


def _onnx(
    artifact: Artifact, model: nn.Module, example: Example, output: Path, progress: Progress
) -> tuple[dict[str, Any], list[Any]]:
    from featherweight.export.onnx import export_onnx
    from featherweight.export.said import lines_of

    found = export_onnx(artifact, model, example(), output, progress)
    return found.facts(), lines_of(found)


def _smallest_onnx(
    artifact: Artifact, model: nn.Module, example: Example, output: Path, progress: Progress
) -> tuple[dict[str, Any], list[Any]]:
    from featherweight.export.onnx import export_onnx
    from featherweight.export.said import lines_of

    found = export_onnx(artifact, model, example(), output, progress, tight=True)
    return found.facts(), lines_of(found)


WRITERS: dict[str, Writer] = {".onnx": _onnx}  # by suffix
SMALLEST: dict[str, Writer] = {".onnx": _smallest_onnx}  # with --smallest


@app.command("export")
def export_command(
    file: Annotated[Path, typer.Argument(help="a .fw file")],
    output: Annotated[Path, typer.Argument(help=f"what to write, by its suffix: {', '.join(WRITERS)}")],
    model: Annotated[str, typer.Option("--model", help="file.py:function that makes the network")],
    weights: opt.Weights = None,
    data: opt.DataSpec = None,
    input_shape: opt.InputShape = None,
    smallest: Annotated[
        bool,
        typer.Option("--smallest", help="ONNX: codes in as few bits as their frequency allows, not as int4 or int8"),
    ] = False,
    as_json: opt.Json = False,
) -> None:
    """Write a network for other programs, and compare what they compute. ONNX: weights keep their stored form."""
    writers = SMALLEST if smallest else WRITERS
    write = writers.get(output.suffix)
    if write is None:
        raise UsageError(f"{output} must end in {' or '.join(writers)}{' with --smallest' * smallest}")
    check_output(output, file)
    check_output(output, weights)
    shape = None if input_shape is None else shape_of(input_shape)

    def example() -> Batch:
        if data is not None:
            return batches(call(data), SAMPLES)[0]
        if shape is None:
            raise UsageError(
                "give --data file.py:function, of which the first samples are run, or --input-shape 3,32,32"
            )
        return Batch((torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)),), {})

    artifact = read(file)
    with bars() as progress, redirect_stdout(sys.stderr):
        facts, lines = write(artifact, make_model(model, weights), example, output, progress)
    size, before = output.stat().st_size, file.stat().st_size
    if as_json:
        print_json({"file": str(output), "bytes": size, "source": str(file), "source_bytes": before} | facts)
        return
    out.print(f"{escape(str(output))}: {size:,} bytes, {size / before:.2f} times {escape(str(file))} ({before:,})")
    for line in lines:
        out.print(line)
