import json
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from featherweight.artifact import read
from featherweight.cli import main
from featherweight.proof import replaced
from tests.nets import tiny

NETS = str(Path(__file__).with_name("nets.py"))
MAKE, DATA, TEST = f"{NETS}:tiny", f"{NETS}:images", f"{NETS}:test_images"


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    path = tmp_path_factory.mktemp("compressed") / "small.fw"
    assert main(["compress", MAKE, "--data", DATA, "--method", "gptq", "--bits", "4", "-o", str(path)]) == 0
    return path


@pytest.fixture
def small(tmp_path, compressed):
    """A copy, which a test may damage."""
    return Path(shutil.copy(compressed, tmp_path))


def test_compress_proves_the_file_in_a_fresh_process(tmp_path, run):
    path = tmp_path / "small.fw"
    code, out, _ = run(
        *("compress", MAKE, "--data", DATA, "--bits", 8, "--test", TEST, "-o", path, "--json"),
    )
    assert code == 0
    found = json.loads(out)
    assert found["file_bytes"] == path.stat().st_size
    assert found["digest"] == read(path).digest()
    assert found["before"]["top1"] == 100.0  # the labels are the dense network's own answers
    assert found["top1"] == found["after"]["top1"] >= 95
    assert found["baselines"]["half"] * 2 == found["baselines"]["fp32"]


def test_compress_prints_tables_for_people(tmp_path, run):
    code, out, _ = run("compress", MAKE, "--data", DATA, "--bits", 8, "--test", TEST, "-o", tmp_path / "s.fw")
    assert code == 0
    for word in (
        "conv2.weight",
        "obq 8 bit sym",
        "fp32",
        "half",
        "plain int8",
        "top1",
        "BatchNorm statistics of 2 layers",
    ):
        assert word in out
    assert "every decoded bit is the same" in out


def test_evaluate_knows_accuracy_and_other_metrics(small, run):
    code, out, _ = run("evaluate", small, "--model", MAKE, "--data", TEST, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["top1"] == found["metrics"]["top1"]
    assert found["bytes"] == small.stat().st_size
    code, out, _ = run("evaluate", small, "--model", MAKE, "--data", TEST, "--metric", f"{NETS}:mean_output")
    assert code == 0
    assert out.startswith("mean ")


def test_inspect_needs_no_network(small, run, monkeypatch):
    code, out, _ = run("inspect", small)
    assert code == 0
    for word in ("conv1.weight", "grid", "gptq 4 bit", "smaller than fp32"):
        assert word in out
    found = json.loads(run("inspect", small, "--json")[1])
    assert [w["name"] for w in found["weights"]] == ["conv1.weight", "conv2.weight", "fc.weight"]
    assert sum(w["bytes"] for w in found["weights"]) < found["bytes"] == small.stat().st_size


def test_plan_is_a_dry_run(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("plan", MAKE, "--data", DATA, "--bits", 3, "--exclude", "fc.*")
    assert code == 0
    for word in ("conv1.weight", "obq 3 bit", "excluded by the recipe", "predicted file", "predicted time"):
        assert word in out
    assert list(tmp_path.iterdir()) == []
    found = json.loads(run("plan", MAKE, "--bits", 3, "--method", "rtn", "--json")[1])
    assert found["rows"][0]["method"] == "rtn 3 bit"


def test_a_recipe_file_and_weights(tmp_path, run):
    recipe, weights = tmp_path / "r.toml", tmp_path / "w.safetensors"
    recipe.write_text('method = "rtn"\nbits = 8\n[[override]]\nmatch = "fc.*"\nbits = 2\n')
    save_file({k: v.contiguous() + 0 for k, v in tiny().state_dict().items()}, weights)
    code, out, _ = run(
        *("compress", MAKE, "--weights", weights, "--recipe", recipe, "--data", DATA, "-o", tmp_path / "s.fw", "--json")
    )
    assert code == 0
    assert {r["name"]: r["method"] for r in json.loads(out)["rows"]}["fc.weight"] == "rtn 2 bit"


def test_the_demo_runs(run, monkeypatch):
    monkeypatch.setattr("featherweight.demo.run.TARGETS", ("3.7x", "8x"))  # of five
    code, out, _ = run("demo", "--json")
    rows = json.loads(out)
    assert code == 0
    assert rows[0]["what"] == "fp32"
    sizes = [row["bytes"] for row in rows[:3]]
    assert sizes == sorted(sizes, reverse=True)
    assert rows[1]["top1"] >= 98


WRONG = {
    "no such file": (2, ["compress", "nowhere.py:make", "--data", DATA]),
    "no function 'nothing'": (2, ["compress", f"{NETS}:nothing", "--data", DATA]),
    "expected file.py:function": (2, ["compress", "nothing", "--data", DATA]),
    "does not import": (2, ["compress", "no.such.package:make", "--data", DATA]),
    "no weights here": (2, ["compress", f"{NETS}:broken", "--data", DATA]),
    "it returned int": (2, ["compress", f"{NETS}:not_a_model", "--data", DATA]),
    "hold no sample": (2, ["compress", MAKE, "--data", f"{NETS}:empty"]),
    "does not accept the data": (2, ["compress", MAKE, "--data", f"{NETS}:sentences"]),
    "matches none of the 3": (2, ["compress", MAKE, "--data", DATA, "--exclude", "layer9.*"]),
    "unknown method 'gtpq'": (2, ["compress", MAKE, "--data", DATA, "--method", "gtpq"]),
    "bits must be": (2, ["compress", MAKE, "--data", DATA, "--bits", "11"]),
    "below 1": (2, ["compress", MAKE, "--data", DATA, "--sparsity", "1.5"]),
    "needs calibration data": (2, ["compress", f"{NETS}:words", "--activations", "8"]),
    "--target chooses": (2, ["compress", MAKE, "--data", DATA, "--target", "2x", "--bits", "4"]),
    "a target is": (2, ["compress", MAKE, "--data", DATA, "--target", "tiny"]),
    "smallest reachable": (3, ["compress", MAKE, "--data", DATA, "--target", "500x"]),
    "--metric needs": (2, ["compress", MAKE, "--data", DATA, "--metric", f"{NETS}:mean_output"]),
    "does not exist": (2, ["compress", MAKE, "--data", DATA, "-o", "no/such/folder/x.fw"]),
    "cannot read the recipe": (2, ["compress", MAKE, "--data", DATA, "--recipe", "none.toml"]),
    "No such option": (2, ["compress", MAKE, "--colour", "red"]),
    "cannot read nothing.fw": (1, ["inspect", "nothing.fw"]),
}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_requests_are_one_line_and_a_code(said, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, args = WRONG[said]
    got, out, err = run(*args)
    assert got == code
    assert said in " ".join(err.split())
    assert out == ""
    assert list(tmp_path.iterdir()) == [], "a failed run leaves nothing behind"


@pytest.mark.parametrize(
    ("metric", "said"),
    [(f"{NETS}:failing_metric", "failed: KeyError"), (f"{NETS}:none", "no function 'none'")],
)
def test_a_bad_metric(small, run, metric, said):
    code, _, err = run("evaluate", small, "--model", MAKE, "--data", TEST, "--metric", metric)
    assert code == 2
    assert said in " ".join(err.split())


def test_accuracy_needs_labels(small, run, tmp_path):
    code, _, err = run("evaluate", small, "--model", MAKE, "--data", f"{NETS}:unlabelled")
    assert code == 2
    assert "--metric" in err


def test_a_file_for_another_network_names_the_differences(small, run):
    code, _, err = run("evaluate", small, "--model", "featherweight.demo.digits:make", "--data", TEST)
    assert code == 2
    assert "not in the network: " in " ".join(err.split())


@pytest.mark.parametrize("command", [["inspect"], ["evaluate", "--model", MAKE, "--data", TEST]])
def test_damaged_files_are_refused(small, run, tmp_path, command):
    data = small.read_bytes()
    bad = tmp_path / "bad.fw"
    for content in (b"", data[:200], data[:-1], data[:500] + b"\x00" + data[501:], b"PK" + data):
        bad.write_bytes(content)
        code, _, err = run(command[0], bad, *command[1:])
        assert code == 1
        assert "bad.fw" in err
    with zipfile.ZipFile(bad, "w") as pickled:
        pickled.writestr("data.pkl", b"cos\nsystem\n(S'false'\ntR.")
    assert run("inspect", bad)[0] == 1
    torch.save({"a": torch.ones(2)}, bad)
    assert run("inspect", bad)[0] == 1


def test_a_file_never_makes_the_program_import_what_it_names(small, run, tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    from featherweight.artifact import Artifact, write

    found = read(small)
    write(Artifact(found.units, found.rest, found.norms, {"model": f"{tmp_path}/trap.py:make"}), small)
    monkeypatch.chdir(tmp_path)
    assert run("inspect", small)[0] == 0
    assert run("evaluate", small, "--model", MAKE, "--data", TEST)[0] == 0
    assert not [name for name in sys.modules if name.split("_")[-1] == "trap"]


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(word in out for word in ("compress", "finetune", "plan", "evaluate", "inspect", "demo"))


def test_output_over_the_weights_is_refused(tmp_path, run):
    weights = tmp_path / "w.safetensors"
    save_file({k: v.contiguous() + 0 for k, v in tiny().state_dict().items()}, weights)
    before = weights.read_bytes()
    code, _, err = run("compress", MAKE, "--weights", weights, "--data", DATA, "-o", weights)
    assert code == 2
    assert "file with the weights" in err
    assert weights.read_bytes() == before


def test_compress_is_the_work_of_one_process(tmp_path, run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for more in ((), ("--lossless",)):
        code, _, err = run("compress", MAKE, "--data", DATA, "--bits", 8, "-o", tmp_path / "small.fw", *more)
        assert code == 2
        assert "run it without torchrun" in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


def test_two_processes_write_to_places_of_their_own(tmp_path, monkeypatch):
    output = tmp_path / "small.fw"
    with replaced(output) as first:
        first.write_text("first")
        monkeypatch.setattr("os.getpid", lambda: -1)
        with replaced(output) as second:
            second.write_text("second")
        assert output.read_text() == "second"
        assert first.read_text() == "first"
    assert output.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["small.fw"]


def test_user_code_that_exits_or_prints(tmp_path, run):
    code, _, err = run("compress", f"{NETS}:quitting", "--data", DATA, "-o", tmp_path / "s.fw")
    assert code == 2
    assert "dataset missing" in err
    code, out, _ = run(
        *("compress", MAKE, "--data", DATA, "--bits", 8, "--test", TEST, "--metric", f"{NETS}:chatty", "--json"),
        *("-o", tmp_path / "s.fw"),
    )
    assert code == 0
    assert json.loads(out)["after"] == {"chatty": 1.0}


def test_a_file_that_cannot_be_proved_does_not_replace_a_good_one(small, run, monkeypatch):
    before = small.read_bytes()
    monkeypatch.setattr("featherweight.artifact.schema.Artifact.digest", lambda self: "0" * 32)
    code, _, err = run("compress", MAKE, "--data", DATA, "--bits", 8, "-o", small)
    assert code == 1
    assert "decodes differently" in err
    assert small.read_bytes() == before
    assert [p.name for p in small.parent.iterdir()] == [small.name]
