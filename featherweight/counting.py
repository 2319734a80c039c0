"""How often layers multiply: foretold from where they stand in a network, and counted while it runs.

A multiply-add is one product that is summed. Products with zeros of padding count, as they are run; biases, norms and
activations do not, nor do products of two activations, and attention layers of torch, which do not call their
projections as layers, are left out by both counts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from featherweight.data import Batch, cut, device_of, hooked
from featherweight.layers import Kind, View
from featherweight.stages import Chain, chain_of, dims_of
from featherweight.weights import Factors, Weight

_CONVS = nn.Conv1d, nn.Conv2d, nn.Conv3d
_TRANSPOSED = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
LAYERS = (*_CONVS, *_TRANSPOSED, nn.Linear, nn.Embedding, nn.RNNBase, nn.RNNCellBase)


@final
@dataclass(frozen=True, slots=True)
class Place:
    """One call of a layer. times: images of a convolution, vectors of a linear layer, indices of an embedding, steps of
    all sequences of a recurrent layer. inputs, outputs: the sides of an image before and after; none for the others."""

    times: int
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


def nominal(view: View, stride: Sequence[int]) -> Place:
    """Where nothing is known: one position of the output. A chain then costs, relative to the dense layer, what it does
    on a large image."""
    ones = (1,) * len(stride)
    return Place(1, ones, tuple(stride)) if view.transposed_groups else Place(1, tuple(stride), ones)


@torch.no_grad()
def places(model: nn.Module, batch: Batch, names: Iterable[str]) -> dict[str, tuple[Place, ...]]:
    """Every call of the modules of these names in one run of the network, which should be in eval mode."""
    modules = dict(model.named_modules())
    seen: dict[str, list[Place]] = {name: [] for name in names}

    def look(name: str) -> Callable[..., None]:
        return lambda layer, args, kwargs, y: seen[name].append(_place(layer, _first(args, kwargs), y))

    with hooked([modules[n].register_forward_hook(look(n), with_kwargs=True) for n in seen]):
        batch.to(device_of(model)).run(model)
    return {name: tuple(found) for name, found in seen.items()}


def dense_macs(view: View, kind: Kind, calls: Sequence[Place]) -> int:
    """Multiply-adds of the layer as it is, in these calls. For an embedding, which looks up, 0."""
    if kind == "embedding":
        return 0
    spent = [prod(p.inputs if view.transposed_groups else p.outputs) * p.times for p in calls]
    return prod(dims_of(view)) * sum(spent)


def chain_macs(chain: Chain, view: View, kind: Kind, calls: Sequence[Place]) -> int:
    """Multiply-adds of the chain in these calls: a side has its size of the output from the link on that has its stride
    (of a transposed convolution: after it). An embedding looks up its last link."""
    links, total = chain.links[:-1] if kind == "embedding" else chain.links, 0
    for place in calls:
        sides = list(place.inputs)
        for link in links:
            after = list(sides)
            for s in link.sides if sides else ():
                after[s] = place.outputs[s]
            total += link.numbers * place.times * prod(sides if view.transposed_groups else after)
            sides = after
    return total


def macs_of(weight: Weight, view: View, kind: Kind, calls: Sequence[Place]) -> int:
    """Multiply-adds of a layer with this weight in these calls: of factors as their chain, where they have one."""
    chain = chain_of(weight, view, kind in ("conv", "conv_transpose")) if isinstance(weight, Factors) else None
    return dense_macs(view, kind, calls) if chain is None else chain_macs(chain, view, kind, calls)


def single(batch: Batch) -> Batch:
    """The first sample of a batch; the batch where it cannot be cut."""
    return cut(batch, batch.size)[0]


@torch.no_grad()
def counted(model: nn.Module, batch: Batch) -> dict[str, int]:
    """Multiply-adds of every plain layer of torch in one run of the network, by name. The network should be in eval
    mode."""
    seen: dict[str, int] = {}

    def look(name: str) -> Callable[..., None]:
        def count(layer: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
            seen[name] = seen.get(name, 0) + _macs(layer, _first(args, kwargs), y)

        return count

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, LAYERS)]
    with hooked([m.register_forward_hook(look(n), with_kwargs=True) for n, m in layers]):
        batch.to(device_of(model)).run(model)
    return seen


def within(counts: Mapping[str, int], name: str) -> int:
    """Of a module and all that are in it."""
    return sum(n for own, n in counts.items() if own == name or own.startswith(f"{name}."))


def _first(args: Any, kwargs: Any) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _place(layer: nn.Module, x: Any, y: Any) -> Place:
    if isinstance(layer, _CONVS + _TRANSPOSED):
        rank = layer.weight.ndim - 2
        return Place(x.shape[0] if x.ndim > rank + 1 else 1, tuple(x.shape[-rank:]), tuple(y.shape[-rank:]))
    if isinstance(layer, nn.Embedding):
        return Place(x.numel())
    data = x.data if isinstance(x, PackedSequence) else x
    return Place(data.numel() // data.shape[-1])


def _macs(layer: nn.Module, x: Any, y: Any) -> int:
    """From the tensors themselves, so that it checks what was foretold."""
    if isinstance(layer, nn.Embedding):
        return 0
    if isinstance(layer, _CONVS):
        return y.numel() // layer.out_channels * layer.weight.numel()
    if isinstance(layer, _TRANSPOSED):
        return x.numel() // layer.in_channels * layer.weight.numel()
    data: Tensor = x.data if isinstance(x, PackedSequence) else x
    weights = [p.numel() for n, p in layer.named_parameters() if n.startswith("weight")]
    return data.numel() // data.shape[-1] * sum(weights)
