"""Calling what the user names: `file.py:function` or `package.module:function`. A name in a `.fw` file never gets
here; only what the user types does."""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from featherweight.errors import UsageError


def find(spec: str) -> Callable[..., Any]:
    """The callable that a spec names.

    Raises:
        UsageError: the form is wrong, or the file, module or name does not exist or fails to import.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise UsageError(f"expected file.py:function or package.module:function, got {spec!r}")
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else _from_module(place)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:  # importing runs the user's code, which may raise anything
        raise UsageError(f"{place} does not import: {type(error).__name__}: {error}") from error
    target = getattr(module, name, None)
    if not callable(target):
        some = ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise UsageError(f"{place} has no function '{name}'; it has {some or 'none'}")
    return target


def call(spec: str) -> Any:
    """Call what a spec names, without arguments, standard output kept out of ours.

    Raises:
        UsageError: it cannot be found, or it fails.
    """
    function = find(spec)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return function()
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise UsageError(f"{spec} failed: {type(error).__name__}: {error}") from error


def make_model(spec: str, weights: Path | None = None) -> nn.Module:
    """Make the network that a spec names, in eval mode, and fill it from a safetensors file where one is given.

    Raises:
        UsageError: the spec gives no nn.Module, or the weights do not fit; the differences are named.
    """
    model = call(spec)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{spec} must return a torch.nn.Module, it returned {type(model).__name__}")
    if weights is not None:
        try:
            loaded = load_file(weights)
            wrong = model.load_state_dict(loaded, strict=False)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UsageError(f"{weights} does not load into {spec}: {error}") from error
        own = model.state_dict(keep_vars=True)
        filled = {id(own[n]) for n in loaded if n in own}  # a tied tensor may be stored under one of its names
        missing = [n for n in wrong.missing_keys if id(own[n]) not in filled and not n.endswith(".num_batches_tracked")]
        if missing or wrong.unexpected_keys:
            unknown = wrong.unexpected_keys[:3]
            raise UsageError(f"{weights} does not fit {spec}: missing {missing[:3]}, unexpected {unknown}")
    return model.eval()


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    name = f"featherweight_user_{path.stem}"
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(path.resolve()):
        return known
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    if folder not in sys.path:  # it stays: functions of the file may import their neighbours when they are called
        sys.path.insert(0, folder)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _from_module(name: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")
    return importlib.import_module(name)
