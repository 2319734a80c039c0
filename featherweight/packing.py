"""A compressed network in memory -> an Artifact, and how large its file is or will be."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.activations import ActivationGrid
from featherweight.artifact import Artifact, FoldedNorm, StoredUnit, fill
from featherweight.artifact.structure import FIELD as STRUCTURE
from featherweight.artifact.structure import structure_of
from featherweight.artifact.write import to_bytes
from featherweight.errors import UsageError
from featherweight.layers import Scan
from featherweight.methods import Method, Solution
from featherweight.norms import foldable, folded
from featherweight.sharing import book_bytes, dictionary_bytes
from featherweight.weights.base import float_type

DIGITS = (4, 5, 6, 7, 8)
FULL = 10  # digits of fp16
SLACK = 0.002  # of the distance to the dense outputs
RATIO = 3  # how much smaller a table of contents becomes when it is packed


@torch.no_grad()
def packed(
    small: nn.Module,
    found: Scan,
    methods: dict[str, Method],
    solutions: dict[str, Solution],
    about: dict[str, Any],
    grids: dict[str, ActivationGrid],
) -> tuple[Artifact, dict[str, float]]:
    """The artifact of an assembled network, and how its other tensors are stored: numbers in fp16, fp32 and other
    types, the largest relative error that fp16 made, and the binary digits of those in fp16."""
    units = tuple(
        StoredUnit(
            u.names,
            u.view,
            solutions[u.name].weight,
            methods[u.name].label,
            error if math.isfinite(error := solutions[u.name].relative_error) else None,
            solutions[u.name].note,
            grids.get(u.name),
        )
        for u in found.units
    )
    rest, norms = {}, []
    taken: set[str] = {n for u in found.units for n in u.names}
    facts = {"fp16": 0, "fp32": 0, "other": 0, "fp16_error": 0.0, "digits": FULL}

    def stored(*tensors: Tensor) -> list[Tensor]:
        dtype = torch.float16 if all(float_type(t) == torch.float16 for t in tensors) else torch.float32
        if any((torch.isfinite(t) & ~torch.isfinite(t.float())).any() for t in tensors):
            dtype = torch.float64  # beyond the range of fp32
        facts[{torch.float16: "fp16", torch.float32: "fp32"}.get(dtype, "other")] += sum(t.numel() for t in tensors)
        for t in tensors:
            if dtype == torch.float16 and t.numel() and (top := float(t.double().abs().max())) > 0:
                facts["fp16_error"] = max(
                    facts["fp16_error"], float((t.half().double() - t.double()).abs().max()) / top
                )
        return [t.detach().cpu().to(dtype) for t in tensors]

    for name, module in foldable(small):
        scale, shift = stored(*folded(module))
        norms.append(FoldedNorm(name, scale, shift, float(module.eps)))
        taken |= {f"{name}.{t}" for t in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    seen: set[int] = set()
    for name, tensor in small.state_dict(keep_vars=True).items():
        if name in taken or name.endswith(".num_batches_tracked") or id(tensor) in seen:
            continue
        if not isinstance(tensor, Tensor):
            raise UsageError(
                f"the network's state has '{name}' of type {type(tensor).__name__}; only tensors can be kept"
            )
        seen.add(id(tensor))
        if tensor.is_floating_point():
            rest[name] = stored(tensor)[0]
        else:
            rest[name] = tensor.detach().cpu().contiguous()
            facts["other"] += tensor.numel()
    return Artifact(units, rest, tuple(norms), about), facts


def shortened(artifact: Artifact, digits: int) -> Artifact:
    """With vectors in fp16, the norms' and such as biases, rounded to so many binary digits behind the leading one: the
    zeros that follow take next to no bytes when they are coded."""

    def short(tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float16 or tensor.ndim != 1:
            return tensor
        mantissa, exponent = torch.frexp(tensor.double())
        found = torch.ldexp(torch.round(mantissa * 2 ** (digits + 1)), exponent - digits - 1).half()
        return torch.where(torch.isfinite(found), found, tensor)

    norms = tuple(replace(n, scale=short(n.scale), shift=short(n.shift)) for n in artifact.norms)
    return replace(artifact, norms=norms, rest={n: short(t) for n, t in artifact.rest.items()})


def shortest(
    artifact: Artifact, small: nn.Module, distance: Callable[[nn.Module], float], slack: float = SLACK
) -> tuple[Artifact, int]:
    """`shortened` to the fewest of DIGITS with which the network does not get further from the dense one, but for
    `slack` of the distance, and these digits; as it is, and FULL, where none will do. distance: of a network, on
    samples that what is rounded was not fitted to."""
    own = copy.deepcopy(small)
    most = distance(fill(own, artifact)) * (1 + slack)
    for digits in DIGITS:
        tried = shortened(artifact, digits)
        if distance(fill(own, tried)) <= most:  # false for NaN
            return tried, digits
    return artifact, FULL


def predicted_bytes(net: nn.Module, found: Scan, methods: dict[str, Method], wanted: dict[str, int]) -> int:
    """About the size of the whole file before anything is solved: codes of grids as they are without coding, mostly a
    tenth more than with it."""
    artifact, _ = packed(net, replace(found, units=()), {}, {}, {STRUCTURE: structure_of(net)}, {})
    names = {n for u in found.units for n in u.names}
    rest = {n: t for n, t in artifact.rest.items() if n not in names}
    other = len(to_bytes(replace(artifact, rest=rest)))
    payload = sum(methods[u.name].storage(u.view.matrix_shape, u.taps, u.groups) for u in found.units)
    header = sum(150 + sum(len(n) + 4 for n in u.names) + 5 * len(u.view.shape) for u in found.units)
    header += sum(len(label) + 5 for label in {m.label for m in methods.values()})
    header += 75 * sum(bits > 0 for bits in wanted.values())
    return other + payload + dictionary_bytes(methods) + book_bytes(methods) + header // RATIO
