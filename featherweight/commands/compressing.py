"""`compress` and `plan`."""

import sys
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from featherweight import options as opt
from featherweight.commands.app import app
from featherweight.commands.packing import pack_checkpoint
from featherweight.console import bars, out, plain_warnings, print_json
from featherweight.database import Database
from featherweight.errors import UsageError
from featherweight.export.fast import MADE_FOR, SPEED
from featherweight.finetune.ranks import several
from featherweight.picture import check_front, check_residuals, save_front, save_residuals
from featherweight.pipeline import compress
from featherweight.planning import Plan, plan
from featherweight.proof import check_output, meter, save_proved
from featherweight.recipe import Recipe, method_of, read_recipe
from featherweight.report import (
    allocation_lines,
    assumed_lines,
    float_inputs_lines,
    left_alone_table,
    summary,
    weights_table,
)
from featherweight.settle import settle
from featherweight.synthesis import shape_of
from featherweight.target import Goal
from featherweight.userland import call, make_model

ACTIVATIONS = 8  # bits of inputs, of a file that is made for speed


@app.command("compress")
def compress_command(
    model: opt.ModelSpec,
    output: Annotated[Path, typer.Option("-o", "--output", help="the file to write")] = Path("small.fw"),
    data: opt.DataSpec = None,
    input_shape: opt.InputShape = None,
    weights: opt.Weights = None,
    method: opt.Method = None,
    bits: opt.Bits = None,
    sparsity: opt.Sparsity = None,
    pattern: opt.Pattern = None,
    group: opt.Group = None,
    symmetric: opt.Symmetric = None,
    share: opt.Share = None,
    vector: opt.Vector = None,
    books: opt.Books = None,
    quantizer: opt.Quantizer = None,
    keep: opt.Keep = None,
    ranks: opt.Ranks = None,
    error: opt.Error = None,
    block: opt.Block = None,
    activations: opt.Activations = None,
    purpose: opt.Purpose = None,
    target: opt.Target = None,
    target_macs: opt.TargetMacs = None,
    target_bops: opt.TargetBops = None,
    target_latency: opt.TargetLatency = None,
    latency_batch: opt.LatencyBatch = 1,
    target_params: opt.TargetParams = None,
    among: opt.AmongKinds = "all",
    score: opt.ScoreKind = "outputs",
    tie: opt.Tied = None,
    measurements: opt.Measurements = None,
    front: Annotated[
        Path | None, typer.Option(help="JSON file for other sizes that a target could have, and a picture beside it")
    ] = None,
    recipe: opt.RecipeFile = None,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    sequential: opt.Sequential = None,
    no_repair: opt.NoRepair = False,
    test: opt.TestSpec = None,
    metric: opt.MetricSpec = None,
    batch_size: opt.BatchSize = 128,
    database: opt.DatabaseFolder = None,
    admm_epochs: opt.AdmmEpochs = 0,
    rho: opt.Rho = None,
    residuals: opt.Residuals = None,
    checkpoint: opt.AdmmCheckpoint = None,
    finetune_epochs: opt.FinetuneEpochs = 0,
    train: opt.TrainSpec = None,
    precision: opt.PrecisionKind = None,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="every bit stays; MODEL may be a safetensors file (see `unpack`)")
    ] = False,
    as_json: opt.Json = False,
) -> None:
    """Compress a network, write the file, read it back in a fresh process and print what came of it."""
    given = {k: v for k, v in locals().items() if k not in ("model", "weights", "output", "lossless", "as_json")}
    if several():
        raise UsageError(
            "compress is the work of one process and torchrun started several: run it without torchrun, or train with "
            "`featherweight finetune` or, in Python, with fw.admm, which join processes"
        )
    if lossless:
        pack_checkpoint(model, weights, output, opt.changed(given, compress_command), as_json)
        return
    opt.check_metric(metric, test)
    opt.check_training(admm_epochs, finetune_epochs, rho, residuals, checkpoint, output)
    check_output(output, weights)
    if database is not None:
        Database.at(database)
    targets = target, target_macs, target_bops, target_latency, target_params
    goal = _goal(targets, among, score, tie, measurements, front, (latency_batch, purpose))
    chosen_elsewhere = goal is not None or recipe is not None
    settings = opt.for_speed(purpose, opt.settings_of(locals()), data, chosen_elsewhere)
    if purpose is not None and activations is None and recipe is None and finetune_epochs == 0:
        activations = ACTIVATIONS
    if front is not None:
        check_front(front, output)
    if residuals is not None:
        check_residuals(residuals, output)
    chosen = _recipe(settings, goal, recipe, include, exclude, no_repair, activations, sequential)
    opt.check_inputs(purpose, chosen)
    shape = None if input_shape is None else shape_of(input_shape)
    asked = opt.told(given | {"weights": weights}, compress_command)
    about = {"model": opt.named(model), "tool": f"featherweight {version('featherweight')}", "settings": asked}
    about |= {} if purpose is None else {MADE_FOR: purpose}
    # whatever the user's code prints is not our output
    with bars() as progress, plain_warnings(), redirect_stdout(sys.stderr):
        network = make_model(model, weights)
        settle(network, chosen, goal, data is not None)
        calibration = call(data) if data else None
        training = admm_epochs, finetune_epochs, rho, checkpoint, train, precision, calibration, batch_size
        admm, tuning = opt.trainings(*training)
        measure = meter(test, metric, batch_size)
        before = measure(network)
        small = compress(
            network,
            calibration,
            input_shape=shape,
            recipe=chosen,
            target=goal,
            evaluate=measure if front is not None and test else None,
            batch_size=batch_size,
            about=about,
            database=database,
            admm=admm,
            finetune=tuning,
            progress=progress,
        )
        progress("read back", 0, 1)
        proof = save_proved(small.artifact, output, model, weights, test, metric, batch_size)
        progress("read back", 1, 1)
    report = replace(small.report, file_bytes=proof["bytes"], before=before, after=proof["metrics"])
    if front is not None:
        save_front(report, front)
    if residuals is not None and report.pulled is not None:
        save_residuals(report.pulled, residuals)
    if as_json:
        print_json(proof["metrics"] | report.to_dict() | {"file": str(output), "digest": proof["digest"]})
        return
    out.print(weights_table(report.rows, report.file_bytes), "")
    out.print(left_alone_table(report.left_alone), "")
    out.print(summary(report, str(output)))
    if front is not None:
        out.print(f"other sizes: {front} and {front.with_suffix('.png')}", style="dim")
    if residuals is not None:
        out.print(f"residuals of every weight: {residuals}", style="dim")
    out.print(f"read back in a fresh process: every decoded bit is the same ({proof['digest'][:12]})", style="green")


@app.command("plan")
def plan_command(
    model: opt.ModelSpec,
    data: opt.DataSpec = None,
    input_shape: opt.InputShape = None,
    weights: opt.Weights = None,
    method: opt.Method = None,
    bits: opt.Bits = None,
    sparsity: opt.Sparsity = None,
    pattern: opt.Pattern = None,
    group: opt.Group = None,
    symmetric: opt.Symmetric = None,
    share: opt.Share = None,
    vector: opt.Vector = None,
    books: opt.Books = None,
    quantizer: opt.Quantizer = None,
    keep: opt.Keep = None,
    ranks: opt.Ranks = None,
    error: opt.Error = None,
    block: opt.Block = None,
    activations: opt.Activations = None,
    purpose: opt.Purpose = None,
    target: opt.Target = None,
    target_macs: opt.TargetMacs = None,
    target_bops: opt.TargetBops = None,
    target_latency: opt.TargetLatency = None,
    latency_batch: opt.LatencyBatch = 1,
    target_params: opt.TargetParams = None,
    among: opt.AmongKinds = "all",
    score: opt.ScoreKind = "outputs",
    tie: opt.Tied = None,
    recipe: opt.RecipeFile = None,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    batch_size: opt.BatchSize = 128,
    database: opt.DatabaseFolder = None,
    as_json: opt.Json = False,
) -> None:
    """Dry run: every weight with its method, or the reason why not; predicted bytes and time."""
    targets = target, target_macs, target_bops, target_latency, target_params
    goal = _goal(targets, among, score, tie, None, None, (latency_batch, purpose))
    settings = opt.for_speed(purpose, opt.settings_of(locals()), data, goal is not None or recipe is not None)
    if purpose is not None and activations is None and recipe is None:
        activations = ACTIVATIONS
    chosen = _recipe(settings, goal, recipe, include, exclude, False, activations, None)
    opt.check_inputs(purpose, chosen)
    shape = None if input_shape is None else shape_of(input_shape)
    with bars() as progress, plain_warnings(), redirect_stdout(sys.stderr):
        network = make_model(model, weights)
        calibration = call(data) if data else None
        found = plan(
            network,
            calibration,
            input_shape=shape,
            recipe=chosen,
            target=goal,
            batch_size=batch_size,
            database=database,
            progress=progress,
        )
    if as_json:
        print_json(asdict(found))
        return
    out.print(_plan_table(found), "")
    out.print(*(f"{row.name}: {row.note}" for row in found.rows if row.note), sep="\n", markup=False)
    out.print(left_alone_table(found.left_alone), *float_inputs_lines(found.float_inputs), "", sep="\n")
    ratio = found.baselines.fp32 / found.file_bytes
    out.print(f"predicted file {found.file_bytes:,} bytes, {ratio:.1f}x smaller than fp32 ({found.baselines.fp32:,})")
    reading = f"{found.capture_seconds:.0f} s of it to read the calibration data"
    searching = f", {found.search_seconds:.0f} s to choose" if found.allocation is not None else ""
    out.print(f"predicted time {found.seconds:.0f} s, {reading}{searching}")
    out.print(*assumed_lines(found.assumed), *allocation_lines(found.allocation, found.file_bytes), sep="\n")


def _goal(
    targets: tuple[str | None, ...],
    among: str,
    score: str,
    tie: list[str] | None,
    measurements: int | None,
    front: Path | None,
    run: tuple[int, str | None],
) -> Goal | None:
    """What the options ask for; None without any target. targets: bytes, MACs, BOPs, latency, parameters. run: samples
    of a call, and what the file is made for."""
    target, macs, bops, latency, params = targets
    if all(t is None for t in targets):
        own = (among, score, run[0]) != ("all", "outputs", 1)
        if own or tie or measurements is not None or front is not None:
            options = "--among, --score, --tie, --measurements, --front and --latency-batch"
            raise UsageError(f"{options} are of a target: give --target, for example 10x")
        return None
    if front is not None:
        check_output(front, None)
    runtime = "int8" if latency is not None and run[1] == SPEED else "torch"
    known = measurements, front is not None, score, tuple(tie or ()), latency, params, run[0], runtime
    return Goal(target, macs, bops, among, *known)  # pyright: ignore - it checks


def _recipe(
    settings: dict[str, Any],
    goal: Goal | None,
    file: Path | None,
    include: list[str] | None,
    exclude: list[str] | None,
    no_repair: bool,
    activations: int | None,
    sequential: bool | None,
) -> Recipe:
    """The recipe that the options name, on top of a recipe file where one is given."""
    if settings and goal is not None:
        raise UsageError(f"--target chooses the settings itself; leave out {', '.join(f'--{k}' for k in settings)}")
    if settings and file is not None:
        raise UsageError(f"--recipe holds the settings; leave out {', '.join(f'--{k}' for k in settings)}")
    if activations is not None and file is not None:
        raise UsageError("--recipe holds the settings; leave out --activations")
    base = read_recipe(file) if file else Recipe(method_of(settings), activations=activations)
    return replace(
        base,
        include=base.include + tuple(include or ()),
        exclude=base.exclude + tuple(exclude or ()),
        repair=base.repair and not no_repair,
        sequential=base.sequential if sequential is None else sequential,
    )


def _plan_table(found: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("weight", "kind", "shape", "method"):
        table.add_column(title, overflow="fold")
    for title in ("fp32 bytes", "bytes", "seconds"):
        table.add_column(title, justify="right", no_wrap=True)
    scored = found.allocation is not None
    if scored:
        table.add_column("predicted loss", justify="right", no_wrap=True)
    rounded = any(row.input_bits for row in found.rows)
    if rounded:
        table.add_column("inputs", justify="right", no_wrap=True)
    for row in found.rows:
        shape = "x".join(map(str, row.shape))
        sizes = f"{4 * row.params:,}", f"{row.bytes:,}", f"{row.seconds:.1f}"
        rise = ["" if row.rise is None else f"{row.rise:.2g}"] * scored
        inputs = [f"{row.input_bits} bit" if row.input_bits else "float"] * rounded
        table.add_row(escape(row.name), row.kind, shape, row.method, *sizes, *rise, *inputs)
    return table
