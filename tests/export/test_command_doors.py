"""`featherweight export` of programs and checkpoints, which need nothing but torch and safetensors."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

import featherweight as fw
from featherweight.cli import main
from featherweight.demo import digits
from tests.nets import sentences, words

MODEL = f"{digits.__name__}:make"
EXAMPLE = "--input-shape", "1,8,8"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "small.fw"
    fw.compress(digits.make(), method=fw.Rtn(fw.GridSpec(4))).save(path)
    return path


def run(*words):
    return main(["export", *map(str, words)])


def test_a_program(small, tmp_path, capsys):
    out = tmp_path / "small.pt2"
    assert run(small, out, "--model", MODEL, *EXAMPLE, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["bytes"] == out.stat().st_size
    assert {w["form"] for w in said["weights"]} == {"grid"}
    x, expected = torch.rand(5, 1, 8, 8), fw.load(small, into=digits.make())
    with torch.no_grad():
        assert torch.allclose(torch.export.load(out).module()(x), expected(x), atol=1e-5)


def test_a_checkpoint(small, tmp_path, capsys):
    out = tmp_path / "small.safetensors"
    assert run(small, out, "--model", MODEL) == 0
    assert "every tensor, bit for bit" in capsys.readouterr().out
    digits.make().load_state_dict(load_file(out), strict=True)


def test_a_folder(small, tmp_path, capsys):
    out = tmp_path / "small"
    assert run(small, out, "--model", MODEL, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["bytes"] == sum(p.stat().st_size for p in out.iterdir())
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    assert run(small, out, "--model", MODEL) == 2
    assert "is not replaced" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("small.pt2", (), "give --data"),
        ("small.pt2", ("--input-shape", "3,5"), "does not accept the data"),
        ("small.safetensors", EXAMPLE, "leave out --data and --input-shape"),
        ("nowhere/small.safetensors", (), "does not exist"),
        ("nowhere/small", (), "does not exist"),
        ("small.safetensors", ("--model", "tests.nets:tiny"), "the file does not fit Tiny"),
    ],
)
def test_wrong_requests_are_one_line(small, tmp_path, capsys, name, more, message):
    assert run(small, tmp_path / name, "--model", MODEL, *more) == 2
    said = capsys.readouterr().err
    assert message in " ".join(said.split())
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_without_onnxruntime_nothing_begins(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert run(small, tmp_path / "small.onnx", "--model", "nowhere.py:make", *EXAMPLE) == 2
    assert "pip install onnx onnxscript onnxruntime (missing: onnxruntime)" in " ".join(capsys.readouterr().err.split())


def test_an_input_shape_for_words_asks_for_data(tmp_path, capsys):
    fw.compress(words(), sentences(), method=fw.Rtn(fw.GridSpec(4))).save(tmp_path / "small.fw")
    given = "--model", "tests.nets:words", "--input-shape", "7"
    for command in (
        ("compress", "tests.nets:words", "-o", tmp_path / "other.fw", "--input-shape", "7"),
        ("export", tmp_path / "small.fw", tmp_path / "small.pt2", *given),
        ("bench", tmp_path / "small.fw", *given),
    ):
        assert main([str(word) for word in command]) == 2, command
        said = " ".join(capsys.readouterr().err.split())
        assert "its embeddings take whole numbers; give --data, not an input shape: " in said
    assert [p.name for p in tmp_path.iterdir()] == ["small.fw"]


def test_another_structure_needs_the_word(small, tmp_path, capsys):
    (tmp_path / "other.py").write_text(
        "from featherweight.demo import digits\nfrom torch import nn\n"
        "def make():\n"
        "    net = digits.make()\n"
        "    conv = next(m for m in net.modules() if isinstance(m, nn.Conv2d))\n"
        "    conv.padding_mode, conv._reversed_padding_repeated_twice = 'circular', (1, 1, 1, 1)\n"
        "    return net\n"
    )
    words = small, tmp_path / "small.safetensors", "--model", f"{tmp_path}/other.py:make"
    assert run(*words) == 2
    assert "padding_mode is circular in the network and zeros in the file" in " ".join(capsys.readouterr().err.split())
    assert run(*words, "--ignore-structure") == 0
