"""Write the golden files of format version 2: `python -m tests.golden.make_v2`. The rules are those of make_v1.

Beside the decoded tensors a `.json` has, by weight name, inputs and what they are rounded to.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from featherweight.activations import ActivationGrid
from featherweight.artifact.schema import Artifact, StoredUnit
from featherweight.artifact.write import to_bytes
from featherweight.layers import View
from tests.golden.make_v1 import F16, F32, dense, grid, sparse, unit

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
    return {"inputs": Artifact((*units, unit("float.weight", dense(2, 2, F16))), {}, ())}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, artifact in artifacts().items():
        path = FOLDER / f"{name}.fw"
        if path.exists():
            print(f"{path.name} is kept as it is")
            continue
        path.write_bytes(to_bytes(artifact))
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
