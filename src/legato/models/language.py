"""Language models around any layer of the library: next-token probabilities and generation."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Generic, cast

import torch
import torch.nn.functional as F
from torch import nn

from legato._checks import positive_int, real_number, whole_number
from legato._dtypes import carry_dtype
from legato._modes import evaluating
from legato._shapes import Float, Int, Tensor
from legato.layers._states import StateT, check_states
from legato.layers.base import Activation, RecurrentLayer, activation_function, check_layer, zero_padding
from legato.layers.highway import Highway

from .embedding import Embedding, LockedDropout, indices, without_padding


class LanguageModel(nn.Module):
    """log p(x_{t+1} | x_1 ... x_t) = log softmax(V y_t + b).

    h_0 = E x;  h_k = highways(f(W m_k + b)), m_k = layer_k(h_{k-1});  y = highways(sum_k w_k h_k), w learned.

    Each block has a recurrent layer, a dense layer and highway layers. Only the recurrent layers
    combine time steps, so the network can be run as a stream: ``step`` and ``generate`` store the
    states of the layers, whose size does not depend on the length of the text.

    Args:
        embedding: E; it also sets the size of the vocabulary.
        layers: the recurrent layers: a function from ``hidden_size`` to a layer with that
            input_size, called once per block, or a sequence of layers, one per block.
        num_layers: number of blocks, if ``layers`` is a function.
        hidden_size: channels of every h; None is the width of the embedding. If the two differ, a
            linear layer maps the embedding to ``hidden_size`` channels.
        dense: whether to use W, b and f; with False, the layer must have ``hidden_size`` outputs.
        activation: f, and the activation of the highways, a name or a callable.
        highways: number of highway layers in each block.
        top_highways: number of highway layers above the sum; None is as many as in a block.
        gate_bias: initial gate bias of the highways.
        tied: use E as V, with the plain softmax; if the embedding has another width, a linear layer
            maps y to it.
        output: None for a plain softmax; else a function (channels, vocabulary size) -> module, where
            ``module(features)`` of (R, channels) gives log p of all tokens, (R, vocabulary), and
            ``module(features, targets)`` log p of the targets, (R,): such as a hierarchical or
            sampled softmax.
        dropout: fraction of the channels of every h_k and of y that is dropped in training, the
            same channels at every step.

    Shapes: tokens (B, T) of int64; log-probabilities (B, T, vocabulary); state a tuple of the layers' states.

    Raises:
        ValueError: sizes or options that do not fit together.

    Example:
        >>> import torch
        >>> from legato import LMU
        >>> make = lambda size: LMU(size, size, memory_size=size, order=5, theta=10)
        >>> model = LanguageModel(Embedding(27, 32), make, num_layers=5)
        >>> log_p, state = model(torch.randint(27, (2, 100)))
        >>> log_p.shape
        torch.Size([2, 100, 27])
        >>> model.generate(torch.randint(27, (2, 10)), 50).shape
        torch.Size([2, 50])

    Source: Chilkuri & Eliasmith 2021, supplement, figure 2: five blocks with three highways each. w
    is initially 1 / (number of blocks + 1), so the sum is the mean of all h_k.
    """

    def __init__(
        self,
        embedding: Embedding,
        layers: Callable[[int], RecurrentLayer] | Sequence[RecurrentLayer],
        *,
        num_layers: int = 5,
        hidden_size: int | None = None,
        dense: bool = True,
        activation: Activation = "relu",
        highways: int = 3,
        top_highways: int | None = None,
        gate_bias: float = -1.0,
        tied: bool = False,
        output: Callable[[int, int], nn.Module] | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        width = embedding.embedding_dim
        self.hidden_size = size = width if hidden_size is None else positive_int(hidden_size, "hidden_size")
        if not isinstance(layers, Sequence):
            layers = [layers(size) for _ in range(positive_int(num_layers, "num_layers"))]
        _check_layers(layers, size, dense)
        self.embedding = embedding
        where: dict[str, Any] = {"device": embedding.weight.device, "dtype": embedding.weight.dtype}
        self.into = nn.Linear(width, size, **where) if width != size else nn.Identity()
        highways = whole_number(highways, "highways")
        rows = {"highways": highways, "activation": activation, "gate_bias": gate_bias, **where}
        self.blocks = nn.ModuleList(_Block(layer, size, dense, **rows) for layer in layers)
        self.depths = nn.Parameter(torch.empty(len(layers) + 1, **where))  # w
        top = highways if top_highways is None else whole_number(top_highways, "top_highways")
        options = {"activation": activation, "gate_bias": gate_bias, **where}
        self.top = nn.Sequential(*(Highway(size, **options) for _ in range(top)))
        self.dropout = LockedDropout(dropout)
        self.tied = bool(tied)
        if output is not None and self.tied:
            raise ValueError("tied=True cannot be combined with output: drop one of them")
        self.output = _Softmax(embedding, size, self.tied) if output is None else output(size, embedding.num_embeddings)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set w to its initial value; the sub-modules have their own ``reset_parameters``."""
        self.depths.fill_(1 / len(self.depths))

    def forward(
        self, tokens: Int[Tensor, "B T"], state: Sequence[Any] | None = None, *, lengths: Int[Tensor, "B"] | None = None
    ) -> tuple[Float[Tensor, "B T V"], tuple[Any, ...]]:
        """log p of every token at the step after each, and the state after the last valid step.

        Args:
            tokens: (B, T), from 0 to below the size of the vocabulary; from ``lengths`` on any
                value, such as -1.
            state: returned by an earlier call or by ``initial_state``; None at the start of a text.
            lengths: number of valid steps of each row; log p is zero from there on.

        Raises:
            ValueError: a token outside the vocabulary, a state of another network, lengths beyond T.
        """
        features, state = self.features(tokens, state, lengths=lengths)
        log_p = self.output(features.flatten(0, 1)).unflatten(0, tokens.shape)
        return (log_p if lengths is None else zero_padding(log_p, lengths)), state

    def features(
        self, tokens: Int[Tensor, "B T"], state: Sequence[Any] | None = None, *, lengths: Int[Tensor, "B"] | None = None
    ) -> tuple[Float[Tensor, "B T C"], tuple[Any, ...]]:
        """y, the input of the softmax, and the state: features for a classifier."""
        tokens = without_padding("tokens", self._checked_tokens("tokens", tokens, 2), lengths)
        h = self.dropout(self.into(self.embedding(tokens)))
        total, states = self.depths[0] * h, []
        for weight, block, old in zip(self.depths[1:], self.blocks, self._states(state), strict=True):
            h, new = block(h, old, lengths)
            h = self.dropout(h)
            total = total + weight * h
            states.append(new)
        y = self.dropout(self.top(total))
        return (y if lengths is None else zero_padding(y, lengths)), tuple(states)

    def score(
        self,
        tokens: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"],
        state: Sequence[Any] | None = None,
        *,
        lengths: Int[Tensor, "B"] | None = None,
    ) -> tuple[Float[Tensor, "B T"], tuple[Any, ...]]:
        """log p of ``targets``, the next token of each step, and the state; zero in the padding.

        The softmax is not computed from ``lengths`` on: ``tokens`` and ``targets`` may have any
        value there, such as -1 and -100. A custom ``output`` may compute only the targets' part of
        the vocabulary.
        """
        tokens = self._checked_tokens("tokens", tokens, 2)
        targets = without_padding("targets", self._checked_tokens("targets", targets, 2), lengths)
        # On the CPU only: on a GPU, reading values waits for all earlier work, and torch checks
        # them.
        if targets.device.type == "cpu" and targets.numel() and not torch.compiler.is_compiling():
            low, high = (int(value) for value in torch.aminmax(targets))
            if low < 0 or high >= self.embedding.num_embeddings:
                raise ValueError(
                    f"expected targets from 0 to {self.embedding.num_embeddings - 1}, got {low} to {high}: "
                    "encode the text with the vocabulary of this model"
                )
        features, state = self.features(tokens, state, lengths=lengths)
        if lengths is None:
            return self.output(features.flatten(0, 1), targets.flatten()).view(targets.shape), state
        valid = torch.arange(tokens.shape[1], device=tokens.device) < lengths.to(tokens.device, torch.int64)[:, None]
        log_p = self.output(features[valid], targets[valid])
        return torch.zeros(tokens.shape, dtype=log_p.dtype, device=log_p.device).masked_scatter(valid, log_p), state

    def loss(
        self,
        tokens: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"],
        state: Sequence[Any] | None = None,
        *,
        lengths: Int[Tensor, "B"] | None = None,
    ) -> tuple[Float[Tensor, ""], tuple[Any, ...]]:
        """Mean of -log p(target) in nats over all valid steps, and the state; see ``score``."""
        log_p, state = self.score(tokens, targets, state, lengths=lengths)
        steps = log_p.numel() if lengths is None else lengths.to(torch.int64).sum().clamp(min=1)
        return -log_p.sum() / steps, state

    def step(self, token: Int[Tensor, "B"], state: Sequence[Any]) -> tuple[Float[Tensor, "B V"], tuple[Any, ...]]:
        """log p of every token after this one, and the state; for use in ``eval`` mode."""
        token = self._checked_tokens("token", token, 1)
        h = self.into(self.embedding(token))
        total, states = self.depths[0] * h, []
        for weight, block, old in zip(self.depths[1:], self.blocks, self._states(state), strict=True):
            h, new = cast(_Block, block).step(h, old)
            total = total + weight * h
            states.append(new)
        return self.output(self.top(total)), tuple(states)

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Any, ...]:
        """The state before a text: the initial state of every layer."""
        return tuple(layer.initial_state(batch_size, device=device, dtype=dtype) for layer in self.layers)

    @torch.no_grad()
    def generate(
        self,
        prompt: Int[Tensor, "B T"],
        steps: int,
        *,
        temperature: float | int = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "B steps"]:
        """The ``steps`` tokens after ``prompt``, drawn in proportion to p^(1 / temperature).

        The memory does not grow with ``steps``, apart from the result.

        Args:
            prompt: (B, T), T at least 1; processed in one parallel pass, followed by calls of
                ``step``.
            steps: 0 or more.
            temperature: 0 takes the most probable token; 1 draws from the model's distribution.
            top_k: draw among that many most probable tokens only.
            generator: the random number generator, on the device of the model.

        Raises:
            ValueError: an empty prompt, a temperature below 0, a top_k below 1.
        """
        prompt = self._checked_tokens("prompt", prompt, 2).to(torch.int64)
        if prompt.shape[1] == 0:
            raise ValueError(f"expected a prompt of T at least 1, got {tuple(prompt.shape)}: pass at least one token")
        steps, temperature = whole_number(steps, "steps"), real_number(temperature, "temperature")
        top_k = None if top_k is None else positive_int(top_k, "top_k")
        if temperature < 0:
            raise ValueError(f"expected temperature of at least 0, got {temperature}: 0 takes the most probable token")
        with evaluating(self):
            features, state = self.features(prompt)
            log_p, drawn = self.output(features[:, -1]), []
            for number in range(steps):
                if number:
                    log_p, state = self.step(drawn[-1], state)
                drawn.append(_draw(log_p, temperature, top_k, generator))
        return torch.stack(drawn, 1) if drawn else prompt[:, :0]

    @property
    def layers(self) -> list[RecurrentLayer]:
        """The recurrent layers, from the lowest block to the highest."""
        return [cast(_Block, block).layer for block in self.blocks]

    @torch.no_grad()
    def calibrate(self, tokens: Int[Tensor, "B T"], *, lengths: Int[Tensor, "B"] | None = None) -> None:
        """``RecurrentLayer.calibrate`` for every layer on these texts, from the first block to the last."""
        tokens = without_padding("tokens", self._checked_tokens("tokens", tokens, 2), lengths)
        with evaluating(self):
            h = self.into(self.embedding(tokens))
            for layer, block in zip(self.layers, self.blocks, strict=True):
                layer.calibrate(h, lengths=lengths)
                h, _ = block(h, None, lengths)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.tied:  # to_empty, from the meta device, makes two parameters out of a shared one
            self.output.weight = self.embedding.weight
        return self

    def _states(self, state: Sequence[Any] | None) -> tuple[Any, ...]:
        if state is None:
            return (None,) * len(self.blocks)
        check_states(state, len(self.blocks), "one per block", "model")
        return tuple(state)

    def _checked_tokens(self, name: str, tokens: Tensor, ndim: int) -> Tensor:
        tokens = indices(name, tokens)
        if tokens.ndim != ndim:
            axes = "(B, T)" if ndim == 2 else "(B,)"
            raise ValueError(f"expected {name} of shape {axes}, got {tuple(tokens.shape)}: encode the text first")
        return tokens


class _Block(nn.Module, Generic[StateT]):
    """h' = highways(f(W layer(h) + b)), or highways(layer(h)) without ``dense``."""

    def __init__(
        self,
        layer: RecurrentLayer[StateT],
        size: int,
        dense: bool,
        highways: int,
        activation: Any,
        gate_bias: float,
        **where: Any,
    ):
        super().__init__()
        self.layer = layer
        self.dense = nn.Linear(_width(layer), size, **where) if dense else None
        self.activation = activation
        options = {"activation": activation, "gate_bias": gate_bias, **where}
        self.highways = nn.Sequential(*(Highway(size, **options) for _ in range(highways)))

    def forward(self, x: Tensor, state: StateT | None, lengths: Tensor | None) -> tuple[Tensor, StateT]:
        output, new = self.layer(x, state, lengths=lengths)
        return self._read(output.flatten(2)), new

    def step(self, x_t: Tensor, state: StateT) -> tuple[Tensor, StateT]:
        output_t, state = self.layer.step(x_t, state)
        return self._read(output_t.flatten(1)), state

    def _read(self, output: Tensor) -> Tensor:
        if self.dense is not None:
            f = activation_function(self.activation)
            output = self.dense(output) if f is None else f(self.dense(output))
        return self.highways(output)


class _Softmax(nn.Module):
    """Plain softmax over V y + b; V is the weight of the embedding if ``tied``."""

    def __init__(self, embedding: Embedding, size: int, tied: bool):
        super().__init__()
        where: dict[str, Any] = {"device": embedding.weight.device, "dtype": embedding.weight.dtype}
        width = embedding.embedding_dim if tied else size
        self.into = nn.Linear(size, width, **where) if width != size else nn.Identity()
        self.tied = tied
        self.weight = embedding.weight if tied else nn.Parameter(torch.empty(embedding.num_embeddings, width, **where))
        self.bias = nn.Parameter(torch.empty(embedding.num_embeddings, **where))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw V again, unless it is the weight of the embedding, and set b to zero."""
        if not self.tied:
            bound = self.weight.shape[1] ** -0.5
            self.weight.uniform_(-bound, bound)
        self.bias.zero_()

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        """log p of the targets, or of all tokens."""
        if targets is None:
            return self.log_prob(features)
        # No target is ignored: with torch's default, a target of -100 would have probability 1.
        options = {"reduction": "none", "ignore_index": torch.iinfo(torch.int64).min}
        return -F.cross_entropy(
            self._scores(features).to(carry_dtype(features.dtype)), targets.to(torch.int64), **options
        )

    def log_prob(self, features: Tensor) -> Tensor:
        return F.log_softmax(self._scores(features), dim=-1, dtype=carry_dtype(features.dtype))

    def _scores(self, features: Tensor) -> Tensor:
        return F.linear(self.into(features), self.weight, self.bias)


def _check_layers(layers: Sequence[RecurrentLayer], size: int, dense: bool) -> None:
    if not layers:
        raise ValueError("expected at least one block, got none: pass at least one layer")
    for number, layer in enumerate(layers):
        check_layer(layer, f"the layer of block {number}")
        if layer.bidirectional or not layer.return_sequences:
            raise ValueError(
                f"expected block {number} to have a layer that returns an output at every step and does "
                f"not read later steps, got {type(layer).__name__}: build it with return_sequences=True "
                "and not bidirectional"
            )
        if layer.input_size != size or not (dense or _width(layer) == size):
            raise ValueError(
                f"expected the layer of block {number} to take {size} channels"
                + ("" if dense else f" and to return {size}, because there is no dense layer above it")
                + f", got {layer.input_size} and {_width(layer)}: make them equal"
            )


def _draw(log_p: Tensor, temperature: float | int, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token per row, (B,)."""
    if temperature == 0:
        return log_p.argmax(-1)
    if top_k is not None and top_k < log_p.shape[-1]:
        least = log_p.topk(top_k, dim=-1).values[:, -1:]
        log_p = log_p.masked_fill(log_p < least, -torch.inf)
    return torch.multinomial((log_p / temperature).softmax(-1), 1, generator=generator)[:, 0]


def _width(layer: RecurrentLayer) -> int:
    size = layer.output_size
    return size if isinstance(size, int) else prod(size)
