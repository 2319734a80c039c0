"""Training by ADMM: the penalty and the update, nearest points, the loop, several processes, the command."""

import json
from dataclasses import dataclass, replace
from importlib import import_module
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
from featherweight.artifact import read
from featherweight.data import batches
from featherweight.demo import digits
from featherweight.errors import SolveError, UsageError
from featherweight.layers import scan
from featherweight.methods import (
    NM,
    Blocks,
    Factorize,
    GridSpec,
    Magnitude,
    Obs,
    Prune,
    Rtn,
    Solution,
    Unstructured,
)
from featherweight.pull import AdmmTraining, Pull
from featherweight.pull.nearest import nearest, white
from featherweight.repair.distance import output_distance
from featherweight.stats import LayerStats
from tests.nets import images, sentences, tiny, words
from tests.reference import pull as reference
from tests.test_finetune_file import two_processes
from tests.test_finetune_parts import Stop, stop_after


@dataclass(frozen=True)
class Exact:
    """A matrix in full."""

    kind: ClassVar[str] = "exact"
    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def dense(self) -> Tensor:
        return self.values


@dataclass(frozen=True)
class Low:
    """Truncated singular value decomposition, in float64."""

    name: ClassVar[str] = "low"
    rank: int

    @property
    def label(self) -> str:
        return f"low {self.rank}"

    def solve(self, w: Tensor, stats: LayerStats) -> Solution:
        u, s, v = torch.linalg.svd(w.double(), full_matrices=False)
        return Solution.of(
            Exact((u[:, : self.rank] * s[: self.rank]) @ v[: self.rank]), w, stats, fw.methods.Status.SOLVED
        )


class Failing:
    name: ClassVar[str] = "failing"
    label = "failing"

    def solve(self, w: Tensor, stats: LayerStats) -> Solution:
        raise SolveError("no")


def line(rows: int = 6, cols: int = 5, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(cols, rows, bias=False).double()


# ---------------------------------------------------------------- the two calls
def test_the_penalty_has_the_gradient_of_the_notes():
    net = nn.Sequential(line(), nn.Tanh(), line(4, 6, 1))
    pull = Pull(net, Low(2), rho=0.7)
    pull.update()
    with torch.no_grad():
        net[0].weight.add_(0.3)
    pull.update()
    assert all(bool((u != 0).any()) for n, u in pull.u.items() if n == "0.weight")
    pull.penalty().backward()
    for name in ("0.weight", "2.weight"):
        w = net.get_parameter(name)
        wanted = pull.rho * (w - pull.z[name] + pull.u[name]) / pull.scale[name]
        torch.testing.assert_close(w.grad, wanted.detach(), rtol=1e-14, atol=0)
    whole = sum(
        pull.rho / pull.scale[n] / 2 * (net.get_parameter(n) - z + pull.u[n]).norm() ** 2 for n, z in pull.z.items()
    )
    torch.testing.assert_close(pull.penalty(), whole, rtol=1e-12, atol=0)
    start = nn.Sequential(line(), nn.Tanh(), line(4, 6, 1))
    assert pull.scale["2.weight"] == pytest.approx(float(start[2].weight.detach().square().sum()))


@pytest.mark.parametrize(("step", "growth"), [(1.0, 1.0), (0.3, 1.5)])
def test_updates_agree_with_a_loop_that_is_written_out(step, growth):
    torch.manual_seed(1)
    net, a, h = line(), torch.randn(6, 5).double(), torch.randn(5, 5).double()
    h = h @ h.T / 5 + 0.1 * torch.eye(5).double()
    project = lambda w: reference.best_low_rank(w, torch.eye(5).double(), 2)  # noqa: E731
    wanted = reference.admm(net.weight.detach(), lambda w: (w - a) @ h, project, 0.8, 0.05, 6, 7, step, growth)
    pull = Pull(net, Low(2), rho=0.8, growth=growth, step=step, relative=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for w, z, u in wanted:
        pull.update()
        for _ in range(7):
            optimizer.zero_grad()
            d = net.weight - a
            ((d @ h) * d).sum().div(2).add(pull.penalty()).backward()
            optimizer.step()
        for ours, theirs in ((net.weight.detach(), w), (pull.z["weight"], z), (pull.u["weight"], u)):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    last, w, z = pull.residuals()["weight"], wanted[-2][0], wanted[-1][1]
    assert last.primal == pytest.approx(float((w - z).norm() / w.norm()), rel=1e-9)
    assert last.dual == pytest.approx(float((z - wanted[-2][1]).norm() / w.norm()), rel=1e-9)


def test_it_comes_to_the_known_optimum_under_the_constraint():
    """Of all matrices of rank 2 the one that loses least, which is not the truncated minimum of the loss."""
    torch.manual_seed(2)
    net, a, h = line(), torch.randn(6, 5).double(), torch.randn(5, 5).double()
    h = h @ h.T / 5 + 0.05 * torch.eye(5).double()
    best = reference.best_low_rank(a, h, 2)
    loss = lambda w: float((((w - a) @ h) * (w - a)).sum())  # noqa: E731
    with torch.no_grad():
        net.weight.copy_(a)
    pull = Pull(net, Low(2), rho=1.0, step=1.0, relative=False)
    direct, inverse = reference.best_low_rank(a, torch.eye(5).double(), 2), torch.linalg.inv(h + torch.eye(5).double())
    for _ in range(300):
        pull.update()
        with torch.no_grad():  # the whole minimum, where training would come close
            net.weight.copy_((a @ h + pull.z["weight"] - pull.u["weight"]) @ inverse)
    assert pull.residuals()["weight"].primal < 1e-6
    assert loss(pull.z["weight"]) == pytest.approx(loss(best), rel=1e-6)
    assert loss(direct) > 1.05 * loss(best)


def test_the_state_goes_on_elsewhere_and_is_refused_by_other_weights():
    net, other = line(), line(seed=5)
    pull = Pull(net, Low(1), rho=2.0, growth=1.5)
    for _ in range(3):
        pull.update()
        with torch.no_grad():
            net.weight.mul_(0.9)
    again = Pull(other, Low(1))
    again.load_state_dict(pull.state_dict())
    with torch.no_grad():
        other.weight.copy_(net.weight)
    assert again.history == pull.history
    assert torch.equal(again.penalty(), pull.penalty())
    assert again.update() == {**again.history[-1]}
    with pytest.raises(UsageError, match=r"other weights: it differs in u\.weight, z\.weight"):
        Pull(line(4, 4), Low(1)).load_state_dict(pull.state_dict())


def test_it_works_under_autocast_and_beside_half_precision():
    net = tiny()
    pull = Pull(net, Magnitude(NM(2, 4)))
    pull.update()
    plain = pull.penalty()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pull.penalty(), plain)
    half = tiny().bfloat16()
    pull = Pull(half, Magnitude(NM(2, 4)))
    pull.update()
    assert {t.dtype for t in (*pull.z.values(), *pull.u.values())} == {torch.float32}
    pull.penalty().backward()
    assert half.fc.weight.grad.dtype == torch.bfloat16


def test_what_cannot_be_pulled_is_refused():
    net = tiny()
    with pytest.raises(UsageError, match=r"there is no weight 'conv9\.weight'"):
        Pull(net, {"conv9.weight": Low(1)})
    with pytest.raises(UsageError, match="no weight is given a form"):
        Pull(net, {})
    with pytest.raises(UsageError, match=r"call update\(\) before"):
        Pull(net, Low(1)).penalty()
    with pytest.raises(SolveError, match=r"fc\.weight: no"):
        Pull(net, {"fc.weight": Failing()}).update()
    for wrong, said in (
        ({"rho": 0}, "rho must be"),
        ({"growth": 0.5}, "growth of rho"),
        ({"step": 2}, "step of the dual"),
    ):
        with pytest.raises(UsageError, match=said):
            Pull(net, Low(1), **wrong)
    with pytest.raises(UsageError, match="nor mixed samples"):
        AdmmTraining(images(8), labels=0.5, loss=nn.functional.cross_entropy)


# ---------------------------------------------------------------- nearest points
PATTERNS = [Unstructured(0.6), NM(2, 4), Blocks(0.5)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.label)
@pytest.mark.parametrize("kind", [Obs, Prune])
def test_pruners_without_inputs_keep_the_largest(pattern, kind):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 6, 3)
    (unit,) = scan(conv).units
    w = unit.view.matrix(conv.weight.detach())
    found = kind(pattern).solve(w, white(unit)).weight.dense()
    assert torch.equal(found, unit.view.matrix(nearest(unit, kind(pattern), conv.weight)))


def test_nearest_points_of_patterns_grids_and_ranks():
    net = line(6, 8).float()
    (unit,) = scan(net).units
    w = net.weight.detach()
    pruned = reference.largest_of_every(w, 2, 4)
    torch.testing.assert_close(nearest(unit, Magnitude(NM(2, 4)), w), pruned, rtol=2**-10, atol=1e-6)
    grid = Rtn(GridSpec(3)).solve(w, white(unit)).weight
    points = (torch.arange(8.0) - grid.zero.float()[..., None]) * grid.scale.float()[..., None]
    closest = points.expand(6, 8, 8).gather(2, (points - w[..., None]).abs().argmin(-1, keepdim=True))[..., 0]
    torch.testing.assert_close(nearest(unit, Rtn(GridSpec(3)), w), closest)
    low = reference.best_low_rank(w.double(), torch.eye(8).double(), 3)
    torch.testing.assert_close(nearest(unit, Low(3), w).double(), low, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["rows", "spatial", "tucker", "tt", "tr", "cp"])
def test_factors_are_a_form_and_what_has_none_is_left_alone(form):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 12, 3), nn.Conv2d(12, 12, 3, groups=12))
    pull = Pull(net, Factorize(form, 0.4))
    assert [u.name for u in pull.units] == ["0.weight"], "the other has groups"
    first = pull.update()["0.weight"].primal
    with torch.no_grad():
        net[0].weight.copy_(pull.z["0.weight"])
    again = Pull(net, Factorize(form, 0.4))
    assert again.update()["0.weight"].primal < 0.05 < first, "a point of the form is near itself"


def test_inputs_count_where_they_are_given():
    net = line(6, 8).float()
    (unit,) = scan(net).units
    x = torch.randn(200, 8) * torch.tensor([9.0, *[0.1] * 7])
    stats = fw.capture(net, batches(x), [unit])
    blind, seeing = Pull(net, Obs(NM(1, 8))), Pull(net, Obs(NM(1, 8)), stats=stats)
    blind.update(), seeing.update()
    lost = [((net.weight.detach() - pull.z["weight"]) @ x.T).norm() for pull in (seeing, blind)]
    assert lost[0] < 0.5 * lost[1]
    assert (net.weight - seeing.z["weight"]).norm() > (net.weight - blind.z["weight"]).norm()


def test_books_that_weights_share_are_fitted_to_all_of_them():
    net = tiny()
    pull = Pull(net, fw.Recipe(fw.Additive(2.0), include=("conv*",)))
    first = pull.update()
    assert all(0 < r.primal < 0.7 for r in first.values())
    values = [z.unique().numel() for z in pull.z.values()]
    assert all(n < z.numel() for n, z in zip(values, pull.z.values(), strict=True))


# ---------------------------------------------------------------- the loop
HOW = AdmmTraining(images(64), 12, rho=20.0, learning_rate=5e-3, batch_size=8)


@pytest.mark.parametrize(
    "method", [Magnitude(NM(1, 4)), Rtn(GridSpec(2)), Factorize("rows", 0.4)], ids=lambda m: m.label
)
def test_residuals_fall_and_less_is_lost(method):
    dense, samples = tiny(), batches(images(64), 32)
    by_name = {"conv1.weight": method, "fc.weight": method}
    net, pulled = fw.admm(dense, by_name, HOW)
    assert all(
        torch.equal(a, b) for a, b in zip(dense.state_dict().values(), tiny().state_dict().values(), strict=True)
    )
    assert net.training is False
    assert {len(v) for v in (*pulled.primal.values(), *pulled.dual.values())} == {HOW.epochs + 1}
    assert all(v[-1] < 0.6 * v[0] for v in pulled.primal.values())
    for name, values in pulled.primal.items():  # the first is what the dense weight would lose
        w = dense.get_parameter(name).detach()
        unit = next(u for u in scan(dense).units if u.name == name)
        assert values[0] == pytest.approx(float((w - nearest(unit, method, w)).norm() / w.norm()), rel=1e-5)
    lost = []
    for start in (dense, net):
        for unit in scan(dense).units:
            if unit.name in by_name:
                w = start.get_parameter(unit.name)
                w.data.copy_(nearest(unit, method, w))
        lost.append(output_distance(tiny(), start, samples))
    assert lost[1] < 0.6 * lost[0]


def test_labels_and_losses_of_ones_own_count_and_networks_of_other_kinds_train():
    (first, _), (second, _), (third, pulled) = (
        fw.admm(tiny(), Low(3), replace(HOW, epochs=1, **more))
        for more in ({}, {"labels": 0.5}, {"loss": lambda out, target: out.square().mean()})
    )
    assert not torch.equal(first.fc.weight, second.fc.weight)
    assert float(third(images().tensors[0]).square().mean()) < float(first(images().tensors[0]).square().mean())
    assert len(pulled.losses) == 1
    net, pulled = fw.admm(words(), Rtn(GridSpec(3)), AdmmTraining(sentences(), 2, precision="bf16"))
    assert net.out.weight is net.embed.weight
    assert set(pulled.primal) == {u.name for u in scan(net).units}


@pytest.mark.parametrize("steps", [4, 6])
def test_a_run_that_was_stopped_gives_the_same_bits(tmp_path, monkeypatch, steps):
    monkeypatch.setattr(import_module("featherweight.finetune.loop"), "OFTEN", 0.0)
    how = replace(HOW, epochs=3, growth=1.2, batch_size=16)
    straight, log = fw.admm(tiny(), Magnitude(NM(1, 4)), how)
    how = replace(how, checkpoint=tmp_path / "state")
    with pytest.raises(Stop):
        fw.admm(tiny(), Magnitude(NM(1, 4)), how, stop_after(steps))
    seen = []
    again, logged = fw.admm(tiny(), Magnitude(NM(1, 4)), how, lambda stage, done, total: seen.append((stage, done)))
    assert seen == [("admm", k) for k in range(steps, 13)]
    assert logged == log
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), straight.state_dict().values(), strict=True)
    )
    with pytest.raises(UsageError, match="of other methods"):
        fw.admm(tiny(), Magnitude(NM(2, 4)), how)
    with pytest.raises(UsageError, match=r"of rho 20\.0, not 3\.0"):
        fw.admm(tiny(), Magnitude(NM(1, 4)), replace(how, rho=3.0))
    with pytest.raises(UsageError, match="no checkpoint of a finetuning"):
        fw.finetune(
            fw.compress(tiny(), method=Rtn(GridSpec(4))).artifact,
            tiny(),
            fw.Finetune(images(), checkpoint=tmp_path / "state"),
        )


TWO = """
import sys, torch
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
from torch.nn.parallel import DistributedDataParallel
import featherweight as fw
from featherweight.methods import NM, Magnitude
from tests.nets import images, tiny
class Failing:
    label = "failing"
    def solve(self, w, stats):
        raise fw.SolveError("no")
rank = torch.distributed.get_rank()
net, log = fw.admm(tiny(), Magnitude(NM(1, 4)), fw.AdmmTraining(images(60), 2, 20.0, batch_size=8))
own = tiny()
wrapped, pull = DistributedDataParallel(own), fw.Pull(own, Magnitude(NM(1, 4)))
optimizer = torch.optim.SGD(own.parameters(), lr=0.01)
x, y = images(16).tensors
for _ in range(2):
    pull.update()
    optimizer.zero_grad()
    (torch.nn.functional.cross_entropy(wrapped(x[rank::2]), y[rank::2]) + pull.penalty()).backward()
    optimizer.step()
try:
    fw.Pull(own, {"conv2.weight": Magnitude(NM(1, 4)), "fc.weight": Failing()}).update()
except fw.SolveError as error:
    print(error)
torch.save([net.state_dict(), log.primal, own.state_dict(), pull.z], sys.argv[1 + rank])
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_agree_and_do_what_one_does(tmp_path):
    paths = tmp_path / "0", tmp_path / "1"
    (said, _), (why, _) = two_processes("-c", TWO, *paths)
    assert "process 1 found no nearest point" in said
    assert "fc.weight: no" in why
    first, second = (torch.load(p) for p in paths)
    for a, b in ((first[0], second[0]), (first[2], second[2]), (first[3], second[3])):
        assert all(torch.equal(a[n], b[n]) for n in a)
    assert first[1] == second[1]
    alone, _ = fw.admm(tiny(), Magnitude(NM(1, 4)), AdmmTraining(images(60), 2, 20.0, batch_size=16))
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(first[0][name], tensor, rtol=1e-3, atol=1e-4)
    own = tiny()
    pull, (x, y) = Pull(own, Magnitude(NM(1, 4))), images(16).tensors
    optimizer = torch.optim.SGD(own.parameters(), lr=0.01)
    for _ in range(2):
        pull.update()
        optimizer.zero_grad()
        (nn.functional.cross_entropy(own(x), y) + pull.penalty()).backward()
        optimizer.step()
    torch.testing.assert_close(first[2]["fc.weight"], own.fc.weight.detach(), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the line and the command
def test_compress_trains_and_finetunes_towards_the_network_given():
    data, method = images(64), Magnitude(NM(1, 4))
    seen = []
    small = fw.compress(
        tiny(),
        data,
        method=method,
        admm=HOW,
        finetune=fw.Finetune(data, 2, 0.01, 16),
        progress=lambda stage, done, total: seen.append(stage),
    )
    assert list(dict.fromkeys(seen)) == ["admm", "capture", "solve", "repair", "finetune"]
    direct = fw.compress(tiny(), data, method=method, finetune=fw.Finetune(data, 2, 0.01, 16))
    nets = [fw.artifact.fill(tiny(), x.artifact) for x in (small, direct)]
    ours, theirs = (output_distance(tiny(), net, batches(data, 32)) for net in nets)
    assert ours < 0.7 * theirs
    assert small.report.file_bytes == pytest.approx(direct.report.file_bytes, abs=64)
    assert small.report.finetuned.losses[0] < direct.report.finetuned.losses[0]
    assert small.report.pulled.primal["fc.weight"][-1] < small.report.pulled.primal["fc.weight"][0]


def test_a_target_chooses_first():
    small = fw.compress(
        tiny(), images(64), target=fw.Goal("2x", among="quantize", measurements=1), admm=replace(HOW, epochs=1)
    )
    assert small.report.allocation is not None
    assert set(small.report.pulled.primal) == {c.name for c in small.report.allocation.chosen}
    assert small.report.ratio >= 2


def test_the_command(tmp_path, run):
    out, picture, state = tmp_path / "small.fw", tmp_path / "residuals.png", tmp_path / "state"
    place = f"{digits.__name__}:"
    command = ["compress", f"{place}make", "--data", f"{place}calibration", "--pattern", "2:4", "--method", "magnitude"]
    command += [
        "--test",
        f"{place}test",
        "--admm",
        2,
        "--train",
        f"{place}calibration",
        "--rho",
        20,
        "--checkpoint",
        state,
    ]
    code, text, _ = run(*command, "--residuals", picture, "-o", out, "--json")
    assert code == 0
    found = json.loads(text)
    assert len(found["pulled"]["losses"]) == 2
    assert {len(v) for v in found["pulled"]["primal"].values()} == {3}
    assert found["digest"] == read(out).digest()
    assert found["top1"] > 95
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert state.exists()
    code, _, err = run(*command, "--rho", 3, "-o", out)
    assert code == 2
    assert "of rho 20.0, not 3.0" in " ".join(err.split())


WRONG = {
    "give --admm EPOCHS": ["--rho", 3],
    "--residuals names a picture": ["--admm", 1, "--residuals", "table.csv"],
    "the output and the checkpoint": ["--admm", 1, "--checkpoint", "small.fw"],
    "--admm needs data": ["--admm", 1],
    "give --finetune EPOCHS, for example 5, or --admm": ["--train", "x.py:y"],
}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_requests_are_one_line_and_a_code(said, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(
        "compress", f"{digits.__name__}:make", "--method", "rtn", "--bits", 4, "-o", "small.fw", *WRONG[said]
    )
    assert code == 2
    assert said in " ".join(err.split())


def test_methods_by_name_get_the_kernel_of_their_weight_and_what_cannot_be_is_said():
    net = nn.Sequential(nn.Conv2d(8, 8, 5), nn.Conv2d(8, 8, 3, groups=2))
    form = Factorize("spatial", keep=0.3)
    by_name, alone = Pull(net, {"0.weight": form}), Pull(net[:1], form)
    assert by_name.update()["0.weight"].primal == pytest.approx(alone.update()["0.weight"].primal)
    with pytest.raises(UsageError, match="groups"):
        Pull(net, {"1.weight": form})
    with pytest.raises(UsageError, match="must be a method, got int"):
        Pull(net, {"0.weight": 3})  # pyright: ignore
