"""What every Weight promises. Adding a kind means adding instances of it here, and its decoder."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight._pack import pack
from featherweight.errors import FormatError, UsageError
from featherweight.methods import NM, Blocks, Channels, Rows
from featherweight.methods.patterns import keep_largest
from featherweight.weights import KINDS, Codebook, Dense, Factors, Grid, Sparse, Weight, books_of
from featherweight.weights.base import float_type
from featherweight.weights.factors import matrix_of
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


def codebook(rows, cols, d, words, dtype=F16, taps=1, keep=None):
    """words: of each book. keep: the mask of a Sparse."""
    books = tuple(torch.randn(n, d, generator=GENERATOR).half() for n in words)
    counts = [cols] * rows if keep is None else keep.sum(dim=1).tolist()
    vectors = max(max(-(-n // d) for n in counts), 1)
    codes = torch.stack([torch.randint(n, (rows, vectors), generator=GENERATOR) for n in words], dim=2)
    scale = torch.randn(rows, 1, generator=GENERATOR).to(dtype)
    return Codebook(codes.to(torch.int16), books, scale, cols, taps, keep)


def sparse_codebook(keep, d, words, dtype=F16, taps=1, form=None):
    rows, cols = keep.shape
    values = codebook(rows, cols, d, words, dtype, taps, keep)
    return Sparse(keep, values, form) if form else Sparse(keep, values)


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

_CUTS = {
    "whole-vectors": (5, 12, 4, [16]),
    "short-last-vector": (5, 10, 4, [8]),
    "two-books": (5, 10, 4, [16, 2]),
    "d-beyond-the-columns": (4, 3, 8, [4, 4]),
    "one-column": (7, 1, 2, [32]),
    "entries": (3, 6, 1, [4]),
    "longest": (2, 70, 64, [2, 4]),
    "eight-books": (3, 9, 3, [2] * 8),
    "8-bit": (3, 10, 2, [256]),
    "9-bit": (3, 10, 2, [512, 4]),
    "12-bit": (3, 10, 5, [4096, 4096]),
    "taps": (4, 18, 4, [8, 4], 9),
    "as-many-taps-as-columns": (2, 6, 4, [4], 6),
}
for _name, (_rows, _cols, _d, _words, *_taps) in _CUTS.items():
    for _type in (F16, F32):
        INSTANCES[label("codebook", _name, NAMES[_type])] = codebook(_rows, _cols, _d, _words, _type, *_taps)
INSTANCES["codebook-1x1"] = codebook(1, 1, 1, [2])
_counts = torch.arange(12) < torch.tensor([0, 1, 4, 5, 12, 0])[:, None]  # kept in each row, before they are mixed
_counts = _counts[:, torch.randperm(12, generator=GENERATOR)]
for _name, _keep in [
    ("all", torch.ones(3, 10).bool()),
    ("none", torch.zeros(3, 10).bool()),
    ("different-counts", _counts),
    ("half", torch.rand(5, 18, generator=GENERATOR) < 0.5),
    ("1x1", torch.ones(1, 1).bool()),
    ("nothing-of-1x1", torch.zeros(1, 1).bool()),
]:
    for _d, _words, _taps in [(4, [8], 1), (3, [512, 2], 1), (20, [4], 1), (4, [16, 4], _keep.shape[1] // 2 or 1)]:
        _part = label("sparse-codebook", _name, f"d{_d}", f"{len(_words)}books", f"taps{_taps}")
        INSTANCES[_part] = sparse_codebook(_keep, _d, _words, F16 if _d % 2 else F32, _taps)
for _name, (_form, _pattern, _taps) in _PATTERNED.items():
    _keep = keep_largest(torch.rand(4, 6, generator=GENERATOR), _pattern, _taps, getattr(_form, "groups", 1))
    for _own in {_taps, 1, 2}:  # the taps of the vectors need not be those of the mask
        _part = label("sparse-codebook", _name, f"taps{_own}", "4x6-kept0.5")
        INSTANCES[_part] = sparse_codebook(_keep, 2, [8, 4], F16, _own, _form)
INSTANCES["sparse-codebook-box"] = sparse_codebook(_box.expand(4, -1).contiguous(), 2, [8], F32, 3, BoxMap(3))

_FORMS = {
    "rows": ((5, 6), "oc", "or rc", {"o": 5, "r": 2, "c": 6}),
    "first-axis-last": ((5, 6), "oc", "rc ro", {"o": 5, "r": 2, "c": 6}),
    "spatial": ((3, 12), "oiyx", "oxr riy", {"o": 3, "r": 2, "i": 2, "y": 3, "x": 2}),
    "tucker": ((3, 8), "oit", "or rst si", {"o": 3, "r": 2, "s": 3, "i": 2, "t": 4}),
    "ring": ((2, 6), "oit", "zoa atb biz", {"o": 2, "i": 3, "t": 2, "z": 2, "a": 2, "b": 1}),
    "cp": ((3, 8), "oiyx", "yr xr ir or", {"o": 3, "i": 2, "y": 2, "x": 2, "r": 4}),
    "blocks": ((3, 8), "obc", "obr rbc", {"o": 3, "b": 2, "c": 4, "r": 2}),
    "one": ((2, 3), "oc", "co", {"o": 2, "c": 3}),
    "1x1": ((1, 1), "oc", "or rc", {"o": 1, "r": 1, "c": 1}),
}


def factors(form, kind="dense", shared=()):
    shape, axes, terms, sizes = form
    parts = [matrix_of(t, sizes) for t in terms.split()]
    made = [dense(*p, F16) if kind == "dense" else grid(*p, 4, p[1], F16, k % 2 == 0) for k, p in enumerate(parts)]
    return Factors(shape, axes, tuple(terms.split()), sizes, tuple(made), shared)


for _name, _form in _FORMS.items():
    for _kind in ("dense", "grid"):
        INSTANCES[label("factors", _name, _kind)] = factors(_form, _kind)
INSTANCES["factors-shared"] = factors(_FORMS["tucker"], shared=(1,))
INSTANCES["factors-all-shared"] = factors(_FORMS["rows"], "grid", (1, 0))

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
    """The matrix as lists of rows. payload: with the books, as for `load`. kept: the stored (row, col) positions, all
    of them in row order when None."""
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
    if kind == "codebook":
        return decode_vectors(shape, meta, payload, set(kept))
    if kind == "factors":
        return decode_factors(shape, meta, payload)
    bits, group = meta["bits"], meta["group"]
    per_row = 0 if group == 0 else -(-shape[1] // group)
    scales = payload["scale"].tolist()
    middle = 0.5 if bits == 1 else 2 ** (bits - 1)
    zeros = [middle] * len(scales) if meta["sym"] else read_bits(payload["zero"], bits, len(scales))
    for (row, col), code in zip(kept, read_bits(payload["codes"], bits, len(kept)), strict=True):
        own = 0 if group == 0 else row * per_row + col // group
        matrix[row, col] = np.float32(scales[own]) * np.float32(code - zeros[own])
    return matrix


def decode_vectors(shape, meta, payload, kept):
    """Code after code, as they lie in the file: tap after tap and channel after channel, a row has its kept entries."""
    (rows, cols), d, taps = shape, meta["d"], meta.get("taps", 1)
    order = [channel * taps + tap for tap in range(taps) for channel in range(cols // taps)]
    own = [[col for col in order if (row, col) in kept] for row in range(rows)]
    vectors = [(row, cols[start : start + d]) for row, cols in enumerate(own) for start in range(0, len(cols), d)]
    assert len(vectors) == meta.get("vectors", len(vectors))
    codes = [read_bits(payload[f"codes{m}"], bits, len(vectors)) for m, bits in enumerate(meta["bits"])]
    matrix, scales = np.zeros(shape, dtype=np.float32), payload["scale"].tolist()
    for i, (row, places) in enumerate(vectors):
        for j, col in enumerate(places):
            words = [np.float32(payload[f"book{m}"][own[i], j].item()) for m, own in enumerate(codes)]
            total = words[0]
            for word in words[1:]:
                total = total + word
            matrix[row, col] = np.float32(scales[row]) * total
    return matrix


def decode_factors(shape, meta, payload):
    """Entry after entry, and product after product. payload: with the shared factors, by position."""
    letters = sorted(meta["sizes"])
    parts = []
    for k, (term, own) in enumerate(zip(meta["terms"], meta["factors"], strict=True)):
        mine = {name.partition(".")[2]: t for name, t in payload.items() if str(name).startswith(f"{k}.")}
        first, *others = (meta["sizes"][x] for x in term)
        matrix = (
            payload[k].dense().numpy() if own is None else decode(own["kind"], (first, math.prod(others)), own, mine)
        )
        parts.append(matrix.astype(np.float64).reshape(first, *others))
    total = np.zeros([meta["sizes"][x] for x in meta["axes"]])
    for place in np.ndindex(*[meta["sizes"][x] for x in letters]):
        at = dict(zip(letters, place, strict=True))
        product = math.prod(p[tuple(at[x] for x in t)] for p, t in zip(parts, meta["terms"], strict=True))
        total[tuple(at[x] for x in meta["axes"])] += product
    return total.reshape(shape).astype(np.float32)


def with_books(weight, payload):
    """What `load` is given: the payload, and what lies elsewhere in a file."""
    shared = {k: weight.parts[k] for k in weight.shared} if isinstance(weight, Factors) else {}
    return payload | {f"book{m}": book for m, book in enumerate(books_of(weight))} | shared


@every
def test_dense_is_what_the_bytes_mean(weight):
    decoded, payload = weight.dense(), with_books(weight, weight.tensors())
    assert decoded.dtype == F32
    assert decoded.numpy().tobytes() == decode(weight.kind, weight.shape, weight.meta(), payload).tobytes()


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


def test_the_exact_payload_of_vectors_from_books():
    """3 columns in vectors of 2: the second vector of a row has an entry that means nothing."""
    codes = torch.tensor([[[0, 1], [3, 0]], [[2, 1], [1, 1]]], dtype=torch.int16)
    books = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]]).half(), torch.tensor([[0.5, 0.25], [0, 10]]).half()
    weight = Codebook(codes, books, torch.tensor([[2.0], [-1.0]], dtype=F16), 3)
    payload = {name: t.tolist() for name, t in weight.tensors().items()}
    assert payload == {"codes0": [0b01_10_11_00], "codes1": [0b1_1_0_1], "scale": [2.0, -1.0]}
    assert weight.meta() == {"d": 2, "bits": [2, 1], "type": "f16"}
    assert weight.dense().tolist() == [[2, 24, 15], [-5, -16, -3]]


def test_the_exact_payload_of_the_kept_entries_in_vectors_from_a_book():
    """2 channels of 2 taps: the columns are taken in the order 0, 2, 1, 3; every row begins a new vector."""
    keep = torch.tensor([[True, True, True, False], [False] * 4, [False, True, False, False]])
    codes = torch.tensor([[[1], [0]], [[0], [0]], [[1], [1]]], dtype=torch.int16)
    book = torch.tensor([[1, 2], [3, 4]]).half()
    weight = Sparse(keep, Codebook(codes, (book,), torch.tensor([[1.0], [9.0], [10.0]]), 4, 2, keep))
    payload = {name: t.tolist() for name, t in weight.tensors().items()}
    assert payload == {"mask": [0b0000_0111, 0b0010], "codes0": [0b1_0_1], "scale": [1, 9, 10]}
    meta = {"kept": 4, "values": "codebook", "d": 2, "bits": [1], "type": "f32", "taps": 2, "vectors": 3}
    assert weight.meta() == meta
    assert weight.dense().tolist() == [[3, 1, 4, 0], [0, 0, 0, 0], [0, 30, 0, 0]]


def test_sums_of_words_are_rounded_to_float32_one_after_the_other():
    """2 ** 14 + 2 ** -10 is no float32: of three words the first two are added first."""
    books = [torch.full((2, 1), x).half() for x in (2.0**14, 2.0**-10, 2.0**-10)]
    codes, one = torch.zeros(1, 1, 3, dtype=torch.int16), torch.ones(1, 1)
    assert Codebook(codes, tuple(books), one, 1).dense().tolist() == [[2.0**14]]
    assert Codebook(codes, tuple(books[::-1]), one, 1).dense().tolist() == [[2.0**14 + 2.0**-9]]


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
    continuous |= {"books"} if books_of(weight) else set()  # which several weights may share
    if isinstance(weight, Factors):
        continuous |= {f"{k}.{n}" for k in weight.shared for n in weight.parts[k].trainable()}
    assert set(weight.trainable()) == continuous
    assert len(weight.trainable()) == len(continuous)


# ---------------------------------------------------------------- reading
def read(weight, meta, payload):
    """As a file is read: the sizes are checked against the layout before `load`."""
    layout = type(weight).layout(weight.shape, meta)
    assert [(t.dtype, t.numel()) for t in payload.values()] == list(layout.values())
    given = with_books(weight, payload)
    if isinstance(weight, Factors):
        shared = {k: given.pop(k) for k in weight.shared}
        return Factors.load(weight.shape, meta, given, shared)
    return type(weight).load(weight.shape, meta, given)


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
    if label_ in ("dense-f32-(3, 5)", "grid-3bit-asym-group-f16", "grid-4bit-sym-row-f32", "codebook-taps-f16")
    or (label_.startswith("sparse") and label_.endswith("4x6-kept0.5"))
    for name in weight.meta()
]


@pytest.mark.parametrize(("weight", "name"), FIELDS)
def test_a_missing_field_is_refused_by_name(weight, name):
    meta = weight.meta()
    if name in ("mask", "taps"):
        return  # without it the mask has a bit an entry, another size; and vectors follow the columns
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
    if name == "bits" and isinstance(meta[name], list):
        wrong.remove([1])  # a book of two words
        wrong += [[1] * 9, [0], [13], [1, True], [1.0], [None], ["1"]]
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
        pytest.param(codebook(3, 6, 2, [4]), "d", 0, id="empty-vectors"),
        pytest.param(codebook(3, 6, 2, [4]), "d", 65, id="vectors-of-65"),
        pytest.param(codebook(3, 6, 2, [4]), "bits", [], id="no-book"),
        pytest.param(codebook(3, 6, 2, [4]), "taps", 4, id="taps-do-not-divide-the-columns"),
        pytest.param(codebook(3, 6, 2, [4]), "taps", 12, id="taps-beyond-the-columns"),
        pytest.param(codebook(3, 6, 2, [4]), "vectors", 9, id="vectors-without-a-mask"),
        pytest.param(sparse_codebook(torch.ones(3, 6).bool(), 4, [4]), "vectors", 4, id="too-few-vectors"),
        pytest.param(sparse_codebook(torch.ones(3, 6).bool(), 4, [4]), "vectors", 19, id="too-many-vectors"),
    ],
)
def test_a_value_just_out_of_range_is_refused(weight, name, value):
    with pytest.raises(FormatError, match=name):
        weight.layout(weight.shape, weight.meta() | {name: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("axes", None),
        ("axes", 7),
        ("axes", ["o", "c"]),
        ("axes", "oC"),
        ("terms", "or"),
        ("terms", ["or", 1]),
        ("terms", []),
        ("sizes", None),
        ("sizes", {"o": 5, "r": 2}),
        ("sizes", {"o": 5, "r": 2.0, "c": 6}),
        ("sizes", {"o": 5, "r": True, "c": 6}),
        ("sizes", {"o": 5, "r": 0, "c": 6}),
        ("sizes", {"o": 5, "r": 2**40, "c": 6}),
        ("sizes", {"o": 6, "r": 2, "c": 6}),
        ("factors", None),
        ("factors", [None]),
        ("factors", [{"kind": "dense", "type": "f16"}, 3]),
        ("factors", [{"kind": "sparse"}, None]),
        ("factors", [{"kind": "dense", "type": "f64"}, None]),
        ("factors", [{"kind": "dense", "type": "f16", "more": 1}, None]),
    ],
)
def test_terms_sizes_and_factors_that_make_no_matrix_are_refused(field, value):
    weight = INSTANCES["factors-rows-dense"]
    with pytest.raises(FormatError, match=field if value != [{"kind": "sparse"}, None] else "kind"):
        weight.layout(weight.shape, weight.meta() | {field: value})


def test_a_shared_factor_of_another_shape_is_refused():
    weight = INSTANCES["factors-shared"]
    for shared in ({}, {1: Dense(torch.ones(2, 11))}, {0: weight.parts[1]}):
        with pytest.raises(FormatError, match=r"factor 1 is shared and must have shape \(2, 12\)"):
            Factors.load(weight.shape, weight.meta(), weight.tensors(), shared)


def test_contraction_is_rounded_once():
    """2 ** 24 + 1 - 2 ** 24 is 1 in float64, 0 or 2 in float32."""
    left, right = torch.tensor([[2.0**24, 1.0, -(2.0**24)]]), torch.ones(3, 1)
    weight = Factors((1, 1), "oc", ("or", "rc"), {"o": 1, "r": 3, "c": 1}, (Dense(left), Dense(right)))
    assert weight.dense().tolist() == [[1.0]]


@every
def test_an_unknown_field_is_refused_by_name(weight):
    with pytest.raises(FormatError, match="from_the_future"):
        weight.layout(weight.shape, weight.meta() | {"from_the_future": 1})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize(
    "weight",
    [grid(4, 6, 3, 2, F16), sparse(grid(4, 6, 3, 6), 0.5), codebook(4, 6, 4, [8]), sparse_codebook(_keep, 4, [8])],
    ids=["grid", "sparse", "codebook", "sparse-codebook"],
)
def test_a_scale_that_is_not_finite_is_refused(weight, value):
    payload = {k: t.clone() for k, t in weight.tensors().items()}
    payload["scale"][-1] = value
    with pytest.raises(FormatError, match="scale"):
        read(weight, weight.meta(), payload)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_word_that_is_not_finite_is_refused(value):
    weight = codebook(3, 6, 2, [4, 2])
    weight.books[1][1, 0] = value
    with pytest.raises(FormatError, match="'book1' holds NaN"):
        read(weight, weight.meta(), weight.tensors())


@pytest.mark.parametrize("other", [{}, {"book0": torch.zeros(4, 3).half()}, {"book0": torch.zeros(8, 2).half()}])
def test_books_that_do_not_fit_the_codes_are_refused(other):
    weight = codebook(3, 6, 2, [4])
    with pytest.raises(FormatError, match=r"needs books of \(words, d\) \[\(4, 2\)\]"):
        Codebook.load(weight.shape, weight.meta(), weight.tensors() | other)


@pytest.mark.parametrize("name", ["codes0", "codes1", "mask"])
def test_padding_bits_beside_codes_that_are_not_zero_are_refused(name):
    weight = sparse_codebook(torch.eye(3, dtype=torch.bool), 2, [4, 512])
    payload = {k: t.clone() for k, t in weight.tensors().items()}
    payload[name][-1] |= 128
    with pytest.raises(FormatError, match="padding"):
        read(weight, weight.meta(), payload)


def test_a_mask_that_needs_another_number_of_vectors_is_refused():
    """As many entries as before, but in two rows."""
    keep = torch.arange(16).reshape(4, 4) < 4
    weight = sparse_codebook(keep, 4, [2])
    payload = weight.tensors() | {"mask": pack(keep.T, 1)}
    with pytest.raises(FormatError, match="the mask needs 4 vectors, the header says 1"):
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
    if not payload:
        return  # all of it is shared
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
NINE = {"o": 3, "r": 2, "c": 3}


def product(shape=(3, 3), axes="oc", terms=("or", "rc"), sizes=NINE, parts=((3, 2), (2, 3)), shared=()) -> Factors:
    return Factors(shape, axes, terms, sizes, tuple(Dense(torch.ones(p)) for p in parts), shared)


def built(size=(2, 3, 1), book=(4, 2), count=1, **altered) -> Codebook:
    """A codebook of 2 rows and 6 columns, of zeros of these shapes; with other fields."""
    books = (torch.zeros(book, dtype=F16),) * count
    fields = {"codes": torch.zeros(size, dtype=torch.int16), "books": books, "scale": torch.ones(2, 1), "cols": 6}
    return Codebook(**fields | altered)  # pyright: ignore[reportArgumentType] - one of them is wrong


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
        pytest.param(lambda: built(count=0), "1 to 8 books", id="no-book"),
        pytest.param(lambda: built((2, 3, 9), count=9), "1 to 8 books", id="nine-books"),
        pytest.param(lambda: built(book=(4,)), r"books must be \(words, d\)", id="book-is-a-vector"),
        pytest.param(
            lambda: built((2, 3, 2), books=(torch.zeros(4, 2).half(), torch.zeros(4, 3).half())), "of one d", id="two-d"
        ),
        pytest.param(lambda: built(books=(torch.zeros(4, 2).double(),)), "books must be float16 or", id="book-type"),
        pytest.param(lambda: built(book=(3, 2)), "words must be a power of two", id="3-words"),
        pytest.param(lambda: built(book=(1, 2)), "words must be a power of two", id="1-word"),
        pytest.param(lambda: built(book=(0, 2)), "words must be a power of two", id="0-words"),
        pytest.param(lambda: built(book=(8192, 2)), "words must be a power of two", id="8192-words"),
        pytest.param(lambda: built(book=(4, 0)), "d must be 1 to 64", id="d-0"),
        pytest.param(lambda: built((2, 1, 1), (4, 65)), "d must be 1 to 64", id="d-65"),
        pytest.param(lambda: built(taps=4), "taps must divide 6 columns", id="taps-4-of-6"),
        pytest.param(lambda: built(taps=0), "taps must divide 6 columns", id="taps-0"),
        pytest.param(lambda: built(scale=torch.ones(2)), r"shape \(rows, 1\)", id="codebook-scale-shape"),
        pytest.param(lambda: built(scale=torch.ones(2, 1).double()), "float16 or float32", id="codebook-scale-type"),
        pytest.param(lambda: built((2, 4, 1)), r"codes must have shape \(2, 3, 1\)", id="too-many-vectors"),
        pytest.param(lambda: built(codes=torch.zeros(2, 3, 1)), "codes must be int16", id="codes-type"),
        pytest.param(lambda: built(codes=torch.full((2, 3, 1), 4).short()), "must be 0 to 3", id="code-too-large"),
        pytest.param(lambda: built(codes=-torch.ones(2, 3, 1).short()), "must be 0 to 3", id="code-below-0"),
        pytest.param(lambda: built(keep=torch.ones(6, 2).bool()), r"keep must be bool \(2, 6\)", id="keep-shape"),
        pytest.param(lambda: built(keep=ZEROS), r"keep must be bool \(2, 6\)", id="keep-type"),
        pytest.param(lambda: Sparse(ZEROS == 0, built()), "those of the kept entries", id="codes-of-no-mask"),
        pytest.param(
            lambda: Sparse(ZEROS == 0, built((2, 1, 1), keep=ZEROS > 0)), "those of the kept entries", id="other-mask"
        ),
        pytest.param(lambda: product(terms=()), "1 to 16 factors", id="no-factor"),
        pytest.param(lambda: product(terms=("or",) * 17), "1 to 16 factors", id="17-factors"),
        pytest.param(lambda: product(axes="oo"), "different letters", id="axis-twice"),
        pytest.param(lambda: product(axes=""), "different letters", id="no-axis"),
        pytest.param(lambda: product(terms=("or", "r,c")), "different letters", id="comma"),
        pytest.param(lambda: product(axes="oz"), "of the letters of the terms", id="unknown-axis"),
        pytest.param(lambda: product(sizes=NINE | {"z": 2}), "of the letters of the terms", id="unused-letter"),
        pytest.param(lambda: product(axes="o", shape=(3, 1)), "the letter 'c' once only", id="lonely-letter"),
        pytest.param(lambda: product(shape=(3, 4)), "do not multiply to 12", id="axes-do-not-fit"),
        pytest.param(
            lambda: product(
                (1, 1), "oc", ("ors", "rt", "stc"), dict(zip("orstc", (1, 1500, 1500, 1500, 1), strict=True)), ()
            ),
            "far more memory",
            id="large-on-the-way",
        ),
        pytest.param(lambda: product(parts=((3, 2), (3, 2))), r"shapes \[\(3, 2\), \(2, 3\)\]", id="factor-shape"),
        pytest.param(lambda: product(parts=((3, 2),)), r"shapes \[\(3, 2\), \(2, 3\)\]", id="missing-factor"),
        pytest.param(lambda: product(shared=(2,)), "among the 2", id="shared-beyond"),
        pytest.param(lambda: product(shared=(0, 0)), "among the 2", id="shared-twice"),
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
