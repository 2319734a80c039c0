"""Move each layer's statistics back to where the dense network has them, walking the compressed network in order.

With BatchNorm (after Sun et al., "Unified Two-Stage Framework", Pattern Recognition 140, 2023, whose Dynamic BN resets
the statistics): running mean += mean here - mean in the dense network, running variance *= variance here / variance in
the dense network, both on the same images. Difference: the correction is relative, because the statistics of plain
images are not those of the augmented images a network was trained on, and setting those breaks even the dense network.

Without BatchNorm the mean of each layer's output is kept: bias += W mean(x) - V mean(y), with x the layer's inputs in
the dense network, y here, W and V the dense and the stored weight; and where a norm has a shift of its own, its mean.

"In order" means one pass of all samples together: a layer is corrected just before it runs, so later layers already
see it corrected. Correcting all layers at once and repeating does not converge.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from featherweight.calls import Calls, Inputs, eager
from featherweight.data import Batch, hooked, split, stacked
from featherweight.errors import UsageError
from featherweight.layers import Unit
from featherweight.repair.distance import DenseOutputs

RATIO = 4.0  # a variance is changed by at most this factor


@final
@dataclass(frozen=True, slots=True)
class Repair:
    """What was tried and what came of it. kind: 'batchnorm', 'mean' or 'none'. before, after: distance to the dense
    outputs on samples that the correction did not see. sites: layers corrected. note: what was left out, or why."""

    kind: str
    applied: bool
    before: float | None
    after: float | None
    sites: int
    samples: int
    note: str = ""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """The dense network on fixed samples, run once: what any compressed copy of it is corrected towards and judged by.

    correct: moves a copy's statistics in place. sites, samples, note: see Repair; failed: why nothing can be corrected.
    outputs: on samples that no correction sees, None where the data cannot be cut.
    """

    kind: str
    outputs: DenseOutputs | None
    correct: Callable[[nn.Module], None]
    sites: int = 0
    samples: int = 0
    note: str = ""
    failed: str = ""

    @classmethod
    def of(cls, dense: nn.Module, data: Sequence[Batch], units: Sequence[Unit], most: int | None = None) -> "Reference":
        """Three quarters of the data are used to correct, `most` samples at most, the rest to judge."""
        correcting, judging = split(data)
        outputs = DenseOutputs.of(dense, judging) if judging else None
        tracked = [n for n, m in dense.named_modules() if _is_tracked(m)]
        try:
            stack, note = stacked(correcting, dense, most)
            sites, found, correct = _batchnorm(dense, stack, tracked) if tracked else _mean(dense, stack, units)
        except (UsageError, RuntimeError) as error:  # a network that works on single batches may refuse a joined one
            return cls("none", outputs, _nothing, failed=f"the network does not accept joined batches: {error}"[:200])
        if found > sites:
            left = f"{found - sites} more run not just once in a pass and were left alone"
            note = "; ".join([note] * bool(note) + [left])
        if not sites:
            failed = note or "no BatchNorm, no bias, no shift to correct"
            return cls("none", outputs, _nothing, samples=stack.size, failed=failed)
        return cls("batchnorm" if tracked else "mean", outputs, correct, sites, stack.size, note)

    def repair(self, model: nn.Module) -> Repair:
        """Correct `model` in place, or leave it as it was where that would not bring its outputs closer."""
        if self.outputs is None:
            cause = "the data cannot be cut in two parts, one to correct and one to judge"
            return Repair("none", False, None, None, 0, 0, cause)
        before = self.outputs.distance(model)
        if math.isnan(before):
            return Repair("none", False, None, None, 0, 0, "outputs hold NaN or vary in shape: nothing to judge by")
        if self.failed:
            return Repair("none", False, before, None, 0, self.samples, self.failed)
        saved = {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
        self.correct(model)
        after = self.outputs.distance(model)
        applied = after <= before  # false for NaN, too
        if not applied:
            model.load_state_dict(saved, strict=False)
        return Repair(
            self.kind, applied, before, None if math.isnan(after) else after, self.sites, self.samples, self.note
        )


def repair(dense: nn.Module, model: nn.Module, data: Sequence[Batch], units: Sequence[Unit]) -> Repair:
    """`Reference.of(dense, data, units).repair(model)`, for one copy."""
    return Reference.of(dense, data, units).repair(model)


def _nothing(_model: nn.Module) -> None:
    pass


def _is_tracked(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None


# ---------------------------------------------------------------- with BatchNorm
def _batchnorm(dense: nn.Module, batch: Batch, norms: Sequence[str]) -> tuple[int, int, Callable[[nn.Module], None]]:
    """How many can be corrected, those that run once in a forward pass; how many there are; and the correction."""
    original = dict(dense.named_modules())
    wanted: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in norms}

    def observe(name: str) -> Callable[..., None]:
        return lambda _module, args, kwargs: wanted[name].append(_moments(args[0] if args else kwargs["input"]))

    def move(name: str) -> Callable[..., None]:
        running = original[name].running_mean.clone(), original[name].running_var.clone()  # pyright: ignore

        def hook(module: Any, args: Any, kwargs: Any) -> None:
            mean, variance = _moments(args[0] if args else kwargs["input"])
            dense_mean, dense_variance = wanted[name][0]
            ratio = torch.where(dense_variance > 0, variance / dense_variance, 1.0).clamp(1 / RATIO, RATIO)
            module.running_mean.copy_(running[0] + mean - dense_mean)
            module.running_var.copy_(running[1] * ratio)

        return hook

    with torch.no_grad(), hooked([original[n].register_forward_pre_hook(observe(n), with_kwargs=True) for n in norms]):
        batch.run(dense)
    once = [n for n in norms if len(wanted[n]) == 1]
    moves = {n: move(n) for n in once}

    def correct(model: nn.Module) -> None:
        modules = dict(model.named_modules())
        with torch.no_grad():
            with hooked([modules[n].register_forward_pre_hook(moves[n], with_kwargs=True) for n in once]):
                batch.run(model)

    return len(once), len(norms), correct


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel (dimension 1)."""
    dims = tuple(d for d in range(x.ndim) if d != 1)
    mean = x.mean(dim=dims)  # torch.var_mean is ten times slower than this
    return mean, (x - mean.view(-1, *[1] * (x.ndim - 2))).square_().mean(dim=dims)


# ---------------------------------------------------------------- without
def _mean(dense: nn.Module, batch: Batch, units: Sequence[Unit]) -> tuple[int, int, Callable[[nn.Module], None]]:
    """How many layers can be corrected, those with a bias or shift that run once in a forward pass; how many have one;
    and the correction."""
    original = dict(dense.named_parameters())
    chosen = [u for u in units if _bias(u.name, original) is not None]
    wanted: dict[str, list[Tensor]] = {}

    def observe(unit: Unit, inputs: Inputs | Tensor) -> None:
        if not isinstance(inputs, Tensor):
            wanted.setdefault(unit.name, []).append(_output_mean(unit, original[unit.name], inputs))

    shifted = [n for n, m in dense.named_modules() if _has_shift(m)]
    shifts: dict[str, list[Tensor]] = {name: [] for name in shifted}
    modules = dict(dense.named_modules())

    def observe_norm(name: str) -> Callable[..., None]:
        return lambda module, _args, out: shifts[name].append(_channel_mean(module, out))

    def correct_norm(name: str) -> Callable[..., Tensor | None]:
        def hook(module: Any, _args: Any, out: Tensor) -> Tensor | None:
            if len(shifts[name]) != 1:
                return None
            change = shifts[name][0] - _channel_mean(module, out)
            module.bias.add_(change)
            return out + (change if isinstance(module, nn.LayerNorm) else change.view(-1, *[1] * (out.ndim - 2)))

        return hook

    def correct(model: nn.Module) -> None:
        parameters, own = dict(model.named_parameters()), dict(model.named_modules())

        def add(unit: Unit, inputs: Inputs | Tensor) -> None:
            if not isinstance(inputs, Tensor) and len(wanted.get(unit.name, ())) == 1:
                bias = _bias(unit.name, parameters)
                assert bias is not None
                bias.add_(wanted[unit.name][0] - _output_mean(unit, parameters[unit.name], inputs))

        with torch.no_grad(), hooked([own[n].register_forward_hook(correct_norm(n)) for n in shifted]):
            with eager(), Calls(model, chosen, add):
                batch.run(model)

    with torch.no_grad(), hooked([modules[n].register_forward_hook(observe_norm(n)) for n in shifted]):
        with eager(), Calls(dense, chosen, observe):
            batch.run(dense)
    sites = sum(len(v) == 1 for v in (*wanted.values(), *shifts.values()))
    return sites, len(chosen) + len(shifts), correct


def _bias(weight: str, parameters: dict[str, nn.Parameter]) -> nn.Parameter | None:
    """The bias that is added to what this weight gives, by torch's naming."""
    path, _, leaf = weight.rpartition(".")
    name = {"in_proj_weight": "in_proj_bias"}.get(leaf, leaf.replace("weight", "bias", 1))
    return parameters.get(f"{path}.{name}" if path else name) if name != leaf else None


def _output_mean(unit: Unit, weight: Tensor, inputs: Inputs) -> Tensor:
    """W mean(x), (rows,), of the weight's own dtype."""
    cols = unit.view.matrix_shape[1]
    total = torch.zeros(unit.groups, cols, dtype=torch.float64, device=weight.device)
    count = torch.zeros(unit.groups, 1, dtype=torch.float64, device=weight.device)
    for block, x in inputs:
        total[block : block + x.shape[0]] += x.sum(dim=2).double()
        count[block : block + x.shape[0]] += x.shape[2]
    mean = total / count.clamp(min=1)
    matrix = unit.view.matrix(weight).double().reshape(unit.groups, -1, cols)
    return (matrix @ mean[:, :, None]).reshape(-1).to(weight.dtype)


def _has_shift(module: nn.Module) -> bool:
    kinds = (nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
    shift = getattr(module, "bias", None)
    return isinstance(module, kinds) and isinstance(shift, Tensor) and shift.ndim == 1


def _channel_mean(module: nn.Module, out: Tensor) -> Tensor:
    """Mean of each entry of the module's shift: the last dimension for LayerNorm, dimension 1 elsewhere."""
    channel = out.ndim - 1 if isinstance(module, nn.LayerNorm) else 1
    return out.mean(dim=[d for d in range(out.ndim) if d != channel])
