import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight._linalg import damped
from featherweight.errors import UsageError
from featherweight.methods import Gptq, GridSpec, Magnitude, Obq, Obs, PruneQuantize, Rtn, Status, Unstructured
from featherweight.methods.base import output_energy
from featherweight.methods.patterns import removals
from featherweight.methods.pruning import global_step, support
from featherweight.methods.traces import trace
from featherweight.stats import LayerStats
from tests.methods.problems import dependent, problem, row_hessians, weights
from tests.reference import obs as oracle

SAME = 1e-10  # the same float64 numbers by another route, on well conditioned problems
SUMS = 1e-9  # sums of up to 20 such numbers


def traced(w, hessian, steps=None):
    """Order and losses of all rows under one Hessian."""
    found = trace(w, torch.linalg.inv(hessian), w.shape[1] if steps is None else steps)
    return found.order.numpy(), found.losses.numpy()


def parts_of(pruned):
    return pruned.weights, pruned.keep, pruned.damp


@pytest.mark.parametrize("cols", [1, 2, 3, 4, 5, 6, 9, 14, 21])
def test_the_trace_is_that_of_explicit_inverses(cols):
    w, stats = problem(4, cols, seed=cols)
    order, losses = traced(w, stats.gram[0])
    for r in range(4):
        expected, expected_losses, _ = oracle.prune_row(w[r].numpy(), stats.gram[0].numpy(), cols)
        assert order[r].tolist() == expected
        np.testing.assert_allclose(losses[r], expected_losses, rtol=SAME)


@pytest.mark.parametrize("steps", [0, 1, 5, 8])
def test_a_shorter_trace_is_the_beginning_of_the_whole_one(steps):
    w, stats = problem(3, 9, seed=1)
    order, losses = traced(w, stats.gram[0])
    begun, begun_losses = traced(w, stats.gram[0], steps)
    assert begun.shape == begun_losses.shape == (3, steps)
    assert np.array_equal(begun, order[:, :steps])
    assert np.array_equal(begun_losses, losses[:, :steps])


def test_step_losses_add_up_to_the_loss_of_the_exact_refit():
    w, stats = problem(3, 20, seed=2)
    h = stats.gram[0].numpy()
    order, losses = traced(w, stats.gram[0])
    for r, row in enumerate(w.numpy()):
        for step in range(21):
            keep = ~np.isin(np.arange(20), order[r, :step])
            refit = oracle.loss(row, h, oracle.refit_row(row, h, keep))
            assert 2 * losses[r, :step].sum() == pytest.approx(refit, rel=SUMS, abs=1e-14)


def test_a_row_is_traced_alike_in_any_company():
    w, stats = problem(12, 30, seed=3)
    order, losses = traced(w, stats.gram[0])
    alone, alone_losses = traced(w[5:6], stats.gram[0])
    assert np.array_equal(order[5], alone[0])
    assert np.array_equal(losses[5], alone_losses[0])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_cheapest_next_steps_are_taken(data):
    """Losses that rise and fall within a row, and ties."""
    rows, steps = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    losses = data.draw(
        st.lists(st.lists(st.integers(0, 6), min_size=steps, max_size=steps), min_size=rows, max_size=rows)
    )
    count = data.draw(st.integers(0, rows * steps))
    assert global_step(torch.tensor(losses, dtype=torch.float64), count).tolist() == oracle.cheapest(losses, count)


def test_the_support_lacks_the_first_removals_of_each_row():
    order = torch.tensor([[2, 0, 1], [1, 2, 0], [0, 1, 2]])
    keep = support(order, torch.tensor([1, 3, 0]), 3)
    assert keep.tolist() == [[True, True, False], [False, False, False], [True, True, True]]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("blocks", [1, 3])
def test_obs_is_trace_heap_and_refit(blocks, sparsity):
    w, stats = problem(6, 10, seed=4, blocks=blocks)
    weights_, keep, damp = parts_of(Obs(Unstructured(sparsity), damp=0.01).prune(w, stats))
    assert damp == 0.01
    hessian = damped(stats.gram, 0.01)
    traces = [oracle.prune_row(w[r].numpy(), h.numpy(), 10) for r, h in row_hessians(w, hessian)]
    taken = oracle.cheapest([losses for _, losses, _ in traces], round(60 * sparsity))
    for r, h in row_hessians(w, hessian):
        expected = ~np.isin(np.arange(10), traces[r][0][: taken[r]])
        assert keep[r].tolist() == expected.tolist()
        refit = oracle.refit_row(w[r].numpy(), h.numpy(), expected)
        np.testing.assert_allclose(weights_[r], refit, rtol=SAME, atol=1e-14)
        _, _, pruned = oracle.prune_row(w[r].numpy(), h.numpy(), taken[r])  # OBS arrives at the same weights
        np.testing.assert_allclose(weights_[r], pruned, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("seed", range(2))
def test_no_mask_beats_brute_force_and_obs_comes_close(seed):
    w, stats = problem(3, 6, seed=seed)
    best = oracle.best_losses(w.numpy(), stats.gram[0].numpy())
    found, refitted = [], []
    for count in range(19):
        v, keep, _ = parts_of(Obs(Unstructured(min(count / 18, 0.999)), damp=0.0).prune(w, stats))
        assert int((~keep).sum()) == count
        found.append(output_energy(v - w, stats))
        own = [oracle.refit_row(a.numpy(), stats.gram[0].numpy(), k.numpy()) for a, k in zip(w, keep, strict=True)]
        own_loss = output_energy(torch.tensor(np.stack(own)) - w, stats)
        assert found[-1] == pytest.approx(own_loss, rel=SUMS, abs=1e-14)
        _, largest, _ = parts_of(Magnitude(Unstructured(min(count / 18, 0.999))).prune(w, stats))
        own = [oracle.refit_row(a.numpy(), stats.gram[0].numpy(), k.numpy()) for a, k in zip(w, largest, strict=True)]
        refitted.append(output_energy(torch.tensor(np.stack(own)) - w, stats))
    assert all(f >= b * (1 - SUMS) - 1e-14 for f, b in zip(found, best, strict=True))
    assert all(m >= b * (1 - SUMS) - 1e-14 for m, b in zip(refitted, best, strict=True))
    assert found[:2] == pytest.approx(best[:2], rel=SUMS, abs=1e-14)  # one removal is exact
    assert sum(found) <= 1.1 * sum(best)
    assert sum(found) < sum(refitted)


def test_obs_beats_magnitude_on_larger_layers():
    for seed in range(3):
        w, stats = problem(16, 40, seed=seed)
        for sparsity in (0.3, 0.6, 0.9):
            assert (
                Obs(Unstructured(sparsity)).solve(w, stats).error
                < 0.7 * Magnitude(Unstructured(sparsity)).solve(w, stats).error
            )


def test_without_correlation_obs_is_magnitude():
    w = weights(7, 11, seed=0)
    for sparsity in (0.2, 0.5, 0.8):
        v, keep, _ = parts_of(Obs(Unstructured(sparsity)).prune(w, LayerStats.white(11)))
        expected, largest, _ = parts_of(Magnitude(Unstructured(sparsity)).prune(w, LayerStats.white(11)))
        assert torch.equal(keep, largest)
        assert torch.allclose(v, expected, rtol=1e-12, atol=0)


def test_magnitude_removes_the_smallest_of_the_layer():
    w = torch.tensor([[3.0, -1.0, 0.5], [-4.0, 2.0, -0.25]])
    v, keep, damp = parts_of(Magnitude(Unstructured(0.5)).prune(w, LayerStats.white(3)))
    assert v.tolist() == [[3, 0, 0], [-4, 2, 0]]
    assert keep.tolist() == [[True, False, False], [True, True, False]]
    assert damp == 0


def test_rows_that_are_seldom_used_are_pruned_first():
    w, stats = problem(4, 6, seed=5)
    share = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    seldom = LayerStats(stats.gram, stats.mean, stats.samples, share)
    _, keep, _ = parts_of(Obs(Unstructured(0.5), damp=0.01).prune(w, seldom))
    assert not keep[3].any()
    traces = [oracle.prune_row(w[r].numpy(), h.numpy(), 6) for r, h in row_hessians(w, damped(stats.gram, 0.01))]
    weighted = [[float(s) * x for x in losses] for s, (_, losses, _) in zip(share, traces, strict=True)]
    assert (~keep).sum(dim=1).tolist() == oracle.cheapest(weighted, 12)


@pytest.mark.parametrize(
    ("count", "sparsity", "expected"), [(10, 0.25, 2), (1, 0.9, 1), (1, 0.5, 0), (7, 0.99, 7), (9, 0, 0)]
)
def test_removals(count, sparsity, expected):
    assert removals(Unstructured(sparsity), (count, 1), 1, 1) == expected


def test_values_are_stored_in_half_precision_unless_that_loses_them():
    w, stats = problem(4, 8)
    for scale, expected in ((1.0, torch.float16), (1e6, torch.float32), (1e-9, torch.float32)):
        solution = Obs(Unstructured(0.5)).solve(w * scale, stats)
        assert solution.weight.values.values.dtype == expected
        assert solution.relative_error == pytest.approx(Obs(Unstructured(0.5)).solve(w, stats).relative_error, rel=1e-2)


@pytest.mark.parametrize("samples", [3, 15, 19])
def test_a_dependent_hessian_is_damped_and_that_is_said(samples):
    for seed in range(8):
        w, stats = weights(3, 20, seed), dependent(20, seed, samples)
        solution = Obs(Unstructured(0.5), damp=0.0).solve(w, stats)
        assert solution.status is Status.DAMPED
        assert 1e-8 <= solution.info["damp"] <= 1e-6
        assert solution.relative_error < 0.5


# ---------------------------------------------------------------- prune, then quantize
@pytest.mark.parametrize(
    "quantize", [Gptq(GridSpec(3)), Obq(GridSpec(3)), Obq(GridSpec(3, group=5)), Gptq(GridSpec(3, True, 0))]
)
@pytest.mark.parametrize(
    "prune", [Magnitude(Unstructured(0.5)), Obs(Unstructured(0.5)), Obs(Unstructured(0.0)), Obs(Unstructured(0.99))]
)
def test_the_support_is_the_pruners_and_quantizing_costs_more(prune, quantize):
    w, stats = problem(6, 12, seed=6, blocks=2)
    _, keep, _ = parts_of(prune.prune(w, stats))
    joint = PruneQuantize(prune, quantize).solve(w, stats)
    assert torch.equal(joint.weight.mask, keep)
    refit = [oracle.refit_row(w[r].numpy(), h.numpy(), keep[r].numpy()) for r, h in row_hessians(w, stats.gram)]
    assert joint.error >= output_energy(torch.tensor(np.stack(refit)) - w, stats) * (1 - SUMS)
    assert joint.info["damp"] == max(prune.damp, quantize.damp)


def test_obs_with_obq_beats_magnitude_with_gptq():
    for seed in range(3):
        w, stats = problem(16, 40, seed=seed)
        ours = PruneQuantize(Obs(Unstructured(0.5)), Obq(GridSpec(3))).solve(w, stats)
        plain = PruneQuantize(Obs(Unstructured(0.5)), Gptq(GridSpec(3))).solve(w, stats)
        simple = PruneQuantize(Magnitude(Unstructured(0.5)), Gptq(GridSpec(3))).solve(w, stats)
        assert ours.error < plain.error < simple.error
        assert ours.weight.bits() == plain.weight.bits() == simple.weight.bits()
        assert ours.weight.bits() < 8 * Rtn(GridSpec(3)).storage((16, 40))


@pytest.mark.parametrize("damps", [(0.05, 0.01), (0.01, 0.05)])
def test_the_larger_damping_is_recorded(damps):
    method = PruneQuantize(Obs(Unstructured(0.5), damp=damps[0]), Gptq(GridSpec(4), damp=damps[1]))
    assert method.solve(*problem(4, 8)).info == {"damp": 0.05}


@pytest.mark.parametrize(
    ("prune", "quantize"),
    [
        (Obs(Unstructured(0.5), damp=0.0), Gptq(GridSpec(4))),
        (Obs(Unstructured(0.5)), Gptq(GridSpec(4), damp=0.0)),
        (Magnitude(Unstructured(0.5)), Obq(GridSpec(4), 0.0)),
    ],
)
def test_damping_in_either_step_is_said(prune, quantize):
    solution = PruneQuantize(prune, quantize).solve(weights(4, 20, 0), dependent(20, 0, 10))
    assert solution.status is Status.DAMPED
    assert solution.info["damp"] >= 1e-8


@pytest.mark.parametrize("sparsity", [1, 1.0, -0.1, float("nan"), 2])
@pytest.mark.parametrize("method", [Magnitude, Obs])
def test_impossible_sparsities_are_refused(method, sparsity):
    with pytest.raises(UsageError, match="sparsity"):
        method(Unstructured(sparsity))
