"""What a candidate is predicted to cost the network, in one of three ways; see `featherweight.target.Score`."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.data import Batch, cut, device_of
from featherweight.errors import UsageError
from featherweight.layers import Unit
from featherweight.methods import Solution
from featherweight.repair.correct import Reference
from featherweight.repair.distance import is_classification, outputs
from featherweight.search import TEMPERATURE
from featherweight.sensitivity import sensitivity
from featherweight.target import Score

CORRECTING = 64  # samples that statistics are corrected on while scores or policies are measured

Progress: TypeAlias = Callable[[str, int, int], None]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """rise: the predicted distance to the dense outputs of a solution of a unit, if no other weight were changed.
    missing: names of units whose rise is their relative layer error instead, which is on another scale. what: in
    words, for people."""

    rise: Callable[[Unit, Solution], float]
    missing: frozenset[str]
    what: str

    @classmethod
    def of(
        cls, how: Score, net: nn.Module, data: Sequence[Batch], units: Sequence[Unit], spill: Path, progress: Progress
    ) -> "Scores":
        """Args: data: empty for the relative change of each weight. spill: see `sensitivity`.

        Raises:
            UsageError: there are no labels, or outputs that cannot be compared, where the score is made of them.
        """
        if not data and how != "outputs":
            raise UsageError(f"the score by {how} needs data")
        if not data:
            return cls(_relative, frozenset(), "relative change of each weight: there are no data")
        return (
            _measured(net, data, units) if how == "measured" else _second_order(how, net, data, units, spill, progress)
        )


def words(how: Score, missing: int) -> str:
    """What scores are, where all but so many weights have one."""
    kind = {
        "outputs": "second order",
        "labels": "second order, of the labels' cross-entropy",
        "measured": "measured with one weight replaced",
    }
    return kind[how] + f"; relative layer errors for {missing} weights that no gradient reaches" * (missing > 0)


def _relative(_unit: Unit, solution: Solution) -> float:
    return solution.relative_error


def _second_order(
    how: Score, net: nn.Module, data: Sequence[Batch], units: Sequence[Unit], spill: Path, progress: Progress
) -> Scores:
    loss = None
    if how == "labels":
        few = cut(data[0], 8)[0].to(device_of(net))
        if not is_classification(list(outputs(few.run(net))), few.target):
            raise UsageError("the score by labels needs data with one class label a sample, and one score a class")
        loss = _cross_entropy
    try:
        found = sensitivity(
            net,
            data,
            units,
            loss=loss,
            temperature=TEMPERATURE,
            spill=spill,
            on_pass=lambda done, total: progress("score", done, total),
        )
    except (UsageError, RuntimeError) as error:  # a network may refuse gradients, or smaller batches
        what = f"relative layer errors, as the network gives no gradients: {error}"[:200]
        return Scores(_relative, frozenset(), what)
    missing = frozenset(u.name for u in units if u.name not in found.gradients)

    def rise(unit: Unit, solution: Solution) -> float:
        if unit.name in missing:
            return solution.relative_error
        w = unit.view.matrix(net.get_parameter(unit.name).detach().cpu()).float()
        return found.rise(unit.name, solution.weight.dense() - w)

    return Scores(rise, missing, words(how, len(missing)))


def _cross_entropy(out: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(next(outputs(out)), target, reduction="none")


def _measured(net: nn.Module, data: Sequence[Batch], units: Sequence[Unit]) -> Scores:
    """As a policy is measured, statistics corrected."""
    small, reference = copy.deepcopy(net), Reference.of(net, data, units, most=CORRECTING)
    start = {n: t.clone() for n, t in small.state_dict().items() if isinstance(t, Tensor)}
    if reference.outputs is None or reference.outputs.parts(small) is None:
        raise UsageError("no score can be measured: the network's outputs cannot be compared, or the data not be cut")
    dense = reference.outputs

    @torch.no_grad()
    def rise(unit: Unit, solution: Solution) -> float:
        small.get_parameter(unit.name).copy_(unit.view.tensor(solution.weight.dense()))
        reference.correct(small)
        parts = dense.parts(small, TEMPERATURE)
        small.load_state_dict(start, strict=False)
        if parts is None or not torch.isfinite(parts).all():
            raise UsageError(f"no score can be measured: outputs are not finite with another {unit.name}")
        return float(parts.mean())

    return Scores(rise, frozenset(), words("measured", 0))
