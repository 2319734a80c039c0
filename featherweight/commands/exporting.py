"""`export`: a file for programs that know nothing of featherweight."""

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape

from featherweight import options as opt
from featherweight.artifact import Artifact, read
from featherweight.commands.app import app
from featherweight.console import bars, out, print_json
from featherweight.data import Batch, batches
from featherweight.errors import UsageError
from featherweight.export.model import Exported, export_onnx
from featherweight.proof import check_output
from featherweight.synthesis import shape_of
from featherweight.userland import call, make_model

SAMPLES = 8  # that the two networks are compared on


@app.command("export")
def export_command(
    file: Annotated[Path, typer.Argument(help="a .fw file")],
    output: Annotated[Path, typer.Argument(help="the file to write: .onnx")],
    model: Annotated[str, typer.Option("--model", help="file.py:function that makes the network")],
    data: Annotated[str | None, typer.Option("--data", help="example inputs: a callable, named like --model")] = None,
    input_shape: opt.InputShape = None,
    as_json: opt.Json = False,
) -> None:
    """Write a file's network in another format, about as small, and compare it with torch."""
    check_output(output, file)
    writers = {".onnx": _onnx}
    if output.suffix not in writers:
        raise UsageError(f"the name of the output must end in {' or '.join(writers)}, got {output.name}")
    artifact = read(file)
    with bars() as progress, redirect_stdout(sys.stderr):
        network, example = make_model(model), _example(data, input_shape)
        progress("export", 0, 1)
        done = writers[output.suffix](artifact, network, example, output)
        progress("export", 1, 1)
    size = file.stat().st_size
    if as_json:
        print_json({"file": str(output), "fw_bytes": size, "digest": artifact.digest()} | asdict(done))
        return
    for name, why in done.floats.items():
        out.print(f"{escape(name)} is float32: {why}", style="yellow")
    kinds = {how: sum(h == how for h in done.stored.values()) for how in sorted(set(done.stored.values()))}
    out.print("; ".join(f"{count} tensors {how}" for how, count in kinds.items()))
    out.print(f"{escape(str(output))}: {done.bytes:,} bytes, the file {size:,} (that one is entropy-coded)")
    out.print(_parity(done), style="green")


def _onnx(artifact: Artifact, network: torch.nn.Module, example: Batch, output: Path) -> Exported:
    return export_onnx(artifact, network, example, output)


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
