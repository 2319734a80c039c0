"""What each kind of weight is multiplied with, step by step from the definition of the layers.

Every function returns blocks of columns, one (cols, samples) tensor for each row block of the weight.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

_PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


def moments(blocks: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[int]]:
    """Second moments, means and sample counts of blocks of columns."""
    gram = [sum(torch.outer(x, x) for x in block.T) / block.shape[1] for block in blocks]
    return torch.stack(gram), torch.stack([b.mean(dim=1) for b in blocks]), [b.shape[1] for b in blocks]


# ---------------------------------------------------------------- convolutions
def conv_inputs(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The values under each tap of the kernel at each position of the output."""
    taps, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    x = x if x.ndim == len(taps) + 2 else x[None]
    reach = [d * (k - 1) for d, k in zip(dilation, taps, strict=True)]
    match layer.padding:
        case "same":
            pads = [(r // 2, r - r // 2) for r in reach]
        case "valid":
            pads = [(0, 0) for _ in reach]
        case sizes:
            pads = [(p, p) for p in sizes]
    padded = np.pad(x.numpy(), [(0, 0), (0, 0), *pads], _PAD_MODES[layer.padding_mode])
    sizes = [(n - r - 1) // s + 1 for n, r, s in zip(padded.shape[2:], reach, stride, strict=True)]

    def under(tap: tuple[int, ...], position: tuple[int, ...]) -> np.ndarray:
        at = (o * s + t * d for o, s, t, d in zip(position, stride, tap, dilation, strict=True))
        return padded[(slice(None), slice(None), *at)]

    return _gather(under, taps, sizes, layer.groups)


def conv_transpose_inputs(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Output o is fed through tap t by the input i with i * stride + t * dilation = o + padding, if there is one."""
    taps, stride, dilation, padding = layer.kernel_size, layer.stride, layer.dilation, layer.padding
    x = x if x.ndim == len(taps) + 2 else x[None]
    values, space = x.numpy(), x.shape[2:]
    geometry = zip(space, stride, padding, dilation, taps, layer.output_padding, strict=True)
    sizes = [(n - 1) * s - 2 * p + d * (k - 1) + extra + 1 for n, s, p, d, k, extra in geometry]

    def under(tap: tuple[int, ...], position: tuple[int, ...]) -> np.ndarray:
        at = [o + p - t * d for o, p, t, d in zip(position, padding, tap, dilation, strict=True)]
        if any(i % s or not 0 <= i // s < n for i, s, n in zip(at, stride, space, strict=True)):
            return np.zeros_like(values[(slice(None), slice(None), *(0 for _ in taps))])
        return values[(slice(None), slice(None), *(i // s for i, s in zip(at, stride, strict=True)))]

    return _gather(under, taps, sizes, layer.groups)


def _gather(under, taps: Sequence[int], sizes: Sequence[int], groups: int) -> list[Tensor]:
    """Columns in the order (channel of the group, tap) of (batch, channels) values `under(tap, position)`."""
    table = np.stack([[under(tap, at) for tap in np.ndindex(*taps)] for at in np.ndindex(*sizes)])
    positions, size, batch, channels = table.shape
    columns = torch.from_numpy(table).permute(3, 1, 0, 2).reshape(channels * size, positions * batch)
    return list(columns.chunk(groups))


# ---------------------------------------------------------------- recurrent layers
def recurrent_inputs(
    layer: nn.RNNBase, sequences: list[Tensor], state: tuple[Tensor, ...]
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Inputs of every weight, and the outputs, of a recurrent layer on sequences (steps, features).
    state: one (layers * directions, sequences, size) tensor, two for an LSTM."""
    own = dict(layer.named_parameters())
    seen: dict[str, list[Tensor]] = {name: [] for name in own if name.startswith("weight")}
    ends = ("", "_reverse") if layer.bidirectional else ("",)
    for level in range(layer.num_layers):
        outputs = []
        for b, sequence in enumerate(sequences):
            both = []
            for direction, end in enumerate(ends):
                suffix = f"_l{level}{end}"
                now = [s[level * len(ends) + direction, b] for s in state]
                hidden = []
                for x in sequence.flip(0) if direction else sequence:
                    seen["weight_ih" + suffix].append(x)
                    seen["weight_hh" + suffix].append(now[0])
                    now, unprojected = _step(layer, own, suffix, x, now)
                    if layer.proj_size:
                        seen["weight_hr" + suffix].append(unprojected)
                    hidden.append(now[0])
                both.append(torch.stack(hidden[::-1] if direction else hidden))
            outputs.append(torch.cat(both, dim=1))
        sequences = outputs
    return {name: [torch.stack(rows, dim=1)] for name, rows in seen.items()}, sequences


def _step(
    layer: nn.RNNBase, own: dict[str, Tensor], suffix: str, x: Tensor, state: list[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """The next state, and the hidden vector before its projection."""
    fed = own["weight_ih" + suffix] @ x + own.get("bias_ih" + suffix, 0)
    back = own["weight_hh" + suffix] @ state[0] + own.get("bias_hh" + suffix, 0)
    match layer.mode:
        case "RNN_TANH":
            h = (fed + back).tanh()
        case "RNN_RELU":
            h = (fed + back).clamp(min=0)
        case "GRU":
            (r, z, n), (hr, hz, hn) = fed.chunk(3), back.chunk(3)
            z = (z + hz).sigmoid()
            h = (1 - z) * (n + (r + hr).sigmoid() * hn).tanh() + z * state[0]
        case "LSTM":
            i, f, g, o = (fed + back).chunk(4)
            cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            h = o.sigmoid() * cell.tanh()
            return [own["weight_hr" + suffix] @ h if layer.proj_size else h, cell], h
    return [h], h


# ---------------------------------------------------------------- attention
def attention_inputs(
    layer: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
) -> tuple[dict[str, list[Tensor]], Tensor]:
    """Inputs of every weight, and the output, of softmax attention on (batch, length, width) tensors.
    mask: (queries, keys) and padding: (batch, keys), true where a query must not look."""
    columns = [x.flatten(0, 1).T for x in (query, key, value)]
    if layer.in_proj_weight is not None:
        seen, weights = {"in_proj_weight": columns}, layer.in_proj_weight.chunk(3)
    else:
        names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        seen = {name: [x] for name, x in zip(names, columns, strict=True)}
        weights = [getattr(layer, name) for name in names]
    biases = [0, 0, 0] if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    q, k, v = (x @ w.T + b for x, w, b in zip((query, key, value), weights, biases, strict=True))
    blocked = torch.zeros(len(q), q.shape[1], k.shape[1], dtype=torch.bool)
    if mask is not None:
        blocked |= mask
    if padding is not None:
        blocked |= padding[:, None, :]
    for extra_k, extra_v in _extra_keys(layer):
        k = torch.cat([k, extra_k.expand(len(k), 1, -1)], dim=1)
        v = torch.cat([v, extra_v.expand(len(v), 1, -1)], dim=1)
        blocked = torch.cat([blocked, torch.zeros_like(blocked[..., :1])], dim=2)
    heads = []
    for q_head, k_head, v_head in zip(*(x.chunk(layer.num_heads, dim=2) for x in (q, k, v)), strict=True):
        scores = (q_head @ k_head.mT / q_head.shape[2] ** 0.5).masked_fill(blocked, -torch.inf)
        heads.append(scores.softmax(dim=2) @ v_head)
    joined = torch.cat(heads, dim=2)
    seen["out_proj.weight"] = [joined.flatten(0, 1).T]
    return seen, layer.out_proj(joined)


def _extra_keys(layer: nn.MultiheadAttention) -> Iterator[tuple[Tensor, Tensor]]:
    if layer.bias_k is not None:
        yield layer.bias_k, layer.bias_v
    if layer.add_zero_attn:
        zero = torch.zeros(1, 1, layer.embed_dim, dtype=torch.float64)
        yield zero, zero
