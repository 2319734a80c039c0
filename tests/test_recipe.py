import pytest

from featherweight.errors import UsageError
from featherweight.layers import scan
from featherweight.methods import (
    NM,
    Admm,
    Blocks,
    Channels,
    Gptq,
    GridSpec,
    Magnitude,
    Obq,
    Obs,
    Prune,
    PruneQuantize,
    Rows,
    Rtn,
    Unstructured,
)
from featherweight.recipe import assign, method_of, read_recipe, recipe_of
from tests.nets import tiny


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Obq(GridSpec(4))),
        ({"bits": 3}, Obq(GridSpec(3))),
        ({"method": "rtn", "bits": 8, "group": 0}, Rtn(GridSpec(8, symmetric=True, group=0))),
        ({"method": "rtn", "bits": 8, "symmetric": False}, Rtn(GridSpec(8))),
        ({"method": "gptq", "bits": 4, "symmetric": True, "damp": 0.1}, Gptq(GridSpec(4, True), damp=0.1)),
        ({"sparsity": 0.5}, Prune(Unstructured(0.5))),
        ({"sparsity": 0.5, "method": "obs"}, Obs(Unstructured(0.5))),
        ({"sparsity": 0.5, "damp": 0.01}, Prune(Unstructured(0.5), damp=0.01)),
        ({"pattern": "2:4"}, Prune(NM(2, 4))),
        ({"pattern": "4:8", "bits": 4, "method": "obs"}, PruneQuantize(Obs(NM(4, 8)), Obq(GridSpec(4)))),
        ({"pattern": "blocks", "sparsity": 0.5, "method": "admm"}, Admm(Blocks(0.5, 4))),
        ({"pattern": "blocks:8", "sparsity": 0.5, "method": "magnitude"}, Magnitude(Blocks(0.5, 8))),
        ({"pattern": "rows", "sparsity": 0.25, "method": "obs"}, Obs(Rows(0.25))),
        ({"pattern": "channels", "sparsity": 0.25}, Prune(Channels(0.25))),
        ({"method": "magnitude", "sparsity": 0.25}, Magnitude(Unstructured(0.25))),
        ({"sparsity": 0.5, "bits": 4}, PruneQuantize(Prune(Unstructured(0.5)), Obq(GridSpec(4)))),
        ({"sparsity": 0.5, "bits": 4, "quantizer": "gptq"}, PruneQuantize(Prune(Unstructured(0.5)), Gptq(GridSpec(4)))),
    ],
)
def test_settings_name_methods(settings, expected):
    assert method_of(settings) == expected


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "gtpq", "bits": 4}, "gtpq"),
        ({"method": "gptq"}, "needs a number of bits"),
        ({"method": "obs"}, "needs a sparsity"),
        ({"method": "gptq", "bits": 4, "sparsity": 0.5}, "no setting 'sparsity'"),
        ({"method": "rtn", "bits": 4, "damp": 0.1}, "no setting 'damp'"),
        ({"method": "obs", "sparsity": 0.5, "group": 3}, "no setting 'group'"),
        ({"bits": 9}, "1 to 8"),
        ({"bits": 4.0}, "1 to 8"),
        ({"bits": True}, "1 to 8"),
        ({"sparsity": 1.0}, "below 1"),
        ({"sparsity": "half"}, "sparsity must be a number"),
        ({"bits": 4, "symmetric": 1}, "symmetric"),
        ({"bits": 4, "group": -1}, "group"),
        ({"bit": 4}, "unknown setting 'bit'"),
        ({"method": "obq", "bits": 4, "quantizer": "gptq"}, "no setting .quantizer."),
        ({"sparsity": 0.5, "bits": 4, "quantizer": "rtn"}, "gptq, obq or additive"),
    ],
)
def test_wrong_settings_are_named(settings, said):
    with pytest.raises(UsageError, match=said):
        method_of(settings)


def test_a_recipe_file(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        'method = "gptq"\nbits = 4\nexclude = ["fc.*"]\nrepair = false\n'
        '[[override]]\nmatch = "conv1.*"\nbits = 8\n'
        '[[override]]\nmatch = "conv2.*"\nmethod = "obs"\nsparsity = 0.5\n'
    )
    recipe = read_recipe(path)
    found = scan(tiny(), recipe.include, recipe.exclude)
    assert assign(recipe, found) == {
        "conv1.weight": Gptq(GridSpec(8, symmetric=True)),
        "conv2.weight": Obs(Unstructured(0.5)),
    }
    assert not recipe.repair
    assert any(x.name == "fc.weight" and "recipe" in x.reason for x in found.left_alone)


def test_the_last_matching_override_wins():
    content = {"bits": 4, "override": [{"match": "conv*", "bits": 3}, {"match": "conv2*", "bits": 2}]}
    methods = assign(recipe_of(content), scan(tiny()))
    assert [m.grid.bits for m in methods.values()] == [3, 2, 4]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bits = ", "TOML"),
        ("bits = 99", "1 to 8"),
        ("colour = 3", "colour"),
        ("[[override]]\nbits = 3", "match"),
        ("override = 3", "match"),
        ("exclude = 'fc'", "list of patterns"),
        ("repair = 1", "repair"),
    ],
)
def test_wrong_recipe_files_are_named(tmp_path, text, said):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=said) as error:
        read_recipe(path)
    assert "recipe.toml" in str(error.value)


def test_an_override_that_matches_nothing_is_refused():
    with pytest.raises(UsageError, match="layer9"):
        assign(recipe_of({"bits": 4, "override": [{"match": "layer9.*", "bits": 2}]}), scan(tiny()))


def test_a_missing_recipe(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        read_recipe(tmp_path / "none.toml")
