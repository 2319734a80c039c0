import pytest
import torch

from featherweight._linalg import damped, damped_cholesky, inverse_factor
from featherweight.errors import SolveError
from featherweight.methods.pruning import refit
from tests.methods.problems import dependent, problem, weights
from tests.reference import obs as oracle
from tests.reference.moments import relative

SAME = 1e-10  # well conditioned float64


def test_damping_is_relative_to_the_mean_of_the_diagonal():
    gram = torch.tensor([[[1.0, 0.5], [0.5, 3.0]], [[100.0, 0.0], [0.0, 300.0]]], dtype=torch.float64)
    out = damped(gram, 0.1)
    assert out.tolist() == [[[1.2, 0.5], [0.5, 3.2]], [[120.0, 0.0], [0.0, 320.0]]]
    assert gram[0, 0, 0] == 1


def test_a_hessian_of_zeros_becomes_the_identity():
    gram = torch.stack([torch.zeros(3, 3), torch.eye(3) * 2]).double()
    assert torch.equal(damped(gram, 0.5), torch.stack([torch.eye(3), torch.eye(3) * 3]).double())
    assert torch.equal(damped(gram, 0.0), torch.stack([torch.eye(3), torch.eye(3) * 2]).double())


def test_the_factor_is_that_of_the_damped_hessian():
    _, stats = problem(4, 12, blocks=2)
    hessian, factor, used = damped_cholesky(stats.gram, 0.02)
    assert used == 0.02
    assert torch.equal(hessian, damped(stats.gram, 0.02))
    assert relative(factor @ factor.mT, hessian) < SAME
    assert torch.equal(factor, factor.tril())


@pytest.mark.parametrize("samples", [1, 2, 7, 15, 18, 19])
def test_dependent_inputs_are_always_damped(samples):
    """Rounding may let a factorisation pass where there is none."""
    for seed in range(40):
        gram = dependent(20, seed, samples).gram
        hessian, factor, used = damped_cholesky(gram, 0.0)
        assert used >= 1e-8
        assert torch.equal(hessian, damped(gram, used))
        inverse, upper = inverse_factor(factor)
        assert relative(inverse @ hessian, torch.eye(20, dtype=torch.float64)[None]) < 1e-4
        assert relative(upper.mT @ upper, inverse) < 1e-4


@pytest.mark.parametrize("make", ["dead", "twice"])
def test_a_dead_or_repeated_column_climbs_one_rung(make):
    x = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 4] = 0 if make == "dead" else 3 * x[:, 1]
    gram = (x.T @ x / 50)[None]
    assert damped_cholesky(gram, 0.0)[2] == 1e-8
    assert damped_cholesky(gram, 0.01)[2] == 0.01


def test_the_ladder_goes_on_until_it_holds():
    gram = torch.diag_embed(torch.tensor([[3.0, 1.0, -2e-5]], dtype=torch.float64))
    assert damped_cholesky(gram, 0.0)[2] == pytest.approx(1e-4)
    assert damped_cholesky(gram, 3e-6)[2] == pytest.approx(3e-5)


def test_one_bad_block_damps_all():
    _, stats = problem(4, 5)
    both = torch.cat([stats.gram, dependent(5, 0, 2).gram])
    assert damped_cholesky(both, 0.0)[2] == 1e-8


@pytest.mark.parametrize(
    "gram", [torch.full((1, 3, 3), torch.nan), -torch.eye(3)[None], torch.full((1, 3, 3), torch.inf)]
)
def test_what_no_damping_mends_is_an_error(gram):
    with pytest.raises(SolveError, match="positive definite"):
        damped_cholesky(gram.double(), 0.0)


def test_the_error_names_the_last_damping_that_was_tried():
    with pytest.raises(SolveError, match=r"damping 0\.01$"):
        damped_cholesky(-torch.eye(3, dtype=torch.float64)[None], 0.0)


@pytest.mark.parametrize("cols", [1, 2, 9])
def test_the_inverse_and_its_factor(cols):
    _, stats = problem(2, cols, blocks=2)
    inverse, upper = inverse_factor(torch.linalg.cholesky(stats.gram))
    assert relative(inverse, torch.linalg.inv(stats.gram)) < SAME
    assert relative(upper.mT @ upper, torch.linalg.inv(stats.gram)) < SAME
    assert torch.equal(upper, upper.triu())
    assert (upper.diagonal(dim1=1, dim2=2) > 0).all()


def test_refit_is_exact_least_squares_on_the_support():
    w, stats = problem(6, 9, seed=1)
    h = stats.gram[0]
    keep = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    keep[0], keep[1], keep[2, 1:] = True, False, False
    before = w.clone()
    v = refit(w, h[None], keep)
    for r in range(6):
        expected = torch.tensor(oracle.refit_row(w[r].numpy(), h.numpy(), keep[r].numpy()))
        assert torch.allclose(v[r], expected, rtol=SAME, atol=1e-14)
    assert torch.equal(v[0], w[0])
    assert not v[1].any()
    assert torch.equal(w, before)
    assert not (v * ~keep).any()


def test_no_other_weights_on_the_support_are_better():
    w, stats = problem(1, 9, seed=2)
    h, keep = stats.gram[0], torch.arange(9)[None] % 3 > 0
    v = refit(w, h[None], keep)
    best = oracle.loss(w[0].numpy(), h.numpy(), v[0].numpy())
    for seed in range(10):
        other = v + keep * weights(1, 9, seed) * 0.01
        assert oracle.loss(w[0].numpy(), h.numpy(), other[0].numpy()) > best
