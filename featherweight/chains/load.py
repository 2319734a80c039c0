"""Networks whose factored weights run as chains of layers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from featherweight.artifact import Artifact, fill, read
from featherweight.chains.choose import ChainRow, OnlyIf, by_place, chains_of, replacement

M = TypeVar("M", bound=nn.Module)


def load_chained(
    path: str | Path, into: M, *, example: Any = None, only_if: OnlyIf = "faster", ignore_structure: bool = False
) -> M:
    """Like `load`, with weights of factors run as chains of layers: an `nn.Sequential` of plain convolutions, linear
    layers and an embedding stands where the layer was, so that compilers, exporters and quantizers see nothing new. All
    else is decoded. `chains_of` says what became what, and why; its options are the same.

    Raises:
        FormatError: the file is damaged or no featherweight file.
        UsageError: names, shapes or structure of `into` differ from the file's, or the network refuses the example.
    """
    return chained(into, read(Path(path)), example=example, only_if=only_if, ignore_structure=ignore_structure)


def chained(
    model: M,
    artifact: Artifact,
    rows: Sequence[ChainRow] | None = None,
    *,
    example: Any = None,
    only_if: OnlyIf = "faster",
    ignore_structure: bool = False,
) -> M:
    """Like `load_chained`, of a file's contents, such as `Compressed.artifact`. rows: what `chains_of` said of this
    network, if it was asked before."""
    fill(model, artifact, ignore_structure=ignore_structure)
    return as_chains(
        model, artifact, chains_of(model, artifact, example=example, only_if=only_if) if rows is None else rows
    )


def as_chains(model: M, artifact: Artifact, rows: Sequence[ChainRow]) -> M:
    """The network, whose weights are decoded already, with those replaced that these rows say run as chains."""
    for place, units in by_place(artifact, rows).items():
        parent, _, own = place.rpartition(".")
        setattr(model.get_submodule(parent), own, replacement(model, place, units))
    return model
