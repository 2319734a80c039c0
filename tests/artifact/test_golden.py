"""Files that an earlier version wrote are read for ever, and give the same bits."""

import json
import zlib
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch

from featherweight.artifact import load, read
from featherweight.artifact.write import plain_bytes, to_bytes
from tests.artifact import mini_reader
from tests.artifact.handmade import take_apart
from tests.golden import make_v2, make_v3, make_v4, make_v5, make_v6
from tests.golden.make_v1 import artifacts

FILES = sorted((Path(__file__).parents[1] / "golden" / "v1").glob("*.fw"))
every = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def test_every_case_has_its_small_files():
    assert [p.stem for p in FILES] == sorted(artifacts())
    assert all(p.stat().st_size < 3000 for f in FILES for p in (f, f.with_suffix(".json")))


@every
def test_a_golden_file_gives_the_expected_bits(path):
    expected = json.loads(path.with_suffix(".json").read_text())
    decoded, independent = load(path), mini_reader.read(path.read_bytes())
    assert list(decoded) == list(independent) == list(expected)
    for name, entry in expected.items():
        values = np.array(entry["values"], entry["type"]).reshape(entry["shape"])
        for found in (decoded[name].numpy(), independent[name]):
            assert (found.dtype, found.shape, found.tobytes()) == (values.dtype, values.shape, values.tobytes()), name


@every
def test_a_golden_file_is_written_again_byte_for_byte(path):
    assert plain_bytes(read(path)) == path.read_bytes() == plain_bytes(artifacts()[path.stem])


# ---------------------------------------------------------------- version 2
FILES_2 = sorted((Path(__file__).parents[1] / "golden" / "v2").glob("*.fw"))


def test_version_2_has_its_file():
    assert [p.stem for p in FILES_2] == sorted(make_v2.artifacts())
    assert all(p.stat().st_size < 6000 for f in FILES_2 for p in (f, f.with_suffix(".json")))


@pytest.mark.parametrize("path", FILES_2, ids=lambda path: path.stem)
def test_a_golden_file_of_version_2_gives_the_expected_bits_and_rounds_the_same(path):
    data, expected = path.read_bytes(), json.loads(path.with_suffix(".json").read_text())
    assert plain_bytes(read(path)) == data == plain_bytes(make_v2.artifacts()[path.stem])
    decoded, independent = load(path), mini_reader.read(data)
    assert list(decoded) == list(independent) == list(expected["tensors"])
    for name, entry in expected["tensors"].items():
        values = np.array(entry["values"], entry["type"]).reshape(entry["shape"])
        assert decoded[name].numpy().tobytes() == independent[name].tobytes() == values.tobytes(), name
    grids, x = mini_reader.inputs(data), np.array(expected["x"], np.float32)
    assert set(grids) == set(read(path).inputs()) == set(expected["rounded"])
    for name, values in expected["rounded"].items():
        want = np.array(values, np.float32)
        assert np.array_equal(mini_reader.rounded(x, *grids[name]), want), name
        assert np.array_equal(read(path).inputs()[name].simulate(torch.tensor(x)).numpy(), want), name


# ---------------------------------------------------------------- version 3
def test_the_golden_file_of_version_3_gives_the_expected_bits():
    path = make_v3.FOLDER / "boxes.fw"
    data, expected = path.read_bytes(), json.loads(path.with_suffix(".json").read_text())
    assert plain_bytes(read(path)) == data == plain_bytes(make_v3.artifact())
    decoded, independent = load(path), mini_reader.read(data)
    assert list(decoded) == list(independent) == list(expected)
    for name, entry in expected.items():
        values = np.array(entry["values"], entry["type"]).reshape(entry["shape"])
        assert decoded[name].numpy().tobytes() == independent[name].tobytes() == values.tobytes(), name


# ---------------------------------------------------------------- version 4
def test_the_golden_file_of_version_4_gives_the_expected_bits():
    path = make_v4.FOLDER / "books.fw"
    assert all(p.stat().st_size < 7000 for p in (path, path.with_suffix(".json")))
    data, expected = path.read_bytes(), json.loads(path.with_suffix(".json").read_text())
    assert plain_bytes(read(path)) == data == plain_bytes(make_v4.artifact())
    decoded, independent = load(path), mini_reader.read(data)
    assert list(decoded) == list(independent) == list(expected)
    for name, entry in expected.items():
        values = np.array(entry["values"], entry["type"]).reshape(entry["shape"])
        assert decoded[name].numpy().tobytes() == independent[name].tobytes() == values.tobytes(), name


# ---------------------------------------------------------------- version 5
def test_the_golden_file_of_version_5_gives_the_expected_bits():
    path = make_v5.FOLDER / "factors.fw"
    assert all(p.stat().st_size < 7000 for p in (path, path.with_suffix(".json")))
    data, expected = path.read_bytes(), json.loads(path.with_suffix(".json").read_text())
    assert plain_bytes(read(path)) == data == plain_bytes(make_v5.artifact())
    decoded, independent = load(path), mini_reader.read(data)
    assert list(decoded) == list(independent) == list(expected)
    for name, entry in expected.items():
        values = np.array(entry["values"], entry["type"]).reshape(entry["shape"])
        assert decoded[name].numpy().tobytes() == independent[name].tobytes() == values.tobytes(), name


# ---------------------------------------------------------------- version 6
PATH_6 = make_v6.FOLDER / "coded.fw"


def unzipped(data: bytes) -> tuple[dict, dict, bytes]:
    """Contents, tensors and payload, with what zlib packed unpacked: other builds of zlib may pack to other bytes."""
    parts = take_apart(data)
    tensors, payload = {n: [e["dtype"], e["shape"]] for n, e in parts.tensors.items() if n != "u8"}, parts.payload
    place = parts.tensors["u8"]["data_offsets"][0]
    for name, sizes in sorted(parts.contents["streams"].items()):
        end = place + sizes[1]
        if name not in ("f16", "bf16", "f32", "f64"):
            values = zlib.decompress(payload[place:end])
            payload = payload[:place] + values + payload[end:]
            end, sizes[1] = place + len(values), None
        place = end
    return parts.contents, tensors, payload


def test_the_golden_file_of_version_6_gives_the_expected_bits():
    assert all(p.stat().st_size < 8000 for p in (PATH_6, PATH_6.with_suffix(".json")))
    data, expected = PATH_6.read_bytes(), json.loads(PATH_6.with_suffix(".json").read_text())
    assert unzipped(to_bytes(read(PATH_6))) == unzipped(data) == unzipped(to_bytes(make_v6.artifact()))
    decoded, independent = load(PATH_6), mini_reader.read(data)
    assert list(decoded) == list(independent) == list(expected)
    for name, entry in expected.items():
        for found in (decoded[name].numpy(), independent[name]):
            digest = blake2b(found.tobytes(), digest_size=16).hexdigest()
            assert [str(found.dtype), list(found.shape), digest] == [entry["type"], entry["shape"], entry["blake2b"]], (
                name
            )
            assert found.reshape(-1)[:4].tolist() == entry["first"], name


def test_in_the_golden_file_of_version_6_every_field_is_coded_that_can_be():
    contents = take_apart(PATH_6.read_bytes()).contents
    assert sorted(contents["streams"]) == ["bf16", "bool", "f16", "f32", "f64", "i64"]
    fields = {
        (w["kind"], w.get("values"), w.get("sym"), min(w.get("group", 0), 1), field)
        for u in contents["units"]
        for w in [u["weight"]]
        for field in u.get("coded", ())
    }
    grids = {("grid", None, sym, group, "codes") for sym in (0, 1) for group in (0, 1)}
    sparse = {("sparse", "grid", sym, 1, field) for sym in (0, 1) for field in ("mask", "codes")}
    sparse |= {("sparse", "codebook", None, 0, field) for field in ("mask", "codes0")}
    sparse |= {("sparse", "dense", None, 0, "mask")}
    others = {("codebook", None, None, 0, "codes0"), ("codebook", None, None, 0, "codes1")}
    assert fields == grids | sparse | others | {("factors", None, None, 0, "1.codes")}
    patterns = [u["coded"] for u in contents["units"] if "mask" in u["weight"]]
    assert [set(coded) for coded in patterns] == [{"codes"}]
    assert sum("coded" not in u for u in contents["units"]) == 3  # of one bit, of one entry, of floats
    assert [entry for entry in contents["rest"] if len(entry) == 2] == [["twice", "u0.bias"], ["index.again", "index"]]
