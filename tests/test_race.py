"""`featherweight bench` and `compress --for speed`, as commands."""

import json
import re
import sys

import pytest
import torch

from featherweight import race
from featherweight.artifact import read
from featherweight.cli import main
from featherweight.data import batches
from featherweight.demo import digits
from featherweight.race import DENSE, OURS, _table, _verdict, in_turns

MODEL, DATA = f"{digits.__name__}:make", f"{digits.__name__}:calibration"


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    file = tmp_path_factory.mktemp("files") / "small.fw"
    assert main(["compress", MODEL, "--for", "speed", "--data", DATA, "-o", str(file), "--json"]) == 0
    return file


def test_a_file_made_for_speed_is_exported_in_int8_and_timed(fast, run, monkeypatch, tmp_path):
    monkeypatch.setattr("featherweight.race.ROUNDS", 2)
    monkeypatch.setattr("featherweight.race.SECONDS", 0.001)
    code, _, err = run("export", fast, tmp_path / "none.onnx", "--model", MODEL, "--input-shape", "1,8,8")
    assert code == 2
    assert "needs calibration data" in err
    code, out, _ = run("export", fast, tmp_path / "small.onnx", "--model", MODEL, "--data", DATA, "--json")
    said = json.loads(out)
    assert code == 0
    assert said["exact"] == said["weights"] == 9
    assert said["same"] >= 0.99
    assert said["bytes"] == (tmp_path / "small.onnx").stat().st_size

    code, out, _ = run("bench", fast, "--model", MODEL, "--data", DATA, "--batch", 2, "--threads", 1, "--json")
    found = json.loads(out)
    assert code == 0
    rows = {(t["runtime"], t["what"]): t for t in found["times"]}
    assert {("torch", DENSE), ("onnxruntime", DENSE), ("onnxruntime", OURS)} <= set(rows)
    assert ("onnxruntime", "quantize_static") in rows
    assert all(0 < t["lowest"] <= t["ms"] <= t["highest"] and t["batch"] == 2 for t in rows.values())
    assert rows["onnxruntime", DENSE]["faster"] == 1
    assert set(found["left"]) == {"ours in torch"}
    assert len(found["verdict"]) == 1


@pytest.mark.slow
def test_a_file_made_to_be_small_is_timed_as_it_is_exported(run, monkeypatch, tmp_path):
    monkeypatch.setattr("featherweight.race.ROUNDS", 1)
    monkeypatch.setattr("featherweight.race.SECONDS", 0.001)
    monkeypatch.delattr("featherweight.race.export_int8")  # that is for files made for speed
    file = tmp_path / "small.fw"
    assert run("compress", MODEL, "--method", "rtn", "--bits", 4, "--data", DATA, "-o", file)[0] == 0
    code, out, _ = run("bench", file, "--model", MODEL, "--input-shape", "1,8,8", "--batch", 1, "--threads", 1)
    assert code == 0
    told = " ".join(out.split())
    assert "inputs are random numbers" in told
    assert re.search(r"onnxruntime ours 1 \d", told)  # not left out
    assert re.findall(r"not timed: (\w+ [\w ]+):", told) == ["ours in torch"]
    assert re.search(r"At batch 1 the file.* \d\.\d\d times \(\d\.\d\d to \d\.\d\d\) the dense one's speed, ", told)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--for", "size", "--data", DATA), "--for must be speed"),
        (("--for", "speed"), "give --data"),
        (("--for", "speed", "--data", DATA, "--activations", "4"), "rounds inputs to 8 bits, got activations of 4"),
        (("--for", "speed", "--data", DATA, "--recipe", "RECIPE"), "rounds inputs to 8 bits, got activations of 6"),
    ],
)
def test_wrong_purposes_are_refused(run, tmp_path, options, said):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('method = "rtn"\nbits = 8\n[[override]]\nmatch = "*"\nactivations = 6\n')
    given = [recipe if o == "RECIPE" else o for o in options]
    code, _, err = run("compress", MODEL, *given, "-o", tmp_path / "small.fw")
    assert code == 2
    assert said in " ".join(err.split())
    assert list(tmp_path.iterdir()) == [recipe]


def test_bench_needs_inputs(run, fast):
    code, _, err = run("bench", fast, "--model", MODEL)
    assert code == 2
    assert "give --data" in err
    code, _, err = run("bench", fast, "--model", MODEL, "--input-shape", "3,5,5", "--batch", 1)
    assert code == 2


def test_without_onnxruntime_bench_prints_the_install_line(run, fast, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, err = run("bench", fast, "--model", "nowhere.py:make", "--input-shape", "1,8,8")
    assert code == 2
    assert "pip install onnx onnxscript onnxruntime (missing: onnxruntime)" in " ".join(err.split())


def test_whatever_keeps_one_from_running_is_a_line_of_the_result(fast, monkeypatch):
    def fail(*_args, **_more):
        raise RuntimeError("no such node\nand more")

    for name in ("graph_of", "made_for_speed", "slim"):
        monkeypatch.setattr(f"featherweight.race.{name}", fail)
    monkeypatch.setattr("featherweight.race.ROUNDS", 1)
    monkeypatch.setattr("featherweight.race.SECONDS", 0.0)
    data = batches(torch.randn(2, 1, 8, 8))
    found = race.race(read(fast), digits.make(), data, [1], 1000, lambda _stage, _done, _total: None)
    assert [(t.runtime, t.what) for t in found.times] == [("torch", DENSE)]
    assert set(found.left) == {f"{DENSE} as ONNX", f"{OURS} as ONNX", f"{OURS} in torch", "quantize_static as ONNX"}
    assert found.left[f"{OURS} as ONNX"] == "RuntimeError: no such node"
    assert "no runtime ran both" in found.verdict[0]


def test_all_take_their_turn_and_another_is_first_each_round():
    seen: list[int] = []
    found = in_turns([lambda k=k: seen.append(k) for k in range(3)], rounds=3, seconds=0.0)
    assert [len(times) for times in found] == [3, 3, 3]
    order = [k for i, k in enumerate(seen[6:]) if i == 0 or seen[6:][i - 1] != k]
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1]


# ---------------------------------------------------------------- what it comes to
def rounds(**times: list[float]) -> dict[tuple[str, str], list[float]]:
    """`onnxruntime_ours=[...]` and the like."""
    names = {"ours": OURS, "dense": DENSE}
    return {(runtime, names[what]): ms for key, ms in times.items() for runtime, what in [key.split("_")]}


def test_the_verdict_says_when_a_small_file_is_not_faster():
    dense = [2.0, 2.0, 2.0]
    fast = _verdict(rounds(onnxruntime_dense=dense, onnxruntime_ours=[1.25, 1.0, 1.6]), 1, 4.0, {})
    assert fast == (
        "at batch 1 the file's network has 1.60 times (1.25 to 2.00) the dense one's speed, both in onnxruntime"
    )
    slow = _verdict(rounds(onnxruntime_dense=dense, onnxruntime_ours=[1.98, 1.98, 1.98]), 1, 4.0, {})
    assert "4.0 times smaller, but its network is not faster: 1.01 times" in slow
    now_and_then = _verdict(rounds(onnxruntime_dense=dense, onnxruntime_ours=[1.5, 1.5, 2.1]), 1, 4.0, {})
    assert "not faster: 1.33 times (0.95 to 1.33)" in now_and_then


def test_faster_in_a_slow_runtime_alone_is_not_faster():
    found = rounds(torch_dense=[6.0], torch_ours=[5.0], onnxruntime_dense=[2.0], onnxruntime_ours=[2.5])
    assert "not faster: 0.80 times (0.80 to 0.80) the dense one's speed, both in onnxruntime" in _verdict(
        found, 1, 4.0, {}
    )
    found = rounds(torch_dense=[2.4], torch_ours=[2.0], onnxruntime_dense=[1.0], onnxruntime_ours=[3.0])
    told = _verdict(found, 1, 4.0, {})
    assert "not faster: 0.50 times" in told
    assert "ours in torch, the dense one in onnxruntime; 1.20 times (1.20 to 1.20) where both run in torch" in told


@pytest.mark.parametrize("missing", [OURS, DENSE])
def test_what_was_not_timed_is_no_tie(missing):
    """Ours without the dense one in the same runtime says as little as neither."""
    found = rounds(torch_dense=[2.0]) | (rounds(onnxruntime_ours=[1.0]) if missing == DENSE else {})
    left = {f"{missing} as ONNX": "torch cannot export Net to ONNX", "quantize_static as ONNX": "of no interest"}
    told = _verdict(found, 1, 4.0, left)
    assert "no runtime ran both" in told
    assert f"{missing} as ONNX: torch cannot export Net to ONNX" in told
    assert "same time" not in told
    assert "no interest" not in told


def test_a_time_without_the_dense_one_beside_it_has_no_ratio():
    [dense, ours] = _table(rounds(torch_dense=[2.0, 2.0], onnxruntime_ours=[1.0, 1.0]), 1)
    assert dense.faster == 1
    assert ours.faster is ours.faster_lowest is ours.faster_highest is None
