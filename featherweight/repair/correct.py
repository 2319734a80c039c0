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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor, nn

from featherweight.calls import Calls, Inputs, eager
from featherweight.data import Batch, device_of
from featherweight.errors import UsageError
from featherweight.layers import Unit
from featherweight.repair.distance import output_distance

SAMPLES = 1024  # at most, for the pass in order
MEMORY = 4 << 30  # bytes that the pass may take, estimated
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


def repair(dense: nn.Module, model: nn.Module, data: Sequence[Batch], units: Sequence[Unit]) -> Repair:
    """Correct `model` in place, or leave it as it was where that would not bring its outputs closer to the dense ones.

    Three quarters of the data are used to correct, the rest to judge.
    """
    correcting, judging = split(data)
    if not judging:
        return Repair(
            "none", False, None, None, 0, 0, "the data cannot be cut in two parts, one to correct and one to judge"
        )
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    before = output_distance(dense, model, judging)
    if math.isnan(before):
        return Repair("none", False, None, None, 0, 0, "outputs hold NaN or vary in shape: nothing to judge by")
    tracked = {n: m for n, m in model.named_modules() if _is_tracked(m)}
    kind = "batchnorm" if tracked else "mean"
    try:
        stack, note = stacked(correcting, dense)
        sites, found = _batchnorm(dense, model, stack, tracked) if tracked else _mean(dense, model, stack, units)
    except (UsageError, RuntimeError) as error:  # a network that works on single batches may refuse a joined one
        model.load_state_dict(saved, strict=False)
        return Repair("none", False, before, None, 0, 0, f"the network does not accept joined batches: {error}"[:200])
    if found > sites:
        note = "; ".join(
            [note] * bool(note) + [f"{found - sites} more run not just once in a pass and were left alone"]
        )
    if not sites:
        return Repair("none", False, before, None, 0, stack.size, note or "no BatchNorm, no bias, no shift to correct")
    after = output_distance(dense, model, judging)
    applied = after <= before  # false for NaN, too
    if not applied:
        model.load_state_dict(saved, strict=False)
    return Repair(kind, applied, before, None if math.isnan(after) else after, sites, stack.size, note)


def _is_tracked(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None


def split(data: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """The first three quarters and the last quarter of the samples; batches are cut where there are fewer than four."""
    parts = list(data)
    if len(parts) < 4:
        parts = [piece for batch in parts for piece in _cut(batch)]
    judged = -(-len(parts) // 4) if len(parts) > 1 else 0
    return parts[: len(parts) - judged], parts[len(parts) - judged :]


def _cut(batch: Batch) -> list[Batch]:
    """Four pieces, or fewer for a small batch."""
    size = batch.size
    if not all(_sliceable(v, size) for v in (*batch.args, *batch.kwargs.values())):
        return [batch]
    edges = sorted({round(i * size / 4) for i in range(5)})
    return [
        Batch(
            tuple(v[a:b] for v in batch.args),
            {k: v[a:b] for k, v in batch.kwargs.items()},
            batch.target[a:b] if _sliceable(batch.target, size) else batch.target,
        )
        for a, b in pairwise(edges)
    ]


def _sliceable(value: Any, size: int) -> bool:
    return (isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)) and len(value) == size


@torch.no_grad()
def stacked(data: Sequence[Batch], model: nn.Module) -> tuple[Batch, str]:
    """As many samples as fit in one batch, and what was left out: those whose shapes differ from the commonest, and
    those over SAMPLES or MEMORY."""
    groups: dict[Any, list[Batch]] = {}
    for batch in data:
        groups.setdefault(_form(batch), []).append(batch)
    same = max(groups.values(), key=lambda g: sum(b.size for b in g))
    limit = min(SAMPLES, max(int(MEMORY / _bytes_a_sample(model, same[0])), 1))
    chosen, total = [], 0
    for batch in same:
        if chosen and total + batch.size > limit:
            break
        chosen.append(batch)
        total += batch.size
    whole = sum(b.size for b in data)
    note = f"used {total} of {whole} samples" if total < whole else ""
    joined = [_join(list(values), chosen) for values in zip(*(b.args for b in chosen), strict=True)]
    named = {k: _join([b.kwargs[k] for b in chosen], chosen) for k in same[0].kwargs}
    return Batch(tuple(joined), named).to(device_of(model)), note


def _form(batch: Batch) -> tuple:
    """What batches that can be joined have in common."""

    def one(value: Any) -> Any:
        if not _sliceable(value, batch.size):
            return id(value)  # shared by all batches of a group, or stands alone
        return (value.dtype, value.shape[1:]) if isinstance(value, Tensor) else "list"

    return tuple(one(v) for v in batch.args), tuple((k, one(v)) for k, v in batch.kwargs.items())


def _join(values: list[Any], batches: list[Batch]) -> Any:
    """One value for all the batches; what is not per sample is the same in all of them."""
    if len(values) == 1 or not all(_sliceable(v, b.size) for v, b in zip(values, batches, strict=True)):
        return values[0]
    return torch.cat(values) if isinstance(values[0], Tensor) else [item for value in values for item in value]


def _bytes_a_sample(model: nn.Module, batch: Batch) -> float:
    """Memory of a forward pass: about four times its largest output of one module."""
    largest = 1

    def look(_module: nn.Module, _args: Any, out: Any) -> None:
        nonlocal largest
        if isinstance(out, Tensor):
            largest = max(largest, out.numel() * out.element_size())

    with _hooked([m.register_forward_hook(look) for m in model.modules()]):
        batch.to(device_of(model)).run(model)
    return 4 * largest / max(batch.size, 1)


def _hooked(handles: Sequence[Any]) -> ExitStack:
    """Removes the hooks at the end, whatever happens."""
    stack = ExitStack()
    for handle in handles:
        stack.callback(handle.remove)
    return stack


# ---------------------------------------------------------------- with BatchNorm
def _batchnorm(dense: nn.Module, model: nn.Module, batch: Batch, norms: Mapping[str, nn.Module]) -> tuple[int, int]:
    """Returns how many were corrected, those that run once in a forward pass, and how many there are."""
    original = dict(dense.named_modules())
    wanted: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in norms}

    def observe(name: str) -> Callable[..., None]:
        return lambda _module, args, kwargs: wanted[name].append(_moments(args[0] if args else kwargs["input"]))

    def correct(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            mean, variance = _moments(args[0] if args else kwargs["input"])
            dense_mean, dense_variance = wanted[name][0]
            ratio = torch.where(dense_variance > 0, variance / dense_variance, 1.0).clamp(1 / RATIO, RATIO)
            module.running_mean.copy_(original[name].running_mean + mean - dense_mean)  # pyright: ignore
            module.running_var.copy_(original[name].running_var * ratio)  # pyright: ignore

        return hook

    with torch.no_grad():
        with _hooked([original[n].register_forward_pre_hook(observe(n), with_kwargs=True) for n in norms]):
            batch.run(dense)
        once = [n for n in norms if len(wanted[n]) == 1]
        with _hooked([norms[n].register_forward_pre_hook(correct(n), with_kwargs=True) for n in once]):
            batch.run(model)
    return len(once), len(norms)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel (dimension 1)."""
    dims = tuple(d for d in range(x.ndim) if d != 1)
    mean = x.mean(dim=dims)  # torch.var_mean is ten times slower than this
    return mean, (x - mean.view(-1, *[1] * (x.ndim - 2))).square_().mean(dim=dims)


# ---------------------------------------------------------------- without
def _mean(dense: nn.Module, model: nn.Module, batch: Batch, units: Sequence[Unit]) -> tuple[int, int]:
    """Returns how many layers were corrected, those with a bias or shift that run once in a forward pass, and how many
    have one."""
    parameters, original = dict(model.named_parameters()), dict(dense.named_parameters())
    biased = {u.name: b for u in units if (b := _bias(u.name, parameters)) is not None}
    chosen = [u for u in units if u.name in biased]
    wanted: dict[str, list[Tensor]] = {}

    def observe(unit: Unit, inputs: Inputs | Tensor) -> None:
        if not isinstance(inputs, Tensor):
            wanted.setdefault(unit.name, []).append(_output_mean(unit, original[unit.name], inputs))

    def correct(unit: Unit, inputs: Inputs | Tensor) -> None:
        if not isinstance(inputs, Tensor) and len(wanted.get(unit.name, ())) == 1:
            here = _output_mean(unit, parameters[unit.name], inputs)
            biased[unit.name].add_(wanted[unit.name][0] - here)

    shifted = {n: m for n, m in model.named_modules() if _has_shift(m)}
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

    with torch.no_grad():
        with _hooked([modules[n].register_forward_hook(observe_norm(n)) for n in shifted]):
            with eager(), Calls(dense, chosen, observe):
                batch.run(dense)
        with _hooked([m.register_forward_hook(correct_norm(n)) for n, m in shifted.items()]):
            with eager(), Calls(model, chosen, correct):
                batch.run(model)
    return sum(len(v) == 1 for v in (*wanted.values(), *shifts.values())), len(chosen) + len(shifts)


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
