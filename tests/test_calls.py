"""Every kind of layer: the captured moments are those of the inputs that an explicit computation finds."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from featherweight import calls
from featherweight.data import Batch
from featherweight.layers import scan
from featherweight.stats import capture
from tests.reference.moments import (
    attention_inputs,
    conv_inputs,
    conv_transpose_inputs,
    moments,
    recurrent_inputs,
    relative,
)

EXACT = 1e-10  # float64 sums of a few hundred terms in another order


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def captured(model, *args, **kwargs):
    return capture(model, [Batch(args, kwargs)], scan(model).units)


@torch.no_grad()
def drawn(model, std=1.0):
    """The network in float64, with biases and weights that differ from zero."""
    for parameter in model.double().eval().parameters():
        parameter.normal_(std=std)
    return model.requires_grad_(False)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64) + 0.3


def agree(stats, blocks):
    gram, mean, samples = moments(blocks)
    assert stats.samples.tolist() == samples
    assert relative(stats.gram, gram) < EXACT
    assert relative(stats.mean, mean) < EXACT
    assert stats.row_share is None


# ---------------------------------------------------------------- convolutions
def geometries(*layers_and_sizes):
    return [pytest.param(layer, size, id=str(layer)) for layer, size in layers_and_sizes]


CONVS = geometries(
    (nn.Conv1d(3, 4, 3), (9,)),
    (nn.Conv1d(3, 4, 1, bias=False), (5,)),
    (nn.Conv1d(4, 6, 4, stride=3, padding=2, dilation=2, groups=2), (11,)),
    (nn.Conv1d(3, 4, 4, padding="same", dilation=3), (8,)),
    (nn.Conv1d(3, 4, 4, padding="same", padding_mode="reflect"), (8,)),
    (nn.Conv1d(3, 4, 3, stride=2, padding="valid"), (8,)),
    (nn.Conv2d(2, 3, 3), (5, 6)),
    (nn.Conv2d(2, 3, 3, stride=2, padding=1), (6, 7)),
    (nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(1, 3)), (5, 8)),
    (nn.Conv2d(2, 3, 3, padding="same"), (4, 5)),
    (nn.Conv2d(2, 3, (2, 4), padding="same", dilation=(3, 1)), (5, 5)),
    (nn.Conv2d(2, 3, 3, padding="valid"), (4, 5)),
    (nn.Conv2d(2, 3, (3, 5), padding=(1, 2), padding_mode="reflect"), (5, 5)),
    (nn.Conv2d(2, 3, 3, stride=2, padding=2, padding_mode="replicate"), (5, 5)),
    (nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), (4, 5)),
    (nn.Conv2d(2, 3, (2, 3), padding="same", padding_mode="circular"), (4, 5)),
    (nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 4)),
    (nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3), (5, 5)),
    (nn.Conv2d(4, 4, 3, groups=4, bias=False), (4, 4)),
    (nn.Conv3d(2, 3, (2, 3, 1)), (3, 4, 2)),
    (nn.Conv3d(2, 4, 2, stride=(1, 2, 1), padding=1, dilation=(1, 1, 2), groups=2), (3, 4, 3)),
    (nn.Conv3d(2, 2, (3, 2, 1), padding="same"), (3, 3, 2)),
    (nn.Conv3d(2, 2, 3, padding=1, padding_mode="replicate"), (3, 3, 2)),
)
TRANSPOSED = geometries(
    (nn.ConvTranspose1d(3, 4, 3), (5,)),
    (nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1, groups=2), (5,)),
    (nn.ConvTranspose1d(3, 4, 3, stride=3, padding=2, output_padding=2, dilation=2), (4,)),
    (nn.ConvTranspose1d(3, 4, 2, stride=3, padding=3), (6,)),  # padding beyond the reach of the taps
    (nn.ConvTranspose1d(3, 4, 1, stride=2, bias=False), (4,)),
    (nn.ConvTranspose2d(2, 3, (3, 2)), (3, 4)),
    (nn.ConvTranspose2d(2, 3, 4, stride=2, padding=1), (3, 3)),
    (nn.ConvTranspose2d(2, 3, 3, stride=(2, 3), padding=(1, 0), output_padding=(1, 2), dilation=(2, 1)), (3, 2)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (3, 3)),
    (nn.ConvTranspose2d(3, 3, 2, stride=2, groups=3), (3, 3)),
    (nn.ConvTranspose2d(2, 2, (2, 1), padding=(2, 1), stride=2), (4, 3)),  # padding beyond the reach of the taps
    (nn.ConvTranspose3d(2, 3, 2, stride=(1, 2, 1), padding=(1, 0, 1), output_padding=(0, 1, 0)), (3, 2, 3)),
)


def oracle(layer, x):
    return (conv_transpose_inputs if layer.transposed else conv_inputs)(layer, x)


# torch warns that an even kernel with `same` copies its input
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize(("layer", "size"), CONVS + TRANSPOSED)
def test_convolution(layer, size):
    drawn(layer)
    x = random(2, layer.in_channels, *size)
    stats = captured(layer, x)["weight"]
    agree(stats, oracle(layer, x))

    # What the moments are for: they give the outputs' mean and power for any weights.
    (unit,) = scan(layer).units
    w = unit.view.matrix(layer.weight).reshape(layer.groups, layer.out_channels // layer.groups, -1)
    outputs = layer(x).transpose(0, 1).flatten(1)
    outputs = outputs if layer.bias is None else outputs - layer.bias[:, None]
    assert relative((w @ stats.gram * w).sum(2).flatten(), outputs.square().mean(1)) < EXACT
    assert relative((w @ stats.mean[:, :, None]).flatten(), outputs.mean(1)) < EXACT


@pytest.mark.parametrize(
    ("layer", "size"),
    geometries(
        (nn.Conv1d(3, 4, 3, padding=1), (6,)),
        (nn.Conv2d(2, 4, 3, groups=2), (4, 4)),
        (nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1), (3, 3)),
    ),
)
def test_unbatched_convolution(layer, size):
    x = random(layer.in_channels, *size)
    agree(captured(drawn(layer), x)["weight"], oracle(layer, x))


@pytest.mark.parametrize("images", [1, 3])
def test_unfolding_a_few_images_at_a_time_changes_nothing(images, monkeypatch):
    layer, x = drawn(nn.Conv2d(4, 4, 3, groups=2)), random(7, 4, 5, 5)
    monkeypatch.setattr(calls, "CHUNK", images * 4 * 9 * 9)
    handed = []
    with calls.Calls(layer, scan(layer).units, lambda _, inputs: handed.extend(x for _, x in inputs)):
        layer(x)
    assert max(h.shape[2] for h in handed) == images * 9
    agree(captured(layer, x)["weight"], oracle(layer, x))


class PadsItself(nn.Conv2d):
    """As in ported TensorFlow networks: the odd zero goes behind."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


def test_a_convolution_that_pads_by_itself():
    x = random(2, 3, 6, 6)
    plain = nn.Conv2d(3, 4, 3, stride=2)
    agree(captured(drawn(PadsItself(3, 4, 3, stride=2)), x)["weight"], conv_inputs(plain, F.pad(x, (0, 1, 0, 1))))


# ---------------------------------------------------------------- uses of a weight
class Calling(nn.Module):
    """A network that does with one layer whatever a test says."""

    def __init__(self, layer, forward):
        super().__init__()
        self.layer = layer
        self.run = forward

    def forward(self, *inputs):
        return self.run(self.layer, *inputs)


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda fc, x: fc(x), id="module"),
        pytest.param(lambda fc, x: F.linear(x, fc.weight), id="functional"),
        pytest.param(lambda fc, x: F.linear(weight=fc.weight, bias=None, input=x), id="by-name"),
        pytest.param(lambda fc, x: nn.Linear.__call__(fc, x.transpose(0, 1)), id="not-contiguous"),
        pytest.param(lambda fc, x: [fc(row) for row in x.flatten(0, 1)], id="vectors"),
    ],
)
def test_linear(use):
    x = random(3, 5, 4)
    agree(captured(drawn(Calling(nn.Linear(4, 2), use)), x)["layer.weight"], [x.flatten(0, 1).T])


def test_functional_convolution_by_name():
    conv, x = nn.Conv1d(2, 3, 3, padding=2, dilation=2), random(2, 2, 7)
    model = Calling(conv, lambda c, x: F.conv1d(weight=c.weight, input=x, padding=(2,), dilation=2))
    agree(captured(drawn(model), x)["layer.weight"], conv_inputs(conv, x))


def test_a_module_used_twice_sees_both_inputs():
    model, x = drawn(Calling(nn.Linear(4, 4), lambda fc, x: fc(fc(x).relu()))), random(5, 4)
    agree(captured(model, x)["layer.weight"], [torch.cat([x, model.layer(x).relu()]).T])


def test_a_use_that_cannot_be_seen_leaves_the_weight_unreached():
    stats = captured(drawn(Calling(nn.Linear(4, 4), lambda fc, x: x @ fc.weight.T)), random(5, 4))
    assert not stats["layer.weight"].reached


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(4, 3), (0, 4)), (nn.Conv2d(4, 3, 3), (0, 4, 5, 5))], ids=["linear", "conv"]
)
def test_a_call_without_rows_counts_nothing(layer, shape):
    stats = captured(drawn(layer), torch.zeros(shape, dtype=torch.float64))["weight"]
    assert stats.samples.tolist() == [0]
    assert not stats.reached


def test_only_the_chosen_units_are_told_and_the_mode_ends():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(5, 4)
    told = []
    with calls.Calls(model, scan(model, include=("1.*",)).units, lambda unit, _: told.append(unit.name)):
        model(x)
    model(x)
    assert told == ["1.weight"]


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_network_is_seen_as_it_is_written():
    plain, x = drawn(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))), random(5, 4)
    whole = torch.compile(plain, backend="eager")
    for _ in range(2):  # with the compiler's first call, and after it
        stats = captured(whole, x)
        agree(stats["_orig_mod.0.weight"], [x.T])
        agree(stats["_orig_mod.2.weight"], [plain[:2](x).T])
        whole(x)


# ---------------------------------------------------------------- recurrent layers
RECURRENT = [
    nn.LSTM(3, 4),
    nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True),
    nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2),
    nn.LSTM(3, 4, bias=False, proj_size=3, batch_first=True),
    nn.GRU(3, 4, num_layers=3),
    nn.GRU(3, 4, num_layers=2, bidirectional=True, bias=False, batch_first=True),
    nn.RNN(3, 4, num_layers=2, bidirectional=True),
    nn.RNN(3, 4, nonlinearity="relu", batch_first=True),
]


@pytest.mark.parametrize("given_state", [False, True], ids=["zero-state", "given-state"])
@pytest.mark.parametrize("form", ["batch", "packed", "unbatched"])
@pytest.mark.parametrize("layer", RECURRENT, ids=str)
def test_recurrent(layer, form, given_state):
    drawn(layer, std=0.4)
    lengths = {"batch": [5, 5, 5], "packed": [2, 5, 1, 5], "unbatched": [5]}[form]
    sequences = [random(n, 3) for n in lengths]
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = [layer.proj_size or 4, 4] if layer.mode == "LSTM" else [4]
    state = tuple(random(count, len(lengths), n) * given_state for n in sizes)
    expected, outputs = recurrent_inputs(layer, sequences, state)

    single = form == "unbatched"
    hx = tuple(s[:, 0] for s in state) if single else state
    args = [(hx if layer.mode == "LSTM" else hx[0])] if given_state else []
    if form == "packed":
        x = pack_sequence(sequences, enforce_sorted=False)
        found = nn.utils.rnn.unpack_sequence(layer(x, *args)[0])
    else:
        stacked = torch.stack(sequences, dim=0 if layer.batch_first else 1)
        x = sequences[0] if single else stacked
        found = [layer(x, *args)[0]] if single else layer(x, *args)[0].unbind(0 if layer.batch_first else 1)
    assert relative(torch.cat(list(found)), torch.cat(outputs)) < EXACT  # the oracle computes what the layer does

    stats = captured(layer, x, *args)
    assert stats.keys() == expected.keys()
    for name, blocks in expected.items():
        agree(stats[name], blocks)


@pytest.mark.parametrize("given_state", [False, True], ids=["zero-state", "given-state"])
@pytest.mark.parametrize(
    "cell", [nn.LSTMCell(3, 4), nn.GRUCell(3, 4), nn.RNNCell(3, 4), nn.RNNCell(3, 4, nonlinearity="relu")], ids=str
)
def test_a_recurrent_cell(cell, given_state):
    x, h = random(5, 3), random(5, 4)
    state = (h, random(5, 4)) if isinstance(cell, nn.LSTMCell) else h
    stats = captured(drawn(cell), x, *([state] if given_state else []))
    agree(stats["weight_ih"], [x.T])
    agree(stats["weight_hh"], [h.T * given_state])
    assert stats["weight_hh"].reached is given_state


# ---------------------------------------------------------------- attention
@pytest.mark.parametrize("masked", ["", "mask", "padding", "mask-padding", "float-mask", "causal"])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True},
        {"bias": False},
        {"kdim": 5, "vdim": 3},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"kdim": 5, "bias": False, "add_zero_attn": True, "batch_first": True},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
def test_attention(options, cross, masked):
    layer = drawn(nn.MultiheadAttention(6, 2, **options), std=0.5)
    if not cross and layer.kdim == layer.vdim == 6:
        query = key = value = random(3, 4, 6)
    else:
        keys = 5 if cross else 4
        query, key, value = random(3, 4, 6), random(3, keys, layer.kdim), random(3, keys, layer.vdim)
    steps = torch.arange(4)[:, None] - torch.arange(key.shape[1])
    mask = steps < 0 if "mask" in masked or masked == "causal" else None
    padding = torch.arange(key.shape[1]) >= torch.tensor([[2], [4], [1]]) if "padding" in masked else None
    expected, output = attention_inputs(layer, query, key, value, mask, padding)

    # Without weights torch takes a causal mask for a hint, and then also hides the added keys.
    need_weights = masked != "causal" or "add_zero_attn" in options
    given = {"key_padding_mask": padding, "need_weights": need_weights, "is_causal": masked == "causal"}
    given["attn_mask"] = torch.zeros(mask.shape).double().masked_fill(mask, -torch.inf) if "float" in masked else mask
    order = [x if layer.batch_first else x.transpose(0, 1) for x in (query, key, value)]
    found = layer(*order, **given)[0]
    assert relative(found if layer.batch_first else found.transpose(0, 1), output) < EXACT

    stats = captured(layer, *order, **given)
    assert stats.keys() == expected.keys()
    for name, blocks in expected.items():
        agree(stats[name], blocks)


def test_unbatched_attention():
    layer, query, memory = drawn(nn.MultiheadAttention(6, 2)), random(4, 6), random(3, 6)
    stats = captured(layer, query, memory, memory)
    expected, _ = attention_inputs(layer, query[None], memory[None], memory[None])
    for name, blocks in expected.items():
        agree(stats[name], blocks)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_fast_path_of_a_transformer_layer_hides_nothing(norm_first, padded):
    options = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first}
    layer = drawn(nn.TransformerEncoderLayer(6, 2, 7, **options), std=0.5)
    x = random(3, 4, 6)
    padding = torch.arange(4) >= torch.tensor([[2], [4], [1]]) if padded else None
    stats = captured(layer, x, src_key_padding_mask=padding)

    inner = layer.norm1(x) if norm_first else x
    expected, attended = attention_inputs(layer.self_attn, inner, inner, inner, padding=padding)
    middle = x + attended
    fed = layer.norm2(middle) if norm_first else layer.norm1(middle)
    expected = {f"self_attn.{name}": blocks for name, blocks in expected.items()}
    expected["linear1.weight"] = [fed.flatten(0, 1).T]
    expected["linear2.weight"] = [layer.linear1(fed).relu().flatten(0, 1).T]
    assert stats.keys() == expected.keys()
    for name, blocks in expected.items():
        agree(stats[name], blocks)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_a_transformer_with_nested_tensors_reaches_every_weight():
    layer = nn.TransformerEncoderLayer(6, 2, 7, dropout=0.0, batch_first=True)
    model = drawn(nn.TransformerEncoder(layer, 2), std=0.5)
    padding = torch.arange(4) >= torch.tensor([[2], [4], [1]])
    stats = captured(model, random(3, 4, 6), src_key_padding_mask=padding)
    assert len(stats) == 8
    assert all(s.reached and s.samples.tolist() == [12] * s.blocks for s in stats.values())


# ---------------------------------------------------------------- embeddings
INDICES = torch.tensor([[0, 1, 1], [4, 1, 0]])


@pytest.mark.parametrize(
    ("layer", "args"),
    [
        pytest.param(nn.Embedding(5, 3), (INDICES,), id="embedding"),
        pytest.param(nn.EmbeddingBag(5, 3), (INDICES,), id="bags"),
        pytest.param(nn.EmbeddingBag(5, 3, mode="sum"), (INDICES.flatten(), torch.tensor([0, 2])), id="offsets"),
        pytest.param(nn.Embedding(5, 3), (INDICES.int(),), id="int32"),
    ],
)
def test_an_embedding_is_told_how_often_each_row_is_used(layer, args):
    stats = captured(layer, *args)["weight"]
    assert stats.row_share.tolist() == pytest.approx([2 / 6, 3 / 6, 0, 0, 1 / 6])
    assert stats.samples.tolist() == [6]
    assert stats.reached
    assert torch.equal(stats.gram, torch.eye(3, dtype=torch.float64)[None])


class Tied(nn.Module):
    def __init__(self, with_head):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.middle = nn.Linear(3, 3)
        if with_head:
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight

    def forward(self, indices):
        h = self.middle(self.embedding(indices)).tanh()
        return self.head(h) if hasattr(self, "head") else F.linear(h, self.embedding.weight)


@pytest.mark.parametrize("with_head", [True, False], ids=["module", "functional"])
def test_a_tied_embedding_has_the_moments_of_the_projection(with_head):
    model = drawn(Tied(with_head))
    h = model.middle(model.embedding(INDICES)).tanh()
    stats = captured(model, INDICES)
    agree(stats["embedding.weight"], [h.flatten(0, 1).T])
    agree(stats["middle.weight"], [model.embedding(INDICES).flatten(0, 1).T])
