"""Modules that stand where a layer was."""

from collections.abc import Mapping
from typing import Any

from torch import nn

_PLAIN = (bool, int, float, str, type(None))


def settings_of(layer: nn.Module) -> dict[str, Any]:
    """What a layer says of itself in plain values: numbers of channels, stride, whether the batch comes first."""

    def plain(value: Any) -> bool:
        return all(map(plain, value)) if isinstance(value, tuple) else isinstance(value, _PLAIN)

    return {n: v for n, v in vars(layer).items() if not n.startswith("_") and n != "training" and plain(v)}


def known_as(made: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """The module, with those of these settings that it has no attribute for, so that code which reads them goes on."""
    for name, value in settings.items():
        if not hasattr(made, name):
            setattr(made, name, value)
    return made
