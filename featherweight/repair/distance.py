"""How far a network's outputs are from those of the dense network on the same inputs."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.data import Batch, device_of


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


@torch.no_grad()
def output_distance(dense: nn.Module, model: nn.Module, data: Sequence[Batch]) -> float:
    """Mean over the data of the divergence KL(dense || model) of the class probabilities where the data have class
    labels and the output is one score a class; elsewhere of the squared difference of all outputs, relative to the
    squared dense outputs. The labels' values are not used. NaN where the two cannot be compared: no output is a
    tensor of real numbers, or the shapes differ (detectors find another number of boxes)."""
    device = device_of(model)
    lost, whole = 0.0, 0.0
    for batch in data:
        here = batch.to(device)
        want, got = list(outputs(here.run(dense))), list(outputs(here.run(model)))
        if not want or [t.shape for t in want] != [t.shape for t in got]:
            return math.nan
        if _is_classification(want, batch.target):
            log_p, log_q = want[0].double().log_softmax(1), got[0].double().log_softmax(1)
            lost += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
            whole += len(want[0])
        else:
            lost += sum(float((g.double() - w.double()).square().sum()) for g, w in zip(got, want, strict=True))
            whole += sum(float(w.double().square().sum()) for w in want)
    return lost / whole if whole > 0 else lost


def _is_classification(outputs: list[Tensor], target: Any) -> bool:
    scores = outputs[0] if len(outputs) == 1 else None
    labels = isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point()
    return labels and scores is not None and scores.ndim == 2 and scores.shape[1] > 1
