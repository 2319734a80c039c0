"""Shared by all tests."""

import sys
from pathlib import Path

import pytest
import torch

from featherweight import reuse_memory
from featherweight.cli import main

SHARED = Path(__file__).resolve().parents[2] / "shared"

reuse_memory()
torch.set_num_threads(1)  # small problems: threads cost more than they give, above all beside other work


@pytest.fixture(scope="session")
def zoo():
    """The trained networks and data of ../shared, or a skip with the reason."""
    if not (SHARED / "zoo.py").is_file():
        pytest.skip("../shared with trained networks and data is absent")
    sys.path.insert(0, str(SHARED))
    try:
        import zoo
    finally:
        sys.path.remove(str(SHARED))
    return zoo


@pytest.fixture
def run(capsys):
    """Run the command line in this process: (exit code, standard output, standard error)."""

    def runner(*args: object) -> tuple[int, str, str]:
        code = main([str(a) for a in args])
        got = capsys.readouterr()
        assert "Traceback" not in got.err + got.out
        return code, got.out, got.err

    return runner
