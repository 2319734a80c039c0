"""What the user says about finetuning, and what comes of it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, final, get_args

from featherweight.errors import require

Precision: TypeAlias = Literal["fp32", "bf16"]
Norms: TypeAlias = Literal["kept", "batch"]


class Settings(Protocol):
    """What every training says, see Finetune. word: what it is called in messages. stage: likewise, of progress."""

    word: ClassVar[str]
    stage: ClassVar[str]

    @property
    def data(self) -> Any: ...
    @property
    def epochs(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def labels(self) -> float: ...
    @property
    def mix(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def norms(self) -> Norms: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def checkpoint(self) -> str | Path | None: ...


def check(how: Settings) -> None:
    """Refuse what no training can have.

    Raises:
        UsageError: a number is out of its range.
    """
    require(type(how.epochs) is int and how.epochs > 0, "epochs must be a whole number above 0", how.epochs)
    require(type(how.batch_size) is int and how.batch_size > 0, "the batch size must be above 0", how.batch_size)
    require(0 < how.learning_rate < math.inf, "the learning rate must be above 0", how.learning_rate)
    require(0 <= how.labels <= 1, "labels must be a share, 0 to 1", how.labels)
    require(0 <= how.mix <= 1, "mix must be a share of the samples, 0 to 1", how.mix)
    require(not (how.mix and how.labels), "mixed samples have no label; leave out mix or labels", (how.mix, how.labels))
    require(how.norms in get_args(Norms), "norms must be kept or batch", how.norms)
    require(how.precision in get_args(Precision), "the precision must be fp32 or bf16", how.precision)


@final
@dataclass(frozen=True, slots=True)
class Finetune:
    """data: training inputs, as `compress` takes them; a Dataset is shuffled every epoch, anything else read again.
    learning_rate: of Adam, relative to the root mean square of every tensor, falling to zero as a cosine. labels: share
    of the loss that is cross-entropy with the data's labels. mix: share of the samples that are mixed with another one,
    so that few data tell more of the dense network. precision: what both networks run in; the loss and what is
    trained are at least float32. norms: whether BatchNorms keep their statistics or take those of every batch, see
    `statistics`. moves: whether codes of vectors and grids may change, too. checkpoint: a file that keeps the state,
    so that a killed run goes on."""

    word: ClassVar[str] = "finetuning"
    stage: ClassVar[str] = "finetune"
    data: Any
    epochs: int = 5
    learning_rate: float = 1e-3
    batch_size: int = 128
    labels: float = 0.0
    seed: int = 0
    precision: Precision = "fp32"
    checkpoint: str | Path | None = None
    moves: bool = False
    mix: float = 0.0
    norms: Norms = "kept"

    def __post_init__(self) -> None:
        check(self)


@final
@dataclass(frozen=True, slots=True)
class Trained:
    """Mean loss of every epoch, first to last."""

    losses: tuple[float, ...]
