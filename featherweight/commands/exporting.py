"""`export`: a file for programs that know nothing of featherweight."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from torch import nn

from featherweight import options as opt
from featherweight.activations import simulate
from featherweight.artifact import Artifact, fill, read
from featherweight.commands.app import app
from featherweight.console import bars, out, print_json
from featherweight.data import Batch, batches
from featherweight.errors import UsageError
from featherweight.export.checkpoint import export_checkpoint
from featherweight.export.model import Exported, export_onnx
from featherweight.export.packed import check_folder, export_compressed_tensors
from featherweight.export.program import export_program
from featherweight.export.result import Export
from featherweight.proof import check_output
from featherweight.synthesis import shape_of
from featherweight.userland import call, make_model

SAMPLES = 8  # that the two networks are compared on
FOLDER = ""  # the ending of a folder's name


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
    data: Annotated[str | None, typer.Option("--data", help="example inputs: a callable, named like --model")] = None,
    input_shape: opt.InputShape = None,
    ignore_structure: opt.IgnoreStructure = False,
    as_json: opt.Json = False,
) -> None:
    """Write a file's network in another format, about as small, and compare it with torch."""
    if output.suffix == FOLDER:
        check_folder(output)
    else:
        check_output(output, file)
    traced: dict[str, Callable[[Artifact, nn.Module, Any, Path], Exported | Export]]
    traced = {".onnx": export_onnx, ".pt2": export_program}
    plain = {".safetensors": export_checkpoint, FOLDER: export_compressed_tensors}
    if output.suffix not in traced | plain:
        raise UsageError(
            "the name of the output must end in .onnx, .pt2 or .safetensors, or have no ending, for a folder; "
            f"got {output.name}"
        )
    artifact = read(file)
    with bars() as progress, redirect_stdout(sys.stderr):
        example = _example(data, input_shape) if output.suffix in traced else _none(data, input_shape, output)
        network = fill(make_model(model), artifact, ignore_structure=ignore_structure)
        simulate(network, {})  # a copy is filled, and simulates again
        progress("export", 0, 1)
        if output.suffix in traced:
            done = traced[output.suffix](artifact, network, example, output)
        else:
            done = plain[output.suffix](artifact, network, output)
        progress("export", 1, 1)
    size = file.stat().st_size
    if as_json:
        print_json({"file": str(output), "fw_bytes": size, "digest": artifact.digest()} | asdict(done))
        return
    if isinstance(done, Export):
        _print(done)
    else:
        _print_onnx(done)
    out.print(f"{escape(str(output))}: {done.bytes:,} bytes, the file {size:,} (that one is entropy-coded)")
    checked = done.checked if isinstance(done, Export) else _parity(done)
    out.print(checked, style="green")


def _print(done: Export) -> None:
    """How many weights have which form, those that have no smaller one, and what the format cannot say."""
    forms = [w.form for w in done.weights]
    out.print("; ".join(f"{forms.count(form)} weights {form}" for form in sorted(set(forms))))
    for weight in done.weights:
        if weight.note:
            out.print(f"{escape(weight.name)} is {weight.form}: {escape(weight.note)}", style="yellow")
    for note in done.notes:
        out.print(escape(note), style="yellow")


def _print_onnx(done: Exported) -> None:
    for name, why in done.floats.items():
        out.print(f"{escape(name)} is float32: {why}", style="yellow")
    kinds = {how: sum(h == how for h in done.stored.values()) for how in sorted(set(done.stored.values()))}
    out.print("; ".join(f"{count} tensors {how}" for how, count in kinds.items()))


def _none(data: str | None, input_shape: str | None, output: Path) -> None:
    if data is not None or input_shape is not None:
        raise UsageError(f"{output} is made of tensors alone; leave out --data and --input-shape")


def _parity(done: Exported) -> str:
    said = done.parity.openvino_note
    other = f"OpenVINO {said}" if done.parity.openvino is None else f"OpenVINO {done.parity.openvino:.1e}"
    return f"furthest from torch, of the largest output: onnxruntime {done.parity.onnxruntime:.1e}, {other}"


def _example(data: str | None, input_shape: str | None) -> Any:
    if (data is None) == (input_shape is None):
        raise UsageError("give the network an example: --data, or --input-shape 3,32,32 without the samples")
    if data is not None:
        return batches(call(data), SAMPLES)[0]
    assert input_shape is not None
    shape = shape_of(input_shape)
    return Batch((torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(0)),), {})
