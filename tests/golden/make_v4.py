"""Write the golden file of format version 4: `python -m tests.golden.make_v4`. The rules are those of make_v1."""

from pathlib import Path

import torch
from torch import Tensor

from featherweight.artifact.schema import Artifact, StoredUnit
from featherweight.artifact.write import plain_bytes
from featherweight.layers import View
from featherweight.weights import Codebook, Sparse
from featherweight.weights.codebook import vector_counts
from featherweight.weights.masks import AnyMask, Bitmap, BoxMap, RowMap
from tests.golden.make_v1 import F16, F32, as_json, grid, numbers, sequence, unit

FOLDER = Path(__file__).parent / "v4"


def book(words: int, d: int, divisor: int) -> Tensor:
    return numbers((words, d), F16, divisor)


def vectors(
    rows: int,
    cols: int,
    books: list[Tensor],
    dtype: torch.dtype = F16,
    taps: int = 1,
    keep: Tensor | None = None,
) -> Codebook:
    counts = [-(-cols // books[0].shape[1])] if keep is None else vector_counts(keep, books[0].shape[1]).tolist()
    size = rows, max(*counts, 1)
    codes = [sequence(size[0] * size[1], 7 + 2 * m, len(b)).reshape(size) for m, b in enumerate(books)]
    scale = numbers((rows, 1), dtype, 53)
    return Codebook(torch.stack(codes, dim=2).to(torch.int16), tuple(books), scale, cols, taps, keep)


def pruned(keep: Tensor, books: list[Tensor], taps: int = 1, form: AnyMask | None = None) -> Sparse:
    values = vectors(keep.shape[0], keep.shape[1], books, F32 if taps > 1 else F16, taps, keep)
    return Sparse(keep, values, form or Bitmap())


def artifact() -> Artifact:
    """One book and several, shared and not; of rows in whole vectors and with some left over; with masks that keep
    everything, something and nothing."""
    first, second, wide, single = book(8, 4, 7), book(4, 4, 11), book(512, 2, 5), book(2, 1, 3)
    uneven = torch.arange(9) < torch.tensor([9, 0, 1, 5])[:, None]
    uneven = uneven[:, sequence(9, 4, 9)]
    rows = (torch.arange(3) != 1)[:, None].expand(3, 6).contiguous()
    box = torch.tensor([True, False, True])[:, None] & torch.tensor([True, True, False]).repeat_interleave(3)
    weights = [
        vectors(3, 8, [first]),
        vectors(3, 10, [second.clone(), first.clone()], F32),  # stored once: their contents are those of the others
        vectors(2, 18, [first, second, first], taps=9),
        vectors(2, 3, [second]),
        vectors(2, 7, [wide]),
        grid(2, 3, 4, 3),
        vectors(1, 1, [single]),
        pruned(uneven, [first]),
        pruned(uneven, [wide, wide.flip(0)[:16].contiguous()], taps=3),
        pruned(rows, [second], form=RowMap()),
        pruned(box, [second, first], 3, BoxMap(3)),
        pruned(torch.zeros(2, 5, dtype=torch.bool), [first, second]),
        pruned(torch.ones(2, 5, dtype=torch.bool), [first]),
    ]
    units = [unit(f"u{i}.weight", w, "additive") for i, w in enumerate(weights)]
    transposed = StoredUnit(
        ("up.weight", "tied.weight"), View((4, 3, 2), 2), vectors(6, 4, [second], taps=2), "additive"
    )
    return Artifact((*units, transposed), {"u0.bias": numbers((3,), F16)}, ())


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / "books.fw"
    if path.exists():
        print(f"{path.name} is kept as it is")
        return
    path.write_bytes(plain_bytes(artifact()))
    path.with_suffix(".json").write_text(as_json(artifact().state()) + "\n")
    print(f"{path.name} written")


if __name__ == "__main__":
    main()
