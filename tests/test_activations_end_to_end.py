"""Rounded inputs through the whole line: recipe, pipeline, file, command line."""

import copy
import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import featherweight as fw
from featherweight import pipeline
from featherweight.activations import best_grid, simulate, simulated
from featherweight.artifact import fill, read
from featherweight.errors import UsageError
from featherweight.layers import scan
from featherweight.methods import Gptq, GridSpec, Rtn
from featherweight.recipe import Override, Recipe, input_bits, read_recipe, recipe_of
from tests.nets import images, sentences, tiny, words
from tests.test_cli import DATA, MAKE, NETS, TEST

EIGHT = Recipe(Rtn(GridSpec(8)), activations=8)


# ---------------------------------------------------------------- recipe
def test_a_recipe_says_which_inputs_are_rounded():
    found = scan(tiny())
    assert input_bits(Recipe(Rtn(GridSpec(8))), found) == {}
    assert input_bits(Recipe(Rtn(GridSpec(8)), activations=0), found) == {}
    assert set(input_bits(EIGHT, found).values()) == {8}
    content = {
        "bits": 4,
        "activations": 4,
        "override": [
            {"match": "conv*", "activations": 8},
            {"match": "conv2*", "bits": 2},
            {"match": "fc*", "activations": 0},
        ],
    }
    recipe = recipe_of(content)
    assert input_bits(recipe, found) == {"conv1.weight": 8, "conv2.weight": 8, "fc.weight": 0}
    assert [o.method.grid.bits for o in recipe.overrides] == [4, 2, 4]
    only = recipe_of({"bits": 4, "override": [{"match": "fc*", "activations": 8}]})
    assert input_bits(only, found) == {"conv1.weight": 0, "conv2.weight": 0, "fc.weight": 8}


@pytest.mark.parametrize("value", ["1", "9", "-8", "8.0", "true", "'8'"])
@pytest.mark.parametrize("place", ["", "[[override]]\nmatch = 'fc*'\n"])
def test_wrong_activations_in_a_recipe(tmp_path, value, place):
    (tmp_path / "r.toml").write_text(f"bits = 4\n{place}activations = {value}\n")
    with pytest.raises(UsageError, match=r"r\.toml: activations must be 2 to 8 bits"):
        read_recipe(tmp_path / "r.toml")


# ---------------------------------------------------------------- pipeline
def test_what_is_read_back_rounds_the_inputs_as_they_were_measured(tmp_path):
    model, (x, _) = tiny(), images().tensors
    before = copy.deepcopy(model.state_dict())
    seen = []
    small = fw.compress(model, images(), recipe=EIGHT, evaluate=lambda m: seen.append(m) or float(m(x).norm()))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert simulated(model) == {}
    assert simulated(seen[0]) == {}, "the dense network is measured as it is"
    assert simulated(seen[1]) == small.artifact.inputs(), "the network read back rounds"
    small.save(tmp_path / "small.fw")
    assert read(tmp_path / "small.fw").inputs() == small.artifact.inputs()
    assert read(tmp_path / "small.fw").digest() == small.artifact.digest()
    loaded = fw.load(tmp_path / "small.fw", into=tiny())
    grids = small.artifact.inputs()
    assert simulated(loaded) == grids
    assert set(grids) == {"conv1.weight", "conv2.weight", "fc.weight"}
    assert grids["conv1.weight"] == best_grid(x, 8)
    assert float(loaded(x).detach().norm()) == small.report.after["metric"]
    with torch.no_grad():  # the same by hand
        plain = copy.deepcopy(loaded)
        simulate(plain, {})
        h = torch.relu(plain.bn1(plain.conv1(grids["conv1.weight"].simulate(x))))
        h = torch.relu(plain.bn2(plain.conv2(grids["conv2.weight"].simulate(h))))
        assert torch.equal(plain.fc(grids["fc.weight"].simulate(h.mean((2, 3)))), loaded(x))
        assert not torch.equal(plain(x), loaded(x))
    assert set(fw.load(tmp_path / "small.fw")) >= {"conv1.weight", "fc.bias"}
    assert {r.name: r.input_bits for r in small.report.rows} == dict.fromkeys(grids, 8)


def test_the_same_call_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        fw.compress(tiny(), images(), recipe=EIGHT).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_without_activations_the_file_is_that_of_version_1():
    plain = fw.compress(tiny(), images(), recipe=Recipe(Rtn(GridSpec(8))))
    assert plain.artifact.inputs() == {}
    assert plain.report.float_inputs == ()
    assert all(r.input_bits is None for r in plain.report.rows)


def test_a_network_that_rounded_before_rounds_what_its_next_file_says():
    rounding = fw.compress(tiny(), images(), recipe=EIGHT).artifact
    plain = fw.compress(tiny(), images(), recipe=Recipe(Rtn(GridSpec(8)))).artifact
    net = fill(tiny(), rounding)
    assert simulated(net) == rounding.inputs()
    assert simulated(fill(net, plain)) == {}


def test_a_network_that_rounds_is_no_dense_network():
    net = fill(tiny(), fw.compress(tiny(), images(), recipe=EIGHT).artifact)
    for function in (fw.compress, fw.plan):
        with pytest.raises(UsageError, match="simulate"):
            function(net, images())
    fw.simulate(net, {})
    fw.plan(net, images())


def test_few_bits_cost_accuracy_and_more_do_not():
    x, y = images(200, 5).tensors
    right = lambda m: float((m(x).argmax(1) == y).double().mean())  # noqa: E731
    after = [
        fw.compress(tiny(), images(), recipe=replace(EIGHT, activations=b), evaluate=right).report.after["metric"]
        for b in (8, 4, 2)
    ]
    assert after[0] >= 0.97
    assert after[0] > after[1] > after[2]


def test_the_correction_is_judged_with_rounded_inputs(monkeypatch):
    seen = []
    real = pipeline.repair
    monkeypatch.setattr(
        pipeline, "repair", lambda dense, model, *a: seen.append((dense, model)) or real(dense, model, *a)
    )
    small = fw.compress(tiny(), images(), recipe=EIGHT)
    ((dense, model),) = seen
    assert simulated(dense) == {}
    assert simulated(model) == small.artifact.inputs()


def test_inputs_that_stay_float_are_in_the_report_and_in_the_plan():
    recipe = replace(EIGHT, exclude=("embed.weight",))
    report = fw.compress(words(), sentences(), recipe=recipe).report
    assert {x.name for x in report.float_inputs} == {"lstm.weight_ih_l0", "lstm.weight_hh_l0"}
    assert all("recurrent" in x.reason for x in report.float_inputs)
    assert any(x.name == "embed.weight" and "excluded" in x.reason for x in report.left_alone)
    planned = fw.plan(words(), sentences(), recipe=EIGHT)
    assert planned.float_inputs == report.float_inputs
    assert {r.name: r.input_bits for r in planned.rows} == {
        "embed.weight": 8,
        "lstm.weight_ih_l0": None,
        "lstm.weight_hh_l0": None,
    }
    off = replace(EIGHT, overrides=(Override("fc*", Rtn(GridSpec(8)), activations=0),))
    for found in (fw.compress(tiny(), images(), recipe=off).report, fw.plan(tiny(), images(), recipe=off)):
        assert [(x.name, x.reason) for x in found.float_inputs] == [("fc.weight", "switched off by the recipe")]
        assert {r.name: r.input_bits for r in found.rows}["fc.weight"] is None


def test_activations_need_data():
    for function in (fw.compress, fw.plan):
        with pytest.raises(UsageError, match="needs calibration data"):
            function(words(), recipe=EIGHT)


def test_a_buffer_that_counts_calls_is_stored_as_it_was():
    class Counting(torch.nn.Linear):
        def __init__(self):
            super().__init__(6, 4)
            self.register_buffer("calls", torch.tensor(5))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    small = fw.compress(Counting(), torch.rand(40, 6), recipe=EIGHT)
    assert int(small.artifact.rest["calls"]) == 5


def test_a_target_is_met_with_activations():
    limit = fw.plan(tiny(), images(), recipe=replace(EIGHT, method=Gptq(GridSpec(4)))).file_bytes
    small = fw.compress(tiny(), images(), recipe=Recipe(Gptq(GridSpec(4)), activations=8), target=limit)
    assert small.report.file_bytes <= limit
    assert len(small.artifact.inputs()) == 3
    for recipe in (EIGHT, Recipe(Rtn(GridSpec(8)))):
        size = fw.compress(tiny(), images(), recipe=recipe).report.file_bytes
        assert size <= fw.plan(tiny(), images(), recipe=recipe).file_bytes <= 1.2 * size


# ---------------------------------------------------------------- command line
@pytest.mark.slow
def test_the_command_line_rounds_measures_and_shows(tmp_path, run):
    path = tmp_path / "small.fw"
    command = ("compress", MAKE, "--data", DATA, "--method", "rtn", "--bits", 8, "--test", TEST, "-o", path)
    code, out, _ = run(*command, "--activations", 2, "--json")
    assert code == 0
    found = json.loads(out)
    rough = found["after"]["top1"]
    assert rough < 95  # the fresh process rounds, too
    assert {r["input_bits"] for r in found["rows"]} == {2}
    assert found["float_inputs"] == []
    assert json.loads(run("evaluate", path, "--model", MAKE, "--data", TEST, "--json")[1])["top1"] == rough
    code, out, _ = run("evaluate", path, "--model", MAKE, "--data", TEST, "--metric", f"{NETS}:mean_output", "--json")
    with torch.no_grad():
        mean = float(fw.load(path, into=tiny())(images(64, 2).tensors[0]).mean())
    assert json.loads(out)["mean"] == pytest.approx(mean)
    code, out, _ = run("inspect", path)
    assert code == 0
    assert "inputs" in out
    assert out.count("2 bit") == 3
    assert {w["input_bits"] for w in json.loads(run("inspect", path, "--json")[1])["weights"]} == {2}
    assert run(*command, "--activations", 8)[0] == 0
    assert json.loads(run("evaluate", path, "--model", MAKE, "--data", TEST, "--json")[1])["top1"] > rough


def test_tables_are_as_before_without_activations(tmp_path, run):
    path = tmp_path / "small.fw"
    assert "inputs" not in run("compress", MAKE, "--data", DATA, "--method", "rtn", "--bits", 8, "-o", path)[1]
    assert "inputs" not in run("inspect", path)[1]
    assert "inputs" not in run("plan", MAKE, "--data", DATA, "--bits", 8)[1]


def test_float_inputs_are_printed_with_their_reason(tmp_path, run):
    recipe = tmp_path / "r.toml"
    recipe.write_text('method = "rtn"\nbits = 8\nactivations = 8\n[[override]]\nmatch = "fc.*"\nactivations = 0\n')
    line = "inputs of fc.weight stay float: switched off by the recipe"
    code, out, _ = run("compress", MAKE, "--data", DATA, "--recipe", recipe, "-o", tmp_path / "small.fw")
    assert code == 0
    assert line in out
    assert [line.split()[-1] for line in out.splitlines() if line.startswith(("conv1", "fc"))][:2] == ["bit", "float"]
    code, out, _ = run("plan", MAKE, "--data", DATA, "--recipe", recipe)
    assert code == 0
    assert line in out
    code, out, _ = run("plan", f"{NETS}:words", "--data", f"{NETS}:sentences", "--activations", 8)
    assert "inputs of lstm.weight_ih_l0, lstm.weight_hh_l0 stay float: recurrent" in out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--activations", "1"], "activations must be 2 to 8 bits"),
        (["--activations", "16"], "activations must be 2 to 8 bits"),
        (["--activations", "8", "--recipe", "r.toml"], "leave out --activations"),
    ],
)
def test_wrong_requests(tmp_path, run, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("compress", MAKE, "--data", DATA, *args)
    assert code == 2
    assert said in " ".join(err.split())


def test_the_recipe_of_the_documentation_is_valid():
    text = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
    (recipe,) = (recipe_of(tomllib.loads(t)) for t in re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL))
    assert input_bits(recipe, scan(tiny())) == {"conv1.weight": 8, "conv2.weight": 4, "fc.weight": 4}
