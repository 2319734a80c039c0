"""What a candidate is predicted to cost the network, in one of three ways; see `featherweight.target.Score`."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.activations import ActivationGrid, simulate
from featherweight.data import Batch, cut, device_of
from featherweight.errors import UsageError
from featherweight.layers import Unit
from featherweight.methods import Solution
from featherweight.repair.correct import Reference
from featherweight.repair.distance import is_classification, outputs
from featherweight.search import TEMPERATURE
from featherweight.sensitivity import sensitivity
from featherweight.target import Score

LARGEST = 1e9
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
        cls,
        how: Score,
        net: nn.Module,
        data: Sequence[Batch],
        units: Sequence[Unit],
        spill: Path,
        progress: Progress,
        grids: Mapping[str, ActivationGrid],
        correcting: bool,
    ) -> "Scores":
        """Args: data: empty for the relative change of each weight. spill: see `sensitivity`. grids, correcting: for
        what is measured, see `search.Judge`.

        Raises:
            UsageError: there are no labels, or outputs that cannot be compared, where the score is made of them.
        """
        if not data and how != "outputs":
            raise UsageError(f"the score by {how} needs data")
        if not data:
            return cls(_relative, frozenset(), "relative change of each weight: there are no data")
        if how == "measured":
            return _measured(net, data, units, grids, correcting)
        return _second_order(how, net, data, units, spill, progress)


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
        for batch in data:
            _check_labels(net, batch)
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
        if how == "labels":
            raise UsageError(f"no gradient of the labels' loss can be had: {error}"[:300]) from error
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
    return F.cross_entropy(next(outputs(out)), target.long(), reduction="none")


@torch.no_grad()
def _check_labels(net: nn.Module, batch: Batch) -> None:
    here = cut(batch, 8)[0].to(device_of(net))
    found = list(outputs(here.run(net)))
    if not is_classification(found, batch.target):
        raise UsageError("the score by labels needs data with one class label a sample, and one score a class")
    low, high, classes = int(batch.target.min()), int(batch.target.max()), found[0].shape[1]
    if low < 0 or high >= classes:
        raise UsageError(f"the score by labels needs labels from 0 to {classes - 1}, got {low} to {high}")


def _measured(
    net: nn.Module,
    data: Sequence[Batch],
    units: Sequence[Unit],
    grids: Mapping[str, ActivationGrid],
    correcting: bool,
) -> Scores:
    """As a policy is measured; LARGEST where outputs are not finite or of another shape."""
    small, reference = copy.deepcopy(net), Reference.of(net, data, units, most=CORRECTING)
    simulate(small, grids)
    start = {n: t.clone() for n, t in small.state_dict().items() if isinstance(t, Tensor)}
    if reference.outputs is None or reference.outputs.parts(small) is None:
        raise UsageError("no score can be measured: the network's outputs cannot be compared, or the data not be cut")
    dense = reference.outputs

    @torch.no_grad()
    def rise(unit: Unit, solution: Solution) -> float:
        small.get_parameter(unit.name).copy_(unit.view.tensor(solution.weight.dense()))
        if correcting:
            reference.correct(small)
        parts = dense.parts(small, TEMPERATURE)
        small.load_state_dict(start, strict=False)
        return LARGEST if parts is None or not torch.isfinite(parts).all() else float(parts.mean())

    return Scores(rise, frozenset(), words("measured", 0))
