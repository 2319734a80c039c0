"""A network as a graph of ONNX nodes whose parameters are named inputs, not yet numbers."""

import contextlib
import io
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.data import Batch, device_of
from featherweight.errors import UsageError
from featherweight.repair.distance import outputs

OPSET = 18  # that the exporter writes
INSTALL = "exporting to ONNX needs: pip install 'featherweight[onnx]'"


def needed() -> None:
    """
    Raises:
        UsageError: the packages are not there; the line that installs them.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{INSTALL} ({error})") from None


def float_graph(net: nn.Module, example: Batch, names: Sequence[str] = ()) -> Any:
    """The network in eval mode as an onnx.ModelProto for any number of samples, simplified. Its initializers have the
    names of the parameters and buffers.

    Args:
        example: of one batch; two samples or more, as one would be taken for a constant.
        names: tensors of the network that become inputs instead, at the end, so that nothing is computed from them
            beforehand.

    Raises:
        UsageError: the network cannot be exported; why.
    """
    needed()
    import onnx
    from onnx import helper
    from onnxscript import ir, optimizer

    model = _exported(net, example).model_proto
    wanted = set(names)
    graph = model.graph
    for tensor in [t for t in graph.initializer if t.name in wanted]:
        graph.initializer.remove(tensor)
        graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    _plain(graph)
    known = ir.serde.deserialize_model(model)
    with _quiet():
        optimizer.optimize(known, num_iterations=3)
    model = ir.serde.serialize_model(known)
    _plain(model.graph)
    onnx.checker.check_model(model)
    return model


def _exported(net: nn.Module, example: Batch) -> Any:
    device = device_of(net)
    batch = example.to(device)
    dynamic: Any = tuple(_dynamic(v, batch.size) for v in batch.args)
    named = {k: _dynamic(v, batch.size) for k, v in batch.kwargs.items()}
    try:
        with _quiet(), torch.no_grad():
            return torch.onnx.export(
                net.eval(),
                batch.args,
                kwargs=batch.kwargs or None,
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                dynamic_shapes=(*dynamic, *named.values()) if not named else {**_positional(net, dynamic), **named},
                output_names=_outputs(net, batch),
                verbose=False,
            )
    except Exception as error:  # the exporter may fail on any network, in any way
        what = str(error).strip().splitlines()
        reason = next((line for line in what if line.strip()), type(error).__name__)
        raise UsageError(f"torch cannot export {type(net).__name__} to ONNX: {reason[:300]}") from error


def _positional(net: nn.Module, dynamic: Sequence[Any]) -> dict[str, Any]:
    import inspect

    return dict(zip(inspect.signature(net.forward).parameters, dynamic, strict=False))


def _dynamic(value: Any, size: int) -> Any:
    """The first dimension of tensors, where it is that of the samples."""
    if isinstance(value, Tensor):
        return {0: torch.export.Dim.DYNAMIC} if value.ndim and len(value) == size else None
    if isinstance(value, tuple | list):
        return type(value)(_dynamic(v, size) for v in value)
    if isinstance(value, dict):
        return {k: _dynamic(v, size) for k, v in value.items()}
    return None


def _outputs(net: nn.Module, batch: Batch) -> list[str]:
    found = list(outputs(batch.run(net)))
    return ["output"] if len(found) == 1 else [f"output{k}" for k in range(len(found))]


def _plain(graph: Any) -> None:
    """Without what only debugging needs."""
    for node in graph.node:
        node.ClearField("doc_string")
        node.ClearField("name")
        del node.metadata_props[:]
    del graph.value_info[:]
    del graph.metadata_props[:]
    graph.ClearField("doc_string")
    for part in (*graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.ClearField("doc_string")


@contextlib.contextmanager
def _quiet() -> Any:
    """Exporters talk a lot."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
