"""Finetuning what is in a file: as a function, as a command, and on several processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import featherweight as fw
from featherweight.artifact import fill, read
from featherweight.cli import main
from featherweight.data import batches
from featherweight.errors import UsageError
from featherweight.repair.distance import output_distance
from tests.nets import images, sentences, tiny, words

ROOT = Path(__file__).parents[1]
NETS = str(Path(__file__).with_name("nets.py"))
MODEL, TRAIN, TEST = f"{NETS}:tiny", f"{NETS}:images", f"{NETS}:test_images"
HOW = fw.Finetune(images(64), 6, 0.01, 16)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("finetune") / "small.fw"
    assert main(["compress", MODEL, "--data", TRAIN, "--method", "gptq", "--bits", "2", "-o", str(path)]) == 0
    return path


def test_a_file_comes_closer_and_keeps_its_size(small, tmp_path):
    dense, samples = tiny(), batches(images(64), 32)
    before = read(small)
    tuned = fw.finetune(small, dense, HOW)
    assert all(
        torch.equal(t, u) for t, u in zip(dense.state_dict().values(), tiny().state_dict().values(), strict=True)
    )
    assert all(p.requires_grad for p in dense.parameters())
    assert tuned.trained.losses[-1] < tuned.trained.losses[0]
    size = tuned.save(tmp_path / "tuned.fw")
    assert abs(size - small.stat().st_size) < 64
    loaded = fw.load(tmp_path / "tuned.fw", into=tiny())
    assert output_distance(dense, loaded, samples) < 0.8 * output_distance(dense, fill(tiny(), before), samples)
    after = read(tmp_path / "tuned.fw")
    assert after.digest() == tuned.artifact.digest()
    for a, b in zip(before.units, after.units, strict=True):
        assert torch.equal(a.weight.codes, b.weight.codes)
        assert not torch.equal(a.weight.scale, b.weight.scale)
        assert (a.names, a.method, a.note, b.error) == (b.names, b.method, b.note, None)
    for a, b in zip(before.norms, after.norms, strict=True):
        assert (a.scale.dtype, a.shift.dtype) == (b.scale.dtype, b.shift.dtype)
        assert not torch.equal(a.scale, b.scale)
        assert not torch.equal(a.shift, b.shift)
    assert not torch.equal(before.rest["fc.bias"], after.rest["fc.bias"])


def test_the_file_says_what_the_trained_network_does(small):
    """Norms are folded in a file: what was trained and what is loaded are the same function."""
    seen = []
    tuned = fw.finetune(small, tiny(), fw.Finetune(images(64), 1, 1e-9, 64), lambda *step: seen.append(step))
    assert seen == [("finetune", 1, 1)]
    x = images(64).tensors[0]
    with torch.no_grad():
        torch.testing.assert_close(fill(tiny(), tuned.artifact)(x), fill(tiny(), read(small))(x), rtol=0, atol=1e-6)


def test_tied_weights_and_networks_without_norms():
    recipe = fw.Recipe(fw.Rtn(fw.GridSpec(3)), exclude=("lstm.weight_hh*",))
    artifact = fw.compress(words(), sentences(), recipe=recipe).artifact
    tuned = fw.finetune(artifact, words(), fw.Finetune(sentences(), 3, 0.01, 16))
    assert tuned.trained.losses[-1] < tuned.trained.losses[0]
    assert list(tuned.artifact.rest) == list(artifact.rest)
    assert fill(words(), tuned.artifact)


def test_bf16_comes_close_to_fp32(small):
    dense, samples = tiny(), batches(images(64), 32)
    distances = {}
    for precision in ("fp32", "bf16"):
        tuned = fw.finetune(small, dense, fw.Finetune(images(64), 6, 0.01, 16, precision=precision))
        distances[precision] = output_distance(dense, fill(tiny(), tuned.artifact), samples)
        assert {t.dtype for t in tuned.artifact.rest.values()} == {t.dtype for t in read(small).rest.values()}
    assert distances["bf16"] != distances["fp32"]
    assert distances["bf16"] < 1.3 * distances["fp32"]
    with pytest.raises(UsageError, match="fp32 or bf16"):
        fw.Finetune(images(8), precision="fp16")


class Viewing(nn.Module):
    """Its `view` works on the usual memory order only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4 * 6 * 6, 5)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).view(len(x), -1))


def test_networks_that_refuse_channels_last_get_them_as_they_come():
    torch.manual_seed(0)
    net, x = Viewing().eval(), images(32).tensors[0]
    with pytest.raises(RuntimeError, match="view size"):
        net(x.contiguous(memory_format=torch.channels_last))
    artifact = fw.compress(net, x, method=fw.Rtn(fw.GridSpec(3))).artifact
    assert fw.finetune(artifact, net, fw.Finetune(x, 1, batch_size=16)).trained


def test_what_cannot_be_finetuned_is_refused(small):
    rounded = fw.compress(tiny(), images(), recipe=fw.Recipe(fw.Rtn(fw.GridSpec(4)), activations=8)).artifact
    with pytest.raises(UsageError, match="rounded inputs"):
        fw.finetune(rounded, tiny(), HOW)
    with pytest.raises(UsageError, match="does not fit Words"):
        fw.finetune(small, words(), HOW)
    with pytest.raises(UsageError, match="does not accept the data"):
        fw.finetune(small, tiny(), fw.Finetune(torch.randn(8, 3), 1))


# ---------------------------------------------------------------- the command
def test_the_command(small, tmp_path, run):
    out, state = tmp_path / "tuned.fw", tmp_path / "state"
    settings = ["--epochs", 4, "--learning-rate", 0.01, "--batch-size", 16, "--seed", 3, "--checkpoint", state]
    command = ["finetune", small, "--model", MODEL, "--train", TRAIN, "--test", TEST, *settings, "-o", out]
    code, text, _ = run(*command, "--json")
    found = json.loads(text)
    assert code == 0
    assert len(found["losses"]) == 4
    assert found["file_bytes"] == out.stat().st_size
    assert found["digest"] == read(out).digest()
    assert found["losses"][-1] < found["losses"][0]
    assert found["top1"] == found["after"]["top1"] > 80
    assert found["before"]["top1"] > 80
    assert state.exists()
    code, text, _ = run(*command)  # the training is in the checkpoint
    assert code == 0
    for word in ("mean loss of each epoch", "top1 ", " -> ", "every decoded bit is the same", found["digest"][:12]):
        assert word in text
    code, _, err = run(*command, "--precision", "bf16")
    assert code == 2
    assert "of precision fp32, not bf16" in " ".join(err.split())


WRONG = {
    "cannot read nothing.fw": (1, ["nothing.fw"]),
    "must be fp32 or bf16": (2, ["SMALL", "--precision", "fp8"]),
    "must be a share": (2, ["SMALL", "--labels", "2"]),
    "rate must be above 0": (2, ["SMALL", "--learning-rate", "0"]),
    "--metric needs": (2, ["SMALL", "--metric", f"{NETS}:mean_output"]),
    "the output and the checkpoint": (2, ["SMALL", "--checkpoint", "tuned.fw"]),
    "lower the learning rate": (2, ["SMALL", "--learning-rate", "1e30"]),
}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_requests_are_one_line_and_a_code(said, small, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, args = WRONG[said]
    got, out, err = run(
        "finetune", *(str(small) if a == "SMALL" else a for a in args), "--model", MODEL, "--train", TRAIN
    )
    assert (got, out) == (code, "")
    assert said in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


def test_compress_takes_a_precision(tmp_path, run):
    command = ["compress", MODEL, "--data", TRAIN, "--method", "rtn", "--bits", 3, "-o", tmp_path / "s.fw"]
    assert run(*command, "--finetune", 1, "--precision", "bf16")[0] == 0
    code, _, err = run(*command, "--precision", "bf16")
    assert code == 2
    assert "give --finetune" in " ".join(err.split())


# ---------------------------------------------------------------- several processes
ONE = """
import json, sys, torch
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
import featherweight as fw
from tests.nets import images, tiny
how = fw.Finetune(images(60), 3, 0.01, 8, checkpoint=sys.argv[2])
steps = []
for turn in (1, 2):  # the second time the checkpoint is of a finished training
    tuned = fw.finetune(sys.argv[1], tiny(), how, lambda stage, done, total: steps.append(done))
tuned.save(sys.argv[3 + torch.distributed.get_rank()])
print(json.dumps([len(steps), tuned.trained.losses]))
torch.distributed.destroy_process_group()
"""


def two_processes(*command: object) -> list[tuple[str, str]]:
    """(standard output, standard error) of two that were started as torchrun starts them."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    done = [process.communicate(timeout=300) for process in started]
    assert [p.returncode for p in started] == [0, 0], done
    return done


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_batches_of_twice_the_size(small, tmp_path):
    outputs = tmp_path / "0.fw", tmp_path / "1.fw"
    done = two_processes("-c", ONE, small, tmp_path / "state", *outputs)
    first, second = (read(path) for path in outputs)
    assert first.digest() == second.digest()
    alone = fw.finetune(small, tiny(), fw.Finetune(images(60), 3, 0.01, 16))
    for text, _ in done:
        steps, losses = json.loads(text)
        assert steps == 3 * 4
        assert losses == pytest.approx(alone.trained.losses, rel=1e-4)  # sums in another order
    for name, tensor in alone.artifact.state().items():
        torch.testing.assert_close(first.state()[name], tensor, rtol=1e-3, atol=1e-5)  # fp16 may round either way


def test_the_first_process_of_the_command_speaks_and_writes(small, tmp_path):
    command = ["-m", "featherweight", "finetune", small, "--model", MODEL, "--train", TRAIN, "--test", TEST]
    output = tmp_path / "tuned.fw"
    (text, _), (silent, _) = two_processes(*command, "--epochs", 1, "-o", output, "--json")
    assert silent == ""
    assert json.loads(text)["digest"] == read(output).digest()
    assert [p.name for p in tmp_path.iterdir()] == ["tuned.fw"]
