import numpy as np
import pytest
import torch

from featherweight._linalg import damped
from featherweight.errors import UsageError
from featherweight.methods import Additive, GridSpec, Magnitude, Obq, PruneQuantize, Unstructured, Vectors
from featherweight.methods import books as fitting
from featherweight.methods.books import Books, fit, least_squares, vectors_of
from featherweight.methods.vectors import Layer, descend, encode, first_codes, fitted, nearest
from featherweight.weights import Codebook, Sparse
from tests.methods.problems import problem, row_hessians
from tests.reference import additive as oracle


def words(sizes, d, seed=0):
    make = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, d, generator=make, dtype=torch.float64).half() for n in sizes)


def layer_of(rows, cols, d, blocks=1, seed=0, taps=1, keep=None):
    w, stats = problem(rows, cols, seed=seed, blocks=blocks)
    return Layer.of(w, w, damped(stats.gram, 0.01), d, taps, keep)


def each_row(layer, scale, books):
    """(row, Hessian, scale, books) as the oracle takes them."""
    numbers = [b.double().numpy() for b in books]
    return [(layer.w[r].numpy(), h.numpy(), float(scale[r]), numbers) for r, h in row_hessians(layer.w, layer.hessian)]


CASES = [
    pytest.param(3, 6, 2, (4,), 1, id="one-book"),
    pytest.param(4, 6, 3, (2, 4), 2, id="two-books-two-blocks"),
    pytest.param(3, 5, 2, (4,), 1, id="short-last-vector"),
    pytest.param(2, 3, 4, (4, 2), 1, id="vector-longer-than-the-row"),
    pytest.param(2, 4, 1, (8,), 1, id="single-entries"),
]


@pytest.mark.parametrize(("rows", "cols", "d", "sizes", "blocks"), [c for c in CASES if len(c.values[3]) == 1])
def test_feedback_is_solving_the_rest_after_each_vector(rows, cols, d, sizes, blocks):
    books = words(sizes, d)
    layer, scale = layer_of(rows, cols, d, blocks), torch.linspace(0.05, 0.2, rows, dtype=torch.float64)
    codes = first_codes(layer, scale, books, 1)
    for r, row in enumerate(each_row(layer, scale, books)):
        assert codes[r].tolist() == [list(c) for c in oracle.feedback_row(*row)]


@pytest.mark.parametrize(("rows", "cols", "d", "sizes", "blocks"), CASES)
def test_with_all_beginnings_kept_the_best_row_is_found(rows, cols, d, sizes, blocks):
    books = words(sizes, d, seed=1)
    layer, scale = layer_of(rows, cols, d, blocks, seed=1), torch.linspace(0.05, 0.2, rows, dtype=torch.float64)
    codes = first_codes(layer, scale, books, int(np.prod(sizes)) ** -(-cols // d))
    errors = layer.errors(scale, codes, books)
    for r, row in enumerate(each_row(layer, scale, books)):
        assert float(errors[r]) == pytest.approx(oracle.best_row(*row)[0], rel=1e-10)


def test_more_beginnings_are_better():
    layer, books = layer_of(32, 24, 4), words((16,), 4)
    scale = torch.full((32,), 0.1, dtype=torch.float64)
    lost = [float(layer.errors(scale, first_codes(layer, scale, books, n), books).sum()) for n in (1, 4, 32)]
    assert lost[0] > lost[1] > lost[2]


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize(("rows", "cols", "d", "sizes", "blocks"), CASES)
def test_the_descent_ends_where_no_single_vector_can_improve(rows, cols, d, sizes, blocks, pruned):
    books = words(sizes, d, seed=2)
    keep = torch.rand(rows, cols, generator=torch.Generator().manual_seed(3)) < 0.7 if pruned else None
    layer, scale = layer_of(rows, cols, d, blocks, seed=2, keep=keep), torch.linspace(0.05, 0.2, rows).double()
    start = nearest(layer, scale, books)
    codes = descend(layer, scale, books, start, sweeps=50)
    errors, before = layer.errors(scale, codes, books), layer.errors(scale, start, books)
    assert (errors <= before * (1 + 1e-12)).all()
    exhaustive = len(sizes) == 1  # sums of several words are searched, not all tried
    for v in range(codes.shape[1]):
        for own, _ in oracle.sums([b.numpy() for b in books]) if exhaustive else ():
            other = codes.clone()
            other[:, v] = torch.tensor(own, dtype=torch.int32)
            assert (layer.errors(scale, other, books) >= errors * (1 - 1e-10)).all()


def test_a_scale_is_the_best_one():
    layer, books = layer_of(5, 12, 4), words((8, 4), 4)
    scale = torch.full((5,), 0.1, dtype=torch.float64)
    codes = first_codes(layer, scale, books, 4)
    best = fitted(layer, scale, books, codes)
    lost = layer.errors(best, codes, books)
    for factor in (0.999, 1.001):
        assert (layer.errors(best * factor, codes, books) > lost).all()


@pytest.mark.parametrize("sizes", [(4,), (4, 2)])
def test_the_words_are_the_least_squares_answer_of_all_layers(monkeypatch, sizes):
    monkeypatch.setattr(fitting, "STEPS", 500)
    monkeypatch.setattr(fitting, "EXACT", 1e-28)
    monkeypatch.setattr(fitting, "RIDGE", 0.0)
    books = words(sizes, 3, seed=4)
    layers = [layer_of(6, 7, 3, seed=5), layer_of(4, 9, 3, blocks=1, seed=6)]
    scales = [torch.linspace(0.1, 0.3, len(x.w), dtype=torch.float64) for x in layers]
    codes = [first_codes(x, s, books, 2) for x, s in zip(layers, scales, strict=True)]
    found = torch.cat(least_squares(layers, [1.0, 0.5], scales, codes, books)).numpy()
    own = [
        (x.w.numpy(), x.hessian[0].numpy(), s.numpy(), c.tolist(), weight)
        for x, s, c, weight in zip(layers, scales, codes, (1.0, 0.5), strict=True)
    ]
    best, a, b = oracle.best_words(own, [w.double().numpy() for w in books])
    quadratic = lambda x: float(x.reshape(-1) @ a @ x.reshape(-1) - 2 * b @ x.reshape(-1))  # noqa: E731
    assert quadratic(found) == pytest.approx(quadratic(best), rel=1e-10)


def test_fitted_books_do_better_than_those_they_start_from(monkeypatch):
    layers = [layer_of(16, 24, 4, seed=7), layer_of(8, 36, 4, seed=8)]

    def lost(rounds):
        monkeypatch.setattr(fitting, "ROUNDS", rounds)
        books = fit(layers, Vectors(4, (4,)))
        assert all(b.dtype == torch.float16 for b in books.words)
        pairs = [(x, *encode(x, books.words, 1, torch.float16)) for x in layers]
        return sum(float(x.errors(s, c, books.words).sum() / x.energy(x.w).sum()) for x, s, c in pairs)

    assert lost(4) < 0.97 * lost(0)


def test_books_do_not_depend_on_the_number_of_threads_and_repeat():
    layers, cut = [layer_of(16, 24, 4, seed=9)], Vectors(4, (4,))
    once, again = fit(layers, cut), fit(layers, cut)
    assert all(torch.equal(a, b) for a, b in zip(once.words, again.words, strict=True))


def test_it_beats_scalar_grids_of_the_same_bits():
    w, stats = problem(48, 64, seed=10)
    vectors = Additive(Vectors(4, (8,))).solve(w, stats)  # with books of its own
    grid = Obq(GridSpec(2)).solve(w, stats)
    assert vectors.error < 0.88 * grid.error
    assert vectors.weight.bits() < grid.weight.bits()
    assert isinstance(vectors.weight, Codebook)


def test_a_row_of_zeros_and_a_column_without_input():
    w, stats = problem(6, 10, seed=11)
    w[2] = 0
    stats.gram[:, 4], stats.gram[:, :, 4] = 0, 0
    solution = Additive(Vectors(3, (3,))).solve(w, stats)
    assert torch.isfinite(solution.weight.dense()).all()
    assert (solution.weight.dense()[2] == 0).all()


def test_pruned_weights_keep_their_zeros():
    w, stats = problem(12, 20, seed=12)
    method = PruneQuantize(Magnitude(Unstructured(0.5)), Additive(Vectors(2, (4,))))
    solution = method.solve(w, stats)
    assert isinstance(solution.weight, Sparse)
    assert isinstance(solution.weight.values, Codebook)
    pruned = Magnitude(Unstructured(0.5)).prune(w, stats)
    assert torch.equal(solution.weight.dense() != 0, pruned.keep & (solution.weight.dense() != 0))
    assert torch.equal(solution.weight.mask, pruned.keep)
    bare = PruneQuantize(Magnitude(Unstructured(0.5)), Obq(GridSpec(2))).solve(w, stats)
    assert solution.error < bare.error


def test_neighbouring_channels_and_neighbouring_taps_are_two_ways_to_cut():
    w, stats = problem(8, 18, seed=13)
    stats = type(stats)(stats.gram, stats.mean, stats.samples, taps=9)
    taps, channels = (Additive(Vectors(2, (5,), channels=c)).solve(w, stats) for c in (False, True))
    assert isinstance(taps.weight, Codebook)
    assert isinstance(channels.weight, Codebook)
    assert (taps.weight.taps, channels.weight.taps) == (1, 9)
    for solution in (taps, channels):
        assert solution.relative_error < 0.1


@pytest.mark.parametrize(
    ("rate", "weights", "expected"),
    [
        (2, 270_000, Vectors(4, (8,))),
        (2, 3_000, Vectors(1, (2,))),
        (2, 10_000, Vectors(2, (4,))),
        (3, 270_000, Vectors(3, (9,))),
        (3, 5_000_000, Vectors(4, (12,))),
        (2.33, 270_000, Vectors(3, (7,))),
        (1.5, 270_000, Vectors(4, (6,))),
        (4, 100, Vectors(1, (4,))),
    ],
)
def test_vectors_are_as_long_as_their_book_is_worth(rate, weights, expected):
    assert vectors_of(rate, weights) == expected
    assert vectors_of(rate, weights).rate == pytest.approx(rate, abs=0.01)


def test_a_rate_that_no_vector_has():
    with pytest.raises(UsageError, match=r"2\.11 bits a weight; try"):
        vectors_of(2.11, 1000)


def test_given_books_are_used_as_they_are():
    w, stats = problem(6, 8, seed=14)
    books = words((16,), 4)
    solution = Additive(Vectors(4, (4,)), books=Books(books)).solve(w, stats)
    assert isinstance(solution.weight, Codebook)
    assert solution.weight.books[0] is books[0]
    assert solution.weight.bits() // 8 == Additive(Vectors(4, (4,))).storage((6, 8))
