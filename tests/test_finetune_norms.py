"""BatchNorms that are trained with the statistics of batches."""

import json

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import featherweight as fw
from featherweight.artifact import fill
from featherweight.data import batches
from featherweight.errors import UsageError
from featherweight.finetune import Finetune
from featherweight.finetune.statistics import statistics
from featherweight.methods import GridSpec, Rtn
from featherweight.norms import foldable, restate
from featherweight.repair.distance import output_distance
from tests.nets import images, sentences, tiny, words

DATA = images(48)
IMAGES = DATA.tensors[0]
TEXT = Finetune(sentences(), 1, norms="batch")
ONE = Finetune(DATA, 1, batch_size=48, norms="batch")  # one batch has them all


def test_a_norm_with_other_statistics_computes_the_same():
    norm = nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
        norm.running_mean.copy_(torch.tensor([0.3, 1.0, -4.0]))
    x = torch.randn(4, 3, 5, 5)
    before = norm(x)
    restate(norm, torch.tensor([1.0, -1.0, 0.0]), torch.tensor([4.0, 0.25, 9.0]))
    torch.testing.assert_close(norm(x), before)
    assert norm.running_var.tolist() == [4.0, 0.25, 9.0]


def test_training_starts_from_the_same_network_and_ends_with_what_its_batches_had():
    net = tiny()
    before = net(IMAGES)
    with statistics(net, ONE):
        torch.testing.assert_close(net(IMAGES), before, rtol=1e-4, atol=1e-4)
        assert all(m.training for _, m in foldable(net))
        other = net(IMAGES[:7])  # another batch has other statistics
    assert not any(m.training for m in net.modules())
    torch.testing.assert_close(net(IMAGES), before, rtol=1e-2, atol=1e-2)  # running variances are unbiased
    assert not torch.allclose(other, before[:7], rtol=1e-2, atol=1e-2)
    assert all(not m.running_mean.any() for _, m in foldable(net))


def test_statistics_that_stay_are_those_of_the_trained_weights():
    net = tiny()
    with statistics(net, ONE):
        with torch.no_grad():
            net.conv1.weight.mul_(3)  # which normalising takes back
    torch.testing.assert_close(net(IMAGES), tiny()(IMAGES), rtol=1e-2, atol=1e-2)


class Twins(nn.Module):
    """Two norms with one scale, and a third that sees a single value where there is one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x)))


def test_norms_that_share_tensors_and_single_values_stay_in_eval_mode():
    torch.manual_seed(0)
    net, data = Twins().eval(), TensorDataset(torch.randn(20, 4))
    with statistics(net, Finetune(data, 1, batch_size=20, norms="batch")):
        net(data.tensors[0])
        assert [m.training for m in (net.a, net.b, net.c)] == [False, False, True]
        net(data.tensors[0][:1])
        assert not net.c.training


def test_a_network_comes_closer_and_is_read_back_as_it_was_trained(tmp_path):
    small = fw.compress(tiny(), DATA, method=Rtn(GridSpec(2)))
    tuned = [fw.finetune(small.artifact, tiny(), Finetune(DATA, 8, 0.01, 16, norms=n)) for n in ("batch", "kept")]
    samples = batches(DATA, 16)
    before = output_distance(tiny(), fill(tiny(), small.artifact), samples)
    after = [output_distance(tiny(), fill(tiny(), t.artifact), samples) for t in tuned]
    assert max(after) < 0.8 * before
    assert tuned[0].artifact.digest() != tuned[1].artifact.digest()
    again = fw.finetune(small.artifact, tiny(), Finetune(DATA, 8, 0.01, 16, norms="batch"))
    assert again.artifact.digest() == tuned[0].artifact.digest()


def test_a_run_that_was_stopped_gives_the_same_bits(tmp_path):
    small = fw.compress(tiny(), DATA, method=Rtn(GridSpec(2)))
    how = Finetune(DATA, 2, 0.01, 16, norms="batch", checkpoint=tmp_path / "state")

    def stop(_stage: str, done: int, _total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fw.finetune(small.artifact, tiny(), how, stop)
    whole = fw.finetune(small.artifact, tiny(), Finetune(DATA, 2, 0.01, 16, norms="batch"))
    assert fw.finetune(small.artifact, tiny(), how).artifact.digest() == whole.artifact.digest()


def test_training_by_admm_takes_them_too():
    net, data = tiny(), images(64)
    found, pulled = fw.admm(net, Rtn(GridSpec(3)), fw.AdmmTraining(data, 2, batch_size=16, norms="batch"))
    kept, _ = fw.admm(net, Rtn(GridSpec(3)), fw.AdmmTraining(data, 2, batch_size=16))
    assert pulled.losses[-1] < pulled.losses[0]
    assert not any(m.training for m in found.modules())
    samples = batches(data, 32)
    away = output_distance(net, found, samples)
    assert 0 < away < 2 * output_distance(net, kept, samples)


def test_a_network_whose_norms_never_see_two_values_is_refused_and_stays_as_it_was():
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.norm(input=self.first(x)).relu())

    torch.manual_seed(0)
    net, data = Rows(), TensorDataset(torch.randn(40, 4))
    for _ in range(30):
        net(data.tensors[0] + 1)
    small = fw.compress(net.eval(), data, method=Rtn(GridSpec(4))).artifact
    with pytest.raises(UsageError, match="several values a channel"):
        fw.finetune(small, net, Finetune(data, 1, 1e-6, 1, norms="batch"))
    with pytest.raises(UsageError, match="there is none"):
        fw.finetune(fw.compress(words(), sentences(), method=Rtn(GridSpec(4))).artifact, words(), TEXT)
    tuned = fw.finetune(small, net, Finetune(data, 1, 1e-6, 39, norms="batch"))  # and one batch of a single sample
    samples = batches(data, 40)
    before, after = (output_distance(net, fill(Rows(), a), samples) for a in (small, tuned.artifact))
    assert after < before + 1e-2


def test_the_command_and_wrong_words(tmp_path, run):
    nets = "tests/nets.py"
    small, tuned = tmp_path / "small.fw", tmp_path / "tuned.fw"
    run("compress", f"{nets}:tiny", "--method", "rtn", "--bits", "3", "-o", small)
    command = ["finetune", small, "--model", f"{nets}:tiny", "--train", f"{nets}:images", "--epochs", "1"]
    code, out, _ = run(*command, "--norms", "batch", "-o", tuned, "--json")
    assert code == 0
    assert json.loads(out)["losses"]
    code, _, said = run(*command, "--norms", "running", "-o", tuned)
    assert code != 0
    assert "norms must be kept or batch" in said
    assert "Traceback" not in said
    with pytest.raises(UsageError, match="norms"):
        Finetune(DATA, norms="none")  # pyright: ignore
