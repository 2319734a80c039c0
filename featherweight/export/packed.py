"""Linear and embedding layers as a compressed-tensors checkpoint: a folder of `model.safetensors` and `config.json`.

The format, as compressed-tensors 0.15 and later read it: https://github.com/vllm-project/compressed-tensors,
"pack-quantized". Integers of b bits, the middle code added so that none is negative, lie in int32 words, least
significant bit first and without gaps: 32 of them in b words. Every row of a weight begins at a word of its own, and so
does every column of the zero points.
"""

import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featherweight._pack import pack, unpack
from featherweight.artifact import Artifact, StoredUnit
from featherweight.errors import UsageError
from featherweight.export.checkpoint import ROUNDED, distinct, filled, same, state_of, type_of
from featherweight.export.result import Export, ExportedWeight
from featherweight.weights import Factors, Grid
from featherweight.weights.grid import per_entry

FORMAT = "pack-quantized"
TENSORS, CONFIG = "model.safetensors", "config.json"
_WORD = 32


@final
@dataclass(frozen=True, slots=True)
class Scheme:
    """What compressed-tensors calls the arguments of a weight's quantization."""

    num_bits: int
    strategy: str
    symmetric: bool
    group_size: int | None

    def said(self) -> dict[str, Any]:
        own = {"num_bits": self.num_bits, "strategy": self.strategy, "symmetric": self.symmetric}
        return own | {"group_size": self.group_size, "type": "int", "dynamic": False}


def export_compressed_tensors(
    small: Artifact | str | Path, model: nn.Module, folder: str | Path, *, ignore_structure: bool = False
) -> Export:
    """Write a folder that compressed-tensors, and what reads its checkpoints, loads: linear and embedding layers whose
    weights are grids of 1 to 8 bits stay packed, all else is dense, in the network's own names and types.

    Args:
        small: a file, or what is in one.
        model: a network of the class that was compressed; it is not changed.
        folder: the folder to make. It must not exist, or be empty.

    Raises:
        FormatError: the file is damaged, or what was written reads back otherwise; then there is no folder.
        UsageError: the network does not fit the file, has a state that is no tensor, or the folder cannot be made.
    """
    folder = Path(folder)
    check_folder(folder)
    artifact, network = filled(small, model, ignore_structure)
    state = state_of(network)
    layers = {n: m for n, m in network.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear | nn.Embedding)}
    schemes: dict[str, Scheme] = {}
    packed: dict[str, Tensor] = {}
    rows: list[ExportedWeight] = []
    for unit in artifact.units:
        reason = _refusal(unit, layers, network)
        if reason is not None or not isinstance(unit.weight, Grid):
            own = state[unit.names[0]]
            rows.append(
                ExportedWeight(unit.names[0], f"dense {type_of(own)}", own.numel() * own.element_size(), reason or "")
            )
            continue
        scheme = _scheme(unit.weight)
        for name in unit.names:
            place = name.removesuffix(".weight")
            made = _tensors(unit.weight, scheme, state[name].dtype)
            packed |= {f"{place}.{n}": t for n, t in made.items()}
            schemes[place] = scheme
            size = sum(t.numel() * t.element_size() for t in made.values())
            own = scheme.strategy if scheme.group_size is None else f"group of {scheme.group_size}"
            again = "" if name == unit.names[0] else f"{unit.names[0]} again: the format ties no packed weights"
            rows.append(ExportedWeight(name, f"{scheme.num_bits} bits, scale per {own}", size, again))
    dense, others = distinct({n: t for n, t in state.items() if n.removesuffix(".weight") not in schemes})
    config = _config(network, schemes, [n for n in layers if n not in schemes])
    with _made(folder) as place:
        save_file(dense | packed, place / TENSORS, {"format": "pt"} | others)
        (place / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        written = load_file(place / TENSORS)
        same({n: t for n, t in written.items() if n not in packed}, dense, folder)
        decoded = {
            f"{n}.weight": decoded_layer(written, n, scheme).to(state[f"{n}.weight"].dtype)
            for n, scheme in schemes.items()
        }
        same(decoded, {n: state[n] for n in decoded}, folder)
    size = sum((folder / name).stat().st_size for name in (TENSORS, CONFIG))
    notes = [ROUNDED] * bool(artifact.inputs())
    if not schemes:
        notes.append("no layer fits this format, so the checkpoint is dense; its reasons stand beside the weights")
    if others:
        notes.append("tied dense tensors are there once, as in a checkpoint of safetensors")
    return Export(size, tuple(rows), "every tensor, decoded, bit for bit", tuple(notes))


def _refusal(unit: StoredUnit, layers: Collection[str], network: nn.Module) -> str | None:
    """Why a weight cannot stay packed in this format, or None."""
    for name in unit.names:
        if not name.endswith(".weight") or name.removesuffix(".weight") not in layers:
            return _foreign(network.get_submodule(name.rpartition(".")[0]))
    weight = unit.weight
    if isinstance(weight, Factors):
        return "the format has no factors"
    if not isinstance(weight, Grid):
        return {"codebook": "the format has no books", "sparse": "the format has no masks"}.get(
            weight.kind, "it is dense"
        )
    if weight.zero is None and weight.nbits == 1:
        return "at 1 bit without zero points the two values are not on a grid that has 0"
    if _scheme(weight).group_size is not None and weight.shape[1] % weight.group:
        return f"the format wants groups of one length, and {weight.group} does not divide {weight.shape[1]} columns"
    return None


def _foreign(owner: nn.Module) -> str:
    """Why no weight of this module can stay packed."""
    match owner:
        case nn.modules.conv._ConvNd():
            what = "convolutions are"
        case nn.RNNBase() | nn.RNNCellBase():
            what = "recurrent layers are"
        case nn.MultiheadAttention():
            what = "the joined projections of nn.MultiheadAttention are"
        case nn.Linear() | nn.Embedding():
            return "the format names layers inside a network, and this layer is the whole network"
        case _:
            what = f"{type(owner).__name__} is"
    return f"{what} no part of the format, which has linear and embedding layers"


def _scheme(grid: Grid) -> Scheme:
    if grid.group == 0:
        return Scheme(grid.nbits, "tensor", grid.zero is None, None)
    if grid.group == grid.shape[1]:
        return Scheme(grid.nbits, "channel", grid.zero is None, None)
    return Scheme(grid.nbits, "group", grid.zero is None, grid.group)


def _tensors(grid: Grid, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the format stores of a layer's weight. Scales are of the network's own type where that is exact: it is the
    type that the weight is decoded to."""
    scale = grid.scale.to(dtype)
    exact = dtype.is_floating_point and torch.equal(scale.double(), grid.scale.double())
    scale = scale if exact else grid.scale.float()
    made = {
        "weight_packed": packed_words(grid.codes, grid.nbits),
        "weight_scale": scale.reshape(-1).clone() if scheme.strategy == "tensor" else scale.clone(),
        "weight_shape": torch.tensor(grid.shape),
    }
    if grid.zero is None:
        return made
    if scheme.strategy == "tensor":  # the format packs zero points of rows and groups only
        return made | {
            "weight_zero_point": (grid.zero.to(torch.int16) - 2 ** (grid.nbits - 1)).to(torch.int8).reshape(-1)
        }
    return made | {"weight_zero_point": packed_words(grid.zero.T, grid.nbits).T.contiguous()}


def packed_words(codes: Tensor, bits: int) -> Tensor:
    """(rows, ceil(cols * bits / 32)) int32: the codes of a row, (rows, cols) below 2**bits, side by side in words.

    >>> packed_words(torch.tensor([[1, 2, 3, 0, 1]]), bits=2)
    tensor([[313]], dtype=torch.int32)
    """
    rows, cols = codes.shape
    whole = torch.nn.functional.pad(codes, (0, -cols % _WORD))
    words = pack(whole, bits).view(torch.int32).reshape(rows, -1)
    return words[:, : -(-cols * bits // _WORD)].contiguous()


def unpacked_words(words: Tensor, bits: int, cols: int) -> Tensor:
    """(rows, cols) uint8: the inverse of `packed_words`."""
    rows = len(words)
    whole = torch.nn.functional.pad(words, (0, -words.shape[1] % bits))
    codes = unpack(whole.contiguous().reshape(-1).view(torch.uint8), bits, whole.numel() * _WORD // bits)
    return codes.reshape(rows, -1)[:, :cols]


def decoded_layer(tensors: dict[str, Tensor], place: str, scheme: Scheme) -> Tensor:
    """The weight of a layer, from what stands in a checkpoint, in float32."""
    rows, cols = tensors[f"{place}.weight_shape"].tolist()
    bits, scale = scheme.num_bits, tensors[f"{place}.weight_scale"].float()
    middle, zero = 2 ** (bits - 1), tensors.get(f"{place}.weight_zero_point")
    codes = unpacked_words(tensors[f"{place}.weight_packed"], bits, cols).float() - middle
    scale = scale.reshape(1, 1) if scheme.strategy == "tensor" else scale
    group = {"tensor": 0, "channel": cols}.get(scheme.strategy, scheme.group_size or 0)
    if zero is not None:
        packed = scheme.strategy != "tensor"
        zero = unpacked_words(zero.T, bits, rows).T.float() - middle if packed else zero.reshape(1, 1).float()
        codes = codes - per_entry(zero, (rows, cols), group)
    return per_entry(scale, (rows, cols), group) * codes


def _config(network: nn.Module, schemes: dict[str, Scheme], ignored: list[str]) -> dict[str, Any]:
    """`config.json`: that of the network, where it is one of transformers, and how its layers are packed."""
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(name)
    listed = {
        f"group_{i}": {"targets": names, "weights": scheme.said(), "format": FORMAT}
        | dict.fromkeys(("input_activations", "output_activations"))
        for i, (scheme, names) in enumerate(groups.items())
    }
    said = {"quant_method": "compressed-tensors", "format": FORMAT, "quantization_status": "compressed"}
    said |= {"config_groups": listed, "ignore": ignored, "kv_cache_scheme": None, "global_compression_ratio": None}
    own: Any = getattr(network, "config", None)
    first = next((p for p in network.parameters()), torch.empty(0))
    plain = {"architectures": [type(network).__name__], "dtype": type_of(first)}
    known: dict[str, Any] = own.to_dict() if callable(getattr(own, "to_dict", None)) else plain
    return known | {"quantization_config": said}


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be made, or that holds something, before any work.

    Raises:
        UsageError: it exists and is not empty, or its place does not exist.
    """
    if not folder.parent.is_dir():
        raise UsageError(f"the folder {folder.parent} does not exist")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists already and is not replaced; choose another name or remove it first")
    if not os.access(folder.parent, os.W_OK):
        raise UsageError(f"the folder {folder.parent} cannot be written")


@contextmanager
def _made(folder: Path) -> Iterator[Path]:
    """A folder to write to that becomes `folder` at the end, whole or not at all."""
    place = folder.with_name(f".{folder.name}.unproved")
    try:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        yield place
        os.replace(place, folder)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
