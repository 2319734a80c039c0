"""Programs and checkpoints hold the network of the file, and need nothing of ours to be read."""

import io
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

import featherweight as fw
from featherweight.artifact import fill
from featherweight.data import Batch
from featherweight.errors import FormatError, UsageError
from featherweight.export import checkpoint, program
from featherweight.export.program import program_bytes, traced
from featherweight.recipe import recipe_of
from tests.export.nets import convs, words

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


SHORT = ("grid", "sparse grid", "factors on grids", "rounded inputs")  # the others are traced by `make test-slow`
TRACED = [
    pytest.param(net, s, marks=[] if s in SHORT else pytest.mark.slow)
    for net, of in (("convs", SETTINGS), ("words", ("grid", "additive", "low rank")))
    for s in of
]


@pytest.mark.parametrize(("net", "settings"), TRACED)
def test_every_kind_of_weight_decodes_in_the_graph(net, settings):
    """Without the fresh process, which is slow: what it runs is the same program."""
    settings = SETTINGS[settings]
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


# ---------------------------------------------------------------- programs
def test_a_program_runs_where_nothing_of_ours_is(tmp_path):
    """The export itself compares, in a process of its own."""
    net, data = convs()
    fw.compress(net, data, recipe=recipe_of(SETTINGS["grid"])).save(tmp_path / "small.fw")
    before = {n: t.clone() for n, t in net.state_dict().items()}
    done = fw.export_program(tmp_path / "small.fw", net, data, tmp_path / "small.pt2")
    assert "any number of samples" in done.checked
    assert done.bytes == (tmp_path / "small.pt2").stat().st_size
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.fw", "small.pt2"]
    text = b"".join(zipfile.ZipFile(tmp_path / "small.pt2").read(n) for n in _json_of(tmp_path / "small.pt2"))
    assert b"featherweight" not in text
    assert str(tmp_path.anchor).encode() + b"work" not in text
    assert b".py" not in text


def _json_of(path):
    return [n for n in zipfile.ZipFile(path).namelist() if n.endswith(".json")]


def test_the_same_program_gives_the_same_bytes():
    net, data = convs()
    artifact = small(net, data, SETTINGS["grid"])
    made = [program_bytes(traced(artifact, fill(convs()[0], artifact), Batch((data[:2],), {}))[1]) for _ in range(2)]
    assert made[0] == made[1]
    assert {i.compress_type for i in zipfile.ZipFile(io.BytesIO(made[0])).infolist()} == {zipfile.ZIP_DEFLATED}


class Named(nn.Module):
    """Takes names, and a number that is not per sample; gives several outputs."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, *, scale, more=None):
        y = self.fc(x * scale)
        return {"y": y, "both": (y + more, 3)}


@pytest.mark.slow
def test_arguments_by_name_and_outputs_of_any_shape(tmp_path):
    torch.manual_seed(0)
    example = Batch((torch.randn(3, 4),), {"scale": torch.tensor(2.0), "more": torch.randn(3, 4)})
    artifact = fw.compress(Named().eval(), [example], recipe=recipe_of(SETTINGS["grid"])).artifact
    done = fw.export_program(artifact, Named(), example, tmp_path / "small.pt2")
    module = torch.export.load(tmp_path / "small.pt2").module()
    y = module(torch.ones(7, 4), scale=torch.tensor(1.0), more=torch.zeros(7, 4))
    assert torch.equal(y["y"], y["both"][0])
    assert "any number" in done.checked


@pytest.mark.slow
def test_a_network_for_so_many_samples_says_so(tmp_path):
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x) if len(x) == 2 else self.fc(x) + 1

    artifact = fw.compress(Halves().eval(), torch.randn(8, 4), recipe=recipe_of(SETTINGS["grid"])).artifact
    done = fw.export_program(artifact, Halves(), torch.randn(2, 4), tmp_path / "small.pt2")
    assert "2 samples at a time" in done.checked


def test_a_network_that_cannot_be_traced_is_named(tmp_path):
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x) if x.sum() > 0 else x

    artifact = fw.compress(Looks().eval(), torch.ones(4, 4), recipe=recipe_of(SETTINGS["grid"])).artifact
    with pytest.raises(UsageError, match=r"^torch\.export cannot trace the network: ") as told:
        fw.export_program(artifact, Looks(), torch.ones(4, 4), tmp_path / "small.pt2")
    assert "\n" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_another_output_is_no_program(tmp_path, monkeypatch):
    net, data = convs()
    artifact = small(net, data, SETTINGS["grid"])
    monkeypatch.setattr(program, "run_alone", lambda _p, inputs, _o: [[torch.zeros(b.size, 5)] for b in inputs])
    with pytest.raises(FormatError, match="outputs differ from the network's by"):
        fw.export_program(artifact, net, data, tmp_path / "small.pt2")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- checkpoints
def test_another_type_and_a_state_that_is_no_tensor(tmp_path):
    net, data = convs()
    artifact = small(net, data, SETTINGS["grid"])
    fw.export_checkpoint(artifact, net.bfloat16(), tmp_path / "half.safetensors")
    types = {t.dtype for t in load_file(tmp_path / "half.safetensors").values()}
    assert types == {torch.bfloat16, torch.int64}  # counters of norms

    class Remembers(type(net)):
        def get_extra_state(self):
            return {"note": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(UsageError, match="'_extra_state' of the network is no tensor"):
        fw.export_checkpoint(artifact, Remembers(), tmp_path / "small.safetensors")


def test_tensors_that_overlap_get_memory_of_their_own():
    whole = torch.arange(6.0)
    kept, others = checkpoint.distinct({"a": whole, "b": whole[:3], "c": whole, "d": whole.reshape(2, 3).T})
    assert others == {"c": "a"}
    assert [t.tolist() for t in kept.values()] == [whole.tolist(), [0, 1, 2], [[0, 3], [1, 4], [2, 5]]]
    assert len({t.untyped_storage().data_ptr() for t in kept.values()}) == 3


def test_what_reads_back_otherwise_is_not_written(tmp_path, monkeypatch):
    net, data = convs()
    artifact = small(net, data, SETTINGS["grid"])
    monkeypatch.setattr(checkpoint, "load_file", lambda path: {n: t + 1 for n, t in load_file(path).items()})
    with pytest.raises(FormatError, match="would read back otherwise"):
        fw.export_checkpoint(artifact, net, tmp_path / "small.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [fw.export_checkpoint, fw.export_compressed_tensors])
def test_another_network_is_refused(write, tmp_path):
    net, data = convs()
    artifact = small(net, data, SETTINGS["grid"])
    net.grouped.stride = (1, 1)
    with pytest.raises(UsageError, match=r"grouped\.stride is 1 in the network and 2 in the file"):
        write(artifact, net, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []
    write(artifact, net, tmp_path / "small", ignore_structure=True)
    assert (tmp_path / "small").exists()
