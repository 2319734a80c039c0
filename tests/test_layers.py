import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from featherweight.errors import UsageError
from featherweight.layers import View, scan

VECTOR = "a vector: bias, norm or scale"
PARAMETRIZED = "parametrized weight: make it plain first (remove_parametrizations)"
LAZY = "not initialised yet: run the network once on an example before compressing"
EXCLUDED = "excluded by the recipe"


def found(result):
    """{name: (kind, rows, cols, groups)} of the units and {name: reason} of the rest."""
    units = {u.name: (u.kind, *u.view.matrix_shape, u.groups) for u in result.units}
    return units, {a.name: a.reason for a in result.left_alone}


def recurrent(cell, inputs, hidden, gates, layers=1, both=False, proj=0):
    units, biases = {}, {}
    out = proj or hidden
    for layer in range(layers):
        for end in ("", "_reverse") if both else ("",):
            cols = inputs if layer == 0 else out * (2 if both else 1)
            units[f"weight_ih_l{layer}{end}"] = ("recurrent", gates * hidden, cols, 1)
            units[f"weight_hh_l{layer}{end}"] = ("recurrent", gates * hidden, out, 1)
            biases |= {f"bias_ih_l{layer}{end}": VECTOR, f"bias_hh_l{layer}{end}": VECTOR}
            if proj:
                units[f"weight_hr_l{layer}{end}"] = ("recurrent", proj, hidden, 1)
    options = {"proj_size": proj} if proj else {}
    return pytest.param(cell(inputs, hidden, layers, bidirectional=both, **options), units, biases)


def conv(module, rows, cols, groups):
    kind = "conv_transpose" if module.transposed else "conv"
    return pytest.param(module, {"weight": (kind, rows, cols, groups)}, {"bias": VECTOR}, id=str(module))


def attention(blocks, **options):
    units = blocks | {"out_proj.weight": ("linear", 8, 8, 1)}
    rest = {"in_proj_bias": VECTOR, "out_proj.bias": VECTOR}
    if options.get("add_bias_kv"):
        other = "no known layer kind: parameter of MultiheadAttention"
        rest |= {"bias_k": other, "bias_v": other}
    return pytest.param(nn.MultiheadAttention(8, 2, **options), units, rest, id=f"attention-{'-'.join(options)}")


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(3, 4))
        self.gain = nn.Parameter(torch.zeros(()))
        self.fc = nn.Linear(4, 2)


def old_weight_norm(module, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, name)


@pytest.mark.parametrize(
    ("module", "units", "rest"),
    [
        pytest.param(nn.Linear(4, 3), {"weight": ("linear", 3, 4, 1)}, {"bias": VECTOR}, id="linear"),
        pytest.param(nn.Linear(4, 3, bias=False), {"weight": ("linear", 3, 4, 1)}, {}, id="linear-no-bias"),
        conv(nn.Conv1d(4, 6, 3), 6, 12, 1),
        conv(nn.Conv2d(4, 6, (3, 2)), 6, 24, 1),
        conv(nn.Conv2d(4, 6, 3, groups=2), 6, 18, 2),
        conv(nn.Conv2d(4, 8, 3, groups=4), 8, 9, 4),
        conv(nn.Conv3d(2, 4, (1, 2, 3)), 4, 12, 1),
        conv(nn.ConvTranspose1d(4, 6, 3, groups=2), 6, 6, 2),
        conv(nn.ConvTranspose2d(4, 6, (3, 2)), 6, 24, 1),
        conv(nn.ConvTranspose2d(6, 4, 2, groups=2), 4, 12, 2),
        conv(nn.ConvTranspose3d(4, 2, 2), 2, 32, 1),
        pytest.param(nn.Embedding(7, 3), {"weight": ("embedding", 7, 3, 1)}, {}, id="embedding"),
        pytest.param(nn.EmbeddingBag(7, 3), {"weight": ("embedding", 7, 3, 1)}, {}, id="embedding-bag"),
        recurrent(nn.LSTM, 3, 5, 4, layers=2, both=True, proj=2),
        recurrent(nn.GRU, 3, 5, 3, layers=3, both=True),
        recurrent(nn.RNN, 3, 5, 1),
        *(
            pytest.param(
                cell(3, 5),
                {"weight_ih": ("recurrent", gates * 5, 3, 1), "weight_hh": ("recurrent", gates * 5, 5, 1)},
                {"bias_ih": VECTOR, "bias_hh": VECTOR},
                id=cell.__name__,
            )
            for cell, gates in [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)]
        ),
        attention({"in_proj_weight": ("attention", 24, 8, 3)}),
        attention({"in_proj_weight": ("attention", 24, 8, 3)}, add_bias_kv=True),
        attention(
            {f"{n}_proj_weight": ("attention", 8, cols, 1) for n, cols in [("q", 8), ("k", 5), ("v", 6)]},
            kdim=5,
            vdim=6,
        ),
        pytest.param(
            nn.Sequential(nn.BatchNorm2d(2), nn.LayerNorm((2, 3)), nn.Linear(2, 2, bias=False)),
            {"2.weight": ("linear", 2, 2, 1)},
            {
                "0.weight": VECTOR,
                "0.bias": VECTOR,
                "1.weight": "no known layer kind: parameter of LayerNorm",
                "1.bias": "no known layer kind: parameter of LayerNorm",
            },
            id="norms",
        ),
        pytest.param(
            Custom(),
            {"fc.weight": ("linear", 2, 4, 1)},
            {"table": "no known layer kind: parameter of Custom", "gain": VECTOR, "fc.bias": VECTOR},
            id="custom-parameter",
        ),
        pytest.param(
            nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 3, bias=False)),
            {"1.weight": ("linear", 3, 3, 1)},
            {
                "0.bias": VECTOR,
                "0.parametrizations.weight.original0": PARAMETRIZED,
                "0.parametrizations.weight.original1": PARAMETRIZED,
            },
            id="weight-norm",
        ),
        pytest.param(
            old_weight_norm(nn.LSTM(4, 3, bias=False), "weight_hh_l0"),
            {"weight_ih_l0": ("recurrent", 12, 4, 1)},
            {"weight_hh_l0_g": PARAMETRIZED, "weight_hh_l0_v": PARAMETRIZED},
            id="old-weight-norm-of-an-lstm",
        ),
        pytest.param(
            prune.l1_unstructured(nn.GRU(4, 3, bias=False), "weight_ih_l0", 0.5),
            {"weight_hh_l0": ("recurrent", 9, 3, 1)},
            {"weight_ih_l0_orig": PARAMETRIZED},
            id="torch-prune-of-a-gru",
        ),
        pytest.param(
            nn.Sequential(nn.LazyLinear(4), nn.LazyConv2d(4, 3), nn.Linear(4, 3, bias=False)),
            {"2.weight": ("linear", 3, 4, 1)},
            {"0.weight": LAZY, "0.bias": LAZY, "1.weight": LAZY, "1.bias": LAZY},
            id="lazy",
        ),
    ],
)
def test_every_parameter_is_a_unit_or_left_alone_with_a_reason(module, units, rest):
    result = scan(module)
    assert found(result) == (units, rest)
    order = [name for name, _ in module.named_parameters()]
    assert [u.name for u in result.units] == [n for n in order if n in units]
    assert [a.name for a in result.left_alone] == [n for n in order if n in rest]
    if LAZY not in rest.values():
        counted = sum(u.params for u in result.units) + sum(a.params for a in result.left_alone)
        assert counted == sum(p.numel() for p in module.parameters())
    else:
        assert {a.params for a in result.left_alone} == {0}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        pytest.param(torch.full((3, 4), torch.nan), "it contains NaN or infinite values", id="nan"),
        pytest.param(torch.full((3, 4), torch.inf), "it contains NaN or infinite values", id="inf"),
        pytest.param(torch.zeros(0, 4), "it is empty", id="empty"),
        pytest.param(
            torch.zeros(3, 4, dtype=torch.int8), "its type torch.int8 is not a real floating-point type", id="int8"
        ),
        pytest.param(
            torch.zeros(3, 4, dtype=torch.complex64),
            "its type torch.complex64 is not a real floating-point type",
            id="complex",
        ),
    ],
)
def test_a_weight_that_cannot_be_compressed_is_left_alone(value, reason):
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    model[0].weight = nn.Parameter(value, requires_grad=False)
    assert found(scan(model)) == ({"1.weight": ("linear", 2, 3, 1)}, {"0.weight": reason})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_float_type_is_a_unit(dtype):
    assert scan(nn.Linear(4, 3, dtype=dtype)).units[0].params == 12


@pytest.mark.parametrize("projection_first", [False, True])
def test_tied_weights_are_one_unit_with_both_names_and_the_projection_decides_the_kind(projection_first):
    embedding, head = nn.Embedding(7, 3), nn.Linear(3, 7)
    head.weight = embedding.weight
    model = nn.ModuleDict({"a": head, "b": embedding} if projection_first else {"a": embedding, "b": head})
    (unit,) = scan(model).units
    assert (unit.names, unit.kind) == (("a.weight", "b.weight"), "linear")
    assert scan(model, include=("b.*",)).units == (unit,)
    assert [a.name for a in scan(model).left_alone] == ["a.bias" if projection_first else "b.bias"]


def test_a_shared_module_is_one_unit():
    shared = nn.Linear(3, 3)
    result = scan(nn.Sequential(shared, nn.ReLU(), shared))
    assert [u.names for u in result.units] == [("0.weight", "2.weight")]
    assert [a.name for a in result.left_alone] == ["0.bias"]


@pytest.fixture
def stack():
    return nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(12)))


@pytest.mark.parametrize(
    ("include", "exclude", "kept"),
    [
        pytest.param((), (), range(12), id="all"),
        pytest.param(("1.*",), (), [1], id="include-one"),
        pytest.param(("1*",), (), [1, 10, 11], id="include-prefix"),
        pytest.param(("1.*", "[23].*"), (), [1, 2, 3], id="include-two-patterns"),
        pytest.param((), ("?.*",), [10, 11], id="exclude"),
        pytest.param(("1*",), ("11.weight",), [1, 10], id="exclude-wins"),
    ],
)
def test_include_and_exclude(stack, include, exclude, kept):
    result = scan(stack, include, exclude)
    assert [u.name for u in result.units] == [f"{i}.weight" for i in kept]
    expected = {f"{i}.weight": EXCLUDED for i in range(12) if i not in kept}
    assert {a.name: a.reason for a in result.left_alone} == expected


@pytest.mark.parametrize("patterns", [{"include": ("typo.*",)}, {"exclude": ("0.*", "typo.*")}], ids=str)
def test_a_pattern_that_matches_nothing_is_refused_by_name(stack, patterns):
    with pytest.raises(UsageError, match=r"'typo\.\*' matches none of the 12 .*0\.weight"):
        scan(stack, **patterns)


def test_a_network_with_nothing_to_compress_is_refused():
    with pytest.raises(UsageError, match="BatchNorm2d has no weight"):
        scan(nn.BatchNorm2d(3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_network_is_refused(stack):
    for model in (torch.jit.script(stack), torch.jit.trace(stack, torch.zeros(1, 3))):
        with pytest.raises(UsageError, match="scripted or traced"):
            scan(nn.Sequential(nn.Linear(3, 3), model))


VIEWS = [
    nn.Linear(4, 3),
    nn.Conv2d(4, 6, (3, 2), groups=2),
    nn.Conv3d(2, 4, (1, 2, 3)),
    nn.ConvTranspose1d(4, 6, 3),
    nn.ConvTranspose1d(4, 6, 3, groups=2),
    nn.ConvTranspose2d(6, 4, (3, 2), groups=2),
    nn.ConvTranspose3d(4, 4, 2, groups=4),
]


@pytest.mark.parametrize("module", VIEWS, ids=str)
def test_view_and_back(module):
    weight = module.weight.detach()
    view = scan(module).units[0].view
    matrix = view.matrix(weight)
    assert tuple(matrix.shape) == view.matrix_shape
    assert torch.equal(view.tensor(matrix), weight)
    assert torch.equal(view.matrix(view.tensor(matrix)), matrix)


@pytest.mark.parametrize("module", VIEWS, ids=str)
def test_rows_are_outputs(module):
    """A row of the matrix moves its own output channel and no other."""
    view, weight = scan(module).units[0].view, module.weight.detach().clone()
    channels = 4 if isinstance(module, nn.Linear) else module.in_channels
    x = torch.randn(2, channels, *([4] * (weight.ndim - 2)))
    for row in range(view.matrix_shape[0]):
        matrix = view.matrix(weight).clone()
        matrix[row] += 1
        with torch.no_grad():
            module.weight.copy_(weight)
            before = module(x)
            module.weight.copy_(view.tensor(matrix))
            change = (module(x) - before).abs().transpose(0, 1).flatten(1).sum(1)
        assert change.nonzero().flatten().tolist() == [row]


def test_view_of_plain_layers_copies_nothing():
    weight = torch.zeros(4, 3, 2, 2)
    assert View((4, 3, 2, 2)).matrix(weight).data_ptr() == weight.data_ptr()
