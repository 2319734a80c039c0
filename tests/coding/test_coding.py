"""What is coded comes back to the last bit, in about as few bytes as its models allow, and bad bytes do no harm."""

import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.coding import (
    contexts,
    costs,
    decode_floats,
    decode_integers,
    decode_symbols,
    encode_floats,
    encode_integers,
    encode_symbols,
)
from featherweight.coding.floats import KINDS
from featherweight.errors import FormatError, UsageError
from tests.artifact import mini_reader
from tests.reference import coding as slow

NAMES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64"}
seeds = st.integers(0, 2**20)


def geometric(shape: tuple[int, int], mean: float, most: int, seed: int) -> torch.Tensor:
    """Integers of both signs, most of them small."""
    rng = np.random.default_rng(seed)
    sizes = np.minimum(rng.geometric(1 / (1 + mean), shape) - 1, most)
    return torch.from_numpy((sizes * rng.choice([-1, 1], shape)).astype(np.int16))


def ideal(bits: float) -> float:
    """Bytes that a code may have, of that many bits."""
    return 1.01 * bits / 8 + 8


# ---------------------------------------------------------------- integers
@st.composite
def matrices(draw):
    """(values, most, keep, signed): uniform, peaked, or nothing but the largest."""
    rows, cols = draw(st.integers(0, 9)), draw(st.integers(0, 24))
    most, signed = draw(st.integers(1, 255)), draw(st.booleans())
    mean, seed = draw(st.sampled_from([0.02, 0.5, 5.0, 1e9])), draw(seeds)
    values = geometric((rows, cols), mean, most, seed)
    values = draw(st.sampled_from([values, values.sign() * most, -values.abs()])) if signed else values.abs()
    rng = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, cols, generator=rng) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    keep = draw(st.sampled_from([None, keep]))
    return values if keep is None else torch.where(keep, values, 0), most, keep, signed


@settings(deadline=None, max_examples=200)
@given(matrices())
def test_integers_come_back(case):
    values, most, keep, signed = case
    data = encode_integers(values, most, keep, signed)
    if data is None:
        return
    assert len(data) < max(values.numel(), 1)
    assert torch.equal(decode_integers(data, tuple(values.shape), most, keep, signed), values)
    mask = np.ones(values.shape, bool) if keep is None else keep.numpy()
    assert np.array_equal(mini_reader.signed(data.numpy(), mask, most, signed), values.numpy())
    state = slow.integers(values.tolist(), most, None if keep is None else keep.tolist(), signed)
    assert state.bits / 8 - 4 < len(data) <= ideal(state.bits)


@pytest.mark.parametrize("value", [1, -1])
@pytest.mark.parametrize("most", [1, 2, 127, 128, 255])
def test_nothing_but_the_largest_integer_comes_back(value, most):
    """All bits of one kind: the bytes of a mask that keeps everything are zeros."""
    values = torch.full((50, 60), value * most, dtype=torch.int16)
    data = encode_integers(values, most, signed=value < 0)
    assert len(data) < (60 if most == 1 else 2000)
    assert torch.equal(decode_integers(data, (50, 60), most, signed=value < 0), values)


def test_integers_that_are_noise_are_not_coded():
    values = torch.from_numpy(np.random.default_rng(0).integers(-255, 256, (40, 50)).astype(np.int16))
    assert encode_integers(values, 255) is None


def test_encoding_leaves_what_it_is_given_as_it_was():
    values = geometric((20, 30), 2.0, 9, 0)
    symbols, floats = values.abs().long() % 4, torch.arange(5000, dtype=torch.float64).sqrt()
    before = [t.clone() for t in (values, symbols, floats)]
    assert encode_integers(values, 9) is not None
    assert encode_symbols(symbols, 2) is not None
    assert encode_floats(floats) is not None
    assert all(torch.equal(a, b) for a, b in zip(before, (values, symbols, floats), strict=True))


@pytest.mark.parametrize("most", [0, 256])
def test_a_magnitude_that_cannot_be_is_told(most):
    with pytest.raises(UsageError, match="magnitudes must be at most 1 to 255"):
        encode_integers(torch.zeros(3, 3), most)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 40), st.sampled_from([0.05, 0.6, 4.0, 1e4]), seeds)
def test_contexts_are_those_of_the_definition(rows, cols, mean, seed):
    values = geometric((rows, cols), mean, 255, seed)
    sizes = values.abs().tolist()
    expected = [[slow.context(sizes, r, c) for c in range(cols)] for r in range(rows)]
    assert contexts(values).tolist() == expected


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 255), st.sampled_from([0.1, 1.0, 8.0]), seeds)
def test_costs_are_those_of_the_counts(most, mean, seed):
    values = geometric((12, 40), mean, most, seed)
    where = contexts(values)
    found = costs(values, where, most)
    expected = slow.costs(values.flatten().tolist(), where.flatten().tolist(), most)
    assert found.shape == (slow.CONTEXTS, most + 1)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize(("mean", "most"), [(0.1, 7), (0.7, 7), (3.0, 31)])
def test_costs_are_about_those_of_the_coder_at_its_end(mean, most):
    """0 and 1 have no bits below the leading one, which `costs` takes to be noise."""
    values = geometric((64, 96), mean, most, 5)
    where = contexts(values)
    found, state = costs(values, where, most), slow.integers(values.tolist(), most)
    often = [x for x in range(slow.CONTEXTS) if int((where == x).sum()) >= 200]
    assert len(often) >= 3
    for x in often:
        more = [state.state["more", x, k][0] / 65536 for k in (0, 1)]
        assert abs(found[x, 0] + np.log2(1 - more[0])) < 0.15
        assert abs(found[x, 1] + np.log2(more[0] * (1 - more[1])) - 1) < 0.3
    total = float(found[where, values.abs().long()].sum())
    assert abs(total / state.bits - 1) < 0.05


# ---------------------------------------------------------------- symbols
@settings(deadline=None, max_examples=80)
@given(st.integers(1, 16), st.integers(0, 400), st.sampled_from([0.05, 1.0, 50.0, 1e6]), seeds)
def test_symbols_come_back(bits, count, mean, seed):
    values = geometric((1, count), mean, 2**15 - 1, seed)[0].long().abs() % 2**bits
    values = 2**bits - 1 - values if seed % 2 else values
    data = encode_symbols(values, bits)
    if data is None:
        return
    assert len(data) < max(-(-count * bits // 8), 1)
    assert torch.equal(decode_symbols(data, count, bits), values)
    assert mini_reader.symbols(data.numpy(), count, bits).tolist() == values.tolist()
    spent = slow.symbols(values.tolist(), bits)
    assert spent / 8 - 4 < len(data) <= ideal(spent)


@pytest.mark.parametrize("bits", [0, 17])
def test_symbols_of_too_many_bits_are_told(bits):
    with pytest.raises(UsageError, match="bits must be 1 to 16"):
        encode_symbols(torch.zeros(3), bits)


# ---------------------------------------------------------------- floats
def patterns(values: torch.Tensor) -> np.ndarray:
    size = values.element_size()
    return values.contiguous().view(torch.uint8).numpy().view(f"<u{size}")


def from_patterns(numbers: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    size = dtype.itemsize
    return torch.from_numpy(numbers.astype(f"<u{size}").view(np.uint8).copy()).view(dtype)


@st.composite
def vectors(draw):
    """Of any bits, of few different ones, or of numbers as a network has them, rounded or not."""
    dtype, count = draw(st.sampled_from(list(KINDS))), draw(st.integers(1, 150))
    rng = np.random.default_rng(draw(seeds))
    whole = rng.integers(0, 2**63, count) * 2 + rng.integers(0, 2, count)
    some = np.array([0, 1, 2**63, 2**64 - 1], np.uint64)[rng.integers(0, 4, count)]
    weights = torch.from_numpy(rng.normal(0, 0.05, count))
    rounded = (weights * 64).round() / 64
    kind = draw(st.sampled_from(["any", "few", "weights", "rounded"]))
    size = 8 * dtype.itemsize
    found = {"any": whole.astype(np.uint64) >> np.uint64(64 - size), "few": some >> np.uint64(64 - size)}
    return from_patterns(found[kind], dtype) if kind in found else (rounded if kind == "rounded" else weights).to(dtype)


@settings(deadline=None, max_examples=120)
@given(vectors())
def test_floats_come_back(values):
    check_floats(values)


def check_floats(values: torch.Tensor) -> int | None:
    data = encode_floats(values)
    if data is None:
        return None
    kind = KINDS[values.dtype]
    assert len(data) < values.numel() * values.element_size()
    again = decode_floats(data, len(values), values.dtype)
    assert again.dtype == values.dtype
    assert patterns(again).tolist() == patterns(values).tolist()
    independent = mini_reader.floats(data.numpy().tobytes(), len(values), NAMES[values.dtype])
    assert independent.tobytes() == patterns(values).tobytes()
    spent = slow.floats(patterns(values).tolist(), kind.exponent, kind.mantissa, int(data[0]))
    assert spent / 8 - 4 < len(data) <= ideal(spent)
    return int(data[0])


@pytest.mark.parametrize("dtype", KINDS)
def test_floats_that_are_no_numbers_come_back(dtype):
    size, mantissa = 8 * dtype.itemsize, KINDS[dtype].mantissa
    top = ((1 << KINDS[dtype].exponent) - 1) << mantissa  # infinity
    sign = 1 << (size - 1)
    odd = [0, sign, 1, sign | 1, (1 << mantissa) - 1, top, sign | top, top | 1, top | (1 << (mantissa - 1)) | 5]
    odd += [2**size - 1, top - 1, sign | (top - 1)]
    values = from_patterns(np.array(odd * 20, np.uint64), dtype)
    assert values.isnan().sum() == 60
    assert check_floats(values) == 0


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("value", [0.0, -0.0, 0.1, float("nan"), float("-inf")])
def test_floats_that_are_all_equal_take_a_hundredth(dtype, value):
    values = torch.full((3000,), value, dtype=dtype)
    data = encode_floats(values)
    assert len(data) < 3000 * dtype.itemsize / 100
    assert patterns(decode_floats(data, 3000, dtype)).tolist() == patterns(values).tolist()


@pytest.mark.parametrize("dtype", KINDS)
def test_floats_of_one_pattern_of_ones_come_back(dtype):
    values = from_patterns(np.full(400, 2 ** (8 * dtype.itemsize) - 1, np.uint64), dtype)
    assert patterns(decode_floats(encode_floats(values), 400, dtype)).tolist() == patterns(values).tolist()


@pytest.mark.parametrize(("dtype", "beside"), [(torch.float32, 2), (torch.float64, 6), (torch.float16, 0)])
def test_bytes_of_many_floats_that_are_noise_are_written_beside(dtype, beside):
    values = torch.from_numpy(np.random.default_rng(3).normal(0, 1, 10000) * np.pi).to(dtype)
    assert check_floats(values) == beside


def test_no_floats_are_not_coded():
    assert all(encode_floats(torch.empty(0, dtype=dtype)) is None for dtype in KINDS)


# ---------------------------------------------------------------- bad bytes
def damaged(data: torch.Tensor, seed: int):
    """Truncated anywhere, longer, with a bit flipped, with many bytes replaced, empty."""
    rng = np.random.default_rng(seed)
    given = data.numpy()
    for length in rng.integers(0, len(given), 30):
        yield given[:length]
    for count in (1, 3, 4, 5, 9, 100):
        yield np.concatenate([given, rng.integers(0, 256, count).astype(np.uint8)])
        yield np.concatenate([given, np.zeros(count, np.uint8)])
    for place in rng.integers(0, 8 * len(given), 60):
        flipped = given.copy()
        flipped[place // 8] ^= 1 << (place % 8)
        yield flipped
    for _ in range(20):
        yield rng.integers(0, 256, len(given)).astype(np.uint8)
    yield given[:0]


def survivors(data: torch.Tensor, decode) -> list[torch.Tensor]:
    """What was decoded and not refused."""
    found = []
    for seed in range(3):
        for bad in damaged(data, seed):
            with suppress(FormatError):
                found.append(decode(torch.from_numpy(bad.copy())))
    return found


@pytest.mark.parametrize("most", [1, 5, 200])
def test_bad_bytes_of_integers_are_refused_or_give_integers_in_range(most):
    values, keep = geometric((20, 30), most / 8, most, 1), torch.arange(600).reshape(20, 30) % 3 > 0
    values = torch.where(keep, values, 0)
    found = survivors(encode_integers(values, most, keep), lambda data: decode_integers(data, (20, 30), most, keep))
    assert found
    for other in found:
        assert int(other.abs().max()) <= most
        assert not other[~keep].any()


def test_bad_bytes_of_symbols_are_refused_or_give_symbols_in_range():
    values = geometric((1, 700), 2.0, 31, 1)[0].long().abs()
    found = survivors(encode_symbols(values, 5), lambda data: decode_symbols(data, 700, 5))
    assert found
    assert all(0 <= int(other.min()) <= int(other.max()) < 32 for other in found)


@pytest.mark.parametrize("dtype", KINDS)
def test_bad_bytes_of_floats_are_refused_or_give_as_many_floats(dtype):
    values = torch.from_numpy(np.random.default_rng(3).normal(0, 0.05, 5000)).to(dtype)
    found = survivors(encode_floats(values), lambda data: decode_floats(data, 5000, dtype))
    assert found
    assert all(other.shape == (5000,) and other.dtype == dtype for other in found)


@pytest.mark.parametrize("beside", [3, 7, 255])
def test_floats_with_more_bytes_beside_than_they_have_are_refused(beside):
    with pytest.raises(FormatError, match="too short"):
        decode_floats(torch.tensor([beside] + [0] * 5000, dtype=torch.uint8), 10, torch.float32)


def test_few_bytes_take_no_time_whatever_they_claim():
    """Without a stop, 2^26 entries take ten seconds and more."""
    data = torch.zeros(5, dtype=torch.uint8)
    decoders = (
        lambda: decode_integers(data, (2**13, 2**13), 255),
        lambda: decode_symbols(data, 2**25, 16),
        lambda: decode_floats(data, 2**25, torch.float64),
    )
    for decode in decoders:
        start = time.perf_counter()
        with pytest.raises(FormatError, match="end before or behind"):
            decode()
        assert time.perf_counter() - start < 5  # seconds, beside other work
