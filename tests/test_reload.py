"""A file goes into any instance, and what comes of it is a network like any other."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from featherweight import compress
from featherweight.artifact import Artifact, fill
from featherweight.chains import chained
from featherweight.errors import UsageError
from featherweight.onuse import keep_packed
from featherweight.recipe import recipe_of
from featherweight.slim import slim
from tests.export.nets import convs, words

SETTINGS = {
    "grid": {"method": "rtn", "bits": 4},
    "rounded inputs": {"method": "rtn", "bits": 4, "activations": 8},
    "additive": {"method": "additive", "bits": 2},
    "sparse grid": {"method": "magnitude", "sparsity": 0.5, "bits": 4, "quantizer": "gptq"},
    "factors on grids": {"method": "tucker", "keep": 0.5, "bits": 6},
    "dictionary": {"method": "dictionary", "keep": 0.5},
    "channels": {"method": "magnitude", "sparsity": 0.5, "pattern": "channels"},
}
NETS = {"convs": convs, "words": words}
LOADED = {
    "filled": fill,
    "packed": keep_packed,
    "chained": lambda net, artifact: chained(net, artifact, only_if="always"),
    "slim": lambda net, artifact: slim(fill(net, artifact)),
}


@pytest.fixture(scope="module", params=[(n, s) for n in NETS for s in SETTINGS], ids="-".join)
def case(request):
    """A fresh instance's maker, the artifact, inputs and what comes out."""
    net, settings = request.param
    made, data = NETS[net]()
    artifact = compress(made, data, recipe=recipe_of(SETTINGS[settings])).artifact
    kind = type(made)
    with torch.no_grad():
        return kind, artifact, data, fill(kind(), artifact)(data)


def meta(kind: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return kind()


def loaded(how: str, net: nn.Module, artifact: Artifact) -> nn.Module:
    if how == "slim" and artifact.inputs():  # it goes by names that slim changes
        with pytest.raises(UsageError, match="this network rounds inputs"):
            LOADED[how](net, artifact)
        return fill(net, artifact)
    return LOADED[how](net, artifact)


@pytest.mark.parametrize("how", LOADED)
@pytest.mark.parametrize("make", [lambda kind: kind(), lambda kind: kind().train(), meta], ids=["new", "train", "meta"])
@torch.no_grad()
def test_every_kind_into_every_instance(case, how, make):
    kind, artifact, data, expected = case
    net = loaded(how, make(kind), artifact)
    assert torch.allclose(net(data), expected, atol=2e-5)
    assert not any(t.is_meta for t in (*net.parameters(), *net.buffers()))
    assert not any(m.training for m in net.modules())


@pytest.mark.parametrize("how", LOADED)
@torch.no_grad()
def test_copies_and_pickles(case, how):
    kind, artifact, data, expected = case
    net = loaded(how, kind(), artifact)
    again = torch.load(_saved(net), weights_only=False)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), again):
        assert torch.allclose(other(data), expected, atol=2e-5)
        assert torch.allclose(other(data), expected, atol=2e-5)  # lists of weights that calls fill and empty


def _saved(net: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    ("how", "settings"),
    [
        *(("filled", "grid"), ("filled", "rounded inputs"), ("packed", "grid"), ("packed", "rounded inputs")),
        *(("packed", "additive"), ("chained", "factors on grids"), ("slim", "channels")),
    ],
)
@torch.no_grad()
def test_compiled_and_exported(how, settings):
    made, data = convs()
    artifact = compress(made, data, recipe=recipe_of(SETTINGS[settings])).artifact
    expected = fill(type(made)(), artifact)(data)
    net = LOADED[how](type(made)(), artifact).requires_grad_(False)
    program = torch.export.export(net, (data,))
    assert torch.allclose(program.module()(data), expected, atol=2e-5)
    compiled = torch.compile(net, backend="eager", fullgraph=settings != "rounded inputs")
    assert torch.allclose(compiled(data), expected, atol=2e-5)
    torch.compiler.reset()


def test_ties_of_a_network_without_memory_stay():
    made, data = words()
    artifact = compress(made, data, recipe=recipe_of(SETTINGS["grid"])).artifact
    net = fill(meta(type(made)), artifact)
    assert net.out.weight is net.embedding.weight
    assert all(any(w is p for p in net.parameters()) for w in net.lstm._flat_weights)


def test_what_no_file_holds_needs_a_real_device():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.register_buffer("table", torch.ones(2), persistent=False)

        def forward(self, x):
            return self.fc(x) * self.table

    artifact = compress(Remembers().eval(), method=None, recipe=recipe_of(SETTINGS["grid"])).artifact
    with pytest.raises(UsageError, match="no memory for table, which no file holds: make it on a real device"):
        fill(meta(Remembers), artifact)
    assert meta(Remembers).table.is_meta
