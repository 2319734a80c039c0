"""Additive codes in the whole line: books that weights share."""

import json

import pytest

import featherweight as fw
from featherweight.artifact import read
from featherweight.demo import digits
from featherweight.errors import UsageError
from featherweight.layers import scan
from featherweight.methods import Additive, GridSpec, Obq, PruneQuantize, Vectors
from featherweight.methods.books import vectors_of
from featherweight.recipe import Override, Recipe, assign, method_of, recipe_of
from featherweight.target import Goal
from featherweight.weights import Codebook, Sparse, books_of
from tests.nets import words

TWO = Additive(Vectors(2, (4,)))


@pytest.fixture(scope="module")
def data():
    return digits.calibration()


def books(artifact):
    return {id(b) for u in artifact.units for b in books_of(u.weight)}


def test_books_are_fitted_for_all_weights_stored_once_and_shared_after_reading(data, tmp_path):
    small = fw.compress(digits.make(), data, method=TWO)
    size = small.save(tmp_path / "small.fw")
    assert size == (tmp_path / "small.fw").stat().st_size == small.report.file_bytes
    stored = read(tmp_path / "small.fw")
    made = [u for u in stored.units if isinstance(u.weight, Codebook)]
    assert len(made) >= 2
    assert len(books(stored)) == len(books(small.artifact)) == 1
    assert stored.digest() == small.artifact.digest()
    fw.load(tmp_path / "small.fw", into=digits.make())
    planned = fw.plan(digits.make(), data, recipe=Recipe(TWO))
    assert abs(planned.file_bytes - size) < 0.15 * size


def test_the_same_call_gives_the_same_bytes(data, tmp_path):
    files = []
    for name in ("a", "b"):
        fw.compress(digits.make(), data, method=TWO).save(tmp_path / name)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize(("share", "least"), [("network", 1), ("stage", 2), ("layer", 2)])
def test_who_shares_books(data, share, least):
    method = method_of({"method": "additive", "bits": 2, "vector": 2, "share": share})
    small = fw.compress(digits.make(), data, method=method)
    made = [u for u in small.artifact.units if isinstance(u.weight, Codebook)]
    count = {"network": 1, "stage": len({u.names[0].partition(".")[0] for u in made}), "layer": len(made)}[share]
    assert len(books(small.artifact)) == count >= least


def test_a_rate_becomes_vectors_that_suit_the_network_and_small_weights_grids():
    found = scan(digits.make())
    methods = assign(Recipe(method_of({"method": "additive", "bits": 2})), found)
    made = {n: m for n, m in methods.items() if isinstance(m, Additive)}
    assert len({(m.vectors, m.share) for m in made.values()}) == 1
    assert all(isinstance(m.vectors, Vectors) and m.vectors.rate == 2 for m in made.values())
    smallest = min(found.units, key=lambda u: u.params)
    assert isinstance(methods[smallest.name], Obq)
    assert methods[smallest.name].grid.bits in (3, 8)  # its rows are too short for vectors


def test_overrides_and_pruned_weights(data):
    recipe = recipe_of(
        {
            "method": "additive",
            "bits": 2,
            "vector": 2,
            "override": [
                {"match": "block1.body.3.*", "method": "obs", "sparsity": 0.5, "bits": 3, "quantizer": "additive"}
            ],
        }
    )
    name = "block1.body.3.weight"
    small = fw.compress(digits.make(), data, recipe=recipe)
    weight = next(u.weight for u in small.artifact.units if u.names[0] == name)
    assert isinstance(weight, Sparse)
    assert isinstance(weight.values, Codebook)
    assert weight.mask.float().mean() == pytest.approx(0.5, abs=0.01)
    assert len(books(small.artifact)) == 2


def test_in_order_and_with_a_database(data, tmp_path, monkeypatch):
    recipe = Recipe(TWO, sequential=True)
    first = fw.compress(digits.make(), data, recipe=recipe, database=tmp_path / "solved")
    monkeypatch.setattr("featherweight.sharing.fit", lambda *_: pytest.fail("books were fitted again"))
    again = fw.compress(digits.make(), data, recipe=recipe, database=tmp_path / "solved")
    assert first.report.in_order >= 2
    assert again.report.reused == len(again.artifact.units)
    assert again.artifact.digest() == first.artifact.digest()


def test_finetuning_keeps_books_shared_and_brings_the_outputs_closer(data, tmp_path):
    start = fw.compress(digits.make(), data, method=TWO, database=tmp_path / "solved")
    how = fw.Finetune(data, epochs=4)
    tuned = fw.compress(digits.make(), data, method=TWO, database=tmp_path / "solved", finetune=how)
    assert len(books(tuned.artifact)) == 1
    assert tuned.report.file_bytes == pytest.approx(start.report.file_bytes, rel=0.02)  # norms keep other digits
    losses = tuned.report.finetuned.losses
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["16x"])
def test_under_a_target_books_are_opened_where_their_bytes_come_back(data, tmp_path, target):
    small = fw.compress(digits.make(), data, target=Goal(target, among="additive", measurements=4))
    limit = small.report.allocation.limits["bytes"]
    assert 0.9 * limit < small.save(tmp_path / "small.fw") <= limit
    kinds = {type(u.weight).__name__ for u in small.artifact.units}
    assert kinds <= {"Grid", "Codebook"}


def test_candidates_without_books_can_be_asked_for(data):
    small = fw.compress(digits.make(), data, target=Goal("14x", among="quantize", measurements=2))
    assert not books(small.artifact)


def test_without_data_vectors_are_fitted_to_the_weights_alone():
    report = fw.compress(words(), method=TWO).report
    assert report.assumed.kind == "weights"
    assert "additive" in " ".join(r.method for r in report.rows)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "additive"}, "needs a number of bits"),
        ({"method": "additive", "bits": 2.11}, "try 1.5, 2"),
        ({"method": "additive", "bits": 2, "share": "street"}, "share must be one of"),
        ({"method": "additive", "bits": 2, "books": 2}, "together"),
        ({"method": "additive", "bits": 0.2, "vector": 4, "books": 2}, "cannot have"),
        ({"method": "additive", "bits": 2, "group": 4}, "has no setting 'group'"),
        ({"method": "obq", "bits": 2, "share": "layer"}, "has no setting 'share'"),
        ({"method": "obq", "bits": 2.5}, "whole number"),
    ],
)
def test_wrong_settings(settings, said):
    with pytest.raises(UsageError, match=said):
        method_of(settings)


@pytest.mark.slow
def test_the_command_line(run, tmp_path):
    out = tmp_path / "small.fw"
    given = ("featherweight.demo.digits:make", "--data", "featherweight.demo.digits:calibration")
    settings = "--method", "additive", "--bits", "2.5", "--vector", "2"
    code, found, _ = run("compress", *given, *settings, "-o", out, "--json")
    assert code == 0
    assert any(r["method"] == "additive 2.5 bit (5 in 2)" for r in json.loads(found)["rows"])
    code, shown, _ = run("inspect", out)
    assert code == 0
    assert "additive 2.5 bit (5 in 2)" in shown
    code, _, said = run("compress", *given, "--method", "additive", "--bits", "2.11", "-o", out)
    assert code == 2
    assert "try 1.5, 2" in said


def test_pruned_and_additive_by_settings():
    method = method_of({"sparsity": 0.5, "bits": 2, "quantizer": "additive", "method": "obs"})
    assert isinstance(method, PruneQuantize)
    assert method.label == "obs 50% + additive 2 bit"


def test_books_are_as_large_as_suits_those_who_share_them():
    found = scan(digits.make())
    cuts = {
        share: {n: m.vectors for n, m in assign(Recipe(Additive(2.0, share)), found).items() if isinstance(m, Additive)}
        for share in ("network", "layer")
    }
    weights = {u.name: u.params for u in found.units}
    assert all(cut == vectors_of(2, weights[n]) for n, cut in cuts["layer"].items())
    assert set(cuts["network"].values()) == {vectors_of(2, sum(weights[n] for n in weights))}


def test_an_additive_override_holds_beside_a_target(data):
    recipe = Recipe(Obq(GridSpec(4)), (Override("block*", Additive(2.0)),))
    small = fw.compress(digits.make(), data, recipe=recipe, target=Goal("10x", among="quantize", measurements=2))
    made = {u.names[0]: u.weight for u in small.artifact.units if isinstance(u.weight, Codebook)}
    assert len(made) == 4
    assert all(n.startswith("block") for n in made)
    assert len(books(small.artifact)) == 1
    weights = sum(u.params for u in scan(digits.make()).units if u.name in made)
    assert {w.d for w in made.values()} == {vectors_of(2, weights).d}


@pytest.mark.parametrize("vectors", [Vectors(0, (4,)), Vectors(65, (4,)), Vectors(4, ()), Vectors(4, (13,))])
def test_vectors_that_no_file_can_hold(vectors):
    with pytest.raises(UsageError, match="must"):
        Additive(vectors)
