"""nn.LSTM, nn.GRU and nn.RNN of one sample, written over time in operators that vmap batches (no fused RNN has a rule).

LSTM: i, f, g, o = W_ih x_t + b_ih + W_hh h + b_hh;  c = s(f) c + s(i) tanh(g);  h = s(o) tanh(c)
GRU:  r, z from both sums;  n = tanh(W_in x + b_in + r (W_hn h + b_hn));  h = (1 - z) n + z h
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .errors import CompileRefused

aten = torch.ops.aten
State = tuple[Tensor, ...]


def _lstm_cell(gates: Tensor, state: State, w: Tensor, b: Any, projection: Any) -> State:
    h, c = state
    i, f, g, o = (gates + linear(h, w, b)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if projection is None else linear(h, projection)), c


def _gru_cell(gates: Tensor, state: State, w: Tensor, b: Any, projection: Any) -> State:
    (h,) = state
    ir, iz, inew = gates.chunk(3, -1)
    hr, hz, hnew = linear(h, w, b).chunk(3, -1)
    z = torch.sigmoid(iz + hz)
    n = torch.tanh(inew + torch.sigmoid(ir + hr) * hnew)
    return (n + z * (h - n),)


def _simple_cell(activation: Callable[[Tensor], Tensor]) -> Callable[..., State]:
    def cell(gates: Tensor, state: State, w: Tensor, b: Any, projection: Any) -> State:
        return (activation(gates + linear(state[0], w, b)),)

    return cell


def _run(
    cell: Any,
    x: Tensor,
    hx: State,
    params: Any,
    biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
    noises: Sequence[Tensor] = (),
) -> Any:
    """x [T, N, C] (or [N, T, C]); returns the output sequence and the last state of every layer and direction.

    The output of each layer but the last is multiplied by its ``noises`` [T, N, C'], if there are any.
    """
    if batch_first:
        x = x.transpose(0, 1)
    directions = 2 if bidirectional else 1
    each = len(params) // (layers * directions)
    weights: Iterator[Any] = iter(params)
    finals: list[State] = []
    for layer in range(layers):
        sides = []
        for direction in range(directions):
            own = [next(weights) for _ in range(each)]
            w_ih, w_hh, *rest = own
            b_ih, b_hh = (rest[0], rest[1]) if biases else (None, None)
            projection = own[-1] if each == (5 if biases else 3) else None
            at = layer * directions + direction
            state = tuple(h[at] for h in hx)
            gates = linear(x, w_ih, b_ih)
            steps = range(x.shape[0]) if direction == 0 else range(x.shape[0] - 1, -1, -1)
            outputs = []
            for t in steps:
                state = cell(gates[t], state, w_hh, b_hh, projection)
                outputs.append(state[0])
            sides.append(torch.stack(outputs if direction == 0 else outputs[::-1]))
            finals.append(state)
        x = sides[0] if directions == 1 else torch.cat(sides, -1)
        if layer < len(noises):
            x = x * noises[layer]
    last = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
    return (x.transpose(0, 1) if batch_first else x, *last)


def _rule(cell: Any) -> Callable[..., Any]:
    def rule(
        x: Tensor,
        hx: Any,
        params: Any,
        biases: bool,
        layers: int,
        dropout: float,
        train: bool,
        both: bool,
        first: bool,
        noises: Sequence[Tensor] = (),
    ) -> Any:
        if train and dropout and layers - 1 != len(noises):
            raise CompileRefused(
                f"A recurrent net of {layers} layers is in train mode with dropout {dropout}, and its random numbers are not "
                "inputs of the graph. Call its .eval(), or compile with dropout=True."
            )
        state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        return _run(cell, x, state, params, biases, layers, both, first, noises)

    return rule


def _cell(cell: Any) -> Callable[..., Any]:
    def rule(x: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Any:
        state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        new = cell(linear(x, w_ih, b_ih), state, w_hh, b_hh, None)
        return new[0] if isinstance(hx, Tensor) else new

    return rule


# One step each, so nothing is unrolled: functorch has no rule for the fused cells.
CELLS: dict[Any, Callable[..., Any]] = {
    aten.lstm_cell.default: _cell(_lstm_cell),
    aten.gru_cell.default: _cell(_gru_cell),
    aten.rnn_tanh_cell.default: _cell(_simple_cell(torch.tanh)),
    aten.rnn_relu_cell.default: _cell(_simple_cell(torch.relu)),
}
RULES: dict[Any, Callable[..., Any]] = {
    aten.lstm.input: _rule(_lstm_cell),
    aten.gru.input: _rule(_gru_cell),
    aten.rnn_tanh.input: _rule(_simple_cell(torch.tanh)),
    aten.rnn_relu.input: _rule(_simple_cell(torch.relu)),
}
