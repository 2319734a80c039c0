"""A program of torch.export that stands alone: no class, no featherweight, only torch.

Weights stay as they are stored, each decoded in the graph where it is used. torch.export writes a zip archive without
compression; it is written once more with deflate, which every reader of it understands.
"""

import io
import math
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from featherweight.artifact import Artifact, StoredUnit
from featherweight.data import Batch, batches, device_of
from featherweight.errors import FormatError, UsageError
from featherweight.export.checkpoint import filled
from featherweight.export.decoders import Memory, decoder
from featherweight.export.parity import away, tensors_in
from featherweight.export.result import Export, ExportedWeight
from featherweight.onuse import decoding
from featherweight.proof import check_output, replaced
from featherweight.solve import Progress

TOLERANCE = 1e-4  # of the largest output
_TRACES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node", "custom")  # who made a node
_ASSERTS = torch.ops.aten._assert_tensor_metadata.default


def export_program(
    small: Artifact | str | Path,
    model: nn.Module,
    example: Any,
    path: str | Path,
    progress: Progress = lambda _stage, _done, _total: None,
    *,
    ignore_structure: bool = False,
) -> Export:
    """Write the network as a program that `torch.export.load` reads where neither its class nor featherweight is.

    Args:
        small: a file, or what is in one.
        model: a network of the class that was compressed; it is not changed.
        example: a batch, or anything that `compress` takes for data, of which two samples of the first batch are taken:
            the program is for inputs like these, with any number of samples where the network allows that.
        path: the file to write, usually `*.pt2`.

    Raises:
        FormatError: the file is damaged, or the program gives other outputs in a fresh process; then there is no file.
        UsageError: the network does not fit the file or the example, cannot be traced, or the output cannot be written.
    """
    output = Path(path)
    progress("export", 0, 3)
    check_output(output, None if isinstance(small, Artifact) else Path(small))
    artifact, network = filled(small, model, ignore_structure)
    batch = (example if isinstance(example, Batch) else batches(example)[0]).to(device_of(network))
    inputs = [_first(batch, count) for count in (2, 3, 1)]
    with torch.no_grad():
        expected = [tensors_in(one.run(network)) for one in inputs]
    progress("export", 1, 3)
    rows, exported = traced(artifact, network, inputs[0])
    whole = _any_number(exported)
    with replaced(output) as place:
        place.write_bytes(program_bytes(exported))
        progress("export", 2, 3)
        found = run_alone(place, inputs if whole else inputs[:1], output)
        worst = max(_difference(a, b, output) for a, b in zip(found, expected, strict=False))
    progress("export", 3, 3)
    said = "any number of samples" if whole else f"{inputs[0].size} samples at a time, as this network wants it"
    checked = f"outputs in a fresh process, which agree to {worst:.1e} of the largest; takes {said}"
    return Export(output.stat().st_size, tuple(rows), checked)


def traced(artifact: Artifact, network: nn.Module, batch: Batch) -> tuple[list[ExportedWeight], ExportedProgram]:
    """The program of a filled network, which is changed, and what its weights take.

    Raises:
        UsageError: torch cannot trace the network.
        FormatError: a decoded weight is another one than the file's.
    """
    memory: Memory = {}
    rows: list[ExportedWeight] = []

    def made(unit: StoredUnit, like: Tensor) -> nn.Module | None:
        own = decoder(unit, like, memory)
        if own is None:
            rows.append(
                ExportedWeight(unit.names[0], "dense", _deflated([like]), "the file has it dense in float32, too")
            )
            return None
        if not torch.equal(own(), like):
            raise FormatError(f"{unit.names[0]} would be decoded to other values: please report this")
        rows.append(ExportedWeight(unit.names[0], unit.weight.kind, _deflated(own.buffers())))
        return own

    with torch.no_grad():
        decoding(network, artifact, made).requires_grad_(False)
        try:
            exported = torch.export.export(network, batch.args, batch.kwargs, dynamic_shapes=_shapes(network, batch))
        except Exception as error:  # torch.export raises what it likes, and so does the user's network
            first = str(error).strip().partition("\n")[0]
            raise UsageError(f"torch.export cannot trace the network: {type(error).__name__}: {first}") from error
    return rows, _bared(exported)


def program_bytes(exported: ExportedProgram) -> bytes:
    """The archive, deflated; the same program gives the same bytes."""
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.export.save(exported, plain)
    with zipfile.ZipFile(plain) as given, zipfile.ZipFile(packed, "w") as made:
        for entry in given.infolist():
            made.writestr(zipfile.ZipInfo(entry.filename), given.read(entry), zipfile.ZIP_DEFLATED, 9)
    return packed.getvalue()


def run_alone(program: Path, inputs: Sequence[Batch], output: Path) -> list[list[Tensor]]:
    """The tensors of the program's outputs for each of the inputs, from a process that knows torch and nothing of ours.

    Raises:
        FormatError: it fails there.
    """
    with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
        given, found = Path(folder) / "inputs.pt", Path(folder) / "outputs.pt"
        torch.save([(one.args, one.kwargs) for one in inputs], given)
        command = [sys.executable, "-P", "-c", _ALONE, str(program.resolve()), str(given), str(found)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        if done.returncode:
            last = done.stderr.strip().rpartition("\n")[2]
            raise FormatError(f"{output} was not written: a fresh process cannot run the program ({last})")
        return torch.load(found, weights_only=True)


_ALONE = """
import sys, torch
program, given, found = sys.argv[1:]
module, outputs = torch.export.load(program).module(), []
with torch.no_grad():
    for args, kwargs in torch.load(given, weights_only=True):
        leaves = torch.utils._pytree.tree_leaves(module(*args, **kwargs))
        outputs.append([t for t in leaves if isinstance(t, torch.Tensor)])
torch.save(outputs, found)
"""


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor], output: Path) -> float:
    """The largest difference, relative to the largest output.

    Raises:
        FormatError: it is above TOLERANCE, or shapes differ.
    """
    shapes = [[tuple(t.shape) for t in many] for many in (found, expected)]
    if shapes[0] != shapes[1]:
        raise FormatError(f"{output} was not written: its outputs have shapes {shapes[0]}, the network's {shapes[1]}")
    far = [away(b.cpu().double().numpy(), a.double().numpy()) for a, b in zip(found, expected, strict=True)]
    worst = max((float(one.max(initial=0.0)) for one in far), default=0.0)
    if worst == math.inf:
        raise FormatError(f"{output} was not written: its outputs are not finite in other places than the network's")
    if worst > TOLERANCE:
        raise FormatError(
            f"{output} was not written: its outputs differ from the network's by {worst:.1e} of the largest, "
            f"more than {TOLERANCE:.0e}"
        )
    return worst


def _first(batch: Batch, count: int) -> Batch:
    """So many samples of a batch, from its beginning, those of a smaller one again."""
    order = [i % max(batch.size, 1) for i in range(count)]

    def take(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == batch.size:
            return value[order]
        return [value[i] for i in order] if isinstance(value, list) and len(value) == batch.size else value

    return Batch(tuple(map(take, batch.args)), {k: take(v) for k, v in batch.kwargs.items()})


def _shapes(network: nn.Module, batch: Batch) -> dict[str, Any]:
    """By the names of `forward`'s arguments: where there is an entry for each sample, any number of them."""
    bound = signature(network.forward).bind(*batch.args, **batch.kwargs)
    named = {p.name for p in bound.signature.parameters.values() if p.kind == p.VAR_KEYWORD}
    given = {k: v for k, v in bound.arguments.items() if k not in named}
    for name in named:
        given |= bound.arguments.get(name, {})
    return pytree.tree_map(lambda v: {0: Dim.AUTO} if _per_sample(v, batch.size) else None, given)


def _per_sample(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == size


def _any_number(exported: ExportedProgram) -> bool:
    """Whether inputs kept a first side of any length."""
    names = set(exported.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder" and n.name in names]
    firsts = [v.shape[0] for v in values if isinstance(v, Tensor) and v.ndim]
    return any(isinstance(side, torch.SymInt) and side.node.maybe_as_int() is None for side in firsts)


def _bared(exported: ExportedProgram) -> ExportedProgram:
    """Without the example, where in whose files each operation came from, and checks of types that cannot change."""
    exported.example_inputs = None
    for node in list(exported.graph.nodes):
        for name in _TRACES:
            node.meta.pop(name, None)
        if node.target is _ASSERTS and not node.users:
            exported.graph.erase_node(node)
    exported.graph_module.recompile()
    return exported


def _deflated(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors take in the archive."""
    return sum(len(zlib.compress(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), 9)) for t in tensors)
