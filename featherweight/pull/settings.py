"""What the user says about training by ADMM, and what comes of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from torch import Tensor

from featherweight.errors import UsageError, require
from featherweight.finetune.settings import Norms, Precision, check

RHO = 10.0  # see docs/admm.md for what it was chosen by
GROWTH = 1.0
STEP = 0.2


@final
@dataclass(frozen=True, slots=True)
class AdmmTraining:
    """data, batch_size, seed, precision, checkpoint: as in `Finetune`. rho, growth, step: see `Pull`. learning_rate: of
    Adam, relative to the root mean square of every tensor, falling to zero as a cosine; matrices and kernels move ten
    times as fast as vectors. labels: share of the loss that is cross-entropy with the data's labels, the rest is the
    distance to the network as it was. mix, norms: as in `Finetune`. loss: of the network's output and the batch's
    target, in place of both."""

    word: ClassVar[str] = "training by ADMM"
    stage: ClassVar[str] = "admm"
    data: Any
    epochs: int = 20
    rho: float = RHO
    growth: float = GROWTH
    step: float = STEP
    learning_rate: float = 1e-3
    batch_size: int = 128
    labels: float = 0.0
    mix: float = 0.0
    norms: Norms = "kept"
    seed: int = 0
    precision: Precision = "fp32"
    checkpoint: str | Path | None = None
    loss: Callable[[Any, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        check(self)
        check_rho(self.rho, self.growth, self.step)
        if self.loss is not None and (self.labels or self.mix):
            raise UsageError("a loss of your own goes with neither labels, whose place it takes, nor mixed samples")


@final
@dataclass(frozen=True, slots=True)
class Pulled:
    """losses: mean of every epoch, without the penalty. primal, dual: by weight, the residuals (see `Residual`) at the
    beginning of every epoch and after the last one: the first primal one is what giving the untrained weights their
    form would change, the last what it now does, at most."""

    losses: tuple[float, ...]
    primal: dict[str, tuple[float, ...]]
    dual: dict[str, tuple[float, ...]]


def check_rho(rho: float, growth: float, step: float) -> None:
    """Refuse a penalty that does not pull.

    Raises:
        UsageError: a number is out of its range.
    """
    require(0 < rho < math.inf, "rho must be above 0", rho)
    require(1 <= growth < math.inf, "the growth of rho must be at least 1", growth)
    require(0 <= step <= 1, "the step of the dual variables must be a share, 0 to 1", step)
