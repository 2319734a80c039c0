"""What every Weight promises. Adding a kind means adding instances of it here, and its decoder."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight._pack import pack
from featherweight.errors import FormatError, UsageError
from featherweight.methods import NM, Blocks, Channels, Rows
from featherweight.methods.patterns import keep_largest
from featherweight.weights import KINDS, Dense, Grid, Sparse, Weight
from featherweight.weights.base import float_type
from featherweight.weights.masks import BlockMap, BoxMap, ChannelMap, NofM, RowMap
from tests.artifact import mini_reader

GENERATOR = torch.Generator().manual_seed(0)
F16, F32 = torch.float16, torch.float32
NAMES = {F16: "f16", F32: "f32"}


# ---------------------------------------------------------------- instances
def dense(rows, cols, dtype):
    return Dense(torch.randn(rows, cols, generator=GENERATOR).to(dtype))


def grid(rows, cols, bits, group, dtype=F32, sym=True):
    codes = torch.randint(2**bits, (rows, cols), generator=GENERATOR, dtype=torch.uint8)
    scales = (1, 1) if group == 0 else (rows, -(-cols // group))
    scale = (torch.rand(scales, generator=GENERATOR) + 0.1).to(dtype)
    zero = None if sym else torch.randint(2**bits, scales, generator=GENERATOR, dtype=torch.uint8)
    return Grid(codes, scale, zero, bits, group)


def sparse(values, keep):
    mask = torch.rand(values.shape, generator=GENERATOR) < keep
    return Sparse(mask, values)


def label(kind, *parts):
    return "-".join([kind, *(str(p) for p in parts)])


INSTANCES: dict[str, Weight] = {}
for _shape in [(3, 5), (1, 1), (7, 1), (1, 9)]:
    for _type in (F32, F16):
        INSTANCES[label("dense", NAMES[_type], _shape)] = dense(*_shape, _type)
for _bits in range(1, 9):
    for _sym in (True, False):
        for _group, _what in [(0, "tensor"), (7, "row"), (3, "group")]:  # 7 columns: the last group has one
            _type = F16 if _bits % 2 else F32
            _name = label("grid", f"{_bits}bit", "sym" if _sym else "asym", _what, NAMES[_type])
            INSTANCES[_name] = grid(5, 7, _bits, _group, _type, _sym)
INSTANCES["grid-1x1"] = grid(1, 1, 3, 1, sym=False)
INSTANCES["grid-one-column"] = grid(5, 1, 5, 1, F16)
INSTANCES["grid-groups-of-one"] = grid(3, 4, 2, 1, sym=False)
for _keep in (0.0, 0.5, 1.0):
    for _values in (
        dense(4, 6, F16),
        dense(4, 6, F32),
        grid(4, 6, 3, 4, sym=False),
        grid(4, 6, 8, 0),
        grid(1, 1, 1, 0),
    ):
        _size = "x".join(map(str, _values.shape))
        INSTANCES[label("sparse", _values.kind, *_values.meta().values(), _size, f"kept{_keep}")] = sparse(
            _values, _keep
        )

_PATTERNED = {
    "blocks": (BlockMap(2, 2), Blocks(0.4, 2), 2),
    "short-blocks": (BlockMap(4), Blocks(0.5, 4), 1),
    "2:4": (NofM(2, 4), NM(2, 4), 1),
    "1:2-taps": (NofM(1, 2, 3), NM(1, 2), 3),
    "rows": (RowMap(), Rows(0.5), 1),
    "channels": (ChannelMap(3, 2), Channels(0.5), 3),
}
for _values in (dense(4, 6, F16), grid(4, 6, 3, 4, sym=False), dense(1, 6, F32)):
    _rows, _channels = torch.arange(_values.shape[0]) % 3 != 1, torch.tensor([True, False])
    _box = _rows[:, None] & _channels.repeat_interleave(3)
    _size = "x".join(map(str, _values.shape))
    INSTANCES[label("sparse", _values.kind, "box", _size)] = Sparse(_box, _values, BoxMap(3))
for _name, (_form, _pattern, _taps) in _PATTERNED.items():
    for _values in (dense(4, 6, F16), grid(4, 6, 3, 4, sym=False)):
        _keep = keep_largest(torch.rand(4, 6, generator=GENERATOR), _pattern, _taps, getattr(_form, "groups", 1))
        INSTANCES[label("sparse", _values.kind, _name, "4x6-kept0.5")] = Sparse(_keep, _values, _form)

every = pytest.mark.parametrize("weight", INSTANCES.values(), ids=INSTANCES)


def test_every_kind_has_instances_and_its_own_tag():
    assert {type(w) for w in INSTANCES.values()} == set(KINDS)
    assert len({kind.kind for kind in KINDS}) == len(KINDS)


# ---------------------------------------------------------------- the oracle: from the bytes, number by number
def read_bits(payload, bits, count):
    """Value i occupies bits i*bits .. i*bits + bits - 1 of the stream; bit j of the stream is bit j%8 of byte j//8."""
    data = payload.tolist()
    return [
        sum((data[j // 8] >> (j % 8) & 1) << k for k, j in enumerate(range(i * bits, (i + 1) * bits)))
        for i in range(count)
    ]


def decode(kind, shape, meta, payload, kept=None):
    """The matrix as lists of rows. kept: the stored (row, col) positions, all of them in row order when None."""
    if kind == "sparse":
        take = lambda _, count: payload["mask"].numpy()[:count]  # noqa: E731
        flags = mini_reader.kept(take, *shape, meta.get("mask", {"kind": "entries"})).reshape(-1)
        kept = [divmod(i, shape[1]) for i, flag in enumerate(flags) if flag]
        return decode(meta["values"], shape, meta, payload, kept)
    matrix = np.zeros(shape, dtype=np.float32)
    kept = list(np.ndindex(*shape)) if kept is None else kept
    if kind == "dense":
        for (row, col), value in zip(kept, payload["values"].tolist(), strict=True):
            matrix[row, col] = value
        return matrix
    bits, group = meta["bits"], meta["group"]
    per_row = 0 if group == 0 else -(-shape[1] // group)
    scales = payload["scale"].tolist()
    middle = 0.5 if bits == 1 else 2 ** (bits - 1)
    zeros = [middle] * len(scales) if meta["sym"] else read_bits(payload["zero"], bits, len(scales))
    for (row, col), code in zip(kept, read_bits(payload["codes"], bits, len(kept)), strict=True):
        own = 0 if group == 0 else row * per_row + col // group
        matrix[row, col] = np.float32(scales[own]) * np.float32(code - zeros[own])
    return matrix


@every
def test_dense_is_what_the_bytes_mean(weight):
    decoded = weight.dense()
    assert decoded.dtype == F32
    assert np.array_equal(decoded.numpy(), decode(weight.kind, weight.shape, weight.meta(), weight.tensors()))


def test_a_grid_decodes_to_scale_times_code_minus_zero():
    codes = torch.tensor([[0, 1, 3], [2, 2, 1]], dtype=torch.uint8)
    scale = torch.tensor([[1.0, 10.0], [0.5, 2.0]])
    zero = torch.tensor([[1, 0], [2, 3]], dtype=torch.uint8)
    assert Grid(codes, scale, None, 2, 2).dense().tolist() == [[-2, -1, 10], [0, 0, -2]]
    assert Grid(codes, scale, zero, 2, 2).dense().tolist() == [[-1, 0, 30], [0, 0, -4]]
    signs = torch.tensor([[0, 1]], dtype=torch.uint8)
    assert Grid(signs, torch.full((1, 1), 4.0), None, 1, 0).dense().tolist() == [[-2, 2]]


def test_the_exact_payload_of_a_sparse_grid():
    codes = torch.tensor([[1, 7, 2], [3, 7, 4]], dtype=torch.uint8)
    mask = torch.tensor([[True, False, True], [True, False, True]])
    zero = torch.tensor([[5], [6]], dtype=torch.uint8)
    weight = Sparse(mask, Grid(codes, torch.tensor([[0.5], [2.0]], dtype=F16), zero, 3, 3))
    payload = {name: t.tolist() for name, t in weight.tensors().items()}
    assert payload == {"mask": [0b101101], "codes": [0b11_010_001, 0b100_0], "scale": [0.5, 2.0], "zero": [0b110_101]}
    assert weight.meta() == {"kept": 4, "values": "grid", "bits": 3, "group": 3, "sym": 0, "type": "f16"}
    assert weight.dense().tolist() == [[-2, 0, -1.5], [-6, 0, -4]]


# ---------------------------------------------------------------- size and layout
@every
def test_bits_are_the_bytes_of_the_payload(weight):
    assert weight.bits() == 8 * sum(len(t.numpy().tobytes()) for t in weight.tensors().values())


@every
def test_layout_foretells_the_payload(weight):
    payload = weight.tensors()
    foretold = weight.layout(weight.shape, json.loads(json.dumps(weight.meta())))
    assert list(foretold.items()) == [(name, (t.dtype, t.numel())) for name, t in payload.items()]
    assert all(t.ndim == 1 and t.is_contiguous() for t in payload.values())


@every
def test_trainable_names_the_continuous_tensors(weight):
    continuous = {name for name, t in weight.tensors().items() if t.is_floating_point()}
    assert set(weight.trainable()) == continuous
    assert len(weight.trainable()) == len(continuous)


# ---------------------------------------------------------------- reading
def read(weight, meta, payload):
    """As a file is read: the sizes are checked against the layout before `load`."""
    layout = type(weight).layout(weight.shape, meta)
    assert [(t.dtype, t.numel()) for t in payload.values()] == list(layout.values())
    return type(weight).load(weight.shape, meta, payload)


@every
def test_load_gives_the_same_matrix_and_the_same_bytes(weight):
    meta = weight.meta()
    again = read(weight, json.loads(json.dumps(meta)), {k: t.clone() for k, t in weight.tensors().items()})
    assert again.shape == weight.shape
    assert again.dense().numpy().tobytes() == weight.dense().numpy().tobytes()
    assert again.meta() == meta
    assert list(again.tensors()) == list(weight.tensors())
    for name, tensor in weight.tensors().items():
        assert again.tensors()[name].numpy().tobytes() == tensor.numpy().tobytes()


FIELDS = [
    pytest.param(weight, name, id=f"{label_}-{name}")
    for label_, weight in INSTANCES.items()
    if label_ in ("dense-f32-(3, 5)", "grid-3bit-asym-group-f16", "grid-4bit-sym-row-f32")
    or (label_.startswith("sparse") and label_.endswith("4x6-kept0.5"))
    for name in weight.meta()
]


@pytest.mark.parametrize(("weight", "name"), FIELDS)
def test_a_missing_field_is_refused_by_name(weight, name):
    meta = weight.meta()
    if name == "mask":
        return  # without it the mask has a bit an entry: another size
    del meta[name]
    with pytest.raises(FormatError, match=name):
        weight.layout(weight.shape, meta)


@pytest.mark.parametrize(("weight", "name"), FIELDS)
def test_a_field_of_a_wrong_type_or_range_is_refused_by_name(weight, name):
    meta = weight.meta()
    wrong = [None, True, False, -1, 10**30, 1.0, 0.0, 1.5, "", "F16", "f64", [], [1], {}]
    wrong += [float(meta[name]), str(meta[name])] if isinstance(meta[name], int) else [[meta[name]], 0, 1]
    if name == "mask":
        wrong += [{"kind": "entries"}, {"kind": ["rows"]}, meta[name] | {"more": 1}]
        wrong += [{k: v for k, v in meta[name].items() if k != gone} for gone in meta[name]]
        wrong += [meta[name] | {k: v} for k in meta[name] for v in (0, -1, 1.0, True, 65, None, 10**9)]
    for value in wrong:
        with pytest.raises(FormatError, match=name):
            weight.layout(weight.shape, meta | {name: value})


@pytest.mark.parametrize(
    ("weight", "name", "value"),
    [
        pytest.param(grid(5, 7, 3, 0), "bits", 0, id="0-bits"),
        pytest.param(grid(5, 7, 3, 0), "bits", 9, id="9-bits"),
        pytest.param(grid(5, 7, 3, 7), "group", 8, id="group-beyond-the-columns"),
        pytest.param(grid(5, 7, 3, 7), "sym", 2, id="sym-2"),
        pytest.param(sparse(dense(4, 6, F32), 0.5), "kept", 25, id="kept-beyond-the-entries"),
        pytest.param(sparse(dense(4, 6, F32), 0.5), "values", "sparse", id="sparse-in-sparse"),
        pytest.param(sparse(grid(4, 6, 3, 0), 0.5), "group", 7, id="group-within-sparse"),
    ],
)
def test_a_value_just_out_of_range_is_refused(weight, name, value):
    with pytest.raises(FormatError, match=name):
        weight.layout(weight.shape, weight.meta() | {name: value})


@every
def test_an_unknown_field_is_refused_by_name(weight):
    with pytest.raises(FormatError, match="from_the_future"):
        weight.layout(weight.shape, weight.meta() | {"from_the_future": 1})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("weight", [grid(4, 6, 3, 2, F16), sparse(grid(4, 6, 3, 6), 0.5)], ids=["grid", "sparse"])
def test_a_scale_that_is_not_finite_is_refused(weight, value):
    payload = {k: t.clone() for k, t in weight.tensors().items()}
    payload["scale"][-1] = value
    with pytest.raises(FormatError, match="scale"):
        read(weight, weight.meta(), payload)


@pytest.mark.parametrize("name", ["codes", "zero", "mask"])
def test_padding_bits_that_are_not_zero_are_refused(name):
    weight = Sparse(torch.eye(3, dtype=torch.bool), grid(3, 3, 3, 3, sym=False))
    payload = {k: t.clone() for k, t in weight.tensors().items()}
    payload[name][-1] |= 128
    with pytest.raises(FormatError, match="padding"):
        read(weight, weight.meta(), payload)


@pytest.mark.parametrize("values", [dense(4, 4, F32), grid(4, 4, 3, 0)], ids=["dense", "grid"])
@pytest.mark.parametrize("extra", [-1, 1])
def test_a_mask_that_does_not_fit_the_header_is_refused(values, extra):
    weight = Sparse(torch.arange(16).reshape(4, 4) < 8, values)
    payload = weight.tensors() | {"mask": pack(torch.arange(16) < 8 + extra, 1)}
    with pytest.raises(FormatError, match=f"keeps {8 + extra} entries, the header says 8"):
        read(weight, weight.meta(), payload)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(INSTANCES)), st.integers(0, 10**6), st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_read_as_it_is(name, place, bit):
    """No payload of the right size makes the reader fail in another way, or forget what it read."""
    weight = INSTANCES[name]
    payload = {k: t.clone() for k, t in weight.tensors().items()}
    flat = torch.cat([t.view(torch.uint8) for t in payload.values()])
    flat[place % len(flat)] ^= 1 << bit
    parts = flat.split([t.numel() * t.element_size() for t in payload.values()])
    altered = {k: p.clone().view(t.dtype) for (k, t), p in zip(payload.items(), parts, strict=True)}
    try:
        again = read(weight, weight.meta(), altered)
    except FormatError:
        return
    for key, tensor in again.tensors().items():
        assert tensor.numpy().tobytes() == altered[key].numpy().tobytes()


# ---------------------------------------------------------------- construction
ZEROS = torch.zeros(2, 6, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        pytest.param(lambda: Dense(torch.zeros(2, 2, dtype=torch.float64)), "float16 or float32", id="dense-f64"),
        pytest.param(lambda: Dense(torch.zeros(4)), "must be a matrix", id="dense-vector"),
        pytest.param(lambda: Grid(ZEROS, torch.ones(2, 1), None, 0, 6), "bits must be 1 to 8", id="grid-0-bits"),
        pytest.param(lambda: Grid(ZEROS, torch.ones(2, 1), None, 9, 6), "bits must be 1 to 8", id="grid-9-bits"),
        pytest.param(lambda: Grid(ZEROS, torch.ones(2, 1), None, 4, 7), "group must be 0", id="grid-wide-group"),
        pytest.param(lambda: Grid(ZEROS, torch.ones(2, 1), None, 4, -1), "group must be 0", id="grid-negative-group"),
        pytest.param(lambda: Grid(ZEROS, torch.ones(2, 1), None, 4, 3), r"shape \(2, 2\)", id="grid-scale-shape"),
        pytest.param(
            lambda: Grid(ZEROS, torch.ones(2, 1).double(), None, 4, 6), "float16 or float32", id="grid-scale-type"
        ),
        pytest.param(lambda: Sparse(ZEROS, Dense(torch.zeros(2, 6))), "must be bool", id="sparse-mask-type"),
        pytest.param(lambda: Sparse(ZEROS.bool().T, Dense(torch.zeros(2, 6))), "mask must be", id="sparse-mask-shape"),
    ],
)
def test_what_cannot_be_stored_cannot_be_built(build, told):
    with pytest.raises(UsageError, match=told):
        build()


def test_entries_outside_the_mask_are_ignored():
    mask = torch.tensor([[True, False]])
    a, b = (Sparse(mask, Dense(torch.tensor([[1.0, value]]))) for value in (7.0, torch.nan))
    assert a.dense().tolist() == b.dense().tolist() == [[1, 0]]
    assert a.tensors()["values"].tolist() == b.tensors()["values"].tolist() == [1]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        pytest.param([0.1, -3.0, 60000.0], F16, id="usual"),
        pytest.param([0.1, 70000.0], F32, id="overflow"),
        pytest.param([1.0, 1e-9], F16, id="tiny-beside-large"),
        pytest.param([1e-9, 1e-8], F32, id="all-tiny"),
        pytest.param([1.0, torch.nan], F32, id="nan"),
        pytest.param([1.0, torch.inf], F32, id="inf"),
        pytest.param([0.0, 0.0], F16, id="zeros"),
        pytest.param([], F16, id="nothing"),
    ],
)
def test_half_precision_only_where_it_is_exact_enough(values, dtype):
    assert float_type(torch.tensor(values, dtype=torch.float64)) == dtype
