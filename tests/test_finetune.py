import copy

import pytest
import torch
from torch import nn

import featherweight as fw
from featherweight.data import Batch, batches
from featherweight.errors import UsageError
from featherweight.finetune import Finetune, train
from featherweight.finetune.order import mixed
from featherweight.layers import scan
from featherweight.methods import Gptq, GridSpec, Obs, PruneQuantize, Rtn, Unstructured
from featherweight.repair.distance import output_distance
from featherweight.solve import assembled
from featherweight.stats import capture
from tests.nets import images, sentences, tiny, words

METHODS = [
    Gptq(GridSpec(2)),
    Obs(Unstructured(0.7)),
    PruneQuantize(Obs(Unstructured(0.5)), Gptq(GridSpec(3, group=8))),
]


def solved(net, data, method):
    units = scan(net).units
    stats = capture(net, data, units)
    solutions = {u.name: method.solve(u.view.matrix(net.get_parameter(u.name).detach()), stats[u.name]) for u in units}
    return units, solutions, assembled(net, units, solutions)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.label)
@pytest.mark.parametrize("make", [lambda: (tiny(), images(64)), lambda: (words(), sentences())], ids=["cnn", "lstm"])
def test_it_comes_closer_and_what_is_discrete_stays(make, method):
    net, data = make()
    net.requires_grad_(False)
    samples = batches(data, 16)
    units, solutions, small = solved(net, samples, method)
    before, dense = output_distance(net, small, samples), copy.deepcopy(net.state_dict())
    old = {n: s.weight for n, s in solutions.items()}
    found, trained = train(net, small, units, old, Finetune(data, epochs=8, learning_rate=0.01, batch_size=16))
    assert output_distance(net, small, samples) < 0.8 * before
    assert trained.losses[-1] < trained.losses[0]
    assert all(torch.equal(t, dense[n]) for n, t in net.state_dict().items())
    for unit in units:
        a, b = old[unit.name], found[unit.name]
        assert (a.kind, a.meta(), a.bits()) == (b.kind, b.meta(), b.bits())
        frozen = set(a.tensors()) - set(a.trainable())
        assert all(torch.equal(a.tensors()[f], b.tensors()[f]) for f in frozen)
        torch.testing.assert_close(small.get_parameter(unit.name), unit.view.tensor(b.dense()))


def test_the_same_seed_gives_the_same_bytes_and_labels_count():
    net, data = tiny().requires_grad_(False), images(32)
    results = []
    for seed, labels in ((0, 0.0), (0, 0.0), (1, 0.0), (0, 0.5)):
        units, solutions, small = solved(net, batches(data, 16), METHODS[0])
        how = Finetune(data, epochs=1, batch_size=8, seed=seed, labels=labels)
        train(net, small, units, {n: s.weight for n, s in solutions.items()}, how)
        results.append(small.fc.bias.clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[3])


def test_through_compress_and_back(tmp_path):
    data = images(64)
    plain = fw.compress(tiny(), data, method=Rtn(GridSpec(3)))
    tuned = fw.compress(tiny(), data, method=Rtn(GridSpec(3)), finetune=Finetune(data, 10, 0.01, 16))
    assert tuned.report.finetuned.losses[-1] < tuned.report.finetuned.losses[0]
    assert tuned.report.file_bytes <= plain.report.file_bytes + 64
    tuned.save(tmp_path / "small.fw")
    loaded, net = fw.load(tmp_path / "small.fw", into=tiny()), tiny()
    plain.save(tmp_path / "plain.fw")
    samples = batches(data, 32)
    assert output_distance(net, loaded, samples) < 0.8 * output_distance(
        net, fw.load(tmp_path / "plain.fw", into=tiny()), samples
    )


def test_wrong_requests():
    with pytest.raises(UsageError, match="epochs"):
        Finetune(images(8), epochs=0)
    with pytest.raises(UsageError, match="leave out mix or labels"):
        Finetune(images(8), mix=0.5, labels=0.1)
    with pytest.raises(UsageError, match="nor mixed samples"):
        fw.AdmmTraining(images(8), mix=0.5, loss=lambda output, target: output.sum())
    with pytest.raises(UsageError, match="labels"):
        fw.compress(words(), sentences(), method=Rtn(GridSpec(4)), finetune=Finetune(sentences(), 1, labels=0.5))
    recipe = fw.Recipe(Gptq(GridSpec(4)), activations=8)
    with pytest.raises(UsageError, match="rounded inputs"):
        fw.compress(tiny(), images(), recipe=recipe, finetune=Finetune(images(), 1))


def test_a_loss_that_is_no_number_is_said():
    net = nn.Sequential(nn.Linear(4, 3))
    data = torch.full((4, 4), 1e30)
    with pytest.raises(UsageError, match="finetuning: the loss is"):
        fw.compress(net, torch.randn(8, 4), method=Rtn(GridSpec(4)), finetune=Finetune(data * 1e10, 1))


def test_other_precisions_and_data_that_are_read_once():
    def batches_of_digits():
        torch.manual_seed(0)
        for _ in range(4):
            yield torch.randn(16, 6)

    for dtype in (torch.float64, torch.bfloat16):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 5)).to(dtype).eval()
        data = [b.to(dtype) for b in batches_of_digits()]
        small = fw.compress(net, data, method=Rtn(GridSpec(3)), finetune=Finetune(data, 3, 0.01))
        assert small.report.finetuned.losses[-1] < small.report.finetuned.losses[0]
    once = batches_of_digits()
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 5)).eval()
    assert fw.compress(net, once, method=Rtn(GridSpec(3)), finetune=Finetune(once, 2)).report.finetuned


def test_data_that_do_not_fit_are_refused_before_the_work(monkeypatch):
    monkeypatch.setattr("featherweight.moments.capture", lambda *a, **k: pytest.fail("the work had begun"))
    with pytest.raises(UsageError, match="does not accept the data"):
        fw.compress(tiny(), images(), method=Gptq(GridSpec(4)), finetune=Finetune(torch.randn(8, 3), 1))


def test_mixed_samples_lie_between_two_of_the_batch():
    x, y = torch.randn(400, 3, generator=torch.Generator().manual_seed(0)), torch.arange(400)
    torch.manual_seed(1)
    found = mixed(Batch((x, y), {"scale": x * 2}, y), 0.25)
    out = found.args[0]
    moved = (out != x).any(1)
    assert 70 < int(moved.sum()) < 130
    for own, now in zip(x[moved][:20], out[moved][:20], strict=True):
        ways = torch.nn.functional.cosine_similarity((now - own)[None], x - own)
        other = x[ways.argmax()]
        assert ways.max() > 0.999
        assert (now - own).norm() <= (other - own).norm() * 1.001
    torch.testing.assert_close(found.kwargs["scale"], out * 2)
    assert torch.equal(found.args[1], y)
    assert torch.equal(found.target, y)


def test_mixing_changes_what_is_learnt_and_words_cannot_be_mixed():
    results = []
    for mix in (0.0, 0.5, 0.5):
        net, data = tiny().requires_grad_(False), images(32)
        units, solutions, small = solved(net, batches(data, 16), METHODS[0])
        train(net, small, units, {n: s.weight for n, s in solutions.items()}, Finetune(data, epochs=1, mix=mix))
        results.append(small.fc.bias.clone())
    assert torch.equal(results[1], results[2])
    assert not torch.equal(results[0], results[1])
    net, data = words().requires_grad_(False), sentences()
    units, solutions, small = solved(net, batches(data, 16), METHODS[0])
    with pytest.raises(UsageError, match="leave out mix"):
        train(net, small, units, {n: s.weight for n, s in solutions.items()}, Finetune(data, mix=0.5))
