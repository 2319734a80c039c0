"""Artifact -> a network of the original class."""

from pathlib import Path
from typing import TypeVar, overload

import torch
from torch import Tensor, nn

from featherweight.artifact.read import read
from featherweight.artifact.schema import Artifact
from featherweight.errors import UsageError

M = TypeVar("M", bound=nn.Module)

_OPTIONAL = ".num_batches_tracked"  # a training counter that inference never reads; it is not stored


@overload
def load(path: str | Path, into: None = None) -> dict[str, Tensor]: ...
@overload
def load(path: str | Path, into: M) -> M: ...
def load(path: str | Path, into: nn.Module | None = None) -> nn.Module | dict[str, Tensor]:
    """Read a file. With `into`, a freshly made network of the same class, fill that network, set it to eval mode and
    return it; without, return the decoded tensors by name.

    Raises:
        FormatError: the file is damaged or no featherweight file.
        UsageError: names or shapes of `into` differ from the file's; the differences are named.
    """
    artifact = read(Path(path))
    return artifact.state() if into is None else fill(into, artifact)


def fill(model: M, artifact: Artifact) -> M:
    """Copy an artifact's decoded tensors into a network, which is returned in eval mode."""
    state, own = artifact.state(), model.state_dict(keep_vars=True)
    given = {id(own[n]): n for n in state if n in own}  # a tensor with several names may come under one of them
    missing = sorted(
        n for n, t in own.items() if isinstance(t, Tensor) and id(t) not in given and not n.endswith(_OPTIONAL)
    )
    unknown = sorted(set(state) - set(own))
    shapes = [
        f"{n} is {tuple(own[n].shape)} in the network and {tuple(t.shape)} in the file"
        for n, t in state.items()
        if n in own and own[n].shape != t.shape
    ]
    modules = dict(model.named_modules())
    eps = [
        f"{x.name}.eps is {modules[x.name].eps} in the network and {x.eps} in the file"
        for x in artifact.norms
        if x.name in modules and getattr(modules[x.name], "eps", None) != x.eps
    ]
    tied = [
        f"{n} and {given[id(own[n])]} are one tensor in the network and two in the file"
        for n, t in state.items()
        if n in own and not torch.equal(t, state[given[id(own[n])]])
    ]
    differences = (
        [f"not in the file: {_some(missing)}"] * bool(missing)
        + [f"not in the network: {_some(unknown)}"] * bool(unknown)
        + shapes[:3]
        + eps[:3]
        + tied[:3]
    )
    if differences:
        raise UsageError(f"the file does not fit {type(model).__name__}: " + "; ".join(differences))
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
    return model.eval()


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
