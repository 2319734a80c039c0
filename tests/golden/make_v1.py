"""Write the golden files of format version 1: `python -m tests.golden.make_v1`.

Files that exist are never written again: what a released version wrote must be read for ever. Add a case, never change
one. Everything comes from fixed arithmetic. Beside each `.fw` lies a `.json` with every decoded tensor.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from featherweight.artifact.schema import Artifact, FoldedNorm, StoredUnit
from featherweight.artifact.write import plain_bytes
from featherweight.layers import View
from featherweight.weights import Dense, Grid, Sparse, Weight

FOLDER = Path(__file__).parent / "v1"
F16, F32 = torch.float16, torch.float32


def sequence(count: int, step: int, modulus: int) -> Tensor:
    """Whole numbers below `modulus`: 1, 1 + step, 1 + 2 step, ..."""
    return (torch.arange(count) * step + 1) % modulus


def numbers(shape: tuple[int, ...], dtype: torch.dtype, divisor: int = 7) -> Tensor:
    """Positive and negative fractions, most of them not exact in binary."""
    count = int(torch.tensor(shape).prod())
    return ((sequence(count, 11, 29) - 14).double() / divisor).to(dtype).reshape(shape)


def dense(rows: int, cols: int, dtype: torch.dtype) -> Dense:
    return Dense(numbers((rows, cols), dtype))


def grid(rows: int, cols: int, bits: int, group: int, dtype: torch.dtype = F16, sym: bool = True) -> Grid:
    codes = sequence(rows * cols, 7, 2**bits).to(torch.uint8).reshape(rows, cols)
    scales = (1, 1) if group == 0 else (rows, -(-cols // group))
    zero = None if sym else sequence(scales[0] * scales[1], 3, 2**bits).to(torch.uint8).reshape(scales)
    return Grid(codes, numbers(scales, dtype, 53), zero, bits, group)


def sparse(values: Dense | Grid, modulus: int) -> Sparse:
    """Keeps about one entry in `modulus`; 1 keeps all, 0 none."""
    rows, cols = values.shape
    keep = sequence(rows * cols, 5, modulus) == 0 if modulus else torch.zeros(rows * cols, dtype=torch.bool)
    return Sparse(keep.reshape(rows, cols), values)


def unit(name: str, weight: Weight, method: str = "rtn", shape: tuple[int, ...] | None = None) -> StoredUnit:
    return StoredUnit((name,), View(shape or weight.shape), weight, method)


def artifacts() -> dict[str, Artifact]:
    """Every golden file by name."""
    extremes = torch.tensor([[65504.0, -65504.0, 2.0**-24], [-(2.0**-24), -0.0, 0.1]])
    cases: dict[str, Artifact] = {}
    cases["dense"] = Artifact(
        (
            unit("f32.weight", dense(3, 4, F32)),
            unit("f16.weight", dense(4, 18, F16), shape=(4, 2, 3, 3)),
            unit("extremes.weight", Dense(extremes.half())),
            unit("vector.weight", dense(5, 1, F16), shape=(5,)),
        ),
        {},
        (),
    )
    cases["grid_symmetric"] = Artifact(
        tuple(unit(f"b{b}.weight", grid(3, 5, b, 5 if b % 2 else 0), f"rtn-{b}") for b in range(1, 9)), {}, ()
    )
    cases["grid_asymmetric"] = Artifact(
        tuple(unit(f"b{b}.weight", grid(3, 5, b, 0 if b % 2 else 5, F32, sym=False)) for b in range(1, 9)), {}, ()
    )
    cases["grid_groups"] = Artifact(
        (
            unit("even.weight", grid(2, 8, 4, 4)),
            unit("short_last.weight", grid(3, 10, 3, 4, F32)),
            unit("short_last_zero.weight", grid(3, 10, 3, 4, F16, sym=False)),
            unit("ones.weight", grid(2, 3, 2, 1, F32, sym=False)),
            unit("row.weight", grid(2, 3, 5, 3)),
        ),
        {},
        (),
    )
    cases["sparse"] = Artifact(
        (
            unit("dense16.weight", sparse(dense(4, 6, F16), 3)),
            unit("dense32.weight", sparse(dense(3, 3, F32), 2)),
            unit("grid.weight", sparse(grid(4, 6, 3, 4, F32, sym=False), 3), "obs + rtn"),
            unit("binary.weight", sparse(grid(3, 7, 1, 7), 2)),
            unit("all.weight", sparse(grid(2, 2, 8, 0), 1)),
            unit("none.weight", sparse(dense(2, 5, F16), 0)),
        ),
        {},
        (),
    )
    cases["transposed"] = Artifact(
        (
            StoredUnit(("up1.weight",), View((3, 2, 2, 2), 1), dense(2, 12, F32), "rtn"),
            StoredUnit(("up2.weight",), View((4, 3, 2), 2), grid(6, 4, 4, 2), "rtn"),
            StoredUnit(("up4.weight", "tied.weight"), View((4, 1, 3), 4), sparse(grid(4, 3, 2, 3), 2), "rtn"),
        ),
        {},
        (),
    )
    cases["norms"] = Artifact(
        (unit("conv.weight", grid(2, 3, 4, 3), shape=(2, 3, 1, 1)),),
        {"conv.bias": numbers((2,), F16)},
        (
            FoldedNorm("bn1", numbers((2,), F16), numbers((2,), F16, 3), 1e-5),
            FoldedNorm("deep.bn2", numbers((3,), F32), numbers((3,), F32, 3), 0.001),
        ),
    )
    cases["rest"] = Artifact(
        (StoredUnit(("größe.weight",), View((1, 2)), dense(1, 2, F16), "rtn", 0.012345, "a note"),),
        {
            "f16": numbers((2, 2), F16),
            "f32": numbers((3,), F32),
            "f64": numbers((2,), torch.float64),
            "bf16": numbers((3,), torch.bfloat16),
            "u8": torch.tensor([0, 255], dtype=torch.uint8),
            "i8": torch.tensor([-128, 127], dtype=torch.int8),
            "i16": torch.tensor([-(2**15), 2**15 - 1], dtype=torch.int16),
            "i32": torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32),
            "i64": torch.tensor([-(2**63), 2**63 - 1]),
            "bool": torch.tensor([[True, False, True]]),
            "scalar": torch.tensor(-2.5),
            "empty": torch.empty(0, 3, dtype=torch.int16),
        },
        (),
        {"model": "net.py:make", "fp32_bytes": 8, "nested": {"list": [1, 2.5, None, True]}},
    )
    return cases


def as_json(state: dict[str, Tensor]) -> str:
    """Decoded tensors; a float is written with enough digits to be exact."""
    return json.dumps(
        {
            n: {"type": str(t.dtype)[6:], "shape": list(t.shape), "values": t.flatten().tolist()}
            for n, t in state.items()
        }
    )


def main() -> None:
    for name, artifact in artifacts().items():
        path = FOLDER / f"{name}.fw"
        if path.exists():
            print(f"{path.name} is kept as it is")
            continue
        path.write_bytes(plain_bytes(artifact))
        path.with_suffix(".json").write_text(as_json(artifact.state()) + "\n")
        print(f"{path.name} written")


if __name__ == "__main__":
    main()
