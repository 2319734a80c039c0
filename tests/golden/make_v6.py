"""Write the golden file of format version 6: `python -m tests.golden.make_v6`. The rules are those of make_v1, but the
`.json` has a digest of every tensor and its first entries: matrices that are worth coding have too many."""

import json
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from featherweight.artifact.schema import Artifact, FoldedNorm, StoredUnit
from featherweight.artifact.write import to_bytes
from featherweight.layers import View
from featherweight.weights import Codebook, Dense, Factor, Factors, Grid, Sparse
from featherweight.weights.codebook import vector_counts
from featherweight.weights.factors import matrix_of
from featherweight.weights.grid import per_entry, scale_shape
from featherweight.weights.masks import AnyMask, Bitmap, RowMap
from tests.golden.make_v1 import F16, F32, numbers, sequence, unit

FOLDER = Path(__file__).parent / "v6"


def peaked(rows: int, cols: int, most: int, step: int = 7) -> Tensor:
    """Whole numbers up to `most` on either side of 0, which is half of them."""
    i = sequence(rows * cols, step, 97) * sequence(rows * cols, 5, 11) % 101
    size = (most * torch.clamp(i - 50, min=0) + 49) // 50 * (sequence(rows * cols, 3, 8) + 1) // 8
    return torch.where(i % 3 == 0, -size, size).reshape(rows, cols)


def grid(rows: int, cols: int, bits: int, group: int, dtype: torch.dtype = F16, sym: bool = True) -> Grid:
    scales = scale_shape((rows, cols), group)
    middle, zero = torch.tensor(2 ** (bits - 1)), None
    if not sym:
        zero = (sequence(scales[0] * scales[1], 3, 2**bits)).reshape(scales).to(torch.uint8)
        middle = per_entry(zero.long(), (rows, cols), group)
    codes = (middle + peaked(rows, cols, 2 ** (bits - 1))).clamp(0, 2**bits - 1).to(torch.uint8)
    return Grid(codes, numbers(scales, dtype, 64), zero, bits, group)


def mask(rows: int, cols: int) -> Tensor:
    """Keeps about a seventh."""
    return (peaked(rows, cols, 8, 13) > 1).contiguous()


def vectors(rows: int, cols: int, books: list[Tensor], keep: Tensor | None = None) -> Codebook:
    """Of any word, but mostly of the first ones."""
    d = books[0].shape[1]
    size = rows, -(-cols // d) if keep is None else int(vector_counts(keep, d).max())
    codes = [peaked(*size, len(b) - 1, 7 + 4 * m).abs() for m, b in enumerate(books)]
    return Codebook(torch.stack(codes, dim=2).to(torch.int16), tuple(books), numbers((rows, 1), F32, 8), cols, 1, keep)


def factors(rows: int, cols: int, rank: int, shared: Factor) -> Factors:
    """Three in a chain: floats, a grid, and one that is shared. Exact small numbers, as in make_v5."""
    sizes = {"o": rows, "r": rank, "s": rank, "c": cols}
    own = Dense(numbers(matrix_of("or", sizes), F32, 8)), grid(rank, rank, 5, rank), shared
    return Factors((rows, cols), "oc", ("or", "rs", "sc"), sizes, own, (2,))


def artifact() -> Artifact:
    """Every kind of field that can be coded, and beside it fields that cannot be, or that get no shorter."""
    first, second = numbers((16, 2), F16, 8), numbers((4, 2), F16, 16)
    keep, some, many = mask(24, 40), mask(12, 30), (peaked(24, 40, 8, 13) >= 0).contiguous()
    rows = (torch.arange(12) % 3 != 1)[:, None].expand(12, 30).contiguous()
    form: AnyMask = RowMap()
    shared = grid(20, 24, 4, 24)
    weights = [
        grid(24, 40, 4, 40),
        grid(24, 40, 3, 0, F32),
        grid(24, 40, 8, 16),
        grid(12, 30, 2, 30, sym=False),
        grid(12, 30, 8, 0, sym=False),
        grid(12, 30, 5, 7, F32, sym=False),
        grid(3, 5, 1, 5),
        grid(1, 1, 2, 1),
        Sparse(keep, grid(24, 40, 4, 40), Bitmap()),
        Sparse(many, grid(24, 40, 6, 15, sym=False), Bitmap()),
        Sparse(rows, grid(12, 30, 3, 30), form),
        Sparse(some, Dense(numbers((12, 30), F16, 8)), Bitmap()),
        vectors(24, 40, [first]),
        vectors(12, 30, [first, second]),
        Sparse(keep, vectors(24, 40, [first], keep), Bitmap()),
        factors(12, 24, 20, shared),
        factors(10, 24, 20, shared),
        Dense(numbers((3, 4), F32, 8)),
    ]
    units = [unit(f"u{i}.weight", w, "ecq") for i, w in enumerate(weights)]
    tied = StoredUnit(("up.weight", "tied.weight"), View((12, 20, 3), 2), grid(40, 18, 4, 18), "ecq", 0.012, "a note")
    rest = {
        "u0.bias": numbers((24,), F16, 8),
        "half": numbers((60,), torch.bfloat16, 8),
        "double": numbers((5, 12), torch.float64, 8),
        "twice": numbers((24,), F16, 8),  # equal to the first
        "index": torch.arange(60).reshape(6, 10) % 7,
        "index.again": torch.arange(60).reshape(6, 10) % 7,
        "index.flat": torch.arange(60) % 7,  # of another shape: stored
        "short": torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32),  # as it is: zlib does not pay
        "bytes": torch.tensor([0, 255], dtype=torch.uint8),
        "flags": torch.arange(200) % 5 == 0,
        "scalar": torch.tensor(-2.5),
        "empty": torch.empty(0, 3),
    }
    norms = (
        FoldedNorm("bn1", numbers((8,), F16, 8), numbers((8,), F16, 4), 1e-5),
        FoldedNorm("bn2", numbers((5,), F32, 8), numbers((5,), F32, 4), 0.001),
    )
    return Artifact((*units, tied), rest, norms, {"model": "net.py:make"})


def digests(state: dict[str, Tensor]) -> dict[str, object]:
    """What a reader must get: type, shape, the hash of the bytes, little-endian, and the first entries."""
    return {
        n: {
            "type": str(t.dtype)[6:],
            "shape": list(t.shape),
            "blake2b": blake2b(t.numpy().tobytes(), digest_size=16).hexdigest(),
            "first": t.flatten()[:4].tolist(),
        }
        for n, t in state.items()
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / "coded.fw"
    if path.exists():
        print(f"{path.name} is kept as it is")
        return
    path.write_bytes(to_bytes(artifact()))
    path.with_suffix(".json").write_text(json.dumps(digests(artifact().state())) + "\n")
    print(f"{path.name} written")


if __name__ == "__main__":
    main()
