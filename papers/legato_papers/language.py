"""What every language-model recipe shares: how a long text is read in training and in evaluation, and the figures.

A text is one array of tokens. In training, readers start at random places each epoch and read on window by window,
their states carried over. In evaluation the text is cut into streams, each warmed up on what stands before it, and
every token counts once. Next: ``recipes/text8.py``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, log
from typing import Annotated, Any, cast

import numpy as np
import torch
from torch import nn

from legato._shapes import Int, Tensor
from legato.models import LanguageModel

from .ranges import Range
from .task import Batch, Examples, ExperimentError, Task, Training


@dataclass
class Reading(Training):
    """Trained by readers who start at random places each epoch and read on, window by window.

    Args:
        window: tokens that a reader reads between two updates.
    """

    batch_size: int = 32
    learning_rate: float = 4e-3
    warmup: float = 0.05
    max_norm: float | None = 1.0
    window: Annotated[int, Range(1, 10**6)] = 64


class Windows(Examples):
    """Windows of a text for training: (tokens, targets, positions), the targets one step on.

    Args:
        text: the tokens, one array of integers.
        batch_size: readers, each at a place of its own.
        window: tokens that a reader reads between two updates; the text is taken as a ring.
        updates: in an epoch that is not told how many; None is one pass over the text.

    Raises:
        ExperimentError: there is nothing to read.
    """

    def __init__(self, text: np.ndarray, batch_size: int, window: int, updates: int | None = None):
        if not len(text) or window < 1:
            raise ExperimentError(
                f"expected a token to train on and a window of 1 or more, got {len(text)} and {window}: take more of "
                "the text, or a longer window"
            )
        super().__init__(max(1, len(text) // window), batch_size, self._read)
        self.text, self.window, self.updates = text, window, updates

    def shuffled(self, seed: int, epoch: int, updates: int) -> Iterator[Tensor]:
        """Where every reader stands, update by update; no two epochs have a place in common.

        So no reader goes on from a state of the epoch before, which a resumed run does not have.
        """
        rounds = epoch * (2 + updates * self.window // len(self.text))
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        start = torch.randint(len(self.text), (self.batch_size,), generator=generator)
        for number in range(updates):
            yield start + rounds * len(self.text) + number * self.window

    def spread(self) -> Int[Tensor, "64 window"]:
        """The tokens of 64 windows from all over the text: what a network is calibrated on."""
        return self.take(torch.linspace(0, len(self.text), 64).long())[0]

    @property
    def updates_per_pass(self) -> int:
        return self.updates or max(1, self.size // self.batch_size)

    def _read(self, positions: Int[Tensor, "B"]) -> Batch:
        places = (positions.numpy()[:, None] + np.arange(self.window + 1)) % len(self.text)
        tokens = torch.from_numpy(self.text[places].astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:], positions


class Streams(Examples):
    """A text in ``count`` parts that are read side by side: (tokens, targets, counted), each (streams, steps).

    Args:
        text: the tokens to be predicted, each counted once.
        before: what stands before the text: every part is warmed up on ``warm_up`` tokens, the first one on these.
        count: parts.
        warm_up: tokens read before a part's first one counts.

    Raises:
        ExperimentError: there is nothing to predict.
    """

    def __init__(self, text: np.ndarray, before: np.ndarray, count: int, warm_up: int):
        if not len(text) or count < 1 or warm_up < 0:
            raise ExperimentError(
                "expected 1 token or more to predict, in 1 stream or more, with a warm-up of 0 or more, got "
                f"{len(text)}, {count} and {warm_up}: take more of the text, or set the others so"
            )
        count = min(count, len(text))
        super().__init__(count, count, self._read)
        self.length, self.warm_up, self.tokens = -(-len(text) // count), warm_up, len(text)
        before = before[-(warm_up + 1) :]
        lead, rest = warm_up + 1 - len(before), count * self.length - len(text)
        self.text = np.concatenate([np.zeros(lead, text.dtype), before, text, np.zeros(rest, text.dtype)])

    def _read(self, rows: Int[Tensor, "S"]) -> Batch:
        steps = np.arange(self.warm_up + self.length)
        places = rows.numpy()[:, None] * self.length + steps
        counted = (steps >= self.warm_up) & (places - self.warm_up < self.tokens)
        tokens, targets = (torch.from_numpy(self.text[at].astype(np.int32)) for at in (places, places + 1))
        return tokens, targets, torch.from_numpy(counted)


class LanguageTask(Task):
    """Predict the next token. A recipe sets the model, ``train`` to Windows and the others to Streams."""

    higher_is_better = False
    train: Windows  # pyright: ignore[reportIncompatibleVariableOverride]
    #: Steps of the streams that are evaluated at once. It changes nothing but time: few stay in a processor's cache.
    steps_at_once = 32

    def __init__(self) -> None:
        self.carried: tuple[Tensor, Any] | None = None

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        tokens, targets, positions = batch
        model = cast(LanguageModel, model)
        loss, state = model.loss(tokens, targets, self._state(model, positions))
        self.carried = positions + tokens.shape[1], _map(lambda tensor: tensor.detach(), state)
        return loss

    def totals(self, model: nn.Module, batch: Batch) -> Tensor:
        """[-log p in nats, tokens] over the tokens that count."""
        state, nats = None, []
        for tokens, targets, counted in zip(*(part.split(self.steps_at_once, 1) for part in batch), strict=True):
            log_p, state = cast(LanguageModel, model).score(tokens.long(), targets.long(), state)
            nats.append(-(log_p * counted).sum())
        return torch.stack([torch.stack(nats).double().sum(), batch[2].sum().double()])

    def metrics(self, totals: Tensor) -> dict[str, float]:
        nats, tokens = totals.tolist()
        if self.metric == "perplexity":
            return {"perplexity": exp(min(nats / tokens, 700.0))}
        return {"bits_per_character": nats / tokens / log(2)}

    def tokens(self, batch: Batch) -> int:
        return batch[0].numel()

    def _state(self, model: LanguageModel, positions: Tensor) -> Any:
        """That of the readers who go on where they stopped, zeros for those who start elsewhere."""
        if self.carried is None or len(self.carried[0]) != len(positions):
            return model.initial_state(len(positions))
        stopped, state = self.carried
        started = positions != stopped
        return _map(lambda tensor: tensor.masked_fill(started.view(-1, *[1] * (tensor.ndim - 1)), 0), state)


def _map(change: Any, state: Any) -> Any:
    """A state with every tensor in it changed."""
    if isinstance(state, Tensor):
        return change(state)
    parts = [_map(change, part) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
