"""`export`: files for other programs, by the suffix of the output."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
import typer
from rich.markup import escape
from rich.text import Text
from torch import nn

from featherweight import options as opt
from featherweight.artifact import Artifact, read
from featherweight.artifact.structure import without_structure
from featherweight.commands.app import app
from featherweight.console import bars, out, print_json
from featherweight.data import Batch, batches
from featherweight.errors import UsageError
from featherweight.export.checkpoint import export_checkpoint
from featherweight.export.fast import export_int8, made_for_speed
from featherweight.export.onnx import export_onnx
from featherweight.export.packed import check_folder, export_compressed_tensors
from featherweight.export.parity import check_installed
from featherweight.export.program import export_program
from featherweight.export.result import Export
from featherweight.export.said import lines_of
from featherweight.proof import check_output
from featherweight.solve import Progress
from featherweight.synthesis import shape_of
from featherweight.userland import call, make_model

BATCH = 32  # samples that run at once while an int8 graph is calibrated
SAMPLES = 8  # of the data: what is written is compared on these
FOLDER = ""  # the suffix of a folder's name

Example: TypeAlias = Callable[[], Batch]
Writer: TypeAlias = Callable[[Artifact, nn.Module, Example, Path, Progress], tuple[dict[str, Any], list[Any]]]
"""Writes a file; what there is to say of it, for machines and for people, whom the sizes are told anyhow."""


def _onnx(smallest: bool) -> Writer:
    def write(
        artifact: Artifact, model: nn.Module, example: Example, output: Path, progress: Progress
    ) -> tuple[dict[str, Any], list[Any]]:
        found = export_onnx(artifact, model, example(), output, progress, tight=smallest)
        return found.facts(), lines_of(found)

    return write


def _program(
    artifact: Artifact, model: nn.Module, example: Example, output: Path, progress: Progress
) -> tuple[dict[str, Any], list[Any]]:
    return _said(export_program(artifact, model, example(), output, progress))


def _checkpoint(
    artifact: Artifact, model: nn.Module, _example: Example, output: Path, progress: Progress
) -> tuple[dict[str, Any], list[Any]]:
    progress("export", 0, 1)
    return _said(export_checkpoint(artifact, model, output))


def _folder(
    artifact: Artifact, model: nn.Module, _example: Example, output: Path, progress: Progress
) -> tuple[dict[str, Any], list[Any]]:
    progress("export", 0, 1)
    return _said(export_compressed_tensors(artifact, model, output))


def _int8(data: str | None) -> Writer:
    """Of .onnx, for a file made for speed."""
    if data is None:
        raise UsageError("a file made for speed is exported in int8, which needs calibration data: give --data")

    def write(
        artifact: Artifact, model: nn.Module, _example: Example, output: Path, progress: Progress
    ) -> tuple[dict[str, Any], list[Any]]:
        found = export_int8(artifact, model, batches(call(data), BATCH), output, progress)
        nodes = ", ".join(f"{count} {name}" for name, count in found.operators.items())
        same = "" if found.same is None else f"{found.same:.1%} the same class, "
        return found.facts(), [
            f"int8: {found.weights} weights, {found.exact} of them with the file's codes; {nodes}",
            *(Text(f"{name}: {reason}", style="yellow") for name, reason in found.left.items()),
            *(Text(note, style="yellow") for note in found.notes),
            f"onnxruntime against torch on {found.samples} samples: {same}"
            f"outputs {found.difference:.2%} of their root mean square away",
        ]

    return write


WRITERS: dict[str, Writer] = {".pt2": _program, ".safetensors": _checkpoint, FOLDER: _folder}
ONNX = ".onnx"


@app.command("export")
def export_command(
    file: Annotated[Path, typer.Argument(help="a .fw file")],
    output: Annotated[
        Path,
        typer.Argument(
            help="what to write: .onnx; .pt2, a torch.export program; .safetensors, decoded tensors; with no ending, "
            "a folder for compressed-tensors"
        ),
    ],
    model: Annotated[str, typer.Option("--model", help="file.py:function that makes the network")],
    weights: opt.Weights = None,
    data: opt.DataSpec = None,
    input_shape: opt.InputShape = None,
    ignore_structure: opt.IgnoreStructure = False,
    smallest: Annotated[
        bool,
        typer.Option("--smallest", help="ONNX: codes in as few bits as their frequency allows, not as int4 or int8"),
    ] = False,
    as_json: opt.Json = False,
) -> None:
    """Write a network for other programs, and compare what they compute. ONNX: weights keep their stored form."""
    if output.suffix not in (ONNX, *WRITERS):
        raise UsageError(f"{output} must end in .onnx, .pt2 or .safetensors, or have no ending, for a folder")
    if smallest and output.suffix != ONNX:
        raise UsageError(f"--smallest is for files that end in {ONNX}, got {output}")
    if output.suffix == ONNX:
        check_installed()
    if output.suffix == FOLDER:
        check_folder(output)
    else:
        check_output(output, file)
        check_output(output, weights)
    if output.suffix not in (ONNX, ".pt2") and (data is not None or input_shape is not None):
        raise UsageError(f"{output} is made of tensors alone; leave out --data and --input-shape")
    if data is not None and input_shape is not None:
        raise UsageError("give --data or --input-shape, not both")
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
    if ignore_structure:
        artifact = replace(artifact, about=without_structure(artifact.about))
    fast = output.suffix == ONNX and made_for_speed(artifact)
    if fast and smallest:
        raise UsageError(f"{file} was made for speed and becomes int8; leave out --smallest")
    write = WRITERS.get(output.suffix) or (_int8(data) if fast else _onnx(smallest))
    with bars() as progress, redirect_stdout(sys.stderr):
        facts, lines = write(artifact, make_model(model, weights), example, output, progress)
    size = facts["bytes"]
    before = file.stat().st_size
    if as_json:
        print_json({"file": str(output), "bytes": size, "source": str(file), "source_bytes": before} | facts)
        return
    out.print(f"{escape(str(output))}: {size:,} bytes, {size / before:.2f} times {escape(str(file))} ({before:,})")
    for line in lines:
        out.print(line)


def _said(done: Export) -> tuple[dict[str, Any], list[Any]]:
    """How many weights have which form, those that have no smaller one, and what the format cannot say."""
    forms = [w.form for w in done.weights]
    lines = [Text("; ".join(f"{forms.count(form)} weights {form}" for form in sorted(set(forms))))]
    lines += [Text(f"{w.name} is {w.form}: {w.note}", style="yellow") for w in done.weights if w.note]
    lines += [Text(note, style="yellow") for note in done.notes]
    return asdict(done), [*lines, Text(done.checked, style="green")]
