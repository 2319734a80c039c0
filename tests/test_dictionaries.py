"""Dictionary pairs in the whole line: settings, dictionaries that weights share, files."""

import pytest
import torch

import featherweight as fw
from featherweight.artifact import read
from featherweight.demo import digits
from featherweight.errors import UsageError
from featherweight.layers import scan
from featherweight.methods import DictionaryPairs, GridSpec
from featherweight.recipe import method_of
from featherweight.sharing import arranged
from featherweight.weights import Factors, shared_factors, united

SHARED = {"method": "dictionary", "keep": 0.5}


def alike():
    """The digits network, some of its layers made alike in their columns' directions."""
    net = digits.make()
    units = {u.name: u for u in scan(net).units}
    names = [n for n, u in units.items() if u.view.matrix_shape[1] == 360]
    torch.manual_seed(0)
    basis = torch.randn(30, 360) / 23
    for name in names[:2]:
        w = units[name].view.matrix(net.get_parameter(name).detach())
        net.get_parameter(name).data = units[name].view.tensor(torch.randn(len(w), 30) @ basis + 0.02 * w)
    return net, names[:2]


@pytest.fixture(scope="module")
def network():
    return alike()


def dictionaries(artifact):
    return {id(p) for u in artifact.units for p in shared_factors(u.weight)}


@pytest.mark.parametrize("bits", [None, 8])
def test_a_common_dictionary_is_stored_once_and_comes_back_shared(network, bits, tmp_path):
    net, names = network
    assert len(names) == 2
    recipes = [
        fw.Recipe(method_of(SHARED | {"bits": bits} | x), include=tuple(names)) for x in ({}, {"share": "layer"})
    ]
    small, apart = (fw.compress(net, recipe=r) for r in recipes)
    size = small.save(tmp_path / "small.fw")
    stored = read(tmp_path / "small.fw")
    assert [u.names[0] for u in stored.units if shared_factors(u.weight)] == names
    assert len(dictionaries(stored)) == len(dictionaries(small.artifact)) == 1
    assert stored.digest() == small.artifact.digest()
    assert not dictionaries(apart.artifact)
    assert sum(u.error or 0.0 for u in small.artifact.units) < sum(u.error or 0.0 for u in apart.artifact.units)
    assert size <= apart.report.file_bytes + 64
    assert fw.plan(net, recipe=recipes[0]).file_bytes == pytest.approx(size, rel=0.1)  # predicted without coding
    loaded = fw.load(tmp_path / "small.fw", into=digits.make())
    for unit in small.artifact.units:
        assert torch.equal(loaded.get_parameter(unit.names[0]), unit.tensor())


def test_payloads_and_dictionaries_add_up_to_what_was_announced(network):
    net, _ = network
    units = scan(net).units
    methods = arranged(net, units, dict.fromkeys((u.name for u in units), method_of(SHARED)))
    announced = sum(methods[u.name].storage(u.view.matrix_shape, u.taps, u.groups) for u in units)
    announced += sum({m.common.name: m.common_bytes for m in methods.values() if m.common}.values())
    small = fw.compress(net, method=method_of(SHARED))
    parts = {id(p): p.bits() for u in small.artifact.units for p in getattr(u.weight, "parts", (u.weight,))}
    assert sum(parts.values()) == 8 * announced


def test_a_database_gives_the_same_file(network, tmp_path):
    net, _ = network
    first, again = (fw.compress(net, method=method_of(SHARED), database=tmp_path / "solved") for _ in range(2))
    assert again.report.reused == len(again.artifact.units)
    for name, small in (("a", first), ("b", again)):
        small.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    weights = united({u.names[0]: u.weight for u in again.artifact.units})
    assert len({id(p) for w in weights.values() for p in shared_factors(w)}) == len(dictionaries(first.artifact))


def test_an_error_holds_for_every_weight():
    net = digits.make()
    small = fw.compress(net, method=DictionaryPairs(error=0.4))
    assert any(isinstance(u.weight, Factors) for u in small.artifact.units)
    for unit in small.artifact.units:
        w = net.get_parameter(unit.names[0]).detach()
        assert (w - unit.tensor()).norm() <= 0.4 * w.norm() * (1 + 1e-5)
        assert isinstance(unit.weight, Factors) or "stored whole" in unit.note


def test_settings():
    method = method_of({"method": "dictionary", "error": 0.1, "bits": 8, "block": 4})
    assert method == DictionaryPairs(error=0.1, grid=GridSpec(8, True), block=4, share="network")
    assert method.label == "dictionary error 0.1 8 bit sym blocks of 4"
    assert method_of(SHARED | {"share": "layer"}) == DictionaryPairs(0.5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "--keep 0.5, or --error 0.1"),
        ({"keep": 0.5, "error": 0.1}, "--keep 0.5, or --error 0.1"),
        ({"keep": 2}, "at most 1"),
        ({"keep": 0.5, "share": "street"}, "share must be one of"),
        ({"keep": 0.5, "block": 2.5}, "block must be"),
        ({"keep": 0.5, "sparsity": 0.5}, "has no setting 'sparsity'"),
    ],
)
def test_wrong_settings(settings, said):
    with pytest.raises(UsageError, match=said):
        method_of({"method": "dictionary"} | settings)


def test_the_command_line(run, tmp_path):
    given = (
        "featherweight.demo.digits:make",
        "--method",
        "dictionary",
        "--error",
        "0.5",
        "--block",
        "4",
        "--bits",
        "8",
    )
    code, out, err = run("plan", *given)
    assert code == 0, err
    assert "dictionary error 0.5" in out
