"""How far a network's outputs are from those of the dense network on the same inputs."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.data import Batch, device_of

KEPT = 1 << 28


def outputs(value: Any) -> Iterator[Tensor]:
    """Every floating-point tensor in a network's output, in order."""
    match value:
        case Tensor():
            if value.is_floating_point():
                yield value
        case dict():
            for inner in value.values():
                yield from outputs(inner)
        case tuple() | list():
            for inner in value:
                yield from outputs(inner)
        case _ if is_dataclass(value) and not isinstance(value, type):
            for part in fields(value):
                yield from outputs(getattr(value, part.name))


@final
@dataclass(frozen=True, slots=True, eq=False)
class DenseOutputs:
    """What the dense network gives on fixed data, to measure copies of it against. kept: a list of outputs for each
    batch, None where they would take more than KEPT bytes: then the dense network runs again each time."""

    dense: nn.Module
    data: Sequence[Batch]
    kept: list[list[Tensor]] | None

    @classmethod
    @torch.no_grad()
    def of(cls, dense: nn.Module, data: Sequence[Batch]) -> "DenseOutputs":
        kept: list[list[Tensor]] = []
        room = KEPT
        for batch in data:
            kept.append([t.clone() for t in outputs(batch.to(device_of(dense)).run(dense))])
            room -= sum(t.numel() * t.element_size() for t in kept[-1])
            if room < 0:
                return cls(dense, data, None)
        return cls(dense, data, kept)

    def distance(self, model: nn.Module) -> float:
        """Mean over the data of the divergence KL(dense || model) of the class probabilities where the data have class
        labels and the output is one score a class; elsewhere of the squared difference of all outputs, relative to
        the squared dense outputs. The labels' values are not used. NaN where the two cannot be compared: no output is
        a tensor of real numbers, or the shapes differ (detectors find another number of boxes)."""
        parts = self.parts(model)
        return math.nan if parts is None else float(parts.mean())

    @torch.no_grad()
    def parts(self, model: nn.Module, temperature: float = 1.0) -> Tensor | None:
        """Numbers whose mean is the distance, float64: one a sample, or one a batch where the first dimension of some
        output is not that of the samples. None where the two cannot be compared.

        temperature: class scores are divided by it, and their divergence multiplied by its square: the higher, the
        more every sample counts, not only the few that are near a border.
        """
        device = device_of(model)
        lost: list[Tensor] = []
        whole = 0.0
        for i, batch in enumerate(self.data):
            here = batch.to(device)
            want = list(outputs(here.run(self.dense))) if self.kept is None else self.kept[i]
            got = list(outputs(here.run(model)))
            if not want or [t.shape for t in want] != [t.shape for t in got]:
                return None
            whole += energy(want, batch.target)
            if is_classification(want, batch.target):
                log_p, log_q = ((t[0].double() / temperature).log_softmax(1) for t in (want, got))
                divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
                lost.append(divergence.cpu() * temperature**2)
            else:
                pairs = [(g.double() - w.double()).square() for g, w in zip(got, want, strict=True)]
                count = batch.size if all(t.ndim and len(t) == batch.size for t in want) else 1
                lost.append(torch.stack([t.reshape(count, -1).sum(1) for t in pairs]).sum(0).cpu())
        parts = torch.cat(lost)
        return parts * len(parts) / whole if whole > 0 else parts


def output_distance(dense: nn.Module, model: nn.Module, data: Sequence[Batch]) -> float:
    """`DenseOutputs.of(dense, data).distance(model)`, for one copy."""
    return DenseOutputs.of(dense, data).distance(model)


def energy(want: list[Tensor], target: Any) -> float:
    """What a batch adds to the denominator of the distance: its samples, or its squared dense outputs."""
    if is_classification(want, target):
        return float(len(want[0]))
    return sum(float(w.double().square().sum()) for w in want)


def is_classification(outputs: list[Tensor], target: Any) -> bool:
    scores = outputs[0] if len(outputs) == 1 else None
    labels = isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point()
    return labels and scores is not None and scores.ndim == 2 and scores.shape[1] > 1


def probe(want: list[Tensor], target: Any, noise: list[Tensor], temperature: float = 1.0) -> list[Tensor]:
    """For independent `noise` of mean 0 and variance 1 in the shape of the outputs: v, one tensor for each of them,
    with E[v vᵀ] the Hessian of the distance's numerator at the dense outputs: diag(p) - p pᵀ for every row of class
    scores, p its probabilities at the temperature, and 2 I elsewhere."""
    if is_classification(want, target):
        p = (want[0] / temperature).softmax(1)
        root = p.sqrt()
        return [root * noise[0] - p * (root * noise[0]).sum(1, keepdim=True)]
    return [math.sqrt(2) * n for n in noise]
