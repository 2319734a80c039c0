"""`featherweight bench` and `compress --for speed`, as commands."""

import json

import pytest

from featherweight.cli import main
from featherweight.demo import digits
from featherweight.race import DENSE, OURS, Time, _verdict, in_turns

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
    file = tmp_path / "small.fw"
    assert run("compress", MODEL, "--method", "rtn", "--bits", 4, "--data", DATA, "-o", file)[0] == 0
    code, out, _ = run("bench", file, "--model", MODEL, "--input-shape", "1,8,8", "--batch", 1, "--threads", 1)
    assert code == 0
    assert "inputs are random numbers" in out
    assert "times smaller" in out or "the dense one's speed" in out


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


def test_all_take_their_turn_and_another_is_first_each_round():
    seen: list[int] = []
    found = in_turns([lambda k=k: seen.append(k) for k in range(3)], rounds=3, seconds=0.0)
    assert [len(times) for times in found] == [3, 3, 3]
    order = [k for i, k in enumerate(seen[6:]) if i == 0 or seen[6:][i - 1] != k]
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1]


@pytest.mark.parametrize(
    ("faster", "said"), [(1.6, "has 1.60 times"), (1.01, "4.0 times smaller, but its network is not")]
)
def test_the_verdict_says_when_a_small_file_is_not_faster(faster, said):
    times = [
        Time("onnxruntime", DENSE, 1, 2.0, 1.9, 2.1, 1.0, 1.0, 1.0),
        Time("onnxruntime", OURS, 1, 2.0 / faster, 1.0, 2.0, faster, 0.9 * faster, 1.1 * faster),
    ]
    assert said in _verdict(times, 1, 4.0)
    assert "same time" in _verdict(times[:1], 1, 4.0)
