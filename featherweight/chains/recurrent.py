"""Recurrent layers whose weights are chains of linear ones.

Where only the first layer's inputs are factored, torch's own layer does the rest, on fewer inputs: `Projected`. All
else is a loop over time steps: `FactoredRecurrent`, `FactoredCell`. They take and give what torch's layers do, for
inference: dropout between layers is left out.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from featherweight.chains.layers import linears
from featherweight.layers import View
from featherweight.stages import Chain, weights_of
from featherweight.weights import Factors

Chained: TypeAlias = Mapping[str, tuple[Factors, View, Chain]]
"""By the name of a parameter of the layer: what is to run as a chain."""

State: TypeAlias = tuple[Tensor, ...]  # hidden, and for an LSTM the cell


def recurrent(layer: Any, chained: Chained) -> nn.Module:
    """The recurrent layer or cell, with these of its weights as chains."""
    simple = set(chained) <= {"weight_ih", "weight_ih_l0"} and not getattr(layer, "bidirectional", False)
    kind = Projected if simple else FactoredCell if isinstance(layer, nn.RNNCellBase) else FactoredRecurrent
    return kind(layer, chained).train(layer.training)


@final
class Projected(nn.Module):
    """reduce: linear layers to the rank. rnn: torch's layer on what they give."""

    def __init__(self, layer: Any, chained: Chained) -> None:
        super().__init__()
        ((name, own),) = chained.items()
        *before, last = weights_of(*own)
        like = getattr(layer, name)
        self.reduce = nn.Sequential(*linears(before, like, None))
        self.rnn = _plain(layer, last.shape[1])
        with torch.no_grad():
            for own_name, parameter in self.rnn.named_parameters():
                parameter.copy_(last if own_name == name else layer.get_parameter(own_name))
                parameter.requires_grad_(layer.get_parameter(own_name).requires_grad)

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        return self.rnn(_rows_changed(input, self.reduce), hx)

    def flatten_parameters(self) -> None:
        """As torch's layers have it."""
        if isinstance(self.rnn, nn.RNNBase):
            self.rnn.flatten_parameters()


def _plain(layer: Any, inputs: int) -> Any:
    """A layer of torch like this one, with so many inputs."""
    like = next(layer.parameters())
    where = {"dtype": like.dtype, "bias": layer.bias}
    if isinstance(layer, nn.RNNCellBase):
        more = {"nonlinearity": layer.nonlinearity} if isinstance(layer, nn.RNNCell) else {}
        kind = next(k for k in (nn.LSTMCell, nn.GRUCell, nn.RNNCell) if isinstance(layer, k))
        return _unset(kind, like.device, inputs, layer.hidden_size, **where, **more)
    more = {"num_layers": layer.num_layers, "batch_first": layer.batch_first, "dropout": layer.dropout}
    if isinstance(layer, nn.RNN):
        more["nonlinearity"] = layer.nonlinearity
    if isinstance(layer, nn.LSTM):
        more["proj_size"] = layer.proj_size
    kind = next(k for k in (nn.LSTM, nn.GRU, nn.RNN) if isinstance(layer, k))
    return _unset(kind, like.device, inputs, layer.hidden_size, **where, **more)


def _unset(kind: Any, device: torch.device, *args: Any, **kwargs: Any) -> Any:
    """A module whose parameters are yet to be filled; `skip_init` does not know recurrent layers."""
    return kind(*args, **kwargs, device="meta").to_empty(device=device)


def _rows_changed(x: Tensor | PackedSequence, change: nn.Module) -> Any:
    return x._replace(data=change(x.data)) if isinstance(x, PackedSequence) else change(x)


# ---------------------------------------------------------------- one step
@final
class _Step(nn.Module):
    """The gates of one layer in one direction: `inputs` of all steps at once, then the state step by step."""

    def __init__(self, layer: Any, chained: Chained, suffix: str) -> None:
        super().__init__()
        self.gates = _gates(layer)
        self.ih = _multiplied(layer, chained, f"weight_ih{suffix}", f"bias_ih{suffix}")
        self.hh = _multiplied(layer, chained, f"weight_hh{suffix}", f"bias_hh{suffix}")
        projected = f"weight_hr{suffix}" in layer._parameters
        self.hr = _multiplied(layer, chained, f"weight_hr{suffix}", "") if projected else nn.Identity()

    def forward(self, given: Tensor, state: State) -> State:
        """given: ih of the inputs, (rows, gates). The next state."""
        old, more = state[0], self.hh(state[0])
        if self.gates == "lstm":
            i, f, g, o = (given + more).chunk(4, dim=-1)
            cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            return self.hr(o.sigmoid() * cell.tanh()), cell
        if self.gates == "gru":
            (a, b, c), (r, z, n) = given.chunk(3, dim=-1), more.chunk(3, dim=-1)
            update, new = (b + z).sigmoid(), (c + (a + r).sigmoid() * n).tanh()
            return ((1 - update) * new + update * old,)
        total = given + more
        return (total.relu() if self.gates == "relu" else total.tanh(),)


def _gates(layer: Any) -> str:
    if isinstance(layer, nn.LSTM | nn.LSTMCell):
        return "lstm"
    return "gru" if isinstance(layer, nn.GRU | nn.GRUCell) else layer.nonlinearity


def _multiplied(layer: Any, chained: Chained, name: str, bias: str) -> nn.Module:
    """A product with this weight, as a chain or one linear layer."""
    like, added = layer.get_parameter(name), layer._parameters.get(bias)
    made = linears(weights_of(*chained[name]) if name in chained else [like.detach()], like, added)
    return nn.Sequential(*made) if name in chained else made[0]


@final
class FactoredCell(nn.Module):
    """Like nn.LSTMCell, nn.GRUCell and nn.RNNCell."""

    def __init__(self, layer: Any, chained: Chained) -> None:
        super().__init__()
        self.hidden_size, self.step = layer.hidden_size, _Step(layer, chained, "")

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        given, lstm = self.step.ih(input), self.step.gates == "lstm"
        if hx is None:
            hx = given.new_zeros(*given.shape[:-1], self.hidden_size)
            hx = (hx, hx) if lstm else hx
        state = self.step(given, tuple(hx) if lstm else (hx,))
        return state if lstm else state[0]


# ---------------------------------------------------------------- many steps
@final
class FactoredRecurrent(nn.Module):
    """Like nn.LSTM, nn.GRU and nn.RNN. Steps are kept as torch packs them: the rows of step t, as many as sequences are
    that long, longest first, behind those of step t - 1."""

    def __init__(self, layer: Any, chained: Chained) -> None:
        super().__init__()
        self.lstm, self.batch_first = isinstance(layer, nn.LSTM), layer.batch_first
        self.sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 1 + self.lstm]
        self.directions = 2 if layer.bidirectional else 1
        names = [f"_l{k}{side}" for k in range(layer.num_layers) for side in ("", "_reverse")[: self.directions]]
        self.steps = nn.ModuleList(_Step(layer, chained, name) for name in names)

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        states = None if hx is None else tuple(hx) if self.lstm else (hx,)
        rows, last = self._packed(input, states) if isinstance(input, PackedSequence) else self._whole(input, states)
        return rows, last if self.lstm else last[0]

    def flatten_parameters(self) -> None:
        """As torch's layers have it; there is nothing to do."""

    def _packed(self, x: PackedSequence, states: State | None) -> tuple[PackedSequence, State]:
        if states is not None and x.sorted_indices is not None:
            states = tuple(s.index_select(1, x.sorted_indices) for s in states)
        rows, last = self._run(x.data, x.batch_sizes.tolist(), states)
        if x.unsorted_indices is not None:
            last = tuple(s.index_select(1, x.unsorted_indices) for s in last)
        return x._replace(data=rows), last

    def _whole(self, x: Tensor, states: State | None) -> tuple[Tensor, State]:
        alone = x.ndim == 2
        x = x.unsqueeze(1) if alone else x.transpose(0, 1) if self.batch_first else x
        states = tuple(s.unsqueeze(1) for s in states) if states is not None and alone else states
        rows, last = self._run(x.flatten(0, 1), [x.shape[1]] * x.shape[0], states)
        y = rows.unflatten(0, (x.shape[0], x.shape[1]))
        if alone:
            return y.squeeze(1), tuple(s.squeeze(1) for s in last)
        return y.transpose(0, 1) if self.batch_first else y, last

    def _run(self, rows: Tensor, counts: list[int], states: State | None) -> tuple[Tensor, State]:
        """Outputs of the last layer, rows like the input's, and the last states, (layers x directions, batch, ...)."""
        last: list[State] = []
        for k in range(0, len(self.steps), self.directions):
            outputs = []
            for i in range(self.directions):
                step: Any = self.steps[k + i]
                order = backwards(counts).to(rows.device) if i else None
                given = step.ih(rows if order is None else rows[order])
                start = None if states is None else tuple(s[k + i] for s in states)
                state = start or tuple(given.new_zeros(counts[0], n) for n in self.sizes)
                found = []
                for part, n in zip(given.split(counts), counts, strict=True):
                    new = step(part, tuple(s[:n] for s in state))
                    state = tuple(torch.cat([a, s[n:]]) if n < len(s) else a for a, s in zip(new, state, strict=True))
                    found.append(new[0])
                own = torch.cat(found)
                outputs.append(own if order is None else own[order])  # to turn round twice is to leave alone
                last.append(state)
            rows = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
        return rows, tuple(torch.stack(s) for s in zip(*last, strict=True))


def backwards(counts: list[int]) -> Tensor:
    """The order of packed rows that turns every sequence back to front."""
    sizes = torch.tensor(counts)
    starts = sizes.cumsum(0) - sizes
    lengths = (sizes[:, None] > torch.arange(counts[0])).sum(0)
    return torch.cat([starts[lengths[:n] - 1 - t] + torch.arange(n) for t, n in enumerate(counts)])
