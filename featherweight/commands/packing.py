"""`compress --lossless`, and `unpack`, its inverse."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

from featherweight import options as opt
from featherweight.artifact import read
from featherweight.artifact.read import from_bytes
from featherweight.artifact.write import to_bytes
from featherweight.commands.app import app
from featherweight.console import bars, out, print_json
from featherweight.errors import FormatError, UsageError
from featherweight.lossless import checkpoint_of, pack, state_of, unpack
from featherweight.proof import check_output, replaced, save_proved
from featherweight.userland import make_model


def pack_checkpoint(model: str, weights: Path | None, output: Path, others: list[str], as_json: bool) -> None:
    """Pack the tensors of a safetensors file or a network, and read them back."""
    if others:
        raise UsageError(f"--lossless keeps every bit as it is; leave out {', '.join(others)}")
    source = Path(model)
    check_output(output, weights)
    with bars() as progress, redirect_stdout(sys.stderr):
        if source.suffix == ".safetensors":
            if weights is not None:
                raise UsageError("MODEL is a safetensors file already; leave out --weights")
            check_output(output, source)
            tensors, metadata = checkpoint_of(source)
        else:
            tensors, metadata = state_of(make_model(model, weights)), {}
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        progress("pack", 0, 1)
        artifact = pack(tensors, metadata, {"model": source.name, "plain_bytes": size})
        again, _ = unpack(from_bytes(to_bytes(artifact)))
        if list(again) != list(tensors) or not all(_same(again[n], t) for n, t in tensors.items()):
            raise FormatError(f"{output} would hold other bits and was not written: please report this")
        proof = save_proved(artifact, output, model, None, None, None, 1)
        progress("pack", 1, 1)
    if as_json:
        facts = {"file": str(output), "bytes": proof["bytes"], "plain_bytes": size, "tensors": len(tensors)}
        print_json(facts | {"digest": proof["digest"]})
        return
    out.print(f"{len(tensors)} tensors, {size:,} bytes -> {proof['bytes']:,} ({proof['bytes'] / max(size, 1):.1%})")
    out.print(f"read back in a fresh process: every bit is the same ({proof['digest'][:12]})", style="green")


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether type, shape and every bit are equal."""
    flat = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


@app.command("unpack")
def unpack_command(
    file: Annotated[Path, typer.Argument(help="a .fw file")],
    output: Annotated[Path, typer.Option("-o", "--output", help="the safetensors file to write")],
    as_json: opt.Json = False,
) -> None:
    """Write the tensors of a file as a safetensors file: of a packed checkpoint to the last bit, of any other the
    decoded network in float32."""
    check_output(output, file)
    tensors, metadata = unpack(read(file))
    with replaced(output) as place:
        save_file({n: t.clone() for n, t in tensors.items()}, place, metadata or None)
    facts = {"file": str(output), "bytes": output.stat().st_size, "tensors": len(tensors)}
    if as_json:
        print_json(facts)
        return
    out.print(f"{facts['tensors']} tensors, {facts['bytes']:,} bytes in {output}")
