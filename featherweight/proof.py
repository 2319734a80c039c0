"""What a network is worth: measured here, and in a fresh process that has nothing but the file."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featherweight.data import batches
from featherweight.errors import FormatError, UsageError
from featherweight.metrics import accuracy
from featherweight.userland import call, find


def meter(data: str | None, metric: str | None, batch_size: int) -> Callable[[nn.Module], dict[str, float]]:
    """Measures the metric, or accuracy, of networks on the data that a spec names; nothing without data."""
    if data is None:
        return lambda _network: {}
    loaded = call(data)
    if metric is None:
        cut = batches(loaded, batch_size)
        return lambda network: accuracy(network, cut)
    function = find(metric)

    def measure(network: nn.Module) -> dict[str, float]:
        try:
            with torch.no_grad(), redirect_stdout(sys.stderr):
                value = function(copy.deepcopy(network), loaded)  # it may leave it in training mode
            named = value if isinstance(value, dict) else {function.__name__: value}
            return {str(name): float(number) for name, number in named.items()}
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise UsageError(f"{metric} failed: {type(error).__name__}: {error}") from error

    return measure


def prove(
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
