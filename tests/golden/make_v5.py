"""Write the golden file of format version 5: `python -m tests.golden.make_v5`. The rules are those of make_v1."""

from pathlib import Path

from featherweight.artifact.schema import Artifact, StoredUnit
from featherweight.artifact.write import plain_bytes
from featherweight.layers import View
from featherweight.weights import Dense, Factor, Factors
from featherweight.weights.factors import matrix_of
from tests.golden.make_v1 import F16, F32, as_json, grid, numbers, unit

FOLDER = Path(__file__).parent / "v5"


def factors(
    shape: tuple[int, int], axes: str, terms: str, given: dict[int, Factor] | None = None, **sizes: int
) -> Factors:
    """Small exact numbers, so that float64 sums are the same in every order. given: the shared ones, by position."""
    own: list[Factor] = []
    for k, term in enumerate(terms.split()):
        rows, cols = matrix_of(term, sizes)
        plain = Dense(numbers((rows, cols), F32 if k % 2 else F16, 8))
        own.append((given or {}).get(k) or (grid(rows, cols, 3, cols) if k == 2 else plain))
    return Factors(shape, axes, tuple(terms.split()), sizes, tuple(own), tuple(given or {}))


def artifact() -> Artifact:
    """Every form, factors on a grid and not, one shared by three weights in two places, one alone."""
    pair, rounded = Dense(numbers((2, 6), F16, 16)), grid(2, 6, 4, 3)
    weights = [
        factors((3, 6), "oc", "or rc", o=3, r=2, c=6),
        factors((3, 6), "oc", "or rc", {1: pair}, o=3, r=2, c=6),
        factors((5, 6), "oc", "or rc", {1: Dense(pair.values.clone())}, o=5, r=2, c=6),  # stored once: equal contents
        factors((2, 6), "oc", "ro rc", {0: grid(2, 2, 8, 2), 1: rounded}, o=2, r=2, c=6),
        factors((4, 6), "oc", "rc ro", {0: rounded}, o=4, r=2, c=6),
        factors((3, 8), "oit", "otr ri", o=3, r=2, i=2, t=4),
        factors((3, 12), "oiyx", "oxr riy", o=3, r=2, i=2, y=3, x=2),
        factors((3, 8), "oit", "or rst si", o=3, r=2, s=2, i=2, t=4),
        factors((4, 8), "mnjkt", "mu nuv tvw wjs sk", m=2, n=2, j=2, k=2, t=2, u=2, v=3, w=2, s=2),
        factors((2, 6), "oit", "zoa atb biz", o=2, i=3, t=2, z=2, a=2, b=1),
        factors((3, 8), "oiyx", "yr xr ir or", o=3, i=2, y=2, x=2, r=3),
        factors((3, 8), "obc", "obr rbc", o=3, b=2, c=4, r=2),
        factors((2, 3), "oc", "co", o=2, c=3),
        factors((1, 1), "oc", "or rc", o=1, r=1, c=1),
    ]
    units = [unit(f"u{i}.weight", w, "factors") for i, w in enumerate(weights)]
    up = factors((6, 4), "oit", "or rit", o=6, r=2, i=2, t=2)
    transposed = StoredUnit(("up.weight", "tied.weight"), View((4, 3, 2), 2), up, "factors")
    return Artifact((*units, transposed), {"u0.bias": numbers((3,), F16)}, ())


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / "factors.fw"
    if path.exists():
        print(f"{path.name} is kept as it is")
        return
    path.write_bytes(plain_bytes(artifact()))
    path.with_suffix(".json").write_text(as_json(artifact().state()) + "\n")
    print(f"{path.name} written")


if __name__ == "__main__":
    main()
