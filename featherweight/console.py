"""What the commands print: results on standard output, progress, warnings and errors on standard error."""

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from featherweight.database import DatabaseWarning
from featherweight.report import finite

out = Console(width=None if sys.stdout.isatty() else 110, soft_wrap=True)
err = Console(stderr=True)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(finite(value), indent=1, allow_nan=False))


@contextmanager
def bars(shown: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on standard error, one a stage, where that is a terminal."""
    columns = TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=err, transient=True, disable=not (shown and err.is_terminal)) as live:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = live.add_task(stage, total=total)
            live.update(tasks[stage], completed=done, total=total)

        yield progress


@contextmanager
def plain_warnings() -> Iterator[None]:
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
