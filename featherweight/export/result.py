"""What an export made."""

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class ExportedWeight:
    """One compressed weight of the network. form: how it stands in what was written. bytes: that it takes there. note:
    why it has no smaller form, empty where it has."""

    name: str
    form: str
    bytes: int
    note: str = ""


@final
@dataclass(frozen=True, slots=True)
class Export:
    """What was written and read back. bytes: of the file, or of all files of the folder. checked: what was compared
    with the network of the `.fw` file. notes: what the other format cannot say."""

    bytes: int
    weights: tuple[ExportedWeight, ...]
    checked: str
    notes: tuple[str, ...] = ()
