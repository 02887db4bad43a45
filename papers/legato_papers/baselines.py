"""The networks that the papers compare with, under the same contract as the layers. ``kinds.py`` gives them by name."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from legato._dtypes import carry_dtype
from legato._shapes import Tensor
from legato.layers.base import RecurrentLayer, StateShapes, positive_int


class LSTMState(NamedTuple):
    """Cell c and output h of an LSTM, each (B, hidden_size)."""

    cell: Tensor
    hidden: Tensor


class LSTM(RecurrentLayer[LSTMState]):
    """c_t = f_t c_{t-1} + i_t z_t, h_t = o_t tanh(c_t): PyTorch's LSTM, one layer, sequential over time.

    Args:
        input_size: channels of x.
        hidden_size: of the cell and of the output.
        return_sequences: True gives h_t at every step, False at the last step that counts.

    Raises:
        ValueError: ``reset`` is given, which PyTorch's LSTM has not.
    """

    State = LSTMState

    def __init__(self, input_size: int, hidden_size: int, *, return_sequences: bool = True) -> None:
        super().__init__(input_size)
        self.hidden_size = hidden_size
        self.return_sequences = return_sequences
        self.lstm = nn.LSTM(input_size, hidden_size, batch_first=True)

    def _state_shapes(self) -> StateShapes:
        return (self.lstm.hidden_size,), (self.lstm.hidden_size,)

    def _sequence(
        self, x: Tensor, state: Any, lengths: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, None, Any]:
        refuse_reset(reset)
        state = self.initial_state(len(x)) if state is None else state
        hidden, cell = state.hidden.to(x.dtype), state.cell.to(x.dtype)
        if 0 in x.shape[:2]:
            output = x.new_zeros(len(x), x.shape[1], self.hidden_size)
        elif lengths is None:
            output, (hidden, cell) = self._run(x, hidden, cell)
        else:
            output, (hidden, cell) = self._to_lengths(x, hidden, cell, lengths)
        if not self.return_sequences:
            output = hidden if x.shape[1] else torch.zeros_like(hidden)
        return output, None, LSTMState(*(part.to(self._carry_dtype()) for part in (cell, hidden)))

    def _run(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, (hidden, cell) = self.lstm(x, (hidden[None], cell[None]))
        return output, (hidden[0], cell[0])

    def _to_lengths(
        self, x: Tensor, hidden: Tensor, cell: Tensor, lengths: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """From one length that occurs to the next, with the rows that go on: on a CPU a tenth of a packed sequence's
        time, whose gradient is written anew at every step."""
        steps, order = x.shape[1], lengths.argsort(descending=True, stable=True)
        ends = sorted({*lengths.tolist(), steps})
        x, parts = x[order], [hidden[order], cell[order]]
        outputs, ended = [], []
        pieces = x.split([end - begin for begin, end in zip([0, *ends], ends, strict=False)], dim=1)
        for piece, end in zip(pieces, ends, strict=True):
            rows = int((lengths >= end).sum())
            ended.append([part[rows:] for part in parts])
            parts = [part[:rows] for part in parts]
            output = piece.new_zeros(0, piece.shape[1], self.hidden_size)
            if rows and piece.shape[1]:
                output, parts = self._run(piece[:rows], *parts)
            outputs.append(F.pad(output, (0, 0, 0, 0, 0, len(x) - len(output))))
        ended.append(parts)
        back = order.argsort()
        hidden, cell = (torch.cat(part)[back] for part in zip(*reversed(ended), strict=True))
        return torch.cat(outputs, dim=1)[back], (hidden, cell)


class TransformerState(NamedTuple):
    """Keys and values of the last ``window`` steps of every layer, (B, layers, 2, window, hidden_size), the newest at
    the end; and how many of them there are, (B,)."""

    memory: Tensor
    filled: Tensor


class Transformer(RecurrentLayer[TransformerState]):
    """x = x + W attention(norm(x)), x = x + MLP(norm(x)), ``layers`` times, then norm(x): a causal transformer.

    Each step attends to itself and to the ``window`` steps before it, so what it needs of the past is of one size, and
    it streams as the layers do. Positions are relative: queries and keys are turned by an angle for their position
    (rotary), of which a score sees the difference only. A sequence is worked on in blocks of ``window`` queries and
    2 * window keys: the cost is linear in the steps.

    Args:
        input_size: channels of x; a matrix takes them to hidden_size where that differs.
        hidden_size: channels of the network, a multiple of 2 * heads.
        layers: how many times attention and MLP.
        heads: of the attention.
        window: steps before it that a step sees in each layer.
        expansion: hidden units of the MLP, in hidden_size.
        dropout: of the attention's and the MLP's outputs in training.
        return_sequences: True gives every output, False that at the last step that counts.

    Raises:
        ValueError: ``reset`` is given; sizes that do not go together.

    Source: Vaswani et al. 2017; pre-norm after Xiong et al. 2020; rotary positions after Su et al. 2021; GELU units.
    """

    State = TransformerState

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        layers: int = 2,
        heads: int = 4,
        window: int = 128,
        expansion: int = 4,
        dropout: float = 0.0,
        return_sequences: bool = True,
    ) -> None:
        super().__init__(input_size)
        self.hidden_size = positive_int(hidden_size, "hidden_size")
        self.window = positive_int(window, "window")
        self.return_sequences = return_sequences
        self.embed = nn.Identity() if input_size == hidden_size else nn.Linear(input_size, hidden_size)
        self.blocks = nn.ModuleList(
            Block(hidden_size, positive_int(heads, "heads"), window, expansion, dropout)
            for _ in range(positive_int(layers, "layers"))
        )
        self.norm = nn.LayerNorm(hidden_size)

    def _state_shapes(self) -> StateShapes:
        return (len(self.blocks), 2, self.window, self.hidden_size), ()

    def _weight(self) -> Tensor:
        return self.norm.weight

    def _sequence(
        self, x: Tensor, state: Any, lengths: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, None, Any]:
        refuse_reset(reset)
        batch, steps, _ = x.shape
        state = self.initial_state(batch) if state is None else state
        if 0 in (batch, steps):
            return x.new_zeros(batch, *(steps,) * self.return_sequences, self.hidden_size), None, state
        # The state after L steps is what stands at L to L + window in the window before, followed by this chunk.
        ends = torch.full((batch,), steps, device=x.device) if lengths is None else lengths
        kept = (ends[:, None] + torch.arange(self.window, device=x.device))[:, None, :, None]  # (B, 1, window, 1)
        h, memory = self.embed(x), []
        for number, block in enumerate(self.blocks):
            h, past = block(h, state.memory[:, number], state.filled)
            memory.append(past.gather(2, kept.expand(-1, 2, -1, self.hidden_size)))
        if not self.return_sequences:
            h = h[torch.arange(batch, device=x.device), (ends - 1).clamp(min=0)]
        filled = (state.filled + ends).clamp(max=self.window)
        return self.norm(h), None, TransformerState(torch.stack(memory, 1).to(self._carry_dtype()), filled)


class Block(nn.Module):
    """One layer of a ``Transformer``: attention over a sliding window, then an MLP."""

    def __init__(self, size: int, heads: int, window: int, expansion: int, dropout: float) -> None:
        super().__init__()
        if size % (2 * heads):
            raise ValueError(f"expected hidden_size as a multiple of 2 * heads = {2 * heads}, got {size}")
        self.heads, self.window, self.dropout = heads, window, nn.Dropout(dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(2))
        self.read = nn.Linear(size, 3 * size)
        self.write = nn.Linear(size, size)
        self.mlp = nn.Sequential(nn.Linear(size, expansion * size), nn.GELU(), nn.Linear(expansion * size, size))

    def forward(self, x: Tensor, before: Tensor, filled: Tensor) -> tuple[Tensor, Tensor]:
        """The output, (B, T, C); and the keys and values before and of this chunk, (B, 2, window + T, C)."""
        queries, keys, values = self.read(self.norms[0](x)).chunk(3, dim=-1)
        past = torch.cat([before.to(x.dtype), torch.stack([keys, values], 1)], dim=2)
        x = x + self.dropout(self.write(self._attend(queries, past, filled)))
        return x + self.dropout(self.mlp(self.norms[1](x))), past

    def _attend(self, queries: Tensor, past: Tensor, filled: Tensor) -> Tensor:
        batch, steps, size = queries.shape
        length = min(self.window, steps)  # of a block of queries
        count = -(-steps // length)
        extra = count * length - steps
        queries = F.pad(queries, (0, 0, 0, extra)).view(batch, count, length, self.heads, -1).transpose(2, 3)
        past = F.pad(past, (0, 0, 0, extra)).unfold(2, self.window + length, length)  # (B, 2, count, C, keys)
        past = past.unflatten(3, (self.heads, -1)).mT  # (B, 2, count, heads, keys, c)
        keys, values = past.unbind(1)
        angles = _angles(self.window + length, size // self.heads, queries)
        of_query = torch.arange(length, device=queries.device)[:, None]
        of_key = torch.arange(self.window + length, device=queries.device)
        seen = (of_key >= of_query) & (of_key <= of_query + self.window)  # (queries, keys)
        slot = of_key + length * torch.arange(count, device=queries.device)[:, None]  # (count, keys), in ``past``
        absent = slot < (self.window - filled)[:, None, None]  # (B, count, keys): nothing has filled it
        mask = seen & ~absent[:, :, None, None]  # (B, count, 1, queries, keys)
        output = F.scaled_dot_product_attention(
            _turn(queries, angles[self.window :]), _turn(keys, angles), values, attn_mask=mask
        )
        return output.transpose(2, 3).reshape(batch, count * length, size)[:, :steps]


def refuse_reset(reset: Tensor | None) -> None:
    """Raise where a baseline is asked to drop its state inside a sequence."""
    if reset is not None:
        raise ValueError("this baseline takes sequences without resets: leave reset out")


def _angles(positions: int, size: int, like: Tensor) -> Tensor:
    """(positions, size / 2) angles, position * 10000^(-2 i / size), in float32 or wider."""
    dtype = carry_dtype(like.dtype)
    rates = 10_000 ** -(torch.arange(0, size, 2, device=like.device, dtype=dtype) / size)
    return torch.arange(positions, device=like.device)[:, None] * rates


def _turn(x: Tensor, angles: Tensor) -> Tensor:
    """Each pair of channels (i, i + size / 2) turned by its position's angle."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
