"""The figures of README.md, on real networks. One run of the command each, as a user would type it."""

import json

import pytest

from featherweight.cli import main
from featherweight.data import batches
from featherweight.layers import scan
from featherweight.methods import Gptq, GridSpec, Obq, Rtn
from featherweight.stats import capture
from tests.conftest import SHARED

pytestmark = pytest.mark.real

FIGURES = [  # network, calibration, test, settings, largest share of fp32 in percent, least top-1
    pytest.param(
        *("resnet20_cifar10", "cifar10_calibration", "cifar10_test", "--method gptq --bits 3"),
        *(113_000 / 10843.92, 91.4),
        marks=pytest.mark.slow,
    ),
    ("lstm_speech", "speech_calibration", "speech_test", "--method obq --bits 8", 26, 86.2),
]


@pytest.mark.parametrize(("network", "calibration", "test", "settings", "share", "least"), FIGURES)
def test_figures(zoo, capsys, tmp_path, network, calibration, test, settings, share, least):
    place = SHARED / "zoo.py"
    command = f"compress {place}:{network} --data {place}:{calibration} --test {place}:{test} --json {settings}"
    code = main([*command.split(), "-o", str(tmp_path / "small.fw")])
    found = json.loads(capsys.readouterr().out)
    assert code == 0
    assert 100 * found["file_bytes"] / found["baselines"]["fp32"] <= share
    assert found["after"]["top1"] >= least


def test_obq_beats_gptq_beats_rounding_on_every_layer(zoo):
    model = zoo.resnet20_cifar10()
    units = scan(model).units
    stats = capture(model, batches(zoo.cifar10_calibration())[:2], units)
    for unit in units:
        w = unit.view.matrix(model.get_parameter(unit.name).detach())
        rtn, gptq, obq = (m(GridSpec(3)).solve(w, stats[unit.name]).error for m in (Rtn, Gptq, Obq))
        assert obq < gptq < rtn, unit.name
