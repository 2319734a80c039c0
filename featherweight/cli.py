"""The `featherweight` command. Errors are one line and a code: 1 a file or a layer is bad, 2 the request is wrong, 3
the target cannot be reached."""

import sys

from rich.markup import escape

from featherweight._memory import reuse_memory
from featherweight.commands import (  # noqa: F401 - they add their commands
    compressing,
    exporting,
    files,
    packing,
    reporting,
    timing,
    tuning,
)
from featherweight.commands.app import app
from featherweight.console import err
from featherweight.errors import FeatherweightError


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
