import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight._pack import pack, packed_size, unpack

streams = st.integers(1, 16).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, 2**n - 1), max_size=41)))


@settings(deadline=None)
@given(streams)
def test_round_trip_has_the_promised_size_and_bit_order(stream):
    bits, values = stream
    packed = pack(torch.tensor(values, dtype=torch.int32), bits)
    number = sum(v << (i * bits) for i, v in enumerate(values))  # the stream as one little-endian integer
    assert packed.dtype == torch.uint8
    assert bytes(packed.tolist()) == number.to_bytes(packed_size(len(values), bits), "little")
    assert unpack(packed, bits, len(values)).tolist() == values


@pytest.mark.parametrize(
    ("bits", "values", "expected"),
    [
        pytest.param(1, [1, 0, 0, 0, 0, 0, 0, 0, 1], [0b00000001, 0b1], id="mask"),
        pytest.param(2, [1, 2, 3, 0, 1], [0b00_11_10_01, 0b01], id="2-bit"),
        pytest.param(3, [7, 0, 5], [0b01_000_111, 0b1], id="3-bit-across-bytes"),
        pytest.param(8, [255, 7], [255, 7], id="8-bit"),
        pytest.param(5, [], [], id="nothing"),
    ],
)
def test_exact_bytes(bits, values, expected):
    assert pack(torch.tensor(values, dtype=torch.uint8), bits).tolist() == expected


def test_any_shape_is_packed_row_major():
    matrix = torch.arange(6).reshape(2, 3)
    assert pack(matrix.T, 3).tolist() == pack(torch.tensor([0, 3, 1, 4, 2, 5]), 3).tolist()


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("size", [-1, 1])
def test_a_wrong_length_is_refused(bits, size):
    with pytest.raises(ValueError, match="bytes, got"):
        unpack(torch.zeros(packed_size(5, bits) + size, dtype=torch.uint8), bits, 5)


@pytest.mark.parametrize("spare_bit", [7, 6, 5, 4])
def test_padding_that_is_not_zero_is_refused(spare_bit):
    packed = pack(torch.tensor([3, 3, 3, 3]), 3)  # 12 bits: the upper four of the last byte are padding
    packed[-1] |= 1 << spare_bit
    with pytest.raises(ValueError, match="padding"):
        unpack(packed, 3, 4)
