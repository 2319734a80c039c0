"""A network -> the graph of an ONNX model, by torch's own exporter, cleaned by onnxscript's optimizer.

Tensors that are to be stored in another form are held: while the optimizer works they are inputs of the graph, so that
nothing is folded into them, and whatever reads them stays.
"""

import inspect
import io
import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.activations import simulated
from featherweight.data import Batch
from featherweight.errors import FormatError, UsageError

INSTALL = "ONNX export needs onnx, onnxscript and onnxruntime: pip install onnx onnxscript onnxruntime"
CONSTANT = "torch takes it for a constant"  # why a batch size is fixed in the exported graph
LARGEST = 2**31 - 2**20  # bytes of all constants: protobuf takes less than 2**31, operators included
SMALLEST = 2  # samples of an example: torch takes a first dimension of 1 for a fixed one
FIRST_OPSET = 20  # what torch's exporter writes without converting
_TRAINING_ONLY = ".num_batches_tracked"


def graph_of(model: nn.Module, example: Batch, held: Collection[str] = ()) -> Any:
    """The network in eval mode as an `onnx.ModelProto`: initializers keep the names of the network's tensors, the first
    dimension of the inputs is dynamic where the network allows it. Without `held`, BatchNorms are folded into
    convolutions; the initializers named there are left whole, in float32, and read by the same operators as in torch.

    Args:
        example: one call of the network; its samples are repeated where there is only one.

    Raises:
        UsageError: a package is missing, or torch cannot export the network; the first reason is named.
    """
    try:
        import onnx_ir
        from onnxscript import optimizer
    except ImportError as error:
        raise UsageError(f"{INSTALL} ({error})") from error
    example = doubled(example)
    args, shapes = bound(model, example)
    with quiet():
        try:
            program: Any = torch.onnx.export(
                model.eval(), (), kwargs=args, dynamo=True, optimize=False, verbose=False, dynamic_shapes=shapes
            )
        except Exception as error:  # the exporter runs the user's code, and may raise anything
            raise UsageError(f"torch cannot export {type(model).__name__} to ONNX: {_reason(error)}") from error
        graph = program.model.graph
        waiting = {n: graph.initializers[n] for n in held if n in graph.initializers}
        values = {n: v.const_value for n, v in waiting.items()}
        for name, value in waiting.items():
            del graph.initializers[name]
            value.const_value = None
            graph.inputs.append(value)
        whole = optimizer.optimize(program.model)
        inputs = {v.name: v for v in whole.graph.inputs}
        for name, tensor in values.items():
            value = inputs[name]
            whole.graph.inputs.remove(value)
            value.const_value = tensor
            whole.graph.initializers[name] = value
    return onnx_ir.to_proto(whole)


def check_model(model: nn.Module) -> None:
    """Refuse a network in another type than the one that weights are decoded to, and layers that ONNX has not.

    Raises:
        UsageError: it is one.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.LSTM) and module.proj_size:
            own = f"'{name}' is an LSTM with projections (proj_size={module.proj_size})"
            raise UsageError(f"{own}, for which ONNX has no operator: export a .pt2 file")
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            own = str(tensor.dtype).removeprefix("torch.")
            raise UsageError(
                f"ONNX files are written in float32, and '{name}' is {own}: export model.float(), with data in float32"
            )


def check_graph(proto: Any) -> None:
    """Refuse a graph that is not one, or that no file can hold.

    Raises:
        FormatError: it is no valid ONNX.
        UsageError: it is larger than an ONNX file can be.
    """
    import onnx

    check_size(proto)
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise FormatError(f"the exported graph is no valid ONNX: {_reason(error)}") from error


def check_size(proto: Any) -> None:
    """Refuse a graph that is larger than an ONNX file can be.

    Raises:
        UsageError: it is.
    """
    size = sum(len(t.raw_data) for t in proto.graph.initializer)
    if size > LARGEST:
        what = f"the network takes {size / 1e9:.2f} GB in ONNX, where a file holds {LARGEST / 1e9:.2f} GB at most"
        raise UsageError(f"{what}: export a .pt2 file")


def converted(proto: Any, opset: int) -> Any:
    """The same model with the operators of a later set.

    Raises:
        UsageError: onnxscript does not know how.
    """
    import onnx_ir
    from onnxscript import version_converter

    with quiet():
        try:
            model = onnx_ir.from_proto(proto)
            version_converter.convert_version(model, opset)
        except Exception as error:  # whatever the converter raises
            raise UsageError(f"the graph cannot be converted to operator set {opset}: {_reason(error)}") from error
    if model.opset_imports[""] != opset:
        raise UsageError(f"the graph cannot be converted to operator set {opset}: onnxscript left it as it was")
    return onnx_ir.to_proto(model)


def doubled(example: Batch) -> Batch:
    """The example with at least SMALLEST samples, repeated where it has fewer."""
    if example.size >= SMALLEST or example.size == 0:
        return example
    times = -(-SMALLEST // example.size)
    return _samples(example, lambda values: torch.cat([values] * times))


def few(example: Batch, most: int) -> Batch:
    """At most so many of its samples."""
    return _samples(example, lambda values: values[:most])


def first(example: Batch) -> Batch:
    """Its first sample."""
    return few(example, 1)


def _samples(example: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The example with this done to every tensor that has its samples in the first dimension."""

    def one(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) and value.ndim and len(value) == example.size else value

    return Batch(tuple(one(v) for v in example.args), {k: one(v) for k, v in example.kwargs.items()})


def bound(model: nn.Module, example: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
    """The example's values by the names that the network's `forward` gives them, and for each which of its dimensions
    are dynamic: the first, where it is that of the samples."""
    forward = type(model).forward.__get__(model) if simulated(model) else model.forward  # that takes anything
    try:
        bound = inspect.signature(forward).bind(*example.args, **example.kwargs)
    except TypeError as error:
        raise UsageError(f"{type(model).__name__} does not accept the example: {error}") from error
    auto = torch.export.Dim.AUTO

    def shape(value: Any) -> Any:
        match value:
            case Tensor():
                return {0: auto} if value.ndim and len(value) == example.size else {}
            case tuple() | list():
                return type(value)(shape(v) for v in value)
            case dict():
                return {k: shape(v) for k, v in value.items()}
        return None

    values: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = inspect.signature(forward).parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            raise UsageError(
                f"{type(model).__name__}.forward takes *{name}: wrap it in a module whose forward names its inputs"
            )
        values |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return values, {k: shape(v) for k, v in values.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters and runtimes print and warn of: their failures are raised."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")]
    levels = [x.level for x in loggers]
    try:
        for x in loggers:
            x.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for x, level in zip(loggers, levels, strict=True):
            x.setLevel(level)


def _reason(error: BaseException) -> str:
    """The innermost cause, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) < 300 else text[:297] + '...'}"


def dynamic(model: Any) -> bool:
    """Whether the first dimension of some input of an `onnx.ModelProto` is dynamic."""
    dims = [i.type.tensor_type.shape.dim for i in model.graph.input]
    return any(d and d[0].dim_param for d in dims)


def fixed_note(size: int, reason: str) -> str:
    """What is said of a graph that takes batches of one size only."""
    return f"the batch size is fixed at {size}: {reason}"


def fix_batch(model: Any, size: int) -> None:
    """Let the dynamic dimensions of inputs, and those of outputs that are the same, be of this size."""
    for dim in _free_dims(model.graph):
        dim.dim_value = size


def name_batch(graph: Any) -> None:
    """Call the dynamic dimensions of inputs, and those of outputs that are the same, batch; a second one batch_2."""
    names: dict[str, str] = {}
    for dim in _free_dims(graph):
        dim.dim_param = names.setdefault(dim.dim_param, f"batch_{len(names) + 1}" if names else "batch")


def _free_dims(graph: Any) -> list[Any]:
    """The dimensions of inputs and outputs that have an input's own symbol. Those that have another one, 5 times it,
    say, become unknown, as no name is true of them."""
    inputs = [d for v in graph.input for d in v.type.tensor_type.shape.dim if d.dim_param]
    own = {d.dim_param for d in inputs}
    outputs = [d for v in graph.output for d in v.type.tensor_type.shape.dim if d.dim_param]
    for dim in outputs:
        if dim.dim_param not in own:
            dim.Clear()
    return inputs + [d for d in outputs if d.dim_param in own]
