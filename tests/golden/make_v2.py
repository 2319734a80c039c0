"""Write the golden files of format version 2: `python -m tests.golden.make_v2`. The rules are those of make_v1.

Beside the decoded tensors a `.json` has, by weight name, inputs and what they are rounded to.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from featherweight.activations import ActivationGrid
from featherweight.artifact.schema import Artifact, StoredUnit
from featherweight.artifact.write import plain_bytes
from featherweight.layers import View
from featherweight.methods import NM, Blocks, Channels, Pattern, Rows
from featherweight.methods.patterns import keep_largest, mask_of
from featherweight.weights import Dense, Grid, Sparse
from tests.golden.make_v1 import F16, F32, dense, grid, sequence, sparse, unit

FOLDER = Path(__file__).parent / "v2"


def inputs() -> Tensor:
    """Some that are rounded, halves among them, and some beyond any range."""
    return torch.cat([torch.arange(-12, 13) / 8, torch.tensor([-1e30, -0.0, 0.3, 5.55, 1e30])])


def artifacts() -> dict[str, Artifact]:
    """Every golden file by name."""
    tenth = float(torch.tensor(0.1))
    grids = [
        ActivationGrid(8, tenth, 128),
        ActivationGrid(8, 0.25, 0),
        ActivationGrid(4, 0.25, 15),
        ActivationGrid(2, 2.0**-126, 3),
    ]
    weights = [grid(3, 5, 4, 5), dense(2, 3, F32), sparse(dense(4, 6, F16), 3), dense(1, 1, F16)]
    units = [
        StoredUnit((f"u{i}.weight", f"tied{i}.weight"), View(w.shape), w, "rtn", 0.5, "a note", g)
        for i, (w, g) in enumerate(zip(weights, grids, strict=True))
    ]
    inputs_ = Artifact((*units, unit("float.weight", dense(2, 2, F16))), {}, ())
    return {"inputs": inputs_, "masks": Artifact(masks(), {}, ())}


def masks() -> tuple[StoredUnit, ...]:
    """Every pattern, with short groups and several taps."""

    def pruned(pattern: Pattern, values: Dense | Grid, taps: int = 1, groups: int = 1) -> Sparse:
        rows, cols = values.shape
        score = sequence(rows * cols, 11, 29).double().reshape(rows, cols)
        return Sparse(keep_largest(score, pattern, taps, groups), values, mask_of(pattern, taps, groups))

    weights = [
        pruned(Blocks(0.5, 2), dense(2, 6, F16)),
        pruned(Blocks(0.4, 4), grid(3, 18, 3, 18), taps=3),
        pruned(NM(2, 4), grid(2, 6, 4, 3, sym=False)),
        pruned(NM(1, 2), dense(3, 15, F32), taps=3),
        pruned(NM(3, 5), dense(2, 3, F16)),
        pruned(NM(4, 4), dense(2, 4, F16)),
        pruned(NM(8, 16), grid(2, 32, 2, 0)),
        pruned(Rows(0.5), grid(4, 6, 2, 0)),
        pruned(Channels(0.5), dense(4, 6, F16), groups=2),
        pruned(Channels(0.4), grid(2, 15, 5, 15), taps=3),
    ]
    return tuple(unit(f"u{i}.weight", w) for i, w in enumerate(weights))


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, artifact in artifacts().items():
        path = FOLDER / f"{name}.fw"
        if path.exists():
            print(f"{path.name} is kept as it is")
            continue
        path.write_bytes(plain_bytes(artifact))
        x = inputs()
        tensors = {
            n: {"type": str(t.dtype)[6:], "shape": list(t.shape), "values": t.flatten().tolist()}
            for n, t in artifact.state().items()
        }
        rounded = {n: g.simulate(x).tolist() for n, g in artifact.inputs().items()}
        path.with_suffix(".json").write_text(
            json.dumps({"tensors": tensors, "x": x.tolist(), "rounded": rounded}) + "\n"
        )
        print(f"{path.name} written")


if __name__ == "__main__":
    main()
