"""`report`."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from featherweight import options as opt
from featherweight.commands.app import app
from featherweight.console import bars, out, plain_warnings, print_json
from featherweight.errors import UsageError
from featherweight.page import collect, html, markdown, measure
from featherweight.page.facts import read_file
from featherweight.page.given import read_given
from featherweight.page.render import check_installed
from featherweight.proof import check_output, replaced


@app.command("report")
def report_command(
    file: Annotated[Path, typer.Argument(help="a .fw file")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="the page to write (default: report.html, or report.md)")
    ] = None,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="a section for a model card in place of a page")
    ] = False,
    model: Annotated[
        str | None, typer.Option("--model", help="file.py:function that makes the dense network, trained")
    ] = None,
    weights: opt.Weights = None,
    test: Annotated[str | None, typer.Option("--test", help="test data: everything is measured on them")] = None,
    metric: opt.MetricSpec = None,
    batch_size: opt.BatchSize = 128,
    ignore_structure: opt.IgnoreStructure = False,
    run: Annotated[Path | None, typer.Option("--run", help="what `compress --json` printed")] = None,
    front: Annotated[Path | None, typer.Option("--front", help="what `compress --front` wrote")] = None,
    bench: Annotated[Path | None, typer.Option("--bench", help="what `bench --json` printed")] = None,
    as_json: opt.Json = False,
) -> None:
    """Write a page about a file: sizes, accuracy and speed beside plain ways to store the network, every weight, and
    how to make it again. With --model and --test everything is measured; without, it tells what the file knows."""
    check_installed()
    opt.check_metric(metric, test)
    if (model is None) != (test is None):
        raise UsageError("to measure, give both: --model file.py:function and --test file.py:function")
    if weights is not None and model is None:
        raise UsageError("--weights fill a network: give --model and --test, too")
    if ignore_structure and model is None:
        raise UsageError("--ignore-structure is of the network that is measured: give --model and --test, too")
    place = output or Path("report.md" if as_markdown else "report.html")
    for source in (file, weights, run, front, bench):
        check_output(place, source)
    artifact, data = read_file(file)
    given = read_given(run, front, bench, artifact.digest(), len(data))
    measured = None
    with bars() as progress, plain_warnings(), redirect_stdout(sys.stderr):
        if model is not None and test is not None:
            given_data = test, metric, batch_size
            measured = measure(file, artifact, model, weights, *given_data, progress, ignore_structure=ignore_structure)
    facts = collect(file.name, artifact, data, given, measured)
    text = markdown(facts) if as_markdown else html(facts)
    with replaced(place) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    if as_json:
        written = {"file": str(place), "bytes": len(text.encode()), "about": str(file), "digest": facts.digest}
        print_json(written | {"before": facts.before, "after": facts.after})
        return
    out.print(f"{place}: {len(text.encode()):,} bytes", markup=False)
