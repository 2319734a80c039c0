"""The parts of finetuning: what is trained, in which order samples come, where a run that stopped goes on."""

from dataclasses import dataclass, replace
from importlib import import_module
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import featherweight as fw
from featherweight.artifact import Artifact, write
from featherweight.data import batches
from featherweight.errors import UsageError
from featherweight.finetune import Finetune, train
from featherweight.finetune.order import epoch_of, kept
from featherweight.finetune.ranks import Ranks
from featherweight.finetune.variables import Variables, continuous, mapped
from featherweight.layers import scan
from featherweight.methods import Gptq, GridSpec, Obs, PruneQuantize, Unstructured
from featherweight.repair.distance import output_distance
from featherweight.weights import Codebook, Dense, Factors, Grid, Sparse
from tests.nets import images, tiny


# ---------------------------------------------------------------- tensors that weights share
@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """w = scale * sum over books of book[codes]: the additive form, one number at a time."""

    kind: ClassVar[str] = "sum"
    codes: Tensor  # (books, rows, cols)
    books: tuple[Tensor, ...]
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[1], self.codes.shape[2]

    def dense(self) -> Tensor:
        parts = [book.float()[code] for book, code in zip(self.books, self.codes, strict=True)]
        return self.scale.float() * torch.stack(parts).sum(0)

    def bits(self) -> int:
        return 0

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes.reshape(-1), "scale": self.scale.reshape(-1)}

    def meta(self) -> dict:
        return {}

    def trainable(self) -> tuple[str, ...]:
        return ("books", "scale")

    @classmethod
    def layout(cls, shape, meta):
        raise NotImplementedError

    @classmethod
    def load(cls, shape, meta, tensors):
        raise NotImplementedError


def shared_codes(net: nn.Module):
    """Units, and weights of two books of 8 numbers that all of them share."""
    torch.manual_seed(0)
    units = scan(net).units
    books = torch.linspace(-1, 1, 8).half(), torch.linspace(-0.2, 0.2, 8).half()
    weights = {}
    for unit in units:
        w = unit.view.matrix(net.get_parameter(unit.name).detach())
        scale = w.abs().amax(1, keepdim=True).half()
        codes, left = [], w / scale.float()
        for book in books:
            codes.append((left[..., None] - book.float()).abs().argmin(-1))
            left = left - book.float()[codes[-1]]
        weights[unit.name] = Sum(torch.stack(codes), books, scale)
    return units, weights


def test_tensors_that_weights_share_are_one_variable_and_one_tensor_again():
    net, data = tiny().requires_grad_(False), images(64)
    units, weights = shared_codes(net)
    small = tiny().requires_grad_(False)
    for unit in units:
        small.get_parameter(unit.name).copy_(unit.view.tensor(weights[unit.name].dense()))
    variables = Variables.of(small, units, weights)
    assert len(variables.inner) == 2 + len(units), "two books, and a scale each"
    before = output_distance(net, small, batches(data, 16))
    found, _ = train(net, small, units, weights, Finetune(data, 8, 0.01, 16))
    assert output_distance(net, small, batches(data, 16)) < 0.8 * before
    first, *others = found.values()
    for k in (0, 1):
        old = weights[units[0].name].books[k]
        assert all(w.books[k] is first.books[k] for w in others)
        assert first.books[k].dtype == torch.float16
        assert not torch.equal(first.books[k], old)
    assert all(found[u.name].codes is weights[u.name].codes for u in units)
    for unit in units:
        torch.testing.assert_close(small.get_parameter(unit.name), unit.view.tensor(found[unit.name].dense()))


def test_a_shared_tensor_gets_the_gradients_of_all_its_weights():
    net = tiny().requires_grad_(False)
    units, weights = shared_codes(net)
    variables = Variables.of(net, units, weights)
    state = variables.state(net)
    sum(state[u.name].square().sum() for u in units).backward()
    together = [v.step.grad.clone() for v in list(variables.inner.values())[:2]]
    alone = [torch.zeros(8), torch.zeros(8)]
    for unit in units:
        own = Variables.of(net, units, weights)
        own.state(net)[unit.name].square().sum().backward()
        alone = [a + v.step.grad for a, v in zip(alone, list(own.inner.values())[:2], strict=True)]
    torch.testing.assert_close(together, alone)


def test_continuous_tensors_are_found_and_put_back_in_any_kind():
    values = Dense(torch.randn(3, 4).half())
    grid = Grid(torch.zeros(3, 4, dtype=torch.uint8), torch.ones(3, 1), None, 2, 4)
    mask = torch.rand(3, 4) > 0.5
    for weight, field in ((values, "values"), (grid, "scale")):
        for whole in (weight, Sparse(mask, weight)):
            (found,) = continuous(whole)
            assert found is getattr(weight, field)
            new = mapped(whole, lambda t, old=found: t + 1 if t is old else t)
            inner = new.values if isinstance(new, Sparse) else new
            assert torch.equal(getattr(inner, field), found + 1)
            assert mapped(whole, lambda t: t) is whole


def test_kept_values_move_faster_than_scales():
    net = tiny().requires_grad_(False)
    (unit,) = scan(net).units[-1:]
    rows, cols = unit.view.matrix_shape
    codes, scale = torch.zeros(rows, cols, dtype=torch.uint8), torch.ones(rows, 1)
    paces = []
    for weight in (Dense(torch.ones(rows, cols)), Grid(codes, scale, None, 2, cols)):
        (variable,) = Variables.of(net, [unit], {unit.name: weight}).inner.values()
        paces.append(variable.pace)
    assert paces[0] > paces[1]


def test_factors_move_like_kept_values_and_their_scales_like_scales():
    """A factor has far fewer numbers than the matrix, but each of them stands for itself."""
    net = nn.Linear(64, 64, bias=False).requires_grad_(False)
    (unit,) = scan(net).units
    grid = Grid(torch.zeros(1, 64, dtype=torch.uint8), torch.ones(1, 1), None, 2, 64)
    sizes = {"o": 64, "r": 1, "c": 64}
    weight = Factors((64, 64), "oc", ("or", "rc"), sizes, (Dense(torch.ones(64, 1)), grid))
    plain, scale = Variables.of(net, [unit], {unit.name: weight}).inner.values()
    assert (plain.start.shape, scale.start.shape) == ((64, 1), (1, 1))
    assert plain.pace == 10 * scale.pace
    three = Dense(torch.ones(64, 1)), Dense(torch.ones(1, 1)), Dense(torch.ones(1, 64))
    weight = Factors((64, 64), "oc", ("or", "rs", "sc"), sizes | {"s": 1}, three)
    assert {v.pace for v in Variables.of(net, [unit], {unit.name: weight}).inner.values()} == {plain.pace / 2}


def test_a_value_that_leaves_fp16_is_said():
    net = nn.Linear(4, 3).requires_grad_(False)
    (unit,) = scan(net).units
    variables = Variables.of(net, [unit], {unit.name: Dense(torch.full((3, 4), 60000.0).half())})
    variables.inner[next(iter(variables.inner))].step.data.fill_(1.0)
    with pytest.raises(UsageError, match="weight has left the range of float16"):
        variables.finish(net)


# ---------------------------------------------------------------- the order of the samples
class Noisy(Dataset):
    """Augmented: what a sample is depends on torch's random numbers."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> Tensor:
        return torch.tensor([float(i)]) + torch.rand(1) / 2


def _read(how: Finetune, epoch: int = 0, ranks: Ranks | None = None, start: int = 0) -> list[Tensor]:
    found = epoch_of(how, epoch, ranks or Ranks(), start)
    read = [b.args[0] for b in found.batches]
    assert len(read) == found.count - start
    return read


@pytest.mark.parametrize("data", [Noisy(), DataLoader(Noisy(), 6, shuffle=True)], ids=["dataset", "loader"])
def test_an_epoch_that_goes_on_has_the_same_batches(data):
    how = Finetune(data, batch_size=6)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    whole = _read(how)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers stay"
    torch.rand(7)
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], _read(how, start=2), strict=True))
    assert not torch.equal(whole[0], _read(how, epoch=1)[0])
    assert sorted(torch.cat(whole).int().flatten().tolist()) == list(range(20))


def test_processes_share_every_batch_of_a_dataset():
    how = Finetune(TensorDataset(torch.arange(21.0)[:, None]), batch_size=4)
    double = _read(replace(how, batch_size=8))
    shares = [_read(how, ranks=Ranks(own, 2)) for own in (0, 1)]
    for both, *parts in zip(double, *shares, strict=True):
        assert sorted(torch.cat(parts).flatten().tolist()) == sorted(both.flatten().tolist())
    loader = [torch.full((2, 1), float(i)) for i in range(5)]
    shares = [_read(Finetune(loader), ranks=Ranks(own, 2)) for own in (0, 1)]
    assert [[float(b[0]) for b in share] for share in shares] == [[0, 2], [1, 3]]
    with pytest.raises(UsageError, match="too few for 8 processes"):
        epoch_of(Finetune(loader), 0, Ranks(0, 8))


def test_data_that_are_read_once_are_kept():
    how = kept(Finetune(iter([torch.ones(2, 1), torch.ones(3, 1)])))
    assert [len(_read(how, epoch)) for epoch in (0, 1)] == [2, 2]
    loader = DataLoader(Noisy(), 6)
    assert kept(Finetune(loader)).data is loader


# ---------------------------------------------------------------- a run that stopped goes on
@pytest.fixture(scope="module")
def pruned() -> Artifact:
    method = PruneQuantize(Obs(Unstructured(0.5)), Gptq(GridSpec(3, group=8)))
    recipe = fw.Recipe(Obs(Unstructured(0.5)), overrides=(fw.Override("conv2.*", method),))
    return fw.compress(tiny(), images(64), recipe=recipe).artifact


class Stop(Exception):
    pass


def stop_after(steps: int):
    def progress(stage: str, done: int, total: int) -> None:
        if done == steps:
            raise Stop

    return progress


@pytest.mark.parametrize("steps", [4, 6, 11])
def test_a_run_that_was_stopped_gives_the_same_bits(tmp_path, pruned, monkeypatch, steps):
    monkeypatch.setattr(import_module("featherweight.finetune.loop"), "OFTEN", 0.0)
    how = Finetune(images(64), 3, 0.01, 16)
    straight = fw.finetune(pruned, tiny(), how)
    resumable = replace(how, checkpoint=tmp_path / "state")
    with pytest.raises(Stop):
        fw.finetune(pruned, tiny(), resumable, stop_after(steps))
    seen = []
    again = fw.finetune(pruned, tiny(), resumable, lambda stage, done, total: seen.append(done))
    assert seen == list(range(steps, 13))  # the step that was told of is not yet in the file
    assert again.artifact.digest() == straight.artifact.digest()
    assert again.trained == straight.trained
    seen.clear()
    finished = fw.finetune(pruned, tiny(), resumable, lambda stage, done, total: seen.append(done))
    assert seen == []
    assert (finished.artifact.digest(), finished.trained) == (straight.artifact.digest(), straight.trained)


def test_checkpoints_of_something_else_are_refused(tmp_path, pruned):
    path = tmp_path / "state"
    how = Finetune(images(64), 1, 0.01, 16, checkpoint=path)
    fw.finetune(pruned, tiny(), how)
    assert [p.name for p in tmp_path.iterdir()] == ["state"], "written whole or not at all"
    for wrong, said in ((replace(how, epochs=2), "of epochs 1, not 2"), (replace(how, seed=1), "of seed 0, not 1")):
        with pytest.raises(UsageError, match=said):
            fw.finetune(pruned, tiny(), wrong)
    with pytest.raises(UsageError, match="of samples 64, not 32"):
        fw.finetune(pruned, tiny(), replace(how, data=images(32)))
    other = tiny()
    with torch.no_grad():
        other.fc.bias.add_(1)
    with pytest.raises(UsageError, match="another network, file or data"):
        fw.finetune(pruned, other, how)
    write(pruned, path)
    with pytest.raises(UsageError, match="no checkpoint of a finetuning"):
        fw.finetune(pruned, tiny(), how)
    path.write_bytes(b"something")
    with pytest.raises(UsageError, match="checkpoint cannot be used"):
        fw.finetune(pruned, tiny(), how)
    with pytest.raises(UsageError, match="of the checkpoint does not exist"):
        fw.finetune(pruned, tiny(), replace(how, checkpoint=tmp_path / "no" / "state"))


def test_the_rate_rises_falls_and_is_never_0():
    rate = import_module("featherweight.finetune.loop")._rate
    assert rate(0, 1) == 1
    whole = [rate(k, 200) for k in range(200)]
    assert whole[:10] == sorted(whole[:10])
    assert whole[9:] == sorted(whole[9:], reverse=True)
    assert min(whole) > 0
    assert max(whole) > 0.99


def test_codes_move_to_nearer_words_and_stay_where_none_is_nearer():
    books = (torch.tensor([[0.0, 0.0], [1.0, 1.0], [4.0, 4.0], [-4.0, 0.0]]).half(),)
    codes = torch.tensor([[[1], [2]], [[0], [3]]], dtype=torch.int16)
    own = Codebook(codes, books, torch.tensor([[2.0], [0.5]]).half(), 3)  # the last vector of a row has a surplus entry
    assert torch.equal(own.nearest(own.dense()), codes)
    wanted = own.dense().clone()
    wanted[0, :2] = torch.tensor([7.0, 7.0])  # 3.5 times the words, nearer to (4, 4)
    assert own.nearest(wanted).flatten().tolist() == [2, 2, 0, 3]


def test_codes_move_to_the_nearest_point_of_a_grid_and_stay_where_the_scale_is_zero():
    codes = torch.tensor([[0, 5, 7], [1, 2, 3]], dtype=torch.uint8)
    own = Grid(codes, torch.tensor([[0.5], [0.0]]).half(), None, 3, 3)
    assert torch.equal(own.nearest(own.dense()), codes)
    wanted = own.dense() + torch.tensor([[0.3, -0.2, 9.0], [1.0, 1.0, 1.0]])
    assert own.nearest(wanted).tolist() == [[1, 5, 7], [1, 2, 3]]
    shifted = Grid(codes, torch.tensor([[0.5]]).half(), torch.tensor([[2]], dtype=torch.uint8), 3, 0)
    assert torch.equal(shifted.nearest(shifted.dense() + 0.24), codes)


@pytest.mark.parametrize(
    "method", [fw.Rtn(fw.GridSpec(2)), fw.PruneQuantize(fw.Prune(fw.Unstructured(0.5)), fw.Obq(fw.GridSpec(3)))]
)
def test_moving_codes_of_grids_lower_the_loss(method):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).requires_grad_(False).eval()
    x = torch.randn(256, 8)
    artifact = fw.compress(dense, x, method=method).artifact
    how = fw.Finetune(x, epochs=12, batch_size=32, learning_rate=1e-2)
    still, moved = (fw.finetune(artifact, dense, replace(how, moves=m)) for m in (False, True))
    before, after = ({u.names[0]: u.weight for u in t.artifact.units} for t in (still, moved))
    assert moved.trained.losses[-1] < 0.8 * still.trained.losses[-1]
    assert {n: w.bits() for n, w in before.items()} == {n: w.bits() for n, w in after.items()}
    for name, weight in before.items():
        if isinstance(weight, Sparse):
            assert torch.equal(weight.mask, after[name].mask)


def test_moving_codes_lower_the_loss_and_keep_the_size():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).requires_grad_(False).eval()
    x = torch.randn(256, 8)
    artifact = fw.compress(dense, x, method=fw.Additive(fw.Vectors(2, (3,)))).artifact
    how = fw.Finetune(x, epochs=12, batch_size=32, learning_rate=1e-2)
    still, moved = (fw.finetune(artifact, dense, replace(how, moves=m)) for m in (False, True))
    before, after = ({u.names[0]: u.weight for u in t.artifact.units} for t in (still, moved))
    changed = sum(int((before[n].codes != after[n].codes).sum()) for n in before if isinstance(before[n], Codebook))
    assert changed > 0
    assert moved.trained.losses[-1] < still.trained.losses[-1]
    assert {n: w.bits() for n, w in before.items()} == {n: w.bits() for n, w in after.items()}
    first = {id(b) for w in after.values() if isinstance(w, Codebook) for b in w.books}
    assert len(first) == 1
