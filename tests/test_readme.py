"""The README is true: its commands, its Python and its recipe are run as they stand."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from featherweight.cli import main
from featherweight.recipe import recipe_of

README = (Path(__file__).parents[1] / "README.md").read_text()
NET = "from featherweight.demo.digits import calibration, make, test\ntrain = calibration\n"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the `net.py` that the README speaks of."""
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run_in_order(here, capsys, monkeypatch):
    monkeypatch.setattr("featherweight.race.ROUNDS", 1)  # of eleven
    monkeypatch.setattr("featherweight.race.SECONDS", 0.01)
    lines = [line.split("#")[0] for block in blocks("") for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("featherweight ")]
    expected = ["plan", "compress", "evaluate", "inspect", "export", "bench", "finetune", "report"]
    assert [c[0] for c in commands] == expected
    for command in commands:
        assert main(command) == 0, command
    assert (here / "small.fw").stat().st_size < 40_000
    assert "top1" in capsys.readouterr().out


def test_the_python_runs(here):
    from featherweight.data import batches
    from featherweight.demo import digits
    from featherweight.metrics import accuracy

    test = batches(digits.test())
    names = {"model": digits.make(), "calibration": digits.calibration(), "make": digits.make}
    names["accuracy"] = lambda model: accuracy(model, test)["top1"]
    (code,) = blocks("python")
    exec(code, names)
    assert names["small"].report.ratio >= 10
    assert names["accuracy"](names["model"]) > 95


def test_the_recipe_is_valid():
    (text,) = blocks("toml")
    recipe = recipe_of(tomllib.loads(text))
    assert [o.pattern for o in recipe.overrides] == ["stem.*", "layer4.*"]


def test_every_file_that_is_linked_exists():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
