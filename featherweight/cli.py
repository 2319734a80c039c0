"""The `featherweight` command. Each command parses, calls the library and prints; errors are one line and a code:
1 a file or a layer is bad, 2 the request is wrong, 3 the target cannot be reached."""

import copy
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from featherweight.artifact import fill, read
from featherweight.data import batches
from featherweight.database import Database, DatabaseWarning
from featherweight.errors import FeatherweightError, FormatError, UsageError
from featherweight.metrics import accuracy
from featherweight.pipeline import Plan, compress, plan, settle
from featherweight.recipe import Recipe, method_of, read_recipe
from featherweight.report import float_inputs_lines, left_alone_table, rows_of, summary, weights_table
from featherweight.userland import call, find, make_model

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
    recipe: RecipeFile = None,
    include: Include = None,
    exclude: Exclude = None,
    sequential: Sequential = None,
    no_repair: NoRepair = False,
    test: Annotated[str | None, typer.Option("--test", help="test data: accuracy is printed before and after")] = None,
    metric: MetricSpec = None,
    batch_size: BatchSize = 128,
    database: DatabaseFolder = None,
    as_json: Json = False,
) -> None:
    """Compress a network, write the file, read it back in a fresh process and print what came of it."""
    if metric and not test:
        raise UsageError("--metric needs the data to measure on: --test file.py:function")
    _check_output(output, weights)
    if database is not None:
        Database.at(database)
    settings = method, bits, sparsity, pattern, group, symmetric
    chosen = _recipe(*settings, target, recipe, include, exclude, no_repair, activations, sequential)
    about = {"model": model, "tool": f"featherweight {version('featherweight')}"}
    unproved = output.with_name(f".{output.name}.unproved")
    try:
        # whatever the user's code prints is not our output
        with _bars() as progress, _plain_warnings(), redirect_stdout(sys.stderr):
            network = make_model(model, weights)
            settle(network, chosen, target)
            calibration = call(data) if data else None
            before = _measure(network, test, metric, batch_size)
            small = compress(
                network,
                calibration,
                recipe=chosen,
                target=target,
                batch_size=batch_size,
                about=about,
                database=database,
                progress=progress,
            )
            size = small.save(unproved)
            progress("read back", 0, 1)
            proof = _prove(unproved, small.artifact.digest(), model, weights, test, metric, batch_size)
            os.replace(unproved, output)
            progress("read back", 1, 1)
    finally:
        unproved.unlink(missing_ok=True)
    report = replace(small.report, file_bytes=size, before=before, after=proof["metrics"])
    if as_json:
        _print_json(proof["metrics"] | report.to_dict() | {"file": str(output), "digest": proof["digest"]})
        return
    out.print(weights_table(report.rows, size), "")
    out.print(left_alone_table(report.left_alone), "")
    out.print(summary(report, str(output)))
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
    recipe: RecipeFile = None,
    include: Include = None,
    exclude: Exclude = None,
    batch_size: BatchSize = 128,
    as_json: Json = False,
) -> None:
    """Dry run: every weight with its method, or the reason why not; predicted bytes and time."""
    settings = method, bits, sparsity, pattern, group, symmetric
    chosen = _recipe(*settings, target, recipe, include, exclude, False, activations, None)
    network = make_model(model, weights)
    found = plan(network, call(data) if data else None, recipe=chosen, target=target, batch_size=batch_size)
    if as_json:
        _print_json(asdict(found))
        return
    out.print(_plan_table(found), "")
    out.print(left_alone_table(found.left_alone), *float_inputs_lines(found.float_inputs), "", sep="\n")
    ratio = found.baselines.fp32 / found.file_bytes
    out.print(f"predicted file {found.file_bytes:,} bytes, {ratio:.1f}x smaller than fp32 ({found.baselines.fp32:,})")
    out.print(f"predicted time {found.seconds:.0f} s, {found.capture_seconds:.0f} s of it to read the calibration data")


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
    measured = _measure(network, data, metric, batch_size)
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


def _recipe(
    method: str | None,
    bits: int | None,
    sparsity: float | None,
    pattern: str | None,
    group: int | None,
    symmetric: bool | None,
    target: str | None,
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
    if settings and target is not None:
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


def _measure(network: nn.Module, data: str | None, metric: str | None, batch_size: int) -> dict[str, float]:
    """The metric, or accuracy, of a network on the data that a spec names; nothing without data."""
    if data is None:
        return {}
    loaded = call(data)
    if metric is None:
        return accuracy(network, batches(loaded, batch_size))
    function = find(metric)
    try:
        with torch.no_grad(), redirect_stdout(sys.stderr):
            value = function(copy.deepcopy(network), loaded)  # it may leave it in training mode
        named = value if isinstance(value, dict) else {function.__name__: value}
        return {str(name): float(number) for name, number in named.items()}
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise UsageError(f"{metric} failed: {type(error).__name__}: {error}") from error


def _prove(
    file: Path, digest: str, model: str, weights: Path | None, test: str | None, metric: str | None, batch_size: int
) -> dict[str, Any]:
    """Read the file back in a fresh process; its digest must be ours. With test data, also measure there."""
    command = [sys.executable, "-P", "-m", "featherweight", "inspect", str(file), "--json"]
    if test is not None:
        command[4:6] = ["evaluate", str(file), "--model", model, "--data", test, "--batch-size", str(batch_size)]
        command += ["--metric", metric] if metric else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FormatError(f"{file} was written but a fresh process cannot use it: {done.stderr.strip()}")
    found = json.loads(done.stdout)
    if found["digest"] != digest:
        raise FormatError(f"{file} decodes differently in a fresh process ({found['digest']}, expected {digest})")
    return {"digest": digest, "metrics": found.get("metrics", {})}


def _plan_table(found: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("weight", "kind", "shape", "method"):
        table.add_column(title, overflow="fold")
    for title in ("fp32 bytes", "bytes", "seconds"):
        table.add_column(title, justify="right", no_wrap=True)
    rounded = any(row.input_bits for row in found.rows)
    if rounded:
        table.add_column("inputs", justify="right", no_wrap=True)
    for row in found.rows:
        shape = "x".join(map(str, row.shape))
        sizes = f"{4 * row.params:,}", f"{row.bytes:,}", f"{row.seconds:.1f}"
        inputs = [f"{row.input_bits} bit" if row.input_bits else "float"] * rounded
        table.add_row(escape(row.name), row.kind, shape, row.method, *sizes, *inputs)
    return table


def _print_json(value: Any) -> None:
    def plain(item: Any) -> Any:  # JSON has no NaN
        match item:
            case float():
                return item if math.isfinite(item) else None
            case dict():
                return {k: plain(v) for k, v in item.items()}
            case list() | tuple():
                return [plain(v) for v in item]
        return item

    typer.echo(json.dumps(plain(value), indent=1, allow_nan=False))


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
    try:
        app(args=sys.argv[1:] if argv is None else argv, prog_name="featherweight")
    except SystemExit as done:  # how typer ends, also after a wrong option
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except FeatherweightError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return error.exit_code
    return 0
