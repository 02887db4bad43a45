"""The networks that the papers compare with, under the same contract as the layers."""

from typing import Any, NamedTuple

from torch import nn

from legato._shapes import Tensor
from legato.layers._base import RecurrentLayer


class LSTMState(NamedTuple):
    """Cell c and output h of an LSTM, each (B, hidden_size)."""

    cell: Tensor
    hidden: Tensor


class LSTM(RecurrentLayer):
    """c_t = f_t c_{t-1} + i_t z_t, h_t = o_t tanh(c_t): PyTorch's LSTM, one layer, sequential over time."""

    State = LSTMState

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size)
        self.hidden_size = hidden_size
        self.lstm = nn.LSTM(input_size, hidden_size, batch_first=True)

    def _state_shapes(self) -> LSTMState:
        return LSTMState(*[(self.lstm.hidden_size,)] * 2)  # type: ignore[arg-type]

    def _sequence(self, x: Tensor, state: Any, lengths: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Any]:
        if lengths is not None or reset is not None:
            raise ValueError("this baseline takes sequences of one length without resets: leave lengths and reset out")
        start = None if state is None else (state.hidden[None], state.cell[None])
        output, (hidden, cell) = self.lstm(x, start)
        return output, LSTMState(cell[0], hidden[0])
