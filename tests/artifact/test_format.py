"""What is in the file, byte by byte, and how it gets onto the disk."""

import ast
import hashlib
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from featherweight.activations import ActivationGrid
from featherweight.artifact import Artifact, FoldedNorm, StoredUnit, read, write
from featherweight.artifact.read import from_bytes
from featherweight.artifact.schema import STREAMS
from featherweight.artifact.write import plain_bytes, to_bytes
from featherweight.errors import FormatError, UsageError
from featherweight.layers import View
from featherweight.methods import NM, Blocks, Channels, Rows
from featherweight.methods.patterns import keep_largest
from featherweight.weights import Codebook, Dense, Grid, Sparse, books_of
from featherweight.weights.codebook import vector_counts
from featherweight.weights.masks import Bitmap, BlockMap, BoxMap, ChannelMap, NofM, RowMap
from tests.artifact import mini_reader
from tests.artifact.handmade import take_apart
from tests.golden import make_v2, make_v3, make_v4
from tests.golden.make_v1 import artifacts

CASES = artifacts() | make_v2.artifacts() | {"boxes": make_v3.artifact(), "books": make_v4.artifact()}
CASES |= {"nothing": Artifact((), {}, ())}
every = pytest.mark.parametrize("artifact", CASES.values(), ids=CASES)
SMALL = CASES["norms"]
ROOT = Path(__file__).parents[2]


def assert_same(state: dict[str, torch.Tensor], expected: dict[str, np.ndarray]) -> None:
    assert set(state) == set(expected)
    for name, tensor in state.items():
        assert tensor.numpy().dtype == expected[name].dtype, name
        assert tuple(tensor.shape) == expected[name].shape, name
        assert tensor.numpy().tobytes() == expected[name].tobytes(), name


# ---------------------------------------------------------------- meaning
def test_the_mini_reader_knows_nothing_of_featherweight():
    tree = ast.parse(Path(mini_reader.__file__).read_text())
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in imports}
    assert names == {"base64", "hashlib", "itertools", "json", "math", "numpy", "struct", "zlib"}


@every
def test_a_reader_made_from_the_documentation_decodes_the_same_bits(artifact):
    for data in (plain_bytes(artifact), to_bytes(artifact)):
        assert_same(artifact.state(), mini_reader.read(data))
        assert_same(from_bytes(data).state(), mini_reader.read(data))


FLOAT16S = st.floats(width=16, allow_nan=False, allow_infinity=False)
FLOAT32S = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def weights(draw):
    rows, cols = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    dtype, floats = draw(st.sampled_from([(torch.float16, FLOAT16S), (torch.float32, FLOAT32S)]))
    exact = lambda shape: torch.tensor(  # noqa: E731
        draw(st.lists(floats, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])), dtype=dtype
    ).reshape(shape)
    stored, keep, form = draw(st.sampled_from(["all", "pattern", "any"])), None, Bitmap()
    if stored == "pattern":
        keep, form = draw(patterned(rows, cols))
    elif stored == "any":
        keep = draw(st.lists(st.booleans(), min_size=rows * cols, max_size=rows * cols))
        keep = torch.tensor(keep).reshape(rows, cols)
    kind = draw(st.sampled_from(["dense", "grid", "codebook"]))
    if kind == "dense":
        values = Dense(exact((rows, cols)))
    elif kind == "codebook":
        values = draw(vectors(rows, cols, exact((rows, 1)), keep))
    else:
        bits, group = draw(st.integers(1, 8)), draw(st.integers(0, cols))
        scales = (1, 1) if group == 0 else (rows, -(-cols // group))
        digits = lambda shape: torch.tensor(  # noqa: E731
            [draw(st.integers(0, 2**bits - 1)) for _ in range(shape[0] * shape[1])], dtype=torch.uint8
        ).reshape(shape)
        values = Grid(digits((rows, cols)), exact(scales), digits(scales) if draw(st.booleans()) else None, bits, group)
    return values if keep is None else Sparse(keep, values, form)


@st.composite
def vectors(draw, rows, cols, scale, keep):
    taps = draw(st.sampled_from([t for t in range(1, cols + 1) if cols % t == 0]))
    d, words = draw(st.integers(1, 12)), draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    count = -(-cols // d) if keep is None else max(int(vector_counts(keep, d).max()), 1)
    make = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    books = tuple((torch.randn(2**n, d, generator=make) * 99).half() for n in words)
    codes = [torch.randint(2**n, (rows, count), generator=make) for n in words]
    return Codebook(torch.stack(codes, dim=2).to(torch.int16), books, scale, cols, taps, keep)


@st.composite
def patterned(draw, rows, cols):
    """A mask of a pattern: what it keeps, and its form."""
    taps = draw(st.sampled_from([t for t in range(1, cols + 1) if cols % t == 0]))
    form = draw(
        st.one_of(
            st.builds(BlockMap, st.integers(1, 5), st.just(taps)),
            st.integers(1, 6).flatmap(lambda m: st.builds(NofM, st.integers(1, m), st.just(m), st.just(taps))),
            st.builds(RowMap),
            st.builds(BoxMap, st.just(taps)),
            st.builds(ChannelMap, st.just(taps), st.sampled_from([g for g in range(1, rows + 1) if rows % g == 0])),
        )
    )
    if isinstance(form, BoxMap):
        some = [
            torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n))) for n in (rows - 1, cols // taps - 1)
        ]
        own, channels = (torch.cat([torch.ones(1, dtype=torch.bool), s.bool()]) for s in some)
        return own[:, None] & channels.repeat_interleave(taps), form
    pattern = {
        BlockMap: lambda: Blocks(draw(st.floats(0, 0.99)), form.block),
        NofM: lambda: NM(form.n, form.m),
        RowMap: lambda: Rows(draw(st.floats(0, 0.99))),
        ChannelMap: lambda: Channels(draw(st.floats(0, 0.99))),
    }[type(form)]()
    make = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    keep = keep_largest(torch.rand(rows, cols, generator=make), pattern, taps, getattr(form, "groups", 1))
    return keep, form


@settings(deadline=None, max_examples=150)
@given(st.lists(weights(), min_size=1, max_size=3))
def test_any_weights_decode_the_same_bits(stored):
    units = tuple(StoredUnit((f"w{i}",), View(w.shape), w, "any") for i, w in enumerate(stored))
    for data in (plain_bytes(Artifact(units, {}, ())), to_bytes(Artifact(units, {}, ()))):
        state = from_bytes(data).state()
        assert_same(state, mini_reader.read(data))
        for i, weight in enumerate(stored):
            assert state[f"w{i}"].numpy().tobytes() == weight.dense().numpy().tobytes()


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_the_view_of_a_transposed_convolution(groups):
    """The formula of docs/format.md, entry by entry."""
    inputs, outputs, taps = 2, 5, 3
    matrix = torch.randn(groups * outputs, inputs * taps)
    tensor = View((groups * inputs, outputs, taps), groups).tensor(matrix)
    for g, i, o, t in np.ndindex(groups, inputs, outputs, taps):
        assert tensor[g * inputs + i, o, t] == matrix[g * outputs + o, i * taps + t]


def test_the_example_of_the_documentation():
    text = (ROOT / "docs" / "format.md").read_text()
    lines = re.findall(r"^([0-9a-f]{4})  ((?:[0-9a-f]{2} )+) *\|", text, re.MULTILINE)
    data = b"".join(bytes.fromhex(digits) for _, digits in lines)
    assert [int(place, 16) for place, _ in lines] == list(range(0, len(data), 16))
    codes = torch.tensor([[3, 2, 0], [1, 2, 3]], dtype=torch.uint8)
    scale = torch.tensor([[0.5], [0.25]], dtype=torch.float16)
    unit = StoredUnit(("fc.weight",), View((2, 3)), Grid(codes, scale, None, 2, 3), "rtn 2")
    artifact = Artifact((unit,), {"fc.bias": torch.tensor([1.0, -2.0], dtype=torch.float16)}, ())
    assert plain_bytes(artifact) == data
    state = {"fc.weight": [[0.5, 0, -1], [-0.25, 0, 0.25]], "fc.bias": [1, -2]}
    assert {n: t.tolist() for n, t in mini_reader.read(data).items()} == state


# ---------------------------------------------------------------- bytes
@every
def test_a_file_read_and_written_again_has_the_same_bytes(artifact):
    for write_to in (plain_bytes, to_bytes):
        data = write_to(artifact)
        assert write_to(from_bytes(data)) == data == write_to(artifact)


@every
def test_a_file_is_of_the_lowest_version_that_can_say_it(artifact):
    masks = [m for u in artifact.units if (m := u.weight.meta().get("mask"))]
    least = 3 if any(m.get("kind") == "box" for m in masks) else 2 if artifact.inputs() or masks else 1
    contents = take_apart(plain_bytes(artifact)).contents
    assert contents["format"] == (4 if any(books_of(u.weight) for u in artifact.units) else least)
    assert ("books" in contents) == (contents["format"] == 4)


def book(seed: int, words: int = 4, d: int = 2) -> torch.Tensor:
    return torch.randn(words, d, generator=torch.Generator().manual_seed(seed)).half()


def made_of(name: str, *books: torch.Tensor, keep: torch.Tensor | None = None) -> StoredUnit:
    """A unit of a row of 6 columns."""
    count = -(-6 // books[0].shape[1]) if keep is None else int(vector_counts(keep, books[0].shape[1]).max())
    codes = torch.zeros(1, count, len(books), dtype=torch.int16)
    weight = Codebook(codes, books, torch.ones(1, 1), 6, 1, keep)
    return StoredUnit((name,), View((1, 6)), weight if keep is None else Sparse(keep, weight), "any")


def test_books_of_equal_contents_are_stored_once_in_the_order_of_their_first_use():
    a, b, c = book(0), book(1, words=8), book(2)
    mask = torch.arange(6)[None] < 3
    units = made_of("0", b, a), made_of("1", a.clone()), made_of("2", c, a, c, keep=mask), made_of("3", b.clone(), b)
    parts = take_apart(plain_bytes(Artifact((made_of("first", a), *units), {}, ())))
    assert parts.contents["books"] == [[4, 2], [8, 2], [4, 2]]
    assert [u["weight"]["books"] for u in parts.contents["units"]] == [[0], [1, 0], [0], [2, 0, 2], [1, 1]]
    assert not any({"d", "bits"} & set(u["weight"]) for u in parts.contents["units"])
    start, end = parts.tensors["f16"]["data_offsets"]
    assert parts.payload[start:end] == b"".join(x.numpy().tobytes() for x in (a, b, c))


def test_books_that_differ_in_a_bit_or_in_shape_are_stored_apart():
    zeros = torch.zeros(4, 2).half()
    parts = take_apart(plain_bytes(Artifact((made_of("0", zeros), made_of("1", -zeros)), {}, ())))
    assert parts.contents["books"] == [[4, 2], [4, 2]]
    parts = take_apart(plain_bytes(Artifact((made_of("0", zeros), made_of("1", zeros.reshape(8, 1))), {}, ())))
    assert parts.contents["books"] == [[4, 2], [8, 1]]


def test_units_of_the_same_book_hold_the_same_tensor_after_reading():
    a, b, mask = book(0), book(1), torch.arange(6)[None] < 3
    units = made_of("0", a, b), made_of("1", b.clone(), keep=mask), made_of("2", a.clone(), a)
    (a0, b0), (b1,), (a2, a3) = (books_of(u.weight) for u in from_bytes(plain_bytes(Artifact(units, {}, ()))).units)
    assert a0 is a2 is a3
    assert b0 is b1
    assert torch.equal(a0, a)
    assert torch.equal(b0, b)


def test_grids_of_inputs_come_back_as_they_were():
    scales = [float(torch.tensor(s)) for s in (0.1, 1.0, 1e-45, 3.4028234663852886e38, 1 / 3)]
    grids = [ActivationGrid(b, s, z) for b, s, z in zip((8, 2, 3, 8, 4), scales, (255, 0, 7, 0, 9), strict=True)]
    units = tuple(
        StoredUnit((f"w{i}",), View((1, 1)), Dense(torch.ones(1, 1)), "any", input=g) for i, g in enumerate(grids)
    )
    data = plain_bytes(Artifact(units, {}, ()))
    assert [u.input for u in from_bytes(data).units] == grids
    assert {n: (b, float(s), z) for n, (b, s, z) in mini_reader.inputs(data).items()} == {
        f"w{i}": (g.bits, g.scale, g.zero) for i, g in enumerate(grids)
    }


def test_another_process_writes_the_same_bytes():
    code = (
        "import hashlib\n"
        "from tests.golden.make_v1 import artifacts\n"
        "from featherweight.artifact.write import plain_bytes\n"
        "for a in artifacts().values(): print(hashlib.sha256(plain_bytes(a)).hexdigest())"
    )
    output = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "77"},
        capture_output=True,
        check=True,
    ).stdout.decode()
    assert output.split() == [hashlib.sha256(plain_bytes(a)).hexdigest() for a in artifacts().values()]


@every
def test_the_payload_has_the_bytes_that_the_weights_claim(artifact):
    data = plain_bytes(artifact)
    rest = [*artifact.rest.values(), *(t for x in artifact.norms for t in (x.scale, x.shift))]
    rest += {b.numpy().tobytes(): b for u in artifact.units for b in books_of(u.weight)}.values()  # equal ones once
    claimed = sum(u.weight.bits() for u in artifact.units) // 8 + sum(t.numel() * t.element_size() for t in rest)
    assert len(take_apart(data).payload) == claimed
    assert len(data) == 8 + int.from_bytes(data[:8], "little") + claimed


@every
def test_any_safetensors_reader_opens_it(artifact, tmp_path):
    write(artifact, tmp_path / "a.fw")
    with safe_open(tmp_path / "a.fw", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert list(metadata) == ["featherweight"]
    contents = json.loads(metadata["featherweight"])
    assert metadata["featherweight"] == json.dumps(contents, sort_keys=True, separators=(",", ":"))
    assert {n: t.dtype for n, t in tensors.items()} == {n: STREAMS[n] for n in tensors}
    assert all(t.ndim == 1 for t in tensors.values())


def test_a_digest_is_equal_exactly_where_every_bit_is():
    base = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([1, 2])}
    same = {"b": base["b"].clone(), "a": base["a"].clone()}
    different = [
        {"a": torch.tensor([-0.0, 1.0])},
        {"a": torch.tensor([0.0, 1.0], dtype=torch.float64)},
        {"a": torch.tensor([[0.0, 1.0]])},
        {"b": torch.tensor([1, 3])},
        {"c": torch.tensor(0)},
    ]
    digest = Artifact((), base, ()).digest()
    assert Artifact((), same, ()).digest() == digest
    assert len({digest} | {Artifact((), base | d, ()).digest() for d in different}) == 1 + len(different)


def test_a_digest_covers_the_grids_of_inputs():
    unit = lambda grid: StoredUnit(("w",), View((1, 1)), Dense(torch.ones(1, 1)), "any", input=grid)  # noqa: E731
    grids = [None, (8, 0.5, 0), (8, 0.5, 1), (8, 0.25, 0), (7, 0.5, 0)]
    digests = [Artifact((unit(g and ActivationGrid(*g)),), {}, ()).digest() for g in grids]
    assert len(set(digests)) == len(grids)


# ---------------------------------------------------------------- what cannot be stored
def named(*names):
    return StoredUnit(names, View((1, 1)), Dense(torch.ones(1, 1)), "any")


NORM = FoldedNorm("bn", torch.ones(1), torch.ones(1), 1e-5)


@pytest.mark.parametrize(
    ("artifact", "told"),
    [
        pytest.param(Artifact((), {"c": torch.ones(1, dtype=torch.complex64)}, ()), "complex64", id="complex"),
        pytest.param(Artifact((named("a"), named("a")), {}, ()), "twice", id="two-units-of-one-name"),
        pytest.param(Artifact((named("a", "a"),), {}, ()), "twice", id="one-unit-twice-the-name"),
        pytest.param(Artifact((named("a"),), {"a": torch.ones(1)}, ()), "twice", id="unit-and-rest"),
        pytest.param(Artifact((named("bn.weight"),), {}, (NORM,)), "twice", id="unit-and-norm"),
        pytest.param(Artifact((), {"bn.running_mean": torch.ones(1)}, (NORM,)), "twice", id="rest-and-norm"),
        pytest.param(Artifact((named("a\nb"),), {}, ()), "control", id="line-break-in-a-name"),
        pytest.param(Artifact((), {"\x1b[2J": torch.ones(1)}, ()), "control", id="escape-in-a-name"),
        pytest.param(Artifact((), {"\ud800": torch.ones(1)}, ()), "header", id="half-a-character"),
        pytest.param(Artifact((), {}, (FoldedNorm("bn", torch.ones(1), torch.ones(1), 1.0),)), "eps", id="eps-1"),
        pytest.param(Artifact((), {}, (), {"loss": float("nan")}), "'about'.*JSON", id="about-nan"),
        pytest.param(Artifact((), {}, (), {"when": object()}), "'about'.*JSON", id="about-object"),
        pytest.param(Artifact((), {}, (), {1: 0, "a": 0}), "'about'.*JSON", id="about-mixed-keys"),
        pytest.param(Artifact((), {}, (), {"big": 2**63}), "header", id="about-huge-integer"),
    ],
)
def test_what_no_reader_would_accept_is_not_written(artifact, told, tmp_path):
    with pytest.raises(UsageError, match=told):
        write(artifact, tmp_path / "a.fw")
    assert list(tmp_path.iterdir()) == []


def test_about_that_looks_like_the_checksum_is_in_the_way_of_it_only_where_it_can_be_seen(tmp_path):
    """From version 4 on the contents are packed."""
    artifact = Artifact((), {}, (), {"checksum": "0" * 32})
    with pytest.raises(FormatError, match="checksum"):
        from_bytes(plain_bytes(artifact))
    write(artifact, tmp_path / "a.fw")
    assert read(tmp_path / "a.fw").about == artifact.about


# ---------------------------------------------------------------- onto the disk
def test_write_returns_the_size_and_replaces_an_old_file(tmp_path):
    path = tmp_path / "a.fw"
    path.write_bytes(b"old")
    assert write(SMALL, path) == path.stat().st_size == len(to_bytes(SMALL)) < len(plain_bytes(SMALL))
    assert read(path).digest() == SMALL.digest()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stop"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call, error):
    path = tmp_path / "a.fw"
    path.write_bytes(b"old")

    def fail(*_):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UsageError if isinstance(error, OSError) else KeyboardInterrupt) as raised:
        write(SMALL, path)
    if isinstance(error, OSError):
        assert str(raised.value) == f"cannot write {path}: No space left on device"
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("place", "told"),
    [
        pytest.param("missing/a.fw", "No such file or directory", id="no-folder"),
        pytest.param("file/a.fw", "Not a directory", id="folder-is-a-file"),
        pytest.param("folder", "not a regular file", id="is-a-folder"),
        pytest.param("", "not a regular file", id="is-its-own-folder"),
        pytest.param("pipe", "not a regular file", id="is-a-pipe"),
        pytest.param("a" * 300, "File name too long", id="long-name"),
    ],
)
def test_a_place_that_cannot_be_written_is_told(tmp_path, place, told):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"old")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=f"cannot write .*: .*{told}") as raised:
        write(SMALL, tmp_path / place)
    assert "\n" not in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_told(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="Permission denied"):
        write(SMALL, tmp_path / "a.fw")
    tmp_path.chmod(0o700)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_decides_who_may_read(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write(SMALL, tmp_path / "a.fw")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.fw").stat().st_mode) == mode
