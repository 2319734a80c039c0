"""What a network is beside names and shapes: its modules of torch, and the settings that change what they compute.

A file may hold this, under `structure` in its `about`, and `load` then names what another network does differently: a
stride, a padding, an eps, a number of heads, another activation. Modules of classes that are not torch's are left out,
as only their code says what they compute; a class that derives from one of torch's counts as that one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from inspect import Parameter, signature
from math import isfinite
from typing import Any, TypeAlias, final

from torch import nn

from featherweight.errors import FormatError

FIELD = "structure"  # in `about`

Setting: TypeAlias = Any  # a JSON value

_WITHOUT_EFFECT = (  # in evaluation mode, or holders of other modules
    *(nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict),
    *(nn.modules.dropout._DropoutNd, nn.modules.loss._Loss),
)
_UNSAID = {  # sizes that shapes of tensors tell, what trains or places, and how a result is reached
    *("in_features", "out_features", "in_channels", "out_channels", "num_features", "num_channels", "bias"),
    *("num_embeddings", "embedding_dim", "input_size", "hidden_size", "num_layers", "bidirectional", "proj_size"),
    *("embed_dim", "kdim", "vdim", "d_model", "normalized_shape", "num_parameters", "affine", "elementwise_affine"),
    *("dropout", "momentum", "scale_grad_by_freq", "sparse", "device", "dtype"),
    *("inplace", "enable_nested_tensor", "mask_check"),
}


@final
@dataclass(frozen=True, slots=True)
class Described:
    """A module: the class of torch that it is, and those settings that are not the default."""

    kind: str
    settings: Mapping[str, Setting]

    def __str__(self) -> str:
        return self.kind + "".join(f" {name}={_shown(value)}" for name, value in self.settings.items())


def structure_of(model: nn.Module) -> dict[str, Any]:
    """The structure of a network as JSON: `kinds`, each once, and in `modules` which one each module has, in the order
    of their names."""
    found = [described for _, described, _ in _modules(model)]
    kinds = sorted({_key(d) for d in found})
    return {"kinds": [json.loads(k) for k in kinds], "modules": [kinds.index(_key(d)) for d in found]}


def without_structure(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says, without this: a network of any structure fits it."""
    return {k: v for k, v in about.items() if k != FIELD}


def structural_differences(model: nn.Module, about: Mapping[str, Any]) -> list[str]:
    """What a network computes otherwise than the one that was compressed, each with the module's name; empty where
    nothing is, or the file does not say.

    Raises:
        FormatError: what the file says is not valid.
    """
    if FIELD not in about:
        return []
    own, theirs = _modules(model), _read(about[FIELD])
    if [_key(d) for _, d, _ in own] == [_key(d) for d in theirs]:
        return []
    if len(own) == len(theirs):
        return [text for mine, d in zip(own, theirs, strict=True) for text in _between(mine, d)]
    told: list[str] = []
    matcher = SequenceMatcher(None, [_key(d) for _, d, _ in own], [_key(d) for d in theirs], autojunk=False)
    for what, a, b, c, d in matcher.get_opcodes():
        if what == "equal":
            continue
        if b - a == d - c:
            told += [text for mine, other in zip(own[a:b], theirs[c:d], strict=True) for text in _between(mine, other)]
            continue
        told += [f"{name or 'the network'} ({mine}) is not in the file's network" for name, mine, _ in own[a:b]]
        after = f"after {own[a - 1][0]}" if a else "at the beginning"
        told += [f"the file's network has {other} {after}" for other in theirs[c:d]]
    return told


def _between(mine: tuple[str, Described, type[nn.Module]], other: Described) -> list[str]:
    name, own, kind = mine
    if own.kind != other.kind:
        return [f"{name or 'the network'} is {own} in the network and {other} in the file"]
    usual = _defaults(kind)
    pairs = {
        s: [d.settings.get(s, _plain(usual.get(s))) for d in (own, other)] for s in {**own.settings, **other.settings}
    }
    return [
        f"{name}.{s} is {_shown(a)} in the network and {_shown(b)} in the file".removeprefix(".")
        for s, (a, b) in sorted(pairs.items())
        if a != b
    ]


def _modules(model: nn.Module) -> list[tuple[str, Described, type[nn.Module]]]:
    """Name, description and class of torch of every module that has one and an effect, in the order of their names."""
    found = []
    for name, module in sorted(model.named_modules()):
        kind = next((c for c in type(module).__mro__ if c.__module__.startswith("torch.nn.modules.")), nn.Module)
        if kind is nn.Module or isinstance(module, _WITHOUT_EFFECT):
            continue
        found.append((name, _described(module, kind), kind))
    return found


def _described(module: nn.Module, kind: type[nn.Module]) -> Described:
    own, usual = vars(module), _defaults(kind)
    unsaid = _UNSAID | ({"kernel_size"} if isinstance(module, nn.modules.conv._ConvNd) else set())
    said = {}
    for name, default in usual.items():
        if name in own and name not in unsaid and (value := _plain(own[name])) not in (_NO_VALUE, _plain(default)):
            said[name] = value
    label = "BatchNorm" if issubclass(kind, nn.modules.batchnorm._BatchNorm) else kind.__name__
    return Described(label, dict(sorted(said.items())))


@lru_cache
def _defaults(kind: type[nn.Module]) -> dict[str, Any]:
    """What a class is made with, and the defaults: of itself, and of its bases as far as it passes arguments on."""
    found: dict[str, Any] = {}
    for one in kind.__mro__:
        own = signature(one.__init__).parameters.values()
        for p in own:
            if p.name != "self" and p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
                found.setdefault(p.name, p.default)
        if not any(p.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD) for p in own):
            break
    return found


_NO_VALUE = "?"  # of what no file can say


def _plain(value: Any) -> Setting:
    """A setting as JSON: one number where it is the same along all sides, the name of a function of torch."""
    match value:
        case bool() | str() | None:
            return value
        case int() | float():
            return int(value) if isfinite(value) and value == int(value) else value if isfinite(value) else repr(value)
        case tuple() | list():
            each = [_plain(v) for v in value]
            return each[0] if each and all(e == each[0] for e in each) else each
    name = getattr(value, "__name__", None)
    return name if callable(value) and isinstance(name, str) and name.isidentifier() else _NO_VALUE


def _shown(value: Setting) -> str:
    return "(" + ", ".join(map(_shown, value)) + ")" if isinstance(value, list) else str(value)


def _key(described: Described) -> str:
    return json.dumps([described.kind, described.settings], sort_keys=True)


def _read(said: Any) -> Sequence[Described]:
    """Checked: a file may hold anything here."""
    try:
        kinds = [Described(kind, settings) for kind, settings in said["kinds"]]
        modules = [kinds[i] for i in said["modules"] if type(i) is int and i >= 0]
        if len(modules) != len(said["modules"]):
            raise ValueError
        if not all(isinstance(d.kind, str) and isinstance(d.settings, dict) for d in kinds):
            raise ValueError
    except (KeyError, IndexError, TypeError, ValueError):
        raise FormatError("damaged: its 'structure' is not two lists, 'kinds' and 'modules'") from None
    return modules
