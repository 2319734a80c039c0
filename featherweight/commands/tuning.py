"""`finetune`."""

import copy
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from featherweight import options as opt
from featherweight.artifact import fill, read
from featherweight.commands.app import app
from featherweight.console import bars, out, plain_warnings, print_json
from featherweight.errors import UsageError
from featherweight.finetune import Finetune, finetune
from featherweight.finetune.ranks import choose_device, joined
from featherweight.proof import check_output, meter, save_proved
from featherweight.userland import call, make_model

TUNING = Finetune(None)  # the defaults


@app.command("finetune")
def finetune_command(
    file: Annotated[Path, typer.Argument(help="a .fw file")],
    model: Annotated[str, typer.Option("--model", help="file.py:function that makes the dense network, trained")],
    train: Annotated[str, typer.Option("--train", help="data to train on: a callable, named like --model")],
    output: Annotated[Path, typer.Option("-o", "--output", help="the file to write")] = Path("tuned.fw"),
    weights: opt.Weights = None,
    epochs: Annotated[int, typer.Option(min=1, help="times that the data are gone through")] = TUNING.epochs,
    learning_rate: Annotated[
        float, typer.Option(help="of Adam, relative to the size of every tensor")
    ] = TUNING.learning_rate,
    labels: Annotated[
        float, typer.Option(help="share of the loss that is cross-entropy with the labels, 0 to 1")
    ] = TUNING.labels,
    mix: Annotated[
        float, typer.Option(help="share of the samples that are mixed with another one (few training data), 0 to 1")
    ] = TUNING.mix,
    norms: Annotated[
        str,
        typer.Option(help="BatchNorms: kept as they are, or batch: with the statistics of every batch of many data"),
    ] = TUNING.norms,
    precision: opt.PrecisionKind = None,
    move_codes: Annotated[
        bool, typer.Option("--move-codes", help="codes of vectors and grids may change, too")
    ] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="file that keeps the state, so that a killed run goes on")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the order of the samples")] = TUNING.seed,
    test: opt.TestSpec = None,
    metric: opt.MetricSpec = None,
    batch_size: opt.BatchSize = 128,
    as_json: opt.Json = False,
) -> None:
    """Train what is continuous in a file towards the dense network; the file keeps about its size. With torchrun, on
    several processors."""
    given = {k: v for k, v in locals().items() if k not in ("file", "model")}
    opt.check_metric(metric, test)
    check_output(output, weights)
    if checkpoint is not None and checkpoint.resolve() == output.resolve():
        raise UsageError(f"{output} cannot be the output and the checkpoint")
    choose_device()
    artifact, start = read(file), time.perf_counter()
    with plain_warnings(), redirect_stdout(sys.stderr):
        network = make_model(model, weights)
        with joined(network) as ranks, bars(ranks.first) as progress:
            asked = epochs, learning_rate, batch_size, labels, seed, precision or "fp32", checkpoint, move_codes, mix
            how = Finetune(call(train), *asked, norms)  # pyright: ignore - it checks
            before = meter(test if ranks.first else None, metric, batch_size)(fill(copy.deepcopy(network), artifact))
            tuned = finetune(artifact, network, how, progress)
            if not ranks.first:
                return
            earlier = artifact.about.get("finetuned", [])
            times = [*(earlier if isinstance(earlier, list) else []), opt.told(given, finetune_command)]
            remembering = replace(tuned.artifact, about=artifact.about | {"finetuned": times})
            proof = save_proved(remembering, output, model, weights, test, metric, batch_size)
    after, losses, seconds = proof["metrics"], tuned.trained.losses, time.perf_counter() - start
    if as_json:
        sizes = {"bytes_before": file.stat().st_size, "file_bytes": proof["bytes"], "digest": proof["digest"]}
        done = {"before": before, "after": after, "losses": losses, "seconds": round(seconds, 2)}
        print_json(after | done | sizes | {"file": str(output)})
        return
    out.print(f"mean loss of each epoch {' -> '.join(f'{x:.3g}' for x in losses)}")
    for name, value in after.items():
        out.print(f"{escape(name)} {before[name]:.2f} -> {value:.2f}")
    out.print(f"{escape(str(output))}: {proof['bytes']:,} bytes, {seconds:.0f} s", style="dim")
    out.print(f"read back in a fresh process: every decoded bit is the same ({proof['digest'][:12]})", style="green")
