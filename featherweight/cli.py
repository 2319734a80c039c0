"""The `featherweight` command. Each command parses, calls the library and prints; errors are one line and a code:
1 a file or a layer is bad, 2 the request is wrong, 3 the target cannot be reached."""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from featherweight._memory import reuse_memory
from featherweight.artifact import fill, read
from featherweight.database import Database, DatabaseWarning
from featherweight.errors import FeatherweightError, UsageError
from featherweight.finetune import Finetune
from featherweight.picture import check_front, save_front
from featherweight.pipeline import Plan, compress, plan, settle
from featherweight.proof import meter, prove
from featherweight.recipe import Recipe, method_of, read_recipe
from featherweight.report import (
    allocation_lines,
    finite,
    float_inputs_lines,
    left_alone_table,
    rows_of,
    summary,
    weights_table,
)
from featherweight.target import Goal
from featherweight.userland import call, make_model

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a trained PyTorch network small, and prove that it still works.",
)
out = Console(width=None if sys.stdout.isatty() else 110, soft_wrap=True)
err = Console(stderr=True)

ModelSpec = Annotated[str, typer.Argument(metavar="MODEL", help="file.py:function or package.module:function")]
DataSpec = Annotated[str | None, typer.Option("--data", help="calibration data: a callable, named like MODEL")]
Weights = Annotated[Path | None, typer.Option(help="safetensors file that fills the network")]
Method = Annotated[str | None, typer.Option(help="rtn, gptq, obq, magnitude, obs or admm, for all weights")]
Bits = Annotated[int | None, typer.Option(help="1 to 8")]
Sparsity = Annotated[float | None, typer.Option(help="share of the weights to remove, 0 to 1")]
Pattern = Annotated[str | None, typer.Option(help="what is removed together: 2:4 (any N:M), blocks:4, rows, channels")]
Group = Annotated[int | None, typer.Option(help="columns that share a scale (default: a whole row; 0: the matrix)")]
Symmetric = Annotated[
    bool | None,
    typer.Option("--symmetric/--asymmetric", help="without or with zero points (default: with, below 8 bits)"),
]
Activations = Annotated[int | None, typer.Option(help="round the inputs of compressed weights, too: 2 to 8 bits")]
Target = Annotated[str | None, typer.Option(help="size of the file: 100kB, 10x smaller than fp32, or 12%")]
TargetMacs = Annotated[str | None, typer.Option(help="multiplications of a sample: 0.5x of the dense ones, 50% or 20M")]
TargetBops = Annotated[str | None, typer.Option(help="the same, each times the bits of both factors (32 for floats)")]
TargetLatency = Annotated[
    str | None, typer.Option(help="time of one sample on this machine, layers made smaller: 4ms, 800us or 0.7x")
]
AmongKinds = Annotated[
    str, typer.Option("--among", help="what a target chooses from: quantize, prune, both, additive or all")
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
NoRepair = Annotated[bool, typer.Option("--no-repair", help="leave BatchNorm statistics and biases as they are")]
BatchSize = Annotated[int, typer.Option(min=1, help="samples a batch, where the data are not batched")]
MetricSpec = Annotated[str | None, typer.Option("--metric", help="callable metric(model, data): a number or a dict")]
DatabaseFolder = Annotated[
    Path | None, typer.Option("--database", help="folder that keeps solved weights, so that no run solves one twice")
]
Json = Annotated[bool, typer.Option("--json", help="results as JSON on standard output")]


@app.command("compress")
def compress_command(
    model: ModelSpec,
    output: Annotated[Path, typer.Option("-o", "--output", help="the file to write")] = Path("small.fw"),
    data: DataSpec = None,
    weights: Weights = None,
    method: Method = None,
    bits: Bits = None,
    sparsity: Sparsity = None,
    pattern: Pattern = None,
    group: Group = None,
    symmetric: Symmetric = None,
    activations: Activations = None,
    target: Target = None,
    target_macs: TargetMacs = None,
    target_bops: TargetBops = None,
    target_latency: TargetLatency = None,
    among: AmongKinds = "all",
    score: ScoreKind = "outputs",
    tie: Tied = None,
    measurements: Measurements = None,
    front: Annotated[
        Path | None, typer.Option(help="JSON file for other sizes that a target could have, and a picture beside it")
    ] = None,
    recipe: RecipeFile = None,
    include: Include = None,
    exclude: Exclude = None,
    sequential: Sequential = None,
    no_repair: NoRepair = False,
    test: Annotated[str | None, typer.Option("--test", help="test data: accuracy is printed before and after")] = None,
    metric: MetricSpec = None,
    batch_size: BatchSize = 128,
    database: DatabaseFolder = None,
    finetune: Annotated[
        int, typer.Option(min=0, help="epochs of training scales, norms and biases towards the dense network")
    ] = 0,
    train: Annotated[str | None, typer.Option(help="data to finetune on (default: the calibration data)")] = None,
    as_json: Json = False,
) -> None:
    """Compress a network, write the file, read it back in a fresh process and print what came of it."""
    if metric and not test:
        raise UsageError("--metric needs the data to measure on: --test file.py:function")
    _check_output(output, weights)
    if database is not None:
        Database.at(database)
    settings = method, bits, sparsity, pattern, group, symmetric
    goal = _goal(target, target_macs, target_bops, target_latency, among, score, tie, measurements, front)
    if front is not None:
        check_front(front, output)
    chosen = _recipe(*settings, goal, recipe, include, exclude, no_repair, activations, sequential)
    about = {"model": model, "tool": f"featherweight {version('featherweight')}"}
    unproved = output.with_name(f".{output.name}.unproved")
    try:
        # whatever the user's code prints is not our output
        with _bars() as progress, _plain_warnings(), redirect_stdout(sys.stderr):
            network = make_model(model, weights)
            settle(network, chosen, goal, data is not None)
            calibration = call(data) if data else None
            measure = meter(test, metric, batch_size)
            before = measure(network)
            tuning = _finetune(finetune, train, calibration, batch_size)
            small = compress(
                network,
                calibration,
                recipe=chosen,
                target=goal,
                evaluate=measure if front is not None and test else None,
                batch_size=batch_size,
                about=about,
                database=database,
                finetune=tuning,
                progress=progress,
            )
            size = small.save(unproved)
            progress("read back", 0, 1)
            proof = prove(unproved, small.artifact.digest(), model, weights, test, metric, batch_size)
            os.replace(unproved, output)
            progress("read back", 1, 1)
    finally:
        unproved.unlink(missing_ok=True)
    report = replace(small.report, file_bytes=size, before=before, after=proof["metrics"])
    if front is not None:
        save_front(report, front)
    if as_json:
        _print_json(proof["metrics"] | report.to_dict() | {"file": str(output), "digest": proof["digest"]})
        return
    out.print(weights_table(report.rows, size), "")
    out.print(left_alone_table(report.left_alone), "")
    out.print(summary(report, str(output)))
    if front is not None:
        out.print(f"other sizes: {front} and {front.with_suffix('.png')}", style="dim")
    out.print(f"read back in a fresh process: every decoded bit is the same ({proof['digest'][:12]})", style="green")


@app.command("plan")
def plan_command(
    model: ModelSpec,
    data: DataSpec = None,
    weights: Weights = None,
    method: Method = None,
    bits: Bits = None,
    sparsity: Sparsity = None,
    pattern: Pattern = None,
    group: Group = None,
    symmetric: Symmetric = None,
    activations: Activations = None,
    target: Target = None,
    target_macs: TargetMacs = None,
    target_bops: TargetBops = None,
    target_latency: TargetLatency = None,
    among: AmongKinds = "all",
    score: ScoreKind = "outputs",
    tie: Tied = None,
    recipe: RecipeFile = None,
    include: Include = None,
    exclude: Exclude = None,
    batch_size: BatchSize = 128,
    database: DatabaseFolder = None,
    as_json: Json = False,
) -> None:
    """Dry run: every weight with its method, or the reason why not; predicted bytes and time."""
    settings = method, bits, sparsity, pattern, group, symmetric
    goal = _goal(target, target_macs, target_bops, target_latency, among, score, tie, None, None)
    chosen = _recipe(*settings, goal, recipe, include, exclude, False, activations, None)
    with _bars() as progress, _plain_warnings(), redirect_stdout(sys.stderr):
        network = make_model(model, weights)
        calibration = call(data) if data else None
        found = plan(
            network,
            calibration,
            recipe=chosen,
            target=goal,
            batch_size=batch_size,
            database=database,
            progress=progress,
        )
    if as_json:
        _print_json(asdict(found))
        return
    out.print(_plan_table(found), "")
    out.print(left_alone_table(found.left_alone), *float_inputs_lines(found.float_inputs), "", sep="\n")
    ratio = found.baselines.fp32 / found.file_bytes
    out.print(f"predicted file {found.file_bytes:,} bytes, {ratio:.1f}x smaller than fp32 ({found.baselines.fp32:,})")
    reading = f"{found.capture_seconds:.0f} s of it to read the calibration data"
    searching = f", {found.search_seconds:.0f} s to choose" if found.allocation is not None else ""
    out.print(f"predicted time {found.seconds:.0f} s, {reading}{searching}")
    out.print(*allocation_lines(found.allocation, found.file_bytes), sep="\n")


@app.command("evaluate")
def evaluate_command(
    file: Annotated[Path, typer.Argument(help="a .fw file")],
    model: Annotated[str, typer.Option("--model", help="file.py:function that makes the network")],
    data: Annotated[str, typer.Option("--data", help="test data: a callable, named like --model")],
    metric: MetricSpec = None,
    batch_size: BatchSize = 128,
    as_json: Json = False,
) -> None:
    """Read a file into a network and measure it."""
    artifact = read(file)
    network = fill(make_model(model), artifact)
    measured = meter(data, metric, batch_size)(network)
    result = {"file": str(file), "bytes": file.stat().st_size, "digest": artifact.digest()}
    if as_json:
        _print_json(measured | result | {"metrics": measured})
        return
    for name, value in measured.items():
        out.print(f"{escape(name)} {value:.2f}")
    out.print(f"{result['bytes']:,} bytes", style="dim")


@app.command("inspect")
def inspect_command(
    file: Annotated[Path, typer.Argument(help="a .fw file")],
    as_json: Json = False,
) -> None:
    """What is in a file: every weight, how it is stored, its bits, bytes and error. Needs no network."""
    artifact = read(file)
    rows, size = rows_of(artifact), file.stat().st_size
    if as_json:
        facts = {"file": str(file), "bytes": size, "about": artifact.about, "digest": artifact.digest()}
        _print_json(facts | {"weights": [asdict(r) for r in rows]})
        return
    out.print(weights_table(rows, size))
    fp32 = artifact.about.get("fp32_bytes")
    if isinstance(fp32, int) and fp32 > 0:
        out.print(f"{fp32 / size:.1f}x smaller than fp32 ({fp32:,} bytes)")


@app.command("demo")
def demo_command(as_json: Json = False) -> None:
    """Compress a small network for handwritten digits at several sizes. Needs no network and no files."""
    from featherweight.demo.run import demo, demo_table

    with _bars() as progress:
        rows = demo(progress)
    if as_json:
        _print_json([asdict(row) for row in rows])
        return
    out.print(demo_table(rows))


def _check_output(output: Path, weights: Path | None) -> None:
    """Refuse a place that cannot be written, or that holds what we read, before any work."""
    if not output.parent.is_dir():
        raise UsageError(f"the folder {output.parent} does not exist")
    if output.exists() and not output.is_file():
        raise UsageError(f"{output} is not a file that can be replaced")
    if not os.access(output.parent, os.W_OK):
        raise UsageError(f"the folder {output.parent} cannot be written")
    if weights is not None and output.exists() and weights.exists() and output.samefile(weights):
        raise UsageError(f"{output} is the file with the weights; choose another name for the output")


def _goal(
    target: str | None,
    macs: str | None,
    bops: str | None,
    latency: str | None,
    among: str,
    score: str,
    tie: list[str] | None,
    measurements: int | None,
    front: Path | None,
) -> Goal | None:
    """What the options ask for; None without any target."""
    if target is None and macs is None and bops is None and latency is None:
        if (among, score) != ("all", "outputs") or tie or measurements is not None or front is not None:
            options = "--among, --score, --tie, --measurements and --front"
            raise UsageError(f"{options} are of a target: give --target, for example 10x")
        return None
    if front is not None:
        _check_output(front, None)
    known = measurements, front is not None, score, tuple(tie or ()), latency
    return Goal(target, macs, bops, among, *known)  # pyright: ignore - it checks


def _finetune(epochs: int, train: str | None, calibration: Any, batch_size: int) -> Finetune | None:
    """None where no epoch is asked for."""
    if epochs == 0:
        if train is not None:
            raise UsageError("--train is for finetuning: give --finetune EPOCHS, for example 5")
        return None
    data = calibration if train is None else call(train)
    if data is None:
        raise UsageError("--finetune needs data: --train file.py:function, or --data")
    return Finetune(data, epochs, batch_size=batch_size)


def _recipe(
    method: str | None,
    bits: int | None,
    sparsity: float | None,
    pattern: str | None,
    group: int | None,
    symmetric: bool | None,
    goal: Goal | None,
    file: Path | None,
    include: list[str] | None,
    exclude: list[str] | None,
    no_repair: bool,
    activations: int | None,
    sequential: bool | None,
) -> Recipe:
    """The recipe that the options name, on top of a recipe file where one is given."""
    settings: dict[str, Any] = {"method": method, "bits": bits, "sparsity": sparsity, "pattern": pattern}
    settings |= {"group": group, "symmetric": symmetric}
    settings = {k: v for k, v in settings.items() if v is not None}
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


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(finite(value), indent=1, allow_nan=False))


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on standard error, one a stage, where that is a terminal."""
    columns = TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield progress


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Our own warnings as a line each; those of others as they are."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, DatabaseWarning):
                err.print(f"[yellow]warning:[/] {escape(str(message))}", highlight=False, soft_wrap=True)
            else:
                usual(message, category, *where)

        warnings.showwarning = show
        yield


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    reuse_memory()
    try:
        app(args=sys.argv[1:] if argv is None else argv, prog_name="featherweight")
    except SystemExit as done:  # how typer ends, also after a wrong option
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except FeatherweightError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return error.exit_code
    return 0
