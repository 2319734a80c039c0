"""A network whose weights stay packed, each decoded at the moment it is used and forgotten after.

Memory then holds what the file holds and one decoded layer at a time, for the price of decoding in every pass. A weight
becomes a property of its module, so it does not matter who uses it: the module's own forward, another module that it
is tied to, or a function that takes it. Recurrent modules keep a list of their weights; it is filled for a call and
emptied after.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar, final

import torch
from torch import Tensor, nn

from featherweight.activations import DECODED_AS
from featherweight.artifact import Artifact, StoredUnit, fill, read
from featherweight.layers import View
from featherweight.weights import KINDS, Factors, Weight, books_of

M = TypeVar("M", bound=nn.Module)
_KINDS = {kind.kind: kind for kind in KINDS}


@final
class Packed(nn.Module):
    """A stored weight as its packed payload, which stays where it is; calling it decodes, to the type and the device
    that the network was moved to."""

    place: Tensor

    def __init__(self, weight: Weight, view: View, like: Tensor) -> None:
        super().__init__()
        weight = replace(weight, shared=()) if isinstance(weight, Factors) else weight  # whole in itself
        self.view = view
        self.payload = weight.tensors() | {f"book{m}": book for m, book in enumerate(books_of(weight))}
        self.said = json.dumps([weight.kind, weight.shape, weight.meta(), list(self.payload)])
        self.register_buffer("place", torch.empty(0, dtype=like.dtype, device=like.device), persistent=False)

    def forward(self) -> Tensor:
        return self.view.tensor(_decode(list(self.payload.values()), self.said)).to(self.place)


@torch.library.custom_op("featherweight::decode", mutates_args=())
def _decode(payload: list[Tensor], said: str) -> Tensor:
    """One operation for torch, whose compiler does not look inside.

    Args:
        said: JSON: kind, shape and metadata of a weight, and the names of the tensors in its payload.
    """
    kind, shape, meta, names = json.loads(said)
    weight = _KINDS[kind].load(tuple(shape), meta, dict(zip(names, payload, strict=True)))
    decoded = weight.dense()
    return decoded.clone() if any(decoded.data_ptr() == t.data_ptr() for t in payload) else decoded


@_decode.register_fake
def _(payload: list[Tensor], said: str) -> Tensor:
    rows, cols = json.loads(said)[1]
    return torch.empty(rows, cols)


def load_packed(path: str | Path, into: M, *, ignore_structure: bool = False) -> M:
    """Like `load`, with every compressed weight kept packed and decoded whenever the network uses it. The network is
    for inference; its compressed weights are no parameters any more.

    Raises:
        FormatError: the file is damaged or no featherweight file.
        UsageError: names, shapes or structure of `into` differ from the file's; the differences are named.
    """
    return keep_packed(into, read(Path(path)), ignore_structure=ignore_structure)


def keep_packed(model: M, artifact: Artifact, *, ignore_structure: bool = False) -> M:
    """Like `load_packed`, of a file's contents."""
    fill(model, artifact, ignore_structure=ignore_structure)
    return decoding(model, artifact, lambda unit, like: Packed(unit.weight, unit.view, like))


def decoding(model: M, artifact: Artifact, make: Callable[[StoredUnit, Tensor], nn.Module | None]) -> M:
    """A network that is filled, with modules in place of weights.

    Args:
        make: the module that gives a weight whenever it is called, for a unit and the parameter that it takes the place
            of; None leaves the parameter.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for unit in artifact.units:
        made: nn.Module | None = None
        for name in unit.names:
            owner, _, attribute = name.rpartition(".")
            module = modules[owner]
            filled = module._parameters.get(attribute)
            if filled is None:  # the same module under another name
                continue
            made = made or make(unit, filled)
            if made is None:
                break
            setattr(made.train(model.training), DECODED_AS, unit.names[0])
            del module._parameters[attribute]
            module.add_module(f"packed_{attribute}", made)
            _as_property(module, attribute)
    for module in model.modules():
        if isinstance(module, nn.RNNBase) and any(n.startswith("packed_") for n in module._modules):
            module._flat_weights = []
            module.register_forward_pre_hook(_filled)
            module.register_forward_hook(_emptied, always_call=True)
    return model


def _as_property(module: nn.Module, attribute: str) -> None:
    """Give this one module a class of its own, in which the attribute decodes."""
    kind, names = type(module), {attribute}
    if issubclass(kind, _Decodes):
        kind, names = kind.plain, {attribute, *kind.names}
    module.__class__ = _class_of(kind, frozenset(names))


class _Decodes:
    """Of modules that have properties in place of weights. plain: their class without these; names: of the weights."""

    plain: ClassVar[type]
    names: ClassVar[frozenset[str]]

    def __reduce_ex__(self, _protocol: Any) -> Any:  # a class that was made here has no name to be found by
        state = {k: v for k, v in vars(self).items() if k != "_flat_weight_refs"}
        return _empty, (self.plain, self.names), state


@lru_cache(maxsize=1024)
def _class_of(plain: type, names: frozenset[str]) -> type:
    own: dict[str, Any] = {name: property(partial(_decoded, name)) for name in names}
    if issubclass(plain, nn.RNNBase):
        own["_update_flat_weights"] = _kept  # it would decode each weight three times
    return type(plain.__name__, (_Decodes, plain), own | {"plain": plain, "names": names})


def _empty(plain: type, names: frozenset[str]) -> Any:
    return object.__new__(_class_of(plain, names))


def _decoded(name: str, module: Any) -> Tensor:
    decoder = module._modules[f"packed_{name}"]
    tensor = decoder()
    setattr(tensor, DECODED_AS, getattr(decoder, DECODED_AS))  # for those that round inputs by their weight
    return tensor


def _kept(_module: Any) -> None:
    """The list of weights is that of the hooks."""


def _filled(module: Any, _inputs: Any) -> None:
    module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


def _emptied(module: Any, _inputs: Any, _outputs: Any) -> None:
    module._flat_weights = []
