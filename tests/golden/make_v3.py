"""Write the golden file of format version 3: `python -m tests.golden.make_v3`. The rules are those of make_v1."""

import json
from pathlib import Path

import torch

from featherweight.artifact.schema import Artifact, StoredUnit
from featherweight.artifact.write import plain_bytes
from featherweight.weights import Dense, Grid, Sparse
from featherweight.weights.masks import BoxMap
from tests.golden.make_v1 import F16, F32, dense, grid, unit

FOLDER = Path(__file__).parent / "v3"


def artifact() -> Artifact:
    """Masks of rows and channels, with everything, something and nothing kept."""

    def boxed(values: Dense | Grid, rows: list[int], channels: list[int], taps: int = 1) -> Sparse:
        keep = torch.zeros(values.shape, dtype=torch.bool)
        own = torch.tensor(channels, dtype=torch.long)[:, None] * taps + torch.arange(taps)
        keep[torch.tensor(rows, dtype=torch.long)[:, None], own.reshape(1, -1)] = True
        return Sparse(keep, values, BoxMap(taps))

    weights = [
        boxed(dense(3, 4, F16), [0, 2], [1, 2, 3]),
        boxed(grid(4, 18, 3, 18), [1, 3], [0, 1], taps=9),
        boxed(grid(5, 6, 4, 3, sym=False), [4], [0, 1, 2], taps=2),
        boxed(dense(2, 3, F32), [0, 1], [0, 1, 2]),
        boxed(dense(2, 3, F16), [], []),
    ]
    units: tuple[StoredUnit, ...] = tuple(unit(f"u{i}.weight", w) for i, w in enumerate(weights))
    return Artifact(units, {}, ())


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / "boxes.fw"
    if path.exists():
        print(f"{path.name} is kept as it is")
        return
    path.write_bytes(plain_bytes(artifact()))
    tensors = {
        n: {"type": str(t.dtype)[6:], "shape": list(t.shape), "values": t.flatten().tolist()}
        for n, t in artifact().state().items()
    }
    path.with_suffix(".json").write_text(json.dumps(tensors) + "\n")
    print(f"{path.name} written")


if __name__ == "__main__":
    main()
