"""See every use of a unit's weight while the network runs, with the inputs that the weight really multiplies.

The network is not traced and its modules are not touched: a `TorchFunctionMode` looks at each torch function that is
called with a unit's parameter as its weight. So overridden `forward`s, padding modes, functional use, shared and reused
modules are all seen as they are, and a recurrent layer's hidden states are the ones it really computes.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from featherweight.layers import Unit

CHUNK = 1 << 22  # numbers unfolded at a time: 16 MB of float32, still in reach of the last-level cache

Inputs: TypeAlias = Iterator[tuple[int, Tensor]]
"""Pieces of a weight's inputs: (first row block, (blocks, cols, samples)); see Unit.groups."""

OnCall: TypeAlias = Callable[[Unit, Inputs | Tensor], None]
"""Called before the function runs. An embedding gives its indices (integer tensor) instead of inputs."""


@final
class Calls(TorchFunctionMode):
    """While active, `on_call` is told of every use of the units' weights in `model`."""

    def __init__(self, model: nn.Module, units: Sequence[Unit], on_call: OnCall) -> None:
        super().__init__()
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._units = {id(parameters[u.name]): u for u in units}
        self._on_call = on_call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for weight, inputs in _uses(func, args, kwargs):
            if (unit := self._units.get(id(weight))) is not None:
                self._on_call(unit, inputs)
        return func(*args, **kwargs)


def eager() -> AbstractContextManager[Any]:
    """Run compiled parts of a network as they are written: `torch.compile` would trace through `Calls` and call it with
    other numbers. While the compiler is not even loaded (it takes seconds) no network has such parts."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _uses(func: Any, args: tuple, kwargs: dict) -> Iterator[tuple[Tensor, Inputs | Tensor]]:
    """(weight, inputs) for each weight that this call multiplies with something."""
    if func is F.linear:
        x, weight, *_ = _bind("input weight bias", args, kwargs)
        yield weight, _columns(x)
    elif func in (F.conv1d, F.conv2d, F.conv3d):
        x, weight, _, *geometry = _bind("input weight bias stride padding dilation groups", args, kwargs)
        yield weight, _conv_patches(x, weight, *_filled(geometry, 1, 0, 1, 1))
    elif func in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d):
        names = "input weight bias stride padding output_padding groups dilation"
        x, weight, _, *geometry = _bind(names, args, kwargs)
        yield weight, _transposed_patches(x, weight, *_filled(geometry, 1, 0, 0, 1, 1))
    elif func in (F.embedding, F.embedding_bag):
        indices, weight, *_ = _bind("input weight", args, kwargs)
        yield weight, indices
    elif func is F.multi_head_attention_forward:
        yield from _attention(args, kwargs)
    elif func in _CELLS:
        x, state, weight_ih, weight_hh, *_ = _bind("input hx w_ih w_hh", args, kwargs)
        yield weight_ih, _columns(x)
        yield weight_hh, _columns(state[0] if isinstance(state, tuple | list) else state)
    elif func in _RECURRENT:
        yield from _recurrent(func, args)


def _bind(names: str, args: tuple, kwargs: dict) -> list[Any]:
    """Arguments by position, whether they came by position or by name; None where not given."""
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names.split())]


def _filled(values: list[Any], *defaults: Any) -> list[Any]:
    return [default if value is None else value for value, default in zip(values, defaults, strict=True)]


def _columns(x: Tensor) -> Inputs:
    """(..., cols) as one block of columns."""
    yield 0, x.reshape(-1, x.shape[-1]).T.unsqueeze(0)


# ---------------------------------------------------------------- convolutions
def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """A per-dimension setting given once or per dimension."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _conv_patches(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Inputs:
    taps = weight.shape[2:]
    dims = len(taps)
    stride, dilation = _each(stride, dims), _each(dilation, dims)
    reach = [d * (k - 1) for d, k in zip(dilation, taps, strict=True)]
    if padding == "same":  # torch puts the odd one behind
        before, after = [r // 2 for r in reach], [r - r // 2 for r in reach]
    else:
        before = after = [0] * dims if padding == "valid" else list(_each(padding, dims))
    x = x if x.ndim == dims + 2 else x.unsqueeze(0)
    yield from _patches(x, taps, stride, dilation, before, after, groups)


def _transposed_patches(
    x: Tensor, weight: Tensor, stride: Any, padding: Any, output_padding: Any, groups: int, dilation: Any
) -> Inputs:
    """A transposed convolution is a convolution of the input with `stride - 1` zeros between its points, with the
    taps in reverse."""
    taps = weight.shape[2:]
    dims = len(taps)
    stride, padding, output_padding, dilation = (_each(v, dims) for v in (stride, padding, output_padding, dilation))
    x = x if x.ndim == dims + 2 else x.unsqueeze(0)
    spread = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)))
    spread[(..., *(slice(None, None, s) for s in stride))] = x
    before = [d * (k - 1) - p for d, k, p in zip(dilation, taps, padding, strict=True)]
    after = [b + o for b, o in zip(before, output_padding, strict=True)]
    yield from _patches(spread, taps, (1,) * dims, dilation, before, after, groups, reverse=True)


def _patches(
    x: Tensor,  # (batch, channels, *space)
    taps: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
    groups: int,
    reverse: bool = False,
) -> Inputs:
    """The explicit unfold, (groups, channels / groups * taps, batch * positions), some images at a time."""
    dims = len(taps)
    pads = [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]
    positions = 1
    for n, b, a, d, k, s in zip(x.shape[2:], before, after, dilation, taps, stride, strict=True):
        positions *= max((n + b + a - d * (k - 1) - 1) // s + 1, 0)
    per_image = max(x.shape[1] * torch.Size(taps).numel() * positions, 1)
    for part in x.split(max(CHUNK // per_image, 1)):
        windows = F.pad(part, pads)
        for i in range(dims):
            span = dilation[i] * (taps[i] - 1) + 1
            windows = windows.unfold(2 + i, span, stride[i])[..., :: dilation[i]]
        if reverse:
            windows = windows.flip(tuple(range(-dims, 0)))
        # (batch, channels, *positions, *taps) -> (channels, *taps, batch, *positions)
        order = (1, *range(2 + dims, 2 + 2 * dims), 0, *range(2, 2 + dims))
        yield 0, windows.permute(order).reshape(groups, x.shape[1] // groups * torch.Size(taps).numel(), -1)


# ---------------------------------------------------------------- attention
_MHA = (
    "query key value embed_dim_to_check num_heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn dropout_p "
    "out_proj_weight out_proj_bias training key_padding_mask need_weights attn_mask use_separate_proj_weight "
    "q_proj_weight k_proj_weight v_proj_weight static_k static_v average_attn_weights is_causal"
)


def _attention(args: tuple, kwargs: dict) -> Iterator[tuple[Tensor, Inputs]]:
    values = dict(zip(_MHA.split(), _bind(_MHA, args, kwargs), strict=True))
    required = dict.fromkeys(_MHA.split()[:13])  # no defaults, and None is a value of some
    given = required | {name: value for name, value in values.items() if value is not None}
    inputs = [values["query"], values["key"], values["value"]]
    if values["use_separate_proj_weight"]:
        for name, x in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), inputs, strict=True):
            yield values[name], _columns(x)
    else:
        blocks = ((i, x.reshape(1, -1, x.shape[-1]).mT) for i, x in enumerate(inputs))
        yield values["in_proj_weight"], blocks
    width = values["out_proj_weight"].shape[1]
    identity = torch.eye(width, dtype=inputs[0].dtype, device=inputs[0].device)
    before_output = given | {"out_proj_weight": identity, "out_proj_bias": None}
    heads, _ = F.multi_head_attention_forward(**before_output)  # pyright: ignore[reportArgumentType]
    yield values["out_proj_weight"], _columns(heads)


# ---------------------------------------------------------------- recurrent layers
_RECURRENT = {torch.lstm: 4, torch.gru: 3, torch.rnn_tanh: 1, torch.rnn_relu: 1}  # gates
_CELLS = (torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell)


def _recurrent(func: Any, args: tuple) -> Iterator[tuple[Tensor, Inputs]]:
    """Run layer after layer, so that the inputs of inner layers and all hidden states are seen.

    Every call is brought to the packed form: rows of all time steps behind each other, step t having sizes[t] rows.
    """
    if isinstance(args[1], Tensor) and not args[1].is_floating_point():
        rows, sizes, state, weights, biased, layers, _, _, both = args
    else:
        x, state, weights, biased, layers, _, _, both, batch_first = args
        x = x.transpose(0, 1) if batch_first else x
        sizes = torch.full((x.shape[0],), x.shape[1], dtype=torch.int64)
        rows = x.reshape(-1, x.shape[-1])
    states = state if isinstance(state, tuple | list) else (state,)
    directions = 2 if both else 1
    each = len(weights) // (layers * directions)  # tensors a layer and direction: ih, hh, [bias_ih, bias_hh], [hr]
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            own = weights[k * each : (k + 1) * each]
            start = [s[k : k + 1] for s in states]
            order = _reversed(sizes) if direction else None
            steps = rows if order is None else rows[order]
            yield own[0], _columns(rows)
            hidden = _run(func, steps, sizes, start, own, biased)
            yield own[1], _columns(_previous(hidden, sizes, start[0][0]))
            if each in (3, 5):
                yield own[-1], _columns(_before_projection(steps, hidden, sizes, start, own, biased))
            outputs.append(hidden if order is None else hidden[torch.argsort(order)])
        rows = torch.cat(outputs, dim=1)


def _run(func: Any, rows: Tensor, sizes: Tensor, start: list[Tensor], own: Sequence[Tensor], biased: bool) -> Tensor:
    """Hidden states of one layer in one direction, packed like its input."""
    state = tuple(start) if func is torch.lstm else start[0]
    return func(rows, sizes, state, list(own), biased, 1, 0.0, False, False)[0]


def _offsets(sizes: Tensor) -> list[int]:
    return [0, *sizes.cumsum(0).tolist()]


def _reversed(sizes: Tensor) -> Tensor:
    """Row order that turns every packed sequence back to front."""
    offsets, lengths = _offsets(sizes), [int((sizes > i).sum()) for i in range(int(sizes[0]))]
    return torch.tensor([offsets[lengths[i] - 1 - t] + i for t, n in enumerate(sizes.tolist()) for i in range(n)])


def _previous(hidden: Tensor, sizes: Tensor, first: Tensor) -> Tensor:
    """The hidden state that each packed row was computed from."""
    offsets = _offsets(sizes)
    steps = [hidden[offsets[t - 1] : offsets[t - 1] + n] for t, n in enumerate(sizes.tolist()) if t]
    return torch.cat([first[: int(sizes[0])], *steps])


def _before_projection(
    rows: Tensor, hidden: Tensor, sizes: Tensor, start: list[Tensor], own: Sequence[Tensor], biased: bool
) -> Tensor:
    """output gate * tanh(cell), the input of `weight_hr` of an LSTM with projections."""
    bias_ih, bias_hh = own[2:4] if biased else (None, None)
    gates = F.linear(rows, own[0], bias_ih) + F.linear(_previous(hidden, sizes, start[0][0]), own[1], bias_hh)
    i, f, g, o = gates.chunk(4, dim=1)
    fresh, cell, cells, offset = i.sigmoid() * g.tanh(), start[1][0], [], 0
    for n in sizes.tolist():
        step = slice(offset, offset + n)
        cell = f[step].sigmoid() * cell[:n] + fresh[step]
        cells.append(cell)
        offset += n
    return o.sigmoid() * torch.cat(cells).tanh()
