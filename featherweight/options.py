"""The options that commands share: names, types and what `--help` says of them."""

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from featherweight.errors import UsageError
from featherweight.export.fast import SPEED
from featherweight.finetune import Finetune
from featherweight.pull import AdmmTraining
from featherweight.pull.settings import RHO
from featherweight.recipe import SETTINGS, Recipe
from featherweight.userland import call

ModelSpec = Annotated[str, typer.Argument(metavar="MODEL", help="file.py:function or package.module:function")]
DataSpec = Annotated[str | None, typer.Option("--data", help="calibration data: a callable, named like MODEL")]
InputShape = Annotated[
    str | None, typer.Option("--input-shape", help="of one input, where there are no data to tell: 3,32,32")
]
Weights = Annotated[Path | None, typer.Option(help="safetensors file that fills the network")]
Method = Annotated[
    str | None,
    typer.Option(
        help="of all weights: rtn, gptq, obq; ecq; additive; magnitude, obs, admm; dictionary; factors (see --keep)"
    ),
]
Bits = Annotated[float | None, typer.Option(help="1 to 8; of ecq and additive bits a weight, such as 1.8")]
Share = Annotated[str | None, typer.Option(help="who shares books or dictionaries: network, stage or layer")]
Vector = Annotated[
    int | None, typer.Option(help="weights in a vector of additive codes (default: what suits the size)")
]
Books = Annotated[int | None, typer.Option(help="words that are added up for a vector (default: 1)", min=1)]
Quantizer = Annotated[str | None, typer.Option(help="of what a pruner leaves: gptq, obq or additive")]
Keep = Annotated[
    float | None,
    typer.Option(
        help="numbers that factors keep, 0 to 1; methods lowrank, spatial, tucker, tt, tr, cp, factors, dictionary"
    ),
]
Ranks = Annotated[str | None, typer.Option(help="of factors, without --keep: vbmf, those that stand out from noise")]
Error = Annotated[float | None, typer.Option(help="of dictionary pairs: relative error of a weight, such as 0.1")]
Block = Annotated[int | None, typer.Option(help="of dictionary pairs: input channels that have a dictionary (0: all)")]
Sparsity = Annotated[float | None, typer.Option(help="share of the weights to remove, 0 to 1")]
Pattern = Annotated[str | None, typer.Option(help="what is removed together: 2:4 (any N:M), blocks:4, rows, channels")]
Group = Annotated[int | None, typer.Option(help="columns that share a scale (default: a whole row; 0: the matrix)")]
Symmetric = Annotated[
    bool | None,
    typer.Option("--symmetric/--asymmetric", help="without or with zero points (default: with, below 8 bits)"),
]
Activations = Annotated[int | None, typer.Option(help="round the inputs of compressed weights, too: 2 to 8 bits")]
Purpose = Annotated[
    str | None,
    typer.Option("--for", help="speed: int8 weights and inputs, for `export` to an int8 ONNX graph; needs --data"),
]
Target = Annotated[str | None, typer.Option(help="size of the file: 100kB, 10x smaller than fp32, or 12%")]
TargetMacs = Annotated[str | None, typer.Option(help="multiplications of a sample: 0.5x of the dense ones, 50% or 20M")]
TargetParams = Annotated[
    str | None, typer.Option(help="numbers that are stored: 0.5x of the dense network's, 50% or 100k")
]
TargetBops = Annotated[str | None, typer.Option(help="the same, each times the bits of both factors (32 for floats)")]
TargetLatency = Annotated[
    str | None,
    typer.Option(help="time of a call on this machine: 4ms, 800us or 0.7x; in torch, or with --for speed in int8"),
]
LatencyBatch = Annotated[int, typer.Option(help="samples of a call that --target-latency is about")]
AmongKinds = Annotated[
    str, typer.Option("--among", help="what a target chooses from: quantize, prune, both, additive, factors or all")
]
ScoreKind = Annotated[
    str, typer.Option("--score", help="what a target's scores are made of: outputs, labels (second order), or measured")
]
Tied = Annotated[
    list[str] | None, typer.Option("--tie", help="weights that match this pattern get one choice (repeatable)")
]
Measurements = Annotated[int | None, typer.Option(help="policies that a target measures, at most", min=1)]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="TOML file with settings and overrides")]
Include = Annotated[list[str] | None, typer.Option(help="only weights that match this pattern (repeatable)")]
Exclude = Annotated[list[str] | None, typer.Option(help="leave matching weights alone (repeatable)")]
Sequential = Annotated[
    bool | None,
    typer.Option("--sequential/--independent", help="layers see the compressed, or the dense network's inputs"),
]
NoRepair = Annotated[
    bool, typer.Option("--no-repair", help="leave BatchNorm statistics and biases as they are, to all digits of fp16")
]
BatchSize = Annotated[int, typer.Option(min=1, help="samples a batch, where the data are not batched")]
MetricSpec = Annotated[str | None, typer.Option("--metric", help="callable metric(model, data): a number or a dict")]
TestSpec = Annotated[str | None, typer.Option("--test", help="test data: accuracy is printed before and after")]
PrecisionKind = Annotated[
    str | None, typer.Option("--precision", help="what training computes in: fp32 or bf16 (default: fp32)")
]
AdmmEpochs = Annotated[
    int,
    typer.Option("--admm", min=0, help="epochs of training the dense network until its weights nearly have their form"),
]
Rho = Annotated[float | None, typer.Option("--rho", help=f"how hard --admm pulls the weights (default: {RHO:g})")]
Residuals = Annotated[
    Path | None, typer.Option("--residuals", help="picture of how far the weights were from their form, by epoch")
]
AdmmCheckpoint = Annotated[
    Path | None, typer.Option("--checkpoint", help="file that keeps the state of --admm, so that a killed run goes on")
]
FinetuneEpochs = Annotated[
    int, typer.Option("--finetune", min=0, help="epochs of training scales, norms and biases, see `finetune`")
]
TrainSpec = Annotated[str | None, typer.Option("--train", help="data to train on (default: the calibration data)")]
DatabaseFolder = Annotated[
    Path | None, typer.Option("--database", help="folder that keeps solved weights, so that no run solves one twice")
]
IgnoreStructure = Annotated[
    bool,
    typer.Option(
        "--ignore-structure",
        help="also where strides, paddings, activations or such differ from the compressed network's",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="results as JSON on standard output")]


def settings_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a command's options that `recipe.method_of` takes and that were given; a whole number of bits as one."""
    found = {k: options[k] for k in SETTINGS if options.get(k) is not None}
    if "bits" in found and float(found["bits"]).is_integer():
        found["bits"] = int(found["bits"])
    return found


def for_speed(purpose: str | None, settings: Mapping[str, Any], data: str | None, chosen: bool) -> dict[str, Any]:
    """The settings, and what `--for speed` adds to them: GPTQ on symmetric grids of 8 bits where nothing is said.
    chosen: whether a recipe or a target chooses the methods.

    Raises:
        UsageError: another purpose, or no data.
    """
    if purpose is None:
        return dict(settings)
    if purpose != SPEED:
        raise UsageError(f"--for must be {SPEED}, got {purpose!r}; for small files give --target or a method")
    if data is None:
        raise UsageError("--for speed finds the ranges of activations on calibration data: give --data")
    return dict(settings) if settings or chosen else {"method": "gptq", "bits": 8}


def check_inputs(purpose: str | None, recipe: Recipe) -> None:
    """Refuse other bits of inputs than those that an int8 graph has.

    Raises:
        UsageError: a file that is made for speed has some.
    """
    given = [recipe.activations, *(o.activations for o in recipe.overrides)]
    other = [bits for bits in given if bits not in (None, 8)]
    if purpose == SPEED and other:
        raise UsageError(f"--for speed rounds inputs to 8 bits, got activations of {other[0]}: give 8, or leave it out")


def check_metric(metric: str | None, test: str | None) -> None:
    """Refuse a metric without the data that it measures on."""
    if metric and not test:
        raise UsageError("--metric needs the data to measure on: --test file.py:function")


def check_training(
    admm: int, finetune: int, rho: float | None, residuals: Path | None, checkpoint: Path | None, output: Path
) -> None:
    """Refuse options of a training that nobody asked for."""
    given = {"--rho": rho, "--residuals": residuals, "--checkpoint": checkpoint}
    own = [name for name, value in given.items() if value is not None]
    if own and admm == 0:
        raise UsageError(f"{own[0]} is for training by ADMM: give --admm EPOCHS, for example 20")
    if checkpoint is not None and checkpoint.resolve() == output.resolve():
        raise UsageError(f"{output} cannot be the output and the checkpoint")


def trainings(
    admm: int,
    finetune: int,
    rho: float | None,
    checkpoint: Path | None,
    train: str | None,
    precision: str | None,
    calibration: Any,
    batch_size: int,
) -> tuple[AdmmTraining | None, Finetune | None]:
    """What is trained before and after, None where no epoch is asked for."""
    if admm == finetune == 0:
        if train is not None or precision is not None:
            what = "--train and --precision are for training: give --finetune EPOCHS, for example 5"
            raise UsageError(f"{what}, or --admm EPOCHS")
        return None, None
    data = calibration if train is None else call(train)
    if data is None:
        raise UsageError(f"{'--admm' if admm else '--finetune'} needs data: --train file.py:function, or --data")
    common: dict[str, Any] = {"batch_size": batch_size, "precision": precision or "fp32"}
    before = AdmmTraining(data, admm, RHO if rho is None else rho, checkpoint=checkpoint, **common) if admm else None
    return before, Finetune(data, finetune, **common) if finetune else None


def changed(given: Mapping[str, Any], command: Callable[..., Any]) -> list[str]:
    """The options of a command whose values are not their defaults, as they are written."""
    return [f"--{name}" for name in _differing(given, command)]


UNTOLD = ("output", "test", "metric", "front", "database", "residuals", "checkpoint", "json", "lossless")


def told(given: Mapping[str, Any], command: Callable[..., Any]) -> dict[str, Any]:
    """The options that decide what a file holds, where they are not their defaults, as JSON for the file to keep; of
    paths the last part."""
    return {
        name: [named(v) for v in value] if isinstance(value, list) else named(value)
        for name, value in _differing(given, command).items()
        if name not in UNTOLD
    }


def named(value: Any) -> Any:
    """A path, or a spec `folder/file.py:function`, without its folders; anything else as it is."""
    if isinstance(value, Path):
        return value.name
    place, colon, function = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    return f"{Path(place).name}:{function}" if colon and place.endswith(".py") else value


def _differing(given: Mapping[str, Any], command: Callable[..., Any]) -> dict[str, Any]:
    """The options of a command whose values are not their defaults, by name."""
    known = signature(command).parameters
    return {_option(known[name]): value for name, value in given.items() if value != known[name].default}


def _option(parameter: Parameter) -> str:
    """How the command line calls a parameter, without dashes; the first name that typer was given is its `default`."""
    found = [d for m in getattr(parameter.annotation, "__metadata__", ()) for d in (m.default, *(m.param_decls or ()))]
    long = [
        d.partition("/")[0] for d in found if isinstance(d, str) and d.startswith("--")
    ]  # typer's default is the first
    return long[0].removeprefix("--") if long else parameter.name.replace("_", "-")
