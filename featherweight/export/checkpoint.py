"""The decoded network as a safetensors file: its own names, its own types, nothing of ours."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featherweight.activations import plain_copy
from featherweight.artifact import Artifact, fill, read
from featherweight.errors import FormatError, UsageError
from featherweight.export.result import Export, ExportedWeight
from featherweight.proof import check_output, replaced

ROUNDED = "the file rounds inputs of its weights; what was exported has the weights, and computes in float"


def export_checkpoint(
    small: Artifact | str | Path, model: nn.Module, path: str | Path, *, ignore_structure: bool = False
) -> Export:
    """Write the decoded network as a safetensors file that `load_state_dict` takes, strictly.

    Args:
        small: a file, or what is in one.
        model: a network of the class that was compressed, which says what types the tensors have; it is not changed.
        path: the file to write. Tensors that are one in the network are there under one name; the metadata give the
            others, as `safetensors.torch.save_model` does it, and `safetensors.torch.load_model` loads them.

    Raises:
        FormatError: the file is damaged, or what was written reads back otherwise; then there is no file.
        UsageError: the network does not fit the file or has a state that is no tensor, or the file cannot be written.
    """
    output = Path(path)
    check_output(output, None if isinstance(small, Artifact) else Path(small))
    artifact, network = filled(small, model, ignore_structure)
    tensors, others = distinct(state_of(network))
    with replaced(output) as place:
        save_file(tensors, place, others or None)
        same(load_file(place), tensors, output)
    rows = [_row(u.names[0], tensors[others.get(u.names[0], u.names[0])]) for u in artifact.units]
    notes = [ROUNDED] * bool(artifact.inputs())
    if others:
        some = ", ".join(f"{n} = {first}" for n, first in list(others.items())[:3])
        notes.append(f"tied tensors are there once ({some}): load with safetensors.torch.load_model")
    return Export(output.stat().st_size, tuple(rows), "every tensor, bit for bit", tuple(notes))


def filled(
    small: Artifact | str | Path, model: nn.Module, ignore_structure: bool = False
) -> tuple[Artifact, nn.Module]:
    """What is in a file, and a copy of the network with it."""
    artifact = small if isinstance(small, Artifact) else read(Path(small))
    return artifact, fill(plain_copy(model), artifact, ignore_structure=ignore_structure)


def _row(name: str, tensor: Tensor) -> ExportedWeight:
    return ExportedWeight(name, f"dense {type_of(tensor)}", tensor.numel() * tensor.element_size())


def type_of(tensor: Tensor) -> str:
    """The type's name, without what torch puts before it."""
    return str(tensor.dtype).removeprefix("torch.")


def state_of(network: nn.Module) -> dict[str, Tensor]:
    """The network's tensors by name.

    Raises:
        UsageError: a part of its state is no tensor.
    """
    state = network.state_dict()
    if others := [n for n, t in state.items() if not isinstance(t, Tensor)]:
        raise UsageError(f"'{others[0]}' of the network is no tensor, and safetensors holds nothing else")
    return {n: t.detach().cpu() for n, t in state.items()}


def distinct(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in memory of their own, each once, and under which name the others are there: name -> name."""
    seen: dict[tuple[object, ...], str] = {}
    kept: dict[str, Tensor] = {}
    others: dict[str, str] = {}
    for name, tensor in state.items():
        place = tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
        first = seen.setdefault(place, name) if tensor.numel() else name
        if first == name:
            kept[name] = tensor.clone(memory_format=torch.contiguous_format)  # views of others become their own
        else:
            others[name] = first
    return kept, others


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], output: Path) -> None:
    """Refuse a file that reads back otherwise.

    Raises:
        FormatError: names, types, shapes or any bit differ.
    """
    wrong = [n for n in expected.keys() | found.keys() if not _equal(found.get(n), expected.get(n))]
    if wrong:
        some = ", ".join(sorted(wrong)[:3])
        raise FormatError(f"{output} would read back otherwise ({some}) and was not written: please report this")


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*flat)
