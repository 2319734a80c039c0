"""Programs and checkpoints hold the network of the file, and need nothing of ours to be read."""

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

import featherweight as fw
from featherweight.artifact import fill
from featherweight.data import Batch
from featherweight.errors import FormatError, UsageError
from featherweight.recipe import recipe_of
from tests.export.nets import Convs, Words, convs, words

SETTINGS = {
    "grid": {"method": "rtn", "bits": 4},
    "groups": {"method": "rtn", "bits": 3, "group": 4},
    "uneven groups": {"method": "rtn", "bits": 5, "group": 7},
    "one scale": {"method": "rtn", "bits": 6, "group": 0, "symmetric": True},
    "1 bit": {"method": "rtn", "bits": 1, "symmetric": True},
    "8 bits": {"method": "rtn", "bits": 8, "symmetric": False},
    "rate": {"method": "ecq", "bits": 1.8},
    "additive": {"method": "additive", "bits": 2},
    "sparse": {"method": "magnitude", "sparsity": 0.5},
    "sparse grid": {"method": "magnitude", "sparsity": 0.5, "bits": 4, "quantizer": "gptq"},
    "sparse vectors": {"method": "magnitude", "sparsity": 0.5, "bits": 2, "quantizer": "additive"},
    "low rank": {"method": "lowrank", "keep": 0.5},
    "factors on grids": {"method": "tucker", "keep": 0.5, "bits": 6},
    "dictionary": {"method": "dictionary", "keep": 0.5},
    "rounded inputs": {"method": "rtn", "bits": 4, "activations": 8},
}
NETS = {"convs": convs, "words": words}


def small(net: nn.Module, data, settings):
    return fw.compress(net, data, recipe=recipe_of(settings)).artifact


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("net", NETS)
def test_every_kind_of_weight_decodes_in_the_graph(net, settings):
    """Without the fresh process, which is slow: what it runs is the same program."""
    from featherweight.export.program import _bared, traced  # noqa: F401

    made, data = NETS[net]()
    artifact = small(made, data, settings)
    filled = fill(NETS[net]()[0], artifact)
    with torch.no_grad():
        expected = [filled(data[:n]) for n in (2, 1, 5)]
    rows, program = traced(artifact, filled, Batch((data[:2],), {}))
    assert [r.name for r in rows] == [u.names[0] for u in artifact.units]
    module = program.module()
    with torch.no_grad():
        for n, want in zip((2, 1, 5), expected, strict=True):
            assert torch.allclose(module(data[:n]), want, rtol=0, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("net", NETS)
def test_a_checkpoint_loads_strictly(net, settings, tmp_path):
    made, data = NETS[net]()
    artifact = small(made, data, settings)
    done = fw.export_checkpoint(artifact, made, tmp_path / "small.safetensors")
    other = type(made)()
    if net == "convs":
        assert not other.load_state_dict(load_file(tmp_path / "small.safetensors"), strict=True).unexpected_keys
    else:  # a tied weight is there once, as safetensors has it
        with safe_open(tmp_path / "small.safetensors", "pt") as file:
            assert file.metadata() == {"out.weight": "embedding.weight"}
        assert load_model(other, tmp_path / "small.safetensors", strict=True) == (set(), [])
    expected = fill(type(made)(), artifact)
    fw.simulate(expected, {})
    with torch.no_grad():
        assert torch.equal(other.eval()(data[:4]), expected(data[:4]))
    assert done.bytes == (tmp_path / "small.safetensors").stat().st_size
    assert bool(done.notes) == (net == "words" or "activations" in settings)
