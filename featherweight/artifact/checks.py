"""What the fields of a table of contents may be. Each check names the place where it fails."""

import re
from math import prod
from typing import Any

from featherweight.errors import FormatError

MAX_DIM = 2**40
FREE, DENSEST = 2**24, 4096  # entries that any file may claim, and for each of its bytes
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]")  # what may break a line or steer a terminal


def keys(entry: Any, where: str, needed: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    if not isinstance(entry, dict) or not set(needed) <= set(entry) <= {*needed, *optional}:
        got = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise FormatError(f"{where} must have the fields {sorted(needed)}, got {got}")


def listed(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise FormatError(f"'{where}' must be a list")
    return value


def text(value: Any, where: str) -> str:
    if not isinstance(value, str) or _CONTROL.search(value):
        raise FormatError(f"'{where}' must be text without control characters, got {value!r}")
    return value


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_DIM


def shape_of(value: Any, where: str, least: int = 1) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > 16 or not all(is_count(n) and n >= least for n in value):
        raise FormatError(f"{where} is not a shape: {value!r}")
    if (least and not value) or prod(max(n, 1) for n in value) >= MAX_DIM:
        raise FormatError(f"{where} is not a shape that a tensor here can have: {value!r}")
    return tuple(value)
