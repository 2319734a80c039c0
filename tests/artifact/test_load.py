"""A file fills a network whole, or says what does not fit and changes nothing."""

import copy

import pytest
import torch
from torch import nn

from featherweight import compress, load
from featherweight.activations import simulate
from featherweight.artifact import Artifact, FoldedNorm, StoredUnit, fill, write
from featherweight.artifact.schema import is_foldable
from featherweight.errors import FormatError, UsageError
from featherweight.layers import scan
from featherweight.methods import GridSpec, Rtn
from featherweight.recipe import Recipe
from featherweight.weights import Dense

F16, F32 = torch.float16, torch.float32


def stored(net: nn.Module, dtype: torch.dtype = F32, norm_dtype: torch.dtype = F16) -> Artifact:
    """The artifact of a network, every weight dense and every BatchNorm folded: by hand, without the pipeline."""
    units = [
        StoredUnit(u.names, u.view, Dense(u.view.matrix(net.get_parameter(u.name).detach()).to(dtype)), "dense")
        for u in scan(net).units
    ]
    norms = []
    for name, m in net.named_modules():
        if is_foldable(m):
            scale = m.weight.detach().double() / (m.running_var.double() + m.eps).sqrt()
            shift = m.bias.detach().double() - m.running_mean.double() * scale
            norms.append(FoldedNorm(name, scale.to(norm_dtype), shift.to(norm_dtype), m.eps))
    taken = {n for u in units for n in u.names} | {n for x in norms for n in x.tensors()}
    rest = {n: t for n, t in net.state_dict().items() if n not in taken and not n.endswith("num_batches_tracked")}
    return Artifact(tuple(units), rest, tuple(norms))


def shaken(net: nn.Module) -> nn.Module:
    """The network with no BatchNorm left at its start values."""
    torch.manual_seed(1)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_()
            m.running_var.uniform_(0.1, 3)
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    return net.eval()


class Plain(nn.Module):
    """Convolution, norm, transposed convolution of two groups, linear layer; buffers of several types."""

    def __init__(self, eps: float = 1e-3):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.bn = nn.BatchNorm2d(4, eps=eps)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
        self.head = nn.Linear(6, 3)
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("precise", torch.tensor([1 / 3], dtype=torch.float64))
        self.register_buffer("small", torch.tensor([-3], dtype=torch.int8))

    def forward(self, x):
        return self.head(self.up(self.bn(self.conv(x)).relu()).mean((2, 3)))


IMAGE = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = shaken(Plain())
    net.steps.fill_(12345678901)
    net.flags.copy_(torch.tensor([False, True]))
    net.precise.fill_(2 / 3)
    net.small.fill_(100)
    return net


@pytest.fixture
def file(net, tmp_path):
    write(stored(net), tmp_path / "net.fw")
    return tmp_path / "net.fw"


# ---------------------------------------------------------------- what fits
def test_without_a_network_the_tensors_come_by_name(net, file):
    state = load(file)
    assert set(state) == {n for n in net.state_dict() if n != "bn.num_batches_tracked"}
    for name, tensor in net.state_dict().items():
        if not name.startswith("bn."):
            assert state[name].dtype == tensor.dtype
            assert torch.equal(state[name], tensor)
    assert state["bn.running_mean"].tolist() == [0] * 4
    assert torch.allclose(state["bn.running_var"] + net.bn.eps, torch.ones(4))


def test_a_network_is_filled_and_returned_in_eval_mode(net, file):
    torch.manual_seed(99)
    other = Plain().train()
    other.conv.weight.requires_grad_(False)
    filled = load(str(file), into=other)
    assert filled is other
    assert not any(m.training for m in filled.modules())
    assert filled.head.weight.requires_grad
    assert not filled.conv.weight.requires_grad
    assert torch.allclose(filled(IMAGE), net(IMAGE), rtol=2e-3, atol=2e-3)
    for name in ("conv.weight", "up.weight", "up.bias", "steps", "flags", "precise", "small"):
        assert torch.equal(filled.state_dict()[name], net.state_dict()[name]), name


@pytest.mark.parametrize("norm_dtype", [F16, F32])
@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        pytest.param(nn.BatchNorm1d, (8, 5), id="1d-flat"),
        pytest.param(nn.BatchNorm1d, (8, 5, 7), id="1d"),
        pytest.param(nn.BatchNorm2d, (4, 5, 3, 3), id="2d"),
        pytest.param(nn.BatchNorm3d, (2, 5, 2, 2, 2), id="3d"),
    ],
)
@pytest.mark.parametrize("eps", [1e-5, 0.5, 0.0])
def test_a_folded_norm_computes_what_the_unfolded_one_does(norm, shape, eps, norm_dtype):
    made = lambda: nn.Sequential(nn.Linear(1, 1), norm(shape[1], eps=eps))  # noqa: E731
    net, other = shaken(made()), fill(made(), stored(shaken(made()), norm_dtype=norm_dtype))
    torch.manual_seed(2)
    other[0].load_state_dict(net[0].state_dict())
    x = torch.randn(shape)
    expected = net[1](x)
    rounding = 2**-11 if norm_dtype == F16 else 2**-20  # of each of scale and shift
    channel = (1, -1) + (1,) * (len(shape) - 2)
    scale = other[1].weight.detach().reshape(channel).abs()
    shift = other[1].bias.detach().reshape(channel).abs()
    assert ((other[1](x) - expected).abs() <= rounding * (scale * x.abs() + shift) * 1.01 + 1e-6).all()


def test_a_norm_that_cannot_be_restored_is_not_folded():
    assert is_foldable(nn.BatchNorm2d(3))
    assert not is_foldable(nn.BatchNorm2d(3, affine=False))
    assert not is_foldable(nn.BatchNorm2d(3, track_running_stats=False))
    assert not is_foldable(nn.BatchNorm2d(3, eps=1.0))
    assert not is_foldable(nn.LayerNorm(3))
    assert not is_foldable(nn.InstanceNorm2d(3, affine=True, track_running_stats=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, F16, torch.float64])
def test_a_network_of_another_float_type_gets_the_rounded_values(net, dtype):
    other = fill(Plain().to(dtype), stored(net, F16))
    assert other.conv.weight.dtype == other.bn.running_var.dtype == dtype
    assert torch.equal(other.conv.weight, net.conv.weight.half().to(dtype))
    assert other.steps.dtype == torch.int64
    assert other(IMAGE.to(dtype)).dtype == dtype


class Tied(nn.Module):
    def __init__(self, tie: bool = True):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.out = nn.Linear(4, 5, bias=False)
        if tie:
            self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.embed(x))


def test_tied_weights_are_stored_once_and_fill_both(tmp_path):
    net = Tied()
    artifact = stored(net)
    assert [u.names for u in artifact.units] == [("embed.weight", "out.weight")]
    write(artifact, tmp_path / "tied.fw")
    assert torch.equal(load(tmp_path / "tied.fw")["out.weight"], net.embed.weight)
    for other in (load(tmp_path / "tied.fw", into=Tied()), load(tmp_path / "tied.fw", into=Tied(tie=False))):
        assert torch.equal(other(torch.arange(5)), net(torch.arange(5)))


def test_inputs_are_rounded_under_every_name_of_a_weight(tmp_path):
    net = Tied()
    compress(net, torch.arange(5), recipe=Recipe(Rtn(GridSpec(8)), activations=2)).save(tmp_path / "tied.fw")
    tied, untied = load(tmp_path / "tied.fw", into=Tied()), load(tmp_path / "tied.fw", into=Tied(tie=False))
    plain = load(tmp_path / "tied.fw", into=Tied())
    simulate(plain, {})
    assert torch.equal(tied(torch.arange(5)), untied(torch.arange(5)))
    assert not torch.equal(tied(torch.arange(5)), plain(torch.arange(5)))


class Shared(nn.Module):
    """One linear layer and one norm under two names each: their vectors are tied too."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.b, self.norm2 = self.a, self.norm

    def forward(self, x):
        return self.norm2(self.b(self.norm(self.a(x))))


def test_a_layer_under_two_names_is_compressed_and_loaded(tmp_path):
    torch.manual_seed(0)
    net = shaken(Shared())
    compress(net, method=Rtn(GridSpec(8))).save(tmp_path / "shared.fw")
    other = load(tmp_path / "shared.fw", into=Shared())
    x = torch.randn(4, 3)
    assert torch.allclose(other(x), net(x), atol=0.1)
    assert torch.allclose(other.norm2.running_mean, net.norm2.running_mean, atol=1e-2)


# ---------------------------------------------------------------- what does not fit
def unchanged(other: nn.Module, artifact: Artifact) -> str:
    """The message, after looking that the network is as it was."""
    other.train()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(UsageError) as raised:
        fill(other, artifact)
    assert other.training
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name]) if isinstance(value, torch.Tensor) else value == before[name], name
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_every_sort_of_difference_is_named_in_one_message(net):
    other = Plain(eps=1e-5)
    other.head = nn.Linear(6, 4)
    other.extra = nn.Linear(1, 1)
    del other.up
    told = unchanged(other, stored(net))
    assert told.startswith("the file does not fit Plain: ")
    for part in (
        "not in the file: extra.weight, extra.bias",
        "not in the network: up.weight, up.bias",
        "head.weight is float32 (4, 6) in the network and float32 (3, 6) in the file",
        "head.bias is float32 (4,) in the network and float32 (3,) in the file",
        "bn.eps is 1e-05 in the network and 0.001 in the file",
    ):
        assert part in told


def test_a_long_list_of_differences_is_cut(net):
    told = unchanged(nn.Sequential(*(nn.Linear(2, 2) for _ in range(50))), stored(net))
    assert "and 96 more" in told
    assert len(told) < 500


def test_another_norm_at_the_same_place_is_refused(net):
    other = Plain()
    other.bn = nn.GroupNorm(2, 4)
    assert "not in the network: bn.running_mean, bn.running_var" in unchanged(other, stored(net))


def test_a_norm_that_is_missing_is_named(net):
    other = Plain()
    other.bn = nn.Identity()
    assert "not in the network: bn.weight, bn.bias, bn.running_mean, bn.running_var" in unchanged(other, stored(net))
    del other.bn
    assert "not in the network: bn.weight" in unchanged(other, stored(net))


def test_a_module_without_eps_in_a_norms_place_is_named(net):
    other = Plain()
    del other.bn.eps
    assert "bn.eps is missing in the network and 0.001 in the file" in unchanged(other, stored(net))


@pytest.mark.parametrize(
    ("name", "dtype"), [("precise", torch.int64), ("steps", torch.bool), ("head.bias", torch.int8)]
)
def test_numbers_that_the_network_cannot_hold_are_refused(net, name, dtype):
    artifact = stored(net)
    other = Plain()
    owner, _, leaf = name.rpartition(".")
    module = other.get_submodule(owner)
    delattr(module, leaf)
    module.register_buffer(leaf, torch.zeros(artifact.rest[name].shape, dtype=dtype))
    assert f"{name} is {str(dtype)[6:]}" in unchanged(other, artifact)


def test_two_tensors_of_the_file_are_not_forced_into_one_of_the_network():
    torch.manual_seed(0)
    told = unchanged(Tied(), stored(Tied(tie=False)))
    assert "embed.weight and out.weight are one tensor in the network and two in the file" in told


def test_equal_tensors_of_the_file_may_be_one_of_the_network():
    untied = Tied(tie=False)
    untied.out.weight.data.copy_(untied.embed.weight)
    assert torch.equal(fill(Tied(), stored(untied)).out.weight, untied.out.weight)


def test_a_network_without_memory_is_refused():
    lazy = nn.Sequential(nn.LazyLinear(3))
    artifact = stored(nn.Sequential(nn.Linear(2, 3)))
    with pytest.raises(UsageError, match=r"no memory yet for 0\.weight, 0\.bias: run it once"):
        fill(lazy, artifact)


class Remembers(nn.Linear):
    """Has a part of its state that is no tensor."""

    def get_extra_state(self):
        return {"note": 1}

    def set_extra_state(self, state):
        pass


def test_a_state_that_is_no_tensor_is_left_alone():
    plain, other = nn.Linear(2, 2), Remembers(2, 2)
    assert torch.equal(fill(other, stored(plain)).weight, plain.weight)
    artifact = stored(plain)
    artifact.rest["_extra_state"] = torch.ones(1)
    assert "not in the network: _extra_state" in unchanged(other, artifact)


def test_a_damaged_file_leaves_the_network_alone(net, file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    other = Plain()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(FormatError, match=r"net\.fw: damaged"):
        load(file, into=other)
    assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())
