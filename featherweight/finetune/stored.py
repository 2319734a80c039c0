"""Finetune what is in a file: an artifact and its dense network in, an artifact of the same size out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from featherweight.activations import plain_copy
from featherweight.artifact import Artifact, fill, read, write
from featherweight.data import Batch, device_of
from featherweight.errors import UsageError
from featherweight.finetune.loop import rehearse, train
from featherweight.finetune.order import epoch_of
from featherweight.finetune.ranks import Ranks
from featherweight.finetune.settings import Finetune, Trained
from featherweight.packing import shortest
from featherweight.repair.distance import DenseOutputs
from featherweight.weights import Weight

JUDGED = 512  # samples that norms and biases with fewer digits are judged on
SLACK = 0.01  # of the distance; these samples were trained on, so any rounding makes it a little larger


@final
@dataclass(frozen=True, slots=True, eq=False)
class Tuned:
    """A finetuned network in memory."""

    artifact: Artifact
    trained: Trained

    def save(self, path: str | Path) -> int:
        """Write the file, whole or not at all. Returns its size in bytes."""
        return write(self.artifact, Path(path))


def finetune(
    small: Artifact | str | Path,
    dense: nn.Module,
    how: Finetune,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Tuned:
    """Train what is continuous in a compressed network towards the dense one that it was made from: scales, codebooks,
    kept values, norms, biases. Codes (unless they move), masks and types stay, and so about the size: norms and biases
    lose digits as in `compress`. Neither argument is changed.

    Args:
        small: a file, or what is in one (`compress(...).artifact`).
        dense: the network that it was made from, with its trained weights, on the device to train on.

    Raises:
        UsageError: the file does not fit the network, its inputs are rounded, the data do not fit, the loss is no
            number, or the checkpoint is of something else.
    """
    artifact = small if isinstance(small, Artifact) else read(Path(small))
    if artifact.inputs():
        raise UsageError("finetuning through rounded inputs does not work yet, and this file rounds them")
    teacher = plain_copy(dense)
    student = fill(plain_copy(dense), artifact)
    how = rehearse(teacher, how)
    weights = {u.names[0]: u.weight for u in artifact.units}
    found, trained = train(teacher, student, artifact.units, weights, how, progress)
    artifact = _updated(artifact, student, found)
    judging = DenseOutputs.of(teacher, list(_first(how, student)))
    return Tuned(shortest(artifact, student, judging.distance, SLACK)[0], trained)


def _first(how: Finetune, net: nn.Module) -> Iterator[Batch]:
    """The first JUDGED training samples, or a little more."""
    seen = 0
    for batch in epoch_of(how, 0, Ranks.now()).batches:
        yield batch.to(device_of(net))
        seen += batch.size
        if seen >= JUDGED:
            return


@torch.no_grad()
def _updated(artifact: Artifact, net: nn.Module, weights: dict[str, Weight]) -> Artifact:
    """The artifact with what the network now holds, every tensor of the type that it had; what the layers lose is not
    known any more."""
    state = net.state_dict(keep_vars=True)
    units = tuple(replace(u, weight=weights[u.names[0]], error=None) for u in artifact.units)
    rest = {n: _as(t, state[n], n) if t.is_floating_point() else t for n, t in artifact.rest.items()}
    norms = []
    for norm in artifact.norms:  # with mean 0 and variance 1 - eps, weight and bias are its scale and shift
        scale, shift = (f"{norm.name}.{part}" for part in ("weight", "bias"))
        norms.append(
            replace(norm, scale=_as(norm.scale, state[scale], scale), shift=_as(norm.shift, state[shift], shift))
        )
    return Artifact(units, rest, tuple(norms), artifact.about)


def _as(old: Tensor, new: Tensor, name: str) -> Tensor:
    """The new numbers in the old type.

    Raises:
        UsageError: they are too large for it.
    """
    found = new.detach().cpu().to(old.dtype)
    if bool((torch.isfinite(old) & ~torch.isfinite(found)).any()):
        kind = str(old.dtype).removeprefix("torch.")
        raise UsageError(f"finetuning: {name} has left the range of {kind}; lower the learning rate")
    return found
