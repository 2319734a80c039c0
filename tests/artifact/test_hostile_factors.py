"""Files with factors that were made to break the reader; test_hostile.py has the others."""

import pytest
import torch

from featherweight.artifact.read import from_bytes
from featherweight.artifact.schema import Artifact, StoredUnit
from featherweight.artifact.write import plain_bytes
from featherweight.errors import FormatError
from featherweight.layers import View
from featherweight.weights import Dense, Factors, Grid
from tests.artifact.test_hostile import edit, frugal, nodes, owner, poked, refused, shorter, take_apart


def factored() -> Artifact:
    """Two weights that share a factor, one of three factors with a grid among them."""
    pair = Dense(torch.ones(2, 6).half())
    codes = Grid(torch.ones(2, 6, dtype=torch.uint8), torch.ones(2, 1).half(), None, 3, 6)
    low = {"o": 3, "r": 2, "c": 6}
    tucker = {"o": 3, "r": 2, "s": 3, "t": 2, "i": 3}
    parts = Dense(torch.ones(3, 2).half()), codes, Dense(torch.ones(3, 3).half())
    weights = {
        "first.weight": Factors((3, 6), "oc", ("or", "rc"), low, (parts[0], pair), (1,)),
        "second.weight": Factors((3, 6), "oc", ("or", "rc"), low, (parts[0], pair), (1,)),
        "third.weight": Factors((3, 6), "oit", ("or", "rst", "si"), tucker, parts),
    }
    return Artifact(tuple(StoredUnit((n,), View(w.shape), w, "tucker") for n, w in weights.items()), {}, ())


FACTORED = plain_bytes(factored())
PATHS = [path for path in nodes(take_apart(FACTORED).contents) if path and path[0] in ("factors", "units")]
INNER = "units.2.weight"


def doubled(parts):
    parts.contents["factors"] *= 2


def older(parts):
    parts.contents["format"] = 4
    del parts.contents["factors"]


ATTACKS = {
    "version-4": (edit("format", 4), "the header must have the fields"),
    "kind-before-version-5": (older, "no weights made of factors"),
    "shared-none": (edit("factors", []), r"the number of one of 0 shared ones"),
    "shared-more": (doubled, "elements of 'f16'"),
    "shared-sparse": (edit("factors.0.weight.kind", "sparse"), "of kind 'dense' or 'grid'"),
    "shared-factors": (edit("factors.0.weight.kind", "factors"), "of kind 'dense' or 'grid'"),
    "shared-vector": (edit("factors.0.shape", [12]), "of kind 'dense' or 'grid'"),
    "shared-empty": (edit("factors.0.shape", [0, 12]), "is not a shape"),
    "shared-turned": (edit("factors.0.shape", [6, 2]), r"factor 1 is shared and must have shape \(2, 6\)"),
    "shared-huge": (edit("factors.0.shape", [2**20, 2**19]), "elements of 'f16'"),
    "number-beyond": (edit("units.0.weight.factors.1", 1), "the number of one of 1 shared ones"),
    "number-negative": (edit("units.0.weight.factors.1", -1), "the number of one of 1 shared ones"),
    "number-true": (edit("units.0.weight.factors.1", True), "the number of one of 1 shared ones"),
    "number-null": (edit("units.0.weight.factors.1", None), "the number of one of 1 shared ones"),
    "books": (edit("units.0.weight.books", [0]), "of kind 'factors' has no books"),
    "inner-sparse": (edit(f"{INNER}.factors.0.kind", "sparse"), "'kind' must be one of"),
    "inner-bits": (edit(f"{INNER}.factors.1.bits", 9), "number 1: field 'bits' must be 1 to 8"),
    "fewer-factors": (edit(f"{INNER}.factors", []), "an entry for each of 3 terms"),
    "fewer-terms": (edit(f"{INNER}.terms", ["or", "rst"]), "of the letters of the terms"),
    "axes-do-not-fit": (edit(f"{INNER}.axes", "os"), "do not multiply to 18 entries|once only"),
    "rank-huge": (edit(f"{INNER}.sizes.r", 2**39), "far more memory|elements of"),
    "rank-over": (edit(f"{INNER}.sizes.r", 3), "elements of|padding"),
    "matrix-huge": (edit(INNER.replace("weight", "shape"), [2**20, 2**19]), "do not multiply"),
    "grid-padding": (poked("u8", 4, b"\xff"), "third.weight: the padding bits"),
    "scale-not-finite": (poked("f16", -2, b"\x00\x7e"), "."),
    "short": (shorter("f16", 2), "elements of 'f16'"),
}  # fmt: skip


def test_the_file_is_fine():
    with frugal():
        again = from_bytes(FACTORED)
    assert plain_bytes(again) == FACTORED
    assert again.units[0].weight.parts[1] is again.units[1].weight.parts[1]


@pytest.mark.parametrize(("attack", "told"), ATTACKS.values(), ids=ATTACKS)
def test_an_attack_with_a_right_checksum(attack, told):
    parts = take_apart(FACTORED)
    attack(parts)
    with frugal():
        refused(parts.file(), told)


def test_any_field_of_any_wrong_type():
    """Nothing but a FormatError, whatever stands where."""
    for path in PATHS:
        for value in (None, True, -1, 0, 2**62, 1.5, "", "zz", [], [[]], {}, {"a": 1}):
            parts = take_apart(FACTORED)
            place = owner(parts.contents, path)
            same = place[path[-1]] == value
            place[path[-1]] = value
            try:
                from_bytes(parts.file())
            except FormatError:
                continue
            assert same or path[-1] in ("method", "error", "names") or path[-2] in ("names",), (path, value)


def test_small_factors_cannot_claim_much_memory():
    """2 ** 19 x 2 ** 19 entries from a megabyte of factors."""
    long = torch.ones(2**19, 1).half()
    weight = Factors(
        (2**19, 2**19), "oc", ("or", "rc"), {"o": 2**19, "r": 1, "c": 2**19}, (Dense(long), Dense(long.reshape(1, -1)))
    )
    data = plain_bytes(Artifact((StoredUnit(("w",), View(weight.shape), weight, "x"),), {}, ()))
    refused(data, "more entries than a file of this size may claim")
