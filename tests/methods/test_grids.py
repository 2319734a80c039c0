import numpy as np
import pytest
import torch

from featherweight.errors import UsageError
from featherweight.methods import GridSpec, Rtn
from featherweight.methods.grids import Points, choose
from featherweight.stats import LayerStats
from featherweight.weights.grid import scale_shape
from tests.methods.problems import problem, weights
from tests.reference import grids as oracle


def grouped(matrix, shape, group):
    """{(row, group) of the scales: the entries there}."""
    rows, cols = shape
    if group == 0:
        return {(0, 0): matrix.reshape(-1).tolist()}
    return {
        (r, g): matrix[r, g * group : (g + 1) * group].tolist() for r in range(rows) for g in range(-(-cols // group))
    }


@pytest.mark.parametrize("group", [None, 0, 4, 1])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_grid_is_that_of_the_plain_search(weighted, bits, symmetric, group):
    w, stats = problem(3, 10, seed=bits)
    w[0] = w[0].abs()  # a grid of one sign
    spec = GridSpec(bits, symmetric, group)
    importance = stats.gram[0].diagonal().expand(3, -1) if weighted else torch.ones_like(w)
    points = choose(w, spec, importance if weighted else None)
    columns = 10 if group is None else group
    assert tuple(points.scale.shape) == scale_shape((3, 10), columns)
    counts = grouped(importance + importance.mean() * 1e-6, (3, 10), columns)
    for at, values in grouped(w, (3, 10), columns).items():
        scale, zero = oracle.search_scale(values, counts[at], bits, symmetric)
        assert float(points.scale[at]) == scale
        assert (zero if symmetric else float(points.zero[at])) == zero
    assert points.scale.dtype == torch.float16
    assert (points.zero is None) is symmetric


def test_removed_entries_do_not_count():
    w, _ = problem(2, 10, seed=1)
    keep = torch.ones(2, 10, dtype=torch.bool)
    keep[:, 3], keep[1, 7] = False, False
    w[:, 3] = 100.0
    points = choose(w, GridSpec(3), keep=keep)
    for r in range(2):
        scale, zero = oracle.search_scale(w[r, keep[r]].tolist(), [1.0] * int(keep[r].sum()), 3, False)
        assert (float(points.scale[r, 0]), float(points.zero[r, 0])) == (scale, zero)


def test_removed_entries_do_not_count_as_zeros():
    """Zero lies on every grid with a zero point; on a grid of one bit it would pull the two points together."""
    w = torch.tensor([[1.0, 1.0, -1.0, -1.0, 5.0, 5.0, 5.0, 5.0]], dtype=torch.float64)
    keep = torch.arange(8)[None] < 4
    scale, _ = oracle.search_scale([1.0, 1.0, -1.0, -1.0], [1.0] * 4, 1, True)
    assert float(choose(w, GridSpec(1, True), keep=keep).scale) == scale == 2


def test_columns_without_input_still_count_a_little():
    w = weights(1, 6, seed=0)
    points = choose(w, GridSpec(4), torch.zeros(1, 6, dtype=torch.float64))
    assert torch.equal(points.scale, choose(w, GridSpec(4)).scale)


@pytest.mark.parametrize("spec", [GridSpec(2), GridSpec(1, True), GridSpec(3, True, 4), GridSpec(8, group=0)])
def test_rounding_finds_the_nearest_point(spec):
    w = weights(3, 10, seed=1)
    points = choose(w, spec)
    scale, zero = points.entries()
    all_codes = torch.arange(2**spec.bits, dtype=torch.float64)
    distance = (scale[..., None] * (all_codes - zero[..., None]) - w[..., None]).abs()
    codes = points.round(w)
    assert codes.dtype == torch.uint8
    picked = distance.gather(2, codes.long()[..., None])[..., 0]
    assert torch.equal(picked, distance.amin(dim=2))
    decoded = points.grid(codes).dense()
    assert torch.allclose(decoded.double(), scale * (codes - zero), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("bits", "magnitude", "dtype"),
    [
        (2, 1e-9, torch.float32),
        (8, 1e-5, torch.float32),
        (8, 1e-2, torch.float16),
        (2, 1.0, torch.float16),
        (8, 1e6, torch.float16),
        (2, 1e6, torch.float32),
        (8, 1e12, torch.float32),
    ],
)
def test_the_magnitude_of_the_weights_does_not_matter(bits, magnitude, dtype):
    w = weights(4, 16, seed=2)
    reference = Rtn(GridSpec(bits)).solve(w, LayerStats.white(16))
    solution = Rtn(GridSpec(bits)).solve(w * 10 * magnitude, LayerStats.white(16))
    assert solution.relative_error == pytest.approx(reference.relative_error, rel=0.05)
    assert solution.weight.scale.dtype == dtype


@pytest.mark.parametrize("magnitude", [1e-9, 1e-4, 1.0, 1e6])
@pytest.mark.parametrize("spec", [GridSpec(8), GridSpec(4, True), GridSpec(4, group=4), GridSpec(1, True)])
def test_a_row_of_zeros_stays_zero_and_spoils_no_other(spec, magnitude):
    w = weights(4, 16, seed=3) * magnitude
    without = Rtn(spec).solve(w[1:], LayerStats.white(16))
    w[0] = 0
    found = Rtn(spec).solve(w, LayerStats.white(16))
    assert found.relative_error == pytest.approx(without.relative_error, rel=1e-3)
    assert found.weight.dense()[0].abs().max() <= 1e-6 * w.abs().max()


@pytest.mark.parametrize("weaker", [1e-1, 1e-3, 1e-4, 1e-5])
def test_a_weak_row_keeps_its_precision(weaker):
    """A normalisation behind the layer may make it as loud as the others."""
    w = weights(4, 64, seed=4)
    w[0] *= weaker
    error = (Rtn(GridSpec(4)).solve(w, LayerStats.white(64)).weight.dense() - w).norm(dim=1) / w.norm(dim=1)
    assert (error < 0.12).all()


def test_zeros_stay_inside_the_codes_where_scales_are_coarse():
    """A row so weak that its scale is rounded to the smallest half-precision number."""
    w = weights(2, 16, seed=4)
    w[0] = -torch.linspace(0.1, 1, 16) * 3 * 1.4 * 2**-24
    points = choose(w, GridSpec(2))
    assert points.scale.dtype == torch.float16
    assert (points.zero < 4).all()


def test_entries_repeat_scales_over_groups():
    points = Points(
        GridSpec(2, group=2), (2, 3), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0, 1], [2, 3]])
    )
    scale, zero = points.entries()
    assert scale.tolist() == [[1, 1, 2], [3, 3, 4]]
    assert zero.tolist() == [[0, 0, 1], [2, 2, 3]]
    scale, zero = Points(GridSpec(1, True, group=0), (2, 2), torch.tensor([[5.0]]), None).entries()
    assert scale.tolist() == [[5, 5], [5, 5]]
    assert zero.tolist() == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (GridSpec(2), 3 * 10 * 2 / 8 + 3 * 2 + 3 * 2 / 8),
        (GridSpec(2, True), 3 * 10 * 2 / 8 + 3 * 2),
        (GridSpec(4, group=4), 15 + 9 * 2 + 9 * 4 / 8),
        (GridSpec(8, group=0), 30 + 2 + 1),
        (GridSpec(3, group=99), 3 * 10 * 3 / 8 + 3 * 2 + 3 * 3 / 8),
    ],
)
def test_storage(spec, expected):
    """Codes, two bytes a scale, zeros: each rounded up to bytes."""
    parts = Rtn(spec).solve(weights(3, 10, 0), LayerStats.white(10)).weight.tensors()
    assert spec.storage((3, 10)) == sum(t.numel() * t.element_size() for t in parts.values())
    assert expected <= spec.storage((3, 10)) < expected + 2


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5, 4.0, True, "4", None])
def test_impossible_bits_are_refused(bits):
    with pytest.raises(UsageError, match="bits"):
        GridSpec(bits)


@pytest.mark.parametrize("group", [-1, 2.5, True, 32.0, "8"])
def test_impossible_groups_are_refused(group):
    with pytest.raises(UsageError, match="group"):
        GridSpec(4, group=group)


@pytest.mark.parametrize(
    ("spec", "label"),
    [(GridSpec(4), "4 bit"), (GridSpec(3, True, 0), "3 bit sym per tensor"), (GridSpec(2, group=32), "2 bit group 32")],
)
def test_labels(spec, label):
    assert spec.label == label
    assert Rtn(spec).label == f"rtn {label}"


def test_rounding_to_half_precision_comes_before_the_choice_of_codes():
    """A scale that half precision moves: codes are chosen for the scale in the file."""
    w = weights(1, 40, seed=5) * 5e-5  # scales below the normal half-precision numbers would lose too much
    points = choose(w, GridSpec(2))
    assert points.scale.dtype == torch.float32
    w = weights(2, 40, seed=5)
    points = choose(w, GridSpec(8))
    scale, zero = points.entries()
    assert np.array_equal(scale.numpy(), points.scale.double().expand(2, 40).numpy())
    assert (
        (scale * (points.round(w) - zero) - w).abs() <= scale * (0.5 + 1e-9) + (w.abs() - 127 * scale).clamp(min=0)
    ).all()
