"""Artifact -> a network of the original class."""

from pathlib import Path
from typing import TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from featherweight.activations import simulate
from featherweight.artifact.read import read
from featherweight.artifact.schema import Artifact
from featherweight.artifact.structure import structural_differences
from featherweight.errors import UsageError

M = TypeVar("M", bound=nn.Module)

_OPTIONAL = ".num_batches_tracked"  # a training counter that inference never reads; it is not stored


@overload
def load(path: str | Path, into: None = None, *, ignore_structure: bool = False) -> dict[str, Tensor]: ...
@overload
def load(path: str | Path, into: M, *, ignore_structure: bool = False) -> M: ...
def load(
    path: str | Path, into: nn.Module | None = None, *, ignore_structure: bool = False
) -> nn.Module | dict[str, Tensor]:
    """Read a file. With `into`, a freshly made network of the same class, fill that network, set it to eval mode and
    return it; without, return the decoded tensors by name. Where the file has grids for inputs, the network simulates
    them from then on (see `featherweight.simulate`). A network on the device `meta` gets memory on the CPU.

    Args:
        ignore_structure: also fill a network whose modules have other settings than those of the network that was
            compressed: another stride, padding, eps, activation. Names and shapes must fit all the same.

    Raises:
        FormatError: the file is damaged or no featherweight file.
        UsageError: names, shapes or structure of `into` differ from the file's; the differences are named.
    """
    artifact = read(Path(path))
    return artifact.state() if into is None else fill(into, artifact, ignore_structure=ignore_structure)


def fill(model: M, artifact: Artifact, *, ignore_structure: bool = False) -> M:
    """Copy an artifact's decoded tensors into a network, which is returned in eval mode and simulates what the artifact
    says of inputs, no more and no less."""
    state = artifact.state()
    differences = _differences(model, _tensors(model), artifact, state)
    other = [] if ignore_structure else structural_differences(model, artifact.about)
    other = [text for text in other if not any(text in known for known in differences)]
    if differences or other:
        raise UsageError(
            f"the file does not fit {type(model).__name__}: "
            + "; ".join(differences + other[:3])
            + (f"; and {len(other) - 3} more" if len(other) > 3 else "")
            + ("" if differences else ". If that is meant, ignore_structure (--ignore-structure) loads it all the same")
        )
    _with_memory(model)
    simulate(model, artifact.inputs())
    own = _tensors(model)
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
    return model.eval()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def _with_memory(model: nn.Module) -> None:
    """Give what is on the device `meta` memory on the CPU, tied tensors the same; counters begin at 0."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, own in [*module._parameters.items(), *module._buffers.items()]:
            if own is None or not own.is_meta:
                continue
            if id(own) not in made:
                empty = torch.zeros_like(own, device="cpu")
                made[id(own)] = nn.Parameter(empty, own.requires_grad) if isinstance(own, nn.Parameter) else empty
            setattr(module, name, made[id(own)])  # modules that keep lists of their weights follow


def _differences(model: nn.Module, own: dict[str, Tensor], artifact: Artifact, state: dict[str, Tensor]) -> list[str]:
    """What keeps `state` from being the whole of the network's `own` tensors, a few of each sort."""
    if empty := [n for n, t in own.items() if is_lazy(t)]:
        return [f"the network has no memory yet for {_some(empty)}: run it once on an example"]
    if unsaid := [n for n, t in model.named_buffers() if t.is_meta and n not in own]:
        return [f"the network has no memory for {_some(unsaid)}, which no file holds: make it on a real device"]
    both = {n: (own[n], t) for n, t in state.items() if n in own}
    given = {id(mine): n for n, (mine, _) in both.items()}  # a tensor of several names may come under one of them
    missing = [n for n, t in own.items() if id(t) not in given and not n.endswith(_OPTIONAL)]
    unknown = [n for n in state if n not in own]
    shapes = [
        f"{n} is {_kind(mine)} in the network and {_kind(t)} in the file"
        for n, (mine, t) in both.items()
        if mine.shape != t.shape or not torch.can_cast(t.dtype, mine.dtype)
    ]
    tied = [
        f"{n} and {given[id(mine)]} are one tensor in the network and two in the file"
        for n, (mine, t) in both.items()
        if t is not state[given[id(mine)]] and not torch.equal(t, state[given[id(mine)]])
    ]
    modules = dict(model.named_modules())
    eps = [
        f"{x.name}.eps is {getattr(modules.get(x.name), 'eps', 'missing')} in the network and {x.eps} in the file"
        for x in artifact.norms
        if own.keys() >= x.tensors().keys()  # else the names differ, which is told
        and getattr(modules.get(x.name), "eps", None) != x.eps
    ]
    return (
        [f"not in the file: {_some(missing)}"] * bool(missing)
        + [f"not in the network: {_some(unknown)}"] * bool(unknown)
        + shapes[:3]
        + tied[:3]
        + eps[:3]
    )


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
