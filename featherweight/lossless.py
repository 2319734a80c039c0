"""Checkpoints packed to the last bit: nothing is lost, only what a float of a network always has is not written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from featherweight.artifact import Artifact
from featherweight.artifact.schema import STREAM_OF
from featherweight.errors import FormatError, UsageError

MARK = "lossless"  # in a file's `about`


def checkpoint_of(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file in its order, and its metadata.

    Raises:
        UsageError: it cannot be read, or is no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UsageError(f"cannot read {path} as a safetensors file: {error}") from error


def state_of(net: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a network's state under its first name.

    Raises:
        UsageError: the state holds something else.
    """
    found = net.state_dict()
    if other := sorted(n for n, t in found.items() if not isinstance(t, Tensor)):
        raise UsageError(f"the network's state has '{other[0]}', which is no tensor; only tensors can be kept")
    return dict(found)


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, about: Any = None) -> Artifact:
    """The artifact of a checkpoint. Equal tensors are stored once.

    Args:
        metadata: of the checkpoint, kept. about: further JSON for people.

    Raises:
        UsageError: there is no tensor, or one of a type that cannot be stored.
    """
    if not tensors:
        raise UsageError("the checkpoint holds no tensor")
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided:
            raise UsageError(
                f"'{name}' is a tensor without values of its own, or sparse; only plain ones can be packed"
            )
        if tensor.dtype not in STREAM_OF:
            known = ", ".join(str(t).removeprefix("torch.") for t in STREAM_OF)
            raise UsageError(f"'{name}' is of type {tensor.dtype}; only {known} can be packed")
    said = dict(about or {}) | {MARK: dict(metadata or {})}
    return Artifact((), {n: t.detach().cpu().contiguous() for n, t in tensors.items()}, (), said)


def unpack(artifact: Artifact) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a packed checkpoint, in their own types; of any other file its decoded network,
    in float32 where it was floats.

    Raises:
        FormatError: the metadata are none.
    """
    metadata = artifact.about.get(MARK)
    if metadata is None or artifact.units or artifact.norms:
        return artifact.state(), {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError("the checkpoint's metadata must be texts by name")
    return dict(artifact.rest), metadata
