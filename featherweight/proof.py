"""What a network is worth: measured here, and in a fresh process that has nothing but the file."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from featherweight.artifact import Artifact, write
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
    file: Path,
    digest: str,
    model: str,
    weights: Path | None,
    test: str | None,
    metric: str | None,
    batch_size: int,
    *,
    ignore_structure: bool = False,
) -> dict[str, Any]:
    """Read the file back in a fresh process; its digest must be ours. With test data, also measure there."""
    command = [sys.executable, "-P", "-m", "featherweight", "inspect", str(file), "--json"]
    if test is not None:
        command[4:6] = ["evaluate", str(file), "--model", model, "--data", test, "--batch-size", str(batch_size)]
        command += ["--metric", metric] if metric else []
        command += ["--ignore-structure"] if ignore_structure else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FormatError(f"{file} was written but a fresh process cannot use it: {done.stderr.strip()}")
    found = json.loads(done.stdout)
    if found["digest"] != digest:
        raise FormatError(f"{file} decodes differently in a fresh process ({found['digest']}, expected {digest})")
    return {"digest": digest, "metrics": found.get("metrics", {})}


def check_output(output: Path, weights: Path | None) -> None:
    """Refuse a place that cannot be written, or that holds what we read, before any work."""
    if not output.parent.is_dir():
        raise UsageError(f"the folder {output.parent} does not exist")
    if output.exists() and not output.is_file():
        raise UsageError(f"{output} is not a file that can be replaced")
    if not os.access(output.parent, os.W_OK):
        raise UsageError(f"the folder {output.parent} cannot be written")
    if weights is not None and output.exists() and weights.exists() and output.samefile(weights):
        raise UsageError(f"{output} is the file with the weights; choose another name for the output")


@contextmanager
def replaced(output: Path) -> Iterator[Path]:
    """A place to write to that becomes `output` at the end, whole or not at all."""
    place = output.with_name(f".{output.name}.{os.getpid()}.unproved")  # another process may write the same
    try:
        yield place
        os.replace(place, output)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"cannot write {output}: {error}") from error
    finally:
        place.unlink(missing_ok=True)


def save_proved(
    artifact: Artifact,
    output: Path,
    model: str,
    weights: Path | None,
    test: str | None,
    metric: str | None,
    batch_size: int,
) -> dict[str, Any]:
    """Write the file under another name, prove it, and only then let it take the place of `output`. Returns what
    `prove` does, and the file's bytes."""
    with replaced(output) as unproved:
        size = write(artifact, unproved)
        proof = prove(unproved, artifact.digest(), model, weights, test, metric, batch_size)
    return proof | {"bytes": size}
