"""`featherweight export`."""

import json

import pytest

import featherweight as fw
from featherweight.cli import main
from featherweight.demo import digits

pytest.importorskip("onnxruntime", reason="needs pip install 'featherweight[onnx]'")
pytest.importorskip("onnxscript", reason="needs pip install 'featherweight[onnx]'")

MODEL = f"{digits.__name__}:make"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "small.fw"
    fw.compress(digits.make(), method=fw.Rtn(fw.GridSpec(4))).save(path)
    return path


def run(*words):
    return main(["export", *map(str, words)])


@pytest.mark.parametrize("example", [("--data", f"{digits.__name__}:test"), ("--input-shape", "1,8,8")])
def test_a_model_is_written_and_compared(small, tmp_path, capsys, example):
    out = tmp_path / "small.onnx"
    assert run(small, out, "--model", MODEL, *example, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["bytes"] == out.stat().st_size
    assert all(p["difference"] < 1e-5 for p in said["parity"])
    assert {row["exported"] for row in said["rows"]} <= {"int4", "fp16"}
    assert run(small, out, "--model", MODEL, *example) == 0
    assert "onnxruntime" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("small.tflite", ("--input-shape", "1,8,8"), "must end in .onnx, .pt2 or .safetensors"),
        ("small.onnx", (), "give --data"),
        ("small.onnx", ("--input-shape", "1,8,8", "--data", "x:y"), "not both"),
        ("small.onnx", ("--input-shape", "3,5"), "does not accept the data"),
        ("nowhere/small.onnx", ("--input-shape", "1,8,8"), "does not exist"),
    ],
)
def test_wrong_requests_are_one_line(small, tmp_path, capsys, name, more, message):
    assert run(small, tmp_path / name, "--model", MODEL, *more) == 2
    said = capsys.readouterr().err
    assert message in " ".join(said.split())
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_the_file_itself_is_no_output(small, tmp_path, capsys):
    twin = tmp_path / "small.onnx"
    twin.symlink_to(small)
    assert run(small, twin, "--model", MODEL, "--input-shape", "1,8,8") == 2
    assert "choose another name" in " ".join(capsys.readouterr().err.split())
