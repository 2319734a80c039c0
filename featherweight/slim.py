"""Layers that compute only what is left of them.

A layer whose weight has whole rows or input channels of zeros is made smaller in place: the remaining channels are
taken from its input, and its outputs are put where they belong among constant ones. The network around it sees the same
shapes and, up to rounding, the same numbers.
"""

import copy
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn

from featherweight.activations import simulated
from featherweight.errors import UsageError
from featherweight.standin import known_as, settings_of

M = TypeVar("M", bound=nn.Module)

_CONVS = nn.Conv1d, nn.Conv2d, nn.Conv3d
_READERS = nn.MultiheadAttention, nn.TransformerEncoderLayer  # have a fast path that takes weights out of layers


@final
class Slim(nn.Module):
    """layer: a linear layer or a convolution without groups, which becomes smaller. rows, channels: int64, those that
    stay, at least one of each. A subclass keeps whatever else it does."""

    layer: nn.Module

    def __init__(self, layer: nn.Module, rows: Tensor, channels: Tensor) -> None:
        super().__init__()
        settings = settings_of(layer)
        weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
        outputs, inputs = weight.shape[:2]
        self.rank = weight.ndim - 2  # dimensions of a sample beyond its channels
        self.layer, self.outputs, self.inputs = layer, outputs, inputs
        own = weight.detach()[rows][:, channels].contiguous()
        layer.weight = nn.Parameter(own, requires_grad=weight.requires_grad)
        names = ("out_features", "in_features") if isinstance(layer, nn.Linear) else ("out_channels", "in_channels")
        for name, size in zip(names, (len(rows), len(channels)), strict=True):
            setattr(layer, name, size)
        others = bias.detach().clone() if bias is not None else own.new_zeros(outputs)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach()[rows].clone(), requires_grad=bias.requires_grad)
        device = weight.device
        self.rows: Tensor | None
        self.channels: Tensor | None
        self.constant: Tensor
        self.register_buffer("rows", None if len(rows) == outputs else rows.to(device), persistent=False)
        self.register_buffer("channels", None if len(channels) == inputs else channels.to(device), persistent=False)
        self.register_buffer("constant", others.reshape(-1, *[1] * self.rank), persistent=False)
        known_as(self, settings)

    @property
    def weight(self) -> Tensor:
        """As large as before, for code that reads it without calling the layer."""
        own = self.layer.get_parameter("weight")
        rows = torch.arange(self.outputs, device=own.device) if self.rows is None else self.rows
        channels = torch.arange(self.inputs, device=own.device) if self.channels is None else self.channels
        whole = own.new_zeros(self.outputs, self.inputs, *own.shape[2:])
        whole[rows[:, None], channels] = own
        return whole

    @property
    def bias(self) -> Tensor | None:
        return None if self.layer._parameters.get("bias") is None else self.constant.reshape(-1)

    def forward(self, x: Tensor) -> Tensor:
        where = -1 - self.rank
        if self.channels is not None:
            x = x.index_select(where, self.channels)
        y = self.layer(x)
        if self.rows is None:
            return y
        shape = list(y.shape)
        shape[where] = self.outputs
        return self.constant.to(y.dtype).expand(shape).clone().index_copy_(where, self.rows, y)


def slim(model: M) -> M:
    """Make the layers of a network smaller in place, where whole rows or input channels of their weights are zero, as
    pruning by channels leaves them. Returns the network, for inference: names of its tensors change.

    Linear layers and convolutions without groups are made smaller, unless their weight is tied to another, they belong
    to an attention or encoder layer of torch, have forward hooks, are the whole network, or are of a class of yours
    that then gives something else. What is left of a layer is computed as before; outputs of which nothing is left
    become their bias.

    Raises:
        UsageError: the network simulates rounded inputs, which go by the names of its tensors.
    """
    if simulated(model):
        raise UsageError("this network rounds inputs by the names of its weights, which would change")
    for name in [n for n, _ in model.named_parameters() if fits(model, n)]:
        place, _, _ = name.rpartition(".")
        parent, _, own = place.rpartition(".")
        layer = model.get_submodule(place)
        setattr(model.get_submodule(parent), own, narrowed(layer, *extent(layer.get_parameter("weight"))))
    return model


def narrowed(layer: nn.Module, rows: Tensor, channels: Tensor) -> nn.Module:
    """The layer, made smaller in place: only these rows and input channels, int64, stay; one of each at least. The
    layer itself where everything does."""
    weight = layer.get_parameter("weight")
    if len(rows) == weight.shape[0] and len(channels) == weight.shape[1]:
        return layer
    first = torch.zeros(1, dtype=torch.int64)
    made = Slim(layer, rows if len(rows) else first, channels if len(channels) else first)
    return made.train(layer.training)


def extent(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and input channels with anything but zeros in them, int64 each."""
    used = (weight.detach() != 0).reshape(*weight.shape[:2], -1).any(dim=2).cpu()
    return used.any(dim=1).nonzero()[:, 0], used.any(dim=0).nonzero()[:, 0]


def fits(model: nn.Module, name: str) -> bool:
    """Whether the layer with the weight of this name can be made smaller."""
    place, _, own = name.rpartition(".")
    if own != "weight" or not place:
        return False
    layer, parent = model.get_submodule(place), model.get_submodule(place.rpartition(".")[0])
    known = isinstance(layer, nn.Linear) or (isinstance(layer, _CONVS) and layer.groups == 1)
    if not known or layer._forward_pre_hooks or layer._forward_hooks or isinstance(parent, _READERS):
        return False
    weight = layer.get_parameter("weight")
    alone = sum(p is weight for _, p in model.named_parameters(remove_duplicate=False)) == 1
    return alone and (type(layer) in (nn.Linear, *_CONVS) or _agrees(layer))


@torch.no_grad()
def _agrees(layer: Any) -> bool:
    """Whether a layer of another class gives the same after it is made smaller, tried on a copy with random weights. It
    may do with its weight, or its input, what no smaller one can do alike."""
    random = torch.Generator().manual_seed(0)
    try:
        whole = copy.deepcopy(layer)
        weight = whole.get_parameter("weight")
        rows, channels = torch.arange(0, weight.shape[0], 2), torch.arange(0, weight.shape[1], 2)
        kept = torch.zeros(weight.shape)
        kept[rows[:, None], channels] = torch.randn(len(rows), len(channels), *weight.shape[2:], generator=random)
        weight.copy_(kept)
        sides = []
        for i, size in enumerate(weight.shape[2:]):
            padding = 0 if isinstance(whole.padding, str) else whole.padding[i]
            sides.append(whole.dilation[i] * (size - 1) + 9 + 2 * padding)
        x = torch.randn(1, weight.shape[1], *sides, generator=random).to(weight)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            want = whole(x)
            got = Slim(copy.deepcopy(whole), rows, channels)(x)
        near = 1e-2 if weight.dtype in (torch.float16, torch.bfloat16) else 1e-4
        return want.shape == got.shape and bool((want - got).abs().max() <= near * want.abs().max())
    except Exception:  # a subclass may raise anything
        return False
