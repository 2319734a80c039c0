"""What a featherweight file holds, in memory. docs/format.md says how it lies in the file."""

import hashlib
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from featherweight.activations import ActivationGrid
from featherweight.layers import View
from featherweight.weights import Weight

VERSIONS = (1, 2, 3, 4, 5, 6)  # read; coded files are of the last, plain ones of the first that can say what is in them
KEY = "featherweight"  # the one metadata entry of the safetensors file
BLANK = "0" * 32  # stands where the checksum goes, while it is computed
LARGEST = 1 << 24  # characters of a table of contents that was packed
MARK = b'\\"checksum\\":\\"'  # what precedes it in the file: JSON inside a JSON string
STREAMS = {  # name in the file -> element type; each holds all payload of that type, in the order of the contents.
    # safetensors has the same names in capitals
    "u8": torch.uint8,
    "f16": torch.float16,
    "f32": torch.float32,
    "f64": torch.float64,
    "bf16": torch.bfloat16,
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
    "bool": torch.bool,
}
STREAM_OF = {dtype: name for name, dtype in STREAMS.items()}


@final
@dataclass(frozen=True, slots=True, eq=False)
class StoredUnit:
    """One compressed parameter. error: relative layer error, None where unknown. method and note are for people.
    input: the grid that its inputs are rounded to, None for float inputs."""

    names: tuple[str, ...]
    view: View
    weight: Weight
    method: str
    error: float | None = None
    note: str = ""
    input: ActivationGrid | None = None

    def tensor(self) -> Tensor:
        """The decoded parameter, float32."""
        return self.view.tensor(self.weight.dense())


@final
@dataclass(frozen=True, slots=True, eq=False)
class FoldedNorm:
    """A BatchNorm in eval mode as scale * x + shift, (channels,) each. It is restored with running mean 0 and running
    variance 1 - eps."""

    name: str
    scale: Tensor
    shift: Tensor
    eps: float

    def tensors(self) -> dict[str, Tensor]:
        """The module's own tensors, float32."""
        return {
            f"{self.name}.weight": self.scale.float(),
            f"{self.name}.bias": self.shift.float(),
            f"{self.name}.running_mean": torch.zeros_like(self.shift, dtype=torch.float32),
            f"{self.name}.running_var": torch.full_like(self.scale, 1 - self.eps, dtype=torch.float32),
        }


@final
@dataclass(frozen=True, slots=True, eq=False)
class Artifact:
    """Everything in a file. rest: tensors stored as they are, or as fp16. about: plain JSON for people, never needed
    to decode."""

    units: tuple[StoredUnit, ...]
    rest: dict[str, Tensor]
    norms: tuple[FoldedNorm, ...]
    about: dict[str, Any] = field(default_factory=dict)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the file determines, decoded, under each of its names. Floats come as float32."""
        decoded: dict[str, Tensor] = {}
        for unit in self.units:
            tensor = unit.tensor()
            decoded |= dict.fromkeys(unit.names, tensor)
        decoded |= {n: t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for n, t in self.rest.items()}
        for norm in self.norms:
            decoded |= norm.tensors()
        return decoded

    def inputs(self) -> dict[str, ActivationGrid]:
        """The grids of the inputs that are rounded, under every name of their weight."""
        return {name: u.input for u in self.units if u.input is not None for name in u.names}

    def digest(self) -> str:
        """A fingerprint of `state()` and `inputs()`: equal exactly where every decoded bit and every grid is equal."""
        seen = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.state().items()):
            seen.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            seen.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, grid in sorted(self.inputs().items()):
            seen.update(f"input of {name} {grid.bits} {grid.scale!r} {grid.zero}\n".encode())
        return seen.hexdigest()


def is_foldable(module: nn.Module) -> bool:
    """Whether the module is a BatchNorm that, in eval mode, is a fixed scale and shift."""
    return (
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        and isinstance(module.weight, nn.Parameter)
        and isinstance(module.bias, nn.Parameter)
        and module.running_mean is not None
        and module.running_var is not None
        and 0 <= module.eps < 1  # it is restored with the variance 1 - eps
    )
