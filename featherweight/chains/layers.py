"""Chains as plain modules of torch: convolutions, transposed convolutions, linear layers, embeddings."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from featherweight.layers import View
from featherweight.stages import Chain, Link, weights_of
from featherweight.weights import Factors

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def sequence(layer: Any, weight: Factors, view: View, chain: Chain) -> nn.Sequential:
    """The layer, with `weight` for its weight, as a chain of modules; of its type, on its device."""
    if isinstance(layer, nn.Linear):
        made = linears(weights_of(weight, view, chain), layer.weight, layer.bias)
    elif isinstance(layer, nn.Embedding):
        made = _embedding(layer, weights_of(weight, view, chain))
    else:
        values = weights_of(weight, view, chain)
        made = [_conv(layer, link, w) for link, w in zip(chain.links, values, strict=True)]
        if layer.bias is not None:
            made[-1].register_parameter("bias", _like(layer.bias.detach().clone(), layer.bias))
    return nn.Sequential(*made).train(layer.training)


def linears(weights: Sequence[Tensor], like: Tensor, bias: Tensor | None) -> list[nn.Module]:
    """Linear layers of these (outputs, inputs) weights, of the type and on the device of `like`."""
    made: list[nn.Module] = []
    for w in weights:
        layer = skip_init(nn.Linear, w.shape[1], w.shape[0], bias=False, device=like.device, dtype=like.dtype)
        layer.weight = _like(w, like)
        made.append(layer)
    if bias is not None:
        made[-1].register_parameter("bias", _like(bias.detach().clone(), bias))
    return made


def _embedding(layer: nn.Embedding, weights: Sequence[Tensor]) -> list[nn.Module]:
    """Indices choose among the rows of the last link; what is before it, turned round, comes after."""
    *before, rows = weights
    kind = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    first = skip_init(nn.Embedding, rows.shape[0], rows.shape[1], layer.padding_idx, **kind)
    first.weight = _like(rows, layer.weight)
    return [first, *linears([w.T for w in reversed(before)], layer.weight, None)]


def _conv(layer: Any, link: Link, w: Tensor) -> nn.Module:
    """One link: its own sides have the layer's stride, padding and dilation."""
    sides = range(len(link.kernel))

    def own(setting: Any, neutral: int) -> tuple[int, ...]:
        return tuple(setting[s] if s in link.sides else neutral for s in sides)

    named = isinstance(layer.padding, str)
    padding = (layer.padding if link.sides else 0) if named else own(layer.padding, 0)
    common = {"groups": link.groups, "bias": False, "device": layer.weight.device, "dtype": layer.weight.dtype}
    common |= {"stride": own(layer.stride, 1), "dilation": own(layer.dilation, 1), "padding": padding}
    turned = isinstance(layer, tuple(_TRANSPOSED.values())) and bool(link.sides)
    if turned:
        common["output_padding"] = own(layer.output_padding, 0)
        grouped = w.reshape(link.groups, -1, *w.shape[1:]).transpose(1, 2)  # inputs of a group before its outputs
        w = grouped.reshape(-1, *grouped.shape[2:])
    else:
        common["padding_mode"] = layer.padding_mode if link.sides else "zeros"
    kinds = _TRANSPOSED if turned else _CONVS
    made = skip_init(kinds[len(link.kernel)], link.inputs, link.outputs, link.kernel, **common)
    made.weight = _like(w, layer.weight)
    return made


def _like(values: Tensor, parameter: Tensor) -> nn.Parameter:
    own = torch.empty(values.shape, dtype=parameter.dtype, device=parameter.device).copy_(values)
    return nn.Parameter(own, requires_grad=parameter.requires_grad)
