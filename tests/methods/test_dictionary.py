"""Dictionary pairs: the optimum beside the paper's iteration and beside analytic tails, ranks, grids and bytes."""

import itertools

import numpy as np
import pytest
import torch

from featherweight.errors import UsageError
from featherweight.methods import DictionaryPairs, GridSpec
from featherweight.methods.common import Member, arranged, fit
from featherweight.methods.dictionary import coefficients_of, in_blocks, pair, rank_within, spectrum, tails
from featherweight.stats import LayerStats
from featherweight.weights import Dense, Factors, Grid
from tests.reference import dictionary_pairs as paper

EXACT = 1e-10  # of the energy of the weights


def matrix(rows, cols, seed=0, decay=0.0):
    """Random, with singular values that fall like k ** -decay."""
    make = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=make, dtype=torch.float64)
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    return (u * s * torch.arange(1, len(s) + 1, dtype=torch.float64) ** -decay) @ v * 0.1


def solved(method, w, taps=1):
    return method.solve(w, LayerStats.white(w.shape[1], taps=taps))


def energy(w):
    return float(w.double().square().sum())


@pytest.mark.parametrize(("decay", "rank", "size"), list(itertools.product([0.0, 1.0, 3.0], [1, 3, 6], [0, 9, 18])))
def test_the_optimum_is_never_worse_than_the_papers_iteration(decay, rank, size):
    w = matrix(8, 36, seed=rank, decay=decay)
    c, d = pair(in_blocks(w, 36 // size if size else 1), rank)
    error = energy(in_blocks(w, len(c)) - c @ d)
    theirs = energy(w - torch.from_numpy(paper.compressed(w.numpy(), rank, size)))
    assert error <= theirs + EXACT * energy(w)
    assert theirs < 2 * error + 0.03 * energy(w), "the reference does not learn"


def test_the_reference_follows_its_formulas():
    """One update of each kind minimises what it says, with the others fixed."""
    x = matrix(12, 7).numpy()
    random = np.random.default_rng(0)
    d, p = random.random((12, 3)), random.random((3, 12))
    d /= np.linalg.norm(d, axis=0)

    def cost(a, p=p, d=d):
        return np.square(x - d @ a).sum() + paper.TAU * np.square(p @ x - a).sum()

    a = paper.coefficients(x, d, p)
    best = paper.projection(x, a, np.linalg.inv(paper.TAU * x @ x.T + paper.GAMMA * np.eye(12)))
    atoms = paper.dictionary(x, a, d)
    assert np.linalg.norm(atoms, axis=0).max() <= 1 + 1e-12
    assert np.square(x - atoms @ a).sum() <= np.square(x - d @ a).sum()
    for _ in range(20):
        step = 1e-3 * random.standard_normal(a.shape)
        assert cost(a) <= cost(a + step)
        other = best + 1e-3 * random.standard_normal(p.shape)
        ridge = [paper.TAU * np.square(q @ x - a).sum() + paper.GAMMA * np.square(q).sum() for q in (best, other)]
        assert ridge[0] <= ridge[1]
        moved = atoms + 0.1 * random.standard_normal(d.shape)
        moved /= np.maximum(1, np.linalg.norm(moved, axis=0))
        assert np.square(x - atoms @ a).sum() <= np.square(x - moved @ a).sum()


@pytest.mark.parametrize("shape", [(6, 42), (40, 6), (12, 24)])
@pytest.mark.parametrize("decay", [0.0, 2.0])
def test_errors_are_the_analytic_tails(shape, decay):
    w = matrix(*shape, decay=decay)
    for blocks in (1, 2, 3):
        x = in_blocks(w, blocks)
        left = tails(spectrum(x))
        for rank in range(1, min(x.shape[1:]) + 1):
            c, d = pair(x, rank)
            optimum = paper.best_error(w.numpy(), rank, shape[1] // blocks)
            assert abs(energy(x - c @ d) - optimum) < EXACT * energy(w)
            assert abs(float(left[rank]) - optimum) < EXACT * energy(w)
            eye = torch.eye(rank, dtype=torch.float64).expand(blocks, -1, -1)
            torch.testing.assert_close(c.mT @ c, eye, atol=1e-6, rtol=0)


def test_matrices_of_small_rank_and_of_zeros():
    w = matrix(8, 3) @ matrix(3, 20, seed=1)
    c, d = pair(in_blocks(w, 1), 5)
    assert energy(w - (c @ d)[0]) < EXACT * energy(w)
    assert torch.isfinite(pair(in_blocks(w.T, 1), 5)[0]).all()
    for grid in (None, GridSpec(4)):
        solution = solved(DictionaryPairs(keep=0.6, grid=grid), torch.zeros(8, 20))
        assert energy(solution.weight.dense()) == 0
        rounded = solved(DictionaryPairs(rank=5, grid=grid), w)
        assert rounded.relative_error < (1e-5 if grid is None else 0.1)


@pytest.mark.parametrize("error", [0.8, 0.5, 0.2, 0.05])
@pytest.mark.parametrize("block", [0, 2])
def test_the_rank_for_an_error_is_the_smallest(error, block):
    w = matrix(10, 24, seed=4, decay=1.5)
    weight = solved(DictionaryPairs(error=error, block=block), w, taps=3).weight
    blocks = 4 if block else 1
    size = 24 // blocks
    most = min(10, size)
    relative = [(paper.best_error(w.numpy(), k, size) / energy(w)) ** 0.5 for k in range(most + 1)]
    smallest = max(next(k for k in range(most + 1) if relative[k] <= error), 1)
    member = Member.of("a", w, 3, DictionaryPairs(error=error, block=block))
    assert arranged([member])["a"].rank == smallest == rank_within(tails(spectrum(member.x)), error)
    small = smallest * (10 * blocks + 24) < 240
    assert isinstance(weight, Factors if small else Dense)
    assert not isinstance(weight, Factors) or weight.sizes["r"] == smallest


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("shape", [(16, 36), (36, 16), (4, 9), (1, 5)])
def test_the_rank_for_a_share_is_the_largest_and_bytes_are_known_before(keep, shape):
    w = matrix(*shape)
    for block, grid in itertools.product([0, 2], [None, GridSpec(8, True), GridSpec(3), GridSpec(4, group=5)]):
        method = DictionaryPairs(keep=keep, block=block, grid=grid)
        blocks, rank = method.blocks(shape), method.rank_of(shape)
        each = shape[0] * blocks + shape[1]
        dense = shape[0] * shape[1]
        most = min(shape[0], shape[1] // blocks)
        assert rank == 1 or rank * each <= keep * dense
        assert rank == most or (rank + 1) * each > keep * dense
        weight = solved(method, w).weight
        assert weight.bits() == 8 * method.storage(shape)
        whole = 2 * dense if grid is None else grid.storage(shape)
        assert weight.bits() <= 8 * whole
        assert isinstance(weight, Factors) == (weight.bits() < 8 * whole)
        assert isinstance(weight, Factors | Dense if grid is None else Factors | Grid)


@pytest.mark.parametrize(("block", "channels", "blocks"), [(0, 8, 1), (4, 8, 2), (3, 8, 2), (16, 3, 1), (16, 17, 1)])
def test_blocks_are_whole_channels(block, channels, blocks):
    method = DictionaryPairs(keep=0.5, block=block)
    assert method.blocks((5, 9 * channels), 9) == blocks
    w = matrix(5, 9 * channels)
    w[:, : 9 * channels // blocks] = 0  # the first block of channels alone
    weight = solved(DictionaryPairs(rank=1, block=block), w, taps=9).weight
    assert isinstance(weight, Factors)
    assert weight.axes == ("oc" if blocks == 1 else "obc")
    assert weight.sizes.get("b", 1) == blocks
    assert energy(weight.dense()[:, : 9 * channels // blocks]) == 0


def test_the_weight_is_the_pair_of_every_block():
    w = matrix(6, 20, seed=3)
    weight = solved(DictionaryPairs(rank=2, block=5), w).weight
    assert isinstance(weight, Factors)
    c, d = weight.tensor_of(0).double(), weight.tensor_of(1).double()
    each = [c[:, b] @ d[:, b] for b in range(4)]
    torch.testing.assert_close(weight.dense().double(), torch.cat(each, dim=1), atol=1e-7, rtol=1e-6)
    expected = [paper.best_error(w[:, 5 * b : 5 * b + 5].numpy(), 2) for b in range(4)]
    lost = [energy(w[:, 5 * b : 5 * b + 5] - each[b]) for b in range(4)]
    np.testing.assert_allclose(lost, expected, rtol=1e-3)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e7])
def test_fp16_holds_factors_of_any_size(scale):
    solution = solved(DictionaryPairs(rank=4), matrix(8, 12) * scale)
    assert isinstance(solution.weight, Factors)
    parts = solution.weight.parts
    assert all(isinstance(p, Dense) and p.values.dtype == torch.float16 for p in parts)
    exact = tails(spectrum(in_blocks(matrix(8, 12), 1)))
    assert solution.relative_error == pytest.approx(float(exact[4] / exact[0]), abs=1e-5)


def test_grids_cost_little_at_8_bits_and_refitting_gains_at_3():
    w = matrix(24, 60, decay=0.7)
    best = solved(DictionaryPairs(keep=0.5), w).relative_error
    assert solved(DictionaryPairs(keep=0.5, grid=GridSpec(8, True)), w).relative_error < best + 1e-3
    method = DictionaryPairs(keep=0.5, grid=GridSpec(3))
    c, d = pair(in_blocks(w, 1), method.rank_of((24, 60)))
    apart = method.coefficients(c, d).dense().double() @ method.dictionary(d, c).dense().double()
    assert solved(method, w).relative_error < 0.97 * energy(w - apart) / energy(w)


def test_least_squares():
    x, d = matrix(7, 12).reshape(7, 2, 6).transpose(0, 1), matrix(2, 12, seed=1).reshape(2, 2, 6)
    for b in range(2):
        expected = np.linalg.lstsq(d[b].T.numpy(), x[b].T.numpy(), rcond=None)[0].T
        np.testing.assert_allclose(coefficients_of(x, d)[b].numpy(), expected, rtol=1e-9, atol=1e-12)


def sharing(rows, cols, seed, noise):
    """Layers whose rows lie near the same few directions, scaled apart."""
    basis = matrix(4, cols, seed)
    return [
        (matrix(r, 4, seed + i) @ basis + noise * matrix(r, cols, seed + 50 + i)) * 10.0**i for i, r in enumerate(rows)
    ]


def members(weights, spec):
    return [Member.of(f"s{i // 2}.layer{i}", w, 1, spec) for i, w in enumerate(weights)]


def test_a_common_dictionary_is_the_optimum_of_all_rows_together():
    spec = DictionaryPairs(keep=0.5, share="network", block=6)
    own = members(sharing([8, 6, 10], 12, 0, 0.3), spec)
    fitted = fit(own, 3).dense().double().reshape(3, 2, 6)
    joined = torch.cat([m.x for m in own], dim=1)
    for b in range(2):
        _, s, v = torch.linalg.svd(joined[b])
        projector = torch.linalg.pinv(fitted[:, b]) @ fitted[:, b]
        torch.testing.assert_close(projector, v[:3].T @ v[:3], atol=2e-3, rtol=0)
        assert energy(joined[b] - joined[b] @ projector) == pytest.approx(float((s[3:] ** 2).sum()), rel=1e-3)
    assert all(m.x.norm() == pytest.approx(1.0) for m in own)


def test_layers_share_where_that_pays_and_not_elsewhere():
    spec = DictionaryPairs(keep=0.5, share="network")
    alike, apart = sharing([8, 8], 24, 0, 0.002), [matrix(8, 24, 7), matrix(8, 24, 8)]
    found = arranged(members(alike, spec))
    first, second = found["s0.layer0"].common, found["s0.layer1"].common
    assert first is not None
    assert first == second
    before = sum(spec.storage(tuple(w.shape)) for w in alike)
    after = sum(m.storage(tuple(w.shape)) for m, w in zip(found.values(), alike, strict=True))
    assert after + found["s0.layer0"].common_bytes <= before
    blocks = members([*alike, *apart], spec)
    for name, method in arranged(blocks).items():
        assert (method.common is not None) == (name[:2] == "s0"), name
    assert all(m.common is None for m in arranged(members(alike, DictionaryPairs(keep=0.5))).values())
    staged = arranged(
        [Member.of(f"t{i}.w", w, 1, DictionaryPairs(keep=0.5, share="stage")) for i, w in enumerate(alike)]
    )
    assert all(m.common is None for m in staged.values())
    other = arranged(members([*alike[:1], sharing([8], 22, 0, 0.002)[0]], spec))
    assert all(m.common is None for m in other.values()), "of other columns"


@pytest.mark.parametrize("noise", [0.002, 0.02, 1.0])
def test_sharing_at_an_error_keeps_it_with_the_fewest_atoms(noise):
    spec = DictionaryPairs(error=0.3, share="network")
    weights = sharing([9, 12], 14, 3, noise)
    own = members(weights, spec)
    found = arranged(own)
    apart = arranged(members(weights, DictionaryPairs(error=0.3)))
    alone = sum(m.storage(tuple(w.shape)) for m, w in zip(apart.values(), weights, strict=True))
    common = found["s0.layer0"].common
    assert (common is not None) == (noise < 1)
    if common is None:
        return
    size = (
        sum(m.storage(tuple(w.shape)) for m, w in zip(found.values(), weights, strict=True))
        + found["s0.layer0"].common_bytes
    )
    assert size < alone
    _, _, v = torch.linalg.svd(torch.cat([m.x[0] for m in own]))
    errors = [[float((m.x[0] - m.x[0] @ v[:k].T @ v[:k]).norm()) for k in range(13)] for m in own]
    assert common.rank == next(k for k in range(13) if all(e[k] <= 0.3 for e in errors))


@pytest.mark.parametrize("grid", [None, GridSpec(6)])
def test_members_hold_the_common_dictionary_and_fit_their_rows_to_it(grid):
    spec = DictionaryPairs(keep=0.5, share="network", grid=grid)
    weights = sharing([8, 8], 24, 0, 0.002)
    own = members(weights, spec)
    methods = arranged(own)
    common = methods["s0.layer0"].common
    assert common is not None
    part = fit(own, common.rank)
    assert part.bits() == 8 * methods["s0.layer0"].common_bytes
    for w, method in zip(weights, methods.values(), strict=True):
        placed = DictionaryPairs(0.5, grid=grid, rank=common.rank, common=type(common)(*_fields(common), part))
        weight = solved(placed, w).weight
        assert isinstance(weight, Factors)
        assert weight.parts[1] is part
        assert weight.shared == (1,)
        assert weight.bits() == 8 * method.storage(tuple(w.shape))
        d = part.dense().double()
        best = energy(w - w @ torch.linalg.pinv(d) @ d)
        assert energy(w - weight.dense()) < (1.01 if grid is None else 2.0) * best + 1e-6 * energy(w)


def _fields(common):
    return common.name, common.cols, common.blocks, common.rank


@pytest.mark.parametrize("grid", [None, GridSpec(4)])
def test_the_same_call_gives_the_same_bytes(grid):
    w = matrix(20, 45)
    method = DictionaryPairs(keep=0.5, grid=grid, block=15)
    one, two = (solved(method, w.clone()).weight.tensors() for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "need keep, error or rank"),
        ({"keep": 0.0}, "keep must be"),
        ({"keep": 1.5}, "keep must be"),
        ({"error": 1.0}, "error must be"),
        ({"keep": 0.5, "error": 0.1}, "exclude"),
        ({"rank": 0}, "rank must be"),
        ({"keep": 0.5, "block": -1}, "block must be"),
    ],
)
def test_wrong_settings(given, said):
    with pytest.raises(UsageError, match=said):
        DictionaryPairs(**given)
