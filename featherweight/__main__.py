"""`python -m featherweight`, and the `featherweight` command."""

import sys

from featherweight.cli import main


def run() -> None:
    """Exit with the code of the command line."""
    sys.exit(main())


if __name__ == "__main__":
    run()
